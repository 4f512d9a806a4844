"""Training and scoring of reward models beside trl's RewardTrainer and a plain padded loop, in the same run."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

from bench import given, keep, keep_rows, save_figure, side_by_side
from bench_training import LENGTHS, bench_figure, gpu_bench, lora_bench, made_groups, made_pairs, relative_gap, twin
from psycopref.core.files import read_json
from psycopref.core.settings import LoraSettings, RewardSettings
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.jobs import launch_command, store_job
from psycopref.training.reward_model import RewardJob
from psycopref.training.scoring import load_reward_model, score_groups
from psycopref.training.texts import prompt_messages, render


def made_texts(tokenizer, n: int, answers: int, profile: str) -> list[list[str]]:
    "Make n groups of rendered exchanges that share a prompt. profile: a key of LENGTHS."
    return [
        [render(tokenizer, prompt_messages(question), answer) for answer in own]
        for question, own in made_groups(tokenizer, n, answers, profile)
    ]


def our_scores(model, tokenizer, groups: list[list[str]]) -> list[float]:
    "Score groups as packs; return the rewards in one list."
    return [score for own in score_groups(model, tokenizer, groups, name="") for score in own]


def plain_scores(model, tokenizer, texts: list[str], by_length: bool = False, rows: int = 16) -> list[float]:
    "Score texts in padded batches of some rows, sorted by length first where that is asked."
    import torch

    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if by_length else range(len(ids))
    scores = [0.0] * len(ids)
    for start in range(0, len(ids), rows):
        own = order[start : start + rows]
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in own]}, return_tensors="pt", padding_side="right")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            for i, reward in zip(own, model.eval()(**inputs, use_cache=False).logits[:, 0].tolist()):
                scores[i] = reward
    return scores


def reward_gap(ours: list[float], theirs: list[float], exact: bool) -> float:
    "Return the largest difference; refuse more than rounding: 1e-4 if exact (float32), else 5% of the rewards' norm."
    gap, off = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), relative_gap(ours, theirs)
    if not (gap <= 1e-4 if exact else off <= 0.05):
        raise RuntimeError(f"the rewards differ by up to {gap:.3g}, {off:.1%} of their norm: it is not the same work")
    return gap


def scoring_bench(
    backbone: str, rounds: int, texts: int, dtype: str = "auto", profiles: typing.Sequence[str] = ("paper", "demo")
) -> list[dict]:
    """Measure scoring of pairs and of groups of eight beside the plain loop, sorted by length and not.

    texts: in a measurement, a multiple of 8."""
    weights, found = find_weights(backbone), []
    tokenizer = load_tokenizer(weights)
    model, exact = (load_reward_model(weights.location, tokenizer, kind, new_head=0) for kind in (dtype, "float32"))
    other, plain = twin(model), twin(exact)
    for profile, size in itertools.product(profiles, (2, 8)):
        groups = made_texts(tokenizer, texts // size, size, profile)
        flat, few = [text for group in groups for text in group], groups[: 16 // size]
        gaps = {
            "largest difference in float32": reward_gap(
                our_scores(exact, tokenizer, few), plain_scores(plain, tokenizer, sum(few, [])), True
            ),
            "largest difference": reward_gap(
                our_scores(model, tokenizer, groups),
                plain_scores(other, tokenizer, flat),
                str(model.dtype) == "torch.float32",
            ),
        }
        for by_length in (True, False):
            what = (
                f"rewards of {texts} texts in groups of {size}, answers of {'-'.join(map(str, LENGTHS[profile][1]))} "
                f"tokens, {backbone}, {str(model.dtype).removeprefix('torch.')}, against padded batches of 16, "
                f"{'sorted by length' if by_length else 'in the given order'}"
            )
            sides = {
                "ours": lambda: len(our_scores(model, tokenizer, groups)),
                "theirs": lambda: len(plain_scores(other, tokenizer, flat, by_length)),
            }
            row = side_by_side("reward_scoring", what, "texts/s", sides, rounds) | gaps
            found.append({"label": f"{profile}'s lengths, groups of {size}", "sorted": by_length, **row})
    return keep_rows("reward_scoring", found)


def curve_gap(one: list[dict], two: list[dict]) -> float:
    "Return the greatest difference of two trainings' losses, step by step, from their logs."
    first, second = ({entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in (one, two))
    if first.keys() != second.keys() or not first:
        raise RuntimeError(f"the logs have {len(first)} and {len(second)} losses, expected the same steps")
    return max(abs(first[step] - second[step]) for step in first)


def processes_bench(pairs: int = 64, counts: tuple[int, ...] = (1, 2)) -> dict:
    "Train the tiny model on some pairs by one process and by several on CPUs; compare the losses."
    tiny, logs = find_weights("random-tiny"), []
    frame = made_pairs(load_tokenizer(tiny), pairs, "demo")
    own = dict(epochs=2, batch_size=8, pack_tokens=2048, learning_rate=3e-3, warmup_ratio=0.1)
    settings = RewardSettings(**own, lora=LoraSettings(rank=4, alpha=8))
    environment = {key: own for key, own in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            job = Path(folder) / f"job-{count}"
            store_job(job, RewardJob(tiny, settings, Path(folder) / f"model-{count}", "float32"), {"train": frame})
            done = subprocess.run(launch_command(job, count), capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{count} processes ended with {done.returncode}: {done.stderr[-500:]}")
            logs.append(read_json(job / "result.json"))
    found = {
        "processes": [log["devices"] for log in logs],
        "steps": logs[0]["steps"],
        "greatest difference": max(curve_gap(logs[0]["log"], log["log"]) for log in logs),
        "losses": [[entry["loss"] for entry in log["log"] if "loss" in entry] for log in logs],
    }
    return keep("reward_processes", found, "losses of the tiny model, float32, trained by so many processes", "nats")


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 3  # measurements of each side, after one that is not counted
BATCHES = 8  # batches of 8 pairs in a measurement of training
TEXTS = 64  # in a measurement of scoring; a multiple of 8
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained where there is a GPU
GPU_PAIRS = 128  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    trained = lora_bench("reward", BACKBONE, ROUNDS, BATCHES, profiles=("paper", "demo"), sizes=(8,))
    scored = scoring_bench(BACKBONE, ROUNDS, TEXTS)
    processes = processes_bench()
    print({key: processes[key] for key in ("processes", "steps", "greatest difference")})
    on_gpu = gpu_bench("reward", GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    panels = {"training, against trl": trained, "training on a GPU, against trl": on_gpu}
    panels["scoring, against sorted batches"] = [row for row in scored if row["sorted"]]
    save_figure("reward", bench_figure(panels))
    print(pd.DataFrame(trained + scored + on_gpu)[["label", "what", "ours", "theirs", "ratio", "unit", "device"]])
