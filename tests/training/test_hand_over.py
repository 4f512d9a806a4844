"""A reward model leaves this repository: others load it with plain transformers, train against it with trl, and read its card; the hub gets all of it or nothing."""

import ast
import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import in_child
from refusals import one_line

from psycopref.training import reward_card as room
from psycopref.core.tables import format_cell
from psycopref.core.settings import LoraSettings, RewardSettings
from psycopref.training.texts import name_for_older
from psycopref.training.reward_card import (
    TABLE_1_COLUMNS,
    HandOver,
    five_lines,
    hub_licence,
    push_reward_model,
    reward_card,
)
from psycopref.training.scoring import load_reward_model, score_groups
from psycopref.corpus.sources import UNKNOWN_LICENCE
from psycopref.training.texts import add_lora, dialogue, prompt_messages, save_merged
from psycopref.models.weights import Weights, find_weights, load_tokenizer

EXCHANGES = [
    ("I count the stairs at night and cannot stop.", "What is it like for you to count them?"),
    ('My "sister" moved out.\n\nI miss <|her|>.', "Stop it."),
    ("Ça va, naïvely {so}.", " word" * 90),
]


@pytest.fixture(scope="module")
def handed(shared_cache, tmp_path_factory):
    """Reward models of three kinds, each saved as chapter 5 saves it, with the scores it had before: kind -> (folder, scores)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        tiny = find_weights("random-tiny")
    tokenizer, found = load_tokenizer(tiny), {}
    groups = [[dialogue(tokenizer, speech, answer)] for speech, answer in EXCHANGES]
    for kind in ("plain", "lora", "bfloat16"):
        folder = tmp_path_factory.mktemp("handed") / kind
        model = load_reward_model(tiny.location, tokenizer, "bfloat16" if kind == "bfloat16" else "float32", new_head=3)
        if kind == "lora":
            model = perturbed(add_lora(model, LoraSettings(rank=4, alpha=8), head=True, seed=1))
        scores = (
            None if kind == "bfloat16" else score_groups(model, tokenizer, groups, name="")
        )  # in its own type it scores otherwise
        save_merged(model, tokenizer, folder)
        name_for_older(folder)
        loaded = score_groups(load_reward_model(str(folder), tokenizer, "float32"), tokenizer, groups, name="")
        found[kind] = (folder, [own[0] for own in scores or loaded], [own[0] for own in loaded])
    return found


def perturbed(model):
    """Give adapters and head values that a training could have left."""
    import torch

    chance = torch.Generator().manual_seed(0)
    changed = [name for name, weight in model.named_parameters() if "lora_B" in name or "modules_to_save" in name]
    for name, weight in model.named_parameters():
        if name in changed:
            weight.data += 0.1 * torch.randn(weight.shape, generator=chance)
    assert any("lora_B" in name for name in changed) and any("score" in name for name in changed)
    return model


def in_plain_python(jobs, tmp_path):
    """Run pieces of code, each with its names, where psycopref is never imported; return the scores."""
    code = """
import json, sys
scores = []
for code, names in json.load(sys.stdin):
    exec(code, names)
    scores.append(names["score"])
assert not [name for name in sys.modules if name.startswith("psycopref")]
print(json.dumps(scores))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(jobs), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- what others do with the folder


def test_five_lines_of_plain_transformers_give_our_scores(handed, facts, tmp_path):
    jobs, ours = [], []
    for folder, scores, _ in handed.values():
        for (speech, answer), score in zip(EXCHANGES, scores):
            jobs.append((five_lines(folder), {"prompt": prompt_messages(speech)[0]["content"], "response": answer}))
            ours.append(score)
    card = reward_card(dataclasses.replace(facts, location=str(handed["lora"][0])))
    jobs.append(
        ("\n".join(re.findall(r"```python\n(.*?)```", card, re.S)[:2]), {})
    )  # the card's own example, as it stands
    ours.append(handed["lora"][1][0])
    assert EXCHANGES[0][0] in card and EXCHANGES[0][1] in card
    for theirs, score in zip(in_plain_python(jobs, tmp_path), ours, strict=True):
        assert abs(theirs - score) < 1e-5
    assert max(ours) - min(ours) > 1e-2, "scores that differ, so that an equal one means something"


def test_there_are_five_lines_after_the_imports():
    lines = ast.parse(five_lines('a "folder"/with \\ é')).body
    imports = [line for line in lines if isinstance(line, ast.Import | ast.ImportFrom)]
    assert lines[: len(imports)] == imports and len(lines) - len(imports) == 5
    assert {name.name for line in imports for name in line.names} == {
        "torch",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
    }


def test_adapters_and_head_survive_the_saving(handed):
    _, before, after = handed["lora"]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < 1e-5
    assert min(abs(a - b) for a, b in zip(after, handed["plain"][1], strict=True)) > 1e-4, "the adapters do something"


@pytest.mark.parametrize("how", ["a name", "a model"])
def test_trl_trains_against_the_folder(handed, tmp_path, how, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    folder, tiny = str(handed["lora"][0]), find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    reward = {"reward_funcs": folder} if how == "a name" else {
        "reward_funcs": AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32"), "reward_processing_classes": AutoTokenizer.from_pretrained(folder)}  # fmt: skip
    arguments = RLOOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=1, use_cpu=True, bf16=False,
                           report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False)  # fmt: skip
    prompts = Dataset.from_list([{"prompt": prompt_messages(speech)} for speech, _ in EXCHANGES[:2]])
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.location, dtype="float32"),
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
        **reward,
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


# ---- the card

SOURCES = [
    {"source": "demo", "licence": "MIT, written for this repository; fictional", "page": "https://example.org/demo"}
]
ROWS = [{"model": "longer | wins", "kind": "baseline", "accuracy %": 55.1, "95% interval": "44.0 to 66.2", "AUC": 0.56234, "ECE": None, "Brier": math.nan, "pairs": 78},
        {"model": "ours", "kind": "reward model", "accuracy %": 80.8, "95% interval": "71.2 to 89.3", "AUC": 0.88141, "ECE": 0.0712, "Brier": 0.1396, "pairs": 78, "NLL": 3.0},
        {"model": "asked", "kind": "LLM as ranker", "accuracy %": 50.0, "95% interval": "40.0 to 60.0", "AUC": None, "ECE": None, "Brier": None, "pairs": 78}]  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    """All that is known of an invented reward model."""
    receipts = {
        "01_speeches": {"settings": {"speeches": {"sources": ["demo"], "test_fraction": 0.25, "dev_fraction": 0.1}}, "origins": SOURCES,
                        "audit": {"test speeches": 84, "other speeches": 252, "test speeches with a near-duplicate "
                                                                              "outside": 0}},
        "03_ratings": {"settings": {"ratings": {"mode": "principle"}}, "coverage": 0.985, "put_aside": 3},
        "04_pairs": {"rater": "offline rubric (stand-in)", "settings": {"pairs": {"min_gap_sum": 7}}, "models": {"a": {"label": "Model A"}, "b": {"label": "Model B"}},
                     "outputs": {"train.parquet": "ab" * 32, "test.parquet": "cd" * 32}, "commit": "0123456789abcdef", "changed_files": True, "versions": {"trl": "1.16.0"}},
    }  # fmt: skip
    training = {
        "pairs": 357,
        "too_long": list(range(30, 42)),
        "steps": 90,
        "best_step": 68,
        "dev_loss": 0.4321,
        "pack_size": 8,
        "left_out": 5,
        "log": [{"loss": 0.7123}, {"loss": 0.3456}],
    }
    weights = Weights("me/base@main", "me/base", "base", "ef" * 20)
    return HandOver(
        weights,
        "first",
        "paper",
        receipts,
        training,
        RewardSettings(),
        ROWS,
        "ours",
        "me/mine",
        1.31,
        {10: 0.0712, 15: 0.0801},
        "float32",
    )


def released(facts):
    """The same, from the released dataset: there are no ratings of ours."""
    speeches, pairs = facts.receipts["01_speeches"], facts.receipts["04_pairs"]
    origins = [
        {
            "source": "released",
            "licence": "CC-BY-NC-4.0",
            "page": "https://huggingface.co/datasets/Psychotherapy-LLM/PsychoCounsel-Preference",
        }
    ]
    receipts = {"01_speeches": {**speeches, "settings": {"speeches": {**speeches["settings"]["speeches"], "sources": ["released"]}}, "origins": origins},
                "04_pairs": {**pairs, "rater": "GPT-4o, as released"}}  # fmt: skip
    return dataclasses.replace(
        facts,
        receipts=receipts,
        weights=Weights(
            "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct", "ab" * 20
        ),
    )


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_header_is_what_the_hub_reads(facts):
    from huggingface_hub import ModelCard

    text = reward_card(facts)
    found, read = header(text), ModelCard(text)
    assert (
        found["library_name"] == "transformers"
        and found["pipeline_tag"] == "text-classification"
        and found["base_model"] == "me/base"
        and found["license"] == "unknown"
    )
    assert set(found["tags"]) == {"reward-model", "preference-learning", "psycopref"} and "datasets" not in found
    [index] = found["model-index"]
    assert index["name"] == "first-base-main-reward" and {m["type"]: m["value"] for m in index["results"][0]["metrics"]} == {
        "accuracy": 80.8, "roc_auc": 0.88141, "expected_calibration_error": 0.0712, "brier_score": 0.1396}  # fmt: skip
    assert read.data.to_dict() == found and read.text.strip().startswith("# first-base-main-reward")
    assert ModelCard(str(read)).data.to_dict() == found, "written again it is the same"


def test_a_card_of_the_released_dataset(facts):
    text = reward_card(released(facts))
    found = header(text)
    assert (
        found["license"] == "other"
        and found["license_name"]
        and found["datasets"] == ["Psychotherapy-LLM/PsychoCounsel-Preference"]
    )
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == "Psychotherapy-LLM/PsychoCounsel-Preference"
    assert (
        "llama3.2" in text
        and "CC-BY-NC-4.0" in text
        and "rated by GPT-4o, as released" in text
        and "stand-in" not in text
    )


def table_of(text):
    """Read the metrics table back: rows of {column: cell}."""
    lines = [
        line for line in text.split("## Results")[1].split("## Calibration")[0].splitlines() if line.startswith("|")
    ]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def checked_table(rows, own, text):
    table = table_of(text)
    assert [row["model"] for row in table] == [own, *(row["model"] for row in rows if row["model"] != own)]
    given = {row["model"]: row for row in rows}
    for row in table:
        assert list(row) == list(TABLE_1_COLUMNS)
        for column, cell in row.items():
            value = given[row["model"]][column]
            assert cell == format_cell(value)
            if isinstance(value, float) and not math.isnan(value):
                assert abs(float(cell) - value) <= (0.05 if abs(value) >= 10 else 0.0005) + 1e-12


def test_the_table_is_the_given_rows(facts):
    checked_table(ROWS, "ours", reward_card(facts))


number = st.one_of(st.none(), st.just(math.nan), st.floats(0, 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 100), number, number, number, st.integers(1, 9999)), min_size=1, max_size=4),
    st.data(),
)
def test_any_rows_are_shown_as_given(facts, drawn, data):
    rows = [
        {
            "model": f"model {i}",
            "kind": "any",
            "accuracy %": a,
            "95% interval": f"{a:.1f} to {a:.1f}",
            "AUC": b,
            "ECE": c,
            "Brier": d,
            "pairs": n,
        }
        for i, (a, b, c, d, n) in enumerate(drawn)
    ]
    own = data.draw(st.sampled_from([row["model"] for row in rows]))
    text = reward_card(dataclasses.replace(facts, rows=rows, own=own))
    checked_table(rows, own, text)
    mine = next(row for row in rows if row["model"] == own)
    metrics = header(text)["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [
        mine[c] for c in ("accuracy %", "AUC", "ECE", "Brier") if mine[c] is not None and not math.isnan(mine[c])
    ]


def test_numbers_of_numpy_make_plain_yaml(facts):
    import numpy as np

    rows = [{**row, "accuracy %": np.float64(row["accuracy %"]), "pairs": np.int64(row["pairs"])} for row in ROWS]
    assert header(reward_card(dataclasses.replace(facts, rows=rows))) == header(reward_card(facts))


def test_the_card_says_what_was_done(facts):
    text = reward_card(facts)
    for said in ("9e-06", "12 pairs longer than 2048 tokens (prefID 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, "
                          "…)", "5 others sit out", "step 68 of 90", "0.4321", "every weight", "1.31", "0.071 with 10 bins, 0.080 with 15 bins",
                 "98.5%", "3 were put aside", "at least 7", "84 speeches", "Model A; Model B", "0123456789ab with "
                                                                                               "changes of its "
                                                                                               "own", "abababababab", "https://example.org/demo", "not known to us",
                 "licensed professional", "no evidence of clinical benefit", 'from_pretrained("me/mine")'):  # fmt: skip
        assert said in text, said
    adapters = dataclasses.replace(
        facts,
        settings=RewardSettings(lora=LoraSettings(rank=16, last_layers=15), margin=True, center_coefficient=0.01),
        training={**facts.training, "dev_loss": None},
        temperature=None,
    )
    for said in (
        "rank 16",
        "last 15 layers",
        "as margin",
        "0.01 ×",
        "no development pairs",
        "No temperature was fitted",
    ):
        assert said in reward_card(adapters), said


def test_what_is_not_what_it_seems_is_labelled(facts):
    gpt = dataclasses.replace(
        facts, receipts={**facts.receipts, "04_pairs": {**facts.receipts["04_pairs"], "rater": "gpt-4o"}}
    )
    assert "a stand-in, no clinical judge" in reward_card(facts) and "stand-in" not in reward_card(gpt)
    assert "numbers mean nothing" in reward_card(
        dataclasses.replace(gpt, profile="tiny")
    ) and "size of a laptop" in reward_card(dataclasses.replace(gpt, profile="demo"))
    assert "numbers mean nothing" not in reward_card(gpt) and "laptop" not in reward_card(gpt)


@given(
    st.lists(st.sampled_from(["MIT", "MIT, fictional", "CC-BY-NC-4.0", UNKNOWN_LICENCE]), min_size=1),
    st.sampled_from(["apache-2.0", "llama3.2", "unknown"]),
)
def test_no_licence_is_claimed_that_is_not_known(data, base):
    found = hub_licence(base, data)
    assert found in (base, "other", "unknown") and (found == "unknown") == (
        base == "unknown" or UNKNOWN_LICENCE in data
    )
    assert found != base or base == "unknown" or all(one.startswith("MIT") for one in data)


def test_missing_facts_are_one_line(facts):
    lacking = {
        name: {key: value for key, value in receipt.items() if key != "audit"}
        for name, receipt in facts.receipts.items()
    }
    for changed, said in (({"own": "mine"}, "'mine'"), ({"receipts": lacking}, "audit"), ({"rows": [*ROWS, ROWS[1]]}, "2 rows"),
                          ({"receipts": {k: v for k, v in facts.receipts.items() if k != "03_ratings"}}, "03_ratings")):  # fmt: skip
        assert said in one_line(lambda changed=changed: reward_card(dataclasses.replace(facts, **changed)))


# ---- the hub


class Hub:
    """Speak as much of the hub's protocol as an upload needs; keep what came."""

    def __init__(self, token="hf_good", lfs=True, exists=None, broken=""):
        self.token, self.lfs, self.private, self.broken = token, lfs, exists, broken
        self.made, self.stored, self.files, self.requests = [], {}, {}, []

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        self.requests.append(f"{handler.command} {path}")
        if self.broken and self.broken in path:
            return 400, {"error": "this model is\nnot welcome"}, {}
        if path.startswith("/put/"):
            self.stored[path.removeprefix("/put/")] = body
            return 200, {}, {}
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/validate-yaml":
            return 200, {}, {}
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.private = self.made[-1].get("visibility") == "private"
            return 200, {"url": f"{self.address}/me/mine"}, {}
        if handler.command == "GET":
            known = {"id": "me/mine", "sha": "1" * 40, "private": self.private, "siblings": [], "tags": []}
            return (
                (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                if self.private is None
                else (200, known, {})
            )
        if path.endswith("/preupload/main"):
            return (
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if self.lfs and f["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for f in json.loads(body)["files"]
                    ]
                },
                {},
            )
        if path.endswith("/objects/batch"):
            return (
                200,
                {
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{self.address}/put/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ]
                },
                {},
            )
        if path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.address}/me/mine/commit/{'2' * 40}", "commitOid": "2" * 40}, {}
        return 404, {"error": f"nothing at {path}"}, {}

    def commit(self, lines):
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.files[line["value"]["path"]] = self.stored[line["value"]["oid"]]


@contextlib.contextmanager
def open_hub(hub):
    """Serve a hub on a loopback port for as long as the block lasts; a connection that says nothing for 20 seconds is closed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, found, headers = hub.answer(self, self.rfile.read(length))
            body = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
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
import json, os, sys
os.environ |= json.loads(sys.argv[1])
from pathlib import Path
from psycopref.training import reward_card
from psycopref.core.settings import StudyError
reward_card.ANSWER_SECONDS = 1.0
folder, repo, endpoint = sys.argv[2:5]
try:
    print(json.dumps({"url": reward_card.push_reward_model(Path(folder), repo, endpoint=endpoint or None)}))
except StudyError as error:
    print(json.dumps({"error": str(error)}))
assert "torch" not in sys.modules
"""


def push(folder, tmp_path, address, repo="me/mine", token="hf_good", **environment):
    """Push from a process of its own, since huggingface_hub reads its settings when it is imported."""
    named = {"HF_TOKEN": token, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", **environment} if token else environment
    [found] = in_child(CHILD, tmp_path, address, json.dumps(named), str(folder), repo, environment.get("ENDPOINT", ""))
    assert "\n" not in found.get("error", "") and "hf_" not in str(found).replace("HF_TOKEN", "")
    return found


@pytest.fixture
def folder(handed, facts, tmp_path):
    """A reward model with its card, and what a training leaves beside it."""
    import shutil

    place = shutil.copytree(handed["lora"][0], tmp_path / "lora")
    (place / "README.md").write_text(reward_card(facts), encoding="utf-8")
    for stray in ("scratch/a.txt", "checkpoint-8/b.txt", ".README.md.7.partial"):
        (place / stray).parent.mkdir(exist_ok=True)
        (place / stray).write_text("not for the hub")
    return place


def sums(files):
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.mark.parametrize("lfs", [True, False], ids=["large files apart", "all in the commit"])
def test_the_hub_gets_the_folder_in_private(folder, tmp_path, lfs):
    before = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    }
    with open_hub(Hub(lfs=lfs)) as hub:
        found = push(folder, tmp_path, hub.address, HF_HUB_DISABLE_XET=str(int(lfs)))
    assert found == {"url": f"{hub.address}/me/mine/commit/{'2' * 40}"}
    assert (
        sums(hub.files) == sums(before)
        and {"README.md", "config.json", "model.safetensors"} <= set(before)
        and bool(hub.stored) == lfs
    )
    [made] = hub.made
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "mine", "private")


def test_a_repository_that_exists_is_used_if_it_is_private(folder, tmp_path):
    with open_hub(Hub(exists=True)) as hub:
        assert "url" in push(folder, tmp_path, "http://127.0.0.1:9", ENDPOINT=hub.address)
        assert hub.files and not hub.made
    with open_hub(Hub(exists=False)) as hub:
        assert "is public, expected a private one" in push(folder, tmp_path, hub.address)["error"]
        assert not hub.files and not hub.made and all(request.startswith("GET") for request in hub.requests)


def test_what_the_hub_refuses_is_one_line(folder, tmp_path):
    with open_hub(Hub()) as hub:
        assert "refused the token (401)" in push(folder, tmp_path, hub.address, token="hf_bad")["error"]
        assert not hub.files and not hub.made
    for place, said in (
        ("/commit/", "refused (400: "),
        ("/put/", "refused (400: Error while uploading 'model.safetensors'"),
        ("/validate-yaml", "Invalid metadata in README.md"),
        ("/create", "refused (400"),
    ):
        with open_hub(Hub(broken=place)) as hub:
            assert said in push(folder, tmp_path, hub.address)["error"] and not hub.files


def test_a_hub_that_is_silent_or_gone_is_one_line(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "did not answer" in push(folder, tmp_path, address)["error"]
    assert "did not answer" in push(folder, tmp_path, address)["error"], "nobody listens there any more"


def test_bad_names_tokens_and_folders_never_reach_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_open_repo", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    for name in ("mine", "a/b/c", "me/", "me/mi ne", "me/my--model", "https://huggingface.co/me/mine", ""):
        assert f"{name!r}: the name is malformed" in one_line(lambda name=name: push_reward_model(folder, name))
    assert "does not tell how to load 'me/other'" in one_line(lambda: push_reward_model(folder, "me/other"))
    for name in ("README.md", "config.json", "tokenizer_config.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert name.replace("model", "*") in one_line(lambda: push_reward_model(folder, "me/mine"))
        (folder / name).write_bytes(kept)
    assert "holds no README.md" in one_line(lambda: push_reward_model(tmp_path / "nowhere", "me/mine"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "found no token" in one_line(lambda: push_reward_model(folder, "me/mine"))


def test_the_switch_of_the_user_holds(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")  # conftest has set HF_HUB_OFFLINE
    assert "did not answer (OfflineModeIsEnabled" in one_line(lambda: push_reward_model(folder, "me/mine"))
