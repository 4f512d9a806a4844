"""One call against servers that reset, stall, dribble, lie and refuse: tried again where it helps, no key anywhere."""

import asyncio
import contextlib
import datetime
import email.utils
import json
import logging
import random
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from psycopref.gateway import gateway as gateway_module
from psycopref.gateway import servers
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, Failure
from psycopref.core.settings import StudyError
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.models.generation import Decoding
from psycopref.gateway.limits import AdaptiveLimit
from psycopref.gateway.servers import completion_reader, proxy_of, read_completion

from raw_server import Closed, Cut, Dribbled, RawServer, Silent, answer, ask, error, open_model, said
from refusals import one_line

KEY = "sk-planted-0123456789abcdef"


# ---- what breaks on its way ----

CHUNKED = b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n10\r\n"
CHUNKS = CHUNKED + said()[:16] + b"\r\n"
BROKEN = {  # how, and what of it must be shown
    "reset before an answer": (Cut(b""), ""),
    "closed before an answer": (Closed(b""), ""),
    "reset in the headers": (Cut(answer(said())[:20]), ""),
    "reset in mid-body": (Cut(answer(said()[:30], length=500)), ""),
    "closed in mid-body": (Closed(answer(said()[:30], length=500)), ""),
    "chunks cut": (Closed(CHUNKS), ""),
    "no HTTP": (Closed(b"SSH-2.0-OpenSSH\r\n\r\n"), ""),
    "truncated JSON": (answer(said("half a sentence")[:75]), "half a sent"),
    "no choices": (answer(said(choices=[])), "prompt_tokens"),
    "a page": (answer(b"<html>\nWelcome to the hotel\n</html>", Content_Type="text/html"), "Welcome to the hotel"),
    "an empty body": (answer(b""), ""),
    "no UTF-8": (answer(b'{"choices": "\xff\xfe caf\xe9"}'), "caf"),
}


def stumble(how):
    """Misbehave for "bad" each time, for "once" at first."""
    return lambda text, attempt: how if text == "bad" or (text, attempt) == ("once", 0) else answer(said(f"re: {text}"))


@pytest.mark.parametrize("fault", BROKEN)
def test_what_breaks_on_its_way_is_tried_again(server, gateway, pauses, fault):
    how, shown = BROKEN[fault]
    server.behave = stumble(how)
    once, bad, good = gateway.ask(open_model(server, concurrency=1), [ask("once"), ask("bad"), ask("good")])
    assert (once.text, good.text) == ("re: once", "re: good")
    assert sorted(server.log) == ["bad", "bad", "good", "once", "once"] and pauses == [(1, None)] * 2
    assert isinstance(bad, Failure) and 5 < len(bad.reason) <= 260 and "\n" not in bad.reason and shown in bad.raw
    assert (gateway.counts[server.uri]["retries"], gateway.counts[server.uri]["failed"]) == (2, 1)
    later = Gateway(ReplyCache(gateway.cache.path)).ask(open_model(server), [ask("once"), ask("bad")])
    assert [isinstance(reply, Failure) for reply in later] == [False, True], "a failure is not kept"


@pytest.mark.parametrize("how", [Silent, Dribbled(answer(said("word " * 2000)))], ids=["never answers", "dribbles"])
def test_the_deadline_covers_the_whole_call(server, gateway, pauses, how):
    server.behave = lambda text, attempt: how
    [bad] = gateway.ask(open_model(server, timeout=0.4), [ask()])
    assert isinstance(bad, Failure) and bad.reason == "Timeout: no answer in 0.4 s" and bad.unsure and bad.again


# ---- what is refused ----


def in_seconds(n) -> str:
    return email.utils.formatdate(time.time() + n, usegmt=True)


REFUSED = [  # status, headers, and the seconds asked for
    (429, {"Retry_After": "7"}, (7, 7)),
    (429, {"retry_after_ms": "250", "Retry_After": "9"}, (0.25, 0.25)),
    (429, {"Retry_After": in_seconds(4000)}, (3000, 4000)),
    (429, {"Retry_After": in_seconds(-40)}, None),
    (429, {"Retry_After": "soon"}, None),
    (429, {"Retry_After": "-5"}, None),
    (503, {"Retry_After": "1.5"}, (1.5, 1.5)),
    *((status, {}, None) for status in (408, 429, 500, 502, 503, 504)),
]


@pytest.mark.parametrize("status, headers, expected", REFUSED)
def test_a_refusal_is_tried_again_after_what_it_asks_for(server, gateway, pauses, status, headers, expected):
    server.behave = lambda text, attempt: (
        error(status, "try\nlater", **headers) if text == "b" or attempt < 2 else answer(said(f"re: {text}"))
    )
    reply, failure = gateway.ask(open_model(server, attempts=3), [ask("a"), ask("b")])
    assert reply.text == "re: a" and sorted(server.log) == ["a"] * 3 + ["b"] * 3
    assert sorted(attempt for attempt, _ in pauses) == [1, 1, 2, 2]
    assert all(after is None if expected is None else expected[0] <= after <= expected[1] for _, after in pauses)
    assert str(status) in failure.reason and "try later" in failure.reason


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_call_that_is_wrong_is_not_tried_again(server, gateway, pauses, status):
    server.behave = lambda text, attempt: error(status, "too many tokens") if text == "bad" else answer(said())
    bad, good = gateway.ask(open_model(server, attempts=5), [ask("bad"), ask("good")])
    assert server.log.count("bad") == 1 and not pauses and good.text == "fine"
    assert not bad.again and "too many tokens" in bad.reason


STOPS = [(401, None, "key"), (403, None, "access"), (404, None, "model's name"), (429, "insufficient_quota", "empty")]


@pytest.mark.parametrize("status, code, word", STOPS)
def test_what_concerns_every_call_stops_the_run_in_one_line(server, gateway, pauses, status, code, word):
    server.behave = lambda text, attempt: error(status, "no\nmore", code) if text == "5" else answer(said())
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=2), [ask(str(n)) for n in range(200)]))
    assert word in message and str(status) in message and "some/model" in message and server.log.count("5") == 1
    assert 6 <= len(server.log) < 12, "nothing more is sent"
    kept = gateway.cache.get([ask(str(n)).key(open_model(server).identity) for n in range(200)])
    assert len(kept) == len(server.log) - 1


def test_a_pause_ends_with_the_run(server, gateway, monkeypatch):
    resting, real = threading.Event(), gateway_module.pause

    async def later():
        while not resting.is_set():
            await asyncio.sleep(0.005)
        return error(401)

    server.behave = lambda text, attempt: error(429, Retry_After="250") if text == "waits" else later()
    monkeypatch.setattr(gateway_module, "pause", lambda *arguments: resting.set() or real(*arguments))
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(one_line, lambda: gateway.ask(open_model(server, timeout=60), [ask("waits"), ask("no")]))
        assert resting.wait(60) and refused.result(120), "the refusal waited for a pause of four minutes"


def test_a_dead_server_stops_the_run_and_keeps_what_was_finished(server, gateway, pauses):
    def behave(text, attempt):
        if len(server.log) > 60:
            server.stop_listening()
        return answer(said(f"re: {text}"))

    server.behave = behave
    asked = [ask(f"q{n}") for n in range(2000)]
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=4), asked))
    assert "in a row" in message and "some/model" in message and "Connection" in message
    kept = gateway.cache.get([request.key(open_model(server).identity) for request in asked])
    assert 55 <= len(kept) <= 61 and {reply.text for reply in kept.values()} <= {f"re: {text}" for text in server.log}
    assert gateway.counts[server.uri]["calls"] < 300, "of two thousand"


# ---- what is read ----


def one_choice(finish_reason="stop", **message):
    return {"choices": [{"finish_reason": finish_reason, "message": message}]}


def usage(prompt, completion):
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


BODIES = [  # what is changed -> what it becomes
    (one_choice("length", content="fine"), ChatReply("fine", "length", 5, 2)),
    *((one_choice(word, content="fine"), ChatReply("fine", "length", 5, 2)) for word in ("MAX_TOKENS", "max_length")),
    *((one_choice(word, content="fine"), ChatReply("fine", "stop", 5, 2)) for word in ("STOP", "end_turn", None)),
    *((one_choice(word, content="fine"), word) for word in ("tool_calls", "error", "SAFETY", "RECITATION", "abort")),
    *(
        (one_choice(content=f"<think>{why}</think>\n\nfine"), ChatReply("fine", "stop", 5, 2))
        for why in ("", '{"a": 1}')
    ),
    (one_choice("length", content="<think>so the client"), "reasoning that does not end"),
    *((one_choice(content=content), "no word") for content in (" ", "\n\t", "\u200b", "…", "**")),
    *((changed, ChatReply("fine")) for changed in ({"usage": None}, {"usage": {}}, usage(None, None))),
    *((usage(count, 3), ChatReply("fine", "stop", 0, 3)) for count in (-7, 10**30, 10**8)),
    *((usage(3, count), ChatReply("fine", "stop", 3, 0)) for count in (-7, 10**30, 10**8)),
    (one_choice("content_filter", content="half"), "content_filter"),
    *((one_choice(content=content), "no text") for content in (None, "")),
    (one_choice(content="fine") | {"choices": []}, "no choice"),
    ({"choices": []}, "no choice"),
    *(({"choices": choices}, "choices") for choices in (None, {"message": "fine"})),
    *(({"choices": [{"finish_reason": "stop", "message": message}]}, "message") for message in (None, "fine")),
    (one_choice(content=[{"text": "fine"}]), "content"),
    (one_choice(content="half a face \ud83d"), "no chat completion"),
]


@pytest.mark.parametrize("changed, expected", BODIES)
def test_a_body_becomes_an_answer_or_one_line(changed, expected):
    found = read_completion(completion_reader(), json.dumps(json.loads(said()) | changed).encode())
    if isinstance(expected, ChatReply):
        assert found == expected
    else:
        assert isinstance(found, Failure) and expected in found.reason and "\n" not in found.reason and found.raw


# ---- money ----

PRICE = {"input": 1e4, "output": 1e6}  # US dollars a million tokens: a cent for each byte, a dollar for each token said


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_breaks_the_server_s_bill_stays_below_the_cap(server, tmp_path, pauses, monkeypatch, seed):
    class Steady(AdaptiveLimit):
        def note(self, *learnt):
            "Stay where it began, at the ceiling."

    monkeypatch.setattr(gateway_module, "AdaptiveLimit", lambda most: Steady(most, most))
    chance, most, charged, all_there = random.Random(seed), {}, [], asyncio.Event()
    model = open_model(server, attempts=4, concurrency=200, timeout=30.0)
    model.price = PRICE

    async def behave(text, attempt):
        if server.flying == 200:
            all_there.set()
        await all_there.wait()
        await asyncio.sleep(chance.random() * 0.05)
        faults = ["dear", "no counts", "reset", "mid-body", "cut", "page", "429", "500", "400", "filter"]
        kind = chance.choice(["good"] * 6 + faults)
        if kind == "dear":
            charged.append(1.08 + 2)
            return answer(said(usage=(108, 2)))
        if kind in ("good", "filter"):
            charged.append(0.11 + 1)
            return answer(said("fine" if kind == "good" else "", usage=(11, 1)))
        if kind in ("429", "500", "400"):
            return error(int(kind))
        charged.append(most[text])  # as much as it could claim
        faulty = {"no counts": answer(said(usage=None)), "reset": Cut(b""), "cut": Closed(CHUNKS)}
        return (faulty | {"page": answer(b"<html>"), "mid-body": Cut(answer(said()[:30], length=500))})[kind]

    server.behave = lambda text, attempt: behave(text, attempt)
    asked = [ask(f"{n:04}{'x' * 96}", decoding=Decoding(2)) for n in range(900)]
    most |= {request.messages[0]["content"]: model.most(request) for request in asked}
    cap = 1000.0
    gateway = Gateway(ReplyCache(tmp_path / "paid.sqlite"), cap, stage="03_ratings")
    with contextlib.suppress(StudyError):
        gateway.ask(model, asked)
        raise AssertionError("the cap was never reached")
    assert sum(charged) <= gateway.spent + 1e-6 and gateway.spent <= cap + 1e-6
    assert sum(charged) > 0.6 * cap and server.most == 200
    [row], count = gateway.cache.bill(), gateway.counts[server.uri]
    assert row["usd"] == pytest.approx(gateway.spent) and row["usd"] == pytest.approx(count["usd"]) and not gateway.busy
    assert (row["prompt_tokens"], row["completion_tokens"]) == (count["prompt_tokens"], count["completion_tokens"])
    assert row["calls"] == len(server.log), "every call that was sent is in the books"


NO_TEXT = [one_choice("length", content=None), one_choice("content_filter", content="half"), one_choice(content="")]
LIES = [None, (0, 0), (-1000, 2), (5, -(10**9)), (10**30, 10**30), (0, 5), (5, 0)]
BILLED = [  # what came, and what is booked: "most" where it may be billed and nobody says how much
    *((how, "most") for how in (Cut(b""), Cut(answer(said()[:30], length=500)), Closed(CHUNKS), Silent, error(504))),
    (answer(b"<html>"), "most"),
    *((answer(said(usage=counts)), "most") for counts in LIES),
    *((answer(said(usage=(1, 2), **changed)), 2.01) for changed in NO_TEXT),  # the tokens went into thoughts
    *((error(status), 0) for status in (500, 429, 400)),
]


@pytest.mark.parametrize("how, usd", BILLED)
def test_what_is_booked_is_what_may_be_billed(server, tmp_path, how, usd):
    gateway = Gateway(ReplyCache(tmp_path / "paid.sqlite"), 100.0)
    model = open_model(server, attempts=1, timeout=0.5 if how is Silent else 9)
    model.price, server.behave, request = PRICE, lambda text, attempt: how, ask("abc", decoding=Decoding(3))
    gateway.ask(model, [request])
    expected = model.most(request) if usd == "most" else usd
    assert gateway.spent == pytest.approx(expected) == pytest.approx(gateway.cache.spent())


def test_what_was_never_sent_costs_nothing(tmp_path, pauses):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        model = chat_model(f"openai:m@http://127.0.0.1:{taken.getsockname()[1]}/v1", max_retries=2, timeout=5)
        model.price, gateway = PRICE, Gateway(ReplyCache(tmp_path / "paid.sqlite"), 100.0)
        [failure] = gateway.ask(model, [ask(decoding=Decoding(3))])
    assert "Connection" in failure.reason and gateway.spent == 0 and gateway.counts[model.uri]["retries"] == 2


# ---- keys ----


def files_below(folder) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_each_key_goes_to_its_own_place(server, gateway, monkeypatch):
    local, own, example = "PSYCOPREF_KEY_LOCALHOST", "PSYCOPREF_SERVER_KEY", "PSYCOPREF_KEY_API_EXAMPLE_ORG"
    keys = {name: f"sk-{name}-0123456789" for name in (local, own, "OPENAI_API_KEY", example)}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")  # where the client takes OpenAI to be
    paid = Gateway(gateway.cache, 100.0)
    elsewhere = server.uri.replace("127.0.0.1", "localhost")
    for uri, name in ((server.uri, own), (elsewhere, local), ("openai:gpt-4o-mini", "OPENAI_API_KEY")):
        assert isinstance(paid.ask(chat_model(uri, max_retries=0, timeout=5), [ask()])[0], ChatReply)
        assert [word for word in keys.values() if word in repr(server.headers[-1])] == [keys[name]]
        assert server.headers[-1]["authorization"] == f"Bearer {keys[name]}"
        assert not [word for word in keys.values() if word in repr(server.bodies[-1])]


def test_a_redirect_takes_no_key_to_another_place(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    other = RawServer()
    try:
        there = f"http://127.0.0.1:{other.port}/v1/chat/completions"
        server.behave = lambda text, attempt: answer(b"", 307, Location=there)
        assert "redirects (307)" in one_line(lambda: gateway.ask(open_model(server, attempts=1), [ask()]))
        assert KEY in repr(server.headers) and KEY not in repr(other.headers)
    finally:
        other.stop()


PROXIES = [
    ({"HTTPS_PROXY": "http://127.0.0.1:3128"}, "https://api.example.org/v1", "http://127.0.0.1:3128"),
    ({"ALL_PROXY": "http://127.0.0.1:3128"}, "https://api.example.org/v1", "http://127.0.0.1:3128"),
    ({"HTTPS_PROXY": "http://127.0.0.1:3128", "NO_PROXY": "example.org"}, "https://api.example.org/v1", None),
    ({"HTTP_PROXY": "http://127.0.0.1:3128"}, "https://api.example.org/v1", None),
]


@pytest.mark.parametrize("variables, address, way", PROXIES)
def test_the_environment_names_the_proxy(monkeypatch, variables, address, way):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.lower(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(address) == way
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1080")
    monkeypatch.setenv("NO_PROXY", "")
    assert "HTTPS_PROXY" in one_line(lambda: proxy_of(address))


def test_a_netrc_file_disturbs_no_call(server, gateway, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("psycopref.gateway.servers.LOOPBACK", ())  # as if it were a server elsewhere
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    [reply] = gateway.ask(open_model(server, attempts=1), [ask()])
    assert reply.text == "re: Hello" and "secret" not in repr(server.headers)


ECHOES = [  # a server that says the key wherever it can
    *(error(status, f"Incorrect key {KEY}", Retry_After="1") for status in (400, 401, 429, 500)),
    error(429, f"{KEY} is broke", "insufficient_quota"),
    answer(f"<html>Bearer {KEY}".encode()),
    answer(b"<" + b"x" * 3990 + KEY.encode()),  # at the edge of what is kept
    answer(said(choices=[], note=KEY)),
    answer(said("", note=KEY)),
    Cut(answer(KEY.encode(), length=500)),
    Closed(f"HTTP/1.1 200 x\r\nContent-Length: {KEY}\r\n\r\n".encode()),
    Closed(f"{KEY}\r\n\r\n".encode()),
    Silent,
    answer(said(f"My key is {KEY}, said the server.")),
]


def test_a_key_is_nowhere_afterwards(server, gateway, tmp_path, monkeypatch, capfd, caplog, pauses):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "openai._base_client", "httpx", "httpx2", "aiohttp.client", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    seen = []
    for n, how in enumerate(ECHOES):
        server.behave, model = (
            lambda question, attempt, how=how: how,
            open_model(server, timeout=0.4 if how is Silent else 9),
        )
        try:
            seen += [repr(reply) for reply in gateway.ask(model, [ask(str(n))])]
        except StudyError as refusal:
            seen += traceback.format_exception(refusal)
        seen.append(repr(model))
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert len(server.headers) >= len(ECHOES), "the key was planted where it is read"
    seen += [repr(gateway), json.dumps(gateway.models()), repr(gateway.cache.bill()), *capfd.readouterr()]
    text = "\n".join(seen)
    assert KEY[:12] not in text and "[key]" in text
    assert KEY not in "\n".join(record.getMessage() for record in caplog.records)
    assert KEY.encode() not in files_below(tmp_path) and b"said the server" in files_below(tmp_path)


def test_half_a_key_is_not_shown_where_the_raw_text_is_cut(monkeypatch):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", KEY)
    for start in range(3960, 4010, 7):
        raw = read_completion(completion_reader(), b"<" + b"x" * start + KEY.encode() + b"y" * 9000).raw
        assert KEY[:3] not in raw and 3900 < len(raw) <= 4000


def test_a_short_word_for_a_key_stays_a_word(server, gateway, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", "EMPTY")  # what vLLM's manual takes for no key
    server.behave = lambda text, attempt: answer(said("The glass is EMPTY."))
    assert gateway.ask(open_model(server), [ask()])[0].text == "The glass is EMPTY."


# ---- models retire ----

END, DAY = datetime.date(2027, 1, 14), datetime.timedelta(days=1)


@pytest.fixture
def at(server, monkeypatch):
    """Open a model that retires at END as on a given day; the test's server is in OpenAI's place."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(servers, "OPENAI", f"http://127.0.0.1:{server.port}/v1")
    servers._warn.cache_clear()
    return lambda day, name="gpt-4o-mini-2024-07-18": chat_model(f"openai:{name}", today=lambda: day)


def test_a_model_is_asked_until_its_end_and_afterwards_the_cache_alone_answers(server, gateway, at, capfd):
    paid = Gateway(gateway.cache, 1.0)
    for text in ("kept", "another"):
        [reply] = paid.ask(at(END - DAY), [ask(text)])
        assert isinstance(reply, ChatReply)
    said = capfd.readouterr().err
    assert said.count("gpt-4o-mini-2024-07-18 is shut down on 2027-01-14, in 1 day;") == 1, "said once"
    spent = gateway.cache.spent()
    assert Gateway(gateway.cache, 1.0).ask(at(END), [ask("another")]) == [reply]
    for text in (["new"], ["kept", "new"]):
        line = one_line(lambda: Gateway(gateway.cache, 1.0).ask(at(END), [ask(one) for one in text]))
        assert "was shut down on 2027-01-14" in line and "paper-substitute" in line and "openai:gpt-6-luna" in line
    assert server.log == ["kept", "another"] and gateway.cache.spent() == spent > 0


@pytest.mark.parametrize("name", ["gpt-4o-mini", "gpt-4o-mini-2024-07-18@"])
def test_of_a_model_without_an_end_nothing_is_said(server, gateway, at, capfd, name):
    name = name.replace("@", f"@http://localhost:{server.port}/v1")  # not the one in OpenAI's place
    [reply] = Gateway(gateway.cache, 1.0).ask(at(END + 365 * DAY, name), [ask("later")])
    assert isinstance(reply, ChatReply) and "shut down" not in capfd.readouterr().err


def test_who_stands_in_is_named_so_and_asked_as_it_wants(server, gateway, at):
    model = at(END, "gpt-6-luna")
    Gateway(gateway.cache, 1.0).ask(model, [ask("Hello", decoding=Decoding(temperature=0.7))])
    assert "not the paper's" in model.label.split(" (")[0] and server.bodies[-1]["reasoning_effort"] == "none"
    assert servers.shutdown_day(model.uri) is None and "reasoning_effort" in model.identity
