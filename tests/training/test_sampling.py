"""Candidates: the same after any interruption, from each engine, and nothing left behind in memory or among the
processes."""

import contextlib
import dataclasses
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings as trials
from hypothesis import strategies as st

from psycopref.training import sampling
from psycopref.core.settings import IterSettings
from psycopref.models.generation import Decoding, Sample, generate
from psycopref.training.sampling import open_sampler, sample_candidates, score_candidates
from psycopref.training.texts import prompt_messages
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer

from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")

SERVER = Path(__file__).parents[1] / "servers" / "sampling_server.py"
SPEECHES = {f"s{i}": "I count the stairs. " * (1 + i % 3) + f"It is {i} now." for i in range(7)}
HOW = Decoding(max_tokens=5, temperature=1.0, top_k=50, seed=3)
BLOCKS = IterSettings(block=2)


@pytest.fixture
def tiny():
    return find_weights("random-tiny")


def sampled(tiny, folder, speeches=SPEECHES, settings=BLOCKS, how=HOW, n=2, dtype="float32"):
    return sample_candidates(tiny, speeches, folder, settings, how, n, dtype, "test")


@pytest.fixture
def opened(monkeypatch):
    """Count how often the local engine is opened, and what it is asked."""
    seen = {"opened": 0, "prompts": 0}
    load, ask = sampling.load_causal_lm, sampling.generate

    def counted_load(*arguments):
        seen["opened"] += 1
        return load(*arguments)

    def counted_ask(model, tokenizer, prompts, *arguments, **named):
        seen["prompts"] += len(prompts)
        return ask(model, tokenizer, prompts, *arguments, **named)

    monkeypatch.setattr(sampling, "load_causal_lm", counted_load)
    monkeypatch.setattr(sampling, "generate", counted_ask)
    return seen


# ---- blocks ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_cache):
    with patch.dict(os.environ, {"PSYCOPREF_CACHE": shared_cache}):
        folder = tmp_path_factory.mktemp("whole")
        return folder, sampled(find_weights("random-tiny"), folder)


def test_candidates_come_in_the_order_of_the_speeches_and_differ(whole):
    folder, samples = whole
    assert list(samples) == list(SPEECHES) and all(len(group) == 2 for group in samples.values())
    assert len({sample.text for group in samples.values() for sample in group}) > 10
    assert sorted(path.name for path in folder.iterdir()) == [f"block-000{i}.json" for i in range(4)]


@trials(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.sets(st.integers(0, 3)), torn=st.integers(0, 3), share=st.floats(0, 0.99), backwards=st.booleans())
def test_any_blocks_lost_or_torn_the_samples_are_the_same(tiny, whole, tmp_path_factory, kept, torn, share, backwards):
    source, samples = whole
    folder = tmp_path_factory.mktemp("again")
    for i in kept:
        body = (source / f"block-000{i}.json").read_bytes()
        (folder / f"block-000{i}.json").write_bytes(body[: int(share * len(body))] if i == torn else body)
    (folder / ".block-0002.json.77.partial").write_text("{")
    speeches = dict(reversed(SPEECHES.items())) if backwards else SPEECHES
    assert sampled(tiny, folder, speeches) == samples
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}


def test_what_is_done_is_not_done_again(tiny, whole, tmp_path, opened):
    source, samples = whole
    for i in (0, 1, 3):
        (tmp_path / f"block-000{i}.json").write_bytes((source / f"block-000{i}.json").read_bytes())
    assert sampled(tiny, tmp_path) == samples and opened == {"opened": 1, "prompts": 2}
    assert sampled(tiny, tmp_path) == samples and opened == {"opened": 1, "prompts": 2}
    assert sampled(tiny, tmp_path, {}) == {} and opened["opened"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"speeches": SPEECHES | {"s0": "Another day."}},
        {"how": dataclasses.replace(HOW, temperature=0.7)},
        *({"n": 3}, {"settings": IterSettings(block=3)}, {"dtype": "bfloat16"}),
    ],
)
def test_blocks_made_of_something_else_are_made_again(tiny, whole, tmp_path, change):
    source, samples = whole
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = sampled(tiny, tmp_path, **change)
    assert found != samples and found == sampled(tiny, tmp_path / "fresh", **change)
    expected = -(-len(SPEECHES) // change.get("settings", BLOCKS).block)
    assert len(list(tmp_path.glob("block-*.json"))) == expected, "blocks of another size are taken away"


def test_another_policy_engine_seed_or_way_to_draw_makes_other_blocks(tiny, tmp_path, monkeypatch):
    def made_of(policy=tiny, engine="local", how=HOW):
        own, settings = sampling.weights_identity(policy), IterSettings(block=2, engine=engine)
        return {b.made_of for b in sampling.plan_blocks(own, SPEECHES, tmp_path, settings, how, 2, "float32")}

    others = [made_of(dataclasses.replace(tiny, revision="f" * 64)), made_of(engine="server")]
    others.append(made_of(how=dataclasses.replace(HOW, seed=4)))
    assert all(not made_of() & other for other in others)
    local, server = made_of(), made_of(engine="server")
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "SEEDING", "numbers by block")
        assert not local & made_of() and server == made_of(engine="server"), "a server draws its own numbers"
    said = one_line(lambda: open_sampler("local", tiny, "int8").__enter__())
    assert "int8" in said, "a policy stays exact"
    own = sampling.weights_identity(tiny), SPEECHES, tmp_path, IterSettings(block=2), HOW, 2, "float32"
    seeds = [block.decoding.seed for block in sampling.plan_blocks(*own)]
    assert len({*seeds}) == len(seeds) > 1, "each block draws for itself"


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"made_of": 3, "samples": []}', '{"samples": {}}', "\xff"])
def test_no_block_is_no_error(tmp_path, content):
    (tmp_path / "block-0000.json").write_text(content, encoding="latin-1")
    assert sampling.read_made(tmp_path / "block-0000.json", "x", "samples") is None


KILLED = """
import json, os, signal, sys
from psycopref.training import sampling
from psycopref.core.settings import IterSettings
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights
import torch
torch.set_num_threads(1)
write, left = sampling.write_json, [2]
def cut(path, value):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return write(path, value)
sampling.write_json = cut
how, weights, speeches = Decoding(5, 1.0, 50, 1.0, 3), find_weights("random-tiny"), json.loads(sys.argv[2])
sampling.sample_candidates(weights, speeches, sys.argv[1], IterSettings(block=2), how, 2, "float32", "test")
"""


def test_a_killed_process_costs_one_block(tiny, whole, tmp_path, opened):
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(SPEECHES)]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-800:]
    assert len(list(tmp_path.glob("block-*.json"))) == 2
    assert sampled(tiny, tmp_path) == whole[1] and opened["prompts"] == 3


# ---- memory ----


def test_the_model_is_gone_behind_the_context_even_after_an_error(tiny, monkeypatch):
    held, load = [], sampling.load_causal_lm
    monkeypatch.setattr(
        sampling, "load_causal_lm", lambda *a: (lambda model: (held.append(weakref.ref(model)), model)[1])(load(*a))
    )
    with open_sampler("local", tiny, "float32") as sample:
        sample([prompt_messages("No.")], HOW, 2)
        assert held[0]() is not None
    assert held[0]() is None, "though `sample` is still here"
    with pytest.raises(KeyError), open_sampler("local", tiny, "float32"):
        raise KeyError
    gc.collect()
    assert held[1]() is None


# ---- vLLM in this process ----


class FakeLLM:
    """As much of vllm.LLM as we use; it answers with the tiny model."""

    made: list = []

    def __init__(self, model, *, dtype, max_model_len, generation_config, **adapted):
        assert generation_config == "vllm" and dtype in ("float32", "bfloat16")
        self.adapted, self.dtype = adapted, dtype
        if max_model_len == 13:
            raise ValueError("Free memory on device (1.0/80.0 GiB) is less than desired.\nDecrease GPU memory use.")
        weights = find_weights("random-tiny")
        self.model, self.tokenizer, self.alive = load_causal_lm(weights, dtype), load_tokenizer(weights), True
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self.end))
        FakeLLM.made.append(weakref.ref(self))

    def end(self):
        self.alive = False
        FakeLLM.ended += 1

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert self.alive and len(prompts) == len(sampling_params)
        if lora_request is not None:
            assert self.adapted["enable_lora"] and self.adapted["max_lora_rank"] == 16
            place = Path(lora_request.path)
            assert (place / "adapter_model.safetensors").is_file() and self.adapted["tokenizer"] == str(place.parent)
            self.model = load_causal_lm(find_weights(str(place.parent)), self.dtype)
        return [self.answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, sampling_params)]

    def answer(self, ids, params):
        outputs, text = [], self.tokenizer.decode(ids)
        for i in range(params.n):
            how = (params.max_tokens, params.temperature, max(0, params.top_k), params.top_p, params.seed + i)
            [[own]] = generate(self.model, self.tokenizer, [text], Decoding(*how), name="")
            tokens = [5] * own.n_tokens + [2] * (own.finish_reason == "stop")
            said = {"text": own.text, "finish_reason": own.finish_reason, "token_ids": tokens}
            outputs.append(types.SimpleNamespace(index=i, **said))
        return types.SimpleNamespace(outputs=outputs[::-1])


@dataclasses.dataclass
class FakeParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    repetition_penalty: float = 1.0

    def __post_init__(self):
        assert self.temperature > 0 or self.n == 1, "n must be 1 when using greedy sampling"
        assert 0 < self.top_p <= 1 and self.top_k >= -1


@pytest.fixture
def vllm(monkeypatch):
    FakeLLM.made, FakeLLM.ended = [], 0
    cleaned = []
    state = types.SimpleNamespace(cleanup_dist_env_and_memory=lambda shutdown_ray=False: cleaned.append(1))
    engine = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=FakeParams)
    request = types.SimpleNamespace(LoRARequest=lambda name, number, path: types.SimpleNamespace(path=path))
    modules = {"vllm": engine, "vllm.distributed": types.SimpleNamespace(parallel_state=state)}
    modules |= {"vllm.lora": types.SimpleNamespace(request=request), "vllm.lora.request": request}
    for name, module in {**modules, "vllm.distributed.parallel_state": state}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cleaned


def test_vllm_samples_blocks_and_is_destroyed(tiny, tmp_path, vllm):
    settings = IterSettings(block=3, engine="vllm")
    found = sampled(tiny, tmp_path, settings=settings)
    assert (
        list(found) == list(SPEECHES)
        and len(FakeLLM.made) == FakeLLM.ended == len(vllm) == 1
        and FakeLLM.made[0]() is None
    )
    (tmp_path / "block-0001.json").unlink()
    assert sampled(tiny, tmp_path, settings=settings) == found
    for sample in (s for group in found.values() for s in group):
        assert sample.n_tokens == 5 if sample.finish_reason == "length" else sample.n_tokens < 5
    assert len({s.text for group in found.values() for s in group}) > 10


def test_vllm_reads_the_prompt_that_the_local_engine_reads(tiny, vllm):
    prompts, greedy = [prompt_messages(text) for text in SPEECHES.values()], Decoding(max_tokens=6)
    with open_sampler("vllm", tiny, "float32") as sample:
        theirs = sample(prompts, greedy, 3)
    with open_sampler("local", tiny, "float32") as sample:
        assert theirs == sample(prompts, greedy, 3)


@pytest.fixture
def adapted(tiny, tmp_path):
    """A policy that is the tiny model with an adapter."""
    from psycopref.core.settings import LoraSettings
    from psycopref.training.texts import add_lora, save_policy

    model = add_lora(load_causal_lm(tiny, "float32"), LoraSettings(rank=4, alpha=8))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "checkpoint")
    save_policy(tmp_path / "checkpoint", load_tokenizer(tiny), tiny, tmp_path / "adapted")
    return find_weights(str(tmp_path / "adapted"))


def test_vllm_gets_the_base_and_the_adapter(tiny, adapted, vllm):
    prompts, greedy, found = [prompt_messages(text) for text in SPEECHES.values()], Decoding(max_tokens=6), {}
    for engine, policy in (("vllm", adapted), ("local", adapted), ("vllm", tiny)):
        with open_sampler(engine, policy, "float32") as sample:
            found[engine, policy.name] = sample(prompts, greedy, 1)
    assert found["vllm", adapted.name] == found["local", adapted.name] != found["vllm", tiny.name]


def test_vllm_ends_after_an_error_too(tiny, vllm):
    with pytest.raises(KeyError), open_sampler("vllm", tiny, "float32"):
        raise KeyError
    gc.collect()
    assert FakeLLM.ended == 1 and FakeLLM.made[0]() is None


def test_vllm_refusals(tiny, vllm, monkeypatch):
    with open_sampler("vllm", tiny, "float32") as sample:
        assert "4096" in one_line(lambda: sample([prompt_messages("word " * 5000)], HOW, 2))
    monkeypatch.setattr(sampling, "MODEL_LENGTH", 13)
    assert "Free memory" in one_line(lambda: open_sampler("vllm", tiny, "float32").__enter__())
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "pip install vllm" in one_line(lambda: open_sampler("vllm", tiny, "float32").__enter__())


# ---- a server ----


def test_a_server_of_ours_has_a_copy_on_each_gpu(tiny, monkeypatch):
    monkeypatch.delenv("PSYCOPREF_SERVE", raising=False)
    monkeypatch.delenv("PSYCOPREF_SERVER_URL", raising=False)
    monkeypatch.delenv("PSYCOPREF_PROCESSES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name)
    for gpus, wanted, copies in ((0, "", 1), (1, "", 1), (8, "", 8), (8, "4", 4), (2, "4", 2)):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setenv("PSYCOPREF_PROCESSES", wanted)
        words = sampling.serve_command(tiny, "float32", 8123)
        told = dict(zip(words, words[1:]))
        assert sampling.sampling_gpus() == copies == int(told.get("--data-parallel-size", 1))
        assert told["--dtype"] == "float32" and told["--max-model-len"] == "4096"
    monkeypatch.setenv("PSYCOPREF_SERVE", "mine {model} --port {port}")
    assert sampling.serve_command(tiny, "float32", 8123) == ["mine", tiny.location, "--port", "8123"]


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Let PSYCOPREF_SERVE start the tests' server with a fault; what it was asked is in the log that is returned."""
    monkeypatch.setattr(sampling, "ATTEMPTS", 2)
    monkeypatch.delenv("PSYCOPREF_SERVER_URL", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(sampling.tempfile, "tempdir", None)

    def start(fault="", after=0, **more):
        log = tmp_path / f"calls-{fault}.jsonl"
        words = [sys.executable, str(SERVER), "--model", "{model}", "--port", "{port}", "--log", str(log)]
        words += ["--fault", fault, "--after", str(after)]
        monkeypatch.setenv("PSYCOPREF_SERVE", shlex.join(words))
        return log

    return start


def notes(log, kind):
    return [note[kind] for line in log.read_text().splitlines() for note in [json.loads(line)] if kind in note]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def gone(pids, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


SERVED = IterSettings(block=3, engine="server")


def test_a_server_is_started_asked_and_ended(tiny, tmp_path, serve):
    log = serve()
    found = sampled(tiny, tmp_path / "blocks", settings=SERVED, n=4)
    bodies, [pids] = notes(log, "body"), notes(log, "pids")
    assert not any(map(alive, pids)), "the server and its child are gone when the context ends"
    assert len(bodies) == len(SPEECHES) and len({body["seed"] for body in bodies}) == len(SPEECHES)
    asked = {"model": "policy", "n": 4, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_completion_tokens": 5}
    assert all(body | asked | {"min_p": 0.0, "repetition_penalty": 1.0} == body for body in bodies)
    seeds = {json.dumps(body["messages"]): body["seed"] for body in bodies}
    tokenizer, here = load_tokenizer(tiny), _server_candidate()
    for name, group in found.items():
        messages = prompt_messages(SPEECHES[name])
        said = [here(messages, seeds[json.dumps(messages)], place) for place in range(4)]
        assert group == [
            Sample(text, why, 5 if why == "length" else len(tokenizer(text).input_ids)) for text, why in said
        ]
    assert not list(tmp_path.glob("psycopref-server-*")), "the log of a good server is taken away"


def _server_candidate():
    import importlib.util

    spec = importlib.util.spec_from_file_location("sampling_server", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.candidate


def test_a_server_gets_the_base_and_the_adapter_and_is_asked_for_both(tiny, adapted, tmp_path, serve, monkeypatch):
    log = serve()
    assert len(sampled(adapted, tmp_path / "blocks", settings=SERVED)) == len(SPEECHES)
    assert {body["model"] for body in notes(log, "body")} == {"adapted"}
    words = sampling.serve_command(adapted, "bfloat16", 8123)
    wanted = {"--model": tiny.location, "--max-lora-rank": "16", "--tokenizer": adapted.location}
    wanted["--lora-modules"] = f"adapted={adapted.location}/adapter"
    assert "--enable-lora" in words and all(words[words.index(name) + 1] == own for name, own in wanted.items())
    monkeypatch.delenv("PSYCOPREF_SERVE")
    monkeypatch.setattr(sampling.shutil, "which", lambda name: name)
    words = sampling.serve_command(adapted, "bfloat16", 8123)
    assert words[:3] == ["vllm", "serve", tiny.location] and wanted["--lora-modules"] in words
    base = [{"id": "policy", "root": tiny.location}]
    assert "adapted" in one_line(lambda: sampling.served_name("http://…", base, adapted, True)), "the base is not it"


def test_a_server_that_dies_half_way_costs_the_block_it_was_at(tiny, tmp_path, serve):
    whole = (serve(), sampled(tiny, tmp_path / "whole", settings=SERVED))[1]
    serve("die", after=4)
    message = one_line(lambda: sampled(tiny, tmp_path / "blocks", settings=SERVED))
    assert "has ended" in message and "status 9" in message
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-0000.json"]
    log = serve()
    log.unlink()
    assert sampled(tiny, tmp_path / "blocks", settings=SERVED) == whole and len(notes(log, "body")) == len(SPEECHES) - 3


def test_a_server_with_another_model_is_ended_in_one_line(tiny, tmp_path, serve):
    log = serve("root")
    assert "/models/last-iteration" in one_line(lambda: sampled(tiny, tmp_path / "blocks", settings=SERVED))
    assert not (tmp_path / "blocks").exists() and gone(notes(log, "pids")[0])


def test_a_server_that_never_answers_is_given_up_and_ended(tiny, tmp_path, serve, monkeypatch):
    log = serve("mute")
    monkeypatch.setattr(sampling, "START_SECONDS", 1.5)
    assert "no answer" in one_line(lambda: sampled(tiny, tmp_path / "blocks", settings=SERVED))
    assert not any(map(alive, notes(log, "pids")[0] if log.exists() else []))


def test_a_server_that_won_t_end_is_made_to(tiny, tmp_path, serve, monkeypatch):
    log = serve("deaf")
    monkeypatch.setattr(sampling, "GRACE", 0.5)
    assert len(sampled(tiny, tmp_path / "blocks", settings=SERVED)) == len(SPEECHES)
    assert gone(notes(log, "pids")[0])


ABANDONED = """
import os, signal
from psycopref.training.sampling import _started
from psycopref.models.weights import find_weights
with _started(find_weights("random-tiny"), "float32"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_server_ends_when_we_are_killed(tiny, serve):
    log = serve()
    done = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-800:]
    assert gone(notes(log, "pids")[0])


@pytest.fixture(scope="module")
def somebodys(tmp_path_factory, shared_cache):
    """A server that somebody else started: its address and its log."""
    port, log = sampling.free_port(), tmp_path_factory.mktemp("standing") / "calls.jsonl"
    with patch.dict(os.environ, {"PSYCOPREF_CACHE": shared_cache}):
        location = find_weights("random-tiny").location
    words = ["--model", location, "--port", str(port), "--name", "my-policy", "--log", str(log)]
    process = subprocess.Popen([sys.executable, str(SERVER), *words])
    yield f"http://127.0.0.1:{port}/v1", log
    for pid in notes(log, "pids")[0]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def standing(somebodys, monkeypatch):
    """Ask that server; what the test asked is returned by the function."""
    url, log = somebodys
    for _ in range(600):
        with contextlib.suppress(ConnectionError):
            assert sampling.listed_models(url)
            break
        time.sleep(0.05)
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", url + "/")
    monkeypatch.setenv("PSYCOPREF_SERVE", "no-such-command {model} {port}")
    monkeypatch.setattr(sampling, "ATTEMPTS", 2)
    before = len(notes(log, "body"))
    return lambda: notes(log, "body")[before:]


def test_a_standing_server_is_asked_and_left_alone(tiny, tmp_path, standing):
    assert len(sampled(tiny, tmp_path / "blocks", settings=SERVED)) == len(SPEECHES)
    assert [body["model"] for body in standing()] == ["my-policy"] * len(SPEECHES)


def test_a_standing_server_with_another_policy_is_refused(tiny, tmp_path, standing, monkeypatch):
    shutil.copytree(tiny.location, tmp_path / "next-iteration")
    policy = find_weights(str(tmp_path / "next-iteration"))
    assert (
        "next-iteration" in one_line(lambda: sampled(policy, tmp_path / "blocks", settings=SERVED)) and not standing()
    )
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", f"http://127.0.0.1:{sampling.free_port()}/v1")
    assert "start one" in one_line(lambda: sampled(tiny, tmp_path / "blocks", settings=SERVED))
    monkeypatch.setenv("PSYCOPREF_SERVER_URL", "http://[::1/v1")
    assert "expected an address" in one_line(lambda: sampled(tiny, tmp_path / "blocks", settings=SERVED))


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_vllm_s_other_ends_are_no_answers(reason):
    one = types.SimpleNamespace(index=0, text="Well?", finish_reason=reason, token_ids=[1, 2])
    assert "look at its log" in one_line(lambda: sampling._vllm_samples([types.SimpleNamespace(outputs=[one])], 1))
    one.finish_reason = "length"
    assert sampling._vllm_samples([types.SimpleNamespace(outputs=[one])], 1)[0][0].finish_reason == "length"


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_calls_that_break_are_made_again(tiny, tmp_path, standing, fault):
    speeches = {name: f"[{fault}] {text}" for name, text in SPEECHES.items()}
    assert len(sampled(tiny, tmp_path, speeches, SERVED)) == len(SPEECHES) and len(standing()) == 2 * len(SPEECHES)


@pytest.mark.parametrize("fault, expected", [("short", "found 1 candidates, expected 2"), ("long", "context length")])
def test_calls_that_stay_broken_are_one_line_and_cost_their_block(tiny, tmp_path, standing, fault, expected):
    speeches = SPEECHES | {"s0": f"[{fault}]"}  # the shortest, in the last block
    assert expected in one_line(lambda: sampled(tiny, tmp_path, speeches, SERVED))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0000.json", "block-0001.json"]
    assert len(standing()) == len(SPEECHES)


def test_the_likeliest_answer_is_asked_once(tiny, tmp_path, standing):
    found = sampled(tiny, tmp_path, settings=SERVED, how=Decoding(max_tokens=5), n=3)
    assert all(len(group) == 3 and len(set(group)) == 1 for group in found.values()) and {
        (b["n"], b["top_k"]) for b in standing()
    } == {(1, -1)}


def test_a_template_that_writes_a_date_gets_ours(tiny, tmp_path, standing):
    shutil.copytree(tiny.location, tmp_path / "dated")
    template = tmp_path / "dated" / "chat_template.jinja"
    template.write_text(
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        + template.read_text()
    )
    with patch.object(sampling, "served_name", return_value="my-policy"):
        sampled(find_weights(str(tmp_path / "dated")), tmp_path / "blocks", settings=SERVED)
    assert all(body["chat_template_kwargs"] == {"date_string": "26 Jul 2024"} for body in standing())


def test_a_proxy_in_the_environment_does_not_come_between(tiny, tmp_path, standing, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert len(sampled(tiny, tmp_path / "blocks", settings=SERVED)) == len(SPEECHES)


def test_the_command_for_a_hub_model_pins_its_commit(tiny, monkeypatch):
    monkeypatch.delenv("PSYCOPREF_SERVE", raising=False)
    monkeypatch.setattr(sampling, "model_length", lambda policy: 4096)
    monkeypatch.setattr(sampling.shutil, "which", lambda name: name)
    local, hub = (
        sampling.serve_command(dataclasses.replace(tiny, location=where, revision="abc"), "bfloat16", 8123)
        for where in (tiny.location, "owner/model")
    )
    assert local[:5] == ["vllm", "serve", tiny.location, "--port", "8123"] and "--revision" not in local
    assert hub[-4:] == ["--revision", "abc", "--tokenizer-revision", "abc"] and "bfloat16" in hub and "4096" in hub


# ---- rewards ----


@pytest.fixture
def scorer(tiny, tmp_path):
    from psycopref.training.scoring import load_reward_model
    from psycopref.training.texts import save_merged

    tokenizer = load_tokenizer(tiny)
    save_merged(load_reward_model(tiny.location, tokenizer, "float32", new_head=0), tokenizer, tmp_path / "scorer")
    return tmp_path / "scorer"


ANSWERS = {"s1": ["Tell me more.", "No."], "s0": ["Tell me more.", "", "What then?"]}


def test_rewards_are_those_of_each_text_alone_in_the_reward_model_s_template(tiny, scorer, tmp_path):
    import torch

    from psycopref.training.scoring import load_scorer, find_scorer
    from psycopref.training.texts import dialogue

    (scorer / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    rewards = score_candidates(str(scorer), SPEECHES, ANSWERS, tmp_path, "float32")
    assert list(rewards) == ["s1", "s0"]
    model, tokenizer, _ = load_scorer(find_scorer(str(scorer)), "float32")
    assert dialogue(tokenizer, "Hm.", "No.").startswith("user: ")
    for name, texts in ANSWERS.items():
        for text, reward in zip(texts, rewards[name]):
            text = dialogue(tokenizer, SPEECHES[name], text)
            with torch.no_grad():
                alone = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
            assert abs(alone - reward) < 1e-4


def test_rewards_are_read_again_for_the_same_answers_only(scorer, tmp_path, monkeypatch):
    calls, load = [], sampling.load_scorer
    monkeypatch.setattr(sampling, "load_scorer", lambda *a: (calls.append(1), load(*a))[1])

    def scored(speeches=SPEECHES, answers=ANSWERS, dtype="float32"):
        return score_candidates(str(scorer), speeches, answers, tmp_path, dtype)

    first = scored()
    assert scored() == first and len(calls) == 1
    assert scored(answers=ANSWERS | {"s1": ["Tell me.", "No."]}) != first and len(calls) == 2
    assert scored() == first and len(calls) == 3, "the file held those of other answers"
    (tmp_path / "rewards.json").write_text('{"made_of": "')
    assert scored() == first and len(calls) == 4
    assert scored(SPEECHES | {"s0": "Other."}) != first and len(calls) == 5
    assert scored(answers={}) == {} and len(calls) == 5


def test_the_reward_model_is_freed_and_no_number_is_refused(scorer, tmp_path, monkeypatch):
    held, load = [], sampling.load_scorer

    def spoiled(*arguments):
        model, tokenizer, weights = load(*arguments)
        held.append(weakref.ref(model))
        if len(held) > 1:
            model.score.weight.data.fill_(float("nan"))
        return model, tokenizer, weights

    monkeypatch.setattr(sampling, "load_scorer", spoiled)
    score_candidates(str(scorer), SPEECHES, ANSWERS, tmp_path, "float32")
    assert held[0]() is None
    assert "no number" in one_line(
        lambda: score_candidates(str(scorer), SPEECHES, {"s1": ["Hm."]}, tmp_path / "odd", "float32")
    )
    assert not (tmp_path / "odd").exists()
