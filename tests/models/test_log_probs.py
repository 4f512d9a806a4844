"""The one-pass head computes what trl's does, gives way where it can't, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from psycopref.models import log_probs as module
from psycopref.models.log_probs import add_log_probs, log_probs, reason_for_other_head, scan_vocabulary

FIELDS = ("loss", "log_probs", "entropy", "mean_logits", "is_top1")
SMALL = dict(vocab_size=5000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def small_model(config=None):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def tokens():
    ids = torch.randint(0, 5000, (3, 40), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(40) < torch.tensor([[5], [39], [40]]), -100)}


@pytest.mark.parametrize("rows, columns", [(1024, 2048), (7, 64), (1, 4999)])
def test_fields_and_gradients_equal_trl(rows, columns, monkeypatch):
    monkeypatch.setattr(module, "TILE_ROWS", rows)
    monkeypatch.setattr(module, "TILE_COLUMNS", columns)
    theirs = small_model()
    theirs.lm_head.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    add_log_probs(ours)
    add_log_probs(ours)  # twice is once
    weights = torch.randn(3, 39)
    for model in (ours, theirs):
        model.found = model(**tokens(), fused_lm_head=True)
        (model.found.log_probs * weights).sum().backward()
    for field in FIELDS:
        torch.testing.assert_close(ours.found[field], theirs.found[field], atol=1e-5, rtol=1e-5)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters()):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


class Products(TorchDispatchMode):
    "Count multiply-adds of matrix products, those that are added in place too, which torch's own counter misses."

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        factors = {"mm": args[:2], "addmm_": args[1:3]}.get(function.overloadpacket.__name__)
        if factors:
            self.total += factors[0].numel() * factors[1].shape[1]
        return function(*args, **(keywords or {}))


def head_products(trains):
    "Count the products of states with the head, in passes over it, for a forward and a backward pass."
    hidden, weight = torch.randn(30, 16, requires_grad=trains), torch.randn(5000, 16)
    with Products() as counter:
        own, _, _ = log_probs(hidden, weight, torch.randint(0, 5000, (30,)))
        if trains:
            own.sum().backward()
    return counter.total / (30 * 5000 * 16)


def test_the_head_is_read_once_and_without_gradients_multiplied_once():
    assert head_products(trains=True) == 2, "logits and expected rows; nothing again in the backward pass"
    assert head_products(trains=False) == 1


class Largest(TorchDispatchMode):
    "Note the size of the largest tensor made that is no part of a given one."

    def __init__(self, given):
        super().__init__()
        self.given, self.numel = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        made = function(*args, **(keywords or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.given:
            self.numel = max(self.numel, made.numel())
        return made


def test_a_head_in_half_precision_is_never_copied_whole():
    model = small_model().requires_grad_(False).bfloat16()
    add_log_probs(model)
    with Largest(model.lm_head.weight) as found:
        model(**tokens(), fused_lm_head=True)
    assert found.numel < model.lm_head.weight.numel()


def test_second_derivatives_are_refused_as_they_would_be_wrong():
    hidden = torch.randn(3, 8, requires_grad=True)
    own, _, _ = log_probs(hidden, torch.randn(50, 8), torch.tensor([1, 2, 3]))
    [slope] = torch.autograd.grad(own.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


def test_evaluation_shows_what_training_shows():
    model = small_model()
    model.lm_head.requires_grad_(False)
    add_log_probs(model)
    trained = model(**tokens(), fused_lm_head=True)
    with torch.no_grad():
        watched = model(**tokens(), fused_lm_head=True)
    for field in FIELDS:
        torch.testing.assert_close(watched[field], trained[field].detach())


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.zeros(5000, 2)
    weight[3000], weight[10] = torch.tensor([400.0, -400.0]), torch.tensor([-400.0, 399.0])
    exact = (hidden.double() @ weight.double().T).logsumexp(-1)
    torch.testing.assert_close(scan_vocabulary(hidden, weight, torch.tensor([3000, 0])).log_sum.double(), exact)
    own, entropy, top = log_probs(hidden, weight, torch.tensor([3000, 0]))
    assert own.tolist() == [0.0, -399.0] and top.tolist() == [True, False] and entropy.abs().max() < 1e-4


def test_where_nothing_counts_the_loss_is_zero_and_trains():
    model = small_model()
    model.lm_head.requires_grad_(False)
    add_log_probs(model)
    given = tokens()
    loss = model(input_ids=given["input_ids"], labels=torch.full_like(given["labels"], -100), fused_lm_head=True).loss
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_other_heads_are_left_to_trl():
    trained = small_model()
    assert "trained" in reason_for_other_head(trained)
    capped = small_model(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)).requires_grad_(False)
    assert "final_logit_softcapping" in reason_for_other_head(capped)
    for model in (trained, capped):
        before = model(**tokens(), fused_lm_head=True)
        add_log_probs(model)
        assert torch.equal(model(**tokens(), fused_lm_head=True).log_probs, before.log_probs)


def test_a_copied_model_runs_its_own_layers():
    model = small_model().requires_grad_(False)
    add_log_probs(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(-1)
    ours, theirs = (own(**tokens(), fused_lm_head=True).log_probs for own in (model, twin))
    assert not torch.allclose(ours, theirs)
