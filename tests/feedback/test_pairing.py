"""Pairs: among equals the seed decides, not the authors and not the order of rows; what the hub reads of them."""

import numpy as np
import pandas as pd

from psycopref.core.tables import Label
from psycopref.feedback.pairing import dataset_card, drawn_pairs, make_pairs

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
    return make_pairs(SPEECHES, given, ("test",), 7, best_worst=True, seed=seed).set_index("ID").sort_index()


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
        pd.DataFrame({"ID": [part], "chosen_cut": [True]}).to_parquet(tmp_path / f"{part}_answers.parquet")
    (tmp_path / "README.md").write_text(dataset_card(pd.DataFrame({"what": ["pairs"]}), Label("tiny"), {}))
    found = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: (own.column_names, len(own)) for name, own in found.items()} == {
        part: (["ID", "chosen"], 1) for part in ("train", "test")
    }
