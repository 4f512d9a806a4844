"""Batches against a provider of the tests' own: nothing ordered twice, whoever is killed and whenever; nothing lost, nothing in a wrong place."""

import asyncio
import collections
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import pytest
from chat_server import message_key, start_server
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.gateway import batches
from psycopref.gateway.batches import BatchModel, cut, read_line, split_lines
from psycopref.gateway.cache import ReplyCache
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


@pytest.fixture
def gateway(tmp_path):
    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))


def again(gateway, **options) -> Gateway:
    """Open the same cache as a later process would."""
    gateway.cache.close()
    return Gateway(ReplyCache(gateway.cache.path), **options)


def open_batch(server, model="any", **options) -> BatchModel:
    return chat_model(f"batch:{model}@{server.base_url}", **QUICK | options)


def ordered(server) -> list[dict]:
    """Return what the provider has of batches, oldest first."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.base_url}/batches?limit=100", timeout=10) as answer:
        return json.load(answer)["data"][::-1]


def sizes(server, before=0) -> list[int]:
    """Say how many lines each batch had that came to be worked on."""
    return [batch["request_counts"]["total"] for batch in ordered(server)[before:] if batch["status"] != "failed"]


def counted(server, requests) -> tuple[collections.Counter, collections.Counter]:
    """Count how often each request was asked and was answered."""
    keys = {message_key(list(request.messages)) for request in requests}
    return tuple(
        collections.Counter(e["key"] for e in server.log() if e["event"] == event and e["key"] in keys)
        for event in ("asked", "answered")
    )


def answered_once(server, requests) -> bool:
    answered = counted(server, requests)[1]
    return len(answered) == len(requests) and set(answered.values()) == {1}


def new_questions(server, n, **keywords) -> list[ChatRequest]:
    """Make questions that this server has not seen."""
    start = len(server.log()) + 1000 * len(ordered(server))
    return [ask(f"{start} {i}", **keywords) for i in range(n)]


# ---- answers ----


def test_each_answer_finds_its_question_and_a_direct_call_finds_it_too(server, gateway):
    schema = {"type": "object", "properties": {"rating": {"type": "integer"}, "rationale": {"type": "string"}}}
    asked = new_questions(server, 30) + new_questions(server, 5, schema=schema, decoding=Decoding(max_tokens=50))
    replies = gateway.ask(open_batch(server), asked)
    direct = Gateway(ReplyCache(gateway.cache.path.with_name("direct.sqlite"))).ask(
        chat_model(server.uri("any")), asked
    )
    assert replies == direct and len({reply.text for reply in replies}) > 30
    seen = len(ordered(server))
    later = again(gateway)
    assert (
        later.ask(chat_model(server.uri("any")), asked[::-1]) == replies[::-1]
        and later.counts[server.uri("any")]["calls"] == 0
    )
    other = Gateway(ReplyCache(gateway.cache.path.with_name("direct.sqlite")))
    assert other.ask(open_batch(server), asked) == direct and len(ordered(server)) == seen, "and the other way round"


def test_a_block_is_cut_into_batches_and_blocks_come_in_order(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "4")
    before, asked = len(ordered(server)), new_questions(server, 15)
    blocks = list(gateway.stream(open_batch(server), [asked[:10], asked[10:11], asked[9:]]))
    assert sorted(sizes(server, before)) == [1, 2, 4, 4, 4] and answered_once(server, asked)
    monkeypatch.delenv("PSYCOPREF_BATCH_REQUESTS")
    assert [*blocks[0], *blocks[2][1:]] == Gateway(ReplyCache(gateway.cache.path.with_name("direct.sqlite"))).ask(
        chat_model(server.uri("any")), asked
    )


@few
@given(st.lists(st.integers(1, 30)), st.integers(1, 5), st.integers(1, 60))
def test_pieces_are_small_enough_in_order_and_no_smaller_than_needed(lines, most_lines, most_bytes):
    pieces = cut(lines, most_lines, most_bytes)
    assert [i for piece in pieces for i in piece] == list(range(len(lines))) and all(pieces)
    assert all(
        len(piece) <= most_lines and (sum(lines[i] for i in piece) <= most_bytes or len(piece) == 1) for piece in pieces
    )
    assert all(
        len(a) == most_lines or sum(lines[i] for i in a) + lines[b[0]] > most_bytes for a, b in zip(pieces, pieces[1:])
    )


@few
@given(st.lists(st.text()), st.integers(1, 9))
def test_lines_end_at_line_feeds_and_nowhere_else(texts, n):
    data = b"".join(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for text in texts)

    async def read():
        async def chunks():
            for start in range(0, len(data), n):
                yield data[start : start + n]

        return [json.loads(line.decode("utf-8", "surrogatepass")) async for line in split_lines(chunks())]

    assert asyncio.run(read()) == texts


@few
@given(st.binary() | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["custom_id", "response", "error", "status_code", "body", "message", "code", "choices"]), x), max_leaves=8).map(lambda x: json.dumps(x).encode()))  # fmt: skip
def test_a_line_of_any_form_is_an_answer_a_failure_or_nothing(line):
    read = read_line(completion_reader(), line)
    assert read is None or isinstance(read[1], ChatReply | Failure)


def test_a_large_file_goes_up_from_the_disk_and_comes_back_whole(server, gateway):
    asked = [
        ChatRequest(({"role": "user", "content": f"{n} {i} " + "é" * 20_000},))
        for i, n in enumerate(new_questions(server, 40))
    ]
    assert all(isinstance(reply, ChatReply) for reply in gateway.ask(open_batch(server), asked))


# ---- what goes wrong with a line ----


def test_failed_lines_are_ordered_again_and_only_they(server, gateway):
    before, asked = len(ordered(server)), new_questions(server, 30)
    replies = gateway.ask(open_batch(server, "flaky"), asked)
    assert sizes(server, before) == [30, 10] and answered_once(server, asked)
    assert replies == gateway.ask(chat_model(server.uri("any")), asked)
    assert gateway.counts[open_batch(server, "flaky").uri]["retries"] == 10


def test_what_expired_is_ordered_again(server, gateway):
    before, asked = len(ordered(server)), new_questions(server, 20)
    assert all(isinstance(reply, ChatReply) for reply in gateway.ask(open_batch(server, "expired"), asked))
    assert (
        sizes(server, before) == [20, 10]
        and ordered(server)[before]["status"] == "expired"
        and answered_once(server, asked)
    )


def test_a_line_without_sense_fails_alone_and_is_not_asked_twice(server, gateway):
    asked = new_questions(server, 5)
    asked[2] = ChatRequest(asked[2].messages, schema={"type": "no type"})
    before = len(ordered(server))
    replies = gateway.ask(open_batch(server), asked)
    assert [type(reply) for reply in replies] == [ChatReply, ChatReply, Failure, ChatReply, ChatReply]
    assert not replies[2].again and replies[2].reason.startswith("400") and sizes(server, before) == [5]


def test_a_cancelled_batch_is_read_and_the_rest_ordered_again(server, gateway, monkeypatch):
    wait, before = BatchModel.wait, len(ordered(server))

    async def cancel_first(self, batch, until):
        batch = await wait(self, batch, until)
        if until is batches.STARTED and len(ordered(server)) == before + 1:
            await self.opened.batches.cancel(batch.id)
        return batch

    monkeypatch.setattr(BatchModel, "wait", cancel_first)
    asked = new_questions(server, 20)
    assert all(isinstance(reply, ChatReply) for reply in gateway.ask(open_batch(server), asked))
    assert sizes(server, before) == [20, 10] and answered_once(server, asked)


class Canned:
    """A provider whose only batch has ended, and whose files are given; None for a file that is gone."""

    def __init__(self, status="completed", output=b"", errors=b""):
        self.contents = {"output": output, "errors": errors}
        self.batch = SimpleNamespace(
            id="batch_1", status=status, created_at=None, output_file_id="output", error_file_id="errors", errors=None
        )
        self.files = SimpleNamespace(
            create=self.create_file, with_streaming_response=SimpleNamespace(content=self.content)
        )
        self.batches = SimpleNamespace(create=self.create)

    async def create_file(self, **arguments):
        return SimpleNamespace(id="file")

    async def create(self, **arguments):
        return self.batch

    def content(self, name):
        self.name = name
        return self

    async def __aenter__(self):
        if self.contents[self.name] is None:
            response = httpx2.Response(404, request=httpx2.Request("GET", "http://127.0.0.1"))
            raise openai.NotFoundError("gone", response=response, body=None)
        return self

    async def __aexit__(self, *error):
        pass

    async def iter_bytes(self):
        yield self.contents[self.name]


def answer_canned(folder, requests, **canned):
    model = chat_model("batch:any@http://127.0.0.1:9/v1")
    model.jobs = ReplyCache(folder / f"{canned.get('status')}.sqlite")

    async def answer():
        model.begin()
        model.opened = Canned(**canned)
        return await model.answer(requests)

    return asyncio.run(answer())


def good_line(request, text="fine"):
    body = {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    line = {
        "custom_id": request.key("openai:any@http://127.0.0.1:9/v1"),
        "response": {"status_code": 200, "body": body},
        "error": None,
    }
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def test_a_question_that_is_in_no_file_may_be_on_the_bill_unless_time_was_up(tmp_path):
    asked = [ask(1), ask(2), ask(3)]
    output = good_line(asked[2], "three\u2028lines") + b"{half a line\n" + good_line(ask("of somebody else"))
    for status, kind, unsure in (
        ("completed", "broken", True),
        ("expired", "refused", False),
        ("cancelled", "refused", False),
    ):
        first, second, third = answer_canned(tmp_path, asked, status=status, output=output)
        assert third.text == "three\u2028lines" and first == second and (first.kind, first.unsure) == (kind, unsure)


def test_files_that_are_gone_are_questions_without_an_answer(tmp_path):
    replies = answer_canned(tmp_path, [ask(1), ask(2)], output=None, errors=None)
    assert [reply.kind for reply in replies] == ["broken", "broken"]


def test_an_answer_goes_before_an_error_and_the_same_question_is_one_line(tmp_path):
    wrong = json.dumps(
        {"custom_id": ask(1).key("openai:any@http://127.0.0.1:9/v1"), "response": {"status_code": 500, "body": {}}}
    ).encode()
    assert [
        reply.text for reply in answer_canned(tmp_path, [ask(1), ask(1)], output=good_line(ask(1)), errors=wrong)
    ] == ["fine", "fine"]


# ---- what goes wrong with a batch ----


def test_a_full_queue_is_tried_again_and_then_said_in_one_line(server, gateway):
    before, asked = len(ordered(server)), new_questions(server, 3)
    replies = gateway.ask(open_batch(server, "rejected", max_retries=1), asked)
    assert [(reply.kind, "\n" in reply.reason) for reply in replies] == [
        ("refused", False)
    ] * 3 and "token_limit_exceeded" in replies[0].reason
    assert len(ordered(server)) == before + 2 and not counted(server, asked)[0]


def test_batches_that_fill_the_queue_wait_for_each_other(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "2")
    before, asked = len(ordered(server)), new_questions(server, 10)
    replies = gateway.ask(open_batch(server, "crowded", max_retries=0), asked)
    assert all(isinstance(reply, ChatReply) for reply in replies), "without a second attempt of the gateway's"
    assert (
        any(batch["status"] == "failed" for batch in ordered(server)[before:])
        and sizes(server, before) == [2] * 5
        and answered_once(server, asked)
    )


def test_a_batch_that_is_wrong_is_one_line_and_not_remembered(server, gateway, monkeypatch):
    asked = new_questions(server, 3)
    monkeypatch.setattr(batches, "ENDPOINT", "/v1/embeddings")
    message = one_line(lambda: gateway.ask(open_batch(server), asked))
    assert "400" in message, "the endpoint is refused at once"
    line = batches.write_line
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(batches, "write_line", lambda key, body: line(key, body).replace(b"POST", b"GET"))
    message = one_line(lambda: gateway.ask(open_batch(server), asked))
    assert "url_mismatch" in message and "line 1" in message and "nothing was spent" in message
    monkeypatch.setattr(batches, "write_line", line)
    assert all(isinstance(reply, ChatReply) for reply in again(gateway).ask(open_batch(server), asked))


def test_a_server_without_batches_is_one_line(server, gateway):
    model = chat_model(f"batch:any@{server.base_url}/elsewhere")
    assert f"use openai:any@{server.base_url}/elsewhere" in one_line(lambda: gateway.ask(model, [ask(1)]))


def test_a_server_that_is_away_while_a_batch_is_under_way_loses_nothing(tmp_path, gateway):
    kept, asked, found = (
        {"state": tmp_path / "state.sqlite", "log": tmp_path / "calls.jsonl"},
        [ask(n) for n in range(10)],
        [],
    )
    with start_server(tmp_path, batch_seconds=60, **kept) as server:
        model = open_batch(server)
        thread = threading.Thread(target=lambda: found.extend(gateway.ask(model, asked)))
        thread.start()
        waited = threading.Event()
        while not ordered(server):
            waited.wait(0.02)
        server.stop()
    waited.wait(0.2)
    with start_server(tmp_path, batch_seconds=0.1, port=server.port, **kept) as server:
        thread.join(30)
        assert len(found) == 10 and all(isinstance(reply, ChatReply) for reply in found)
        assert len(ordered(server)) == 1 and set(counted(server, asked)[1].values()) == {1}


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
    assert all(isinstance(reply, ChatReply) for reply in gateway.ask(model, asked))
    assert len(lost) == 3 and sizes(server, before) == [5, 5, 5] and answered_once(server, asked)


# ---- money ----


@pytest.fixture
def openai_server(server, monkeypatch):
    """The same server in OpenAI's place, so that prices hold."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
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


def test_an_interrupted_wait_is_booked_when_it_is_read_and_not_before(openai_server, gateway, monkeypatch):
    before, asked, waiting, wait = (
        len(ordered(openai_server)),
        new_questions(openai_server, 10),
        threading.Event(),
        BatchModel.wait,
    )

    async def forever(self, batch, until):
        waiting.set()
        await asyncio.sleep(60)

    def interrupt():
        assert waiting.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(BatchModel, "wait", forever)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Gateway(gateway.cache, 100.0).ask(chat_model("batch:gpt-4o-mini", **QUICK), asked)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert gateway.cache.spent() == 0.0
    monkeypatch.setattr(BatchModel, "wait", wait)
    later = again(gateway, budget_usd=100.0)
    replies = later.ask(model := chat_model("batch:gpt-4o-mini", **QUICK), asked)
    assert (
        sizes(openai_server, before) == [10]
        and later.cache.spent() == pytest.approx(sum(map(model.cost, replies)))
        and answered_once(openai_server, asked)
    )


def test_the_key_is_nowhere_but_in_the_header(openai_server, gateway, tmp_path, capfd):
    replies = Gateway(gateway.cache, 100.0).ask(
        chat_model("batch:gpt-4o-mini", **QUICK), new_questions(openai_server, 3)
    )
    seen = repr(replies) + "".join(capfd.readouterr())
    assert KEY not in seen and not any(
        KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert not any(KEY in json.dumps(batch) for batch in ordered(openai_server))


# ---- kills ----

CHILD = """
import json, os, signal, sys
from psycopref.gateway import batches
from psycopref.gateway import cache
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.gateway.gateway import Gateway, chat_model

point, nth, uri, path, texts = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], json.loads(sys.argv[5])
left = [nth]

def die():
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when=lambda *a: True):
    real = getattr(owner, name)
    def wrapped(*a, **k):
        if when(*a):
            die()
        return real(*a, **k)
    setattr(owner, name, wrapped)

def after(owner, name, when=lambda *a: True):
    real = getattr(owner, name)
    def wrapped(*a, **k):
        found = real(*a, **k)
        if when(*a):
            die()
        return found
    setattr(owner, name, wrapped)

async def read(self, batch, asked, real=batches.BatchModel.read):
    found = await real(self, batch, asked)
    die()
    return found

an_id = lambda self, rows: any(id.startswith("batch_") for id in rows.values())
{"noted": lambda: before(batches.BatchModel, "create"),
 "created": lambda: before(cache.ReplyCache, "keep_jobs", an_id),
 "ordered": lambda: after(cache.ReplyCache, "keep_jobs", an_id),
 "waiting": lambda: before(batches.BatchModel, "wait", lambda self, batch, until: until is batches.ENDED),
 "read": lambda: setattr(batches.BatchModel, "read", read),
 "dropped": lambda: after(cache.ReplyCache, "drop_jobs"),
 "kept": lambda: after(cache.ReplyCache, "keep", lambda self, done: any(entry[0] for entry in done))}[point]()
asked = [ChatRequest(({"role": "user", "content": text},)) for text in texts]
Gateway(ReplyCache(path)).ask(chat_model(uri, poll=(0.02, 0.05)), asked)
"""


def kill_at(point, nth, model, path, asked, **environment):
    texts = [request.messages[0]["content"] for request in asked]
    done = subprocess.run([sys.executable, "-c", CHILD, point, str(nth), model.uri, str(path), json.dumps(texts)],
                          env=os.environ | environment, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    "point, nth",
    [
        ("noted", 1),
        ("created", 1),
        ("ordered", 1),
        ("waiting", 1),
        ("read", 1),
        ("dropped", 1),
        ("kept", 1),
        ("created", 2),
        ("read", 2),
    ],
)
def test_whenever_it_is_killed_nothing_is_ordered_twice(server, tmp_path, point, nth):
    before, asked, path = len(ordered(server)), new_questions(server, 12), tmp_path / "replies.sqlite"
    kill_at(point, nth, open_batch(server, "flaky"), path, asked)
    replies = Gateway(ReplyCache(path)).ask(open_batch(server, "flaky"), asked)
    assert all(isinstance(reply, ChatReply) for reply in replies)
    assert sizes(server, before) == [12, 4] and answered_once(server, asked)


def test_orders_under_way_are_found_whatever_is_asked_beside_them(server, tmp_path, monkeypatch):
    before, asked, path = len(ordered(server)), new_questions(server, 31), tmp_path / "replies.sqlite"
    kill_at("ordered", 2, open_batch(server, "flaky"), path, asked[:12])  # eight are kept, four ordered again
    kill_at("ordered", 1, open_batch(server, "flaky"), path, asked[12:30])
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "7")  # other groups than before, if it were not for the orders
    replies = Gateway(ReplyCache(path)).ask(open_batch(server, "flaky"), asked[::-1])
    assert all(isinstance(reply, ChatReply) for reply in replies) and answered_once(server, asked)
    assert sizes(server, before)[:3] == [12, 4, 18] and sorted(sizes(server, before)[3:]) == [1, 1, 6]


def test_one_that_waited_for_the_queue_is_found_too(server, tmp_path, monkeypatch):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", "2")
    kill_at(
        "created", 4, open_batch(server, "crowded"), path, asked
    )  # three orders, two find the queue full, one of them is ordered again
    assert all(
        isinstance(reply, ChatReply) for reply in Gateway(ReplyCache(path)).ask(open_batch(server, "crowded"), asked)
    )
    assert sizes(server, before) == [2, 2, 2] and answered_once(server, asked)


def test_a_server_of_our_own_that_forgot_its_batches_is_asked_anew(tmp_path, gateway):
    asked = [ask(n) for n in range(4)]
    with start_server(tmp_path, batch_seconds=60) as server:
        kill_at("ordered", 1, open_batch(server), gateway.cache.path, asked)
    with start_server(tmp_path, batch_seconds=0.1, port=server.port) as server:
        assert all(isinstance(reply, ChatReply) for reply in gateway.ask(open_batch(server), asked)) and sizes(
            server
        ) == [4]


# ---- asked again on purpose ----


def test_a_reply_that_is_forgotten_is_ordered_anew_each_time(server, gateway):
    asked = new_questions(server, 6)
    before, model = len(ordered(server)), open_batch(server)
    gateway.ask(model, asked)
    for _ in range(2):
        gateway = again(gateway)
        gateway.cache.forget([asked[3].key(model.identity)])
        gateway.ask(open_batch(server), asked)
    assert sizes(server, before) == [6, 1, 1]


def test_also_when_the_first_process_was_killed_right_after_keeping(server, tmp_path):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    model = open_batch(server)
    kill_at("kept", 1, model, path, asked)
    cache = ReplyCache(path)
    cache.forget([asked[3].key(model.identity)])
    Gateway(cache).ask(model, asked)
    assert sizes(server, before) == [6, 1]


def test_live_fetches_first_what_nobody_read_and_then_orders_everything_again(server, tmp_path):
    before, asked, path = len(ordered(server)), new_questions(server, 6), tmp_path / "replies.sqlite"
    kill_at("waiting", 1, open_batch(server), path, asked)
    for orders in ([6], [6, 6], [6, 6, 6]):
        replies = Gateway(ReplyCache(path), calls="live").ask(open_batch(server), asked)
        assert all(isinstance(reply, ChatReply) for reply in replies) and sizes(server, before) == orders


def test_replay_orders_nothing(server, gateway):
    before = len(ordered(server))
    replayed = Gateway(gateway.cache, calls="replay")
    assert (
        "PSYCOPREF_CALLS=record" in one_line(lambda: replayed.ask(open_batch(server), new_questions(server, 3)))
        and len(ordered(server)) == before
    )


# ---- settings ----


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_bad_number_of_requests_is_one_line(server, gateway, monkeypatch, text):
    monkeypatch.setenv("PSYCOPREF_BATCH_REQUESTS", text)
    assert "PSYCOPREF_BATCH_REQUESTS" in one_line(lambda: gateway.ask(open_batch(server), [ask(1)]))


def test_a_model_without_a_price_or_a_key_is_one_line(gateway):
    assert "batch:gpt-17" in one_line(lambda: chat_model("batch:gpt-17"))
    assert "OPENAI_API_KEY" in one_line(lambda: Gateway(gateway.cache, 100.0).ask(chat_model("batch:gpt-4o"), [ask(1)]))


def test_importing_it_stays_light():
    code = "import sys, psycopref.gateway.batches; print(sorted({'openai', 'httpx2', 'aiohttp', 'pandas', 'torch'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        ).stdout.strip()
        == "[]"
    )
