"""Who answers whom is settled by seed and id alone; a rating belongs to a response, not to its place; what fails is put aside."""

import json
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.feedback import rating as ratings
from psycopref.feedback import pool as responses
from psycopref.core.files import PRINCIPLE_KEYS, SCHEMAS, StageReader, StageWriter, read_json, read_rows, write_rows
from psycopref.core.settings import PROFILES, load_profile
from psycopref.core.stages import Run, Shard, parse_shard
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, ChatRequest, Failure, FreeModel
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.rater.rules import PHRASES, rubric_reply
from psycopref.gateway.servers import OpenAIModel
from psycopref.run.plan import plan_run, usd
from psycopref.feedback.rating import (
    MODES,
    mode_agreement_row,
    check_coverage,
    first_speeches,
    mode_agreement,
    mode_calls,
    preference_agreement,
    rate,
    rate_blocks,
    rating_request,
    rating_summary,
    shown_order,
)
from psycopref.feedback.pool import POOLS, Member, assign_members, find_pool, pool_table, respond, shard_speeches
from psycopref.rater.rubric import rubric_scores, to_rating

from refusals import one_line
from test_gateway import completion, error, server  # noqa: F401 (a fixture)

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SPEECHES = pd.DataFrame({"speech_id": ["a", "b", "c"], "speech": ["Nobody at work has talked to me since I asked for "
                                                                  "fewer shifts.",
                                                                 "I count the stairs and start over when I lose "
                                                                 "count.", "My sister moved out in March."]})  # fmt: skip


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
    whole = assign_members(names, POOLS["tiny"], each, seed)
    assert [name for name, _ in whole] == [name for name in names for _ in range(each)]
    part = chance.sample(names, max(1, len(names) // 2))
    own = {name: [m for n, m in whole if n == name] for name in names}
    assert assign_members([*part, "one more"], POOLS["tiny"], each, seed)[: each * len(part)] == [
        (name, m) for name in part for m in own[name]
    ]
    assert all(len({m.name for m in members}) == each for members in own.values()), "nobody answers twice"


def test_members_change_with_the_seed_and_everybody_gets_a_turn():
    names = [f"demo-{n}" for n in range(800)]
    first, second = (assign_members(names, POOLS["demo"], 4, seed) for seed in (0, 1))
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
    for member in {*POOLS["paper"], *POOLS["demo"], *POOLS["tiny"]}:
        messages = member.messages("I {count} the stairs.")
        turns = [m["role"] for m in messages if m["role"] != "system"]
        assert turns == ["user", "assistant"] * len(member.examples) + ["user"] and "system" not in [
            m["role"] for m in messages[1:]
        ]
        assert "I {count} the stairs." in messages[-1]["content"] and all(m["content"].strip() for m in messages)
        assert member.model.startswith(("openai:", "local:", "rules:"))
        if member.model.startswith(("openai:", "rules:")):
            chat_model(member.model)


# ---- responses ----


def test_every_assigned_member_has_one_row_in_order(gateway):
    assigned = assign_members(SPEECHES.speech_id, POOLS["tiny"], 4, 0)
    frame, failures = respond(gateway, SPEECHES, assigned, 64, 0)
    assert not failures and list(zip(frame.speech_id, frame.model)) == [
        (name, member.name) for name, member in assigned
    ]
    assert (
        set(frame.columns) == set(SCHEMAS["responses"])
        and frame.response.str.len().gt(0).all()
        and frame.request_key.is_unique
    )
    with StageWriter(Run("example"), "02_responses", "tiny", 0, {}) as stage:
        stage.rows("responses", frame)
    assert len(StageReader(Run("example"), "02_responses").rows("responses")) == 12


def test_responses_stay_when_speeches_are_added(gateway, tmp_path):
    first, _ = respond(gateway, SPEECHES, assign_members(["a"], POOLS["tiny"], 4, 0), 64, 0)
    whole, _ = respond(gateway, SPEECHES, assign_members(["c", "a", "b"], POOLS["tiny"], 4, 0), 64, 0)
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
    pool = (Member("silent", "-", "x:1"), *POOLS["tiny"][:3])
    assigned = assign_members(SPEECHES.speech_id, pool, 4, 0)
    frame, failures = respond(gateway, SPEECHES, assigned, 64, 0)
    assert failures == [{"speech_id": "b", "model": "silent", "reason": "no text", "raw": "raw reply"}]
    assert list(zip(frame.speech_id, frame.model)) == [
        (n, m.name) for n, m in assigned if (n, m.name) != ("b", "silent")
    ]
    assert frame.groupby("speech_id").size().to_dict() == {"a": 4, "b": 3, "c": 4}
    heard = frame[frame.model == "silent"]
    assert heard.finish_reason.eq("length").all() and heard.n_tokens.eq(5).all()
    table = pool_table(pool, frame).set_index("member")
    assert (
        table.loc["silent", "responses"] == 2
        and table.loc["silent", "cut off %"] == 100.0
        and table.loc["phrases-0", "cut off %"] == 0.0
    )


def test_a_pool_that_never_answers_leaves_an_empty_frame_and_its_reasons(gateway, monkeypatch):
    monkeypatch.setattr(responses, "chat_model", lambda uri: Scripted(uri, lambda request: None))
    frame, failures = respond(gateway, SPEECHES, assign_members(SPEECHES.speech_id, POOLS["tiny"], 4, 0), 64, 0)
    assert len(failures) == 12 and len(frame) == 0 and set(frame.columns) == set(SCHEMAS["responses"])
    assert pool_table(POOLS["tiny"], frame).responses.sum() == 0


def test_each_member_is_asked_with_its_own_decoding(gateway, monkeypatch):
    model = Scripted("x:1", lambda request: "fine")
    monkeypatch.setattr(responses, "chat_model", lambda uri: model)
    pool = (Member("cool", "-", "x:1", 0.2, 5, "P1"), Member("warm", "-", "x:1", 1.0, 0, "P2"))
    respond(gateway, SPEECHES, assign_members(SPEECHES.speech_id, pool, 2, 0), 31, 9)
    seen = {
        (r.messages[0]["content"], r.decoding.temperature, r.decoding.top_k, r.decoding.max_tokens, r.decoding.seed)
        for r in model.requests
    }
    assert seen == {("P1", 0.2, 5, 31, 9), ("P2", 1.0, 0, 31, 9)} and all(r.task == "respond" for r in model.requests)


SEVEN = pd.DataFrame(
    [{"speech_id": f"s{n}", "speech": f"I have called my brother {'and again ' * (n % 4)}{n} times."} for n in range(7)]
)
QUIRKS = (Member("cool", "tiny", "local:random-tiny", 0.5, 0, "P1"), Member("warm", "tiny", "local:random-tiny", 1.0, 5, "P2", (("Hello.", "Yes?"),)),
          Member("mute", "tiny", "local:random-tiny", 1.0, 0, "P3", system=False), *POOLS["tiny"][:3])  # fmt: skip


@pytest.fixture(scope="module")
def single_thread():
    """Sampled words hang on sums in float32, so on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_canned_responses_are_the_same_in_any_blocks(tmp_path, gateway, block):
    assigned = assign_members(SEVEN.speech_id, POOLS["tiny"], 4, 0)
    assert respond(Gateway(ReplyCache(tmp_path / "own.sqlite")), SEVEN, assigned, 64, 0, block)[0].equals(
        respond(gateway, SEVEN, assigned, 64, 0)[0]
    )


def test_shards_and_an_interrupted_run_give_the_words_of_one_whole_run(tmp_path, monkeypatch, single_thread):
    """Sampled words hang on what is asked together, so on the block, and on nothing else."""
    monkeypatch.setattr(
        responses,
        "chat_model",
        lambda uri: chat_model(uri, **({"dtype": "float32"} if uri.startswith("local:") else {})),
    )

    def answered_by(speeches, block, name):
        gateway = Gateway(ReplyCache(tmp_path / f"{name}.sqlite"))
        frame, failures = respond(gateway, speeches, assign_members(speeches.speech_id, QUIRKS, 4, 0), 6, 0, block)
        assert not failures
        return frame, gateway

    whole, gateway = answered_by(SEVEN, 2, "whole")
    assert len(whole) == 28 and {"cool", "warm", "mute"} < set(whole.model)
    shards = [answered_by(shard_speeches(SEVEN, 2, Shard(i, 3)), 2, f"shard {i}")[0] for i in (1, 2, 3)]
    order = {name: n for n, name in enumerate(SEVEN.speech_id)}
    assert (
        pd.concat(shards)
        .sort_values("speech_id", key=lambda names: names.map(order), kind="stable", ignore_index=True)
        .equals(whole)
    )
    gateway.cache.forget(list(whole.request_key[::3]))
    assert answered_by(SEVEN, 2, "whole")[0].equals(whole)


def test_the_quirks_of_a_member_reach_the_call():
    mute = Member(
        "mute",
        "-",
        "openai:m@http://127.0.0.1:9/v1",
        persona="Be warm.",
        examples=(("Hello.", "Yes?"),),
        system=False,
        thinking=4096,
    )
    asked = mute.request("I can't sleep.", 300, 5)
    how = OpenAIModel("m@http://127.0.0.1:9/v1").chat_arguments(asked)
    assert [message["role"] for message in how["messages"]] == ["user", "assistant", "user"] and how["messages"][0][
        "content"
    ] == "Be warm.\n\nHello."
    assert how["messages"][-1]["content"] == "I can't sleep." and how["max_completion_tokens"] == 4396
    plain = Member("plain", "-", "rules:phrases", persona="Be warm.", system=False).messages("I can't sleep.")
    assert (
        [message["role"] for message in plain] == ["user"]
        and plain[0]["content"].startswith("Be warm.\n\n")
        and plain[0]["content"].count("I can't sleep.") == 1
    )
    loud = Member("loud", "-", "rules:phrases", persona="Be warm.").request("I can't sleep.", 300, 5)
    assert loud.messages[0] == {"role": "system", "content": "Be warm."} and loud.decoding.max_tokens == 300


# ---- ratings ----


@few
@given(st.integers(1, 40), st.sampled_from(sorted(MODES)), st.sets(st.integers(0, 27)))
def test_ratings_are_the_same_in_any_blocks(tmp_path_factory, block, mode, lost):
    gateway = Gateway(ReplyCache(tmp_path_factory.getbasetemp() / "any blocks.sqlite"))
    shown = pd.DataFrame(
        [
            {"speech_id": f"s{n}", "model": f"m{i}", "response": PHRASES[(n + i) % len(PHRASES)].format(word="work")}
            for n in range(7)
            for i in range(4)
        ]
    ).drop(index=list(lost))
    whole, aside = rate(gateway, "rules:rubric", SEVEN, shown, seed=3, mode=mode)
    parts = list(rate_blocks(gateway, "rules:rubric", SEVEN, shown, seed=3, mode=mode, block=block))
    assert len(parts) == -(-7 // block) and [entry for _, own in parts for entry in own] == aside
    frames = [frame for frame, _ in parts if len(frame)]
    assert pd.concat(frames, ignore_index=True).equals(whole) if frames else whole.empty
    assert all(
        set(frame.speech_id) <= set(SEVEN.speech_id[n * block : (n + 1) * block]) for n, (frame, _) in enumerate(parts)
    )
    gateway.cache.close()


@few
@given(st.lists(st.integers(0, 21), max_size=6))
def test_rows_written_frame_by_frame_are_the_rows_of_one_frame(tmp_path_factory, cuts):
    folder = tmp_path_factory.getbasetemp()
    whole = pd.DataFrame(
        [
            {
                "speech_id": f"s{n}",
                "model": "m é\u2028",
                "principle": "safety",
                "rating": n % 5 + 1,
                "rationale": "x" * n,
                "rater": "r",
                "position": 1,
            }
            for n in range(21)
        ]
    )
    edges = [0, *sorted(cuts), 21]
    write_rows(folder / "parts.parquet", "ratings", (whole[a:b] for a, b in zip(edges, edges[1:])))
    write_rows(folder / "one.parquet", "ratings", whole)
    parts, one = (read_rows(folder / f"{name}.parquet", "ratings") for name in ("parts", "one"))
    assert (
        parts.equals(one) and parts.to_dict("records") == whole.to_dict("records") and parts.dtypes.equals(one.dtypes)
    )


def test_a_frame_that_does_not_fit_leaves_the_rows_as_they_were(tmp_path):
    good = pd.DataFrame([{"speech_id": "a", "speech": "I count the stairs."}]).assign(
        source="demo", topic="anxiety", coarse_topic="c", topic_by="gold", split="train"
    )
    path = write_rows(tmp_path / "speeches.parquet", "speeches", good)
    before = path.read_bytes()
    for bad in (good.assign(speech=None), good.assign(age=3)):
        assert "speeches.parquet" in one_line(lambda: write_rows(path, "speeches", iter([good, good, bad])))
    with pytest.raises(ZeroDivisionError):
        write_rows(path, "speeches", (good.assign(speech_id=str(1 // n)) for n in (1, 0)))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir() if "speeches" in entry.name] == [
        "speeches.parquet"
    ]


@few
@given(st.integers(1, 6), st.integers(0, 2**31), st.text(max_size=5))
def test_an_order_is_a_permutation_that_its_names_settle(n, seed, name):
    assert sorted(shown_order(n, seed, name)) == list(range(n)) and shown_order(n, seed, name) == shown_order(
        n, seed, name
    )


def test_every_response_gets_every_place_equally_often():
    places = Counter(
        (i, place) for n in range(1200) for place, i in enumerate(shown_order(4, 0, f"demo-{n}", "empathy"))
    )
    assert len(places) == 16 and all(abs(count - 300) < 5 * (1200 * 0.25 * 0.75) ** 0.5 for count in places.values())


@settings(few, max_examples=6)
@given(st.integers(0, 2**31), st.randoms())
def test_ratings_do_not_depend_on_the_places_or_the_order_of_rows(tmp_path_factory, seed, chance):
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"))
    shown = answered()
    order = chance.sample(range(len(shown)), len(shown))
    found, aside = rate(gateway, "rules:rubric", SPEECHES, shown.iloc[order].reset_index(drop=True), seed=seed)
    assert not aside and len(found) == len(shown) * 7 and set(found.rater) == {"rules:rubric"}
    speech, response = (
        dict(zip(SPEECHES.speech_id, SPEECHES.speech)),
        {(r.speech_id, r.model): r.response for r in shown.itertuples()},
    )
    for row in found.itertuples():
        assert row.rating == to_rating(
            rubric_scores(speech[row.speech_id], response[row.speech_id, row.model])[row.principle]
        )
        assert row.rationale.startswith(f"Rubric (offline stand-in): {row.principle}")
    assert found.groupby(["speech_id", "principle"]).position.apply(lambda p: sorted(p) == [1, 2, 3, 4]).all()
    assert not found.duplicated(["speech_id", "model", "principle"]).any()
    gateway.cache.db.close()


def test_ratings_fit_their_schema(gateway):
    found, _ = rate(gateway, "rules:rubric", SPEECHES, answered())
    assert list(found.columns) == list(SCHEMAS["ratings"])
    with StageWriter(Run("example"), "03_ratings", "tiny", 0, {}) as stage:
        stage.rows("ratings", found)
    back = StageReader(Run("example"), "03_ratings").rows("ratings")
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
    "prose": "I would rather not.", "cut off": '{"response_1_rating": 3, "rationa', "three": '{"response_1_rating": '
                                                                                             '3, "response_2_rating": '
                                                                                             '3, "response_3_rating": '
                                                                                             '3}',
    "six": '{"response_1_rating": 6, "response_2_rating": 3, "response_3_rating": 3, "response_4_rating": 3}',
    "half": '{"response_1_rating": 2.5, "response_2_rating": 3, "response_3_rating": 3, "response_4_rating": '
            '3}', "empty": "", "failed": None,
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
    assert all(
        entry["raw"] == ("raw reply" if BROKEN[fault] is None else BROKEN[fault]) and entry["reason"] for entry in aside
    )
    json.dumps(aside)
    assert len(found) == (3 * 7 - 2) * 4 and not {("a", "empathy"), ("c", "safety")} & set(
        zip(found.speech_id, found.principle)
    )


def test_a_rater_that_always_fails_leaves_an_empty_frame(gateway, monkeypatch):
    monkeypatch.setattr(ratings, "chat_model", lambda uri: Scripted("x:rater", lambda request: "no"))
    found, aside = rate(gateway, "x:rater", SPEECHES, answered())
    assert len(aside) == 21 and len(found) == 0 and list(found.columns) == list(SCHEMAS["ratings"])


def test_a_speech_without_all_its_responses_is_not_passed_over_in_silence(gateway):
    shown = answered().drop(index=5)  # one of b's four
    found, aside = rate(gateway, "rules:rubric", SPEECHES, shown)
    assert set(found.speech_id) == {"a", "c"}
    assert {entry["speech_id"] for entry in aside} == {"b"}, (
        "every response is rated or listed, or the coverage counts it as done"
    )


def test_a_rating_request_asks_for_what_the_parser_needs():
    request = rating_request("safety", "I can't sleep.", list("wxyz"), 99)
    assert (request.task, request.decoding.max_tokens, request.decoding.temperature) == ("rate", 99, 0.0)
    assert set(request.schema["required"]) == {
        f"{k}_{i}{s}" for i in range(1, 5) for k, s in (("response", "_rating"), ("rationale", ""))
    }
    assert {k: v for k, v in request.fields.items() if k.startswith("response")} == {
        f"response_{i}": c for i, c in enumerate("wxyz", 1)
    }
    assert len({rating_request(key, "I can't sleep.", list("wxyz")).key("m") for key in PRINCIPLE_KEYS}) == 7


# ---- the two modes ----


def planted(judge):
    """A rater that rates each response by `judge(principle, text, place)` and answers in the form it was asked for."""

    def one(key, request):
        texts = [request.fields[f"response_{i}"] for i in range(1, 5)]
        pairs = [(f"response_{i}_rating", judge(key, text, i)) for i, text in enumerate(texts, 1)]
        return dict(pairs) | {f"rationale_{i}": f"{key}: {text}" for i, text in enumerate(texts, 1)}

    def answer(request):
        if request.task == "rate":
            return json.dumps(one(request.fields["principle"], request))
        return json.dumps({key: one(key, request) for key in PRINCIPLE_KEYS})

    return Scripted("x:rater", answer)


@pytest.mark.parametrize("mode", MODES)
def test_a_rating_stays_with_its_response_when_the_inputs_are_swapped(gateway, monkeypatch, mode):
    taste = {f"text {i}": i for i in range(1, 5)}
    rater = planted(lambda key, text, place: (taste[text] + PRINCIPLE_KEYS.index(key)) % 5 + 1)
    monkeypatch.setattr(ratings, "chat_model", lambda uri: rater)
    many = pd.DataFrame(
        {"speech_id": [f"s{n}" for n in range(24)], "speech": [f"I have called {n} times." for n in range(24)]}
    )
    shown = pd.DataFrame(
        [{"speech_id": name, "model": f"m{i}", "response": f"text {i}"} for name in many.speech_id for i in range(1, 5)]
    )
    swapped = shown.assign(response=shown.response.map({"text 1": "text 4", "text 4": "text 1"}).fillna(shown.response))
    for frame in (shown, swapped):
        text = {(r.speech_id, r.model): r.response for r in frame.itertuples()}
        found, aside = rate(gateway, "x:rater", many, frame, seed=5, mode=mode)
        assert not aside and len(found) == 24 * 4 * 7
        for row in found.itertuples():
            own = text[row.speech_id, row.model]
            assert (
                row.rating == (taste[own] + PRINCIPLE_KEYS.index(row.principle)) % 5 + 1
                and row.rationale == f"{row.principle}: {own}"
            )
        assert found.groupby("model").position.nunique().eq(4).all(), "every place was tried"
    assert len(rater.requests) == 2 * 24 * len(MODES[mode])


def test_one_call_shows_one_order_to_all_principles_and_notes_it(gateway, monkeypatch):
    rater = planted(lambda key, text, place: place)
    monkeypatch.setattr(ratings, "chat_model", lambda uri: rater)
    shown = answered()
    found, _ = rate(gateway, "x:rater", SPEECHES, shown, seed=3, mode="speech")
    assert (found.rating == found.position).all(), "this rater rates places"
    assert found.groupby(["speech_id", "model"]).position.nunique().eq(1).all()
    assert all(
        shown_order(4, 3, name) == [int(m[1]) for m in own.sort_values("position").model]
        for name, own in found[found.principle == "safety"].groupby("speech_id")
    )
    text = {(r.speech_id, r.model): r.response for r in shown.itertuples()}
    asked = {r.fields["client_speech"]: r for r in rater.requests}
    speech = dict(zip(SPEECHES.speech_id, SPEECHES.speech))
    assert len(rater.requests) == 3 and {r.task for r in rater.requests} == {"rate_all"}
    for row in found.itertuples():
        assert (
            f"Response {row.position}: {text[row.speech_id, row.model]}"
            in asked[speech[row.speech_id]].messages[0]["content"]
        )


@settings(few, max_examples=6)
@given(st.integers(0, 2**31))
def test_the_rubric_says_the_same_in_both_modes(tmp_path_factory, seed):
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"))
    (one, _), (every, aside) = (
        rate(gateway, "rules:rubric", SPEECHES, answered(), seed=seed, mode=mode) for mode in MODES
    )
    assert not aside and one.drop(columns="position").equals(every.drop(columns="position")), (
        "rows, their order and all but the place"
    )
    assert list(one.columns) == list(every.columns) == list(SCHEMAS["ratings"]) and one.dtypes.equals(every.dtypes)
    assert gateway.counts["rules:rubric"]["calls"] + gateway.counts["rules:rubric"]["cached"] == 21 + 3
    agreed = mode_agreement(one, every)
    assert (
        (agreed["exact %"] == 100).all() and agreed["same preference %"].iloc[-1] == 100 and agreed.pairs.iloc[-1] == 18
    )
    gateway.cache.db.close()


def test_the_rubric_knows_its_tasks_and_no_others(gateway):
    every = rating_request(None, SPEECHES.speech[0], list("wxyz"))
    [reply] = gateway.ask(chat_model("rules:rubric"), [every])
    singles = {
        key: json.loads(rubric_reply("rate", rating_request(key, SPEECHES.speech[0], list("wxyz")).fields))
        for key in PRINCIPLE_KEYS
    }
    assert json.loads(reply.text) == singles
    for task in ("respond", "topic", "rate_every", ""):
        assert "rules:rubric" in one_line(
            lambda: gateway.ask(
                chat_model("rules:rubric"), [ChatRequest(every.messages, task=task, fields=every.fields)]
            )
        )


@pytest.mark.parametrize("fault", [*BROKEN, "text", "missing"])
def test_one_bad_principle_among_seven_is_put_aside_alone(gateway, monkeypatch, fault):
    parts = {
        "text": '{"response_1_rating": "3", "response_2_rating": 3, "response_3_rating": 3, "response_4_rating": 3}'
    } | BROKEN

    def answer(request):
        reply = json.loads(rubric_reply("rate_all", request.fields))
        if request.fields["client_speech"] == SPEECHES.speech[1]:
            own = parts.get(fault)
            try:
                reply["autonomy"] = json.loads(own or "null")
            except json.JSONDecodeError:
                reply["autonomy"] = own
            if fault == "missing":
                del reply["autonomy"]
        return json.dumps(reply)

    monkeypatch.setattr(ratings, "chat_model", lambda uri: Scripted("x:rater", answer))
    found, aside = rate(gateway, "x:rater", SPEECHES, answered(), mode="speech")
    [entry] = aside
    assert (
        (entry["speech_id"], entry["principle"]) == ("b", "autonomy")
        and entry["reason"].startswith("autonomy: ")
        and json.loads(entry["raw"])["empathy"]
    )
    assert len(found) == (3 * 7 - 1) * 4 and ("b", "autonomy") not in set(zip(found.speech_id, found.principle))
    whole, _ = rate(gateway, "rules:rubric", SPEECHES, answered(), mode="speech")
    rest = whole[(whole.speech_id != "b") | (whole.principle != "autonomy")].reset_index(drop=True)
    assert found.drop(columns="rater").equals(rest.drop(columns="rater"))


@pytest.mark.parametrize("fault", BROKEN)
def test_a_reply_without_any_principle_puts_all_seven_aside(gateway, monkeypatch, fault):
    def answer(request):
        return (
            BROKEN[fault]
            if request.fields["client_speech"] == SPEECHES.speech[0]
            else rubric_reply("rate_all", request.fields)
        )

    monkeypatch.setattr(ratings, "chat_model", lambda uri: Scripted("x:rater", answer))
    found, aside = rate(gateway, "x:rater", SPEECHES, answered(), mode="speech")
    assert [(entry["speech_id"], entry["principle"]) for entry in aside] == [("a", key) for key in PRINCIPLE_KEYS]
    assert all(
        entry["raw"] == ("raw reply" if BROKEN[fault] is None else BROKEN[fault]) and entry["reason"] for entry in aside
    )
    assert len(found) == 2 * 7 * 4


@pytest.mark.parametrize("mode", MODES)
def test_what_is_put_aside_counts_the_same_in_both_modes(gateway, mode):
    found, aside = rate(gateway, "rules:rubric", SPEECHES, answered().drop(index=5), mode=mode)
    assert [(entry["speech_id"], entry["principle"]) for entry in aside] == [
        ("b", key) for key in PRINCIPLE_KEYS
    ] and len(found) == 2 * 7 * 4


@pytest.mark.parametrize("wrong", ["speach", "", "both", "Speech", None])
def test_an_unknown_mode_names_both_and_asks_nobody(gateway, wrong):
    for action in (lambda: rate(gateway, "rules:rubric", SPEECHES, answered(), mode=wrong), lambda: mode_calls(wrong)):
        message = one_line(action)
        assert "ratings.mode" in message and repr(wrong) in message and "principle" in message and "speech" in message
    assert gateway.counts == {}
    if wrong is not None:
        assert "ratings.mode" in one_line(lambda: plan_run(load_profile("demo", {"ratings.mode": wrong}), 10).work())


def test_an_api_is_asked_for_a_strict_form_on_all_principles():
    request = rating_request(None, "I can't sleep.", list("wxyz"), 99)
    assert (request.task, request.decoding.max_tokens, "principle" in request.fields) == ("rate_all", 7 * 99, False)
    how = OpenAIModel("gpt-4o-2024-08-06").chat_arguments(request)
    form = how["response_format"]["json_schema"]
    assert form["strict"] is True and how["max_completion_tokens"] == 7 * 99

    def check(node):
        if node["type"] == "object":
            assert node["required"] == list(node["properties"]) and node["additionalProperties"] is False
            return sum(map(check, node["properties"].values()))
        return 1

    assert check(form["schema"]) == 7 * 8


# ---- the plan ----


@pytest.mark.parametrize("mode, calls", [("principle", 185_381), ("speech", 26_483)])
def test_the_plan_counts_the_calls_and_tokens_of_the_mode(mode, calls):
    found = plan_run(load_profile("paper", {"ratings.mode": mode}), 26_483)
    [row] = found.ratings()
    requests = [rating_request(key, "x" * found.characters, ["x" * 4 * 350] * 4) for key in MODES[mode]]
    asked = sum(len(request.messages[0]["content"]) for request in requests) / len(requests)
    assert row.calls == calls and row.tokens_in / calls == pytest.approx(found.tokens(asked, row.who), abs=1)
    assert usd(row) == pytest.approx((row.tokens_in * 2.5 + row.tokens_out * 10) / 1e6)


def test_the_plan_adds_a_comparison_in_the_other_mode():
    for mode, other, each in (("principle", "speech", 1), ("speech", "principle", 7)):
        profile = load_profile("paper", {"ratings.mode": mode, "ratings.compare_mode_speeches": 500})
        own, second = plan_run(profile, 1000).ratings()
        assert own.calls == 1000 * len(MODES[mode]) and second.calls == 500 * each and other in second.what
        [alone] = plan_run(load_profile("paper", {"ratings.mode": other}), 1000).ratings()
        assert second.tokens_in * 2 == alone.tokens_in and usd(second) == pytest.approx(usd(alone) / 2)
        assert [row.calls for row in plan_run(profile, 100).ratings()] == [100 * len(MODES[mode]), 100 * each]


# ---- agreement ----


def rated(rows) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"speech_id": s, "model": m, "principle": key, "rating": rating}
            for s, m, values in rows
            for key, rating in zip(PRINCIPLE_KEYS, values)
        ]
    )


def test_agreement_equals_values_computed_by_hand():
    first = rated(
        [
            ("a", "x", [5] * 7),
            ("a", "y", [4] * 7),
            ("a", "z", [3, 3, 3, 3, 3, 3, 2]),
            ("b", "x", [1] * 7),
            ("b", "y", [2] * 7),
        ]
    )
    second = rated(
        [("b", "y", [3] * 7), ("a", "z", [3] * 7), ("a", "x", [4] * 7), ("a", "y", [4] * 7), ("b", "x", [1] * 7)]
    )
    table = mode_agreement(first, second).set_index("principle")
    assert list(table.index) == [*PRINCIPLE_KEYS, "sum of seven"]
    # empathy: 5 4 3 1 2 against 4 4 3 1 3; gaps -1 0 0 0 1: exact 3 of 5, mean 0; variances 2 and 1.2, means equal: 1 - 0.4 / 3.2
    assert table.loc["empathy", ["n", "exact %", "within one %", "mean difference", "kappa"]].tolist() == [
        5,
        60.0,
        100.0,
        0.0,
        0.875,
    ]
    # staging: 5 4 2 1 2 against 4 4 3 1 3; gaps -1 0 1 0 1: exact 2 of 5, mean 0.2; variances 2.16 and 1.2: 1 - 0.6 / 3.4
    assert table.loc["staging", ["n", "exact %", "within one %", "mean difference", "kappa"]].tolist() == [
        5,
        40.0,
        100.0,
        0.2,
        0.824,
    ]
    # sums: 35 28 20 7 14 against 28 28 21 7 21. Pairs: a 35-28 > against =, 35-20 > against 28-21 >, 28-20 > against 28-21 >; b < against <
    own = table.loc["sum of seven"]
    assert own[["n", "exact %", "within one %", "mean difference"]].tolist() == [5, 40.0, 60.0, 0.2]
    assert own[["pairs", "same preference %", "preferred in a mode", "same of these %"]].tolist() == [4, 75.0, 4, 75.0]
    assert table.pairs.iloc[:7].isna().all()
    back = mode_agreement(second, first).set_index("principle")
    assert (back["mean difference"] == -table["mean difference"]).all() and (
        back["same preference %"].iloc[-1],
        back.kappa.iloc[0],
    ) == (75.0, 0.875)


@few
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=40).filter(
        lambda pairs: len({v for pair in pairs for v in pair}) > 1
    )
)
def test_kappa_is_scikit_learns(pairs):
    from sklearn.metrics import cohen_kappa_score

    first, second = np.array(pairs).T
    assert mode_agreement_row("x", first, second)["kappa"] == pytest.approx(
        cohen_kappa_score(first, second, weights="quadratic", labels=range(1, 6)), abs=6e-4
    )


@pytest.mark.parametrize("first, second, same", [([21, 14], [21, 14], 100.0), ([21, 15], [20, 15], 100.0), ([21, 14], [20, 14], 0.0),
                                                 ([21, 14], [14, 21], 0.0), ([14, 21], [7, 35], 100.0)])  # fmt: skip
def test_a_preference_needs_a_gap_of_seven_and_a_side(first, second, same):
    found = preference_agreement(pd.DataFrame({"speech_id": "a", "first": first, "second": second}))
    assert (found["pairs"], found["same preference %"]) == (1, same)
    assert preference_agreement(pd.DataFrame({"speech_id": ["a", "b"], "first": first, "second": second})) == {
        "pairs": 0, "same preference %": None, "preferred in a mode": 0, "same of these %": None}  # fmt: skip


def test_only_what_both_modes_rated_is_compared():
    first = rated([("a", "x", [5] * 7), ("a", "y", [1] * 7), ("b", "x", [2] * 7)])
    second = first[(first.speech_id == "a") & ((first.model != "y") | (first.principle != "safety"))]
    table = mode_agreement(first, second).set_index("principle")
    assert table.n.to_dict() == {key: 1 if key in ("safety", "sum of seven") else 2 for key in table.index}
    assert table.pairs.iloc[-1] == 0, "a response without all seven has no sum"
    assert "in common" in one_line(lambda: mode_agreement(first, second.assign(speech_id="z" + second.speech_id)))


def test_a_negative_number_of_speeches_is_refused():
    assert (
        len(first_speeches(SPEECHES, 0)) == 0
        and first_speeches(SPEECHES, 2).speech_id.tolist() == ["a", "b"]
        and len(first_speeches(SPEECHES, 9)) == 3
    )
    assert "compare_mode_speeches" in one_line(lambda: first_speeches(SPEECHES, -1))


# ---- the stage ----


def run_stage(overrides, shard=None) -> Path:
    """Run the run cells of chapter 3 on three speeches, or on a shard of them."""
    run = Run("example")
    with StageWriter(run, "01_speeches", "tiny", 0, {}) as stage:
        stage.rows(
            "speeches",
            SPEECHES.assign(
                source="demo", topic="anxiety", coarse_topic="core-mental-health-issues", topic_by="gold", split="train"
            ),
        )
    with StageWriter(
        run, "02_responses", "tiny", 0, {}, facts={"models": {"rules:phrases": {"label": "canned"}}}
    ) as stage:
        stage.rows("responses", answered().assign(finish_reason="stop", n_tokens=9, request_key="k"))
    cells = json.loads((Path(__file__).parents[2] / "nbs" / "03_ratings.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for source in [sources[0], *(source for source in sources if source.startswith("#| run"))]:
        names |= {"PROFILE": "tiny", "RUN": "example", "SEED": 0, "OVERRIDES": overrides, "SHARD": shard}
        exec(source, names)
    names["stage"].gateway.cache.close()  # as the end of the process would
    return run.stage("03_ratings") if shard is None else run.stage("03_ratings.shards") / str(parse_shard(shard))


def files_of(*folders) -> dict:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_of_the_stage_writes_beside_it_and_the_whole_then_asks_nobody(mode):
    overrides, run = {"responses.block": 2, "ratings.mode": mode, "ratings.compare_mode_speeches": 2}, Run("example")
    folder = run_stage(overrides)
    rows = StageReader(run, "03_ratings").rows("ratings")
    shutil.rmtree(run.outputs / "cache")
    before = files_of(run.tables, folder)
    assert any("table_S1" in path for path in before)
    for shard, names in (("1/2", ["a", "b"]), ("2/2", ["c"])):
        own = run_stage(overrides, shard)
        assert own.parent.name == "03_ratings.shards" and read_json(own / "receipt.json")["coverage"] == 1.0
        assert pd.read_parquet(own / "ratings.parquet").equals(
            rows[rows.speech_id.isin(names)].reset_index(drop=True)
        ), "its share of the rows, as they are in the whole"
        assert not list(own.glob("tables/*S14*")), "what compares the whole is left to the whole"
    assert files_of(run.tables, folder) == before, "a shard touches neither the stage nor the tables of the run"
    assert "fewer shards" in one_line(lambda: run_stage(overrides, "3/3"))
    whole = run_stage({**overrides, "ratings.compare_mode_speeches": 0})
    assert (
        StageReader(run, "03_ratings").rows("ratings").equals(rows)
        and read_json(whole / "receipt.json")["models"]["rules:rubric"]["calls"] == 0
    )
    [booked] = read_json(whole / "receipt.json")["books"]
    assert booked["calls"] == 3 * len(MODES[mode]), "what the shards asked is in the books of the whole"


@pytest.mark.parametrize("mode, other", [("principle", "speech"), ("speech", "principle")])
def test_the_stage_compares_the_modes_where_it_is_asked_to(mode, other):
    folder = run_stage({"ratings.mode": mode, "ratings.compare_mode_speeches": 2})
    receipt, found = read_json(folder / "receipt.json"), StageReader(Run("example"), "03_ratings").rows("ratings")
    assert len(found) == 84 and receipt["coverage"] == 1.0 and receipt["settings"]["ratings"]["mode"] == mode
    assert (receipt["compared_speeches"], receipt["compared_put_aside"]) == (2, 0)
    assert receipt["models"]["rules:rubric"]["calls"] + receipt["models"]["rules:rubric"]["cached"] == 3 * len(
        MODES[mode]
    ) + 2 * len(MODES[other])
    table, said = (
        pd.read_csv(folder / "tables/table_S14_mode_agreement.csv"),
        read_json(folder / "tables/table_S14_mode_agreement.json"),
    )
    assert (
        table.n.tolist() == [8] * 8
        and (table["exact %"] == 100).all()
        and f"{other} minus {mode}" in said["caption"]
        and "2 speeches" in said["label"]
    )


def test_the_stage_compares_nothing_by_itself():
    assert all(
        profile.ratings.mode == "principle" and profile.ratings.compare_mode_speeches == 0
        for profile in PROFILES.values()
    ), "the paper's"
    folder = run_stage({})
    assert not list(folder.glob("tables/*S14*")) and "compared_speeches" not in read_json(folder / "receipt.json")


# ---- coverage ----


@pytest.mark.parametrize(
    "done, asked, least", [(97, 100, 0.98), (0, 100, 0.01), (0, 0, 0.98), (99, 100, 1.0), (9799, 10000, 0.98)]
)
def test_too_many_gaps_are_refused(done, asked, least):
    message = one_line(lambda: check_coverage(done, asked, least, "03_ratings"))
    assert message.startswith("03_ratings: ") and f"{done} of {asked}" in message


@pytest.mark.parametrize(
    "done, asked, least", [(98, 100, 0.98), (100, 100, 1.0), (1, 1, 1.0), (0, 5, 0.0), (49, 50, 0.98)]
)
def test_enough_answers_pass(done, asked, least):
    assert check_coverage(done, asked, least, "03_ratings") == pytest.approx(done / asked)


def test_the_units_of_a_coverage_are_named():
    message = one_line(lambda: check_coverage(5, 10, 0.9, "03_ratings", "pairs of speech and principle"))
    assert "5 of 10 pairs of speech and principle gave" in message


def test_a_member_is_frozen():
    with pytest.raises(AttributeError):
        setattr(POOLS["tiny"][0], fields(Member)[0].name, "other")


# ---- one server, one model after the other ----


def test_a_server_is_asked_for_the_model_that_it_serves(server, tmp_path):  # noqa: F811
    speeches = pd.DataFrame({"speech_id": list("abcdef"), "speech": [f"I count {n} stairs." for n in range(6)]})
    address = server.uri.partition("@")[2]
    pool = tuple(Member(name, "-", f"openai:owner/{name}@{address}") for name in ("first", "second", "third"))
    assigned = assign_members(speeches.speech_id, pool, 2, 0)
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"))
    for served, left in (("third", "2 models"), ("first", "1 models")):
        server.behave = lambda text, attempt: (
            completion("fine") if server.bodies[-1]["model"] == f"owner/{served}" else error(404)
        )
        message = one_line(lambda: respond(gateway, speeches, assigned, 64, 0))
        assert left in message and f"owner/{served}" not in message and "owner/second" in message
    asked = len([body for body in server.bodies if body["model"] != "owner/second"])
    server.behave = lambda text, attempt: completion("fine")
    responses, failures = respond(gateway, speeches, assigned, 64, 0)
    assert len(responses) == 12 and not failures
    assert len([body for body in server.bodies if body["model"] != "owner/second"]) == asked, (
        "what was answered is not asked again"
    )
