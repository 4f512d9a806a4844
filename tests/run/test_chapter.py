"""Chapters: inputs are noted, results shown, labels name changed settings and no private place."""

import json

import pandas as pd

from psycopref.core.files import StageReader
from psycopref.core.stages import Run
from psycopref.run.chapter import changed_settings, full_caption, open_stage, short_text, shown_table
from psycopref.core.settings import load_profile

SPEECH = {"speech_id": "demo-0", "source": "demo", "speech": "I count the stairs.", "topic": "anxiety"}
SPEECH |= {"coarse_topic": "emotional", "topic_by": "gold", "split": "test"}


def first_stage(**overrides):
    stage = open_stage("01_speeches", "tiny", overrides=overrides)
    stage.keep(speeches=pd.DataFrame([SPEECH]), drops=[{"rows": 1}])
    stage.finish(licences={})
    return stage


def test_what_was_read_stands_in_the_receipt_and_nothing_else():
    first_stage()
    stage = open_stage("02_responses", "tiny", seed=3)
    assert len(stage.read("01_speeches", "speeches")) == 1 and stage.read("01_speeches", "speeches").shape == (1, 7)
    assert stage.receipt("01_speeches")["licences"] == {}  # a receipt that is looked at is no input
    stage.finish(failures=0)
    receipt = StageReader(Run("tiny"), "02_responses").receipt
    assert list(receipt["inputs"]) == ["outputs/tiny/01_speeches/speeches.parquet"]
    assert receipt["seed"] == 3 and receipt["failures"] == 0 and receipt["models"] == {}


def test_an_interrupted_stage_goes_on_where_inputs_and_settings_are_the_same():
    first_stage()
    for overrides, kept in (({}, False), ({}, True), ({"responses.max_tokens": 7}, False)):
        stage = open_stage("02_responses", "tiny", overrides=overrides)
        stage.read("01_speeches", "speeches")
        assert (stage.work / "half.txt").is_file() is kept
        (stage.work / "half.txt").write_text("half")


def test_labels_name_changed_settings_of_all_that_results_hang_on():
    first_stage(**{"speeches.limit": 9, "budget_usd": 3.0, "reward.epochs": 1})
    stage = open_stage("02_responses", "tiny", overrides={"responses.max_tokens": 7})
    stage.read("01_speeches", "speeches")
    assert stage.profile == "tiny with responses.max_tokens=7, speeches.limit=9"
    usual = open_stage("02_responses", "tiny", overrides={"responses.max_tokens": 24})
    assert usual.profile == "tiny"
    private = first_stage(**{"speeches.sources": ["demo=/home/somebody/own.jsonl"]}).profile
    assert "somebody" not in private and 'speeches.sources=["demo"]' in private


def test_settings_on_which_nothing_hangs_are_no_change():
    profile = load_profile("tiny", {"reward.report_to": "wandb", "reward.push_to_hub": "me/mine", "reward.epochs": 3})
    assert changed_settings(profile, "05_reward") == {"reward.epochs": 3}


def test_captions_carry_number_and_origin_once():
    drift = "Drift (not in the paper's first version)"
    assert full_caption("Table", "2", "win rates") == "Table 2: win rates"
    assert full_caption("Table", "S3", "gains") == "Table S3: gains (not in the paper)"
    assert full_caption("Table", "S2", "Pairs (§3.3)") == "Table S2: Pairs (§3.3)"
    assert full_caption("Figure", "S9", drift) == f"Figure S9: {drift}"


def test_long_tables_and_texts_are_cut_where_they_are_shown_only(capsys):
    frame = pd.DataFrame({"n": range(40), "text": ["many words " * 50] * 40})
    assert shown_table(frame, "Forty", rows=5).endswith("… and 35 more rows.</p>")
    assert len(short_text(frame.text[0])) <= 242 and short_text(frame.text[0]).endswith(" …")
    stage = open_stage("01_speeches", "tiny")
    stage.table("S9", "drops", frame, "Forty rows", rows=5)
    stage.finish()
    assert len(pd.read_csv(Run("tiny").tables / "table_S9_drops.csv")) == 40
    assert json.loads((Run("tiny").tables / "table_S9_drops.json").read_text())["caption"].startswith("Table S9: Forty")
