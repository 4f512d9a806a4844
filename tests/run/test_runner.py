"""The runner: code is hashed without reading a notebook twice."""

import json

from psycopref.run import runner


def notebook(path, *sources):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source} for source in sources]}))
    return path


def test_a_notebook_is_read_again_only_when_it_was_changed(tmp_path):
    chapter = notebook(tmp_path / "00_chapter.ipynb", "import json", "from psycopref.core.files import read_json")
    (tmp_path / "core").mkdir()
    wing = notebook(tmp_path / "core/04_files.ipynb", "#| default_exp core.files", "#| export\nx = 1", "x = 2")
    first = runner.code_hash(chapter)
    reads = runner._code_cells.cache_info().misses
    assert runner.code_hash(chapter) == first and runner._code_cells.cache_info().misses == reads
    notebook(wing, "#| default_exp core.files", "#| export\nx = 1", "x = 'an example'")
    assert runner.code_hash(chapter) == first, "examples do not count"
    notebook(wing, "#| default_exp core.files", "#| export\nx = 'other code'", "x = 2")
    assert runner.code_hash(chapter) != first
