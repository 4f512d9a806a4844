"""Who answers whom is settled by seed and id alone; a rating belongs to a response, not to its place; what fails is
put aside."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import error, good
from refusals import one_line

from psycopref.core.files import SCHEMAS, StageReader, StageWriter, read_json
from psycopref.core.principles import principle_keys
from psycopref.core.settings import PROFILES, EvaluationSettings, ResponseSettings, load_profile
from psycopref.core.stages import Run, Shard, derived_seed, parse_shard
from psycopref.feedback.battles import answer
from psycopref.feedback.pairing import make_pairs, one_author_pairs, scored_responses
from psycopref.feedback.pool import POOLS, Member, assign_members, author_of, find_pool, left_out, pool_table, respond
from psycopref.feedback.pool import sample_of, shard_speeches, whole_pool
from psycopref.feedback.rating import (
    MODES,
    check_coverage,
    describe_ratings,
    first_speeches,
    mode_agreement,
    mode_calls,
)
from psycopref.feedback.rating import collect_ratings, mode_agreement_row, mode_calls, preference_agreement
from psycopref.feedback.rating import rate_blocks, rating_request, rating_summary, shown_order
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import PROVIDERS, Gateway, chat_model
from psycopref.gateway.servers import OpenAIModel, shutdown_day
from psycopref.models.chat import ChatReply, ChatRequest, Failure
from psycopref.models.generation import Decoding
from psycopref.rater.rules import PHRASES, rubric_reply, score_batch, to_rating
from psycopref.run.plan import plan_run, usd

PRINCIPLE_KEYS = principle_keys()

BRIEF = ResponseSettings(max_tokens=64)

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SAID = {"a": "Nobody at work has talked to me since I asked for fewer shifts."}
SAID |= {"b": "I count the stairs and start over when I lose count.", "c": "My sister moved out in March."}
SEVEN = {f"s{n}": f"I have called my brother {'and again ' * (n % 4)}{n} times." for n in range(7)}
RUBRIC = "rules:rubric"


def speeches_of(said: dict) -> pd.DataFrame:
    return pd.DataFrame(list(said.items()), columns=["speech_id", "speech"])


def answered(names="abc", n=4) -> pd.DataFrame:
    """n responses for each speech, of different quality."""
    said = [phrase.format(word="work") for phrase in PHRASES]
    rows = [(name, f"m{i}", said[(i + ord(name[-1])) % len(said)]) for name in names for i in range(n)]
    return pd.DataFrame(rows, columns=["speech_id", "model", "response"])


def new_gateway(folder, name="replies") -> Gateway:
    return Gateway(ReplyCache(folder / f"{name}.sqlite"))


SPEECHES = speeches_of(SAID)

# ---- assignment ----

ids = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@few
@given(ids, st.integers(0, 2**31), st.integers(1, 8), st.randoms())
def test_members_do_not_depend_on_the_other_speeches(names, seed, each, chance):
    whole = assign_members(names, POOLS["tiny"], each, seed)
    assert [name for name, _ in whole] == [name for name in names for _ in range(each)]
    part = chance.sample(names, max(1, len(names) // 2))
    own = {name: [m for n, m in whole if n == name] for name in names}
    again = assign_members([*part, "one more"], POOLS["tiny"], each, seed)
    assert again[: each * len(part)] == [(name, m) for name in part for m in own[name]]
    assert all(len({m.name for m in members}) == each for members in own.values()), "nobody answers twice"


def test_members_change_with_the_seed_and_everybody_gets_a_turn():
    names = [f"demo-{n}" for n in range(800)]
    first, second = (assign_members(names, POOLS["demo"], 4, seed) for seed in (0, 1))
    assert first != second
    turns, share = Counter(member.name for _, member in first), 4 / len(POOLS["demo"])
    assert len(turns) == len(POOLS["demo"])
    assert all(abs(n - 800 * share) < 5 * (800 * share * (1 - share)) ** 0.5 for n in turns.values())
    orders = Counter(member.name for _, member in first[::4])
    assert len(orders) == len(turns), "the order of a speech's members is drawn too"


def test_pools_hold_enough_members_that_can_be_asked():
    for name, pool in POOLS.items():
        each = PROFILES[name.removesuffix("-substitute")].responses.each_speech
        assert len({member.name for member in pool}) == len(pool) >= each
        assert find_pool(name, len(pool)) == pool
        assert str(len(pool)) in one_line(lambda: find_pool(name, len(pool) + 1))
        for member in {*pool}:
            messages = member.messages("I {count} the stairs.")
            roles = [message["role"] for message in messages]
            turns = ["user", "assistant"] * len(member.examples) + ["user"]
            assert roles in (turns, ["system", *turns]) and all(message["content"].strip() for message in messages)
            assert "I {count} the stairs." in messages[-1]["content"]
            assert member.model.startswith("local:") or chat_model(member.model)
    assert "demo" in one_line(lambda: find_pool("dmeo", 4))


def test_who_is_left_out_is_not_drawn_and_has_a_reason():
    chosen = PROFILES["paper"].responses
    asked, reasons = find_pool("paper", 4, chosen.leave_out), left_out("paper", chosen.leave_out)
    assert {member.name for member in asked} | set(reasons) == {member.name for member in whole_pool("paper")}
    assert len(asked) == 15 and "2025-10-27" in reasons.pop("o1-mini")
    assert len(reasons) == 4 and all("trust_remote_code" in reason for reason in reasons.values())
    turns = Counter(member.name for _, member in assign_members([f"s{n}" for n in range(1500)], asked, 4, 0))
    assert len(turns) == 15 and all(abs(n - 400) < 5 * 400**0.5 for n in turns.values())
    assert "Did you mean o1-mini" in one_line(lambda: find_pool("paper", 4, ["o1-minni"]))
    gone = [*chosen.leave_out, *(member.name for member in asked[3:])]
    assert "has 3 members to ask" in one_line(lambda: find_pool("paper", 4, gone))
    table = pool_table(
        whole_pool("paper"), answered().head(0).assign(finish_reason=""), left_out("paper", chosen.leave_out)
    )
    assert table["answered by"].str.startswith("not asked: ").sum() == 5


def test_baichuan_s_template_writes_what_its_own_code_writes():
    template = next(member.serve.chat_template for member in POOLS["paper"] if member.name == "Baichuan2-13B-Chat")
    said = ("user", "Hello"), ("assistant", "I am Baichuan."), ("user", "And I?")
    messages = [{"role": role, "content": text} for role, text in said]
    form = (
        "<reserved_106>Hello<reserved_107>I am Baichuan.<reserved_106>And I?<reserved_107>"  # vLLM's pull request 3340
    )
    assert jinja2.Template(template).render(messages=messages, add_generation_prompt=True) == form


def test_the_substitute_pool_asks_nobody_who_retires():
    paper, instead = POOLS["paper"], POOLS["paper-substitute"]
    retiring = {member.name for member in paper if shutdown_day(member.model)}
    assert retiring == {name for member in instead for name in member.replaces}
    assert not any(shutdown_day(member.model) for member in instead)
    assert {member for member in paper if member.name not in retiring} < set(instead)


# ---- responses ----


def test_nobody_is_asked_for_nothing_where_a_member_is_gone(server, tmp_path):
    here, gone = Member("here", "-", server.uri), Member("gone", "-", "openai:o1-mini")
    assigned, paid = [("a", here), ("a", gone)], Gateway(ReplyCache(tmp_path / "paid.sqlite"), 10.0)
    line = one_line(lambda: respond(paid, SPEECHES, assigned, BRIEF, 0))
    assert "o1-mini was shut down on 2025-10-27" in line and not server.log


def test_every_assigned_member_has_one_row_in_order_whatever_else_is_asked(gateway, tmp_path):
    assigned = assign_members(SEVEN, POOLS["tiny"], 4, 0)
    frame, failures = respond(gateway, speeches_of(SEVEN), assigned, BRIEF, 0)
    assert not failures and list(zip(frame.speech_id, frame.model)) == [(name, m.name) for name, m in assigned]
    assert frame.response.str.len().gt(0).all() and frame.request_key.is_unique
    with StageWriter(Run("example"), "02_responses", "tiny", 0, {}) as stage:
        stage.rows("responses", frame)
    assert len(StageReader(Run("example"), "02_responses").rows("responses")) == 28
    for block in (1, 2, 3, 5):
        own = new_gateway(tmp_path, f"block {block}")
        assert respond(own, speeches_of(SEVEN), assigned, replace(BRIEF, block=block), 0)[0].equals(frame)
    more = assign_members(["x", "s3", "s1"], POOLS["tiny"], 4, 0)
    found, _ = respond(gateway, speeches_of({**SEVEN, "x": "I am new."}), more, BRIEF, 0)
    for name in ("s3", "s1"):
        parts = [rows[rows.speech_id == name].reset_index(drop=True) for rows in (found, frame)]
        assert parts[0].equals(parts[1])
    assert gateway.counts["rules:phrases"]["calls"] == 32, "what was answered is not asked again"


def test_failures_are_listed_and_the_others_kept(gateway, scripted):
    lost, kept = Failure("no text", "raw reply"), ChatReply("I hear you.", "length", 3, 5)
    scripted(lambda request: lost if "stairs" in request.messages[-1]["content"] else kept)
    pool = (Member("silent", "-", "scripted:model"), *POOLS["tiny"][:3])
    assigned = assign_members(SAID, pool, 4, 0)
    frame, failures = respond(gateway, SPEECHES, assigned, BRIEF, 0)
    assert failures == [{"speech_id": "b", "model": "silent", "reason": "no text", "raw": "raw reply"}]
    expected = [(name, member.name) for name, member in assigned if (name, member.name) != ("b", "silent")]
    assert list(zip(frame.speech_id, frame.model)) == expected
    heard, table = frame[frame.model == "silent"], pool_table(pool, frame).set_index("member")
    assert heard.finish_reason.eq("length").all() and heard.n_tokens.eq(5).all()
    assert table.loc["silent", ["responses", "cut off %"]].tolist() == [2, 100.0]
    assert table.loc["phrases-0", "cut off %"] == 0.0
    scripted(lambda request: lost)
    frame, failures = respond(gateway, SPEECHES, assign_members(SAID, pool[:1], 1, 0), BRIEF, 0)
    assert len(failures) == 3 and len(frame) == 0 and list(frame.columns) == list(SCHEMAS["responses"])


def test_each_member_is_asked_with_its_own_decoding(gateway, scripted):
    model = scripted(lambda request: "fine")
    pool = [Member("cool", "-", "scripted:model", 0.2, 5, "P1"), Member("warm", "-", "scripted:model", 1.0, 0, "P2")]
    respond(gateway, SPEECHES, assign_members(SAID, pool, 2, 0), ResponseSettings(max_tokens=31), 9)
    asked = [(request.messages[0]["content"], request.decoding) for request in model.requests]
    seen = {(text, how.temperature, how.top_k, how.max_tokens, how.seed) for text, how in asked}
    assert seen == {("P1", 0.2, 5, 31, 9), ("P2", 1.0, 0, 31, 9)}
    assert {request.task for request in model.requests} == {"respond"}


def test_shards_and_an_interrupted_run_give_the_words_of_one_whole_run(tmp_path, monkeypatch, one_thread):
    """Sampled words hang on what is asked together, so on the block, and on nothing else."""
    local, tiny = PROVIDERS["local"], ("tiny", "local:random-tiny")
    monkeypatch.setitem(PROVIDERS, "local", lambda name: local(name, dtype="float32"))
    pool = [Member("cool", *tiny, 0.5, 0, "P1"), Member("warm", *tiny, 1.0, 5, "P2", (("Hello.", "Yes?"),))]
    pool += [Member("mute", *tiny, 1.0, 0, "P3", system=False), *POOLS["tiny"][:3]]
    seven = speeches_of(SEVEN)

    def answered_by(speeches, name):
        gateway = new_gateway(tmp_path, name)
        frame, failures = respond(
            gateway,
            speeches,
            assign_members(speeches.speech_id, pool, 4, 0),
            ResponseSettings(max_tokens=6, block=2),
            0,
        )
        assert not failures
        return frame, gateway

    whole, gateway = answered_by(seven, "whole")
    assert len(whole) == 28 and {"cool", "warm", "mute"} < set(whole.model)
    shards = [answered_by(shard_speeches(seven, 2, Shard(i, 3)), f"shard {i}")[0] for i in (1, 2, 3)]
    assert pd.concat(shards).sort_values("speech_id", kind="stable", ignore_index=True).equals(whole)
    gateway.cache.forget(list(whole.request_key[::3]))
    assert answered_by(seven, "whole")[0].equals(whole)


def test_the_quirks_of_a_member_reach_the_call():
    speech, served = "I can't sleep.", "m@http://127.0.0.1:9/v1"
    quirks = {"persona": "Be warm.", "examples": (("Hello.", "Yes?"),), "system": False, "thinking": 4096}
    how = OpenAIModel(served).chat_arguments(
        Member("mute", "-", f"openai:{served}", **quirks).request(speech, ResponseSettings(max_tokens=300), 5)
    )
    turns = [("user", "Be warm.\n\nHello."), ("assistant", "Yes?"), ("user", speech)]
    assert [(m["role"], m["content"]) for m in how["messages"]] == turns and how["max_completion_tokens"] == 4396
    [only] = Member("plain", "-", "rules:phrases", persona="Be warm.", system=False).messages(speech)
    assert only["role"] == "user" and only["content"].startswith("Be warm.\n\n") and only["content"].count(speech) == 1
    loud = Member("loud", "-", "rules:phrases", persona="Be warm.").request(speech, ResponseSettings(max_tokens=300), 5)
    assert loud.messages[0] == {"role": "system", "content": "Be warm."} and loud.decoding.max_tokens == 300


# ---- ratings ----


@few
@given(st.integers(1, 40), st.sampled_from(sorted(MODES)), st.sets(st.integers(0, 27)))
def test_ratings_are_the_same_in_any_blocks(tmp_path_factory, block, mode, lost):
    gateway = new_gateway(tmp_path_factory.getbasetemp(), "any blocks")
    seven, how = speeches_of(SEVEN), {"seed": 3, "mode": mode}
    shown = answered(SEVEN).drop(index=list(lost))
    whole, aside = collect_ratings(gateway, RUBRIC, seven, shown, **how)
    parts = list(rate_blocks(gateway, RUBRIC, seven, shown, **how, block=block))
    assert len(parts) == -(-7 // block) and [entry for _, own in parts for entry in own] == aside
    frames = [frame for frame, _ in parts if len(frame)]
    assert pd.concat(frames, ignore_index=True).equals(whole) if frames else whole.empty
    for n, (frame, _) in enumerate(parts):
        assert set(frame.speech_id) <= set(seven.speech_id[n * block : (n + 1) * block])
    gateway.cache.close()


@settings(few, max_examples=6)
@given(st.integers(0, 2**31), st.randoms())
def test_ratings_do_not_depend_on_the_places_the_order_of_rows_or_the_mode(tmp_path_factory, seed, chance):
    gateway, shown = new_gateway(tmp_path_factory.mktemp("cache")), answered()
    order = chance.sample(range(len(shown)), len(shown))
    found, aside = collect_ratings(gateway, RUBRIC, SPEECHES, shown.iloc[order].reset_index(drop=True), seed=seed)
    assert not aside and len(found) == len(shown) * 7 and set(found.rater) == {RUBRIC}
    response = {(r.speech_id, r.model): r.response for r in shown.itertuples()}
    known = score_batch((SAID[speech], text) for (speech, _), text in response.items())
    for row in found.itertuples():
        scores = known[SAID[row.speech_id], response[row.speech_id, row.model]].scores
        assert row.rating == to_rating(scores[row.principle])
        assert row.rationale.startswith(f"Rubric (offline stand-in): {row.principle}")
    assert found.groupby(["speech_id", "principle"]).position.apply(lambda p: sorted(p) == [1, 2, 3, 4]).all()
    assert not found.duplicated(["speech_id", "model", "principle"]).any()

    one, every = (collect_ratings(gateway, RUBRIC, SPEECHES, shown, seed=seed, mode=mode)[0] for mode in MODES)
    assert one.drop(columns="position").equals(every.drop(columns="position")), "rows and their order"
    assert list(one.columns) == list(every.columns) == list(SCHEMAS["ratings"]) and one.dtypes.equals(every.dtypes)
    agreed = mode_agreement(one, every)
    assert (agreed["exact %"] == 100).all() and agreed.iloc[-1][["same preference %", "pairs"]].tolist() == [100, 18]
    gateway.cache.db.close()


def test_ratings_fit_their_schema(gateway):
    found, _ = collect_ratings(gateway, RUBRIC, SPEECHES, answered())
    with StageWriter(Run("example"), "03_ratings", "tiny", 0, {}) as stage:
        stage.rows("ratings", found)
    back = StageReader(Run("example"), "03_ratings").rows("ratings")
    assert back.rating.between(1, 5).all() and back.to_dict("records") == found.to_dict("records")
    summary = rating_summary(back)
    assert set(summary.model) == {"m0", "m1", "m2", "m3"} and summary.overall.is_monotonic_decreasing
    mean = back[(back.model == "m0") & (back.principle == "safety")].rating.mean()
    assert summary.set_index("model").loc["m0", "safety"] == pytest.approx(mean, abs=0.005)


def judge_by(judge):
    """Rate each response by `judge(principle, text, place)`, in the form that was asked for."""

    def one(key, request):
        texts = [(i, request.fields[f"response_{i}"]) for i in range(1, 5)]
        ratings = {f"response_{i}_rating": judge(key, text, i) for i, text in texts}
        return ratings | {f"rationale_{i}": f"{key}: {text}" for i, text in texts}

    def answer(request):
        if request.task == "rate":
            return json.dumps(one(request.fields["principle"], request))
        return json.dumps({key: one(key, request) for key in PRINCIPLE_KEYS})

    return answer


@pytest.mark.parametrize("mode", MODES)
def test_the_position_says_where_a_response_was_shown(gateway, scripted, mode):
    rater, shown = scripted(judge_by(lambda key, text, place: place)), answered()
    found, _ = collect_ratings(gateway, "scripted:model", SPEECHES, shown, seed=3, mode=mode)
    assert (found.rating == found.position).all(), "this rater rates places"
    text = {(r.speech_id, r.model): r.response for r in shown.itertuples()}
    asked = {(r.fields["client_speech"], r.fields.get("principle")): r for r in rater.requests}
    assert len(rater.requests) == 3 * len(mode_calls(mode))
    for row in found.itertuples():
        request = asked[SAID[row.speech_id], row.principle if mode == "principle" else None]
        response = text[row.speech_id, row.model]
        assert request.fields[f"response_{row.position}"] == response
        assert f"Response {row.position}: {response}" in request.messages[0]["content"]
    for (name, principle), own in found.groupby(["speech_id", "principle"]):
        order = shown_order(4, 3, name, *([principle] if mode == "principle" else []))
        assert order == [int(m[1]) for m in own.sort_values("position").model]


@pytest.mark.parametrize("mode", MODES)
def test_a_rating_stays_with_its_response_when_the_inputs_are_swapped(gateway, scripted, mode):
    taste = {f"text {i}": i for i in range(1, 5)}
    rater = scripted(judge_by(lambda key, text, place: (taste[text] + PRINCIPLE_KEYS.index(key)) % 5 + 1))
    many = speeches_of({f"s{n}": f"I have called {n} times." for n in range(24)})
    for texts in (["text 1", "text 2", "text 3", "text 4"], ["text 4", "text 2", "text 3", "text 1"]):
        rows = [(name, f"m{i}", text) for name in many.speech_id for i, text in enumerate(texts)]
        shown = pd.DataFrame(rows, columns=["speech_id", "model", "response"])
        found, aside = collect_ratings(gateway, "scripted:model", many, shown, seed=5, mode=mode)
        assert not aside and len(found) == 24 * 4 * 7
        for row in found.itertuples():
            own = texts[int(row.model[1])]
            assert row.rating == (taste[own] + PRINCIPLE_KEYS.index(row.principle)) % 5 + 1
            assert row.rationale == f"{row.principle}: {own}"
        assert found.groupby("model").position.nunique().eq(4).all(), "every place was tried"
    assert len(rater.requests) == 2 * 24 * len(mode_calls(mode))


def rated_as(*values) -> str:
    return json.dumps({f"response_{i}_rating": value for i, value in enumerate(values, 1)})


BROKEN = {"prose": "I would rather not.", "cut off": '{"response_1_rating": 3, "rationa', "empty": ""}
BROKEN |= {"three": rated_as(3, 3, 3), "six": rated_as(6, 3, 3, 3), "half": rated_as(2.5, 3, 3, 3)}
LOST = {"principle": [("a", "empathy"), ("c", "safety")], "speech": [("a", key) for key in PRINCIPLE_KEYS]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", [*BROKEN.values(), Failure("timed out", "raw reply")], ids=[*BROKEN, "failed"])
def test_a_broken_reply_is_put_aside_with_what_it_said(gateway, scripted, fault, mode):
    places = {(SAID[name], key) for name, key in LOST[mode]}

    def answer(request):
        asked = request.fields["client_speech"], request.fields.get("principle", "empathy")
        return fault if asked in places else rubric_reply(request.task, request.fields)

    scripted(answer)
    found, aside = collect_ratings(gateway, "scripted:model", SPEECHES, answered(), mode=mode)
    assert [(entry["speech_id"], entry["principle"]) for entry in aside] == LOST[mode]
    raw = fault if isinstance(fault, str) else fault.raw
    assert all(entry["raw"] == raw and entry["reason"] for entry in json.loads(json.dumps(aside)))
    assert len(found) == (21 - len(LOST[mode])) * 4 and not {*LOST[mode]} & {*zip(found.speech_id, found.principle)}


def test_a_rater_that_always_fails_leaves_an_empty_frame(gateway, scripted):
    scripted(lambda request: "no")
    found, aside = collect_ratings(gateway, "scripted:model", SPEECHES, answered())
    assert len(aside) == 21 and len(found) == 0 and list(found.columns) == list(SCHEMAS["ratings"])


NO_PARTS = {"text": rated_as("3", 3, 3, 3), "failed": None}


@pytest.mark.parametrize("fault", [*(BROKEN | NO_PARTS), "missing"])
def test_one_bad_principle_among_seven_is_put_aside_alone(gateway, scripted, fault):
    def answer(request):
        reply = json.loads(rubric_reply("rate_all", request.fields))
        if request.fields["client_speech"] == SAID["b"]:
            own = (BROKEN | NO_PARTS).get(fault)
            try:
                reply["autonomy"] = json.loads(own or "null")
            except json.JSONDecodeError:
                reply["autonomy"] = own
            if fault == "missing":
                del reply["autonomy"]
        return json.dumps(reply)

    scripted(answer)
    found, [entry] = collect_ratings(gateway, "scripted:model", SPEECHES, answered(), mode="speech")
    assert (entry["speech_id"], entry["principle"]) == ("b", "autonomy")
    assert entry["reason"].startswith("autonomy: ") and json.loads(entry["raw"])["empathy"]
    whole, _ = collect_ratings(gateway, RUBRIC, SPEECHES, answered(), mode="speech")
    rest = whole[(whole.speech_id != "b") | (whole.principle != "autonomy")].reset_index(drop=True)
    assert found.drop(columns="rater").equals(rest.drop(columns="rater"))


@pytest.mark.parametrize("mode", MODES)
def test_a_speech_without_all_its_responses_is_put_aside_in_both_modes(gateway, mode):
    found, aside = collect_ratings(gateway, RUBRIC, SPEECHES, answered().drop(index=5), mode=mode)
    assert [(entry["speech_id"], entry["principle"]) for entry in aside] == [("b", key) for key in PRINCIPLE_KEYS]
    assert len(found) == 2 * 7 * 4


@pytest.mark.parametrize("wrong", ["speach", "", "both", "Speech", None])
def test_an_unknown_mode_names_both_and_asks_nobody(gateway, wrong):
    for action in (
        lambda: collect_ratings(gateway, RUBRIC, SPEECHES, answered(), mode=wrong),
        lambda: mode_calls(wrong),
    ):
        message = one_line(action)
        assert all(said in message for said in ("ratings.mode", repr(wrong), "principle", "speech"))
    assert gateway.counts == {}
    if wrong is not None:
        assert "ratings.mode" in one_line(lambda: plan_run(load_profile("demo", {"ratings.mode": wrong}), 10).work())


def test_a_rating_request_asks_for_what_the_parser_needs():
    request = rating_request("safety", "I can't sleep.", list("wxyz"), 99)
    assert (request.task, request.decoding.max_tokens, request.decoding.temperature) == ("rate", 99, 0.0)
    asked = {name for i in range(1, 5) for name in (f"response_{i}_rating", f"rationale_{i}")}
    assert set(request.schema["required"]) == asked
    responses = {key: text for key, text in request.fields.items() if key.startswith("response")}
    assert responses == {f"response_{i}": text for i, text in enumerate("wxyz", 1)}
    assert len({rating_request(key, "I can't sleep.", list("wxyz")).key("m") for key in PRINCIPLE_KEYS}) == 7


def test_the_rubric_knows_its_tasks_and_no_others(gateway):
    every = rating_request(None, SAID["a"], list("wxyz"))
    rubric = chat_model(RUBRIC)
    [reply] = gateway.ask(rubric, [every])
    singles = [rubric_reply("rate", rating_request(key, SAID["a"], list("wxyz")).fields) for key in PRINCIPLE_KEYS]
    assert json.loads(reply.text) == dict(zip(PRINCIPLE_KEYS, map(json.loads, singles)))
    for task in ("respond", "topic", "rate_every", ""):
        asked = ChatRequest(every.messages, task=task, fields=every.fields)
        assert RUBRIC in one_line(lambda: gateway.ask(rubric, [asked]))


# ---- the plan ----


@pytest.mark.parametrize("mode, other", [("principle", "speech"), ("speech", "principle")])
def test_the_plan_counts_the_calls_and_tokens_of_the_mode_and_of_a_comparison(mode, other):
    found = plan_run(load_profile("paper", {"ratings.mode": mode}), 26_483)
    [row] = found.ratings()
    requests = [rating_request(key, "x" * found.characters, ["x" * 4 * 350] * 4) for key in mode_calls(mode)]
    asked = sum(len(request.messages[0]["content"]) for request in requests) / len(requests)
    assert row.calls == 26_483 * len(mode_calls(mode))
    assert row.tokens_in / row.calls == pytest.approx(found.tokens(asked, row.who), abs=1)
    assert usd(row) == pytest.approx((row.tokens_in * 2.5 + row.tokens_out * 10) / 1e6)

    profile = load_profile("paper", {"ratings.mode": mode, "ratings.compare_mode_speeches": 500})
    [alone] = plan_run(load_profile("paper", {"ratings.mode": other}), 1000).ratings()
    own, second = plan_run(profile, 1000).ratings()
    assert (own.calls, second.calls) == (
        1000 * len(mode_calls(mode)),
        500 * len(mode_calls(other)),
    ) and other in second.what
    assert second.tokens_in * 2 == alone.tokens_in and usd(second) == pytest.approx(usd(alone) / 2)
    assert [row.calls for row in plan_run(profile, 100).ratings()] == [
        100 * len(mode_calls(mode)),
        100 * len(mode_calls(other)),
    ]


# ---- agreement ----


def rated(*rows) -> pd.DataFrame:
    """Ratings of (speech, model, seven values), or one value for all seven."""
    full = [(s, m, [value] * 7 if isinstance(value, int) else value) for s, m, value in rows]
    long = [(s, m, *pair) for s, m, values in full for pair in zip(PRINCIPLE_KEYS, values)]
    return pd.DataFrame(long, columns=["speech_id", "model", "principle", "rating"])


def test_agreement_equals_values_computed_by_hand():
    first = rated(("a", "x", 5), ("a", "y", 4), ("a", "z", [3, 3, 3, 3, 3, 3, 2]), ("b", "x", 1), ("b", "y", 2))
    second = rated(("b", "y", 3), ("a", "z", 3), ("a", "x", 4), ("a", "y", 4), ("b", "x", 1))
    table = mode_agreement(first, second).set_index("principle")
    assert list(table.index) == [*PRINCIPLE_KEYS, "sum of all"]
    columns = ["n", "exact %", "within one %", "mean difference", "kappa"]
    # empathy: 5 4 3 1 2 against 4 4 3 1 3; gaps -1 0 0 0 1: mean 0; variances 2 and 1.2, means equal: 1 - 0.4 / 3.2
    assert table.loc["empathy", columns].tolist() == [5, 60.0, 100.0, 0.0, 0.875]
    # staging: 5 4 2 1 2 against 4 4 3 1 3; gaps -1 0 1 0 1: mean 0.2; variances 2.16 and 1.2: 1 - 0.6 / 3.4
    assert table.loc["staging", columns].tolist() == [5, 40.0, 100.0, 0.2, 0.824]
    # sums: 35 28 20 7 14 against 28 28 21 7 21. Pairs: a 35-28 > against =, 35-20 and 28-20 > against 28-21 >; b <, <
    own = table.loc["sum of all"]
    assert own[columns[:4]].tolist() == [5, 40.0, 60.0, 0.2]
    assert own[["pairs", "same preference %", "preferred in a mode", "same of these %"]].tolist() == [4, 75.0, 4, 75.0]
    assert table.pairs.iloc[:7].isna().all()
    back = mode_agreement(second, first).set_index("principle")
    assert (back["mean difference"] == -table["mean difference"]).all() and back.kappa.iloc[0] == 0.875


@few
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=40))
def test_kappa_is_scikit_learns(pairs):
    from sklearn.metrics import cohen_kappa_score

    first, second = np.array(pairs).T
    ours = mode_agreement_row("x", first, second)["kappa"]
    if len({*first, *second}) == 1:
        assert ours is None
    else:
        theirs = cohen_kappa_score(first, second, weights="quadratic", labels=range(1, 6))
        assert ours == pytest.approx(theirs, abs=6e-4)


PREFERENCES = [([21, 14], [21, 14], 100.0), ([21, 15], [20, 15], 100.0), ([21, 14], [20, 14], 0.0)]
PREFERENCES += [([21, 14], [14, 21], 0.0), ([14, 21], [7, 35], 100.0)]


@pytest.mark.parametrize("first, second, same", PREFERENCES)
def test_a_preference_needs_a_gap_of_seven_and_a_side(first, second, same):
    found = preference_agreement(pd.DataFrame({"speech_id": "a", "first": first, "second": second}))
    assert (found["pairs"], found["same preference %"]) == (1, same)
    alone = preference_agreement(pd.DataFrame({"speech_id": ["a", "b"], "first": first, "second": second}))
    assert list(alone.values()) == [0, None, 0, None]


def test_only_what_both_modes_rated_is_compared():
    first = rated(("a", "x", 5), ("a", "y", 1), ("b", "x", 2))
    second = first[(first.speech_id == "a") & ((first.model != "y") | (first.principle != "safety"))]
    table = mode_agreement(first, second).set_index("principle")
    assert table.n.to_dict() == {key: 1 if key in ("safety", "sum of all") else 2 for key in table.index}
    assert table.pairs.iloc[-1] == 0, "a response without all seven has no sum"


def test_a_negative_number_of_speeches_is_refused():
    assert [list(first_speeches(SPEECHES, n).speech_id) for n in (0, 2, 9)] == [[], ["a", "b"], ["a", "b", "c"]]
    assert "compare_mode_speeches" in one_line(lambda: first_speeches(SPEECHES, -1))


# ---- the stage ----


def run_stage(overrides, shard=None) -> Path:
    """Run the run cells of chapter 3 on three speeches, or on a shard of them."""
    run, facts = Run("example"), {"models": {"rules:phrases": {"label": "canned"}}}
    topic = {"topic": "anxiety", "coarse_topic": "core-mental-health-issues", "topic_by": "gold"}
    with StageWriter(run, "01_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", SPEECHES.assign(source="demo", split="train", **topic))
    with StageWriter(run, "02_responses", "tiny", 0, {}, facts=facts) as stage:
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
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("mode, other", [("principle", "speech"), ("speech", "principle")])
def test_the_stage_compares_its_modes_and_a_shard_writes_beside_it_so_the_whole_asks_nobody(mode, other):
    overrides, run = {"responses.block": 2, "ratings.mode": mode, "ratings.compare_mode_speeches": 2}, Run("example")
    folder = run_stage(overrides)
    rows, receipt = StageReader(run, "03_ratings").rows("ratings"), read_json(folder / "receipt.json")
    assert len(rows) == 84 and receipt["coverage"] == 1.0 and receipt["settings"]["ratings"]["mode"] == mode
    assert (receipt["compared_speeches"], receipt["compared_put_aside"]) == (2, 0)
    calls = receipt["models"][RUBRIC]
    assert calls["calls"] + calls["cached"] == 3 * len(mode_calls(mode)) + 2 * len(mode_calls(other))
    table = pd.read_csv(folder / "tables/table_S14_mode_agreement.csv")
    described = read_json(folder / "tables/table_S14_mode_agreement.json")
    assert table.n.tolist() == [8] * 8 and (table["exact %"] == 100).all()
    assert f"{other} minus {mode}" in described["caption"] and "2 speeches" in described["label"]

    shutil.rmtree(run.outputs / "cache")
    before = files_of(run.tables, folder)
    for shard, names in (("1/2", ["a", "b"]), ("2/2", ["c"])):
        own = run_stage(overrides, shard)
        assert own.parent.name == "03_ratings.shards" and read_json(own / "receipt.json")["coverage"] == 1.0
        share = rows[rows.speech_id.isin(names)].reset_index(drop=True)
        assert pd.read_parquet(own / "ratings.parquet").equals(share), "its rows are as they are in the whole"
        assert not list(own.glob("tables/*S14*")), "what compares the whole is left to the whole"
    assert files_of(run.tables, folder) == before, "a shard touches neither the stage nor the tables of the run"
    assert "fewer shards" in one_line(lambda: run_stage(overrides, "3/3"))
    receipt = read_json(run_stage({**overrides, "ratings.compare_mode_speeches": 0}) / "receipt.json")
    assert StageReader(run, "03_ratings").rows("ratings").equals(rows) and receipt["models"][RUBRIC]["calls"] == 0
    [booked] = receipt["books"]
    assert booked["calls"] == 3 * len(mode_calls(mode)), "what the shards asked is in the books of the whole"


def test_the_stage_compares_nothing_by_itself():
    for profile in PROFILES.values():
        assert (profile.ratings.mode, profile.ratings.compare_mode_speeches) == ("principle", 0), "the paper's"
    folder = run_stage({})
    assert not list(folder.glob("tables/*S14*")) and "compared_speeches" not in read_json(folder / "receipt.json")


# ---- coverage ----

GAPS = [(97, 100, 0.98), (0, 100, 0.01), (0, 0, 0.98), (99, 100, 1.0), (9799, 10000, 0.98)]
ENOUGH = [(98, 100, 0.98), (100, 100, 1.0), (1, 1, 1.0), (0, 5, 0.0), (49, 50, 0.98)]


@pytest.mark.parametrize("done, asked, least", [*GAPS, *ENOUGH])
def test_too_many_gaps_are_refused(done, asked, least):
    if (done, asked, least) in ENOUGH:
        assert check_coverage(done, asked, least, "03_ratings") == pytest.approx(done / asked)
    else:
        message = one_line(lambda: check_coverage(done, asked, least, "03_ratings", "pairs"))
        assert message.startswith("03_ratings: ") and f"{done} of {asked} pairs gave" in message


# ---- one server, one model after the other ----


def test_a_server_is_asked_for_the_model_that_it_serves(server, gateway):
    speeches = speeches_of({name: f"I count {n} stairs." for n, name in enumerate("abcdef")})
    address = server.uri.partition("@")[2]
    pool = [Member(name, "-", f"openai:owner/{name}@{address}") for name in ("first", "second", "third")]
    assigned = assign_members(speeches.speech_id, pool, 2, 0)

    def asked_of_the_others():
        return sum(body["model"] != "owner/second" for body in server.bodies)

    for served, left in (("third", "2 models"), ("first", "1 models")):
        wanted = f"owner/{served}"
        server.behave = lambda text, attempt: good("fine") if server.bodies[-1]["model"] == wanted else error(404)
        message = one_line(lambda: respond(gateway, speeches, assigned, BRIEF, 0))
        assert left in message and wanted not in message and "owner/second" in message
    asked = asked_of_the_others()
    server.behave = lambda text, attempt: good("fine")
    responses, failures = respond(gateway, speeches, assigned, BRIEF, 0)
    assert len(responses) == 12 and not failures
    assert asked_of_the_others() == asked, "what was answered is not asked again"


# ---- more than one response of a member ----


def twice_answered(gateway, scripted, samples=2):
    """Responses of a scripted pool, in which a member's second response is worse."""
    model = scripted(lambda request: f"answer of seed {request.decoding.seed}")
    pool = [Member(f"m{i}", "-", "scripted:model", persona=f"P{i}") for i in range(5)]
    assigned = assign_members(SAID, pool, 4, 0)
    return model, pool, assigned, respond(gateway, SPEECHES, assigned, replace(BRIEF, samples=samples), 0)[0]


def test_a_member_that_answers_twice_is_asked_with_another_seed_and_its_first_response_stays(gateway, scripted):
    model, pool, assigned, twice = twice_answered(gateway, scripted)
    once = respond(gateway, SPEECHES, assigned, BRIEF, 0)[0]
    assert len(twice) == 2 * len(once) and not twice.duplicated(["speech_id", "model"]).any()
    assert twice.request_key.is_unique and twice[twice.model.map(sample_of) == 0].reset_index(drop=True).equals(once)
    assert len(model.requests) == len(twice), "what was answered once is not asked again"
    assert {request.decoding.seed for request in model.requests} == {0, derived_seed(0, "sample", 1)}
    assert [author_of(name) for name in twice.model] == [m.name for _, m in assigned for _ in range(2)]
    table = pool_table(pool, twice)
    assert table.responses.sum() == len(twice) and set(table.member) == {member.name for member in pool}


@pytest.mark.parametrize("mode", MODES)
def test_each_round_is_rated_with_the_prompts_four_places(gateway, scripted, mode):
    _, _, _, twice = twice_answered(gateway, scripted)
    rater = scripted(judge_by(lambda key, text, place: 5 if text.endswith(" 0") else 2))
    found, aside = collect_ratings(gateway, "scripted:model", SPEECHES, twice, mode=mode)
    assert not aside and len(found) == 7 * len(twice) and len(rater.requests) == 2 * 3 * len(mode_calls(mode))
    assert not found.duplicated(["speech_id", "model", "principle"]).any() and found.position.max() == 4
    assert (found.rating == np.where(found.model.map(sample_of) == 0, 5, 2)).all()
    short, aside = collect_ratings(gateway, "scripted:model", SPEECHES, twice.drop(index=1), mode=mode)
    assert len(aside) == 7 and len(short) == 7 * (len(twice) - 4), "a gap takes only its own round away"


def test_two_responses_of_a_member_make_pairs_of_one_author(gateway, scripted):
    _, _, _, twice = twice_answered(gateway, scripted)
    scripted(judge_by(lambda key, text, place: 5 if text.endswith(" 0") else 2))
    scored = scored_responses(twice, collect_ratings(gateway, "scripted:model", SPEECHES, twice)[0])
    speeches = SPEECHES.assign(split=["train", "test", "test"])
    train = make_pairs(speeches, scored, ("train",), 1.0, best_worst=False)
    assert len(train) == 16, "each of four good answers against each of four poor ones"
    assert (train.chosen_model == train.rejected_model).sum() == 4
    assert set(train.chosen_model) <= {f"m{i}" for i in range(5)}, "authors, not their samples"
    alone = one_author_pairs(speeches, scored, ("test",), 1.0)
    assert len(alone) == 8 and (alone.chosen_model == alone.rejected_model).all() and set(alone.ID) == {"b", "c"}
    assert alone.chosen.str.endswith(" 0").all() and not alone.rejected.str.endswith(" 0").any()
    assert not alone.duplicated(["ID", "prefID"]).any()
    once = scored[scored.model.map(sample_of) == 0]
    assert one_author_pairs(speeches, once, ("test",), 7).empty


def test_a_members_name_is_no_number_of_a_response(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text('[{"name": "mine #2", "size": "-", "model": "rules:phrases"}]')
    assert "mine #2" in one_line(lambda: find_pool(str(path), 1))


@pytest.mark.parametrize("samples", [1, 3])
def test_the_plan_counts_the_samples(samples):
    found = plan_run(load_profile("paper", {"responses.samples": samples}), 1000)
    assert sum(row.calls for row in found.responses()) == 4000 * samples
    assert [row.calls for row in found.ratings()] == [7000 * samples]
    one = plan_run(load_profile("paper"), 1000)
    assert found.test_pairs == one.test_pairs
    assert found.train_pairs / one.train_pairs == pytest.approx({1: 1, 3: 66 / 6}[samples], rel=0.01)


def test_two_responses_of_an_author_to_a_speech_are_two():
    rows = [("s", "ada", key, 4) for key in PRINCIPLE_KEYS] * 2 + [("s", "bob", key, 2) for key in PRINCIPLE_KEYS]
    ratings = pd.DataFrame(rows, columns=["speech_id", "model", "principle", "rating"])
    said = describe_ratings(ratings, rating_summary(ratings), 1.0, 0)[0]
    assert "2 responses) is rated highest" in said and "1 responses) lowest" in said


def test_two_members_that_answer_twice_are_rated_in_one_call_of_four(gateway, scripted):
    scripted(lambda request: f"answer of seed {request.decoding.seed}")
    pool = [Member(f"m{i}", "-", "scripted:model", persona=f"P{i}") for i in range(3)]
    assigned = assign_members(SAID, pool, 2, 0)
    responses, _ = respond(gateway, SPEECHES, assigned, replace(BRIEF, samples=2), 0)
    rater = scripted(judge_by(lambda key, text, place: 4))
    found, aside = collect_ratings(gateway, "scripted:model", SPEECHES, responses, mode="speech")
    assert not aside and len(rater.requests) == 3 and len(found) == 7 * 12
    shown = {tuple(sorted(v for k, v in r.fields.items() if k.startswith("response_"))) for r in rater.requests}
    assert all(len(texts) == 4 for texts in shown)
    short, aside = collect_ratings(gateway, "scripted:model", SPEECHES, responses.drop(index=0), mode="speech")
    assert len(aside) == 7 and short.speech_id.nunique() == 2


# ---- how answers end, and members as references ----


def test_what_an_api_wrote_ends_with_a_sentence_and_the_cache_keeps_all_of_it(gateway, scripted):
    model = scripted(lambda request: ChatReply("I hear you. It is late. And so I wou", "length", 9, 12))
    ask = lambda words: ChatRequest(({"role": "user", "content": "?"},), Decoding(12, sentence_after=words))
    cut, [raw] = gateway.ask(model, [ask(4), ask(9)]), gateway.ask(model, [ask(0)])
    assert [(reply.text, reply.finish_reason) for reply in cut] == [
        ("I hear you. It is late.", "sentence"),
        ("I hear you. It is late. And so I wou", "length"),
    ]
    assert raw.finish_reason == "length" and cut[0].completion_tokens == 12, "what was written is what was paid"
    again = gateway.ask(model, [ask(4)])
    assert again == cut[:1] and len(model.requests) == 3


def test_a_member_of_the_pool_is_asked_as_in_the_pool_wherever_it_is_a_reference(gateway, scripted, tmp_path):
    place = tmp_path / "pool.json"
    member = {"name": "kind", "size": "-", "model": "scripted:model", "persona": "Be kind.", "temperature": 0.3}
    member |= {"top_k": 7, "top_p": 0.8, "examples": [["Hello.", "Yes?"]]}
    place.write_text(json.dumps([member]))
    model = scripted(lambda request: "I hear you. It is late, so late.")
    chosen = EvaluationSettings(reference=f"pool:{place}/kind", max_tokens=50, temperature=1.0, sentence_after=3)
    found = answer(gateway, chosen.reference, SPEECHES, "reference", chosen, (5, None))
    with pytest.raises(KeyError):  # a length that nobody knows is not left open in silence
        answer(gateway, chosen.reference, SPEECHES, "reference", chosen, (5, {}))
    assert set(found.response) == {"I hear you."} and set(found.finish_reason) == {"sentence"}
    for request, speech in zip(model.requests, SPEECHES.speech):
        assert request.messages == find_pool(str(place), 1)[0].messages(speech)
        how = request.decoding
        assert (how.max_tokens, how.temperature, how.top_k, how.top_p, how.seed) == (50, 0.3, 7, 0.8, 5)
    assert gateway.counts[chosen.reference]["label"].startswith("kind of pool")
    before = chat_model(chosen.reference).identity
    place.write_text(json.dumps([member | {"persona": "Be harsh."}]))
    assert chat_model(chosen.reference).identity != before, "another manner is another model"
    rating = rating_request(None, "I am sad.", ["a", "b", "c", "d"])
    line = one_line(lambda: chat_model(chosen.reference).asked(replace(rating, fields={})))
    assert "it answers clients only" in line


def test_a_penalty_and_the_cut_are_part_of_a_calls_name_only_where_they_do_something():
    plain = ChatRequest(({"role": "user", "content": "?"},), Decoding(12))
    names = {replace(plain, decoding=how).key("m") for how in (Decoding(12), Decoding(12, 0.0, 0, 1.0, 0, 1.0, 0))}
    others = {
        replace(plain, decoding=Decoding(12, **how)).key("m")
        for how in ({"sentence_after": 4}, {"repetition_penalty": 1.1})
    }
    assert len(names) == 1 and len(others) == 2 and not names & others
