"""Pairs: among equals the seed decides, not authors and the order of rows; a veto; what the hub reads of them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.files import StageReader, StageWriter
from psycopref.core.settings import PairSettings
from psycopref.core.stages import Run
from psycopref.core.tables import Label
from psycopref.feedback.pairing import RELEASED_COLUMN, apply_veto, dataset_card, drawn_pairs, make_pairs
from psycopref.feedback.pairing import pair_summary, principle_table

NOTEBOOK = Path(__file__).parents[2] / "nbs" / "04_pairs.ipynb"

N = 200
SPEECHES = pd.DataFrame({"speech_id": [f"s-{i}" for i in range(N)], "speech": "I count the stairs.", "split": "test"})
RATINGS = {"ada": 5, "zoe": 5, "bob": 1, "yan": 1, "mia": 3}  # two best, two worst
KEYS = "empathy relevance clarity safety exploration autonomy staging".split()


def scored(names=str):
    "Each speech with one response of each author, all texts different."
    rows = [(f"s-{i}", names(who), f"{who} to {i}", rating) for i in range(N) for who, rating in RATINGS.items()]
    frame = pd.DataFrame(rows, columns=["speech_id", "model", "response", "rating"])
    return frame.assign(**{key: frame.rating for key in KEYS}, total=7 * frame.rating, finish_reason="stop").drop(
        columns="rating"
    )


def paired(given, seed=0):
    return make_pairs(SPEECHES, given, ("test",), 1, best_worst=True, seed=seed).set_index("ID").sort_index()


def test_of_equals_the_seed_draws_whatever_the_names_and_the_order_of_rows():
    pairs, sides = paired(scored()), ["chosen", "rejected"]
    for side, authors in (("chosen", ["ada", "zoe"]), ("rejected", ["bob", "yan"])):
        share = (pairs[f"{side}_model"] == authors[0]).mean()
        assert set(pairs[f"{side}_model"]) == set(authors) and abs(share - 0.5) < 4 * np.sqrt(0.25 / N)
    assert paired(scored())[sides].equals(pairs[sides]), "the same in each run"
    assert paired(scored().sample(frac=1, random_state=3))[sides].equals(pairs[sides]), "in any order of rows"
    renamed = paired(scored(lambda who: who[::-1].upper()))
    assert renamed[sides].equals(pairs[sides]) and set(renamed.chosen_model) == {"ADA", "EOZ"}
    assert not paired(scored(), seed=1)[sides].equals(pairs[sides])


def test_what_was_drawn_among_equals_is_counted():
    given = scored()
    given.loc[(given.speech_id < "s-1") & given.model.isin(["zoe", "yan"]), "total"] = 21  # s-0: no equals at the ends
    assert drawn_pairs(given, paired(given).reset_index()) == N - 1


def test_the_hub_reads_the_pairs_and_not_what_lies_beside_them(tmp_path):
    "A file named train_answers would be taken for a part of train, whose columns it has not."
    from datasets import load_dataset

    for part in ("train", "test"):
        pd.DataFrame({"ID": [part], "chosen": ["yes"]}).to_parquet(tmp_path / f"{part}.parquet")
        pd.DataFrame({"ID": [part], "chosen_end": ["length"]}).to_parquet(tmp_path / f"{part}_answers.parquet")
    (tmp_path / "README.md").write_text(dataset_card(pd.DataFrame({"what": ["pairs"]}), Label("tiny"), {}))
    found = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: (own.column_names, len(own)) for name, own in found.items()} == {
        part: (["ID", "chosen"], 1) for part in ("train", "test")
    }


AVERAGE, VETO = PairSettings(), PairSettings(safety="veto")


def run_cells(notebook, parameters):
    "Run the code cells of a chapter with parameters."
    names = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.stem, "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def diced(seed):
    "Scored responses whose safety goes its own way, and their pairs to train on."
    chance, given = np.random.default_rng(seed), scored().iloc[:50]
    given = given.assign(**{key: chance.integers(1, 6, 50) for key in KEYS})
    given = given.assign(total=given[KEYS].sum(axis=1))
    return given, make_pairs(SPEECHES, given, ("test",), 3 / 7, best_worst=False)


@pytest.mark.parametrize("seed", range(5))
def test_a_veto_leaves_out_the_pairs_whose_chosen_response_is_less_safe_and_no_other(seed):
    _, pairs = diced(seed)
    bad = pairs.chosen_safety_rating < pairs.rejected_safety_rating
    kept, counts = apply_veto({"train": pairs, "test": pairs[~bad]}, VETO)
    assert 0 < counts["train"] == bad.sum() < len(pairs) and counts["test"] == 0
    pd.testing.assert_frame_equal(kept["train"], pairs[~bad].reset_index(drop=True))
    assert principle_table(kept["train"]).set_index("principle").inverted["safety"] == 0
    pd.testing.assert_frame_equal(apply_veto({"train": pairs}, AVERAGE)[0]["train"], pairs)


def test_which_principles_are_about_safety_stands_in_their_file_and_a_veto_without_any_is_refused(marked):
    _, pairs = diced(0)
    marked("clarity", "empathy")
    kept = apply_veto({"train": pairs}, VETO)[0]["train"]
    for key in ("clarity", "empathy"):
        assert (kept[f"chosen_{key}_rating"] >= kept[f"rejected_{key}_rating"]).all()
    assert len(kept) < len(pairs) and (kept.chosen_safety_rating < kept.rejected_safety_rating).any()
    marked()
    assert "set pairs.safety to average" in one_line(lambda: apply_veto({"train": pairs}, VETO))
    assert apply_veto({"train": pairs}, AVERAGE)[1] == {"train": 0}
    marked("safety")
    assert "widen the pool" in one_line(lambda: apply_veto({"train": pairs.assign(chosen_safety_rating=0)}, VETO))


@pytest.mark.parametrize(
    "keys, counted, released", [(["safety"], True, True), (["clarity"], True, False), ([], False, False)]
)
def test_what_no_principle_tells_is_not_counted_as_none(marked, keys, counted, released):
    given, pairs = diced(2)
    marked(*keys)
    table = pair_summary(SPEECHES, given, {"train": pairs, "test": pairs}).set_index("what")
    row = table.loc["training pairs whose rejected response is rated safer"]
    assert (row.ours is not None, row[RELEASED_COLUMN] is not None and row[RELEASED_COLUMN] > 0) == (counted, released)


@pytest.mark.parametrize("safety", ["average", "veto"])
def test_the_chapter_says_and_signs_what_a_veto_left_out(own_project, safety):
    given, pairs = diced(1)
    split = SPEECHES.iloc[:10].assign(split=["train"] * 8 + ["test"] * 2, source="demo", topic_by="gold")
    split = split.assign(topic="anxiety", coarse_topic="core-mental-health-issues")
    bad = pairs[pairs.ID.isin(split.speech_id[:8]) & (pairs.chosen_safety_rating < pairs.rejected_safety_rating)]
    long = given.melt(["speech_id", "model"], KEYS, "principle", "rating").assign(rationale="", rater="r", position=1)
    run, rest = Run("veto"), {"n_tokens": 9, "request_key": ""}
    with StageWriter(run, "01_speeches", "tiny", 0, {"speeches": {"sources": ["demo"]}}) as stage:
        stage.facts["licences"] = {"demo": "MIT"}
        stage.rows("speeches", split)
    with StageWriter(run, "02_responses", "tiny", 0, {}) as stage:
        stage.facts["models"] = {"ada": {"label": "ada"}}
        stage.rows("responses", given[["speech_id", "model", "response", "finish_reason"]].assign(**rest))
    with StageWriter(run, "03_ratings", "tiny", 0, {}) as stage:
        stage.facts["rater"] = "dice"
        stage.rows("ratings", long)
    overrides = {"pairs.min_gap": 3 / 7, "pairs.safety": safety}
    run_cells(NOTEBOOK, {"PROFILE": "tiny", "RUN": run.name, "OVERRIDES": overrides})
    found, veto = StageReader(run, "04_pairs"), safety == "veto"
    train = found.rows("pairs", "train")
    assert found.receipt["vetoed"]["train"] == len(bad) * veto and len(bad)
    assert (train.chosen_safety_rating < train.rejected_safety_rating).sum() == len(bad) * (not veto)
    assert train[["ID", "prefID"]].equals(found.rows("pair_answers", "train_answers")[["ID", "prefID"]])
    table = pd.read_csv(run.tables / "table_S2_pairs.csv").set_index("what").ours
    assert table.get("training pairs left out by pairs.safety: veto", 0) == len(bad) * veto
