"""What is said to be fast is measured here, both sides in one run."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

from psycopref.core.files import read_json, write_json
from psycopref.core.paper import resource_path
from psycopref.core.stages import cache_root, project_root
from psycopref.core.tables import new_figure


def given(arguments: list[str], known: dict) -> dict:
    "Read NAME=JSON arguments of a bench script; refuse a name that it does not have."
    found = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in known or not name.isupper():
            names = ", ".join(sorted(own for own in known if own.isupper()))
            raise SystemExit(f"{argument}: there is no parameter {name!r}, expected one of {names}")
        found[name] = json.loads(value)
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


def save_figure(name: str, figure) -> None:
    "Save a figure as figures/bench/NAME.png."
    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=160)


def in_turn(sides: dict[str, typing.Callable[[], float]], rounds: int = 3) -> dict[str, list[float]]:
    """Measure several ways in turn; the first round warms up and isn't counted.

    sides: each does its work and returns how many units it did. Returns units/s of each side, round by round."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            start = time.perf_counter()
            done = work()
            if turn:
                rates[side].append(done / (time.perf_counter() - start))
    return rates


def side_by_side(name: str, what: str, unit: str, sides: dict, rounds: int = 3) -> dict:
    """Measure "ours", "theirs" and any other sides in turn, keep medians and ratios of ours to each.

    unit: more is better; sides: as `in_turn` takes them."""
    rates = in_turn(sides, rounds)
    ratios = {side: [a / b for a, b in zip(rates["ours"], own)] for side, own in rates.items() if side != "ours"}
    found = {side: statistics.median(own) for side, own in rates.items()}
    found |= {"ratio": statistics.median(ratios["theirs"]), "ratios": ratios["theirs"]}
    found |= {f"{side} ratio": statistics.median(own) for side, own in ratios.items() if side != "theirs"}
    return keep(name, found, what, unit)


def mixed_speeches(n: int, seed: int = 0, copies: float = 0.1) -> list[str]:
    """Mix the sentences of the demo corpus into n different speeches of three to six.

    copies: share that repeats an earlier one with a greeting before it."""
    chance = random.Random(seed)
    sentences = [part for speech in demo_speeches() for part in re.split(r"(?<=[.?!]) ", speech) if len(part) > 30]
    made: list[str] = []
    while len(made) < n:
        if made and chance.random() < copies:
            made.append("Hello, thanks for reading. " + chance.choice(made))
        else:
            made.append(" ".join(chance.sample(sentences, chance.randint(3, 6))))
    return made


def stage_bench(n: int) -> dict:
    "Run chapter 1 on a made source of n rows in a process of its own."
    import resource

    from psycopref.models.weights import find_weights

    find_weights("minilm")
    with tempfile.TemporaryDirectory() as folder:
        cache, source = Path(folder) / "cache", Path(folder) / "combined_dataset.json"
        cache.mkdir()
        (cache / "weights").symlink_to(cache_root() / "weights")
        lines = (json.dumps({"Context": text, "Response": ""}) + "\n" for text in mixed_speeches(n))
        source.write_text("".join(lines), encoding="utf-8")
        code = "import sys; from psycopref.run.cli import main; sys.exit(main())"
        chapter, sources = str(project_root() / "nbs/01_speeches.ipynb"), f'SOURCES=["demo", "amod-counsel={source}"]'
        command = [sys.executable, "-c", code, "run", chapter, "-p", "RUN=bench", "-p", sources]
        environment = os.environ | {"PSYCOPREF_CACHE": str(cache), "PSYCOPREF_ROOT": folder}
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        took, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        stage = Path(folder) / "outputs/bench/01_speeches"
        receipt, drops = read_json(stage / "receipt.json"), read_json(stage / "drops.json")[-1]
    found = {"seconds": round(took, 1), "stage_seconds": receipt["seconds"], "peak_mb": round(peak)}
    found |= {"rows": drops["rows"], "kept": drops["kept"]}
    what = f"chapter 1 on {n} made speeches and the demo corpus"
    return keep("speech_stage", found, what, "s", f"{os.cpu_count()} cores")


def duplicates_bench(sizes: list[int]) -> tuple:
    """Compare rensa with datasketch, and follow time and memory of the search as it grows.

    sizes: numbers of synthetic speeches. Returns (frame comparing libraries, frame of growth, figure)."""
    import pandas as pd

    from bench_duplicates import growth, library_comparison

    compared = pd.DataFrame(library_comparison(min(15000, max(sizes))))
    grown = pd.DataFrame(growth(sizes, 0))
    what = "near-duplicates among synthetic speeches at a Jaccard index of 0.7; each row in a process of its own"
    rows = {"libraries": compared.to_dict("records"), "growth": grown.to_dict("records")}
    keep("near_duplicates", rows, what, "s", f"{os.cpu_count()} cores")
    figure, axes = new_figure(7.5, 3.2, 1, 2)
    for axis, column, unit in zip(axes, ("seconds", "peak_mb"), ("seconds", "peak memory, MB")):
        axis.plot(grown.n, grown[column], marker="o")
        axis.set(xscale="log", yscale="log", xlabel="speeches", ylabel=unit)
    figure.suptitle("Search for near-duplicates (exact; above 100,000 by rensa, then the exact index)", fontsize=9)
    return compared, grown, figure


SPEECHES = 30000  # rows sent through the whole speech stage
ROWS = [10000, 30000, 100000, 300000, 1000000]  # sizes of the search for near-duplicates


if __name__ == "__main__":
    globals().update(given(sys.argv[1:], globals()))
    print(stage_bench(SPEECHES))
    compared, grown, figure = duplicates_bench(ROWS)
    save_figure("near_duplicates", figure)
    print(compared, grown)
