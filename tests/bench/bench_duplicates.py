"""The speech stage and its parts: embedding, near-duplicates among synthetic speeches by several ways, growth."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import demo_speeches, given, in_child, keep, peak_mb, save_figure, show
from psycopref.core.files import read_json
from psycopref.core.stages import cache_root, project_root
from psycopref.core.tables import new_figure
from psycopref.corpus import duplicates
from psycopref.corpus.duplicates import exact_join, jaccard, near_pairs, shingles

EDITS = ("case", "word", "greeting", "typos", "cut")  # kinds of planted near-duplicates
_GREETINGS = ("Hi everyone, thanks for reading. ", "Hello, I am new here. ", "Good evening to you all. ")
_COMMON = """
the i to and a my of it in that me is he she you was for but so with have not they do at be we just when can on
what as know like about feel if all this are get or her been his him there no out now am don't always want
because think time had even never would up from will really how people go life more one work anymore who them
then back say only day still friends family years going try being got home then things much sleep every after
night mother father told school could tell make too their something into talk over week someone wrong why other
help myself need last before two alone job anyone sometimes again thinking left month away boyfriend wife
husband angry tired scared sad""".split()


def edited(text: str, kind: str, random) -> str:
    "Plant a near-duplicate of at most 1,000 characters; random(n) draws from 0 … n - 1."
    words = text.split(" ")
    if kind == "case":
        text = text.upper().replace(".", " !") if random(2) else text.lower().replace(",", " ,")
    elif kind == "word":
        words[random(len(words))] = "otherwise"
        text = " ".join(words)
    elif kind == "greeting":
        text = _GREETINGS[random(len(_GREETINGS))] + text
    elif kind == "typos":
        for place in [random(len(text) - 1) for _ in range(max(1, len(text) // 60))]:
            text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    else:
        text = text[: max(100, int(len(text) * 0.8))]
    return text[:1000]


def _vocabulary(random, size: int) -> list[str]:
    "Common English words, then made-up ones of one to three syllables; each again with a full stop."
    heads = "b c d f g h j k l m n p r s t v w st tr pl ch sh".split()
    pools = (heads, "a e i o u ea ou".split(), " n r s t l ng".split(" "))
    parts = [[pool[i] for i in random.integers(0, len(pool), 4 * size)] for pool in pools]
    syllables = ["".join(three) for three in zip(*parts)]
    made = ("".join(syllables[4 * i : 4 * i + 1 + n]) for i, n in enumerate(random.integers(0, 3, size)))
    words = list(dict.fromkeys(itertools.chain(_COMMON, made)))
    return words + [word + "." for word in words]


def _originals(random, n: int):
    "Yield n texts of independent words by a Zipf law, 112 to 1,000 characters long."
    words = np.array(_vocabulary(random, 20_000), dtype=object)
    half, steps, chunk = len(words) // 2, 2**18, 8192
    shares = np.cumsum(1 / (np.arange(half) + 2.7) ** 1.2)
    quantiles = np.searchsorted(shares / shares[-1], (np.arange(steps) + 0.5) / steps)  # a word for each equal step
    for start in range(0, n, chunk):
        targets = np.clip(112 + random.gamma(1.4, 189, min(chunk, n - start)), 112, 1000).astype(int)
        ends = np.cumsum(targets // 3 + 20)  # enough words, whatever their length
        drawn = quantiles[random.integers(0, steps, ends[-1])] + half * (random.integers(0, 12, ends[-1]) == 0)
        spoken = words[drawn].tolist()
        for begin, end, target in zip([0, *ends.tolist()], ends.tolist(), targets.tolist()):
            text = " ".join(spoken[begin:end])
            yield text[: text.rfind(" ", 0, target + 1)].capitalize()


def synthetic_speeches(n: int, duplicate_share: float = 0.1, seed: int = 0) -> tuple[list[str], np.ndarray]:
    "Make texts as long as speeches; also the row of which each is a planted copy, -1 for originals."
    random = np.random.default_rng(seed)
    copies = np.sort(random.permutation(n)[: int(n * duplicate_share)])
    texts, origin = list(_originals(random, n)), np.full(n, -1)
    rows = np.setdiff1d(np.arange(n), copies)
    origin[copies] = rows[random.integers(0, max(1, len(rows)), len(copies))] if len(rows) else -1
    draws = itertools.cycle(random.random(65_521).tolist())
    for count, (copy, source) in enumerate(zip(copies.tolist(), origin[copies].tolist())):
        if source >= 0:
            texts[copy] = edited(texts[source], EDITS[count % len(EDITS)], lambda top: int(next(draws) * top))
    return texts, origin


def datasketch_pairs(texts: list[str], threshold: float):
    "The same pairs by way of datasketch, with our shingles, bands and verification."
    from datasketch import MinHash, MinHashLSH

    bands, rows = duplicates._bands(threshold)
    index, found = MinHashLSH(num_perm=bands * rows, params=(bands, rows)), set()
    for row, text in enumerate(texts):
        sketch = MinHash(bands * rows)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        found.update((other, row) for other in index.query(sketch))
        index.insert(row, sketch)
    candidates = [np.array(sorted(found), np.int64).reshape(-1, 2).T]
    return duplicates._verified(candidates, functools.partial(jaccard, texts), threshold, len(texts))


WAYS = {"rensa": functools.partial(near_pairs, exact_rows=0), "datasketch": datasketch_pairs, "ours": near_pairs}


def measure(n: int, seed: int, way: str, threshold: float) -> dict:
    "Do one measurement in this process."
    texts = synthetic_speeches(n, seed=seed)[0]
    WAYS[way](texts[:100], threshold)  # imports are not measured
    ready, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    pairs = WAYS[way](texts, threshold)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    memory = {"ready_mb": ready, "peak_mb": peak_mb(), "compared": pairs.attrs["compared"]}
    return {"n": n, **took, **memory, "pairs": pairs[["i", "j"]].values.tolist()}


def library_comparison(n: int, threshold: float = 0.7, seed: int = 0) -> list[dict]:
    "Compare rensa and datasketch on n synthetic speeches: pairs, recall, wrong, compared, seconds, memory."
    texts, rows = synthetic_speeches(n, seed=seed)[0], []
    truth = exact_join(texts, texts, threshold).query("i < j")
    truth = set(zip(truth.i, truth.j))
    for way in ("rensa", "datasketch"):
        row = in_child("bench_duplicates.measure", n=n, seed=seed, way=way, threshold=threshold)
        found = set(map(tuple, row["pairs"]))
        recall = len(found & truth) / len(truth) if truth else math.nan
        rows.append({"library": way, **row, "pairs": len(found), "recall": recall, "wrong": len(found - truth)})
    return rows


def growth(sizes, seed: int = 0, threshold: float = 0.7) -> list[dict]:
    "Measure near_pairs on synthetic speeches of growing number."
    how = dict(seed=seed, way="ours", threshold=threshold)
    rows = [in_child("bench_duplicates.measure", n=int(n), **how) for n in sizes]
    return [{**row, "pairs": len(row["pairs"])} for row in rows]


def mixed_speeches(n: int, seed: int = 0, copies: float = 0.1) -> list[str]:
    """Mix the sentences of the demo corpus into n different speeches of three to six.

    copies: share that repeats an earlier one with a greeting before it."""
    chance = random.Random(seed)
    sentences = [part for speech in demo_speeches() for part in re.split(r"(?<=[.?!]) ", speech) if len(part) > 30]
    made: list[str] = []
    while len(made) < n:
        if made and chance.random() < copies:
            made.append("Hello, thanks for reading. " + chance.choice(made))
        else:
            made.append(" ".join(chance.sample(sentences, chance.randint(3, 6))))
    return made


def embedding_bench(n: int, dtype: str = "auto", encoder: str = "minilm") -> dict:
    "Measure the embedding of n speeches: useful tokens/s and share of the machine's peak."
    from shares import account, encoder_flops, take
    from psycopref.models.embedding import embed, load_encoder
    from psycopref.models.weights import find_weights

    texts, weights = mixed_speeches(n, copies=0.0), find_weights(encoder)
    tokenizer, model = load_encoder(weights, dtype)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=256).input_ids]
    needed = encoder_flops(model, lengths)
    found = account(take(lambda: embed(texts, weights, dtype=dtype)), sum(lengths), needed, model.dtype)
    return keep("share_embedding", found, f"embedding of {n} made speeches by {weights.label}", "tokens/s")


def stage_bench(n: int) -> dict:
    "Run chapter 1 on a made source of n rows in a process of its own."
    import resource

    from psycopref.models.weights import find_weights

    find_weights("minilm")
    with tempfile.TemporaryDirectory() as folder:
        cache, source = Path(folder) / "cache", Path(folder) / "combined_dataset.json"
        cache.mkdir()
        (cache / "weights").symlink_to(cache_root() / "weights")
        lines = (json.dumps({"Context": text, "Response": ""}) + "\n" for text in mixed_speeches(n))
        source.write_text("".join(lines), encoding="utf-8")
        code = "import sys; from psycopref.run.cli import main; sys.exit(main())"
        chapter, sources = str(project_root() / "nbs/01_speeches.ipynb"), f'SOURCES=["demo", "amod-counsel={source}"]'
        command = [sys.executable, "-c", code, "run", chapter, "-p", "RUN=bench", "-p", sources]
        environment = os.environ | {"PSYCOPREF_CACHE": str(cache), "PSYCOPREF_ROOT": folder}
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        took, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        stage = Path(folder) / "outputs/bench/01_speeches"
        receipt, drops = read_json(stage / "receipt.json"), read_json(stage / "drops.json")[-1]
    found = {"seconds": round(took, 1), "stage_seconds": receipt["seconds"], "peak_mb": round(peak)}
    found |= {"rows": drops["rows"], "kept": drops["kept"]}
    what = f"chapter 1 on {n} made speeches and the demo corpus"
    return keep("speech_stage", found, what, "s", f"{os.cpu_count()} cores")


def duplicates_bench(sizes: list[int]) -> tuple:
    """Compare rensa with datasketch, and follow time and memory of the search as it grows.

    sizes: numbers of synthetic speeches. Returns (frame comparing libraries, frame of growth, figure)."""
    import pandas as pd

    compared = pd.DataFrame(library_comparison(min(3000, max(sizes))))
    grown = pd.DataFrame(growth(sizes, 0))
    what = "near-duplicates among synthetic speeches at a Jaccard index of 0.7; each row in a process of its own"
    rows = {"libraries": compared.to_dict("records"), "growth": grown.to_dict("records")}
    keep("near_duplicates", rows, what, "s", f"{os.cpu_count()} cores")
    figure, axes = new_figure(7.5, 3.2, 1, 2)
    for axis, column, unit in zip(axes, ("seconds", "peak_mb"), ("seconds", "peak memory, MB")):
        axis.plot(grown.n, grown[column], marker="o")
        axis.set(xscale="log", yscale="log", xlabel="speeches", ylabel=unit)
    figure.suptitle("Search for near-duplicates (exact; above 100,000 by rensa, then the exact index)", fontsize=9)
    return compared, grown, figure


SPEECHES = 1000  # rows sent through the whole speech stage
EMBEDDED = 256  # speeches in the measurement of embedding
ROWS = [3000, 10000, 30000]  # sizes of the search for near-duplicates
DTYPE = "auto"  # of the embedding: auto, float32 or bfloat16


if __name__ == "__main__":
    globals().update(given(sys.argv[1:], globals()))
    show(embedding_bench(EMBEDDED, DTYPE))
    print(stage_bench(SPEECHES))
    compared, grown, figure = duplicates_bench(ROWS)
    save_figure("near_duplicates", figure)
    print(compared, grown)
