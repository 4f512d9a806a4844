"""Chapters: inputs are noted, results shown, labels name changed settings and no private place."""

import csv
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from psycopref.core.files import StageReader
from psycopref.core.stages import Run
from psycopref.core.tables import safe_table
from psycopref.run.chapter import changed_settings, full_caption, open_stage, short_text, shown_table
from psycopref.core.settings import load_profile
from psycopref.reporting.report_page import overview_page

from refusals import one_line

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


HOSTILE = "</style></td><script>alert(1)</script><img src=x onerror=alert(2)>\n=cmd|'/c calc'!A1"
SHEETS = ["=1+1", "+SUM(1)", "-A2+3", "@SUM(A1)", "\t=1", '"=1"', "a\n=1", "＝1", "a;=1"]


class Tags(HTMLParser):
    "Collect the tags of a page."

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        self.found |= {tag, *(name for name, _ in attributes if name.startswith("on"))}


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_what_models_write_is_text_wherever_it_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    stage, frame = open_stage("01_speeches", "tiny"), pd.DataFrame({HOSTILE: [HOSTILE], "text": [HOSTILE]})
    stage.made_by([HOSTILE], HOSTILE)
    stage.table("S9", "hostile", frame, HOSTILE)
    stage.preview(frame)
    stage.say(HOSTILE)
    stage.keep(hostile=frame)
    stage.finish()
    run = Run("tiny")
    [path] = run.tables.glob("*.html")
    entry = {"kind": "table", "number": "1", "path": path, "caption": HOSTILE}
    overview = overview_page(HOSTILE, stage.label, [shown_table(frame, HOSTILE, stage.label)], [entry], [])
    pages = [path.read_text(), overview, *(thing.data for thing in shown)]
    assert len(pages) == 5 and all("alert(1)" in page for page in pages)
    for page in pages:
        assert not tags(page) & {"script", "img", "onerror"}, page[:200]
    assert overview.count("</style>") == 1, "the page's own"


@pytest.mark.parametrize("text", SHEETS)
def test_a_sheet_for_people_holds_no_formula(text):
    stage = open_stage("01_speeches", "tiny")
    stage.table("S9", "sheet", pd.DataFrame({text: [text, "plain"]}), "A sheet")
    stage.keep(sheet=pd.DataFrame({text: [text]}))
    stage.finish()
    for path in (Run("tiny").tables / "table_S9_sheet.csv", Run("tiny").stage("01_speeches") / "sheet.csv"):
        for row in csv.reader(path.open(encoding="utf-8", newline="")):
            assert not any(re.search(r"(?:^|[\n;,\t])[\s\"]*[=+@＝-]", cell.replace("\u00a0", "!")) for cell in row), (
                row
            )


def test_numbers_of_a_sheet_stay_numbers():
    frame = pd.DataFrame({"n": pd.array([288, None], dtype="Int64"), "k": pd.Series([6, None], dtype=object)})
    frame = frame.assign(kappa=["-0.08 (no interval: too few)", "-0.22 (-0.40 to -0.10)"], gap=[-1.5, 2.0])
    assert safe_table(frame).to_csv(index=False) == frame.to_csv(index=False)


MADE = [  # what the earlier stage was made with, what is asked now, whether in a chain -> whether it is refused
    ({}, {}, False, False),
    ({"speeches.limit": 9}, {}, False, False),  # by hand, the rest is the run's own
    ({"speeches.limit": 9}, {"speeches.limit": 9}, False, False),
    ({"speeches.limit": 9}, {"speeches.limit": 8}, False, True),
    ({}, {"speeches.sources": ["demo", "counsel-chat=/x.csv"]}, False, True),
    ({}, {"responses.max_tokens": 7}, False, False),
    ({"speeches.limit": 9}, {}, True, True),  # a chain asks for all
    ({"speeches.limit": 9}, {"speeches.limit": 9}, True, False),
]


@pytest.mark.parametrize("made, asked, chain, refused", MADE)
def test_an_earlier_stage_made_otherwise_is_refused(monkeypatch, made, asked, chain, refused):
    first_stage(**made)
    if chain:
        monkeypatch.setenv("PSYCOPREF_ASKED", json.dumps({"name": "tiny", "overrides": asked}))
    stage = open_stage("02_responses", "tiny", overrides={} if chain else asked)
    if refused:
        assert "01_speeches was made with speeches." in one_line(lambda: stage.read("01_speeches", "speeches"))
    else:
        assert len(stage.read("01_speeches", "speeches")) == 1
