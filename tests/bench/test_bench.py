"""The benches at their smallest size: what is measured in turn, scored, sampled, asked, killed and drawn."""

import ast
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench
from bench import given, measured, peak_mb, side_by_side
from bench_duplicates import mixed_speeches
from bench_gateway import CLIENTS, call_of, job_of, memory, throughput
from bench_generation import growth_bench, llama_samples, llama_server, make_work, ours, parts_bench, rivals_bench
from bench_machine import machine_bench
from bench_reward import made_texts, our_scores, plain_scores, reward_gap
from bench_reward import scoring_bench, scoring_growth, scoring_share, twin
from psycopref.feedback.pool import POOLS
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from psycopref.training.scoring import load_reward_model
from refusals import one_line


def test_sides_are_measured_in_turn_and_kept(tmp_path, monkeypatch):
    naps = []  # in seconds, by a clock of our own
    clock = SimpleNamespace(perf_counter=lambda: sum(naps), strftime=time.strftime)
    monkeypatch.setattr(bench, "time", clock)
    sides = {"ours": lambda: naps.append(1) or 1, "theirs": lambda: naps.append(3) or 1}
    found = side_by_side("example", "sleeping", "naps/s", sides | {"stock": lambda: naps.append(2) or 1}, rounds=2)
    assert naps == [1, 3, 2] * 3 and found["ratio"] == 3 and found["stock ratio"] == 2 and found["ratios"] == [3, 3]
    assert found["unit"] == "naps/s"
    assert json.loads((tmp_path / "outputs/bench/example.json").read_text()) == found
    side_by_side("example", "sleeping", "naps/s", sides, rounds=1, warm=False)
    assert naps == [1, 3, 2] * 3 + [1, 3], "the first round counts"


def test_memory_is_what_a_call_took_beyond_what_was_there():
    ballast = os.urandom(1000) * 100_000
    result, _, mb = measured(lambda: len(os.urandom(1000) * 200_000))
    assert result == 2 * len(ballast) and 190 < mb < 300
    assert measured(lambda: 0)[2] < 50 < peak_mb(), "an earlier peak is forgotten"


def test_parameters_are_named_in_capitals():
    assert given(["ROUNDS=1", 'NAMES=["a"]'], {"ROUNDS": 3, "NAMES": [], "other": 0}) == {"ROUNDS": 1, "NAMES": ["a"]}
    for argument in ('DTYPE="float32"', "DTYPE=float32"):
        assert given([argument], {"DTYPE": "auto"}) == {"DTYPE": "float32"}
    assert given(["DTYPE=float32"], {"CALLS": 3}) == {}, "for the benches that have one"
    for wrong in ("other=1", "ROUND=1"):
        with pytest.raises(SystemExit, match="expected one of ROUNDS"):
            given([wrong], {"ROUNDS": 3, "other": 0})


def test_speeches_are_mixed_and_some_repeated():
    few = mixed_speeches(300)
    assert len(few) == 300 and few == mixed_speeches(300) and sum(text.startswith("Hello, thanks") for text in few) > 10


def test_clients_ask_the_same_calls():
    assert job_of(8)[:2] == ("bench-1", "relevance") and call_of(8) == call_of(8) != call_of(9)
    for row in [throughput(name, 64, 16, 0.02) for name in CLIENTS]:
        assert row["calls"] == 64 and 0 < row["share of ideal %"] <= 100 and row["most in flight"] <= 16
    assert len(memory(40, 8)["trace"]) == 1


LLAMA = """
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace as CommonParams_


class Five(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = {"tokens_predicted": asked["n_predict"], "stop_type": "limit" if asked["seed"] else "eos"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *arguments):
        pass


def CommonParams():
    part = CommonParams_
    return part(model=part(), cpuparams=part(), cpuparams_batch=part())


class Server:
    def __init__(self, own):
        assert open(own.model.path).read() == "gguf" and own.n_parallel == 32 and own.n_ctx > 32 * 5
        stub = ThreadingHTTPServer(("127.0.0.1", 0), Five)
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{stub.server_port}"


def get_system_info():
    return "a stand-in "
"""


@pytest.fixture
def sampled():
    weights = find_weights("random-tiny")
    model, tokenizer = load_causal_lm(weights, "float32"), load_tokenizer(weights)
    return lambda *arguments: make_work(model, tokenizer, *arguments)


def test_all_ways_of_sampling_make_the_tokens(sampled, tmp_path, monkeypatch):
    work = sampled(3, Decoding(5, 0.8, 0, 0.95), 2)
    assert len(work.prompts) == 3 and all(work.ids()) and 0 < ours(work) <= 30
    assert len(work.part(2).prompts) == 2 and work.part(2).prompts[0] == work.prompts[0]
    found = rivals_bench(work, work.model, "random-tiny", 1, 2)
    assert found["llama.cpp"] == "not run: pip install xllamacpp" and found["ratio"] > 0 and "llama" not in found
    (tmp_path / "xllamacpp.py").write_text(LLAMA)
    (tmp_path / "file.gguf").write_text("gguf")
    monkeypatch.syspath_prepend(tmp_path)
    with llama_server(tmp_path / "file.gguf", 32, 5) as (address, note):
        assert llama_samples(work, address) == 3 * 2 * 5 - 1 and note == "a stand-in"
    (tmp_path / "file.gguf").write_text("other")
    assert "AssertionError" in one_line(lambda: llama_server(tmp_path / "file.gguf", 32, 5).__enter__())


def test_prefill_and_decoding_are_accounted_apart_and_followed(sampled, tmp_path):
    work = sampled(3, Decoding(4, 0.8), 2, POOLS["demo"][2])
    prefill, decode = parts_bench(work, "pool")
    assert prefill["replayed"] == decode["replayed"] == 1 and {prefill["dtype"], decode["dtype"]} == {"float32"}
    assert 0 < prefill["needed of computed"] <= 1.01 and 0 < decode["needed of computed"] <= 1.01
    assert sum(share for _, share in prefill["operators"]) == pytest.approx(1)
    found = growth_bench(sampled(4, Decoding(2)), [1, 5], [1, 2], [1, 2])
    kept = json.loads((tmp_path / "outputs/bench/growth_sampling.json").read_text())
    assert kept["curves"] == found and [row["size"] for row in found[0]["rows"]] == [1, 5]


def test_the_machine_is_measured_at_the_shapes_used():
    found = machine_bench("random-tiny", "float32", [8, 32])
    assert {(row["inputs"], row["outputs"]) for row in found["rows"]} >= {(64, 128), (128, 64), (64, 32)}
    assert found["square"] > 0 and all(row["8 rows"] > 0 < row["32 rows"] for row in found["rows"])


# Scoring


def test_scoring_is_compared_and_other_rewards_are_refused(tmp_path):
    tiny = find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    model = load_reward_model(tiny.location, tokenizer, "float32", new_head=0)
    groups = made_texts(tokenizer, 3, 8, "demo")
    flat, own = sum(groups, []), our_scores(model, tokenizer, groups)
    assert reward_gap(own, plain_scores(twin(model), tokenizer, flat), exact=True) < 1e-4
    with pytest.raises(RuntimeError, match="not the same work"):
        reward_gap(own, own[1:] + own[:1], exact=False)
    found = scoring_bench(model, twin(model), tokenizer, 1, [("demo", 2, 8), ("demo", 8, 16)])
    assert len(found) == 2 and all(row["ours"] > 0 and row["largest difference"] <= 1e-4 for row in found)
    assert json.loads((tmp_path / "outputs/bench/reward_scoring.json").read_text())["rows"] == found
    row = scoring_share(model, tokenizer, texts=8)
    assert row["replayed"] == 1 and 0.5 < row["needed of computed"] <= 1
    curves = scoring_growth(model, tokenizer, [2, 4], [8, 16], [1, 2])
    assert [len(curve["rows"]) for curve in curves] == [2, 2, 2]


# The guide's page


def shown(page):
    "Execute the page's cells; return what the last line of each gives."
    names, found = {}, []
    for source in (
        "".join(cell["source"]) for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"
    ):
        *body, last = ast.parse(source).body
        exec(compile(ast.Module(body, []), "page", "exec"), names)
        if isinstance(last, ast.Expr):
            found.append(eval(compile(ast.Expression(last.value), "page", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "page", "exec"), names)
    return found


def test_the_guide_shows_what_was_measured_or_that_nothing_was(sampled, tmp_path, capsys):
    page = Path(__file__).parents[2] / "nbs" / "guide" / "11_speed.ipynb"
    assert shown(page) == ["not measured here: make bench"] * 2 + [None] + ["not measured here: make bench"] * 2
    assert "not measured here" in capsys.readouterr().out
    machine_bench("random-tiny", "float32", [8, 32])
    tiny = sampled(2, Decoding(3, 0.8), 2)
    parts_bench(tiny, "pool")
    rivals_bench(tiny, tiny.model, "random-tiny", 1, 1)
    growth_bench(sampled(4, Decoding(2)), [1, 2], [1, 2], [1, 2])
    machine, shares, _, rivals, growth = shown(page)
    assert list(machine["8 rows"]) and list(shares.work) == ["decode_pool", "prefill_pool"] and len(growth) == 3
    assert rivals.other[0] == "not run: pip install xllamacpp" and "outside of operators" in capsys.readouterr().out
