"""Half precision loses nothing of what is learnt: adapters are kept apart, and FSDP2 hands on float32."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from psycopref.core.paper import resource_path
from psycopref.core.settings import LoraSettings, load_profile
from psycopref.models.generation import Sample
from psycopref.models.local import LocalModel
from psycopref.models.weights import adapter_base, find_weights, load_causal_lm, load_tokenizer
from psycopref.training import sampling, watching
from psycopref.training.jobs import launch_command
from psycopref.training.sampling import open_sampler, weights_identity
from psycopref.training.scoring import load_reward_model, score_pairs
from psycopref.training.texts import merge_policy, numbered
from psycopref.training.watching import Watcher
from refusals import one_line
from trainings import SETTINGS, TRAIN, losses, same, train, weights_of, write

pytestmark = pytest.mark.usefixtures("one_thread")

# Adapters

DEMO = load_profile("demo").dpo
LORA = replace(SETTINGS["dpo lora"], learning_rate=DEMO.learning_rate, lora=LoraSettings(rank=DEMO.lora.rank))
LORA = replace(LORA, checkpoints=1)


def update(adapter, scale):
    "What adapters add to each weight: name -> (out, in) in float64."
    names = {name.rpartition(".lora_")[0] for name in adapter if ".lora_" in name}
    product = lambda name: adapter[f"{name}.lora_B.weight"].double() @ adapter[f"{name}.lora_A.weight"].double()
    return {name.removeprefix("base_model.model."): scale * product(name) for name in names}


def effective(module):
    "The weight that a linear layer computes with, in float64."
    if not hasattr(module, "base_layer"):
        return module.weight.detach().double()
    a, b = (own["default"].weight.detach().double() for own in (module.lora_A, module.lora_B))
    return module.base_layer.weight.detach().double() + module.scaling["default"] * b @ a


def lost(model, base, wanted):
    "The part of an update that a model does not compute with."
    off = [effective(model.get_submodule(k)) - (effective(base.get_submodule(k)) + d) for k, d in wanted.items()]
    return math.sqrt(sum(own.square().sum() for own in off) / sum(d.square().sum() for d in wanted.values()))


@pytest.fixture(scope="module")
def iterated(tiny, tmp_path_factory):
    "Two iterations in bfloat16, each started from the one before: (folders, their adapters' updates, results)."
    folder, start, found = tmp_path_factory.mktemp("iterated"), tiny, []
    for name in ("first", "second"):
        result = train(start, folder, name, LORA, "bfloat16", keep_points=True)
        [*_, (_, last)] = numbered(folder / f"{name}-job" / "checkpoints")
        adapter = weights_of(last, "adapter_model.safetensors")
        found.append((folder / name, update(adapter, LORA.lora.alpha / LORA.lora.rank), result))
        start = find_weights(str(folder / name))
    return found


def samples(policy, monkeypatch, tmp_path):
    "The model that samples."
    with open_sampler("local", policy, "bfloat16"):
        pass


def watches(policy, monkeypatch, tmp_path):
    "The model whose divergence is measured, first; then the base."
    monkeypatch.setattr(watching, "kl_to_base", lambda *models, **more: [[0.0]])
    profile = replace(load_profile("tiny"), dtype="bfloat16")
    speeches = SimpleNamespace(speech_id=["a"], speech=["No."])
    own = Watcher(tmp_path, adapter_base(policy.location), "", speeches, profile, 0, None)
    own.measure_kl(policy, {"a": [Sample("I see.", "stop", 2)]})


def evaluates(policy, monkeypatch, tmp_path):
    "The model that answers test speeches."
    LocalModel(policy.location, dtype="bfloat16").load()


@pytest.mark.parametrize("way", [samples, watches, evaluates])
@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
def test_in_bfloat16_no_update_is_lost(way, number, iterated, tiny, monkeypatch, tmp_path):
    from psycopref.models import linear

    folder, wanted, _ = iterated[number]
    loaded, load = [], load_causal_lm
    for module in (sampling, watching, linear):
        monkeypatch.setattr(module, "load_causal_lm", lambda *a: loaded.append(load(*a)) or loaded[-1])
    way(find_weights(str(folder)), monkeypatch, tmp_path)
    base = load(tiny, "bfloat16").requires_grad_(False)
    rounded = {name: (base.get_submodule(name).weight.double() + own).bfloat16() for name, own in wanted.items()}
    merged = [rounded[name].double() - base.get_submodule(name).weight.double() - own for name, own in wanted.items()]
    as_merged = math.sqrt(sum(m.square().sum() for m in merged) / sum(own.square().sum() for own in wanted.values()))
    assert loaded[0].dtype == torch.bfloat16 and lost(loaded[0], base, wanted) <= 0.01 < 0.02 < as_merged


def test_an_iteration_goes_on_with_the_adapter_of_the_one_before(iterated, tiny, tmp_path):
    "A step too small for float32 leaves its bits; the reference is the policy before, so the first loss is ln 2."
    (first, *_), (second, _, result) = iterated
    assert losses(result)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert [adapter_base(str(own)) for own in (first, second)] == [tiny, tiny]
    policy = find_weights(str(first))
    still = replace(LORA, learning_rate=1e-30, epochs=1)
    found = train(policy, tmp_path, "still", still, "bfloat16")
    assert same(weights_of(tmp_path / "still"), weights_of(first)) and not same(weights_of(first), weights_of(second))
    assert losses(found) == pytest.approx([math.log(2)] * 4, abs=1e-6)
    held = train(policy, tmp_path, "held", replace(LORA, epochs=1), "bfloat16", reference=tiny)
    assert abs(losses(held)[0] - math.log(2)) > 1e-4
    other = replace(LORA, lora=LoraSettings(rank=2))
    assert "have rank 16" in one_line(lambda: train(policy, tmp_path, "other", other, "bfloat16"))


def test_the_whole_is_written_once_in_float32_and_changes_nothing_here(iterated, tiny, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    folder, wanted, _ = iterated[1]
    assert not (folder / "model.safetensors").exists(), "an iteration takes the adapter's bytes, not the model's"
    place = shutil.copytree(folder, tmp_path / "policy")
    before = find_weights(str(place))
    known = before.revision, weights_identity(before)
    merge_policy(place)
    assert (find_weights(str(place)).revision, weights_identity(before)) == known
    plain, base = AutoModelForCausalLM.from_pretrained(place), load_causal_lm(tiny, "float32")
    assert plain.dtype == torch.float32 and lost(plain, base, wanted) < 1e-4
    assert lost(load_causal_lm(before, "float32"), base, wanted) < 1e-4
    assert all(own.dtype == torch.float32 for own in weights_of(place).values())


def test_a_reward_model_in_bfloat16_keeps_its_update(tiny, tmp_path):
    own = replace(SETTINGS["reward lora"], learning_rate=DEMO.learning_rate, lora=LORA.lora, checkpoints=1)
    train(tiny, tmp_path, "model", own, "bfloat16")
    tokenizer, place = load_tokenizer(tiny), tmp_path / "model"
    wanted = update(weights_of(place / "adapter", "adapter_model.safetensors"), LORA.lora.alpha / LORA.lora.rank)
    half, whole = (load_reward_model(str(place), tokenizer, dtype) for dtype in ("bfloat16", "float32"))
    base = load_reward_model(tiny.location, tokenizer, "bfloat16", new_head=0)
    assert lost(half, base, wanted) <= 0.01 and lost(whole, base, wanted) < 1e-4
    assert torch.equal(half.score.weight, whole.score.weight) and half.score.weight.dtype == torch.float32
    for ours, exact in zip(score_pairs(half, tokenizer, TRAIN), score_pairs(whole, tokenizer, TRAIN)):
        assert ours == pytest.approx(exact, abs=0.02)


# FSDP2, in two processes on the CPU

WORKER = """
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from psycopref.training import dpo, reward_model
from trainings import SETTINGS, build

made = PartialState.__init__


def as_on_gpus(self, *arguments, **keywords):  # accelerate shards only there, torch on a CPU too
    made(self, *arguments, **keywords)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_on_gpus
dpo.training_precision = reward_model.training_precision = lambda lora, dtype: ("float32", dtype == "bfloat16")
for job in map(Path, sys.argv[1:]):
    kind, precision = job.name.split("-")
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"float32": "no", "bfloat16": "bf16"}[precision]
    AcceleratorState._reset_state()
    trainer, _, _ = build(SETTINGS[f"{'reward' if kind == 'reward' else 'dpo'} full"], job)
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **keywords):
            def look(module, inputs, outputs):
                seen.append(outputs.logits if kind == "reward" else outputs.log_probs)

            model.register_forward_hook(look)

    trainer.add_callback(Look())
    trainer.train()
    if trainer.is_world_process_zero():
        values = torch.cat([own.detach()[own != 0] for own in seen])
        found = {"sharded": trainer.is_fsdp_enabled, "dtype": str(values.dtype), "packed": not trainer.not_packed}
        found["finer"] = float((values != values.bfloat16().to(values.dtype)).float().mean())
        found["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if kind != "reward":
            found["reference"] = list(trainer.train_dataset["ref_chosen_logps"])
        (job / "found.json").write_text(json.dumps(found))
"""
FULL = {kind: replace(SETTINGS[f"{kind} full"], epochs=1, checkpoints=0) for kind in ("dpo", "reward")}
CASES = [f"{kind}-{dtype}" for kind, dtype in itertools.product(("start", "held", "reward"), ("float32", "bfloat16"))]


@pytest.fixture(scope="module")
def shards(tiny, other, tmp_path_factory):
    "By case, what two processes with a shard each have seen, and the result of one process in float32."
    folder, found = tmp_path_factory.mktemp("shards"), {}
    for case in CASES:
        kind, dtype = case.split("-")
        own, more = FULL["reward" if kind == "reward" else "dpo"], {"reference": other} if kind == "held" else {}
        write(tiny, folder / case, own, folder / f"{case}-model", dtype, **more)
        if dtype == "float32":
            found[kind] = train(tiny, folder, f"{kind}-one", own, **more)
    (folder / "worker.py").write_text(WORKER)
    *launcher, _, _, _ = launch_command(folder, 2, str(resource_path("accelerate/fsdp2.yaml")))
    command = [*launcher, sys.executable, str(folder / "worker.py"), *(str(folder / case) for case in CASES)]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: (json.loads((folder / case / "found.json").read_text()), found[case.split("-")[0]]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_shards_compute_the_losses_of_one_process(case, shards):
    "In bfloat16, to what its products round; what a head computed stays in float32."
    (two, one), (kind, dtype) = shards[case], case.split("-")
    assert two["sharded"] and two["packed"] and two["dtype"] == "torch.float32" and two["finer"] > 0.9
    near = 1e-5 if dtype == "float32" else 0.015  # 0.008 was found
    assert two["loss"] == pytest.approx(losses(one), abs=near) and len(two["loss"]) == 4
    if kind != "reward":
        rounded = torch.tensor(two["reference"]).bfloat16().tolist()
        assert sum(own != coarse for own, coarse in zip(two["reference"], rounded)) > 15, "of 19"
    if kind == "start":
        assert two["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
