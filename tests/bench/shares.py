"""What work reaches: its matrix products, the time they take alone, where the rest goes, and how it grows."""

from __future__ import annotations

import math
import typing
from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import clock, measured
from psycopref.models.weights import pick_device

# What a call computes

LEFT = {  # operators that multiply matrices, and where their left factor stands among the arguments
    **dict.fromkeys(("mm", "bmm", "matmul", "linear", "_int_mm", "_mkl_linear", "_linear_pointwise"), 0),
    **dict.fromkeys(("qlinear_pointwise", "linear_dynamic", "_weight_int8pack_mm", "_scaled_mm"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addmm_", "baddbmm_", "_addmm_activation"), 1),
}
FUSED = {  # attention in one kernel: where the queries stand, and products that it stands for
    "scaled_dot_product_attention": (0, 2),  # whole in inference mode, as matmul and linear are
    "_scaled_dot_product_flash_attention_for_cpu": (0, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 5),
}


@dataclass
class Product:
    "Hold a matrix product, to be computed again with the same operands."

    again: typing.Callable  # computes it
    operations: float  # of one
    times: int = 0  # how often it was seen


def _kept(argument):
    "Hold an operand without what it was computed from."
    return argument.detach() if isinstance(argument, torch.Tensor) and argument.requires_grad else argument


def _fused(query, key, times: int) -> typing.Callable:
    "Stand for a fused attention with plain products of its shapes."
    heads = query.shape[1]
    other = (key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], 1)).mT
    return lambda: [query @ other for _ in range(times)]


class Products(TorchDispatchMode):
    "Count the matrix products of what runs within, on a CPU backward passes too; equal ones are counted together."

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple, Product] = {}

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        result, name = function(*args, **(keywords or {})), function.overloadpacket.__name__
        if name in LEFT or name in FUSED:
            tensors = [own for own in args if isinstance(own, torch.Tensor)]
            shapes = ((tuple(own.shape), own.dtype, not own.is_mkldnn and own.stride()) for own in tensors)
            key = (name, *shapes)
            if key not in self.seen:
                self.seen[key] = self.product(name, function, args, keywords or {}, result)
            self.seen[key].times += 1
        return result

    def product(self, name: str, function, args, keywords: dict, result) -> Product:
        "Say what a product costs and how it is done again."
        if name in FUSED:
            first, times = FUSED[name]
            query, key = map(_kept, args[first : first + 2])
            return Product(_fused(query, key, times), 2.0 * times * query.numel() * key.shape[-2])
        own = [_kept(argument) for argument in args]
        if name.endswith("_"):
            own[0] = own[0].clone()
        return Product(lambda: function(*own, **keywords), 2.0 * result.numel() * args[LEFT[name]].shape[-1])


def encoder_flops(model, lengths: typing.Iterable[int]) -> float:
    "Count the operations of an encoder like BERT on texts of some lengths, with attention both ways."
    layers = [own for name, own in model.named_modules() if isinstance(own, torch.nn.Linear) and "pooler" not in name]
    linear, config = sum(own.weight.numel() for own in layers), model.config
    attention = config.num_hidden_layers * config.hidden_size
    return float(sum(2 * linear * length + 4 * attention * length**2 for length in lengths))


# How fast it can be done


def fastest(call: typing.Callable, repeats: int = 3, least: float = 0.002) -> float:
    "Time a call in seconds, the best of some repeats; each lasts at least so many seconds; one before warms up."
    with torch.inference_mode():
        took, calls = [], 1
        for _ in range(repeats + 1):
            start = clock()
            for _ in range(calls):
                call()
            took.append((clock() - start) / calls)
            calls = max(1, min(1000, math.ceil(least / max(took[-1], 1e-7))))
    return min(took[1:])


def replay(seen: dict[tuple, Product], limit: float = 20.0) -> tuple[float, float]:
    """Reckon what the same products take alone: (seconds, share of the operations that was measured).

    limit: seconds; the smallest products beyond are reckoned at the rate of the others. Each is timed with the same
    operands again and again, which the caches then hold: the machine cannot do the work faster than that."""
    begun, done, seconds = clock(), 0.0, 0.0
    products = sorted(seen.values(), key=lambda own: -own.times * own.operations)
    for own in products:
        if done and clock() - begun > limit:
            break
        seconds += own.times * fastest(own.again)
        done += own.times * own.operations
    share = done / sum(own.times * own.operations for own in products)
    return seconds / share, share


def matmul_rate(dtype, size: int, repeats: int = 3) -> float:
    "Measure how fast the device multiplies square matrices of a size: operations/s, the best of several."
    device = pick_device()
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    least = 0.2 if device == "cuda" else 0.02
    return 2 * size**3 / fastest(lambda: first @ second, repeats, least)


def peak_rate(dtype) -> float:
    "Measure the machine's own peak in operations/s: the best of square matrices of some sizes."
    return max(matmul_rate(dtype, size) for size in ((4096, 8192) if pick_device() == "cuda" else (1024, 2048)))


def shape_rates(model, rows: typing.Sequence[int] = (8, 32, 128, 1024)) -> list[dict]:
    "Measure the products of a model's linear layers at some numbers of rows, in its dtype, in GFLOP/s."
    layers = {tuple(own.weight.shape): own.weight for own in model.modules() if isinstance(own, torch.nn.Linear)}
    found = []
    for (outputs, inputs), weight in sorted(layers.items()):
        row = {"inputs": inputs, "outputs": outputs}
        for n in rows:
            states = torch.randn(n, inputs, device=weight.device).to(weight.dtype)
            took = fastest(lambda: torch.nn.functional.linear(states, weight))
            row[f"{n} rows"] = 2 * n * inputs * outputs / took / 1e9
        found.append(row)
    return found


# Where the time goes


@dataclass
class Taken:
    "Hold what a piece of work took."

    seconds: float
    seen: dict[tuple, Product]
    operators: Counter  # seconds of each, and of what lies outside of them
    mb: float | None  # of `measured`
    result: typing.Any = None  # what the work returned

    def __sub__(self, other: Taken) -> Taken:
        "Take away work that this one began with."
        left = {
            key: Product(own.again, own.operations, own.times - (other.seen[key].times if key in other.seen else 0))
            for key, own in self.seen.items()
        }
        seen = {key: own for key, own in left.items() if own.times > 0}
        return Taken(self.seconds - other.seconds, seen, self.operators - other.operators, self.mb, self.result)


def operators(call: typing.Callable) -> Counter:
    "Do it under torch's profiler: seconds of each operator, without those that it calls, and of what lies outside."
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = clock()
        call()
        took = clock() - start
    own = Counter()
    for event in found.key_averages():
        own[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e6
    own["outside of operators"] = max(0.0, took - own.total())
    return own


def take(call: typing.Callable, rounds: int = 1) -> Taken:
    "Do a piece of work to record its products, which warms up; then timed, the best of some rounds; then profiled."
    with Products() as products:
        call()
    result, seconds, mb = min((measured(call) for _ in range(rounds)), key=lambda own: own[1])
    return Taken(seconds, products.seen, operators(call), mb, result)


def account(taken: Taken, tokens: float, needed: float, dtype, top: int = 8) -> dict:
    """Say what a piece of work reaches and where its time goes.

    tokens, needed: useful ones, and the operations that it needs, of `flops`; top: operators that are listed."""
    alone, replayed = replay(taken.seen)
    computed = sum(own.times * own.operations for own in taken.seen.values())
    peak, whole = peak_rate(dtype), taken.operators.total()
    most = [[name, seconds / whole] for name, seconds in taken.operators.most_common(top)]
    return {
        "tokens/s": tokens / taken.seconds,
        "GFLOP/s": needed / taken.seconds / 1e9,
        "share": alone / taken.seconds,  # of the products alone
        "products GFLOP/s": computed / alone / 1e9,
        "peak GFLOP/s": peak / 1e9,
        "share of peak": needed / taken.seconds / peak,
        "needed of computed": needed / computed,
        "replayed": replayed,  # of the operations
        "seconds": taken.seconds,
        "MB": taken.mb,
        "dtype": str(dtype).removeprefix("torch."),
        "operators": most + [["all others", 1 - sum(own for _, own in most)]],
    }


# How it grows


def exponent(sizes: typing.Sequence[float], values: typing.Sequence[float]) -> float:
    "Fit the power of the size with which values grow: 1 is linear, 0 is constant."
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def grow(of: str, sizes: typing.Sequence[float], work: typing.Callable) -> dict:
    """Follow work as it grows: tokens/s, memory, and the powers of size with which seconds and memory grow.

    of: what grows; work: gives for a size a call that returns its useful tokens. The first is done once before."""
    work(sizes[0])()
    rows = []
    for size in sizes:
        tokens, seconds, mb = measured(work(size))
        rows.append({"size": size, "tokens/s": tokens / seconds, "seconds": seconds, "MB": mb})
    powers = {name: exponent(sizes, [row[name] or 0 for row in rows]) for name in ("seconds", "MB")}
    return {"of": of, "rows": rows, "power": powers}
