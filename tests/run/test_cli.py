"""What a user can mend is one line and exit code 1; help answers without heavy imports."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import one_line

from psycopref.core.stages import Run, project_root
from psycopref.run.chapter import open_stage
from psycopref.run import cli
from psycopref.run.cli import main
from psycopref.run.runner import notebook_parameters, trace


PAIRS = str(Path(__file__).resolve().parents[2] / "nbs" / "04_pairs.ipynb")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["run", "."], "cannot be read (Is a directory)"),
        (["run", "nowhere.ipynb"], "cannot be read (No such file or directory)"),
        (["run", PAIRS, "--parameters", "{RUN: 1}"], "expected a JSON object"),
        (["run", PAIRS, "--parameters", "[1]"], "expected a JSON object"),
        (["run", PAIRS, "-p", "OVERRIDES=[1]", "-o", "dpo.beta=1"], "OVERRIDES: found [1]"),
        (["run", PAIRS, "-p", "SEED"], "expected name=value"),
        (["plan", "--profile", "papers"], "Did you mean paper"),
        (["plan", "--profile", "tiny", "-o", "plan.gpu=V100"], "plan.gpu"),
        (["notebooks", ""], "run name ''"),
        (["rate", "none.csv", "-o", "out.csv"], "none.csv: cannot be read"),
        (["rate", "none.csv", "-o", "out.docx"], "ends in one of .csv"),
        (["notebooks", "never"], "run 01_speeches first"),
        (["trace", "outputs/never/01_speeches/speeches.parquet"], "is no artefact of a run"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, said, capsys):
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and said in shown.err


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "PSYCOPREF_ROOT"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "PSYCOPREF_ROOT"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'psycopref[train]'"),
        (ModuleNotFoundError("No module named 'psycopref.no'", name="psycopref.no"), "found no way on"),
        (ValueError("two\nlines"), "found no way on (ValueError: two lines)"),
    ],
)
def test_what_the_machine_lacks_is_one_line_that_says_what_to_do(error, said, capsys, monkeypatch):
    def fails(given):
        raise error

    monkeypatch.setattr(cli, "execute", fails)
    assert main(["plan"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and said in shown


def test_help_imports_no_settings_and_nothing_heavy():
    code = "import sys; from psycopref.run import cli; cli.build_parser(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("pydantic", "yaml", "numpy", "pandas", "torch", "papermill") if f"'{name}'" in loaded]


@pytest.mark.parametrize("source", ["A = B = 1", "A, B = 1, 2", "A += 1", "print(1)", "A = f()"])
def test_a_cell_of_parameters_holds_plain_values(tmp_path, source):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": [source]}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert "lines like NAME = value" in one_line(lambda: notebook_parameters(tmp_path / "x.ipynb"))
    (tmp_path / "x.ipynb").write_bytes(b"\xff\xfe\x00")
    assert "is no notebook" in one_line(lambda: notebook_parameters(tmp_path / "x.ipynb"))


def test_a_trace_begins_at_what_exists():
    stage = open_stage("01_speeches", "tiny")
    stage.keep(drops=[])
    stage.finish()
    folder = Run("tiny").stage("01_speeches")
    assert trace(folder / "drops.json") == trace(folder) and trace(folder)[0].startswith(
        "01_speeches: seed 0, no model"
    )
    for path in (folder / "speeches.parquet", Run("tiny").tables, project_root()):
        assert "expected an existing path" in one_line(lambda: trace(path))


def test_a_reader_that_has_enough_gets_no_traceback():
    command = [
        sys.executable,
        "-c",
        "import sys; from psycopref.run.cli import main; sys.exit(main())",
        "plan",
        "--profile",
        "tiny",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0


def test_a_table_is_rated_in_the_terminal(tmp_path, capsys):
    (tmp_path / "in.csv").write_text("context,text\nI can't sleep.,Since when?\nI lie awake.,\n")
    assert main(["rate", f"{tmp_path}/in.csv", "-o", f"{tmp_path}/out.csv", "--explain"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("out.csv: 1 of 2 rows rated by rules:rubric")
    assert second == "1 of 2 rows has no response and no score: row 2"
    assert (tmp_path / "out.csv").read_text().splitlines()[2].startswith("I lie awake.,,,")
