"""Every source is read in the form it was published in, and no row is lost."""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import BODY, COMMIT, Hub, in_child, one_line, open_loopback, ranged, send, serve

from psycopref.corpus import sources
from psycopref.core.files import SCHEMAS, sha256_file
from psycopref.corpus.fetching import url_place
from psycopref.corpus.sources import (
    RELEASED_DATASET,
    SOURCES,
    RawSpeech,
    Source,
    client_turn,
    is_local,
    open_released,
    open_source,
    pick_files,
    read_columns,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("module", ["sources", "general"])
def test_importing_stays_light(module):
    heavy = ("pandas", "numpy", "pyarrow", "httpx", "huggingface_hub", "torch", "filelock")
    code = f"import sys, psycopref.corpus.{module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def as_csv(path, head, *rows, encoding="utf-8"):
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def texts(spec):
    return {speech.row: speech.text for speech in open_source(spec).read().speeches}


# ---- each source as published ----

CHAT_HEAD = "questionID questionTitle questionText questionUrl topics therapistName therapistUrl answerText upvotes"
CHAT_2020 = " questionID questionTitle questionText questionLink topic therapistInfo therapistURL answerText upvotes"
CHAT_2020 += " views split"


def chat_csv(path, *rows):
    """Write a counsel-chat table of (key, text, topics)."""
    page = "https://example.org"
    full = [
        (*(key, "T", text, page, topics, "Someone", page), "<p>I hear you,\nand more.</p>", 1)
        for key, text, topics in rows
    ]
    return as_csv(path, CHAT_HEAD.split(), *full)


def test_counsel_chat_in_both_forms(tmp_path):
    said = 'I said "no".\nThen, I left.'
    rows = [("a1", said, "Family Conflict,Stress"), ("a1", said, "Family Conflict,Stress"), ("b2", "", "")]
    found = open_source(f"counsel-chat={chat_csv(tmp_path / 'counselchat-data.csv', *rows)}").read()
    assert found.speeches == (RawSpeech(0, said, ("Family Conflict", "Stress")), RawSpeech(2, ""))
    assert (found.rows, found.repeats, found.unreadable) == (3, 1, 0)
    old = [
        ("0", "I am sad.", "grief-and-loss", "a"),
        ("0", "I am sad.", "grief-and-loss", "b"),
        ("1", "I am tired.", "depression", "c"),
    ]
    old = [
        (n, key, "T", text, "l", topic, "i", "u", said, 1, 2, "train") for n, (key, text, topic, said) in enumerate(old)
    ]
    for folder in ("old", "clone/data"):
        as_csv(tmp_path / folder / "20200325_counsel_chat.csv", CHAT_2020.split(" "), *old)
    found = open_source(f"counsel-chat={tmp_path / 'old'}").read()
    expected = RawSpeech(0, "I am sad.", ("grief-and-loss",)), RawSpeech(2, "I am tired.", ("depression",))
    assert found.speeches == expected and found.repeats == 1
    both = chat_csv(tmp_path / "clone" / "data" / "counselchat-data.csv", *rows)
    assert open_source(f"counsel-chat={tmp_path / 'clone'}").paths == (both,), "one form, not both"


def test_a_key_that_returns_with_another_text_is_a_speech(tmp_path):
    rows = [("a", "one", ""), ("a", "two", ""), ("a", "one", ""), ("", "one", ""), ("", "one", "")]
    found = open_source(f"counsel-chat={chat_csv(tmp_path / 'a.csv', *rows)}").read()
    assert [s.row for s in found.speeches] == [0, 1, 3, 4] and found.repeats == 1 and found.rows == 5


def test_the_published_counsel_chat_is_read_whole(counsel_chat):
    frame = pd.read_csv(counsel_chat, dtype=str, keep_default_na=False)
    found = open_source(f"counsel-chat={counsel_chat}").read()
    assert found.rows == len(frame) == 1482 and found.unreadable == 0
    first = frame[~frame.questionID.duplicated()]
    assert [s.row for s in found.speeches] == first.index.tolist() and found.repeats == len(frame) - len(first)
    one_end = first.questionText.str.replace("\r\n?", "\n", regex=True).tolist()
    assert [re.sub(r"\r\n?", "\n", s.text) for s in found.speeches] == one_end
    listed = [tuple(t.strip() for t in topics.split(",") if t.strip()) for topics in first.topics]
    assert [s.topics for s in found.speeches] == listed


def test_psycho8k_as_json_and_as_two_files_of_lines(tmp_path):
    path = tmp_path / "Alexander_Street_shareGPT_2.0.json"
    rows = [{"instruction": "Please answer.", "input": f"Speech {n}.", "output": "Answer."} for n in range(3)]
    path.write_text(json.dumps(rows, indent=2))
    assert texts(f"psycho8k={path}") == texts(f"psycho8k={tmp_path}") == {n: f"Speech {n}." for n in range(3)}
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "input.txt").write_bytes("I can’t sleep…\nCafé at night\u0085no\n\n".encode("cp1252", "replace"))
    (lines / "output_GT.txt").write_bytes(b"a\nb\nc\n")
    for spec in (lines, lines / "input.txt", lines / "output_GT.txt"):
        assert list(texts(f"psycho8k={spec}").values()) == ["I can’t sleep…", "Café at night?no", ""]
    (lines / "output_GT.txt").write_bytes(b"a\nb\n")
    assert "3 lines" in one_line(lambda: texts(f"psycho8k={lines}"))
    (lines / "output_GT.txt").unlink()
    assert "output_GT.txt" in one_line(lambda: texts(f"psycho8k={lines / 'input.txt'}"))


def test_therapist_qa_with_its_byte_order_mark(tmp_path):
    head = ("Id_Number", "Patient Question", "Distorted part", "Dominant Distortion", "Secondary Distortion (Optional)")
    rows = ("4500", "I am late, again.", "", "No Distortion", ""), ("4501", "", "x", "Labeling", "")
    path = as_csv(tmp_path / "Annotated_data.csv", head, *rows, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert texts(f"therapistQA={path}") == {0: "I am late, again.", 1: ""}
    as_csv(tmp_path / "Therapist_responses.csv", ("Answer", "Question", "Id_Number"), ("A.", "Q.", "1"))
    assert texts(f"therapistQA={tmp_path}") == {0: "Q."}
    assert "kaggle" in one_line(lambda: open_source("therapistQA")) and not is_local("therapistQA")


def test_amod_counsel_counts_the_rows_that_repeat_a_context(tmp_path):
    contexts = ["I am sad.", "I am sad.", "I am tired.", "I am sad.", ""]
    rows = (json.dumps({"Context": c, "Response": f"R{n}"}) + "\n" for n, c in enumerate(contexts))
    (tmp_path / "combined_dataset.json").write_text("".join(rows))
    found = open_source(f"amod-counsel={tmp_path}").read()
    assert {s.row: s.text for s in found.speeches} == {0: "I am sad.", 2: "I am tired.", 4: ""}
    assert found.repeats == 2 and found.rows == 5


def test_mental_chat_16k_counts_its_rows_over_both_files(tmp_path):
    synthetic, interview = tmp_path / "Synthetic_Data_10K.csv", tmp_path / "Interview_Data_6K.csv"
    for path, said in ((synthetic, "made"), (interview, "heard")):
        rows = (("You are a helpful assistant.", f"{said} {n}", "ok") for n in range(2))
        as_csv(path, ("instruction", "input", "output"), *rows)
    expected = {0: "heard 0", 1: "heard 1", 2: "made 0", 3: "made 1"}
    assert texts(f"mentalChat16k={tmp_path}") == texts(f"mentalChat16k={synthetic}") == expected
    interview.unlink()
    for spec in (tmp_path, synthetic):  # half of it would have other row numbers
        assert "Interview" in one_line(lambda spec=spec: open_source(f"mentalChat16k={spec}"))


@pytest.mark.parametrize("column", ["question", "Question", "query", "input", "text", "post1"])
def test_mental_agora_under_any_likely_column(tmp_path, column):
    train = pd.DataFrame({"author": [7, 8], column: ["I am sad.", None], "response": "ok"})
    train.to_parquet(tmp_path / "train.parquet")
    found = open_source(f"mentalAgora={tmp_path}").read()
    assert [s.text for s in found.speeches] == ["I am sad.", ""] and found.unreadable == 1
    pd.DataFrame({column: ["I am old."], "response": "ok"}).to_parquet(tmp_path / "test.parquet")
    assert list(texts(f"mentalAgora={tmp_path}").values()) == ["I am old.", "I am sad.", ""]


def test_phi2_mental_yields_the_question_only(tmp_path):
    shown = {
        "### Human: I am sad. ### Assistant: Why?": "I am sad.",
        "Question: I am tired.\nAnswer: Rest.": "I am tired.",
        "no mark at all": "",
        "[INST] I am cold. [/INST] Dress.": "I am cold.",
    }
    found = open_source(f"phi2Mental={as_csv(tmp_path / 'phi2-data.csv', ('text',), *zip(shown))}").read()
    assert [s.text for s in found.speeches] == [*shown.values()] and (found.unreadable, found.rows) == (1, 4)


words = st.sampled_from(["I", "can't", "sleep.", "Why?", "was", "late,", "2", "é", "again"])
plain = st.lists(words, min_size=1, max_size=9).map(" ".join)
befores, betweens = st.sampled_from(["", "### ", "**", "<"]), st.sampled_from([" ", "\n", "\n\n"])


@few
@given(plain, plain, st.sampled_from(sources.TURN_MARKS), befores, betweens)
def test_the_answer_never_gets_into_the_question(question, answer, marks, before, between):
    after = {"**": "**", "<": ">"}.get(before, "")
    text = f"{before}{marks[0]}{after}: {question}{between}{before}{marks[1]}{after}: {answer}"
    assert client_turn(text) == question


def test_the_demo_corpus_is_shipped():
    opened = open_source("demo")
    found = opened.read()
    assert found.rows == len(found.speeches) == 336 and all(s.topics and s.text for s in found.speeches)
    assert is_local("demo") and opened.origin["licence"].startswith("MIT")
    assert opened.origin["files"][0]["from"] == "package:demo_speeches.jsonl"


@pytest.mark.parametrize("source", [*SOURCES.values(), RELEASED_DATASET], ids=lambda source: source.name)
def test_every_source_is_declared_in_full(source):
    assert source.licence and source.page.startswith("https://") and source.speech
    assert source.scraped == (source.name != "demo")
    assert all(home.startswith(("package:", "https://", "hf://datasets/")) and "," not in home for home in source.homes)
    names = [home.rsplit("/", 1)[1] for home in source.homes if home.endswith((".csv", ".json", ".parquet"))]
    same = not names or pick_files(source, names[::-1], "home") == names
    assert same, "a folder that holds its files is read in the same order"


def test_the_sources_are_these():
    assert " ".join(SOURCES) == (
        "demo counsel-chat psycho8k therapistQA amod-counsel mentalChat16k mentalAgora phi2Mental"
    )


# ---- nothing lost ----

cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@few
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_a_table_is_the_same_in_every_form(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("form") / f"table.{kind}"
    table = {"Context": [a for a, _ in rows], "Response": [b for _, b in rows]}
    objects = [dict(zip(table, row)) for row in rows]
    if kind == "csv":
        as_csv(path, tuple(table), *rows)
    elif kind == "parquet":
        pd.DataFrame(table).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(objects))
    else:
        path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    assert read_columns(path) == table
    found = open_source(f"amod-counsel={path}").read()
    first = [a for n, (a, _) in enumerate(rows) if not a.strip() or a not in table["Context"][:n]]
    assert found.rows == len(rows) and [s.text for s in found.speeches] == first


values = st.one_of(
    *(st.text(max_size=5), st.integers(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)),
    st.dictionaries(st.just("a"), st.integers()),
)


@few
@given(st.lists(values, min_size=1, max_size=8))
def test_a_cell_that_is_no_text_is_counted(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps([{"input": value} for value in values]))
    expected = [value if isinstance(value, str) else "" for value in values]
    if not any(isinstance(value, str) for value in values):
        assert "expected text" in one_line(lambda: open_source(f"psycho8k={path}").read())
        return
    found = open_source(f"psycho8k={path}").read()
    assert found.unreadable == sum(not isinstance(value, str) for value in values)
    assert len(found.speeches) == len(values)
    assert all(s.text == value or "\ufffd" in s.text for s, value in zip(found.speeches, expected))


def test_a_cell_of_fifty_million_characters_passes_and_the_limit_is_restored(tmp_path):
    before = csv.field_size_limit()
    path = as_csv(tmp_path / "a.csv", ("Context", "Response"), ("x" * 50_000_000, "y"))
    assert len(texts(f"amod-counsel={path}")[0]) == 50_000_000 and csv.field_size_limit() == before


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_line_ends_only_where_lines_end(tmp_path, strange):
    first = json.dumps({"Context": f"a{strange}b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f'{first}\r\n\r\n{{"Context": "c"}}\r\n'.encode())
    (tmp_path / "a.csv").write_bytes(f'Context,Response\r\n"a{strange}b",x\r\n\r\nc,y\r\n'.encode())
    for path in tmp_path.iterdir():
        assert list(texts(f"amod-counsel={path}").values()) == [f"a{strange}b", "c"]


def test_half_a_surrogate_pair_becomes_something_a_file_can_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"Context": "odd \\ud83d end"}\n{"Context": "smile \\ud83d\\ude00"}\n')
    assert list(texts(f"amod-counsel={tmp_path / 'a.jsonl'}").values()) == ["odd \ufffd end", "smile \U0001f600"]


# ---- bad input ----

BAD = {
    "empty.csv": (b"", "is empty"),
    "blank.csv": (b"\n \n", "is empty"),
    "head.csv": (b"Context,Response\n", "no rows"),
    "other.csv": (b"id,words\n1,a\n", "'Context', found ['id', 'words']"),
    "long.csv": (b"Context,Response\na,b\na,b,c\n", "line 3 has 3 of 2"),
    "short.csv": (b'Context,Response\n"a\nb",c\nd\n', "line 4 has 1 of 2"),
    "quote.csv": (b'Context,Response\n"a,b\nc,d\n', "unexpected end of data"),
    "after.csv": (b'Context,Response\n"a"b,c\n', "line 2"),
    "twice.csv": (b"Context,Context\na,b\n", "more than once"),
    "nul.csv": (b"Context,Response\na,b\nc\0,d\n", "line 3: holds a NUL"),
    "latin.csv": ("Context,Response\ncaf\xe9,b\n".encode("latin-1"), "UTF-8 (byte 20)"),
    "wide.csv": ("Context,Response\na,b\n".encode("utf-16"), "UTF-16, expected UTF-8"),
    "line.jsonl": (b'{"Context": "a"}\n\n{"Context": \n', "line 3"),
    "list.json": (b'[{"Context": "a"},\n {"Context" "b"}]', "line 2"),
    "objects.json": (b'[{"Context": "a"}, 3]', "item 2: found int"),
    "lines.jsonl": (b'{"Context": "a"}\n["b"]\n', "line 2: found list"),
    "pretty.json": (b'{\n "Context": ["a"]\n}', "line 1"),
    "none.json": (b"[]", "no rows"),
    "deep.json": (b"[" * 200_000, "line 1"),
    "digits.json": (b'[{"Context": ' + b"1" * 5000 + b"}]", "line 1"),
    "numbers.jsonl": (b'{"Context": 1}\n{"Context": 2}\n', "holds int, expected text"),
    "nulls.jsonl": (b'{"Context": null}\n', "expected text"),
    "no.parquet": (b"nothing of the kind", "PAR1"),
    "cut.parquet": (b"PAR1" + b"\x15" * 40, "parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_its_place(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    message = one_line(lambda: open_source(f"amod-counsel={tmp_path / name}").read())
    assert name in message and expected in message


BAD_SPECS = (
    "",
    "=a.csv",
    "demo=",
    "demo= ",
    "psycho8k=hf://datasets/only",
    "psycho8k=https:///x",
    "psycho8k=https://[::1/x",
)


def test_missing_places_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "b.csv"):
        as_csv(tmp_path / "two" / name, ("Context",), ("a",))
    for place, words in (("empty", "found nothing"), ("two", "a.csv"), ("absent", "no such file")):
        assert words in one_line(lambda place=place: open_source(f"amod-counsel={tmp_path / place}"))
    for spec in BAD_SPECS:
        one_line(lambda spec=spec: open_source(spec))
    assert "Did you mean amod-counsel" in one_line(lambda: open_source("amod-counsell"))
    one_line(lambda: is_local("amod-counsell"))
    local = [is_local(f"amod-counsel={tmp_path / path}") for path in ("absent", "two/absent.csv", "two")]
    assert local == [False, False, True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_one_line(tmp_path):
    as_csv(tmp_path / "a.csv", ("Context",), ("a",)).chmod(0)
    assert "permission" in one_line(lambda: open_source(f"amod-counsel={tmp_path / 'a.csv'}").read()).lower()


# ---- files of the web and of the hub ----


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    return open_loopback(tmp_path, monkeypatch)


def test_a_source_of_the_web_is_read_and_known(own_cache):
    def answer(handler, n):
        return ranged(handler, BODY, '"one"') if handler.path.endswith("a.csv") else send(handler, b"sorry", 404)

    with serve(answer) as (address, seen):
        spec = f"amod-counsel={address}/data/a.csv"
        assert not is_local(spec)
        opened = open_source(spec)
        assert open_source(spec).origin == opened.origin and len(seen) == 1
        message = one_line(lambda: open_source(f"amod-counsel={address}/other.csv"))
    assert "404" in message and message.endswith("and give amod-counsel=/path/to/it")
    assert opened.read().rows == 4000 and is_local(spec) and opened.origin["source"] == "amod-counsel"
    (origin,) = opened.origin["files"]
    assert origin["sha256"] == sha256_file(opened.paths[0]) and origin["from"] == f"{address}/data/a.csv"
    opened.paths[0].write_bytes(BODY[:-1])
    assert "has changed" in one_line(lambda: open_source(spec))
    opened.paths[0].unlink()
    assert not is_local(spec)


def test_the_pinned_hash_of_a_home_is_held(own_cache):
    with serve(lambda handler, n: ranged(handler, BODY, '"one"')) as (address, seen):

        def pinned(name, value):
            home = f"{address}/{name}.csv"
            return {"p": Source("p", "MIT", "https://example.org", ("Context",), (home,), sha256=(value,))}

        assert open_source("p", pinned("a", hashlib.sha256(BODY).hexdigest())).read().rows == 4000
        assert "another file" in one_line(lambda: open_source("p", pinned("b", "0" * 64)))
        assert not url_place(f"{address}/b.csv").exists()
        later = one_line(lambda: open_source("p", pinned("a", "0" * 64)))
        assert "pinned" in later, "a file that was fetched before the pin"
        open_source(f"p={address}/a.csv", pinned("c", "0" * 64))


IN_CHILD = """
import json, sys
from psycopref.core.settings import StudyError
from psycopref.corpus.sources import is_local, open_source
for spec in sys.argv[1:]:
    try:
        local, opened = is_local(spec), open_source(spec)
        result = {"local": local, "rows": opened.read().rows, "files": opened.origin["files"], "now": is_local(spec)}
    except StudyError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
"""


def test_a_source_of_the_hub_is_read_at_its_commit(tmp_path):
    one, whole = "amod-counsel=hf://datasets/any/set@main/train.csv", "amod-counsel=hf://datasets/any/set"
    more = ("phi2Mental=hf://datasets/any/set@main/data/more.csv", "amod-counsel=hf://datasets/any/gated")
    with serve(Hub()) as (address, seen):
        first, listed, other, gated = in_child(IN_CHILD, tmp_path, address, one, whole, *more)
    assert not first["local"] and first["now"] and first["rows"] == listed["rows"] == 4000
    files = [(entry["file"], entry["commit"]) for entry in listed["files"]]
    assert files == [("train.csv", COMMIT)], "the layout chooses from the list"
    assert "has no column" in other["error"] and gated["error"].endswith("give amod-counsel=/path/to/it")
    offline = in_child(IN_CHILD, tmp_path, "http://127.0.0.1:9", one, whole, "mentalChat16k", offline="1")
    assert [result.get("rows") for result in offline] == [4000, 4000, None] and "HF_HUB_OFFLINE" in offline[2]["error"]


# ---- the released dataset ----


def pair(ID="psycho8k-3135", prefID=0, question="I am tired.", **other):
    row = {name: f"any {name}" if kind == "str" else 3 for name, kind in SCHEMAS["pairs"].items()}
    return {**row, "ID": ID, "prefID": prefID, "question": question, **other}


def released(folder, train):
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", train), ("test", [pair("therapistQA-4356", 9, " I am late. ")])):
        pd.DataFrame(rows).to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return f"released={folder}"


def test_the_released_dataset_is_opened_and_reduced_to_its_speeches(tmp_path):
    other = pair("mental-chat-7", 2, "I am tired.", rejected=" ")
    train = [pair(prefID=0, chosen=" Tell me more."), pair(prefID=1), other]
    released(tmp_path / "r" / "data", train)
    for where in ("r", "r/data", "r/data/test-00000-of-00001.parquet"):
        found = open_released(f"released={tmp_path / where}")
        assert found.speeches.to_dict("split")["data"] == [
            ["psycho8k-3135", "psycho8k", "I am tired.", "train"],
            ["mental-chat-7", "mental-chat", "I am tired.", "train"],
            ["therapistQA-4356", "therapistQA", "I am late.", "test"],
        ]
        assert list(found.speeches) == ["speech_id", "source", "speech", "part"]
        assert [path.name for path in found.paths] == ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"]
        files = [(file["file"][:4], file["sha256"]) for file in found.origin["files"]]
        assert files == [(path.name[:4], sha256_file(path)) for path in found.paths]
    assert found.parts["train"].to_dict("records") == train and found.parts["test"].question.tolist() == [
        " I am late. "
    ]
    assert all(list(frame) == list(SCHEMAS["pairs"]) for frame in found.parts.values())
    assert found.origin["blank_responses"] == 1 and found.origin["licence"] == "CC-BY-NC-4.0"
    assert is_local(f"released={tmp_path / 'r'}")


def test_columns_in_another_order_or_of_another_width_are_the_same(tmp_path):
    frame = pd.DataFrame([pair()])[list(SCHEMAS["pairs"])[::-1]].assign(extra=1)
    frame = frame.astype({"prefID": "int32", "chosen_model": "category", "chosen_safety_rating": "int8"})
    found = open_released(released(tmp_path, frame)).parts["train"]
    assert found.to_dict("records") == [pair()]
    assert (found.dtypes[[name for name, kind in SCHEMAS["pairs"].items() if kind == "int"]] == "int64").all()


FAULTS = {
    "rating 0": [pair(chosen_empathy_rating=0)],
    "rating 6": [pair(), pair(rejected_staging_rating=6)],
    "rating as text": [pair(chosen_empathy_rating="3")],
    "rating as real": [pair(chosen_empathy_rating=3.0)],
    "no rating": [pair(), pair(chosen_safety_rating=None)],
    "no text": [pair(), pair(chosen=None)],
    "blank question": [pair(question=" \n")],
    "blank model": [pair(chosen_model="")],
    "number as text": [pair(question=3)],
    "id without a row": [pair("psycho8k")],
    "id without a source": [pair("-3")],
    "two questions": [pair(), pair(question="I am late.")],
    "both parts": [pair("therapistQA-4356", 3, "I am late.")],
    "foreign": [{"text": "a"}],
    "one column short": [{name: cell for name, cell in pair().items() if name != "rejected_model"}],
    "no rows": pd.DataFrame([pair()]).iloc[:0],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_released_file_is_one_line(tmp_path, fault):
    spec = released(tmp_path, FAULTS[fault])
    message = one_line(lambda: open_released(spec))
    assert "train-00000" in message or "released dataset" in message
    assert message.endswith("and give released=/path/to/it")


def test_the_same_question_with_other_blanks_is_one_question(tmp_path):
    spec = released(tmp_path, [pair(), pair(prefID=1, question=" I am tired.\n")])
    assert len(open_released(spec).speeches) == 2


def test_a_missing_or_broken_part_is_one_line(tmp_path):
    spec, path = released(tmp_path, [pair()]), tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 cut")
    assert "parquet" in one_line(lambda: open_released(spec))
    path.unlink()
    assert "test-*.parquet" in one_line(lambda: open_released(spec))
    for wrong in ("released=", f"released={tmp_path / 'none'}", "demo", "released=hf://nothing", "hf://nothing"):
        one_line(lambda wrong=wrong: open_released(wrong))
    assert is_local(spec) and not is_local("released=/nowhere/at/all")
