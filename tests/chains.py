"""A finished chain of the `tiny` profile for the tests of whole chains, and commands in a copy of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from psycopref.core.stages import STAGES

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


PLANTED = "sk-planted-0123456789abcdef"  # a secret of the user's, which must stand nowhere afterwards


def environment():
    "The environment of a user: no project set, this interpreter's commands first, keys of services that are not asked."
    own = dict.fromkeys(("OPENAI_API_KEY", "HF_TOKEN", "PSYCOPREF_KEY_EXAMPLE_ORG", "WANDB_API_KEY"), PLANTED)
    own |= {"PATH": f"{BIN}:{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "false"}
    own["OMP_NUM_THREADS"] = "2"  # as Snakemake gives to each stage with two cores: threads decide the last bits
    return {k: v for k, v in os.environ.items() if k != "PSYCOPREF_ROOT"} | own


def run(copy, *command, ok=True):
    "Run a command in the copy; return its combined output."
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=copy, env=environment(), timeout=1500, **pipes)
    assert (done.returncode == 0) is ok, done.stdout[-3000:]
    return done.stdout


def chain(copy, *more, overrides="{}", more_config=(), ok=True):
    "Run Snakemake in the copy."
    config = ("--config", "profile=tiny", f"overrides={overrides}", *more_config)
    return run(copy, "snakemake", "--cores", "2", "--nolock", *more, *config, ok=ok)


def bad(copy, *command):
    "Run a command that must fail with one clear line."
    output = run(copy, *command, ok=False).strip()
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("psycopref: ")]
    return line


def run_stage(copy, stage, *more):
    "Run a chapter that must fail with one clear line."
    return bad(copy, "psycopref", "run", f"nbs/{stage}.ipynb", "-p", "PROFILE=tiny", *more)


def planned(output):
    "Stages that a dry run would execute."
    return [name for name in STAGES if f"{name}:" in output or (name == "13_report" and "rule report" in output)]


def receipt(copy, stage, name="tiny"):
    return json.loads((copy / "outputs" / name / stage / "receipt.json").read_text())


def finished_chain(folder):
    "Make the chain in a folder once for all processes that test."
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name in ("nbs", "Snakefile", "settings.ini"):
                source = REPOSITORY / name
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
            chain(folder)
            (folder / "finished").touch()
    return folder
