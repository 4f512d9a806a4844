"""A hundred kills of the `tiny` study at random moments, a full disk, a read-only one: the same bytes in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

import psutil

from bench import given, keep

sys.path.insert(0, str(Path(__file__).parents[1]))
from chains import BIN, environment, finished_chain  # noqa: E402

KEPT = (".csv", ".parquet", ".safetensors")  # what holds no time of day


def signed(project: Path) -> dict[str, dict[str, str]]:
    "Read what every stage of the run signed, but for what tells times: stage -> file -> hash."
    found = {}
    for path in sorted(project.glob("outputs/tiny/*/receipt.json")):
        outputs = json.loads(path.read_text())["outputs"]
        own = {name: digest for name, digest in outputs.items() if name.endswith(KEPT) and "seconds" not in name}
        found[path.parent.name] = {name: digest for name, digest in own.items() if "spending" not in name}
    return found


def start(project: Path) -> subprocess.Popen:
    "Start the study."
    command = [str(BIN / "snakemake"), "--cores", "2", "--nolock", "--rerun-incomplete", "--config", "profile=tiny"]
    how = dict(start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=project, env=environment(), **how)


def kill(process: subprocess.Popen) -> None:
    "Kill a start with all that it started, wherever that hides, at once."
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.communicate()


def lost(project: Path, chance: random.Random, stages: list[str]) -> list[str]:
    "Take some stages away, as if they had never been made; others must follow. Returns their names."
    gone = chance.sample(stages, chance.randint(1, 3))
    for name in gone:
        shutil.rmtree(project / "outputs" / "tiny" / name, ignore_errors=True)
        shutil.rmtree(project / "outputs" / "tiny" / "kept" / name, ignore_errors=True)
    return gone


def kills(project: Path, n: int, seed: int = 0, longest: float = 20.0) -> dict:
    """Kill the study n times at random moments, each time after some stages were lost; then let it finish.

    longest: seconds to a kill. Returns counts of kills, of starts that ended first, and of files that differ."""
    chance, before, killed, ended = random.Random(seed), signed(project), 0, 0
    while killed < n:
        if not (project / "outputs/tiny/13_report/receipt.json").is_file() or chance.random() < 0.3:
            pass  # go on with what the last kill left
        else:
            lost(project, chance, list(before))
        process = start(project)
        try:
            _, said = process.communicate(timeout=chance.uniform(0.5, longest))
            ended += 1
            if process.returncode:
                raise RuntimeError(f"after {killed} kills the study does not go on: {said[-600:]}")
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
    process = start(project)
    _, said = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"after {killed} kills the study does not go on: {said[-600:]}")
    return {"kills": killed, "ended before the kill": ended, **compared(before, signed(project))}


def compared(before: dict, after: dict) -> dict:
    "Count the files that two signings share, and name those that differ."
    names = [(stage, name) for stage in before for name in before[stage]]
    differ = [f"{stage}/{name}" for stage, name in names if after.get(stage, {}).get(name) != before[stage][name]]
    return {"files": len(names), "differ": differ}


@contextlib.contextmanager
def mounted(place: Path, *how: str) -> typing.Iterator[bool]:
    "Mount something over a folder, where we may; says whether it could."
    done = subprocess.run(["mount", *how, str(place)], capture_output=True, text=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)


def no_room(project: Path) -> dict:
    "Run a chapter on a full disk, and on one that can't be written; each ends in one line, and a later start goes on."
    found, before = {}, signed(project)
    outputs = project / "outputs"
    kept = project / "kept-outputs"
    shutil.copytree(outputs, kept)
    command = [str(BIN / "psycopref"), "run", "nbs/04_pairs.ipynb", "-p", "PROFILE=tiny"]
    size = sum(-(-path.lstat().st_size // 4096) * 4 for path in outputs.rglob("*")) + 300  # in whole pages, KiB
    for what, how in {
        "full": ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs"],
        "read-only": ["-o", "bind,ro", str(kept)],
    }.items():
        with mounted(outputs, *how) as could:
            if not could:
                found[what] = "not tried: mounting is not allowed here"
                continue
            if what == "full":
                shutil.copytree(kept, outputs, dirs_exist_ok=True)
                filler = outputs / "filler"
                with contextlib.suppress(OSError), open(filler, "wb") as file:
                    while True:
                        file.write(b"x" * 4096)
                        file.flush()
            else:
                subprocess.run(["mount", "-o", "remount,bind,ro", str(outputs)], check=True)
            done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=600)
            said = [line for line in done.stderr.splitlines() if line.startswith("psycopref: ")]
            good = done.returncode and len(said) == 1 and "Traceback" not in done.stderr
            found[what] = f"one line: {said[0][:160]}" if good else f"FAULT: {done.stderr[-400:]!r}"
    process = start(project)
    process.communicate(timeout=1800)
    return found | {"afterwards": compared(before, signed(project))}


KILLS = 100

if __name__ == "__main__":
    n = given(sys.argv[1:], {"KILLS": KILLS}).get("KILLS", KILLS)
    began, scratch = time.time(), Path(tempfile.mkdtemp())
    try:
        chain = finished_chain(scratch / "chain")
        disks = no_room(chain)  # the shorter part first: what fails there fails early
        print(json.dumps(disks, indent=1, ensure_ascii=False), flush=True)
        result = kills(chain, n) | {"disks": disks}
        result["seconds"] = round(time.time() - began)
        print(json.dumps(result, indent=1, ensure_ascii=False))
        keep("kills", result, f"{n} kills of a whole tiny study", "kills")
        faults = len(result["differ"]) + sum(str(own).startswith("FAULT") for own in result["disks"].values())
        sys.exit(bool(faults or result["disks"]["afterwards"]["differ"]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
