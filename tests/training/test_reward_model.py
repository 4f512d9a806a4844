"""Reward models: saved as trained, chosen by development loss, the same after an interruption, the same on two processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from psycopref.core.settings import LoraSettings, RewardSettings
from psycopref.training.jobs import launch_command
from psycopref.training.reward_model import (
    build_reward_trainer,
    rating_gaps,
    run_reward_job,
    train_reward_model,
    write_reward_job,
)
from psycopref.training.scoring import load_reward_model, score_pairs
from psycopref.training.texts import last_checkpoint, numbered
from psycopref.models.weights import find_weights, load_tokenizer
from refusals import one_line

SETTINGS = RewardSettings(
    epochs=2,
    batch_size=4,
    pack_tokens=300,
    learning_rate=3e-3,
    warmup_ratio=0.1,
    max_length=300,
    checkpoints=4,
    lora=LoraSettings(rank=4, alpha=8),
)
FULL = replace(SETTINGS, lora=LoraSettings(), learning_rate=1e-3)


@pytest.fixture(scope="module")
def tiny():
    return find_weights("random-tiny")


def some_pairs(n, start=0):
    places = ("stairs", "doors", "windows", "cups", "letters", "coats", "trains")
    good = ("What do you feel then?", "I hear how tiring it is. What would help?", "That sounds like a lot.")
    bad = ("Stop it.", "You should pull yourself together, because everybody else does.", "Whatever.")
    return pd.DataFrame(
        [
            {
                "ID": f"s-{i}",
                "prefID": i,
                "question": f"I count the {places[i % 7]} number {i} again and again.",
                "chosen": good[i % 3],
                "rejected": bad[i % 3],
            }
            for i in range(start, start + n)
        ]
    )


TRAIN, DEV = some_pairs(19), some_pairs(6, 100)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train(tiny, tmp_path, name, settings=SETTINGS, seed=0, dev=DEV, pairs=TRAIN):
    return train_reward_model(
        tiny, pairs, settings, tmp_path / name, tmp_path / f"{name}-job", "float32", seed, dev=dev
    )


@pytest.mark.parametrize("settings", [SETTINGS, FULL], ids=["lora", "full"])
def test_a_seed_gives_the_same_weights_bit_by_bit_and_another_seed_others(settings, tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny, tmp_path, name, settings, seed)
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize(
    "settings, dtype",
    [(SETTINGS, "float32"), (FULL, "float32"), (SETTINGS, "bfloat16")],
    ids=["lora", "full", "lora in bfloat16"],
)
def test_resuming_from_any_checkpoint_gives_the_weights_of_no_interruption(settings, dtype, tiny, tmp_path):
    from transformers import TrainerCallback

    whole = train_reward_model(tiny, TRAIN, settings, tmp_path / "whole", tmp_path / "whole-job", dtype, 0, dev=DEV)
    expected = weights_of(tmp_path / "whole")

    class Pulled(Exception):
        pass

    for stop in (3, 5, 7):
        job = tmp_path / f"job-{stop}"
        write_reward_job(job, tiny, TRAIN, DEV, settings, tmp_path / f"model-{stop}", dtype, 0)
        trainer, _, _ = build_reward_trainer(job)

        class Pull(TrainerCallback):
            def on_step_end(self, args, state, control, **keywords):
                if state.global_step == stop:
                    raise Pulled

        trainer.add_callback(Pull())
        with pytest.raises(Pulled):
            trainer.train()
        checkpoint = last_checkpoint(job / "checkpoints")
        assert checkpoint is not None and numbered(job / "checkpoints")[-1][0] < stop
        torn = job / "checkpoints" / f"checkpoint-{stop}"  # the power went while the next one was written
        torn.mkdir()
        (torn / "adapter_model.safetensors").write_bytes(b"half")
        resumed = run_reward_job(job)
        assert same(weights_of(tmp_path / f"model-{stop}"), expected)
        assert resumed["best_step"] == whole["best_step"] and resumed["dev_loss"] == whole["dev_loss"]


def test_the_kept_weights_are_those_of_the_least_development_loss(tiny, tmp_path):
    "Too large a step size, so that the last checkpoint is not the best."
    settings = replace(SETTINGS, learning_rate=0.05, epochs=3, lora=LoraSettings(rank=4, alpha=64))
    contrary = DEV.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    found = train(tiny, tmp_path, "model", settings, dev=contrary)
    looked = {entry["step"]: entry["eval_loss"] for entry in found["log"] if "eval_loss" in entry}
    assert found["steps"] in looked and found["best_step"] == min(looked, key=looked.get) != found["steps"]
    tokenizer = load_tokenizer(tiny)
    chosen, rejected = score_pairs(
        load_reward_model(str(tmp_path / "model"), tokenizer, "float32"), tokenizer, contrary, name=""
    )
    loss = torch.nn.functional.softplus(torch.tensor(rejected) - torch.tensor(chosen)).mean().item()
    assert loss == pytest.approx(found["dev_loss"], rel=1e-4)


def test_without_development_pairs_the_last_step_is_kept(tiny, tmp_path):
    found = train(tiny, tmp_path, "model", dev=None)
    assert found["best_step"] == found["steps"] == 8 and found["dev_loss"] is None


def test_a_saved_reward_model_scores_as_before(tiny, tmp_path):
    "trl 1379: a score head lost on save would give new, random scores."
    job = tmp_path / "job"
    write_reward_job(job, tiny, TRAIN, None, SETTINGS, tmp_path / "model", "float32", 0)
    trainer, tokenizer, _ = build_reward_trainer(job)
    trainer.train()
    before = score_pairs(trainer.model.eval(), tokenizer, DEV, name="")
    from psycopref.training.texts import save_merged

    save_merged(trainer.model, tokenizer, tmp_path / "model")
    after = score_pairs(
        load_reward_model(str(tmp_path / "model"), load_tokenizer(find_weights(str(tmp_path / "model"))), "float32"),
        tokenizer,
        DEV,
        name="",
    )
    assert torch.allclose(torch.tensor(before), torch.tensor(after), atol=1e-5)
    assert min(map(lambda pair: pair[0] - pair[1], zip(*after))) > 0, "learned, and still there after loading"


def test_overlong_pairs_are_listed_and_left_over_pairs_counted(tiny, tmp_path):
    long = some_pairs(1, 50).assign(rejected="word " * 400)
    found = train(tiny, tmp_path, "model", pairs=pd.concat([TRAIN, long]))
    assert found["too_long"] == [50] and found["pairs"] == 19 and found["left_out"] == 3


def test_a_margin_and_centring_reach_the_loss(tiny, tmp_path):
    wide = TRAIN.assign(gap=[1.0 + (i % 3) for i in range(len(TRAIN))])
    losses = {}
    for name, settings in (
        ("plain", SETTINGS),
        ("margin", replace(SETTINGS, margin=True)),
        ("centred", replace(SETTINGS, center_coefficient=5.0)),
    ):
        losses[name] = train(tiny, tmp_path, name, settings, dev=None, pairs=wide)["log"][0]["loss"]
    assert losses["margin"] > losses["plain"] + 0.1 and losses["centred"] > losses["plain"]


def test_rows_without_any_gap_are_refused_for_margins():
    assert "reward.margin" in one_line(lambda: rating_gaps(TRAIN))


def test_another_job_in_the_folder_is_cleared_and_the_same_one_kept(tiny, tmp_path):
    job = tmp_path / "job"
    write_reward_job(job, tiny, TRAIN, DEV, SETTINGS, tmp_path / "model", "float32", 0)
    (job / "checkpoints").mkdir()
    write_reward_job(job, tiny, TRAIN, DEV, SETTINGS, tmp_path / "model", "float32", 0)
    assert (job / "checkpoints").is_dir(), "the same job goes on"
    write_reward_job(job, tiny, TRAIN, DEV, replace(SETTINGS, epochs=1), tmp_path / "model", "float32", 0)
    assert not (job / "checkpoints").exists()


def test_two_processes_train_as_one(tiny, tmp_path):
    "Same batches, same losses, the same weights to rounding: the global batch is 4 on both."
    found = {}
    for processes in (1, 2):
        job = tmp_path / f"job-{processes}"
        write_reward_job(job, tiny, TRAIN, DEV, FULL, tmp_path / f"model-{processes}", "float32", 0)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        } | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            launch_command(job, processes), capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[processes] = json.loads((job / "result.json").read_text())
    one, two = found[1], found[2]
    assert (one["devices"], two["devices"]) == (1, 2) and one["steps"] == two["steps"]
    for key in ("loss", "eval_loss"):
        losses = [[entry[key] for entry in own["log"] if key in entry] for own in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4) and losses[0]
    first, second = (weights_of(tmp_path / f"model-{n}") for n in (1, 2))
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


PULLED = """
import sys
from pathlib import Path
from transformers import TrainerCallback
from psycopref.training.reward_model import build_reward_trainer

class Pull(TrainerCallback):
    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == 7:
            raise SystemExit(3)

trainer, _, _ = build_reward_trainer(Path(sys.argv[1]))
trainer.add_callback(Pull())
trainer.train()
"""


def test_two_processes_go_on_inside_the_second_epoch_as_if_unbroken(tiny, tmp_path):
    "accelerate's own way to set a sampler's epoch does not reach it after a resume on several devices."
    (tmp_path / "pulled.py").write_text(PULLED)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    } | {"OMP_NUM_THREADS": "1"}
    results = {}
    for name in ("whole", "broken"):
        job = tmp_path / f"{name}-job"
        write_reward_job(job, tiny, TRAIN, DEV, FULL, tmp_path / name, "float32", 0)
        command = launch_command(job, 2)
        if name == "broken":
            done = subprocess.run(
                [*command[:-3], sys.executable, str(tmp_path / "pulled.py"), str(job)],
                capture_output=True,
                text=True,
                timeout=600,
                env=environment,
            )
            assert done.returncode and [n for n, _ in numbered(job / "checkpoints")] == [4, 6], done.stderr[-2000:]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        results[name] = json.loads((job / "result.json").read_text())
    assert [e["loss"] for e in results["whole"]["log"] if "loss" in e] == pytest.approx(
        [e["loss"] for e in results["broken"]["log"] if "loss" in e], abs=1e-6
    )
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_a_batch_that_the_devices_do_not_divide_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    write_reward_job(tmp_path / "job", tiny, TRAIN, None, SETTINGS, tmp_path / "model", "float32", 0)
    said = one_line(lambda: build_reward_trainer(tmp_path / "job"))
    assert "4" in said and "3 device" in said


def test_a_launch_that_fails_says_why_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_PROCESSES", "2")
    assert "batch_size 5" in one_line(lambda: train(tiny, tmp_path, "model", replace(SETTINGS, batch_size=5)))
    assert not (tmp_path / "model").exists()


def test_a_job_killed_between_saving_and_the_result_is_done_again(tiny, tmp_path):
    train(tiny, tmp_path, "model")
    expected = weights_of(tmp_path / "model")
    (tmp_path / "model-job" / "result.json").unlink()
    shutil.rmtree(tmp_path / "model")
    train(tiny, tmp_path, "model")
    assert same(weights_of(tmp_path / "model"), expected)


def test_development_pairs_that_are_all_too_long_are_done_without(tiny, tmp_path):
    found = train(tiny, tmp_path, "model", dev=some_pairs(2, 200).assign(rejected="word " * 400))
    assert found["dev_too_long"] == [200, 201] and found["dev_pairs"] == 0 and found["best_step"] == found["steps"]
