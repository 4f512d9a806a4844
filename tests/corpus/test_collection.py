"""Every row is kept or counted, the order of rows changes nothing, and a speech keeps its part whatever is added."""

import dataclasses
import itertools
import json
import math

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from psycopref.core.files import SCHEMAS, StageReader, StageWriter, sha256_file
from psycopref.core.principles import principle_keys
from psycopref.core.settings import DEMO
from psycopref.core.stages import Run
from psycopref.core.paper import coarse_of, resource_path
from psycopref.corpus.duplicates import same_text
from psycopref.corpus.collection import (
    ROW_FATES,
    KEPT,
    audit_split,
    collect,
    collect_released,
    draw_and_split,
    drop_table,
    limit_speeches,
    mask_private,
    open_sources,
    read_source,
    split_of,
    split_speeches,
    split_table,
    topic_table,
    writing_figures,
    writing_table,
)
from psycopref.corpus.sources import open_source

from refusals import one_line

PRINCIPLE_KEYS = principle_keys()

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
TOPICS = [
    "Anxiety",
    "Stress",
    "Legal & Regulatory",
    "Grief and Loss",
    "Children & Adolescents",
    "Alzheimer's",
    "Career",
]
LINES = [
    "I count the stairs at night and they never end, whatever I do about it.",
    "My sister sold the piano without asking any of us.",
    "Since the move I eat alone in a kitchen that smells of paint.",
    "The exam is in nine days and I have not opened one book.",
    "He says nothing at dinner and then slams the garage door.",
    "Every Sunday my stomach turns when I iron my work shirt.",
    "Our baby cries and I stand in the hall and can't move.",
    "I quit smoking twice this spring and hid it both times.",
]


def chat_csv(path, rows) -> str:
    """Write rows as a counsel-chat table; give the source as a user would."""
    pd.DataFrame(rows, columns=["questionID", "questionText", "topics"]).to_csv(path, index=False)
    return f"counsel-chat={path}"


def jsonl(path, entries) -> str:
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
    return str(path)


TRIPLES = list(itertools.combinations(LINES, 3))


def long_text(n) -> str:
    """What the n-th of 56 people says; no two are near-duplicates."""
    return " ".join(TRIPLES[(n * 17) % len(TRIPLES)])


def gathered(*specs, **changes):
    found = collect(open_sources(list(specs)), dataclasses.replace(DEMO.speeches, **changes))
    return found, found["frame"][found["frame"].reason == KEPT]


@pytest.fixture(scope="module")
def demo():
    found = gathered("demo")[1].reset_index(drop=True)
    assert len(found) == 504 and found.topic.value_counts().eq(12).all() and found.topic.nunique() == 42
    return found


# ---- every row is kept or counted ----

GERMAN = "Seit dem Umzug esse ich allein in einer Küche, die nach Farbe riecht, und ich weiss nicht, wem ich das sage."
TEXTS = {
    "good": long_text,
    "twin": lambda n: long_text(0),
    "loud twin": lambda n: long_text(0).upper() + "!!",
    "near twin": lambda n: f"Hello, {n} here. {long_text(0)}",
    "short": lambda n: f"too short {n}",
    "long": lambda n: f"{n} " + "word " * 250,
    "empty": lambda n: "",
    "blank": lambda n: " <p>\u00a0</p> ",
    "emoji": lambda n: "😀" * 120,
    "german": lambda n: GERMAN,
}
kinds = st.sampled_from(["good", "good", *TEXTS])


def rows_from(drawn):
    """Give every drawn kind a row of its own; twins repeat the speech of number 0."""
    return [(f"q{n}", TEXTS[kind](n), TOPICS[n % len(TOPICS)]) for n, kind in enumerate(drawn)]


@few
@given(st.lists(kinds, min_size=1, max_size=14), st.randoms())
def test_every_row_is_kept_or_counted_and_the_order_of_rows_changes_no_text(tmp_path_factory, drawn, chance):
    assume(any("good" in kind or "twin" in kind for kind in drawn))
    folder, rows = tmp_path_factory.mktemp("source"), rows_from(drawn)
    found, kept = gathered(chat_csv(folder / "a.csv", rows))
    tally = drop_table(found["frame"], found["repeats"]).iloc[0]
    assert tally.source == "counsel-chat" and tally["rows"] == len(rows) == tally[list(ROW_FATES)].sum()
    assert tally.kept == len(kept) and tally["empty"] == sum(k in ("empty", "blank") for k in drawn)
    fates = ("too short", "too long", "no words", "not English")
    assert [tally[fate] for fate in fates] == [*map(drawn.count, ("short", "long", "emoji", "german"))]
    assert kept.speech.map(same_text).is_unique and kept.speech_id.is_unique
    shuffled = chance.sample(rows, len(rows))
    other, kept_too = gathered(chat_csv(folder / "b.csv", shuffled))
    assert set(kept_too.speech) == set(kept.speech), "the very texts are the same, not only their number"
    assert drop_table(other["frame"], other["repeats"]).equals(drop_table(found["frame"], found["repeats"]))


def test_the_limits_of_length_are_settings_and_part_of_the_range(tmp_path):
    rows = [
        (f"q{n}", long_text(0) + f" {n}" + "!" * (n - len(long_text(0)) - 4), "Stress") for n in (299, 300, 400, 401)
    ]
    found = gathered(chat_csv(tmp_path / "a.csv", rows), min_characters=300, max_characters=400, near_duplicate=1.0)[0]
    assert found["frame"].reason.tolist() == ["too short", KEPT, KEPT, "too long"]


def test_ids_name_the_row_of_the_source_and_a_repeated_question_is_counted(tmp_path):
    second = ("q1", long_text(1), "Stress")
    rows = [("q0", "short", "Stress"), second, second, ("q2", long_text(2), "Anxiety, Stress"), second]
    found, kept = gathered(chat_csv(tmp_path / "a.csv", rows))
    assert [*zip(kept.speech_id, kept.topic)] == [("counsel-chat-1", "stress"), ("counsel-chat-3", "anxiety")]
    tally = drop_table(found["frame"], found["repeats"]).iloc[0]
    assert (tally["rows"], tally.repeated, tally.kept) == (5, 2, 2)
    longer = gathered(chat_csv(tmp_path / "a.csv", [*rows, ("q9", long_text(9), "Stress")]))[1]
    assert longer.speech_id.tolist() == [*kept.speech_id, "counsel-chat-5"], "rows that come later change no id"


def test_the_first_source_keeps_a_duplicate_across_sources(tmp_path):
    both = [long_text(1), long_text(2)]
    first = chat_csv(tmp_path / "a.csv", [("x", both[0], "Stress"), ("y", long_text(3), "Stress")])
    copies = [{"Context": text, "Response": "r"} for text in (f"Hi all. {both[0]}", both[1]) for _ in range(2)]
    second = "amod-counsel=" + jsonl(tmp_path / "b.json", copies)
    for specs, owner in (([first, second], "counsel-chat"), ([second, first], "amod-counsel")):
        found, kept = gathered(*specs)
        assert kept[kept.speech.str.endswith(both[0])].source.tolist() == [owner]
        table = drop_table(found["frame"], found["repeats"]).set_index("source")
        assert table["near-duplicate"].to_dict() == {specs[0].split("=")[0]: 0, specs[1].split("=")[0]: 1, "all": 1}
        members = found["clusters"][0]["members"]
        assert [member["source"] for member in members].count(owner) == 1 and members[0]["kept"]


# ---- privacy ----


def test_what_is_masked_is_in_no_output(tmp_path):
    text = f"My name is Rosalind Okonkwo, write to rosa.o@example.org or call 212-555-0147. {long_text(4)}"
    spec = chat_csv(tmp_path / "a.csv", [("q0", text, "Stress"), ("q1", f"Hello! {text}", "Stress")])
    found, kept = gathered(spec)
    written = kept.to_json() + json.dumps(found["clusters"])
    assert not [secret for secret in ("Rosalind", "Okonkwo", "rosa.o", "0147") if secret in written]
    assert "[name]" in written and found["masked"].loc[0, ["email", "phone"]].tolist() == [2, 2]


def test_our_own_corpus_is_left_alone_unless_asked(demo):
    assert not demo.speech.str.contains(r"\[name\]").any()
    _, counts = mask_private(demo.head(5), "scraped")
    assert counts.loc[0, "person"] is None and "fictional" in counts.loc[0, "note"]
    one_line(lambda: mask_private(demo.head(2), "some"))


# ---- bad sources ----

HEAD = "questionID,questionText,topics\n"
GOOD = f'{HEAD}q0,"{long_text(0)}",Stress\n'
BAD_CSV = {
    "unknown topic": GOOD.replace("Stress", "Golf"),
    "no usable speech": GOOD.replace(long_text(0), "too short"),
    "all empty": f"{HEAD}q0,,Stress\n",
}


@pytest.mark.parametrize("fault", BAD_CSV)
def test_a_bad_table_is_one_line_that_names_the_file(tmp_path, fault):
    (tmp_path / "bad.csv").write_text(BAD_CSV[fault], encoding="utf-8")
    message = one_line(lambda: gathered(f"counsel-chat={tmp_path / 'bad.csv'}"))
    assert "bad.csv" in message and len(message) < 600


# ---- limits and splits ----


def frame_of(sizes):
    """A frame with as many speeches of each topic as asked."""
    topics = sorted(coarse_of())
    rows = [(f"s-{topic}-{n}", topics[topic]) for topic, size in enumerate(sizes) for n in range(size)]
    frame = pd.DataFrame(rows, columns=["speech_id", "topic"])
    return frame.assign(speech=frame.topic + frame.speech_id.str.replace(r".*-", " ", regex=True))


def test_the_split_has_the_asked_share_in_every_coarse_topic():
    frame = frame_of([630] * 42)  # the paper's size
    split = split_speeches(frame, 3291 / 26483, 0.1, 0)
    assert abs((split.split == "test").sum() - 26460 * 3291 / 26483) < 4 * (26460 * 0.124 * 0.876) ** 0.5
    rest = split[split.split != "test"]
    assert abs((rest.split == "dev").mean() - 0.1) < 4 * (0.09 / len(rest)) ** 0.5
    table = split_table(split, 3291 / 26483)
    ranges = (map(float, text.split(" to ")) for text in table["by chance %"])
    inside = [low <= share <= high for share, (low, high) in zip(table["test %"], ranges)]
    assert sum(inside) >= len(table) - 2 and table.speeches.iloc[-1] == table.speeches.iloc[:-1].sum() == 26460


few_words = st.lists(st.text(alphabet="abc xyz", min_size=3), min_size=1, max_size=20)


@few
@given(few_words, st.lists(st.text(max_size=20), max_size=20), st.integers(0, 4), st.randoms())
def test_adding_removing_or_reordering_rows_moves_no_speech(texts, more, seed, chance):
    def parts(speeches):
        return {speech: split_of(speech, 0.3, 0.2, seed) for speech in speeches}

    before, after = parts(texts), parts(chance.sample([*texts, *more], len(texts) + len(more)))
    assert all(after[speech] == part for speech, part in before.items())
    louder = [split_of(speech.upper() + "!", 0.3, 0.2, seed) for speech in before]
    assert louder == [*before.values()], "the same words are on the same side"


def test_a_larger_fraction_keeps_what_was_held_out_and_every_part_is_asked_for(demo):
    def held_out(fraction, seed):
        return set(split_speeches(demo, fraction, 0.1, seed).query("split == 'test'").speech_id)

    assert held_out(0.1, 0) < held_out(0.3, 0) and held_out(0.25, 1) != held_out(0.25, 0)
    for part, shares in (("test", (0.0, 0.1)), ("dev", (0.2, 0.0))):
        assert part in one_line(lambda shares=shares: split_speeches(demo, *shares, 0))


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
    even = counts.empty or not full.any() or counts[full].min() >= counts.max() - 1
    assert even, "no topic is passed over while another gets two more"
    shuffled = frame.iloc[chance.sample(range(len(frame)), len(frame))].reset_index(drop=True)
    assert set(limit_speeches(shuffled, limit, seed).speech_id) == set(kept.speech_id)
    smaller = set(limit_speeches(frame, max(0, limit - 1), seed).speech_id)
    assert smaller <= set(kept.speech_id), "a smaller limit keeps a part of a larger one"


def test_a_part_of_our_corpus_has_as_many_of_each_topic_and_the_whole_enough_to_test(demo):
    for each in (2, 5):
        assert limit_speeches(demo, 42 * each, 0).topic.value_counts().eq(each).all()
    for seed in range(3):
        parts = split_speeches(demo, 0.25, 0.1, seed).groupby("split").topic.agg(["size", "nunique"])
        assert parts.loc["test", "size"] >= 120 and parts.loc["test", "nunique"] >= 40


def test_which_topics_have_one_more_is_drawn_and_not_by_the_alphabet():
    frame = frame_of([2, 2, 2, 2])
    more = [limit_speeches(frame, 5, seed).topic.value_counts().idxmax() for seed in range(40)]
    assert set(more) == set(frame.topic)


def test_a_split_seed_tests_every_seed_on_the_same_speeches(demo):
    parts = {"frame": demo, "released": None, "candidates": None, "pairs": None}
    for split_seed, alike in ((0, True), (None, False)):
        chosen = dataclasses.replace(DEMO.speeches, split_seed=split_seed, limit=168)
        first, second = (draw_and_split(demo, parts, chosen, seed)[0] for seed in (1, 2))
        assert first.equals(second) == alike and (first.split == "test").sum() > 30


# ---- the audit ----


def test_the_audit_finds_and_removes_what_deduplication_missed(demo):
    split = split_speeches(demo, 0.25, 0.1, 0)
    test = split[split.split == "test"].iloc[0]
    planted = test.to_frame().T.assign(speech_id="planted-0", speech="Well then. " + test.speech, split="train")
    frame, found = audit_split(pd.concat([split, planted], ignore_index=True), None, None, DEMO.speeches, 0)
    assert found["dropped by the audit"] == 1 and found["test speeches with a near-duplicate outside"] == 0
    assert frame.speech_id.tolist() == split.speech_id.tolist(), "the test speech stays, its twin in training goes"


def test_the_audit_says_how_many_there_would_have_been(tmp_path):
    texts = [long_text(n) for n in range(40)]
    rows = [(f"q{n}", t, "Stress") for n, t in enumerate([*texts, *(f"Hello there. {t}" for t in texts)])]
    found, kept = gathered(chat_csv(tmp_path / "a.csv", rows))
    assert len(kept) == 40 and len(found["clusters"]) == 40
    split = split_speeches(kept.reset_index(drop=True), 0.25, 0.1, 0)
    counts = audit_split(split, found["candidates"], found["pairs"], DEMO.speeches, 0)[1]
    sides = {t: (split_of(t, 0.25, 0, 0), split_of(f"Hello there. {t}", 0.25, 0, 0)) for t in texts}
    assert counts["would have had one without near-deduplication"] == sum(a != b for a, b in sides.values()) > 0
    assert counts["test speeches with a near-duplicate outside"] == 0 == counts["dropped by the audit"]


# ---- the released dataset ----


def released_folder(folder, n=30):
    """Write a dataset in the released form: 21 columns, two parts, several pairs for a training question."""
    (folder / "data").mkdir(parents=True)
    rated = {f"{side}_{key}_rating": n for side, n in (("chosen", 5), ("rejected", 3)) for key in PRINCIPLE_KEYS}
    for part, first, size, pairs in (("train", 0, n, 2), ("test", n, n // 3, 1)):
        rows = [
            {"ID": f"psycho8k-{i}", "prefID": k, "question": f" {long_text(i)}", "chosen": f"I hear you, {i}."}
            | {"rejected": f"Move on, {i}.", "chosen_model": "gpt-4o", "rejected_model": f"model-{k}", **rated}
            for i, k in itertools.product(range(first, first + size), range(pairs))
        ]
        pd.DataFrame(rows)[list(SCHEMAS["pairs"])].to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")
    return folder


def test_the_released_dataset_brings_speeches_parts_and_pairs(tmp_path):
    frame, parts = collect_released(f"released={released_folder(tmp_path / 'r')}", DEMO.speeches)
    assert len(frame) == 40 and not frame.speech.str.startswith(" ").any() and len(parts["train"]) == 60
    split = split_speeches(frame.assign(coarse_topic="special-topics"), 0.25, 0.2, 0)
    assert set(split.speech_id[split.split == "test"]) == set(parts["test"].ID), "the published part is kept"
    assert (split.split == "dev").sum() > 0 and not set(split.speech_id[split.split == "dev"]) & set(parts["test"].ID)


def test_released_texts_are_masked_only_on_demand(tmp_path):
    folder, said = released_folder(tmp_path / "r"), "I hear you. Write to help@example.org."
    path = folder / "data" / "train-00000-of-00001.parquet"
    pd.read_parquet(path).assign(chosen=said).to_parquet(path)
    for mask, expected in ((DEMO.speeches.mask, said), ("all", "I hear you. Write to [email].")):
        parts = collect_released(f"released={folder}", dataclasses.replace(DEMO.speeches, mask=mask))[1]
        assert set(parts["train"].chosen) == {expected}


# ---- the real table ----


def test_counsel_chat_is_read_whole(counsel_chat):
    table = pd.read_csv(counsel_chat, dtype=str, keep_default_na=False)
    found, kept = gathered(f"counsel-chat={counsel_chat}")
    tally = drop_table(found["frame"], found["repeats"]).iloc[0]
    assert tally["rows"] == len(table) == tally[list(ROW_FATES)].sum() and tally.kept == len(kept) > 500
    assert tally["rows"] - tally.repeated == table.questionID.nunique()
    assert kept.topic.isin(list(coarse_of())).all() and (kept.topic_by == "gold").mean() > 0.98
    assert kept.speech_id.is_unique and not kept.speech.str.contains(r"</?[a-z]+>|&\w+;|\n|@\w", regex=True).any()


def test_counsel_chat_copied_into_amod_is_found_again(counsel_chat, tmp_path):
    questions = pd.read_csv(counsel_chat).drop_duplicates("questionID").questionText.dropna().tolist()
    rows = [{"Context": f"  {question.strip()} ", "Response": "r"} for question in questions]
    copy = "amod-counsel=" + jsonl(tmp_path / "combined_dataset.json", rows)
    found, kept = gathered(f"counsel-chat={counsel_chat}", copy)
    table = drop_table(found["frame"], found["repeats"]).set_index("source")
    assert table.kept["amod-counsel"] == 0
    assert table.duplicate["amod-counsel"] == table.kept["counsel-chat"] == len(kept)


def test_the_stored_figures_of_counsel_chat_are_those_of_its_file(counsel_chat):
    stored = json.loads(resource_path("counsel_chat.json").read_text())
    assert sha256_file(counsel_chat) == stored["sha256"], "measure them again from the new file"
    opened = open_source(f"counsel-chat={counsel_chat}")
    kept = [read_source(opened, *limits)[0].query("reason == ''").speech for limits in ((1, 10**6), ())]
    assert [writing_figures(speeches) for speeches in kept] == list(stored["figures"].values())


# ---- the shipped corpus, and the way into a stage ----


def test_our_corpus_reads_like_real_questions(demo):
    table = writing_table(demo.speech).set_index("what")
    ours, real = table["this run"], table.iloc[:, -1]
    assert abs(ours["words, 50th percentile"] - real["words, 50th percentile"]) <= 10
    assert abs(ours.filter(like="question") - real.filter(like="question")).max() <= 10
    assert ours["in first person, %"] >= 95 and abs(ours["reading ease, median"] - real["reading ease, median"]) <= 10


@few
@given(st.lists(st.text(alphabet="ab ?.I'"), min_size=1, max_size=8))
def test_figures_of_any_texts_are_finite_and_in_range(texts):
    found = writing_figures(texts)
    assert all(math.isfinite(value) for value in found.values())
    assert found["words, 5th percentile"] <= found["words, 50th percentile"] <= found["words, 95th percentile"]
    assert 0 <= found["ending in a question, %"] <= found["with a question, %"] <= 100


def test_speeches_fit_their_schema_and_the_table_counts_them(demo):
    frame = split_speeches(demo.assign(coarse_topic=demo.topic.map(coarse_of())), 0.25, 0.1, 0)
    frame = frame[list(SCHEMAS["speeches"])]
    with StageWriter(Run("example"), "01_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", frame)
    assert StageReader(Run("example"), "01_speeches").rows("speeches").equals(frame)
    table = topic_table(frame)
    assert table.speeches.iloc[-1] == table.speeches.iloc[:-1].sum() == len(frame)
    assert table["paper speeches"].iloc[-1] == table["paper speeches"].iloc[:-1].sum() == 26483
    assert table["share %"].iloc[:-1].sum() == pytest.approx(100, abs=0.05 * 42)
