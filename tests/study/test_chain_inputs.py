"""Other inputs to the chain: shards, real and released data, bad input, a server that fails; CI runs them."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from psycopref.core.files import SCHEMAS, read_rows, sha256_file
from psycopref.core.stages import STAGES
from psycopref.corpus.collection import ROW_FATES
from psycopref.run.runner import stage_rules

from chains import bad, chain, planned, receipt, run, run_stage
from test_collection import released_folder

pytestmark = pytest.mark.chain


def test_shards_give_the_rows_of_the_whole_byte_by_byte(copy):
    chain(copy, "--until", "03_ratings", more_config=("run=cut", "shards=3"))
    for stage, name in (("02_responses", "responses"), ("03_ratings", "ratings")):
        parts = sorted(path.parent.name for path in (copy / f"outputs/cut/{stage}.shards").glob("*/receipt.json"))
        assert parts == ["1-of-3", "2-of-3", "3-of-3"]
        rows = [read_rows(copy / f"outputs/cut/{stage}.shards" / part / f"{name}.parquet", name) for part in parts]
        assert all(map(len, rows)) and sum(map(len, rows)) == len(
            read_rows(copy / f"outputs/cut/{stage}/{name}.parquet", name)
        )
        assert (
            sha256_file(copy / f"outputs/cut/{stage}/{name}.parquet")
            == receipt(copy, stage)["outputs"][f"{name}.parquet"]
        )
        whole = receipt(copy, stage, "cut")
        assert all(count["calls"] == 0 for count in whole["models"].values()), (
            "the whole finds every reply in the caches of its shards"
        )
        assert sum(row["calls"] for row in whole["books"]) == sum(row["calls"] for row in receipt(copy, stage)["books"])
    assert [path.name for path in (copy / "outputs/cut/cache").glob("*.sqlite")] == ["replies.sqlite"]
    assert not planned(chain(copy, "--dry-run", "--until", "03_ratings", more_config=("run=cut", "shards=3"))), (
        "a finished run has nothing to do"
    )


def test_bad_input_is_one_line_and_harms_nothing(copy, tmp_path):
    signed = {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}
    assert "profile 'tyni' does not exist" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFILE=tyni")
    assert "no parameter 'PROFIL'" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFIL=tiny")
    assert "no setting 'learning_rte'. Did you mean learning_rate?" in run_stage(
        copy, "05_reward", "-o", "reward.learning_rte=1"
    )
    assert "expected a valid number" in run_stage(copy, "05_reward", "-o", 'reward.learning_rate="fast"')
    assert "no such file" in run_stage(copy, "01_speeches", "-p", 'SOURCES=["counsel-chat=/nowhere.csv"]')
    (tmp_path / "chat.csv").write_text("a,b\n1,2\n")
    assert "has no column" in run_stage(copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/chat.csv"]')
    (tmp_path / "empty.csv").write_text("questionID,questionText,topics\n1,too short,Stress\n")
    assert "no usable client speech" in run_stage(
        copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/empty.csv"]'
    )
    (tmp_path / "latin.csv").write_bytes("questionID,questionText,topics\n1,caf\xe9,Stress\n".encode("latin-1"))
    assert "not UTF-8" in run_stage(copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/latin.csv"]')
    assert signed == {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}


def test_a_failing_stage_leaves_the_chain_s_results_in_place(copy):
    signed = sha256_file(copy / "outputs/tiny/01_speeches/receipt.json")
    chain(copy, overrides='{"speeches.sources": ["counsel-chat=/nowhere.csv"]}', ok=False)
    assert sha256_file(copy / "outputs/tiny/01_speeches/receipt.json") == signed
    assert len(read_rows(copy / "outputs/tiny/01_speeches/speeches.parquet", "speeches")) == 42


def test_real_speech_runs_the_same_stage(copy, counsel_chat):
    run(
        copy,
        "psycopref",
        "run",
        "nbs/01_speeches.ipynb",
        "-p",
        "PROFILE=tiny",
        "-p",
        "RUN=real",
        "-p",
        f'SOURCES=["counsel-chat={counsel_chat}"]',
    )
    speeches = read_rows(copy / "outputs/real/01_speeches/speeches.parquet", "speeches")
    assert set(speeches.source) == {"counsel-chat"} and len(speeches) == 42
    drops = json.loads((copy / "outputs/real/01_speeches/drops.json").read_text())
    assert (
        drops[0]["rows"] == sum(drops[0][fate] for fate in ROW_FATES)
        and drops[0]["kept"] == 42
        and drops[0]["not drawn"] > 400
    )
    for number in (9, 10, 11, 12, 13):
        assert list((copy / "outputs/real/tables").glob(f"table_S{number}_*.csv")), number


def test_the_released_dataset_goes_on_at_stage_08(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_ROOT", str(copy))
    folder = released_folder(tmp_path / "released")
    rules = {
        rule["name"]: rule
        for rule in stage_rules("tiny", "given", overrides={"speeches.sources": [f"released={folder}"]})
    }
    assert list(rules) == [name for name in STAGES if name not in ("02_responses", "03_ratings")] and rules["04_pairs"][
        "needs"
    ] == ["outputs/given/01_speeches/receipt.json"]
    for name in ("01_speeches", "04_pairs"):
        run(copy, "psycopref", "run", f"nbs/{name}.ipynb", "--parameters", rules[name]["parameters"])
    given = pd.read_parquet(folder / "data" / "train-00000-of-00001.parquet")
    pairs = read_rows(copy / "outputs/given/04_pairs/train.parquet", "pairs")
    assert (
        pairs.equals(given[list(SCHEMAS["pairs"])])
        and receipt(copy, "04_pairs", "given")["rater"] == "GPT-4o, as released"
    )
    principles = pd.read_csv(copy / "outputs/given/tables/table_S8_principles.csv").set_index("principle")
    assert principles.chosen.eq(5).all() and principles.rejected.eq(3).all() and principles.inverted.eq(0).all()
    speeches = read_rows(copy / "outputs/given/01_speeches/speeches.parquet", "speeches")
    assert set(speeches.speech_id[speeches.split == "test"]) == set(
        pd.read_parquet(folder / "data" / "test-00000-of-00001.parquet").ID
    )
    assert list((copy / "figures/given").glob("fig_5_*.png")) and list((copy / "figures/given").glob("fig_6_*.png"))


class Rater(BaseHTTPRequestHandler):
    """Rate every response 3; while `broken`, answer prose to the questions about one principle."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        state = self.server
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with state.lock:
            state.log.append(text)
        bad = state.broken and "Empathy" in text
        said = (
            f"I would rather not, {self.headers['Authorization']}."
            if bad
            else json.dumps(
                {f"response_{i}_rating": 3 for i in range(1, 5)} | {f"rationale_{i}": "so" for i in range(1, 5)}
            )
        )
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


PLANTED = "sk-planted-0123456789abcdef"


def test_retry_asks_the_quarantine_again_and_nothing_else(copy, rater, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", PLANTED)
    for stage in ("01_speeches", "02_responses"):
        shutil.copytree(copy / "outputs/tiny" / stage, copy / "outputs/asked" / stage)
    uri = f"openai:some/rater@http://127.0.0.1:{rater.server_port}/v1"
    assert "252 of 294" in run_stage(copy, "03_ratings", "-p", "RUN=asked", "-o", f'ratings.rater="{uri}"'), (
        "below its coverage the stage fails"
    )
    assert len(rater.log) == 294 and not (copy / "outputs/asked/03_ratings").exists()
    quarantine = json.loads((copy / "outputs/asked/03_ratings.partial/quarantine.json").read_text())
    assert "Bearer [key]" in quarantine[0]["raw"], "the server did say the key"
    first, rater.broken = list(rater.log), False
    assert (
        "valid answer" in run_stage(copy, "03_ratings", "-p", "RUN=asked", "-o", f'ratings.rater="{uri}"')
        and len(rater.log) == 294
    ), "the same replies are read again"
    run(copy, "psycopref", "retry", "asked")
    again = rater.log[294:]
    assert len(again) == 42 and set(again) == {text for text in first if "Empathy" in text}
    assert (
        len(read_rows(copy / "outputs/asked/03_ratings/ratings.parquet", "ratings")) == 42 * 7 * 4
        and receipt(copy, "03_ratings", "asked")["settings"]["ratings"]["rater"] == uri
    )
    assert "nothing is in the quarantine" in bad(
        copy, "psycopref", "retry", "asked"
    ) and "has no quarantine.json" in bad(copy, "psycopref", "retry", "nowhere")
    written = [path for path in copy.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()]
    assert not written, "a key was written: into a notebook's output, a receipt, the cache, a log or a traceback"
