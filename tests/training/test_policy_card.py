"""A policy leaves this repository: plain transformers, peft and a server load it, its card says what is known and nothing else, and the notice goes everywhere with it."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import in_child
from refusals import one_line
from test_hand_over import Hub, open_hub, sums

from psycopref.training import policy_card as room
from psycopref.core.settings import DpoSettings, IterSettings, LoraSettings
from psycopref.models.generation import Decoding
from psycopref.training.policy_card import (
    NOTICE,
    PolicyFacts,
    ask_lines,
    curl_line,
    generation_defaults,
    hand_over,
    policy_card,
    policy_deviations,
    push_policy,
    quoted,
    save_adapter,
    serve_lines,
    use_lines,
)  # fmt: skip
from psycopref.training.texts import add_lora, prompt_messages, save_merged
from psycopref.models.weights import Weights, find_weights, load_causal_lm, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEECH = "It's late, \"again\".\n\nI count the stairs & can't $stop."
DECODING = Decoding(max_tokens=9, temperature=0.7, top_k=40, top_p=0.95)


def adapted(weights, seed=1):
    """A policy with adapters that a training could have left."""
    import torch

    model, chance = (
        add_lora(load_causal_lm(weights, "float32"), LoraSettings(rank=4, alpha=8), seed=seed),
        torch.Generator().manual_seed(seed),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=chance)
    return model


@pytest.fixture(scope="module")
def made(shared_cache, tmp_path_factory):
    """A policy with its adapters apart, and a checkpoint as peft writes it: base, tokenizer, folder, checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        tiny = find_weights("random-tiny")
    tokenizer, place = load_tokenizer(tiny), tmp_path_factory.mktemp("policy")
    model = adapted(tiny)
    model.save_pretrained(place / "checkpoint-8")
    save_adapter(model, tokenizer, tiny, place / "policy")
    save_merged(model, tokenizer, place / "policy")
    return tiny, tokenizer, place / "policy", place / "checkpoint-8"


@pytest.fixture
def policy(made, tmp_path):
    """A copy of the policy that a test may change."""
    return shutil.copytree(made[2], tmp_path / "policy")


def logits(model, tokenizer):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokenizer(SPEECH).input_ids])).logits.float()


# ---- adapters and weights


@pytest.mark.parametrize("source", ["model", "checkpoint"])
def test_base_and_adapters_give_what_the_merged_weights_give(made, tmp_path, source):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny, tokenizer, folder, checkpoint = made
    apart = save_adapter(adapted(tiny) if source == "model" else checkpoint, tokenizer, tiny, tmp_path)
    merged = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny.location, dtype="float32")
    plain = logits(base, tokenizer)
    for found in (
        AutoPeftModelForCausalLM.from_pretrained(apart, dtype="float32"),
        PeftModel.from_pretrained(base, apart),
    ):
        assert (logits(found.eval(), tokenizer) - merged).abs().max() < 1e-4
    assert (plain - merged).abs().max() > 1e-2, "the adapters do something"
    assert AutoTokenizer.from_pretrained(apart).chat_template == tokenizer.chat_template


def test_adapters_name_what_they_belong_to(made, tmp_path):
    tiny, tokenizer, _, checkpoint = made
    for base, commit in ((tiny, None), (Weights("me/base@main", "me/base", "base", "ab" * 20), "ab" * 20)):
        place = save_adapter(checkpoint, tokenizer, base, tmp_path)
        config = json.loads((place / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"], config["r"]) == (base.location, commit, 4)
        assert NOTICE in (place / "NOTICE.md").read_text() and not (place / "README.md").exists()


def test_what_has_no_adapters_is_refused(made, tmp_path):
    tiny, tokenizer, folder, checkpoint = made
    assert "holds no adapter_config.json" in one_line(lambda: save_adapter(folder, tokenizer, tiny, tmp_path))
    model = adapted(tiny)
    save_merged(model, tokenizer, tmp_path / "merged")
    assert "not merged yet" in one_line(lambda: save_adapter(model, tokenizer, tiny, tmp_path))
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in one_line(lambda: save_adapter(broken, tokenizer, tiny, tmp_path))


# ---- defaults and notice


def test_plain_transformers_answers_with_the_measured_decoding(policy, facts, tmp_path):
    hand_over(policy, facts)
    code = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM, GenerationConfig
prompt = json.load(sys.stdin)
exec({use_lines(policy)!r})
model = AutoModelForCausalLM.from_pretrained({str(policy)!r})
inputs = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
torch.manual_seed(0)
ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
generator = model.generation_config
model.save_pretrained({str(tmp_path / "again")!r})
assert not [name for name in sys.modules if name.startswith("psycopref")]
print(json.dumps([answer, len(ids), generator.do_sample, generator.temperature, generator.top_k, generator.top_p, generator.max_new_tokens, generator.eos_token_id]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(prompt_messages(SPEECH)[0]["content"]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer, length, *how = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, str) and 0 < length <= 9 and how == [True, 0.7, 40, 0.95, 9, 2]
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["notice"] == NOTICE, (
        "it survives loading and saving"
    )


@pytest.mark.parametrize("ends, kept", [(2, 2), ([7, 2], [7, 2]), (7, [7, 2]), ([7, 9], [7, 9, 2]), (None, 2)])
def test_every_end_of_the_base_is_kept(policy, ends, kept):
    path = policy / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "eos_token_id": ends,
                "bos_token_id": 5,
                "pad_token_id": 0,
                "repetition_penalty": 1.1,
                "temperature": 0.1,
                "min_p": 0.2,
                "max_length": 20,
                "_from_model_config": True,
            }
        )
    )
    found = generation_defaults(policy, DECODING)
    assert (
        found == json.loads(path.read_text())
        and found["eos_token_id"] == kept
        and (found["bos_token_id"], found["pad_token_id"]) == (5, 0)
    )
    assert found["temperature"] == 0.7 and not {
        "repetition_penalty",
        "min_p",
        "max_length",
        "_from_model_config",
    } & set(found)
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


def test_the_chat_template_stays_as_trained(policy, made, facts):
    from transformers import AutoTokenizer

    _, tokenizer, _, _ = made
    hand_over(policy, facts)
    rendered = AutoTokenizer.from_pretrained(policy).apply_chat_template(
        prompt_messages(SPEECH), tokenize=False, add_generation_prompt=True
    )
    assert (
        rendered == tokenizer.apply_chat_template(prompt_messages(SPEECH), tokenize=False, add_generation_prompt=True)
        and "system" not in rendered
    )
    for name in ("README.md", "NOTICE.md"):
        assert NOTICE in (policy / name).read_text()


def test_what_is_no_policy_gets_no_defaults(tmp_path):
    assert "holds no config.json" in one_line(lambda: generation_defaults(tmp_path, DECODING))


# ---- served

LLAMA = Weights(
    "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct", "ab" * 20
)


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def test_the_printed_lines(made, tmp_path):
    tiny, _, folder, _ = made
    whole = commands(serve_lines(folder))
    assert [words[:3] for words in whole] == [["vllm", "serve", str(folder)], ["transformers", "serve", str(folder)]]
    *_, apart = commands(serve_lines(folder, tiny))
    assert (
        apart[:3] == ["vllm", "serve", tiny.location]
        and apart[apart.index("--lora-modules") + 1] == f"{folder}={folder}/adapter"
        and "--enable-lora" in apart
        and "--revision" not in apart
    )
    *_, fetch, hub = commands(serve_lines("me/mine", LLAMA))
    assert (
        fetch[:3] == ["hf", "download", "me/mine"]
        and fetch[-1] == "mine"
        and "me/mine=mine/adapter" in hub
        and hub[hub.index("--revision") + 1] == LLAMA.revision
    )
    assert all(words[words.index("--host") + 1] == "127.0.0.1" for words in (*whole, apart, hub)), (
        "nobody else gets at it"
    )
    assert NOTICE in serve_lines(folder) and ["vllm", "serve", "a b; 'c'"] in [
        words[:3] for words in commands(serve_lines("a b; 'c'"))
    ]
    for rank, held in ((0, None), (16, None), (17, "32"), (64, "64"), (500, "512")):
        *_, words = commands(serve_lines(folder, tiny, rank))
        assert held == (words[words.index("--max-lora-rank") + 1] if "--max-lora-rank" in words else None)


class Completions:
    """Answer as a server of chat completions does; keep what was asked."""

    def __init__(self):
        self.bodies = []

    def answer(self, handler, body):
        self.bodies.append(json.loads(body))
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Tell me more."}}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "policy", "choices": [message]}, {}


@pytest.mark.parametrize("decoding", [DECODING, Decoding(max_tokens=7)], ids=["sampled", "greedy"])
def test_both_snippets_ask_with_the_prompt_of_the_training(decoding):
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    location = "my \"folder\"/of 'é'"
    with open_hub(Completions()) as server:
        done = subprocess.run(
            curl_line(location, SPEECH, decoding).replace("http://127.0.0.1:8000", server.address),
            shell=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "Tell me more.", done.stderr
        names = {"prompt": prompt_messages(SPEECH)[0]["content"]}
        exec(ask_lines(location, decoding).replace("http://127.0.0.1:8000", server.address), names)
        assert names["answer"] == "Tell me more."
        names["client"].close()
    first, second = server.bodies
    assert (
        first == second
        and first["messages"] == prompt_messages(SPEECH)
        and first["model"] == location
        and first["max_tokens"] == decoding.max_tokens
    )
    sampling = {name: value for name, value in first.items() if name not in ("model", "messages", "max_tokens")}
    assert sampling == ({"temperature": 0.7, "top_p": 0.95} if decoding is DECODING else {"temperature": 0.0}), (
        "transformers serve refuses top_k"
    )


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")),
    reason="transformers[serving] is not installed",
)
def test_transformers_serves_the_folder(policy, facts, tmp_path):
    hand_over(policy, facts)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    _, command = commands(serve_lines(policy))
    words = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command[1:-1], port]
    server = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until, found = time.monotonic() + 90, None
        asked = shlex.split(curl_line(policy, SPEECH, DECODING))
        request = urllib.request.Request(
            asked[2].replace("8000", port), asked[-1].encode(), {"Content-Type": "application/json"}
        )
        while found is None and time.monotonic() < until and server.poll() is None:
            try:
                found = json.load(urllib.request.urlopen(request, timeout=30))
            except urllib.error.HTTPError as error:
                pytest.fail(f"refused: {error.code} {error.read()[:300]}")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
    finally:
        server.terminate()
        _, said = server.communicate(timeout=20)
    assert found, said[-2000:]
    assert found["choices"][0]["message"]["content"] and found["usage"]["completion_tokens"] <= DECODING.max_tokens


# ---- the card

SOURCES = [
    {"source": "demo", "licence": "MIT, written for this repository; fictional", "page": "https://example.org/demo"}
]
POINT = {"pairs": 240, "step": 61, "speeches": 38, "answers": 152, "reward": 1.253, "reward_low": 1.117, "reward_high": 1.423, "proxy": 61.57, "proxy_low": 55.13, "proxy_high": 68.29,
         "judged": 57.31, "judged_low": 50.19, "judged_high": 64.37, "kl": 4.757, "kl_low": 4.261, "kl_high": 5.277, "words": 31.47, "words_low": 30.1, "words_high": 32.9,
         "tokens": 41.83, "cut_share": 0.123, "distinct_1": 0.217, "distinct_2": 0.419}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    """All that is known of an invented policy of offline DPO."""
    receipts = {
        "01_speeches": {"settings": {"speeches": {"sources": ["demo"], "test_fraction": 0.25, "dev_fraction": 0.13}}, "origins": SOURCES, "audit": {"test speeches": 84, "other speeches": 252}},
        "03_ratings": {"settings": {"ratings": {"mode": "principle"}}, "coverage": 0.985, "put_aside": 3},
        "04_pairs": {"rater": "offline rubric (stand-in)", "models": {"a": {"label": "Model A"}, "b": {"label": "Model B"}}, "outputs": {"train.parquet": "ab" * 32},
                     "commit": "0123456789abcdef", "changed_files": True, "versions": {"trl": "1.16.0"}},
    }  # fmt: skip
    training = {
        "pairs": 357,
        "too_long": list(range(30, 42)),
        "steps": 89,
        "best_step": 61,
        "dev_loss": 0.4321,
        "pack_size": 8,
        "left_out": 5,
        "log": [{"loss": 0.6931}, {"loss": 0.3456}],
    }
    settings = DpoSettings(
        beta=0.15,
        learning_rate=4e-4,
        batch_size=4,
        epochs=1.5,
        warmup_ratio=0.07,
        max_length=777,
        label_smoothing=0.02,
        select="loss",
        lora=LoraSettings(rank=16, alpha=24, last_layers=11),
    )
    return PolicyFacts(Weights("me/base@main", "me/base", "base", "ef" * 20), "first", "paper", "dpo", receipts, [training], settings, DECODING, POINT, "Bradley-Terry on base", "me/mine",
                       "weights kept in float32, computed with in bfloat16", {"reward": 0.517, "words": 29.03}, "offline rubric (stand-in)", "Model B")  # fmt: skip


@pytest.fixture(scope="module")
def online(facts):
    """The same of DPO-Iter."""
    rounds = [
        {"pairs": 301 + i, "steps": 21 + i, "too_long": [5] * i, "dropped": {"no gap": 1 + i, "same text": 2}}
        for i in range(4)
    ]
    how = IterSettings(
        iterations=5,
        prompts=322,
        candidates=7,
        temperature=0.93,
        top_k=44,
        top_p=0.97,
        learning_rate=3e-3,
        nll_weight=0.21,
        epochs=2.5,
        min_gap=0.11,
        reference="base",
    )
    return dataclasses.replace(facts, kind="dpo-iter", trainings=rounds, iter_settings=how, chosen=3)


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_header_is_what_the_hub_reads(facts, online):
    from huggingface_hub import ModelCard

    for known in (facts, online):
        text = policy_card(known)
        found, read = header(text), ModelCard(text)
        assert (
            found["library_name"] == "transformers"
            and found["pipeline_tag"] == "text-generation"
            and found["base_model"] == "me/base"
            and found["license"] == "unknown"
            and found["language"] == "en"
        )
        assert (
            {"dpo", "trl", "preference"} <= set(found["tags"])
            and ("dpo-iter" in found["tags"]) == (known is online)
            and "datasets" not in found
        )
        assert "model-index" not in found, "development numbers are no evaluation"
        assert read.data.to_dict() == found == ModelCard(str(read)).data.to_dict() and read.text.strip().startswith(
            f"# first-base-main-{known.kind}"
        )
    assert "base_model" not in header(
        policy_card(dataclasses.replace(facts, weights=dataclasses.replace(facts.weights, location="/")))
    )


def test_a_card_of_the_released_dataset(facts):
    speeches = facts.receipts["01_speeches"]
    origins = [
        {
            "source": "released",
            "licence": "CC-BY-NC-4.0",
            "page": "https://huggingface.co/datasets/Psychotherapy-LLM/PsychoCounsel-Preference",
        }
    ]
    receipts = {"01_speeches": {**speeches, "settings": {"speeches": {**speeches["settings"]["speeches"], "sources": ["released"]}}, "origins": origins},
                "04_pairs": {**facts.receipts["04_pairs"], "rater": "GPT-4o, as released"}}  # fmt: skip
    text = policy_card(dataclasses.replace(facts, receipts=receipts, weights=LLAMA, judge="", reference=""))
    found = header(text)
    assert (
        found["license"] == "other"
        and found["license_name"]
        and found["datasets"] == ["Psychotherapy-LLM/PsychoCounsel-Preference"]
        and found["base_model"] == LLAMA.location
    )
    assert (
        "llama3.2" in text
        and "rated by GPT-4o, as released" in text
        and "stand-in" not in text
        and "no judge was asked" in text
    )


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


def mutated(known, path):
    """The same facts with one number changed."""
    if not path:
        return known + 1 if isinstance(known, int) else known * 1.5
    key, *rest = path
    if dataclasses.is_dataclass(known):
        return dataclasses.replace(known, **{key: mutated(getattr(known, key), rest)})
    if isinstance(known, dict):
        return known | {key: mutated(known[key], rest)}
    return type(known)(mutated(item, rest) if place == key else item for place, item in enumerate(known))


# numbers that no card shows: another stage's, the machine's, or pair numbers that are only counted
SILENT = {("settings", name) for name in ("pack_tokens", "checkpoints")} | {("iter_settings", name) for name in ("block", "checkpoints", "length_slack")} | {
    ("receipts", "01_speeches", "settings", "speeches", "test_fraction"), ("receipts", "03_ratings", "put_aside"), ("decoding", "seed"), ("point", "pairs")}  # fmt: skip
REPLACED = {"facts": {("trainings", 0, "pack_size"), ("trainings", 0, "dev_loss"), ("trainings", 0, "best_step")},  # the point says which step it is
            "online": {("settings", "learning_rate"), ("settings", "epochs"), ("point", "step"), *(("trainings", 3, *key) for key in (("pairs",), ("steps",), ("dropped", "no gap"), ("dropped", "same text")))}}  # fmt: skip


@pytest.mark.parametrize("kind", ["facts", "online"])
def test_a_number_that_changes_changes_the_card(kind, request):
    """The iterations' own learning rate and epochs stand in place of the offline ones, and what came after the chosen iteration is no part of it."""
    known = request.getfixturevalue(kind)
    before = policy_card(known)
    ways = [path for path in leaves(known) if path != ("chosen",)]
    silent = {path for path in ways if policy_card(mutated(known, path)) == before}
    assert {path for path in silent if "too_long" not in path} <= SILENT | REPLACED[kind]
    assert (
        len(ways) > 50
        and {("point", name) for name in room.MEASURES} | {("decoding", "max_tokens")} <= set(ways) - silent
    )
    assert kind == "facts" or policy_card(dataclasses.replace(known, chosen=2)) != before


@pytest.mark.parametrize("kind", ["facts", "online"])
def test_every_number_in_the_card_is_a_fact(kind, request):
    """Each number is one of the facts, a percentage or sum of them, or stands in the fixed words of any card."""
    known = request.getfixturevalue(kind)
    values = []
    for path in leaves(known):
        found = known
        for key in path:
            found = getattr(found, key) if dataclasses.is_dataclass(found) else found[key]
        values += [found, 100 * found]
    done = known.trainings[: known.chosen]
    values += [sum(one[key] for one in done) for key in ("pairs", "steps")] + [
        sum(len(one["too_long"]) for one in done),
        len(known.trainings),
    ]
    values += [sum(one["dropped"][reason] for one in done) for one in done[:1] for reason in one.get("dropped", {})]
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
        32,
        0.1,
        5e-7,
        64,
        16,
        6400,
        8,
    ]  # the section, interval and labels; address and emergency numbers; the paper's own, in its deviations
    text = policy_card(known)
    words = re.sub(
        r"`[0-9a-f]{12}…`|revision [0-9a-f]+|commit [0-9a-f]+|--revision \S+|torch \S+|trl \S+|127\.0\.0\.1(:8000)?|distinct-\d|Llama-\S+",
        "",
        text.split("---\n", 2)[2],
    )
    for number in NUMBERS.findall(words):
        assert any(abs(float(number) - value) <= max(5e-4, 0.006 * abs(value)) for value in values), (number, words)
    paper = text.split("## Deviations from the paper")[1].split("\n## ")[0]
    assert "6400" not in text.replace(paper, "") and "5e-07" not in text.replace(paper, ""), (
        "the paper's numbers stand in the deviations alone"
    )


def test_the_card_says_what_was_done(facts, online):
    for known, said in (
        (facts, ("by offline DPO", "β = 0.15, label smoothing 0.02, no likelihood term", "rank 16 (alpha 24, last 11 "
                                                                                         "layers), merged into the "
                                                                                         "weights", "computed with in bfloat16", "0.0004, warm-up over 7%", "4 pairs in a step",
                 "12 pairs longer than 777 tokens; 5 others", "step 61 of 89", "0.6931 at the first step, 0.3456 at "
                                                                               "the last", "98.5%", "84 speeches are held out for testing, and took no part", "Model A; Model B",
                 "against Model B", "Least".lower() + " DPO loss on development pairs", "never on test "
                                                                                        "speeches", "152 answers to 38 development speeches", "| proxy win rate, % | — | 61.6 | 55.1 to 68.3 |",
                 "| KL to the base, nats per answer | — | 4.757 | 4.26 to 5.28 |", "| mean reward | 0.517 | 1.253 | "
                                                                                   "1.12 to 1.42 |", "| distinct-2 | — | 0.419 | — |", "learning rate: 0.0004 here, 5e-07 in the paper")),
        (online, ("by iterative online DPO", "4 were trained, this is number 3", "the policy of the iteration "
                                                                                 "before", "- reference: the base "
                                                                                           "model", "322 client speeches", "7 for each, at temperature 0.93 from the 44 likeliest", "top-p 0.97",
                  "301, 302, 303 in the iterations", "66 steps in all", "plus 0.21 ×", "3 pairs longer than 777 "
                                                                                       "tokens, 6 for no gap, 6 for "
                                                                                       "same text", "906 training pairs", "highest mean reward on development speeches",
                  "candidates for each prompt: 7 here, 8 in the paper", "Bradley-Terry on base chose among "
                                                                        "them", "writes plain DPO")),
    ):  # fmt: skip
        text = policy_card(known)
        for one in said:
            assert one in text, one
    assert "highest judged win rate" in policy_card(
        dataclasses.replace(facts, settings=DpoSettings(select="win-rate"))
    ) and "every weight" in policy_card(dataclasses.replace(facts, settings=DpoSettings()))


def test_the_notice_comes_first_and_stand_ins_are_named(facts, online):
    for known in (facts, online):
        text = policy_card(known)
        assert (
            text.index(NOTICE) < text.index("A policy trained from") < text.index("## Data") and text.count(NOTICE) == 2
        ), "on top, and above the commands"
        assert (
            "a stand-in, no clinical judge" in text
            and "judged on development speeches by offline rubric (stand-in)" in text
        )
    for word in (
        "not a therapist",
        "people in crisis",
        "qualified person must review",
        "emergency services",
        "no medical advice",
    ):
        assert word in NOTICE
    assert "numbers mean nothing" in policy_card(
        dataclasses.replace(facts, profile="tiny")
    ) and "size of a laptop" in policy_card(dataclasses.replace(facts, profile="demo"))


def test_what_was_not_measured_is_not_shown(facts):
    bare = dataclasses.replace(
        facts, point={"reward": 1.0, "judged": None, "kl": None}, base_point=None, judge="", reference=""
    )
    text = policy_card(bare)
    table = [line for line in text.split("## Development numbers")[1].splitlines() if line.startswith("|")]
    assert len(table) == 3 and table[-1] == "| mean reward | — | 1.0 | — |" and "step 61 of 89" in text


def test_deviations_are_the_settings_that_differ(facts, online):
    gpt = {**facts.receipts, "04_pairs": {**facts.receipts["04_pairs"], "rater": "gpt-4o-2024-08-06"}}
    paper = dataclasses.replace(facts, weights=LLAMA, settings=DpoSettings(), receipts=gpt)
    assert policy_deviations(paper) == [] and "None that we know of." in policy_card(paper)
    assert (
        len(
            policy_deviations(
                dataclasses.replace(
                    online, weights=LLAMA, settings=DpoSettings(), receipts=gpt, iter_settings=IterSettings()
                )
            )
        )
        == 1
    ), "what the paper leaves open"
    assert "Only one seed." in policy_card(dataclasses.replace(paper, deviations=("Only one seed.",)))


def test_missing_facts_are_one_line(facts, online):
    without = lambda name, key: {**facts.receipts, name: {k: v for k, v in facts.receipts[name].items() if k != key}}  # noqa: E731
    for known, changed, said in (
        (facts, {"receipts": without("01_speeches", "audit")}, "audit"), (facts, {"receipts": without("04_pairs", "rater")}, "rater"), (facts, {"receipts": without("04_pairs", "outputs")}, "outputs"),
        (facts, {"receipts": {k: v for k, v in facts.receipts.items() if k != "03_ratings"}}, "03_ratings"), (facts, {"receipts": {}}, "01_speeches"), (facts, {"point": {}}, "no reward"),
        (facts, {"trainings": []}, "0 trainings"), (facts, {"trainings": [{"pairs": 3, "steps": 1}]}, "too_long"), (online, {"chosen": 0}, "iteration 0"), (online, {"chosen": None}, "iteration None"),
        (online, {"iter_settings": None}, "iter_settings"), (online, {"trainings": [{}] * 3}, "training 1")):  # fmt: skip
        assert said in one_line(lambda known=known, changed=changed: policy_card(dataclasses.replace(known, **changed)))


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Safe",
    "a: [b, {c: d}",
    "'\"`\\",
    "![x](http://evil)<script>alert(1)</script>",
    "| a | b |\n|---|",
    "\u2028# Clinically proven\u2028",
    "> [!NOTE]\n> safe",
    "```\n# out\n```",
    "\r# z",
    "%YAML 2",
    "\x00",
    "--- ",
    "*/**",
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40)))
def test_hostile_labels_change_no_line_of_structure(facts, word):
    from huggingface_hub import ModelCard

    def filled(label):
        receipts = {
            **facts.receipts,
            "04_pairs": {**facts.receipts["04_pairs"], "rater": f"gpt {label}", "models": {"a": {"label": label}}},
        }
        return policy_card(dataclasses.replace(facts, weights=dataclasses.replace(facts.weights, label=f"b {label}"), scorer=f"s {label}", judge=f"j {label}", reference=f"r {label}", receipts=receipts, run="run",
                                               deviations=(f"d {label}",)))  # fmt: skip

    text, tame = filled(word), filled("plain")
    assert header(text) == header(tame) and ModelCard(text).data.to_dict() == ModelCard(tame).data.to_dict()
    heads = [[line for line in one.splitlines() if re.match(r"\s*(#|```|---|\||> \[!)", line)] for one in (text, tame)]
    assert (
        [line.split(" ")[0] for line in heads[0]] == [line.split(" ")[0] for line in heads[1]]
        and text.count("](") == tame.count("](")
        and text.count("<") == tame.count("<")
    )
    assert quoted(quoted(word)) == quoted(word)


def test_a_hostile_run_stays_inside_its_field(facts):
    for word in HOSTILE:
        found = header(policy_card(dataclasses.replace(facts, run=word)))
        assert found["license"] == "unknown" and set(found) == set(header(policy_card(facts)))


def test_adapters_are_named_only_where_others_can_use_them(policy, made, facts):
    tiny, tokenizer, _, checkpoint = made
    for base, stands, served in (
        (facts.weights, True, True),
        (tiny, False, False),
        (Weights("x", str(policy), "x", "1"), False, False),
    ):
        save_adapter(checkpoint, tokenizer, base, policy)
        text = hand_over(policy, facts).read_text()
        assert ("apart in `adapter/`" in text, "--enable-lora" in text) == (stands, served)
        assert tiny.location not in text
    local = hand_over(
        policy,
        dataclasses.replace(
            facts, weights=Weights("x", str(policy), "x", "1"), location="outputs/demo/06_policy/x/dpo"
        ),
    ).read_text()
    assert "apart in `adapter/`" in local and "--enable-lora" not in local and str(policy) not in local


# ---- the hub

CHILD = """
import json, os, sys
os.environ |= json.loads(sys.argv[1])
from pathlib import Path
from psycopref.training import policy_card
from psycopref.training import reward_card
from psycopref.core.settings import StudyError
reward_card.ANSWER_SECONDS = 1.0
try:
    print(json.dumps({"url": policy_card.push_policy(Path(sys.argv[2]), sys.argv[3])}))
except StudyError as error:
    print(json.dumps({"error": str(error)}))
assert "torch" not in sys.modules
"""


def push(folder, tmp_path, address, repo="me/mine", token="hf_good"):
    [found] = in_child(
        CHILD,
        tmp_path,
        address,
        json.dumps({"HF_TOKEN": token, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}),
        str(folder),
        repo,
    )
    assert "\n" not in found.get("error", "") and "hf_" not in str(found).replace("HF_TOKEN", "")
    return found


@pytest.fixture
def handed(policy, facts):
    """A policy that was handed over, and what a training leaves beside it."""
    hand_over(policy, facts)
    for stray in ("scratch/a.txt", "checkpoint-8/b.txt", ".README.md.7.partial"):
        (policy / stray).parent.mkdir(exist_ok=True)
        (policy / stray).write_text("not for the hub")
    return policy


def test_the_hub_gets_the_policy_in_private(handed, made, facts, tmp_path):
    whole = {
        path.name: path.read_bytes() for path in handed.iterdir() if path.is_file() and not path.name.startswith(".")
    }
    with open_hub(Hub()) as hub:
        assert push(handed, tmp_path, hub.address) == {"url": f"{hub.address}/me/mine/commit/{'2' * 40}"}
    assert sums(hub.files) == sums(whole) and {
        "README.md",
        "NOTICE.md",
        "generation_config.json",
        "model.safetensors",
    } <= set(whole), "adapters of a folder stay here"
    [made_repo] = hub.made
    assert made_repo["visibility"] == "private"
    save_adapter(made[3], made[1], facts.weights, handed)
    hand_over(handed, facts)
    with open_hub(Hub(exists=True)) as hub:
        assert "url" in push(handed, tmp_path, hub.address)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/NOTICE.md"} <= set(
        hub.files
    ) and not [name for name in hub.files if name.startswith(("scratch", "checkpoint"))]
    assert not [name for name, data in hub.files.items() if made[0].location.encode() in data], (
        "no folder of this disk is told"
    )


def test_what_the_hub_refuses_is_one_line(handed, tmp_path):
    with open_hub(Hub(exists=False)) as hub:
        assert "is public, expected a private one" in push(handed, tmp_path, hub.address)["error"] and not hub.files
    with open_hub(Hub()) as hub:
        assert (
            "refused the token (401)" in push(handed, tmp_path, hub.address, token="hf_bad")["error"] and not hub.files
        )


def test_nothing_goes_out_without_its_notice(handed, facts, monkeypatch):
    monkeypatch.setattr("psycopref.training.reward_card._open_repo", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert "the name is malformed" in one_line(lambda: push_policy(handed, "mine"))
    assert "does not tell how to load 'me/other'" in one_line(lambda: push_policy(handed, "me/other"))
    for name in ("README.md", "NOTICE.md", "generation_config.json", "config.json", "model.safetensors"):
        kept = (handed / name).read_bytes()
        (handed / name).unlink()
        assert f"holds no {name.replace('model', '*')}" in one_line(lambda: push_policy(handed, "me/mine"))
        (handed / name).write_bytes(kept)
    (handed / "README.md").write_text(policy_card(facts).replace(NOTICE, "Fine for all."))
    assert "under our notice" in one_line(lambda: push_policy(handed, "me/mine"))
