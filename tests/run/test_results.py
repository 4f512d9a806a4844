"""Results in place: outputs only, never sources; all chapters or none; nothing of a machine."""

import json

import pytest
from refusals import one_line

from psycopref.core.files import write_json
from psycopref.core.stages import STAGES, Run, project_root
from psycopref.run import results
from psycopref.run.chapter import open_stage
from psycopref.run.results import copy_results, publication_faults, publish

TEXT = {"output_type": "display_data", "metadata": {"a": 1}}
TEXT |= {"data": {"text/markdown": ["It is so."], "text/plain": ["<object at 0x7f>"]}}


def cell(source, *outputs, name="a", tags=()):
    found = {"cell_type": "code", "id": name, "source": [source], "outputs": list(outputs), "execution_count": 4}
    return found | {"metadata": {"tags": list(tags)} if tags else {}}


@pytest.fixture
def finished():
    """A run whose chapters are executed, and chapters without results."""
    stage = open_stage("01_speeches", "tiny")
    stage.keep(drops=[])
    stage.finish()
    injected = cell("RUN = 'tiny'", name="injected", tags=["injected-parameters"])
    executed = cell("stage.say(1)", TEXT) | {"metadata": {"papermill": {"duration": 3}}}
    for name in ("index", *STAGES):
        write_json(project_root() / "nbs" / f"{name}.ipynb", {"cells": [cell("stage.say(1)")], "nbformat": 4})
        write_json(Run("tiny").outputs / "notebooks" / f"{name}.ipynb", {"cells": [injected, executed]})
    return Run("tiny")


def read(name):
    return json.loads((project_root() / "nbs" / f"{name}.ipynb").read_text())


def spoil(finished, name, change):
    """Change the second cell of an executed chapter."""
    path = finished.outputs / "notebooks" / f"{name}.ipynb"
    done = json.loads(path.read_text())
    change(done["cells"][1])
    write_json(path, done)


def test_outputs_are_copied_and_nothing_else(finished):
    stream = {"output_type": "stream", "name": "stdout", "text": [f"{project_root()}/outputs/tiny\n"]}
    spoil(finished, "05_reward", lambda own: own.update(outputs=[stream]))
    assert len(copy_results(finished)) == 1 + len(STAGES)
    for name in ("index", *STAGES):
        [own] = read(name)["cells"]
        assert own["source"] == ["stage.say(1)"] and own["execution_count"] is None and own["metadata"] == {}
        kept = TEXT | {"data": {"text/markdown": ["It is so."]}, "metadata": {}}
        assert own["outputs"] == [stream | {"text": ["outputs/tiny\n"]} if name == "05_reward" else kept]
        assert publication_faults(read(name)) == []


def shown(text):
    return lambda own: own["outputs"][0]["data"].update({"text/markdown": [text]})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda own: own.update(source=["stage.say(2)"]), "a cell was changed since the run"),
        (lambda own: own.update(outputs=[]), "shows a result and holds no output"),
        (lambda own: own["outputs"].append({"output_type": "error", "ename": "E"}), "holds an error"),
        (shown("/home/me/x"), "a path of a machine"),
        (shown("x" * 600_000), "at most 500000"),
    ],
)
def test_one_unfit_chapter_and_nothing_is_written(finished, change, message):
    spoil(finished, "13_report", change)
    assert message in one_line(lambda: copy_results(finished))
    assert all(read(name)["cells"][0]["outputs"] == [] for name in ("index", *STAGES))


def test_a_run_that_is_not_finished_or_of_an_older_layout_is_refused(finished):
    (finished.outputs / "notebooks" / "07_win_rates.ipynb").unlink()
    assert "finish the run first" in one_line(lambda: copy_results(finished))
    assert "run 13_report first" in one_line(lambda: publish(finished))
    (finished.outputs / "05_speeches").mkdir()
    assert "no stage of this version" in one_line(lambda: publish(finished))


def test_a_later_seed_leaves_its_file_and_neither_chapters_nor_picture(finished, monkeypatch):
    stage = {
        "settings": {},
        "code": "a",
        "own": True,
        "seconds": 6.0,
        "finished": "2026",
        "processor": "",
        "commit": "",
    }
    record = {"profile": "tiny", "changed": {}, "backbones": ["m"], "dtype": "float32", "calibration": {}, "pairs": "p"}
    record |= {"stages": {"06_policy": stage | {"versions": {}}}, "speeches": "s", "lists": {}, "rows": []}
    monkeypatch.setattr(results, "stages_of_run", lambda run: STAGES)
    monkeypatch.setattr(results, "run_notebook", lambda path, given: None)  # it was executed before
    write_json(finished.outputs / "13_report" / "receipt.json", {})
    (picture := finished.figures / "fig_S3_win_rates.png").parent.mkdir(parents=True)
    for seed, shown in ((3, "three"), (7, "seven")):
        picture.write_text(shown)
        monkeypatch.setattr(results, "seed_record", lambda run, seed=seed: record | {"seed": seed})
        lines = publish(finished)
    assert "it shows seed 3" in lines[-1] and (project_root() / "figures/results.png").read_text() == "three"
    assert sorted(path.name for path in (project_root() / "results/tiny").iterdir()) == ["seed-3.json", "seed-7.json"]
    assert read("05_reward")["cells"][0]["outputs"], "the first seed's outputs stay"
