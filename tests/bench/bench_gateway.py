"""Calls a second, processor time, memory and kills: the gateway against a loopback server whose own log is the witness."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

from psycopref.core.tables import new_figure
from psycopref.core.files import sha256_file, write_json, write_rows
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.core.stages import blocks, derived_seed, project_root
from psycopref.core.paper import resource_path
from psycopref.gateway.gateway import Gateway, chat_model
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.feedback.rating import rating_request, read_ratings, shown_order

HERE = Path(__file__).parent


@functools.cache
def sentences() -> list[str]:  # of the demo corpus
    "Split the demo corpus into sentences to make texts of."
    lines = resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()
    return [part.strip() + "." for line in lines for part in json.loads(line)["speech"].split(".") if len(part) > 20]


@functools.lru_cache(maxsize=64)
def texts_of(
    speech: str,  # speech_id
) -> tuple[str, ...]:  # a client speech and four responses
    "Make the texts of one speech; in the study they are there already."
    chance = random.Random(derived_seed(0, speech))
    return tuple(" ".join(chance.choices(sentences(), k=k)) for k in (6, 12, 12, 12, 12))


def job_of(
    n: int,  # number of the call
) -> tuple[str, str, list[int]]:  # speech_id, principle, order
    "Say what the n-th rating call of an endless study is about."
    speech, principle = f"bench-{n // len(PRINCIPLE_KEYS)}", PRINCIPLE_KEYS[n % len(PRINCIPLE_KEYS)]
    return speech, principle, shown_order(4, 0, speech, principle)


def call_of(
    n: int,  # number of the call
) -> ChatRequest:  # what is asked
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

            async def call(i):
                async with gate:
                    how = {
                        "type": "json_schema",
                        "json_schema": {"name": "reply", "strict": True, "schema": requests[i].schema},
                    }
                    await client.chat.completions.create(
                        model="bench",
                        messages=list(requests[i].messages),
                        max_completion_tokens=512,
                        response_format=how,
                    )

            await asyncio.gather(*map(call, range(n)))

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
                    async with session.post(
                        f"{base_url}/chat/completions", data=body, headers={"Content-Type": "application/json"}
                    ) as response:
                        json.loads(await response.read())

            await asyncio.gather(*(worker() for _ in range(in_flight)))

    model = chat_model(f"openai:bench@{base_url}")
    bodies = [json.dumps(model.chat_arguments(call_of(i))) for i in range(n)]
    seen(0)
    asyncio.run(work())


CLIENTS = {"gateway": by_gateway, "openai": by_openai, "aiohttp": by_aiohttp}


def client(
    name: str,  # a key of CLIENTS
    base_url: str,  # of the server
    n: int,  # calls
    in_flight: int,  # at once
    folder: str,  # for the cache and the rows
) -> None:
    "Be a client process: do the calls, print one JSON line of what they took."
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
    code = "import sys; from bench_gateway import client; client(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])"
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "PSYCOPREF_PROGRESS": os.devnull, "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def server(folder: Path, **options):
    "Open the tests' chat server in a process of its own; see tests/servers/chat_server.py."
    sys.path.insert(0, str(HERE.parent / "servers"))
    from chat_server import start_server

    return start_server(folder, **options)


def bench_facts(
    what: str,  # what was measured
) -> dict:  # what, device, date
    "Say where and when a benchmark ran."
    return {"what": what, "device": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d")}


def throughput(
    name: str,  # a key of CLIENTS, or of `rivals`
    n: int,  # calls
    in_flight: int = 128,  # at once
    latency: float = 0.3,  # seconds
    command: typing.Sequence[str] = (),  # of a rival
) -> dict:  # client, calls, calls_s, share of the ideal, cpu_ms a call, most in flight
    "Measure one client."
    with (
        tempfile.TemporaryDirectory() as scratch,
        server(Path(scratch), latency=latency, calls=n + 100, seconds=900) as opened,
    ):
        if command:
            prompts = Path(scratch) / "prompts.jsonl"
            prompts.write_text("".join(json.dumps(list(call_of(i).messages)) + "\n" for i in range(n)))
            done = subprocess.run(
                [*command, opened.base_url, str(prompts), str(in_flight)],
                capture_output=True,
                text=True,
                check=True,
                cwd=project_root(),
            )
        else:
            process = start_client(name, opened.base_url, n, in_flight, scratch)
            done = subprocess.CompletedProcess([], 0, process.communicate()[0])
        found = json.loads(done.stdout.splitlines()[-1])
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


def memory(
    n: int,  # calls
    in_flight: int = 128,  # at once
) -> dict:  # calls, peak MB, trace of (calls, MB)
    "Follow a client's resident memory while it asks, reads and writes n calls."
    with (
        tempfile.TemporaryDirectory() as scratch,
        server(Path(scratch), latency=0.02, calls=n + 100, seconds=1800) as opened,
    ):
        found = json.loads(
            start_client("gateway", opened.base_url, n, in_flight, scratch).communicate()[0].splitlines()[-1]
        )
    return {
        "calls": n,
        "peak_mb": max(mb for _, mb in found["trace"]),
        "last_mb": found["trace"][-1][1],
        "seconds": found["seconds"],
        "trace": found["trace"],
    }


def memory_figure(
    runs: list[dict],  # of memory
):  # figure
    "Draw resident memory against calls."
    figure, axis = new_figure(6.4, 3.4)
    for run in runs:
        axis.plot(*zip(*run["trace"]), marker=".", label=f"{run['calls']:,} calls")
    axis.set(
        xscale="log",
        ylim=(0, None),
        xlabel="calls done",
        ylabel="resident memory, MB",
        title="Memory of the asking process",
    )
    axis.legend()
    return figure


def kill_run(
    n: int = 5000,  # calls
    kills: int = 30,  # SIGKILLs
    in_flight: int = 64,  # at once
    seed: int = 0,  # of the moments
) -> dict:  # what was asked twice, what was lost, whether the rows are the same
    "Kill a client again and again, and let the server's log say what was asked twice."
    moments = sorted(random.Random(seed).sample(range(1, n), kills))
    with (
        tempfile.TemporaryDirectory() as scratch,
        server(Path(scratch), latency=0.1, calls=3 * n + 9999, seconds=1800) as opened,
    ):
        whole, broken, kept = Path(scratch) / "whole", Path(scratch) / "broken", []
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
        log, same = (
            opened.log()[before:],
            sha256_file(whole / "ratings.parquet") == sha256_file(broken / "ratings.parquet"),
        )
        identity = chat_model(f"openai:bench@{opened.base_url}").identity
    return {
        "calls": n,
        "in flight": in_flight,
        **kill_verdict(identity, n, kept, log),
        "rows equal an unbroken run's": same,
    }


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


def kill_verdict(
    identity: str,  # of the model
    n: int,  # calls
    kept: list[tuple[float, set[str]]],  # (moment of a kill, keys that were kept)
    log: list[dict],  # of the server, from the first of these clients on
) -> dict:  # counts
    "Count what was asked though it was kept, asked twice, and answered well before a kill and yet lost."
    import hashlib

    requests = [call_of(i) for i in range(n)]
    shown = {
        request.key(identity): hashlib.sha256(json.dumps(list(request.messages), sort_keys=True).encode()).hexdigest()
        for request in requests
    }
    asked = [(event["t"], event["key"]) for event in log if event["event"] == "asked"]
    answered = [(event["t"], event["key"]) for event in log if event["event"] == "answered"]
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
    from bench import given

    globals().update(given(sys.argv[1:], globals()))
    import pandas as pd

    rows = [throughput(name, CALLS, IN_FLIGHT, LATENCY) for name in CLIENTS]
    write_json(
        project_root() / "outputs" / "bench" / "gateway_throughput.json",
        {
            "rows": rows,
            **bench_facts(
                f"{CALLS} rating calls at {LATENCY} s, {IN_FLIGHT} in flight, each client in a process of its own"
            ),
        },
    )
    print(pd.DataFrame(rows))
    rows = [throughput(name, RIVAL_CALLS, IN_FLIGHT, LATENCY, RIVALS.get(name, ())) for name in ("gateway", *RIVALS)]
    write_json(
        project_root() / "outputs" / "bench" / "gateway_rivals.json",
        {"rows": rows, **bench_facts(f"{RIVAL_CALLS} rating calls at {LATENCY} s, {IN_FLIGHT} in flight")},
    )
    print(pd.DataFrame(rows))
    killed = kill_run(kills=KILLS)
    write_json(
        project_root() / "outputs" / "bench" / "gateway_kills.json",
        killed | bench_facts("a run killed with SIGKILL again and again"),
    )
    print(killed)
    runs = [memory(n) for n in MEMORY_CALLS]
    write_json(
        project_root() / "outputs" / "bench" / "gateway_memory.json",
        {"runs": runs, **bench_facts("resident memory of the asking process, replies read and rows written")},
    )
    figure = memory_figure(runs)
    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gateway_memory.png", dpi=160)
