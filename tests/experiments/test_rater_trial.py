"""The rubric on trial: measures equal references, groups are drawn whole, planted labels are found."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, pearsonr, rankdata, spearmanr

from psycopref.core.principles import principle_keys
from psycopref.core.paper import resource_path
from psycopref.core.settings import StudyError, load_profile
from psycopref.core.stages import stage_settings
from psycopref.corpus.labelled_text import ALL_SCORES, COMPARISONS, LABEL_COLUMNS, TITLES, Comparison, Labelled
from psycopref.experiments import rater_trial as trial
from psycopref.stats.scores import roc_auc

PRINCIPLE_KEYS = principle_keys()

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=60)
rows_of = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 3)), min_size=4, max_size=30)
PLANTED = Comparison("annomi", "open question, not closed", "binary", "planted", ("exploration",))
QUALITY, UPVOTES = "high-quality session", "more upvotes, same question"


@given(rows_of)
@QUICK
def test_weighted_measures_equal_the_references_on_repeated_rows(rows):
    score, label, times = (np.array(column, dtype=float) for column in zip(*rows))
    assume(times.sum())
    where = np.repeat(np.arange(len(score)), times.astype(int))
    assume(len(set(label[where])) == 2)
    assert trial.auc(score, label, times) == pytest.approx(roc_auc(score[where], label[where]), abs=1e-9)
    if len(set(score[where])) > 1:
        expected = spearmanr(score[where], label[where])[0]
        assert trial.spearman(score, label, times) == pytest.approx(expected, abs=1e-9)
    assert trial.pair_accuracy(score - 2, label, times) == pytest.approx(np.mean(score[where] > 2))


@pytest.mark.parametrize("kind", ["binary", "ordinal", "pair"])
def test_an_interval_holds_its_value_and_a_score_differs_from_itself_by_zero(kind):
    rng = np.random.default_rng(1)
    groups, label = np.repeat(np.arange(40), 3), rng.integers(0, 2, 120).astype(float)
    score = label + rng.normal(size=120)
    low, high = trial.measure_interval(kind, score, None, label, groups, 200, 7)
    assert low < trial.LABEL_MEASURES[kind][1](score, label, np.ones(120)) < high
    low, high = trial.measure_interval(kind, score, score, label, groups, 200, 7)
    assert low < 0 < high and high - low < 0.4


def test_rows_of_few_groups_have_wider_intervals():
    rng = np.random.default_rng(2)
    session = np.repeat(rng.normal(size=20), 20)
    frame = pd.DataFrame({name: session + 0.1 * rng.normal(size=400) for name in ALL_SCORES})
    frame = frame.assign(words=rng.integers(3, 30, 400), label=np.repeat(rng.integers(0, 2, 20), 20))
    groups = np.repeat(np.arange(20), 20), np.arange(400)
    whole, each = (trial.compare_with_length(PLANTED, frame.assign(group=g.astype(str)), 200, 0)[0] for g in groups)
    width = [one["value interval"][1] - one["value interval"][0] for one in (whole, each)]
    assert whole["value"] == each["value"] and width[0] > 2 * width[1]
    assert (whole["groups"], each["groups"]) == (20, 400)


SCORED = pd.DataFrame(np.random.default_rng(0).normal(size=(240, len(ALL_SCORES))), columns=list(ALL_SCORES))
SCORED["words"] = np.random.default_rng(1).integers(3, 40, 240).astype(float)
SCORED["group"] = [str(i // 4) for i in range(240)]


def compared(label, comparison=PLANTED, **columns):
    "Compare one score with the labels, and read the result."
    [one] = trial.compare_with_length(comparison, SCORED.assign(label=label, **columns), 200, 0)
    return one, trial._reading(one)


def test_planted_labels_are_found_and_length_is_not_mistaken_for_them():
    good, reading = compared((SCORED.exploration > 0).astype(float))
    assert good["value"] == 1 and good["length"] < 0.6 and reading == "above length"
    long, reading = compared((SCORED.words > 20).astype(float))
    assert (long["baseline"], long["length"], reading) == ("longer", 1, "below length")
    short, _ = compared((SCORED.words < 20).astype(float))
    assert (short["baseline"], short["length"]) == ("shorter", 1)
    alike, reading = compared((SCORED.words > 20).astype(float), exploration=SCORED.words)
    assert alike["difference"] == 0 and -0.1 < alike["difference interval"][0] < 0 and reading == "not told from length"


def test_lower_is_higher_turned_around():
    higher = Comparison("esconv", "suggestion, not another strategy", "binary", "planted", ("autonomy",))
    (up, _), (down, _) = (compared(np.tile([0.0, 1.0], 120), c) for c in (higher, replace(higher, expected="lower")))
    assert down["value"] == pytest.approx(1 - up["value"]) and down["length"] == up["length"]


def test_one_group_has_a_value_and_no_interval():
    one, reading = compared(np.tile([0.0, 1.0], 120), group="a")
    assert 0 <= one["value"] <= 1 and one["value interval"] is one["difference interval"] is None
    assert reading == "too few groups for an interval"


def labelled(rows, name="annomi", dropped=None):
    return Labelled(pd.DataFrame(rows, columns=list(LABEL_COLUMNS)), dropped or {}, {"source": name}, ())


def scorer(score, keys=PRINCIPLE_KEYS, asked=None):
    """Let a function of the response stand for every principle, or for some; list what is asked."""

    def found(clients, responses):
        (asked if asked is not None else []).extend(zip(clients, responses))
        rows = [{key: float(score(one)) if key in keys else 3.0 for key in PRINCIPLE_KEYS} for one in responses]
        return pd.DataFrame(rows, columns=list(PRINCIPLE_KEYS))

    return found


def results_of(own, score, samples=100):
    "Make the comparisons of a corpus with a scorer."
    scores = trial.score_texts(own.rows.context.tolist(), own.rows.text.tolist(), scorer(score))
    return trial.corpus_results(own, scores, samples, 0)


def test_a_session_is_one_observation():
    rows = [("I drink.", "x" * (1 + i + 3 * (s % 2)), QUALITY, s % 2, str(s)) for s in range(12) for i in range(3)]
    found = {c.unit: results for c, results, _ in results_of(labelled(rows), len) if results}
    assert [one["score"] for one in found["group"]] == list(ALL_SCORES)
    assert {one["n"] for one in found["response"]} == {36} and {one["n"] for one in found["group"]} == {12}
    assert {one["value"] for one in found["group"]} == {1.0}


def test_pairs_are_read_from_the_preferred_side():
    shouts = lambda response: response.count("!")
    texts = [("Yes! Go on", "No"), ("No", "Yes!"), ("Same", "Thing"), ("Oh! Well! So", "Hm!")] * 3
    rows = [("I worry.", text, UPVOTES, votes, i) for i, pair in enumerate(texts) for votes, text in zip((4, 2), pair)]
    more = rows + [("I worry.", "As many votes", UPVOTES, 4, i) for i in range(len(texts))]
    [(_, results, reason)] = results_of(labelled(more, "counsel-chat"), shouts)
    assert reason is None and results[0]["n"] == 24 and results[0]["groups"] == 12
    [(_, results, reason)] = results_of(labelled(rows, "counsel-chat"), shouts)
    assert reason is None and {one["value"] for one in results} == {0.5} and results[0]["n"] == 12
    assert results[0]["baseline"] == "longer" and results[0]["length"] == 0.5, "ties are no success"


def test_texts_are_scored_once():
    asked = []
    found = trial.score_texts(["a", "a", "b", "a"], ["x y", "x y", "x y", "z"], scorer(lambda response: 3, asked=asked))
    assert asked == [("a", "x y"), ("b", "x y"), ("a", "z")]
    assert found.words.tolist() == [2, 2, 2, 1] and set(found["mean"]) == {3.0}


def test_what_was_not_measured_is_empty_and_says_why():
    table = trial.corpus_table([])
    assert len(table) == len(COMPARISONS) and set(table.corpus) == set(TITLES.values())
    filled = [name for name in table.columns if table[name].notna().any()]
    assert filled == ["corpus", "construct", "compared with", "reading", "experts agree (κ)"] and set(
        table.reading
    ) == {trial.NOT_NAMED}
    ties = [("I drink.", f"So {i}.", UPVOTES, 0, 1) for i in range(4)]
    dropped = {"labels without a context": 3}
    nothing = trial.corpus_table(results_of(labelled(ties, "counsel-chat", dropped), len))
    [reading] = nothing.reading[nothing.corpus == "counsel-chat"]
    assert "nothing to compare" in reading and "3 labels without" in reading and nothing.rubric.isna().all()
    alike = labelled([("I drink.", f"So {i}.", QUALITY, 1, 1) for i in range(4)])
    readings = {reason for c, results, reason in results_of(alike, len) if c.construct == QUALITY}
    assert readings == {"not measured: all labels are alike"}


def test_the_packages_minimal_pairs_can_be_judged():
    pairs = trial.read_minimal_pairs()
    counts = pairs.groupby(["principle", "set"]).size().unstack()
    assert set(counts.index) == set(PRINCIPLE_KEYS) and (counts.sum(axis=1) >= 30).all() and (counts > 9).all().all()
    assert pairs.map(lambda value: isinstance(value, str) and bool(value.strip())).all(axis=None)
    assert pairs.id.is_unique and (pairs.better != pairs.worse).all() and set(pairs.set) == set(trial.SETS)


def test_the_minimal_table_counts_wins_ties_and_lengths():
    scores = {"good": 4.0, "bad": 2.0, "fine words here": 3.0, "other fine words": 3.0}
    sides = [("good", "bad"), ("bad", "good"), ("fine words here", "other fine words"), ("good", "fine words here")]
    pairs = pd.DataFrame(sides, columns=["better", "worse"]).assign(client="x", construct=["c0", "c1"] * 2)
    pairs = pairs.merge(pd.DataFrame({"principle": ["empathy", "safety"]}), how="cross")
    judged = trial.score_minimal_pairs(
        pairs.merge(pd.DataFrame({"set": trial.SETS}), how="cross"), scorer(scores.get, ["empathy"])
    )
    table = trial.minimal_table(judged).set_index(["set", "principle"])
    assert table.loc[("held-out", "empathy")].tolist() == [4, 50.0, "15.0 to 85.0", 25.0, 50.0, 0.0, 25.0]
    assert table.loc[("held-out", "safety"), "ties %"] == 100
    assert table.loc[("develop", "all, each on its own"), "n"] == 8
    assert trial.minimal_table(judged, "construct").n.sum() == len(judged)


def test_swapping_the_sides_turns_every_pair():
    pairs = trial.read_minimal_pairs().groupby("principle").head(3)
    turned = pairs.rename(columns={"better": "worse", "worse": "better"})
    forward, backward = (
        trial.score_minimal_pairs(frame, scorer(len))[["own", "mean", "words"]] for frame in (pairs, turned)
    )
    assert forward.equals(-backward)


def test_corpora_are_opened_before_anything_is_scored(tmp_path):
    for specs, told in (
        (("annomi=/a", "annomi=/b"), "more than once"),
        (("anomi=/a",), "not declared"),
        ((f"esconv={tmp_path}/none.json",), "no such file"),
    ):
        with pytest.raises(StudyError, match=told) as error:
            trial.open_corpora(specs)
        assert "\n" not in str(error.value)


def judged(right, longer, n=40):
    "Scored pairs of one principle, twice n: how many are right, and how often the longer answer is the better one."
    signs = {"own": right, "words": longer}
    signs = {name: [1.0] * plus + [-1.0] * (2 * n - plus) for name, plus in signs.items()}
    return pd.DataFrame({"set": ["held-out"] * n + ["develop"] * n, "principle": "empathy", "mean": 1.0} | signs)


@pytest.mark.parametrize("with_corpora", [False, True])
def test_the_figure_draws_what_there_is(with_corpora):
    one = compared(np.tile([0.0, 1.0], 120))[0] | {"heads": trial.OWN_HEADS}
    results = [(PLANTED, [one], None), (COMPARISONS[-1], [], "not measured")] if with_corpora else []
    figure = trial.trial_figure(trial.minimal_table(judged(38, 20)[:40]), results)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Minimal pairs", *["Labelled text"] * with_corpora]
    plt.close(figure)


@pytest.mark.parametrize(
    "right, longer, weak", [(38, 20, []), (22, 20, ["empathy"]), (38, 38, ["empathy"]), (38, 2, ["empathy"])]
)
def test_weak_principles_are_those_that_length_or_chance_explains(right, longer, weak):
    table = trial.minimal_table(judged(right, longer))
    assert trial.weak_principles(table) == weak
    said = trial.minimal_sentences(table)
    assert "On the 40 held-out pairs" in said[0] and f"in {100 * right / 40}%" in said[0]
    assert ("no evidence" if weak else "Every principle") in said[3]


def test_labelled_text_is_reported_only_where_it_was_measured():
    found = [compared(label.astype(float))[0] for label in (SCORED.exploration > 0, SCORED.words > 20)]
    found = [one | {"heads": trial.OWN_HEADS} for one in found]
    sentences = trial.corpus_sentences([(PLANTED, [one], None) for one in found])
    assert ", 2 comparisons" in sentences[0] and "above length: 1; below length: 1" in sentences[0]
    assert [trial.corpus_sentences(results) for results in ([], [(PLANTED, [], "all labels are alike")])] == [
        ["Not measured: no labelled corpus is named in `trial.corpora`."],
        ["Not measured: the corpora hold nothing to compare."],
    ]


def test_a_receipt_names_what_was_read(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text(",".join(LABEL_COLUMNS) + f'\nI drink.,So.,"{UPVOTES}",0,1\n,So.,"{UPVOTES}",0,1\n')
    corpora = trial.open_corpora((f"counsel-chat={path}",))
    facts = trial.trial_facts(trial.rubric_model(), judged(1, 1), corpora)
    assert len({one["identity"] for one in facts["models"].values()}) == 2
    facts = facts["corpora"]["counsel-chat"]
    assert (facts["labels"], facts["groups"], facts["source"]) == (1, 1, "counsel-chat")
    assert facts["dropped"] == corpora[0].dropped and sum(facts["dropped"].values()) == 1
    inputs = [path.name for path in trial.trial_inputs(corpora)]
    assert inputs == ["minimal_pairs.jsonl", "triples.jsonl", "sentences.jsonl", "clients.jsonl", "votes.csv"]
    assert trial.trial_size(range(3), corpora) == "3 minimal pairs, 1 labels of counsel-chat"


def test_the_stage_reads_its_own_settings():
    assert stage_settings(load_profile("tiny"), "12_trial") == {"trial": {"corpora": (), "bootstrap": 200}}


def test_at_equal_length_measures_are_the_references():
    rng = np.random.default_rng(3)
    words = rng.choice([10.0, 20.0, 30.0], 300)
    label, score = (rng.random(300) < words / 40).astype(float), rng.normal(size=300) + words / 10
    assert trial.pairs_at_equal_length(score - 1, label, words - 20) == pytest.approx(
        np.mean([np.mean(score[own] > 1) for own in (words > 20, words < 20)])
    )
    line = linregress(rankdata(words)[label == 0], rankdata(score)[label == 0])
    left = rankdata(score) - line.intercept - line.slope * rankdata(words)
    assert trial.auc_at_equal_length(score, label, words) == pytest.approx(roc_auc(left.round(6), label), abs=1e-3)
    ranks = [np.column_stack([np.ones(300), rankdata(words)]), rankdata(score), rankdata(label + score)]
    left = [rank - ranks[0] @ np.linalg.lstsq(ranks[0], rank)[0] for rank in ranks[1:]]
    assert trial.partial_spearman(score, label + score, words) == pytest.approx(pearsonr(*left)[0], abs=1e-9)


@given(st.integers(0, 1000))
@QUICK
def test_a_score_that_is_length_knows_nothing_at_equal_length(seed):
    rng = np.random.default_rng(seed)
    words = rng.choice([5.0, 15.0, 40.0, 80.0], 200)
    label = (words + rng.normal(0, 30, 200) > 35).astype(float)
    assume(0 < label.mean() < 1)
    assert trial.auc_at_equal_length(words, label, words) == 0.5
    longer = rng.choice([-9.0, 5.0, 20.0], 200)  # of pairs, the preferred answer in two of three
    assert trial.pairs_at_equal_length(longer, label, longer) == 0.5


def test_what_length_explains_is_gone_at_equal_length():
    rng = np.random.default_rng(5)
    words = rng.integers(5, 80, 400).astype(float)
    liked = (SCORED.words + rng.normal(0, 5, 240) > 20).astype(float)
    one, _ = compared(liked, exploration=SCORED.words + 0.01 * SCORED.exploration)
    assert one["value"] > 0.9 and 0.3 < one["at equal length"] < 0.7
    label = words + rng.normal(0, 5, 400)
    assert spearmanr(words, label)[0] > 0.9
    assert abs(trial.partial_spearman(words + rng.normal(0, 5, 400), label, words)) < 0.2


def test_experts_own_agreement_stands_beside_with_its_source():
    told = {c.construct: c.experts for c in COMPARISONS if c.experts}
    values = {"emotional reactions": ".35–.56", "interpretations": ".26–.62", "explorations": ".74–.84"}
    assert all(told[name].startswith(value) for name, value in values.items())
    assert told["suggestion, not another strategy"].startswith(".54–.70 (advice"), "Kumar et al. (2025)"
    source = resource_path("labelled_text.yaml").read_text(encoding="utf-8")
    assert "Kumar et al. (2025)" in source and "arXiv 2506.10150" in source
    table = trial.corpus_table([])
    shown = table.set_index("construct")["experts agree (κ)"].dropna()
    assert shown.to_dict() == told
