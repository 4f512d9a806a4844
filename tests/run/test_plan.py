"""The plan counts with a model's own tokenizer where that is on this machine, never asks the network unless told to, and adds up."""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from psycopref.run import cli
from psycopref.core import stages as config
from psycopref.run import estimates
from psycopref.run import plan
from psycopref.run import policy_plan
from psycopref.run import reward_plan
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.gateway.batches import BatchModel
from psycopref.models.chat import ChatReply
from psycopref.core.settings import DEMO, PAPER, PROFILES, TINY, StudyError, load_profile
from psycopref.core.stages import MIXES, cache_root
from psycopref.core.paper import resource_path
from psycopref.run.estimates import (
    ESTIMATED,
    GeneralSizes,
    Tokenizer,
    ask,
    file_counter,
    find_tokenizer,
    merge,
    pair_tokens,
    parameters,
    plan_sizes,
    prompt_tokens,
    reply_tokens,
    sample,
    tokenizer_file,
    with_tokenizers,
)
from psycopref.corpus.general import GENERAL_COLUMNS, grid
from psycopref.run.plan import (
    CALL_SECONDS,
    IN_FLIGHT,
    TABLE_WIDTH,
    batch_lines,
    duration_lines,
    plan_stages,
    plan_text,
    shares,
    sized_stages,
    token_lines,
)
from psycopref.core.prompts import rating_prompt
from psycopref.run.reward_plan import (
    SHARDS,
    cell_groups,
    missing_for_rewards,
    missing_gpu,
    missing_scorers,
    shortages,
    training_bytes,
    training_steps,
)
from psycopref.training.scoring import find_scorer
from psycopref.gateway.servers import OpenAIModel
from psycopref.training.texts import pair_rows
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer

from refusals import one_line

GPT_4O, QWEN = "openai:gpt-4o-2024-08-06", "Qwen/Qwen2.5-7B-Instruct"
SERVED = f"openai:{QWEN}@http://127.0.0.1:8000/v1"
ADDRESS = "https://encodings.example.org/tiny.tiktoken"
GRID = [stage for stage in config.STAGES if stage == "09_mixing"]
TEXT = "the cat sat with the other, then slept"


@pytest.fixture
def offline(monkeypatch):
    """No name is looked up and nothing is connected to."""

    def refuse(*arguments, **more):
        raise AssertionError("the network was asked")

    for owner, name in (
        (socket, "getaddrinfo"),
        (socket, "create_connection"),
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
    ):
        monkeypatch.setattr(owner, name, refuse)


@pytest.fixture
def encoding(monkeypatch, tmp_path):
    """An encoding of 256 bytes and two merges in the place of o200k_base; returns its bytes and its place in tiktoken's cache folder."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"e "]
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))

    def construct():
        ranks = tiktoken.load.load_tiktoken_bpe(ADDRESS, hashlib.sha256(data).hexdigest())
        return {
            "name": "o200k_base",
            "pat_str": r"[\s\S]+",
            "mergeable_ranks": ranks,
            "special_tokens": {"<|endoftext|>": 300},
        }

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"o200k_base": construct})
    folder = tmp_path / "tiktoken"
    folder.mkdir()
    return data, folder / hashlib.sha1(ADDRESS.encode()).hexdigest()


def bpe_count(text):
    return len(text.encode()) - text.count("th") - text.count("e ")


# ---- OpenAI's tokenizers ----


def test_an_encoding_in_the_cache_folder_counts(encoding, offline):
    data, path = encoding
    assert find_tokenizer(GPT_4O, [TEXT]) == ESTIMATED
    path.write_bytes(data)
    found = find_tokenizer(GPT_4O, [TEXT, TEXT])
    assert (
        found.name == "o200k_base"
        and found.count(TEXT) == bpe_count(TEXT)
        and found.characters == len(TEXT) / bpe_count(TEXT)
    )
    assert found.count("they wrote <|endoftext|>") > 10, "what a client writes is no special token"
    assert (
        find_tokenizer("batch:gpt-4o-2024-08-06", [TEXT]).name
        == find_tokenizer("openai:o1-mini", [TEXT]).name
        == "o200k_base"
    )


@pytest.mark.parametrize("harm", [lambda data: data[:100], lambda data: data.replace(b"dGg=", b"dGk=")])
def test_a_damaged_encoding_is_not_counted_with(encoding, offline, harm):
    data, path = encoding
    path.write_bytes(harm(data))
    assert find_tokenizer(GPT_4O, [TEXT]) == ESTIMATED


def test_an_encoding_is_downloaded_only_when_that_was_asked_for(encoding, monkeypatch):
    data, path = encoding
    fetched = []
    monkeypatch.setattr(tiktoken.load, "read_file", lambda address: fetched.append(address) or data)
    assert find_tokenizer(GPT_4O, [TEXT]) == ESTIMATED and fetched == [], "not asked for"
    assert (
        find_tokenizer(GPT_4O, [TEXT], fetch=True).name == "o200k_base"
        and fetched == [ADDRESS]
        and path.read_bytes() == data
    )
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert find_tokenizer(GPT_4O, [TEXT]).name == "o200k_base" and len(fetched) == 1, "now it is here"


def test_a_failed_download_is_an_estimate_that_says_so(encoding, monkeypatch):
    def fail(address):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken.load, "read_file", fail)
    found = find_tokenizer(GPT_4O, [TEXT], fetch=True)
    assert found.count is None and "o200k_base can't be had (ConnectionError)" in found.why


def test_the_paper_s_ratings_are_counted_token_by_token(encoding, offline):
    encoding[1].write_bytes(encoding[0])
    text = plan_text(PAPER)
    assert (
        "gpt-4o-2024-08-06, gpt-4o-mini-2024-07-18 and o1-mini: counted with o200k_base, " in text
        and "200 demo speeches of the package" in text
    )
    assert re.search(r"command-r-08-2024: estimated at 4 characters a\s+token: no tokenizer is known for it", text)
    assert max(len(line) for line in text.splitlines() if not line.startswith("  vllm serve ")) <= TABLE_WIDTH
    [row] = [row for row in plan_stages(PAPER) if row.stage == "03_ratings"]
    sizes = plan_sizes(PAPER)
    ratio = sum(map(len, sizes.texts)) / sum(map(bpe_count, sizes.texts))
    own = [bpe_count(rating_prompt(key, "", [""] * 4)) for key in PRINCIPLE_KEYS]
    assert row.input_tokens / row.calls == pytest.approx(sum(own) / 7 + (366 + 4 * 1400) / ratio, abs=1.5)
    assert row.usd == pytest.approx((row.input_tokens * 2.5 + row.output_tokens * 10) / 1e6)


# ---- open models ----


def words_file(path: Path, **more) -> Path:
    """A tokenizer that counts words, cut at three and padded to five."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(3)
    made.enable_padding(length=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub cache with two commits of one repository; the newer is main."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct"
    words_file(folder / "snapshots" / ("a" * 40) / "tokenizer.json")
    (folder / "snapshots" / ("b" * 40)).mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    return folder


def test_a_tokenizer_in_the_hub_s_cache_counts_whole_texts(hub, offline):
    for uri in (SERVED, f"local:{QWEN}", f"local:{QWEN}@{'a' * 40}", SERVED.replace("openai:", "batch:", 1)):
        found = find_tokenizer(uri, ["one two three four five six seven"])
        assert (
            found.name == "its own tokenizer" and found.count("one two three four") == 4 and found.count("one") == 1
        ), uri
        assert found.characters == len("one two three four five six seven") / 7
    for uri in (
        f"local:{QWEN}@{'b' * 40}",
        "local:Qwen/Other",
        "local:no-such-name",
        "local:./nowhere",
        "local:minilm-not",
    ):
        assert find_tokenizer(uri, ["one"]) == ESTIMATED, uri


def test_the_hub_is_asked_for_one_file_and_only_when_told_to(hub, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda **where: asked.append(where) or str(words_file(tmp_path / "new" / "tokenizer.json")),
    )
    assert find_tokenizer("local:owner/model@v2", ["one two"]) == ESTIMATED and asked == []
    assert find_tokenizer("local:owner/model@v2", ["one two"], fetch=True).characters == 3.5
    assert asked == [{"repo_id": "owner/model", "filename": "tokenizer.json", "revision": "v2"}]
    assert (
        find_tokenizer(SERVED, ["one"], fetch=True).name
        and find_tokenizer("local:minilm", ["one"], fetch=True)
        and len(asked) == 1
    ), "here, or with its weights"

    def refuse(**where):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert find_tokenizer("local:owner/model", ["one"], fetch=True).why == estimates.NO_HUB

    def gated(**where):
        raise PermissionError("gated")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    assert "can't be had (PermissionError)" in find_tokenizer("local:owner/model", ["one"], fetch=True).why


def test_a_hub_that_is_away_is_asked_once_and_openai_all_the_same(encoding, monkeypatch, tmp_path):
    asked = []

    def refuse(**where):
        asked.append(where["repo_id"])
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda address: encoding[0])
    text = plan_text(PAPER, fetch=True)
    names = text.partition("Tokens\n")[2].partition("Assumptions\n")[0]
    assert all(names.count(estimates.short_name(name)) == 1 for name in PAPER.backbones), (
        "served and trained, it is one model"
    )
    assert (
        len(asked) == 1
        and "the hub does not answer" in " ".join(text.split())
        and "gpt-4o-2024-08-06, gpt-4o-mini-2024-07-18 and o1-mini: counted" in text
    )


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Magic"}}', "\x00\x01"])
def test_a_broken_tokenizer_file_is_an_estimate_that_says_so(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    found = find_tokenizer(f"local:{tmp_path}", ["one"])
    assert found.count is None and found.why.startswith("its tokenizer can't be read (")


def test_counts_are_those_of_transformers():
    weights = find_weights("random-tiny")
    theirs, ours = load_tokenizer(weights), file_counter(tokenizer_file("random-tiny"))
    assert tokenizer_file("random-tiny") == cache_root() / "weights" / "random-tiny" / "tokenizer.json"
    for text in (
        *sample(["My brother called.", "Ünïcode — “quotes” 🙂", "", "a  b\n\n c"]),
        rating_prompt("empathy", "x", list("wxyz")),
    ):
        assert ours(text) == len(theirs(text, add_special_tokens=False).input_ids), text


def test_a_filled_prompt_has_the_tokens_that_the_plan_expects():
    "Prompts filled with real texts, counted whole, against own words counted and texts by their length."
    find_weights("random-tiny")
    speeches = [json.loads(line)["speech"] for line in resource_path("demo_speeches.jsonl").read_text().splitlines()]
    found = find_tokenizer("local:random-tiny", sample(speeches))
    exact, characters = [], 0
    for i in range(0, 60, 5):
        exact += [found.count(rating_prompt(key, speeches[i], speeches[i + 1 : i + 5])) for key in PRINCIPLE_KEYS]
        characters += sum(map(len, speeches[i : i + 5]))
    mean = characters / 60
    assert prompt_tokens(round(mean), round(mean / 4), 4, found)["rate"] == pytest.approx(
        sum(exact) / len(exact), rel=0.02
    )
    assert prompt_tokens(round(mean), round(mean / 4))["rate"] != pytest.approx(sum(exact) / len(exact), rel=0.1), (
        "four characters a token are off for this one"
    )


def test_each_model_reads_with_its_own_tokenizer():
    profile = load_profile("paper", {"ratings.compare_mode_speeches": 10})
    sizes = plan_sizes(profile, 1000)
    base = sized_stages(profile, sizes)
    for who, moved in (
        (
            f"local:{profile.backbones[0]}",
            {"05_reward", "06_policy", "07_win_rates", "10_judges", "08_ablations", *GRID},
        ),
        (
            profile.ratings.rater,
            {"03_ratings", "05_reward", "06_policy", "02_responses", "07_win_rates", "10_judges", "08_ablations"},
        ),
    ):
        rows = sized_stages(
            profile, replace(sizes, tokenizers={who: Tokenizer("half", 2.0, lambda text: len(text) // 2)})
        )
        more = [(a, b) for a, b in zip(base, rows) if a != b]
        assert {a.stage for a, _ in more} == moved and [r.calls for r in rows] == [r.calls for r in base]
        for a, b in more:
            assert (
                any(estimates.short_name(who) == estimates.short_name(name) for name in a.who)
                and a.input_tokens <= b.input_tokens <= 2 * a.input_tokens + 14 * a.calls
            ), a.work
    doubled = reply_tokens(4, Tokenizer("half", 2.0, lambda text: len(text) // 2))
    battles = [
        row for row in rows if "battles" in row.work and row.stage != "10_judges"
    ]  # of the judge, who is the rater too
    assert len(battles) == 2 and all(row.output_tokens == row.calls * doubled["battle"] for row in battles)
    assert all(doubled[key] == pytest.approx(2 * n, abs=2) for key, n in reply_tokens().items() if key != "rank")


# ---- the network ----


def test_no_plan_asks_the_network(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **where: pytest.fail("a download"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    for profile in PROFILES.values():
        text = plan_text(profile)
        assert max(len(line) for line in text.splitlines() if not line.startswith("  vllm serve ")) <= TABLE_WIDTH
    tokens = " ".join(plan_text(PAPER).partition("Tokens\n")[2].partition("Assumptions\n")[0].split())
    assert (
        re.search(
            "gpt-4o-mini-2024-07-18, o1-mini, [^:]* and [^:]*: each estimated at 4 characters a token: its tokenizer "
            "is not on this machine[.]",
            tokens,
        )
        and "`psycopref plan --fetch-tokenizers`" in tokens
    )
    for name in [
        *(member.model for member, _ in shares(PAPER, plan_sizes(PAPER))),
        *(find_scorer(name).location for name in PAPER.reward.scorers),
    ]:
        assert estimates.short_name(name) in tokens, "each model is named with what counts for it"


def test_the_command_line_downloads_only_with_its_option(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(plan, "plan_text", lambda profile, **more: seen.append((profile.name, more)) or "text")
    assert (
        cli.main(["plan", "--profile", "demo"]) == 0
        and cli.main(["plan", "--profile", "demo", "--fetch-tokenizers"]) == 0
    )
    assert seen == [("demo", {"fetch": False}), ("demo", {"fetch": True})] and capsys.readouterr().out == "text\ntext\n"


# ---- batches ----


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_a_batch_costs_in_the_plan_what_the_gateway_books(monkeypatch, factor):
    table = json.loads(resource_path("prices.json").read_text())
    table["batch_discount"]["factor"] = factor
    for module in ("run.plan", "run.estimates", "gateway.batches", "gateway.servers"):
        monkeypatch.setattr(f"psycopref.{module}.prices", lambda: table)
    for model in (OpenAIModel("gpt-4o"), BatchModel("gpt-4o")):
        assert ask("s", "w", model.uri, 1, 1000, 100).usd == pytest.approx(model.cost(ChatReply("", "stop", 1000, 100)))
    rows = [row for row in plan_stages(PAPER, 1000) if row.stage == "03_ratings" or ("battles" in row.work and row.usd)]
    usd = sum(row.usd for row in rows)
    [line] = batch_lines(plan_stages(PAPER, 1000))
    assert f"cost {factor * usd:,.2f} instead of {usd:,.2f} US dollars, {(1 - factor) * usd:,.2f} less" in line
    ordered = load_profile("paper", {"ratings.rater": "batch:gpt-4o-2024-08-06"})
    [row] = [row for row in plan_stages(ordered, 1000) if row.stage == "03_ratings"]
    assert row.usd == pytest.approx(factor * rows[0].usd) and row.input_tokens == rows[0].input_tokens
    assert "Batches: battles by" in batch_lines(plan_stages(ordered, 1000))[0] and "OPENAI_API_KEY" in plan_text(
        ordered, 1000
    )


def test_who_has_no_price_saves_nothing():
    for uri in (
        "rules:rubric",
        SERVED,
        "local:smollm2-135m",
        "openai:new-model",
        "openai:command-r@https://example.org/v1",
    ):
        assert (
            batch_lines(plan_stages(load_profile("paper", {"ratings.rater": uri, "evaluation.judge": uri}), 100)) == []
        ), uri


# ---- thinking, time ----


def test_hidden_reasoning_is_counted_at_its_most():
    sizes = plan_sizes(PAPER, 2000)
    [(member, calls)] = [(member, calls) for member, calls in shares(PAPER, sizes) if member.thinking]
    [row] = [row for row in plan_stages(PAPER, 2000) if "commercial" in row.work]
    assert calls == 400 and row.output_tokens == row.calls * 350 + calls * member.thinking
    [line] = plan.thinking_lines(PAPER, sizes)
    assert (
        line.startswith("o1-mini")
        and "4,096 hidden tokens" in line
        and f"{calls * 4096 * 4.4 / 1e6:,.2f} US dollars" in line
    )
    assert (
        plan.thinking_lines(load_profile("paper", {"speeches.sources": ["released"]}), sizes)
        == []
        == plan.thinking_lines(DEMO, sizes)
    )


def test_the_duration_is_the_slowest_of_what_holds_the_ratings_back(monkeypatch):
    monkeypatch.delenv("PSYCOPREF_RPM", raising=False), monkeypatch.delenv("PSYCOPREF_TPM", raising=False)
    rows = plan_stages(PAPER, 26_483)
    assert (
        f"{185_381 * CALL_SECONDS / IN_FLIGHT / 3600:.1f} hours with {IN_FLIGHT} calls in flight"
        in duration_lines(PAPER, rows)[0]
    )
    monkeypatch.setenv("PSYCOPREF_RPM", "500")
    assert f"{185_381 / 500 / 60:.1f} hours within PSYCOPREF_RPM=500." in duration_lines(PAPER, rows)[0]
    monkeypatch.setenv("PSYCOPREF_TPM", "800000")
    [row] = [row for row in rows if row.stage == "03_ratings"]
    tokens = row.input_tokens + row.calls * PAPER.ratings.max_tokens
    assert f"{tokens / 800_000 / 60:.1f} hours within PSYCOPREF_TPM=800000." in duration_lines(PAPER, rows)[0]
    speech = load_profile("paper", {"ratings.mode": "speech"})
    [row] = [row for row in plan_stages(speech, 26_483) if row.stage == "03_ratings"]
    tokens = row.input_tokens + row.calls * 7 * PAPER.ratings.max_tokens
    assert f"{tokens / 800_000 / 60:.1f} hours within PSYCOPREF_TPM" in duration_lines(speech, [row])[0]
    monkeypatch.setenv("PSYCOPREF_RPM", "many")
    assert "PSYCOPREF_RPM" in one_line(lambda: plan_text(PAPER))


def test_the_duration_is_silent_where_no_server_rates():
    assert duration_lines(DEMO, plan_stages(DEMO, 10)) == []
    released = load_profile("paper", {"speeches.sources": ["released"]})
    assert duration_lines(released, [row for row in plan_stages(PAPER, 10) if row.stage != "03_ratings"]) == []


def test_members_without_a_system_message_are_named():
    text = " ".join(plan_text(PAPER).split())
    assert (
        "No system message for gemma-2-9b-it, Orion-14B-Chat and o1-mini:" in text
        and "No system message" not in plan_text(DEMO)
    )


def test_the_sample_is_spread_over_all_speeches():
    texts = [str(i) for i in range(1000)]
    assert (
        sample(texts) == tuple(texts[::5])
        and sample(texts[:3]) == tuple(texts[:3])
        and len(set(sample(texts[:333]))) == 200
    )
    sizes = with_tokenizers(DEMO, plan_sizes(DEMO))
    assert (
        sizes.sampled == "client speeches of these sources"
        and len(sizes.texts) == 200
        and merge("s", "w", sized_stages(DEMO, sizes)).calls > 0
    )
    assert all("smollm2" in line or "tokens" in line.lower() or "downloads" in line for line in token_lines(sizes))


# ---- reward models ----


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_a_training_takes_the_steps_and_looks_of_the_trainer(pairs, batch, epochs, checkpoints):
    from psycopref.training.texts import step_plan

    settings = replace(DEMO.reward, batch_size=batch, epochs=epochs, checkpoints=checkpoints)
    steps, looks = training_steps(pairs, settings)
    if pairs < batch:
        assert (steps, looks) == (0, 0)
        return
    found = step_plan([10] * pairs, settings, 0)
    assert steps == found["steps"]
    assert looks == len({*range(found["every"], steps + 1, found["every"]), steps}), (
        "at every so many steps and at the last"
    )
    assert looks <= max(1, checkpoints)


def test_a_pair_has_the_tokens_that_training_computes():
    "The prompt once and both answers: rows as the trainer gets them, against the plan."
    weights = find_weights("random-tiny")
    speeches = [json.loads(line)["speech"] for line in resource_path("demo_speeches.jsonl").read_text().splitlines()]
    answers = [" ".join(speeches[i : i + 8])[:1400] for i in range(0, 80, 4)]
    pairs = pd.DataFrame(
        {
            "ID": "a",
            "prefID": range(10),
            "question": speeches[100:110],
            "chosen": answers[:10],
            "rejected": answers[10:],
        }
    )
    rows, long = pair_rows(pairs, load_tokenizer(weights), 4096)
    sizes = replace(with_tokenizers(TINY, plan_sizes(TINY)), characters=round(pairs.question.str.len().mean()))
    assert not long and pair_tokens(sizes, 1024, "random-tiny") == pytest.approx(
        np.mean([row["length"] for row in rows]), rel=0.04
    )


def test_every_scorer_of_table_1_has_a_row(tmp_path):
    safetensors.numpy.save_file(
        {"layer": np.zeros((300, 100)), "score": np.zeros((1, 100))}, tmp_path / "model-00001-of-00002.safetensors"
    )
    safetensors.numpy.save_file({"layer2": np.zeros((300, 100))}, tmp_path / "model-00002-of-00002.safetensors")
    profile = load_profile(
        "paper", {"reward.scorers": ["nemotron-70b", "skywork-gemma-27b", str(tmp_path), "me/unknown"]}
    )
    rows = {row.who[0]: row for row in plan_stages(profile, 1000) if row.stage == "05_reward"}
    assert parameters(str(tmp_path)) == 60_100
    assert rows["nemotron-70b"].gpu_hours / rows["skywork-gemma-27b"].gpu_hours == pytest.approx(70 / 27)
    assert rows[str(tmp_path)].gpu_hours / rows["nemotron-70b"].gpu_hours == pytest.approx(60_100 / 70e9)
    assert rows["me/unknown"].gpu_hours == 0 and "the size of me/unknown" in " ".join(
        plan_text(profile, 1000).partition("Not in the sums")[2].split()
    )
    assert len({row.calls for name, row in rows.items() if name in profile.reward.scorers}) == 1


@pytest.mark.parametrize("content", [b"", b"half", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_broken_folder_has_no_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert parameters(str(tmp_path)) is None and parameters(str(tmp_path / "nowhere")) is None


def test_training_holds_the_bytes_that_the_plan_says():
    import torch

    model = load_causal_lm(find_weights("random-tiny"), "float32")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimiser.step()
    own = list(model.parameters())
    tensors = [
        *own,
        *(p.grad for p in own),
        *(state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")),
    ]
    size, held = sum(p.numel() for p in own), sum(t.numel() * t.element_size() for t in tensors)
    assert held == sum(training_bytes(PAPER).values()) * size
    alone = policy_plan.training_memory(size, policy_plan.SHAPES[PAPER.backbones[0]], "DDP", 1, 1)
    assert held == sum(alone[name] for name in ("weights", "gradients", "moments"))


def test_the_remedy_is_what_the_machine_allows(monkeypatch):
    monkeypatch.delenv("PSYCOPREF_ACCELERATE", raising=False)
    name, path = SHARDS.split("=")
    assert name == "PSYCOPREF_ACCELERATE" and resource_path(path.removeprefix("psycopref/resources/")).is_file()

    def said(*gigabytes):
        monkeypatch.setattr(reward_plan, "gpu_memory", lambda: [int(1e9 * n) for n in gigabytes])
        return " ".join(missing_gpu(PAPER))

    assert "some 128 GB" in said() and SHARDS in said() and "reward.lora.rank" in said()
    assert said(141) == "" and f"set {SHARDS}" in said(80, 80) and "40 GB in all" in said(40)
    for sharding in ("fsdp2", "zero3"):
        monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(resource_path(f"accelerate/{sharding}.yaml")))
        assert said(80, 80) == "" and "80 GB in all" in said(40, 40)
    for whole in (str(resource_path("accelerate/ddp.yaml")), "nowhere.yaml"):
        monkeypatch.setenv("PSYCOPREF_ACCELERATE", whole)
        assert f"set {SHARDS}" in said(80, 80), "each GPU holds all of it"


def test_reward_models_of_others_need_the_hub_or_a_folder(offline, monkeypatch, tmp_path):
    by_score, by_logit = missing_scorers(PAPER.reward.scorers)
    assert (
        all(name in by_score for name in PAPER.reward.scorers if name != "nemotron-70b")
        and "each needs the hub, or a local folder" in by_score
    )
    assert "nemotron-70b" in by_logit and "needs the hub;" in by_logit, "a folder would be read by a head that it lacks"
    assert (
        "no .safetensors" in missing_scorers([str(tmp_path)])[0] and "no such folder" in missing_scorers(["skywork"])[0]
    )
    (tmp_path / "model.safetensors").touch()
    assert missing_scorers([str(tmp_path)]) == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    pushed = load_profile("tiny", {"reward.push_to_hub": "me/mine"})
    [line] = missing_for_rewards(pushed)
    assert line.startswith("reward.push_to_hub:") and "hf auth login" in line and missing_for_rewards(TINY) == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "any")
    assert missing_for_rewards(pushed) == []


# ---- the grid of mixes ----


def invented_domains(psy, general):
    "What a cell reads of both domains, with (train, dev) pairs each."

    def frame(n, name, **more):
        rows = [
            {"ID": f"{name}-{i}", "prefID": i, "question": "And 3?", "chosen": "Why?", "rejected": "Stop.", **more}
            for i in range(n)
        ]
        return pd.DataFrame(rows, columns=["ID", "prefID", "question", "chosen", "rejected", *more])

    said = {"messages": [{"role": "user", "content": "And 3?"}], "gap": 1.0}
    return SimpleNamespace(
        psy={part: frame(n, f"psy-{part}") for part, n in zip(("train", "dev"), psy)},
        general={part: frame(n, f"help-{part}", **said) for part, n in zip(("train", "dev"), general)},
    )


@pytest.mark.parametrize("budget", [8, 9, 12, 13, 20, 21])
def test_a_cell_takes_the_pairs_of_the_grid_and_is_refused_where_the_plan_says_so(budget):
    mixing = pytest.importorskip("psycopref.experiments.mixing_grid")
    profile = load_profile("tiny", {"mixing.budget": budget, "reward.batch_size": 2})
    sizes = replace(
        plan_sizes(TINY), train_pairs=20, dev_pairs=4, test_pairs=6, general=GeneralSizes(12, 3, 5, 400, "counted")
    )
    domains, mixes = invented_domains((20, 4), (12, 3)), dict(zip(MIXES, grid(budget)))
    for mix in MIXES[1:]:
        short = " ".join(shortages(replace(profile, mixing=replace(profile.mixing, cells=(mix,))), sizes))
        train, dev = (sum(n for n, _ in groups) for groups in cell_groups(profile, sizes, mix, "random-tiny"))
        try:
            own = mixing.cell_pairs(mixes[mix], domains, 0)
        except StudyError:
            assert f"cell {mix} asks for" in short
            continue
        assert short == "" and (len(own[0]), len(own[1])) == (train, dev), mix


@pytest.mark.skipif(not GRID, reason="the grid is no stage yet")
def test_the_grid_is_counted_cell_by_cell(offline):
    profile = load_profile(
        "paper",
        {
            "mixing.cells": ["half", "both-all"],
            "mixing.general": "demo",
            "mixing.rule": "helpfulness",
            "mixing.reward_bench": "",
        },
    )
    sizes = plan_sizes(profile)
    rows = [row for row in sized_stages(profile, sizes) if row.stage == "09_mixing"]
    assert [row.who[0] for row in rows] == [name for name in profile.backbones for _ in range(3)]
    assert rows[2].calls == 3 * 2 * (sizes.test_pairs + sizes.general.test), (
        "two cells and the model of chapter 5, both answers"
    )
    assert rows[1].gpu_hours > rows[0].gpu_hours and rows[4].gpu_hours / rows[1].gpu_hours == pytest.approx(8.03 / 3.21)
    total = merge("total", "total", sized_stages(profile, sizes)).gpu_hours
    without = merge(
        "total", "total", [row for row in sized_stages(profile, sizes) if row.stage != "09_mixing"]
    ).gpu_hours
    assert total == pytest.approx(without + sum(row.gpu_hours for row in rows))


@pytest.mark.skipif(not GRID, reason="the grid is no stage yet")
def test_general_pairs_that_are_here_are_counted(offline, tmp_path):
    rows = [
        dict(zip(GENERAL_COLUMNS, (f"Count to {i}.", text, rating, 3, 3, 2, 2)))
        for i in range(40)
        for text, rating in (("Yes.", 4), ("No, I won't.", 4 if i % 4 == 0 else 1))
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = plan_sizes(load_profile("demo", {"mixing.general": f"own={tmp_path / 'own.jsonl'}"})).general
    assert (sizes.train + sizes.dev + sizes.test, sizes.basis) == (30, "counted in own") and sizes.test and sizes.dev, (
        "ties make no pair"
    )
    assert sizes.characters == round(np.mean([len(f"Count to {i}.Yes.No, I won't.") for i in range(40) if i % 4]))
    lost = load_profile("demo", {"mixing.general": "own=/nowhere", "mixing.reward_bench": "/nowhere"})
    text = " ".join(plan_text(lost).split())
    assert (
        "10,681 general pairs (at most" in text
        and "2,985 pairs of 1,600" in text
        and "general pairs 'own': needs a local copy" in text
        and "RewardBench: needs a local copy" in text
    )
    assert "mixing.rule" in one_line(lambda: plan_text(load_profile("demo", {"mixing.rule": "80b"})))


def test_a_run_without_the_grid_says_nothing_of_it(monkeypatch):
    monkeypatch.setattr(config, "STAGES", {name: stage for name, stage in config.STAGES.items() if name != "09_mixing"})
    text = plan_text(PAPER)
    assert "05_reward" in text and not any(
        word in text for word in ("09_mixing", "RewardBench", "HelpSteer2", "helpsteer2", "mixing.budget")
    )


def test_importing_the_plan_stays_light():
    code = "import sys, psycopref.run.plan; print([m for m in ('numpy', 'pandas', 'torch', 'transformers', 'trl', 'huggingface_hub', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# ---- other judges ----


def test_other_judges_are_counted_as_the_stage_asks_them():
    from psycopref.feedback.battles import ORDERS
    from psycopref.evaluation.judging import contests, distinct_texts

    profile = load_profile(
        "paper",
        {"judges.speeches": 5, "judges.others": ["reward", "choose:local:smollm2-135m", "rules:rubric", "longer"]},
    )
    sizes = plan_sizes(profile)
    policies = [f"{backbone} {kind}" for backbone in profile.backbones for kind in range(plan.POLICIES)]
    speeches = pd.DataFrame({"speech_id": [f"s{i}" for i in range(5)], "speech": "Hm."})
    answers = pd.DataFrame(
        [
            {"speech_id": own, "policy": name, "setting": setting, "response": f"{own} {name} {setting}"}
            for own in speeches.speech_id
            for name in ("reference", *policies)
            for setting in (("free",) if name == "reference" else ("free", "length"))
        ]
    )
    asked = contests(speeches, answers)
    score, choose, battles = plan.judges_plans(profile, sizes)
    assert choose.calls == battles.calls == len(asked) and set(asked.order) == set(ORDERS), "the baseline is no work"
    assert (
        score.calls == sum(map(len, distinct_texts(asked).values()))
        and score.gpu_hours > 0
        and choose.gpu_hours > 0 == battles.gpu_hours
    )
    every = plan.judges_plans(load_profile("paper", {"judges.speeches": None}), sizes)[0]
    assert (
        every.calls
        == sizes.test * (1 + 2 * plan.POLICIES * plan.PLAN_SETTINGS)
        == plan.judges_plans(load_profile("paper", {"judges.speeches": 10**6}), sizes)[0].calls
    )


def test_the_main_judge_is_not_asked_twice_and_a_missing_stage_asks_nobody(monkeypatch):
    alone = load_profile("paper", {"judges.others": [PAPER.evaluation.judge, "longer"]})
    assert plan.judges_plans(alone, plan_sizes(alone)) == [] and "10_judges" not in plan_text(alone, 1000)
    monkeypatch.setattr(config, "STAGES", {name: stage for name, stage in config.STAGES.items() if name != "10_judges"})
    assert plan.other_judges(
        load_profile("paper", {"judges.others": ["rewards"]})
    ) == [] and "10_judges" not in plan_text(PAPER, 1000)


def test_what_other_judges_lack_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    judged = load_profile(
        "demo",
        {
            "judges.others": [
                "openai:another-model",
                "reward:owner/model",
                "choose:openai:served/model@http://127.0.0.1:8000/v1",
                "reward:./nowhere",
            ]
        },
    )
    said = " ".join(plan_text(judged).split())
    for words in (
        "OPENAI_API_KEY is not set: another-model",
        "a price for another-model",
        "hub access to owner/model",
        "a server at http://127.0.0.1:8000/v1 for model",
        "weights './nowhere'",
        "the size of owner/model",
    ):
        assert words in said, words
    assert "another-model" in said.partition("Tokens")[2].partition("Assumptions")[0], "what counts its tokens is said"
    said = one_line(lambda: plan_text(load_profile("demo", {"judges.others": ["rewards"]})))
    assert "'rewards'" in said and "Did you mean reward" in said


def test_tokenizers_of_other_judges_are_downloaded_only_when_told_to(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda **where: asked.append(where["repo_id"]) or str(words_file(tmp_path / "new" / "tokenizer.json")),
    )
    judged = load_profile(
        "tiny", {"judges.others": ["choose:local:owner/model", "reward:owner/scorer", "rules:rubric"]}
    )
    assert plan.counted_sizes(judged, 50).tokenizer("local:owner/model") == ESTIMATED and asked == []
    sizes = plan.counted_sizes(judged, 50, fetch=True)
    assert (
        sorted(asked) == ["owner/model", "owner/scorer"]
        and sizes.tokenizer("local:owner/model").name == sizes.tokenizer("owner/scorer").name == "its own tokenizer"
    )


def test_every_stage_that_works_has_a_line():
    for profile in PROFILES.values():
        assert [stage for stage in dict.fromkeys(row.stage for row in plan_stages(profile, 500))] == [
            stage for stage in config.STAGES if stage not in ("00_study", "13_report")
        ]
    [row] = [row for row in plan_stages(PAPER) if row.stage == "11_experts"]
    assert row.work == "kits for experts: 600 items" and not row.calls and row.usd is None
