"""DPO beside trl's DPOTrainer, as it comes and at its best: time, memory, and where the time of an iteration goes."""

from __future__ import annotations

import os
import sys
import time
import typing

from bench import given, keep, save_figure, side_by_side
from bench_generation import Work as Sampling
from bench_generation import ours as our_samples
from bench_generation import render_prompts, transformers_generate
from bench_training import bench_figure, demo_settings, gpu_bench, lora_bench, made_groups, memory_bench
from psycopref.core.files import StageReader, read_json
from psycopref.core.settings import StudyError
from psycopref.core.stages import Run, project_root
from psycopref.core.tables import PALETTE, new_figure
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


PHASES = ("sample", "score", "reference", "train", "save")  # in the order of an iteration; others follow behind


def policy_run(run: str | None) -> StageReader:
    "Open the 06_policy of a run; None takes the newest of the demo."
    receipts = sorted(
        (project_root() / "outputs").glob("*/06_policy/receipt.json"), key=lambda own: own.stat().st_mtime
    )
    names = [run] if run else [path.parents[1].name for path in receipts if read_json(path)["profile"] == "demo"]
    if not names:
        raise StudyError(
            "bench: found no finished 06_policy of the demo under outputs/, expected one to look at; run `make "
            "reproduce` first"
        )
    return StageReader(Run(names[-1]), "06_policy")


def iteration_phases(reader: StageReader) -> list[dict]:
    "Read the seconds of the phases of each iteration of each backbone from a 06_policy."
    found = []
    for slug, result in reader.json("training").items():
        for number, done in enumerate(result["iter"]["iterations"], start=1):
            seconds = done.get("seconds")
            if not isinstance(seconds, dict):
                raise StudyError(
                    f"{reader.folder}: iteration {number} of {slug} has no `seconds`, expected those of its phases; "
                    "it is of an older version, so run 06_policy again"
                )
            order = sorted(seconds, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
            own, total = {name: float(seconds[name]) for name in order}, float(sum(seconds.values()))
            found.append({"label": f"{slug}, iteration {number}", "seconds": own, "total": total})
    return found


def phases_bench(run: str | None) -> list[dict]:
    "Keep the phases of a run's iterations, or print what has to run first and return nothing."
    try:
        reader = policy_run(run)
        found = iteration_phases(reader)
    except StudyError as error:
        print(error)
        return []
    facts = {"run": reader.run.name, "profile": reader.receipt["profile"], "rows": found}
    what = f"seconds of the phases of an iteration of DPO-Iter, run {reader.run.name}"
    keep("policy_phases", facts, what, "s", f"{os.cpu_count()} cores")
    return found


def phases_figure(found: list[dict]):
    "Draw the phases of each iteration, stacked. found: of iteration_phases."
    import pandas as pd

    figure, axis = new_figure(max(4.6, 2.4 + 0.75 * len(found)), 3.8)
    frame = pd.DataFrame([row["seconds"] for row in found]).fillna(0.0)
    frame.plot.bar(ax=axis, stacked=True, width=0.66, color=list(PALETTE), rot=0)
    most = max(row["total"] for row in found)
    for bars in axis.containers:
        sizes = [bar.get_height() for bar in bars]
        words = [f"{size:.3g}" if size >= 0.06 * most else "" for size in sizes]
        axis.bar_label(bars, words, label_type="center", color="white", fontsize=8)
    for i, row in enumerate(found):
        axis.text(i, row["total"] + 0.01 * most, f"{row['total']:.0f} s", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(found)), [row["label"].replace(", iteration ", "\n") for row in found], fontsize=8)
    axis.set(xlabel="iteration", ylabel="seconds", title="Phases of an iteration of DPO-Iter")
    axis.margins(y=0.1)
    axis.grid(False, axis="x")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 2  # measurements of each side, after one that is not counted
STEPS = 1  # optimiser steps of 8 pairs in a measurement
PACK_TOKENS = None  # budget of our packs, which trades memory for speed; None takes the demo's
RUN = None  # demo run whose iterations are drawn; None takes the newest
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
    phased = phases_bench(RUN)
    save_figure("policy", bench_figure({"DPO, steps of 8 pairs": trained, "peak memory of the process": remembered}))
    if on_gpu:
        sampled, on_gpu_trained = on_gpu[::2], on_gpu[1::2]
        panels = {"DPO on a GPU, against trl": on_gpu_trained, "sampling on a GPU, against transformers": sampled}
        save_figure("policy_gpu", bench_figure(panels))
    if phased:
        save_figure("policy_phases", phases_figure(phased))
    columns = ["label", "unit", "ours", "theirs", "stock", "ratio", "stock ratio"]
    print(pd.DataFrame(trained + remembered + on_gpu)[columns].round(2))
