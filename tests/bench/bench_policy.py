"""DPO beside trl's DPOTrainer, as it comes and at its best: time and memory."""

from __future__ import annotations

import sys
import time
import typing

from bench import given, save_figure, side_by_side
from bench_generation import Work as Sampling
from bench_generation import ours as our_samples
from bench_generation import render_prompts, transformers_generate
from bench_training import bench_figure, demo_settings, gpu_bench, lora_bench, made_groups, memory_bench
from psycopref.models.generation import Decoding


def candidates_bench(
    name: str,
    model,
    tokenizer,
    rounds: int,
    prompts: int = 64,
    n: int = 8,
    tokens: int = 400,
    rows: typing.Sequence[int] = (64, 128, 512),
) -> dict:
    """Measure sampling of n candidates for each prompt beside transformers' generate.

    tokens: longest candidate; rows: answers that transformers computes together, of which the best is taken."""
    import torch

    rendered = render_prompts(tokenizer, [question for question, _ in made_groups(tokenizer, prompts, 0, "paper")])
    work, made, tried = Sampling(model, tokenizer, rendered, Decoding(tokens, 1.0, 50), n), {}, {}

    def sample(side: str, do: typing.Callable[[], int]) -> float:
        made[side] = do()
        return float(prompts * n)

    for size in rows:
        start = time.perf_counter()
        try:
            tried[size] = sample("theirs", lambda: transformers_generate(work, size)) / (time.perf_counter() - start)
        except torch.OutOfMemoryError:
            tried[size] = 0.0
        torch.cuda.empty_cache()
    best = max(tried, key=tried.get)
    what = (
        f"{n} candidates for each of {prompts} prompts, at most {tokens} tokens, top-k 50, {name}, against "
        f"transformers' generate, {best} rows at a time"
    )
    sides = {
        "ours": lambda: sample("ours", lambda: our_samples(work)),
        "theirs": lambda: sample("theirs", lambda: transformers_generate(work, best)),
    }
    found = side_by_side(f"policy_candidates_{name}", what, "candidates/s", sides, rounds)
    rates = {str(size): rate for size, rate in tried.items()}
    return {"label": f"{name}, candidates", **found, "tokens": made, "tried": rates}


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 2  # measurements of each side, after one that is not counted
STEPS = 1  # optimiser steps of 8 pairs in a measurement
PACK_TOKENS = None  # budget of our packs, which trades memory for speed; None takes the demo's
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained and sampled from where there is a GPU
GPU_PAIRS = 64  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    settings = demo_settings("policy", PACK_TOKENS)
    trained = lora_bench("policy", BACKBONE, ROUNDS, STEPS, settings)
    remembered = memory_bench(BACKBONE, trained, settings)
    on_gpu = gpu_bench("policy", GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING, candidates_bench)
    save_figure("policy", bench_figure({"DPO, steps of 8 pairs": trained, "peak memory of the process": remembered}))
    if on_gpu:
        sampled, on_gpu_trained = on_gpu[::2], on_gpu[1::2]
        panels = {"DPO on a GPU, against trl": on_gpu_trained, "sampling on a GPU, against transformers": sampled}
        save_figure("policy_gpu", bench_figure(panels))
    columns = ["label", "unit", "ours", "theirs", "stock", "ratio", "stock ratio"]
    print(pd.DataFrame(trained + remembered + on_gpu)[columns].round(2))
