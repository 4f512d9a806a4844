"""The benches at their smallest size: what is measured in turn, scored, sampled, asked, killed and drawn."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench import given, in_turn, mixed_speeches, side_by_side
from bench_gateway import CLIENTS, call_of, job_of, kill_run, memory, throughput
from bench_generation import find_gguf, llama_samples, llama_server, make_work, ours, transformers_generate
from bench_policy import iteration_phases, phases_bench, phases_figure, policy_run
from bench_reward import curve_gap, made_texts, our_scores, plain_scores, reward_gap, scoring_bench, twin
from psycopref.core.files import StageWriter
from psycopref.core.stages import Run
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.scoring import load_reward_model
from refusals import one_line


def test_sides_are_measured_in_turn_and_kept(tmp_path):
    order = []
    rates = in_turn({"one": lambda: order.append(1) or 5, "two": lambda: order.append(2) or 7}, rounds=2)
    assert order == [1, 2, 1, 2, 1, 2] and list(map(len, rates.values())) == [2, 2]

    def naps(seconds):
        return lambda: time.sleep(seconds) or 1

    sides = {"ours": naps(0.01), "theirs": naps(0.03), "stock": naps(0.02)}
    found = side_by_side("example", "sleeping", "naps/s", sides, rounds=2)
    assert found["ratio"] > found["stock ratio"] > 1 and found["unit"] == "naps/s"
    assert json.loads((tmp_path / "outputs/bench/example.json").read_text()) == found


def test_parameters_are_named_in_capitals():
    assert given(["ROUNDS=1", 'NAMES=["a"]'], {"ROUNDS": 3, "NAMES": [], "other": 0}) == {"ROUNDS": 1, "NAMES": ["a"]}
    for wrong in ("other=1", "ROUND=1"):
        with pytest.raises(SystemExit, match="expected one of ROUNDS"):
            given([wrong], {"ROUNDS": 3, "other": 0})


def test_speeches_are_mixed_and_some_repeated():
    few = mixed_speeches(300)
    assert len(few) == 300 and few == mixed_speeches(300) and sum(text.startswith("Hello, thanks") for text in few) > 10


# Gateway


def test_clients_ask_the_same_calls_and_a_killed_one_loses_nothing():
    assert job_of(8)[:2] == ("bench-1", "relevance") and call_of(8) == call_of(8) != call_of(9)
    for row in [throughput(name, 64, 16, 0.02) for name in CLIENTS]:
        assert row["calls"] == 64 and 0 < row["share of ideal %"] <= 100 and row["most in flight"] <= 16
    killed = kill_run(200, 2, 16)
    assert killed["kills after which a kept call was asked"] == killed["answered 0.5 s before a kill and lost"] == 0
    assert killed["rows equal an unbroken run's"] and killed["asked twice"] <= 2 * 2 * 16
    assert len(memory(40, 8)["trace"]) == 1


# Generation


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
    assert "no GGUF" in one_line(lambda: find_gguf("random-tiny", Path(".")))
    assert "exit status 1" in one_line(lambda: llama_server("false", Path("none.gguf"), 1, 8).__enter__())


# Scoring and processes


def test_scoring_is_compared_and_other_rewards_are_refused(tmp_path):
    tiny = find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    model, groups = (
        load_reward_model(tiny.location, tokenizer, "float32", new_head=0),
        made_texts(tokenizer, 3, 8, "demo"),
    )
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


# Phases of an iteration


def demo_run(name, iterations, profile="demo"):
    with StageWriter(Run(name), "06_policy", profile, 0, {}) as stage:
        stage.json("training", {"m": {"iter": {"iterations": iterations}}})
    return stage.run.stage("06_policy") / "receipt.json"


def test_the_newest_demo_run_is_looked_at(capsys):
    assert phases_bench(None) == [] and "make reproduce" in capsys.readouterr().out
    for age, (name, profile) in enumerate((("newest", "demo"), ("older", "demo"), ("small", "tiny"))):
        receipt = demo_run(name, [{"seconds": {"train": 1.0}}], profile)
        os.utime(receipt, (1e9 - age, 1e9 - age) if profile == "demo" else (2e9, 2e9))
    assert policy_run(None).run.name == "newest" and policy_run("small").run.name == "small"


def test_an_iteration_without_seconds_is_told_about(tmp_path, capsys):
    demo_run("old", [{"seconds": {"train": 1.0}}, {"pairs": 3}])
    assert "iteration 2 of m" in one_line(lambda: iteration_phases(policy_run("old")))
    assert phases_bench("old") == [] and "run 06_policy again" in capsys.readouterr().out
    assert not (tmp_path / "outputs/bench/policy_phases.json").exists()


def test_bars_of_phases_stack_up_to_the_total(tmp_path):
    demo_run("mine", [{"seconds": {"save": 1, "sample": 2.5, "mend": 0.25}}, {"seconds": {"sample": 4.0}}])
    found = phases_bench("mine")
    kept = json.loads((tmp_path / "outputs/bench/policy_phases.json").read_text())
    assert kept["rows"] == found and kept["run"] == "mine" and list(found[0]["seconds"]) == ["sample", "save", "mend"]
    bars = phases_figure(found).axes[0].patches
    for i, row in enumerate(found):
        own = [bar for bar in bars if round(bar.get_x() + bar.get_width() / 2) == i]
        assert max(bar.get_y() + bar.get_height() for bar in own) == pytest.approx(row["total"])
