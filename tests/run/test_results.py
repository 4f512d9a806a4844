"""Results in place: outputs only, never sources; all chapters or none; nothing of a machine."""

import json

import pytest
from refusals import one_line

from psycopref.core.files import write_json
from psycopref.core.stages import STAGES, Run, project_root
from psycopref.run.chapter import open_stage
from psycopref.run.results import copy_results, publication_faults

TEXT = {
    "output_type": "display_data",
    "data": {"text/markdown": ["It is so."], "text/plain": ["<object at 0x7f>"]},
    "metadata": {"a": 1},
}


def cell(source, *outputs, name="a", kind="code"):
    return {
        "cell_type": kind,
        "id": name,
        "metadata": {},
        "source": [source],
        "outputs": list(outputs),
        "execution_count": 4,
    }


@pytest.fixture
def finished():
    """A run whose chapters are executed, and chapters without results."""
    stage = open_stage("01_speeches", "tiny")
    stage.keep(drops=[])
    stage.finish()
    for name in ("index", *STAGES):
        write_json(project_root() / "nbs" / f"{name}.ipynb", {"cells": [cell("stage.say(1)")], "nbformat": 4})
        injected = cell("RUN = 'tiny'", name="injected")
        executed = {"cells": [injected, cell("stage.say(1)", TEXT) | {"metadata": {"papermill": {"duration": 3}}}]}
        write_json(Run("tiny").outputs / "notebooks" / f"{name}.ipynb", executed)
    return Run("tiny")


def read(name):
    return json.loads((project_root() / "nbs" / f"{name}.ipynb").read_text())


def test_outputs_are_copied_and_nothing_else(finished):
    assert len(copy_results(finished)) == 1 + len(STAGES)
    for name in ("index", *STAGES):
        [own] = read(name)["cells"]
        assert own["source"] == ["stage.say(1)"] and own["execution_count"] is None and own["metadata"] == {}
        assert own["outputs"] == [
            {"data": {"text/markdown": ["It is so."]}, "metadata": {}, "output_type": "display_data"}
        ]
        assert publication_faults(read(name)) == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda done: done["cells"][1].update(source=["stage.say(2)"]), "a cell was changed since the run"),
        (lambda done: done["cells"][1].update(outputs=[]), "shows a result and holds no output"),
        (lambda done: done["cells"][1]["outputs"].append({"output_type": "error", "ename": "E"}), "holds an error"),
        (
            lambda done: done["cells"][1]["outputs"][0]["data"].update({"text/markdown": ["/home/me/x"]}),
            "a path of a machine",
        ),
        (
            lambda done: done["cells"][1]["outputs"][0]["data"].update({"text/markdown": ["x" * 600_000]}),
            "at most 500000",
        ),
    ],
)
def test_one_unfit_chapter_and_nothing_is_written(finished, spoil, message):
    path = finished.outputs / "notebooks" / "13_report.ipynb"
    done = json.loads(path.read_text())
    spoil(done)
    write_json(path, done)
    assert message in one_line(lambda: copy_results(finished))
    assert all(read(name)["cells"][0]["outputs"] == [] for name in ("index", *STAGES))


def test_a_run_that_is_not_finished_is_refused(finished):
    (finished.outputs / "notebooks" / "07_win_rates.ipynb").unlink()
    assert "finish the run first" in one_line(lambda: copy_results(finished))


def test_paths_below_the_project_become_relative(finished):
    path = finished.outputs / "notebooks" / "05_reward.ipynb"
    done = json.loads(path.read_text())
    done["cells"][1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": [f"{project_root()}/outputs/tiny\n"]}
    ]
    write_json(path, done)
    copy_results(finished)
    assert read("05_reward")["cells"][0]["outputs"][0]["text"] == ["outputs/tiny\n"]
