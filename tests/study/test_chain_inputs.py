"""Other inputs to the chain: shards, real and released data, bad input, a server that fails; CI runs them."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from psycopref.core.files import SCHEMAS, StageReader, read_rows, sha256_file
from psycopref.core.paper import resource_path
from psycopref.core.principles import read_principles
from psycopref.core.stages import STAGES, Run
from psycopref.corpus.collection import ROW_FATES
from psycopref.run.runner import stage_rules

from chains import PLANTED, REPOSITORY, bad, chain, planned, receipt, run, run_stage
from test_collection import released_folder

pytestmark = pytest.mark.chain


def test_shards_give_the_rows_of_the_whole_byte_by_byte(copy):
    three = ("run=cut", "shards=3")
    chain(copy, "--until", "03_ratings", more_config=three)
    for stage, name in (("02_responses", "responses"), ("03_ratings", "ratings")):
        place = copy / "outputs/cut" / stage
        parts = sorted(path.parent for path in place.with_suffix(".shards").glob("*/receipt.json"))
        assert [path.name for path in parts] == ["1-of-3", "2-of-3", "3-of-3"]
        rows = [len(read_rows(part / f"{name}.parquet", name)) for part in parts]
        assert all(rows) and sum(rows) == len(read_rows(place / f"{name}.parquet", name))
        own, whole = receipt(copy, stage), receipt(copy, stage, "cut")
        assert sha256_file(place / f"{name}.parquet") == own["outputs"][f"{name}.parquet"]
        assert not any(count["calls"] for count in whole["models"].values()), "every reply is found in a shard's cache"
        assert sum(row["calls"] for row in whole["books"]) == sum(row["calls"] for row in own["books"])
    assert [path.name for path in (copy / "outputs/cut/cache").glob("*.sqlite")] == ["replies.sqlite"]
    again = chain(copy, "--dry-run", "--until", "03_ratings", more_config=three)
    assert not planned(again), "a finished run has nothing to do"


def test_bad_input_is_one_line_and_harms_nothing(copy, tmp_path):
    signed = {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}
    executed = copy / "outputs/tiny/notebooks/01_speeches.ipynb"
    shown = sha256_file(executed)
    assert "profile 'tyni' does not exist" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFILE=tyni")
    assert "no parameter 'PROFIL'" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFIL=tiny")
    for override, expected in (
        ("reward.learning_rte=1", "no setting 'learning_rte'. Did you mean learning_rate?"),
        ('reward.learning_rate="fast"', "expected a valid number"),
    ):
        assert expected in run_stage(copy, "05_reward", "-o", override)
    files = {
        "chat.csv": (b"a,b\n1,2\n", "has no column"),
        "empty.csv": (b"questionID,questionText,topics\n1,too short,Stress\n", "no usable client speech"),
        "latin.csv": (b"questionID,questionText,topics\n1,caf\xe9,Stress\n", "not UTF-8"),
        "nowhere.csv": (None, "no such file"),
    }
    for name, (content, expected) in files.items():
        if content:
            (tmp_path / name).write_bytes(content)
        assert expected in run_stage(copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path / name}"]')
    assert sha256_file(executed) == shown and executed.with_name("01_speeches.unfinished.ipynb").is_file()
    assert "01_speeches was made with speeches.limit" in run_stage(copy, "02_responses", "-o", "speeches.limit=7")
    assert signed == {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}


def test_a_failing_stage_leaves_the_chain_s_results_in_place(copy):
    signed = sha256_file(copy / "outputs/tiny/01_speeches/receipt.json")
    chain(copy, overrides='{"speeches.sources": ["counsel-chat=/nowhere.csv"]}', ok=False)
    assert sha256_file(copy / "outputs/tiny/01_speeches/receipt.json") == signed
    assert len(read_rows(copy / "outputs/tiny/01_speeches/speeches.parquet", "speeches")) == 42


def test_real_speech_runs_the_same_stage(copy, counsel_chat):
    given = ("-p", "PROFILE=tiny", "-p", "RUN=real", "-p", f'SOURCES=["counsel-chat={counsel_chat}"]')
    run(copy, "psycopref", "run", "nbs/01_speeches.ipynb", *given)
    speeches = read_rows(copy / "outputs/real/01_speeches/speeches.parquet", "speeches")
    assert set(speeches.source) == {"counsel-chat"} and len(speeches) == 42
    [drops, *_] = json.loads((copy / "outputs/real/01_speeches/drops.json").read_text())
    assert drops["rows"] == sum(drops[fate] for fate in ROW_FATES)
    assert drops["kept"] == 42 and drops["not drawn"] > 400
    for number in (9, 10, 11, 12, 13):
        assert list((copy / "outputs/real/tables").glob(f"table_S{number}_*.csv")), number


def test_the_released_dataset_goes_on_at_stage_08(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_ROOT", str(copy))
    folder, place = released_folder(tmp_path / "released"), copy / "outputs/given"
    found = stage_rules("tiny", "given", overrides={"speeches.sources": [f"released={folder}"]})
    rules = {rule["name"]: rule for rule in found}
    assert list(rules) == [name for name in STAGES if name not in ("02_responses", "03_ratings")]
    assert rules["04_pairs"]["needs"] == ["outputs/given/01_speeches/receipt.json"]
    for name in ("01_speeches", "04_pairs"):
        run(copy, "psycopref", "run", f"nbs/{name}.ipynb", "--parameters", rules[name]["parameters"])
    given, test = (pd.read_parquet(folder / f"data/{name}-00000-of-00001.parquet") for name in ("train", "test"))
    assert read_rows(place / "04_pairs/train.parquet", "pairs").equals(given[list(SCHEMAS["pairs"])])
    assert receipt(copy, "04_pairs", "given")["rater"] == "GPT-4o, as released"
    principles = pd.read_csv(place / "tables/table_S8_principles.csv")
    assert principles.chosen.eq(5).all() and principles.rejected.eq(3).all() and principles.inverted.eq(0).all()
    speeches = read_rows(place / "01_speeches/speeches.parquet", "speeches")
    assert set(speeches.speech_id[speeches.split == "test"]) == set(test.ID)
    assert all(list((copy / "figures/given").glob(f"fig_{number}_*.png")) for number in (5, 6))


PRIVATE = ("jane.roe@example.org", "+1 555 867 5309", "@jane_roe_1987", "jane.roe[at]example.net")


def test_what_is_masked_stands_in_no_file_and_no_message(copy, tmp_path):
    own = [json.loads(line)["speech"] for line in resource_path("demo_speeches.jsonl").read_text().splitlines()]
    said = [f"{text} You can write to {PRIVATE[i % 4]} for more." for i, text in enumerate(own)]
    place, headless = tmp_path / "own.csv", tmp_path / "headless.csv"
    pd.DataFrame({"Context": said}).to_csv(place, index=False)
    pd.DataFrame({"Context": [f"{PRIVATE[0]} is mine. {text}" for text in said]}).to_csv(
        headless, index=False, header=False
    )
    given = ("-p", "PROFILE=tiny", "-p", "RUN=private", "-o", "speeches.mask=all")
    first = run(copy, "psycopref", "run", "nbs/01_speeches.ipynb", *given, "-p", f'SOURCES=["amod-counsel={place}"]')
    speeches = read_rows(copy / "outputs/private/01_speeches/speeches.parquet", "speeches")
    assert len(speeches) == 42 and speeches.speech.str.contains("You can write to").all()
    line = run_stage(copy, "01_speeches", *given[2:], "-p", f'SOURCES=["amod-counsel={headless}"]')
    assert "has no column 'Context'" in line
    for text in PRIVATE:
        assert text not in first + line
        held = [path for path in copy.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
        assert not held and not speeches.speech.str.contains(text, regex=False).any(), text


class Rater(BaseHTTPRequestHandler):
    """Rate every response 3; while `broken`, answer prose to the questions about one principle."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        state = self.server
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with state.lock:
            state.log.append(text)
        said = json.dumps(
            {f"response_{i}_rating": 3 for i in range(1, 5)} | {f"rationale_{i}": "so" for i in range(1, 5)}
        )
        if state.broken and "Empathy" in text:
            said = f"I would rather not, {self.headers['Authorization']}."
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        body = json.dumps(
            {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def rater():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rater)
    server.log, server.lock, server.broken = [], threading.Lock(), True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_retry_asks_the_quarantine_again_and_nothing_else(copy, rater, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", PLANTED)
    for stage in ("01_speeches", "02_responses"):
        shutil.copytree(copy / "outputs/tiny" / stage, copy / "outputs/asked" / stage)
    uri = f"openai:some/rater@http://127.0.0.1:{rater.server_port}/v1"
    ask = ("03_ratings", "-p", "RUN=asked", "-o", f'ratings.rater="{uri}"')
    assert "252 of 294" in run_stage(copy, *ask), "below its coverage the stage fails"
    assert len(rater.log) == 294 and not (copy / "outputs/asked/03_ratings").exists()
    quarantine = json.loads((copy / "outputs/asked/03_ratings.partial/quarantine.json").read_text())
    assert "Bearer [key]" in quarantine[0]["raw"], "the server did say the key"
    first, rater.broken = list(rater.log), False
    assert "valid answer" in run_stage(copy, *ask) and len(rater.log) == 294, "the same replies are read again"
    run(copy, "psycopref", "retry", "asked")
    again = rater.log[294:]
    assert len(again) == 42 and set(again) == {text for text in first if "Empathy" in text}
    assert len(read_rows(copy / "outputs/asked/03_ratings/ratings.parquet", "ratings")) == 42 * 7 * 4
    assert receipt(copy, "03_ratings", "asked")["settings"]["ratings"]["rater"] == uri
    assert "nothing is in the quarantine" in bad(copy, "psycopref", "retry", "asked")
    assert "has no quarantine.json" in bad(copy, "psycopref", "retry", "nowhere")
    written = [path for path in copy.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()]
    assert not written, "a key was written: into a notebook's output, a receipt, the cache, a log or a traceback"


def test_another_field_runs_whole_by_the_command_of_the_guide(copy, tmp_path, monkeypatch):
    "Questions and principles of our second field, through pairs, models, tables, kits and report."
    page = json.loads((REPOSITORY / "nbs/guide/13_own_principles.ipynb").read_text(encoding="utf-8"))
    said = "".join(line for cell in page["cells"] for line in cell["source"] if line.startswith("make reproduce"))
    [(sources, overrides)] = re.findall(r"SOURCES=(\S+) OVERRIDES='(.+?)'\n", said)
    for name, own in (("questions.csv", "plain-words.csv"), ("principles.yaml", "plain-words.yaml")):
        shutil.copy(resource_path(f"principles/{own}"), copy / name)
    assert "own=questions.csv" in sources and '"principles.yaml"' in overrides, "the files that were copied"
    chain(copy, overrides=overrides, more_config=("run=plain", f"sources={sources}"))

    monkeypatch.setenv("PSYCOPREF_ROOT", str(copy))
    place, keys = copy / "outputs/plain", read_principles(str(copy / "principles.yaml")).keys
    assert len(keys) == 5 and not {*keys} & {*read_principles("counselling").keys}
    assert not (place / "12_trial").exists()
    ratings = StageReader(Run("plain"), "03_ratings").rows("ratings")
    assert set(ratings.principle) == {*keys} and ratings.rating.nunique() > 2
    pairs = StageReader(Run("plain"), "04_pairs").rows("pairs", "train")
    rated = {side: pairs[[f"{side}_{key}_rating" for key in keys]].mean(axis=1) for side in ("chosen", "rejected")}
    assert (rated["chosen"] - rated["rejected"] > 1 - 1e-9).all() and len(pairs.columns) == 7 + 2 * len(keys)
    card = (place / "04_pairs/README.md").read_text()
    assert "# Preference pairs: diagnoses in plain words" in card and "counselling]" not in card
    forms = [path.read_text() for path in place.glob("11_experts/kits/*/kit.html")]
    assert forms and all("Does no harm" in form and "Empathy" not in form for form in forms)
    tables = {number: pd.read_csv(next((place / "tables").glob(f"table_{number}_*.csv"))) for number in ("S8", "S36")}
    assert tables["S8"].principle.tolist() == [*keys] and {*keys} < {*tables["S36"].columns}
    report = (place / "13_report/overview.html").read_text()
    assert "points for diagnoses in plain words" in report and "all labels that we have are of the paper" in report
