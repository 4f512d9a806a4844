"""The stage of reward models: scores kept in files, the rows of Table 1 by hand and by scikit-learn, the paper's numbers in the paper's columns only."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from psycopref.core.files import PRINCIPLE_KEYS, SCHEMAS, read_rows
from psycopref.evaluation.baselines import length_scores, score_frame
from psycopref.stats.calibration import GAP_BANDS, LENGTH_BANDS
from psycopref.core.settings import StudyError
from psycopref.core.paper import coarse_topics, paper_values
from psycopref.stats.intervals import win_interval
from psycopref.feedback.choosing import ranker_row
from psycopref.experiments.reward_table import (
    BASELINES,
    baseline_scores,
    kept_scores,
    model_scores,
    one_table,
    score_row,
    slice_tables,
    table_1,
)
from psycopref.training.scoring import load_reward_model, score_pairs
from psycopref.models.weights import find_weights, load_tokenizer

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
OURS = ["accuracy %", "95% interval", "AUC", "ECE", "Brier", "pairs"]
PAPER = {"paper accuracy %": "accuracy", "paper AUC": "auc", "paper ECE": "ece", "paper Brier": "brier"}
PUBLISHED = {row["model"]: row for row in paper_values()["table_1"]}


def some_pairs(n, file="s", each=2):
    """Pairs of which `each` share a client speech."""
    answers = ("What do you feel then?", "I see.", "That sounds like a lot to carry. What would help you now?")
    return pd.DataFrame([{"ID": f"{file}-{i // each}", "prefID": i, "question": f"I count the stairs, {i} of "
                                                                                "them.", "chosen": answers[i % 3], "rejected": answers[(i + 1 + i % 2) % 3]}
                         for i in range(n)])  # fmt: skip


def scores_of(chosen, rejected, each=2, name="m"):
    return score_frame(some_pairs(len(chosen), each=each), name, chosen, rejected)


# ---- scores are files ----

TESTS = {"dev": some_pairs(4, "d"), "test": some_pairs(6, "t")}


class Scorer:
    """Score by length, and count how often it is asked."""

    def __init__(self, tests=TESTS, shift=0.0):
        self.asked, self.tests, self.shift = 0, tests, shift

    def __call__(self):
        self.asked += 1
        return {
            test: score_frame(pairs, "any", *(np.add(side, self.shift) for side in length_scores(pairs)))
            for test, pairs in self.tests.items()
        }


def test_a_scorer_is_asked_once_and_its_files_are_rows_of_scores(tmp_path):
    scorer = Scorer()
    first = kept_scores(tmp_path, "Bradley-Terry on words (TF-IDF)", TESTS, scorer)
    again = kept_scores(tmp_path, "Bradley-Terry on words (TF-IDF)", TESTS, scorer)
    assert scorer.asked == 1 and sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet"] * 2
    for test, pairs in TESTS.items():
        pd.testing.assert_frame_equal(first[test], again[test])
        assert (
            list(first[test].columns) == list(SCHEMAS["scores"])
            and list(first[test].prefID) == list(pairs.prefID)
            and list(first[test].ID) == list(pairs.ID)
        )
        assert set(first[test].model) == {"Bradley-Terry on words (TF-IDF)"}, "the name that tables show"
        [path] = tmp_path.glob(f"*.{test}.parquet")
        pd.testing.assert_frame_equal(read_rows(path, "scores"), first[test])


@pytest.mark.parametrize("lost", ["dev", "test"])
def test_a_missing_file_of_two_makes_both_again(lost, tmp_path):
    """The other one may be that of an earlier attempt; both come from one scorer."""
    kept_scores(tmp_path, "length", TESTS, Scorer())
    next(tmp_path.glob(f"*.{lost}.parquet")).unlink()
    scorer = Scorer(shift=10.0)
    found = kept_scores(tmp_path, "length", TESTS, scorer)
    assert scorer.asked == 1
    for test, pairs in TESTS.items():
        assert found[test].chosen_score.tolist() == [words + 10 for words in length_scores(pairs)[0]]


def test_a_scorer_that_dies_leaves_no_half_file_and_is_asked_again(tmp_path):
    class Pulled(Exception):
        pass

    def dies():
        yield from Scorer()().items()
        raise Pulled

    class Half(dict):
        def items(self):
            return dies()

    with pytest.raises(Pulled):
        kept_scores(tmp_path, "length", {**TESTS, "more": TESTS["test"]}, Half)
    assert len(list(tmp_path.iterdir())) == 2
    scorer = Scorer({**TESTS, "more": TESTS["test"]})
    assert set(kept_scores(tmp_path, "length", scorer.tests, scorer)) == {"dev", "test", "more"} and scorer.asked == 1


def test_a_torn_file_is_never_read_as_scores(tmp_path):
    kept_scores(tmp_path, "length", TESTS, Scorer())
    path = tmp_path / "length.test.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    try:
        found = kept_scores(tmp_path, "length", TESTS, Scorer())
    except StudyError as error:
        assert "length.test.parquet" in str(error) and "\n" not in str(error)
    else:
        assert len(found["test"]) == 6


def test_a_torn_file_of_two_makes_both_again(tmp_path):
    kept_scores(tmp_path, "length", TESTS, Scorer())
    path = tmp_path / "length.test.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    scorer = Scorer(shift=1.0)
    found = kept_scores(tmp_path, "length", TESTS, scorer)
    assert scorer.asked == 1 and found["dev"].chosen_score[0] == length_scores(TESTS["dev"])[0][0] + 1


def test_names_that_make_one_file_name_do_not_share_scores(tmp_path):
    """Two folders of reward models, say `my model` and `My-Model`."""
    kept_scores(tmp_path, "my model", TESTS, Scorer())
    other = kept_scores(tmp_path, "My-Model", TESTS, Scorer(shift=5.0))
    assert (
        set(other["test"].model) == {"My-Model"}
        and other["test"].chosen_score[0] == length_scores(TESTS["test"])[0][0] + 5
    )


def test_kept_scores_of_other_pairs_are_not_read(tmp_path):
    kept_scores(tmp_path, "length", TESTS, Scorer())
    fewer = {"dev": TESTS["dev"], "test": TESTS["test"][:3]}
    assert len(kept_scores(tmp_path, "length", fewer, Scorer(fewer))["test"]) == 3


def test_a_score_that_is_no_number_never_reaches_a_file(tmp_path):
    wrong = {
        test: pairs[["ID", "prefID"]].assign(model="m", chosen_score=float("nan"), rejected_score=0.0)
        for test, pairs in TESTS.items()
    }
    said = one_line(
        lambda: kept_scores(
            tmp_path,
            "length",
            TESTS,
            lambda: {t: score_frame(TESTS[t], "m", f.chosen_score, f.rejected_score) for t, f in wrong.items()},
        )
    )
    assert "nan" in said and list(tmp_path.iterdir()) == []


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
        assert found[test].chosen_score.tolist() == pytest.approx(chosen, abs=1e-6) and found[
            test
        ].rejected_score.tolist() == pytest.approx(rejected, abs=1e-6)
        assert abs(found[test].chosen_score - found[test].rejected_score).min() > 1e-4, "the sides differ"


# ---- a row ----


def test_a_row_by_hand():
    """Margins 1, -1 and 0: one right; each pair counts in both orders."""
    high = 1 / (1 + np.exp(-1.0))
    row = score_row("mine", "reward model", scores_of([2.0, 0.0, 1.0], [1.0, 1.0, 1.0]), bins=10, samples=20)
    assert (row["model"], row["kind"], row["pairs"], row["accuracy %"]) == ("mine", "reward model", 3, 33.3)
    assert row["AUC"] == pytest.approx(4.5 / 9)  # 1 beats -1 and 0 and ties 1; -1 ties -1; 0 beats -1 and ties 0
    assert row["Brier"] == pytest.approx(((1 - high) ** 2 + high**2 + 0.25) / 3)
    assert row["ECE"] == pytest.approx(
        4 / 6 * (high - 0.5)
    )  # both bins off by as much; the tie is forecast as half and is half
    assert score_row(
        "mine", "baseline", scores_of([2.0, 0.0, 1.0], [1.0, 1.0, 1.0]), calibrated=False, samples=20
    ) == row | {"kind": "baseline", "ECE": None, "Brier": None}


@few
@given(st.lists(st.integers(-40, 40).filter(bool), min_size=2, max_size=40), st.sampled_from([5, 10, 15]))
def test_a_row_equals_scikit_learn_on_both_orders(margins, bins):
    margin = np.array(margins) / 8
    scores = scores_of(margin + 1, np.ones(len(margin)))
    row = score_row("m", "reward model", scores, bins=bins, samples=5)
    forecast, label = 1 / (1 + np.exp(-np.concatenate([margin, -margin]))), np.repeat([1, 0], len(margin))
    assert row["accuracy %"] == round(100 * float((margin > 0).mean()), 1)
    assert row["AUC"] == pytest.approx(roc_auc_score(label, np.concatenate([margin, -margin])))
    assert row["Brier"] == pytest.approx(brier_score_loss(label, forecast))
    frequency, mean = calibration_curve(label, forecast, n_bins=bins)
    count = np.histogram(forecast, np.linspace(0, 1, bins + 1))[0]
    assert row["ECE"] == pytest.approx(float(np.abs(frequency - mean) @ count[count > 0] / len(label)))


def test_the_interval_is_that_of_speeches_and_missing_for_one():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.integers(0, 2, 30), 4)  # the four pairs of a speech go together
    frame = scores_of(right.astype(float), np.full(120, 0.5), each=4)

    def width(row):
        low, high = map(float, row["95% interval"].split(" to "))
        return high - low

    clustered, loose = (
        score_row("m", "k", frame, samples=300),
        score_row("m", "k", frame.assign(ID=[str(i) for i in range(120)]), samples=300),
    )
    low, high = win_interval(right, frame.ID.to_numpy(), samples=300)
    assert clustered["95% interval"] == f"{low:.1f} to {high:.1f}" and width(clustered) > 1.5 * width(loose)
    assert low <= clustered["accuracy %"] <= high


def test_a_tie_is_not_won():
    row = score_row("m", "k", scores_of([1.0, 1.0], [1.0, 1.0], each=1), samples=5)
    assert row["accuracy %"] == 0 and row["AUC"] == 0.5 and row["95% interval"] == "0.0 to 0.0"


# ---- Table 1 ----

own_names = st.one_of(st.sampled_from(sorted(PUBLISHED)), st.sampled_from(sorted(PUBLISHED)).map(lambda name: name + "-HF"),
                      st.sampled_from(["longer answer wins", "Bradley-Terry on random two-layer Llama", "untrained head on SmolLM2-135M-Instruct", "Llama-3.1-8B-Instruct"]))  # fmt: skip
own_rows = st.builds(
    lambda name, kind, number, calibrated: {"model": name, "kind": kind, "accuracy %": number, "95% interval": "1.0 to 2.0", "AUC": number / 1000 + 7,
                                            "ECE": 7.5 if calibrated else None, "Brier": 8.5 if calibrated else None, "pairs": 84},
    own_names, st.sampled_from(["reward model", "baseline", "other reward model"]), st.floats(0, 100), st.booleans(),
)  # fmt: skip


@few
@given(st.lists(own_rows, max_size=6, unique_by=lambda row: row["model"]))
def test_the_papers_numbers_stand_in_the_papers_columns_only(rows):
    frame = table_1(rows)
    ours, theirs = frame[: len(rows)], frame[len(rows) :]
    for row, (_, shown) in zip(rows, ours.iterrows()):
        assert {column: shown[column] for column in row} == row, "our numbers, as they came"
    for _, shown in theirs.iterrows():
        assert shown["95% interval"] == "not run here" and shown["kind"].startswith("paper: ")
        assert all(shown[column] is None for column in OURS if column != "95% interval" and column in frame)
        assert {column: shown[column] for column in PAPER} == {
            column: PUBLISHED[shown["model"]][key] for column, key in PAPER.items()
        }
    for _, shown in ours.iterrows():
        name = shown["model"].removesuffix("-HF")
        expected = {column: PUBLISHED[name][key] if name in PUBLISHED else None for column, key in PAPER.items()}
        assert {column: shown.get(column) for column in PAPER} == expected
    ran = {row["model"].removesuffix("-HF") for row in rows}
    assert list(theirs["model"]) == [name for name in PUBLISHED if name not in ran], (
        "each of the paper's once: beside ours, or below"
    )


def test_a_ranker_of_the_paper_stands_beside_its_number():
    summary = {"accuracy": 0.8, "low": 0.7, "high": 0.9, "unreadable": 0.02, "pairs": 84}
    frame = table_1([ranker_row("gemma-2-9b-it, asked", summary)])
    assert (
        frame["accuracy %"][0] == 80.0
        and frame["paper accuracy %"][0] == 81.5
        and "gemma-2-9b-it" not in list(frame["model"][1:])
    )


@pytest.mark.parametrize(
    "name",
    [
        "untrained head on gemma-2-9b-it",
        "Bradley-Terry on Llama-3.1-70B-Instruct",
        "gemma-2-9b-it-SimPO, asked (0% unreadable)",
    ],
)
def test_a_model_made_from_one_of_the_papers_is_another_model(name):
    row = score_row(name, "reward model", scores_of([1.0, 0.0], [0.0, 1.0]), samples=5)
    frame = table_1([row])
    assert frame["paper accuracy %"][0] is None and len(frame) == 1 + len(PUBLISHED)


# ---- slices ----

SHORTS = {slug: node["short"] for slug, node in coarse_topics().items()}


@settings(few, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.integers(-3, 3),
            st.integers(0, 7),
            st.lists(st.integers(1, 5), min_size=14, max_size=14),
            st.integers(1, 12),
            st.integers(1, 12),
        ),
        min_size=2,
        max_size=15,
    )
)
def test_slices_sum_to_all_and_all_is_the_row_of_table_1(drawn):
    slugs = list(SHORTS)
    pairs = pd.DataFrame([
        {"ID": f"s-{i // 2}", "prefID": i, "chosen": "word " * c, "rejected": "word " * r}
        | {f"{side}_{key}_rating": ratings[7 * (side == "rejected") + k] for side in ("chosen", "rejected") for k, key in enumerate(PRINCIPLE_KEYS)}
        for i, (_, _, ratings, c, r) in enumerate(drawn)])  # fmt: skip
    speeches = pd.DataFrame(
        [
            {"speech_id": f"s-{i // 2}", "coarse_topic": slugs[topic % len(slugs)]}
            for i, (_, topic, *_) in enumerate(drawn)
            if i % 2 == 0
        ]
    )
    scores = score_frame(pairs, "m", [float(margin) for margin, *_ in drawn], np.zeros(len(drawn)))
    tables = slice_tables(scores, pairs, speeches, samples=20)
    assert list(tables) == [
        "coarse topic of the client speech",
        "gap of the mean ratings",
        "words of the chosen answer",
    ]
    row = score_row("m", "reward model", scores, samples=20)
    for table in tables.values():
        parts, whole = table[:-1], table.iloc[-1]
        assert whole["group"] == "all" and parts["pairs"].sum() == whole["pairs"] == len(pairs)
        assert (parts["accuracy %"] * parts["pairs"]).sum() / len(pairs) == pytest.approx(
            whole["accuracy %"]
        ) and round(whole["accuracy %"], 1) == row["accuracy %"]
    topics = tables["coarse topic of the client speech"]
    assert topics["speeches"][:-1].sum() == topics["speeches"].iloc[-1] == len(speeches), "a speech has one topic"
    named = {
        "coarse topic of the client speech": [*SHORTS.values()],
        "gap of the mean ratings": [*GAP_BANDS],
        "words of the chosen answer": [*LENGTH_BANDS],
    }
    for title, groups in named.items():
        assert set(tables[title]["group"][:-1]) <= set(groups), "cut by what the title says"

    stacked = one_table(tables, "slice")
    assert list(stacked.columns) == ["slice", *topics.columns] and len(stacked) == sum(map(len, tables.values()))
    for title, table in tables.items():
        pd.testing.assert_frame_equal(
            stacked[stacked["slice"] == title].drop(columns="slice").reset_index(drop=True), table, check_dtype=False
        )
