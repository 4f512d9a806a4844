"""Calls a second, processor time and memory: the gateway against a loopback server whose log is the witness."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

from bench import demo_speeches, given, in_child, keep, save_figure
from psycopref.core.files import write_rows
from psycopref.core.principles import principle_keys
from psycopref.core.stages import blocks, derived_seed, project_root
from psycopref.core.tables import new_figure
from psycopref.feedback.rating import rating_request, read_ratings, shown_order
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.models.chat import ChatRequest

PRINCIPLE_KEYS = principle_keys()


@functools.cache
def sentences() -> list[str]:
    "Split the demo corpus into sentences to make texts of."
    return [part.strip() + "." for speech in demo_speeches() for part in speech.split(".") if len(part) > 20]


@functools.lru_cache(maxsize=64)
def texts_of(speech: str) -> tuple[str, ...]:
    "Make a client speech and four responses for a speech_id; in the study they are there already."
    chance = random.Random(derived_seed(0, speech))
    return tuple(" ".join(chance.choices(sentences(), k=k)) for k in (6, 12, 12, 12, 12))


def job_of(n: int) -> tuple[str, str, list[int]]:
    "Say what the n-th rating call of an endless study is about: speech_id, principle, order."
    speech, principle = f"bench-{n // len(PRINCIPLE_KEYS)}", PRINCIPLE_KEYS[n % len(PRINCIPLE_KEYS)]
    return speech, principle, shown_order(4, 0, speech, principle)


def call_of(n: int) -> ChatRequest:
    "Word the n-th rating call."
    speech, principle, order = job_of(n)
    client, *responses = texts_of(speech)
    return rating_request(principle, client, [responses[i] for i in order], 512)


def by_gateway(base_url: str, n: int, in_flight: int, folder: Path, seen: typing.Callable) -> None:
    "Ask n calls through the gateway, read each reply, write the ratings."
    import pandas  # noqa: F401, as in any notebook: not while calls are under way

    model = chat_model(f"openai:bench@{base_url}")
    model.concurrency = in_flight
    gateway = Gateway(ReplyCache(folder / "replies.sqlite"), stage="bench")
    parts = blocks(range(n), 3584)

    def frames():
        asked = ((call_of(i) for i in part) for part in parts)
        for replies, part in zip(gateway.stream(model, asked, "bench", n), parts):
            answered = [(job_of(i), reply, list("wxyz")) for i, reply in zip(part, replies)]
            frame, aside = read_ratings(answered, [], "bench", 4, lambda job: "")
            if aside:
                raise RuntimeError(f"{len(aside)} calls failed, the first: {aside[0]['reason']}")
            seen(part[-1] + 1)
            yield frame

    write_rows(folder / "ratings.parquet", "ratings", frames())


def by_openai(base_url: str, n: int, in_flight: int, folder: Path, seen: typing.Callable) -> None:
    "Ask n calls with the openai client and a semaphore; nothing is kept."
    import openai

    async def work():
        gate = asyncio.Semaphore(in_flight)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:

            async def call(request):
                schema = {"name": "reply", "strict": True, "schema": request.schema}
                own = dict(model="bench", messages=list(request.messages), max_completion_tokens=512)
                async with gate:
                    await client.chat.completions.create(
                        **own, response_format={"type": "json_schema", "json_schema": schema}
                    )

            await asyncio.gather(*map(call, requests))

    requests = [call_of(i) for i in range(n)]
    seen(0)  # the clock starts when the prompts are there
    asyncio.run(work())


def by_aiohttp(base_url: str, n: int, in_flight: int, folder: Path, seen: typing.Callable) -> None:
    "Post n ready bodies with aiohttp alone: what the machine and the server can do."
    import aiohttp

    async def work():
        left = iter(bodies)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight)) as session:

            async def worker():
                for body in left:
                    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                        json.loads(await response.read())

            await asyncio.gather(*(worker() for _ in range(in_flight)))

    model = chat_model(f"openai:bench@{base_url}")
    url, bodies = f"{base_url}/chat/completions", [json.dumps(model.chat_arguments(call_of(i))) for i in range(n)]
    seen(0)
    asyncio.run(work())


CLIENTS = {"gateway": by_gateway, "openai": by_openai, "aiohttp": by_aiohttp}


def client(name: str, base_url: str, n: int, in_flight: int, folder: str) -> dict:
    """Do n calls in this process; return what they took.

    name: a key of CLIENTS; folder: for the cache and the rows."""
    import psutil

    process, trace = psutil.Process(), []
    start = [time.monotonic(), time.process_time()]

    def seen(done: int) -> None:
        if not done:  # only now the calls begin
            start[:] = time.monotonic(), time.process_time()
        trace.append((done, round(process.memory_info().rss / 2**20, 1)))

    CLIENTS[name](base_url, n, in_flight, Path(folder), seen)
    took, cpu = time.monotonic() - start[0], time.process_time() - start[1]
    return {"calls": n, "seconds": round(took, 3), "cpu_ms": round(1e3 * cpu / n, 3), "trace": trace}


def ask(name: str, base_url: str, n: int, in_flight: int, folder: Path) -> dict:
    "Let a client do n calls in a process of its own."
    order = dict(name=name, base_url=base_url, n=n, in_flight=in_flight, folder=str(folder))
    return in_child("bench_gateway.client", **order)


@contextlib.contextmanager
def scratch_server(**options):
    "Open a scratch folder and the tests' chat server beside it, in a process of its own."
    sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))
    from chat_server import start_server

    with tempfile.TemporaryDirectory() as scratch, start_server(Path(scratch), **options) as opened:
        yield Path(scratch), opened


def throughput(
    name: str, n: int, in_flight: int = 128, latency: float = 0.3, command: typing.Sequence[str] = ()
) -> dict:
    """Measure one client: calls a second, share of the ideal, processor time a call.

    name: a key of CLIENTS, or of RIVALS with its command; latency: of the server, in seconds."""
    with scratch_server(latency=latency, calls=n + 100, seconds=900) as (scratch, opened):
        if command:
            prompts = scratch / "prompts.jsonl"
            prompts.write_text("".join(json.dumps(list(call_of(i).messages)) + "\n" for i in range(n)))
            rival = [*command, opened.base_url, str(prompts), str(in_flight)]
            said = subprocess.run(rival, capture_output=True, text=True, check=True, cwd=project_root()).stdout
            found = json.loads(said.splitlines()[-1])
        else:
            found = ask(name, opened.base_url, n, in_flight, scratch)
        times = [event["t"] for event in opened.log() if event["event"] in ("asked", "answered")]
        stats = opened.stats()
    rate = n / (max(times) - min(times))
    if stats["answered"] != n:
        raise RuntimeError(f"{name}: {stats['answered']} of {n} calls were answered")
    return {
        "client": name,
        "calls": n,
        "calls_s": round(rate, 1),
        "share of ideal %": round(100 * rate * latency / in_flight, 1),
        "cpu ms a call": found.get("cpu_ms"),
        "most in flight": stats["most_in_flight"],
        "server cpu ms a call": round(1e3 * stats["cpu_seconds"] / n, 3),
    }


def memory(n: int, in_flight: int = 128) -> dict:
    "Follow a client's resident memory in MB while it asks, reads and writes n calls."
    with scratch_server(latency=0.02, calls=n + 100, seconds=1800) as (scratch, opened):
        found = ask("gateway", opened.base_url, n, in_flight, scratch)
    return {**found, "peak_mb": max(mb for _, mb in found["trace"]), "last_mb": found["trace"][-1][1]}


def memory_figure(runs: list[dict]):
    "Draw resident memory against calls. runs: of memory."
    figure, axis = new_figure(6.4, 3.4)
    for run in runs:
        axis.plot(*zip(*run["trace"]), marker=".", label=f"{run['calls']:,} calls")
    axis.set(xscale="log", ylim=(0, None), xlabel="calls done", ylabel="resident memory, MB")
    axis.set_title("Memory of the asking process")
    axis.legend()
    return figure


CALLS = 4000  # rating calls of the throughput run
RIVAL_CALLS = 4000  # calls of the run beside other libraries
LATENCY = 0.3  # seconds before the server answers
IN_FLIGHT = 128  # calls in flight
MEMORY_CALLS = [1000, 8000]  # sizes of the memory runs
RIVALS = {}  # name and command of other libraries, see above


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    cores, load = f"{os.cpu_count()} cores", f"at {LATENCY} s, {IN_FLIGHT} in flight"
    rows = [throughput(name, CALLS, IN_FLIGHT, LATENCY) for name in CLIENTS]
    what = f"{CALLS} rating calls {load}, each client in a process of its own"
    keep("gateway_throughput", {"rows": rows}, what, "calls/s", cores)
    print(pd.DataFrame(rows))
    names = ("gateway", *RIVALS) if RIVALS else ()
    if rows := [throughput(name, RIVAL_CALLS, IN_FLIGHT, LATENCY, RIVALS.get(name, ())) for name in names]:
        keep("gateway_rivals", {"rows": rows}, f"{RIVAL_CALLS} rating calls {load}", "calls/s", cores)
        print(pd.DataFrame(rows))
    runs = [memory(n) for n in MEMORY_CALLS]
    what = "resident memory of the asking process, replies read and rows written"
    keep("gateway_memory", {"runs": runs}, what, "MB", cores)
    save_figure("gateway_memory", memory_figure(runs))
