"""The gateway against a server that answers, stalls, refuses and lies: nothing asked twice, nothing overspent, nothing leaked."""

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, ChatRequest, Failure, FreeModel
from psycopref.core.stages import Run
from psycopref.gateway.gateway import Gateway, chat_model, open_gateway
from psycopref.models.generation import Decoding
from psycopref.gateway.servers import OpenAIModel, prices

from raw_server import ask, error, good, open_model
from refusals import one_line

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def again(gateway, budget_usd=0.0) -> Gateway:
    """Open the same cache as a later process would."""
    gateway.cache.db.close()
    return Gateway(ReplyCache(gateway.cache.path), budget_usd)


# ---- answers ----


def test_an_answer_with_its_counts(server, gateway):
    asked = ask("Hello", decoding=Decoding(7, 0.5, top_k=3, top_p=0.9, seed=4), schema={"type": "object"})
    [reply] = gateway.ask(open_model(server), [asked])
    assert reply == ChatReply("re: Hello", "stop", 5, 2)
    counts = dict(calls=1, cached=0, failed=0, retries=0, prompt_tokens=5, completion_tokens=2, usd=0.0)
    assert gateway.models() == {server.uri: {"label": "some/model", **counts}}
    [sent] = server.bodies
    assert (sent["model"], sent["messages"]) == ("some/model", [{"role": "user", "content": "Hello"}])
    names = ("max_completion_tokens", "temperature", "top_p", "seed", "top_k")
    assert [sent[name] for name in names] == [7, 0.5, 0.9, 4, 3]
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_replies_stand_in_the_order_of_the_requests(server, gateway):
    async def behave(text):
        while text == "0" and "9" not in server.log:  # the first is answered last
            await asyncio.sleep(0.005)
        return good(f"re: {text}")

    server.behave = lambda text, attempt: behave(text)
    asked = [ask(str(n % 10)) for n in range(20)]
    assert [r.text for r in gateway.ask(open_model(server), asked)] == [f"re: {n % 10}" for n in range(20)]
    assert sorted(server.log) == [str(n) for n in range(10)], "a repeated question is asked once"


def test_after_a_refusal_the_same_model_can_ask_again(server, gateway):
    model = open_model(server)
    server.behave = lambda text, attempt: error(401) if text == "3" else good(f"re: {text}")
    one_line(lambda: gateway.ask(model, [ask(str(n)) for n in range(5)]))
    server.behave = lambda text, attempt: good(f"re: {text}")
    assert [r.text for r in gateway.ask(model, [ask(str(n)) for n in range(5)])] == [f"re: {n}" for n in range(5)]


# ---- concurrency ----


def test_calls_are_in_flight_together_and_never_too_many(server, gateway):
    async def behave(text):
        while server.log.index(text) >= len(server.log) // 4 * 4:  # each waits for three others
            await asyncio.sleep(0.005)
        return good(f"re: {text}")

    server.behave = lambda text, attempt: behave(text)
    replies = gateway.ask(open_model(server, 1, 30, concurrency=4), [ask(str(n)) for n in range(40)])
    assert [r.text for r in replies] == [f"re: {n}" for n in range(40)] and server.most == 4


# ---- nothing twice ----


def test_nothing_is_asked_twice(server, gateway):
    asked = [ask(str(n % 30)) for n in range(60)]
    first = gateway.ask(open_model(server), asked[:20])
    later = again(gateway)
    everything = later.ask(open_model(server), asked)
    assert everything[:20] == first and sorted(server.log) == sorted({str(n % 30) for n in range(60)})
    assert again(later).ask(open_model(server), asked) == everything and len(server.log) == 30
    assert later.counts[server.uri]["calls"] == 10 and later.counts[server.uri]["cached"] == 50


def test_another_model_seed_schema_or_history_is_another_question(server, gateway):
    asked = [ask(), ask(decoding=Decoding(seed=1)), ask(decoding=Decoding(max_tokens=9)), ask(schema={"type": "object"}),
             ChatRequest(({"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}))]  # fmt: skip
    gateway.ask(open_model(server), asked)
    assert len(server.log) == 5
    gateway.ask(chat_model(server.uri.replace("some/model", "other"), max_retries=0), [ask()])
    assert len(server.log) == 6 and server.bodies[-1]["model"] == "other"


texts = st.text(max_size=20)


@few
@given(texts, texts, st.integers(1, 99), st.integers(1, 99))
def test_keys_tell_questions_apart(first, second, short, long):
    keys = {ask(t, decoding=Decoding(n)).key(i) for t in {first, second} for n in {short, long} for i in ("a", "b")}
    assert len(keys) == len({first, second}) * len({short, long}) * 2
    swapped = ChatRequest(({"content": first, "role": "user"},))
    assert ask(first).key("a") == swapped.key("a"), "the order of keys says nothing"


kept_replies = st.builds(ChatReply, texts, st.sampled_from(["stop", "length"]), st.integers(0, 9), st.integers(0, 9))


@few
@given(st.dictionaries(texts, kept_replies, max_size=5))
def test_the_cache_gives_back_what_was_put(tmp_path_factory, replies):
    path = tmp_path_factory.mktemp("cache") / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put(replies)
    cache.db.close()
    cache = ReplyCache(path)
    assert cache.get([*replies, "absent\x00"]) == replies
    cache.db.close()


NO_CACHE = {"text": b"not a database, but long enough to look at" * 20, "header": b"SQLite format 3\0" + b"\xff" * 4096}


@pytest.mark.parametrize("content", NO_CACHE.values(), ids=NO_CACHE)
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


# ---- interruptions ----


def test_what_was_finished_before_an_error_is_kept(server, gateway):
    model = open_model(server, concurrency=1)
    server.behave = lambda text, attempt: error(401) if text == "12" else good(f"re: {text}")
    one_line(lambda: gateway.ask(model, [ask(str(n)) for n in range(40)]))
    assert server.log == [str(n) for n in range(13)], "nothing is sent after the error"
    server.behave = lambda text, attempt: good(f"re: {text}")
    later = again(gateway)
    replies = later.ask(open_model(server), [ask(str(n)) for n in range(40)])
    assert [reply.text for reply in replies] == [f"re: {n}" for n in range(40)]
    assert sorted(server.log) == sorted([*map(str, range(40)), "12"]), "only the refused call was asked again"


# ---- budget ----

PRICE = {"input": 1e4, "output": 1e6}  # US dollars a million tokens: a cent for each byte, a dollar for each token said


def priced(server, concurrency=None):
    return open_model(server, concurrency=concurrency, price=PRICE)


def bill(server) -> float:
    """What the server would charge for all it was asked, at most."""
    return sum(0.01 * len(b["messages"][-1]["content"].encode()) + b["max_completion_tokens"] for b in server.bodies)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_cap_is_used_up_before_it_stops_the_run(server, tmp_path, concurrency):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 40.3)  # 20 calls of 2.01
    server.behave = lambda text, attempt: good(f"re: {text}", usage=(1, 2))
    model = priced(server, concurrency)
    asked = [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(26)]
    one_line(lambda: gateway.ask(model, asked))
    assert bill(server) <= 40.3
    kept = gateway.cache.get([request.key(model.identity) for request in asked])
    assert len(kept) == len(server.log) == 20 and gateway.spent == pytest.approx(20 * 2.01)


def test_a_call_that_was_paid_is_never_asked_again(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 40.3)

    async def behave(text):
        while len(server.log) < 19:  # as many as the cap allows to be in flight together
            await asyncio.sleep(0.005)
        return good(f"re: {text}", usage=(1, 2))

    server.behave = lambda text, attempt: behave(text)
    asked = [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(26)]
    one_line(lambda: gateway.ask(priced(server), asked))
    kept = len(gateway.cache.get([request.key(priced(server).identity) for request in asked]))
    assert kept == 20, "what the cap allows is answered and kept"
    assert len(again(gateway, 100.0).ask(priced(server), asked)) == 26
    assert len(server.log) == len(set(server.log)) == 26


def test_what_is_cheaper_than_feared_leaves_room(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 30.0)  # feared: 10.01 for each call; real: 1.01
    server.behave = lambda text, attempt: good(f"re: {text}", usage=(1, 1))
    model = priced(server, 1)
    replies = gateway.ask(model, [ask(chr(65 + n), decoding=Decoding(max_tokens=10)) for n in range(20)])
    assert len(replies) == 20
    assert gateway.spent == pytest.approx(20.2) and gateway.counts[server.uri]["usd"] == pytest.approx(20.2)


@pytest.mark.parametrize("finish_reason, content", [("length", None), ("content_filter", "half"), ("stop", "")])
def test_an_answer_without_text_costs_what_it_cost(server, tmp_path, finish_reason, content):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 10.0)
    choices = [{"finish_reason": finish_reason, "message": {"content": content}}]
    server.behave = lambda text, attempt: good(usage=(1, 2), choices=choices)  # the tokens went into thoughts
    model = priced(server, 1)
    one_line(lambda: gateway.ask(model, [ask(chr(65 + n), decoding=Decoding(max_tokens=2)) for n in range(20)]))
    assert len(server.log) == 4 and gateway.spent == pytest.approx(4 * 2.01)


def test_the_stages_of_a_run_share_one_budget(server):
    first = open_gateway(Run("example"), 10.0)
    server.behave = lambda text, attempt: good(usage=(1, 2))
    first.ask(priced(server), [ask(letter, decoding=Decoding(max_tokens=2)) for letter in "ABC"])
    assert first.spent == pytest.approx(3 * 2.01)
    second = open_gateway(Run("example"), 10.0)
    one_line(lambda: second.ask(priced(server), [ask(letter, decoding=Decoding(max_tokens=2)) for letter in "DEFG"]))
    assert bill(server) <= 10.0, "each stage spent as if it were the first"
    other = open_gateway(Run("another"), 10.0)
    assert other.spent == 0
    assert isinstance(other.ask(priced(server), [ask("H", decoding=Decoding(max_tokens=2))])[0], ChatReply)


def test_cached_replies_cost_nothing(server, tmp_path):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 10.0)
    gateway.ask(priced(server), [ask(decoding=Decoding(max_tokens=2))])
    assert gateway.spent > 0
    later = again(gateway, 0.0)
    [reply] = later.ask(priced(server), [ask(decoding=Decoding(max_tokens=2))])
    assert isinstance(reply, ChatReply) and later.spent == 0


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


def test_no_key_is_one_line(gateway):
    assert "OPENAI_API_KEY" in one_line(lambda: Gateway(gateway.cache, 100.0).ask(chat_model("openai:gpt-4o"), [ask()]))


# ---- names ----


BAD = "|:|gpt-4o|openai:|opnai:gpt-4o|rules:|rules:rubik|openai:gpt-17|local:|local:./nowhere".split("|")


@pytest.mark.parametrize("uri", BAD)
def test_a_bad_uri_is_one_line(uri):
    one_line(lambda: chat_model(uri))


def test_a_local_model_answers_each_in_its_place_and_once(gateway, monkeypatch):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = chat_model("local:random-tiny", dtype="float32")
    asked = [ask("word " * (n % 5 + 1) + str(n), decoding=Decoding(max_tokens=4)) for n in range(7)]
    replies = gateway.ask(model, asked)
    caches = [ReplyCache(gateway.cache.path.with_name(f"{n}.sqlite")) for n in range(len(asked))]
    alone = [Gateway(cache).ask(model, [request])[0] for cache, request in zip(caches, asked)]
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
    assert "2 of 7" in message and "question 5" in message and "PSYCOPREF_CALLS=record" in message
    assert len(server.log) == seen
    assert replayed.ask(chat_model(server.uri), asked) == recorded, "a refusal spoils nothing"


def test_live_asks_again_and_keeps_the_newer_answer(server, gateway):
    model = chat_model(server.uri)
    server.behave = lambda text, attempt: good(f"answer {attempt}")
    assert gateway.ask(model, [ask("Hello")])[0].text == "answer 0"
    live = Gateway(ReplyCache(gateway.cache.path), calls="live")
    assert live.ask(chat_model(server.uri), [ask("Hello"), ask("Hello")])[0].text == "answer 1"
    assert len(server.log) == 2, "asked again, but once"
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
    server.behave = lambda text, attempt: asyncio.sleep(0.25, good())
    gateway.ask(open_model(server, concurrency=48), [ask(f"q{n}") for n in range(300)])
    assert 32 < server.most <= 48, "it starts low and grows"


def test_a_server_that_refuses_is_not_overrun(server, gateway):
    def behave(text, attempt):
        crowded = server.flying > 12
        return asyncio.sleep(0.01 if crowded else 0.03, error(429, "slow down") if crowded else good(f"re: {text}"))

    server.behave = behave
    replies = gateway.ask(open_model(server, attempts=51), [ask(f"q{n}") for n in range(600)])
    assert all(isinstance(reply, ChatReply) for reply in replies), "every call is answered in the end"
    half, retries = server.log[len(server.log) // 2 :], gateway.counts[server.uri]["retries"]
    assert retries > 0 and len(half) < 1.5 * 300, "most of the later calls are taken at once"
    assert len(server.log) == 600 + retries


def test_limits_a_minute_are_kept_to(server, gateway, monkeypatch):
    import aiolimiter

    asked = []

    class Spy(aiolimiter.AsyncLimiter):
        async def acquire(self, amount=1):
            asked.append((self.max_rate, amount))

    monkeypatch.setattr(aiolimiter, "AsyncLimiter", Spy)
    monkeypatch.setenv("PSYCOPREF_RPM", "500")
    monkeypatch.setenv("PSYCOPREF_TPM", "90")
    gateway.ask(open_model(server), [ask("x" * 80, decoding=Decoding(30)), ask("y" * 80, decoding=Decoding(1000))])
    assert sorted(asked) == [(90, 50), (90, 90), (500, 1), (500, 1)], (
        "20 tokens of the question and the longest answer; never more than a minute gives"
    )
    for bad in ("0", "-3", "many", "1.5"):
        monkeypatch.setenv("PSYCOPREF_RPM", bad)
        assert "PSYCOPREF_RPM" in one_line(lambda: gateway.ask(open_model(server), [ask(f"z{bad}")]))


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
        fault, log = Failure("reset", kind="broken", unsure=True), self.log
        return [fault if log.count(t) <= self.faults(t) else ChatReply(f"re: {t}", "stop", 2, 3) for t in texts]

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
@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=8), st.integers(1, 9),
       st.sampled_from([1, 3, 64, None]), st.integers(0, 3), st.integers(0, 10**6))  # fmt: skip
def test_a_stream_gives_what_asking_one_by_one_gives(tmp_path_factory, numbers, concurrency, look, ahead, seed):
    chance = random.Random(seed)
    faulty = {f"q{n}": chance.choice([0, 0, 0, 1, 2]) for n in range(31)}
    slow = {f"q{n}": chance.choice([0, 0, 0.001, 0.004]) for n in range(31)}
    model = Chancy(faulty.get, slow.get, concurrency=concurrency, look=look, ahead=ahead, price=1.0, worth=0.5)
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"), 1e6, stage="s")
    before = threads()
    with patch("psycopref.gateway.gateway.pause", lambda *arguments: 0.0):
        found = list(gateway.stream(model, ((ask(f"q{n}") for n in block) for block in numbers)))
    texts = [[f"q{n}" for n in block] for block in numbers]
    assert [[reply.text for reply in replies] for replies in found] == [[f"re: {t}" for t in block] for block in texts]
    unique = {text for block in texts for text in block}
    assert Counter(model.log) == {text: faulty[text] + 1 for text in unique}, "sent once, and once more for each fault"
    count, n, lost = gateway.counts["chancy"], len(unique), sum(faulty[text] for text in unique)
    counted = (count["calls"], count["cached"], count["retries"], count["failed"])
    assert counted == (n, sum(map(len, numbers)) - n, lost, 0)
    row = dict(stage="s", model="chancy", calls=n + lost, prompt_tokens=2 * n, completion_tokens=3 * n)
    assert gateway.cache.bill() == ([row | {"usd": 0.5 * n + lost}] if unique else [])
    assert gateway.spent == count["usd"] == 0.5 * n + lost
    replayed = Gateway(gateway.cache, calls="replay").stream(Chancy(look=look), (map(ask, block) for block in texts))
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
    assert [isinstance(reply, Failure) for reply in replies] == [True, False, False, False, True, False, True]
    assert sorted(model.log) == ["a", "b", "bad", "c", "d"]


def test_a_notebook_whose_loop_runs_can_ask(gateway, no_thread_left):
    async def cell():
        return gateway.ask(Chancy(), [ask("a")])

    assert asyncio.run(cell())[0].text == "re: a"


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
            self.answered.append(tuple(request.messages[0]["content"] for request in requests))
            return await super().answer(requests)

    blocks = [[ask("x" * n) for n in block] for block in numbers]
    unique = [list(dict.fromkeys("x" * n for n in block)) for block in numbers]
    groups = [(block, Grouped().groups([ask(text) for text in block])) for block in unique]
    expected = {tuple(block[i] for i in group) for block, found in groups for group in found}
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"))
    known = {n: chance.random() < 0.5 for n in range(1, 41)}
    gateway.cache.put({ask("x" * n).key("chancy"): ChatReply(f"kept {n}") for n in known if known[n]})
    model = Grouped(answered=[])
    found = list(gateway.stream(model, iter(blocks)))
    assert model.groups_seen == unique, "a whole block, each request once, known or not"
    assert set(model.answered) <= expected, "a group is answered as a whole"
    missing = {"x" * n for block in numbers for n in block if not known[n]}
    assert missing <= set(model.log), "and only where something is missing"
    assert all(missing & set(group) for group in model.answered)
    assert all(isinstance(reply, ChatReply) for replies in found for reply in replies)
    assert [len(replies) for replies in found] == list(map(len, numbers))
    gateway.cache.close()


def test_a_model_that_looks_at_blocks_sees_what_is_missing_of_a_whole_one(gateway):
    class Looking(Chancy):
        look = None

        def groups(self, requests):
            self.groups_seen.append(len(requests))
            return [list(range(len(requests)))]

    model = Looking()
    gateway.ask(Chancy(), [ask(str(n)) for n in range(0, 200, 2)])
    blocks = [range(200), range(100, 300)]
    found = list(gateway.stream(model, ([ask(str(n)) for n in block] for block in blocks)))
    assert model.groups_seen == [100, 100]
    assert sorted(model.log) == sorted(str(n) for n in range(300) if n % 2 or n >= 200)
    assert [[reply.text for reply in replies] for replies in found] == [[f"re: {n}" for n in block] for block in blocks]


def test_a_stream_on_a_full_disk_ends_in_one_line(gateway, no_thread_left):
    gateway.cache.db.execute("PRAGMA max_page_count = 12")
    seen, blocks = [], [[ask(f"{b} {n} {'x' * 200}") for n in range(30)] for b in range(50)]
    message = one_line(lambda: seen.extend(gateway.stream(Chancy(concurrency=8), iter(blocks))))
    assert "replies.sqlite" in message and "full" in message and len(seen) < 10
    kept = again(gateway).cache.get([request.key("chancy") for block in blocks[: len(seen)] for request in block])
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
    caught = {"Ctrl-C": pytest.raises(KeyboardInterrupt), "an error": pytest.raises(Mishap)}
    with caught.get(how, contextlib.nullcontext()):
        seen += next(stream)
        while how == "close" and len(model.log) < 14:
            time.sleep(0.005)
        if how != "close":
            next(stream)
    stream.close()
    [row] = gateway.cache.bill()
    assert len(model.log) == 14 and len(seen) == 10
    usd = 10 * 0.5 + 4 * 2.0
    assert row == dict(stage="s", model="chancy", calls=14, prompt_tokens=20, completion_tokens=30, usd=usd)
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
    command = [sys.executable, "-c", code, str(tmp_path / "replies.sqlite")]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 7 and not done.stderr
