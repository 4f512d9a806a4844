"""The plan counts what the stages do, prices it as the gateway books it, asks no network, and says what is missing."""

import datetime
import json
import re
import shlex
import socket
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.paper import resource_path
from psycopref.core.prompts import rating_prompt
from psycopref.core.settings import DEMO, PAPER, PROFILES, load_profile
from psycopref.corpus.general import GENERAL_COLUMNS
from psycopref.evaluation.judging import contests, distinct_texts
from psycopref.feedback.pool import POOLS
from psycopref.experiments.policies import check_trainings
from psycopref.gateway.batches import BatchModel
from psycopref.gateway.servers import OpenAIModel
from psycopref.models.chat import ChatReply
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.run import plan
from psycopref.run.plan import Work, gpu_hours, missing, parameters, plan_run, plan_text, usd
from psycopref.training.texts import pair_rows, step_plan

THREE, EIGHT = PAPER.backbones
SPEECHES = [json.loads(line)["speech"] for line in resource_path("demo_speeches.jsonl").read_text().splitlines()]


@pytest.fixture
def offline(monkeypatch):
    """No name is looked up, nothing is connected to, and nobody is logged in."""

    def refuse(*arguments, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for owner, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)


def paper(speeches=1000, **changed):
    """A plan of the paper's profile, settings changed as in reward__epochs=1."""
    return plan_run(load_profile("paper", {name.replace("__", "."): own for name, own in changed.items()}), speeches)


def stage_rows(found, *stages):
    return [row for row in found.work() if row.stage in stages]


# ---- tokens ----


def test_characters_of_a_token_are_within_the_range_that_is_said():
    tokenizer = load_tokenizer(find_weights("random-tiny"))
    count = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in SPEECHES)
    assumed, off = plan.characters_per_token("random-tiny")
    assert abs(sum(map(len, SPEECHES)) / count / assumed - 1) <= off / 100


def test_a_filled_prompt_has_the_length_that_the_plan_expects():
    shown = [SPEECHES[i : i + 5] for i in range(0, 60, 5)]
    exact = [len(rating_prompt(key, own[0], own[1:])) for own in shown for key in plan.mode_calls("principle")]
    characters = np.mean([len(text) for own in shown for text in own])
    assert plan.filled_characters("principle", round(characters), round(characters / 4))[0] == pytest.approx(
        np.mean(exact), rel=0.02
    )


def test_a_pair_has_the_tokens_that_training_computes():
    "The prompt once and both answers: rows as the trainer gets them, against the plan."
    answers = [" ".join(SPEECHES[i : i + 8])[:1400] for i in range(0, 80, 4)]
    texts = {"question": SPEECHES[100:110], "chosen": answers[:10], "rejected": answers[10:]}
    pairs = pd.DataFrame({"ID": "a", "prefID": range(10), **texts})
    rows, long = pair_rows(pairs, load_tokenizer(find_weights("random-tiny")), 4096)
    sizes = replace(paper(10), characters=round(pairs.question.str.len().mean()))
    assert not long and sizes.pair("random-tiny") == pytest.approx(np.mean([r["length"] for r in rows]), rel=0.2)


def test_no_plan_asks_the_network(offline):
    for name in PROFILES:
        text = plan_text(load_profile(name))
        assert max(map(len, re.split(r"\n[a-zM]", text.partition("\nAssumptions")[2])[0].splitlines())) <= 110


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
    rows = paper().work()
    batched = sum(usd(row) or 0 for row in rows if row.stage == "03_ratings" or "battles" in row.what)
    assert f"cost {(1 - factor) * batched:,.2f} less" in plan.money_lines(PAPER, rows)[1]


@pytest.mark.parametrize("uri", ["rules:rubric", "local:smollm2-135m", "openai:new-model", "openai:r@https://e.org/v1"])
def test_who_has_no_price_saves_nothing(uri):
    found = paper(100, ratings__rater=uri, evaluation__judge=uri)
    assert len(plan.money_lines(found.profile, found.work())) == 1


@pytest.mark.parametrize("name", ["judge-9", "lab/judge-9"])
def test_a_second_judge_elsewhere_has_the_cost_that_its_gateway_books_or_is_named_as_not_counted(monkeypatch, name):
    place, table = f"{name}@https://e.org/v1", json.loads(resource_path("prices.json").read_text())
    for module in ("run.plan", "gateway.servers"):
        monkeypatch.setattr(f"psycopref.{module}.prices", lambda: table)
    found = paper(evaluation__second_judge=f"openai:{place}")
    [row] = [row for row in found.battles() if row.what == "battles, second judge"]
    assert usd(row) is None and plan.unknown_costs([row]) == [f"the price of {name}"] and not gpu_hours(row, PAPER.plan)
    saved = plan.money_lines(found.profile, found.work())[1:]
    table["models"][place] = {"input": 3.0, "output": 15.0}
    cost = OpenAIModel(place).cost(ChatReply("", "stop", row.tokens_in, row.tokens_out))
    assert usd(row) == pytest.approx(cost) and cost > 10 and not plan.unknown_costs([row])
    assert plan.money_lines(found.profile, found.work())[1:] == saved, "no batches there"


def test_the_paper_s_profile_keeps_its_budget():
    rows = paper(26_483).work()
    watched = sum(usd(row) or 0 for row in rows if row.what.startswith("watch"))
    assert sum(usd(row) or 0 for row in rows) < PAPER.budget_usd and 0 < watched < 100
    assert not any(usd(row) for row in plan_run(DEMO).work())


@pytest.mark.parametrize("asked", [{"pairs__safety": "veto"}, {"ablation__veto": True}])
def test_a_veto_without_a_principle_about_safety_is_refused_before_anything_is_paid(asked, marked):
    own = marked()
    assert "set pairs.safety to average" in one_line(lambda: paper(principles=own, **asked))
    plain = paper(principles=own, ablation__veto=False)
    arms = [row.what.partition(":")[0] for row in plain.ablation() if " arm" in row.what]
    assert arms == ["offline arm", "online arm"] * 2 and not any("safety" in row.what for row in plain.ablation())


CHEAPER = {"dpo_iter.max_tokens": 100, "dpo_iter.candidates": 4, "dpo_iter.iterations": 8, "dpo.steps": 800}
CHEAPER |= {
    "dpo_iter.steps": 50,
    "watch.speeches": 10,
    "dpo_iter.engine": "vllm",
    "plan.gpu": "B200",
    "plan.tokens_local": 3000.0,
}


@pytest.mark.parametrize("name, value", [*CHEAPER.items(), ("ablation.pairs", 100)])
def test_a_cheaper_setting_is_cheaper(name, value):
    def hours(profile):
        rows = stage_rows(plan_run(profile, 26_483), "06_policy", "08_ablations")
        return sum(gpu_hours(row, profile.plan) for row in rows)

    assert hours(load_profile("paper", {name: value})) < hours(PAPER)


def test_every_scorer_of_table_1_has_a_row(tmp_path):
    from safetensors.numpy import save_file

    save_file({"layer": np.zeros((300, 100)), "score": np.zeros((1, 100))}, tmp_path / "model-1.safetensors")
    save_file({"layer2": np.zeros((300, 100))}, tmp_path / "model-2.safetensors")
    names = ["nemotron-70b", "skywork-gemma-27b", str(tmp_path), "me/unknown"]
    rows = {row.who: row for row in stage_rows(paper(reward__scorers=names), "05_reward")}
    hours = [gpu_hours(replace(rows[name], tokens_in=10**6), PAPER.plan) for name in names]
    assert parameters(str(tmp_path)) == 60_100 and hours[3] == 0
    assert hours[0] / hours[1] == pytest.approx(70 / 27) and hours[2] / hours[0] == pytest.approx(60_100 / 70e9)
    assert plan.unknown_costs(rows.values()) == ["the size of me/unknown"]


def test_the_rankers_of_table_1_are_counted_and_served_on_machines_of_ours(offline):
    rows = [row for row in paper().rewards() if row.what == "rank test pairs"]
    assert [row.who for row in rows] == list(PAPER.reward.rankers) and len(rows) == 4
    assert len({row.calls for row in rows}) == 1 and all(row.calls and row.tokens_in for row in rows)
    assert [usd(row) is None for row in rows] == [True] * 3 + [False], "a server of ours has no list price"
    assert all(gpu_hours(row, PAPER.plan) > 0 for row in rows[:3]) and not plan.unknown_costs(rows)
    said = plan.missing_models(plan.asked_uris(PAPER), PAPER.reward.rankers)
    for row in rows[:3]:
        [line] = [line for line in said if row.who.partition("@")[2] in line]
        assert "its row of Table 1" in line and plan.short_names([row.who]) in line
        [command] = [line for line in plan.serve_commands(PAPER) if f"--port {row.who[-7:-3]} " in line]
        assert row.who.partition(":")[2].partition("@")[0] in command
    [pool] = [line for line in said if ":8000" in line]
    assert "Table 1" not in pool, "the pool can't be left out"
    released = load_profile("paper", {"speeches.sources": ["released"]})
    assert len(plan.serve_commands(released)) == 3
    [bare] = plan.missing_models(["openai:google/gemma-2-9b-it"])
    assert "openai:google/gemma-2-9b-it@http" in bare and "OPENAI_API_KEY" not in bare


def test_the_reward_models_are_looked_at_more_than_twice_an_epoch_where_it_is_short():
    steps, looks = plan.training_steps(145, DEMO.reward.batch_size, DEMO.reward.epochs, DEMO.reward.checkpoints)
    assert steps == 36 and looks == DEMO.reward.checkpoints > 2 * DEMO.reward.epochs


@pytest.mark.parametrize("content", [b"", b"half", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_broken_folder_has_no_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert parameters(str(tmp_path)) is None and parameters(str(tmp_path / "nowhere")) is None


# ---- counts ----


EPOCHS, STEPS = st.sampled_from([0.5, 1.0, 1.7, 3.0]), st.none() | st.integers(1, 60)


@given(st.integers(9, 200), st.integers(1, 9), EPOCHS, st.integers(0, 6), STEPS)
def test_a_training_has_the_steps_and_looks_of_the_trainer(pairs, batch, epochs, checkpoints, counted):
    settings = replace(DEMO.dpo, batch_size=batch, epochs=epochs, steps=counted, checkpoints=max(1, checkpoints))
    found = step_plan([10] * pairs, settings, 0)
    steps, looks = plan.training_steps(pairs, batch, epochs, checkpoints, counted)
    assert counted in (None, steps)
    points = {*range(found["every"], steps + 1, found["every"]), steps}
    assert steps == found["steps"] and looks == len(points) <= max(1, checkpoints)


@pytest.mark.parametrize("judged", [True, False])
def test_watching_is_counted_answer_by_answer(judged):
    changed = {"dpo_iter__iterations": 3, "watch__speeches": 50, "watch__answers": 2, "watch__judged": judged}
    changed |= {"reward__train_on": "train", "dpo__select": "reward", "dpo_iter__select": "reward"}
    rows, every = list(paper(2000, **changed).watching()), (1 + 8 + 3) * 50 * 2
    assert [row.calls for row in rows if row.who in PAPER.backbones] == [every, every + 50] * 2
    assert [row.calls for row in rows if "reference" in row.what] == [50], "asked once, whatever the backbones"
    assert [row.calls for row in rows if "battles" in row.what] == [2 * every] * judged


def test_a_reward_model_of_all_pairs_is_counted_with_the_development_pairs_and_looks_at_none():
    """The paper's 34,329 pairs in steps of 128, twice; 1,600 steps of 64 in both trainings of a policy."""
    works = [row.what for row in stage_rows(paper(26_483), "05_reward", "06_policy")]
    for said in ("train: 536 steps × 128 pairs", "DPO: 1,600 steps × 64 pairs", "DPO-Iter: 1,600 steps × 64 pairs"):
        assert works.count(said) == 2, said
    less = dict(reward__train_on="train", dpo__select="reward", dpo_iter__select="reward")
    for whole, part in zip(paper(26_483).cells().values(), paper(26_483, **less).cells().values(), strict=True):
        assert all(a >= b for a, b in zip(whole, part))
    counts = [found.reward_pairs()[:2] for found in (paper(26_483), paper(26_483, **less))]
    assert counts[0] == (34_329, 0) and sum(counts[1]) == 34_329 and counts[1][1] > 3000


def test_the_grid_is_counted_cell_by_cell(offline):
    changed = {"mixing__cells": ["half", "both-all"], "mixing__general": "demo", "mixing__rule": "helpfulness"}
    found = paper(26_483, mixing__reward_bench="", **changed)
    rows = list(found.mixing())
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
    assert "general pairs for training (at most" in " ".join(plan_text(lost).split())
    lines = " ".join(missing(lost))
    assert "general pairs 'own': needs a local copy" in lines and "RewardBench: needs a local copy" in lines
    assert "mixing.rule" in one_line(lambda: plan_run(load_profile("demo", {"mixing.rule": "80b"})))


def test_other_judges_are_counted_as_the_stage_asks_them():
    others = ["reward", "choose:local:smollm2-135m", "rules:rubric", "longer"]
    policies = [f"{backbone} {kind}" for backbone in PAPER.backbones for kind in range(plan.POLICIES)]
    speeches = pd.DataFrame({"speech_id": [f"s{i}" for i in range(5)], "speech": "Hm."})
    answers = [
        {"speech_id": own, "policy": name, "setting": setting, "response": f"{own} {name} {setting}"}
        for own in speeches.speech_id
        for name in ("reference", *policies)
        for setting in (("free",) if name == "reference" else ("free", "length"))
    ]
    asked = contests(speeches, pd.DataFrame(answers))
    score, choose, battles = paper(judges__speeches=5, judges__others=others).judges()
    assert choose.calls == battles.calls == len(asked), "the baseline is no work"
    assert score.calls == sum(map(len, distinct_texts(asked).values()))
    assert list(paper(judges__others=[PAPER.evaluation.judge, "longer"]).judges()) == []


# ---- memory and disk ----


@pytest.mark.parametrize("model", ["reward", "dpo"])
@pytest.mark.parametrize("strategy", ["FSDP2", "ZeRO-3"])
def test_shards_shrink_with_gpus_and_activations_with_the_pass(model, strategy):
    def trained(gpus, tokens=16_384):
        one_pass = {f"{model}.pack_tokens": tokens, f"{model}.batch_size": 4}
        return plan.training_memory(load_profile("paper", one_pass), EIGHT, model, strategy, gpus)[1]

    for gpus in (1, 2, 4, 8, 32):
        assert trained(2 * gpus) < trained(gpus) < trained(gpus, 40_000)
        assert trained(gpus) - trained(2 * gpus) >= 7.9 * parameters(EIGHT) / gpus


BASE, ADAPTERS = {"dpo_iter.reference": "base"}, {"dpo.lora.rank": 16}
COPIES = [("DDP", "dpo", {}, 1), ("FSDP2", "dpo", {}, 2), ("ZeRO-3", "dpo", {}, 2), ("FSDP2", "reward", {}, 1)]


@pytest.mark.parametrize(
    "strategy, model, changed, copies", [*COPIES, ("DDP", "dpo", BASE, 2), ("DDP", "dpo", ADAPTERS, 1)]
)
def test_a_sharded_policy_loads_its_reference_beside_it(strategy, model, changed, copies):
    "Adapters load it too, both in 16 bits."
    loaded, _ = plan.training_memory(load_profile("paper", changed), EIGHT, model, strategy, 8)
    assert loaded == copies * 4 * parameters(EIGHT)


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


def test_eight_bits_are_missing_where_a_gpu_is(monkeypatch):
    profile = load_profile("tiny", {"evaluation.reference": "int8:random-tiny"})
    for gpus, expected in (([], 0), ([80 * 10**9], 1)):
        monkeypatch.setattr(plan, "gpu_memory", lambda: gpus)
        lines = [line for line in missing(profile) if "8 bits" in line]
        assert len(lines) == expected and all("write local:random-tiny" in line for line in lines)


@given(st.integers(1, 20), st.one_of(st.none(), st.integers(1, 25)), st.sampled_from(["reset", "keep"]))
def test_disk_counts_what_is_kept(iterations, keep, optimiser):
    changed = {"dpo_iter__iterations": iterations, "dpo_iter__keep_last": keep, "dpo_iter__optimiser": optimiser}
    found, size = paper(26_483, backbones=[EIGHT], **changed).disk_bytes(), parameters(EIGHT)
    kept = iterations if keep is None else min(iterations, keep + 1)
    online = kept * size * (12 if optimiser == "keep" else 4)
    assert found == {"offline": 36 * size, "online": online, "arms": 3 * 36 * size, "training": 36 * size}


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
    assert plan.missing_sampler(local) == [] and "pip install vllm" in plan.missing_sampler(vllm)[0]
    assert "'vllm'" in plan.missing_sampler(server)[0]
    for profile, word in ((vllm, "package vllm"), (server, "command 'vllm'")):
        line = one_line(lambda: check_trainings(profile, {"train_on": "train+dev"}))
        assert line.startswith("dpo_iter.engine: ") and word in line and "pip install vllm" in line
    monkeypatch.setenv("PSYCOPREF_SERVE", "'/opt/my serve' {model} --port {port}")
    assert "/opt/my serve" in plan.missing_sampler(server)[0]
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert plan.missing_sampler(server) == []
    check_trainings(server, {"train_on": "train+dev"})
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", "http://10.0.0.1:8000/v1")
    assert "not checked" in plan.missing_sampler(server)[0] and plan.missing_sampler(local) == []


def test_the_hours_are_those_of_the_engine_that_samples():
    def sampled(**changed):
        found = paper(26_483, **changed)
        [row] = [row for row in found.work() if "DPO-Iter: 102,400 × 8 answers" in row.what and "8B" in row.who]
        return row.what, gpu_hours(row, found.profile.plan), plan.clock_hours(row, found.profile.plan)

    found = {name: sampled(dpo_iter__engine=name) for name in ("local", "vllm", "server")}
    assert all(what.endswith(f"answers, {name}") for name, (what, _, _) in found.items())
    speeds, written = PAPER.plan, paper(26_483).policies()
    tokens = next(row.tokens_out for row in written if "answers" in row.what and "8B" in row.who)
    for name, (_, hours, clock) in found.items():
        writing = 8.03 / 8 * tokens / getattr(speeds, f"tokens_{name}") / 3600
        assert writing < hours < 1.1 * writing and hours / clock == pytest.approx(8 if name == "server" else 1)
    assert sampled() == found["server"], "the paper's profile samples on all GPUs"
    assert sampled(plan__gpu_count=4)[2] == pytest.approx(2 * found["server"][2])
    tested = [row for row in stage_rows(paper(26_483), "07_win_rates") if "policies" in row.what]
    assert tested and all(row.what.endswith(", local") for row in tested), "by models.local, whatever the engine"


def test_what_is_missing_is_named_with_its_remedy(offline, tmp_path):
    others = ["openai:another-model", "reward:owner/model", "choose:openai:served/model@http://127.0.0.1:8000/v1"]
    changed = {"judges.others": [*others, "reward:./nowhere"], "speeches.sources": ["therapistQA", "demo"]}
    changed |= {"reward.push_to_hub": "me/mine", "dpo.push_to_hub": "me/ours"}
    changed |= {"reward.scorers": ["psychocounsel-8b", str(tmp_path)]}
    said = " ".join(plan_text(load_profile("demo", changed)).split())
    for words in (
        "source 'therapistQA': needs a local copy",
        "the paper's count over its seven sources",
        "OPENAI_API_KEY is not set: another-model",
        "a price for another-model",
        "no token was found for it: Psychotherapy-LLM/PsychoCounsel-Llama3-8B-Reward, owner/model; where one is gated",
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


def test_the_plan_names_who_retires_when_and_what_to_do(offline):
    def said(day, **changed):
        profile = load_profile("paper", changed)
        return " ".join(plan_text(profile, 1000, today=lambda: datetime.date.fromisoformat(day)).split())

    ahead, late = said("2026-12-31"), said("2027-01-14")
    assert "gpt-4o-2024-08-06 is shut down on 2027-01-14, in 14 days; ask it before" in ahead
    assert "gpt-4o-2024-08-06 was shut down on 2027-01-14" in late and "responses.pool=paper-substitute" in late
    assert "o1-mini: shut down by OpenAI on 2025-10-27" in ahead and "15 of 20 members are asked" in ahead
    assert "o1-mini was shut down" in said("2026-12-31", **{"responses.leave_out": []})
    luna = dict.fromkeys(("ratings.rater", "evaluation.reference", "evaluation.judge"), "openai:gpt-6-luna")
    luna |= {"responses.pool": "paper-substitute", "judges.others": ["longer"], "reward.rankers": []}
    instead = said("2027-01-14", **luna)
    assert "was shut down" not in instead and "Not the paper's: GPT-6-luna, in the place of GPT-4o" in instead


SERVED = [own for own in POOLS["paper"] if "127.0.0.1" in own.model]


@pytest.mark.parametrize("member", SERVED, ids=lambda own: own.name)
def test_a_served_member_s_command_says_what_its_model_needs(member):
    words = shlex.split(plan.serve_command_of(member, 1024, 8))
    told = dict(zip(words, words[1:]))
    assert words[:3] == ["vllm", "serve", member.model.partition(":")[2].partition("@")[0]]
    assert told["--dtype"] == "bfloat16" and told["--generation-config"] == "vllm" and told["--port"] == "8000"
    assert plan.PROMPT_TOKENS + 1024 <= int(told["--max-model-len"]) <= member.serve.context
    alone = shlex.split(plan.serve_command_of(member, 1024, 1))
    assert "--data-parallel-size" not in alone and set(alone) <= set(words), "rankers stand beside one another"
    size, gpus = parameters(words[2]), int(told["--tensor-parallel-size"])
    assert 2 * size < 0.7 * 80e9 * gpus and (gpus == 1 or 2 * size > 0.7 * 40e9 * gpus)
    copies = 1 if "Jamba" in member.name else 8 // gpus  # its experts would be spread, not copied
    assert int(told.get("--data-parallel-size", 1)) == copies
    assert ("--trust-remote-code" in words) == member.serve.remote_code == (member.name in PAPER.responses.leave_out)
    assert ("<reserved_106>" in told.get("--chat-template", "")) == member.name.startswith("Baichuan2")
    assert member.serve.source != "not verified"


def test_an_accelerate_file_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    profile = load_profile("paper", {"reward.lora.rank": 8})
    assert plan.missing_accelerate(profile) == []
    for file, named in ((tmp_path / "none.yaml", "none.yaml"), ("fsdp2.yaml", "FSDP2"), ("zero3.yaml", "ZeRO-3")):
        monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path("accelerate") / file))
        [line] = plan.missing_accelerate(profile)
        assert named in line and ("reward.lora.rank" in line) is (named != "none.yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install deepspeed" in plan.missing_accelerate(PAPER)[0]


def test_too_few_pairs_for_a_cell_or_a_batch_are_named():
    said = " ".join(paper(200).too_few_pairs())
    assert "cell psy asks for 10,000 pairs" in said and "dpo.batch_size" not in said
    assert paper(26_483).too_few_pairs() == [] and "reward.batch_size" in " ".join(paper(60).too_few_pairs())


def test_the_environment_s_budget_is_the_plan_s(monkeypatch):
    monkeypatch.setenv("BUDGET_USD", "100")
    assert "budget of 100.00 US dollars is BELOW" in plan.money_lines(PAPER, plan_run(PAPER, 26_483).work())[0]


def test_the_plan_says_what_figure_4_costs_and_what_makes_it_cheaper():
    rows = plan_run(PAPER, 26_483).work()
    money = "\n".join(plan.money_lines(PAPER, rows))
    said = re.search(r"Figure 4's battles cost ([\d,.]+) of it; evaluation.curve_speeches", money)
    curves = sum(usd(row) or 0 for row in rows if "curve battles" in row.what)
    assert float(said[1].replace(",", "")) == round(curves, 2) > 500


def test_rankers_that_are_asked_together_have_gpus_of_their_own():
    named = [command.split()[0] for command in plan.serve_commands(PAPER) if command.startswith("CUDA_VISIBLE_DEVICES")]
    gpus = [own.partition("=")[2].split(",") for own in named]
    assert [len(own) for own in gpus] == [1, 1, 4] and len({*sum(gpus, [])}) == 6
