"""Published values carry their source, and what is not the paper's never stands under the paper's name."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from psycopref.core.principles import principle_keys
from psycopref.core.paper import coarse_topics, paper_remarks, paper_values, published_source, published_values
from psycopref.core.paper import resource_path
from psycopref.core.tables import Label
from psycopref.experiments.mixing_grid import GridEntry, grid_row
from psycopref.feedback.pairing import RELEASED_COLUMN, dataset_card, pair_summary

PRINCIPLE_KEYS = principle_keys()

CHAPTERS = Path(__file__).resolve().parents[2] / "nbs"
PAPER = "Zhang, Eack & Chen (2025), arXiv:2502.19731, "
OTHERS = {"later_version": ("S20", "S21"), "released_dataset": ("S2",)}  # section -> tables that show it


PAPER_YAML = resource_path("paper.yaml").read_text(encoding="utf-8")


def test_every_value_has_a_place_a_version_and_a_tolerance():
    values, tolerances = published_values(), paper_remarks()["tolerances"]
    names = [(own["section"], own["path"]) for own in values]
    assert len(values) == len(set(names)) == 296
    for own in values:
        assert re.search(r"Table \d|§|column|counted", own["where"]), own
        assert own["kind"] in tolerances and own["version"] in ("first", "later", "release"), own
        assert (own["version"] == "first") == (own["section"] not in OTHERS), own
    columns = {own["where"].split("column ")[1] for own in values if own["section"] in ("table_1", "table_2")}
    assert {"Accuracy", "Brier", "Mental Issues", "Overall"} < columns and len(columns) == 13


def test_the_taxonomy_adds_up_to_the_number_of_speeches():
    for coarse, node in coarse_topics().items():
        assert sum(node["topics"].values()) == node["count"], coarse
    assert sum(node["count"] for node in coarse_topics().values()) == paper_values()["dataset"]["speeches"]
    assert sum(len(node["topics"]) for node in coarse_topics().values()) == paper_values()["design"]["fine_topics"]
    assert len(coarse_topics()) == paper_values()["design"]["coarse_topics"]


def test_speeches_pool_and_agreement_add_up():
    data, said, pool = (paper_values()[name] for name in ("dataset", "agreement", "table_5"))
    assert data["train_speeches"] + data["test_speeches"] == data["speeches"]
    assert data["test_pairs"] < data["test_speeches"] and data["train_pairs"] < 6 * data["train_speeches"]
    assert sum(map(len, pool.values())) == paper_values()["design"]["pool_models"]
    assert 100 * said["experts_agree"] / said["pairs"] == said["experts_agree_percent"]
    both = said["expert_1_with_labels"] + said["expert_2_with_labels"]
    assert 100 * both / (2 * said["pairs"]) == said["experts_with_labels_percent"]


SIZES = {"life-transitions": 115, "social-issues": 81, "youth-and-development": 146, "crisis-and-safety": 65}
SIZES["special-topics"] = (
    235  # test speeches of which all twelve values of a column are whole shares; three are unknown
)


def test_an_overall_win_rate_is_the_mean_of_its_topics_within_rounding():
    rest = {slug: node["count"] for slug, node in coarse_topics().items() if slug not in SIZES}
    left = paper_values()["dataset"]["test_speeches"] - sum(SIZES.values())
    weights = SIZES | {slug: left * n / sum(rest.values()) for slug, n in rest.items()}
    for rates in (rates for setting in paper_values()["table_2"].values() for rates in setting.values()):
        mean = sum(weights[slug] * rates[slug] for slug in weights) / sum(weights.values())
        assert abs(mean - rates["overall"]) < 0.1, rates
        for slug, n in SIZES.items():
            assert round(100 * round(rates[slug] * n / 100) / n, 1) == rates[slug], (slug, rates)


def test_the_later_version_repeats_the_first_and_averages_its_own():
    later, first = paper_values()["later_version"], paper_values()
    of_model = {row["model"]: row for row in first["table_1"]}
    for row in later["reward"]:
        name = row["model"].replace("PsyCo-", "PsychoCounsel-").removesuffix(" (Ranker)")
        assert [row[key] for key in ("accuracy", "auc", "ece", "brier")] == [
            of_model[name][key] for key in ("accuracy", "auc", "ece", "brier")
        ]
    for row in later["win_rates"]:
        for kind, more in (("base", ""), ("dpo", " + DPO"), ("dpo-iter", " + DPO-Iter")):
            assert row[kind] == first["table_2"][row["setting"]][row["backbone"] + more]["overall"]
    odd = [
        row["data"]
        for row in later["budget_10k"]
        if abs((row["accuracy"] + row["rewardbench"]) / 2 - row["average"]) > 0.01
    ]
    assert odd == ["Help10k"], "and the file says so"


def test_what_does_not_add_up_gives_two_figures_and_their_places():
    remarks = paper_remarks()
    for own in remarks["does_not_add_up"]:
        assert own["one"]["value"] != own["other"]["value"] and own["one"]["where"] != own["other"]["where"], own
    said = {own["what"]: own for own in remarks["does_not_add_up"]}
    data = paper_values()["dataset"]
    assert said["how many preference pairs there are"]["other"]["value"] == data["train_pairs"] + data["test_pairs"]
    learnt = said["pairs that DPO learns from"]
    design = paper_values()["design"]
    assert learnt["one"]["value"] == design["policy_steps"] * design["policy_batch"]
    assert learnt["other"]["value"] == int(data["train_pairs"] * (1 - design["development_share"]))
    assert any("average" in what for what in said) and len(said) == 9
    assert [own["where"] for own in remarks["not_printed"]] == ["Fig. 2", "Fig. 3", "Fig. 4", "Figs. 5 and 6"]


def test_another_file_is_read_in_its_place_and_leaves_the_package_s_alone():
    assert PAPER_YAML.count("speeches: {value: 26483") == 1
    changed = published_values(PAPER_YAML.replace("speeches: {value: 26483", "speeches: {value: 26484"))
    assert (
        changed[0]["value"] == 26484
        and published_values()[0]["value"] == 26483 == paper_values()["dataset"]["speeches"]
    )
    assert [own | {"value": 0} for own in changed] == [own | {"value": 0} for own in published_values()]


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
