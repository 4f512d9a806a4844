"""Calls a second, processor time, memory and kills: the gateway against a loopback server whose log is the witness."""

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

from bench import demo_speeches, given, keep, save_figure
from psycopref.core.files import PRINCIPLE_KEYS, sha256_file, write_rows
from psycopref.core.stages import blocks, derived_seed, project_root
from psycopref.core.tables import new_figure
from psycopref.feedback.rating import rating_request, read_ratings, shown_order
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.models.chat import ChatRequest

HERE = Path(__file__).parent


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


def client(name: str, base_url: str, n: int, in_flight: int, folder: str) -> None:
    """Be a client process: do n calls, print one JSON line of what they took.

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
    print(json.dumps({"calls": n, "seconds": round(took, 3), "cpu_ms": round(1e3 * cpu / n, 3), "trace": trace}))


def start_client(*arguments) -> subprocess.Popen:
    "Start a client process."
    code = "import sys, bench_gateway as own; a = sys.argv; own.client(a[1], a[2], int(a[3]), int(a[4]), a[5])"
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "PSYCOPREF_PROGRESS": os.devnull, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def server(folder: Path, **options):
    "Open the tests' chat server in a process of its own; see tests/servers/chat_server.py."
    sys.path.insert(0, str(HERE.parent / "servers"))
    from chat_server import start_server

    return start_server(folder, **options)


@contextlib.contextmanager
def scratch_server(**options):
    "Open a scratch folder and a server beside it."
    with tempfile.TemporaryDirectory() as scratch, server(Path(scratch), **options) as opened:
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
        else:
            said = start_client(name, opened.base_url, n, in_flight, scratch).communicate()[0]
        found = json.loads(said.splitlines()[-1])
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
        said = start_client("gateway", opened.base_url, n, in_flight, scratch).communicate()[0]
    found = json.loads(said.splitlines()[-1])
    return {
        "calls": n,
        "peak_mb": max(mb for _, mb in found["trace"]),
        "last_mb": found["trace"][-1][1],
        "seconds": found["seconds"],
        "trace": found["trace"],
    }


def memory_figure(runs: list[dict]):
    "Draw resident memory against calls. runs: of memory."
    figure, axis = new_figure(6.4, 3.4)
    for run in runs:
        axis.plot(*zip(*run["trace"]), marker=".", label=f"{run['calls']:,} calls")
    axis.set(xscale="log", ylim=(0, None), xlabel="calls done", ylabel="resident memory, MB")
    axis.set_title("Memory of the asking process")
    axis.legend()
    return figure


def kill_run(n: int = 5000, kills: int = 30, in_flight: int = 64, seed: int = 0) -> dict:
    """Kill a client of n calls again and again; count by the server's log what was asked twice or lost.

    kills: SIGKILLs; seed: of their moments."""
    moments = sorted(random.Random(seed).sample(range(1, n), kills))
    with scratch_server(latency=0.1, calls=3 * n + 9999, seconds=1800) as (scratch, opened):
        whole, broken, kept = scratch / "whole", scratch / "broken", []
        for folder in (whole, broken):
            folder.mkdir()
        finish(start_client("gateway", opened.base_url, n, in_flight, whole))
        before = len(opened.log())
        for moment in moments:
            process = start_client("gateway", opened.base_url, n, in_flight, broken)
            while process.poll() is None and opened.stats()["answered"] - n < moment:
                time.sleep(0.002)
            process.kill()
            process.wait()
            kept.append((time.monotonic(), kept_keys(broken / "replies.sqlite")))
        finish(start_client("gateway", opened.base_url, n, in_flight, broken))
        log = opened.log()[before:]
        same = sha256_file(whole / "ratings.parquet") == sha256_file(broken / "ratings.parquet")
        identity = chat_model(f"openai:bench@{opened.base_url}").identity
    verdict = kill_verdict(identity, n, kept, log)
    return {"calls": n, "in flight": in_flight, **verdict, "rows equal an unbroken run's": same}


def finish(process: subprocess.Popen) -> None:
    "Wait for a client that must end well."
    if process.wait():
        raise RuntimeError(f"a client ended with {process.returncode}: {process.stdout.read()[-500:]}")


def kept_keys(path: Path) -> set[str]:
    "List the request keys that a cache holds, read by somebody else than its writer."
    import sqlite3

    opened = sqlite3.connect(path)
    try:
        return {key for (key,) in opened.execute("SELECT key FROM replies")}
    except sqlite3.OperationalError:  # killed before the table was there
        return set()
    finally:
        opened.close()


def kill_verdict(identity: str, n: int, kept: list[tuple[float, set[str]]], log: list[dict]) -> dict:
    """Count what was asked though it was kept, asked twice, and answered well before a kill and yet lost.

    identity: of the model; n: calls; kept: moment of each kill with the keys that were kept; log: of the server."""
    import hashlib

    shown = {}
    for request in map(call_of, range(n)):
        text = json.dumps(list(request.messages), sort_keys=True)
        shown[request.key(identity)] = hashlib.sha256(text.encode()).hexdigest()
    asked, answered = (
        [(event["t"], event["key"]) for event in log if event["event"] == kind] for kind in ("asked", "answered")
    )
    kept = [(moment, {shown[key] for key in keys}) for moment, keys in kept]
    again = sum(any(t > moment and key in keys for t, key in asked) for moment, keys in kept)
    before = [0.0, *(moment for moment, _ in kept)]  # what comes in the half second after a kill was meant for the dead
    lost = sum(
        last + 0.5 < t < moment - 0.5 and key not in keys
        for last, (moment, keys) in zip(before, kept)
        for t, key in answered
    )
    return {
        "kills": len(kept),
        "kept at the last kill": len(kept[-1][1]),
        "kills after which a kept call was asked": again,
        "asked": len(asked),
        "asked twice": len(asked) - len({key for _, key in asked}),
        "answered 0.5 s before a kill and lost": lost,
    }


CALLS = 20000  # rating calls of the throughput run
RIVAL_CALLS = 8000  # calls of the run beside other libraries
LATENCY = 0.3  # seconds before the server answers
IN_FLIGHT = 128  # calls in flight
MEMORY_CALLS = [2000, 20000, 200000]  # sizes of the memory runs
KILLS = 30  # SIGKILLs in a run of 5000 calls
RIVALS = {}  # name and command of other libraries, see above


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    cores, load = f"{os.cpu_count()} cores", f"at {LATENCY} s, {IN_FLIGHT} in flight"
    rows = [throughput(name, CALLS, IN_FLIGHT, LATENCY) for name in CLIENTS]
    what = f"{CALLS} rating calls {load}, each client in a process of its own"
    keep("gateway_throughput", {"rows": rows}, what, "calls/s", cores)
    print(pd.DataFrame(rows))
    rows = [throughput(name, RIVAL_CALLS, IN_FLIGHT, LATENCY, RIVALS.get(name, ())) for name in ("gateway", *RIVALS)]
    keep("gateway_rivals", {"rows": rows}, f"{RIVAL_CALLS} rating calls {load}", "calls/s", cores)
    print(pd.DataFrame(rows))
    killed = kill_run(kills=KILLS)
    print(keep("gateway_kills", killed, "a run killed with SIGKILL again and again", "calls", cores))
    runs = [memory(n) for n in MEMORY_CALLS]
    what = "resident memory of the asking process, replies read and rows written"
    keep("gateway_memory", {"runs": runs}, what, "MB", cores)
    save_figure("gateway_memory", memory_figure(runs))
