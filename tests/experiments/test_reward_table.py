"""Scores of reward models are kept in files, rows of Table 1 are those by hand and by scikit-learn, the paper's
numbers stand apart."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import error, good
from refusals import one_line

from psycopref.core.files import SCHEMAS, read_rows
from psycopref.core.principles import principle_keys
from psycopref.core.paper import coarse_topics, paper_values
from psycopref.core.settings import load_profile
from psycopref.core.stages import derived_seed
from psycopref.evaluation.baselines import length_scores, score_frame
from psycopref.experiments.reward_table import AUTHOR, BASELINES, PARTS, RewardStudy, accuracy_row, ask_rankers
from psycopref.experiments.reward_table import author_gains, baseline_scores, describe_rankers, describe_shortcuts
from psycopref.experiments.reward_table import kept_scores, model_scores, one_table, other_prompts, reward_rows
from psycopref.experiments.reward_table import score_row, shortcut_table, slice_tables, table_1
from psycopref.feedback.choosing import rank_pairs, ranker_row
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.stats.calibration import GAP_BANDS, LENGTH_BANDS
from psycopref.stats.intervals import win_interval
from psycopref.training.scoring import load_reward_model, score_pairs

PRINCIPLE_KEYS = principle_keys()

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
OURS = ["accuracy %", "95% interval", "AUC", "ECE", "Brier", "pairs"]
PAPER = {"paper accuracy %": "accuracy", "paper AUC": "auc", "paper ECE": "ece", "paper Brier": "brier"}
PUBLISHED = {row["model"]: row for row in paper_values()["table_1"]}
ANSWERS = ("What do you feel then?", "I see.", "That sounds like a lot to carry. What would help you now?")


def some_pairs(n, file="s", each=2):
    """Pairs of which `each` share a client speech."""
    rows = [
        (f"{file}-{i // each}", i, f"I count the stairs, {i} of them.", ANSWERS[i % 3], ANSWERS[(i + 1 + i % 2) % 3])
        for i in range(n)
    ]
    frame = pd.DataFrame(rows, columns=["ID", "prefID", "question", "chosen", "rejected"])
    sides = ([f"model-{(i + k) % 3}" for i in range(n)] for k in range(2))
    return frame.assign(**dict(zip(("chosen_model", "rejected_model"), sides)))


def scores_of(chosen, rejected, each=2, name="m"):
    return score_frame(some_pairs(len(chosen), each=each), name, chosen, rejected)


# ---- scores are files ----

TESTS = {"dev": some_pairs(4, "d"), "test": some_pairs(6, "t")}


class Scorer:
    """Score by length, and count how often it is asked."""

    def __init__(self, shift=0.0, tests=TESTS):
        self.asked, self.shift, self.tests = 0, shift, tests

    def __call__(self):
        self.asked += 1
        sides = {test: np.add(length_scores(pairs), self.shift) for test, pairs in self.tests.items()}
        return {test: score_frame(self.tests[test], "any", *both) for test, both in sides.items()}


def test_a_scorer_is_asked_once_and_its_files_are_rows_of_scores(tmp_path):
    name, scorer = "Bradley-Terry on words (TF-IDF)", Scorer()
    first, again = (kept_scores(tmp_path, name, TESTS, scorer) for _ in range(2))
    assert scorer.asked == 1 and [path.suffix for path in tmp_path.iterdir()] == [".parquet"] * 2
    for test, pairs in TESTS.items():
        pd.testing.assert_frame_equal(first[test], again[test])
        assert list(first[test].columns) == list(SCHEMAS["scores"])
        assert first[test][["ID", "prefID"]].equals(pairs[["ID", "prefID"]])
        assert set(first[test].model) == {name}, "the name that tables show"
        [path] = tmp_path.glob(f"*.{test}.parquet")
        pd.testing.assert_frame_equal(read_rows(path, "scores"), first[test])


@pytest.mark.parametrize("fault", ["missing", "torn"])
@pytest.mark.parametrize("lost", ["dev", "test"])
def test_a_file_that_is_missing_or_torn_makes_both_again(lost, fault, tmp_path):
    """The other one may be that of an earlier attempt; both come from one scorer."""
    kept_scores(tmp_path, "length", TESTS, Scorer())
    path = tmp_path / f"length.{lost}.parquet"
    path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:-40])
    scorer = Scorer(shift=10.0)
    found = kept_scores(tmp_path, "length", TESTS, scorer)
    assert scorer.asked == 1
    for test, pairs in TESTS.items():
        assert found[test].chosen_score.tolist() == [words + 10 for words in length_scores(pairs)[0]]


def test_a_scorer_that_dies_leaves_no_half_file_and_is_asked_again(tmp_path):
    class Pulled(Exception):
        pass

    class Half(dict):
        def items(self):
            yield from Scorer()().items()
            raise Pulled

    more = {**TESTS, "more": TESTS["test"]}
    with pytest.raises(Pulled):
        kept_scores(tmp_path, "length", more, Half)
    assert len(list(tmp_path.iterdir())) == 2
    scorer = Scorer(tests=more)
    assert set(kept_scores(tmp_path, "length", more, scorer)) == {"dev", "test", "more"} and scorer.asked == 1


def test_scores_of_another_model_or_of_other_pairs_are_not_read(tmp_path):
    """Two folders of reward models, say `my model` and `My-Model`, make one file name."""
    kept_scores(tmp_path, "my model", TESTS, Scorer())
    other = kept_scores(tmp_path, "My-Model", TESTS, Scorer(shift=5.0))["test"]
    assert set(other.model) == {"My-Model"} and other.chosen_score[0] == length_scores(TESTS["test"])[0][0] + 5
    fewer = TESTS | {"test": TESTS["test"][:3]}
    assert len(kept_scores(tmp_path, "My-Model", fewer, Scorer(tests=fewer))["test"]) == 3


def test_a_score_that_is_no_number_never_reaches_a_file(tmp_path):
    assert "nan" in one_line(lambda: kept_scores(tmp_path, "length", TESTS, Scorer(shift=float("nan"))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in BASELINES if "MiniLM" not in name])
def test_baselines_score_every_part_even_an_empty_one(name, tmp_path):
    """A run of few speeches may have no development pairs."""
    tests = {"dev": TESTS["dev"][:0], "test": TESTS["test"]}
    found = kept_scores(tmp_path, name, tests, lambda: baseline_scores(name, some_pairs(12, "f"), tests))
    assert {test: len(own) for test, own in found.items()} == {"dev": 0, "test": 6}
    assert list(found["test"].ID) == list(TESTS["test"].ID) and set(found["test"].model) == {name}


def test_a_reward_models_scores_keep_their_sides_and_pairs(tmp_path):
    tiny = find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    model = load_reward_model(tiny.location, tokenizer, "float32", new_head=0)
    found = kept_scores(tmp_path, "untrained", TESTS, lambda: model_scores("untrained", model, tokenizer, TESTS))
    assert len(model_scores("untrained", model, tokenizer, {"dev": TESTS["dev"][:0]})["dev"]) == 0
    for test, pairs in TESTS.items():
        chosen, rejected = score_pairs(model, tokenizer, pairs, name="")
        assert found[test].chosen_score.tolist() == pytest.approx(chosen, abs=1e-6)
        assert found[test].rejected_score.tolist() == pytest.approx(rejected, abs=1e-6)
        assert abs(found[test].chosen_score - found[test].rejected_score).min() > 1e-4, "the sides differ"


# ---- a row ----


def test_a_row_by_hand():
    """Margins 1, -1 and 0: one right; each pair counts in both orders."""
    high, scores = 1 / (1 + np.exp(-1.0)), scores_of([2.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    row = score_row("mine", "reward model", scores, bins=10, samples=20)
    assert (row["model"], row["kind"], row["pairs"], row["accuracy %"]) == ("mine", "reward model", 3, 33.3)
    assert row["AUC"] == pytest.approx(4.5 / 9)  # 1 beats -1 and 0 and ties 1; -1 ties -1; 0 beats -1 and ties 0
    assert row["Brier"] == pytest.approx(((1 - high) ** 2 + high**2 + 0.25) / 3)
    assert row["ECE"] == pytest.approx(4 / 6 * (high - 0.5))  # both bins off by as much; the tie is forecast as half
    assert score_row("mine", "reward model", scores, bins=1, samples=20)["ECE"] == pytest.approx(0)
    other = score_row("mine", "baseline", scores, calibrated=False, samples=20)
    assert other == row | {"kind": "baseline", "ECE": None, "Brier": None}


def test_the_interval_is_that_of_speeches():
    right = np.repeat(np.random.default_rng(0).integers(0, 2, 30), 4)  # the four pairs of a speech go together
    frame = scores_of(right.astype(float), np.full(120, 0.5), each=4)
    frames = frame, frame.assign(ID=[str(i) for i in range(120)])
    clustered, loose = (score_row("m", "k", own, samples=300) for own in frames)
    (low, high), (least, most) = (map(float, row["95% interval"].split(" to ")) for row in (clustered, loose))
    expected = win_interval(right, frame.ID.to_numpy(), samples=300)
    assert (low, high) == tuple(round(end, 1) for end in expected) and low <= clustered["accuracy %"] <= high
    assert high - low > 1.5 * (most - least)


# ---- Table 1 ----

MADE = ["longer answer wins", "Bradley-Terry on random two-layer Llama", "untrained head on SmolLM2-135M-Instruct"]
names = st.sampled_from([*PUBLISHED, *(f"{name}-HF" for name in PUBLISHED), *MADE, "Llama-3.1-8B-Instruct"])
kinds = st.sampled_from(["reward model", "baseline", "other reward model"])


@few
@given(st.lists(st.tuples(names, kinds, st.floats(0, 100), st.booleans()), max_size=6, unique_by=lambda row: row[0]))
def test_the_papers_numbers_stand_in_the_papers_columns_only(drawn):
    rows = []
    for name, kind, number, calibrated in drawn:
        values = [number, "1.0 to 2.0", number / 1000 + 7, *((7.5, 8.5) if calibrated else (None, None)), 84]
        rows.append({"model": name, "kind": kind} | dict(zip(OURS, values)))
    frame = table_1(rows)
    ours, theirs = frame[: len(rows)], frame[len(rows) :]
    for row, (_, shown) in zip(rows, ours.iterrows()):
        assert {column: shown[column] for column in row} == row, "our numbers, as they came"
        published = PUBLISHED.get(row["model"].removesuffix("-HF"), {})
        assert all(shown.get(column) == published.get(key) for column, key in PAPER.items())
    for _, shown in theirs.iterrows():
        assert shown["95% interval"] == "not run here" and shown["kind"].startswith("paper: ")
        assert all(shown[column] is None for column in OURS if column != "95% interval" and column in frame)
        assert all(shown[column] == PUBLISHED[shown["model"]][key] for column, key in PAPER.items())
    ran = {row["model"].removesuffix("-HF") for row in rows}
    once = "each of the paper's once: beside ours, or below"
    assert list(theirs["model"]) == [name for name in PUBLISHED if name not in ran], once


def test_a_ranker_of_the_paper_stands_beside_its_number():
    summary = {"accuracy": 0.8, "low": 0.7, "high": 0.9, "unreadable": 0.02, "pairs": 84}
    frame = table_1([ranker_row("gemma-2-9b-it, asked", summary)])
    assert (frame["accuracy %"][0], frame["paper accuracy %"][0]) == (80.0, 81.5)
    assert "gemma-2-9b-it" not in list(frame["model"][1:])


OTHERS = ["untrained head on gemma-2-9b-it", "Bradley-Terry on Llama-3.1-70B-Instruct"]


@pytest.mark.parametrize("name", [*OTHERS, "gemma-2-9b-it-SimPO, asked (0% unreadable)"])
def test_a_model_made_from_one_of_the_papers_is_another_model(name):
    frame = table_1([score_row(name, "reward model", scores_of([1.0, 0.0], [0.0, 1.0]), samples=5)])
    assert frame["paper accuracy %"][0] is None and len(frame) == 1 + len(PUBLISHED)


# ---- slices ----

TOPICS = coarse_topics()
CUTS = {"coarse topic of the client speech": {node["short"] for node in TOPICS.values()}}
CUTS |= {"gap of the mean ratings": {*GAP_BANDS}, "words of the chosen answer": {*LENGTH_BANDS}}
words, fourteen = st.integers(1, 12), st.lists(st.integers(1, 5), min_size=14, max_size=14)
a_pair = st.tuples(st.integers(-3, 3), st.sampled_from([*TOPICS]), fourteen, words, words)


@settings(few, max_examples=25)
@given(st.lists(a_pair, min_size=2, max_size=15))
def test_slices_sum_to_all_and_all_is_the_row_of_table_1(drawn):
    columns = [f"{side}_{key}_rating" for side in ("chosen", "rejected") for key in PRINCIPLE_KEYS]
    pairs = pd.DataFrame([ratings for _, _, ratings, _, _ in drawn], columns=columns).assign(
        ID=[f"s-{i // 2}" for i in range(len(drawn))],
        prefID=range(len(drawn)),
        chosen=["word " * chosen for *_, chosen, _ in drawn],
        rejected=["word " * rejected for *_, rejected in drawn],
    )
    topics = [(f"s-{i}", topic) for i, (_, topic, *_) in enumerate(drawn[::2])]
    speeches = pd.DataFrame(topics, columns=["speech_id", "coarse_topic"])
    scores = score_frame(pairs, "m", [float(margin) for margin, *_ in drawn], np.zeros(len(drawn)))
    tables, row = slice_tables(scores, pairs, speeches, samples=20), score_row("m", "reward model", scores, samples=20)
    stacked = one_table(tables, "slice")
    assert list(tables) == list(CUTS) and len(stacked) == sum(map(len, tables.values()))
    for title, table in tables.items():
        parts, whole = table[:-1], table.iloc[-1]
        assert whole["group"] == "all" and parts["pairs"].sum() == whole["pairs"] == len(pairs)
        right = (parts["accuracy %"] * parts["pairs"]).sum() / len(pairs)
        assert right == pytest.approx(whole["accuracy %"]) and round(whole["accuracy %"], 1) == row["accuracy %"]
        assert {*parts["group"]} <= CUTS[title], "cut by what the title says"
        own = stacked[stacked["slice"] == title].reset_index(drop=True)
        assert list(own.columns) == ["slice", *table.columns]
        pd.testing.assert_frame_equal(own.drop(columns="slice"), table, check_dtype=False)
    by_topic = tables["coarse topic of the client speech"]
    assert by_topic["speeches"][:-1].sum() == by_topic["speeches"].iloc[-1] == len(speeches), "a speech has one topic"


# ---- does it read, or does it know who wrote? ----

SPEECHES = pd.DataFrame({"ID": [f"s-{i // 2}" for i in range(400)], "prefID": range(400)})
SPEECHES = SPEECHES.assign(question=[f"I count stair {i // 2}." for i in range(400)])
SPEECHES = SPEECHES.assign(
    chosen=[f"What is stair {i // 2} to you, {i}?" for i in range(400)], rejected=[f"Stop it, {i}." for i in range(400)]
)


def luck(*texts) -> float:
    return derived_seed(0, *texts) / 2**32


REWARDS = {
    "blind": lambda asked, said: len(said) + 40 * luck(said),
    "reader": lambda asked, said: (
        float(asked.split()[-1].rstrip(".") in said.split()) + luck(asked, said) / 2 if asked else luck(said)
    ),
}


def rewarded(name, pairs):
    sides = (
        [REWARDS[name](q, said) for q, said in zip(pairs.question, pairs[side])] for side in ("chosen", "rejected")
    )
    return score_frame(pairs, name, *sides)


def test_another_prompt_is_another_speechs_and_the_answers_stay():
    found = other_prompts(SPEECHES, seed=0)
    swapped, emptied = found["swapped"], found["emptied"]
    assert (swapped.question != SPEECHES.question).all() and set(swapped.question) == set(SPEECHES.question)
    assert swapped.groupby("ID").question.nunique().eq(1).all(), "pairs of a speech stay together"
    for frame in (swapped, emptied):
        assert frame.drop(columns="question").equals(SPEECHES.drop(columns="question"))
    assert set(emptied.question) == {""} and list(other_prompts(SPEECHES[:2], 0)) == ["emptied"]
    assert other_prompts(SPEECHES, 0)["swapped"].equals(swapped)
    assert not other_prompts(SPEECHES, 1)["swapped"].equals(swapped)


def test_a_reward_that_ignores_the_prompt_keeps_its_accuracy_and_one_that_only_reads_it_falls_to_chance():
    parts = {"test": SPEECHES} | other_prompts(SPEECHES, 0)
    right = {}
    for name in REWARDS:
        rows = [accuracy_row(name, part, rewarded(name, pairs), samples=20) for part, pairs in parts.items()]
        right[name] = [row["accuracy %"] for row in rows]
    assert len(set(right["blind"])) == 1 and 60 < right["blind"][0] < 100
    assert right["reader"][0] == 100 and all(40 < share < 60 for share in right["reader"][1:])


def test_where_the_author_says_little_only_the_answer_can_help():
    """The author's model is sure of six pairs, wrong in two and near a coin in two."""
    pairs = some_pairs(10, each=1)
    author = score_frame(pairs, AUTHOR, [2.0] * 6 + [-1.0] * 2 + [0.3] * 2, [0.0] * 10)
    mine = score_frame(pairs, "mine", [1.0] * 9 + [-1.0], [0.0] * 10)
    alone = mine[:3].assign(chosen_score=[1.0, 1.0, -1.0])
    found = {AUTHOR: ("baseline", {"test": author}), "words": ("baseline", {"test": author})}
    found["mine"] = ("reward model", {"test": mine, "one-author": alone})
    table = shortcut_table(found, samples=20).set_index(["model", "pairs taken"])
    assert set(table.index.get_level_values(0)) == {AUTHOR, "mine"}
    assert table.loc[("mine", PARTS["unsure"])].tolist()[::2] == [75.0, 4]
    assert table.loc[("mine", PARTS["one-author"])].tolist()[::2] == [66.7, 3]
    assert table.loc[(AUTHOR, PARTS["test"]), "accuracy %"] == 80.0
    sure = found | {AUTHOR: ("baseline", {"test": author.assign(chosen_score=9.0)})}
    empty = shortcut_table(sure, samples=20).set_index(["model", "pairs taken"]).loc[("mine", PARTS["unsure"])]
    assert empty["pairs"] == 0 and empty["accuracy %"] is None
    said = " ".join(describe_shortcuts(table.reset_index(), author_gains(found, pairs), "mine", {"new"}))
    assert (
        "order 80.0%" in said and "average: new" in said and "75.0%" in said and "4 pairs" in said and "too few" in said
    )


# ---- rankers that nobody serves ----


def ranker_study(rankers, tmp_path):
    own = some_pairs(4, "r", each=1)
    return RewardStudy(load_profile("tiny", {"reward.rankers": rankers}), own, {"dev": own, "test": own}, tmp_path, 0)


def test_a_ranker_that_is_not_served_is_a_row_with_its_reason_and_the_others_are_asked(server, gateway, tmp_path):
    address = server.uri.partition("@")[2]
    here, other = (f"openai:owner/{name}@{address}" for name in ("here", "Mistral-Nemo-Instruct-2407"))
    server.behave = lambda text, attempt: good("1") if server.bodies[-1]["model"] == "owner/here" else error(404)
    nobody = "openai:google/gemma-2-9b-it@http://127.0.0.1:9/v1"
    uris = [nobody, other, "openai:meta-llama/Llama-3.1-70B-Instruct", "openai:gpt-4o-2024-08-06", here]
    gateway.budget_usd = 10.0
    study = ranker_study(uris, tmp_path)
    summaries, verdicts = ask_rankers(gateway, study)
    assert len(verdicts) == 8 and summaries["here, asked"]["accuracy"] == 0.5
    rows = reward_rows(study, {}, summaries)
    table = table_1(rows).set_index("model")
    reasons = {
        "gemma-2-9b-it": "nobody answers",
        "Mistral-Nemo-Instruct-2407": "404",
        "Llama-3.1-70B-Instruct": "server",
    }
    for name, reason in reasons.items():
        row = table.loc[f"{name}, asked"]
        assert row["95% interval"].startswith("not run: ") and reason in row["95% interval"]
        assert row["accuracy %"] is None and row["paper accuracy %"] == PUBLISHED[name]["accuracy"]
        assert name not in table.index and "127.0.0.1" not in row["95% interval"]
    ours = table.loc["gpt-4o-2024-08-06, asked"]
    assert "OPENAI_API_KEY" in ours["95% interval"] and "not in the paper" in ours.kind
    assert table.loc["gemma-2-9b-it, asked", "kind"] == "LLM as ranker"
    said = describe_rankers(summaries)
    assert sum("not run" in line for line in said) == 4 and any("right in 50.0%" in line for line in said)


def test_a_ranker_that_is_served_and_answers_too_few_pairs_still_stops(server, gateway, tmp_path):
    server.behave = lambda text, attempt: good("1") if len(server.log) < 3 else error(400)
    assert "answered in both orders" in one_line(lambda: ask_rankers(gateway, ranker_study([server.uri], tmp_path)))


def test_a_ranker_that_leaves_after_the_first_pair_is_a_row_with_its_reason(server, gateway, tmp_path):
    server.behave = lambda text, attempt: good("1") if len(server.log) < 3 else error(404)
    [summary] = ask_rankers(gateway, ranker_study([server.uri], tmp_path))[0].values()
    assert "404" in summary["not_asked"]


def test_a_ranker_that_was_asked_before_needs_no_server(server, gateway, tmp_path):
    study = ranker_study([server.uri], tmp_path)
    rank_pairs(gateway, server.uri, study.tests["test"], study.seed)
    asked, server.behave = len(server.log), lambda text, attempt: error(500)
    [summary] = ask_rankers(gateway, study)[0].values()
    assert "not_asked" not in summary and len(server.log) == asked


def test_a_replay_reproduces_a_row_that_was_not_run(server, gateway, tmp_path):
    gateway.calls = "replay"
    [(name, summary)] = ask_rankers(gateway, ranker_study([server.uri], tmp_path))[0].items()
    assert summary == {"not_asked": "its replies were not kept"} and not server.log
