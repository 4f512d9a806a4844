"""Reward models and DPO, trained by our trainers and by trl's at its best, on the same pairs in the same run."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import random
import tempfile
import time
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import demo_speeches, keep, keep_rows, side_by_side
from flops import training_flops
from psycopref.core.settings import DpoSettings, LoraSettings, RewardSettings, StudyError, load_profile, suggest
from psycopref.models.packs import lay_out, unwrap
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer, pick_device, pick_dtype
from psycopref.training.dpo import dpo_rows
from psycopref.training.packing import dpo_trainer, reward_trainer
from psycopref.training.scoring import load_reward_model
from psycopref.training.texts import (
    add_lora,
    common_arguments,
    one_device,
    pair_rows,
    prompt_messages,
    silence,
    step_plan,
)
from shares import account, grow, matmul_rate, take

Kind = typing.Literal["reward", "policy"]
LENGTHS = {"paper": ((20, 80), (350, 430)), "demo": ((20, 80), (35, 60))}  # tokens of a question, of an answer
STRATEGIES = ("group_by_length", "batch_rebalance", "random")


# What is trained on


def made_groups(tokenizer, n: int, answers: int, profile: str | tuple, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Cut texts from the demo corpus: n questions, each with its answers.

    profile: a key of LENGTHS, or two spans of tokens as there."""
    chance, (question, answer) = random.Random(seed), LENGTHS.get(profile, profile)
    tokens = [tokenizer(" " + speech, add_special_tokens=False).input_ids for speech in demo_speeches()]

    def text(span: tuple[int, int]) -> str:
        wanted, ids = chance.randint(*span), []
        while len(ids) < wanted:
            ids += chance.choice(tokens)
        return tokenizer.decode(ids[:wanted]).strip()

    return [(text(question), [text(answer) for _ in range(answers)]) for _ in range(n)]


def made_pairs(tokenizer, n: int, profile: str | tuple):
    "Make a frame of n pairs with prefID, question, chosen, rejected."
    import pandas as pd

    groups = made_groups(tokenizer, n, 2, profile)
    rows = [(i, question, *answers) for i, (question, answers) in enumerate(groups)]
    return pd.DataFrame(rows, columns=["prefID", "question", "chosen", "rejected"])


@dataclass(frozen=True)
class Work:
    "Hold what every side has to train."

    kind: Kind
    fresh: typing.Callable[[], typing.Any]  # gives a transformers model to change at will
    tokenizer: typing.Any
    pairs: typing.Any  # of made_pairs
    settings: RewardSettings | DpoSettings  # batch, rate, adapters
    checkpointing: bool = False  # of gradients, for ours and trl's best; trl as it comes has its default
    autocast: bool = False  # compute in bfloat16 above float32 weights, as the study trains every weight on a GPU

    @functools.cached_property
    def rows(self) -> list[dict]:
        "The pairs as tokens."
        rows = pair_rows if self.kind == "reward" else dpo_rows
        return rows(self.pairs, self.tokenizer, self.settings.max_length)[0]

    def flops(self, model) -> int:
        "Count the operations that a training on all pairs needs, each prompt once; for DPO with the reference."
        before = [row.get("prompt_ids", []) for row in self.rows]
        ends = [(row["chosen_ids"], row["rejected_ids"]) for row in self.rows]
        pack = lay_out([[start + end for end in own] for start, own in zip(before, ends)])
        outputs = sum(len(end) if self.kind == "policy" else 1 for own in ends for end in own)
        segments = list(zip(pack.query_lengths, pack.key_lengths))
        return training_flops(model, segments, outputs, reference=self.kind == "policy")

    def __post_init__(self):
        if len(self.rows) < len(self.pairs) or len(self.rows) % self.settings.batch_size:
            raise StudyError(
                f"bench: found {len(self.rows)} of {len(self.pairs)} pairs short enough, expected all, and whole "
                f"batches of {self.settings.batch_size}; change the number of pairs, or max_length"
            )


@dataclass(frozen=True)
class Way:
    "Say how a side trains."

    side: typing.Literal["ours", "trl", "stock"]
    pairs: int = 8  # in one forward pass; stock has trl's default, which is 8 too
    strategy: str = "group_by_length"  # transformers' train_sampling_strategy
    attention: str = "sdpa"  # transformers' attn_implementation, of trl's side; ours has its own


def our_way(work: Work) -> Way:
    "Take the packs that the study's training would."
    size = step_plan([row["length"] for row in work.rows], work.settings, 0)["pack_size"]
    return Way("ours", size, "batch_rebalance")


def their_ways(kind: Kind, pairs: int) -> list[Way]:
    "List trl's numbers of pairs in a pass that divide a step of `pairs`, with each kernel of attention."
    from transformers.utils import is_flash_attn_2_available

    kernels = ["sdpa"] + ["flash_attention_2"] * bool(is_flash_attn_2_available())
    sizes = [size for size in ((4, 8, 16, 32) if kind == "reward" else (2, 4, 8, 16)) if pairs % size == 0]
    return [Way("trl", size, attention=kernel) for kernel in kernels for size in sizes]


# The sides


def twin(model):
    "Copy a model's modules around the same parameters."
    return copy.deepcopy(model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())})


def side_rows(work: Work, way: Way) -> list[dict]:
    "Give ours tokens; trl tokenises DPO's conversations itself and groups by the longest text, to which it pads."
    if way.side == "ours":
        return work.rows
    longest = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in work.rows]
    if work.kind == "reward" and way.side == "trl":
        return [row | {"length": length} for row, length in zip(work.rows, longest)]
    return [
        {
            "prompt": prompt_messages(pair.question),
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "length": len(row.get("prompt_ids", [])) + length,
        }
        for pair, row, length in zip(work.pairs.itertuples(), work.rows, longest)
    ]


def side_config(work: Work, way: Way):
    "Make trl's configuration: one epoch; nothing is saved, shown or sent."
    import torch
    from trl import DPOConfig, RewardConfig

    settings, folder = work.settings, tempfile.gettempdir()
    quiet = dict(save_strategy="no", report_to="none", disable_tqdm=True, num_train_epochs=1)
    if way.side == "stock":  # as it comes, with the experiment's numbers and the dtype of ours
        own = dict(learning_rate=settings.learning_rate, warmup_steps=settings.warmup_ratio, seed=0)
        own |= dict(max_length=settings.max_length, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)
        own |= dict(beta=settings.beta) if work.kind == "policy" else {}
        own |= dict(bf16=False) if work.fresh().dtype == torch.float32 else {}  # which a slow processor would emulate
        config = (RewardConfig if work.kind == "reward" else DPOConfig)(folder, **own, **quiet)
        config.gradient_accumulation_steps = settings.batch_size // config.per_device_train_batch_size
        return one_device(config)
    if work.kind == "policy":
        quiet |= dict(beta=settings.beta, precompute_ref_log_probs=True)
    quiet |= dict(train_sampling_strategy=way.strategy, gradient_checkpointing=work.checkpointing, bf16=work.autocast)
    arguments = common_arguments(settings, folder, 0, way.pairs, remove_unused_columns=False, **quiet)
    return one_device((RewardConfig if work.kind == "reward" else DPOConfig)(**arguments))


def side_models(work: Work, way: Way) -> dict:
    "Make the model of a side with its adapters, and for DPO its reference."
    lora = work.settings.lora
    model = add_lora(work.fresh(), lora, head=work.kind == "reward")
    if way.side == "stock":
        return {"model": work.fresh(), "peft_config": model.peft_config["default"]}
    if way.side == "trl":
        unwrap(model).set_attn_implementation(way.attention)
    reference = {"ref_model": work.fresh() if lora.rank else None} if work.kind == "policy" else {}
    return {"model": model} | reference


@dataclass
class Side:
    "Train on all pairs once; calling it returns their number, as `in_turn` wants."

    work: Work
    way: Way
    optimiser: typing.Any = None  # torch optimiser that sides share; None lets the trainer make its own
    peak_gb: float | None = None  # greatest memory of the last call, on a GPU

    def __post_init__(self):
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import DPOTrainer, RewardTrainer

        silence()
        ours, theirs = (reward_trainer, RewardTrainer) if self.work.kind == "reward" else (dpo_trainer, DPOTrainer)
        models = side_models(self.work, self.way)
        self.reference = models.get("ref_model")
        self.trainer = (ours() if self.way.side == "ours" else theirs)(
            **models,
            args=side_config(self.work, self.way),
            train_dataset=Dataset.from_list(side_rows(self.work, self.way)),
            processing_class=self.work.tokenizer,
            optimizers=(self.optimiser, None),
        )
        self.trainer.ref_model = None  # known now
        self.trainer.remove_callback(PrinterCallback)
        if self.way.side == "ours" and self.trainer.not_packed:
            raise RuntimeError(f"the model is not packed: {self.trainer.not_packed}")

    def compute_reference(self) -> None:
        "Compute the reference's log-probabilities as trl does before a training."
        from torch.utils.data import DataLoader

        own = self.trainer
        own.ref_model = self.reference
        try:
            loader = DataLoader(own.train_dataset, batch_size=self.way.pairs, collate_fn=own.data_collator)
            for batch in own.accelerator.prepare(loader):
                for logps in own.compute_ref_log_probs(self.reference or own.model, batch):
                    logps.cpu()
        finally:
            own.ref_model = None

    def positions(self) -> int:
        "Count the positions that a training computes, padding included."
        batches = self.trainer.get_train_dataloader()
        return sum((own["pack"].input_ids if "pack" in own else own["input_ids"]).numel() for own in batches)

    def __call__(self) -> float:
        import torch

        pairs, gpu = len(self.work.rows), torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        if self.work.kind == "policy" and self.way.side != "stock":  # trl as it comes computes it on the way
            self.compute_reference()
        self.trainer.train()
        steps, size = self.trainer.state.global_step, self.work.settings.batch_size
        if steps * size != pairs:
            raise RuntimeError(f"{self.way}: took {steps} steps of {size}, expected all {pairs} pairs to be trained on")
        if gpu:
            torch.cuda.synchronize()
            self.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        return float(pairs)


# The same work


@contextlib.contextmanager
def moved_adapters(side: Side, scale: float = 0.02, seed: int = 0):
    "Give a side's adapters random weights of a scale while the block lasts; without adapters nothing is changed."
    import torch

    generator, weights = torch.Generator().manual_seed(seed), sorted(side.trainer.model.named_parameters())
    own = [weight for _, weight in weights if side.work.settings.lora.rank and weight.requires_grad]
    before = [weight.detach().clone() for weight in own]
    with torch.no_grad():
        for weight in own:
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(own, before):
                weight.copy_(kept)


def first_losses(sides: list[Side], scale: float = 0.02, seed: int = 0) -> list[float]:
    """Compute each side's loss on the first pairs, under the same adapters; their own are put back.

    scale, seed: of the adapters' weights."""
    import torch
    from accelerate.utils import send_to_device

    losses = []
    for side in sides:
        trainer, first = side.trainer, range(min(8, side.work.settings.batch_size))
        batch = trainer.data_collator(list(trainer.train_dataset.select(first)))
        with moved_adapters(side, scale, seed), torch.no_grad():
            batch = send_to_device(batch, trainer.accelerator.device)
            losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    return losses


def gradients(side: Side) -> dict:
    "Compute the gradients of what is trained, over a whole batch: name -> tensor."
    trainer = side.trainer
    trainer.model.train()
    for batch in trainer.get_train_dataloader():
        (trainer.compute_loss(trainer.model, batch) / trainer.args.gradient_accumulation_steps).backward()
    found = {name: own.grad.clone() for name, own in trainer.model.named_parameters() if own.grad is not None}
    trainer.model.zero_grad()
    return found


def relative_gap(ours: list[float], theirs: list[float]) -> float:
    "Compute the distance of two vectors as a share of the second one's norm."
    return math.dist(ours, theirs) / math.hypot(*theirs)


def reference_gap(first: Side, second: Side) -> float:
    "Compare the references' log-probabilities of two sides: difference as a share of their norm."
    rows = [side.trainer.train_dataset for side in (first, second)]
    return relative_gap(*([*own["ref_chosen_logps"], *own["ref_rejected_logps"]] for own in rows))


def same_work(sides: list[Side]) -> dict:
    """Refuse sides that don't compute the same; return their losses and the gap of the references.

    sides: ours first, then trl's, then trl as it comes where there are adapters."""
    import torch

    work, exact = sides[0].work, unwrap(sides[0].trainer.model).dtype == torch.float32
    reward = work.kind == "reward"
    losses = first_losses(sides) if reward or work.settings.lora.rank else []  # without adapters DPO starts at ln 2
    spread, gap = max(losses, default=0) - min(losses, default=0), 0.0 if reward else reference_gap(*sides[:2])
    limit = (1e-4 if reward else 1e-3) if exact else (0.05 if reward else 0.2)
    if not (gap <= (1e-5 if exact else 0.02) and spread <= limit):
        raise RuntimeError(
            f"the references are {gap:.2g} apart and the losses {spread:.2g} ({losses}): it is not the same work"
        )
    return {"losses": losses, "reference gap": gap}


# The comparison


def try_ways(make: typing.Callable[[Way], Side], ways: list[Way]) -> list[tuple[float, Way]]:
    "Measure each way once: pairs/s, 0 where memory ran out."
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


def compare(
    name: str,
    what: str,
    work: Work,
    ways: list[Way],
    rounds: int,
    optimiser=None,
    strategies: typing.Sequence[str] = STRATEGIES,
    warm: bool = True,
) -> dict:
    """Measure ours beside trl at its best, and with adapters as it comes, in pairs/s.

    ways: trl's, of which the fastest on one batch is taken, then its fastest strategy; optimiser: shared by the sides;
    warm: of `bench.in_turn`."""
    make = functools.partial(Side, work, optimiser=optimiser)
    sides = {"ours": make(our_way(work)), "theirs": make(ways[0])}
    if work.settings.lora.rank:
        sides["stock"] = make(Way("stock"))
    few = replace(work, pairs=work.pairs[: work.settings.batch_size])
    probe = functools.partial(Side, few, optimiser=optimiser)
    same, tried = same_work(list(sides.values())), try_ways(probe, ways)
    best = max(tried, key=lambda own: own[0])[1]
    tried += try_ways(probe, [replace(best, strategy=own) for own in strategies if own != best.strategy])
    best = max(tried, key=lambda own: own[0])[1]
    sides["theirs"] = make(best)
    what += f", against trl ({best.strategy}, {best.pairs} pairs a pass, {best.attention})"
    found = side_by_side(name, what, "pairs/s", sides, rounds, warm)
    found |= {"ways": {side: asdict(own.way) for side, own in sides.items()}}
    found |= {"tried": [asdict(way) | {"rate": rate} for rate, way in tried]}
    found |= {"positions": {side: own.positions() for side, own in sides.items()}}
    found["kernel"] = unwrap(sides["ours"].trainer.model).base_model.pack_kernel
    found["positions"]["useful"] = sum(row["length"] for row in work.rows)
    return found | {"peak GB": {side: own.peak_gb for side, own in sides.items()}, **same}


def demo_settings(kind: Kind, pack_tokens: int | None = None) -> RewardSettings | DpoSettings:
    """Take the demo's settings with steps of 8 pairs and length enough for long answers.

    pack_tokens: budget of our packs; None takes the demo's."""
    demo = load_profile("demo").reward if kind == "reward" else load_profile("demo").dpo
    own = dict(pack_tokens=pack_tokens or demo.pack_tokens, max_length=1024, batch_size=8, checkpoints=0)
    return replace(demo, epochs=1, **own)


def load_start(kind: Kind, weights, tokenizer, dtype: str):
    "Load what a training starts from."
    if kind == "policy":
        return load_causal_lm(weights, dtype)
    return load_reward_model(weights.location, tokenizer, dtype, new_head=0)


def training_of(kind: Kind, settings, model) -> str:
    "Say in words what is trained."
    return (
        f"{'reward model' if kind == 'reward' else 'DPO, the reference counted'}, steps of {settings.batch_size} "
        f"pairs, LoRA of rank {settings.lora.rank} on the last {settings.lora.last_layers} layers of "
        f"{Path(model.name_or_path).name}, {str(model.dtype).removeprefix('torch.')}"
    )


def lora_bench(
    kind: Kind,
    model,
    tokenizer,
    rounds: int,
    steps: int,
    settings,
    profiles: typing.Sequence[str] = ("demo",),
    sizes: typing.Sequence[int] = (4, 8),
    strategies: typing.Sequence[str] = ("group_by_length",),
) -> list[dict]:
    """Measure training with adapters beside trl's, for each profile of lengths.

    steps: of a batch, in a measurement; settings: of demo_settings; sizes, strategies: of trl's, to try."""
    found, ways = [], [Way("trl", size, strategies[0]) for size in sizes]
    for profile in profiles:
        what = f"{training_of(kind, settings, model)}, answers of {'-'.join(map(str, LENGTHS[profile][1]))} tokens"
        pairs = made_pairs(tokenizer, settings.batch_size * steps, profile)
        work = Work(kind, lambda: twin(model), tokenizer, pairs, settings)
        row = compare(f"{kind}_training", what, work, ways, rounds, None, strategies, warm=False)
        found.append({"label": f"{profile}'s lengths", **row})
        keep_rows(f"{kind}_training", found)  # after each, for long answers take long
    return found


def side_of(kind: Kind, model, tokenizer, settings, pairs: int, profile: str | tuple) -> tuple[Side, int]:
    "Make our side of one optimiser step of some pairs; also count its useful tokens."
    own, made = replace(settings, batch_size=pairs), made_pairs(tokenizer, pairs, profile)
    work = Work(kind, lambda: twin(model), tokenizer, made, own)
    return Side(work, our_way(work)), sum(row["length"] for row in work.rows)


def share_bench(kind: Kind, model, tokenizer, settings, profile: str = "demo") -> dict:
    "Measure what one of our steps reaches of the machine, and where its time goes."
    side, tokens = side_of(kind, model, tokenizer, settings, settings.batch_size, profile)
    row = account(take(side), tokens, side.work.flops(side.trainer.model), model.dtype)
    return keep(f"share_{kind}", row, f"{training_of(kind, settings, model)}, {profile}'s lengths", "tokens/s")


def growth_bench(kind: Kind, model, tokenizer, settings, pairs: typing.Sequence[int], lengths: typing.Sequence[int]):
    "Follow a step as its pairs and the tokens of an answer (of 4 pairs) grow."

    def work(n: int, profile) -> typing.Callable:
        side, tokens = side_of(kind, model, tokenizer, settings, n, profile)
        return lambda: tokens * bool(side())

    found = [
        grow("pairs of a step", pairs, lambda n: work(n, "demo")),
        grow("tokens of an answer, 4 pairs", lengths, lambda n: work(4, ((20, 80), (n, n)))),
    ]
    keep(f"growth_{kind}", {"curves": found}, training_of(kind, settings, model), "tokens/s")
    return found


# Every weight of a large model, on a GPU

_LLAMA = dict(num_key_value_heads=8, head_dim=128, vocab_size=128256)
SHAPES = {
    "llama-3.2-3b": _LLAMA
    | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24)
    | dict(tie_word_embeddings=True),
    "llama-3.1-8b": _LLAMA
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
}


def random_model(kind: Kind, shape: dict, tokenizer, dtype: str = "bfloat16"):
    "Make a Llama of random weights on the device. shape: of LlamaConfig."
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    more = {"num_labels": 1} if kind == "reward" else {}
    ends = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = LlamaConfig(**shape, **more, **ends, max_position_embeddings=4096)
    with torch.random.fork_rng(), torch.device(pick_device()):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
        return model.from_config(config, dtype=pick_dtype(dtype)).eval()


def step_optimiser(model, learning_rate: float):
    "Make AdamW where weights, gradients and two moments leave a quarter of the memory free, else plain descent."
    import torch

    gpu = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if gpu else float("inf")
    need = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    if need < 0.75 * total:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=gpu)
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


def shape_bench(
    kind: Kind, name: str, model, rounds: int, pairs: int, checkpointing: bool = True, matmul: int = 8192, ways=()
) -> dict:
    """Measure training of every weight of a model: pairs/s, share of the machine's own rate, memory.

    pairs: in a measurement, one optimiser step; matmul: size of the matrices that tell the device's rate; ways:
    of trl, to try; none = all."""
    import torch

    tokenizer = load_tokenizer(find_weights("random-tiny"))
    own = RewardSettings() if kind == "reward" else DpoSettings()
    settings = replace(own, batch_size=pairs, epochs=1, checkpoints=0, lora=LoraSettings())
    optimiser = step_optimiser(model, settings.learning_rate)
    work = Work(kind, lambda: twin(model), tokenizer, made_pairs(tokenizer, pairs, "paper"), settings, checkpointing)
    what = (
        f"{'reward model' if kind == 'reward' else 'DPO, the reference counted'}, {pairs} pairs, answers of 350-430 "
        f"tokens, every weight of {name} in bfloat16, {'with' if checkpointing else 'no'} gradient checkpointing, "
        f"{type(optimiser).__name__}"
    )
    found = compare(f"{kind}_{name}", what, work, ways or their_ways(kind, pairs), rounds, optimiser)
    each = work.flops(model) / pairs
    most = matmul_rate(torch.bfloat16, matmul)
    shares = {side: found[side] * each / most for side in ("ours", "theirs")}
    return {"label": name, **found, "FLOP a pair": each, "matmul FLOP/s": most, "share": shares}


def gpu_bench(kind: Kind, shapes: list[str], rounds: int, pairs: int, checkpointing: bool) -> list[dict]:
    "Measure shapes, keys of SHAPES, on a GPU and keep what was found; nothing without a GPU."
    import torch

    if unknown := [name for name in shapes if name not in SHAPES]:
        raise StudyError(f"GPU_SHAPES: {unknown[0]!r} is not known. {suggest(unknown[0], SHAPES)}")
    found, tokenizer = [], load_tokenizer(find_weights("random-tiny"))
    for name in shapes if torch.cuda.is_available() else []:
        model = random_model(kind, SHAPES[name], tokenizer)
        found.append(shape_bench(kind, name, model, rounds, pairs, checkpointing))
        keep_rows(f"{kind}_gpu", found)
        del model
        torch.cuda.empty_cache()
    return found
