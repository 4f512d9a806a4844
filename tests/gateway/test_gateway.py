"""The gateway against a server that answers, stalls, refuses and lies: nothing asked twice, nothing overspent, nothing leaked."""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, ChatRequest, Failure, FreeModel
from psycopref.core.stages import Run
from psycopref.core.settings import StudyError
from psycopref.gateway.gateway import Gateway, chat_model, open_gateway
from psycopref.models.generation import Decoding
from psycopref.gateway.servers import OpenAIModel, prices

from refusals import one_line

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
KEY = "sk-planted-0123456789abcdef"


def ask(text="Hello", **keywords):
    return ChatRequest(({"role": "user", "content": text},), **keywords)


# ---- a server that speaks the chat completions protocol ----


def completion(text="fine", finish_reason="stop", usage=(5, 2), **changed):
    """One good body; `changed` replaces its parts."""
    counts = usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": counts,
    } | changed


def error(status, message="no"):
    return status, {"error": {"message": message, "type": "x", "code": None}}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, 1 << 16

    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with state.lock:
            attempt = sum(seen == text for seen in state.log)
            state.log.append(text)
            state.bodies.append(body)
            state.headers.append({name.lower(): value for name, value in self.headers.items()})
            state.flying += 1
            state.most = max(state.most, state.flying)
        try:
            status, content = state.behave(text, attempt)
        finally:
            with state.lock:
                state.flying -= 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", state.content_type)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client went away
        with state.lock:
            state.answered.append(text)

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 512  # connections that may wait to be taken

    def handle_error(self, request, address):
        pass


@pytest.fixture
def server(monkeypatch):
    """Set `server.behave(text, attempt) -> (status, body)`; read `server.log`, the last message of every request in order."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = SimpleNamespace(lock=threading.Lock(), log=[], bodies=[], headers=[], answered=[], flying=0, most=0,
                            content_type="application/json", behave=lambda text, attempt: completion(f"re: {text}"))  # fmt: skip
    http = Server(("127.0.0.1", 0), Handler)
    http.state = state
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.uri = f"openai:some/model@http://127.0.0.1:{http.server_port}/v1"
    state.model = lambda **options: chat_model(state.uri, **{"max_retries": 1, "timeout": 5, **options})
    yield state
    http.shutdown()
    http.server_close()
    thread.join(5)


@pytest.fixture
def gateway(tmp_path):
    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))


def again(gateway, budget_usd=0.0) -> Gateway:
    """Open the same cache as a later process would."""
    gateway.cache.db.close()
    return Gateway(ReplyCache(gateway.cache.path), budget_usd)


# ---- answers ----


def test_an_answer_with_its_counts(server, gateway):
    [reply] = gateway.ask(
        server.model(), [ask("Hello", decoding=Decoding(7, 0.5, top_k=3, top_p=0.9, seed=4), schema={"type": "object"})]
    )
    assert reply == ChatReply("re: Hello", "stop", 5, 2)
    assert gateway.models() == {
        server.uri: {
            "label": "some/model",
            "calls": 1,
            "cached": 0,
            "failed": 0,
            "retries": 0,
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "usd": 0.0,
        }
    }
    [sent] = server.bodies
    assert (sent["model"], sent["messages"]) == ("some/model", [{"role": "user", "content": "Hello"}])
    assert (sent["max_completion_tokens"], sent["temperature"], sent["top_p"], sent["seed"], sent["top_k"]) == (
        7,
        0.5,
        0.9,
        4,
        3,
    )
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_replies_stand_in_the_order_of_the_requests(server, gateway):
    barrier = threading.Event()

    def behave(text, attempt):
        if text == "0":
            barrier.wait(5)  # the first is answered last
        elif text == "9":
            barrier.set()
        return completion(f"re: {text}")

    server.behave = behave
    asked = [ask(str(n % 10)) for n in range(20)]
    assert [r.text for r in gateway.ask(server.model(), asked)] == [f"re: {n % 10}" for n in range(20)]
    assert sorted(server.log) == [str(n) for n in range(10)], "a repeated question is asked once"


def test_length_is_kept_and_any_other_end_is_a_stop(server, gateway):
    server.behave = lambda text, attempt: completion(text, text)
    replies = gateway.ask(server.model(), [ask("length"), ask("stop"), ask("tool_calls")])
    assert [r.finish_reason for r in replies] == ["length", "stop", "stop"]


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}], ids=["none", "empty", "nulls"]
)
def test_an_answer_without_usage_is_kept(server, gateway, usage):
    status, body = completion()
    server.behave = lambda text, attempt: (status, body | {"usage": usage})
    assert gateway.ask(server.model(), [ask()]) == [ChatReply("fine", "stop", 0, 0)]


def test_too_many_requests_is_tried_again(server, gateway):
    server.behave = lambda text, attempt: error(429) if attempt == 0 else completion(f"re: {text}")
    assert [r.text for r in gateway.ask(server.model(), [ask("a"), ask("b")])] == ["re: a", "re: b"]
    assert sorted(server.log) == ["a", "a", "b", "b"] and gateway.counts[server.uri]["failed"] == 0


FAULTS = {
    "500": lambda: error(500), "429 forever": lambda: error(429), "400": lambda: error(400), "no choices": lambda: completion(choices=[]),
    "null choices": lambda: completion(choices=None), "filtered": lambda: completion("half", "content_filter"), "null content": lambda: completion(None),
    "empty content": lambda: completion(""), "null message": lambda: completion(choices=[{"index": 0, "finish_reason": "stop", "message": None}]),
    "broken JSON": lambda: (200, b'{"choices": [{"mess'), "empty body": lambda: (200, b""), "not an object": lambda: (200, b"[1]"),
    "lone surrogate": lambda: completion("half a face \ud83d"), "choices no list": lambda: completion(choices={"message": "fine"}),
    "text for a message": lambda: completion(choices=[{"index": 0, "finish_reason": "stop", "message": "fine"}]), "content in parts": lambda: completion([{"text": "fine"}]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_answer_is_a_failure_and_the_run_goes_on(server, gateway, fault):
    server.behave = lambda text, attempt: FAULTS[fault]() if text == "bad" else completion(f"re: {text}")
    replies = gateway.ask(server.model(), [ask("a"), ask("bad"), ask("b")])
    assert [r.text for r in (replies[0], replies[2])] == ["re: a", "re: b"]
    assert isinstance(replies[1], Failure) and replies[1].reason and "\n" not in replies[1].reason
    assert gateway.counts[server.uri]["failed"] == 1 and gateway.counts[server.uri]["calls"] == 3
    server.behave = lambda text, attempt: completion("mended")
    later = again(gateway)
    assert [r.text for r in later.ask(server.model(), [ask("a"), ask("bad"), ask("b")])] == [
        "re: a",
        "mended",
        "re: b",
    ], "a failure is not kept"
    assert later.counts[server.uri]["calls"] == 1 and later.counts[server.uri]["cached"] == 2


def test_what_came_instead_is_shown(server, gateway):
    server.behave = lambda text, attempt: completion("half a sentence", "content_filter")
    [failure] = gateway.ask(server.model(), [ask()])
    assert "content_filter" in failure.reason and "half a sentence" in failure.raw


def test_a_page_in_place_of_an_answer_is_one_line(server, gateway):
    server.content_type = "text/html"
    server.behave = lambda text, attempt: (200, b"<html>Welcome to the proxy\n</html>")
    try:
        [reply] = gateway.ask(server.model(), [ask()])
    except StudyError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert isinstance(reply, Failure) and "\n" not in reply.reason


def test_retries_are_bounded(server, gateway):
    server.behave = lambda text, attempt: error(500)
    [reply] = gateway.ask(server.model(max_retries=3), [ask()])
    assert isinstance(reply, Failure) and len(server.log) == 4


def test_a_server_that_never_answers_is_a_failure(server, gateway):
    held = threading.Event()

    def behave(text, attempt):
        if text == "slow":
            held.wait(20)
        return completion(f"re: {text}")

    server.behave = behave
    slow, quick = gateway.ask(server.model(max_retries=0, timeout=0.3), [ask("slow"), ask("quick")])
    held.set()
    assert isinstance(slow, Failure) and "Timeout" in slow.reason and quick.text == "re: quick"


def test_no_server_is_a_failure(gateway):
    [reply] = gateway.ask(chat_model("openai:m@http://127.0.0.1:9/v1", max_retries=0, timeout=2), [ask()])
    assert isinstance(reply, Failure) and "Connection" in reply.reason


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_concerns_every_call_stops_the_run(server, gateway, status):
    server.behave = lambda text, attempt: error(status)
    message = one_line(lambda: gateway.ask(server.model(), [ask(str(n)) for n in range(5)]))
    assert str(status) in message and "some/model" in message


def test_after_a_refusal_the_same_model_can_ask_again(server, gateway):
    model = server.model()
    server.behave = lambda text, attempt: error(401) if text == "3" else completion(f"re: {text}")
    one_line(lambda: gateway.ask(model, [ask(str(n)) for n in range(5)]))
    server.behave = lambda text, attempt: completion(f"re: {text}")
    assert [r.text for r in gateway.ask(model, [ask(str(n)) for n in range(5)])] == [f"re: {n}" for n in range(5)]


# ---- concurrency ----


def test_calls_are_in_flight_together_and_never_too_many(server, gateway):
    four = threading.Barrier(4)

    def behave(text, attempt):
        try:
            four.wait(10)  # each waits for three others: one at a time would never pass
        except threading.BrokenBarrierError:
            return error(500, "alone")
        return completion(f"re: {text}")

    server.behave = behave
    model = server.model(timeout=30, max_retries=0)
    model.concurrency = 4
    replies = gateway.ask(model, [ask(str(n)) for n in range(40)])
    assert [r.text for r in replies] == [f"re: {n}" for n in range(40)] and server.most == 4


def test_the_server_is_asked_by_many_at_once_as_it_comes():
    assert OpenAIModel("m@http://127.0.0.1:9/v1").concurrency >= 16


# ---- nothing twice ----


def test_nothing_is_asked_twice(server, gateway):
    asked = [ask(str(n % 30)) for n in range(60)]
    first = gateway.ask(server.model(), asked[:20])
    later = again(gateway)
    everything = later.ask(server.model(), asked)
    assert everything[:20] == first and sorted(server.log) == sorted({str(n % 30) for n in range(60)})
    assert again(later).ask(server.model(), asked) == everything and len(server.log) == 30
    assert later.counts[server.uri]["calls"] == 10 and later.counts[server.uri]["cached"] == 50


def test_another_model_seed_schema_or_history_is_another_question(server, gateway):
    asked = [ask(), ask(decoding=Decoding(seed=1)), ask(decoding=Decoding(max_tokens=9)), ask(schema={"type": "object"}),
             ChatRequest(({"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}))]  # fmt: skip
    gateway.ask(server.model(), asked)
    assert len(server.log) == 5
    gateway.ask(chat_model(server.uri.replace("some/model", "other"), max_retries=0), [ask()])
    assert len(server.log) == 6 and server.bodies[-1]["model"] == "other"


texts = st.text(max_size=20)


@few
@given(texts, texts, st.integers(1, 99), st.integers(1, 99))
def test_keys_tell_questions_apart(first, second, short, long):
    keys = {ask(t, decoding=Decoding(n)).key(i) for t in {first, second} for n in {short, long} for i in ("a", "b")}
    assert len(keys) == len({first, second}) * len({short, long}) * 2
    assert ask(first).key("a") == ChatRequest(({"content": first, "role": "user"},)).key("a"), (
        "the order of keys says nothing"
    )


@few
@given(
    st.dictionaries(
        texts,
        st.builds(ChatReply, texts, st.sampled_from(["stop", "length"]), st.integers(0, 9), st.integers(0, 9)),
        max_size=5,
    )
)
def test_the_cache_gives_back_what_was_put(tmp_path_factory, replies):
    path = tmp_path_factory.mktemp("cache") / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put(replies)
    cache.db.close()
    cache = ReplyCache(path)
    assert cache.get([*replies, "absent\x00"]) == replies
    cache.db.close()


def test_the_cache_finds_more_keys_than_sqlite_takes_at_once(tmp_path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    many = {str(n): ChatReply(str(n)) for n in range(1203)}
    cache.put(many)
    assert cache.get(list(many)) == many and cache.get([]) == {}


@pytest.mark.parametrize(
    "content",
    [b"not a database, but long enough to look at" * 20, b"SQLite format 3\x00" + b"\xff" * 4096],
    ids=["text", "header"],
)
def test_a_file_that_is_no_cache_is_one_line(tmp_path, content):
    (tmp_path / "replies.sqlite").write_bytes(content)
    assert "replies.sqlite" in one_line(lambda: ReplyCache(tmp_path / "replies.sqlite").get(["a"]))
    assert (tmp_path / "replies.sqlite").read_bytes() == content, "it may hold somebody's paid replies"


def test_a_cache_damaged_further_in_is_one_line(tmp_path):
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put({str(n): ChatReply("x" * 300) for n in range(200)})
    cache.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache.db.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    assert "replies.sqlite" in one_line(lambda: ReplyCache(path).get([str(n) for n in range(200)]))


def test_a_disk_that_is_too_full_for_replies_is_one_line_and_keeps_what_fitted(gateway):
    class Long(FreeModel):
        uri = identity = label = "long"

        async def answer(self, requests):
            return [ChatReply("x" * 3000) for _ in requests]

    asked, model = [ask(str(n)) for n in range(60)], Long()
    gateway.cache.db.execute("PRAGMA max_page_count = 20")
    message = one_line(lambda: gateway.ask(model, asked))
    assert "replies.sqlite" in message and "full" in message
    kept = again(gateway).cache.get([request.key("long") for request in asked])
    assert 5 < len(kept) < 60 and all(reply == ChatReply("x" * 3000) for reply in kept.values())


def test_a_run_has_one_cache(tmp_path):
    gateway = open_gateway(Run("example"), 3.0)
    assert gateway.budget_usd == 3.0 and gateway.cache.path == Run("example").outputs / "cache" / "replies.sqlite"
    assert gateway.cache.path.is_file()


# ---- interruptions ----


def test_what_was_finished_before_an_error_is_kept(server, gateway):
    model = server.model()
    model.concurrency = 1
    server.behave = lambda text, attempt: error(401) if text == "12" else completion(f"re: {text}")
    one_line(lambda: gateway.ask(model, [ask(str(n)) for n in range(40)]))
    assert server.log == [str(n) for n in range(13)], "nothing is sent after the error"
    server.behave = lambda text, attempt: completion(f"re: {text}")
    later = again(gateway)
    assert [r.text for r in later.ask(server.model(), [ask(str(n)) for n in range(40)])] == [
        f"re: {n}" for n in range(40)
    ]
    assert sorted(server.log) == sorted([*map(str, range(40)), "12"]), "only the refused call was asked again"


def test_what_was_finished_is_kept_when_the_provider_breaks(gateway):
    class Breaking(FreeModel):
        uri = identity = label = "breaking"
        seen = []

        async def answer(self, requests):
            self.seen.append(requests[0].messages[0]["content"])
            if len(self.seen) == 5:
                raise ZeroDivisionError
            return [ChatReply("fine") for _ in requests]

    with pytest.raises(ZeroDivisionError):
        gateway.ask(Breaking(), [ask(str(n)) for n in range(9)])
    assert len(again(gateway).ask(Breaking(), [ask(str(n)) for n in range(9)])) == 9
    assert Breaking.seen == [*"01234", *"45678"]


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread only"
)
def test_ctrl_c_stops_asking_and_keeps_what_came(gateway):
    class Slow(FreeModel):
        uri = identity = label = "slow"
        asked = 0

        async def answer(self, requests):
            self.asked += 1
            if self.asked == 10:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.sleep(0.005)
            return [ChatReply("fine") for _ in requests]

    model, asked = Slow(), 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            gateway.ask(model, [ask(str(n)) for n in range(100)])
    finally:
        signal.signal(signal.SIGINT, before)
    while asked != model.asked:  # until nothing moves any more
        asked = model.asked
        time.sleep(0.25)
    assert 10 <= asked < 100, "the calls went on after Ctrl-C"
    kept = sqlite3.connect(gateway.cache.path).execute("SELECT count(*) FROM replies").fetchone()[0]
    assert 9 <= kept <= asked


# ---- budget ----

PRICE = {
    "input": 1e4,
    "output": 1e6,
}  # US dollars for a million tokens: a cent for each byte asked, a dollar for each token answered


def priced(server, **options):
    model = server.model(**options)
    model.price = PRICE
    return model


def bill(server) -> float:
    """What the server would charge for all it was asked, at most."""
    return sum(0.01 * len(b["messages"][-1]["content"].encode()) + b["max_completion_tokens"] for b in server.bodies)


def test_hundreds_of_calls_in_flight_never_pass_the_cap(server, tmp_path):
    cap = 40.3
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), cap)
    server.behave = lambda text, attempt: completion(f"re: {text}", usage=(len(text), 2))
    model = priced(server)
    model.concurrency = 300
    message = one_line(
        lambda: gateway.ask(model, [ask(f"{n:03}", decoding=Decoding(max_tokens=2)) for n in range(400)])
    )
    assert "40.30" in message and bill(server) <= cap and gateway.spent <= cap
    assert not gateway.busy


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_cap_is_used_up_before_it_stops_the_run(server, tmp_path, concurrency):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 40.3)  # 20 calls of 2.01
    server.behave = lambda text, attempt: completion(f"re: {text}", usage=(1, 2))
    model = priced(server)
    model.concurrency = concurrency
    asked = [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(26)]
    one_line(lambda: gateway.ask(model, asked))
    assert bill(server) <= 40.3
    kept = gateway.cache.get([request.key(model.identity) for request in asked])
    assert len(kept) == len(server.log) == 20 and gateway.spent == pytest.approx(20 * 2.01)


def test_a_call_that_was_paid_is_never_asked_again(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 40.3)
    all_there = threading.Event()

    def behave(text, attempt):
        if len(server.log) >= 20:
            all_there.set()
        all_there.wait(1)  # the calls that the cap allows are in flight together
        return completion(f"re: {text}", usage=(1, 2))

    server.behave = behave
    asked = [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(26)]
    one_line(lambda: gateway.ask(priced(server), asked))
    kept = len(gateway.cache.get([request.key(priced(server).identity) for request in asked]))
    assert kept == 20, "what the cap allows is answered and kept"
    assert len(again(gateway, 100.0).ask(priced(server), asked)) == 26
    assert len(server.log) == len(set(server.log)) == 26


def test_what_is_cheaper_than_feared_leaves_room(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 30.0)  # feared: 10.01 for each call; real: 1.01
    server.behave = lambda text, attempt: completion(f"re: {text}", usage=(1, 1))
    model = priced(server)
    model.concurrency = 1
    replies = gateway.ask(model, [ask(chr(65 + n), decoding=Decoding(max_tokens=10)) for n in range(20)])
    assert (
        len(replies) == 20
        and gateway.spent == pytest.approx(20.2)
        and gateway.counts[server.uri]["usd"] == pytest.approx(20.2)
    )


@pytest.mark.parametrize("finish_reason, content", [("length", None), ("content_filter", "half"), ("stop", "")])
def test_an_answer_without_text_costs_what_it_cost(server, tmp_path, finish_reason, content):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 10.0)
    server.behave = lambda text, attempt: completion(
        content, finish_reason, usage=(1, 2)
    )  # the tokens went into thoughts
    model = priced(server)
    model.concurrency = 1
    one_line(lambda: gateway.ask(model, [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(20)]))
    assert len(server.log) == 4 and gateway.spent == pytest.approx(4 * 2.01)


def test_a_paid_answer_without_counts_is_taken_at_its_most(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 10.0)
    server.behave = lambda text, attempt: completion(usage=None)
    one_line(
        lambda: gateway.ask(priced(server), [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(20)])
    )
    assert len(server.log) == 4, "nobody said what was spent, so it may have been all that was reserved"


def test_the_stages_of_a_run_share_one_budget(server):
    first = open_gateway(Run("example"), 10.0)
    server.behave = lambda text, attempt: completion(usage=(1, 2))
    first.ask(priced(server), [ask(letter, decoding=Decoding(max_tokens=2)) for letter in "ABC"])
    assert first.spent == pytest.approx(3 * 2.01)
    second = open_gateway(Run("example"), 10.0)
    one_line(lambda: second.ask(priced(server), [ask(letter, decoding=Decoding(max_tokens=2)) for letter in "DEFG"]))
    assert bill(server) <= 10.0, "each stage spent as if it were the first"
    other = open_gateway(Run("another"), 10.0)
    assert other.spent == 0 and isinstance(
        other.ask(priced(server), [ask("H", decoding=Decoding(max_tokens=2))])[0], ChatReply
    )


def test_a_free_model_needs_no_budget(server, gateway):
    assert isinstance(gateway.ask(server.model(), [ask()])[0], ChatReply)


def test_cached_replies_cost_nothing(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 10.0)
    gateway.ask(priced(server), [ask(decoding=Decoding(max_tokens=2))])
    assert gateway.spent > 0
    later = again(gateway, 0.0)
    assert (
        isinstance(later.ask(priced(server), [ask(decoding=Decoding(max_tokens=2))])[0], ChatReply) and later.spent == 0
    )


@few
@given(st.text(max_size=60), st.integers(1, 4000), st.integers(0, 4000))
def test_a_reply_never_costs_more_than_was_reserved(text, max_tokens, used):
    model = OpenAIModel("gpt-4o-2024-08-06")
    reply = ChatReply("", "stop", len(text.encode()), min(used, max_tokens))  # a token is at least a byte
    assert model.cost(reply) <= model.most(ask(text, decoding=Decoding(max_tokens))) + 1e-12


def test_prices_are_dated_and_positive():
    table = prices()
    assert table["as_of"][:2] == "20" and all(p["input"] > 0 and p["output"] > 0 for p in table["models"].values())


# ---- the key ----


def files_below(folder) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_the_key_of_a_server_goes_there_and_nowhere_else(server, gateway, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    kinds = {
        "good": completion("fine"),
        "server": error(500),
        "filtered": completion("x", "content_filter"),
        "request": error(400),
    }
    server.behave = lambda text, attempt: kinds[text]
    replies = gateway.ask(server.model(), [ask(kind) for kind in kinds])
    assert server.headers[0]["authorization"] == f"Bearer {KEY}", "the key was planted where it is read"
    server.behave = lambda text, attempt: error(401)
    message = one_line(lambda: gateway.ask(server.model(), [ask("refused")]))
    seen = message + repr(replies) + repr(gateway) + json.dumps(gateway.models()) + "".join(capfd.readouterr())
    assert KEY not in seen and KEY.encode() not in files_below(tmp_path) and b"fine" in files_below(tmp_path)


def test_the_key_of_openai_goes_to_no_other_server(server, gateway, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    gateway.ask(server.model(), [ask()])
    assert KEY not in repr(server.headers) and KEY.encode() not in files_below(tmp_path)


def test_the_key_of_openai_is_kept_out_of_files_and_errors(server, gateway, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.uri.partition("@")[2])  # where the client takes OpenAI to be
    model = chat_model("openai:gpt-4o-mini", max_retries=0, timeout=5)
    paid = Gateway(gateway.cache, 100.0)
    kinds = {
        "good": completion("fine"),
        "server": error(500),
        "filtered": completion("x", "content_filter"),
        "request": error(400),
    }
    server.behave = lambda text, attempt: kinds[text]
    replies = paid.ask(model, [ask(kind) for kind in kinds])
    assert server.headers[0]["authorization"] == f"Bearer {KEY}", "the key was planted where it is read"
    server.behave = lambda text, attempt: error(401)
    message = one_line(lambda: paid.ask(chat_model("openai:gpt-4o-mini", max_retries=0, timeout=5), [ask("refused")]))
    seen = message + repr(replies) + repr(paid) + json.dumps(paid.models()) + "".join(capfd.readouterr())
    assert KEY not in seen and KEY.encode() not in files_below(tmp_path) and b"fine" in files_below(tmp_path)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_repeats_the_key_in_its_error_does_not_get_it_written(
    server, gateway, tmp_path, monkeypatch, status
):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    server.behave = lambda text, attempt: error(status, f"Incorrect API key provided: {KEY}")
    try:
        seen = repr(gateway.ask(server.model(), [ask()]))
    except StudyError as refusal:
        seen = str(refusal)
    assert KEY not in seen and KEY.encode() not in files_below(tmp_path)


def test_no_key_is_one_line(gateway):
    assert "OPENAI_API_KEY" in one_line(lambda: Gateway(gateway.cache, 100.0).ask(chat_model("openai:gpt-4o"), [ask()]))


# ---- names ----


@pytest.mark.parametrize(
    "uri",
    [
        "",
        ":",
        "gpt-4o",
        "openai:",
        "opnai:gpt-4o",
        "rules:",
        "rules:rubik",
        "openai:gpt-17",
        "local:",
        "local:./nowhere",
    ],
)
def test_a_bad_uri_is_one_line(uri):
    one_line(lambda: chat_model(uri))


def test_a_local_model_answers_each_in_its_place_and_once(gateway, monkeypatch):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = chat_model("local:random-tiny", dtype="float32")
    asked = [ask("word " * (n % 5 + 1) + str(n), decoding=Decoding(max_tokens=4)) for n in range(7)]
    replies = gateway.ask(model, asked)
    alone = [
        Gateway(ReplyCache(gateway.cache.path.with_name(f"{n}.sqlite"))).ask(model, [request])[0]
        for n, request in enumerate(asked)
    ]
    assert replies == alone and all(0 <= r.completion_tokens <= 4 < r.prompt_tokens for r in replies)
    monkeypatch.setattr(model, "answer", None)
    assert again(gateway).ask(model, asked) == replies
    torch.set_num_threads(threads)


def test_the_name_of_a_local_model_in_the_cache_changes_with_its_dtype():
    single, half = (chat_model("local:random-tiny", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert single.identity != half.identity, "their answers differ, so one must not be served for the other"


# ---- record, replay, live ----


def test_replay_answers_from_the_cache_and_asks_nobody(server, gateway):
    asked = [ask(f"question {n}") for n in range(5)]
    model = chat_model(server.uri)
    recorded = gateway.ask(model, asked)
    seen = len(server.log)
    replayed = Gateway(ReplyCache(gateway.cache.path), calls="replay")
    assert replayed.ask(chat_model(server.uri), asked[::-1]) == recorded[::-1] and len(server.log) == seen
    message = one_line(lambda: replayed.ask(chat_model(server.uri), [*asked, ask("question 5"), ask("question 6")]))
    assert (
        "2 of 7" in message
        and "question 5" in message
        and "PSYCOPREF_CALLS=record" in message
        and len(server.log) == seen
    )
    assert replayed.ask(chat_model(server.uri), asked) == recorded, "a refusal spoils nothing"


def test_live_asks_again_and_keeps_the_newer_answer(server, gateway):
    model = chat_model(server.uri)
    server.behave = lambda text, attempt: completion(f"answer {attempt}")
    assert gateway.ask(model, [ask("Hello")])[0].text == "answer 0"
    live = Gateway(ReplyCache(gateway.cache.path), calls="live")
    assert (
        live.ask(chat_model(server.uri), [ask("Hello"), ask("Hello")])[0].text == "answer 1" and len(server.log) == 2
    ), "asked again, but once"
    assert Gateway(ReplyCache(gateway.cache.path)).ask(chat_model(server.uri), [ask("Hello")])[0].text == "answer 1"


@pytest.mark.parametrize("way", ["record", "replay", "live"])
def test_the_way_of_calling_comes_from_the_environment(monkeypatch, way):
    monkeypatch.setenv("PSYCOPREF_CALLS", way)
    assert open_gateway(Run("example")).calls == way
    monkeypatch.setenv("PSYCOPREF_CALLS", way + "ed")
    assert "record, replay or live" in one_line(lambda: open_gateway(Run("example")))


def test_many_open_a_new_cache_at_once(tmp_path):
    start = threading.Barrier(16)

    def open_one(n):
        start.wait(30)
        cache = ReplyCache(tmp_path / "replies.sqlite")
        cache.put({f"key {n}": ChatReply(str(n))})

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(open_one, range(16)))
    assert len(ReplyCache(tmp_path / "replies.sqlite").get([f"key {n}" for n in range(16)])) == 16


# ---- pace ----


def test_a_steady_server_is_used_up_to_the_ceiling(server, gateway):
    model = server.model()
    model.concurrency = 48
    server.behave = lambda text, attempt: (time.sleep(0.25), completion())[1]
    gateway.ask(model, [ask(f"q{n}") for n in range(300)])
    assert 20 < server.most <= 48, "it starts low and grows"


def test_a_server_that_refuses_is_not_overrun(server, gateway):
    state = server

    def behave(text, attempt):
        with state.lock:
            crowded = state.flying > 12
        time.sleep(0.01 if crowded else 0.03)
        return error(429, "slow down") if crowded else completion(f"re: {text}")

    state.behave, model = behave, state.model(max_retries=50)
    replies = gateway.ask(model, [ask(f"q{n}") for n in range(600)])
    assert all(isinstance(reply, ChatReply) for reply in replies), "every call is answered in the end"
    half = state.log[len(state.log) // 2 :]
    retries = gateway.counts[state.uri]["retries"]
    assert retries > 0 and len(half) < 1.5 * 300, "most of the later calls are taken at once"
    assert len(state.log) == 600 + retries


def test_no_more_than_the_ceiling_are_in_flight(server, gateway):
    model = server.model()
    model.concurrency = 8
    server.behave = lambda text, attempt: completion()
    replies = gateway.ask(model, [ask(f"q{n}") for n in range(300)])
    assert [reply.text for reply in replies] == ["fine"] * 300 and server.most <= 8


def test_limits_a_minute_are_kept_to(server, gateway, monkeypatch):
    import aiolimiter

    asked = []

    class Spy(aiolimiter.AsyncLimiter):
        async def acquire(self, amount=1):
            asked.append((self.max_rate, amount))

    monkeypatch.setattr(aiolimiter, "AsyncLimiter", Spy)
    monkeypatch.setenv("PSYCOPREF_RPM", "500")
    monkeypatch.setenv("PSYCOPREF_TPM", "90")
    gateway.ask(server.model(), [ask("x" * 80, decoding=Decoding(30)), ask("y" * 80, decoding=Decoding(1000))])
    assert sorted(asked) == [(90, 50), (90, 90), (500, 1), (500, 1)], (
        "20 tokens of the question and the longest answer; never more than a minute gives"
    )
    for bad in ("0", "-3", "many", "1.5"):
        monkeypatch.setenv("PSYCOPREF_RPM", bad)
        assert "PSYCOPREF_RPM" in one_line(lambda: gateway.ask(server.model(), [ask(f"z{bad}")]))


# ---- streams ----


class Chancy(FreeModel):
    """Answers after a while; `faults` says how often a text breaks before it is answered."""

    uri = identity = label = "chancy"
    attempts, price, worth = 5, 0.0, 0.0

    def __init__(self, faults=lambda text: 0, wait=lambda text: 0.0, **options):
        self.faults, self.wait, self.log, self.done, self.groups_seen = faults, wait, [], [], []
        vars(self).update(options)

    async def answer(self, requests):
        texts = [request.messages[-1]["content"] for request in requests]
        self.log += texts
        await asyncio.sleep(self.wait(texts[0]))
        self.done += texts
        return [
            Failure("reset", kind="broken", unsure=True)
            if self.log.count(text) <= self.faults(text)
            else ChatReply(f"re: {text}", "stop", 2, 3)
            for text in texts
        ]

    def most(self, request):
        return self.price

    def cost(self, reply):
        return self.worth if isinstance(reply, ChatReply) else 0.0


def threads() -> set:
    return {thread for thread in threading.enumerate() if "tqdm" not in type(thread).__module__}


@pytest.fixture
def no_thread_left():
    before = threads()
    yield
    assert threads() <= before


@settings(few, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=8),
    st.integers(1, 9),
    st.sampled_from([1, 3, 64, None]),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_a_stream_gives_what_asking_one_by_one_gives(tmp_path_factory, numbers, concurrency, look, ahead, seed):
    chance = random.Random(seed)
    faulty, slow = (
        {f"q{n}": chance.choice([0, 0, 0, 1, 2]) for n in range(31)},
        {f"q{n}": chance.choice([0, 0, 0.001, 0.004]) for n in range(31)},
    )
    model = Chancy(faulty.get, slow.get, concurrency=concurrency, look=look, ahead=ahead, price=1.0, worth=0.5)
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"), 1e6, stage="s")
    before = threads()
    with patch("psycopref.gateway.limits.pause", lambda *arguments: 0.0):
        found = list(gateway.stream(model, ((ask(f"q{n}") for n in block) for block in numbers)))
    assert [[reply.text for reply in replies] for replies in found] == [
        [f"re: q{n}" for n in block] for block in numbers
    ]
    unique = {f"q{n}" for block in numbers for n in block}
    assert Counter(model.log) == {text: faulty[text] + 1 for text in unique}, (
        "each is sent once, and once more for each fault"
    )
    count, lost = gateway.counts["chancy"], sum(faulty[text] for text in unique)
    assert (count["calls"], count["cached"], count["retries"], count["failed"]) == (
        len(unique),
        sum(map(len, numbers)) - len(unique),
        lost,
        0,
    )
    books = [
        dict(
            stage="s",
            model="chancy",
            calls=len(unique) + lost,
            prompt_tokens=2 * len(unique),
            completion_tokens=3 * len(unique),
            usd=0.5 * len(unique) + lost,
        )
    ]
    assert (
        gateway.cache.bill() == (books if unique else []) and gateway.spent == count["usd"] == 0.5 * len(unique) + lost
    )
    replayed = Gateway(gateway.cache, calls="replay").stream(
        Chancy(look=look), ([ask(f"q{n}") for n in block] for block in numbers)
    )
    assert list(replayed) == found and threads() <= before
    gateway.cache.close()


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_a_source_is_read_no_further_than_it_must(gateway, ahead, no_thread_left):
    read, furthest = [], 0

    def source():
        for b in range(40):
            read.append(b)
            yield [ask(f"{b}-{n}") for n in range(3)]

    stream = gateway.stream(Chancy(concurrency=4, ahead=ahead), source())
    for b, _ in enumerate(stream):
        seen = -1
        while seen != len(read) and b % 5 == 0:  # until it reads no further by itself
            seen = len(read)
            time.sleep(0.02)
        furthest = max(furthest, read[-1] - b)
    assert ahead <= furthest <= ahead + 3 and read == list(range(40))


def test_closing_a_stream_ends_its_calls_and_its_thread(gateway, no_thread_left):
    model = Chancy(wait=lambda text: 0.0 if text < "2" else 5.0, concurrency=4, ahead=3)
    stream = gateway.stream(model, ([ask(f"{b}-{n}") for n in range(3)] for b in itertools.count()))
    assert [reply.text for reply in next(stream)] == [f"re: 0-{n}" for n in range(3)]
    while "2-0" not in model.log:
        time.sleep(0.005)
    stream.close()
    sent = list(model.log)
    assert not gateway.busy and "2-0" not in model.done and len(sent) <= 6 + 4, "calls in flight are given up"
    assert len(gateway.ask(model, [ask("0-0"), ask("1-9")])) == 2 and model.log == [*sent, "1-9"]


class Mishap(Exception):
    """Something that is no refusal of ours."""


@pytest.mark.parametrize("place", ["source", "a request", "model", "cache", "consumer", "grouping"])
def test_an_error_comes_through_as_it_is_and_leaves_no_thread(gateway, place, no_thread_left, monkeypatch):
    mishap, model = Mishap(place), Chancy(concurrency=2)

    def trip(where, value=None):
        if where == place:
            raise mishap
        return value

    def source():
        for b in range(4):
            yield (trip("a request" if (b, n) == (2, 1) else "", ask(f"{b}-{n}")) for n in range(3))
        trip("source")

    if place == "model":
        model.wait = lambda text: trip("model" if text == "2-1" else "", 0.0)
    if place == "grouping":
        model.groups = lambda requests: trip("grouping")
    if place == "cache":
        monkeypatch.setattr(gateway.cache, "keep", lambda done: trip("cache"))
    with pytest.raises(Mishap) as error:
        for _ in gateway.stream(model, source()):
            trip("consumer")
    assert error.value is mishap and not gateway.busy
    monkeypatch.undo()
    assert gateway.ask(Chancy(), [ask("9-9")])[0].text == "re: 9-9", "the gateway is as good as before"


def test_after_an_error_of_the_source_nothing_more_is_sent(gateway, no_thread_left):
    raised = []

    def source():
        yield [ask(str(n)) for n in range(8)]
        raised.append(True)
        raise Mishap

    class Waiting(Chancy):
        async def answer(self, requests):
            self.log += requests
            while not raised:
                await asyncio.sleep(0.001)
            return [ChatReply("fine")]

    model = Waiting(concurrency=4)
    with pytest.raises(Mishap):
        list(gateway.stream(model, source()))
    assert len(model.log) == 4 and len(gateway.cache.get([ask(str(n)).key("chancy") for n in range(8)])) == 4, (
        "what was in flight is kept"
    )


def test_a_call_that_fails_is_not_repeated_for_each_time_it_stands_in_a_block(gateway):
    model = Chancy(faults=lambda text: 99 if text == "bad" else 0, attempts=1, look=1, concurrency=1)
    replies = gateway.ask(model, [ask(text) for text in ("bad", "a", "b", "c", "bad", "d", "bad")])
    assert [isinstance(reply, Failure) for reply in replies] == [
        True,
        False,
        False,
        False,
        True,
        False,
        True,
    ] and sorted(model.log) == ["a", "b", "bad", "c", "d"]


def test_one_stream_at_a_time(gateway, no_thread_left):
    first = gateway.stream(Chancy(), ([ask(f"{b}")] for b in range(9)))
    next(first)
    assert "one stream at a time" in one_line(lambda: next(gateway.stream(Chancy(), [[ask("x")]])))
    assert "one stream at a time" in one_line(lambda: gateway.ask(Chancy(), [ask("x")]))
    assert [replies[0].text for replies in first] == [f"re: {b}" for b in range(1, 9)]
    assert gateway.ask(Chancy(), [ask("x")])[0].text == "re: x"


@few
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=14), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_a_model_that_answers_in_groups_gets_the_same_groups_whatever_is_known(tmp_path_factory, numbers, chance):
    class Grouped(Chancy):
        look, whole, concurrency = None, True, 2

        def groups(self, requests):
            order = sorted(range(len(requests)), key=lambda i: (len(requests[i].messages[0]["content"]), i))
            self.groups_seen.append([request.messages[0]["content"] for request in requests])
            return [order[i : i + 3] for i in range(0, len(order), 3)]

        async def answer(self, requests):
            self.answered = [
                *getattr(self, "answered", ()),
                tuple(request.messages[0]["content"] for request in requests),
            ]
            return await super().answer(requests)

    blocks = [[ask("x" * n) for n in block] for block in numbers]
    unique = [list(dict.fromkeys("x" * n for n in block)) for block in numbers]
    expected = {
        tuple(block[i] for i in group) for block in unique for group in Grouped().groups([ask(text) for text in block])
    }
    gateway, known = (
        Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite")),
        {n: chance.random() < 0.5 for n in range(1, 41)},
    )
    gateway.cache.put({ask("x" * n).key("chancy"): ChatReply(f"kept {n}") for n in known if known[n]})
    model = Grouped()
    found = list(gateway.stream(model, iter(blocks)))
    assert model.groups_seen == unique, "a whole block, each request once, known or not"
    assert set(getattr(model, "answered", ())) <= expected, "a group is answered as a whole"
    missing = {"x" * n for block in numbers for n in block if not known[n]}
    assert missing <= set(model.log) and all(missing & set(group) for group in getattr(model, "answered", ())), (
        "and only where something is missing"
    )
    assert all(isinstance(reply, ChatReply) for replies in found for reply in replies) and [
        len(replies) for replies in found
    ] == list(map(len, numbers))
    gateway.cache.close()


def test_a_model_that_looks_at_blocks_sees_what_is_missing_of_a_whole_one(gateway):
    class Looking(Chancy):
        look = None

        def groups(self, requests):
            self.groups_seen.append(len(requests))
            return [list(range(len(requests)))]

    model = Looking()
    gateway.ask(Chancy(), [ask(str(n)) for n in range(0, 200, 2)])
    found = list(
        gateway.stream(model, iter([[ask(str(n)) for n in range(200)], [ask(str(n)) for n in range(100, 300)]]))
    )
    assert model.groups_seen == [100, 100] and sorted(model.log) == sorted(
        str(n) for n in range(300) if n % 2 or n >= 200
    )
    assert [[reply.text for reply in replies] for replies in found] == [
        [f"re: {n}" for n in range(200)],
        [f"re: {n}" for n in range(100, 300)],
    ]


def test_a_stream_on_a_full_disk_ends_in_one_line(gateway, no_thread_left):
    gateway.cache.db.execute("PRAGMA max_page_count = 12")
    seen = []
    message = one_line(
        lambda: seen.extend(
            gateway.stream(Chancy(concurrency=8), ([ask(f"{b} {n} {'x' * 200}") for n in range(30)] for b in range(50)))
        )
    )
    assert "replies.sqlite" in message and "full" in message and len(seen) < 10
    kept = again(gateway).cache.get(
        [ask(f"{b} {n} {'x' * 200}").key("chancy") for b in range(len(seen)) for n in range(30)]
    )
    assert len(kept) == 30 * len(seen), "what was seen is kept"


# ---- what an interruption costs ----


@pytest.mark.parametrize("how", ["close", "Ctrl-C", "an error"])
def test_what_was_in_flight_is_booked_at_its_most(tmp_path, how, no_thread_left):
    if how == "Ctrl-C" and threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")

    class Held(Chancy):
        async def answer(self, requests):
            [text] = [request.messages[-1]["content"] for request in requests]
            self.log.append(text)
            if text < "20":
                return [ChatReply("fine", "stop", 2, 3)]
            while len(self.log) < 14 or not seen:
                await asyncio.sleep(0.001)
            if how == "Ctrl-C" and self.log[-1] == text:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if how == "an error":
                raise Mishap
            await asyncio.sleep(30)

    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 100.0, stage="s")
    model, seen = Held(concurrency=4, price=2.0, worth=0.5), []
    stream = gateway.stream(model, iter([[ask(f"1{n}") for n in range(10)], [ask(f"2{n}") for n in range(4)]]))
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if how == "Ctrl-C" else None
    try:
        with (
            contextlib.nullcontext()
            if how == "close"
            else pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else Mishap)
        ):
            seen += next(stream)
            while how == "close" and len(model.log) < 14:
                time.sleep(0.005)
            if how != "close":
                next(stream)
        stream.close()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    [row] = gateway.cache.bill()
    assert (
        len(model.log) == 14
        and len(seen) == 10
        and row
        == {
            "stage": "s",
            "model": "chancy",
            "calls": 14,
            "prompt_tokens": 20,
            "completion_tokens": 30,
            "usd": 10 * 0.5 + 4 * 2.0,
        }
    )
    assert gateway.spent == gateway.counts["chancy"]["usd"] == row["usd"] and not gateway.busy
    assert again(gateway).cache.spent() == row["usd"], "and it is on the disk"


def test_a_reader_that_nobody_closed_holds_up_no_exit(tmp_path):
    code = """
import itertools, sys, time
from pathlib import Path
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.gateway.gateway import Gateway, chat_model

gateway = Gateway(ReplyCache(Path(sys.argv[1])))
reader = gateway.stream(chat_model("rules:phrases"), ([ChatRequest(({"role": "user", "content": str(b)},))] for b in itertools.count()))
next(reader)
time.sleep(0.3)  # until it has read as far ahead as it may
raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "replies.sqlite")], timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 7 and not done.stderr
