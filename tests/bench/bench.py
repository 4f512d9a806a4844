"""What is said to be fast is measured here, both sides in one run."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
import typing

from psycopref.core.tables import new_figure
from psycopref.core.files import write_json
from psycopref.core.paper import resource_path
from psycopref.core.stages import project_root
from bench_duplicates import growth, library_comparison
from psycopref.models.weights import find_weights


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


def in_turn(
    sides: dict[str, typing.Callable[[], float]],  # each does its work and returns how many units it did
    rounds: int = 3,  # counted measurements of each side
) -> dict[str, list[float]]:  # units/s of each side, round by round
    "Measure several ways in turn; the first round warms up and isn't counted."
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            start = time.perf_counter()
            done = work()
            if turn:
                rates[side].append(done / (time.perf_counter() - start))
    return rates


def device_name() -> str:  # for a result
    "Name what is computed on."
    import torch

    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def side_by_side(
    name: str,  # of the benchmark
    what: str,  # what is measured, in a sentence
    unit: str,  # of both figures; more is better
    ours: typing.Callable[[], float],  # does the work, returns how many units it did
    theirs: typing.Callable[[], float],  # the same work
    rounds: int = 3,  # counted measurements of each side
) -> dict:  # ours, theirs, ratio, unit, device, what
    "Measure two ways in turn and keep the medians."
    rates = in_turn({"ours": ours, "theirs": theirs}, rounds)
    medians = {side: statistics.median(own) for side, own in rates.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"])]
    found = {
        **medians,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "unit": unit,
        "device": device_name(),
        "what": what,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(project_root() / "outputs" / "bench" / f"{name}.json", found)
    return found


def mixed_speeches(
    n: int,  # how many
    seed: int = 0,  # of the mixture
    copies: float = 0.1,  # share that repeats an earlier one with a greeting before it
) -> list[str]:  # speeches of three to six sentences
    "Mix the sentences of the demo corpus into many different speeches."
    import random
    import re

    chance = random.Random(seed)
    lines = [
        json.loads(line)["speech"]
        for line in resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    sentences = [part for line in lines for part in re.split(r"(?<=[.?!]) ", line) if len(part) > 30]
    made: list[str] = []
    while len(made) < n:
        again = made and chance.random() < copies
        made.append(
            "Hello, thanks for reading. " + chance.choice(made)
            if again
            else " ".join(chance.sample(sentences, chance.randint(3, 6)))
        )
    return made


def stage_bench(
    n: int,  # rows of the source
) -> dict:  # seconds, peak_mb, rows, kept
    "Run chapter 1 on a made source in a process of its own, embeddings not cached."
    import os
    import resource
    import subprocess
    import sys
    from pathlib import Path

    from psycopref.core.stages import cache_root

    find_weights("minilm")
    with tempfile.TemporaryDirectory() as folder:
        cache, source = Path(folder) / "cache", Path(folder) / "combined_dataset.json"
        cache.mkdir()
        (cache / "weights").symlink_to(cache_root() / "weights")
        source.write_text(
            "".join(json.dumps({"Context": text, "Response": ""}) + "\n" for text in mixed_speeches(n)),
            encoding="utf-8",
        )
        command = [
            sys.executable,
            "-c",
            "import sys; from psycopref.run.cli import main; sys.exit(main())",
            "run",
            str(project_root() / "nbs/01_speeches.ipynb"),
            "-p",
            "RUN=bench",
            "-p",
            f'SOURCES=["demo", "amod-counsel={source}"]',
        ]
        start = time.perf_counter()
        subprocess.run(
            command,
            env=os.environ | {"PSYCOPREF_CACHE": str(cache), "PSYCOPREF_ROOT": folder},
            check=True,
            capture_output=True,
        )
        took, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        receipt = json.loads((Path(folder) / "outputs/bench/01_speeches/receipt.json").read_text())
        drops = json.loads((Path(folder) / "outputs/bench/01_speeches/drops.json").read_text())[-1]
    found = {
        "seconds": round(took, 1),
        "stage_seconds": receipt["seconds"],
        "peak_mb": round(peak),
        "rows": drops["rows"],
        "kept": drops["kept"],
        "what": f"chapter 1 on {n} made speeches and the demo corpus, embeddings not cached",
        "unit": "s",
        "device": f"{os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(project_root() / "outputs" / "bench" / "speech_stage.json", found)
    return found


def duplicates_bench(
    sizes: list[int],  # numbers of synthetic speeches
) -> tuple:  # (frame comparing libraries, frame of growth, figure)
    "Compare rensa with datasketch, and follow time and memory of the search as it grows."
    import pandas as pd

    compared = pd.DataFrame(library_comparison(min(15000, max(sizes))))
    grown = pd.DataFrame(growth(sizes, 0))
    write_json(
        project_root() / "outputs" / "bench" / "near_duplicates.json",
        {
            "libraries": compared.to_dict("records"),
            "growth": grown.to_dict("records"),
            "date": time.strftime("%Y-%m-%d"),
            "what": "near-duplicates among synthetic speeches at a Jaccard index of 0.7; each row in a process of its "
            "own",
        },
    )
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
    stage_found = stage_bench(SPEECHES)
    print(stage_found)
    compared, grown, figure = duplicates_bench(ROWS)
    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "near_duplicates.png", dpi=160)
    print(compared, grown)
