"""Stages that were killed, or have lost a part, go on to the same bytes; CI runs them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from chains import BIN, chain, environment, receipt, run

pytestmark = pytest.mark.chain


def test_the_grid_is_made_cell_by_cell_and_a_lost_cell_again(copy):
    cells = copy / "outputs/tiny/09_mixing.cells"
    assert sorted(path.name for path in cells.iterdir()) == ["random-tiny.half", "random-tiny.psy"]
    rows = json.loads((copy / "outputs/tiny/09_mixing/summary.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["this run's counselling pairs", "Psy16", "Psy8Help8"]
    half = json.loads((cells / "random-tiny.half/cell.json").read_text())
    assert (
        half["drawn"] == {"counselling": 8, "general": 8}
        and half["training"]["pairs"] == 16
        and not list(cells.rglob("*.safetensors"))
    )
    before = receipt(copy, "09_mixing")["outputs"]
    shutil.rmtree(cells / "random-tiny.half")
    run(copy, "psycopref", "run", "nbs/09_mixing.ipynb", "-p", "PROFILE=tiny")  # by hand it makes what is missing
    after = receipt(copy, "09_mixing")["outputs"]
    assert {name: digest for name, digest in after.items() if name.endswith((".csv", ".parquet"))} == {
        name: digest for name, digest in before.items() if name.endswith((".csv", ".parquet"))
    }
    assert (cells / "random-tiny.half/receipt.json").is_file()
    chain(copy)


@pytest.mark.parametrize(
    "stage, moment",
    [
        ("05_reward", "checkpoint-*/trainer_state.json"),
        ("05_reward", "checkpoint-*"),
        *(
            ("06_policy", f"random-tiny/{place}")
            for place in (
                "job/checkpoints/checkpoint-*",
                "iter/iteration-1/candidates/block-0000.json",
                "iter/iteration-1/job/checkpoints/checkpoint-*",
                "iter/iteration-2/candidates/block-0000.json",
            )
        ),
    ],
)
def test_killed_training_continues_to_the_same_weights(copy, stage, moment):
    "SIGKILL at six places; the next start ends with the bytes of an unbroken run."
    name = f"killed-{stage}-" + "".join(c for c in moment if c.isalnum())
    for done in ("01_speeches", "03_ratings", "04_pairs", *(["05_reward"] if stage == "06_policy" else [])):
        shutil.copytree(copy / "outputs/tiny" / done, copy / "outputs" / name / done)
    command = [str(BIN / "psycopref"), "run", f"nbs/{stage}.ipynb", "-p", "PROFILE=tiny", "-p", f"RUN={name}"]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
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
    weights = {
        key: digest for key, digest in receipt(copy, stage, name)["outputs"].items() if key.endswith(".safetensors")
    }
    assert weights and weights == {
        key: digest for key, digest in receipt(copy, stage)["outputs"].items() if key.endswith(".safetensors")
    }


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
        try:
            if b"ipykernel_launcher" in path.read_bytes() and Path(os.readlink(path.parent / "cwd")).is_relative_to(
                folder
            ):
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found
