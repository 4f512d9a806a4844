"""A text has one vector, that of sentence-transformers, in any company, and it is computed once."""

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psycopref.models import embedding
from psycopref.core.stages import cache_root
from psycopref.models.embedding import BATCH_TOKENS, STEP, embed, encode, shaped_batches
from psycopref.models.weights import find_weights

from refusals import one_line

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
slow = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LETTERS = "abcdefghijklmnopqrstuvwxyz'.,?"


def make_encoder(folder: Path, seed=0, positions=256, lower=True) -> str:
    """Save a random two-layer BERT that spells; its weights are large, so that texts differ."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *("##" + c for c in LETTERS),
        *LETTERS.upper()[:26],
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=lower).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=positions,
            initializer_range=0.4,
        )
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return find_weights(make_encoder(tmp_path_factory.mktemp("encoder") / "bert"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test finds another's vectors."""
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def computed(monkeypatch):
    """The texts that an encoder reads, in order."""
    seen, load = [], embedding.load_encoder

    def recording(*arguments):
        tokenizer, model = load(*arguments)

        def tokenize(texts, **keywords):
            seen.extend(texts)
            return tokenizer(texts, **keywords)

        return tokenize, model

    monkeypatch.setattr(embedding, "load_encoder", recording)
    return seen


def cache_files() -> list[Path]:
    return sorted((cache_root() / "embeddings").glob("*.sqlite"))


def naive(texts, weights, max_tokens=256):
    """The definition: each text alone, unpadded, mean of the last hidden state over the attention mask, unit length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(weights.location),
        AutoModel.from_pretrained(weights.location, dtype=torch.float32).eval(),
    )
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0].double()
        mask = inputs.attention_mask[0].double()
        mean = (hidden * mask[:, None]).sum(0) / mask.sum()
        found.append((mean / mean.norm()).numpy())
    return np.array(found)


TEXTS = [
    "i am so tired",
    "",
    "no",
    "😀 é \x00",
    "why? " * 7,
    "a" * 300,
    "i can't sleep, and i do not know why. " * 6,
    *("b c " * n for n in range(5, 60, 11)),
]

# ---- the vectors ----


def test_vectors_are_those_of_the_definition(tiny):
    found, expected = embed(TEXTS, tiny, dtype="float32"), naive(TEXTS, tiny)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 32)
    assert np.abs(found - expected).max() < 1e-3 and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3
    apart = np.linalg.norm(expected[:, None] - expected[None], axis=2) + np.eye(len(TEXTS))
    assert apart.min() > 0.02, "the texts differ, so a vector of another text would be seen"


@pytest.fixture(scope="module")
def alone(tiny):
    return {text: encode([text], tiny, dtype="float32")[0] for text in TEXTS}


@slow
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=30))
def test_a_text_has_the_same_bits_in_any_company(tiny, alone, company):
    assert encode(company, tiny, dtype="float32").tobytes() == np.stack([alone[text] for text in company]).tobytes()


def test_the_same_bits_with_whole_batches_and_with_remnants(tiny):
    texts = [f"{'i am ' * (n % 9)}{LETTERS[n % 26]}{LETTERS[n // 26 % 26]}" for n in range(300)]
    assert len({len(members) for _, _, members in shaped_batches([20] * 300, 256)}) > 1
    whole = encode(texts, tiny, dtype="float32")
    for start in (0, 1, 63, 64, 65, 299):
        assert np.array_equal(encode(texts[start:], tiny, dtype="float32"), whole[start:])
    assert np.array_equal(encode(texts[::-1], tiny, dtype="float32")[::-1], whole)


@pytest.mark.parametrize("max_tokens", [4, 16, 20, 100])
def test_what_is_beyond_the_last_token_is_not_read(tiny, max_tokens):
    long = "i can not sleep and " * 20
    found = encode([long, long + "more", "i"], tiny, max_tokens, "float32")
    assert (
        np.array_equal(found[0], found[1]) and np.abs(found - naive([long, long, "i"], tiny, max_tokens)).max() < 1e-3
    )
    other = encode([long], tiny, max_tokens + 1, "float32")
    assert not np.array_equal(other[0], found[0]), "one token more is read"


def test_bfloat16_is_near(tiny):
    assert (embed(TEXTS, tiny, dtype="bfloat16") * naive(TEXTS, tiny)).sum(1).min() > 0.99


@few
@given(
    st.lists(st.integers(0, 300), max_size=60),
    st.sampled_from([1, 16, 40, 100, 256, 300]),
    st.sampled_from([1, 64, BATCH_TOKENS]),
)
def test_batches_hold_every_text_once_in_a_shape_that_only_its_length_decides(lengths, longest, batch_tokens):
    lengths = [max(1, min(n, longest)) for n in lengths]
    batches = shaped_batches(lengths, longest, batch_tokens)
    assert sorted(i for _, _, members in batches for i in members) == list(range(len(lengths)))
    for padded, rows, members in batches:
        assert 1 <= len(members) <= rows == max(1, batch_tokens // padded)
        for i in members:
            assert lengths[i] <= padded <= min(longest, lengths[i] + STEP - 1) and (
                padded % STEP == 0 or padded == longest
            )
    assert len({padded for padded, _, _ in batches}) <= -(-longest // STEP)


# ---- the cache ----


def test_a_text_is_computed_once(tiny, computed):
    first = embed(TEXTS, tiny, dtype="float32")
    assert sorted(computed) == sorted(TEXTS)
    computed.clear()
    assert np.array_equal(embed(TEXTS[::-1], tiny, dtype="float32"), first[::-1]) and computed == []
    assert np.array_equal(embed(["new one", *TEXTS], tiny, dtype="float32")[1:], first) and computed == ["new one"]
    assert len(cache_files()) == 1


def test_repeated_texts_are_computed_once(tiny, computed):
    found = embed(["i", "no", "i", "i", "no"], tiny, dtype="float32")
    assert (
        sorted(computed) == ["i", "no"]
        and np.array_equal(found, found[[0, 1, 0, 0, 1]])
        and not np.array_equal(found[0], found[1])
    )


def test_more_texts_than_sqlite_takes_at_once(tiny, computed):
    texts = [f"{LETTERS[n % 26]} {LETTERS[n // 26 % 26]} {LETTERS[n // 676]}" for n in range(1203)]
    first = embed(texts, tiny, dtype="float32")
    computed.clear()
    assert np.array_equal(embed(texts, tiny, dtype="float32"), first) and computed == []


def test_the_cache_changes_no_bit(tiny, computed):
    cold = embed(TEXTS, tiny, dtype="float32")
    shutil.rmtree(cache_root())
    embed(TEXTS[::3], tiny, dtype="float32")
    computed.clear()
    assert np.array_equal(embed(TEXTS, tiny, dtype="float32"), cold) and set(computed) == set(TEXTS) - set(TEXTS[::3])


def test_what_shapes_a_vector_keeps_vectors_apart(tiny, computed):
    long = ["i can not sleep and " * 5]
    full, short, half = (
        embed(long, tiny, dtype="float32"),
        embed(long, tiny, 8, "float32"),
        embed(long, tiny, dtype="bfloat16"),
    )
    assert computed == long * 3 and not np.array_equal(full, short) and not np.array_equal(full, half)
    for found, keywords in (
        (full, {"dtype": "float32"}),
        (short, {"max_tokens": 8, "dtype": "float32"}),
        (half, {"dtype": "bfloat16"}),
    ):
        assert np.array_equal(embed(long, tiny, **keywords), found)
    assert len(computed) == 3


def test_auto_is_the_dtype_that_it_picks(tiny, computed):
    from psycopref.models.weights import pick_dtype

    name = str(pick_dtype("auto")).removeprefix("torch.")
    assert np.array_equal(embed(["i"], tiny), embed(["i"], tiny, dtype=name)) and computed == ["i"]


def test_other_weights_have_other_vectors_even_in_the_same_folder(tmp_path, computed):
    first = embed(["i"], find_weights(make_encoder(tmp_path / "bert", seed=1)), dtype="float32")
    second = embed(["i"], find_weights(make_encoder(tmp_path / "bert", seed=2)), dtype="float32")
    assert computed == ["i", "i"] and np.abs(first - second).max() > 0.01 and len(cache_files()) == 2
    assert (
        np.array_equal(
            embed(["i"], find_weights(make_encoder(tmp_path / "elsewhere" / "bert", seed=1)), dtype="float32"), first
        )
        and len(computed) == 2
    ), "the place does not matter"


def test_another_tokenizer_has_other_vectors(tmp_path):
    lower = find_weights(make_encoder(tmp_path / "a" / "bert"))
    cased = find_weights(make_encoder(tmp_path / "b" / "bert", lower=False))
    expected = naive(["I AM"], cased)
    assert np.abs(naive(["I AM"], lower) - expected).max() > 0.01
    embed(["I AM"], lower, dtype="float32")
    assert np.abs(embed(["I AM"], cased, dtype="float32") - expected).max() < 1e-3


def spoilt(path: Path, how: str) -> None:
    content = path.read_bytes()
    for rest in path.parent.glob(path.name + "-*"):
        rest.unlink()
    if how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"text": b"not a database, but long enough to look at" * 200, "header": content[:16] + b"\xff" * 4096, "half": content[: len(content) // 2],
                          "middle": content[:1024] + b"\xff" * (len(content) - 1024)}[how])  # fmt: skip


@pytest.mark.parametrize("how", ["text", "header", "half", "middle", "folder"])
def test_a_broken_cache_is_one_line_and_made_anew_once_it_is_deleted(tiny, computed, how):
    texts = [f"{LETTERS[n % 26]} {LETTERS[n // 26]}" for n in range(200)]
    good = embed(texts, tiny, dtype="float32")
    [path] = cache_files()
    spoilt(path, how)
    message = one_line(lambda: embed(texts, tiny, dtype="float32"))
    assert str(path) in message and "delete" in message
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert np.array_equal(embed(texts, tiny, dtype="float32"), good)


def test_a_cache_with_some_of_the_texts_is_filled_up(tiny):
    good = embed(TEXTS, tiny, dtype="float32")
    [path] = cache_files()
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM vectors WHERE key IN (SELECT key FROM vectors LIMIT 5)")
    database.close()
    assert np.array_equal(embed(TEXTS, tiny, dtype="float32"), good)


def test_after_an_interruption_finished_batches_are_not_computed_again(tiny, monkeypatch):
    pooled, calls = embedding._pooled, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return pooled(*arguments)

    texts = [f"{LETTERS[n % 26]} {LETTERS[n // 26 % 26]} {LETTERS[n // 676]}" for n in range(6 * BATCH_TOKENS // STEP)]
    monkeypatch.setattr(embedding, "_pooled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(texts, tiny, dtype="float32")
    embed(texts, tiny, dtype="float32")
    assert len(calls) < 5 + 6, "four of six batches were finished"


def test_threads_share_a_new_cache(tiny, computed):
    groups = [TEXTS[n:] + [f"{LETTERS[n]} {LETTERS[n + 1]}"] for n in range(6)]
    expected = [encode(group, tiny, dtype="float32").astype(np.float32) for group in groups]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda group: embed(group, tiny, dtype="float32"), groups))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    computed.clear()
    embed([text for group in groups for text in group], tiny, dtype="float32")
    assert computed == []


def embed_in_a_process(location: str, texts: list[str], barrier, answers) -> None:
    """Run in a fresh process: write to the cache at the same moment as the other one."""
    weights = find_weights(location)
    made = encode(texts, weights, dtype="float32")
    barrier.wait(120)
    found = embed(texts, weights, dtype="float32")
    answers.put((texts[0], found.tobytes(), np.array_equal(found, made)))


def test_two_processes_write_at_once(tiny, computed):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    both = [["i", *TEXTS], ["a", *TEXTS[::-1]]]
    running = [
        context.Process(target=embed_in_a_process, args=(tiny.location, texts, barrier, answers), daemon=True)
        for texts in both
    ]
    for process in running:
        process.start()
    told = dict((first, (vectors, same)) for first, vectors, same in (answers.get(timeout=180) for _ in both))
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0] and all(same for _, same in told.values())
    for texts in both:
        assert embed(texts, tiny, dtype="float32").tobytes() == told[texts[0]][0]
    assert computed == [], "the cache holds what both wrote"


# ---- odd input ----


def test_no_texts(tiny, computed):
    assert embed([], tiny, dtype="float32").shape == encode([], tiny, dtype="float32").shape == (0, 32)
    assert computed == []


@pytest.mark.parametrize(
    "text", ["", " ", "😀", "你好", "\x00", "[CLS] [SEP] [PAD]", "e\u0301", "\u202e", "i\n\n\ti"], ids=ascii
)
def test_any_text_has_a_vector(tiny, text):
    [found] = embed([text], tiny, dtype="float32")
    assert (
        np.isfinite(found).all()
        and abs(np.linalg.norm(found) - 1) < 1e-3
        and np.abs(found - naive([text], tiny)[0]).max() < 1e-3
    )
    assert np.array_equal(embed([text], tiny, dtype="float32")[0], found)


def test_a_lone_surrogate_has_a_vector(tiny):
    assert embed(["i am \ud83d tired"], tiny, dtype="float32").shape == (1, 32)


def test_a_tuple_and_an_array_are_lists_of_texts(tiny):
    expected = embed(["i", "no"], tiny, dtype="float32")
    assert np.array_equal(embed(("i", "no"), tiny, dtype="float32"), expected) and np.array_equal(
        embed(np.array(["i", "no"]), tiny, dtype="float32"), expected
    )


def test_a_column_of_a_sorted_frame_gives_each_text_its_own_vector(tiny):
    import pandas as pd

    column = pd.Series(["no", "i am so tired", "why"]).sort_values()
    assert column.index.tolist() != [0, 1, 2]
    assert np.array_equal(
        embed(column, tiny, dtype="float32"), encode(list(column), tiny, dtype="float32").astype(np.float32)
    )


def test_minilm_is_the_encoder_where_none_is_named(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(embedding, "find_weights", lambda name: asked.append(name) or tiny)
    assert np.array_equal(embed(["i"], dtype="float32"), embed(["i"], tiny, dtype="float32")) and asked == ["minilm"]


def test_an_unknown_dtype_is_one_line(tiny):
    assert "float61" in one_line(lambda: embed(["i"], tiny, dtype="float61"))


def test_truncated_weights_are_one_line(tmp_path):
    folder = Path(make_encoder(tmp_path / "cut"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert str(folder) in one_line(lambda: embed(["i"], find_weights(str(folder)), dtype="float32"))


def test_more_tokens_than_the_model_has_positions_are_one_line(tmp_path):
    small = find_weights(make_encoder(tmp_path / "small", positions=32))
    assert "32" in one_line(lambda: embed(["i " * 100], small, max_tokens=64, dtype="float32"))


def test_importing_stays_light():
    code = "import sys, psycopref.models.embedding, psycopref.corpus.cleaning, psycopref.corpus.topics; print(sorted(m for m in ('torch', 'transformers', 'pandas', 'numpy', 'sklearn', 'scipy', 'ftfy', 'py3langid') if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ).stdout.strip()
        == "[]"
    )
