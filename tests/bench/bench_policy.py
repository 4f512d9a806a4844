"""DPO beside trl's DPOTrainer, as it comes and at its best: time and memory."""

from __future__ import annotations

import sys

from bench import given, save_figure
from bench_training import bench_figure, demo_settings, gpu_bench, lora_bench, memory_bench

BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 2  # measurements of each side, after one that is not counted
STEPS = 1  # optimiser steps of 8 pairs in a measurement
PACK_TOKENS = None  # budget of our packs, which trades memory for speed; None takes the demo's
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained where there is a GPU
GPU_PAIRS = 64  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    settings = demo_settings("policy", PACK_TOKENS)
    trained = lora_bench("policy", BACKBONE, ROUNDS, STEPS, settings)
    remembered = memory_bench(BACKBONE, trained, settings)
    on_gpu = gpu_bench("policy", GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    panels = {"DPO, steps of 8 pairs": trained, "peak memory of the process": remembered}
    save_figure("policy", bench_figure(panels | {"DPO on a GPU, against trl": on_gpu}))
    columns = ["label", "unit", "ours", "theirs", "stock", "ratio", "stock ratio"]
    print(pd.DataFrame(trained + remembered + on_gpu)[columns].round(2))
