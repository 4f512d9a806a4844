"""The benches at their smallest size: what is measured in turn, scored, sampled, asked, killed and drawn."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench
from bench import given, mixed_speeches, side_by_side
from bench_gateway import CLIENTS, call_of, job_of, memory, throughput
from bench_generation import llama_samples, llama_server, make_work, ours, transformers_generate
from bench_reward import curve_gap, made_texts, our_scores, plain_scores, reward_gap, scoring_bench, twin
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights, load_tokenizer
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


def test_parameters_are_named_in_capitals():
    assert given(["ROUNDS=1", 'NAMES=["a"]'], {"ROUNDS": 3, "NAMES": [], "other": 0}) == {"ROUNDS": 1, "NAMES": ["a"]}
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


class Five(BaseHTTPRequestHandler):
    "Answers as llama.cpp's server does; the first request ends with an end token."

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = {"tokens_predicted": asked["n_predict"], "stop_type": "limit" if asked["seed"] else "eos"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *arguments):
        pass


def test_all_ways_of_sampling_make_the_tokens():
    work = make_work("random-tiny", 3, Decoding(5, 0.8, 0, 0.95), n=2)
    assert len(work.prompts) == 3 and all(work.ids()) and 0 < ours(work) <= 30
    assert all(0 < transformers_generate(work, rows) <= 30 for rows in (2, 64))
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Five)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    assert llama_samples(work, f"http://127.0.0.1:{stub.server_port}") == 3 * 2 * 5 - 1
    stub.shutdown()
    assert "exit status 1" in one_line(lambda: llama_server("false", Path("none.gguf"), 1, 8).__enter__())


# Scoring and processes


def test_scoring_is_compared_and_other_rewards_are_refused(tmp_path):
    tiny = find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    model = load_reward_model(tiny.location, tokenizer, "float32", new_head=0)
    groups = made_texts(tokenizer, 3, 8, "demo")
    flat, own = sum(groups, []), our_scores(model, tokenizer, groups)
    for by_length in (False, True):
        assert reward_gap(own, plain_scores(twin(model), tokenizer, flat, by_length), exact=True) < 1e-4
    with pytest.raises(RuntimeError, match="not the same work"):
        reward_gap(own, own[1:] + own[:1], exact=False)
    found = scoring_bench("random-tiny", 1, 16, "float32", ["demo"])
    assert len(found) == 4 and all(row["ours"] > 0 and row["largest difference"] <= 1e-4 for row in found)
    assert json.loads((tmp_path / "outputs/bench/reward_scoring.json").read_text())["rows"] == found


def test_loss_curves_are_compared_step_by_step():
    log = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "eval_loss": 0.65}]
    assert curve_gap(log, log) == 0 and curve_gap(log, [log[0], {"step": 2, "loss": 0.5}]) == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="the same steps"):
        curve_gap(log, log[:1])
