"""The whole chain in the `tiny` profile, in a copy of the repository: contracts, no-op, selective re-runs, kill and resume, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from psycopref.core.files import SCHEMAS, read_rows, sha256_file
from psycopref.core.stages import STAGES
from psycopref.run.runner import stage_rules
from psycopref.corpus.collection import ROW_FATES

from test_collection import released_folder

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(copy, *command, ok=True):
    "Run a command in the copy; return its combined output."
    environment = {k: v for k, v in os.environ.items() if k != "PSYCOPREF_ROOT"} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1500
    )
    assert (done.returncode == 0) is ok, done.stdout[-3000:]
    return done.stdout


def chain(copy, *more, overrides="{}", more_config=(), ok=True):
    return run(
        copy,
        "snakemake",
        "--cores",
        "2",
        "--nolock",
        *more,
        "--config",
        "profile=tiny",
        f"overrides={overrides}",
        *more_config,
        ok=ok,
    )


def planned(output):
    "Stages that a dry run would execute."
    return [name for name in STAGES if f"{name}:" in output or (name == "13_report" and "rule report" in output)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "Snakefile", "settings.ini"):
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, folder / name)
    chain(folder)
    return folder


def receipt(copy, stage, name="tiny"):
    return json.loads((copy / "outputs" / name / stage / "receipt.json").read_text())


def test_every_stage_is_signed_and_inputs_are_what_upstream_signed(copy):
    for stage in STAGES:
        signed = receipt(copy, stage)
        assert (
            signed["stage"] == stage and signed["seed"] == 0 and signed["seconds"] >= 0 and signed["versions"]["torch"]
        )
        for path, digest in signed["inputs"].items():
            if path.startswith("outputs/") and not path.endswith("receipt.json"):
                _, _, upstream, *rest = Path(path).parts
                assert receipt(copy, upstream)["outputs"]["/".join(rest)] == digest, (stage, path)
        for name, digest in signed["outputs"].items():
            assert sha256_file(copy / "outputs" / "tiny" / stage / name) == digest


def test_rows_keep_their_contracts(copy):
    folder = copy / "outputs" / "tiny"
    speeches = read_rows(folder / "01_speeches" / "speeches.parquet", "speeches")
    responses = read_rows(folder / "02_responses" / "responses.parquet", "responses")
    ratings = read_rows(folder / "03_ratings" / "ratings.parquet", "ratings")
    train, test = (read_rows(folder / "04_pairs" / f"{name}.parquet", "pairs") for name in ("train", "test"))
    assert set(responses.speech_id) == set(speeches.speech_id) and (responses.groupby("speech_id").size() == 4).all()
    assert len(ratings) == 7 * len(responses) and ratings.rating.between(1, 5).all()
    split = dict(zip(speeches.speech_id, speeches.split))
    assert (
        {split[i] for i in train.ID} <= {"train", "dev"}
        and {split[i] for i in test.ID} == {"test"}
        and test.ID.is_unique
    )
    sides = {
        side: [c for c in train if c.startswith(f"{side}_") and c.endswith("_rating")]
        for side in ("chosen", "rejected")
    }
    for pairs in (train, test):
        assert (pairs[sides["chosen"]].sum(axis=1) - pairs[sides["rejected"]].sum(axis=1) >= 7).all()
    assert list(train.columns) == list(SCHEMAS["pairs"])
    battles = read_rows(folder / "07_win_rates" / "battles.parquet", "battles")
    assert set(battles.verdict) <= {"win", "loss"} and set(battles.speech_id) == set(
        speeches.speech_id[speeches.split == "test"]
    )
    assert (battles.groupby(["policy", "setting", "speech_id"]).size() == 2).all()


def test_every_promised_table_and_figure_is_there(copy):
    absent = json.loads((copy / "outputs/tiny/13_report/absent.json").read_text())
    excused = {(item["kind"], item["number"]) for item in absent}
    assert excused <= {("table", "3"), ("table", "6")}, (
        "only cases may be missing, where no battle was won in both orders"
    )
    for kind, folder, prefix, numbers in (
        ("table", "outputs/tiny/tables", "table", [*"123456", *(f"S{i}" for i in (4, *range(24, 39)))]),
        ("figure", "figures/tiny", "fig", [*"23456", "S3", "S4", "S11", "S12", "S13", "S14"]),
    ):
        for number in numbers:
            if (kind, number) not in excused:
                labels = [json.loads(p.read_text())["label"] for p in (copy / folder).glob(f"{prefix}_{number}_*.json")]
                assert labels and all("profile: tiny" in label for label in labels), (kind, number)


def test_what_was_simulated_says_so_and_is_nobody_s_headline(copy):
    for place in (
        "outputs/tiny/tables/table_S33_agreement.json",
        "outputs/tiny/tables/table_S34_agreement_by_principle.json",
        "figures/tiny/fig_2_comparison.json",
        "figures/tiny/fig_3_scores.json",
    ):
        shown = json.loads((copy / place).read_text())
        assert "simulated" in shown["label"] and "no human took part" in shown["caption"], place
    table = pd.read_csv(copy / "outputs/tiny/tables/table_S7_headlines.csv")
    experts = table[table.result.str.contains("expert")]
    assert (
        len(experts) == 4 and experts.ours.isna().all() and experts["95% interval"].str.contains("not measured").all()
    )


def test_the_paper_never_fills_our_columns(copy):
    import pandas as pd

    table = pd.read_csv(copy / "outputs/tiny/tables/table_1_reward.csv")
    published = table[table.kind.str.startswith("paper")]
    assert published["accuracy %"].isna().all() and published["paper accuracy %"].notna().all()
    assert table[~table.kind.str.startswith("paper")]["paper accuracy %"].isna().all()


def test_a_finished_run_has_nothing_to_do(copy):
    assert "Nothing to be done" in chain(copy, "--dry-run")


def test_a_parameter_re_runs_its_stage_and_what_follows(copy):
    output = chain(copy, "--dry-run", overrides='{"reward.learning_rate": 0.002}')
    assert planned(output) == [
        "00_study",
        "05_reward",
        "06_policy",
        "07_win_rates",
        "08_ablations",
        "09_mixing",
        "10_judges",
        "11_experts",
        "13_report",
    ]
    output = chain(copy, "--dry-run", overrides='{"evaluation.judge": "rules:rubric", "ablation.pairs": 4}')
    assert planned(output) == ["00_study", "08_ablations", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"judges.speeches": 3}')
    assert planned(output) == ["00_study", "10_judges", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"agreement.scored": 3}')
    assert planned(output) == ["00_study", "11_experts", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"mixing.budget": 12}')
    assert planned(output) == ["00_study", "09_mixing", "13_report"] and output.count("09_mixing_cell") >= 1


def test_code_re_runs_its_stage_and_what_follows(copy):
    path = copy / "nbs" / "07_win_rates.ipynb"
    before = path.read_text()
    try:
        path.write_text(before.replace("stage.keep(answers=answers", "stage.keep( answers=answers"))
        assert path.read_text() != before
        assert planned(chain(copy, "--dry-run")) == ["07_win_rates", "10_judges", "11_experts", "13_report"]
    finally:
        path.write_text(before)


def test_prose_and_saved_outputs_re_run_nothing(copy):
    path = copy / "nbs" / "07_win_rates.ipynb"
    before = path.read_text()
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = ["Other words.\n"]
        else:
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["other\n"]}]
    try:
        path.write_text(json.dumps(notebook))
        assert "Nothing to be done" in chain(copy, "--dry-run")
    finally:
        path.write_text(before)


def test_a_run_folder_of_an_older_layout_is_refused_in_one_line(copy):
    (copy / "outputs/old/05_speeches").mkdir(parents=True)
    line = psycopref(copy, "01_speeches", "-p", "RUN=old")
    assert "outputs/old: holds '05_speeches'" in line and "expected such as '00_study'" in line
    assert "outputs/old: holds '05_speeches'" in bad(
        copy, "snakemake", "--cores", "2", "--nolock", "--config", "profile=tiny", "run=old"
    )


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


def test_report_is_self_contained(copy):
    chain(copy, "--report", "outputs/tiny/report.html")
    page = (copy / "outputs/tiny/report.html").read_text()
    for name in (
        "table_1_reward",
        "table_2_win_rates",
        "fig_4_online_offline",
        "table_S7_headlines",
        "table_S15_spending",
    ):
        assert name in page
    assert 'src="http' not in page and '<link rel="stylesheet" href="http' not in page


def test_the_report_says_what_was_asked_and_that_it_was_free(copy):
    table = pd.read_csv(copy / "outputs/tiny/tables/table_S15_spending.csv", keep_default_na=False, dtype=str)
    books = [row for stage in STAGES if stage != "13_report" for row in receipt(copy, stage).get("books", [])]
    assert (
        {row["stage"] for row in books}
        == set(table.stage) - {"all"}
        == {"02_responses", "03_ratings", "05_reward", "06_policy", "07_win_rates", "10_judges", "08_ablations"}
    )
    for stage in set(table.stage) - {"all"}:
        assert table[table.stage == stage].calls.astype(int).sum() == sum(
            row["calls"] for row in books if row["stage"] == stage
        )
    assert table[table.stage == "02_responses"].calls.tolist() == ["168"] and table[
        table.stage == "03_ratings"
    ].calls.tolist() == ["294"]
    assert int(table.calls.iloc[-1]) == sum(row["calls"] for row in books) and set(table["US dollars"]) == {"0.00"}
    page = (copy / "outputs/tiny/13_report/overview.html").read_text()
    assert "nothing was paid: no model asked has a price" in page and str(copy) not in "".join(table.model)


def test_the_grid_is_made_cell_by_cell_and_a_lost_cell_again(copy):
    cells = copy / "outputs/tiny/09_mixing.cells"
    assert sorted(path.name for path in cells.iterdir()) == ["random-tiny.half", "random-tiny.psy"]
    rows = json.loads((copy / "outputs/tiny/09_mixing/summary.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["this run's counselling pairs", "Psy16", "Psy8Help8"]
    half = json.loads((cells / "random-tiny.half/cell.json").read_text())
    assert (
        half["drawn"] == {"counselling": 8, "general": 8}
        and half["training"]["pairs"] == 16
        and not list(cells.rglob("*.safetensors"))
    )
    before = receipt(copy, "09_mixing")["outputs"]
    shutil.rmtree(cells / "random-tiny.half")
    run(copy, "psycopref", "run", "nbs/09_mixing.ipynb", "-p", "PROFILE=tiny")  # by hand it makes what is missing
    after = receipt(copy, "09_mixing")["outputs"]
    assert {name: digest for name, digest in after.items() if name.endswith((".csv", ".parquet"))} == {
        name: digest for name, digest in before.items() if name.endswith((".csv", ".parquet"))
    }
    assert (cells / "random-tiny.half/receipt.json").is_file()
    chain(copy)


@pytest.mark.parametrize(
    "stage, moment",
    [
        ("05_reward", "checkpoint-*/trainer_state.json"),
        ("05_reward", "checkpoint-*"),
        *(
            ("06_policy", f"random-tiny/{place}")
            for place in (
                "job/checkpoints/checkpoint-*",
                "iter/iteration-1/candidates/block-0000.json",
                "iter/iteration-1/job/checkpoints/checkpoint-*",
                "iter/iteration-2/candidates/block-0000.json",
            )
        ),
    ],
)
def test_killed_training_continues_to_the_same_weights(copy, stage, moment):
    "SIGKILL at six places; the next start ends with the bytes of an unbroken run."
    name = f"killed-{stage}-" + "".join(c for c in moment if c.isalnum())
    for done in ("01_speeches", "03_ratings", "04_pairs", *(["05_reward"] if stage == "06_policy" else [])):
        shutil.copytree(copy / "outputs/tiny" / done, copy / "outputs" / name / done)
    command = [str(BIN / "psycopref"), "run", f"nbs/{stage}.ipynb", "-p", "PROFILE=tiny", "-p", f"RUN={name}"]
    environment = {k: v for k, v in os.environ.items() if k != "PSYCOPREF_ROOT"} | {
        "PATH": f"{BIN}:{os.environ['PATH']}"
    }
    process = subprocess.Popen(
        command, cwd=copy, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    work = copy / "outputs" / name / f"{stage}.partial"
    limit = time.monotonic() + 300
    while process.poll() is None and not _there(work, moment) and time.monotonic() < limit:
        time.sleep(0.01)
    assert process.poll() is None, "the moment passed before the kill"
    os.killpg(process.pid, signal.SIGKILL)
    for pid in _children_in(copy):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (copy / "outputs" / name / stage).exists()
    run(copy, *command)
    weights = {
        key: digest for key, digest in receipt(copy, stage, name)["outputs"].items() if key.endswith(".safetensors")
    }
    assert weights and weights == {
        key: digest for key, digest in receipt(copy, stage)["outputs"].items() if key.endswith(".safetensors")
    }


def _there(folder, moment):
    "Whether a file or folder stands below; one that goes away while we look is looked for again."
    try:
        return any(folder.rglob(moment))
    except FileNotFoundError:
        return False


def _children_in(folder):
    "Kernels that a killed runner left in this copy."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ipykernel_launcher" in path.read_bytes() and Path(os.readlink(path.parent / "cwd")).is_relative_to(
                folder
            ):
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def bad(copy, *command):
    "Run a command that must fail with one clear line."
    output = run(copy, *command, ok=False).strip()
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("psycopref: ")]
    return line


def psycopref(copy, notebook, *more):
    return bad(copy, "psycopref", "run", f"nbs/{notebook}.ipynb", "-p", "PROFILE=tiny", *more)


def test_bad_input_is_one_line_and_harms_nothing(copy, tmp_path):
    signed = {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}
    assert "profile 'tyni' does not exist" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFILE=tyni")
    assert "no parameter 'PROFIL'" in bad(copy, "psycopref", "run", "nbs/04_pairs.ipynb", "-p", "PROFIL=tiny")
    assert "no setting 'learning_rte'. Did you mean learning_rate?" in psycopref(
        copy, "05_reward", "-o", "reward.learning_rte=1"
    )
    assert "expected float" in psycopref(copy, "05_reward", "-o", 'reward.learning_rate="fast"')
    assert "no such file" in psycopref(copy, "01_speeches", "-p", 'SOURCES=["counsel-chat=/nowhere.csv"]')
    (tmp_path / "chat.csv").write_text("a,b\n1,2\n")
    assert "has no column" in psycopref(copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/chat.csv"]')
    (tmp_path / "empty.csv").write_text("questionID,questionText,topics\n1,too short,Stress\n")
    assert "no usable client speech" in psycopref(
        copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/empty.csv"]'
    )
    (tmp_path / "latin.csv").write_bytes("questionID,questionText,topics\n1,caf\xe9,Stress\n".encode("latin-1"))
    assert "not UTF-8" in psycopref(copy, "01_speeches", "-p", f'SOURCES=["counsel-chat={tmp_path}/latin.csv"]')
    assert signed == {stage: sha256_file(copy / "outputs/tiny" / stage / "receipt.json") for stage in STAGES}


def test_broken_files_are_one_line(copy):
    shutil.copytree(copy / "outputs/tiny", copy / "outputs/broken", ignore=shutil.ignore_patterns("1*", "cache"))
    (copy / "outputs/broken/03_ratings/receipt.json").unlink()
    assert "has no receipt.json" in psycopref(copy, "04_pairs", "-p", "RUN=broken")
    path = copy / "outputs/broken/02_responses/responses.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert "was changed since" in psycopref(copy, "03_ratings", "-p", "RUN=broken")


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
    assert "252 of 294" in psycopref(copy, "03_ratings", "-p", "RUN=asked", "-o", f'ratings.rater="{uri}"'), (
        "below its coverage the stage fails"
    )
    assert len(rater.log) == 294 and not (copy / "outputs/asked/03_ratings").exists()
    quarantine = json.loads((copy / "outputs/asked/03_ratings.partial/quarantine.json").read_text())
    assert "Bearer [key]" in quarantine[0]["raw"], "the server did say the key"
    first, rater.broken = list(rater.log), False
    assert (
        "valid answer" in psycopref(copy, "03_ratings", "-p", "RUN=asked", "-o", f'ratings.rater="{uri}"')
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


def test_trace_and_compare(copy):
    lines = run(copy, "psycopref", "trace", "outputs/tiny/04_pairs").splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")][0] == "04_pairs" and any(
        line.startswith("01_speeches") for line in lines
    )
    assert set(line.split()[0] for line in run(copy, "psycopref", "compare", "tiny", "tiny").splitlines()) == {"same"}
