"""The policy bench gives all sides the same work: equal losses and gradients in float32, no pair left out, memory told truly, operations counted as torch does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from psycopref.core.files import StageWriter
from bench_policy import (
    Side,
    Way,
    Work,
    adapted_losses,
    cpu_figure,
    iteration_phases,
    made_pairs,
    phases_bench,
    phases_figure,
    policy_flops,
    policy_run,
    random_policy,
    reference_gap,
    same_work,
    try_ways,
    our_way,
)
from bench_reward import LENGTHS, twin
from psycopref.core.settings import DpoSettings, LoraSettings, StudyError
from psycopref.core.stages import Run
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer

SETTINGS = DpoSettings(
    batch_size=8,
    epochs=1.0,
    checkpoints=0,
    max_length=1024,
    learning_rate=1e-3,
    warmup_ratio=0.0,
    lora=LoraSettings(rank=4, alpha=8),
    pack_tokens=1000,
)
SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=1024,
)
WAYS = (Way("ours", 4, "batch_rebalance"), Way("trl", 2, "group_by_length"), Way("stock"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_weights("random-tiny"))


@pytest.fixture(scope="module")
def work(tokenizer):
    model = load_causal_lm(find_weights("random-tiny"), "float32")
    return Work(lambda: twin(model), tokenizer, made_pairs(tokenizer, 8, LENGTHS["demo"]), SETTINGS)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_ROOT", str(tmp_path))
    return tmp_path


def gradients(side):
    "Of the adapters, over a whole batch."
    trainer = side.trainer
    trainer.model.train()
    for batch in trainer.get_train_dataloader():
        (trainer.compute_loss(trainer.model, batch) / trainer.args.gradient_accumulation_steps).backward()
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}


def test_all_sides_start_from_the_same_adapters_and_leave_the_same_gradients(work):
    sides = [Side(work, way) for way in WAYS]
    starts = [
        {name: weight for name, weight in side.trainer.model.named_parameters() if weight.requires_grad}
        for side in sides
    ]
    for name, weight in starts[0].items():
        assert all(torch.equal(weight, own[name]) for own in starts), name
    first, *others = (gradients(side) for side in sides)
    for own in others:
        assert own.keys() == first.keys()
        for name, gradient in first.items():
            assert (own[name].float() - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6), name


def test_losses_under_the_same_adapters_are_equal_and_not_those_of_no_adapters(work):
    losses = adapted_losses([Side(work, way) for way in WAYS], scale=0.05)
    assert max(losses) - min(losses) < 1e-4 and abs(losses[0] - torch.log(torch.tensor(2.0)).item()) > 1e-3


def test_another_reference_is_refused(work, tokenizer):
    shifted = load_causal_lm(find_weights("random-tiny"), "float32")
    with torch.no_grad():
        shifted.lm_head.weight.mul_(1.5)
    ours, theirs = Side(work, WAYS[0]), Side(replace(work, fresh=lambda: twin(shifted)), WAYS[1])
    assert reference_gap(ours, theirs) > 1e-3
    with pytest.raises(RuntimeError, match="not the same work"):
        same_work([ours, theirs])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.side)
def test_a_call_trains_all_pairs_and_can_be_repeated(work, way):
    side = Side(work, way)
    before = {
        name: weight.detach().clone() for name, weight in side.trainer.model.named_parameters() if weight.requires_grad
    }
    for _ in range(2):
        assert side() == 8 and side.trainer.state.global_step == 1
    assert any(
        not torch.equal(weight, before[name])
        for name, weight in side.trainer.model.named_parameters()
        if name in before
    )
    assert (side.reference_seconds > 0) == (way.side != "stock")


def test_a_side_that_leaves_steps_out_is_refused(work):
    side = Side(work, Way("trl", 8))
    side.trainer.args.max_steps = 0.5  # what a trainer that stops early would show
    side.trainer.train = lambda: setattr(side.trainer.state, "global_step", 0)
    with pytest.raises(RuntimeError, match="expected all 8 pairs"):
        side()


def test_the_reference_is_computed_anew_in_each_measurement(work, monkeypatch):
    side, seen = Side(work, WAYS[0]), []
    compute = side.trainer.compute_ref_log_probs
    monkeypatch.setattr(
        side.trainer,
        "compute_ref_log_probs",
        lambda model, batch: seen.append((model, len(batch["completion_mask"]))) or compute(model, batch),
    )
    side(), side()
    assert [rows for _, rows in seen] == [8, 8] * 2, "two packs of four pairs, twice"
    assert all(model is side.reference for model, _ in seen) and side.trainer.ref_model is None


def test_a_way_out_of_memory_loses(work):
    class Full(Side):
        def __call__(self):
            if self.way.pairs == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__()

    tried = try_ways(lambda way: Full(work, way), [Way("trl", 4), Way("trl", 8)])
    assert tried[0] == (0.0, Way("trl", 4)) and tried[1][0] > 0


def test_full_training_shares_weights_and_optimiser(tokenizer):
    model = random_policy(SHAPE, tokenizer, "float32")
    work = Work(
        lambda: twin(model),
        tokenizer,
        made_pairs(tokenizer, 4, LENGTHS["demo"]),
        replace(SETTINGS, batch_size=4, lora=LoraSettings()),
        checkpointing=True,
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sides, before = (
        [Side(work, way, optimiser) for way in (our_way(work), Way("trl", 2, "batch_rebalance"))],
        model.lm_head.weight.clone(),
    )
    assert same_work(sides)["reference gap"] < 1e-5
    for side in sides:
        assert (
            side.trainer.model.lm_head.weight is model.lm_head.weight
            and side() == 4
            and side.trainer.args.gradient_checkpointing
        )
        assert not torch.equal(before, model.lm_head.weight)
        before = model.lm_head.weight.clone()


def test_packs_go_to_the_device_with_the_batch(work):
    from accelerate.utils import send_to_device

    trainer = Side(work, WAYS[0]).trainer
    batch = send_to_device(trainer.data_collator(list(trainer.train_dataset)), "meta")
    assert batch["pack"].input_ids.device.type == "meta" == batch["completion_mask"].device.type


def test_operations_are_those_torch_counts(tokenizer):
    model, (rows, width) = random_policy(SHAPE, tokenizer, "float32"), (1, 70)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 900, (rows, width)), use_cache=False).logits.sum().backward()
    everything = policy_flops(model.config, [{"prompt_ids": [], "chosen_ids": [*range(width)], "rejected_ids": [1000]}])
    masked = (
        4 / 3 * 3 * 2 * 4 * 4 * 16 * (width * width - width * (width + 1) // 2)
    )  # torch counts what the mask hides; 2 layers, 4 heads of 16
    other = (
        policy_flops(model.config, [{"prompt_ids": [], "chosen_ids": [0], "rejected_ids": [1000]}]) / 2
    )  # the other text has one token
    assert (everything - other + masked) * 3 / 4 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_child_is_not_charged_with_the_memory_of_its_parent():
    code = "from bench_policy import peak_mb; print(peak_mb())"
    ballast = bytearray(os.urandom(1000) * 600_000)
    assert len(ballast) == 600_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = float(done.stdout)
    assert found < 600


def timed(seconds):
    return {"m": {"iter": {"iterations": seconds}}}


def demo_run(name, training, profile="demo"):
    with StageWriter(Run(name), "06_policy", profile, 0, {}) as stage:
        stage.json("training", training)
    return stage.run.stage("06_policy") / "receipt.json"


def test_the_newest_demo_run_is_looked_at(root, capsys):
    assert phases_bench(None) == [] and "make reproduce" in capsys.readouterr().out
    for age, (name, profile) in enumerate((("newest", "demo"), ("older", "demo"), ("small", "tiny"))):
        receipt = demo_run(name, timed([{"seconds": {"train": 1.0}}]), profile)
        os.utime(receipt, (1e9 - age, 1e9 - age) if profile == "demo" else (2e9, 2e9))
    assert policy_run(None).run.name == "newest" and policy_run("small").run.name == "small"


def test_an_iteration_without_seconds_is_told_about(root, capsys):
    demo_run("old", timed([{"seconds": {"train": 1.0}}, {"pairs": 3}]))
    with pytest.raises(StudyError, match="iteration 2 of m"):
        iteration_phases(policy_run("old"))
    assert phases_bench("old") == [] and "run 06_policy again" in capsys.readouterr().out
    assert not (root / "outputs/bench/policy_phases.json").exists()


def test_bars_stack_up_to_the_total(root):
    demo_run("mine", timed([{"seconds": {"save": 1, "sample": 2.5, "mend": 0.25}}, {"seconds": {"sample": 4.0}}]))
    found = phases_bench("mine")
    kept = json.loads((root / "outputs/bench/policy_phases.json").read_text())
    assert kept["rows"] == found and kept["run"] == "mine" and list(found[0]["seconds"]) == ["sample", "save", "mend"]
    bars = phases_figure(found).axes[0].patches
    for i, row in enumerate(found):
        own = [bar for bar in bars if round(bar.get_x() + bar.get_width() / 2) == i]
        assert max(bar.get_y() + bar.get_height() for bar in own) == pytest.approx(row["total"])


def test_the_figure_draws_what_was_found():
    trained = [
        {
            "label": "demo's lengths",
            "seconds": {"ours": 1.0, "trl": 2.0, "stock": 4.5},
            "ratio": {"trl": 2.0, "stock": 4.4},
        }
    ]
    sides = {side: {"loaded_mb": 700.0} for side in ("ours", "trl", "stock")}
    remembered = [
        {"label": "demo's lengths", "peak_mb": {"ours": 1000.0, "trl": 1500.0, "stock": 2500.0}, "sides": sides}
    ]
    times, memory = cpu_figure(trained, remembered).axes
    assert [bar.get_height() for bar in times.patches] == [1.0, 2.0, 4.5] and [
        bar.get_height() for bar in memory.patches
    ] == [1000, 1500, 2500]
    assert any("4.4×" in text.get_text() for text in times.texts) and any(
        "2.5×" in text.get_text() for text in memory.texts
    )


def test_pairs_that_are_too_long_are_refused(tokenizer):
    pairs = pd.concat([made_pairs(tokenizer, 7, LENGTHS["demo"]), made_pairs(tokenizer, 1, LENGTHS["paper"])])
    with pytest.raises(StudyError, match="7 of 8 pairs"):
        Work(lambda: None, tokenizer, pairs, replace(SETTINGS, max_length=300))
