"""Published values carry their source, and what is not the paper's never stands under the paper's name."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from psycopref.core.principles import principle_keys
from psycopref.core.paper import paper_values, published_source
from psycopref.core.tables import Label
from psycopref.experiments.mixing_grid import GridEntry, grid_row
from psycopref.feedback.pairing import RELEASED_COLUMN, dataset_card, pair_summary

PRINCIPLE_KEYS = principle_keys()

CHAPTERS = Path(__file__).resolve().parents[2] / "nbs"
PAPER = "Zhang, Eack & Chen (2025), arXiv:2502.19731, "
OTHERS = {"later_version": ("S20", "S21"), "released_dataset": ("S2",)}  # section -> tables that show it


def test_every_published_section_has_its_source_and_only_the_paper_s_has_the_paper_s():
    sections = set(paper_values()) - {"sources"}
    assert set(paper_values()["sources"]) == sections
    assert {name for name in sections if not published_source(name).startswith(PAPER)} == set(OTHERS)
    assert all(re.search("Table \\d|§", published_source(name)) for name in sections - set(OTHERS))
    assert all("not in the paper" in published_source(name) for name in OTHERS)


@pytest.mark.parametrize("section, number", [(name, number) for name, own in OTHERS.items() for number in own])
def test_a_table_with_values_of_another_source_names_it_in_its_caption(section, number):
    cells = [
        "".join(cell["source"])
        for path in CHAPTERS.glob("[0-9]*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    [shown] = [text for text in cells if f'stage.table("{number}"' in text]
    assert re.search(rf"published_source\(['\"]{section}['\"]\)", shown)


def test_what_was_counted_in_the_released_pairs_is_not_the_paper_s():
    rated = {f"{side}_{key}_rating": [n] for side, n in (("chosen", 4), ("rejected", 2)) for key in PRINCIPLE_KEYS}
    pairs = pd.DataFrame({"ID": ["a"], "chosen_model": "x", "rejected_model": "y", **rated})
    speeches = pd.DataFrame({"speech_id": ["a"], "split": ["train"]})
    found = pair_summary(speeches, None, {"train": pairs, "test": pairs})
    counted = found[RELEASED_COLUMN].dropna()
    assert counted.tolist() == [662] and found.paper[counted.index].isna().all()
    assert set(found.paper.dropna()) <= set(paper_values()["dataset"].values())
    card = dataset_card(found, Label("tiny"), {})
    assert f"{RELEASED_COLUMN}: {published_source('released_dataset')}" in card


def test_a_row_of_the_grid_names_the_later_version_wherever_its_values_stand():
    scores = pd.DataFrame({"ID": list("ab"), "prefID": 0, "chosen_score": 1.0, "rejected_score": 0.0})
    entry = GridEntry("Llama-3.2-3B", "help-all", "HelpSteer2", {"general": 4}, {"psy": scores, "general": scores})
    row = grid_row(entry, samples=20)
    [printed] = [own for own in paper_values()["later_version"]["helpsteer"] if own["accuracy"] == 81.6]
    assert {name for name, value in row.items() if value in (81.6, 0.916, 0.12, 83.6)} == {
        f"later version: {name}" for name in ("counselling %", "AUC", "Brier", "RewardBench %")
    }
    assert printed["rewardbench"] == row["later version: RewardBench %"] and not any("paper" in name for name in row)
