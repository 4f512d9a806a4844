"""The check of a GPU runs dry on a CPU, says what it leaves out, and calls other losses a failure."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check
from gpu_check import DRY, FULL, NotRun, Report, losses, tables, with_kernel, worded
from psycopref.core.files import read_json

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "check.sh"


@pytest.fixture
def report(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    return Report("made", {"dry run": True})


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of\nmemory")


def no_room():
    raise NotRun("the plan says 150 GB")


def test_a_row_is_measured_or_says_why_not_and_the_next_is_tried(report, capsys):
    report.row("one", lambda: {"tokens/s": 5.0})
    report.row("two", no_memory)
    report.row("three", no_room)
    report.row("four", lambda: {"tokens/s": 7.0}, needs=10 * gpu_check.SECONDS)
    report.row("five", lambda: signal.raise_signal(signal.SIGALRM))  # as when the part's time is over
    written = read_json(report.path)
    assert written["dry run"] and written["rows"] == report.rows
    said = capsys.readouterr().out.splitlines()
    assert [worded(row) for row in report.rows] == [line.strip() for line in said]
    assert "two: failed: OutOfMemoryError: CUDA out of memory" in said[1] and "not run: the plan says" in said[2]
    assert re.search(r"four: not run: needs about 2700 s, 2\d\d of 270 are left", said[3]) and "were over" in said[4]
    assert "tokens/s" in tables(report.rows) and "two" not in tables(report.rows)


def test_a_library_that_catches_every_exception_does_not_swallow_the_end(report):
    def deaf():
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception:
            return {"tokens/s": 1.0}

    report.row("deaf", deaf)
    assert "were over" in report.rows[0]["not run"]


@pytest.mark.usefixtures("one_thread")
def test_losses_of_another_model_are_a_failure(report, monkeypatch):
    def other(model, kernel):
        own = with_kernel(model, kernel)
        own.base_model.layers[0].self_attn.scaling *= 1.1
        return own

    monkeypatch.setattr(gpu_check, "with_kernel", other)
    losses(report, DRY)
    ours = [row for row in report.rows if row["what"].endswith(" segments") and "float32" in row["what"]]
    assert len(ours) == 2 and all("not equal to trl's in float32: " in row["failed"] for row in ours)
    assert not any("failed" in row for row in report.rows if row["what"].endswith(("trl", "varlen")))


def test_all_that_a_machine_with_torch_lacks_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    names = re.search(r"names='(.+?)'", SCRIPT.read_text(encoding="utf-8"))[1].split("|")
    assert len(names) > 8 and all(re.search(rf"(?im)^{name}==", pins) for name in names)


@pytest.mark.chain
def test_a_dry_run_measures_both_parts_and_says_what_needs_a_gpu(tmp_path):
    own = dict(PYTHON=sys.executable, OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run([SCRIPT, "--dry"], capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("dry run on CPU, figures are not results") == 2 and "\n0 failed\n" in done.stdout
    assert all(f"{name}: steps and memory: not run: no GPU" in done.stdout for name in FULL.shapes)
    assert "varlen: not run: the varlen kernel needs CUDA" in done.stdout and "5282 tokens/s" in done.stdout
    found = {part: read_json(tmp_path / f"gpu_{part}.json") for part in ("losses", "speed")}
    for own in found.values():
        assert own["dry run"] is True and own["versions"]["torch"] == torch.__version__
    rows = {row["what"]: row for row in found["speed"]["rows"]}
    step = rows["DPO, tiny, 4 pairs"]
    assert 0 < step["ours / matmul"] < 1.5 and step["ours tokens/s"] > 0 and step["ours MFU"] is None
    assert rows["memory, policy, tiny, LoRA of rank 16"]["plan GB"] > 0
    engines = {what.rpartition(", ")[2]: row for what, row in rows.items() if what.startswith("sampling")}
    assert engines["local"]["tokens/s"] > 0 and (
        "tokens/s" in engines["vllm"] or engines["vllm"]["not run"] == "vllm is not installed"
    )
