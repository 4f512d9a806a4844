"""Reward models and policies: one seed, one result, interrupted or on two processes; chosen by development loss."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from psycopref.training import jobs
from psycopref.training.jobs import launch_command, run_or_launch
from psycopref.training.reward_model import loss_margins, rating_gaps
from psycopref.training.texts import numbered
from refusals import one_line
from trainings import CONTRARY, DEV, SETTINGS, TRAIN, Pulled, build, dev_loss, is_reward, losses, pull
from trainings import same, some_pairs, train, weights_of, write

pytestmark = pytest.mark.usefixtures("one_thread")

REWARD = SETTINGS["reward lora"]
EACH = pytest.mark.parametrize("name", ["reward lora", "dpo full"])


def given(name, other):
    return {"dev": DEV} | ({} if is_reward(SETTINGS[name]) else {"reference": other})


@pytest.fixture(scope="module")
def whole(tiny, other, tmp_path_factory):
    "Train once without interruption; returns the result and the weights."

    @functools.cache
    def trained(name, dtype="float32"):
        folder = tmp_path_factory.mktemp("whole")
        result = train(tiny, folder, "model", SETTINGS[name], dtype, **given(name, other))
        return result, weights_of(folder / "model")

    return trained


def pulled(*arguments):
    raise Pulled


@pytest.mark.parametrize(
    "name, dtype",
    [("reward full", "float32"), ("dpo full", "float32"), ("reward lora", "bfloat16"), ("dpo lora", "bfloat16")],
)
def test_interrupted_anywhere_it_ends_with_the_weights_of_no_interruption(
    name, dtype, whole, tiny, other, tmp_path, monkeypatch
):
    "In the first epoch, at its end, in the second, and behind the last step; peft loads bfloat16 adapters as float32."
    settings, (result, weights) = SETTINGS[name], whole(name, dtype)
    job = write(tiny, tmp_path / "job", settings, tmp_path / "model", dtype, **given(name, other))
    for stop in (3, 5, 7):
        pull(job, stop, settings)
        assert numbered(job / "checkpoints")[-1][0] == stop - 1
        torn = job / "checkpoints" / f"checkpoint-{stop}"  # the power went while the next one was written
        torn.mkdir()
        (torn / "adapter_model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch, pytest.raises(Pulled):
        patch.setattr(jobs, "save_trained", pulled)
        run_or_launch(job)
    assert not (tmp_path / "model").exists()
    found = run_or_launch(job)
    assert same(weights_of(tmp_path / "model"), weights) and losses(found) == losses(result)
    assert [found[key] for key in ("best_step", "dev_loss")] == [result[key] for key in ("best_step", "dev_loss")]


@EACH
def test_another_seed_gives_other_weights(name, whole, tiny, other, tmp_path):
    train(tiny, tmp_path, "model", replace(SETTINGS[name], epochs=1), seed=1, **given(name, other))
    own = weights_of(tmp_path / "model")
    assert not same(own, whole(name)[1]) and not same(own, weights_of(tiny.location))


@EACH
def test_the_kept_weights_are_those_of_the_least_development_loss(name, tiny, tmp_path):
    "Development pairs contradict the training pairs: learning makes them worse, so the last is not the best."
    own = replace(SETTINGS[name], epochs=3, learning_rate=0.01)
    found = train(tiny, tmp_path, "model", own, dev=CONTRARY)
    looked = {entry["step"]: entry["eval_loss"] for entry in found["log"] if "eval_loss" in entry}
    assert found["steps"] in looked and found["best_step"] == min(looked, key=looked.get) != found["steps"]
    expected = dev_loss(own, tmp_path / "model", tiny, CONTRARY)
    assert found["dev_loss"] == looked[found["best_step"]] == pytest.approx(expected, rel=1e-4)


@EACH
def test_overlong_and_left_over_pairs_are_counted_and_without_development_pairs_the_last_step_is_kept(
    name, tiny, tmp_path
):
    settings = replace(SETTINGS[name], epochs=1)
    long, dev_long = (some_pairs(n, start).assign(rejected="word " * 400) for n, start in ((1, 50), (2, 200)))
    found = train(tiny, tmp_path, "model", settings, pairs=pd.concat([TRAIN, long]), dev=dev_long)
    assert (found["too_long"], found["pairs"], found["left_out"]) == ([50], 19, 3)
    assert (found["dev_too_long"], found["dev_pairs"], found["dev_loss"]) == ([200, 201], 0, None)
    assert found["best_step"] == found["steps"] == 4
    job = write(tiny, tmp_path / "some", settings, tmp_path / "model", dev=pd.concat([dev_long, DEV]))
    facts = build(settings, job)[2]
    assert (facts["dev_too_long"], facts["dev_pairs"]) == ([200, 201], 5)


# Several processes

WORKER = """
import sys
from pathlib import Path

from psycopref.run.cli import main
from trainings import SETTINGS, pull

for job in map(Path, sys.argv[1:]):
    if job.name == "broken":
        pull(job, 7, SETTINGS["reward full"])
    main(["train", str(job)])
"""


def on_two_processes(folder, jobs):
    "Train jobs one after another in the same two processes."
    (folder / "worker.py").write_text(WORKER)
    *launcher, _, _, _ = launch_command(jobs[0], 2)
    command = [*launcher, sys.executable, str(folder / "worker.py"), *map(str, jobs)]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((job / "result.json").read_text()) for job in jobs]


def test_two_processes_train_as_one_and_go_on_as_if_unbroken(whole, tiny, other, tmp_path):
    """Same batches, losses, weights to rounding; with and without development pairs, whose number two does not divide.

    One job is pulled inside its second epoch: accelerate's own way to set a sampler's epoch does not reach it then."""
    cases = {name: (name, given(name, other)) for name in ("reward full", "dpo full")}
    cases |= {"broken": ("reward full", {"dev": DEV}), "dpo lora": ("dpo lora", {})}
    written = [
        write(tiny, tmp_path / title, SETTINGS[name], tmp_path / f"{title}-two", **more)
        for title, (name, more) in cases.items()
    ]
    found = dict(zip(cases, on_two_processes(tmp_path, written)))
    one = {name: whole(name) for name in ("reward full", "dpo full")}
    result = train(tiny, tmp_path, "one", SETTINGS["dpo lora"])
    one["dpo lora"] = result, weights_of(tmp_path / "one")
    for name, (single, weights) in one.items():
        two, near = found[name], 1e-4 if is_reward(SETTINGS[name]) else 1e-5
        assert (single["devices"], two["devices"]) == (1, 2)
        assert [single[key] for key in ("steps", "best_step")] == [two[key] for key in ("steps", "best_step")]
        for key in ("loss", "eval_loss") + (() if is_reward(SETTINGS[name]) else ("rewards/margins",)):
            assert losses(two, key) == pytest.approx(losses(single, key), abs=near), (name, key)
        assert len(losses(two)) == 8 and len(losses(two, "eval_loss")) == (0 if name == "dpo lora" else 4)
        second = weights_of(tmp_path / f"{name}-two")
        assert all(torch.allclose(weights[key], second[key], atol=near) for key in weights), name
    assert losses(found["reward full"]) == losses(found["broken"])
    assert same(weights_of(tmp_path / "reward full-two"), weights_of(tmp_path / "broken-two"))


@EACH
def test_a_batch_that_the_devices_do_not_divide_is_refused(name, tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "job", SETTINGS[name], tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = one_line(lambda: build(SETTINGS[name], tmp_path / "job"))
    assert "4" in said and "3 device" in said


@EACH
def test_processes_that_nobody_reckoned_with_are_refused(name, tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "job", SETTINGS[name], tmp_path / "model")
    monkeypatch.setattr("psycopref.training.texts.devices", lambda: 2)  # but nobody else has come
    assert "expected steps of 4 pairs over all" in one_line(lambda: build(SETTINGS[name], tmp_path / "job"))


def test_a_launch_that_fails_says_why_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_PROCESSES", "2")
    assert "batch_size 5" in one_line(lambda: train(tiny, tmp_path, "model", replace(REWARD, batch_size=5)))
    assert not (tmp_path / "model").exists()


# Margins and centring of rewards


def test_a_margin_and_centring_reach_the_loss(tiny, tmp_path):
    pairs = TRAIN[:4].assign(gap=[1.0, 2.0, 3.0, 1.0])
    plain, margin, centred = (
        losses(train(tiny, tmp_path, f"model-{i}", replace(REWARD, epochs=1, **own), pairs=pairs))[0]
        for i, own in enumerate(({}, {"margin": True}, {"center_coefficient": 5.0}))
    )
    assert margin > plain + 0.1 and centred > plain


def test_rows_without_any_gap_are_refused_for_margins():
    assert "reward.margin" in one_line(lambda: rating_gaps(TRAIN))
    assert "19 of 19 pairs have no gap" in one_line(lambda: loss_margins(TRAIN.assign(gap=float("nan"))))
