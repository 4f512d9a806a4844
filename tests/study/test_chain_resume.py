"""Stages that were killed, or have lost a part, go on to the same bytes; CI runs them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench_kills import kills
from chains import BIN, chain, environment, receipt, run

pytestmark = pytest.mark.chain
KEPT = (".csv", ".parquet")


def test_the_grid_is_made_cell_by_cell_and_a_lost_cell_again(copy):
    cells = copy / "outputs/tiny/09_mixing.cells"
    assert sorted(path.name for path in cells.iterdir()) == ["random-tiny.half", "random-tiny.psy"]
    rows = json.loads((copy / "outputs/tiny/09_mixing/summary.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["this run's counselling pairs", "Psy16", "Psy8Help8"]
    half = json.loads((cells / "random-tiny.half/cell.json").read_text())
    assert half["drawn"] == {"counselling": 8, "general": 8} and half["training"]["pairs"] == 16
    assert not list(cells.rglob("*.safetensors"))

    def kept():
        return {name: own for name, own in receipt(copy, "09_mixing")["outputs"].items() if name.endswith(KEPT)}

    before = kept()
    shutil.rmtree(cells / "random-tiny.half")
    run(copy, "psycopref", "run", "nbs/09_mixing.ipynb", "-p", "PROFILE=tiny")  # by hand it makes what is missing
    assert kept() == before
    assert (cells / "random-tiny.half/receipt.json").is_file()
    chain(copy)


def test_kills_at_random_moments_leave_the_same_bytes(copy):
    "`make bench WHAT=kills` does a hundred."
    found = kills(copy, 4, seed=1, longest=12.0)
    assert found["kills"] == 4 and found["files"] > 100 and found["differ"] == []


MOMENTS = {
    "checkpoint-*/trainer_state.json": "05_reward",
    "random-tiny/job/checkpoints/checkpoint-*": "06_policy",
    "random-tiny/iter/iteration-2/candidates/block-0000.json": "06_policy",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_training_continues_to_the_same_weights(copy, moment):
    "The next start ends with the bytes of an unbroken run."
    stage = MOMENTS[moment]
    name = f"killed-{stage}-" + "".join(c for c in moment if c.isalnum())
    for done in ("01_speeches", "03_ratings", "04_pairs", *(["05_reward"] if stage == "06_policy" else [])):
        shutil.copytree(copy / "outputs/tiny" / done, copy / "outputs" / name / done)
    command = [str(BIN / "psycopref"), "run", f"nbs/{stage}.ipynb", "-p", "PROFILE=tiny", "-p", f"RUN={name}"]
    how = dict(start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=copy, env=environment(), **how)
    work = copy / "outputs" / name / f"{stage}.partial"
    limit = time.monotonic() + 300
    while process.poll() is None and not _there(work, moment) and time.monotonic() < limit:
        time.sleep(0.01)
    assert process.poll() is None, "the moment passed before the kill"
    os.killpg(process.pid, signal.SIGKILL)
    for pid in _children_in(copy):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (copy / "outputs" / name / stage).exists()
    run(copy, *command)
    signed = [receipt(copy, stage, run)["outputs"].items() for run in (name, "tiny")]
    killed, whole = ({key: own for key, own in found if key.endswith(".safetensors")} for found in signed)
    assert killed and killed == whole


def _there(folder, moment):
    "Whether a file or folder stands below; one that goes away while we look is looked for again."
    try:
        return any(folder.rglob(moment))
    except FileNotFoundError:
        return False


def _children_in(folder):
    "Kernels that a killed runner left in this copy."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ValueError):
            place = Path(os.readlink(path.parent / "cwd"))
            if b"ipykernel_launcher" in path.read_bytes() and place.is_relative_to(folder):
                found.append(int(path.parent.name))
    return found
