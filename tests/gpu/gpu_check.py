"""Losses, speed and memory on one GPU, beside trl's; `check.sh` starts this where torch is, offline."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import inspect
import math
import os
import platform
import signal
import subprocess
import tempfile
import time
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import demo_speeches
from bench_generation import Work as Sampling
from bench_generation import render_prompts, transformers_generate
from bench_training import SHAPES, Side, Way, Work, demo_settings, first_losses, gradients, made_pairs
from bench_training import moved_adapters, our_way, random_model, shape_bench, their_ways, twin
from psycopref.core.files import write_json
from psycopref.core.settings import LoraSettings, load_profile
from psycopref.core.stages import project_root
from psycopref.models.generation import Decoding
from psycopref.models.packs import enable_packing
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer, quiet_transformers, release
from psycopref.run.plan import gpu_memory, parameters, training_memory
from psycopref.training.sampling import open_sampler
from psycopref.training.texts import prompt_messages

SECONDS = 270  # of a part; what would not fit is said, not left out in silence
PACKAGES = ("torch", "triton", "trl", "transformers", "datasets", "accelerate", "peft", "tokenizers")
PACKAGES += ("flash-attn", "liger-kernel", "vllm")
DATA_SHEET = {"H100": 989e12, "H200": 989e12}  # dense bf16 operations/s of the SXM cards, by NVIDIA's data sheets
ANCHOR = {
    "what": "open-instruct, DPO of OLMo2-7B on 16 H100, packed (their figures)",
    "tokens/s": 5282,
    "MFU": 0.225,
    "source": "https://github.com/allenai/open-instruct/pull/1466",
}
LOSS_SHAPE = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8)
LOSS_SHAPE |= dict(num_key_value_heads=2, head_dim=64, vocab_size=1024)
TINY = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, head_dim=16, vocab_size=1024)
ASSUMED = 2.5e14  # operations/s, to foresee whether a row still fits


@dataclass(frozen=True)
class Scale:
    "Say how large everything is."

    loss_shape: dict
    loss_pairs: int  # in all
    lengths: tuple[str, ...]  # of the losses' pairs, keys of LENGTHS
    shapes: dict[str, tuple[dict, str]]  # name -> shape, and the weights that the plan knows by that size
    pairs: int  # in a step whose speed is measured
    memory_pairs: int  # in a step whose memory is measured, in passes as full as the paper profile's
    matmul: int  # size of the matrices that tell the device's rate
    prompts: int  # answered by 8 candidates each
    tokens: int  # longest candidate


BACKBONES = {"llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct", "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct"}
FULL = Scale(
    LOSS_SHAPE, 16, ("demo", "paper"), {n: (SHAPES[n], own) for n, own in BACKBONES.items()}, 16, 32, 8192, 32, 128
)
DRY = Scale(TINY, 4, ("demo",), {"tiny": (TINY, "random-tiny")}, 4, 4, 128, 2, 8)


class OutOfTime(BaseException):
    "The part's seconds are over; no library's `except Exception` may swallow it."


class NotRun(Exception):
    "Says why something can't be run here."


@dataclass
class Report:
    "Collect the rows of a part and write them after each, so that a stop loses none."

    name: str
    head: dict
    started: float = field(default_factory=time.perf_counter)  # start-up counts too
    rows: list[dict] = field(default_factory=list)

    @property
    def path(self) -> Path:
        "Where the rows go."
        return Path(os.environ.get("OUT") or project_root() / "outputs" / "bench") / f"gpu_{self.name}.json"

    def left(self) -> float:
        "Return the seconds that this part still has."
        return SECONDS - (time.perf_counter() - self.started)

    def row(self, what: str, measure: typing.Callable[[], dict | None], needs: float = 0) -> None:
        "Run a measurement within the time left, and keep what it found, or why there is nothing. needs: seconds."
        began = time.perf_counter()
        if needs > self.left():
            found = {"not run": f"needs about {needs:.0f} s, {self.left():.0f} of {SECONDS} are left"}
        else:
            found = self.tried(measure)
        self.rows.append({"what": what, **found, "seconds": round(time.perf_counter() - began, 1)})
        write_json(self.path, self.head | {"rows": self.rows})
        print("  " + worded(self.rows[-1]))
        release()

    def tried(self, measure: typing.Callable[[], dict | None]) -> dict:
        "Call a measurement; what goes wrong in one is no reason to leave the others out."
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, max(1, self.left()))
        try:
            return measure() or {}
        except OutOfTime:
            return {"not run": f"was stopped when the part's {SECONDS} s were over"}
        except NotRun as reason:
            return {"not run": str(reason)}
        except Exception as error:  # whatever a library says on a machine that nobody has seen
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(*_):
    raise OutOfTime


def _raise(error: Exception):
    raise error


def worded(row: dict) -> str:
    "Say in one line whether a row was measured."
    said = next((f"{key}: {row[key]}" for key in ("not run", "failed") if key in row), f"done in {row['seconds']} s")
    return f"{row['what']}: {said}"


def tables(rows: list[dict]) -> str:
    "Lay the figures of measured rows out, those with the same columns in one table."
    import tabulate

    plain = [{key: own for key, own in row.items() if not isinstance(own, dict)} for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in plain:
        if row.keys() - {"what", "seconds"} and not {"not run", "failed"} & row.keys():
            groups.setdefault(tuple(row), []).append(row)
    how = dict(headers="keys", floatfmt=".3g", intfmt=",")
    return "\n\n".join(tabulate.tabulate(own, **how) for own in groups.values())


# What is here


def versions() -> dict[str, str]:
    "Name what this machine has."
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    gpu = torch.cuda.is_available()
    return found | {
        "CUDA": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name() if gpu else f"no GPU ({platform.machine()}, {os.cpu_count()} cores)",
        "driver": driver() if gpu else "none",
        "memory GB": f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f}" if gpu else "none",
    }


def driver() -> str:
    "Ask nvidia-smi for the driver's version."
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


# Losses


def with_kernel(model, kernel: str):
    "Copy a model around the same weights, with packs computed by a kernel; refuse what can't be."
    import torch

    if kernel == "varlen":
        if not torch.cuda.is_available():
            raise NotRun("the varlen kernel needs CUDA")
        if model.dtype == torch.float32:
            raise NotRun("the varlen kernel takes half precision only")
        from torch.nn.attention.varlen import varlen_attn

        if lost := {"scale", "window_size", "enable_gqa"} - {*inspect.signature(varlen_attn).parameters}:
            raise NotRun(f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(lost))}")
    own = twin(model)
    if reason := enable_packing(own):
        raise RuntimeError(f"the model is not packed: {reason}")
    own.base_model.pack_kernel = kernel
    return own


def learnt(side: Side) -> tuple[float, dict]:
    "Compute the loss of the first pairs and the gradients of all, under the same moved adapters."
    loss = first_losses([side], scale=0.05)[0]
    with moved_adapters(side, scale=0.05):
        return loss, {name: own.float() for name, own in gradients(side).items()}


def apart(found: tuple, truth: tuple) -> dict:
    "Compare losses and gradients: difference in nats; norm of the difference as a share of the norm."
    import torch

    names, own, true = sorted(truth[1]), found[1], truth[1]
    first, second = (torch.cat([grads[name].flatten() for name in names]) for grads in (own, true))
    gap = float((first - second).norm() / second.norm())
    return {"loss": found[0], "loss gap": abs(found[0] - truth[0]), "gradient gap": gap}


def losses(report: Report, scale: Scale) -> None:
    """Compare losses and gradients of packs with those of trl in float32, on the same weights (rounded to bfloat16).

    In float32 a loss may differ by 1e-5 nats (1e-4 with answers of 400 tokens, whose log-probabilities are summed) and
    the gradients by 1e-4 of their norm; in bfloat16 by 1.5 times what trl's own differ, or by 0.01 and 0.02."""
    import torch

    tokenizer = load_tokenizer(find_weights("random-tiny"))
    for kind in ("reward", "policy"):
        rounded = random_model(kind, scale.loss_shape, tokenizer)
        models = {"float32": copy.deepcopy(rounded).float(), "bfloat16": rounded.to(torch.bfloat16)}
        for length in scale.lengths:
            pairs, lora = made_pairs(tokenizer, scale.loss_pairs, length), LoraSettings(rank=4, alpha=8)
            settings = replace(demo_settings(kind, 8192), batch_size=scale.loss_pairs, lora=lora)
            work = Work(kind, lambda: twin(models["float32"]), tokenizer, pairs, settings)
            label, kept = f"{kind}, {length}'s lengths", {}
            for dtype, model in models.items():  # a row is measured at once, so what it closes over is its own
                own = replace(work, fresh=lambda: twin(model))
                report.row(f"{label}, {dtype}, trl", lambda: of_trl(own, dtype, kept), needs=10)
                for kernel in ("segments", "varlen"):
                    report.row(
                        f"{label}, {dtype}, {kernel}", lambda: of_ours(own, model, kernel, dtype, kept), needs=10
                    )


def of_trl(work: Work, dtype: str, kept: dict) -> dict:
    "Compute what trl learns, keep it by type, and compare it with float32."
    kept[dtype] = learnt(Side(work, Way("trl", len(work.rows) // 2)))
    return apart(kept[dtype], kept["float32"]) | {"loss allowed": None, "gradient allowed": None}


def of_ours(work: Work, model, kernel: str, dtype: str, kept: dict) -> dict:
    "Compare what packs learn with trl in float32; raise where it is further off than it may be."
    ours = replace(work, fresh=lambda: with_kernel(model, kernel))
    found = apart(learnt(Side(ours, replace(our_way(work), pairs=len(work.rows) // 2))), kept["float32"])
    if dtype == "float32":
        most = {"loss": 1e-4 if max(row["length"] for row in work.rows) > 500 else 1e-5, "gradient": 1e-4}
    else:
        other = apart(kept[dtype], kept["float32"])
        most = {"loss": max(0.01, 1.5 * other["loss gap"]), "gradient": max(0.02, 1.5 * other["gradient gap"])}
    beyond = [f"{key} {found[f'{key} gap']:.2g} > {own:.2g}" for key, own in most.items() if found[f"{key} gap"] > own]
    if beyond or not all(map(math.isfinite, found.values())):
        raise RuntimeError(f"not equal to trl's in float32: {', '.join(beyond) or found}")
    return found | {f"{key} allowed": own for key, own in most.items()}


# Speed and memory


def foreseen(scale: Scale, backbone: str, operations: int, pairs: int, runs: int) -> float:
    "Foresee the seconds of some trainings. operations: for each weight and token."
    return 10 + runs * operations * parameters(backbone) * 1000 * pairs / ASSUMED


def stepped(kind: str, name: str, shape: dict, scale: Scale) -> dict:
    "Measure steps of every weight in bfloat16 beside trl's best: tokens/s, MFU, peak memory."
    import torch

    model = random_model(kind, shape, load_tokenizer(find_weights("random-tiny")))
    ways = [way for way in their_ways(kind, scale.pairs) if way.pairs * 2 >= scale.pairs]
    found = shape_bench(kind, name, model, 1, scale.pairs, matmul=scale.matmul, ways=ways)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    sheet = next((rate for own, rate in DATA_SHEET.items() if own in device), None)
    own = {"ratio": found["ratio"], "kernel": found["kernel"]}
    for side in ("ours", "theirs"):
        useful, rate = found["positions"]["useful"] / scale.pairs, found[side]
        own |= {f"{side} tokens/s": round(rate * useful), f"{side} / matmul": found["share"][side]}
        own |= {f"{side} MFU": rate * found["FLOP a pair"] / sheet if sheet else None}
        own |= {f"{side} peak GB": found["peak GB"][side]}
    way = found["ways"]["theirs"]
    own |= {"trl's best": f"{way['pairs']} pairs a pass, {way['attention']}, {way['strategy']}"}
    return own | {"matmul TFLOP/s": found["matmul FLOP/s"] / 1e12, "all": found}


def remembered(kind: str, shape: dict, backbone: str, rank: int, scale: Scale) -> dict:
    "Measure the peak of a step as the study takes it, beside the plan's formula; refuse what would not fit by it."
    import torch

    profile, section, gpu = load_profile("paper"), "reward" if kind == "reward" else "dpo", torch.cuda.is_available()
    settings = replace(getattr(profile, section), batch_size=scale.memory_pairs, lora=LoraSettings(rank=rank))
    profile = replace(profile, **{section: settings})
    planned, room = training_memory(profile, backbone, section, "DDP", 1), min(gpu_memory(), default=None)
    if room and max(planned) > room:
        raise NotRun(f"the plan says {max(planned) / 1e9:.0f} GB, this GPU holds {room / 1e9:.0f}")
    tokenizer = load_tokenizer(find_weights("random-tiny"))
    model = random_model(kind, shape, tokenizer, "bfloat16" if rank else "float32")
    settings = replace(settings, epochs=1, **({} if kind == "reward" else {"steps": 1}))
    pairs = made_pairs(tokenizer, scale.memory_pairs, "paper")
    work = Work(kind, lambda: twin(model), tokenizer, pairs, settings, gpu, autocast=gpu and not rank)
    side = Side(work, our_way(work))
    side.reference = None  # as after a training's start
    release()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    side.trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else None
    found = {"peak GB": peak and peak / 1e9, "plan GB": planned[1] / 1e9}
    return found | {"peak / plan": peak and peak / planned[1]}


def save_random(shape: dict, tokenizer, folder: str) -> None:
    "Save a policy of random weights whose every token is a word of the tokenizer."
    with quiet_transformers():
        random_model("policy", shape | {"vocab_size": len(tokenizer)}, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sampled(engine: str, folder: str, scale: Scale, kept: dict) -> dict:
    """Sample 8 candidates for each prompt: tokens/s. engine: plain (transformers' generate), or of training.sampling.

    kept: tokens/s of the engines before, to which this one's is added."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise NotRun("vllm is not installed")
    speeches, decoding, policy = demo_speeches()[: scale.prompts], Decoding(scale.tokens, 1.0, 50), find_weights(folder)
    with contextlib.ExitStack() as stack:
        if engine == "plain":
            model, tokenizer = load_causal_lm(policy, "auto"), load_tokenizer(policy)
            work = Sampling(model, tokenizer, render_prompts(tokenizer, speeches), decoding)
            sample = functools.partial(transformers_generate, work, 8 * scale.prompts)
        else:
            opened = stack.enter_context(open_sampler(engine, policy))
            messages = [prompt_messages(speech) for speech in speeches]

            def sample():
                return sum(own.n_tokens for group in opened(messages, decoding, 8) for own in group)

        rates = []
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            rates.append(sample() / (time.perf_counter() - start))
    kept[engine] = rates[-1]
    return {"tokens/s": round(rates[-1]), "to plain generation": rates[-1] / kept["plain"]}


def speed(report: Report, scale: Scale) -> None:
    "Measure steps, their memory, and sampling; each row by itself."
    import trl

    print(
        f"  trl {trl.__version__}: DPO's head is fused, in tiles; its DPOTrainer 1.16 switches padding_free off itself"
    )
    print(
        "  tokens/s and MFU: each prompt once, DPO's reference counted in, what checkpointing computes again left out"
    )
    print("  published: {what}: {tokens/s} tokens/s a GPU, {MFU:.1%} MFU, {source}".format(**ANCHOR))
    for name, (shape, backbone) in scale.shapes.items():
        for kind, operations in (("reward", 8), ("policy", 10)):
            label = f"{'reward model' if kind == 'reward' else 'DPO'}, {name}, {scale.pairs} pairs"
            needs = foreseen(scale, backbone, operations, scale.pairs, 9)
            report.row(label, functools.partial(stepped, kind, name, shape, scale), needs)
    for name in [own for own in FULL.shapes if own not in scale.shapes]:
        report.row(f"reward model and DPO, {name}: steps and memory", functools.partial(_raise, NotRun("no GPU")))
    for name, (shape, backbone) in scale.shapes.items():
        for rank in (0, 16) if name == [*scale.shapes][-1] else (0,):
            for kind in ("reward", "policy"):
                label = f"memory, {kind}, {name}, {f'LoRA of rank {rank}' if rank else 'every weight'}"
                needs = foreseen(scale, backbone, 10, scale.memory_pairs, 1)
                report.row(label, functools.partial(remembered, kind, shape, backbone, rank, scale), needs)
    tokenizer, kept = load_tokenizer(find_weights("random-tiny")), {}
    name, (shape, _) = next(iter(scale.shapes.items()))
    with tempfile.TemporaryDirectory() as folder:
        report.row(f"weights of {name} to sample from", lambda: save_random(shape, tokenizer, folder), needs=20)
        for engine in ("plain", "local", "vllm"):
            label = f"sampling, {name} with a small vocabulary, 8 × {scale.prompts} of {scale.tokens} tokens, {engine}"
            report.row(label, functools.partial(sampled, engine, folder, scale, kept), needs=30)


PARTS = {"losses": losses, "speed": speed}


def main(words: list[str] | None = None) -> int:
    "Run the parts; return 1 where something failed. What is not run says why, and is no failure."
    import torch

    known = argparse.ArgumentParser(description=__doc__)
    known.add_argument("parts", nargs="*", choices=[*PARTS, []], help="losses, speed; both by default")
    known.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to see that the script runs")
    told, started, failed = known.parse_args(words), time.perf_counter(), 0
    if told.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet
    dry = not torch.cuda.is_available()
    head = {"dry run": dry, "date": time.strftime("%Y-%m-%d"), "versions": versions(), "anchor": ANCHOR}
    print(*(f"{name} {own}" for name, own in head["versions"].items()), sep=", ")
    for name in told.parts or PARTS:
        report, started = Report(name, head, started), time.perf_counter()
        print(f"{name}{': dry run on CPU, figures are not results' if dry else ''}")
        try:
            PARTS[name](report, DRY if dry else FULL)
        except Exception as error:  # the other part is another matter
            report.row("the part", functools.partial(_raise, error))
        print(tables(report.rows))
        failed += sum("failed" in row for row in report.rows)
        print(f"{name}: {len(report.rows)} rows in {report.path}")
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
