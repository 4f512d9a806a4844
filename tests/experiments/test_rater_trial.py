"""The rubric on trial: measures equal references, groups are drawn whole, planted labels are found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from psycopref.experiments import rater_trial as trial
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.settings import StudyError
from psycopref.core.stages import stage_settings
from psycopref.corpus.labelled_text import ALL_SCORES, COMPARISONS, LABEL_COLUMNS, TITLES, Comparison, Labelled
from psycopref.stats.scores import roc_auc

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
    found = trial.auc(score, label, times), trial.spearman(score, label, times)
    assert found[0] == pytest.approx(roc_auc(score[where], label[where]), abs=1e-9)
    if len(set(score[where])) > 1:
        assert found[1] == pytest.approx(spearmanr(score[where], label[where])[0], abs=1e-9)
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
    assert trial.measure_interval(kind, score, score, label, np.zeros(120), 200, 7) is None


def test_rows_of_few_groups_have_wider_intervals():
    rng = np.random.default_rng(2)
    session = rng.normal(size=20)
    frame = pd.DataFrame({name: np.repeat(session, 20) + 0.1 * rng.normal(size=400) for name in ALL_SCORES}).assign(
        words=rng.integers(3, 30, 400), label=np.repeat(rng.integers(0, 2, 20), 20)
    )
    whole, each = (
        trial.compare_with_length(PLANTED, frame.assign(group=group), "binary", 200, 0)[0]
        for group in (np.repeat(np.arange(20), 20).astype(str), np.arange(400).astype(str))
    )
    width = [one["interval"][1] - one["interval"][0] for one in (whole, each)]
    assert (
        whole["value"] == each["value"] and width[0] > 2 * width[1] and (whole["groups"], each["groups"]) == (20, 400)
    )


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@QUICK
def test_shares_have_wilsons_interval(case):
    right, n = case
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert trial.share_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def scored(n=240, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({name: rng.normal(size=n) for name in ALL_SCORES}).assign(
        words=rng.integers(3, 40, n).astype(float), group=[str(i // 4) for i in range(n)]
    )


def test_planted_labels_are_found_and_length_is_not_mistaken_for_them():
    frame = scored()
    good = trial.compare_with_length(
        PLANTED, frame.assign(label=(frame.exploration > 0).astype(float)), "binary", 200, 0
    )[0]
    assert good["value"] == 1 and good["length"] < 0.6 and trial._reading(good) == "above length"
    long = trial.compare_with_length(PLANTED, frame.assign(label=(frame.words > 20).astype(float)), "binary", 200, 0)[0]
    assert long["baseline"] == "longer" and long["length"] == 1 and trial._reading(long) == "below length"
    short = trial.compare_with_length(PLANTED, frame.assign(label=(frame.words < 20).astype(float)), "binary", 200, 0)[
        0
    ]
    assert short["baseline"] == "shorter" and short["length"] == 1
    both = frame.assign(exploration=frame.words, label=(frame.words > 20).astype(float))
    alike = trial.compare_with_length(PLANTED, both, "binary", 200, 0)[0]
    assert (
        alike["difference"] == 0
        and -0.1 < alike["difference interval"][0] < 0
        and trial._reading(alike) == "not told from length"
    )


def test_lower_is_higher_turned_around():
    frame = scored().assign(label=np.tile([0.0, 1.0], 120))
    higher = Comparison("esconv", "suggestion, not another strategy", "binary", "planted", ("autonomy",))
    lower = replace(higher, expected="lower")
    (down,), (up,) = (trial.compare_with_length(c, frame, "binary", 50, 0) for c in (lower, higher))
    assert down["value"] == pytest.approx(1 - up["value"]) and down["length"] == up["length"]


def test_one_group_has_a_value_and_no_interval():
    [one] = trial.compare_with_length(PLANTED, scored(8).assign(group="a", label=[0, 1] * 4), "binary", 50, 0)
    assert (
        0 <= one["value"] <= 1
        and one["interval"] is one["difference interval"] is None
        and trial._reading(one) == "too few groups for an interval"
    )


def labelled(rows, name="annomi", dropped=None):
    frame = pd.DataFrame(rows, columns=list(LABEL_COLUMNS))
    return Labelled(frame, dropped or {}, {"source": name}, ())


@pytest.fixture
def rubric(monkeypatch):
    """Let a function of the response stand for every principle."""

    def install(score):
        found = lambda said, response: dict.fromkeys(PRINCIPLE_KEYS, float(score(response)))  # noqa: E731
        monkeypatch.setattr(trial, "rubric_scores", found)

    return install


def test_a_session_is_one_observation(rubric):
    rubric(len)
    rows = [("I drink.", "x" * (1 + i + 3 * (s % 2)), QUALITY, s % 2, str(s)) for s in range(12) for i in range(3)]
    found = {c.unit: results for c, results, _ in trial.corpus_results(labelled(rows), 100, 0) if results}
    assert [one["score"] for one in found["group"]] == list(ALL_SCORES)
    assert {one["n"] for one in found["response"]} == {36} and {one["n"] for one in found["group"]} == {12}
    assert {one["value"] for one in found["group"]} == {1.0}


def test_pairs_are_read_from_the_preferred_side(rubric):
    rubric(lambda response: response.count("!"))
    texts = [("Yes! Go on", "No"), ("No", "Yes!"), ("Same", "Thing"), ("Oh! Well! So", "Hm!")] * 3
    rows = [("I worry.", text, UPVOTES, votes, i) for i, pair in enumerate(texts) for votes, text in zip((4, 2), pair)]
    rows += [("I worry.", "As many votes", UPVOTES, 4, i) for i in range(len(texts))]
    [(comparison, results, reason)] = trial.corpus_results(labelled(rows, "counsel-chat"), 100, 0)
    assert reason is None and results[0]["n"] == 24 and results[0]["groups"] == 12
    rows = rows[:24]
    [(comparison, results, reason)] = trial.corpus_results(labelled(rows, "counsel-chat"), 100, 0)
    assert reason is None and {one["value"] for one in results} == {0.5} and results[0]["n"] == 12
    assert results[0]["baseline"] == "longer" and results[0]["length"] == 0.5, "ties are no success"


def test_texts_are_scored_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        trial,
        "rubric_scores",
        lambda said, response: asked.append((said, response)) or dict.fromkeys(PRINCIPLE_KEYS, 3.0),
    )
    found = trial.score_texts(["a", "a", "b", "a"], ["x y", "x y", "x y", "z"])
    assert (
        asked == [("a", "x y"), ("b", "x y"), ("a", "z")]
        and found.words.tolist() == [2, 2, 2, 1]
        and set(found["mean"]) == {3.0}
    )


def test_what_was_not_measured_is_empty_and_says_why():
    table = trial.corpus_table([])
    assert len(table) == len(COMPARISONS) and set(table.corpus) == set(TITLES.values())
    filled = [name for name in table.columns if table[name].notna().any()]
    assert filled == ["corpus", "construct", "compared with", "reading"] and set(table.reading) == {trial.NOT_NAMED}
    ties = [("I drink.", f"So {i}.", UPVOTES, 0, 1) for i in range(4)]
    dropped = {"labels without a context": 3}
    nothing = trial.corpus_table(trial.corpus_results(labelled(ties, "counsel-chat", dropped), 50, 0))
    [reading] = nothing.reading[nothing.corpus == "counsel-chat"]
    assert "nothing to compare" in reading and "3 labels without" in reading and nothing.rubric.isna().all()
    alike = labelled([("I drink.", f"So {i}.", QUALITY, 1, 1) for i in range(4)])
    readings = {reason for c, results, reason in trial.corpus_results(alike, 50, 0) if c.construct == QUALITY}
    assert readings == {"not measured: all labels are alike"}


def test_the_packages_minimal_pairs_can_be_judged():
    pairs = trial.read_minimal_pairs()
    counts = pairs.groupby(["principle", "set"]).size().unstack()
    assert set(counts.index) == set(PRINCIPLE_KEYS) and (counts.sum(axis=1) >= 30).all() and (counts > 9).all().all()
    assert pairs.map(lambda value: isinstance(value, str) and bool(value.strip())).all(axis=None)
    assert pairs.id.is_unique and (pairs.better != pairs.worse).all() and set(pairs.set) == set(trial.SETS)


def test_the_minimal_table_counts_wins_ties_and_lengths(monkeypatch):
    scores = {"good": 4.0, "bad": 2.0, "fine words here": 3.0, "other fine words": 3.0}
    monkeypatch.setattr(
        trial,
        "rubric_scores",
        lambda said, response: {key: scores[response] if key == "empathy" else 3.0 for key in PRINCIPLE_KEYS},
    )
    sides = [("good", "bad"), ("bad", "good"), ("fine words here", "other fine words"), ("good", "fine words here")]
    pairs = pd.DataFrame(
        [
            {
                "id": str(i),
                "principle": principle,
                "construct": f"c{i % 2}",
                "client": "x",
                "better": better,
                "worse": worse,
                "set": name,
            }
            for i, (principle, name, (better, worse)) in enumerate(
                (p, s, side) for p in ("empathy", "safety") for s in trial.SETS for side in sides
            )
        ]
    )
    judged = trial.score_minimal_pairs(pairs)
    table = trial.minimal_table(judged).set_index(["set", "principle"])
    assert table.loc[("held-out", "empathy")].tolist() == [4, 50.0, "15.0 to 85.0", 25.0, 50.0, 0.0, 25.0]
    assert (
        table.loc[("held-out", "safety"), "ties %"] == 100 and table.loc[("develop", "all, each on its own"), "n"] == 8
    )
    assert trial.minimal_table(judged, "construct").n.sum() == len(pairs)


def test_swapping_the_sides_turns_every_pair(monkeypatch):
    pairs = trial.read_minimal_pairs().groupby("principle").head(3)
    forward, backward = (
        trial.score_minimal_pairs(frame)
        for frame in (pairs, pairs.rename(columns={"better": "worse", "worse": "better"}))
    )
    for column in ("own", "mean", "words"):
        assert (forward[column] == -backward[column]).all()


def test_corpora_are_opened_before_anything_is_scored(tmp_path):
    for specs, told in (
        (("annomi=/a", "annomi=/b"), "more than once"),
        (("anomi=/a",), "not declared"),
        ((f"esconv={tmp_path}/none.json",), "no such file"),
    ):
        with pytest.raises(StudyError, match=told) as error:
            trial.open_corpora(specs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("with_corpora", [False, True])
def test_the_figure_draws_what_there_is(with_corpora):
    import matplotlib.pyplot as plt

    made = pd.DataFrame(
        {
            "set": ["held-out"] * 3,
            "principle": ["empathy", "safety", "safety"],
            "own": [1, 0, 1],
            "mean": [1, 1, 0],
            "words": [1, -1, 0],
        }
    )
    frame = scored(40).assign(label=np.tile([0.0, 1.0], 20))
    results = (
        [
            (PLANTED, trial.compare_with_length(PLANTED, frame, "binary", 50, 0), None),
            (COMPARISONS[-1], [], "not measured"),
        ]
        if with_corpora
        else []
    )
    figure = trial.trial_figure(trial.minimal_table(made), results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Minimal pairs",
        *(["Labelled text"] if with_corpora else []),
    ]
    plt.close(figure)


def test_weak_principles_are_those_that_length_or_chance_explains():
    def judged(right, longer, n=40):
        half = ["held-out"] * n + ["develop"] * n
        return pd.DataFrame(
            {
                "set": half,
                "principle": "empathy",
                "own": [1.0] * right + [-1.0] * (2 * n - right),
                "mean": 1.0,
                "words": [1.0] * longer + [-1.0] * (2 * n - longer),
            }
        )

    assert trial.weak_principles(trial.minimal_table(judged(38, 20))) == []
    assert trial.weak_principles(trial.minimal_table(judged(22, 20))) == ["empathy"], "chance"
    assert (
        trial.weak_principles(trial.minimal_table(judged(38, 38)))
        == ["empathy"]
        == trial.weak_principles(trial.minimal_table(judged(38, 2)))
    ), "length, longer or shorter"
    strong, weak = (trial.minimal_sentences(trial.minimal_table(judged(right, 20))) for right in (38, 22))
    assert (
        "On the 40 held-out pairs" in strong[0]
        and "in 95.0%" in strong[0]
        and "Every principle" in strong[3]
        and "no evidence" in weak[3]
    )


def test_labelled_text_is_reported_only_where_it_was_measured():
    frame = scored()
    found = [
        trial.compare_with_length(PLANTED, frame.assign(label=label.astype(float)), "binary", 100, 0)
        for label in (frame.exploration > 0, frame.words > 20)
    ]
    sentences = trial.corpus_sentences([(PLANTED, one, None) for one in found])
    assert sentences[0].startswith("2 comparisons") and "above length: 1; below length: 1" in sentences[0]
    assert [trial.corpus_sentences(results) for results in ([], [(PLANTED, [], "all labels are alike")])] == [
        ["Not measured: no labelled corpus is named in `trial.corpora`."],
        ["Not measured: the corpora hold nothing to compare."],
    ]


def test_a_receipt_names_what_was_read(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text(",".join(LABEL_COLUMNS) + f'\nI drink.,So.,"{UPVOTES}",0,1\n,So.,"{UPVOTES}",0,1\n')
    corpora = trial.open_corpora((f"counsel-chat={path}",))
    facts = trial.corpora_facts(corpora)["counsel-chat"]
    assert (facts["labels"], facts["groups"], facts["source"]) == (1, 1, "counsel-chat")
    assert facts["dropped"] == corpora[0].dropped and sum(facts["dropped"].values()) == 1
    assert [path.name for path in trial.trial_inputs(corpora)] == ["minimal_pairs.jsonl", "votes.csv"]
    assert trial.trial_size(range(3), corpora) == "3 minimal pairs, 1 labels of counsel-chat"


def test_the_stage_reads_its_own_settings():
    from psycopref.core.settings import load_profile

    assert stage_settings(load_profile("tiny"), "12_trial") == {"trial": {"corpora": (), "bootstrap": 200}}
