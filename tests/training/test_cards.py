"""Reward models and policies leave this repository: others load, serve and train with them, and read their cards;
the hub gets all of it or nothing."""

import base64
import contextlib
import dataclasses
import http.server
import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from unittest.mock import MagicMock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import in_child
from refusals import one_line

from psycopref.core.settings import DpoSettings, IterSettings, LoraSettings, RewardSettings
from psycopref.core.tables import format_cell
from psycopref.corpus.sources import UNKNOWN_LICENCE
from psycopref.models.generation import Decoding
from psycopref.models.weights import Weights, find_weights, load_causal_lm, load_tokenizer
from psycopref.training.cards import (
    CARD_COLUMNS,
    NOTICE,
    PolicyFacts,
    RewardFacts,
    ask_lines,
    curl_line,
    five_lines,
    generation_defaults,
    hand_over,
    hub_licence,
    policy_card,
    push_policy,
    push_reward_model,
    reward_card,
    serve_lines,
    use_lines,
)
from psycopref.training.scoring import load_reward_model, score_groups
from psycopref.training.texts import add_lora, dialogue, name_for_older, prompt_messages, save_adapter, save_merged

EXCHANGES = [
    ("I count the stairs at night and cannot stop.", "What is it like for you to count them?"),
    ('My "sister" moved out.\n\nI miss <|her|>.', "Stop it."),
    ("Ça va, naïvely {so}.", " word" * 90),
]
SPEECH = "It's late, \"again\".\n\nI count the stairs & can't $stop."
DECODING = Decoding(max_tokens=9, temperature=0.7, top_k=40, top_p=0.95)
LLAMA_NAME = "meta-llama/Llama-3.2-3B-Instruct"
LLAMA = Weights(LLAMA_NAME, LLAMA_NAME, "Llama-3.2-3B-Instruct", "ab" * 20)


@pytest.fixture(scope="module")
def tiny(shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        return find_weights("random-tiny")


def perturbed(model):
    """Give adapters and head values that a training could have left."""
    import torch

    chance = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=chance)
    return model


@pytest.fixture(scope="module")
def handed(tiny, tmp_path_factory):
    """Reward models of three kinds, each saved as chapter 5 saves it: kind -> (folder, scores before, scores after)."""
    tokenizer, found = load_tokenizer(tiny), {}
    groups = [[dialogue(tokenizer, speech, answer)] for speech, answer in EXCHANGES]
    for kind in ("plain", "lora", "bfloat16"):
        folder = tmp_path_factory.mktemp("handed") / kind
        model = load_reward_model(tiny.location, tokenizer, "bfloat16" if kind == "bfloat16" else "float32", new_head=3)
        if kind == "lora":
            model = perturbed(add_lora(model, LoraSettings(rank=4, alpha=8), head=True, seed=1))
        before = score_groups(model, tokenizer, groups, name="")
        save_merged(model, tokenizer, folder)
        name_for_older(folder)
        after = score_groups(load_reward_model(str(folder), tokenizer, "float32"), tokenizer, groups, name="")
        before = after if kind == "bfloat16" else before  # in its own type it scores otherwise
        found[kind] = (folder, [own[0] for own in before], [own[0] for own in after])
    return found


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A policy with its adapters apart, and a checkpoint as peft writes it: base, tokenizer, folder, checkpoint."""
    tokenizer, place = load_tokenizer(tiny), tmp_path_factory.mktemp("policy")
    model = perturbed(add_lora(load_causal_lm(tiny, "float32"), LoraSettings(rank=4, alpha=8), seed=1))
    model.save_pretrained(place / "checkpoint-8")
    save_adapter(place / "checkpoint-8", tokenizer, tiny, place / "policy")
    save_merged(model, tokenizer, place / "policy")
    return tiny, tokenizer, place / "policy", place / "checkpoint-8"


@pytest.fixture
def policy(made, tmp_path):
    """A copy of the policy that a test may change."""
    return shutil.copytree(made[2], tmp_path / "policy")


def in_plain_python(jobs, tmp_path):
    """Run (code, names, wanted name) where psycopref is never imported; return what is left under the wanted names."""
    code = """
import json, sys
found = []
for code, names, wanted in json.load(sys.stdin):
    exec(code, names)
    found.append(names[wanted])
assert not [name for name in sys.modules if name.startswith("psycopref")]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(jobs), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- what others do with a reward model


def test_five_lines_of_plain_transformers_give_our_scores(handed, reward, tmp_path):
    jobs, ours = [], []
    for folder, scores, _ in handed.values():
        for (speech, answer), score in zip(EXCHANGES, scores):
            names = {"prompt": prompt_messages(speech)[0]["content"], "response": answer}
            jobs.append((five_lines(folder), names, "score"))
            ours.append(score)
    card = reward_card(dataclasses.replace(reward, location=str(handed["lora"][0])))
    jobs.append(("\n".join(re.findall(r"```python\n(.*?)```", card, re.S)[:2]), {}, "score"))  # the card's own example
    ours.append(handed["lora"][1][0])
    assert EXCHANGES[0][0] in card and EXCHANGES[0][1] in card
    for theirs, score in zip(in_plain_python(jobs, tmp_path), ours, strict=True):
        assert abs(theirs - score) < 1e-5
    assert max(ours) - min(ours) > 1e-2, "scores that differ, so that an equal one means something"


def test_adapters_and_head_survive_the_saving(handed):
    _, before, after = handed["lora"]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < 1e-5
    assert min(abs(a - b) for a, b in zip(after, handed["plain"][1], strict=True)) > 1e-4, "the adapters do something"


def test_trl_trains_against_the_folder(handed, tiny, tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer

    folder, tokenizer = str(handed["lora"][0]), load_tokenizer(tiny)
    steps = {"max_steps": 1, "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = RLOOConfig(str(tmp_path), **steps, **quiet, use_cpu=True, bf16=False, logging_steps=1)
    prompts = Dataset.from_list([{"prompt": prompt_messages(speech)} for speech, _ in EXCHANGES[:2]])
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.location, dtype="float32"),
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
        reward_funcs=folder,
    )
    seen, calculate = [], trainer._calculate_rewards

    def watched(inputs, prompts, completions, *more):
        rewards = calculate(inputs, prompts, completions, *more)
        seen.extend(zip(prompts, completions, rewards[:, 0].tolist(), strict=True))
        return rewards

    monkeypatch.setattr(trainer, "_calculate_rewards", watched)
    trainer.train()
    assert trainer.state.global_step == 1 and len(seen) == 4
    groups = [[tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)] for prompt, completion, _ in seen]
    ours = score_groups(load_reward_model(folder, tokenizer, "float32"), tokenizer, groups, name="")
    for (_, _, theirs), [score] in zip(seen, ours, strict=True):
        assert abs(theirs - score) < 1e-5


# ---- what others do with a policy


def test_adapters_name_what_they_belong_to(made, tmp_path):
    tiny, tokenizer, _, checkpoint = made
    for base, commit in ((tiny, None), (Weights("me/base@main", "me/base", "base", "ab" * 20), "ab" * 20)):
        place = save_adapter(checkpoint, tokenizer, base, tmp_path)
        config = json.loads((place / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"], config["r"]) == (base.location, commit, 4)
        assert (place / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_plain_transformers_answers_as_trained_with_the_measured_decoding(policy, made, offline, tmp_path):
    hand_over(policy, offline)
    assert all(NOTICE in (policy / name).read_text() for name in ("README.md", "NOTICE.md"))
    code = f"""{use_lines(policy)}
from transformers import AutoModelForCausalLM
import torch
torch.manual_seed(0)
model, how = AutoModelForCausalLM.from_pretrained({str(policy)!r}), dict(return_dict=True, return_tensors="pt")
rendered = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **how)
ids, how = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], model.generation_config
model.save_pretrained({str(tmp_path / "again")!r})
found = [how.do_sample, how.temperature, how.top_k, how.top_p, how.max_new_tokens, how.eos_token_id]
found = [rendered, answer, len(ids), *found]
"""
    [found] = in_plain_python([(code, {"prompt": prompt_messages(SPEECH)[0]["content"]}, "found")], tmp_path)
    rendered, answer, length, *how = found
    trained = made[1].apply_chat_template(prompt_messages(SPEECH), tokenize=False, add_generation_prompt=True)
    assert rendered == trained and "system" not in rendered
    assert isinstance(answer, str) and 0 < length <= 9 and how == [True, 0.7, 40, 0.95, 9, 2]
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again["notice"] == NOTICE, "it survives loading and saving"


@pytest.mark.parametrize("ends, kept", [(2, 2), ([7, 2], [7, 2]), (7, [7, 2]), ([7, 9], [7, 9, 2]), (None, 2)])
def test_every_end_of_the_base_is_kept(policy, ends, kept):
    path, tokens = policy / "generation_config.json", {"bos_token_id": 5, "pad_token_id": 0}
    gone = {"repetition_penalty": 1.1, "min_p": 0.2, "max_length": 20, "_from_model_config": True}
    path.write_text(json.dumps({"eos_token_id": ends, "temperature": 0.1, **tokens, **gone}))
    found = generation_defaults(policy, DECODING)
    assert found == json.loads(path.read_text()) and found | tokens | {"eos_token_id": kept} == found
    assert found["temperature"] == 0.7 and not set(gone) & set(found)
    path.unlink()
    assert generation_defaults(policy, DECODING)["eos_token_id"] == 2, "from config.json and the tokenizer"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 2), st.integers(0, 200), st.floats(0.01, 1), st.integers(1, 4096))
def test_transformers_takes_any_decoding(policy, temperature, top_k, top_p, tokens):
    from transformers import GenerationConfig

    generation_defaults(policy, Decoding(tokens, temperature, top_k, top_p))
    found = GenerationConfig.from_pretrained(policy)
    found.validate(strict=True)
    assert found.max_new_tokens == tokens and found.do_sample == (temperature > 0)
    assert (found.temperature, found.top_k, found.top_p) == (
        (temperature, top_k, top_p) if temperature > 0 else (None, None, None)
    )


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def test_the_printed_lines(made):
    tiny, _, folder, _ = made
    whole = commands(serve_lines(folder))
    assert [words[:3] for words in whole] == [["vllm", "serve", str(folder)], ["transformers", "serve", str(folder)]]
    *_, apart = commands(serve_lines(folder, tiny))
    assert apart[:3] == ["vllm", "serve", tiny.location] and "--enable-lora" in apart and "--revision" not in apart
    assert apart[apart.index("--lora-modules") + 1] == f"{folder}={folder}/adapter"
    *_, fetch, hub = commands(serve_lines("me/mine", LLAMA))
    assert fetch[:3] == ["hf", "download", "me/mine"] and fetch[-1] == "mine" and "me/mine=mine/adapter" in hub
    assert hub[hub.index("--revision") + 1] == LLAMA.revision
    for words in (*whole, apart, hub):
        assert words[words.index("--host") + 1] == "127.0.0.1", "nobody else gets at it"
    assert NOTICE in serve_lines(folder) and commands(serve_lines("a b; 'c'"))[0][:3] == ["vllm", "serve", "a b; 'c'"]
    for rank, held in ((0, None), (16, None), (17, "32"), (64, "64"), (500, "512")):
        *_, words = commands(serve_lines(folder, tiny, rank))
        assert held == (words[words.index("--max-lora-rank") + 1] if "--max-lora-rank" in words else None)


@pytest.mark.parametrize("decoding", [DECODING, Decoding(max_tokens=7)], ids=["sampled", "greedy"])
def test_both_snippets_ask_with_the_prompt_of_the_training(decoding, monkeypatch):
    location, client = "my \"folder\"/of 'é'", MagicMock()
    sampling = {"temperature": 0.7, "top_p": 0.95} if decoding is DECODING else {"temperature": 0.0}  # no top_k there
    asked = {"model": location, "messages": prompt_messages(SPEECH), "max_tokens": decoding.max_tokens} | sampling
    command = shlex.split(curl_line(location, SPEECH, decoding))
    assert command[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(command[-1]) == asked
    monkeypatch.setattr("openai.OpenAI", client)
    names = {"prompt": prompt_messages(SPEECH)[0]["content"]}
    exec(ask_lines(location, decoding), names)
    client.assert_called_once_with(base_url="http://127.0.0.1:8000/v1", api_key="none")
    assert client().chat.completions.create.call_args.kwargs == asked
    assert names["answer"] is client().chat.completions.create().choices[0].message.content


# ---- the cards

SOURCES = [{"source": "demo", "licence": "MIT, fictional", "page": "https://example.org/demo"}]
ROWS = [
    dict(zip(CARD_COLUMNS, row))
    for row in (
        ["longer | wins", "baseline", 55.1, "44.0 to 66.2", 0.56234, None, math.nan, 78],
        ["ours", "reward model", 80.8, "71.2 to 89.3", 0.88141, 0.0712, 0.1396, 78],
        ["asked", "LLM as ranker", 50.0, "40.0 to 60.0", None, None, None, 78],
    )
]
POINT = yaml.safe_load("""{
    pairs: 240, step: 61, speeches: 38, answers: 152, tokens: 41.83, cut_share: 0.123, distinct_1: 0.217,
    distinct_2: 0.419, reward: 1.253, reward_low: 1.117, reward_high: 1.423, proxy: 61.57,
    proxy_low: 55.13,
    proxy_high: 68.29, judged: 57.31, judged_low: 50.19, judged_high: 64.37, kl: 4.757, kl_low: 4.261, kl_high: 5.277,
    words: 31.47, words_low: 30.1, words_high: 32.9}""")


def shared_facts():
    """What is known of any of the invented models, and of its training."""
    audit = {"test speeches": 84, "other speeches": 252, "test speeches with a near-duplicate outside": 3}
    speeches = {"sources": ["demo"], "test_fraction": 0.25, "dev_fraction": 0.13}
    pairs = {"rater": "offline rubric (stand-in)", "models": {"a": {"label": "Model A"}, "b": {"label": "Model B"}}}
    pairs |= {"settings": {"pairs": {"min_gap": 1.0}}, "principles": [*"abcdefg"]}
    pairs |= {"commit": "0123456789abcdef", "changed_files": True}
    pairs |= {"outputs": {"train.parquet": "ab" * 32, "test.parquet": "cd" * 32}, "versions": {"trl": "1.16.0"}}
    receipts = {
        "01_speeches": {"settings": {"speeches": speeches}, "origins": SOURCES, "audit": audit},
        "03_ratings": {"settings": {"ratings": {"mode": "principle"}}, "coverage": 0.985, "put_aside": 4},
        "04_pairs": pairs,
    }
    training = {"pairs": 357, "too_long": list(range(30, 42)), "steps": 89, "best_step": 61, "dev_loss": 0.4321}
    training |= {"pack_size": 8, "left_out": 5, "log": [{"loss": 0.6931}, {"loss": 0.3456}]}
    weights = Weights("me/base@main", "me/base", "base", "ef" * 20)
    known = {"weights": weights, "run": "first", "profile": "paper", "receipts": receipts, "location": "me/mine"}
    return known, training


@pytest.fixture(scope="module")
def reward():
    """All that is known of an invented reward model."""
    known, training = shared_facts()
    measured = {"temperature": 1.31, "ece_by_bins": {10: 0.0712, 15: 0.0801}, "dtype": "float32"}
    return RewardFacts(**known, training=training, settings=RewardSettings(), rows=ROWS, own="ours", **measured)


@pytest.fixture(scope="module")
def offline():
    """All that is known of an invented policy of offline DPO."""
    known, training = shared_facts()
    lora = LoraSettings(rank=16, alpha=24, last_layers=11)
    how = {"beta": 0.15, "learning_rate": 4e-4, "batch_size": 4, "epochs": 1.5, "warmup_ratio": 0.07, "max_length": 777}
    return PolicyFacts(
        **known,
        kind="dpo",
        trainings=[training],
        settings=DpoSettings(**how, label_smoothing=0.02, select="loss", lora=lora),
        decoding=DECODING,
        point=POINT,
        scorer="Bradley-Terry on base",
        precision="weights kept in float32, computed with in bfloat16",
        base_point={"reward": 0.517, "words": 29.03},
        judge="offline rubric (stand-in)",
        reference="Model B",
    )


@pytest.fixture(scope="module")
def online(offline):
    """The same of DPO-Iter."""
    rounds = [
        {"pairs": 301 + i, "steps": 21 + i, "too_long": [5] * i, "dropped": {"no gap": 1 + i, "same text": 2}}
        for i in range(4)
    ]
    how = {"iterations": 5, "prompts": 322, "candidates": 7, "temperature": 0.93, "top_k": 44, "top_p": 0.97}
    how |= {"learning_rate": 3e-3, "nll_weight": 0.21, "epochs": 2.5, "min_gap": 0.11, "reference": "base"}
    return dataclasses.replace(offline, kind="dpo-iter", trainings=rounds, iter_settings=IterSettings(**how), chosen=3)


@pytest.fixture(params=["reward", "offline", "online"])
def known(request):
    return request.getfixturevalue(request.param)


def card_of(facts):
    return (reward_card if isinstance(facts, RewardFacts) else policy_card)(facts)


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def rated_by(facts, rater, **more):
    return dataclasses.replace(
        facts, receipts=facts.receipts | {"04_pairs": facts.receipts["04_pairs"] | {"rater": rater} | more}
    )


def test_the_header_is_what_the_hub_reads(known):
    from huggingface_hub import ModelCard

    text = card_of(known)
    found, read = header(text), ModelCard(text)
    policy = known.kind != "reward"
    assert found["library_name"] == "transformers" and found["language"] == "en" and found["license"] == "unknown"
    assert found["pipeline_tag"] == ("text-generation" if policy else "text-classification")
    tags = {"dpo", "trl", "preference", "dpo-iter"} if policy else {"reward-model", "preference-learning"}
    assert set(found["tags"]) == (tags | {"psycopref"}) - ({"dpo-iter"} if known.kind == "dpo" else set())
    assert found["base_model"] == "me/base" and "datasets" not in found
    assert read.text.strip().startswith(f"# first-base-main-{known.kind}")
    assert read.data.to_dict() == found == ModelCard(str(read)).data.to_dict(), "written again it is the same"
    if policy:
        assert "model-index" not in found, "development numbers are no evaluation"
    else:
        [index] = found["model-index"]
        numbers = {"accuracy": 80.8, "roc_auc": 0.88141, "expected_calibration_error": 0.0712, "brier_score": 0.1396}
        assert {one["type"]: one["value"] for one in index["results"][0]["metrics"]} == numbers
    local = dataclasses.replace(known, weights=dataclasses.replace(known.weights, location="/"))
    assert "base_model" not in header(card_of(local))


def test_a_card_of_the_released_dataset(known):
    page = "https://huggingface.co/datasets/Psychotherapy-LLM/PsychoCounsel-Preference"
    speeches = known.receipts["01_speeches"] | {
        "settings": {"speeches": {"sources": ["released"], "dev_fraction": 0.1}},
        "origins": [{"source": "released", "licence": "CC-BY-NC-4.0", "page": page}],
    }
    facts = rated_by(dataclasses.replace(known, weights=LLAMA), "GPT-4o, as released")
    receipts = {"01_speeches": speeches, "04_pairs": facts.receipts["04_pairs"]}  # there are no ratings of ours
    nobody = {} if known.kind == "reward" else {"judge": "", "reference": ""}
    text = card_of(dataclasses.replace(facts, receipts=receipts, **nobody))
    found = header(text)
    assert found["license"] == "other" and found["license_name"] and found["base_model"] == LLAMA.location
    assert found["datasets"] == ["Psychotherapy-LLM/PsychoCounsel-Preference"]
    assert "llama3.2" in text and "CC-BY-NC-4.0" in text and "rated by GPT-4o, as released" in text
    assert "stand-in" not in text and ("no judge was asked" in text) == (known.kind != "reward")


def table_of(text, section):
    """Read a section's table back: rows of {column: cell}."""
    lines = [line for line in text.split(f"## {section}")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_rows_are_shown_as_given_and_what_was_not_measured_is_no_result(reward):
    text = reward_card(dataclasses.replace(reward, own="longer | wins"))
    assert table_of(text, "Results") == [{name: format_cell(row[name]) for name in CARD_COLUMNS} for row in ROWS]
    assert [row["model"] for row in table_of(reward_card(reward), "Results")] == ["ours", "longer | wins", "asked"]
    metrics = header(text)["model-index"][0]["results"][0]["metrics"]
    assert {one["type"]: one["value"] for one in metrics} == {"accuracy": 55.1, "roc_auc": 0.56234}


NUMBERS = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w])")


def leaves(known, path=()):
    """Every number in the facts, with the way to it."""
    if isinstance(known, bool) or known is None:
        return
    if isinstance(known, (int, float)):
        yield path
    elif isinstance(known, dict):
        for key, item in known.items():
            yield from leaves(item, (*path, key))
    elif isinstance(known, (list, tuple)):
        for key, item in enumerate(known):
            yield from leaves(item, (*path, key))
    elif dataclasses.is_dataclass(known):
        for one in dataclasses.fields(known):
            yield from leaves(getattr(known, one.name), (*path, one.name))


@pytest.mark.parametrize("name", ["offline", "online"])
def test_every_number_in_a_policys_card_is_a_fact(name, request):
    """Each number is one of the facts, a percentage or sum of them, or stands in the fixed words of any card."""
    known, values = request.getfixturevalue(name), []
    for path in leaves(known):
        found = known
        for key in path:
            found = getattr(found, key) if dataclasses.is_dataclass(found) else found[key]
        values += [found, 100 * found]
    values += [sum(one[key] for one in known.done) for key in ("pairs", "steps")] + [*known.dropped.values()]
    values += [sum(len(one["too_long"]) for one in known.done), len(known.trainings)]
    values += [
        4.2,
        95,
        1,
        2,
        127,
        0,
        8000,
        112,
        911,
        999,
        988,
        116,
        123,
    ]  # section, interval, labels, address, emergency numbers
    values += [32, 0.1, 5e-7, 64, 16, 6400, 8]  # the paper's own, in its deviations
    text = policy_card(known)
    marks = r"`[0-9a-f]{12}…`|(revision|commit) [0-9a-f]+|trl \S+|127\.0\.0\.1(:8000)?|distinct-\d|Llama-\S+"
    words = re.sub(marks, "", text.split("---\n", 2)[2])
    for number in NUMBERS.findall(words):
        assert any(abs(float(number) - value) <= max(5e-4, 0.006 * abs(value)) for value in values), (number, words)
    paper = text.split("## Deviations from the paper")[1].split("\n## ")[0]
    assert "6400" not in text.replace(paper, "") and "5e-07" not in text.replace(paper, ""), "the paper's, there alone"


SAID = {
    "reward": """9e-06|12 pairs longer than 2048 tokens (prefID 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, …)|
        5 others sit out|step 61 of 89|0.4321|every weight|1.31|0.071 with 10 bins, 0.080 with 15 bins|98.5%|
        4 were put aside|differ by at least 1.|84 speeches|Model A; Model B|0123456789ab with changes of its own|
        abababababab|https://example.org/demo|not known to us|licensed professional|
        no evidence of clinical benefit|from_pretrained("me/mine")""",
    "dpo": """by offline DPO|β = 0.15, label smoothing 0.02, no likelihood term|
        rank 16 (alpha 24, last 11 layers), merged into the weights|computed with in bfloat16|
        0.0004, warm-up over 7%|4 pairs in a step|12 pairs longer than 777 tokens; 5 others|step 61 of 89|
        0.6931 at the first step, 0.3456 at the last|98.5%|
        84 speeches are held out for testing, and took no part|Model A; Model B|against Model B|
        least DPO loss on development pairs|never on test speeches|152 answers to 38 development speeches|
        learning rate: 0.0004 here, 5e-07 in the paper|
        judged on development speeches by offline rubric (stand-in)|357, in 1.5 epochs, 89 steps|n = 357 training pairs|
        13% serve to watch|temperature 0.7, top-k 40, top-p 0.95, at most 9 tokens""",
    "dpo-iter": """by iterative online DPO|4 were trained, this is number 3|the policy of the iteration before|
        - reference: the base model|322 client speeches|
        7 for each, at temperature 0.93 from the 44 likeliest|top-p 0.97|301, 302, 303 in the iterations|
        66 steps in all|plus 0.21 ×|3 pairs longer than 777 tokens, 6 for no gap, 6 for same text|
        906 training pairs|highest mean reward on development speeches|
        candidates for each prompt: 7 here, 8 in the paper|Bradley-Terry on base chose among them|
        writes plain DPO|gap above 0.11: 301|2.5 in an iteration|learning rate: 0.003""",
}


def test_the_card_says_what_was_done(known):
    text = card_of(known)
    for said in SAID[known.kind].split("|"):
        assert said.strip() in text, said


def test_the_cards_development_numbers(offline):
    rows = [[*row.values()] for row in table_of(policy_card(offline), "Development numbers")]
    assert rows == [
        ["mean reward", "0.517", "1.253", "1.12 to 1.42"],
        ["proxy win rate, %", "—", "61.6", "55.1 to 68.3"],
        ["judged win rate, %", "—", "57.3", "50.2 to 64.4"],
        ["KL to the base, nats per answer", "—", "4.757", "4.26 to 5.28"],
        ["words per answer", "29.0", "31.5", "30.1 to 32.9"],
        ["tokens per answer", "—", "41.8", "—"],
        ["share of answers cut at the limit", "—", "0.123", "—"],
        ["distinct-1", "—", "0.217", "—"],
        ["distinct-2", "—", "0.419", "—"],
    ]
    bare = dataclasses.replace(offline, point={"reward": 1.0, "judged": None, "kl": None}, base_point=None, judge="")
    [row] = table_of(policy_card(bare), "Development numbers")
    assert [*row.values()] == ["mean reward", "—", "1.0", "—"] and "step 61 of 89" in policy_card(bare)


def test_the_card_follows_the_settings(reward, offline):
    lora = RewardSettings(lora=LoraSettings(rank=16, last_layers=15), margin=True, center_coefficient=0.01)
    training = {**reward.training, "dev_loss": None}
    text = reward_card(dataclasses.replace(reward, settings=lora, training=training, temperature=None))
    said = "rank 16|last 15 layers|as margin|0.01 ×|no development pairs|No temperature was fitted"
    assert [one for one in said.split("|") if one not in text] == []
    assert "less sure than" in reward_card(dataclasses.replace(reward, temperature=0.7))
    text = policy_card(dataclasses.replace(offline, settings=DpoSettings(select="win-rate")))
    assert "highest judged win rate" in text and "every weight" in text


def test_what_is_not_what_it_seems_is_labelled(known):
    text, gpt = card_of(known), card_of(rated_by(known, "gpt-4o"))
    assert "a stand-in, no clinical judge" in text and "No clinician has checked them" in gpt
    for profile, said in (("tiny", "numbers mean nothing"), ("demo", "size of a laptop")):
        assert said in card_of(dataclasses.replace(known, profile=profile)) and said not in text
    if known.kind != "reward":
        assert text.index(NOTICE) < text.index("A policy trained from") < text.index("## Data")
        assert text.count(NOTICE) == 2, "on top, and above the commands"


licences = st.lists(st.sampled_from(["MIT", "MIT, fictional", "CC-BY-NC-4.0", UNKNOWN_LICENCE]), min_size=1)


@given(licences, st.sampled_from(["apache-2.0", "llama3.2", "unknown"]))
def test_no_licence_is_claimed_that_is_not_known(data, base):
    found = hub_licence(base, data)
    unknown = base == "unknown" or UNKNOWN_LICENCE in data
    assert found in (base, "other", "unknown") and (found == "unknown") == unknown
    assert found != base or base == "unknown" or all(one.startswith("MIT") for one in data)


def deviations(text):
    return text.split("## Deviations from the paper\n\n")[1].partition("\n\n## ")[0].splitlines()


def test_deviations_are_the_settings_that_differ(offline, online):
    paper = rated_by(dataclasses.replace(offline, weights=LLAMA, settings=DpoSettings()), "gpt-4o-2024-08-06")
    assert deviations(policy_card(paper)) == ["None that we know of."]
    iterated = dataclasses.replace(paper, kind="dpo-iter", chosen=1, iter_settings=IterSettings())
    assert len(deviations(policy_card(iterated))) == 1, "what the paper leaves open"
    found = deviations(policy_card(online))
    assert len(found) == 11 and all(line.startswith("- ") for line in found)


@pytest.mark.parametrize(
    "stage, key", [("01_speeches", "audit"), ("04_pairs", "rater"), ("04_pairs", "outputs"), ("03_ratings", "")]
)
def test_missing_facts_are_one_line(known, stage, key):
    lacking = {k: v for k, v in known.receipts[stage].items() if key and k != key}
    receipts = known.receipts | {stage: lacking}
    said = one_line(lambda: card_of(dataclasses.replace(known, receipts=receipts)))
    assert f"the receipt of {stage} has no {key}" in said


HOSTILE = ["x\n---\nlicense: mit\n---\n# Safe", "a: [b, {c: d}", "'\"`\\", "![x](http://evil)<script>alert(1)</script>"]
HOSTILE += ["| a | b |\n|---|", "\u2028# Clinically proven\u2028", "> [!NOTE]\n> safe", "```\n# out\n```", "\r# z"]
HOSTILE += ["%YAML 2", "\x00", "--- ", "*/**"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40)))
def test_hostile_labels_change_no_line_of_structure(known, word):
    from huggingface_hub import ModelCard

    def filled(label):
        facts = rated_by(known, f"gpt {label}", models={"a": {"label": label}})
        more = {name: f"{name} {label}" for name in ("scorer", "judge", "reference") if hasattr(facts, name)}
        weights = dataclasses.replace(facts.weights, label=f"b {label}")
        return card_of(dataclasses.replace(facts, weights=weights, run=f"run {label}", **more))

    def structure(text):
        lines = [line for line in ModelCard(text).text.splitlines() if re.match(r"\s*(#|```|---|\||> \[!)", line)]
        return [line.split(" ")[0] for line in lines], text.count("]("), text.count("<")

    text, tame = filled(word), filled("plain")
    assert structure(text) == structure(tame)
    found, expected = (ModelCard(one).data.to_dict() for one in (text, tame))
    assert set(found) == set(expected) and found["license"] == "unknown"


def test_adapters_of_a_base_in_a_folder_are_kept_but_not_served(policy, made, offline):
    base = Weights("x", str(policy), "x", "1")
    save_adapter(made[3], made[1], base, policy)
    mine = {"weights": base, "location": "outputs/demo/06_policy/x/dpo"}
    local = hand_over(policy, dataclasses.replace(offline, **mine)).read_text()
    assert "apart in `adapter/`" in local and "--enable-lora" not in local and str(policy) not in local


# ---- the hub


class Hub:
    """Speak as much of the hub's protocol as an upload needs; keep what came."""

    def __init__(self, exists=None, broken=""):
        self.private, self.broken = exists, broken
        self.made, self.stored, self.files, self.requests = [], {}, {}, []

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        self.requests.append(f"{handler.command} {path}")
        if self.broken and self.broken in path:
            return 400, {"error": "this model is\nnot welcome"}, {}
        if path.startswith("/put/"):
            self.stored[path.removeprefix("/put/")] = body
            return 200, {}, {}
        if handler.headers.get("Authorization") != "Bearer hf_good":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/validate-yaml":
            return 200, {}, {}
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.address}/me/mine"}, {}
        if handler.command == "GET" and self.private is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if handler.command == "GET":
            return 200, {"id": "me/mine", "sha": "1" * 40, "private": self.private, "siblings": [], "tags": []}, {}
        if path.endswith("/preupload/main"):
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in paths]
            keys = ("path", "uploadMode", "shouldIgnore")
            return 200, {"files": [dict(zip(keys, (*own, False))) for own in zip(paths, modes)]}, {}
        if path.endswith("/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{"actions": {"upload": {"href": f"{self.address}/put/{one['oid']}"}}} for one in asked]
            return 200, {"objects": [one | where for one, where in zip(asked, upload)]}, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                own = line["value"]
                if line["key"] == "file":
                    self.files[own["path"]] = base64.b64decode(own["content"])
                elif line["key"] == "lfsFile":
                    self.files[own["path"]] = self.stored[own["oid"]]
            return 200, {"commitUrl": f"{self.address}/me/mine/commit/{'2' * 40}", "commitOid": "2" * 40}, {}
        return 404, {"error": f"nothing at {path}"}, {}


@contextlib.contextmanager
def open_hub(hub):
    """Serve a hub on a loopback port; a connection that says nothing for 20 seconds is closed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, found, headers = hub.answer(self, self.rfile.read(length))
            body = json.dumps(found).encode()
            self.send_response(status)
            own = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
            for name, value in own.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


CHILD = """
import json, sys
from psycopref.training import cards
from psycopref.core.settings import StudyError
cards.HUB_SECONDS = 1.0
folder, push = sys.argv[1:3]
try:
    print(json.dumps({"url": getattr(cards, push)(folder, "me/mine")}))
except StudyError as error:
    print(json.dumps({"error": str(error)}))
assert "torch" not in sys.modules
"""


def push(folder, tmp_path, address, token="hf_good"):
    """Push from a process of its own, since huggingface_hub reads its settings when it is imported."""
    code = f"import os; os.environ |= {{'HF_TOKEN': {token!r}, 'HF_HUB_DISABLE_IMPLICIT_TOKEN': '0'}}\n{CHILD}"
    name = "push_policy" if (folder / "NOTICE.md").is_file() else "push_reward_model"
    [found] = in_child(code, tmp_path, address, str(folder), name)
    assert "\n" not in found.get("error", "") and "hf_" not in str(found).replace("HF_TOKEN", "")
    return found


@pytest.fixture
def reward_folder(handed, reward, tmp_path):
    place = shutil.copytree(handed["lora"][0], tmp_path / "lora")
    (place / "README.md").write_text(reward_card(reward), encoding="utf-8")
    return place


@pytest.fixture
def policy_folder(policy, offline):
    hand_over(policy, offline)
    return policy


@pytest.fixture(params=["reward", "policy"])
def folder(request):
    """A model with its card, and what a training leaves beside it."""
    place = request.getfixturevalue(f"{request.param}_folder")
    for stray in ("scratch/a.txt", "checkpoint-8/b.txt", ".README.md.7.partial"):
        (place / stray).parent.mkdir(exist_ok=True)
        (place / stray).write_text("not for the hub")
    return place


def test_the_hub_gets_the_folder_in_private(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    with open_hub(Hub()) as hub:
        found = push(folder, tmp_path, hub.address)
    assert found == {"url": f"{hub.address}/me/mine/commit/{'2' * 40}"}
    assert hub.files == before and {"README.md", "config.json", "model.safetensors"} <= set(before)
    [made_repo] = hub.made
    assert (made_repo["organization"], made_repo["name"], made_repo["visibility"]) == ("me", "mine", "private")


def test_adapters_of_a_base_on_the_hub_go_too(policy_folder, made, offline, tmp_path):
    save_adapter(made[3], made[1], offline.weights, policy_folder)
    hand_over(policy_folder, offline)
    with open_hub(Hub(exists=True)) as hub:
        assert "url" in push(policy_folder, tmp_path, hub.address)
    apart = {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "NOTICE.md")}
    assert apart <= set(hub.files)
    assert not [name for name, data in hub.files.items() if made[0].location.encode() in data], "no folder of this disk"


def test_a_repository_that_exists_is_used_if_it_is_private(reward_folder, tmp_path):
    with open_hub(Hub(exists=True)) as hub:
        assert "url" in push(reward_folder, tmp_path, hub.address)
        assert hub.files and not hub.made
    with open_hub(Hub(exists=False)) as hub:
        assert "is public, expected a private one" in push(reward_folder, tmp_path, hub.address)["error"]
        assert not hub.files and not hub.made and all(request.startswith("GET") for request in hub.requests)


def test_what_the_hub_refuses_is_one_line(reward_folder, tmp_path):
    with open_hub(Hub()) as hub:
        assert "401" in push(reward_folder, tmp_path, hub.address, token="hf_bad")["error"]
        assert not hub.files and not hub.made
    for place, said in (("/put/", "Error while uploading 'model.safetensors'"), ("/validate-yaml", "Invalid metadata")):
        with open_hub(Hub(broken=place)) as hub:
            found = push(reward_folder, tmp_path, hub.address)["error"]
            assert said in found and "which stays as it is; mend that and push again" in found and not hub.files


def test_a_hub_that_is_silent_or_gone_is_one_line(reward_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "Timeout" in push(reward_folder, tmp_path, address)["error"]
    assert "Connect" in push(reward_folder, tmp_path, address)["error"], "nobody listens there any more"


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/mi ne", "https://hub.co/me/mine"])
def test_bad_names_never_reach_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert f"{name!r}: the name is malformed" in one_line(lambda: push_reward_model(tmp_path, name))


def test_nothing_goes_out_without_its_card_and_notice(folder, offline, monkeypatch):
    policy = (folder / "NOTICE.md").is_file()
    push_it = push_policy if policy else push_reward_model
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert "does not tell how to load 'me/other'" in one_line(lambda: push_it(folder, "me/other"))
    needed = ["README.md", "config.json", "tokenizer_config.json", "model.safetensors"]
    for name in needed + ["NOTICE.md", "generation_config.json"] * policy:
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert f"holds no {name.replace('model', '*')}" in one_line(lambda: push_it(folder, "me/mine"))
        (folder / name).write_bytes(kept)
    if policy:
        (folder / "README.md").write_text(policy_card(offline).replace(NOTICE, "Fine for all."))
        assert "under our notice" in one_line(lambda: push_policy(folder, "me/mine"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "found no token" in one_line(lambda: push_it(folder, "me/mine"))


def test_the_switch_of_the_user_holds(reward_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")  # conftest has set HF_HUB_OFFLINE
    assert "OfflineModeIsEnabled" in one_line(lambda: push_reward_model(reward_folder, "me/mine"))
