"""Batches against a provider of the tests' own: nothing ordered twice, whoever is killed and whenever; nothing lost."""

import asyncio
import collections
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import openai
import pytest
from chat_server import message_key, start_server
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.gateway import batches, servers
from psycopref.gateway.batches import BatchModel, cut, read_line
from psycopref.gateway.cache import ReplyCache
from psycopref.core.settings import StudyError
from psycopref.models.chat import ChatReply, ChatRequest, Failure
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.models.generation import Decoding
from psycopref.gateway.servers import completion_reader

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
QUICK = {"poll": (0.02, 0.05)}
KEY = "sk-planted-0123456789abcdef"


def ask(n, **keywords):
    return ChatRequest(({"role": "user", "content": f"Question {n}"},), **keywords)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("server"), batch_seconds=0.15, latency=0) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PSYCOPREF_BATCH_REQUESTS", raising=False)


def again(gateway, **options) -> Gateway:
    """Open the same cache as a later process would."""
    gateway.cache.close()
    return Gateway(ReplyCache(gateway.cache.path), **options)


def all_answered(gateway, model, asked) -> list[ChatReply]:
    replies = gateway.ask(model, asked)
    assert all(isinstance(reply, ChatReply) for reply in replies)
    return replies


def answer_directly(server, gateway, asked) -> list[ChatReply]:
    """Answer by single calls, with a cache of their own."""
    return Gateway(ReplyCache(gateway.cache.path.with_name("direct.sqlite"))).ask(chat_model(server.uri("any")), asked)


def open_batch(server, model="any", **options) -> BatchModel:
    return chat_model(f"batch:{model}@{server.base_url}", **QUICK | options)


def ordered(server) -> list[dict]:
    """Return what the provider has of batches, oldest first."""
    return server.read("/v1/batches?limit=100")["data"][::-1]


def sizes(server, before=0) -> list[int]:
    """Say how many lines each batch had that came to be worked on."""
    return [batch["request_counts"]["total"] for batch in ordered(server)[before:] if batch["status"] != "failed"]


def counted(server, requests, event="answered") -> collections.Counter:
    """Count how often each request was answered, or asked."""
    keys = {message_key(list(request.messages)) for request in requests}
    return collections.Counter(e["key"] for e in server.log() if e["event"] == event and e["key"] in keys)


def answered_once(server, requests) -> bool:
    return sorted(counted(server, requests).values()) == [1] * len(requests)


def new_questions(server, n, **keywords) -> list[ChatRequest]:
    """Make questions that this server has not seen."""
    start = len(server.log()) + 1000 * len(ordered(server))
    return [ask(f"{start} {i}", **keywords) for i in range(n)]


# ---- answers ----


def test_each_answer_finds_its_question_and_a_direct_call_finds_it_too(server, gateway):
    schema = {"type": "object", "properties": {"rating": {"type": "integer"}, "rationale": {"type": "string"}}}
    asked = new_questions(server, 30) + new_questions(server, 5, schema=schema, decoding=Decoding(max_tokens=50))
    replies, direct = gateway.ask(open_batch(server), asked), answer_directly(server, gateway, asked)
    assert replies == direct and len({reply.text for reply in replies}) > 30
    seen, later = len(ordered(server)), again(gateway)
    assert later.ask(chat_model(server.uri("any")), asked[::-1]) == replies[::-1]
    assert later.counts[server.uri("any")]["calls"] == 0
    other = Gateway(ReplyCache(gateway.cache.path.with_name("direct.sqlite")))
    assert other.ask(open_batch(server), asked) == direct and len(ordered(server)) == seen, "and the other way round"


def test_a_block_is_cut_into_batches_and_blocks_come_in_order(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "4")
    before, asked = len(ordered(server)), new_questions(server, 15)
    blocks = list(gateway.stream(open_batch(server), [asked[:10], asked[10:11], asked[9:]]))
    assert sorted(sizes(server, before)) == [1, 2, 4, 4, 4] and answered_once(server, asked)
    assert [*blocks[0], *blocks[2][1:]] == answer_directly(server, gateway, asked)


@few
@given(st.lists(st.integers(1, 30)), st.integers(1, 5), st.integers(1, 60))
def test_pieces_are_small_enough_in_order_and_no_smaller_than_needed(lines, most_lines, most_bytes):
    pieces = cut(lines, most_lines, most_bytes)
    assert [i for piece in pieces for i in piece] == list(range(len(lines))) and all(pieces)
    weights = [sum(lines[i] for i in piece) for piece in pieces]
    assert all(len(p) <= most_lines and (w <= most_bytes or len(p) == 1) for p, w in zip(pieces, weights))
    fuller = [w + lines[b[0]] > most_bytes for w, b in zip(weights, pieces[1:])]
    assert all(full or len(p) == most_lines for full, p in zip(fuller, pieces))


names = st.sampled_from("custom_id response error status_code body message code choices".split())
values = st.none() | st.booleans() | st.integers() | st.text()
values = st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=8)


@few
@given(st.binary() | values.map(lambda value: json.dumps(value).encode()))
def test_a_line_of_any_form_is_an_answer_a_failure_or_nothing(line):
    read = read_line(completion_reader(), line)
    assert read is None or isinstance(read[1], ChatReply | Failure)


# ---- what goes wrong with a line ----


@pytest.mark.parametrize("fault, lost", [("flaky", 10), ("expired", 15), ("cancelled", 15)])
def test_failed_lines_are_ordered_again_and_only_they(server, gateway, fault, lost):
    before, asked, model = len(ordered(server)), new_questions(server, 30), open_batch(server, fault)
    replies = all_answered(gateway, model, asked)
    assert sizes(server, before) == [30, lost] and answered_once(server, asked)
    assert ordered(server)[before]["status"] == ("completed" if fault == "flaky" else fault)
    assert gateway.counts[model.uri]["retries"] == lost and replies == answer_directly(server, gateway, asked)


def test_a_line_without_sense_fails_alone_and_is_not_asked_twice(server, gateway):
    asked = new_questions(server, 5)
    asked[2] = ChatRequest(asked[2].messages, schema={"type": "no type"})
    before = len(ordered(server))
    replies = gateway.ask(open_batch(server), asked)
    assert [type(reply) for reply in replies] == [ChatReply, ChatReply, Failure, ChatReply, ChatReply]
    assert not replies[2].again and replies[2].reason.startswith("400") and sizes(server, before) == [5]


def answer_canned(folder, requests, status, **files):
    """Answer by a provider whose only batch has ended so. files: what output and errors hold, None where gone."""
    names = {"output_file_id": "output", "error_file_id": "errors"}
    batch = SimpleNamespace(id="batch_1", status=status, created_at=None, errors=None, **names)

    async def create(**arguments):
        return batch

    async def content(name):
        if files[name] is None:
            response = httpx2.Response(404, request=httpx2.Request("GET", "http://127.0.0.1"))
            raise openai.NotFoundError("gone", response=response, body=None)
        return SimpleNamespace(content=files[name])

    async def answer():
        model.begin()
        opened = {"files": SimpleNamespace(create=create, content=content), "batches": SimpleNamespace(create=create)}
        model.opened = SimpleNamespace(**opened)
        return await model.answer(requests)

    model = chat_model("batch:any@http://127.0.0.1:9/v1")
    model.jobs = ReplyCache(folder / f"{status}.sqlite")
    return asyncio.run(answer())


def line_of(request, text="fine", status=200) -> bytes:
    body = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    key, response = request.key("openai:any@http://127.0.0.1:9/v1"), {"status_code": status, "body": body}
    return json.dumps({"custom_id": key, "response": response, "error": None}, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("status, kind", [("completed", "broken"), ("expired", "refused"), ("cancelled", "refused")])
def test_a_question_that_is_in_no_file_may_be_on_the_bill_unless_time_was_up(tmp_path, status, kind):
    asked = [ask(1), ask(2), ask(3), ask(3)]
    output = line_of(asked[2], "three\u2028lines") + b"{half a line\n" + line_of(ask("of somebody else"))
    errors = line_of(asked[2], status=500)  # an answer goes before an error
    first, second, *third = answer_canned(tmp_path, asked, status, output=output, errors=errors)
    assert [reply.text for reply in third] == ["three\u2028lines"] * 2 and first == second
    assert (first.kind, first.unsure) == (kind, status == "completed")


def test_files_that_are_gone_are_questions_without_an_answer(tmp_path):
    replies = answer_canned(tmp_path, [ask(1), ask(2)], "completed", output=None, errors=None)
    assert [reply.kind for reply in replies] == ["broken", "broken"]


# ---- what goes wrong with a batch ----


def test_a_full_queue_is_tried_again_and_then_said_in_one_line(server, gateway):
    before, asked = len(ordered(server)), new_questions(server, 3)
    replies = gateway.ask(open_batch(server, "rejected", max_retries=1), asked)
    assert [(reply.kind, "\n" in reply.reason) for reply in replies] == [("refused", False)] * 3
    assert "token_limit_exceeded" in replies[0].reason
    assert len(ordered(server)) == before + 2 and not counted(server, asked, "asked")


def test_batches_that_fill_the_queue_wait_for_each_other(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "2")
    before, asked = len(ordered(server)), new_questions(server, 10)
    all_answered(gateway, open_batch(server, "crowded-1"), asked)
    assert sizes(server, before) == [2] * 5 and answered_once(server, asked)


def test_a_batch_that_is_wrong_is_one_line_and_not_remembered(server, gateway, monkeypatch):
    asked = new_questions(server, 3)
    monkeypatch.setattr(batches, "ENDPOINT", "/v1/embeddings")
    message = one_line(lambda: gateway.ask(open_batch(server), asked))
    assert "400" in message, "the endpoint is refused at once"
    line = batches.write_line
    monkeypatch.setattr(batches, "ENDPOINT", "/v1/chat/completions")
    monkeypatch.setattr(batches, "write_line", lambda key, body: line(key, body).replace(b"POST", b"GET"))
    message = one_line(lambda: gateway.ask(open_batch(server), asked))
    assert "url_mismatch" in message and "line 1" in message and "nothing was spent" in message
    monkeypatch.setattr(batches, "write_line", line)
    all_answered(again(gateway), open_batch(server), asked)


def test_a_server_without_batches_is_one_line(server, gateway):
    model = chat_model(f"batch:any@{server.base_url}/elsewhere")
    assert f"use openai:any@{server.base_url}/elsewhere" in one_line(lambda: gateway.ask(model, [ask(1)]))


def test_a_server_that_is_away_while_a_batch_is_under_way_loses_nothing(tmp_path, gateway):
    kept, asked = {"state": tmp_path / "state.sqlite", "log": tmp_path / "calls.jsonl"}, [ask(n) for n in range(10)]
    with ThreadPoolExecutor(1) as pool:
        with start_server(tmp_path, batch_seconds=600, **kept) as server:
            found = pool.submit(gateway.ask, open_batch(server), asked)
            while not gateway.cache.db.execute("SELECT 1 FROM jobs WHERE id LIKE 'batch_%'").fetchone():
                time.sleep(0.02)
            server.stop()
        time.sleep(0.2)  # the client finds nobody
        with start_server(tmp_path, batch_seconds=0.1, port=server.port, **kept) as server:
            assert all(isinstance(reply, ChatReply) for reply in found.result(120))
            assert len(ordered(server)) == 1 and answered_once(server, asked)


def test_a_lost_answer_to_an_order_does_not_order_twice(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "5")
    open_client, lost = BatchModel.open_client, []

    def open_losing(self):
        client = open_client(self)
        create = client.batches.create

        async def lose(**arguments):
            lost.append(await create(**arguments))
            raise openai.APIConnectionError(request=None)

        client.batches.create = lose
        return client

    monkeypatch.setattr(BatchModel, "open_client", open_losing)
    before, asked, model = len(ordered(server)), new_questions(server, 15), open_batch(server)
    model.concurrency = 1  # the list is read once more for each
    all_answered(gateway, model, asked)
    assert len(lost) == 3 and sizes(server, before) == [5, 5, 5] and answered_once(server, asked)


# ---- money ----


@pytest.fixture
def openai_server(server, monkeypatch):
    """The same server in OpenAI's place, so that prices hold."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(servers, "OPENAI", server.base_url)
    return server


def test_without_the_money_nothing_is_uploaded(openai_server, gateway):
    before = len(ordered(openai_server))
    model = chat_model("batch:gpt-4o-mini", **QUICK)
    asked = new_questions(openai_server, 10)
    poor = Gateway(gateway.cache, sum(map(model.most, asked)) * 0.99)
    assert "budget" in one_line(lambda: poor.ask(model, asked)) and len(ordered(openai_server)) == before
    enough = Gateway(gateway.cache, sum(map(model.most, asked)) * 1.01)
    replies = enough.ask(chat_model("batch:gpt-4o-mini", **QUICK), asked)
    direct = chat_model("openai:gpt-4o-mini")
    assert gateway.cache.spent() == pytest.approx(sum(map(direct.cost, replies)) / 2) and gateway.cache.spent() > 0


def test_after_a_model_s_end_what_was_ordered_is_fetched_and_nothing_is_ordered(openai_server, gateway, monkeypatch):
    def at(year):
        return chat_model("batch:gpt-4o-mini-2024-07-18", **QUICK, today=lambda: datetime.date(year, 1, 14))

    async def stop(self, batch, until):
        raise StudyError("stopped")

    before, asked, wait = len(ordered(openai_server)), new_questions(openai_server, 4), BatchModel.wait
    monkeypatch.setattr(BatchModel, "wait", stop)
    assert one_line(lambda: Gateway(gateway.cache, 1.0).ask(at(2026), asked)) == "stopped"
    monkeypatch.setattr(BatchModel, "wait", wait)
    later = again(gateway, budget_usd=1.0)
    all_answered(later, at(2027), asked)
    assert "was shut down" in one_line(lambda: later.ask(at(2027), new_questions(openai_server, 2)))
    assert sizes(openai_server, before) == [4]


def test_an_interrupted_wait_is_booked_when_it_is_read_and_not_before(openai_server, gateway, monkeypatch):
    before, asked = len(ordered(openai_server)), new_questions(openai_server, 10)
    waiting, wait = threading.Event(), BatchModel.wait

    async def forever(self, batch, until):
        waiting.set()
        await asyncio.Event().wait()

    def interrupt():
        assert waiting.wait(120)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(BatchModel, "wait", forever)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        Gateway(gateway.cache, 100.0).ask(chat_model("batch:gpt-4o-mini", **QUICK), asked)
    assert gateway.cache.spent() == 0.0
    monkeypatch.setattr(BatchModel, "wait", wait)
    later = again(gateway, budget_usd=100.0)
    replies = later.ask(model := chat_model("batch:gpt-4o-mini", **QUICK), asked)
    assert sizes(openai_server, before) == [10] and answered_once(openai_server, asked)
    assert later.cache.spent() == pytest.approx(sum(map(model.cost, replies)))


def test_the_key_is_nowhere_but_in_the_header(openai_server, gateway, tmp_path, capfd):
    paid, asked = Gateway(gateway.cache, 100.0), new_questions(openai_server, 3)
    seen = repr(all_answered(paid, chat_model("batch:gpt-4o-mini", **QUICK), asked)) + "".join(capfd.readouterr())
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in seen + json.dumps(ordered(openai_server)) and KEY.encode() not in files


# ---- kills ----

CHILD = """
import json, os, signal, sys
from psycopref.gateway import batches, cache
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.gateway.gateway import Gateway, chat_model

point, nth, uri, path, texts = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], json.loads(sys.argv[5])
left = [nth]

def die():
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

def at(owner, name, when=lambda *a: True, after=False):
    real = getattr(owner, name)
    def wrapped(*a, **k):
        if not after and when(*a):
            die()
        found = real(*a, **k)
        if after and when(*a):
            die()
        return found
    setattr(owner, name, wrapped)

async def read(self, batch, asked, real=batches.BatchModel.read):
    found = await real(self, batch, asked)
    die()
    return found

an_id = lambda self, rows: any(id.startswith("batch_") for id in rows.values())
{"noted": lambda: at(batches.BatchModel, "create"),
 "created": lambda: at(cache.ReplyCache, "keep_jobs", an_id),
 "ordered": lambda: at(cache.ReplyCache, "keep_jobs", an_id, after=True),
 "waiting": lambda: at(batches.BatchModel, "wait", lambda self, batch, until: until is batches.ENDED),
 "read": lambda: setattr(batches.BatchModel, "read", read),
 "dropped": lambda: at(cache.ReplyCache, "drop_jobs", after=True),
 "kept": lambda: at(cache.ReplyCache, "keep", lambda self, done: any(entry[0] for entry in done), after=True)}[point]()
asked = [ChatRequest(({"role": "user", "content": text},)) for text in texts]
Gateway(ReplyCache(path)).ask(chat_model(uri, poll=(0.02, 0.05)), asked)
"""


def kill_at(point, nth, model, path, asked, **environment):
    texts = [request.messages[0]["content"] for request in asked]
    done = subprocess.run([sys.executable, "-c", CHILD, point, str(nth), model.uri, str(path), json.dumps(texts)],
                          env=os.environ | environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


POINTS = [(point, 1) for point in ("noted", "created", "ordered", "waiting", "read", "dropped", "kept")]


@pytest.mark.parametrize("point, nth", [*POINTS, ("created", 2), ("read", 2)])
def test_whenever_it_is_killed_nothing_is_ordered_twice(server, tmp_path, point, nth):
    before, asked, path = len(ordered(server)), new_questions(server, 12), tmp_path / "replies.sqlite"
    kill_at(point, nth, open_batch(server, "flaky"), path, asked)
    all_answered(Gateway(ReplyCache(path)), open_batch(server, "flaky"), asked)
    assert sizes(server, before) == [12, 4] and answered_once(server, asked)


def test_orders_under_way_are_found_whatever_is_asked_beside_them(server, tmp_path, monkeypatch):
    before, asked, path = len(ordered(server)), new_questions(server, 31), tmp_path / "replies.sqlite"
    kill_at("ordered", 2, open_batch(server, "flaky"), path, asked[:12])  # eight are kept, four ordered again
    kill_at("ordered", 1, open_batch(server, "flaky"), path, asked[12:30])
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "7")  # other groups than before, if it were not for the orders
    all_answered(Gateway(ReplyCache(path)), open_batch(server, "flaky"), asked[::-1])
    assert answered_once(server, asked)
    assert sizes(server, before)[:3] == [12, 4, 18] and sorted(sizes(server, before)[3:]) == [1, 1, 6]


def test_one_that_waited_for_the_queue_is_found_too(server, tmp_path, monkeypatch):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "2")
    # three orders, at least one finds the queue full and is ordered again
    kill_at("created", 4, open_batch(server, "crowded-2"), path, asked)
    all_answered(Gateway(ReplyCache(path)), open_batch(server, "crowded-2"), asked)
    assert sizes(server, before) == [2, 2, 2] and answered_once(server, asked)


def test_of_two_batches_of_one_order_the_newest_is_taken():
    async def listed(limit):
        for name in ("new", "old"):
            facts = {"created_at": None, "status": "completed", "output_file_id": "file"}
            yield SimpleNamespace(id=name, metadata={"psycopref": "order"}, **facts)

    model = chat_model("batch:any@http://127.0.0.1:9/v1")
    model.opened = SimpleNamespace(batches=SimpleNamespace(list=listed))
    assert asyncio.run(model.list_orders())["order"].id == "new"


def test_a_server_of_our_own_that_forgot_its_batches_is_asked_anew(tmp_path, gateway):
    asked = [ask(n) for n in range(4)]
    with start_server(tmp_path, batch_seconds=600) as server:
        kill_at("ordered", 1, open_batch(server), gateway.cache.path, asked)
    with start_server(tmp_path, batch_seconds=0.1, port=server.port) as server:
        all_answered(gateway, open_batch(server), asked)
        assert sizes(server) == [4]


# ---- asked again on purpose ----


@pytest.mark.parametrize("killed", [False, True], ids=["", "also after a kill right behind keeping"])
def test_a_reply_that_is_forgotten_is_ordered_anew_each_time(server, tmp_path, killed):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    if killed:
        kill_at("kept", 1, open_batch(server), path, asked)
    else:
        Gateway(ReplyCache(path)).ask(open_batch(server), asked)
    for _ in range(2):
        gateway, model = Gateway(ReplyCache(path)), open_batch(server)
        gateway.cache.forget([asked[3].key(model.identity)])
        all_answered(gateway, model, asked)
        gateway.cache.close()
    assert sizes(server, before) == [6, 1, 1]


def test_live_fetches_first_what_nobody_read_and_then_orders_everything_again(server, tmp_path):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    kill_at("waiting", 1, open_batch(server), path, asked)
    for orders in ([6], [6, 6], [6, 6, 6]):
        all_answered(Gateway(ReplyCache(path), calls="live"), open_batch(server), asked)
        assert sizes(server, before) == orders


# ---- settings ----


@pytest.mark.parametrize("provider", ["batch", "openai"])
def test_a_model_without_a_key_is_one_line(gateway, provider):
    paid = Gateway(gateway.cache, 100.0)
    assert "OPENAI_API_KEY" in one_line(lambda: paid.ask(chat_model(f"{provider}:gpt-4o"), [ask(1)]))
