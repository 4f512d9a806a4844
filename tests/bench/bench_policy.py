"""DPO beside trl's DPOTrainer, as it comes and at its best: time, memory, share of the machine's rate, growth."""

from __future__ import annotations

import sys

from bench import given, show
from bench_training import demo_settings, gpu_bench, growth_bench, load_start, lora_bench, share_bench
from psycopref.models.weights import find_weights, load_tokenizer

BACKBONE = "smollm2-135m"  # weights of `models.weights`
DTYPE = "auto"  # auto, float32 or bfloat16
ROUNDS = 1  # measurements of each side
STEPS = 1  # optimiser steps of 8 pairs in a measurement
PROFILES = ["demo"]  # lengths of answers; paper's take eight times as long
SIZES = [4, 8]  # pairs in a pass of trl's, to try
PAIRS = [2, 8]  # of a step, as it grows
LENGTHS_GROWN = [32, 96]  # tokens of an answer, as they grow
PACK_TOKENS = None  # budget of our packs, which trades memory for speed; None takes the demo's
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained where there is a GPU
GPU_PAIRS = 64  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    weights, settings = find_weights(BACKBONE), demo_settings("policy", PACK_TOKENS)
    tokenizer = load_tokenizer(weights)
    model = load_start("policy", weights, tokenizer, DTYPE)
    show(share_bench("policy", model, tokenizer, settings))
    trained = lora_bench("policy", model, tokenizer, ROUNDS, STEPS, settings, PROFILES, SIZES)
    print(growth_bench("policy", model, tokenizer, settings, PAIRS, LENGTHS_GROWN))
    on_gpu = gpu_bench("policy", GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    columns = ["label", "unit", "ours", "theirs", "stock", "ratio", "stock ratio", "MB"]
    print(pd.DataFrame(trained + on_gpu).reindex(columns=columns).round(2).to_string())
