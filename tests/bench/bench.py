"""Tools of the benches: both sides in one run and in turn, time and memory, results kept as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import typing
from pathlib import Path

from psycopref.core.files import write_json
from psycopref.core.paper import resource_path
from psycopref.core.stages import project_root


_SHARED = {"DTYPE", "ROUNDS"}  # may be given to all benches at once


def given(arguments: list[str], known: dict) -> dict:
    "Read NAME=JSON arguments of a bench script, or text where text is expected; refuse a name that it does not have."
    found = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in _SHARED and name not in known:
            continue
        if name not in known or not name.isupper():
            names = ", ".join(sorted(own for own in known if own.isupper()))
            raise SystemExit(f"{argument}: there is no parameter {name!r}, expected one of {names}")
        found[name] = value.strip('"') if isinstance(known[name], str) else json.loads(value)
    return found


def demo_speeches() -> list[str]:
    "Read the speeches of the demo corpus."
    lines = resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["speech"] for line in lines]


def device_name() -> str:
    "Name what torch computes on."
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_mb() -> float:
    "Return the most memory of this process that was resident, in MB; ru_maxrss would start at the parent's peak."
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def in_child(function: str, **order) -> dict:
    "Call MODULE.FUNCTION of a bench in a fresh process, because peak memory never falls again. order: its arguments."
    module, name = function.split(".")
    code = f"import json, sys, {module} as own\nprint('\\n' + json.dumps(own.{name}(**json.loads(sys.argv[1]))))"
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "PSYCOPREF_PROGRESS": os.devnull}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{function} of {order} ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def keep(name: str, found: dict, what: str, unit: str, device: str | None = None) -> dict:
    "Write a result with its unit, device and date to outputs/bench/NAME.json, and return it."
    found = {**found, "unit": unit, "device": device or device_name(), "what": what, "date": time.strftime("%Y-%m-%d")}
    write_json(project_root() / "outputs" / "bench" / f"{name}.json", found)
    return found


def keep_rows(name: str, rows: list[dict]) -> list[dict]:
    "Write several comparisons into one file, the first of which stands for all."
    write_json(project_root() / "outputs" / "bench" / f"{name}.json", {**rows[0], "rows": rows})
    return rows


def show(row: dict) -> None:
    "Print a row of `shares.account` in two lines."
    parts = ", ".join(f"{name} {share:.0%}" for name, share in row["operators"])
    print(f"{row['what']}: {row['tokens/s']:.0f} tokens/s, {row['GFLOP/s']:.0f} GFLOP/s in {row['dtype']},", end=" ")
    print(f"{row['share']:.0%} of its products alone, {row['share of peak']:.0%} of {row['peak GFLOP/s']:.0f} GFLOP/s,")
    print(f"  {row['MB'] or math.nan:.0f} MB; {parts}", flush=True)


def save_figure(name: str, figure) -> None:
    "Save a figure as figures/bench/NAME.png."
    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=160)


def clock() -> float:
    "Read the time in seconds, when a GPU has done what it was told."
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(call: typing.Callable) -> tuple[typing.Any, float, float | None]:
    """Call; return what comes back, seconds, and the most memory taken meanwhile beyond what was there before, in MB.

    Memory is the GPU's where there is one, else the process's resident one; None where the system does not tell."""
    gc.collect()
    torch = sys.modules.get("torch")
    gpu, told = torch is not None and torch.cuda.is_available(), True
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident
        except OSError:
            told = False

    def most() -> float:
        return torch.cuda.max_memory_allocated() / 1e6 if gpu else peak_mb()

    before, start = most() if told else 0, clock()
    result = call()
    took = clock() - start
    return result, took, most() - before if told else None


def in_turn(sides: dict[str, typing.Callable[[], float]], rounds: int = 3, warm: bool = True) -> tuple[dict, dict]:
    """Measure several ways in turn.

    sides: each does its work and returns how many units it did; warm: begin with a round that isn't counted. Returns
    units/s of each side, round by round, and its memory in the first round in MB."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float | None] = {}
    for turn in range(rounds + warm):
        for side, work in sides.items():
            done, took, mb = measured(work)
            memory.setdefault(side, mb)
            if turn >= warm:
                rates[side].append(done / took)
    return rates, memory


def side_by_side(name: str, what: str, unit: str, sides: dict, rounds: int = 3, warm: bool = True) -> dict:
    """Measure "ours", "theirs" and any other sides in turn, keep medians and ratios of ours to each.

    unit: more is better; sides, warm: as `in_turn` takes them."""
    rates, memory = in_turn(sides, rounds, warm)
    ratios = {side: [a / b for a, b in zip(rates["ours"], own)] for side, own in rates.items() if side != "ours"}
    found = {side: statistics.median(own) for side, own in rates.items()}
    found |= {"ratio": statistics.median(ratios["theirs"]), "ratios": ratios["theirs"], "MB": memory}
    found |= {f"{side} ratio": statistics.median(own) for side, own in ratios.items() if side != "theirs"}
    return keep(name, found, what, unit)
