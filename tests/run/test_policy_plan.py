"""The plan of the policies counts what the stages do, its memory is that of real tensors and of the libraries' own figures, and its configurations are accelerate's."""

import dataclasses
import os
import types

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.run import policy_plan
from psycopref.core.settings import DEMO, PAPER, TINY, DpoSettings, load_profile
from psycopref.core.paper import resource_path
from psycopref.run.estimates import merge, parameters, plan_sizes
from psycopref.run.plan import TABLE_WIDTH, plan_stages, plan_text, sized_stages
from psycopref.run.policy_plan import (
    CARDS,
    COUNTS,
    STRATEGIES,
    TILE_BYTES,
    USABLE,
    Shape,
    arm_pairs,
    disk_bytes,
    kept_bytes,
    layer_bytes,
    memory_table,
    missing_accelerate,
    missing_engine,
    missing_for_policies,
    missing_policy_gpu,
    model_shape,
    phase_bytes,
    policy_lines,
    policy_shortages,
    policy_steps,
    smallest_card,
    training_memory,
    watch_plans,
    watching,
)
from psycopref.training.jobs import accelerate_strategy
from psycopref.models.weights import find_weights, load_causal_lm

from refusals import one_line

EIGHT, THREE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"
CONFIGURATIONS = sorted(resource_path("accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("PSYCOPREF_ACCELERATE", "PSYCOPREF_PROCESSES", "PSYCOPREF_SERVE", "PSYCOPREF_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sizes():
    return plan_sizes(PAPER, 26_483)


# ---- steps and watching ----


@given(st.integers(4, 200), st.integers(1, 4), st.sampled_from([0.5, 1.0, 1.7, 3.0]), st.integers(1, 6))
def test_a_training_has_the_steps_and_checkpoints_of_the_trainer(pairs, batch, epochs, checkpoints):
    from psycopref.training.texts import step_plan

    chosen = DpoSettings(batch_size=batch, epochs=epochs, checkpoints=checkpoints, pack_tokens=100)
    found = step_plan([10] * pairs, chosen, 0)
    steps, points = policy_steps(pairs, batch, epochs, checkpoints)
    assert (
        steps == found["steps"]
        and points == len({*range(found["every"], steps + 1, found["every"]), steps}) <= checkpoints
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_watching_is_counted_answer_by_answer(iterations, speeches, answers, checkpoints, judged):
    profile = load_profile(
        "paper",
        {
            "dpo_iter.iterations": iterations,
            "watch.speeches": speeches,
            "watch.answers": answers,
            "dpo.checkpoints": checkpoints,
            "watch.judged": judged,
        },
    )
    sizes = plan_sizes(profile, 2000)
    seen, rows = watching(profile, sizes), watch_plans(profile, sizes)
    assert seen.points == 1 + policy_steps(sizes.train_pairs, 64, 3.0, checkpoints)[
        1
    ] + iterations and seen.speeches == min(speeches, sizes.dev)
    every = seen.points * seen.speeches * answers
    assert [row.calls for row in rows if "answers" in row.work and "reference" not in row.work] == [every] * len(
        profile.backbones
    )
    assert (
        sum(row.calls for row in rows if row.who == (profile.evaluation.reference,) and "reference" in row.work)
        == seen.speeches
    ), "each is asked once, whatever the number of backbones"
    assert sum(row.calls for row in rows if "judged" in row.work) == (len(profile.backbones) * every if judged else 0)


def test_the_paper_s_profile_keeps_its_budget(sizes):
    rows = sized_stages(PAPER, sizes)
    total, watched = merge("t", "t", rows), merge("t", "t", [row for row in rows if row.work.startswith("watch")])
    assert total.usd < PAPER.budget_usd and 0 < watched.usd < 100
    assert f"{watched.usd:,.2f} US dollars" in " ".join(policy_lines(PAPER, sizes))
    assert not any(row.usd for row in plan_stages(DEMO)) and not any("select" in row.work for row in rows)


def test_a_cheaper_setting_is_cheaper(sizes):
    def hours(**changed):
        profile = load_profile("paper", {name.replace("__", "."): value for name, value in changed.items()})
        return sum(row.gpu_hours for row in sized_stages(profile, sizes) if row.stage in ("06_policy", "08_ablations"))

    full = hours()
    for changed in (
        {"dpo_iter__max_tokens": 100},
        {"dpo_iter__candidates": 4},
        {"dpo_iter__iterations": 8},
        {"dpo__epochs": 1.0},
        {"watch__speeches": 10},
        {"dpo__checkpoints": 2},
    ):
        assert hours(**changed) < full, changed


def test_too_few_pairs_are_said():
    assert policy_shortages(TINY, plan_sizes(TINY)) == [] == policy_shortages(DEMO, plan_sizes(DEMO))
    lines = policy_shortages(
        load_profile("paper", {"dpo_iter.prompts": 63, "ablation.pairs": 64}), plan_sizes(PAPER, 40)
    )
    assert (
        len(lines) == 3
        and all(line.startswith("dpo.batch_size") for line in lines)
        and "DPO-Iter trains on 63 pairs" in lines[1]
    )


@pytest.mark.parametrize("asked", [1, 100, 900, 10**6])
def test_the_arms_are_equal_and_no_larger_than_what_there_is(asked):
    profile = load_profile("paper", {"ablation.pairs": asked})
    sizes = plan_sizes(profile, 1000)
    n = arm_pairs(profile, sizes)
    assert n == min(asked, sizes.train_pairs)
    rows = [row for row in sized_stages(profile, sizes) if row.stage == "08_ablations"]
    assert rows[0].calls == asked * profile.dpo_iter.candidates and f"2 arms × {n:,} pairs" == rows[2].work
    assert ("The arms of Fig. 4" in " ".join(policy_lines(profile, sizes))) == (n < asked)


# ---- memory ----


@pytest.mark.parametrize(
    "shape", [Shape(1, 64, 160, 32, 100, True), Shape(1, 128, 448, 32, 100, True), Shape(1, 96, 256, 96, 100, False)]
)
@pytest.mark.parametrize("state", [4, 2])
def test_a_layer_keeps_what_the_formula_says(shape, state):
    "Tensors that one layer of transformers saves for its backward pass, with gradient checkpointing's inputs."
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    size, tokens, kind = 16, 37, torch.float32 if state == 4 else torch.bfloat16
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.hidden // size,
        num_key_value_heads=shape.key_values // size,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(kind)
    assert shape.layer == sum(p.numel() for p in layer.parameters())
    states, saved = torch.randn(1, tokens, shape.hidden, dtype=kind, requires_grad=True), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    turns = LlamaRotaryEmbedding(config)(states, torch.arange(tokens)[None])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == 4),
    ):
        layer(states, position_embeddings=turns)
    own = {p.data_ptr() for p in layer.parameters()} | {turn.data_ptr() for turn in turns}
    texts = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own and tokens in t.shape)
    small = 4 * tokens * (2 + shape.hidden // size)  # normalisers and attention's, which the formula leaves out
    assert texts == kept_bytes(shape, state) * tokens + small
    assert layer_bytes(shape, tokens, state) > texts - small


def test_shapes_are_read_from_config_files_and_published_ones_fit():
    weights = find_weights("random-tiny")
    shape, model = model_shape("random-tiny"), load_causal_lm(weights, "float32")
    assert (
        shape.layers * shape.layer + shape.ends == sum(p.numel() for p in model.parameters())
        and model_shape(weights.location) == shape
    )
    for name in PAPER.backbones:
        assert policy_plan.SHAPES[name].layers * policy_plan.SHAPES[name].layer + policy_plan.SHAPES[
            name
        ].ends == pytest.approx(parameters(name), rel=2e-3)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"hidden_size": 64}', '{"num_attention_heads": "four", "hidden_size": 64}']
)
def test_a_broken_config_file_has_no_shape(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert model_shape(str(tmp_path)) is None


@given(
    st.sampled_from([THREE, EIGHT]), st.sampled_from(["FSDP2", "ZeRO-3"]), st.integers(1, 64), st.integers(512, 32_768)
)
def test_shards_shrink_with_gpus_and_activations_with_the_pass(name, strategy, gpus, tokens):
    size, shape = parameters(name), model_shape(name)
    one, more, longer = (
        training_memory(size, shape, strategy, n, t)
        for n, t in ((gpus, tokens), (2 * gpus, tokens), (gpus, 2 * tokens))
    )
    assert sum(more.values()) < sum(one.values()) < sum(longer.values()) and one["weights"] == 2 * more["weights"]
    whole = training_memory(size, shape, "DDP", gpus, tokens)
    assert sum(whole[part] for part in ("weights", "gradients", "moments")) == 16 * size
    assert (
        whole["buckets"] == (4 * size if gpus > 1 else 0)
        and training_memory(size, shape, "DDP", 2, tokens)["buckets"] == 4 * size
    )
    assert sum(training_memory(size, shape, strategy, gpus, tokens, language_model=False).values()) <= sum(one.values())


def test_tiles_are_those_of_trl():
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    from trl.trainer import utils

    assert TILE_BYTES == 2 * kernels.TOKEN_CHUNK_SIZE * utils._CHUNKED_LOGPROB_CHUNK_SIZE


def test_the_table_says_the_fullest_phase_and_the_smallest_card():
    lines = memory_table(PAPER).splitlines()
    cells = [line.split() for line in lines if line.split()[0] in STRATEGIES]
    assert len(cells) == 2 * len(STRATEGIES) and max(map(len, lines)) <= TABLE_WIDTH
    for name, own in zip((THREE, EIGHT), (cells[:3], cells[3:])):
        for strategy, *words in own:
            for n, need, card in zip(COUNTS, words[0::3], words[2::3]):
                phases = phase_bytes(PAPER, name, strategy, n)
                fullest = max(phases.values())
                assert need == f"{fullest / 1e9:.1f}" and card.endswith("*") == (fullest > phases["training"])
                assert card.rstrip("*") == str(smallest_card(fullest) or "—")
    for need in (1.0, 24e9 * USABLE, 24e9 * USABLE + 1, 200e9):
        card = smallest_card(need)
        assert (
            card is None
            or need <= USABLE * card * 1e9
            and all(other >= card or need > USABLE * other * 1e9 for other in CARDS)
        )
    assert memory_table(TINY) == "" == memory_table(load_profile("paper", {"backbones": ["me/unknown"]}))


def test_the_remedies_do_what_they_say(monkeypatch):
    def said(*gigabytes, **changed):
        monkeypatch.setattr(policy_plan, "gpu_memory", lambda: [int(1e9 * n) for n in gigabytes])
        return " ".join(
            missing_policy_gpu(
                load_profile("paper", {name.replace("__", "."): value for name, value in changed.items()})
            )
        )

    assert "none is here" in said() and said(*[200] * 8) == "" and "DDP" in said(141)
    assert "zero3.yaml" in said(*[80] * 4) and "fsdp2.yaml" in said(*[80] * 4)
    assert "dpo.lora.rank to 16" in said(80) and said(80, dpo__lora__rank=16) == ""
    for strategy in ("fsdp2", "zero3"):
        monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path(f"accelerate/{strategy}.yaml")))
        assert said(*[80] * 4) == ""
        monkeypatch.setenv("PSYCOPREF_PROCESSES", "2")
        assert "training" in said(*[80] * 4), "two of four are used"
        monkeypatch.delenv("PSYCOPREF_PROCESSES")
    shorter = said(*[52] * 4, backbones=[EIGHT])
    assert "dpo.pack_tokens to 8192" in shorter and said(*[52] * 4, dpo__pack_tokens=8192) == ""
    assert "pack_tokens" not in said(*[52] * 4, dpo__max_length=16_384), "a pair has to fit in a pass"


# ---- accelerate's configurations ----


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_understands_the_configurations(path, monkeypatch):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    found, parser = load_config_from_file(str(path)), launch_command_parser()
    known, plain = {action.dest for action in parser._actions}, yaml.safe_load(path.read_text())
    assert isinstance(found, ClusterConfig) and set(plain) <= {
        field.name for field in dataclasses.fields(ClusterConfig)
    }
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(plain.get(section, {})) <= known, "a key that nobody reads would be passed over in silence"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args, _, _ = _validate_launch_command(
        parser.parse_args(
            ["--config_file", str(path), "--num_processes", "4", "--no_python", "psycopref", "train", "x"]
        )
    )
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    assert {"FSDP2": args.use_fsdp, "ZeRO-3": args.use_deepspeed, "DDP": args.multi_gpu}[
        accelerate_strategy()
    ] and args.num_processes == 4
    assert isinstance(args.mixed_precision, str), "no in YAML is false"
    assert path.name in STRATEGIES.values() and path.read_text().startswith("# ")


def test_zero3_hands_on_what_the_trainer_fills_in():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = resource_path("accelerate/zero3.yaml")
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "x.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    own = {
        name.removeprefix("ACCELERATE_"): value
        for name, value in environment.items()
        if name.startswith("ACCELERATE_") and name not in os.environ
    }
    assert (
        own["DEEPSPEED_ZERO_STAGE"] == "3"
        and own["DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        and own["DEEPSPEED_ZERO3_INIT"] == "true"
    )
    assert own["GRADIENT_ACCUMULATION_STEPS"] == own["GRADIENT_CLIPPING"] == "auto" and own["MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("content", [None, "", "- 1", "compute_environment: LOCAL_MACHINE", "a: [", "\x00"])
def test_an_unreadable_configuration_is_one_line(content, monkeypatch, tmp_path):
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    line = one_line(accelerate_strategy)
    assert (
        "PSYCOPREF_ACCELERATE" in line
        and missing_accelerate(PAPER) == [line]
        and "with DDP" in missing_policy_gpu(PAPER)[0]
    )


# ---- disk ----


@given(st.integers(1, 20), st.one_of(st.none(), st.integers(1, 25)), st.sampled_from(["reset", "keep"]))
def test_disk_counts_what_is_kept(iterations, keep, optimiser):
    profile = load_profile(
        "paper", {"dpo_iter.iterations": iterations, "dpo_iter.keep_last": keep, "dpo_iter.optimiser": optimiser}
    )
    found, size = disk_bytes(profile, plan_sizes(PAPER, 26_483), EIGHT), parameters(EIGHT)
    kept = iterations if keep is None else min(iterations, keep + 1)
    assert found == {
        "offline": 9 * 4 * size,
        "online": kept * size * (12 if optimiser == "keep" else 4),
        "arms": 2 * 9 * 4 * size,
        "training": 36 * size,
    }


def test_a_checkpoint_has_the_bytes_that_the_plan_says(tmp_path):
    "What a full training writes: weights and both moments, in float32."
    import torch

    model = load_causal_lm(find_weights("random-tiny"), "float32")
    optimiser, size = torch.optim.AdamW(model.parameters(), lr=1e-5), sum(p.numel() for p in model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path)
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    stored = sum(path.stat().st_size for pattern in ("*.safetensors", "*.pt") for path in tmp_path.glob(pattern))
    assert stored == pytest.approx(12 * size, rel=0.05)


def test_a_disk_that_is_too_small_is_said(monkeypatch, sizes):
    def lines(free):
        monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(free=free))
        return [line for line in missing_for_policies(PAPER, sizes) if line.startswith("disk")]

    need = policy_plan.total_disk(PAPER, sizes)
    assert lines(need) == [] and "dpo_iter.keep_last" in lines(need - 1e9)[0]


# ---- what goes together, what is here ----


def test_the_engine_is_looked_for_and_not_opened(monkeypatch):
    profiles = {engine: load_profile("paper", {"dpo_iter.engine": engine}) for engine in ("local", "vllm", "server")}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert (
        missing_engine(profiles["local"]) == []
        and "pip install vllm" in missing_engine(profiles["vllm"])[0]
        and "'vllm'" in missing_engine(profiles["server"])[0]
    )
    monkeypatch.setenv("PSYCOPREF_SERVE", "'/opt/my serve' {model} --port {port}")
    assert (
        "/opt/my serve" in missing_engine(profiles["server"])[0]
        and "PSYCOPREF_SERVE" in missing_engine(profiles["server"])[0]
    )
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert missing_engine(profiles["server"]) == []
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", "http://10.0.0.1:8000/v1")
    assert "not checked from here" in missing_engine(profiles["server"])[0] and missing_engine(profiles["local"]) == []
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", "10.0.0.1:8000")
    assert "expected an address" in missing_engine(profiles["server"])[0]


def test_adapters_are_not_sharded_and_deepspeed_is_looked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path("accelerate/zero3.yaml")))
    assert "deepspeed is not installed" in missing_accelerate(PAPER)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert missing_accelerate(PAPER) == [] and "reward.lora.rank" in missing_accelerate(DEMO)[0]
    assert "dpo.lora.rank" in missing_accelerate(load_profile("paper", {"dpo.lora.rank": 4}))[0]
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path("accelerate/ddp.yaml")))
    assert missing_accelerate(DEMO) == []


def test_the_plan_prints_it():
    text = plan_text(PAPER, 26_483)
    assert (
        "Memory for policies" in text
        and "Disk for policies" in text
        and "Watching: 25 points" in text
        and "Memory for policies" not in plan_text(DEMO)
    )
    assert max(len(line) for line in text.splitlines() if not line.startswith("  vllm serve ")) <= TABLE_WIDTH
