"""Labelled corpora in their published columns: who said what before, whose label counts, what is left out, and what is refused."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.corpus.labelled_text import (
    ALL_SCORES,
    ANNOMI_CONTRASTS,
    LABEL_COLUMNS,
    COMPARISONS,
    CONTEXT,
    CORPORA,
    ESCONV_CONTRASTS,
    FEEDBACK,
    LABEL_KINDS,
    MI_QUALITY,
    ESCONV_STRATEGIES,
    TITLES,
    UPVOTES,
    _majority,
    _said_before,
    label_comparison_table,
    labelled_files,
    read_labelled,
)

ANNOMI_FULL = (
    "mi_quality",
    "transcript_id",
    "video_title",
    "video_url",
    "topic",
    "utterance_id",
    "interlocutor",
    "timestamp",
    "utterance_text",
    "annotator_id",
    "therapist_input_exists",
    "therapist_input_subtype",
    "reflection_exists",
    "reflection_subtype",
    "question_exists",
    "question_subtype",
    "main_therapist_behaviour",
    "client_talk_type",
)
ANNOMI_SIMPLE = (
    "transcript_id",
    "mi_quality",
    "video_title",
    "video_url",
    "topic",
    "utterance_id",
    "interlocutor",
    "timestamp",
    "utterance_text",
    "main_therapist_behaviour",
    "client_talk_type",
)
EPITOME = ("sp_id", "rp_id", "seeker_post", "response_post", "level", "rationales")
CHAT = (
    "questionID",
    "questionTitle",
    "questionText",
    "questionUrl",
    "topics",
    "therapistName",
    "therapistUrl",
    "answerText",
    "upvotes",
)
CHAT_2020 = (
    "",
    "questionID",
    "questionTitle",
    "questionText",
    "questionLink",
    "topic",
    "therapistInfo",
    "therapistURL",
    "answerText",
    "upvotes",
    "views",
    "split",
)


def table(path, head, *rows, blank=""):
    """Write a CSV; a row names the cells it fills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(head)
        writer.writerows([[row.get(name, blank) for name in head] for row in rows])
    return path


def said(number, who, text, session=3, quality="high", annotator=0, **labels):
    return {
        "mi_quality": quality,
        "transcript_id": session,
        "utterance_id": number,
        "interlocutor": who,
        "utterance_text": text,
        "annotator_id": annotator,
        **labels,
    }


SESSION = (
    said(0, "therapist", "Welcome.", main_therapist_behaviour="other"),
    said(1, "client", "I smoke."),
    said(2, "client", "A lot."),
    said(3, "therapist", "What do you like about it?", main_therapist_behaviour="question", question_subtype="open"),
    said(4, "client", "It calms me."),
    said(5, "therapist", "Do you smoke at work?", main_therapist_behaviour="question", question_subtype="closed"),
    said(6, "therapist", "You smoke for peace.", main_therapist_behaviour="reflection", reflection_subtype="complex"),
    said(
        7, "therapist", "You should stop.", main_therapist_behaviour="therapist_input", therapist_input_subtype="advice"
    ),
)


def labels_of(found, construct):
    own = found.rows[found.rows.construct == construct]
    return dict(zip(own.item, own.label))


def test_annomi_full_gives_the_planted_labels(tmp_path):
    path = table(
        tmp_path / "AnnoMI-full.csv",
        ANNOMI_FULL,
        *reversed(SESSION),
        said(1, "client", "Hm.", 4, "low"),
        said(
            2,
            "therapist",
            "Quit!",
            4,
            "low",
            main_therapist_behaviour="therapist_input",
            therapist_input_subtype="options",
        ),
        blank="n/a",
    )
    found = read_labelled(f"annomi={path}")
    assert (
        tuple(found.rows.columns) == LABEL_COLUMNS
        and set(found.rows.kind) == {"binary"}
        and set(found.rows.corpus) == {"annomi"}
    )
    assert labels_of(found, "open question, not closed") == {"3-3": 1, "3-5": 0}
    assert labels_of(found, "reflection, not input") == {"3-6": 1, "3-7": 0, "4-2": 0}
    assert labels_of(found, "question, not input") == {"3-3": 1, "3-5": 1, "3-7": 0, "4-2": 0}
    assert labels_of(found, "options or negotiation, not advice") == {"3-7": 0, "4-2": 1}
    assert labels_of(found, "complex reflection, not simple") == {"3-6": 1}
    assert labels_of(found, MI_QUALITY) == {"3-3": 1, "3-5": 1, "3-6": 1, "3-7": 1, "4-2": 0}
    words = found.rows.drop_duplicates("item").set_index("item").client_speech
    assert (
        words["3-3"] == "I smoke. A lot." and words["3-7"] == "I smoke. A lot. It calms me." and words["4-2"] == "Hm."
    )
    assert set(found.rows.group) == {"3", "4"} and sum(found.dropped.values()) == 1
    assert [file["file"] for file in found.origin["files"]] == ["AnnoMI-full.csv"] and found.paths == (path,)


def test_annomi_simple_has_fewer_constructs_and_the_folder_prefers_full(tmp_path):
    table(tmp_path / "AnnoMI-simple.csv", ANNOMI_SIMPLE, *SESSION, blank="n/a")
    found = read_labelled(f"annomi={tmp_path}")
    assert set(found.rows.construct) == {MI_QUALITY, "reflection, not input", "question, not input"}
    table(tmp_path / "AnnoMI-full.csv", ANNOMI_FULL, *SESSION, blank="n/a")
    assert [path.name for path in labelled_files(f"annomi={tmp_path}")] == ["AnnoMI-full.csv"]


def test_annotators_vote_and_ties_are_counted(tmp_path):
    votes = [
        said(2, "therapist", "And then?", annotator=a, main_therapist_behaviour="question", question_subtype=kind)
        for a, kind in enumerate(("open", "closed", "closed"))
    ]
    tied = [
        said(3, "therapist", "And now?", annotator=a, main_therapist_behaviour="question", question_subtype=kind)
        for a, kind in enumerate(("open", "closed"))
    ]
    found = read_labelled(
        f"annomi={table(tmp_path / 'a.csv', ANNOMI_FULL, said(1, 'client', 'I fell.'), *votes, *tied, blank='n/a')}"
    )
    assert labels_of(found, "open question, not closed") == {"3-2": 0}
    assert labels_of(found, "question, not input") == {"3-2": 1, "3-3": 1}
    assert found.dropped == {"labels on which annotators were tied: open question, not closed": 1}


@given(st.lists(st.sampled_from(["open", "closed", ""]), min_size=1, max_size=9))
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_majority_is_the_strictly_most_frequent(votes):
    from collections import Counter

    counts = Counter(votes)
    best = [value for value in counts if counts[value] == max(counts.values())]
    assert _majority(counts) == (best[0] if len(best) == 1 else None)


@given(st.lists(st.tuples(st.booleans(), st.text("abc ", max_size=4).map(str.strip)), max_size=12))
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_nobody_hears_what_is_said_later(turns):
    before = _said_before(turns)
    for place in range(len(turns)):
        assert before[place] == " ".join([words for client, words in turns[:place] if client and words][-CONTEXT:])


def epitome(folder, levels=(2, 1, 0)):
    rows = [
        {
            "sp_id": "p1",
            "rp_id": f"r{i}",
            "seeker_post": "Nobody calls.",
            "response_post": f"I am sorry {i}.",
            "level": level,
        }
        for i, level in enumerate(levels)
    ]
    for part in ("emotional-reactions", "interpretations", "explorations"):
        table(folder / f"{part}-reddit.csv", EPITOME, *rows, {**rows[0], "response_post": " "})
    return folder


def test_epitome_is_three_files_of_the_same_answers(tmp_path):
    found = read_labelled(f"epitome={epitome(tmp_path / 'dataset')}")
    for construct in ("emotional reactions", "interpretations", "explorations"):
        assert labels_of(found, construct) == {"p1-r0": 2, "p1-r1": 1, "p1-r2": 0}
    assert (
        set(found.rows.group) == {"p1"}
        and set(found.rows.kind) == {"ordinal"}
        and found.dropped == {"answers without a post or without words": 3}
    )
    one = read_labelled(f"epitome={tmp_path / 'dataset' / 'explorations-reddit.csv'}")
    assert len(one.rows) == 9, "a file brings the other two with it"
    (tmp_path / "dataset" / "explorations-reddit.csv").unlink()
    with pytest.raises(StudyError, match="but not"):
        read_labelled(f"epitome={tmp_path / 'dataset'}")


def esconv(path, *dialogs):
    path.write_text(
        json.dumps(
            [
                {
                    "situation": "work",
                    "dialog": [{"speaker": who, "annotation": notes, "content": text} for who, text, notes in dialog],
                }
                for dialog in dialogs
            ]
        )
    )
    return path


@pytest.mark.parametrize(
    ("seeker", "supporter", "question", "other"),
    [
        ("seeker", "supporter", "Question", "Others"),
        ("speaker", "listener", "Questions", "Other"),
        ("usr", "sys", "[Question]", "[Others]"),
    ],
)
def test_esconv_strategies_and_feedback(tmp_path, seeker, supporter, question, other):
    dialog = (
        (supporter, "Hi", {"strategy": other}),
        (seeker, "I was fired.\n", {}),
        (supporter, "What happened?", {"strategy": question}),
        (seeker, "They said no.", {}),
        (supporter, "Go again.", {"strategy": "Providing Suggestions"}),
        (supporter, "You can.", {"strategy": other}),
        (seeker, "Well.", {"feedback": "1"}),
        (seeker, "No.", {"feedback": "5"}),
        (supporter, "Bye", {}),
    )
    found = read_labelled(f"esconv={esconv(tmp_path / 'ESConv.json', dialog, dialog)}")
    assert labels_of(found, "question, not another strategy") == {
        f"{d}-{i}": float(i == 2) for d in (0, 1) for i in (2, 4, 5)
    }
    assert labels_of(found, "suggestion, not another strategy") == {
        f"{d}-{i}": float(i == 4) for d in (0, 1) for i in (2, 4, 5)
    }
    rated = found.rows[found.rows.construct == FEEDBACK]
    assert (
        rated.label.tolist() == [1, 1]
        and set(rated.response) == {"Go again. You can."}
        and set(rated.client_speech) == {"I was fired. They said no."}
    )
    assert set(found.rows.group) == {"0", "1"} and sum(found.dropped.values()) == 6


def test_counsel_chat_pairs_stay_within_a_question(tmp_path):
    def answer(question, text, votes):
        return {
            "questionID": question,
            "questionTitle": "Sleep",
            "questionText": "<p>I wake at&nbsp;3.</p>",
            "answerText": text,
            "upvotes": votes,
        }

    rows = (
        answer("a", "<p>Rest.</p><p>Walk.</p>", 2),
        answer("a", "Why?", 5),
        answer("a", "<br/>", 9),
        answer("a", "Hm.", 2),
        answer("b", "Ask.", 1),
    )
    for name, head in (("counselchat-data.csv", CHAT), ("20200325_counsel_chat.csv", CHAT_2020)):
        found = read_labelled(f"counsel-chat={table(tmp_path / name, head, *rows)}")
        assert set(zip(found.rows.response, found.rows.other)) == {("Why?", "Rest.\nWalk."), ("Why?", "Hm.")}
        assert (
            set(found.rows.kind) == {"pair"}
            and set(found.rows.label) == {1}
            and set(found.rows.group) == {"a"}
            and set(found.rows.client_speech) == {"I wake at 3."}
        )
        assert found.dropped == {
            "answers without words, or to a question without words": 1,
            "pairs of answers with as many upvotes": 1,
        }
    assert labelled_files(f"counsel-chat={tmp_path}") == [tmp_path / "20200325_counsel_chat.csv"], (
        "only that file has votes"
    )


def test_the_published_counsel_chat_file_has_no_votes(counsel_chat):
    found = read_labelled(f"counsel-chat={counsel_chat}")
    assert len(found.rows) == 0 and list(found.rows.columns) == list(LABEL_COLUMNS)
    assert 1500 < found.dropped["pairs of answers with as many upvotes"] < 2500
    assert found.dropped["answers without words, or to a question without words"] < 50


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mi_quality": "medium"}, "mi_quality is 'medium'"),
        ({"interlocutor": "robot"}, "interlocutor is 'robot'"),
        ({"utterance_id": "first"}, "utterance_id is 'first'"),
        ({"main_therapist_behaviour": "joke"}, "main_therapist_behaviour is 'joke'"),
        ({"question_subtype": "rhetorical"}, "question_subtype is 'rhetorical'"),
    ],
)
def test_annomi_refuses_odd_cells(tmp_path, change, told):
    path = table(tmp_path / "a.csv", ANNOMI_FULL, SESSION[1], {**SESSION[3], **change}, blank="n/a")
    with pytest.raises(StudyError, match=told) as error:
        read_labelled(f"annomi={path}")
    assert "\n" not in str(error.value) and "row 1" in str(error.value) and "github.com" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "content", "told"),
    [
        ("annomi", b"", "is empty"),
        ("annomi", b"a,b\n1,2\n", "has no column 'transcript_id'"),
        ("annomi", "mi_quality\n".encode("utf-16"), "UTF-16"),
        ("annomi", ",".join(ANNOMI_FULL).encode() + b"\n", "no rows"),
        (
            "annomi",
            ",".join(set(ANNOMI_FULL) - {"main_therapist_behaviour"}).encode() + b"\n" + b"high," * 16 + b"x\n",
            "main_therapist",
        ),
        ("counsel-chat", b"questionID,questionText,answerText\n1,a,b\n", "has no column 'upvotes'"),
        ("counsel-chat", b"questionID,questionText,answerText,upvotes\n1,a,b,few\n", "upvotes is 'few'"),
        ("esconv", b"[1]", "expected a JSON object"),
        ("esconv", b'[{"dialog": "hello"}]', "expected a list of turns"),
        ("esconv", b'[{"dialog": [{"speaker": "cat"}]}]', "expected speaker"),
        (
            "esconv",
            b'[{"dialog": [{"speaker": "seeker", "content": "a", "annotation": {"feedback": "6"}}]}]',
            "feedback is '6', expected 1 to 5",
        ),
        (
            "esconv",
            b'[{"dialog": [{"speaker": "supporter", "content": "a", "annotation": {"strategy": "Joke"}}]}]',
            "strategy is 'Joke'",
        ),
        ("esconv", b'[{"dialog": [{"speaker": "supporter", "content": null}]}]', "expected text"),
        ("esconv", b"\xff\xfa\xfb", "is not UTF-8"),
        ("epitome", b"a,b\n1,2\n", "tells no mechanism"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, spec, content, told):
    path = tmp_path / ("odd.json" if spec == "esconv" else "odd.csv")
    path.write_bytes(content)
    with pytest.raises(StudyError, match=told) as error:
        read_labelled(f"{spec}={path}")
    assert "\n" not in str(error.value) and "odd" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("anno=/a", "Did you mean annomi"),
        ("annomi", "needs a local copy"),
        ("annomi=", "nothing follows"),
        ("esconv=/no/where", "no such file"),
    ],
)
def test_wrong_places_are_one_line(spec, told):
    with pytest.raises(StudyError, match=told) as error:
        read_labelled(spec)
    assert "\n" not in str(error.value)
    assert labelled_files(spec) == []


def test_older_encodings_of_tables_are_read(tmp_path):
    path = tmp_path / "AnnoMI-simple.csv"
    table(path, ANNOMI_SIMPLE, SESSION[1], {**SESSION[3], "utterance_text": "Caf\u00e9?"}, blank="n/a")
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    assert set(read_labelled(f"annomi={path}").rows.response) == {"Café?"}


def test_every_construct_is_compared_with_something_and_nothing_else_is():
    read = {
        "annomi": {MI_QUALITY, *ANNOMI_CONTRASTS},
        "epitome": {"emotional reactions", "interpretations", "explorations"},
        "esconv": {FEEDBACK, *ESCONV_CONTRASTS},
        "counsel-chat": {UPVOTES},
    }
    assert {name: {c.construct for c in COMPARISONS if c.corpus == name} for name in CORPORA} == read
    assert all(set(c.scores) <= set(ALL_SCORES) and c.scores and c.why for c in COMPARISONS) and len(
        set(COMPARISONS)
    ) == len(COMPARISONS) == len(label_comparison_table())
    assert (
        set(ESCONV_CONTRASTS.values()) <= set(ESCONV_STRATEGIES)
        and set(TITLES) == set(CORPORA)
        and set(LABEL_KINDS) == {"binary", "ordinal", "pair"}
    )
