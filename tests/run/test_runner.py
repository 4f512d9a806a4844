"""The runner: code is hashed without reading a notebook twice; an interrupted stage leaves no kernel."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psycopref.core.stages import Run
from psycopref.run import runner
from psycopref.run.runner import check_parameters, notebook_parameters, retry

from refusals import one_line

NBS = Path(__file__).parents[2] / "nbs"


def notebook(path, *sources):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source} for source in sources]}))
    return path


def test_a_notebook_is_read_again_only_when_it_was_changed(tmp_path):
    chapter = notebook(tmp_path / "00_chapter.ipynb", "import json", "from psycopref.core.files import read_json")
    (tmp_path / "core").mkdir()
    wing = notebook(tmp_path / "core/05_files.ipynb", "#| default_exp core.files", "#| export\nx = 1", "x = 2")
    first = runner.code_hash(chapter)
    reads = runner._code_cells.cache_info().misses
    assert runner.code_hash(chapter) == first and runner._code_cells.cache_info().misses == reads
    notebook(wing, "#| default_exp core.files", "#| export\nx = 1", "x = 'an example'")
    assert runner.code_hash(chapter) == first, "examples do not count"
    notebook(wing, "#| default_exp core.files", "#| export\nx = 'other code'", "x = 2")
    assert runner.code_hash(chapter) != first


WAITS = """import os, pathlib, time
pathlib.Path("kernel").write_text(str(os.getpid()))
time.sleep(100)"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_leaves_no_kernel_and_says_how_to_go_on(tmp_path, sent):
    cells = [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "RUN = 'r'"}]
    cells.append({"cell_type": "code", "id": "b", "metadata": {}, "source": WAITS})
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [cell | {"outputs": [], "execution_count": None} for cell in cells]
    path = tmp_path / "00_waits.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    command = [sys.executable, "-c", "import sys; from psycopref.run.cli import main; sys.exit(main())", "run", path]
    environment = {name: value for name, value in os.environ.items() if name != "PSYCOPREF_LOG"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as running:
        limit, mark = time.monotonic() + 60, tmp_path / "kernel"
        while not (mark.is_file() and mark.read_text()) and running.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        running.send_signal(sent)
        output = running.communicate(timeout=60)[0]
    assert running.returncode == 130 and not Path("/proc", mark.read_text()).exists()
    assert output.splitlines() == ["psycopref: interrupted; what is finished is kept, run again to continue"]


NOTEBOOKS = {  # a file that is no chapter -> what is said
    "no JSON": ("{", "is no notebook"),
    "a list": ("[]", "is no notebook"),
    "no cells": ('{"cells": null}', "is no notebook"),
    "cells of text": ('{"cells": ["a"]}', "is no notebook"),
    "no tags": ('{"cells": [{"metadata": {"tags": null}}]}', "is no notebook"),
    "no metadata": ('{"cells": [{"metadata": null}]}', "is no notebook"),
    "no source": ('{"cells": [{"metadata": {"tags": ["parameters"]}, "source": null}]}', "is no notebook"),
    "no parameters": ('{"cells": []}', "0 cells tagged"),
    "no Python": ('{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "RUN ="}]}', "lines like NAME = value"),
    "a call": ('{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "RUN = f()"}]}', "lines like NAME = value"),
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_no_chapter_is_one_line(tmp_path, name):
    text, said = NOTEBOOKS[name]
    (tmp_path / "x.ipynb").write_text(text)
    assert said in one_line(lambda: notebook_parameters(tmp_path / "x.ipynb"))


WRONG = [
    ({"RUN": ["a"]}, "RUN is"),
    ({"SEED": -1}, "SEED is -1"),
    ({"SEED": "1"}, "SEED is '1'"),
    ({"SED": 1}, "'SED'"),
]
WRONG += [
    ({"PROFILE": ["tiny"]}, "PROFILE is"),
    ({"OVERRIDES": {"dpo.beta": "x"}}, "dpo.beta"),
    ({"RUN": "../x"}, "../x"),
]


@pytest.mark.parametrize("given, said", WRONG)
def test_a_wrong_parameter_is_one_line(given, said):
    assert said in one_line(lambda: check_parameters(NBS / "04_pairs.ipynb", given))


def test_a_stage_that_is_none_is_one_line():
    assert "there is no stage '../../x'" in one_line(lambda: retry(Run("any"), "../../x"))
