"""Topics are those of Table 4, no head scores what it was trained on, scores are scikit-learn's, and gold stays gold."""

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
from refusals import one_line
from test_gateway import completion, error, gateway, server  # noqa: F401 (fixtures)

from psycopref.corpus import topics
from psycopref.core.paper import coarse_of, resource_path
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, Failure
from psycopref.gateway.gateway import Gateway
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
DEMO = [json.loads(line) for line in resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()]


def hashed(texts, *arguments, **keywords):
    """Stand in for MiniLM: each word has a direction, a text is the mean of its words."""
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
    rows = [
        {"speech": talk(slug, n), "topic": slug, "topic_by": by} for slug, size in counts.items() for n in range(size)
    ]
    return pd.DataFrame(rows, columns=["speech", "topic", "topic_by"])


def probabilities_of(slugs, certainty=1.0):
    found = np.zeros((len(slugs), 42))
    for row, slug in zip(found, slugs):
        if slug is not None:
            row[:] = (1 - certainty) / 41
            row[SLUGS.index(slug)] = certainty
    return found


class Spy:
    """A method that notes what it is trained on and what it is asked, and knows nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, train, labels, texts):
        assert len(train) == len(labels)
        self.calls.append((train, labels, texts))
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
    for written in (
        slug,
        slug.upper(),
        title,
        title.replace(" And ", " & "),
        slug.replace("-", "_"),
        slug.replace("-", " / "),
        f" {title}! ",
        slug.replace("-", "\u2011"),
    ):
        assert topic_slug(written) == slug, written
    assert topic_slug(slug + "x") is None and topic_slug("x-" + slug) is None


@pytest.mark.parametrize("written, slug", [("Grief", "grief-and-loss"), ("Sleep", "sleep-improvement"), ("Alzheimer’s", "aging"), ("Alzheimer's", "aging"), ("Career Counseling", "career"),
                                           ("Legal & Regulatory", "legal-regulatory"), ("Children & Adolescents", "children-adolescents"), ("LGBTQ", "lgbtq"), ("LGBTQ+", "lgbtq")])  # fmt: skip
def test_other_names_of_topics_are_known(written, slug):
    assert topic_slug(written) == slug


@pytest.mark.parametrize("written", ["", " ", "golf", "-", "42", "none", "anxiety, stress", "depressed", "тревога"])
def test_what_is_no_topic_has_no_slug(written):
    assert topic_slug(written) is None


@few
@given(st.text(max_size=30))
def test_a_slug_is_one_of_the_42(text):
    assert topic_slug(text) in [*SLUGS, None]


def test_both_published_spellings_of_counsel_chat_are_known(counsel_chat):
    listed = pd.read_csv(counsel_chat, dtype=str, keep_default_na=False).topics
    titles = {title.strip() for cell in listed for title in cell.split(",") if title.strip()}
    assert len(titles) > 30 and None not in map(topic_slug, titles)
    for title in titles:  # the older form writes the title as a slug
        assert topic_slug(
            re.sub(r"[^a-z]+", "-", title.lower().replace("'", "").replace("&", "")).strip("-")
        ) == topic_slug(title)


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
    found = topic_probabilities("zero-shot", [], [], ["about grief-and-loss"])
    assert SLUGS[found[0].argmax()] == "grief-and-loss"


@pytest.mark.parametrize("change, shown", [(lambda d: d | {"golf": "x"}, "golf"), (lambda d: {k: v for k, v in d.items() if k != "aging"}, "aging"),
                                           (lambda d: {k.replace("stress", "Stress"): v for k, v in d.items()}, "Stress"), (lambda d: list(d), "42"), (lambda d: "text", "42"), (lambda d: {}, "42"),
                                           *((lambda d, value=value: value, "42") for value in (None, 3, [{}]))])  # fmt: skip
def test_wrong_descriptions_are_one_line(prompts, change, shown):
    (prompts / "topics.json").write_text(json.dumps(change(dict.fromkeys(SLUGS, "x"))))
    message = one_line(topic_descriptions)
    assert "topics.json" in message and shown in message


@pytest.mark.parametrize("content", ["", "{", "Dear reader", '{"anxiety": "a" "stress": "b"}', "\ufeff{}"])
def test_descriptions_that_are_no_json_are_one_line(prompts, content):
    (prompts / "topics.json").write_text(content, encoding="utf-8")
    assert "topics.json" in one_line(topic_descriptions)


@pytest.mark.parametrize("value", [None, 3, ["worry", "fear"], {"text": "worry"}, ""], ids=repr)
def test_a_description_that_is_no_sentence_is_one_line(prompts, value):
    (prompts / "topics.json").write_text(json.dumps(dict.fromkeys(SLUGS, "x") | {"anxiety": value}))
    assert "anxiety" in one_line(topic_descriptions)


# ---- probabilities ----

TRAIN = frame_of({"sleep-improvement": 6, "anxiety": 3, "workplace-relationships": 4})


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_probabilities_are_rows_of_one_in_the_order_of_the_table(method):
    asked = [talk(slug, 99) for slug in ("workplace-relationships", "anxiety", "sleep-improvement")] + [
        "",
        "completely other words",
    ]
    found = topic_probabilities(method, TRAIN.speech.tolist(), TRAIN.topic.tolist(), asked)
    assert found.shape == (5, 42) and found.min() >= 0 and np.abs(found.sum(1) - 1).max() < 1e-6
    unseen = [i for i, slug in enumerate(SLUGS) if slug not in set(TRAIN.topic)]
    if method == "zero-shot":
        assert (found > 0).all()
    else:
        assert [SLUGS[best] for best in found.argmax(1)[:3]] == [
            "workplace-relationships",
            "anxiety",
            "sleep-improvement",
        ] and (found[:, unseen] == 0).all()
    assert topic_probabilities(method, TRAIN.speech.tolist(), TRAIN.topic.tolist(), []).shape == (0, 42)


def test_zero_shot_learns_nothing_and_knows_every_description():
    described = topic_descriptions()
    found = topic_probabilities("zero-shot", [], [], list(described.values()))
    assert [SLUGS[best] for best in found.argmax(1)] == SLUGS
    again = topic_probabilities("zero-shot", TRAIN.speech.tolist(), TRAIN.topic.tolist(), list(described.values()))
    assert np.array_equal(found, again)


@pytest.mark.parametrize("method", ["minilm", "tfidf"])
def test_a_rare_topic_weighs_as_much_as_a_frequent_one(method):
    many = frame_of({"anxiety": 60, "aging": 2})
    found = topic_probabilities(
        method, many.speech.tolist(), many.topic.tolist(), ["", talk("aging", 99), talk("anxiety", 99)]
    )
    rare = found[:, SLUGS.index("aging")]
    assert rare[1] > 0.5 > rare[2]
    assert method == "tfidf" or 0.2 < rare[0] < 0.8, "with nothing to go by, both are as likely"


def test_an_unknown_method_is_one_line_that_names_the_known():
    message = one_line(lambda: topic_probabilities("minlm", ["a", "b"], ["anxiety", "stress"], ["a"]))
    assert "'minlm'" in message and "minilm" in message and "tfidf" in message and "zero-shot" in message


# ---- what is learnt from ----


def test_our_speeches_help_where_they_are_not_part_of_the_run():
    ours = [row["speech"] for row in DEMO]
    gold, slugs, more, more_topics = training_rows(TRAIN)
    assert (
        (gold, slugs) == (TRAIN.speech.tolist(), TRAIN.topic.tolist())
        and more == ours
        and set(more_topics) == set(SLUGS)
    )
    own = pd.DataFrame({"speech": ours[:50], "topic": more_topics[:50], "topic_by": "gold"})
    gold, _, more, _ = training_rows(own)
    assert gold == ours[:50] and more == ours[50:]
    assert training_rows(own.assign(topic_by="none given"))[0] == [], "only gold is learnt from"


def test_more_rows_never_hold_a_gold_speech(spy):
    frame = frame_of({"anxiety": 30, "stress": 30})
    more = [
        ("a speech of another source", "aging"),
        (frame.speech[0], "golf-is-never-read"),
        (frame.speech[31], "stress"),
    ]
    gold, _, others, other_topics = training_rows(frame, more)
    assert (
        others[0] == more[0][0]
        and not set(others) & set(gold)
        and other_topics[0] == "aging"
        and len(others) == 1 + len(DEMO)
    )
    table = compare_methods(frame, ["spy"], 0.0, more=more)
    assert table["gold speeches"].tolist() == [60]
    for learnt, labels, asked in spy.calls:
        assert (
            learnt.count(more[0][0]) == 1
            and labels[learnt.index(more[0][0])] == "aging"
            and not set(asked) - set(frame.speech)
        )
        assert not set(learnt) & set(asked), "a speech was learnt and then scored"


# ---- cross-validation ----


@few
@given(st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(lambda sizes: max(sizes) >= 5), st.integers(0, 3))
def test_every_gold_speech_is_scored_once_by_a_head_that_has_not_seen_it(sizes, seed):
    spy, frame = Spy(), frame_of({SLUGS[5 * i]: size for i, size in enumerate(sizes)})
    ours = ["ours one", "ours two"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setitem(METHODS, "spy", spy)
        found = cross_validate("spy", frame.speech.tolist(), frame.topic.tolist(), ours, ["stress", "aging"], seed=seed)
    topic_of = dict(zip(frame.speech, frame.topic)) | dict(zip(ours, ["stress", "aging"]))
    assert sorted(text for _, _, asked in spy.calls for text in asked) == sorted(frame.speech) and len(spy.calls) == 5
    for learnt, labels, asked in spy.calls:
        assert (
            sorted(learnt) == sorted(set(frame.speech) - set(asked)) + ours
            and [topic_of[text] for text in learnt] == labels
        )
    assert (
        found.shape == (len(frame), 42)
        and (found[:, [SLUGS.index("stress"), SLUGS.index("anxiety")]] == 0.5).all()
        and np.allclose(found.sum(1), 1)
    )


def test_rows_of_the_answer_belong_to_their_speeches(monkeypatch):
    frame = frame_of({"anxiety": 7, "aging": 6, "career": 5}).sample(frac=1, random_state=3)
    known = dict(zip(frame.speech, frame.topic))
    monkeypatch.setitem(
        METHODS, "knows", lambda train, labels, texts: (probabilities_of([known[text] for text in texts]), SLUGS)
    )
    found = cross_validate("knows", frame.speech.tolist(), frame.topic.tolist(), [], [])
    assert [SLUGS[best] for best in found.argmax(1)] == frame.topic.tolist()


def test_methods_share_the_folds_of_a_seed(monkeypatch):
    frame, spies = frame_of({"anxiety": 25, "aging": 20, "career": 7}), {}
    for name in ("one", "two"):
        monkeypatch.setitem(METHODS, name, spies.setdefault(name, Spy()))
    compare_methods(frame, ["one", "two"], 0.0, seed=4)
    folds = {name: [asked for _, _, asked in seen.calls] for name, seen in spies.items()}
    assert folds["one"] == folds["two"] and len(folds["one"]) == 5
    for asked in folds["one"]:
        assert {topics.topic_slug(re.match(r"I talk about (\S+)", text)[1]) for text in asked} == {
            "anxiety",
            "aging",
            "career",
        }, "each part has every topic"
    compare_methods(frame, ["one"], 0.0, seed=5)
    assert [asked for _, _, asked in spies["one"].calls[5:]] != folds["one"]


def test_gold_that_is_spread_over_all_topics_is_compared():
    frame = frame_of(dict.fromkeys(SLUGS, 2))
    table = compare_methods(frame, ["minilm"], 0.0)
    assert table["gold speeches"].tolist() == [84]


@pytest.mark.parametrize("method", ["minilm", "tfidf"])
def test_a_head_that_learns_is_better_than_chance(method):
    frame = frame_of({"anxiety": 5, "aging": 5, "career": 5})
    found = cross_validate(method, frame.speech.tolist(), frame.topic.tolist(), ["words"], ["stress"])
    assert [SLUGS[best] for best in found.argmax(1)] == frame.topic.tolist()


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
def test_scores_are_those_of_scikit_learn(table):
    gold, found = drawn(*table)
    said = [SLUGS[row.argmax()] if row.max() > 0 else "nothing" for row in found]
    coarse = [{**coarse_of(), "nothing": "nothing"}[slug] for slug in said]
    scored = score_topics(gold, found, 0.1, samples=2)
    assert scored["accuracy %"] == pytest.approx(100 * accuracy_score(gold, said))
    assert scored["macro-F1"] == pytest.approx(
        100 * f1_score(gold, said, labels=sorted(set(gold)), average="macro", zero_division=0)
    )
    coarse_gold = [coarse_of()[slug] for slug in gold]
    assert scored["coarse macro-F1"] == pytest.approx(
        100 * f1_score(coarse_gold, coarse, labels=sorted(set(coarse_gold)), average="macro", zero_division=0)
    )
    by_hand = []
    for slug in set(gold):
        hits = sum(a == b == slug for a, b in zip(gold, said))
        by_hand.append(2 * hits / (gold.count(slug) + said.count(slug)))
    assert scored["macro-F1"] == pytest.approx(100 * np.mean(by_hand))


@pytest.mark.parametrize("n, kinds", [(50, 1), (50, 8), (120, 4), (400, 8)])
def test_the_interval_holds_the_score_and_the_seed_decides_it(n, kinds):
    gold, found = drawn(np.random.default_rng(n), n, kinds)
    one, same, other = (score_topics(gold, found, 0.1, samples=200, seed=seed) for seed in (0, 0, 1))
    assert one == same and 0 <= one["low"] <= one["macro-F1"] <= one["high"] <= 100 and one["high"] > one["low"]
    assert (other["low"], other["high"]) != (one["low"], one["high"]) and other["macro-F1"] == one["macro-F1"]


def test_more_speeches_make_a_narrower_interval():
    widths = []
    for n in (60, 600):
        gold, found = drawn(np.random.default_rng(7), n, 3)
        scored = score_topics(gold, found, 0.1, samples=200)
        widths.append(scored["high"] - scored["low"])
    assert widths[1] < widths[0] / 2


@fewer
@given(tables)
def test_a_higher_threshold_keeps_fewer(table):
    gold, found = drawn(*table)
    said = [SLUGS[row.argmax()] if row.max() > 0 else "nothing" for row in found]
    last = 101.0
    for threshold in sorted((0.01, 0.1, 0.3, float(found.max()), 1.1)):
        scored = score_topics(gold, found, threshold, samples=2)
        kept = [row.max() >= threshold for row in found]
        assert scored["kept %"] == pytest.approx(100 * np.mean(kept)) and scored["kept %"] <= last
        right = [a == b for a, b, keep in zip(gold, said, kept) if keep]
        assert scored["accuracy of the kept %"] == (pytest.approx(100 * np.mean(right)) if right else None)
        last = scored["kept %"]


def test_perfect_and_hopeless():
    gold = ["anxiety", "aging", "career", "others"] * 5
    assert score_topics(gold, probabilities_of(gold), 0.5, samples=20) == {
        "macro-F1": 100, "low": 100, "high": 100, "coarse macro-F1": 100, "accuracy %": 100, "kept %": 100, "accuracy of the kept %": 100}  # fmt: skip
    nothing = score_topics(SLUGS, np.zeros((42, 42)), 0.5, samples=20)
    assert {k: v for k, v in nothing.items() if v != 0} == {"accuracy of the kept %": None}


def test_an_unreadable_reply_is_never_kept():
    gold = ["anxiety", "aging"] * 5
    assert score_topics(gold, probabilities_of([None, "aging"] * 5), 0.0, samples=20)["kept %"] == 50


# ---- comparing ----


@pytest.mark.parametrize("method", ["spy", "openai:gpt-4o-2024-08-06"])
def test_with_few_gold_rows_nothing_is_measured_and_the_table_says_so(spy, method):
    frame = pd.concat([frame_of({"anxiety": 25, "stress": 24}), frame_of({"career": 80}, by="none given")])
    [row] = compare_methods(frame, [method], 0.1).to_dict("records")
    assert (
        row["method"] == method
        and row["gold speeches"] == 49
        and "fewer than 50" in row["note"]
        and set(row) == {"method", "gold speeches", "note"}
    )
    assert spy.calls == []
    assert compare_methods(frame.iloc[:0], ["spy"], 0.1)["gold speeches"].tolist() == [0]
    measured = compare_methods(frame_of({"anxiety": 25, "stress": 25}), ["spy"], 0.1)
    assert measured["accuracy %"].tolist() == [50.0] and len(spy.calls) == 5, "fifty are enough"


def test_the_table_has_a_row_for_each_method_with_its_scores(spy):
    frame = frame_of({"anxiety": 30, "stress": 25, "aging": 5})
    table = compare_methods(frame, ["minilm", "zero-shot", "spy"], 0.2)
    assert table.method.tolist() == ["minilm", "zero-shot", "spy"] and (table["gold speeches"] == 60).all()
    gold, slugs, ours, our_topics = training_rows(frame)
    scored = score_topics(slugs, cross_validate("minilm", gold, slugs, ours, our_topics), 0.2)
    assert {k: table[k][0] for k in scored} == {k: round(v, 1) for k, v in scored.items()}
    assert table["note"].tolist() == ["", "no training", ""]
    assert table["accuracy %"][2] == 50.0, "of two that are as likely, the first of the table"


def test_a_misspelt_method_is_one_line_in_a_comparison(spy):
    assert "tf-idf" in one_line(lambda: compare_methods(frame_of({"anxiety": 30, "stress": 30}), ["tf-idf"], 0.1))


def test_the_list_of_a_source_counts_any_of_its_topics(monkeypatch):
    frame = frame_of({"anxiety": 40, "stress": 20})
    frame["topics"] = [["anxiety", "aging"]] * 30 + [["anxiety"]] * 10 + [["stress", "anxiety"]] * 20
    monkeypatch.setitem(METHODS, "aging", lambda train, labels, texts: (np.ones((len(texts), 1)), ["aging"]))
    monkeypatch.setitem(METHODS, "anxiety", lambda train, labels, texts: (np.ones((len(texts), 1)), ["anxiety"]))
    table = compare_methods(frame, ["aging", "anxiety"], 0.1).set_index("method")
    assert table["in the source's list %"].tolist() == [50.0, 100.0] and table["accuracy %"].tolist() == [0.0, 66.7]
    assert compare_methods(frame.drop(columns="topics"), ["aging"], 0.1)["in the source's list %"].tolist() == [None]


# ---- a model as labeller ----


def say(topic):
    return lambda text, attempt: completion(json.dumps({"topic": topic}))


def test_the_question_holds_every_topic_the_speech_and_a_schema(server, gateway):  # noqa: F811
    speech = 'I keep {braces}, {topics} and "quotes"\\ in my head.'
    server.behave = say("stress")
    found = label_by_model(gateway, server.uri, [speech])
    [body] = server.bodies
    content = body["messages"][-1]["content"]
    for slug, what in topic_descriptions().items():
        assert f"- {slug}: {what}" in content
    assert content.endswith(speech) and content.count("- anxiety: ") == 1
    schema = body["response_format"]["json_schema"]["schema"]
    assert (
        schema["properties"]["topic"]["enum"] == SLUGS
        and schema["required"] == ["topic"]
        and schema["additionalProperties"] is False
    )
    assert body["temperature"] == 0 and body["max_completion_tokens"] >= 24
    assert np.array_equal(found, probabilities_of(["stress"]))


@pytest.mark.parametrize("reply, slug", [
    ('{"topic": "aging"}', "aging"), ('Sure! Here it is:\n```json\n{"topic": "aging"}\n```\nBe well.', "aging"), ('{"topic": "Grief & Loss"}', "grief-and-loss"),
    ('{"topic": "STRESS ", "why": "tired"}', "stress"), ('{"topic": "golf"}', None), ('{"topic": ""}', None), ('{"topic": null}', None), ('{"topic": 3}', None), ('{"Topic": "aging"}', None),
    ('{"topic": "anxiety, stress"}', None), ("aging", None), ("[]", None), ("{", None), ('{"topic": "aging"', None), ('{"topic": "aging"} {"topic": "stress"}', None), ("{" * 5000 + "}" * 5000, None),
    ('{"topic": {"topic": "aging"}}', None)], ids=lambda value: str(value)[:20])  # fmt: skip
def test_replies_are_read_or_have_no_topic(reply, slug):
    assert read_topic(ChatReply(reply)) == slug
    assert read_topic(Failure("no text", reply)) is None


@few
@given(st.text(max_size=60))
def test_any_reply_is_read(text):
    assert read_topic(ChatReply(text)) in [*SLUGS, None]
    assert read_topic(ChatReply(json.dumps({"topic": text}))) == topic_slug(text)


def test_labels_stand_with_their_speeches_and_what_cannot_be_read_is_a_row_of_zeros(server, gateway):  # noqa: F811
    frame = frame_of({"anxiety": 3, "aging": 2, "career": 2})

    def behave(text, attempt):
        slug = re.search(r"I talk about (\S+)", text)[1]
        return (
            error(500)
            if slug == "career"
            else completion("I won't say." if text.endswith(" 1") else f'It is {{"topic": "{slug}"}}.')
        )

    server.behave = behave
    found = label_by_model(gateway, server.uri, frame.speech.tolist())
    assert np.array_equal(found, probabilities_of(["anxiety", None, "anxiety", "aging", None, None, None]))
    assert label_by_model(gateway, server.uri, []).shape == (0, 42)


def test_a_model_is_compared_on_every_gold_row_and_its_unreadable_replies_are_counted(server, gateway, spy):  # noqa: F811
    frame = frame_of({"anxiety": 30, "stress": 30})
    server.behave = lambda text, attempt: completion(
        "no idea" if text.endswith((" 7", " 8")) else '{"topic": "stress"}'
    )
    table = compare_methods(frame, [server.uri, "spy"], 0.5, gateway).set_index("method")
    assert table.note.tolist() == ["4 replies unreadable", ""]
    assert (
        table["accuracy %"].iloc[0] == round(100 * 28 / 60, 1)
        and table["kept %"].iloc[0] == round(100 * 56 / 60, 1)
        and table["accuracy of the kept %"].iloc[0] == 50.0
    )
    assert len(server.log) == 60, "each speech is asked once, by no fold"


def test_an_unreadable_reply_is_in_no_list_of_a_source(server, gateway):  # noqa: F811
    frame = frame_of({"anxiety": 60})
    frame["topics"] = [["anxiety"]] * 60
    server.behave = lambda text, attempt: completion("no idea")
    assert compare_methods(frame, [server.uri], 0.5, gateway)["in the source's list %"].tolist() == [0.0]


def test_nothing_is_asked_twice(server, gateway):  # noqa: F811
    server.behave = say("aging")
    texts = [talk("aging", n % 4) for n in range(9)]
    first = label_by_model(gateway, server.uri, texts)
    assert len(server.log) == 4
    gateway.cache.db.close()
    later = Gateway(ReplyCache(gateway.cache.path))
    server.behave = say("stress")
    assert np.array_equal(label_by_model(later, server.uri, texts[::-1]), first) and len(server.log) == 4


def test_other_descriptions_are_another_question(server, gateway, prompts):  # noqa: F811
    server.behave = say("aging")
    label_by_model(gateway, server.uri, ["I am old."])
    (prompts / "topics.json").write_text(json.dumps(dict.fromkeys(SLUGS, "something else")))
    label_by_model(gateway, server.uri, ["I am old."])
    assert len(server.log) == 2


def test_a_prompt_without_a_place_for_the_speech_is_one_line(prompts):
    (prompts / "topic.txt").write_text("Choose among {topics}.")
    assert "client_speech" in one_line(lambda: topic_request("I am old."))


def test_canned_phrases_name_no_topic(gateway):  # noqa: F811
    assert not label_by_model(gateway, "rules:phrases", ["I am old.", "I am tired."]).any()


def test_rules_that_cannot_label_are_one_line(gateway):  # noqa: F811
    assert "rules:rubric" in one_line(lambda: label_by_model(gateway, "rules:rubric", ["I am old."]))


@pytest.mark.parametrize("uri", ["openai:", "anthropic:claude", "openai:no-such-priced-model"])
def test_an_unknown_labeller_is_one_line(gateway, uri):  # noqa: F811
    assert uri in one_line(lambda: assign_topics(frame_of({"aging": 1}, by="none given"), uri, 0.1, gateway))


# ---- assigning ----

MIXED = pd.concat([frame_of({"anxiety": 8, "aging": 6, "career": 7}), frame_of({"anxiety": 4, "aging": 5, "career": 3}, by="none given").assign(
    speech=lambda f: f.speech + " again", topic="others")], ignore_index=True)  # fmt: skip


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_gold_stays_and_every_other_row_is_filled(method):
    before = MIXED.copy(deep=True)
    found = assign_topics(MIXED, method, 0.05)
    gold = MIXED.topic_by == "gold"
    assert MIXED.equals(before), "the given frame is not changed"
    assert (
        found[gold][["speech", "topic", "topic_by"]].equals(MIXED[gold])
        and found.speech.equals(MIXED.speech)
        and found.index.equals(MIXED.index)
    )
    assert set(found.topic_by[~gold]) <= {"classifier", LOW} and found.topic.isin(SLUGS).all()
    assert (found.coarse_topic == found.topic.map(coarse_of())).all()
    said = found[found.topic_by == "classifier"]
    assert len(said) > 6 and (method == "zero-shot" or said.topic.tolist() == [text.split()[3] for text in said.speech])


def test_gold_rows_alone_need_no_classifier(spy):
    gold = MIXED[MIXED.topic_by == "gold"]
    assert assign_topics(gold, "spy", 0.1).drop(columns="coarse_topic").equals(gold) and spy.calls == []
    assert list(assign_topics(gold.iloc[:0], "spy", 0.1)) == ["speech", "topic", "topic_by", "coarse_topic"]


def test_without_any_gold_row_our_speeches_teach(spy):
    open_rows = frame_of({"anxiety": 3}, by="none given")
    found = assign_topics(open_rows, "spy", 0.1, more=[("a speech", "aging")])
    assert found.topic.tolist() == ["anxiety"] * 3 and found.topic_by.tolist() == ["classifier"] * 3
    [(learnt, labels, asked)] = spy.calls
    assert (
        learnt == ["a speech", *(row["speech"] for row in DEMO)]
        and labels[0] == "aging"
        and asked == open_rows.speech.tolist()
    )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_below_the_threshold_a_speech_goes_to_others(monkeypatch, threshold):
    certainty = {talk("aging", n): n / 10 for n in range(1, 11)}
    frame = pd.DataFrame({"speech": list(certainty), "topic": "others", "topic_by": "none given"})
    monkeypatch.setitem(
        METHODS,
        "sure",
        lambda train, labels, texts: (np.array([[certainty[text], 0.0] for text in texts]), ["aging", "career"]),
    )
    found = assign_topics(frame, "sure", threshold)
    for row, sure in zip(found.itertuples(), certainty.values()):
        assert (row.topic, row.topic_by, row.coarse_topic) == (
            ("aging", "classifier", coarse_of()["aging"])
            if sure >= threshold
            else ("others", LOW, coarse_of()["others"])
        )


def test_a_model_assigns_and_what_it_does_not_say_goes_to_others(server, gateway):  # noqa: F811
    server.behave = lambda text, attempt: completion(
        '{"topic": "golf"}' if text.endswith("0 again") else '{"topic": "Career Counseling"}'
    )
    for threshold in (0.0, 0.9):
        found = assign_topics(MIXED, server.uri, threshold, gateway)
        rest = found[found.topic_by != "gold"]
        assert len(rest) == 12 and rest.topic.tolist() == [
            "others" if text.endswith("0 again") else "career" for text in rest.speech
        ]
        assert rest.topic_by.tolist() == [LOW if text.endswith("0 again") else "classifier" for text in rest.speech]
    assert len(server.log) == 12, "gold rows are not asked about"


@pytest.mark.parametrize("method", ["minilm", "tfidf", "zero-shot"])
def test_the_order_of_rows_changes_no_topic(method):
    by_speech = assign_topics(MIXED, method, 0.3).set_index("speech").sort_index()
    for seed in range(2):
        shuffled = MIXED.sample(frac=1, random_state=seed)
        assert assign_topics(shuffled, method, 0.3).set_index("speech").sort_index().equals(by_speech)


def test_any_index_and_more_columns_are_kept(spy):
    frame = MIXED.assign(speech_id=[f"s-{n}" for n in range(len(MIXED))])
    frame.index = ["twin"] * len(frame)
    found = assign_topics(frame, "spy", 0.5)
    assert found.speech_id.tolist() == frame.speech_id.tolist() and found.index.tolist() == frame.index.tolist()
    assert (
        found.topic[found.topic_by != "gold"].tolist() == ["anxiety"] * 12
        and found.topic[found.topic_by == "gold"].tolist() == MIXED.topic[:21].tolist()
    )


def test_assigning_twice_is_assigning_once():
    once = assign_topics(MIXED, "minilm", 0.3)
    assert assign_topics(once, "minilm", 0.3).equals(once)


def test_our_own_speeches_are_given_back_as_they_are():
    frame = pd.DataFrame(
        {
            "speech": [row["speech"] for row in DEMO],
            "topic": [topic_slug(row["topic"]) for row in DEMO],
            "topic_by": "gold",
        }
    )
    assert assign_topics(frame, "minilm", 0.5).topic.tolist() == frame.topic.tolist()
