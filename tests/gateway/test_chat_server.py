"""The tests' own model server: it keeps the protocol, answers the same each time, and its log tells what was asked and answered."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.prompts import (
    battle_schema,
    parse_all_ratings,
    parse_battle,
    parse_ratings,
    rating_all_schema,
    rating_schema,
)

from chat_server import BATCH_LINES, ENDED, line_problem, message_key, read_lines, start_server


def question(n=0):
    return [{"role": "user", "content": f"My sister has called {n} times about the house. Rate the four responses."}]


def schema_form(schema):
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}


def client_of(server, **options):
    return openai.OpenAI(
        base_url=server.base_url,
        api_key="sk-planted-0123456789",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
        **options,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with (
        start_server(tmp_path_factory.mktemp("server"), latency=0, batch_seconds=0.1) as server,
        client_of(server) as client,
    ):
        yield server, client


# ---- chat completions ----


@pytest.mark.parametrize(
    "schema, read",
    [(rating_schema(), parse_ratings), (rating_all_schema(), parse_all_ratings), (battle_schema(), parse_battle)],
)
def test_a_reply_obeys_its_schema(running, schema, read):
    done = running[1].chat.completions.create(model="any", messages=question(), response_format=schema_form(schema))
    found = read(done.choices[0].message.content)
    assert json.loads(done.choices[0].message.content).keys() == schema["properties"].keys()
    assert set(found) == set(PRINCIPLE_KEYS) if read is parse_all_ratings else found
    assert (
        done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens > 20
        and done.choices[0].finish_reason == "stop"
    )


def test_a_question_has_one_answer_on_any_server(running, tmp_path):
    with start_server(tmp_path, latency=0) as other, client_of(other) as second:
        first, again, elsewhere = (
            client.chat.completions.create(model="any", messages=question()).choices
            for client in (running[1], running[1], second)
        )
    assert first == again == elsewhere and len(first[0].message.content.split()) == 40
    assert first != running[1].chat.completions.create(model="any", messages=question(1)).choices


@pytest.mark.parametrize(
    "changed",
    [
        {"stream": True},
        {"messages": []},
        {"response_format": schema_form({"type": "object", "properties": {"a": {"anyOf": []}}})},
        {"messages": [{"role": "user"}]},
    ],
)
def test_what_it_does_not_speak_is_refused(running, changed):
    with pytest.raises(openai.BadRequestError):
        running[1].chat.completions.create(**{"model": "any", "messages": question()} | changed)


async def flood(server, n):
    async with openai.AsyncOpenAI(
        base_url=server.base_url,
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        return await asyncio.gather(
            *(client.chat.completions.create(model="any", messages=question(i)) for i in range(n)),
            return_exceptions=True,
        )


def test_calls_above_the_limit_are_refused_and_said_when_to_return(tmp_path):
    with start_server(tmp_path, latency=1.0, refuse_above=5) as server:
        replies = asyncio.run(flood(server, 20))
        refused = [reply for reply in replies if isinstance(reply, openai.RateLimitError)]
        stats = server.stats()
        assert len(refused) == stats["refused"] == 15
        assert stats["answered"] == stats["asked"] == stats["most_in_flight"] == 5
        assert {error.response.headers["retry-after-ms"] for error in refused} == {"50"} and stats[
            "in_flight"
        ] == 0 < stats["cpu_seconds"]
        assert len(server.log()) == 10


def test_the_log_names_what_was_asked_and_answered_and_no_key(tmp_path):
    with start_server(tmp_path, latency=0) as server, client_of(server) as client:
        for n in (0, 1, 0):
            client.chat.completions.create(model="any", messages=question(n))
        events = server.log()
        assert [(e["event"], e["key"]) for e in events] == [
            (event, message_key(question(n))) for n in (0, 1, 0) for event in ("asked", "answered")
        ]
        assert [e["t"] for e in events] == sorted(e["t"] for e in events) and all(
            e.keys() == {"event", "key", "t"} for e in events
        )
        assert server.stop() == 0 and server.log() == events
    assert not any("planted" in path.read_text() for path in tmp_path.iterdir())


def test_a_client_that_went_away_was_asked_but_not_answered(tmp_path):
    with start_server(tmp_path, latency=0.5) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.base_url}/chat/completions",
                json={"model": "any", "messages": question()},
                timeout=httpx.Timeout(10, read=0.1),
                trust_env=False,
            )
        until(lambda: server.stats()["dropped"])
        assert [e["event"] for e in server.log()] == ["asked"] and server.stats()["answered"] == 0


# ---- its end ----


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return found


def test_it_stops_after_so_many_calls_with_the_log_complete(tmp_path):
    with start_server(tmp_path, latency=0.01, calls=30) as server:
        assert not any(isinstance(reply, Exception) for reply in asyncio.run(flood(server, 30)))
        assert server.process.wait(10) == 0
        events = server.log()
    assert [sum(e["event"] == event for e in events) for event in ("asked", "answered")] == [30, 30]


ORPHAN = """
import chat_server, os, signal, sys
with chat_server.start_server(sys.argv[1], seconds=60) as server:
    print(server.port, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_stops_when_the_time_is_up_and_when_its_parent_is_gone(tmp_path):
    with start_server(tmp_path, seconds=0.1) as server:
        assert server.process.wait(10) == 0
    parent = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(tmp_path)],
        cwd=Path(__file__).parents[1] / "servers",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert parent.returncode == -signal.SIGKILL
    port = int(parent.stdout)

    def gone():
        try:
            return httpx.get(f"http://127.0.0.1:{port}/stats", trust_env=False) and False
        except httpx.TransportError:
            return True

    until(gone)


def test_one_that_can_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --latancy"):
        with start_server(tmp_path, latancy=1):
            pass


# ---- batches ----


def batch_lines(texts, model="any", **changed):
    return [
        {
            "custom_id": f"call-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": question(n)},
        }
        | changed
        for n in texts
    ]


def send(client, lines, metadata=None):
    content = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    assert client.files.content(file.id).content == content and client.files.retrieve(file.id).bytes == len(content)
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
    )


def finish(client, batch):
    return until(lambda: now if (now := client.batches.retrieve(batch.id)).status in ENDED else None)


def rows(client, name):
    return [json.loads(line) for line in client.files.content(name).text.splitlines()] if name else []


def asked_and_answered(client, lines):
    batch = finish(client, send(client, lines))
    return batch, rows(client, batch.output_file_id), rows(client, batch.error_file_id)


def test_a_file_that_is_wrong_fails_with_its_lines(running):
    lines = batch_lines([500]) + [
        "{not json\n",
        *batch_lines([500]),
        *batch_lines([501], url="/v1/embeddings"),
        *batch_lines([502], "other"),
        *batch_lines([503], body=None),
    ]
    batch, output, errors = asked_and_answered(running[1], lines)
    assert (batch.status, output, errors) == ("failed", [], [])
    assert [(e.code, e.line) for e in batch.errors.data] == [("invalid_json_line", 2), ("duplicate_custom_id", 3), ("url_mismatch", 4), ("model_mismatch", 5),
                                                              ("missing_required_parameter", 6)]  # fmt: skip
    assert asked_and_answered(running[1], ["\n"])[0].errors.data[0].code == "empty_file"


def test_the_limits_of_a_batch_hold():
    line = json.dumps(batch_lines([0])[0]).encode()
    assert line_problem(line, "/v1/chat/completions", set(), None)[1] is None
    for content in (b"x\n" * (BATCH_LINES + 1), b"x" * (200 * 1024**2 + 1)):
        asked, [problem] = asyncio.run(read_lines(content, "/v1/chat/completions"))
        assert (asked, problem["code"], problem["line"]) == ([], "too_many_tasks", None)


def test_batches_are_listed_newest_first_page_by_page(running):
    client = running[1]
    made = [send(client, batch_lines([600 + n])).id for n in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:2:-1] and page.has_more and page.last_id == made[3]
    assert [batch.id for batch in client.batches.list(limit=2)][:5] == made[::-1]  # the client turns the pages
    assert [batch.id for batch in client.batches.list(after=made[1], limit=1).data] == made[:1]
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_unknown")


def test_what_is_no_batch_is_refused(running):
    client = running[1]
    with pytest.raises(openai.BadRequestError, match="jsonl"):
        client.files.create(file=("lines.txt", b"x"), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="input_file_id"):
        client.batches.create(input_file_id="file-unknown", endpoint="/v1/chat/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="metadata"):
        send(client, batch_lines([700]), {"long": "x" * 513})
    for action in (client.batches.retrieve, client.files.retrieve, client.files.content):
        with pytest.raises(openai.NotFoundError):
            action("none")
