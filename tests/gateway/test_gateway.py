"""The gateway against a server that answers, stalls, refuses and lies: nothing asked twice, nothing overspent."""

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
from psycopref.gateway.gateway import Gateway, chat_model, open_gateway, read_ahead
from psycopref.models.generation import Decoding
from psycopref.gateway.servers import OpenAIModel

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


# ---- what is kept ----


def test_another_model_question_history_seed_or_schema_is_another_key():
    asked = [
        ask(),
        ask("Bye"),
        ask(decoding=Decoding(seed=1)),
        ask(decoding=Decoding(9)),
        ask(schema={"type": "object"}),
    ]
    asked += [ChatRequest(({"role": "system", "content": "s"}, *ask().messages))]
    assert len({request.key(identity) for request in asked for identity in ("a", "b")}) == 2 * len(asked)
    assert ask().key("a") == ChatRequest(({"content": "Hello", "role": "user"},)).key("a"), "in whatever order"


texts = st.text(max_size=20)
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


DAMAGED = {
    "no database": lambda old: b"not a database, but long enough to look at" * 20,
    "only a header": lambda old: b"SQLite format 3\0" + b"\xff" * 4096,
    "further in": lambda old: old[:4096] + b"\xff" * (len(old) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_is_one_line_and_stays(tmp_path, damage):
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put({str(n): ChatReply("x" * 300) for n in range(200)})
    cache.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache.close()
    path.write_bytes(content := DAMAGED[damage](path.read_bytes()))
    assert "replies.sqlite" in one_line(lambda: ReplyCache(path).get([str(n) for n in range(200)]))
    assert path.read_bytes() == content, "it may hold somebody's paid replies"


def test_what_was_finished_before_an_error_is_kept(server, gateway):
    model = open_model(server, concurrency=1)
    server.behave = lambda text, attempt: error(401) if text == "12" else good(f"re: {text}")
    one_line(lambda: gateway.ask(model, [ask(str(n)) for n in range(40)]))
    assert server.log == [str(n) for n in range(13)], "nothing is sent after the error"
    server.behave = lambda text, attempt: good(f"re: {text}")
    replies = again(gateway).ask(model, [ask(str(n)) for n in range(40)])
    assert [reply.text for reply in replies] == [f"re: {n}" for n in range(40)]
    assert sorted(server.log) == sorted([*map(str, range(40)), "12"]), "only the refused call was asked again"


# ---- budget ----

PRICE = {"input": 1e4, "output": 1e6}  # US dollars a million tokens: a cent for each byte, a dollar for each token said


def priced(server, concurrency=None):
    return open_model(server, concurrency=concurrency, price=PRICE)


def two_tokens(text):
    return ask(text, decoding=Decoding(max_tokens=2))


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("said, n", [(2, 20), (1, 38)], ids=["as dear as feared", "cheaper"])
def test_a_cap_is_used_up_and_what_was_paid_is_never_asked_again(server, tmp_path, concurrency, said, n):
    gateway = Gateway(ReplyCache(tmp_path / "replies.sqlite"), 40.3)  # 2.01 is feared for each call
    server.behave = lambda text, attempt: good(f"re: {text}", usage=(1, said))
    asked = [two_tokens(chr(65 + i)) for i in range(50)]
    assert "budget" in one_line(lambda: gateway.ask(priced(server, concurrency), asked))
    assert len(server.log) == n and gateway.spent == pytest.approx(n * (0.01 + said))
    later = again(gateway, 1000.0)
    replies = later.ask(priced(server), asked)
    assert [reply.text for reply in replies] == [f"re: {chr(65 + i)}" for i in range(50)]
    assert again(later).ask(priced(server), asked) == replies, "without a budget, since it costs nothing"
    assert len(server.log) == len(set(server.log)) == 50


def test_a_refused_call_spends_nothing(server, gateway):
    paid, server.behave = Gateway(gateway.cache, 10.0), lambda text, attempt: error(401)
    one_line(lambda: paid.ask(priced(server), [two_tokens("A")]))
    assert len(server.log) == 1 and paid.spent == 0


def test_a_disk_that_is_too_full_for_all_replies_keeps_what_fits(gateway):
    class Long(FreeModel):
        uri = identity = label = "long"

        async def answer(self, requests):
            return [ChatReply("x" * 3000) for _ in requests]

    gateway.cache.db.execute("PRAGMA max_page_count = 20")
    asked = [ask(str(n)) for n in range(60)]
    message = one_line(lambda: gateway.ask(Long(), asked))
    assert "replies.sqlite" in message and "full" in message
    assert 5 < len(again(gateway).cache.get([request.key("long") for request in asked])) < 60


def test_the_stages_of_a_run_share_one_budget(server):
    server.behave = lambda text, attempt: good(usage=(1, 2))
    open_gateway(Run("example"), 10.0).ask(priced(server), [two_tokens(letter) for letter in "ABC"])
    second = open_gateway(Run("example"), 10.0)
    assert second.spent == pytest.approx(3 * 2.01)
    one_line(lambda: second.ask(priced(server), [two_tokens(letter) for letter in "DEFG"]))
    assert len(server.log) == 4, "each stage spent as if it were the first"
    other = open_gateway(Run("another"), 10.0)
    assert other.spent == 0 and isinstance(other.ask(priced(server), [two_tokens("H")])[0], ChatReply)


@few
@given(st.text(max_size=60), st.integers(1, 4000), st.integers(0, 4000))
def test_a_reply_never_costs_more_than_was_reserved(text, max_tokens, used):
    model = OpenAIModel("gpt-4o-2024-08-06")
    reply = ChatReply("", "stop", len(text.encode()), min(used, max_tokens))  # a token is at least a byte
    assert model.cost(reply) <= model.most(ask(text, decoding=Decoding(max_tokens))) + 1e-12


# ---- names ----

BAD = "|:|gpt-4o|openai:|opnai:gpt-4o|rules:|rules:rubik|openai:gpt-17|batch:gpt-17|local:|local:./nowhere".split("|")


@pytest.mark.parametrize("uri", BAD)
def test_a_bad_uri_is_one_line(uri):
    one_line(lambda: chat_model(uri))


def test_a_local_model_answers_each_in_its_place_and_once(gateway, monkeypatch, one_thread):
    model, half = (chat_model("local:random-tiny", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert model.identity != half.identity, "their answers differ, so one must not be served for the other"
    asked = [ask("word " * (n % 5 + 1) + str(n), decoding=Decoding(24, temperature=1.0)) for n in range(7)]
    replies = gateway.ask(model, asked)
    caches = [ReplyCache(gateway.cache.path.with_name(f"{n}.sqlite")) for n in range(len(asked))]
    alone = [Gateway(cache).ask(model, [request])[0] for cache, request in zip(caches, asked)]
    assert replies == alone and all(0 <= r.completion_tokens <= 24 and r.prompt_tokens > 4 for r in replies)
    monkeypatch.setattr(model, "answer", None)
    assert again(gateway).ask(model, asked) == replies


# ---- record, replay, live ----


class Company(FreeModel):
    """Answer by whom a request is answered with, as sampling in a batch does."""

    uri = label = identity = "local:company"
    look, whole = None, True

    def groups(self, requests):
        return [list(range(len(requests)))]

    async def answer(self, requests):
        together = " ".join(request.messages[-1]["content"] for request in requests)
        return [ChatReply(together, "stop", 1, 1) for _ in requests]


def test_a_kept_reply_stays_the_one_that_was_given_back(gateway):
    first, model = gateway.ask(Company(), [ask("a"), ask("b")]), Company()
    more = gateway.ask(model, [ask("a"), ask("b"), ask("c")])
    assert [reply.text for reply in more] == ["a b", "a b", "a b c"] and more[:2] == first
    assert gateway.ask(model, [ask("a"), ask("b"), ask("c")]) == more, "what a run was given is what its cache gives"


def test_replay_answers_from_the_cache_and_asks_nobody(server, gateway):
    asked, model = [ask(f"question {n}") for n in range(5)], chat_model(server.uri)
    recorded = gateway.ask(model, asked)
    replayed = Gateway(ReplyCache(gateway.cache.path), calls="replay")
    message = one_line(lambda: replayed.ask(model, [*asked, ask("question 5"), ask("question 6")]))
    assert "2 of 7" in message and "question 5" in message and "PSYCOPREF_CALLS=record" in message
    assert replayed.ask(model, asked[::-1]) == recorded[::-1], "a refusal spoils nothing"
    assert len(server.log) == 5


def test_live_asks_again_and_keeps_the_newer_answer(server, gateway):
    model = chat_model(server.uri)
    server.behave = lambda text, attempt: good(f"answer {attempt}")
    assert gateway.ask(model, [ask("Hello")])[0].text == "answer 0"
    live = Gateway(ReplyCache(gateway.cache.path), calls="live")
    assert live.ask(model, [ask("Hello"), ask("Hello")])[0].text == "answer 1" and len(server.log) == 2, "but once"
    assert again(live).ask(model, [ask("Hello")])[0].text == "answer 1"


def test_the_way_of_calling_comes_from_the_environment(monkeypatch):
    for way in ("record", "replay", "live"):
        monkeypatch.setenv("PSYCOPREF_CALLS", way)
        assert open_gateway(Run("example")).calls == way
    monkeypatch.setenv("PSYCOPREF_CALLS", "recorded")
    assert "record, replay or live" in one_line(lambda: open_gateway(Run("example")))


@pytest.mark.parametrize("wrong", ["3,000", "nan", "-1", "inf", "1e999", "ten", "$5"])
def test_a_budget_of_the_environment_that_is_no_amount_is_one_line(monkeypatch, wrong):
    monkeypatch.setenv("BUDGET_USD", wrong)
    assert "BUDGET_USD is" in one_line(lambda: open_gateway(Run("example")))


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch, empty):
    for name in ("BUDGET_USD", "PSYCOPREF_CALLS", "PSYCOPREF_RPM", "OPENAI_BASE_URL", "PSYCOPREF_PROMPTS"):
        monkeypatch.setenv(name, empty)
    opened = open_gateway(Run("example"), 2.5)
    assert (opened.budget_usd, opened.calls) == (2.5, "record")
    assert chat_model("openai:gpt-4o-mini").identity == "openai:gpt-4o-mini"


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
        self.faults, self.wait, self.log, self.done = faults, wait, [], []
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


def test_one_stream_at_a_time(gateway, no_thread_left):
    first = gateway.stream(Chancy(), ([ask(f"{b}")] for b in range(9)))
    next(first)
    assert "one stream at a time" in one_line(lambda: next(gateway.stream(Chancy(), [[ask("x")]])))
    assert "one stream at a time" in one_line(lambda: gateway.ask(Chancy(), [ask("x")]))
    assert [replies[0].text for replies in first] == [f"re: {b}" for b in range(1, 9)]
    assert gateway.ask(Chancy(), [ask("x")])[0].text == "re: x"


@few
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=14), min_size=1, max_size=4),
       st.sets(st.integers(1, 40)), st.booleans())  # fmt: skip
def test_a_model_that_groups_sees_each_block_whole_or_what_is_missing_of_it(tmp_path_factory, numbers, known, whole):
    class Grouped(Chancy):
        look, concurrency = None, 2

        def groups(self, requests):
            order = sorted(range(len(requests)), key=lambda i: (len(requests[i].messages[0]["content"]), i))
            self.seen.append([request.messages[0]["content"] for request in requests])
            return [order[i : i + 3] for i in range(0, len(order), 3)]

        async def answer(self, requests):
            self.answered.append(tuple(request.messages[0]["content"] for request in requests))
            return await super().answer(requests)

    expected, shown, known = [], set(), {"x" * n for n in known}
    for block in ([*dict.fromkeys("x" * n for n in block)] for block in numbers):
        expected.append(block if whole else [text for text in block if text not in known | shown])
        shown |= set(block)
    gateway = Gateway(ReplyCache(tmp_path_factory.mktemp("cache") / "replies.sqlite"))
    gateway.cache.put({ask(text).key("chancy"): ChatReply("kept") for text in known})
    model = Grouped(answered=[], seen=[], whole=whole)
    found = list(gateway.stream(model, ([ask("x" * n) for n in block] for block in numbers)))
    seen, missing = list(model.seen), shown - known
    groups = [(block, model.groups([*map(ask, block)])) for block in expected]
    assert seen == expected, "each request once"
    assert set(model.answered) <= {tuple(block[i] for i in group) for block, own in groups for group in own}
    assert set(model.log) >= missing and all(missing & set(group) for group in model.answered), "no group in vain"
    assert [[isinstance(reply, ChatReply) for reply in replies] for replies in found] == [
        [True] * len(b) for b in numbers
    ]
    gateway.cache.close()


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


def test_a_reader_leaves_no_thread_also_where_its_work_fails_at_the_end():
    async def work():
        try:
            yield 1
        finally:
            raise OSError("the disk is full")

    before, reader = threading.active_count(), read_ahead(work())
    assert next(reader) == 1
    reader.close()
    assert threading.active_count() == before


def test_a_reader_that_nobody_closed_holds_up_no_exit(tmp_path):
    code = """
import itertools, sys, time
from pathlib import Path
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.gateway.gateway import Gateway, chat_model

gateway = Gateway(ReplyCache(Path(sys.argv[1])))
blocks = ([ChatRequest(({"role": "user", "content": str(b)},))] for b in itertools.count())
reader = gateway.stream(chat_model("rules:phrases"), blocks)
next(reader)
time.sleep(0.3)  # until it has read as far ahead as it may
raise SystemExit(7)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "replies.sqlite")]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 7 and not done.stderr
