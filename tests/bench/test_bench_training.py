"""All sides of the training bench do the same work: equal losses and gradients, no pair left out, true counts."""

import os
from dataclasses import replace

import pandas as pd
import pytest
import torch

from bench import in_child, peak_mb
from bench_training import (
    LENGTHS,
    STRATEGIES,
    Side,
    Way,
    Work,
    demo_settings,
    first_losses,
    gradients,
    gpu_bench,
    load_start,
    growth_bench,
    lora_bench,
    made_groups,
    made_pairs,
    our_way,
    random_model,
    reference_gap,
    same_work,
    share_bench,
    shape_bench,
    try_ways,
    twin,
)
from psycopref.core.files import read_json
from psycopref.core.settings import LoraSettings
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.models.packs import enable_packing
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("kind", ["reward", "policy"])
LORA = LoraSettings(rank=4, alpha=8, last_layers=1)
SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, head_dim=16, vocab_size=1024)
TRL = Way("trl", 2)
STOCK = Way("stock")


def small(kind):
    return replace(demo_settings(kind, 1000), learning_rate=1e-3, warmup_ratio=0.0, lora=LORA)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_weights("random-tiny"))


@pytest.fixture(scope="module")
def works(tokenizer):
    "A work of eight pairs for each kind."
    found = {}
    for kind in ("reward", "policy"):
        model = load_start(kind, find_weights("random-tiny"), tokenizer, "float32")
        found[kind] = Work(kind, lambda own=model: twin(own), tokenizer, made_pairs(tokenizer, 8, "demo"), small(kind))
    return found


def sides_of(work, optimiser=None):
    return [
        Side(work, way, optimiser)
        for way in (our_way(work), TRL, *([STOCK] if work.kind == "policy" and work.settings.lora.rank else []))
    ]


# The work


def test_texts_have_the_wished_lengths_and_are_the_same_each_time(tokenizer):
    for profile, (_, (low, high)) in LENGTHS.items():
        groups = made_groups(tokenizer, 8, 2, profile)
        found = [len(tokenizer(answer).input_ids) for _, own in groups for answer in own]
        assert all(low - 3 <= n <= high + 3 for n in found), "the seam of a cut may cost a token"
        assert groups == made_groups(tokenizer, 8, 2, profile)


def test_pairs_that_are_too_long_or_make_no_whole_batch_are_refused(works, tokenizer):
    work = works["policy"]
    pairs = pd.concat([made_pairs(tokenizer, 7, "demo"), made_pairs(tokenizer, 1, "paper")])
    short = replace(work.settings, max_length=300)
    assert "7 of 8 pairs" in one_line(lambda: replace(work, pairs=pairs, settings=short))
    assert "whole batches of 8" in one_line(lambda: replace(work, pairs=work.pairs[:6]))


# The same work


@KINDS
def test_all_sides_start_from_the_same_adapters_and_leave_the_same_gradients(kind, works):
    sides = sides_of(works[kind])
    starts = [{n: w for n, w in side.trainer.model.named_parameters() if w.requires_grad} for side in sides]
    for name, weight in starts[0].items():
        assert all(torch.equal(weight, own[name]) for own in starts), name
    first, *others = map(gradients, sides)
    for own in others:
        assert own.keys() == first.keys()
        for name, gradient in first.items():
            assert (own[name].float() - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6), name


@KINDS
def test_losses_under_the_same_adapters_are_equal_and_the_sides_own_are_put_back(kind, works):
    sides = sides_of(works[kind])
    before = [weight.clone() for weight in sides[0].trainer.model.parameters()]
    losses, plain = first_losses(sides, scale=0.05), first_losses(sides[:1], scale=0.0)
    assert max(losses) - min(losses) < 1e-4 and abs(losses[0] - plain[0]) > 1e-3, "the adapters reach the loss"
    assert all(map(torch.equal, before, sides[0].trainer.model.parameters()))


@KINDS
def test_another_start_or_other_pairs_are_refused(kind, works, tokenizer):
    work, shifted = works[kind], load_start(kind, find_weights("random-tiny"), tokenizer, "float32")
    with torch.no_grad():
        (shifted.lm_head if kind == "policy" else shifted.score).weight.mul_(1.5)
    ours = Side(work, our_way(work))
    theirs = Side(replace(work, fresh=lambda: twin(shifted)), TRL)
    assert kind == "reward" or reference_gap(ours, theirs) > 1e-3
    others = [Side(replace(work, pairs=work.pairs.assign(chosen="No.")), TRL)] + [theirs] * (kind == "policy")
    for other in others:
        with pytest.raises(RuntimeError, match="not the same work"):
            same_work([ours, other])


def test_the_trl_side_s_modules_are_not_touched_and_its_parameters_shared(tokenizer):
    model = random_model("reward", SHAPE, tokenizer, "float32")
    other = twin(model)
    assert enable_packing(model) == ""
    assert "forward" in vars(model.base_model) and "forward" not in vars(other.base_model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters())) and model.config is not other.config


# Training


@KINDS
def test_a_call_trains_all_pairs_and_can_be_repeated(kind, works):
    for side in sides_of(works[kind]):
        own = {name: weight for name, weight in side.trainer.model.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in own.items()}
        for _ in range(2):
            assert side() == 8 and side.trainer.state.global_step == 1
        after = dict(side.trainer.model.named_parameters())
        assert any(not torch.equal(after[name], weight) for name, weight in before.items() if name in after)


def test_a_side_that_leaves_steps_out_is_refused(works):
    side = Side(works["policy"], TRL)
    side.trainer.train = lambda: setattr(side.trainer.state, "global_step", 0)
    with pytest.raises(RuntimeError, match="expected all 8 pairs"):
        side()


def test_the_reference_is_computed_anew_in_each_measurement(works, monkeypatch):
    side, seen = Side(works["policy"], Way("ours", 4, "batch_rebalance")), []
    compute = side.trainer.compute_ref_log_probs

    def record(model, batch):
        seen.append((model, len(batch["completion_mask"])))
        return compute(model, batch)

    monkeypatch.setattr(side.trainer, "compute_ref_log_probs", record)
    side(), side()
    assert [rows for _, rows in seen] == [8, 8] * 2, "two packs of four pairs, twice"
    assert all(model is side.reference for model, _ in seen) and side.trainer.ref_model is None


def test_a_way_out_of_memory_loses_and_the_next_is_tried(works):
    class Full(Side):
        def __call__(self):
            if self.way.pairs == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__()

    tried = try_ways(lambda way: Full(works["policy"], way), [Way("trl", 4), Way("trl", 8)])
    assert tried[0] == (0.0, Way("trl", 4)) and tried[1][0] > 0


def test_packs_go_to_the_device_with_the_batch(works):
    from accelerate.utils import send_to_device

    trainer = Side(works["policy"], our_way(works["policy"])).trainer
    batch = send_to_device(trainer.data_collator(list(trainer.train_dataset)), "meta")
    assert batch["pack"].input_ids.device.type == "meta" == batch["completion_mask"].device.type


def test_a_child_is_not_charged_with_the_memory_of_its_parent():
    ballast = bytearray(os.urandom(1000) * 600_000)
    assert 5 < in_child("bench.peak_mb") < len(ballast) / 1e6 <= peak_mb()


# Whole benches, at the smallest size


@KINDS
def test_adapters_are_compared_and_kept(kind, works, tokenizer, tmp_path):
    own = works[kind].fresh(), tokenizer
    found = lora_bench(kind, *own, 1, 1, small(kind), sizes=(4, 8), strategies=STRATEGIES[:2])
    written = read_json(tmp_path / "outputs" / "bench" / f"{kind}_training.json")
    assert written["rows"] == found and [row["label"] for row in found] == ["demo's lengths"]
    assert {"ours", "theirs", "stock", "ratio", "stock ratio", "unit", "device", "what", "date"} <= written.keys()
    assert len(written["tried"]) == 3 and set(written["MB"]) == {"ours", "theirs", "stock"}
    positions = written["positions"]
    assert positions["ours"] <= positions["useful"] < positions["theirs"]


@KINDS
def test_a_step_is_accounted_and_followed(kind, works, tokenizer):
    own = works[kind].fresh(), tokenizer, small(kind)
    row = share_bench(kind, *own)
    assert row["replayed"] == 1 and 0.5 < row["needed of computed"] <= 1, "no product is missed, none is padding"
    curves = growth_bench(kind, *own, [2, 4], [8, 16])
    assert [[row["size"] for row in curve["rows"]] for curve in curves] == [[2, 4], [8, 16]]


def test_a_child_that_fails_says_its_last_words():
    with pytest.raises(RuntimeError, match="no attribute 'nothing'"):
        in_child("bench.nothing")


@KINDS
def test_every_weight_of_a_shape_is_compared(kind, tokenizer):
    found = shape_bench(kind, "small", random_model(kind, SHAPE, tokenizer), 1, pairs=4, matmul=256)
    assert len(found["tried"]) >= len(STRATEGIES) and "AdamW" in found["what"] and found["reference gap"] < 0.02
    assert min(found["share"].values()) > 0 and found["positions"]["ours"] <= found["positions"]["useful"]
    assert 0 < found["FLOP a pair"] * found["ours"] < found["matmul FLOP/s"] * 10, "in one unit"


def test_a_shape_that_is_not_known_is_refused():
    assert "llama-3.2-3b" in one_line(lambda: gpu_bench("reward", ["llama-3.2-3"], 1, 8, True))
