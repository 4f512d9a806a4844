"""The operations that are counted are those that torch dispatches, but for the half of attention that is masked."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench_training import random_model
from flops import forward_flops, training_flops
from psycopref.core.settings import LoraSettings
from psycopref.models.packs import enable_packing, lay_out
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.texts import add_lora

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=1024)
SHAPE |= dict(num_key_value_heads=2, head_dim=16, attn_implementation="eager")
N = 50


def dispatched(model, backward: bool) -> int:
    "What torch counts on one text; it does not know attention's mask."
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=torch.arange(N)[None] + 3, use_cache=False).logits
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def masked(passes: int) -> int:
    "Of the keys that stand behind a query."
    return passes * SHAPE["num_hidden_layers"] * 4 * 64 * (N * N - N * (N + 1) // 2)


@pytest.mark.parametrize("kind", ["reward", "policy"])
def test_one_text_takes_what_torch_counts(kind):
    model = random_model(kind, SHAPE, load_tokenizer(find_weights("random-tiny")), "float32")
    forward = forward_flops(model, [(N, N)], N)  # a plain classifier gives a score to each position
    assert forward == dispatched(model, False) - masked(1)
    assert training_flops(model, [(N, N)], N) == 3 * forward == dispatched(model, True) - masked(3)
    assert training_flops(model, [(N, N)], N, reference=True) == 4 * forward


def test_with_adapters_no_gradient_goes_below_the_first_trained_layer():
    model = random_model("policy", SHAPE, load_tokenizer(find_weights("random-tiny")), "float32")
    add_lora(model, LoraSettings(rank=4, alpha=8, last_layers=1))
    unneeded = 2 * N * 64 * (64 + 2 * 32 + 3 * 4)  # of what the first q, k and v read; they are counted
    own = training_flops(model, [(N, N)], N) - unneeded
    assert own == dispatched(model, True) - masked(1) - masked(2) // SHAPE["num_hidden_layers"]


def test_a_pack_s_segments_are_counted_as_one_long_text_would_be():
    model = random_model("policy", SHAPE, load_tokenizer(find_weights("random-tiny")), "float32")
    pack = lay_out([[[1, 2, 3, 4, 5], [1, 2, 3, 6]]])
    segments = list(zip(pack.query_lengths, pack.key_lengths))
    alone = [forward_flops(model, [(n, n)]) for n in (5, 4, 3)]
    assert not enable_packing(model) and forward_flops(model, segments) == alone[0] + alone[1] - alone[2]
