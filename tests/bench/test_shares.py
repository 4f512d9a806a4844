"""Products of a call are counted as they are, forwards and backwards, and can be done again alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from psycopref.models.weights import find_weights, load_causal_lm
from shares import Products, Taken, account, encoder_flops, exponent, grow, operators, replay, take

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(seen):
    return sum(own.times * own.operations for own in seen.values())


def test_two_known_products_are_counted_with_their_operations():
    a, b, c = torch.ones(8, 32), torch.ones(32, 16), torch.ones(3, 4, 16)
    with Products() as products:
        for _ in range(3):
            a @ b
        c @ torch.ones(3, 16, 5)
        torch.addmm(torch.ones(16), a, b)
        a + 1
    found = {(key[0], own.times, own.operations) for key, own in products.seen.items()}
    assert found == {("mm", 3, 2 * 8 * 32 * 16), ("bmm", 1, 2 * 3 * 4 * 16 * 5), ("addmm", 1, 2 * 8 * 32 * 16)}
    seconds, share = replay(products.seen)
    assert seconds > 0 and share == 1
    assert torch.equal(next(iter(products.seen.values())).again(), a @ b), "the same operands"
    assert 0 < replay(products.seen, limit=-1)[1] < 1


@pytest.mark.parametrize("how", ["training", "inference", "fused inference"])
def test_products_of_a_model_are_those_that_torch_counts(how):
    model = load_causal_lm(find_weights("random-tiny"), "float32")
    model.set_attn_implementation("eager")

    def call():
        with torch.inference_mode(how != "training"):
            loss = model(input_ids=torch.arange(24)[None]).logits.sum()
        return loss.backward() if how == "training" else None

    with FlopCounterMode(display=False) as torchs:
        call()
    if how == "fused inference":
        model.set_attn_implementation("sdpa")
    with Products() as products:
        call()
    assert ("scaled_dot" in str(products.seen)) == (how == "fused inference")
    assert counted(products.seen) == torchs.get_total_flops()


def test_fused_attention_stands_for_two_products_forwards_and_five_backwards():
    query, key = torch.randn(1, 4, 10, 8, requires_grad=True), torch.randn(1, 2, 12, 8)
    with Products() as products:
        scaled_dot_product_attention(query, key, key, enable_gqa=True).sum().backward()
    fused = {own[0]: product for own, product in products.seen.items() if "flash" in own[0]}
    if not fused:
        pytest.skip("this torch has no fused attention here")
    assert sum(own.operations for own in fused.values()) == 7 * 2 * 4 * 10 * 12 * 8
    assert all(own.again() for own in fused.values())


def test_products_of_int8_are_counted():
    weight = torch.quantize_per_tensor(torch.randn(16, 32), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    with Products() as products:
        torch.ops.quantized.linear_dynamic(torch.ones(8, 32), packed, False)
    ((key, own),) = products.seen.items()
    assert key[0] == "linear_dynamic" and own.operations == 2 * 8 * 32 * 16 and own.again().shape == (8, 16)


def test_products_of_a_layer_in_8_bits_are_counted():
    from psycopref.models.linear import _int8_linear

    layer = _int8_linear()(torch.nn.Linear(32, 16), torch.arange(2), {})
    with torch.inference_mode(), Products() as products:
        layer(torch.ones(8, 32))
    found = {key[0]: own for key, own in products.seen.items()}
    assert found["qlinear_pointwise"].operations == 2 * 8 * 32 * 16 and found["addmm_"].operations == 2 * 8 * 2 * 16
    assert len(found) == 2 and replay(products.seen)[0] > 0


def test_an_encoder_s_operations_are_torch_s():
    config = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**config), add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as torchs:
        model(input_ids=torch.arange(12)[None])
    assert encoder_flops(model, [12]) == torchs.get_total_flops()


def test_work_is_taken_apart_and_what_it_began_with_taken_away():
    a, b = torch.ones(64, 64), torch.ones(64, 32)
    short, long = take(lambda: [a @ b]), take(lambda: [a @ b, a @ b, a @ a, a.exp()], rounds=2)
    rest = Taken(long.seconds + short.seconds, long.seen, long.operators, 1.0, 7) - short
    assert sorted(own.times for own in rest.seen.values()) == [1, 1] and rest.result == 7
    row = account(rest, tokens=10, needed=2 * 64 * 64 * 96, dtype=torch.float32, top=2)
    assert row["needed of computed"] == 1 == row["replayed"] and row["tokens/s"] == 10 / rest.seconds
    assert len(row["operators"]) == 3 and sum(own for _, own in row["operators"]) == pytest.approx(1)
    assert {"mm", "exp", "outside of operators"} <= set(operators(lambda: [a @ b, a.exp(), sum(range(10000))]))


def test_growth_is_fitted_by_a_power():
    assert exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1) and exponent([1, 10], [5, 5]) == pytest.approx(0)
    asked = []
    found = grow("rows", [2, 4], lambda size: asked.append(size) or (lambda: size))
    assert asked == [2, 2, 4] and [row["size"] for row in found["rows"]] == [2, 4]
    assert set(found["power"]) == {"seconds", "MB"}
