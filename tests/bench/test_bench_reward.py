"""The reward bench counts rightly: operations as torch counts them, useful work as the pack lays it out, and no side is given less work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench_reward import (
    LENGTHS,
    Epoch,
    Way,
    made_rows,
    make_trainer,
    model_flops,
    random_reward_model,
    try_ways,
    twin,
    useful_work,
)
from psycopref.training.packing import enable_packing, lay_out
from psycopref.models.weights import find_weights, load_tokenizer

SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
)
TEXTS = [[*range(3, 43), *range(100, 130)], [*range(3, 43), *range(200, 255)]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_weights("random-tiny"))


def counted(module, **inputs):
    "Operations of a forward and a backward pass; the plain kernel of attention is made of matrix products, which are counted whole, masked places too."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**inputs, use_cache=False)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "shape",
    [SHAPE, SHAPE | dict(num_key_value_heads=4, intermediate_size=96), SHAPE | dict(hidden_size=128)],
    ids=["grouped", "plain heads", "narrow heads"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_padded_pass_are_those_torch_counts(shape, checkpointing, tokenizer):
    model, (rows, width) = random_reward_model(shape, tokenizer, "float32").train(), (3, 70)
    if checkpointing:
        model.activation_checkpointing_enable()
    found = counted(model, input_ids=torch.randint(3, 900, (rows, width)))
    expected = model_flops(model.config, rows * width, rows * width**2)
    if checkpointing:  # computes nearly all of the forward twice, which is not credited
        assert 1.25 * expected < found < 1.34 * expected
    else:
        assert expected == pytest.approx(found, rel=0.01)


def test_operations_of_a_pack_are_those_torch_counts(tokenizer):
    model = random_reward_model(SHAPE, tokenizer, "float32")
    assert enable_packing(model) == ""
    pack = lay_out([TEXTS])
    expected = model_flops(
        model.config, pack.input_ids.numel(), sum(q * k for q, k in zip(pack.query_lengths, pack.key_lengths))
    )
    assert expected == pytest.approx(counted(model.model, pack=pack), rel=0.01)


ids = st.lists(st.integers(3, 6), min_size=1, max_size=12)


@given(pairs=st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_useful_work_is_what_a_pack_computes(pairs):
    groups = [[shared + first, shared + second] for shared, first, second in pairs]
    pack = lay_out(groups)
    tokens, attended = useful_work([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in groups])
    looked = sum(
        keys - queries + i + 1 for queries, keys in zip(pack.query_lengths, pack.key_lengths) for i in range(queries)
    )
    again = sum(
        len(own[0]) == len(shared) or own[1][: len(own[0])] == own[0] or own[0][: len(own[1])] == own[1]
        for (shared, _, _), own in zip(pairs, groups)
    )
    assert 0 <= pack.input_ids.numel() - tokens <= again, "a text that begins the other one costs a token"
    assert 0 <= looked - attended <= 24 * again


def test_both_sides_leave_the_same_gradients_on_the_same_parameters(tokenizer):
    model, rows = random_reward_model(SHAPE, tokenizer, "float32"), made_rows(tokenizer, 8, LENGTHS["demo"])
    other, found = twin(model), []
    for own, way in ((model, Way(True, "batch_rebalance", 4)), (other, Way(False, "group_by_length", 2))):
        walk = Epoch(make_trainer(own, tokenizer, rows, way), way, 8.0)
        assert walk.passes() == 8
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        other.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6), name


def test_a_side_that_is_given_fewer_pairs_is_refused(tokenizer, monkeypatch):
    walk = Epoch(
        make_trainer(
            random_reward_model(SHAPE, tokenizer, "float32"),
            tokenizer,
            made_rows(tokenizer, 4, LENGTHS["demo"]),
            Way(pairs=2),
        ),
        Way(pairs=2),
        4.0,
    )
    loader = walk.trainer.get_train_dataloader
    monkeypatch.setattr(walk.trainer, "get_train_dataloader", lambda: list(loader())[:1])
    with pytest.raises(RuntimeError, match="2 of 4 pairs"):
        walk()


def test_a_way_out_of_memory_loses_and_the_next_is_tried(tokenizer):
    model, rows = random_reward_model(SHAPE, tokenizer, "float32"), made_rows(tokenizer, 4, LENGTHS["demo"])

    class Full(Epoch):
        def passes(self, most=None):
            super().passes(most)  # gradients are there when memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory")

    def make(way):
        return (Full if way.pairs == 4 else Epoch)(make_trainer(model, tokenizer, rows, way), way, 4.0)

    (fits, side), (full, _) = try_ways(make, [Way(pairs=2), Way(pairs=4)])
    assert full == 0 < fits and side.way.pairs == 2 and all(parameter.grad is None for parameter in model.parameters())
