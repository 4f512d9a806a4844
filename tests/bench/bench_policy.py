"""DPO beside trl's DPOTrainer, as it comes and at its best: time, memory, and where the time of an iteration goes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from psycopref.core.tables import PALETTE, new_figure
from psycopref.core.files import StageReader, read_json, write_json
from bench import device_name, in_turn, side_by_side
from bench_generation import Work as Sampling
from bench_generation import ours as our_samples
from bench_generation import transformers_generate
from bench_reward import (
    LENGTHS,
    SHAPES,
    STRATEGIES,
    Lengths,
    bench_figure,
    keep,
    keep_gpu,
    made_groups,
    matmul_rate,
    model_flops,
    step_optimiser,
    twin,
    useful_work,
)
from psycopref.core.settings import DpoSettings, LoraSettings, StudyError, load_profile, suggest
from psycopref.core.stages import Run, project_root
from psycopref.training.dpo import dpo_config, dpo_rows
from psycopref.models.generation import Decoding
from psycopref.training.packing import dpo_trainer, unwrap
from psycopref.training.texts import add_lora, common_arguments, prompt_messages, silence, step_plan
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer, pick_device, pick_dtype


@dataclass(frozen=True)
class Work:
    "Hold what every side has to train."

    fresh: typing.Callable[[], typing.Any]  # gives a transformers language model to change at will
    tokenizer: typing.Any  # its tokenizer
    pairs: typing.Any  # frame with prefID, question, chosen, rejected
    settings: DpoSettings  # batch, rate, beta, adapters
    checkpointing: bool = False  # of gradients, for ours and trl's best; stock has its default

    @functools.cached_property
    def rows(self) -> list[dict]:
        "The pairs as tokens: prompt_ids, chosen_ids, rejected_ids, length."
        return dpo_rows(self.pairs, self.tokenizer, self.settings.max_length)[0]

    def __post_init__(self):
        if len(self.rows) < len(self.pairs) or len(self.rows) % self.settings.batch_size:
            raise StudyError(
                f"bench: found {len(self.rows)} of {len(self.pairs)} pairs short enough, expected all, and whole "
                f"batches of {self.settings.batch_size}; "
                "change the number of pairs, or max_length"
            )


def made_pairs(
    tokenizer,  # that counts the tokens
    n: int,  # pairs
    lengths: Lengths,  # of their texts
):  # frame with prefID, question, chosen, rejected
    "Make pairs of wished lengths."
    import pandas as pd

    return pd.DataFrame(
        [
            {"prefID": i, "question": question, "chosen": chosen, "rejected": rejected}
            for i, (question, (chosen, rejected)) in enumerate(made_groups(tokenizer, n, 2, lengths))
        ]
    )


@dataclass(frozen=True)
class Way:
    "Say how a side trains."

    side: typing.Literal["ours", "trl", "stock"]
    pairs: int = 8  # in one forward pass; stock has trl's default, which is 8 too
    strategy: str = "random"  # transformers' train_sampling_strategy
    attention: str = "sdpa"  # transformers' attn_implementation, of trl's side


def our_way(work: Work) -> Way:  # ours
    "Take the packs that `training.dpo` would."
    return Way(
        "ours", step_plan([row["length"] for row in work.rows], work.settings, 0)["pack_size"], "batch_rebalance"
    )


def conversations(
    work: Work,
    **columns,  # name -> a value for each row
) -> list[dict]:  # prompt, chosen, rejected
    "Word the pairs as trl's users do; trl tokenises them itself."
    rows = [
        {"prompt": prompt_messages(pair.question)}
        | {part: [{"role": "assistant", "content": getattr(pair, part)}] for part in ("chosen", "rejected")}
        for pair in work.pairs.itertuples()
    ]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


def _lora_config(config, lora: LoraSettings):
    "Make peft's configuration of our adapters, on a model without weights."
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return add_lora(AutoModelForCausalLM.from_config(config), lora).peft_config["default"]


def _stock(work: Work) -> dict:
    "Collect what trl's trainer gets as it comes: the experiment's numbers; nothing is saved, shown or sent."
    import torch
    from trl import DPOConfig

    settings, model, quiet = (
        work.settings,
        work.fresh(),
        dict(save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False),
    )
    config = DPOConfig(
        tempfile.gettempdir(),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        beta=settings.beta,
        max_length=settings.max_length,
        seed=0,
        num_train_epochs=1,
        use_cpu=not torch.cuda.is_available(),
        **quiet,
    )
    config.gradient_accumulation_steps = settings.batch_size // config.per_device_train_batch_size
    return dict(
        model=model, args=config, rows=conversations(work), peft_config=_lora_config(model.config, settings.lora)
    )


def _tuned(work: Work, way: Way) -> dict:
    "Collect what our trainer gets, or trl's at its best."
    from trl import DPOConfig

    settings, model = work.settings, add_lora(work.fresh(), work.settings.lora)
    rows, more = (
        work.rows,
        dict(
            num_train_epochs=1,
            max_steps=-1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=work.checkpointing,
        ),
    )
    if way.side == "ours":
        config = dpo_config(
            replace(settings, checkpoints=0),
            {"pack_size": way.pairs, "steps": -1},
            Path(tempfile.gettempdir()),
            0,
            False,
        )
        for name, value in more.items():
            setattr(config, name, value)
    else:
        unwrap(model).set_attn_implementation(way.attention)
        rows = conversations(
            work,
            length=[len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows],
        )
        config = DPOConfig(
            **common_arguments(
                settings,
                tempfile.gettempdir(),
                0,
                way.pairs,
                beta=settings.beta,
                precompute_ref_log_probs=True,
                remove_unused_columns=False,
                train_sampling_strategy=way.strategy,
                **more,
            )
        )
    return dict(model=model, args=config, rows=rows, ref_model=work.fresh() if settings.lora.rank else None)


@dataclass
class Side:
    "Train on all pairs once; calling it returns their number, as `in_turn` wants."

    work: Work
    way: Way
    optimiser: typing.Any = None  # torch optimiser that sides share; None lets the trainer make its own
    peak_gb: float | None = None  # greatest memory of the last call, on a GPU
    reference_seconds: float = 0.0  # of the last call

    def __post_init__(self):
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import DPOTrainer

        silence()
        given = _stock(self.work) if self.way.side == "stock" else _tuned(self.work, self.way)
        self.reference = given.get("ref_model")
        self.trainer = (dpo_trainer() if self.way.side == "ours" else DPOTrainer)(
            **given
            | {
                "train_dataset": Dataset.from_list(given.pop("rows")),
                "processing_class": self.work.tokenizer,
                "optimizers": (self.optimiser, None),
            }
        )
        self.trainer.ref_model = None  # known now
        self.trainer.remove_callback(PrinterCallback)
        if self.way.side == "ours" and self.trainer.not_packed:
            raise RuntimeError(f"the model is not packed: {self.trainer.not_packed}")

    def know_reference(self) -> None:
        "Compute the reference's log-probabilities as trl does before a training."
        from torch.utils.data import DataLoader

        start, own = time.perf_counter(), self.trainer
        own.ref_model = self.reference
        try:
            for batch in own.accelerator.prepare(
                DataLoader(own.train_dataset, batch_size=self.way.pairs, collate_fn=own.data_collator)
            ):
                for logps in own.compute_ref_log_probs(self.reference or own.model, batch):
                    logps.cpu()
        finally:
            own.ref_model = None
        self.reference_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        import torch

        pairs, gpu = len(self.work.rows), torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        if self.way.side != "stock":
            self.know_reference()
        self.trainer.train()
        if (steps := self.trainer.state.global_step) * self.work.settings.batch_size != pairs:
            raise RuntimeError(
                f"{self.way}: took {steps} steps of {self.work.settings.batch_size}, expected all {pairs} pairs to be "
                "trained on"
            )
        if gpu:
            torch.cuda.synchronize()
            self.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        return float(pairs)


def adapted_losses(
    sides: list[Side],  # with adapters
    scale: float = 0.02,  # of the adapters' weights
    seed: int = 0,  # of their values
) -> list[float]:  # of the first batch
    "Compute the loss of each side under the same adapters; their own are put back."
    import torch
    from accelerate.utils import send_to_device

    losses = []
    for side in sides:
        generator, trainer = torch.Generator().manual_seed(seed), side.trainer
        own = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in own.items()}
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(side.work.settings.batch_size))))
        with torch.no_grad():
            for name in sorted(own):
                own[name].copy_(scale * torch.randn(own[name].shape, generator=generator))
            losses.append(
                trainer.compute_loss(trainer.model.eval(), send_to_device(batch, trainer.accelerator.device)).item()
            )
            for name, weight in before.items():
                own[name].copy_(weight)
    return losses


def reference_gap(
    first: Side,  # that knows its reference
    second: Side,  # likewise
) -> float:  # difference of the log-probabilities, share of their norm
    "Compare the references' log-probabilities."
    import math

    ours, theirs = (
        [value for part in ("chosen", "rejected") for value in side.trainer.train_dataset[f"ref_{part}_logps"]]
        for side in (first, second)
    )
    return math.dist(ours, theirs) / math.hypot(*theirs)


def same_work(
    sides: list[Side],  # ours first, then trl's best, then stock where there are adapters
) -> dict:  # losses, and the gap of the references
    "Refuse sides that don't compute the same."
    import torch

    exact = unwrap(sides[0].trainer.model).dtype == torch.float32
    losses = adapted_losses(sides) if sides[0].work.settings.lora.rank else []
    gap, spread = reference_gap(sides[0], sides[1]), max(losses, default=0) - min(losses, default=0)
    if not (gap <= (1e-5 if exact else 0.02) and spread <= (1e-3 if exact else 0.2)):
        raise RuntimeError(
            f"the references are {gap:.2g} apart and the losses {spread:.2g} ({losses}): it is not the same work"
        )
    return {"losses": losses, "reference gap": gap}


def try_ways(
    make: typing.Callable[[Way], Side],  # makes a side
    ways: list[Way],  # to try
) -> list[tuple[float, Way]]:  # pairs/s of each, measured once; 0 where memory ran out
    "Measure each way once."
    import torch

    tried = []
    for way in ways:
        side = make(way)
        try:
            start = time.perf_counter()
            tried.append((side() / (time.perf_counter() - start), way))
        except torch.OutOfMemoryError:
            side.trainer.model.zero_grad()
            tried.append((0.0, way))
        del side
        torch.cuda.empty_cache()
    return tried


def demo_settings(
    pairs: int = 8,  # in an optimiser step
    pack_tokens: int | None = None,  # budget of our packs; None takes the demo's
) -> DpoSettings:  # the demo's, for these measurements
    "Take the demo's settings, with steps of 8 pairs and room for long answers."
    demo = load_profile("demo").dpo
    return replace(
        demo, batch_size=pairs, epochs=1.0, checkpoints=0, max_length=1024, pack_tokens=pack_tokens or demo.pack_tokens
    )


def compare_sides(
    what: str,  # is trained
    work: Work,
    ways: list[Way],  # trl's, of which the best is taken
    rounds: int,  # counted measurements of each side
) -> dict:  # seconds a step of each side, ratios to ours
    "Measure ours, trl at its best and stock trl in turn."
    ours, stock = Side(work, our_way(work)), Side(work, Way("stock"))
    same = same_work([ours, Side(work, ways[0]), stock])
    tried = try_ways(lambda way: Side(work, way), ways)
    sides = {"ours": ours, "trl": Side(work, max(tried, key=lambda own: own[0])[1]), "stock": stock}
    rates, batch = in_turn(sides, rounds), work.settings.batch_size
    ratios = {side: [a / b for a, b in zip(rates["ours"], rates[side])] for side in ("trl", "stock")}
    return {
        "what": what,
        "unit": "s",
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "steps": len(work.rows) // batch,
        "seconds": {side: statistics.median(batch / rate for rate in own) for side, own in rates.items()},
        "ratio": {side: statistics.median(own) for side, own in ratios.items()},
        "ratios": ratios,
        "of it reference": {
            side: own.reference_seconds * batch / len(work.rows) for side, own in sides.items() if side != "stock"
        },
        "ways": {side: dataclasses.asdict(own.way) for side, own in sides.items()},
        "tried": [dataclasses.asdict(way) | {"rate": rate} for rate, way in tried],
        "useful tokens a step": sum(row["length"] for row in work.rows) * batch / len(work.rows),
        **same,
    }


def lora_bench(
    backbone: str,  # weights
    rounds: int,  # counted measurements of each side
    steps: int,  # of 8 pairs, in a measurement
    settings: DpoSettings | None = None,  # None takes demo_settings
    dtype: str = "auto",  # bfloat16 where the processor has it
    profiles: typing.Sequence[str] = ("demo", "paper"),  # keys of LENGTHS
    sizes: typing.Sequence[int] = (2, 4, 8),  # trl's pairs in a pass that are tried
) -> list[dict]:  # what was found, for each profile of lengths
    "Measure DPO with adapters."
    weights, found, settings = find_weights(backbone), [], settings or demo_settings()
    tokenizer, model = load_tokenizer(weights), load_causal_lm(weights, dtype)
    for label in profiles:
        low, high = LENGTHS[label].answer
        what = (
            f"DPO in steps of {settings.batch_size} pairs, answers of {low}-{high} tokens, LoRA of rank "
            f"{settings.lora.rank} on the last {settings.lora.last_layers} layers of {backbone}, "
            f"{str(model.dtype).removeprefix('torch.')}, the reference counted"
        )
        work = Work(
            lambda: twin(model), tokenizer, made_pairs(tokenizer, settings.batch_size * steps, LENGTHS[label]), settings
        )
        found.append(
            {"label": f"{label}'s lengths"}
            | compare_sides(what, work, [Way("trl", size, "group_by_length") for size in sizes], rounds)
        )
        keep("policy_training", found)  # after each, for long answers take long
    return found


def peak_mb() -> float:  # of this process since it began
    "Return the most memory that was resident."
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure_memory(
    spec: dict,  # backbone, dtype, profile (a key of LENGTHS), pairs, settings, way
) -> dict:  # loaded_mb, peak_mb
    "Train one side in this process, which should be new."
    import trl.trainer.dpo_trainer  # noqa: F401, so that it counts as loaded

    weights = find_weights(spec["backbone"])
    load = functools.partial(load_causal_lm, weights, spec["dtype"])
    tokenizer, first = load_tokenizer(weights), [load()]
    loaded = peak_mb()
    settings = DpoSettings(**spec["settings"] | {"lora": LoraSettings(**spec["settings"]["lora"])})
    work = Work(
        lambda: first.pop() if first else load(),
        tokenizer,
        made_pairs(tokenizer, spec["pairs"], LENGTHS[spec["profile"]]),
        settings,
    )
    side = Side(work, Way(**spec["way"]))
    side.reference = None  # as after a training's start
    side.trainer.train()
    return {"loaded_mb": loaded, "peak_mb": peak_mb(), "steps": side.trainer.state.global_step}


def child_memory(
    spec: dict,  # of measure_memory
) -> dict:  # of measure_memory
    "Measure in a new process."
    code = "import json, sys; from bench_policy import measure_memory; print('\\n' + json.dumps(measure_memory(json.loads(sys.argv[1]))))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{spec['way']} ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_bench(
    backbone: str,  # weights
    trained: list[dict],  # of lora_bench: whose ways are taken
    settings: DpoSettings | None = None,  # None takes demo_settings
    dtype: str = "auto",  # bfloat16 where the processor has it
) -> list[dict]:  # peak of each side and share of stock's, for each profile of lengths
    "Measure the memory of all sides, for one optimiser step."
    found, settings = [], settings or demo_settings()
    for row in trained:
        spec = {
            "backbone": backbone,
            "dtype": dtype,
            "profile": row["label"].partition("'")[0],
            "pairs": settings.batch_size,
            "settings": dataclasses.asdict(settings),
        }
        sides = {side: child_memory(spec | {"way": way}) for side, way in row["ways"].items()}
        growth = {side: own["peak_mb"] - own["loaded_mb"] for side, own in sides.items()}
        found.append(
            {
                "label": row["label"],
                "what": f"peak memory of a process: {row['what']}",
                "unit": "MB",
                "device": device_name(),
                "date": time.strftime("%Y-%m-%d"),
                "sides": sides,
                "peak_mb": {side: own["peak_mb"] for side, own in sides.items()},
                "growth_mb": growth,
                "share of stock's": {
                    side: sides[side]["peak_mb"] / sides["stock"]["peak_mb"] for side in ("ours", "trl")
                },
                "growth's share of stock's": {side: growth[side] / growth["stock"] for side in ("ours", "trl")},
            }
        )
    return keep("policy_memory", found)


def policy_flops(
    config,  # of a model built like Llama
    rows: list[dict],  # of Work
) -> float:  # operations
    "Count the operations of DPO, every weight trained."
    texts = [{part: row["prompt_ids"] + row[part] for part in ("chosen_ids", "rejected_ids")} for row in rows]
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    training = model_flops(config, *useful_work(texts)) + 3 * 2.0 * config.hidden_size * config.vocab_size * answers
    return training * 4 / 3  # three parts for the policy's two directions, one for the reference


def random_policy(
    shape: dict,  # of LlamaConfig
    tokenizer,  # whose special tokens are meant
    dtype: str = "bfloat16",  # or float32
):  # transformers causal language model on the chosen device
    "Make a Llama of random weights on the device."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **shape,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(), torch.device(pick_device()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=pick_dtype(dtype)).eval()


def their_ways(
    pairs: int,  # in the step
) -> list[Way]:  # to try
    "List trl's numbers of pairs in a pass and its kernels of attention."
    from transformers.utils import is_flash_attn_2_available

    kernels = ["sdpa"] + ["flash_attention_2"] * bool(is_flash_attn_2_available())
    return [
        Way("trl", size, "group_by_length", kernel) for kernel in kernels for size in (2, 4, 8, 16) if pairs % size == 0
    ]


def shape_bench(
    name: str,  # for the table
    shape: dict,  # of LlamaConfig
    rounds: int,  # counted measurements of each side
    pairs: int = 64,  # in a measurement, one optimiser step
    checkpointing: bool = True,  # of gradients
    matmul: int = 8192,  # size of the matrices that tell the device's rate
    model=None,  # a policy of this shape; None makes one
) -> dict:  # what was found
    "Measure full DPO of a shape: pairs/s, utilisation, memory."
    import torch

    tokenizer = load_tokenizer(find_weights("random-tiny"))
    model = model or random_policy(shape, tokenizer)
    settings = DpoSettings(batch_size=pairs, epochs=1.0, checkpoints=0)
    adam = step_optimiser(model)
    optimiser = adam or torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    work = Work(lambda: twin(model), tokenizer, made_pairs(tokenizer, pairs, LENGTHS["paper"]), settings, checkpointing)
    make = lambda way: Side(work, way, optimiser)
    tried = try_ways(make, their_ways(pairs))
    best = max(tried, key=lambda own: own[0])[1]
    tried += try_ways(make, [replace(best, strategy=strategy) for strategy in STRATEGIES if strategy != best.strategy])
    mine, rival = make(our_way(work)), make(max(tried, key=lambda own: own[0])[1])
    same = same_work([mine, rival])
    what = (
        f"DPO of {pairs} pairs, answers of 350-430 tokens, every weight of {name} in bfloat16, "
        f"{'with' if checkpointing else 'no'} gradient checkpointing, the reference counted, "
        f"{'AdamW' if adam else 'plain gradient descent'}, against trl's DPOTrainer ({rival.way.strategy}, "
        f"{rival.way.pairs} pairs a pass, {rival.way.attention})"
    )
    found = side_by_side(f"policy_{name}", what, "pairs/s", mine, rival, rounds)
    each, most = policy_flops(model.config, work.rows) / pairs, matmul_rate(torch.bfloat16, matmul)
    return {
        "label": name,
        **found,
        "FLOP a pair": each,
        "matmul FLOP/s": most,
        "utilisation": {side: found[side] * each / most for side in ("ours", "theirs")},
        "peak GB": {"ours": mine.peak_gb, "theirs": rival.peak_gb},
        "ways": [dataclasses.asdict(side.way) for side in (mine, rival)],
        "tried": [dataclasses.asdict(way) | {"rate": rate} for rate, way in tried],
        "our kernel": mine.trainer.pack_kernel,
        "parameters": sum(p.numel() for p in model.parameters()),
        **same,
    }


def candidates_bench(
    name: str,  # for the table
    model,  # causal language model
    tokenizer,  # its tokenizer
    rounds: int,  # counted measurements of each side
    prompts: int = 64,  # client speeches
    n: int = 8,  # candidates for each
    tokens: int = 400,  # longest candidate
    rows: typing.Sequence[int] = (64, 128, 512),  # answers that transformers computes together, to try
) -> dict:  # what was found
    "Measure sampling of candidates beside transformers' generate."
    import torch

    questions = [question for question, _ in made_groups(tokenizer, prompts, 0, LENGTHS["paper"])]
    rendered = [
        tokenizer.apply_chat_template(prompt_messages(question), tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
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
    what = f"{n} candidates for each of {prompts} prompts, at most {tokens} tokens, top-k 50, {name}, against transformers' generate, {best} rows at a time"
    found = side_by_side(
        f"policy_candidates_{name}",
        what,
        "candidates/s",
        lambda: sample("ours", lambda: our_samples(work)),
        lambda: sample("theirs", lambda: transformers_generate(work, best)),
        rounds,
    )
    return {
        "label": f"{name}, candidates",
        **found,
        "tokens": made,
        "tried": {str(size): rate for size, rate in tried.items()},
    }


def gpu_bench(
    shapes: list[str],  # keys of SHAPES
    rounds: int,  # counted measurements of each side
    pairs: int,  # in a measurement
    checkpointing: bool,  # of gradients
) -> tuple[list[dict], list[dict]]:  # trainings, samplings; empty without a GPU
    "Measure the shapes on a GPU and keep what was found."
    import torch

    if unknown := [name for name in shapes if name not in SHAPES]:
        raise StudyError(f"GPU_SHAPES: {unknown[0]!r} is not known. {suggest(unknown[0], SHAPES)}")
    trained, sampled, tokenizer = [], [], load_tokenizer(find_weights("random-tiny"))
    for name in shapes if torch.cuda.is_available() else []:
        model = random_policy(SHAPES[name], tokenizer)
        sampled.append(candidates_bench(name, model, tokenizer, rounds))
        trained.append(shape_bench(name, SHAPES[name], rounds, pairs, checkpointing, model=model))
        for found in (sampled[-1], trained[-1]):
            keep_gpu(found, "policy")
        del model
        torch.cuda.empty_cache()
    return trained, sampled


PHASES = ("sample", "score", "reference", "train", "save")  # in the order of an iteration; others follow behind


def policy_run(
    run: str | None,  # its name; None takes the newest of the demo
) -> StageReader:  # of its 06_policy
    "Find the run whose iterations are looked at."
    receipts = sorted(
        (project_root() / "outputs").glob("*/06_policy/receipt.json"), key=lambda path: path.stat().st_mtime
    )
    names = [run] if run else [path.parents[1].name for path in receipts if read_json(path)["profile"] == "demo"]
    if not names:
        raise StudyError(
            "bench: found no finished 06_policy of the demo under outputs/, expected one to look at; run `make "
            "reproduce` first"
        )
    return StageReader(Run(names[-1]), "06_policy")


def iteration_phases(
    reader: StageReader,  # of a 06_policy
) -> list[dict]:  # label, and seconds by phase, one for each iteration of each backbone
    "Read how long the phases of the iterations took."
    found = []
    for slug, result in reader.json("training").items():
        for number, done in enumerate(result["iter"]["iterations"], start=1):
            if not isinstance(done.get("seconds"), dict):
                raise StudyError(
                    f"{reader.folder}: iteration {number} of {slug} has no `seconds`, expected those of its phases; "
                    "it is of an older version, so run 06_policy again"
                )
            seconds = {name: float(value) for name, value in done["seconds"].items()}
            order = sorted(seconds, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
            found.append(
                {
                    "label": f"{slug}, iteration {number}",
                    "seconds": {name: seconds[name] for name in order},
                    "total": sum(seconds.values()),
                }
            )
    return found


def phases_bench(
    run: str | None,  # of the demo; None takes the newest
) -> list[dict]:  # of iteration_phases; empty, and a line printed, where there is none
    "Keep the phases of a run's iterations, or say what has to run first."
    try:
        reader = policy_run(run)
        found = iteration_phases(reader)
    except StudyError as error:
        print(error)
        return []
    write_json(
        project_root() / "outputs" / "bench" / "policy_phases.json",
        {
            "what": f"seconds of the phases of an iteration of DPO-Iter, run {reader.run.name}",
            "unit": "s",
            "run": reader.run.name,
            "profile": reader.receipt["profile"],
            "device": f"{os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
            "rows": found,
        },
    )
    return found


def phases_figure(
    found: list[dict],  # of iteration_phases
):  # matplotlib figure
    "Draw the phases of each iteration, stacked."
    figure, axis = new_figure(max(4.6, 2.4 + 0.75 * len(found)), 3.8)
    names, most = (
        list(dict.fromkeys(name for row in found for name in row["seconds"])),
        max(row["total"] for row in found),
    )
    bottoms = [0.0] * len(found)
    for place, name in enumerate(names):
        heights = [row["seconds"].get(name, 0.0) for row in found]
        axis.bar(range(len(found)), heights, 0.66, bottoms, color=PALETTE[place % len(PALETTE)], label=name)
        for i, height in enumerate(heights):
            if height >= 0.06 * most:
                axis.text(
                    i,
                    bottoms[i] + height / 2,
                    f"{height:.0f}" if height >= 10 else f"{height:.1f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    for i, row in enumerate(found):
        axis.text(i, row["total"] + 0.01 * most, f"{row['total']:.0f} s", ha="center", va="bottom", fontsize=8)
    named = [(slug, number) for slug, _, number in (row["label"].rpartition(", iteration ") for row in found)]
    axis.set_xticks(
        range(len(found)),
        [number if i and slug == named[i - 1][0] else f"{number}\n{slug}" for i, (slug, number) in enumerate(named)],
        fontsize=8,
    )
    axis.set(xlabel="iteration", ylabel="seconds", title="Phases of an iteration of DPO-Iter")
    axis.margins(y=0.1)
    axis.grid(False, axis="x")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


NAMES = {"ours": "ours", "trl": "trl's best", "stock": "trl as it comes"}


def cpu_figure(
    trained: list[dict],  # of lora_bench
    remembered: list[dict],  # of memory_bench
):  # matplotlib figure
    "Draw seconds a step and peak memory; above each bar how many times ours it is."
    figure, axes = new_figure(8.4, 3.8, 1, 2)
    for axis, rows, key, ylabel, title in (
        (axes[0], trained, "seconds", "seconds", "A step of 8 pairs, reference included"),
        (axes[1], remembered, "peak_mb", "MB", "Peak memory of the process"),
    ):
        for place, side in enumerate(NAMES):
            heights = [row[key][side] for row in rows]
            axis.bar(
                [i + 0.27 * (place - 1) for i in range(len(rows))],
                heights,
                0.25,
                color=PALETTE[place],
                label=NAMES[side],
            )
            for i, (row, height) in enumerate(zip(rows, heights)):
                times = (
                    ""
                    if side == "ours"
                    else f"\n{(row['ratio'][side] if 'ratio' in row else height / row[key]['ours']):.1f}×"
                )
                axis.text(
                    i + 0.27 * (place - 1),
                    height,
                    f"{height:.3g}{times}" if height < 100 else f"{height:.0f}{times}",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        if key == "peak_mb":
            for i, row in enumerate(rows):
                for place, side in enumerate(NAMES):
                    axis.hlines(
                        row["sides"][side]["loaded_mb"],
                        i + 0.27 * (place - 1) - 0.125,
                        i + 0.27 * (place - 1) + 0.125,
                        color="white",
                        linewidth=1.5,
                    )
        axis.set_xticks(range(len(rows)), [row["label"] for row in rows])
        axis.set(ylabel=ylabel, title=title)
        axis.margins(y=0.2)
        axis.grid(False, axis="x")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    axes[1].set_xlabel("below the white line: the model and the libraries, loaded", fontsize=8)
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
    from bench import given

    globals().update(given(sys.argv[1:], globals()))
    settings = demo_settings(pack_tokens=PACK_TOKENS)
    trained = lora_bench(BACKBONE, ROUNDS, STEPS, settings)
    remembered = memory_bench(BACKBONE, trained, settings)
    on_gpu, sampled = gpu_bench(GPU_SHAPES, ROUNDS, GPU_PAIRS, CHECKPOINTING)
    phased = phases_bench(RUN)
    import pandas as pd

    folder = project_root() / "figures" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    cpu_figure(trained, remembered).savefig(folder / "policy.png", dpi=160)
    if on_gpu:
        bench_figure({"DPO on a GPU, against trl": on_gpu, "sampling on a GPU, against transformers": sampled}).savefig(
            folder / "policy_gpu.png", dpi=160
        )
    if phased:
        phases_figure(phased).savefig(folder / "policy_phases.png", dpi=160)
    rows = [
        {
            "label": row["label"],
            "unit": row["unit"],
            **own,
            **{f"{side} / ours": ratio for side, ratio in times.items()},
        }
        for row, own, times in (
            [(row, row["seconds"], row["ratio"]) for row in trained]
            + [
                (
                    row,
                    row["peak_mb"],
                    {side: row["peak_mb"][side] / row["peak_mb"]["ours"] for side in ("trl", "stock")},
                )
                for row in remembered
            ]
        )
    ]
    print(pd.DataFrame(rows).round(2))
