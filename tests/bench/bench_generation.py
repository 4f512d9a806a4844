"""Our sampling beside the ways one would otherwise take: transformers prompt by prompt and in batches."""

from __future__ import annotations

import sys
import typing
from dataclasses import dataclass

from bench import demo_speeches, given, side_by_side
from psycopref.models.generation import Decoding, generate
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
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


def generation_bench(backbone: str, rounds: int, prompts: int, tokens: int) -> list[dict]:
    """Measure ours against transformers, a prompt and 64 rows at a time, with top-p and with top-k sampling.

    tokens: longest candidate."""
    found = []
    for kind, how in (("top_p 0.95", Decoding(tokens, 0.8, 0, 0.95)), ("top_k 50", Decoding(tokens, 1.0, 50))):
        work = make_work(backbone, prompts, how)
        for side, rows in (("loop", work.n), ("batch", 64)):
            what = (
                f"8 candidates for each of {prompts} prompts, at most {tokens} tokens, {kind}, {backbone}, against "
                f"transformers' generate, {'one prompt' if side == 'loop' else '64 rows'} at a time"
            )
            sides = {"ours": lambda: ours(work), "theirs": lambda: transformers_generate(work, rows)}
            found.append(side_by_side(f"generation_{kind.split()[0]}_{side}", what, "tokens/s", sides, rounds))
    return found


BACKBONE = "smollm2-135m"  # weights of `models.weights`
ROUNDS = 3  # measurements of each side, after one that is not counted
PROMPTS = 64  # client speeches, 8 candidates for each
TOKENS = 64  # longest candidate


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    found = generation_bench(BACKBONE, ROUNDS, PROMPTS, TOKENS)
    print(pd.DataFrame(found)[["what", "ours", "theirs", "ratio", "unit", "device"]])
