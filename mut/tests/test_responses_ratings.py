"""Who answers whom is settled by seed and id alone; a rating belongs to a response, not to its place; what fails is put aside."""

import json
from collections import Counter
from dataclasses import fields

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref import ratings, responses
from psycopref.artifacts import PRINCIPLE_KEYS, SCHEMAS, StageReader, StageWriter
from psycopref.config import PROFILES, Run, StudyError
from psycopref.gateway import PHRASES, ChatReply, Failure, FreeModel, Gateway, ReplyCache, chat_model, rubric_reply
from psycopref.ratings import check_coverage, rate, rating_request, rating_summary, shown_order
from psycopref.responses import DEMO_POOL, PAPER_POOL, POOLS, TINY_POOL, Member, assign_members, find_pool, pool_table, respond
from psycopref.rubric import rubric_scores, to_rating

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SPEECHES = pd.DataFrame({"speech_id": ["a", "b", "c"], "speech": ["Nobody at work has talked to me since I asked for fewer shifts.",
                                                                 "I count the stairs and start over when I lose count.", "My sister moved out in March."]})  # fmt: skip


def one_line(action) -> str:
    with pytest.raises(StudyError) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).strip()
    return str(error.value)


@pytest.fixture
def gateway(tmp_path):
    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))


def answered(names="abc", n=4) -> pd.DataFrame:
    """n responses for each speech, of different quality."""
    return pd.DataFrame([{"speech_id": name, "model": f"m{i}", "response": PHRASES[(i + ord(name)) % len(PHRASES)].format(word="work")}
                         for name in names for i in range(n)])  # fmt: skip


# ---- assignment ----

ids = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@few
@given(ids, st.integers(0, 2**31), st.integers(1, 8), st.randoms())
def test_members_do_not_depend_on_the_other_speeches(names, seed, each, chance):
    whole = assign_members(names, TINY_POOL, each, seed)
    assert [name for name, _ in whole] == [name for name in names for _ in range(each)]
    part = chance.sample(names, max(1, len(names) // 2))
    own = {name: [m for n, m in whole if n == name] for name in names}
    assert assign_members([*part, "one more"], TINY_POOL, each, seed)[: each * len(part)] == [(name, m) for name in part for m in own[name]]
    assert all(len({m.name for m in members}) == each for members in own.values()), "nobody answers twice"


def test_members_change_with_the_seed_and_everybody_gets_a_turn():
    names = [f"demo-{n}" for n in range(800)]
    first, second = (assign_members(names, DEMO_POOL, 4, seed) for seed in (0, 1))
    assert first != second
    turns = Counter(member.name for _, member in first)
    expected, spread = 800 * 4 / 8, (800 * 0.5 * 0.5) ** 0.5
    assert len(turns) == 8 and all(abs(n - expected) < 5 * spread for n in turns.values())
    orders = Counter(member.name for _, member in first[::4])
    assert len(orders) == 8, "the order of a speech's members is drawn too"


def test_pools_hold_enough_members_with_names_of_their_own():
    for name, pool in POOLS.items():
        assert len({member.name for member in pool}) == len(pool) >= PROFILES[name].responses.each_speech == 4
        assert find_pool(name, len(pool)) == pool
        assert str(len(pool)) in one_line(lambda: find_pool(name, len(pool) + 1))
    assert "demo" in one_line(lambda: find_pool("dmeo", 4))


def test_every_member_of_every_pool_can_be_asked():
    for member in {*PAPER_POOL, *DEMO_POOL, *TINY_POOL}:
        messages = member.messages("I {count} the stairs.")
        turns = [m["role"] for m in messages if m["role"] != "system"]
        assert turns == ["user", "assistant"] * len(member.examples) + ["user"] and "system" not in [m["role"] for m in messages[1:]]
        assert "I {count} the stairs." in messages[-1]["content"] and all(m["content"].strip() for m in messages)
        assert member.model.startswith(("openai:", "local:", "rules:"))
        if member.model.startswith(("openai:", "rules:")):
            chat_model(member.model)


# ---- responses ----


def test_every_assigned_member_has_one_row_in_order(gateway):
    assigned = assign_members(SPEECHES.speech_id, TINY_POOL, 4, 0)
    frame, failures = respond(gateway, SPEECHES, assigned, 64, 0)
    assert not failures and list(zip(frame.speech_id, frame.model)) == [(name, member.name) for name, member in assigned]
    assert set(frame.columns) == set(SCHEMAS["responses"]) and frame.response.str.len().gt(0).all() and frame.request_key.is_unique
    with StageWriter(Run("example"), "06_responses", "tiny", 0, {}) as stage:
        stage.rows("responses", frame)
    assert len(StageReader(Run("example"), "06_responses").rows("responses")) == 12


def test_responses_stay_when_speeches_are_added(gateway, tmp_path):
    first, _ = respond(gateway, SPEECHES, assign_members(["a"], TINY_POOL, 4, 0), 64, 0)
    whole, _ = respond(gateway, SPEECHES, assign_members(["c", "a", "b"], TINY_POOL, 4, 0), 64, 0)
    assert whole[whole.speech_id == "a"].reset_index(drop=True).equals(first)
    assert gateway.counts["rules:phrases"]["calls"] == 12, "what was answered is not asked again"


class Scripted(FreeModel):
    """Answer by a function of the request; None in its place is a failure."""

    def __init__(self, uri, answer):
        self.uri = self.identity = self.label = uri
        self.script, self.requests = answer, []

    async def answer(self, requests):
        self.requests += requests
        texts = [self.script(request) for request in requests]
        return [Failure("no text", "raw reply") if text is None else ChatReply(text, "length", 3, 5) for text in texts]


def test_failures_are_listed_and_the_others_kept(gateway, monkeypatch):
    model = Scripted("x:1", lambda request: None if "stairs" in request.messages[-1]["content"] else "I hear you.")
    monkeypatch.setattr(responses, "chat_model", lambda uri: model if uri == "x:1" else chat_model(uri))
    pool = (Member("silent", "-", "x:1"), *TINY_POOL[:3])
    assigned = assign_members(SPEECHES.speech_id, pool, 4, 0)
    frame, failures = respond(gateway, SPEECHES, assigned, 64, 0)
    assert failures == [{"speech_id": "b", "model": "silent", "reason": "no text", "raw": "raw reply"}]
    assert list(zip(frame.speech_id, frame.model)) == [(n, m.name) for n, m in assigned if (n, m.name) != ("b", "silent")]
    assert frame.groupby("speech_id").size().to_dict() == {"a": 4, "b": 3, "c": 4}
    heard = frame[frame.model == "silent"]
    assert heard.finish_reason.eq("length").all() and heard.n_tokens.eq(5).all()
    table = pool_table(pool, frame).set_index("member")
    assert table.loc["silent", "responses"] == 2 and table.loc["silent", "cut off %"] == 100.0 and table.loc["phrases-0", "cut off %"] == 0.0


def test_a_pool_that_never_answers_leaves_an_empty_frame_and_its_reasons(gateway, monkeypatch):
    monkeypatch.setattr(responses, "chat_model", lambda uri: Scripted(uri, lambda request: None))
    frame, failures = respond(gateway, SPEECHES, assign_members(SPEECHES.speech_id, TINY_POOL, 4, 0), 64, 0)
    assert len(failures) == 12 and len(frame) == 0 and set(frame.columns) == set(SCHEMAS["responses"])
    assert pool_table(TINY_POOL, frame).responses.sum() == 0


def test_each_member_is_asked_with_its_own_decoding(gateway, monkeypatch):
    model = Scripted("x:1", lambda request: "fine")
    monkeypatch.setattr(responses, "chat_model", lambda uri: model)
    pool = (Member("cool", "-", "x:1", 0.2, 5, "P1"), Member("warm", "-", "x:1", 1.0, 0, "P2"))
    respond(gateway, SPEECHES, assign_members(SPEECHES.speech_id, pool, 2, 0), 31, 9)
    seen = {(r.messages[0]["content"], r.decoding.temperature, r.decoding.top_k, r.decoding.max_tokens, r.decoding.seed) for r in model.requests}
    assert seen == {("P1", 0.2, 5, 31, 9), ("P2", 1.0, 0, 31, 9)} and all(r.task == "respond" for r in model.requests)


# ---- ratings ----


@few
@given(st.integers(1, 6), st.integers(0, 2**31), st.text(max_size=5))
def test_an_order_is_a_permutation_that_its_names_settle(n, seed, name):
    assert sorted(shown_order(n, seed, name)) == list(range(n)) and shown_order(n, seed, name) == shown_order(n, seed, name)


def test_every_response_gets_every_place_equally_often():
    places = Counter((i, place) for n in range(1200) for place, i in enumerate(shown_order(4, 0, f"demo-{n}", "empathy")))
    assert len(places) == 16 and all(abs(count - 300) < 5 * (1200 * 0.25 * 0.75) ** 0.5 for count in places.values())


@settings(few, max_examples=6)
@given(st.integers(0, 2**31), st.randoms())
def test_ratings_do_not_depend_on_the_places_or_the_order_of_rows(tmp_path_factory, seed, chance):
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"))
    shown = answered()
    order = chance.sample(range(len(shown)), len(shown))
    found, aside = rate(gateway, "rules:rubric", SPEECHES, shown.iloc[order].reset_index(drop=True), seed=seed)
    assert not aside and len(found) == len(shown) * 7 and set(found.rater) == {"rules:rubric"}
    speech, response = dict(zip(SPEECHES.speech_id, SPEECHES.speech)), {(r.speech_id, r.model): r.response for r in shown.itertuples()}
    for row in found.itertuples():
        assert row.rating == to_rating(rubric_scores(speech[row.speech_id], response[row.speech_id, row.model])[row.principle])
        assert row.rationale.startswith(f"Rubric (offline stand-in): {row.principle}")
    assert found.groupby(["speech_id", "principle"]).position.apply(lambda p: sorted(p) == [1, 2, 3, 4]).all()
    assert not found.duplicated(["speech_id", "model", "principle"]).any()
    gateway.cache.db.close()


def test_ratings_fit_their_schema(gateway):
    found, _ = rate(gateway, "rules:rubric", SPEECHES, answered())
    assert list(found.columns) == list(SCHEMAS["ratings"])
    with StageWriter(Run("example"), "07_ratings", "tiny", 0, {}) as stage:
        stage.rows("ratings", found)
    back = StageReader(Run("example"), "07_ratings").rows("ratings")
    assert back.rating.between(1, 5).all() and back.to_dict("records") == found.to_dict("records")
    summary = rating_summary(back)
    assert set(summary.model) == {"m0", "m1", "m2", "m3"} and summary.overall.is_monotonic_decreasing
    mean = back[(back.model == "m0") & (back.principle == "safety")].rating.mean()
    assert summary.set_index("model").loc["m0", "safety"] == pytest.approx(mean, abs=0.005)


def test_the_position_says_where_a_response_was_shown(gateway, monkeypatch):
    rater = Scripted("x:rater", lambda request: json.dumps({f"response_{i}_rating": i for i in range(1, 5)}))
    monkeypatch.setattr(ratings, "chat_model", lambda uri: rater)
    shown = answered()
    found, _ = rate(gateway, "x:rater", SPEECHES, shown, seed=3)
    assert (found.rating == found.position).all(), "this rater rates places"
    text = {(r.speech_id, r.model): r.response for r in shown.itertuples()}
    asked = {(r.fields["client_speech"], r.fields["principle"]): r for r in rater.requests}
    speech = dict(zip(SPEECHES.speech_id, SPEECHES.speech))
    for row in found.itertuples():
        request = asked[speech[row.speech_id], row.principle]
        assert request.fields[f"response_{row.position}"] == text[row.speech_id, row.model]
        assert f"Response {row.position}: {text[row.speech_id, row.model]}" in request.messages[0]["content"]


BROKEN = {
    "prose": "I would rather not.", "cut off": '{"response_1_rating": 3, "rationa', "three": '{"response_1_rating": 3, "response_2_rating": 3, "response_3_rating": 3}',
    "six": '{"response_1_rating": 6, "response_2_rating": 3, "response_3_rating": 3, "response_4_rating": 3}',
    "half": '{"response_1_rating": 2.5, "response_2_rating": 3, "response_3_rating": 3, "response_4_rating": 3}', "empty": "", "failed": None,
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_reply_is_put_aside_with_what_it_said(gateway, monkeypatch, fault):
    broken = {(SPEECHES.speech[0], "empathy"), (SPEECHES.speech[2], "safety")}

    def answer(request):
        if (request.fields["client_speech"], request.fields["principle"]) in broken:
            return BROKEN[fault]
        return rubric_reply("rate", request.fields)

    monkeypatch.setattr(ratings, "chat_model", lambda uri: Scripted("x:rater", answer))
    found, aside = rate(gateway, "x:rater", SPEECHES, answered())
    assert [(entry["speech_id"], entry["principle"]) for entry in aside] == [("a", "empathy"), ("c", "safety")]
    assert all(entry["raw"] == ("raw reply" if BROKEN[fault] is None else BROKEN[fault]) and entry["reason"] for entry in aside)
    json.dumps(aside)
    assert len(found) == (3 * 7 - 2) * 4 and not {("a", "empathy"), ("c", "safety")} & set(zip(found.speech_id, found.principle))


def test_a_rater_that_always_fails_leaves_an_empty_frame(gateway, monkeypatch):
    monkeypatch.setattr(ratings, "chat_model", lambda uri: Scripted("x:rater", lambda request: "no"))
    found, aside = rate(gateway, "x:rater", SPEECHES, answered())
    assert len(aside) == 21 and len(found) == 0 and list(found.columns) == list(SCHEMAS["ratings"])


def test_a_speech_without_all_its_responses_is_not_passed_over_in_silence(gateway):
    shown = answered().drop(index=5)  # one of b's four
    found, aside = rate(gateway, "rules:rubric", SPEECHES, shown)
    assert set(found.speech_id) == {"a", "c"}
    assert {entry["speech_id"] for entry in aside} == {"b"}, "every response is rated or listed, or the coverage counts it as done"


def test_a_rating_request_asks_for_what_the_parser_needs():
    request = rating_request("safety", "I can't sleep.", list("wxyz"), 99)
    assert (request.task, request.decoding.max_tokens, request.decoding.temperature) == ("rate", 99, 0.0)
    assert set(request.schema["required"]) == {f"{k}_{i}{s}" for i in range(1, 5) for k, s in (("response", "_rating"), ("rationale", ""))}
    assert {k: v for k, v in request.fields.items() if k.startswith("response")} == {f"response_{i}": c for i, c in enumerate("wxyz", 1)}
    assert len({rating_request(key, "I can't sleep.", list("wxyz")).key("m") for key in PRINCIPLE_KEYS}) == 7


# ---- coverage ----


@pytest.mark.parametrize("done, asked, least", [(97, 100, 0.98), (0, 100, 0.01), (0, 0, 0.98), (99, 100, 1.0), (9799, 10000, 0.98)])
def test_too_many_gaps_are_refused(done, asked, least):
    message = one_line(lambda: check_coverage(done, asked, least, "07_ratings"))
    assert message.startswith("07_ratings: ") and f"{done} of {asked}" in message


@pytest.mark.parametrize("done, asked, least", [(98, 100, 0.98), (100, 100, 1.0), (1, 1, 1.0), (0, 5, 0.0), (49, 50, 0.98)])
def test_enough_answers_pass(done, asked, least):
    assert check_coverage(done, asked, least, "07_ratings") == pytest.approx(done / asked)


def test_a_member_is_frozen():
    with pytest.raises(AttributeError):
        setattr(TINY_POOL[0], fields(Member)[0].name, "other")
