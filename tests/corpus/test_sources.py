"""Every source is read in the form it was published in, and no row is lost."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import BODY, COMMIT, Hub, in_child, one_line, open_loopback, ranged, send, serve

from psycopref.corpus import sources
from psycopref.core.files import SCHEMAS, sha256_file
from psycopref.corpus.fetching import url_place
from psycopref.corpus.sources import RELEASED_DATASET, SOURCES, Source, client_turn, is_here, open_released
from psycopref.corpus.sources import open_source, pick_files, read_columns

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def put(path, content):
    """Write bytes, or columns in the form that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".csv":
        pd.DataFrame(content).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(content).to_parquet(path)
    else:
        rows = pd.DataFrame(content, dtype=object).to_dict("records")
        whole = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(whole, encoding="utf-8")
    return path


def texts(spec):
    return open_source(spec).read()[0].text.to_dict()


# ---- each source as published ----

SAID = 'I said "no".\nThen, I left.'
SAD = {"Context": ["I am sad.", "I am sad.", "I am tired.", "I am sad.", ""], "Response": list("abcde")}
INTERVIEW, SYNTHETIC = "Interview_Data_6K.csv", "Synthetic_Data_10K.csv"
QA = {"Id_Number": ["4500", "4501"], "Patient Question": ["I am late, again.", ""]}
PHI2 = {
    "### Human: I am sad. ### Assistant: Why?": "I am sad.",
    "Question: I am tired.\nAnswer: Rest.": "I am tired.",
    "no mark at all": "",
    "[INST] I am cold. [/INST] Dress.": "I am cold.",
}
PUBLISHED = {
    "counsel-chat": (
        {
            "data/counselchat-data.csv": {
                "questionID": ["a1", "a1", "b2"],
                "questionText": [SAID, SAID, ""],
                "topics": "",
            }
        }
        | {"data/20200325_counsel_chat.csv": {"questionID": ["0"], "questionText": ["I am sad."], "topic": ["grief"]}},
        ({0: SAID, 2: ""}, 1),
    ),
    "psycho8k": ({"GPT_2.0.json": {"input": ["One.", "Two."], "output": ["a", "b"]}}, ({0: "One.", 1: "Two."}, 0)),
    "psycho8k lines": (
        {"input.txt": "I can’t sleep…\nCafé at night\n\n".encode("cp1252"), "output_GT.txt": b"a\nb\nc\n"},
        ({0: "I can’t sleep…", 1: "Café at night", 2: ""}, 0),
    ),
    "therapistQA": (
        {"Annotated_data.csv": b"\xef\xbb\xbf" + pd.DataFrame(QA).to_csv(index=False).encode()},
        ({0: "I am late, again.", 1: ""}, 0),
    ),
    "amod-counsel": ({"combined_dataset.jsonl": SAD}, ({0: "I am sad.", 2: "I am tired.", 4: ""}, 2)),
    "mentalChat16k": (
        {SYNTHETIC: {"input": ["made 0", "made 1"]}, INTERVIEW: {"input": ["heard 0"]}},
        ({0: "heard 0", 1: "made 0", 2: "made 1"}, 0),
    ),
    "mentalAgora": (
        {"train.parquet": {"post1": ["I am sad.", None]}, "test.parquet": {"post1": ["I am old."]}},
        ({0: "I am old.", 1: "I am sad.", 2: ""}, 0),
    ),
    "phi2Mental": ({"phi2-data.csv": {"text": list(PHI2)}}, (dict(enumerate(PHI2.values())), 0)),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_source_is_read_as_it_was_published(tmp_path, case):
    files, (expected, repeats) = PUBLISHED[case]
    paths = [put(tmp_path / name, content) for name, content in files.items()]
    name = case.split()[0]
    sets = name != "mentalAgora"  # whose parts have no names that tell one from two
    for where in (tmp_path, *paths[: 1 if name == "counsel-chat" else 2 * sets]):
        frame, found = open_source(f"{name}={where}").read()
        assert (frame.text.to_dict(), found) == (expected, repeats), where


@pytest.mark.parametrize("column", ["question", "Question", "query", "input", "text", "post1"])
def test_mental_agora_under_any_likely_column(tmp_path, column):
    put(tmp_path / "a.parquet", {"author": [7, 8], column: ["I am sad.", None]})
    assert texts(f"mentalAgora={tmp_path}") == {0: "I am sad.", 1: ""}


HALVES = {"psycho8k": ("input.txt", "output_GT.txt"), "mentalChat16k": (SYNTHETIC, INTERVIEW)}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_set_would_have_other_row_numbers(tmp_path, name):
    there, lacks = HALVES[name]
    put(tmp_path / there, b"input\na\n")
    for spec in (tmp_path, tmp_path / there):
        assert lacks[:9] in one_line(lambda spec=spec: open_source(f"{name}={spec}"))
    if name == "psycho8k":
        put(tmp_path / lacks, b"a\n")
        assert "2 lines" in one_line(lambda: texts(f"psycho8k={tmp_path}"))


def test_topics_keys_and_repeats(tmp_path):
    said = {"questionID": ["a", "a", "a", "", ""], "questionText": ["one", "two", "one", "one", "one"]}
    path = put(tmp_path / "a.csv", said | {"topics": ["Family Conflict, Stress,", "", "", "", ""]})
    frame, repeats = open_source(f"counsel-chat={path}").read()
    assert frame.index.tolist() == [0, 1, 3, 4] and repeats == 1, "a key that returns with another text is a speech"
    assert frame.topics.tolist() == [("Family Conflict", "Stress"), (), (), ()]


def test_the_published_counsel_chat_is_read_whole(counsel_chat):
    frame = pd.read_csv(counsel_chat, dtype=str, keep_default_na=False)
    found, repeats = open_source(f"counsel-chat={counsel_chat}").read()
    first = frame[~frame.questionID.duplicated()]
    assert len(found) + repeats == len(frame) == 1482 and found.index.tolist() == first.index.tolist()
    one_end = first.questionText.str.replace("\r\n?", "\n", regex=True).tolist()
    assert [re.sub(r"\r\n?", "\n", text) for text in found.text] == one_end
    assert found.topics.tolist() == [
        tuple(t.strip() for t in topics.split(",") if t.strip()) for topics in first.topics
    ]


words = st.sampled_from(["I", "can't", "sleep.", "Why?", "was", "late,", "2", "é", "again"])
plain = st.lists(words, min_size=1, max_size=9).map(" ".join)
befores, betweens = st.sampled_from(["", "### ", "**", "<"]), st.sampled_from([" ", "\n", "\n\n"])


@few
@given(plain, plain, st.sampled_from(sources.TURN_MARKS), befores, betweens)
def test_the_answer_never_gets_into_the_question(question, answer, marks, before, between):
    after = {"**": "**", "<": ">"}.get(before, "")
    text = f"{before}{marks[0]}{after}: {question}{between}{before}{marks[1]}{after}: {answer}"
    assert client_turn(text) == question


@pytest.mark.parametrize("source", [*SOURCES.values(), RELEASED_DATASET], ids=lambda source: source.name)
def test_every_source_is_declared_in_full(source):
    assert source.licence and source.speech
    assert source.page.startswith("https://") or (source.name == "own" and not source.homes)
    assert source.scraped == (source.name != "demo")
    assert all(home.startswith(("package:", "https://", "hf://datasets/")) and "," not in home for home in source.homes)
    names = [home.rsplit("/", 1)[1] for home in source.homes if home.endswith((".csv", ".json", ".parquet"))]
    same = not names or pick_files(source, names[::-1], "home") == names
    assert same, "a folder that holds its files is read in the same order"


# ---- nothing lost ----

cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@few
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_a_table_is_the_same_in_every_form(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("form") / f"table.{kind}"
    table = {"Context": [a for a, _ in rows], "Response": [b for _, b in rows]}
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(table), *rows])
    else:
        put(path, table)
    assert read_columns(path) == table
    first = [a for n, (a, _) in enumerate(rows) if not a.strip() or a not in table["Context"][:n]]
    frame, repeats = open_source(f"amod-counsel={path}").read()
    assert frame.text.tolist() == first and len(frame) + repeats == len(rows)


def test_columns_without_a_name_are_kept_and_no_name_hides_another(tmp_path):
    (tmp_path / "a.csv").write_text(",Context,\n1,a,2\n")
    assert read_columns(tmp_path / "a.csv") == {"Unnamed: 0": ["1"], "Context": ["a"], "Unnamed: 2": ["2"]}
    pq.write_table(pa.table([["a"], ["b"]], names=["Context", "Context"]), tmp_path / "a.parquet")
    assert "Multiple matches" in one_line(lambda: read_columns(tmp_path / "a.parquet"))


values = st.one_of(
    *(st.text(max_size=5), st.integers(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)),
    st.dictionaries(st.just("a"), st.integers()),
)


@few
@given(st.lists(values, min_size=1, max_size=8))
def test_a_cell_that_is_no_text_is_an_empty_speech(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps([{"input": value} for value in values]))
    if not any(isinstance(value, str) for value in values):
        assert "expected text" in one_line(lambda: texts(f"psycho8k={path}"))
        return
    expected = [value if isinstance(value, str) else "" for value in values]
    found = texts(f"psycho8k={path}")
    assert len(found) == len(values)
    assert all(found[row] == text or "\ufffd" in found[row] for row, text in enumerate(expected))


def test_a_cell_of_fifty_million_characters_passes_and_the_limit_is_restored(tmp_path):
    before, path = csv.field_size_limit(), put(tmp_path / "a.csv", b"Context,Response\n" + b"x" * 50_000_000 + b",y\n")
    assert len(texts(f"amod-counsel={path}")[0]) == 50_000_000 and csv.field_size_limit() == before


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_line_ends_only_where_lines_end(tmp_path, strange):
    first = json.dumps({"Context": f"a{strange}b"}, ensure_ascii=False)
    put(tmp_path / "a.jsonl", f'{first}\r\n\r\n{{"Context": "c"}}\r\n'.encode())
    put(tmp_path / "a.csv", f'Context,Response\r\n"a{strange}b",x\r\n\r\nc,y\r\n'.encode())
    for path in tmp_path.iterdir():
        assert list(texts(f"amod-counsel={path}").values()) == [f"a{strange}b", "c"]


def test_half_a_surrogate_pair_becomes_something_a_file_can_hold(tmp_path):
    path = put(tmp_path / "a.jsonl", b'{"Context": "odd \\ud83d end"}\n{"Context": "smile \\ud83d\\ude00"}\n')
    assert list(texts(f"amod-counsel={path}").values()) == ["odd \ufffd end", "smile \U0001f600"]


# ---- bad input ----


def zipped(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "Context\na\n")
    return out.getvalue()


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
    "twice.jsonl": (b'{"Context": "a", " Context": "b"}\n', "more than once"),
    "nul.csv": (b"Context,Response\na,b\nc\0,d\n", "line 3: holds a NUL"),
    "latin.csv": ("Context,Response\ncaf\xe9,b\n".encode("latin-1"), "UTF-8 (byte 20)"),
    "book.csv": (zipped("xl/sheet1.xml", "[Content_Types].xml"), "is a workbook"),
    "calc.csv": (zipped("mimetype", "content.xml"), "is a workbook"),
    "file.csv": (zipped("own.csv"), "is a zip archive"),
    "half.csv": (zipped("own.csv")[:60], "is a broken zip archive"),
    "file.csv.bz2.csv": (bz2.compress(b"Context\na\n"), "is a bz2 archive"),
    "file.csv.xz.csv": (lzma.compress(b"Context\na\n"), "is a xz archive"),
    "capitals.csv": (b"context,Context\na,b\n", "differ in capitals alone"),
    "inner.json": (b'{"data": [{"Context": "a"}]}', "holds a list under 'data'"),
    "headless.csv": (
        b'"I feel low and my name is Jane Roe, so please help me with it",b\nc,d\n',
        "I feel l… (61 characters)",
    ),
    "old.csv": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a workbook"),
    "twice.json": (b'[{"Context": "a", "Context": "b"}]', "'Context' stands twice"),
    "nan.json": (b'[{"Context": "a", "Response": NaN}]', "NaN is no number"),
    "line.jsonl": (b'{"Context": "a"}\n\n{"Context": \n', "line 3"),
    "list.json": (b'[{"Context": "a"},\n {"Context" "b"}]', "line 2"),
    "objects.json": (b'[{"Context": "a"}, 3]', "item 2: found int"),
    "lines.jsonl": (b'{"Context": "a"}\n["b"]\n', "line 2: found list"),
    "pretty.json": (b'{\n "Context": ["a"]\n}', "line 1"),
    "none.json": (b"[]", "no rows"),
    "deep.json": (b"[" * 200_000, "nested too deep"),
    "digits.json": (b'[{"Context": ' + b"1" * 5000 + b"}]", "is not valid JSON (Exceeds the"),
    "numbers.jsonl": (b'{"Context": 1}\n{"Context": 2}\n', "holds int, expected text"),
    "nulls.jsonl": (b'{"Context": null}\n', "expected text"),
    "no.parquet": (b"nothing of the kind", "PAR1"),
    "cut.parquet": (b"PAR1" + b"\x15" * 40, "parquet"),
    "cut.csv.gz": (gzip.compress(b"Context,Response\na,b\n")[:-12], "unpacked"),
    "odd.csv.gz": (b"\x1f\x8b and no more", "unpacked"),
    "none.csv.gz": (gzip.compress(b"\n"), "is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_its_place(tmp_path, name):
    content, expected = BAD[name]
    message = one_line(lambda: texts(f"amod-counsel={put(tmp_path / name, content)}"))
    assert name in message and expected in message


BAD_SPECS = {
    "": "not declared",
    "=a.csv": "not declared",
    "amod-counsell": "Did you mean amod-counsel",
    "demo=": "nothing follows",
    "demo= ": "nothing follows",
    "therapistQA": "kaggle",
    "psycho8k=hf://datasets/only": "hf://datasets/OWNER",
    "psycho8k=https:///x": "no valid URL",
    "psycho8k=https://[::1/x": "no valid URL",
    "amod-counsel={}/empty": "found nothing",
    "amod-counsel={}/two": "a.csv",
    "amod-counsel={}/absent": "no such file",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_missing_places_are_one_line(tmp_path, spec):
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "b.csv"):
        put(tmp_path / "two" / name, b"Context\na\n")
    assert BAD_SPECS[spec] in one_line(lambda: open_source(spec.format(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_one_line(tmp_path):
    put(tmp_path / "a.csv", b"Context\na\n").chmod(0)
    assert "permission" in one_line(lambda: texts(f"amod-counsel={tmp_path / 'a.csv'}")).lower()


# ---- files of the web and of the hub ----


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    return open_loopback(tmp_path, monkeypatch)


def test_a_source_of_the_web_is_read_and_known(own_cache):
    def answer(handler, n):
        return ranged(handler, BODY, '"one"') if handler.path.endswith("a.csv") else send(handler, b"sorry", 404)

    with serve(answer) as (address, seen):
        place = f"{address}/data/a.csv"
        spec = f"amod-counsel={place}"
        assert not is_here(place)
        opened = open_source(spec)
        assert open_source(spec).origin == opened.origin and len(seen) == 1
        message = one_line(lambda: open_source(f"amod-counsel={address}/other.csv"))
    assert "404" in message and message.endswith("and give amod-counsel=/path/to/it")
    assert len(opened.read()[0]) == 4000 and is_here(place) and opened.origin["source"] == "amod-counsel"
    (origin,) = opened.origin["files"]
    assert origin["sha256"] == sha256_file(opened.paths[0]) and origin["from"] == place


def test_the_pinned_hash_of_a_home_is_held(own_cache):
    with serve(lambda handler, n: ranged(handler, BODY, '"one"')) as (address, seen):

        def pinned(name, value):
            home = f"{address}/{name}.csv"
            return {"p": Source("p", "MIT", "https://example.org", ("Context",), (home,), sha256=(value,))}

        assert len(open_source("p", pinned("a", hashlib.sha256(BODY).hexdigest())).read()[0]) == 4000
        assert "another file" in one_line(lambda: open_source("p", pinned("b", "0" * 64)))
        assert not url_place(f"{address}/b.csv").exists()
        open_source(f"p={address}/a.csv", pinned("c", "0" * 64))


IN_CHILD = """
import json, sys
from psycopref.core.settings import StudyError
from psycopref.corpus.sources import is_here, open_source
for spec in sys.argv[1:]:
    place = spec.partition("=")[2]
    try:
        before, opened = is_here(place), open_source(spec)
        rows = len(opened.read()[0])
        result = {"before": before, "rows": rows, "files": opened.origin["files"], "now": is_here(place)}
    except StudyError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
"""


def test_a_source_of_the_hub_is_read_at_its_commit(tmp_path):
    one, whole = "amod-counsel=hf://datasets/any/set@main/train.csv", "amod-counsel=hf://datasets/any/set"
    more = ("phi2Mental=hf://datasets/any/set@main/data/more.csv", "amod-counsel=hf://datasets/any/gated")
    with serve(Hub()) as (address, seen):
        first, listed, other, gated = in_child(IN_CHILD, tmp_path, address, one, whole, *more)
    assert not first["before"] and first["now"] and first["rows"] == listed["rows"] == 4000
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
    for part, rows in (("train", train), ("test", [pair("therapistQA-4356", 9, " I am late. ")])):
        put(folder / f"{part}-00000-of-00001.parquet", rows)
    return f"released={folder}"


def test_the_released_dataset_is_opened_and_reduced_to_its_speeches(tmp_path):
    other = pair("mental-chat-7", 2, "I am tired.", rejected=" ")
    train = [pair(chosen=" Tell me more."), pair(prefID=1, question="I am tired.\n"), other]
    released(tmp_path / "r" / "data", train)
    for where in ("r", "r/data", "r/data/test-00000-of-00001.parquet"):
        parts, speeches = open_released(f"released={tmp_path / where}")
        assert speeches.to_dict("split")["data"] == [
            ["psycho8k-3135", "psycho8k", "I am tired.", "train"],
            ["mental-chat-7", "mental-chat", "I am tired.", "train"],
            ["therapistQA-4356", "therapistQA", "I am late.", "test"],
        ]
        assert list(speeches) == ["speech_id", "source", "speech", "part"]
    assert parts["train"].to_dict("records") == train and parts["test"].question.tolist() == [" I am late. "]
    assert all(list(frame) == list(SCHEMAS["pairs"]) for frame in parts.values())


def test_columns_in_another_order_or_of_another_width_are_the_same(tmp_path):
    frame = pd.DataFrame([pair()])[list(SCHEMAS["pairs"])[::-1]].assign(extra=1)
    frame = frame.astype({"prefID": "int32", "chosen_model": "category", "chosen_safety_rating": "int8"})
    found = open_released(released(tmp_path, frame)).parts["train"]
    assert found.to_dict("records") == [pair()]
    assert (found.dtypes[[name for name, kind in SCHEMAS["pairs"].items() if kind == "int"]] == "int64").all()


FAULTS = {
    "rating 0": [pair(chosen_empathy_rating=0)],
    "rating 6": [pair(), pair(rejected_staging_rating=6)],
    "rating as real": [pair(chosen_empathy_rating=3.0)],
    "no rating": [pair(), pair(chosen_safety_rating=None)],
    "no text": [pair(), pair(chosen=None)],
    "blank question": [pair(question=" \n")],
    "blank model": [pair(chosen_model="")],
    "number as text": [pair(question=3)],
    "number as id": [pair(3)],
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
    message = one_line(lambda: open_released(released(tmp_path, FAULTS[fault])))
    assert "train-00000" in message or "released dataset" in message
    assert message.endswith("and give released=/path/to/it")


def test_a_missing_or_broken_part_is_one_line(tmp_path):
    spec, path = released(tmp_path, [pair()]), tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 cut")
    assert "parquet" in one_line(lambda: open_released(spec))
    path.unlink()
    assert "test-*.parquet" in one_line(lambda: open_released(spec))
    for wrong in ("released=", f"released={tmp_path / 'none'}", "demo", "released=hf://nothing"):
        one_line(lambda wrong=wrong: open_released(wrong))
