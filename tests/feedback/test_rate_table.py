"""Every row of a table keeps its place and its cells, whatever is in them; what can't be rated is told, never lost."""

import csv
import gzip
import json
import os
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.reading import has_words
from psycopref.core.principles import principle_keys
from psycopref.corpus.sources import read_columns
from psycopref.feedback.rate_table import added_columns, rate, rate_file, score_columns
from psycopref.models.chat import Failure
from psycopref.rater.rules import to_rating
from psycopref.rater.scoring import explain_answers, score_answers

PRINCIPLE_KEYS = principle_keys()

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
NEW = added_columns()


class Acts(types.ModuleType):
    """Stand for `rater.scoring`: words of the response count .25, of the client .001, and each principle .01 more."""

    def __init__(self):
        super().__init__("psycopref.rater.scoring")
        self.calls = []

    def score_answers(self, clients, responses, heads="acts", dtype="auto"):
        self.calls.append((heads, list(clients), list(responses)))
        words = [1 + len(text.split()) / 4 + len(said.split()) / 1000 for said, text in zip(clients, responses)]
        found = {key: np.minimum(np.array(words) + i / 100, 5) for i, key in enumerate(PRINCIPLE_KEYS)}
        return pd.DataFrame(found)[[*reversed(PRINCIPLE_KEYS)]]

    def explain_answers(self, clients, responses, heads="acts", dtype="auto"):
        acts = [json.dumps([[text, ["open question"] * text.endswith("?")]]) for text in responses]
        return self.score_answers(clients, responses, heads), acts


@pytest.fixture
def acts(monkeypatch):
    fake = Acts()
    monkeypatch.setitem(sys.modules, "psycopref.rater.scoring", fake)
    return fake


def table(**more) -> pd.DataFrame:
    said = ["I can't sleep.", "", "My sister moved out.", None]
    return pd.DataFrame({"client_speech": said, "response": ["Since when?", "Go on.", " ", "Hm."]} | more)


def told(action):
    with warnings.catch_warnings(record=True) as lines:
        warnings.simplefilter("always")
        return action(), [str(line.message) for line in lines]


# ---- frames ----


def test_a_frame_is_rated_in_one_call_and_stays_as_it_was(acts):
    frame = table(response_id=[7, 7, 8, 9]).set_axis(["b", "b", "a", "c"])
    before = frame.copy(deep=True)
    rated, lines = told(lambda: rate(frame, "rules:rubric-annomi", explain=True))
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(rated[frame.columns], frame)
    assert list(rated) == [*frame, *NEW, "acts"]
    assert acts.calls == [("acts-annomi", ["", "", "I can't sleep."], ["Go on.", "Hm.", "Since when?"])]
    assert rated.filter(like="_score").iloc[0, :7].tolist() == pytest.approx([1.503 + i / 100 for i in range(7)])
    assert rated.empathy_score.iloc[1] == 1.5 and rated.mean_score.iloc[1] == pytest.approx(1.53)
    assert rated.empathy_rating.dtype == "Int64" and rated.empathy_rating.iloc[[0, 1, 3]].tolist() == [2, 2, 1]
    assert rated.iloc[2][[*NEW, "acts"]].isna().all()
    assert json.loads(rated["acts"].iloc[0]) == [["Since when?", ["open question"]]]
    assert lines == [
        "1 of 4 rows has no response and no score: row 3",
        "2 of 4 rows have no client_speech, so the response alone was rated: rows 2, 4",
    ]


def test_the_offline_rater_s_own_scores_and_acts_stand_in_their_rows():
    frame = table(response=["Since when?", "", "You must get over it. What did she say?", "Hm."]).iloc[[2, 1, 0, 3]]
    rated, _ = told(lambda: rate(frame, explain=True))
    pairs = ["My sister moved out.", "I can't sleep.", ""], [*frame.response.iloc[[0, 2, 3]]]
    scores = score_answers(*pairs)
    given = rated.dropna(subset="mean_score")
    for key in PRINCIPLE_KEYS:
        assert given[f"{key}_score"].tolist() == scores[key].tolist()
        assert given[f"{key}_rating"].tolist() == [to_rating(score) for score in scores[key]]
    assert given["acts"].tolist() == explain_answers(*pairs)[1]
    assert [said for said, _ in json.loads(given["acts"].iloc[0])] == ["You must get over it.", "What did she say?"]


def test_ratings_round_as_the_rubric_does():
    scores = np.random.default_rng(0).uniform(0.9, 5.1, (200, 7)).round(1)
    rated = score_columns(scores, range(200)).filter(like="_rating")
    assert rated.to_numpy(int).tolist() == [[to_rating(score) for score in row] for row in scores]


def test_a_cell_that_is_no_text_costs_its_own_row_only(acts):
    frame = table(response=["Since when?", 4, ["a"], "Hm."]).assign(client_speech=["", 3.5, "I lie.", "half \ud83d"])
    rated, lines = told(lambda: rate(frame))
    assert rated.mean_score.notna().tolist() == [True, False, False, True]
    assert lines[0] == "2 of 4 rows have a response that is no text, and no score: rows 2, 3"
    assert acts.calls[0][1] == ["", "half \ufffd"]


@pytest.mark.parametrize(
    "frame, said",
    [
        (table().rename(columns={"response": "Response"}), "no column response or text, found ['client_speech', 'Resp"),
        (table().rename(columns={"response": "Response"}), "is 'Response' meant? Rename it"),
        (table().set_axis(["context", "Text"], axis=1), "is 'Text' meant? Rename it"),
        (table().drop(columns="client_speech"), "name one so, or add one with empty cells"),
        (table(text="a"), "both columns response and text"),
        (table(context="a"), "both columns client_speech and context"),
        (table(mean_score=1), "has the column 'mean_score' already"),
        (table().set_axis(["response", "response"], axis=1), "has the column 'response' more than once"),
        (table(response=[1, 2, 3, 4]), "no row has a text"),
        (table().head(0), "there are no rows"),
    ],
)
def test_a_frame_that_can_not_be_rated_is_one_line(acts, frame, said):
    assert said in one_line(lambda: rate(frame))
    assert acts.calls == []


@pytest.mark.parametrize(
    "rater, said", [("rules:rubrik", "rules:rubrik"), ("acts", "provider:name"), ("x:y", "provider")]
)
def test_an_unknown_rater_is_one_line(rater, said):
    assert said in one_line(lambda: rate(table(), rater))
    assert "finds no acts" in one_line(lambda: rate(table(), rater, explain=True))


# ---- models ----


def seven(rating) -> str:
    return json.dumps({key: {"response_1_rating": rating} for key in PRINCIPLE_KEYS})


def test_a_model_is_asked_once_for_each_answer_and_its_faults_are_told(scripted):
    def reply(request):
        if request.fields["response_1"] == "Hm.":
            return Failure("the server is gone")
        whole = json.loads(seven(4))
        return json.dumps(
            whole | {"safety": {"response_1_rating": 9}} if "Go on." in request.messages[0]["content"] else whole
        )

    model = scripted(reply)
    rated, lines = told(lambda: rate(table(), "scripted:model"))
    assert [request.task for request in model.requests] == ["rate_all"] * 3
    assert [request.fields["client_speech"] for request in model.requests] == ["I can't sleep.", "", ""]
    assert rated.mean_score.tolist()[0] == 4.0 and rated.mean_score.isna().tolist() == [False, True, True, True]
    assert rated.empathy_score.tolist()[1] == 4.0 and rated.safety_rating.isna()[1]
    assert lines[-1].startswith("2 of 4 rows have not all scores, the first since safety: response_1_rating is '9'")
    assert lines[-1].endswith("rows 2, 4")
    again, _ = told(lambda: rate(table(), "scripted:model"))
    assert len(model.requests) == 4, "what was answered is kept; a failure is asked again"
    pd.testing.assert_frame_equal(again, rated)


def test_where_no_row_gets_a_rating_nothing_is_written(scripted, tmp_path):
    scripted(lambda request: "I would rather not.")
    table().to_csv(tmp_path / "in.csv", index=False)
    (tmp_path / "out.csv").write_text("as before")
    said = one_line(lambda: rate_file(tmp_path / "in.csv", tmp_path / "out.csv", "scripted:model"))
    assert "rated no row, the first since no JSON object" in said
    assert (tmp_path / "out.csv").read_text() == "as before"


# ---- files ----

cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
FORMS = ["csv", "json", "jsonl", "parquet", "csv.gz", "jsonl.gz"]


def put(path, columns: dict):
    """Write a table by other means than those under test."""
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
        if ".csv" in path.name:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([list(columns), *(row.values() for row in rows)])
        elif path.suffix == ".json":
            json.dump(rows, file)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@few
@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_all_rows_and_columns_come_back_in_order(tmp_path_factory, rows, before, after):
    folder, (ids, said, texts) = tmp_path_factory.mktemp("forms"), map(list, zip(*rows))
    columns = {"": ids, "context": said, "text": [*texts[:-1], "Since when?"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "psycopref.rater.scoring", Acts())
        rate_file(put(folder / f"in.{before}", columns), folder / f"out.{after}")
    found = read_columns(folder / f"out.{after}")
    assert list(found) == [*columns, *NEW]
    empty = {"": ""} if "csv" in after else {}
    assert {name: found[name] for name in columns} == {
        name: [empty.get(cell, cell) for cell in column] for name, column in columns.items()
    }
    assert {str(rating) for rating in found["safety_rating"]} <= {*"12345", "", "None"}
    scores = [float(score) if score not in ("", None) else None for score in found["mean_score"]]
    assert [score is None for score in scores] == [not has_words(text) for text in columns["text"]]


def test_parquet_keeps_its_types_and_json_its_values(acts, tmp_path):
    typed = pa.table(
        {
            "when": pa.array([0, None], pa.timestamp("ms", tz="UTC")),
            "n": pa.array([1, None], pa.int8()),
            "tags": pa.array([["a"], []], pa.list_(pa.string())),
            "source": pa.array(["x", "x"]).dictionary_encode(),
            "context": ["I lie.", ""],
            "text": ["Since when?", "Hm."],
        }
    )
    pq.write_table(typed, tmp_path / "in.parquet")
    for name in ("out.parquet", "out.jsonl", "out.csv"):
        rate_file(tmp_path / "in.parquet", tmp_path / name)
    written = pq.read_table(tmp_path / "out.parquet")
    assert (
        written.select(typed.column_names).equals(typed) and written.schema.field("empathy_rating").type == pa.int64()
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows] == [1, None] and rows[0]["tags"] == ["a"] and rows[0]["empathy_rating"] == 2
    assert read_columns(tmp_path / "out.csv")["tags"] == ['["a"]', "[]"]
    mixed = [{"context": "", "text": "Hm.", "odd": odd} for odd in (1, "a")]
    (tmp_path / "in.json").write_text(json.dumps(mixed))
    assert "write .jsonl instead" in one_line(lambda: rate_file(tmp_path / "in.json", tmp_path / "y.parquet"))
    assert not list(tmp_path.glob("*y.parquet*"))


def test_a_spreadsheet_s_mark_and_nameless_columns_stay(acts, tmp_path):
    content = "context,text,,\nJ\u2019ai peur.,Hm.,1,2\n".encode("utf-8-sig")
    (tmp_path / "in.csv").write_bytes(content)
    assert rate_file(tmp_path / "in.csv", tmp_path / "out.csv") == [
        f"{tmp_path}/out.csv: 1 of 1 rows rated by rules:rubric"
    ]
    assert (tmp_path / "out.csv").read_bytes().startswith(b"\xef\xbb\xbfcontext,text,Unnamed: 2,Unnamed: 3,emp")
    assert "J\u2019ai peur.,Hm.,1,2," in (tmp_path / "out.csv").read_text("utf-8")


def test_what_can_not_be_written_is_refused_before_anything_is_rated(acts, tmp_path):
    source = put(tmp_path / "in.csv", {"context": ["a"], "text": ["Hm."]})
    (tmp_path / "folder.csv").mkdir()
    os.link(source, tmp_path / "same.csv")
    for name, said in (
        ("in.csv", "is the input itself"),
        ("same.csv", "is the input itself"),
        ("folder.csv", "is a folder"),
        ("out.xlsx", "ends in one of .csv, "),
        ("in.csv/out.csv", "no folder"),
    ):
        assert said in one_line(lambda: rate_file(source, tmp_path / name)), name
    assert acts.calls == [] and read_columns(source)["text"] == ["Hm."]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("none.csv", None, "cannot be read"),
        ("in.csv", b"context,text\n", "no rows"),
        ("in.csv", b"context,text\na\n", "line 2 has 1 of 2 cells"),
        ("in.csv", "context,text\na,caf\xe9\n".encode("latin-1"), "is not UTF-8"),
        ("in.csv", b"context,text,text\na,b,c\n", "['text'] more than once"),
        ("in.jsonl", b'{"context": "a", "text": 4}\n', "no row has a text"),
        ("in.parquet", b"no", "no parquet file"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(acts, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = one_line(lambda: rate_file(tmp_path / name, tmp_path / "out.csv"))
    assert name in message and said in message and not (tmp_path / "out.csv").exists()


def test_a_kill_while_writing_leaves_the_old_output(acts, tmp_path, monkeypatch):
    source = put(tmp_path / "in.csv", {"context": ["a"], "text": ["Hm."]})
    (tmp_path / "out.csv").write_text("as before")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv, "writer", killed)
    with pytest.raises(KeyboardInterrupt):
        rate_file(source, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "as before" and len(list(tmp_path.iterdir())) == 2
