"""Reward models: margins and centring, saved as trained, resumed on two processes, refused in one line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.jobs import launch_command
from psycopref.training.reward_model import build_reward_trainer, loss_margins, rating_gaps
from psycopref.training.scoring import load_reward_model, score_pairs
from psycopref.training.texts import numbered, save_merged
from refusals import one_line
from trainings import ALONE, DEV, SETTINGS, TRAIN, losses, same, train, weights_of, write

LORA, FULL = SETTINGS["reward lora"], SETTINGS["reward full"]


def test_a_saved_reward_model_scores_as_before(tiny, tmp_path):
    "trl 1379: a score head lost on save would give new, random scores."
    trainer, tokenizer, _ = build_reward_trainer(write(tiny, tmp_path / "job", LORA, tmp_path / "model"))
    trainer.train()
    before = score_pairs(trainer.model.eval(), tokenizer, DEV, name="")
    save_merged(trainer.model, tokenizer, tmp_path / "model")
    tokenizer = load_tokenizer(find_weights(str(tmp_path / "model")))
    after = score_pairs(load_reward_model(str(tmp_path / "model"), tokenizer, "float32"), tokenizer, DEV, name="")
    assert torch.allclose(torch.tensor(before), torch.tensor(after), atol=1e-5)
    assert min(chosen - rejected for chosen, rejected in zip(*after)) > 0, "learned, and still there after loading"


def test_a_margin_and_centring_reach_the_loss(tiny, tmp_path):
    wide = TRAIN.assign(gap=[1.0 + (i % 3) for i in range(len(TRAIN))])
    plain, margin, centred = (
        losses(train(tiny, tmp_path, f"model-{i}", replace(LORA, **own), pairs=wide))[0]
        for i, own in enumerate(({}, {"margin": True}, {"center_coefficient": 5.0}))
    )
    assert margin > plain + 0.1 and centred > plain


def test_rows_without_any_gap_are_refused_for_margins():
    assert "reward.margin" in one_line(lambda: rating_gaps(TRAIN))
    assert "19 of 19 pairs have no gap" in one_line(lambda: loss_margins(TRAIN.assign(gap=float("nan"))))


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
    how, results = dict(capture_output=True, text=True, timeout=600, env=ALONE), {}
    for name in ("whole", "broken"):
        job = write(tiny, tmp_path / f"{name}-job", FULL, tmp_path / name, dev=DEV)
        command = launch_command(job, 2)
        if name == "broken":
            pulled = [*command[:-3], sys.executable, str(tmp_path / "pulled.py"), str(job)]
            done = subprocess.run(pulled, **how)
            assert done.returncode and [n for n, _ in numbered(job / "checkpoints")] == [4, 6], done.stderr[-2000:]
        done = subprocess.run(command, **how)
        assert done.returncode == 0, done.stderr[-2000:]
        results[name] = json.loads((job / "result.json").read_text())
    assert losses(results["whole"]) == pytest.approx(losses(results["broken"]), abs=1e-6)
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_a_launch_that_fails_says_why_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_PROCESSES", "2")
    assert "batch_size 5" in one_line(lambda: train(tiny, tmp_path, "model", replace(LORA, batch_size=5)))
    assert not (tmp_path / "model").exists()
