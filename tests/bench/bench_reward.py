"""Reward models: training beside trl's RewardTrainer, scoring beside a padded loop, shares of the peak, growth."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

from bench import given, keep, keep_rows, show, side_by_side
from bench_training import (
    LENGTHS,
    demo_settings,
    gpu_bench,
    growth_bench,
    load_start,
    lora_bench,
    made_groups,
    relative_gap,
    share_bench,
    twin,
)
from flops import forward_flops
from psycopref.models.packs import lay_out
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.scoring import score_groups
from psycopref.training.texts import prompt_messages, render
from shares import account, grow, take


def made_texts(tokenizer, n: int, answers: int, profile: str) -> list[list[str]]:
    "Make n groups of rendered exchanges that share a prompt. profile: a key of LENGTHS."
    return [
        [render(tokenizer, prompt_messages(question), answer) for answer in own]
        for question, own in made_groups(tokenizer, n, answers, profile)
    ]


def our_scores(model, tokenizer, groups: list[list[str]]) -> list[float]:
    "Score groups as packs; return the rewards in one list."
    return [score for own in score_groups(model, tokenizer, groups, name="") for score in own]


def plain_scores(model, tokenizer, texts: list[str], rows: int = 16) -> list[float]:
    "Score texts in padded batches of some rows, sorted by length."
    import torch

    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
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


def scoring_bench(model, exact, tokenizer, rounds: int, works: typing.Sequence[tuple[str, int, int]]) -> list[dict]:
    """Measure scoring of groups beside the padded loop, sorted by length.

    exact: the same model in float32; works: profile of LENGTHS, answers of a group, texts."""
    found, other, plain = [], twin(model), twin(exact)
    dtype = str(model.dtype).removeprefix("torch.")
    for profile, size, texts in works:
        groups = made_texts(tokenizer, texts // size, size, profile)
        flat, few = [text for group in groups for text in group], groups[: max(1, 8 // size)]
        own = our_scores(exact, tokenizer, few), plain_scores(plain, tokenizer, sum(few, []))
        gaps = {"largest difference in float32": reward_gap(*own, True)}
        own = our_scores(model, tokenizer, few), plain_scores(other, tokenizer, sum(few, []))
        gaps["largest difference"] = reward_gap(*own, dtype == "float32")
        what = f"rewards of {texts} texts in groups of {size}, answers of {'-'.join(map(str, LENGTHS[profile][1]))} "
        what += f"tokens, {Path(model.name_or_path).name}, {dtype}, against padded batches of 16, sorted by length"
        sides = {
            "ours": lambda: len(our_scores(model, tokenizer, groups)),
            "theirs": lambda: len(plain_scores(other, tokenizer, flat)),
        }
        row = side_by_side("reward_scoring", what, "texts/s", sides, rounds, warm=False) | gaps
        found.append({"label": f"{profile}'s lengths, groups of {size}", **row})
    return keep_rows("reward_scoring", found)


def useful(tokenizer, groups: list[list[str]]) -> list[tuple[int, int]]:
    "List what a scoring of groups needs: (queries, keys) of each text's own part, what a group shares once."
    pack = lay_out([[tokenizer(text, add_special_tokens=False).input_ids for text in group] for group in groups])
    return list(zip(pack.query_lengths, pack.key_lengths))


def scoring_share(model, tokenizer, profile: str = "demo", size: int = 2, texts: int = 64) -> dict:
    "Measure what scoring reaches of the machine, and where its time goes. size: answers of a group."
    groups = made_texts(tokenizer, texts // size, size, profile)
    segments = useful(tokenizer, groups)
    tokens, needed = sum(queries for queries, _ in segments), forward_flops(model, segments, texts)
    row = account(take(lambda: our_scores(model, tokenizer, groups)), tokens, needed, model.dtype)
    return keep("share_scoring", row, f"scoring of {texts} texts in groups of {size}, {profile}'s lengths", "tokens/s")


def scoring_growth(model, tokenizer, texts: list[int], lengths: list[int], answers: list[int]) -> list[dict]:
    "Follow scoring as texts (in pairs), tokens of an answer (8 pairs) and answers of a group (4 groups) grow."

    def work(n: int, size: int, profile) -> typing.Callable:
        groups = made_texts(tokenizer, n, size, profile)
        tokens = sum(queries for queries, _ in useful(tokenizer, groups))
        return lambda: tokens * bool(our_scores(model, tokenizer, groups))

    found = [
        grow("texts, in pairs", texts, lambda n: work(n // 2, 2, "demo")),
        grow("tokens of an answer, 8 pairs", lengths, lambda n: work(8, 2, ((20, 80), (n, n)))),
        grow("answers of a group, 4 groups", answers, lambda n: work(4, n, "demo")),
    ]
    keep("growth_scoring", {"curves": found}, "scoring", "tokens/s")
    return found


BACKBONE = "smollm2-135m"  # weights of `models.weights`
DTYPE = "auto"  # auto, float32 or bfloat16
ROUNDS = 1  # measurements of each side
STEPS = 2  # optimiser steps of 8 pairs in a measurement of training
PROFILES = ["demo"]  # lengths of the answers that are trained on; paper's take eight times as long
SIZES = [4, 8]  # pairs in a pass of trl's, to try
PAIRS = [2, 8]  # of a step, as it grows
LENGTHS_GROWN = [32, 128]  # tokens of an answer, as they grow
SCORED = [["demo", 2, 32], ["demo", 8, 32], ["paper", 2, 16]]  # lengths, answers of a group, texts
TEXTS_GROWN = [16, 48]  # that are scored
ANSWERS_GROWN = [1, 8]  # of a group that is scored
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained where there is a GPU
GPU_PAIRS = 128  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    weights, settings = find_weights(BACKBONE), demo_settings("reward")
    tokenizer = load_tokenizer(weights)
    model, exact = (load_start("reward", weights, tokenizer, dtype) for dtype in (DTYPE, "float32"))
    scorer = twin(model)  # which is taught to take packs; trl's sides are copies of a plain one
    show(share_bench("reward", model, tokenizer, settings))
    show(scoring_share(scorer, tokenizer))
    trained = lora_bench("reward", model, tokenizer, ROUNDS, STEPS, settings, PROFILES, SIZES)
    scored = scoring_bench(scorer, exact, tokenizer, ROUNDS, SCORED)
    print(growth_bench("reward", model, tokenizer, settings, PAIRS, LENGTHS_GROWN))
    print(scoring_growth(scorer, tokenizer, TEXTS_GROWN, LENGTHS_GROWN, ANSWERS_GROWN))
    on_gpu = gpu_bench("reward", GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    columns = ["label", "ours", "theirs", "stock", "ratio", "stock ratio", "MB", "unit"]
    print(pd.DataFrame(trained + scored + on_gpu).reindex(columns=columns).round(2).to_string())
