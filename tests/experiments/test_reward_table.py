"""Scores of reward models are kept in files, rows of Table 1 are those by hand and by scikit-learn, the paper's
numbers stand apart."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.files import PRINCIPLE_KEYS, SCHEMAS, read_rows
from psycopref.core.paper import coarse_topics, paper_values
from psycopref.evaluation.baselines import length_scores, score_frame
from psycopref.experiments.reward_table import BASELINES, baseline_scores, kept_scores, model_scores, one_table
from psycopref.experiments.reward_table import score_row, slice_tables, table_1
from psycopref.feedback.choosing import ranker_row
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.stats.calibration import GAP_BANDS, LENGTH_BANDS
from psycopref.stats.intervals import win_interval
from psycopref.training.scoring import load_reward_model, score_pairs

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
    return pd.DataFrame(rows, columns=["ID", "prefID", "question", "chosen", "rejected"])


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
