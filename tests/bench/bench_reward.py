"""Training and scoring of reward models beside trl's RewardTrainer and a plain padded loop, on the same pairs in the same run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import platform
import random
import re
import subprocess
import tempfile
import time
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from psycopref.core.tables import PALETTE, new_figure
from psycopref.core.files import read_json, write_json
from bench import side_by_side
from psycopref.core.settings import LoraSettings, RewardSettings, StudyError, suggest
from psycopref.core.paper import resource_path
from psycopref.core.stages import project_root
from psycopref.models.generation import common_prefix
from psycopref.training.jobs import launch_command
from psycopref.training.packing import reward_trainer, unwrap
from psycopref.training.reward_model import write_reward_job
from psycopref.training.scoring import load_reward_model, score_groups
from psycopref.training.texts import add_lora, common_arguments, pack_size, pair_rows, prompt_messages, render, silence
from psycopref.models.weights import find_weights, load_tokenizer, pick_device, pick_dtype


@dataclass(frozen=True)
class Lengths:
    "Give the tokens of made texts, from and to."

    question: tuple[int, int]  # without the words around it
    answer: tuple[int, int]


LENGTHS = {"paper": Lengths((20, 80), (350, 430)), "demo": Lengths((20, 80), (35, 60))}


def made_groups(
    tokenizer,  # that counts the tokens
    n: int,  # questions
    answers: int,  # for each
    lengths: Lengths,  # of both
    seed: int = 0,  # of the mixture
) -> list[tuple[str, list[str]]]:  # (question, answers)
    "Cut texts of wished lengths from the demo corpus."
    chance = random.Random(seed)
    lines = resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [tokenizer(" " + json.loads(line)["speech"], add_special_tokens=False).input_ids for line in lines]

    def text(span: tuple[int, int]) -> str:
        wanted, ids = chance.randint(*span), []
        while len(ids) < wanted:
            ids += chance.choice(tokens)
        return tokenizer.decode(ids[:wanted]).strip()

    return [(text(lengths.question), [text(lengths.answer) for _ in range(answers)]) for _ in range(n)]


def made_rows(
    tokenizer,  # of the model
    n: int,  # pairs
    lengths: Lengths,  # of their texts
) -> list[dict]:  # chosen_ids, rejected_ids, length
    "Make tokenised pairs."
    import pandas as pd

    pairs = [
        {"prefID": i, "question": question, "chosen": chosen, "rejected": rejected}
        for i, (question, (chosen, rejected)) in enumerate(made_groups(tokenizer, n, 2, lengths))
    ]
    return pair_rows(pd.DataFrame(pairs), tokenizer, 2048)[0]


def made_texts(
    tokenizer,  # of the model
    n: int,  # groups
    answers: int,  # in each
    lengths: Lengths,  # of their texts
) -> list[list[str]]:  # rendered exchanges; those of a group share a prompt
    "Make groups of rendered exchanges."
    return [
        [render(tokenizer, prompt_messages(question), answer) for answer in own]
        for question, own in made_groups(tokenizer, n, answers, lengths)
    ]


@dataclass(frozen=True)
class Way:
    "Say how a side trains."

    ours: bool = False  # our trainer, or trl's
    strategy: str = "group_by_length"  # transformers' train_sampling_strategy
    pairs: int = 8  # in one forward pass
    attention: str = "sdpa"  # transformers' attn_implementation, of trl's side; ours has its own


def twin(
    model,  # transformers or peft model
):  # the same parameters in other modules
    "Copy a model's modules around the same parameters."
    return copy.deepcopy(model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())})


def make_trainer(
    model,  # reward model
    tokenizer,  # its tokenizer
    rows: list[dict],  # of made_rows
    way: Way,  # how
    checkpointing: bool = False,  # of gradients
):  # our trainer, or trl's
    "Make the trainer of a side; the rows are one optimiser step."
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    if not way.ours:  # trl pads to the longest text, so that is the length it should group by
        rows = [row | {"length": max(len(row["chosen_ids"]), len(row["rejected_ids"]))} for row in rows]
        unwrap(model).set_attn_implementation(way.attention)
    if checkpointing:
        unwrap(model).activation_checkpointing_enable()
    arguments = common_arguments(
        RewardSettings(batch_size=len(rows)),
        tempfile.gettempdir(),
        0,
        way.pairs,
        train_sampling_strategy=way.strategy,
        remove_unused_columns=False,
        gradient_checkpointing=checkpointing,
    )
    silence()
    return (reward_trainer() if way.ours else RewardTrainer)(
        model=model, args=RewardConfig(**arguments), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


@dataclass
class Epoch:
    "Train on all pairs once; calling it returns the units that were done, as `side_by_side` wants."

    trainer: typing.Any  # of make_trainer
    way: Way  # how
    units: float  # that all pairs are worth
    optimiser: typing.Any = None  # torch optimiser, or None for forward and backward only
    positions: int = 0  # computed in the last walk, padding included
    peak_gb: float | None = None  # greatest memory of the last walk, on a GPU

    def passes(self, most: int | None = None) -> int:
        "Go forward and backward, at most so many times; return the pairs."
        model, pairs, self.positions = self.trainer.model.train(), 0, 0
        for batch in itertools.islice(self.trainer.get_train_dataloader(), most):
            pairs += len(batch["attention_mask"]) // 2
            self.positions += (batch["pack"].input_ids if "pack" in batch else batch["input_ids"]).numel()
            loss = self.trainer.compute_loss(model, self.trainer._prepare_inputs(batch))
            (loss / self.trainer.args.gradient_accumulation_steps).backward()
        return pairs

    def __call__(self) -> float:
        import torch

        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        if (pairs := self.passes()) != len(self.trainer.train_dataset):
            raise RuntimeError(f"{self.way}: {pairs} of {len(self.trainer.train_dataset)} pairs were trained on")
        if self.optimiser is not None:
            self.optimiser.step()
        self.trainer.model.zero_grad()
        if gpu:
            torch.cuda.synchronize()
            self.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        return self.units


STRATEGIES = ("group_by_length", "batch_rebalance", "random")


def loss_gap(
    first,  # trainer
    second,  # trainer
    rows: list[dict],  # of made_rows
) -> float:  # difference of their mean losses
    "Compare the losses of two trainers on the same pairs; refuse more than rounding."
    import torch
    from accelerate.utils import send_to_device

    with torch.no_grad():
        losses = [
            trainer.compute_loss(
                trainer.model.eval(), send_to_device(trainer.data_collator(rows), trainer.accelerator.device)
            ).item()
            for trainer in (first, second)
        ]
    gap, limit = abs(losses[0] - losses[1]), 1e-4 if unwrap(first.model).dtype == torch.float32 else 0.05
    if not gap <= limit:
        raise RuntimeError(
            f"the losses are {losses[0]:.5f} and {losses[1]:.5f}, expected them within {limit:g}: it is not the same "
            "work"
        )
    return gap


def try_ways(
    make: typing.Callable[[Way], Epoch],  # makes a side
    ways: list[Way],  # to try
) -> list[tuple[float, Epoch]]:  # units/s of each, measured once
    "Measure each way once."
    import torch

    tried = []
    for way in ways:
        side = make(way)
        try:
            side.passes(1)
            start = time.perf_counter()
            tried.append((side() / (time.perf_counter() - start), side))
        except torch.OutOfMemoryError:
            side.trainer.model.zero_grad()
            tried.append((0.0, side))
        torch.cuda.empty_cache()
    return tried


def training_bench(
    what: str,  # is trained, in a sentence
    name: str,  # of the JSON file
    unit: str,  # tokens/s or pairs/s
    model,  # reward model, with adapters or without
    tokenizer,  # its tokenizer
    rows: list[dict],  # of made_rows, one optimiser step
    ours: Way,  # our side
    theirs: list[Way],  # trl's, of which the best is taken
    rounds: int,  # counted measurements of each side
    checkpointing: bool = False,  # of gradients
    optimiser=None,  # torch optimiser, or None
) -> tuple[dict, Epoch, Epoch]:  # what was found, ours, the best of trl
    "Measure our trainer beside trl's at its best."
    useful = sum(row["length"] for row in rows)

    def make(way: Way, own) -> Epoch:
        return Epoch(
            make_trainer(own, tokenizer, rows, way, checkpointing),
            way,
            useful if unit == "tokens/s" else len(rows),
            optimiser,
        )

    other = twin(model)
    mine, plain = make(ours, model), lambda way: make(way, other)
    if mine.trainer.not_packed:
        raise RuntimeError(f"the model is not packed: {mine.trainer.not_packed}")
    gap = loss_gap(mine.trainer, plain(theirs[0]).trainer, rows[:8])
    tried = try_ways(plain, theirs)
    best = max(tried, key=lambda own: own[0])[1].way
    tried += try_ways(plain, [replace(best, strategy=strategy) for strategy in STRATEGIES if strategy != best.strategy])
    best = max(tried, key=lambda own: own[0])[1].way
    rival = plain(best)
    found = side_by_side(
        name,
        f"{what}, against trl's RewardTrainer ({best.strategy}, {best.pairs} pairs a pass, {best.attention})",
        unit,
        mine,
        rival,
        rounds,
    )
    return (
        found
        | {
            "ours way": dataclasses.asdict(ours),
            "theirs way": dataclasses.asdict(best),
            "loss difference": gap,
            "tried": [dataclasses.asdict(side.way) | {"rate": rate} for rate, side in tried],
            "positions": {"useful": useful, "ours": mine.positions, "theirs": rival.positions},
        },
        mine,
        rival,
    )


def keep(
    name: str,  # of the file
    found: list[dict],  # of side_by_side; the first stands for all
) -> list[dict]:  # the same
    "Write several comparisons into one file of outputs/bench."
    write_json(project_root() / "outputs" / "bench" / f"{name}.json", {**found[0], "rows": found})
    return found


def lora_bench(
    backbone: str,  # weights
    rounds: int,  # counted measurements of each side
    batches: int,  # of 8 pairs, in a measurement
    lora: LoraSettings = LoraSettings(rank=16, last_layers=15),  # of the demo
    dtype: str = "auto",  # bfloat16 where the processor has it
    profiles: typing.Sequence[str] = ("paper", "demo"),  # keys of LENGTHS
) -> list[dict]:  # what was found, for each profile of lengths
    "Measure training with adapters."
    weights, found = find_weights(backbone), []
    tokenizer = load_tokenizer(weights)
    for label in profiles:
        lengths = LENGTHS[label]
        model = add_lora(load_reward_model(weights.location, tokenizer, dtype, new_head=0), lora, head=True)
        what = (
            f"forward and backward of {batches} batches of 8 pairs, answers of "
            f"{lengths.answer[0]}-{lengths.answer[1]} tokens, LoRA of rank {lora.rank} on the last {lora.last_layers} "
            f"layers and the head of {backbone}, {str(unwrap(model).dtype).removeprefix('torch.')}, tokens of useful "
            "text"
        )
        rows = made_rows(tokenizer, 8 * batches, lengths)
        found.append(
            {"label": f"{label}'s lengths"}
            | training_bench(
                what,
                "reward_training",
                "tokens/s",
                model,
                tokenizer,
                rows,
                Way(True, "batch_rebalance"),
                [Way()],
                rounds,
            )[0]
        )
    return keep("reward_training", found)


def plain_scores(
    model,  # reward model
    tokenizer,  # its tokenizer
    texts: list[str],  # rendered exchanges
    by_length: bool = False,  # sort them first
    rows: int = 16,  # in a batch
) -> list[float]:  # one reward for each
    "Score texts in padded batches."
    import torch

    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if by_length else range(len(ids))
    scores = [0.0] * len(ids)
    for start in range(0, len(ids), rows):
        own = order[start : start + rows]
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in own]}, return_tensors="pt", padding_side="right").to(
            model.device
        )
        with torch.inference_mode():
            rewards = (
                model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
                .logits[:, 0]
                .tolist()
            )
        for i, reward in zip(own, rewards):
            scores[i] = reward
    return scores


def reward_gap(
    ours: list[float],  # rewards
    theirs: list[float],  # of the same texts
    exact: bool,  # computed in float32
) -> float:  # largest difference
    "Compare rewards; refuse more than rounding: 1e-4 in float32, 5% of their norm in half precision, as `training.packing` does."
    import math

    gap, off = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), math.dist(ours, theirs) / math.hypot(*theirs)
    if not (gap <= 1e-4 if exact else off <= 0.05):
        raise RuntimeError(f"the rewards differ by up to {gap:.3g}, {off:.1%} of their norm: it is not the same work")
    return gap


def exact_gap(
    location: str,  # of the weights
    tokenizer,  # of the model
    groups: list[list[str]],  # rendered texts
) -> float:  # largest difference
    "Compare our rewards with the plain ones in float32."
    model = load_reward_model(location, tokenizer, "float32", new_head=0)
    theirs = plain_scores(twin(model), tokenizer, [text for group in groups for text in group])
    return reward_gap(
        [score for own in score_groups(model, tokenizer, groups, name="") for score in own], theirs, exact=True
    )


def scoring_bench(
    backbone: str,  # weights
    rounds: int,  # counted measurements of each side
    texts: int,  # in a measurement, a multiple of 8
    dtype: str = "auto",  # bfloat16 where the processor has it
    profiles: typing.Sequence[str] = ("paper", "demo"),  # keys of LENGTHS
) -> list[dict]:  # what was found: lengths × size of groups × order of the plain loop
    "Measure scoring of pairs and of groups of eight beside the plain loop."
    weights, found = find_weights(backbone), []
    tokenizer = load_tokenizer(weights)
    model = load_reward_model(weights.location, tokenizer, dtype, new_head=0)
    other, exact = twin(model), str(model.dtype) == "torch.float32"
    for label, size in itertools.product(profiles, (2, 8)):
        lengths = LENGTHS[label]
        groups = made_texts(tokenizer, texts // size, size, lengths)
        flat = [text for group in groups for text in group]
        gaps = {
            "largest difference in float32": exact_gap(weights.location, tokenizer, groups[: 16 // size]),
            "largest difference": reward_gap(
                [score for own in score_groups(model, tokenizer, groups, name="") for score in own],
                plain_scores(other, tokenizer, flat),
                exact,
            ),
        }
        for by_length in (True, False):
            what = (
                f"rewards of {texts} texts in groups of {size}, answers of {lengths.answer[0]}-{lengths.answer[1]} "
                f"tokens, {backbone}, {str(model.dtype).removeprefix('torch.')}, "
                f"against padded batches of 16, {'sorted by length' if by_length else 'in the given order'}"
            )
            sides = [
                lambda: len(flat) * bool(score_groups(model, tokenizer, groups, name="")),
                lambda: len(plain_scores(other, tokenizer, flat, by_length)),
            ]
            found.append(
                {"label": f"{label}'s lengths, groups of {size}", "sorted": by_length}
                | side_by_side("reward_scoring", what, "texts/s", *sides, rounds)
                | gaps
            )
    return keep("reward_scoring", found)


def curve_gap(
    one: list[dict],  # log of a training
    two: list[dict],  # of another
) -> float:  # greatest difference of the losses
    "Compare two loss curves step by step."
    first, second = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in (one, two))
    if [step for step, _ in first] != [step for step, _ in second] or not first:
        raise RuntimeError(f"the logs have {len(first)} and {len(second)} losses, expected the same steps")
    return max(abs(a - b) for (_, a), (_, b) in zip(first, second))


def processes_bench(
    pairs: int = 64,  # to train on, of the demo's lengths
    counts: tuple[int, ...] = (1, 2),  # processes of each training
) -> dict:  # steps, greatest difference of the losses
    "Train the tiny model by one process and by several, on CPUs."
    import pandas as pd

    tiny, logs = find_weights("random-tiny"), []
    groups = made_groups(load_tokenizer(tiny), pairs, 2, LENGTHS["demo"])
    frame = pd.DataFrame(
        [
            {"prefID": i, "question": question, "chosen": chosen, "rejected": rejected}
            for i, (question, (chosen, rejected)) in enumerate(groups)
        ]
    )
    settings = RewardSettings(
        epochs=2,
        batch_size=8,
        pack_tokens=2048,
        learning_rate=3e-3,
        warmup_ratio=0.1,
        lora=LoraSettings(rank=4, alpha=8),
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    } | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            job = Path(folder) / f"job-{count}"
            write_reward_job(job, tiny, frame, None, settings, Path(folder) / f"model-{count}", "float32", 0)
            done = subprocess.run(launch_command(job, count), capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{count} processes ended with {done.returncode}: {done.stderr[-500:]}")
            logs.append(read_json(job / "result.json"))
    found = {
        "processes": [log["devices"] for log in logs],
        "steps": logs[0]["steps"],
        "greatest difference": max(curve_gap(logs[0]["log"], log["log"]) for log in logs),
        "losses": [[entry["loss"] for entry in log["log"]] for log in logs],
        "what": "losses of the tiny model, float32, trained by so many processes on CPUs",
        "unit": "nats",
        "device": f"{platform.machine()} CPU",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(project_root() / "outputs" / "bench" / "reward_processes.json", found)
    return found


def model_flops(
    config,  # of a model built like Llama
    tokens: int,  # computed
    attended: int,  # pairs of query and key
) -> float:  # operations, forward and backward
    "Count the operations of training, every weight trained; embeddings are looked up and cost nothing."
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    projections = (
        2 * config.hidden_size * size * (config.num_attention_heads + config.num_key_value_heads)
    )  # q, o; k, v
    weights = projections + 3 * config.hidden_size * config.intermediate_size  # gate, up, down
    return 3.0 * config.num_hidden_layers * (2 * weights * tokens + 4 * config.num_attention_heads * size * attended)


def useful_work(
    rows: list[dict],  # of made_rows
) -> tuple[
    int, int
]:  # tokens, pairs of query and key: prompts once, no padding, each token looks at what stands before it and at itself
    "Count what pairs need."
    tokens = attended = 0
    for row in rows:
        texts = row["chosen_ids"], row["rejected_ids"]
        shared = common_prefix(texts)
        tokens += sum(map(len, texts)) - shared
        attended += sum(len(text) * (len(text) + 1) for text in texts) // 2 - shared * (shared + 1) // 2
    return tokens, attended


def matmul_rate(
    dtype,  # torch dtype
    size: int,  # of square matrices
    repeats: int = 5,  # measurements, of which the best counts
) -> float:  # operations/s
    "Measure how fast the device multiplies large matrices."
    import torch

    device, rates = pick_device(), []
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = max(1, round(2e13 / size**3)) if device == "cuda" else 4
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(calls):
            first @ second
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(calls * 2 * size**3 / (time.perf_counter() - start))
    return max(rates[1:])


SHAPES = {
    "llama-3.2-3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}


def random_reward_model(
    shape: dict,  # of LlamaConfig
    tokenizer,  # whose padding token is meant
    dtype: str = "bfloat16",  # or float32
):  # transformers sequence-classification model with one label, on the chosen device
    "Make a Llama of random weights on the device."
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        **shape,
        num_labels=1,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(), torch.device(pick_device()):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config, dtype=pick_dtype(dtype)).eval()


def step_optimiser(
    model,  # every weight is trained
):  # torch.optim.AdamW, or None
    "Make AdamW where weights, gradients and two moments leave a quarter of the memory free."
    import torch

    gpu = torch.cuda.is_available()
    room = torch.cuda.get_device_properties(0).total_memory if gpu else float("inf")
    need = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        torch.optim.AdamW(model.parameters(), lr=9e-6, fused=gpu) if need < 0.75 * room else None
    )  # the paper's rate (§4.1)


def their_ways(
    pairs: int,  # in the step
) -> list[Way]:  # to try
    "List trl's numbers of pairs in a pass and its kernels of attention."
    from transformers.utils import is_flash_attn_2_available

    kernels = ["sdpa"] + ["flash_attention_2"] * bool(is_flash_attn_2_available())
    return [Way(pairs=size, attention=kernel) for kernel in kernels for size in (4, 8, 16, 32) if pairs % size == 0]


def shape_bench(
    name: str,  # for the table
    shape: dict,  # of LlamaConfig
    rounds: int,  # counted measurements of each side
    pairs: int = 128,  # in a measurement, one optimiser step
    checkpointing: bool = True,  # of gradients
    matmul: int = 8192,  # size of the matrices that tell the device's rate
) -> dict:  # what was found
    "Measure full training of a shape: pairs/s, utilisation, memory."
    import torch

    tokenizer = load_tokenizer(find_weights("random-tiny"))
    model, rows = random_reward_model(shape, tokenizer), made_rows(tokenizer, pairs, LENGTHS["paper"])
    optimiser = step_optimiser(model)
    size = pack_size([row["length"] for row in rows], pairs, RewardSettings().pack_tokens, 1, 0)
    done = "forward, backward" + (" and AdamW's step" if optimiser else ", no optimiser's step")
    what = f"{done} of {pairs} pairs, answers of 350-430 tokens, every weight of {name} in bfloat16, {'with' if checkpointing else 'no'} gradient checkpointing"
    found, mine, rival = training_bench(
        what,
        f"reward_{name}",
        "pairs/s",
        model,
        tokenizer,
        rows,
        Way(True, "batch_rebalance", size),
        their_ways(pairs),
        rounds,
        checkpointing,
        optimiser,
    )
    each, most = model_flops(model.config, *useful_work(rows)) / pairs, matmul_rate(torch.bfloat16, matmul)
    return {
        "label": name,
        **found,
        "FLOP a pair": each,
        "matmul FLOP/s": most,
        "utilisation": {side: found[side] * each / most for side in ("ours", "theirs")},
        "peak GB": {"ours": mine.peak_gb, "theirs": rival.peak_gb},
        "our kernel": unwrap(model).base_model.pack_kernel,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def gpu_bench(
    shapes: list[str],  # keys of SHAPES
    rounds: int,  # counted measurements of each side
    pairs: int,  # in a measurement
    checkpointing: bool,  # of gradients
) -> list[dict]:  # what was found; empty without a GPU
    "Measure the shapes on a GPU and keep what was found."
    import torch

    if unknown := [name for name in shapes if name not in SHAPES]:
        raise StudyError(f"GPU_SHAPES: {unknown[0]!r} is not known. {suggest(unknown[0], SHAPES)}")
    if not torch.cuda.is_available():
        return []
    found = []
    for name in shapes:
        found.append(shape_bench(name, SHAPES[name], rounds, pairs, checkpointing))
        keep_gpu(found[-1])
        torch.cuda.empty_cache()
    return found


def keep_gpu(
    found: dict,  # of shape_bench
    kind: str = "reward",  # which measurements: reward, policy
) -> Path:  # the file
    "Put a measurement into the dated file of its device; another of the same label on the same day takes its place."
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    path = project_root() / "tests" / "bench" / "gpu" / f"{kind}_{device}_{found['date']}.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    write_json(
        path,
        {
            "device": found["device"],
            "date": found["date"],
            "rows": [row for row in rows if row["label"] != found["label"]] + [found],
        },
    )
    return path


def bench_figure(
    panels: dict[str, list[dict]],  # title -> what was found; empty ones are left out
):  # matplotlib figure
    "Draw ours beside theirs, with the ratio above."
    panels = {title: found for title, found in panels.items() if found}
    figure, axes = new_figure(
        sum(1.4 + 1.1 * len(found) for found in panels.values()),
        3.6,
        1,
        len(panels),
        squeeze=False,
        width_ratios=[1.3 + len(found) for found in panels.values()],
    )
    for axis, (title, found) in zip(axes[0], panels.items()):
        for shift, side, color in ((-0.2, "ours", PALETTE[0]), (0.2, "theirs", PALETTE[1])):
            axis.bar(
                [i + shift for i in range(len(found))], [row[side] for row in found], 0.38, color=color, label=side
            )
        for i, row in enumerate(found):
            axis.text(i, max(row["ours"], row["theirs"]), f"{row['ratio']:.2f}×", ha="center", va="bottom")
        axis.set_xticks(range(len(found)), [row["label"].replace(", ", ",\n") for row in found], fontsize=8)
        axis.set(ylabel=found[0]["unit"], title=title)
        axis.margins(y=0.12)
        axis.grid(False, axis="x")
    axes[0][0].legend(frameon=False)
    return figure


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 3  # measurements of each side, after one that is not counted
BATCHES = 8  # batches of 8 pairs in a measurement of training
TEXTS = 64  # in a measurement of scoring; a multiple of 8
GPU_SHAPES = ["llama-3.2-3b", "llama-3.1-8b"]  # trained where there is a GPU
GPU_PAIRS = 128  # in a measurement on a GPU, one optimiser step
CHECKPOINTING = True  # of gradients, on a GPU


if __name__ == "__main__":
    import sys

    from bench import given

    globals().update(given(sys.argv[1:], globals()))
    trained = lora_bench(BACKBONE, ROUNDS, BATCHES)
    scored = scoring_bench(BACKBONE, ROUNDS, TEXTS)
    processes = processes_bench()
    print({key: processes[key] for key in ("processes", "steps", "greatest difference")})
    on_gpu = gpu_bench(GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    import pandas as pd

    figure = bench_figure(
        {
            "training, against trl": trained,
            "scoring, against sorted batches": [row for row in scored if row["sorted"]],
            "training on a GPU, against trl": on_gpu,
        }
    )
    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "reward.png", dpi=160)
    print(pd.DataFrame(trained + scored + on_gpu)[["label", "what", "ours", "theirs", "ratio", "unit", "device"]])
