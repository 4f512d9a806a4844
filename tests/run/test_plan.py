"""The plan counts what the stages do, prices it as the gateway books it, asks no network, and says what is missing."""

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core import stages as config
from psycopref.core.paper import resource_path
from psycopref.core.prompts import rating_prompt
from psycopref.core.settings import DEMO, PAPER, PROFILES, StudyError, load_profile
from psycopref.core.stages import cache_root
from psycopref.corpus.general import GENERAL_COLUMNS
from psycopref.gateway.batches import BatchModel
from psycopref.gateway.servers import OpenAIModel
from psycopref.models.chat import ChatReply
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from psycopref.run import plan
from psycopref.run.plan import Work, characters_per_token, gpu_hours, missing, missing_accelerate, parameters
from psycopref.run.plan import plan_run, plan_text, usd
from psycopref.training.texts import pair_rows, step_plan

GPT_4O, QWEN = "openai:gpt-4o-2024-08-06", "Qwen/Qwen2.5-7B-Instruct"
THREE, EIGHT = PAPER.backbones


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No name is looked up, nothing is connected to, and the hub's cache is empty."""

    def refuse(*arguments, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for owner, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)


def demo_speeches():
    return [json.loads(line)["speech"] for line in resource_path("demo_speeches.jsonl").read_text().splitlines()]


def stage_rows(profile, stage, speeches=1000):
    return [row for row in plan_run(profile, speeches).work() if row.stage == stage]


# ---- tokens ----


def words_file(path):
    """A tokenizer that counts words, cut at three and padded to five."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(3)
    made.enable_padding(length=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))


def test_a_tokenizer_that_is_here_is_measured_and_none_is_fetched(offline, tmp_path):
    place = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct"
    words_file(place / "snapshots" / ("a" * 40) / "tokenizer.json")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    words = sum(map(len, demo_speeches())) / sum(len(text.split()) for text in demo_speeches())
    for who in (f"openai:{QWEN}@http://127.0.0.1:8000/v1", f"local:{QWEN}", f"{QWEN}@{'a' * 40}"):
        assert characters_per_token(who) == (pytest.approx(words), "its own tokenizer")
        assert characters_per_token(who, measure=False) == (4.1, "±15%")
    for who in (f"{QWEN}@{'b' * 40}", "local:Qwen/Other", "local:no-such-name", "./nowhere"):
        assert characters_per_token(who)[1] != "its own tokenizer", who


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0", "model": {"type": "Magic"}}', "\x00\x01"])
def test_a_broken_tokenizer_file_is_an_estimate(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert characters_per_token(f"local:{tmp_path}") == (4.1, "±15%")


def test_a_family_s_constant_is_within_its_range():
    find_weights("random-tiny")
    for who in ("random-tiny", "smollm2-135m"):
        (measured, how), (assumed, off) = characters_per_token(who), characters_per_token(who, measure=False)
        if how == "its own tokenizer":
            assert abs(measured / assumed - 1) <= int(off[1:-1]) / 100, who
    tokenizer, count = load_tokenizer(find_weights("random-tiny")), 0
    for text in demo_speeches():
        count += len(tokenizer(text, add_special_tokens=False).input_ids)
    assert characters_per_token("random-tiny")[0] == pytest.approx(sum(map(len, demo_speeches())) / count)


def test_a_filled_prompt_has_the_length_that_the_plan_expects():
    speeches, exact, characters = demo_speeches(), [], 0
    for i in range(0, 60, 5):
        exact += [len(rating_prompt(key, speeches[i], speeches[i + 1 : i + 5])) for key in plan.mode_calls("principle")]
        characters += sum(map(len, speeches[i : i + 5]))
    found, _ = plan.filled_characters("principle", round(characters / 60), round(characters / 60 / 4))
    assert found == pytest.approx(np.mean(exact), rel=0.02)


def test_a_pair_has_the_tokens_that_training_computes():
    "The prompt once and both answers: rows as the trainer gets them, against the plan."
    speeches = demo_speeches()
    answers = [" ".join(speeches[i : i + 8])[:1400] for i in range(0, 80, 4)]
    texts = {"question": speeches[100:110], "chosen": answers[:10], "rejected": answers[10:]}
    pairs = pd.DataFrame({"ID": "a", "prefID": range(10), **texts})
    rows, long = pair_rows(pairs, load_tokenizer(find_weights("random-tiny")), 4096)
    sizes = replace(plan_run(PAPER, 10, measure=True), characters=round(pairs.question.str.len().mean()))
    assert not long and sizes.pair(1024, "random-tiny") == pytest.approx(np.mean([r["length"] for r in rows]), rel=0.06)


def test_no_plan_asks_the_network(offline):
    for name in PROFILES:
        text = plan_text(load_profile(name))
        assert max(map(len, re.split(r"\n[a-zM]", text.partition("\nAssumptions")[2])[0].splitlines())) <= 110


def test_importing_the_plan_stays_light():
    heavy = ("pandas", "torch", "transformers", "trl", "huggingface_hub", "matplotlib")
    code = f"import sys, psycopref.run.plan; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- money and hours ----


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_a_batch_costs_in_the_plan_what_the_gateway_books(monkeypatch, factor):
    table = json.loads(resource_path("prices.json").read_text())
    table["batch_discount"]["factor"] = factor
    for module in ("run.plan", "gateway.servers"):
        monkeypatch.setattr(f"psycopref.{module}.prices", lambda: table)
    for model in (OpenAIModel("gpt-4o"), BatchModel("gpt-4o")):
        work = Work("s", "w", model.uri, 1, 1000, 100)
        assert usd(work) == pytest.approx(model.cost(ChatReply("", "stop", 1000, 100)))
    rows = plan_run(PAPER, 1000).work()
    batched = sum(usd(row) or 0 for row in rows if row.stage == "03_ratings" or "battles" in row.what)
    assert f"cost {(1 - factor) * batched:,.2f} less" in plan.money_lines(PAPER, rows)[1]


@pytest.mark.parametrize("uri", ["rules:rubric", "local:smollm2-135m", "openai:new-model", "openai:r@https://e.org/v1"])
def test_who_has_no_price_saves_nothing(uri):
    profile = load_profile("paper", {"ratings.rater": uri, "evaluation.judge": uri})
    assert len(plan.money_lines(profile, plan_run(profile, 100).work())) == 1


def test_the_paper_s_profile_keeps_its_budget():
    rows = plan_run(PAPER, 26_483).work()
    watched = sum(usd(row) or 0 for row in rows if row.what.startswith("watch"))
    assert sum(usd(row) or 0 for row in rows) < PAPER.budget_usd and 0 < watched < 100
    assert not any(usd(row) for row in plan_run(DEMO).work())


def test_hidden_reasoning_is_counted_at_its_most():
    [row] = [row for row in stage_rows(PAPER, "02_responses", 2000) if "hidden" in row.what]
    assert (row.who, row.calls, row.tokens_out) == ("openai:o1-mini", 400, 400 * (350 + 4096))


@pytest.mark.parametrize(
    "changed",
    [
        {"dpo_iter.max_tokens": 100},
        {"dpo_iter.candidates": 4},
        {"dpo_iter.iterations": 8},
        {"dpo.epochs": 1.0},
        {"watch.speeches": 10},
        {"dpo_iter.engine": "server"},
        {"plan.gpu": "B200"},
        {"plan.tokens_local": 3000.0},
    ],
)
def test_a_cheaper_setting_is_cheaper(changed):
    def hours(profile):
        rows = stage_rows(profile, "06_policy", 26_483) + stage_rows(profile, "08_ablations", 26_483)
        return sum(gpu_hours(row, profile.plan) for row in rows)

    assert hours(load_profile("paper", changed)) < hours(PAPER)


def test_every_scorer_of_table_1_has_a_row(tmp_path):
    from safetensors.numpy import save_file

    save_file({"layer": np.zeros((300, 100)), "score": np.zeros((1, 100))}, tmp_path / "model-1.safetensors")
    save_file({"layer2": np.zeros((300, 100))}, tmp_path / "model-2.safetensors")
    names = ["nemotron-70b", "skywork-gemma-27b", str(tmp_path), "me/unknown"]
    rows = {row.who: row for row in stage_rows(load_profile("paper", {"reward.scorers": names}), "05_reward")}
    hours = [gpu_hours(replace(rows[name], tokens_in=10**6), PAPER.plan) for name in names]
    assert parameters(str(tmp_path)) == 60_100 and hours[3] == 0
    assert hours[0] / hours[1] == pytest.approx(70 / 27) and hours[2] / hours[0] == pytest.approx(60_100 / 70e9)
    assert plan.unknown_costs(rows.values()) == ["the size of me/unknown"]


@pytest.mark.parametrize("content", [b"", b"half", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_broken_folder_has_no_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert parameters(str(tmp_path)) is None and parameters(str(tmp_path / "nowhere")) is None


# ---- counts ----


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from([0.5, 1.0, 1.7, 3.0]), st.integers(0, 6))
def test_a_training_has_the_steps_and_looks_of_the_trainer(pairs, batch, epochs, checkpoints):
    settings = replace(DEMO.dpo, batch_size=batch, epochs=epochs, checkpoints=checkpoints)
    if pairs < batch:
        return
    found = step_plan([10] * pairs, settings, 0)
    steps, looks = plan.training_steps(pairs, batch, epochs, checkpoints)
    points = {*range(found["every"], steps + 1, found["every"]), steps}
    assert steps == found["steps"] and looks == len(points) <= max(1, checkpoints)


@pytest.mark.parametrize(
    "iterations, speeches, answers, judged", [(1, 1, 1, True), (9, 400, 4, False), (3, 50, 2, True)]
)
def test_watching_is_counted_answer_by_answer(iterations, speeches, answers, judged):
    changed = {"dpo_iter.iterations": iterations, "watch.speeches": speeches, "watch.answers": answers}
    found = plan_run(load_profile("paper", {**changed, "watch.judged": judged}), 2000)
    some, points, rows = min(speeches, found.dev), 1 + found.offline_steps()[1] + iterations, found.watching()
    every = points * some * answers
    assert [row.calls for row in rows if row.who in PAPER.backbones] == [every, every + some] * 2
    assert [row.calls for row in rows if "reference" in row.what] == [some], "asked once, whatever the backbones"
    assert [row.calls for row in rows if "battles" in row.what] == ([2 * every] if judged else [])


@pytest.mark.parametrize("asked", [1, 100, 900, 10**6])
def test_the_arms_are_equal_and_no_larger_than_what_there_is(asked):
    profile = load_profile("paper", {"ablation.pairs": asked})
    found = plan_run(profile, 1000)
    n, steps, _ = found.arm_size()
    rows = found.ablation()
    assert n == min(asked, found.train_pairs) and rows[0].calls == asked * profile.dpo_iter.candidates
    assert rows[2].what == rows[3].what == f"an arm: {steps:,} steps × 64 pairs"


def test_the_grid_is_counted_cell_by_cell(offline):
    changed = {"mixing.cells": ["half", "both-all"], "mixing.general": "demo", "mixing.rule": "helpfulness"}
    found = plan_run(load_profile("paper", {**changed, "mixing.reward_bench": ""}))
    rows = found.mixing()
    assert [row.who for row in rows] == [name for name in PAPER.backbones for _ in range(3)]
    assert rows[2].calls == 3 * 2 * (found.test_pairs + found.general["test"]), "two cells and the model of chapter 5"
    hours = [gpu_hours(row, PAPER.plan) for row in rows]
    assert hours[1] > hours[0] and hours[4] / hours[1] == pytest.approx(8.03 / 3.21)


def test_general_pairs_that_are_here_are_counted(offline, tmp_path):
    rows = [
        dict(zip(GENERAL_COLUMNS, (f"Count to {i}.", text, rating, 3, 3, 2, 2)))
        for i in range(40)
        for text, rating in (("Yes.", 4), ("No, I won't.", 4 if i % 4 == 0 else 1))
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan_run(load_profile("demo", {"mixing.general": f"own={tmp_path / 'own.jsonl'}"})).general
    assert found["train"] + found["dev"] + found["test"] == 30 and found["test"] and found["dev"], "ties make no pair"
    assert found["characters"] == round(np.mean([len(f"Count to {i}.Yes.No, I won't.") for i in range(40) if i % 4]))
    lost = load_profile("demo", {"mixing.general": "own=/nowhere", "mixing.reward_bench": "/nowhere"})
    assert plan_run(lost).general == plan.HELPSTEER2
    lines = " ".join(missing(lost))
    assert "general pairs 'own': needs a local copy" in lines and "RewardBench: needs a local copy" in lines
    assert "mixing.rule" in one_line(lambda: plan_run(load_profile("demo", {"mixing.rule": "80b"})))


def test_other_judges_are_counted_as_the_stage_asks_them():
    from psycopref.evaluation.judging import contests, distinct_texts

    others = ["reward", "choose:local:smollm2-135m", "rules:rubric", "longer"]
    profile = load_profile("paper", {"judges.speeches": 5, "judges.others": others})
    policies = [f"{backbone} {kind}" for backbone in profile.backbones for kind in range(plan.POLICIES)]
    speeches = pd.DataFrame({"speech_id": [f"s{i}" for i in range(5)], "speech": "Hm."})
    answers = [
        {"speech_id": own, "policy": name, "setting": setting, "response": f"{own} {name} {setting}"}
        for own in speeches.speech_id
        for name in ("reference", *policies)
        for setting in (("free",) if name == "reference" else ("free", "length"))
    ]
    asked = contests(speeches, pd.DataFrame(answers))
    score, choose, battles = stage_rows(profile, "10_judges")
    assert choose.calls == battles.calls == len(asked), "the baseline is no work"
    assert score.calls == sum(map(len, distinct_texts(asked).values()))
    alone = load_profile("paper", {"judges.others": [PAPER.evaluation.judge, "longer"]})
    assert stage_rows(alone, "10_judges") == []


def test_every_stage_that_works_has_a_line():
    for name in PROFILES:
        stages = dict.fromkeys(row.stage for row in plan_run(load_profile(name), 500).work())
        assert list(stages) == [stage for stage in config.STAGES if stage not in ("00_study", "13_report")]


# ---- memory and disk ----


def test_training_holds_and_writes_the_bytes_that_the_plan_says(tmp_path):
    import torch

    model = load_causal_lm(find_weights("random-tiny"), "float32")
    optimiser, own = torch.optim.AdamW(model.parameters(), lr=1e-5), list(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimiser.step()
    moments = (state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq"))
    size, held = sum(p.numel() for p in own), [*own, *(p.grad for p in own), *moments]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 16 * size
    model.save_pretrained(tmp_path)
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    stored = sum(path.stat().st_size for pattern in ("*.safetensors", "*.pt") for path in tmp_path.glob(pattern))
    assert stored == pytest.approx(12 * size, rel=0.05)


@given(
    st.sampled_from([THREE, EIGHT]), st.sampled_from(["FSDP2", "ZeRO-3"]), st.integers(1, 64), st.integers(512, 9999)
)
def test_shards_shrink_with_gpus_and_activations_with_the_pass(name, strategy, gpus, tokens):
    size = parameters(name)
    one, more, longer = (
        plan.training_bytes(size, strategy, n, t) for n, t in ((gpus, tokens), (2 * gpus, tokens), (gpus, 2 * tokens))
    )
    assert more < one < longer and one - more >= 7.9 * size / gpus > 0
    assert plan.training_bytes(size, "DDP", gpus, tokens) >= 18 * size


def test_a_sharded_policy_loads_its_reference_beside_it():
    for strategy, model, copies in (
        ("DDP", "dpo", 1),
        ("FSDP2", "dpo", 2),
        ("ZeRO-3", "dpo", 2),
        ("FSDP2", "reward", 1),
    ):
        phases = plan.memory_phases(PAPER, EIGHT, model, strategy, 8)
        [loading] = [need for phase, need in phases.items() if phase.startswith("loading")]
        assert loading == copies * 4 * parameters(EIGHT)
    base = load_profile("paper", {"dpo_iter.reference": "base"})
    assert plan.memory_phases(base, EIGHT, "dpo", "DDP", 1)["loading, with the reference"] == 8 * parameters(EIGHT)
    adapters = load_profile("paper", {"dpo.lora.rank": 16})
    assert plan.memory_phases(adapters, EIGHT, "dpo", "DDP", 1)["loading, with the reference"] == 4 * parameters(EIGHT)


def test_the_remedy_is_what_the_machine_allows(monkeypatch):
    def said(*gigabytes, **changed):
        monkeypatch.setattr(plan, "gpu_memory", lambda: [int(1e9 * n) for n in gigabytes])
        return " ".join(plan.missing_memory(load_profile("paper", {"reward.scorers": [], **changed})))

    assert "none here" in said() and said(*[190] * 8) == "" and "DDP" in said(141)
    assert "fsdp2.yaml" in said(*[80] * 4) and "zero3.yaml" in said(*[80] * 4) and "as a policy" in said(*[80] * 4)
    assert "dpo.lora.rank" in said(60) and said(60, **{"dpo.lora.rank": 16, "reward.lora.rank": 16}) == ""
    for strategy in ("fsdp2", "zero3"):
        monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path(f"accelerate/{strategy}.yaml")))
        assert said(*[80] * 4) == "" and "as a policy takes 64 GB" in said(*[50] * 8)


@given(st.integers(1, 20), st.one_of(st.none(), st.integers(1, 25)), st.sampled_from(["reset", "keep"]))
def test_disk_counts_what_is_kept(iterations, keep, optimiser):
    changed = {"dpo_iter.iterations": iterations, "dpo_iter.keep_last": keep, "dpo_iter.optimiser": optimiser}
    found = plan_run(load_profile("paper", {**changed, "backbones": [EIGHT]}), 26_483).disk_bytes()
    size, kept = parameters(EIGHT), iterations if keep is None else min(iterations, keep + 1)
    online = kept * size * (12 if optimiser == "keep" else 4)
    assert found == {"offline": 36 * size, "online": online, "arms": 2 * 36 * size, "training": 36 * size}


def test_a_disk_that_is_too_small_is_said(monkeypatch, offline):
    def lines(free):
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
        return [line for line in missing(PAPER) if line.startswith("disk")]

    need = sum(plan_run(PAPER).disk_bytes().values())
    assert lines(need) == [] and "dpo_iter.keep_last" in lines(need - 1e9)[0]


# ---- what is here ----


def test_the_engine_is_looked_for_and_not_opened(monkeypatch):
    local, vllm, server = (load_profile("paper", {"dpo_iter.engine": name}) for name in ("local", "vllm", "server"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert plan.missing_engine(local) == [] and "pip install vllm" in plan.missing_engine(vllm)[0]
    assert "'vllm'" in plan.missing_engine(server)[0]
    monkeypatch.setenv("PSYCOPREF_SERVE", "'/opt/my serve' {model} --port {port}")
    assert "/opt/my serve" in plan.missing_engine(server)[0]
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert plan.missing_engine(server) == []
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", "http://10.0.0.1:8000/v1")
    assert "not checked" in plan.missing_engine(server)[0] and plan.missing_engine(local) == []


def test_keys_prices_weights_and_tokens_are_named_with_their_remedy(offline, tmp_path):
    others = ["openai:another-model", "reward:owner/model", "choose:openai:served/model@http://127.0.0.1:8000/v1"]
    changed = {
        "judges.others": [*others, "reward:./nowhere"],
        "reward.push_to_hub": "me/mine",
        "dpo.push_to_hub": "me/ours",
    }
    said = " ".join(missing(load_profile("demo", {**changed, "reward.scorers": ["psychocounsel-8b", str(tmp_path)]})))
    for words in (
        "OPENAI_API_KEY is not set: another-model",
        "a price for another-model",
        "owner/model comes from the hub: no token found",
        "Psychotherapy-LLM/PsychoCounsel-Llama3-8B-Reward comes from the hub: no token found",
        "a server at http://127.0.0.1:8000/v1 for model",
        "weights './nowhere'",
        f"weights {str(tmp_path)!r}",
        "reward.push_to_hub: 'me/mine' needs a token",
        "dpo.push_to_hub: 'me/ours' needs a token",
    ):
        assert words in said, words
    judges = load_profile("demo", {"judges.others": ["rewards"]})
    assert "Did you mean reward" in one_line(lambda: plan_text(judges))
    (tmp_path / "model.safetensors").touch()
    assert plan.missing_weights([str(tmp_path)]) == []


def test_sources_that_are_not_here_are_named(offline):
    text = " ".join(plan_text(load_profile("paper", {"speeches.sources": ["therapistQA", "demo"]})).split())
    assert "source 'therapistQA': needs a local copy" in text and "the paper's count over its seven sources" in text
    with pytest.raises(StudyError, match="found 0 client speeches"):
        plan_run(PAPER, 0)
    assert cache_root().exists()


def test_an_accelerate_file_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    profile = load_profile("paper", {"reward.lora.rank": 8})
    assert missing_accelerate(profile) == []
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(tmp_path / "none.yaml"))
    [line] = missing_accelerate(profile)
    assert "none.yaml" in line
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path("accelerate/fsdp2.yaml")))
    [line] = missing_accelerate(profile)
    assert "FSDP2" in line and "reward.lora.rank" in line and missing_accelerate(load_profile("paper")) == []
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path("accelerate/zero3.yaml")))
    assert "reward.lora.rank" in missing_accelerate(profile)[0]


def test_too_few_pairs_for_a_cell_or_a_batch_are_named():
    few = plan_run(load_profile("paper"), 200)
    said = " ".join(few.too_few_pairs())
    assert "cell psy asks for 10,000 pairs" in said and "dpo.batch_size" not in said
    assert plan_run(load_profile("paper"), 26_483).too_few_pairs() == []
    assert "reward.batch_size" in " ".join(plan_run(load_profile("paper"), 60).too_few_pairs())
