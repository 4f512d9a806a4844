"""Topics are those of Table 4, no head scores what it was trained on, scores are scikit-learn's, and gold stays
gold."""

import hashlib
import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from raw_server import error, good
from refusals import one_line

from psycopref.corpus import topics
from psycopref.core.paper import coarse_of
from psycopref.models.chat import ChatReply, Failure
from psycopref.corpus.topics import (
    LOW,
    METHODS,
    assign_topics,
    compare_methods,
    cross_validate,
    label_by_model,
    read_topic,
    score_topics,
    topic_descriptions,
    topic_probabilities,
    topic_request,
    topic_slug,
    training_rows,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
fewer = settings(few, max_examples=12)
SLUGS = list(coarse_of())


def hashed(texts, *arguments, **keywords):
    """Stand in for MiniLM: each word has a direction, a text is the mean of its words."""
    texts = list(texts)
    found = np.zeros((len(texts), 64), np.float32)
    for row, text in zip(found, texts):
        for word in re.findall(r"\w{3,}", text.lower()):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
            row += np.random.default_rng(seed).standard_normal(64)
        row /= np.linalg.norm(row) or 1
    return found


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    monkeypatch.setattr(topics, "embed", hashed)


def talk(slug: str, number: int) -> str:
    return f"I talk about {slug} {slug.replace('-', ' ')} {number}"


def frame_of(counts: dict[str, int], by: str = "gold") -> pd.DataFrame:
    """As many speeches of each topic as asked."""
    rows = [(talk(slug, n), slug, by) for slug, size in counts.items() for n in range(size)]
    return pd.DataFrame(rows, columns=["speech", "topic", "topic_by"])


def probabilities_of(slugs):
    """Rows that are certain of a slug, or know nothing where it is None."""
    found = np.zeros((len(slugs), 42))
    for row, slug in zip(found, slugs):
        if slug is not None:
            row[SLUGS.index(slug)] = 1
    return found


def best(found) -> list[str]:
    return [SLUGS[column] for column in found.argmax(1)]


class Spy:
    """A method that notes what it is trained on and what it is asked; it knows some texts, else two topics are as
    likely."""

    def __init__(self, known=None):
        self.calls, self.known = [], known

    def __call__(self, train, labels, texts):
        assert len(train) == len(labels)
        self.calls.append((train, labels, texts))
        if self.known:
            return probabilities_of([self.known[text] for text in texts]), SLUGS
        return np.full((len(texts), 2), 0.5), ["stress", "anxiety"]


@pytest.fixture
def spy(monkeypatch):
    found = Spy()
    monkeypatch.setitem(METHODS, "spy", found)
    return found


# ---- spellings ----


@pytest.mark.parametrize("slug", SLUGS)
def test_a_topic_is_known_however_it_is_written(slug):
    title = slug.replace("-", " ").title()
    ways = (slug, slug.upper(), title, title.replace(" And ", " & "), f" {title}! ")
    for written in (*ways, *(slug.replace("-", mark) for mark in ("_", " / ", "\u2011"))):
        assert topic_slug(written) == slug, written
    assert topic_slug(slug + "x") is None and topic_slug("x-" + slug) is None


NAMES = {
    "Grief": "grief-and-loss",
    "Sleep": "sleep-improvement",
    "Alzheimer’s": "aging",
    "Alzheimer's": "aging",
    "Career Counseling": "career",
    "Legal & Regulatory": "legal-regulatory",
    "Children & Adolescents": "children-adolescents",
    "LGBTQ+": "lgbtq",
}
NO_TOPICS = ["", " ", "golf", "-", "42", "none", "anxiety, stress", "depressed", "тревога"]


@pytest.mark.parametrize("written, slug", [*NAMES.items(), *((text, None) for text in NO_TOPICS)])
def test_other_names_of_topics_are_known_and_nothing_else(written, slug):
    assert topic_slug(written) == slug


def test_both_published_spellings_of_counsel_chat_are_known(counsel_chat):
    listed = pd.read_csv(counsel_chat, dtype=str, keep_default_na=False).topics
    titles = {title.strip() for cell in listed for title in cell.split(",") if title.strip()}
    assert len(titles) > 30 and None not in map(topic_slug, titles)
    for title in titles:  # the older form writes the title as a slug
        older = re.sub(r"[^a-z]+", "-", title.lower().replace("'", "").replace("&", "")).strip("-")
        assert topic_slug(older) == topic_slug(title)


# ---- descriptions ----


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A user's folder of prompts."""
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path / "prompts"))
    (tmp_path / "prompts").mkdir()
    return tmp_path / "prompts"


def test_there_is_a_sentence_for_each_topic_in_the_order_of_the_table():
    found = topic_descriptions()
    assert list(found) == SLUGS and len(set(found.values())) == 42 and all(len(what) > 30 for what in found.values())


def test_a_user_can_replace_the_descriptions(prompts):
    (prompts / "topics.json").write_text(json.dumps({slug: f"about {slug}" for slug in reversed(SLUGS)}))
    assert topic_descriptions() == {slug: f"about {slug}" for slug in SLUGS} and list(topic_descriptions()) == SLUGS
    assert "- stress: about stress\n" in topic_request("I am tired.").messages[0]["content"]
    assert best(topic_probabilities("zero-shot", [], [], ["about grief-and-loss"])) == ["grief-and-loss"]


EACH = dict.fromkeys(SLUGS, "x")
BAD_DESCRIPTIONS = [
    (json.dumps(EACH | {"golf": "x"}), "golf"),
    (json.dumps({slug: "x" for slug in SLUGS if slug != "aging"}), "aging"),
    (json.dumps({slug.replace("stress", "Stress"): "x" for slug in SLUGS}), "Stress"),
    *((json.dumps(value), "42") for value in (SLUGS, "text", {}, None, 3, [{}])),
    *((json.dumps(EACH | {"anxiety": value}), "anxiety") for value in (None, 3, ["worry"], {"text": "worry"}, "")),
    *((text, "is no JSON") for text in ("", "{", "Dear reader", '{"anxiety": "a" "stress": "b"}', "\ufeff{")),
]


@pytest.mark.parametrize("content, shown", BAD_DESCRIPTIONS, ids=lambda value: value[-12:])
def test_wrong_descriptions_are_one_line(prompts, content, shown):
    (prompts / "topics.json").write_text(content, encoding="utf-8")
    message = one_line(topic_descriptions)
    assert "topics.json" in message and shown in message


# ---- probabilities ----

TRAIN = frame_of({"sleep-improvement": 6, "anxiety": 3, "workplace-relationships": 4})
LEARNT = (TRAIN.speech.tolist(), TRAIN.topic.tolist())


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_probabilities_are_rows_of_one_in_the_order_of_the_table(method):
    slugs = ["workplace-relationships", "anxiety", "sleep-improvement"]
    asked = [*(talk(slug, 99) for slug in slugs), "", "completely other words"]
    found = topic_probabilities(method, *LEARNT, asked)
    assert found.shape == (5, 42) and found.min() >= 0 and np.abs(found.sum(1) - 1).max() < 1e-6
    unseen = [i for i, slug in enumerate(SLUGS) if slug not in LEARNT[1]]
    if method == "zero-shot":
        assert (found > 0).all()
    else:
        assert best(found)[:3] == slugs and (found[:, unseen] == 0).all()
    assert topic_probabilities(method, *LEARNT, []).shape == (0, 42)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_embeds_a_speech_twice(method, monkeypatch):
    asked = []
    monkeypatch.setattr(topics, "embed", lambda texts, **how: asked.extend(texts) or hashed(texts, **how))
    topic_probabilities(method, *LEARNT, ["Only here."])
    assert asked.count("Only here.") == (method != "tfidf")


def test_zero_shot_learns_nothing_and_knows_every_description():
    described = list(topic_descriptions().values())
    found = topic_probabilities("zero-shot", [], [], described)
    assert best(found) == SLUGS and np.array_equal(found, topic_probabilities("zero-shot", *LEARNT, described))


@pytest.mark.parametrize("method", ["minilm", "tfidf"])
def test_a_rare_topic_weighs_as_much_as_a_frequent_one(method):
    many = frame_of({"anxiety": 60, "aging": 2})
    asked = ["", talk("aging", 99), talk("anxiety", 99)]
    rare = topic_probabilities(method, many.speech.tolist(), many.topic.tolist(), asked)[:, SLUGS.index("aging")]
    assert rare[1] > 0.5 > rare[2]
    assert method == "tfidf" or 0.2 < rare[0] < 0.8, "with nothing to go by, both are as likely"


# ---- what is learnt from ----


def test_our_speeches_help_where_they_are_not_part_of_the_run(shipped):
    ours = [row["speech"] for row in shipped]
    gold, slugs, more, more_topics = training_rows(TRAIN)
    assert (gold, slugs) == LEARNT and more == ours and set(more_topics) == set(SLUGS)
    own = pd.DataFrame({"speech": ours[:50], "topic": more_topics[:50], "topic_by": "gold"})
    gold, _, more, topics = training_rows(own, [("another", "aging"), (ours[3], "stress")])
    assert gold == ours[:50] and more == ["another", *ours[50:]] and topics[0] == "aging", "no gold speech twice"
    assert training_rows(own.assign(topic_by="none given"))[0] == [], "only gold is learnt from"


# ---- cross-validation ----


@few
@given(st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(lambda sizes: max(sizes) >= 5), st.integers(0, 3))
def test_every_gold_speech_is_scored_once_by_a_head_that_has_not_seen_it(sizes, seed):
    frame = frame_of({SLUGS[5 * i]: size for i, size in enumerate(sizes)}).sample(frac=1, random_state=seed)
    ours = {"ours one": "stress", "ours two": "aging"}
    topic_of = dict(zip(frame.speech, frame.topic)) | ours
    spy = Spy(topic_of)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setitem(METHODS, "spy", spy)
        found = cross_validate("spy", frame.speech.tolist(), frame.topic.tolist(), [*ours], [*ours.values()], seed=seed)
    assert sorted(text for _, _, asked in spy.calls for text in asked) == sorted(frame.speech) and len(spy.calls) == 5
    for learnt, labels, asked in spy.calls:
        assert sorted(learnt) == sorted(set(frame.speech) - set(asked)) + [*ours]
        assert [topic_of[text] for text in learnt] == labels
    assert np.array_equal(found, probabilities_of(frame.topic)), "each row belongs to its speech"


def test_methods_share_the_folds_of_a_seed(monkeypatch):
    frame, spies = frame_of({"anxiety": 25, "aging": 20, "career": 7}), {}
    for name in ("one", "two"):
        monkeypatch.setitem(METHODS, name, spies.setdefault(name, Spy()))
    compare_methods(frame, ["one", "two"], 0.0, seed=4)
    one, two = ([asked for _, _, asked in seen.calls] for seen in spies.values())
    assert one == two and len(one) == 5
    assert all({text.split()[3] for text in asked} == set(frame.topic) for asked in one), "each part has every topic"
    compare_methods(frame, ["one"], 0.0, seed=5)
    assert [asked for _, _, asked in spies["one"].calls[5:]] != one


# ---- scores ----

tables = st.tuples(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99)).map(
    lambda t: (np.random.default_rng(t[2]), *t[:2])
)


def drawn(chance, n, topics_of_gold):
    """Random gold, and random probabilities with a lean to the gold; some rows are unreadable."""
    gold = chance.choice(SLUGS[: 5 * topics_of_gold : 5], n).tolist()
    found = chance.random((n, 42)) ** 4
    found[np.arange(n), [SLUGS.index(slug) for slug in gold]] += chance.random(n)
    found /= found.sum(1, keepdims=True)
    found[chance.random(n) < 0.1] = 0
    return gold, found


@fewer
@given(tables)
def test_scores_are_those_of_scikit_learn_and_a_higher_threshold_keeps_fewer(table):
    gold, found = drawn(*table)
    said = [SLUGS[row.argmax()] if row.max() > 0 else "nothing" for row in found]
    above = {**coarse_of(), "nothing": "nothing"}
    last = 101.0
    for threshold in sorted((0.01, 0.1, 0.3, float(found.max()), 1.1)):
        scored = score_topics(gold, found, threshold, samples=2)
        kept = [row.max() >= threshold for row in found]
        assert scored["kept %"] == pytest.approx(100 * np.mean(kept)) and scored["kept %"] <= last
        right = [a == b for a, b, keep in zip(gold, said, kept) if keep]
        assert scored["accuracy of the kept %"] == (pytest.approx(100 * np.mean(right)) if right else None)
        last = scored["kept %"]
    assert scored["accuracy %"] == pytest.approx(100 * accuracy_score(gold, said))
    for key, *both in (
        ("macro-F1", gold, said),
        ("coarse macro-F1", *([above[s] for s in side] for side in (gold, said))),
    ):
        reference = f1_score(*both, labels=sorted(set(both[0])), average="macro", zero_division=0)
        assert scored[key] == pytest.approx(100 * reference)


@pytest.mark.parametrize("n, kinds", [(50, 1), (50, 8), (120, 4), (400, 8)])
def test_the_interval_holds_the_score_and_the_seed_decides_it(n, kinds):
    gold, found = drawn(np.random.default_rng(n), n, kinds)
    one, same, other = (score_topics(gold, found, 0.1, samples=200, seed=seed) for seed in (0, 0, 1))
    assert one == same and 0 <= one["low"] <= one["macro-F1"] <= one["high"] <= 100 and one["high"] > one["low"]
    assert (other["low"], other["high"]) != (one["low"], one["high"]) and other["macro-F1"] == one["macro-F1"]


def test_perfect_hopeless_and_unreadable():
    gold = ["anxiety", "aging", "career", "others"] * 5
    scored = score_topics(gold, probabilities_of(gold), 0.5, samples=20)
    assert len(scored) == 7 and {value for key, value in scored.items() if key != "low"} == {100}
    nothing = score_topics(SLUGS, np.zeros((42, 42)), 0.0, samples=20)
    assert {k: v for k, v in nothing.items() if v != 0 and k != "high"} == {"accuracy of the kept %": None}, (
        "whatever the threshold"
    )


# ---- comparing ----


@pytest.mark.parametrize("method", ["spy", "openai:gpt-4o-2024-08-06"])
def test_with_few_gold_rows_nothing_is_measured_and_the_table_says_so(spy, method):
    frame = pd.concat([frame_of({"anxiety": 25, "stress": 24}), frame_of({"career": 80}, by="none given")])
    [row] = compare_methods(frame, [method], 0.1).to_dict("records")
    assert "fewer than 50" in row.pop("note") and row == {"method": method, "gold speeches": 49} and spy.calls == []
    assert compare_methods(frame.iloc[:0], ["spy"], 0.1)["gold speeches"].tolist() == [0]
    measured = compare_methods(frame_of({"anxiety": 25, "stress": 25}), ["spy"], 0.1)
    assert measured["accuracy %"].tolist() == [50.0] and len(spy.calls) == 5, "fifty are enough"


def test_the_table_has_a_row_for_each_method_with_its_scores(spy):
    frame = frame_of({"anxiety": 36, "stress": 30, "aging": 6})
    table = compare_methods(frame, ["minilm", "zero-shot", "spy"], 0.2)
    assert table.method.tolist() == ["minilm", "zero-shot", "spy"] and (table["gold speeches"] == 72).all()
    gold, slugs, ours, our_topics = training_rows(frame)
    scored = score_topics(slugs, cross_validate("minilm", gold, slugs, ours, our_topics), 0.2)
    assert {k: table[k][0] for k in scored} == {k: round(v, 1) for k, v in scored.items()}
    assert table["note"].tolist() == ["", "no training", ""]
    assert table["accuracy %"][2] == 50.0, "of two that are as likely, the first of the table"
    few = compare_methods(frame[1:], ["zero-shot"], 0.2).iloc[0]
    assert few.low is None and few.note == "no training; no interval: fewer than 24 gold speeches a topic"


def test_the_list_of_a_source_counts_any_of_its_topics(monkeypatch):
    frame = frame_of({"anxiety": 40, "stress": 20})
    frame["topics"] = [["anxiety", "aging"]] * 30 + [["anxiety"]] * 10 + [["stress", "anxiety"]] * 20
    for slug in ("aging", "anxiety"):
        monkeypatch.setitem(METHODS, slug, Spy(dict.fromkeys(frame.speech, slug)))
    table = compare_methods(frame, ["aging", "anxiety"], 0.1)
    assert table["in the source's list %"].tolist() == [50.0, 100.0] and table["accuracy %"].tolist() == [0.0, 66.7]
    assert compare_methods(frame.drop(columns="topics"), ["aging"], 0.1)["in the source's list %"].tolist() == [None]


# ---- a model as labeller ----


def test_the_question_holds_every_topic_the_speech_and_a_schema(server, gateway):
    speech = 'I keep {braces}, {topics} and "quotes"\\ in my head.'
    server.behave = lambda text, attempt: good('{"topic": "stress"}')
    found = label_by_model(gateway, server.uri, [speech])
    [body] = server.bodies
    content = body["messages"][-1]["content"]
    assert all(content.count(f"- {slug}: {what}") == 1 for slug, what in topic_descriptions().items())
    assert content.endswith(speech)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["topic"]["enum"] == SLUGS
    assert schema["required"] == ["topic"] and schema["additionalProperties"] is False
    assert body["temperature"] == 0 and body["max_completion_tokens"] >= 24
    assert np.array_equal(found, probabilities_of(["stress"]))


UNREADABLE = [
    *(json.dumps({"topic": value}) for value in ("golf", "", None, 3, "anxiety, stress", {"topic": "aging"})),
    *('{"Topic": "aging"}', "aging", "[]", "{", '{"topic": "aging"', '{"topic": "aging"} {"topic": "stress"}'),
    "{" * 5000 + "}" * 5000,
]


@pytest.mark.parametrize("reply", UNREADABLE, ids=lambda reply: reply[:20])
def test_what_names_no_topic_is_none(reply):
    assert read_topic(ChatReply(reply)) is None


@few
@given(st.text(max_size=60) | st.sampled_from(["STRESS ", "Grief and Loss"]))
def test_any_reply_is_read(text):
    assert read_topic(ChatReply(text)) is read_topic(Failure("no text", text)) is None
    assert read_topic(ChatReply(json.dumps({"topic": text, "why": "tired"}))) == topic_slug(text)
    assert read_topic(ChatReply('Sure! Here it is:\n```json\n{"topic": "aging"}\n```\nBe well.')) == "aging"


def test_labels_stand_with_their_speeches_and_what_cannot_be_read_is_a_row_of_zeros(server, gateway):
    frame = frame_of({"anxiety": 3, "aging": 2, "career": 2})

    def behave(text, attempt):
        slug = re.search(r"I talk about (\S+)", text)[1]
        if slug == "career":
            return error(500)
        return good("I won't say." if text.endswith(" 1") else f'It is {{"topic": "{slug}"}}.')

    server.behave = behave
    found = label_by_model(gateway, server.uri, frame.speech.tolist())
    assert np.array_equal(found, probabilities_of(["anxiety", None, "anxiety", "aging", None, None, None]))
    assert label_by_model(gateway, server.uri, []).shape == (0, 42)


def test_a_model_is_compared_on_every_gold_row_and_its_unreadable_replies_are_counted(server, gateway, spy):
    frame = frame_of({"anxiety": 30, "stress": 30}).assign(topics=[["stress", "anxiety"]] * 60)
    texts = {False: '{"topic": "stress"}', True: "no idea"}
    server.behave = lambda text, attempt: good(texts[text.endswith((" 7", " 8"))])
    row, _ = compare_methods(frame, [server.uri, "spy"], 0.5, gateway).to_dict("records")
    assert row["note"] == "4 replies unreadable" and row["accuracy of the kept %"] == 50.0
    assert (row["accuracy %"], row["kept %"]) == (round(100 * 28 / 60, 1), round(100 * 56 / 60, 1))
    assert row["in the source's list %"] == row["kept %"], "an unreadable reply is in no list of a source"
    assert len(server.log) == 60, "each speech is asked once, by no fold"


def test_rules_that_answer_with_phrases_name_no_topic_and_those_that_cannot_are_one_line(gateway):
    assert not label_by_model(gateway, "rules:phrases", ["I am old.", "I am tired."]).any()
    for uri in ("rules:rubric", "openai:", "anthropic:claude", "openai:no-such-priced-model"):
        frame = frame_of({"aging": 1}, by="none given")
        assert uri in one_line(lambda uri=uri, frame=frame: assign_topics(frame, uri, 0.1, gateway))


# ---- assigning ----

MIXED = pd.concat(
    [frame_of({"anxiety": 8, "aging": 6, "career": 7}), frame_of({"anxiety": 4, "aging": 5, "career": 3})]
)
MIXED = MIXED.assign(speech_id=[f"s-{n}" for n in range(33)]).set_axis(["twin"] * 33)
GOLD = np.arange(33) < 21
MIXED.loc[~GOLD, ["topic", "topic_by"]] = ["others", "none given"]
MIXED.loc[~GOLD, "speech"] += " again"


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_gold_stays_and_every_other_row_is_filled(method):
    before = MIXED.copy(deep=True)
    found = assign_topics(MIXED, method, 0.05)
    assert MIXED.equals(before), "the given frame is not changed"
    kept = ["speech", "topic", "topic_by", "speech_id"]
    assert found[GOLD][kept].equals(MIXED[GOLD][kept]) and (found.coarse_topic == found.topic.map(coarse_of())).all()
    same = found[["speech", "speech_id"]].equals(MIXED[["speech", "speech_id"]])
    assert same and found.index.equals(MIXED.index), "any index and more columns are kept"
    assert set(found.topic_by[~GOLD]) <= {"classifier", LOW} and found.topic.isin(SLUGS).all()
    said = found[found.topic_by == "classifier"]
    assert len(said) > 6 and (method == "zero-shot" or said.topic.tolist() == [text.split()[3] for text in said.speech])
    assert assign_topics(found, method, 0.05).equals(found), "twice is once"


def test_gold_rows_alone_need_no_classifier(spy):
    gold = MIXED[GOLD]
    assert assign_topics(gold, "spy", 0.1).drop(columns="coarse_topic").equals(gold) and spy.calls == []
    assert list(assign_topics(gold.iloc[:0], "spy", 0.1)) == [*MIXED, "coarse_topic"]


def test_without_any_gold_row_our_speeches_teach(spy, shipped):
    open_rows = frame_of({"anxiety": 3}, by="none given")
    found = assign_topics(open_rows, "spy", 0.1, more=[("a speech", "aging")])
    assert found.topic.tolist() == ["anxiety"] * 3 and found.topic_by.tolist() == ["classifier"] * 3
    [(learnt, labels, asked)] = spy.calls
    assert learnt == ["a speech", *(row["speech"] for row in shipped)]
    assert labels[0] == "aging" and asked == open_rows.speech.tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_below_the_threshold_a_speech_goes_to_others(monkeypatch, threshold):
    certainty = {talk("aging", n): n / 10 for n in range(1, 11)}
    frame = pd.DataFrame({"speech": list(certainty), "topic": "others", "topic_by": "none given"})
    answers = np.array([[sure, 0.0] for sure in certainty.values()])
    monkeypatch.setitem(METHODS, "sure", lambda train, labels, texts: (answers, ["aging", "career"]))
    expected = [("aging", "classifier") if sure >= threshold else ("others", LOW) for sure in certainty.values()]
    assert [*zip(*(assign_topics(frame, "sure", threshold)[name] for name in ("topic", "topic_by")))] == expected


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_a_model_assigns_and_what_it_does_not_say_goes_to_others(server, gateway, threshold):
    topic = {False: "Career Counseling", True: "golf"}
    server.behave = lambda text, attempt: good(json.dumps({"topic": topic[text.endswith("0 again")]}))
    rest = assign_topics(MIXED, server.uri, threshold, gateway)[~GOLD]
    expected = [("others", LOW) if text.endswith("0 again") else ("career", "classifier") for text in rest.speech]
    assert [*zip(rest.topic, rest.topic_by)] == expected
    assert len(server.log) == 12, "gold rows are not asked about"


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_the_order_of_rows_changes_no_topic(method):
    by_speech = assign_topics(MIXED, method, 0.3).sort_values("speech")
    for seed in range(2):
        shuffled = MIXED.sample(frac=1, random_state=seed)
        assert assign_topics(shuffled, method, 0.3).sort_values("speech").equals(by_speech)
