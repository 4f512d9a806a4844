"""Wheel and sdist in a clean environment: pairs and measures without torch, training with it; CI runs them."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from chains import REPOSITORY

pytestmark = pytest.mark.chain

WITHOUT_TORCH = """
import importlib.util, importlib, pkgutil
import numpy as np, pandas as pd
import psycopref

assert not importlib.util.find_spec("torch") and not importlib.util.find_spec("transformers")
for module in pkgutil.walk_packages(psycopref.__path__, "psycopref."):
    importlib.import_module(module.name)  # rooms that train load their libraries when they are asked to

from psycopref.core.principles import principle_keys, read_principles
from psycopref.feedback.pairing import make_pairs, scored_responses
from psycopref.stats.intervals import mean_interval
from psycopref.stats.scores import pairwise_metrics

assert pairwise_metrics(np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, 0.0]))["accuracy"] == 2 / 3
assert len(read_principles("plain-words").keys) == 5
responses = pd.DataFrame(
    [("q", "a", 0, "What is it like?", "stop"), ("q", "b", 0, "Stop it.", "stop")],
    columns=["speech_id", "model", "sample", "response", "finish_reason"],
)
marks = [("q", model, key, mark) for model, mark in (("a", 5), ("b", 2)) for key in principle_keys()]
ratings = pd.DataFrame(marks, columns=["speech_id", "model", "principle", "rating"])
speeches = pd.DataFrame({"speech_id": ["q"], "speech": ["I count the stairs."], "split": ["train"]})
pairs = make_pairs(speeches, scored_responses(responses, ratings), ("train",), 1.0, best_worst=False)
assert pairs.chosen_model.tolist() == ["a"]
print("without torch")
"""

WITH_TRAIN = """
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer

weights = find_weights("random-tiny")
model, tokenizer = load_causal_lm(weights), load_tokenizer(weights)
assert model(**tokenizer("I count the stairs.", return_tensors="pt")).logits.isfinite().all()
print("with train")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The wheel and the source archive."
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    "Python of an environment that holds the wheel and what it requires, and nothing else."
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(folder / "bin/python", str(built[0]))
    return folder / "bin/python"


def install(python, what):
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--constraint", str(REPOSITORY / "constraints.txt"), what]
    done = subprocess.run(command, env=far(), capture_output=True, text=True)
    if done.returncode and not os.environ.get("PSYCOPREF_INSTALL"):  # CI sets it: there nothing may be skipped
        pytest.skip(f"no registry to install from: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]


def far():
    "The environment's variables, less those that lead back to this checkout."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PSYCOPREF_ROOT")}


def outside(tmp_path, *command):
    "Run something far from the checkout."
    return subprocess.run(list(map(str, command)), cwd=tmp_path, env=far(), capture_output=True, text=True)


def test_wheel_and_archive_hold_every_room_and_resource(built):
    wheel, archive = built
    listed = subprocess.run(["git", "ls-files", "psycopref"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    ours = {*listed.stdout.split()}
    assert {*zipfile.ZipFile(wheel).namelist()} >= ours
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= ours | {"pyproject.toml", "README.md", "LICENSE"}


def test_measuring_and_pairing_work_without_torch(clean, tmp_path):
    done = outside(tmp_path, clean, "-c", WITHOUT_TORCH)
    assert done.stdout == "without torch\n", done.stderr[-2000:]
    tool = clean.parent / "psycopref"
    plan = outside(tmp_path, tool, "plan", "--profile", "paper")
    assert plan.returncode == 0 and "185,381" in plan.stdout, plan.stderr
    (tmp_path / "a.csv").write_text("client_speech,response\nI count the stairs at night.,What is it like?\n")
    lacking = outside(tmp_path, tool, "rate", "a.csv", "-o", "b.csv")
    assert lacking.returncode == 1 and lacking.stderr.count("\n") == 1
    assert "is not installed" in lacking.stderr and "pip install 'psycopref[train]'" in lacking.stderr


def test_the_extra_train_brings_what_trains(built, clean, tmp_path):
    install(clean, f"{built[0]}[train]")
    done = outside(tmp_path, clean, "-c", WITH_TRAIN)
    assert done.stdout == "with train\n", done.stderr[-2000:]
    listed = outside(tmp_path, clean, "-m", "pip", "check")
    assert listed.returncode == 0, listed.stdout
