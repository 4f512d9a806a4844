"""What `make reproduce` shows while it runs, from the real Makefile and Snakefile, with stages that only sign."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psycopref.run.console import Console, expected_seconds
from psycopref.run.runner import followed_progress

REPOSITORY = Path(__file__).parents[2]
STAGE = """#!{python} -IS
"psycopref run: signs the stage, fails or waits, as a file of its name says."
import json, os, pathlib, signal, sys, time
if sys.argv[1] != "run":
    sys.exit()
stage, told = pathlib.Path(sys.argv[2]).stem, json.loads(sys.argv[4])
more = dict(word.split("=") for word in sys.argv[6::2])
place = pathlib.Path("outputs", more.get("RUN", told["RUN"]), stage)
if "SHARD" in more:
    place = place.with_suffix(".shards") / more["SHARD"]
if "CELL" in more:
    place = place.with_suffix(".cells") / more["CELL"]
if os.path.exists(stage + ".fails"):
    sys.exit("psycopref: " + stage + ": found nothing, expected something")
if os.path.exists(stage + ".waits"):
    pathlib.Path(stage + ".pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    time.sleep(60)
place.mkdir(parents=True, exist_ok=True)
if stage == "13_report":
    (place / "show").mkdir(exist_ok=True)
    (place / "overview.html").write_text("everything on one page")
    (place / "browse.html").write_text("answers")
signed = dict(profile=told["PROFILE"], settings={{}}, seconds=115.0, finished="2026-11-30T00:00:00Z")
(place / "receipt.json").write_text(json.dumps(signed))
print("the path of a notebook")
"""


@pytest.fixture
def project(tmp_path):
    "A copy of what `make reproduce` reads, whose `psycopref` is quick and whose `snakemake` is the real one."
    for name in ("nbs", "Snakefile", "Makefile", "settings.ini", "constraints.txt", "pyproject.toml"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "psycopref").write_text(STAGE.format(python=sys.executable))
    (programs / "psycopref").chmod(0o755)
    (programs / "snakemake").symlink_to(Path(sys.executable).parent / "snakemake")
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def start(project, *words):
    "Start `make reproduce` as a terminal would, in a group of its own."
    own = {
        name: value for name, value in os.environ.items() if name not in ("PSYCOPREF_ROOT", "MAKEFLAGS", "MAKELEVEL")
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(["make", "reproduce", "PROFILE=tiny", *words], cwd=project, env=own, **pipes)


def shown(running, code=0):
    "Wait for a run, and return what it wrote."
    output = running.communicate(timeout=120)[0]
    assert (running.returncode == 0) == (code == 0), output
    assert "\r" not in output and "\x1b" not in output, "this is no terminal"
    return output


def test_a_run_is_told_in_lines_and_the_next_knows_how_long_it_takes(project):
    lines = shown(start(project, "SHARDS=2")).splitlines()
    assert lines[0].startswith("20 steps, time left is told when")
    assert lines[1] == "[ 1/20] 00_study: the chain, the weights and the plan" and re.match(
        r"\[ 1/20\] 00_study: \d+ s$", lines[2]
    )
    told = [line for line in lines if "02_responses" in line]
    assert any(re.search(r"\] 02_responses: responses of the pool, shard 1-of-2$", line) for line in told)
    assert any(re.search(r"\] 02_responses, shard 2-of-2: \d+ s$", line) for line in told) and len(told) == 6
    assert re.match(r"\[20/20\] 13_report: \d+ s$", lines[40]) and len(lines) <= 42, lines
    log = (project / "outputs/tiny/snakemake.log").read_text()
    assert "Building DAG" in log and "Job stats" in log and "20 of 21 steps" in log
    begun = [int(re.search(r"\] (\d\d)_", line)[1]) for line in lines[1:41:2]]
    assert begun == sorted(begun), "of what could run, the first in reading order does"
    assert (project / "outputs/tiny/report.html").read_text() == "everything on one page"
    assert (project / "outputs/tiny/browse.html").read_text() == "answers"

    report = (project / "outputs/tiny/report.html").stat().st_mtime_ns
    again = shown(start(project, "SHARDS=2"))
    assert again.splitlines()[0] == "Nothing to do: this run is finished"
    assert (project / "outputs/tiny/report.html").stat().st_mtime_ns == report, "nothing changed, so neither did it"

    other = shown(start(project, "RUN=other")).splitlines()
    assert other[0] == "16 steps, about 32 min", other[0]  # 16 of 119 s
    assert re.match(r"\[ 1/16\] 00_study: \d+ s; about \d+ min left", other[2]) and "left" not in other[-2]


def test_the_error_of_a_stage_passes_through_and_the_log_is_named(project):
    (project / "03_ratings.fails").touch()
    output = shown(start(project), code=1)
    assert "psycopref: 03_ratings: found nothing, expected something" in output
    assert re.search(r"03_ratings: failed after \d+ s\n", output) and "outputs/tiny/snakemake.log" in output
    assert not re.search("Select jobs|CalledProcess|Traceback|Shutting down", output)
    assert "CalledProcessError" in (project / "outputs/tiny/snakemake.log").read_text()


def test_errors_of_snakemake_and_wrong_words_are_few_lines(project):
    assert "expected a whole number" in shown(start(project, "SHARDS=0"), code=1)
    text = (project / "Snakefile").read_text()
    (project / "Snakefile").write_text(text.replace('needs=stage["needs"],', 'needs=[*stage["needs"], "none.json"],'))
    output = shown(start(project), code=1)
    assert "MissingInputException" in output and "none.json" in output and output.count("\n") < 10, output
    (project / "Snakefile").write_text(text + "rule all:")
    assert "outputs/tiny/snakemake.log" in shown(start(project), code=1)


@pytest.mark.parametrize("name", ["0", "2024", "1e3", "2025_02", "true", "07", "null"])
def test_the_name_of_a_run_is_a_name_whatever_it_looks_like(project, name):
    shown(start(project, f"RUN={name}"))
    assert (project / "outputs" / name / "report.html").is_file() and os.listdir(project / "outputs") == [name]


@pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "-1", "a'b", '"', "a;b", "a/b", "~"])
def test_what_is_no_name_is_one_line_and_makes_no_folder(project, name):
    output = shown(start(project, f"RUN={name}"), code=1)
    [line] = [line for line in output.splitlines() if not line.startswith("make: ")]
    assert line.startswith("psycopref: run name") and name in line and not (project / "outputs").exists()


def test_variables_that_are_set_to_nothing_are_not_set(project):
    shown(start(project, "RUN=", "SEED=", "SEEDS=", "OVERRIDES=", "SOURCES=", "SHARDS=", "CORES="))
    assert os.listdir(project / "outputs") == ["tiny"]


@pytest.mark.parametrize("given", ["run=2024", "run=0", "run=1e3", "run=2025_02", "run=True", "profile=7"])
def test_a_number_that_snakemake_read_is_no_name(project, given):
    command = [str(project / ".venv/bin/snakemake"), "-n", "--cores", "1", "--config", given]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("psycopref: ")]
    name = given.partition("=")[0]
    assert done.returncode and len(lines) == 1 and f"""write {name}='["NAME"]'""" in lines[0]


def until(there, running):
    "Wait until something is there, at most a minute."
    limit = time.monotonic() + 60
    while not there() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    assert there()


GO_ON = "the same command goes on from there"


@pytest.mark.parametrize("how", ["first second", "to all", "to make"])
def test_an_interrupt_says_how_to_go_on_and_leaves_no_process(project, how):
    (project / "02_responses.waits").touch()
    running = start(project)
    mark, log = project / "02_responses.pid", project / "outputs/tiny/snakemake.log"
    until(log.exists if how == "first second" else mark.exists, running)
    if how == "to make":
        running.send_signal(signal.SIGTERM)
    else:
        os.killpg(running.pid, signal.SIGINT)  # what a terminal sends; Snakemake has a group of its own
    output = shown(running, code=1)
    assert output.count(GO_ON) == 1 and "Traceback" not in output
    if mark.exists():
        assert not Path("/proc", mark.read_text()).exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_bars_are_one_line_in_place_or_a_line_now_and_then(out):
    with followed_progress(out, each=0.01):
        with open(os.environ["PSYCOPREF_PROGRESS"], "a") as bars:
            bars.write("\rtrain: 10%\rtrain: 20%\x1b[A")
            bars.flush()
            limit = time.monotonic() + 30
            while "20%" not in out.getvalue() and time.monotonic() < limit:
                time.sleep(0.01)
    text = out.getvalue()
    assert "train: 20%" in text
    assert text.endswith("\r\x1b[K") if out.isatty() else not {"\r", "\x1b"} & {*text} and text.endswith("%\n")


def rule(name, settings):
    return {"name": name, "title": "", "parameters": '{"PROFILE": "tiny"}', "settings": json.dumps(settings)}


def sign(root, run, stage, seconds, settings, finished="2026"):
    place = root / "outputs" / run / stage
    place.mkdir(parents=True)
    signed = {"profile": "tiny", "settings": settings, "seconds": seconds, "finished": finished}
    (place / "receipt.json").write_text(json.dumps(signed))


def test_receipts_of_equal_settings_count_before_newer_and_these_before_published_ones(tmp_path):
    rules = [rule("04_pairs", {"gap": 7}), rule("05_reward", {})]
    assert expected_seconds(rules, published={}) == {}
    sign(tmp_path, "a", "04_pairs", 100.0, {"gap": 7}, "2025")
    sign(tmp_path, "b", "04_pairs", 200.0, {"gap": 9}, "2026")
    sign(tmp_path, "b", "03_ratings.shards/1-of-2", 50.0, {})
    published = {"tiny": {"gflops": 1e-6, "seconds": {"04_pairs": 1.0, "05_reward": 3e9}}}
    found = expected_seconds([*rules, rule("03_ratings", {})], 2, published)
    assert found["04_pairs"] == found["04_pairs_seed"] == 104 and found["03_ratings_shard"] == 27
    assert 0 < found["05_reward"] < 3e6, "a faster machine takes less"


def test_what_was_slower_than_expected_makes_the_rest_longer(tmp_path):
    for stage in ("04_pairs", "05_reward"):
        sign(tmp_path, "a", stage, 596.0, {})
    out = io.StringIO()
    console = Console([rule("04_pairs", {}), rule("05_reward", {})], out=out)
    console.planned({"04_pairs": 1, "05_reward": 1, "total": 2})
    begun = {"event": "job_info", "jobid": 1, "rule_name": "04_pairs", "rule_msg": "04_pairs: "}
    console.handle(logging.makeLogRecord(begun))
    console.began -= 1260  # twice as long
    console.handle(logging.makeLogRecord({"event": "job_finished", "job_id": 1}))
    assert out.getvalue().startswith("2 steps, about 20 min\n") and out.getvalue().endswith("about 20 min left\n")
