"""Reward models and policies: one seed, one result, interrupted or on two processes; chosen by development loss."""

import json
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
import torch

from psycopref.core.settings import LoraSettings
from psycopref.training import jobs
from psycopref.training.jobs import launch_command
from psycopref.training.texts import numbered
from refusals import one_line
from trainings import ALONE, CONTRARY, DEV, SETTINGS, TRAIN, Pulled, build, dev_loss, is_reward, losses, pull, run
from trainings import same, some_pairs, train, weights_of, write

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
EACH = pytest.mark.parametrize("settings", [SETTINGS["reward lora"], SETTINGS["dpo full"]], ids=["reward", "dpo"])


def held_by(settings, other):
    return {} if is_reward(settings) else {"reference": other}


@KINDS
def test_a_seed_gives_the_same_weights_bit_by_bit_and_another_seed_others(settings, tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny, tmp_path, name, settings, seed=seed)
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c) and not same(a, weights_of(tiny.location))


@pytest.mark.parametrize(
    "name, dtype", [*((name, "float32") for name in SETTINGS), ("reward lora", "bfloat16"), ("dpo lora", "bfloat16")]
)
def test_resuming_from_any_checkpoint_gives_the_weights_of_no_interruption(name, dtype, tiny, other, tmp_path):
    "In bfloat16 too: peft loads adapters as float32, which would train on otherwise."
    settings = SETTINGS[name]
    more = {"dev": DEV} | held_by(settings, other)
    whole = train(tiny, tmp_path, "whole", settings, dtype, **more)
    expected = weights_of(tmp_path / "whole")
    for stop in (3, 5, 7):
        job, goal = tmp_path / f"job-{stop}", tmp_path / f"model-{stop}"
        write(tiny, job, settings, goal, dtype, **more)
        pull(job, stop, settings)
        assert numbered(job / "checkpoints")[-1][0] == stop - 1
        torn = job / "checkpoints" / f"checkpoint-{stop}"  # the power went while the next one was written
        torn.mkdir()
        (torn / "adapter_model.safetensors").write_bytes(b"half")
        resumed = run(job)
        assert same(weights_of(goal), expected) and losses(resumed) == losses(whole)
        assert [resumed[key] for key in ("best_step", "dev_loss")] == [whole[key] for key in ("best_step", "dev_loss")]


@KINDS
def test_the_kept_weights_are_those_of_the_least_development_loss(settings, tiny, tmp_path):
    "Too large a step size and contrary pairs, so that the last checkpoint is not the best."
    wild = (
        dict(learning_rate=0.05, lora=LoraSettings(rank=4, alpha=64))
        if settings.lora.rank
        else dict(learning_rate=0.01)
    )
    own = replace(settings, epochs=3, **(wild if is_reward(settings) else dict(learning_rate=0.01)))
    found = train(tiny, tmp_path, "model", own, dev=CONTRARY)
    looked = {entry["step"]: entry["eval_loss"] for entry in found["log"] if "eval_loss" in entry}
    assert found["steps"] in looked and found["best_step"] == min(looked, key=looked.get) != found["steps"]
    expected = dev_loss(own, tmp_path / "model", tiny, CONTRARY)
    assert found["dev_loss"] == looked[found["best_step"]] == pytest.approx(expected, rel=1e-4)


@EACH
def test_overlong_and_left_over_pairs_are_counted_and_without_development_pairs_the_last_step_is_kept(
    settings, tiny, tmp_path
):
    long, dev_long = (some_pairs(n, start).assign(rejected="word " * 400) for n, start in ((1, 50), (2, 200)))
    found = train(tiny, tmp_path, "model", settings, pairs=pd.concat([TRAIN, long]), dev=dev_long)
    assert (found["too_long"], found["pairs"], found["left_out"]) == ([50], 19, 3)
    assert (found["dev_too_long"], found["dev_pairs"], found["dev_loss"]) == ([200, 201], 0, None)
    assert found["best_step"] == found["steps"] == 8
    some = train(tiny, tmp_path, "some", replace(settings, epochs=1), dev=pd.concat([dev_long, DEV]))
    assert (some["dev_too_long"], some["dev_pairs"]) == ([200, 201], 5)


@EACH
def test_a_finished_job_is_read_and_a_lost_model_made_again(settings, tiny, tmp_path, monkeypatch):
    first = train(tiny, tmp_path, "model", settings)
    expected = weights_of(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "do_job", None)
        assert train(tiny, tmp_path, "model", settings) == json.loads(json.dumps(first))
    (tmp_path / "model-job" / "result.json").unlink()  # killed between saving and the result
    shutil.rmtree(tmp_path / "model")
    train(tiny, tmp_path, "model", settings)
    assert same(weights_of(tmp_path / "model"), expected)


@pytest.mark.parametrize("name, epochs", [("reward full", 2), ("dpo full", 2), ("dpo full", 1.5), ("dpo full", 0.5)])
def test_interrupted_after_the_last_step_no_step_is_added(name, epochs, tiny, tmp_path, monkeypatch):
    own = replace(SETTINGS[name], epochs=epochs)
    whole = train(tiny, tmp_path, "whole", own)
    with monkeypatch.context() as patch, pytest.raises(Pulled):

        def pulled(*arguments):
            raise Pulled

        patch.setattr(jobs, "save_trained", pulled)
        train(tiny, tmp_path, "broken", own)
    assert not (tmp_path / "broken").exists()
    found = train(tiny, tmp_path, "broken", own)
    assert losses(found) == losses(whole) and len(losses(found)) == int(4 * epochs)
    assert same(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"))


# Several processes


@pytest.mark.parametrize("name, dev", [("reward full", DEV), ("dpo full", DEV), ("dpo lora", None)])
def test_two_processes_train_as_one(name, dev, tiny, other, tmp_path):
    "Same batches, losses, weights to rounding; with and without development pairs, whose number two does not divide."
    settings, more = SETTINGS[name], {"dev": dev} | (held_by(SETTINGS[name], other) if dev is not None else {})
    write(tiny, tmp_path / "two-job", settings, tmp_path / "two", **more)
    started = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ALONE)
    running = subprocess.Popen(launch_command(tmp_path / "two-job", 2), **started)
    one = train(tiny, tmp_path, "one", settings, **more)
    said = running.communicate(timeout=600)[1]
    assert running.returncode == 0, said[-2000:]
    two = json.loads((tmp_path / "two-job" / "result.json").read_text())
    assert (one["devices"], two["devices"]) == (1, 2)
    assert [one[key] for key in ("steps", "best_step")] == [two[key] for key in ("steps", "best_step")]
    near = 1e-4 if is_reward(settings) else 1e-5
    for key in ("loss", "eval_loss") + (() if is_reward(settings) else ("rewards/margins",)):
        assert losses(two, key) == pytest.approx(losses(one, key), abs=near), key
    assert len(losses(two)) == 8 and len(losses(two, "eval_loss")) == (0 if dev is None else 4)
    first, second = (weights_of(tmp_path / n) for n in ("one", "two"))
    assert all(torch.allclose(first[key], second[key], atol=near) for key in first)


@EACH
def test_a_batch_that_the_devices_do_not_divide_is_refused(settings, tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "job", settings, tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = one_line(lambda: build(settings, tmp_path / "job"))
    assert "4" in said and "3 device" in said
