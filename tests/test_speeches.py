"""Every raw row is kept or counted, cleaning settles, and a speech keeps its split wherever it stands."""

import csv
import io
import json

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from psycopref.artifacts import SCHEMAS, StageReader, StageWriter
from psycopref.config import Run, StudyError, coarse_of
from psycopref.speeches import (
    clean,
    collect,
    limit_speeches,
    open_source,
    read_counsel_chat,
    read_demo,
    same_text,
    split_speeches,
    topic_slug,
    topic_table,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TOPICS = ["Anxiety", "Stress", "Legal & Regulatory", "Grief and Loss", "Children & Adolescents", "Alzheimer's", "Career Counseling"]


def one_line(action) -> str:
    with pytest.raises(StudyError) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).strip()
    return str(error.value)


def chat_csv(path, rows, header=("questionID", "questionText", "topics")) -> str:
    """Write rows as a counsel-chat table; give the source as a user would."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path.write_text(text.getvalue(), encoding="utf-8")
    return f"counsel-chat={path}"


def demo_lines(path, entries) -> str:
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
    return f"demo={path}"


def long_text(n) -> str:
    return f"Speech number {n}: " + "I count the stairs and they never end, whatever I do about it. " * 2


@pytest.fixture(scope="module")
def demo():
    return collect(["demo"])


# ---- cleaning ----

marked = st.lists(
    st.sampled_from(["<p>", "</p>", "<br/>", "<!-- x -->", "<!--", "-->", "<", ">", "&", "&amp;", "&lt;", "&gt;", "&#39;", "&#x26;", "amp;", "lt;", "#39;", ";",
                     "\u00a0", "\u200b", "\ufeff", "\x00", "\x7f", "\t", "\r\n", "\u2028", " ", "a", "b <3 c", "I can't", "2 < 3 > 1", "é", "&nbsp;", "&NotEqualTilde;"]),
    max_size=24).map("".join)  # fmt: skip


@few
@given(st.one_of(marked, st.text(max_size=80)))
def test_cleaning_settles(text):
    once = clean(text)
    assert clean(once) == once
    assert once == once.strip() and not any(c in once for c in "\n\r\t\x00\u200b\ufeff") and "  " not in once


@pytest.mark.parametrize("depth", [1, 5, 9, 40])
def test_cleaning_settles_however_often_an_entity_was_escaped(depth):
    text = "I said &" + "amp;" * depth + "lt;b> and left"
    assert clean(clean(text)) == clean(text) and "amp;" not in clean(text)


@few
@given(st.lists(st.sampled_from(["I", "can't", "sleep,", "since", "March.", "Why?", "2", "<3", "é"]), min_size=1).map(" ".join))
def test_plain_text_is_left_alone(text):
    assert clean(text) == text


@few
@given(st.lists(st.sampled_from(["I", "sleep", "never", "März"]), min_size=1, max_size=6), st.randoms())
def test_texts_that_differ_in_case_space_and_marks_are_the_same(words, chance):
    noisy = "".join(chance.choice([w.upper(), w.lower(), w.title()]) + chance.choice([" ", ", ", "... ", "! \n", " - "]) for w in words)
    assert same_text(noisy) == same_text(" ".join(words))
    assert same_text(" ".join([*words, "today"])) != same_text(" ".join(words))


# ---- collecting ----

kinds = st.sampled_from(["good", "good", "good", "twin", "loud twin", "short", "long", "empty", "blank"])


def rows_from(drawn):
    """Give every drawn kind a row of its own; twins repeat the speech of another number."""
    texts = {"short": lambda n: f"too short {n}", "long": lambda n: f"{n} " + "word " * 250, "empty": lambda n: "", "blank": lambda n: " <p>\u00a0</p> ",
             "twin": lambda n: long_text(0), "loud twin": lambda n: long_text(0).upper() + "!!", "good": long_text}  # fmt: skip
    return [(f"q{n}", texts[kind](n), TOPICS[n % len(TOPICS)]) for n, kind in enumerate(drawn)]


@few
@given(st.lists(kinds, min_size=1, max_size=14), st.randoms())
def test_every_row_is_kept_or_counted_and_the_order_of_rows_changes_no_text(tmp_path_factory, drawn, chance):
    assume(any("good" in kind or "twin" in kind for kind in drawn))
    folder, rows = tmp_path_factory.mktemp("source"), rows_from(drawn)
    found, counts = collect([chat_csv(folder / "a.csv", rows)])
    tally = counts.iloc[0].to_dict()
    assert tally.pop("source") == "counsel-chat" and tally.pop("rows") == len(rows) == sum(tally.values())
    assert tally["kept"] == len(found) and tally["empty"] == sum(k in ("empty", "blank") for k in drawn)
    assert tally["too short"] == drawn.count("short") and tally["too long"] == drawn.count("long")
    assert found.speech.str.len().between(100, 1000).all() and found.speech.map(same_text).is_unique and found.speech_id.is_unique
    shuffled = chance.sample(rows, len(rows))
    other, counts_too = collect([chat_csv(folder / "b.csv", shuffled)])
    assert set(other.speech.map(same_text)) == set(found.speech.map(same_text))
    assert counts_too.drop(columns="source").equals(counts.drop(columns="source"))


@pytest.mark.parametrize("length, kept", [(99, False), (100, True), (101, True), (999, True), (1000, True), (1001, False)])
def test_the_limits_of_length_are_part_of_the_range(tmp_path, length, kept):
    rows = [("q0", long_text(0), "Stress"), ("q1", ("stairs " * 200)[: length - 1] + "!", "Stress")]
    found, _ = collect([chat_csv(tmp_path / "a.csv", rows)])
    assert ("counsel-chat-1" in found.speech_id.tolist()) == kept


def test_ids_name_the_row_of_the_source(tmp_path):
    rows = [("q0", "short", "Stress"), ("q1", long_text(1), "Stress"), ("q1", long_text(1), "Stress"), ("q2", long_text(2), "Anxiety, Stress")]
    spec = chat_csv(tmp_path / "a.csv", rows)
    found, _ = collect([spec])
    assert found.speech_id.tolist() == ["counsel-chat-1", "counsel-chat-3"] and found.topic.tolist() == ["stress", "anxiety"]
    again, _ = collect([spec])
    assert again.equals(found)
    longer, _ = collect([chat_csv(tmp_path / "a.csv", [*rows, ("q9", long_text(9), "Stress")])])
    assert longer.iloc[:2].equals(found), "rows that come later change no id"
    shorter, _ = collect([spec], min_characters=1)
    assert set(found.speech_id) < set(shorter.speech_id), "the limits change no id"


def test_the_first_source_keeps_a_duplicate(tmp_path):
    both = [long_text(1), long_text(2)]
    first = chat_csv(tmp_path / "a.csv", [("x", both[0], "Stress"), ("y", long_text(3), "Stress")])
    second = demo_lines(tmp_path / "b.jsonl", [{"speech": t, "topic": "anxiety"} for t in both])
    for specs, owner in (([first, second], "counsel-chat"), ([second, first], "demo")):
        found, counts = collect(specs)
        assert found[found.speech == clean(both[0])].source.tolist() == [owner] and counts.duplicate.tolist() == [0, 1]


def test_two_tables_of_one_source_never_share_an_id(tmp_path):
    specs = [chat_csv(tmp_path / f"{n}.csv", [("q", long_text(n), "Stress")]) for n in range(2)]
    try:
        found, _ = collect(specs)
    except StudyError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert found.speech_id.is_unique


def test_questions_without_an_id_are_not_taken_for_one(tmp_path):
    found, counts = collect([chat_csv(tmp_path / "a.csv", [("", long_text(n), "Stress") for n in range(3)])])
    assert counts.iloc[0]["rows"] == 3 and len(found) == 3


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_a_line_of_json_ends_where_json_lines_end(tmp_path, strange):
    spec = demo_lines(tmp_path / "a.jsonl", [{"speech": long_text(n) + strange + "and so on", "topic": "stress"} for n in range(2)])
    found, _ = collect([spec])
    assert found.speech_id.tolist() == ["demo-0", "demo-1"] and found.speech.str.endswith("and so on").all()


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfquestionID,questionText,topics\r\n" + f'q,"{long_text(1)}",Stress\r\n'.encode())
    assert len(collect([f"counsel-chat={path}"])[0]) == 1
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps({"speech": long_text(1), "topic": "stress"}).encode() + b"\r\n")
    assert len(collect([f"demo={lines}"])[0]) == 1


# ---- bad sources ----

GOOD = f'questionID,questionText,topics\nq0,"{long_text(0)}",Stress\n'
BAD_CSV = {
    "no question": GOOD.replace("questionText", "text"), "no topics": GOOD.replace("topics", "labels"), "no id": GOOD.replace("questionID", "id"),
    "empty": "", "only a head": "questionID,questionText,topics\n", "blank lines": "\n\n\n", "prose": "Dear reader,\nthis is no table.\n",
    "open quote": GOOD + 'q1,"never closed,Stress\n', "a longer row": GOOD + "q1,a,Stress,extra\n", "all rows longer": "questionID,questionText,topics\nq0,a,Stress,extra\n",
    "unknown topic": GOOD.replace("Stress", "Golf"), "no usable speech": GOOD.replace(long_text(0), "too short"),
    "bare commas": GOOD.replace('"', "").replace("whatever", ", whatever"), "all rows longer, but usable": GOOD.replace("Stress", "Stress,extra"),
    "all empty": "questionID,questionText,topics\nq0,,Stress\n",
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_CSV)
def test_a_bad_table_is_one_line_that_names_the_file(tmp_path, fault):
    (tmp_path / "bad.csv").write_text(BAD_CSV[fault], encoding="utf-8")
    message = one_line(lambda: collect([f"counsel-chat={tmp_path / 'bad.csv'}"]))
    assert "bad.csv" in message and len(message) < 600


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_another_encoding_is_one_line(tmp_path, encoding):
    (tmp_path / "bad.csv").write_bytes(GOOD.replace("stairs", "café").encode(encoding))
    assert "UTF-8" in one_line(lambda: collect([f"counsel-chat={tmp_path / 'bad.csv'}"]))
    (tmp_path / "bad.jsonl").write_bytes('{"speech": "café", "topic": "stress"}'.encode(encoding))
    assert "UTF-8" in one_line(lambda: collect([f"demo={tmp_path / 'bad.jsonl'}"]))


def test_a_row_that_ends_early_is_read_or_one_line(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD + f'q1,"{long_text(1)}"\n')
    try:
        found, _ = collect([f"counsel-chat={tmp_path / 'a.csv'}"])
    except StudyError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert found.topic.tolist() == ["stress", "others"]


@pytest.mark.parametrize("line", ["{", "[]", '"text"', "3", "null", "{}", '{"speech": "a"}', '{"topic": "stress"}', '{"speech": 3, "topic": "stress"}',
                                  '{"speech": null, "topic": "stress"}', '{"speech": "LONG", "topic": null}', '{"speech": "LONG", "topic": 3}', '{"speech": "LONG", "topic": ["stress"]}',
                                  '{"speech": "LONG", "topic": "golf"}'])  # fmt: skip
def test_a_bad_line_of_json_is_one_line(tmp_path, line):
    good = json.dumps({"speech": long_text(0), "topic": "stress"})
    (tmp_path / "bad.jsonl").write_text(good + "\n" + line.replace("LONG", long_text(1)) + "\n")
    message = one_line(lambda: collect([f"demo={tmp_path / 'bad.jsonl'}"]))
    assert "bad.jsonl" in message


@pytest.mark.parametrize("spec", ["dem", "", "counsel-chat", "counsel-chat=", "psycho8k=x.csv", "=x.csv"])
def test_an_undeclared_source_is_one_line(spec):
    one_line(lambda: open_source(spec))


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    assert "absent.csv" in one_line(lambda: collect([f"counsel-chat={tmp_path / 'absent.csv'}"]))
    assert str(tmp_path) in one_line(lambda: collect([f"counsel-chat={tmp_path}"]))


# ---- topics ----


@pytest.mark.parametrize("slug", sorted(coarse_of()))
def test_a_topic_is_known_however_it_is_written(slug):
    for written in (slug, slug.upper(), slug.replace("-", " "), slug.replace("-", "_"), slug.replace("-and-", " & ").title(), f" {slug}! "):
        assert topic_slug(written) == slug, written
    assert topic_slug(slug + "x") is None


@pytest.mark.parametrize("written, slug", [("Grief", "grief-and-loss"), ("Sleep", "sleep-improvement"), ("Alzheimer’s", "aging"), ("Career Counseling", "career"),
                                           ("Legal & Regulatory", "legal-regulatory"), ("Children & Adolescents", "children-adolescents")])  # fmt: skip
def test_other_names_of_topics_are_known(written, slug):
    assert topic_slug(written) == slug


def test_the_topics_of_counsel_chat_all_map(counsel_chat):
    rows = list(read_counsel_chat(counsel_chat))
    written = {topic for row in rows for topic in row.topics}
    assert len(written) > 25 and [t for t in sorted(written) if topic_slug(t) is None] == []
    assert len({topic_slug(t) for t in written}) > 25


def test_counsel_chat_is_read_whole(counsel_chat):
    limit = csv.field_size_limit(1 << 24)  # some answers are longer than the csv module expects
    with open(counsel_chat, newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    csv.field_size_limit(limit)
    first = {}
    for place, entry in enumerate(table):
        first.setdefault(entry["questionID"], place)
    rows = list(read_counsel_chat(counsel_chat))
    assert [row.row for row in rows] == list(first.values()) and len(rows) > 700
    assert all(clean(row.text) == clean(table[row.row]["questionText"]) for row in rows)
    found, counts = collect([f"counsel-chat={counsel_chat}"])
    tally = counts.iloc[0].to_dict()
    assert tally["rows"] == len(rows) == sum(tally[k] for k in ("empty", "too short", "too long", "duplicate", "kept")) and tally["kept"] == len(found) > 300
    assert found.topic.isin(list(coarse_of())).all() and (found.coarse_topic == found.topic.map(coarse_of())).all()
    assert found.speech_id.is_unique and not found.speech.str.contains(r"</?[a-z]+>|&\w+;|\n", regex=True).any()
    split = split_speeches(found, 0.25, 0.1, 0)
    assert (split.split == "test").sum() == round(0.25 * len(found))


# ---- limits and splits ----


def frame_of(sizes):
    """A frame with as many speeches of each topic as asked."""
    topics = sorted(coarse_of())
    rows = [{"speech_id": f"s-{topic}-{n}", "topic": topics[topic]} for topic, size in enumerate(sizes) for n in range(size)]
    return pd.DataFrame(rows)


fractions = st.sampled_from([0.0, 0.1, 3291 / 26483, 0.25, 0.5, 0.9])


@few
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), fractions, fractions, st.integers(0, 5), st.randoms())
def test_splits_have_the_asked_sizes_and_do_not_depend_on_the_order(sizes, test_fraction, dev_fraction, seed, chance):
    frame = frame_of(sizes)
    split = split_speeches(frame, test_fraction, dev_fraction, seed)
    counts = split.split.value_counts()
    n_test = round(test_fraction * len(frame))
    n_dev = round(dev_fraction * (len(frame) - n_test))
    assert (counts.get("test", 0), counts.get("dev", 0), counts.get("train", 0)) == (n_test, n_dev, len(frame) - n_test - n_dev)
    assert split.drop(columns="split").equals(frame) and set(split.split) <= {"train", "dev", "test"}
    for topic, own in split.groupby("topic"):
        assert abs((own.split == "test").sum() - test_fraction * len(own)) <= 1.5, topic
    order = chance.sample(range(len(frame)), len(frame))
    shuffled = split_speeches(frame.iloc[order].reset_index(drop=True), test_fraction, dev_fraction, seed)
    assert dict(zip(shuffled.speech_id, shuffled.split)) == dict(zip(split.speech_id, split.split))
    kept_index = split_speeches(frame.iloc[order], test_fraction, dev_fraction, seed)
    assert dict(zip(kept_index.speech_id, kept_index.split)) == dict(zip(split.speech_id, split.split))


def test_another_seed_splits_otherwise(demo):
    frame, _ = demo
    first, second = (split_speeches(frame, 0.25, 0.1, seed).split for seed in (0, 1))
    assert (first != second).any() and (first == split_speeches(frame, 0.25, 0.1, 0).split).all()


def test_a_split_does_not_depend_on_the_texts(demo):
    frame, _ = demo
    assert split_speeches(frame.assign(speech="other"), 0.25, 0.1, 0).split.equals(split_speeches(frame, 0.25, 0.1, 0).split)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 3), st.randoms())
def test_a_limit_takes_evenly_from_topics_and_keeps_the_order(sizes, limit, seed, chance):
    frame = frame_of(sizes)
    kept = limit_speeches(frame, limit, seed)
    assert len(kept) == min(limit, len(frame)) and kept.index.tolist() == list(range(len(kept)))
    places = [frame.speech_id.tolist().index(name) for name in kept.speech_id]
    assert places == sorted(places)
    counts = kept.topic.value_counts().reindex(frame.topic.unique(), fill_value=0)
    full = counts < frame.topic.value_counts().reindex(counts.index)
    assert counts.empty or not full.any() or counts[full].min() >= counts.max() - 1, "no topic is passed over while another gets two more"
    shuffled = limit_speeches(frame.iloc[chance.sample(range(len(frame)), len(frame))].reset_index(drop=True), limit, seed)
    assert set(shuffled.speech_id) == set(kept.speech_id)
    assert set(limit_speeches(frame, max(0, limit - 1), seed).speech_id) <= set(kept.speech_id), "a smaller limit keeps a part of a larger one"


def test_no_limit_keeps_all(demo):
    frame, _ = demo
    for limit in (None, len(frame), len(frame) + 1):
        assert limit_speeches(frame, limit, 0).equals(frame)


# ---- the shipped corpus, and the way into a stage ----


def test_the_demo_corpus_is_usable_whole(demo):
    frame, counts = demo
    tally = counts.iloc[0]
    assert tally["kept"] == tally["rows"] == len(frame) == 336 and frame.topic.value_counts().eq(8).all() and frame.topic.nunique() == 42
    assert len(list(read_demo(open_source("demo")[1]))) == 336


def test_speeches_fit_their_schema_and_the_table_counts_them(demo):
    frame = split_speeches(demo[0], 0.25, 0.1, 0)
    assert set(frame.columns) == set(SCHEMAS["speeches"])
    with StageWriter(Run("example"), "05_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", frame)
    assert StageReader(Run("example"), "05_speeches").rows("speeches").equals(frame[list(SCHEMAS["speeches"])])
    table = topic_table(frame)
    assert table.speeches.iloc[-1] == table.speeches.iloc[:-1].sum() == len(frame)
    assert table["paper speeches"].iloc[-1] == table["paper speeches"].iloc[:-1].sum() == 26483
    assert table["share %"].iloc[:-1].sum() == pytest.approx(100, abs=0.05 * 42)
