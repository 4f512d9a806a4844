"""The chapters read as chapters: results in place, few imports, no definitions; README says what the run says."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from psycopref.core.settings import load_profile
from psycopref.core.stages import as_dotted
from psycopref.experiments.seeds import read_seeds
from psycopref.run.results import publication_faults, readme_block

REPOSITORY = Path(__file__).parents[2]
CHAPTERS = sorted((REPOSITORY / "nbs").glob("*.ipynb"))
README = (REPOSITORY / "README.md").read_text()


def notebook(path):
    return json.loads(path.read_text())


def sources(path, kind):
    return ["".join(cell["source"]) for cell in notebook(path)["cells"] if cell["cell_type"] == kind]


def code(path):
    return sources(path, "code")


def prose(path):
    return sources(path, "markdown")


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_there_are_fourteen_chapters_and_an_index():
    assert len(CHAPTERS) == 15 and CHAPTERS[-1].stem == "index"


@each_chapter
def test_a_chapter_holds_its_results_and_nothing_of_a_machine(path):
    assert publication_faults(notebook(path)) == []


@each_chapter
def test_a_chapter_imports_in_eight_lines_and_defines_nothing(path):
    trees = [ast.parse(source) for source in code(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    lines = sum(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert lines <= 8
    assert not [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_run_cells_say_what_the_experiment_is_and_little_else():
    cells = [source for path in CHAPTERS for source in code(path) if source.startswith("#| run")]
    lines = [len(source.splitlines()) for source in cells]
    assert sum(lines) - len(lines) <= 570 and max(lines) <= 18


@each_chapter
def test_a_chapter_opens_with_its_question_and_points_to_no_number(path):
    first = prose(path)[0]
    assert first.startswith("# ") and "\n> " in first
    assert not re.findall(r"\bnotebooks? \d\d", "\n".join(prose(path)))


def test_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 120 and len(README.split()) <= 1200
    assert any(line.startswith("make reproduce") for line in lines[:30])
    assert "no clinical judge" in README


PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *CHAPTERS]
PAGES += sorted((REPOSITORY / "nbs/guide").glob("*.ipynb"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join(prose(path))
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", CHAPTERS[:-1], ids=lambda path: path.stem)
def test_a_chapter_needs_no_later_one(path):
    own, text = int(path.stem[:2]), "\n".join(prose(path)[:-1] + code(path))  # the last cell says what to read next
    assert [number for number in map(int, re.findall(r"\]\((\d\d)_\w+\.ipynb\)", text)) if number > own] == []


def shown_cells(outputs):
    "The texts of all table cells in outputs."
    html = "".join("".join(output.get("data", {}).get("text/html", [])) for output in outputs)
    return {re.sub(r"<[^>]+>", "", own).strip() for own in re.findall(r"<td[^>]*>(.*?)</td>", html, re.S)}


def test_every_number_of_readme_s_results_stands_in_the_index():
    cells = notebook(REPOSITORY / "nbs/index.ipynb")["cells"]
    shown = shown_cells([output for cell in cells for output in cell.get("outputs", [])])
    lines = [line for line in README.splitlines() if re.match(r"\| [^|]+ \| [\d.]+% \|", line)]
    rows = [[own.strip() for own in line.split("|")[2:5]] for line in lines]
    assert len(rows) >= 3
    for measured, interval, n in rows:
        assert measured.rstrip("%") in shown and interval in shown and n in shown, (measured, interval, n)


def test_readme_s_table_is_that_of_the_seeds_in_results(monkeypatch):
    monkeypatch.setenv("PSYCOPREF_ROOT", str(REPOSITORY))
    [(profile, shown)] = re.findall(r"(?s)<!-- results: (\w+) -->\n(.*)\n<!-- end of results -->", README)
    assert shown == readme_block(read_seeds(profile)), f"run make notebooks, for results/{profile} was changed"


def test_the_settings_page_holds_every_setting():
    page = notebook(REPOSITORY / "nbs/guide/09_settings.ipynb")
    shown = json.dumps([cell.get("outputs") for cell in page["cells"]])
    missing = [name for name in as_dotted(dataclasses.asdict(load_profile("tiny"))) if f"| `{name}` |" not in shown]
    assert not missing, f"run nbs/guide/09_settings.ipynb again, for {missing}"


def test_no_saved_output_speaks_of_the_old_layout():
    names = "03_weights 05_speeches 06_responses 07_ratings 08_pairs 11_reward 12_policy 13_evaluation 16_report"
    old = re.compile(rf"\b({'|'.join(names.split())})\b")
    for path in sorted((REPOSITORY / "nbs").rglob("*.ipynb")):
        saved = json.dumps([cell.get("outputs") for cell in notebook(path)["cells"]])
        assert path.parent.name == "run" and "holds '05_speeches'" in saved or not old.search(saved), path
