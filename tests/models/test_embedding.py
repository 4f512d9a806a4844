"""A text has one vector, that of sentence-transformers, in any company, and equal texts are computed once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psycopref.models import embedding
from psycopref.models.embedding import BATCH_TOKENS, STEP, embed, shaped_batches
from psycopref.models.weights import find_weights

from refusals import one_line

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
slow = settings(few, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
LETTERS = "abcdefghijklmnopqrstuvwxyz'.,?"
TEXTS = [
    "i am so tired",
    "",
    "no",
    "😀 é \x00",
    "why? " * 7,
    "a" * 300,
    "i can't sleep, and i do not know why. " * 6,
    *("b c " * n for n in range(5, 60, 11)),
    *("你好", "[CLS] [SEP] [PAD]", "\u202e", "i\n\n\ti"),
]


def make_encoder(folder: Path, seed=0, positions=256, lower=True) -> str:
    """Save a random two-layer BERT that spells; its weights are large, so that texts differ."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *LETTERS, *("##" + c for c in LETTERS), *LETTERS.upper()[:26]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=lower).save_pretrained(folder)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    more = dict(max_position_embeddings=positions, initializer_range=0.4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(BertConfig(vocab_size=len(vocabulary), **shape, **more)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Compute every text anew in each call."""
    monkeypatch.setattr(embedding, "MOST_KNOWN", -1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return find_weights(make_encoder(tmp_path_factory.mktemp("encoder") / "bert"))


def naive(texts, weights, max_tokens=256):
    """The definition: each text alone, unpadded, mean of the last hidden state over the attention mask, unit length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.location)
    model = AutoModel.from_pretrained(weights.location, dtype=torch.float32).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0].double()
        mask = inputs.attention_mask[0].double()
        mean = (hidden * mask[:, None]).sum(0) / mask.sum()
        found.append((mean / mean.norm()).numpy())
    return np.array(found)


def test_vectors_are_those_of_the_definition(tiny):
    found, expected = embed(TEXTS, tiny, dtype="float32"), naive(TEXTS, tiny)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 32)
    assert np.abs(found - expected).max() < 1e-3 and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3
    apart = np.linalg.norm(expected[:12, None] - expected[None, :12], axis=2) + np.eye(12)
    assert apart.min() > 0.02, "the texts differ, so a vector of another text would be seen"
    assert (embed(TEXTS, tiny, dtype="bfloat16") * expected).sum(1).min() > 0.99


@pytest.fixture(scope="module")
def alone(tiny):
    return {text: embed([text], tiny, dtype="float32")[0] for text in TEXTS}


@slow
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=30))
def test_a_text_has_the_same_bits_in_any_company(tiny, alone, company):
    assert embed(company, tiny, dtype="float32").tobytes() == np.stack([alone[text] for text in company]).tobytes()


def test_the_same_bits_with_whole_batches_and_with_remnants(tiny):
    texts = [f"{'i am ' * (n % 9)}{LETTERS[n % 26]}{LETTERS[n // 26 % 26]}" for n in range(300)]
    assert len({len(members) for _, _, members in shaped_batches([20] * 300, 256)}) > 1
    whole = embed(texts, tiny, dtype="float32")
    for start in (1, 64, 65, 299):
        assert np.array_equal(embed(texts[start:], tiny, dtype="float32"), whole[start:])
    assert np.array_equal(embed(texts[::-1], tiny, dtype="float32")[::-1], whole)


@pytest.mark.parametrize("max_tokens", [4, 16, 20, 100])
def test_what_is_beyond_the_last_token_is_not_read(tiny, max_tokens):
    long = "i can not sleep and " * 20
    found = embed([long, long + "more", "i"], tiny, max_tokens, "float32")
    assert np.array_equal(found[0], found[1])
    assert np.abs(found - naive([long, long, "i"], tiny, max_tokens)).max() < 1e-3
    assert not np.array_equal(embed([long], tiny, max_tokens + 1, "float32")[0], found[0]), "one token more is read"


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
        assert all(lengths[i] <= padded <= min(longest, lengths[i] + STEP - 1) for i in members)
        assert padded % STEP == 0 or padded == longest
    assert len({padded for padded, _, _ in batches}) <= -(-longest // STEP)


def test_a_text_is_computed_again_by_other_weights_layers_or_lengths_alone(tiny, monkeypatch):
    monkeypatch.setattr(embedding, "MOST_KNOWN", 2)
    seen, pooled = [], embedding._pooled

    def recording(model, tokens, mask, layers):
        seen.append(int(mask[:, 1].sum()))  # texts of the batch
        return pooled(model, tokens, mask, layers)

    monkeypatch.setattr(embedding, "_pooled", recording)
    both = embed(["i", "no"], tiny, dtype="float32")
    assert np.array_equal(embed(["no", "i", "no"], tiny, dtype="float32"), both[[1, 0, 1]]) and seen == [2]
    embed(["no"], tiny, 100, "float32"), embed(["no"], tiny, dtype="float32", layers=(0,))
    assert seen == [2, 1, 1]
    embed(["am"], tiny, dtype="float32"), embed(["no"], tiny, dtype="float32")
    assert seen == [2, 1, 1, 1, 1], "three texts were one too many to keep"


def test_equal_texts_are_computed_once_and_of_any_collection(tiny, monkeypatch):
    import pandas as pd

    expected = embed(["i", "no"], tiny, dtype="float32")
    seen, (tokenizer, model) = [], embedding.load_encoder(tiny, "float32")

    def recording(texts, **how):
        seen.extend(texts)
        return tokenizer(texts, **how)

    monkeypatch.setattr(embedding, "load_encoder", lambda weights, dtype, depth: (recording, model))
    texts = ["i", "no", "i", "i", "no"]
    for own in (texts, tuple(texts), np.array(texts), pd.Series(texts, index=[4, 0, 2, 1, 3]), iter(texts)):
        assert np.array_equal(embed(own, tiny, dtype="float32"), expected[[0, 1, 0, 0, 1]])
    assert seen == ["i", "no"] * 5


def test_weights_and_tokenizer_shape_the_vectors(tmp_path):
    first, second = (find_weights(make_encoder(tmp_path / "bert", seed=seed)) for seed in (1, 2))
    cased = find_weights(make_encoder(tmp_path / "cased" / "bert", lower=False))
    assert first.revision != second.revision, "other weights in the same folder"
    assert np.abs(embed(["I AM"], cased, dtype="float32") - naive(["I AM"], cased)).max() < 1e-3
    assert np.abs(embed(["I AM"], cased, dtype="float32") - embed(["I AM"], second, dtype="float32")).max() > 0.01


# ---- odd input ----


def test_no_texts_and_half_a_surrogate_pair_have_vectors(tiny):
    assert embed([], tiny, dtype="float32").shape == (0, 32)
    assert embed(["i am \ud83d tired"], tiny, dtype="float32").shape == (1, 32)


def test_minilm_is_the_encoder_where_none_is_named(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(embedding, "find_weights", lambda name: asked.append(name) or tiny)
    assert np.array_equal(embed(["i"], dtype="float32"), embed(["i"], tiny, dtype="float32")) and asked == ["minilm"]


def test_truncated_weights_are_one_line(tmp_path):
    folder = Path(make_encoder(tmp_path / "cut"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert str(folder) in one_line(lambda: embed(["i"], find_weights(str(folder)), dtype="float32"))


def test_more_tokens_than_the_model_has_positions_are_one_line(tmp_path):
    small = find_weights(make_encoder(tmp_path / "small", positions=32))
    assert "32" in one_line(lambda: embed(["i " * 100], small, max_tokens=64, dtype="float32"))


def test_eight_bits_keep_a_text_near_its_vector_in_any_company(tiny):
    exact, rounded = embed(TEXTS, tiny, dtype="float32"), embed(TEXTS, tiny, dtype="int8")
    close = (exact * rounded).sum(1)
    assert close.min() > 0.99 and not np.array_equal(exact, rounded)
    assert np.array_equal(embed(TEXTS[::-1], tiny, dtype="int8")[::-1], rounded)
