"""The repository agrees with itself: notebooks and modules, pins, import order, licence of notebooks' form."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
WINGS = "core stats models rater gateway corpus feedback training evaluation experiments reporting run".split()
CHAPTERS = sorted((REPOSITORY / "nbs").glob("[0-9]*.ipynb"))
ROOMS = sorted(path for wing in WINGS for path in (REPOSITORY / "nbs" / wing).glob("[0-9]*.ipynb"))
BIN = Path(sys.executable).parent


def cells(path):
    return json.loads(path.read_text())["cells"]


def exports(path):
    sources = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    return [source for source in sources if source.startswith("#| export")]


def contents(folder) -> dict:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_export_and_clean_leave_no_difference(command, tmp_path):
    for name in ("nbs", "psycopref"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    for name in ("settings.ini", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    before = contents(tmp_path)
    subprocess.run([str(BIN / command)], cwd=tmp_path, check=True, capture_output=True)
    after = contents(tmp_path)
    assert {path for path in {*before, *after} if after.get(path) != before.get(path)} == set()


def wing_and_number(path):
    return WINGS.index(path.parent.name), int(path.name.split("_")[0])


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "psycopref":
            whole = node.module.count(".") == 2
            yield from [node.module] if whole else [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("psycopref."))


def test_rooms_import_lower_wings_and_lower_rooms():
    from psycopref.run.runner import code_cells, notebook_of_modules

    notebooks = notebook_of_modules(REPOSITORY / "nbs")
    assert len(notebooks) == len(ROOMS)
    for path in ROOMS:
        for module in {name for source in code_cells(path) for name in imported(source)}:
            other = notebooks[module.removeprefix("psycopref.")]
            late = f"{path.parent.name}/{path.name} imports {module}, which comes later"
            assert wing_and_number(other) < wing_and_number(path), late


def test_chapters_are_imported_by_nobody_and_bear_no_name_of_a_wing():
    from psycopref.core.stages import STAGES

    assert [path.stem for path in CHAPTERS] == list(STAGES)
    assert not {path.stem.split("_", 1)[1] for path in CHAPTERS} & {*WINGS}
    assert not any(map(exports, CHAPTERS)), "a chapter defines nothing that others could import"


def test_the_folders_of_notebooks_are_the_wings():
    folders = {path.name for path in (REPOSITORY / "nbs").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders == {*WINGS, "guide"}
    rooms = {wing: sum(path.parent.name == wing for path in ROOMS) for wing in WINGS}
    assert all(n <= 10 for n in rooms.values()), rooms


def test_each_module_has_one_notebook():
    exported = [re.search(r"#\| default_exp ([\w.]+)", "".join(c["source"])) for path in ROOMS for c in cells(path)]
    names = [match[1] for match in exported if match]
    assert len(names) == len(set(names)) == len(ROOMS)
    assert all(name == f"{path.parent.name}.{path.stem.split('_', 1)[1]}" for name, path in zip(names, ROOMS))


def test_stage_notebooks_have_their_parameters():
    from psycopref.core.stages import STAGES
    from psycopref.run.runner import notebook_parameters

    for stage in STAGES:
        found = notebook_parameters(REPOSITORY / "nbs" / f"{stage}.ipynb").keys()
        assert {"PROFILE", "RUN", "SEED", "OVERRIDES"} <= found


def test_the_top_level_holds_what_was_meant():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    known = ".ci .gitattributes .gitignore CONTRIBUTING.md LICENSE Makefile README.md Snakefile constraints.txt"
    known += " .devcontainer .github CHANGELOG.md CITATION.cff environment.yml figures nbs outputs psycopref"
    known += " pyproject.toml results settings.ini tests"
    assert top <= {*known.split()}


def test_papermill_reads_every_parameter():
    from papermill.inspection import inspect_notebook

    from psycopref.run.runner import notebook_parameters

    for path in CHAPTERS:
        if '"parameters"' in path.read_text():
            lost = f"{path.name}: an = in a comment makes papermill lose a parameter"
            assert list(inspect_notebook(str(path))) == list(notebook_parameters(path)), lost


LEAN = "core.settings core.prompts rater.rules corpus.cleaning corpus.topics corpus.fetching corpus.sources"
LEAN += " corpus.general gateway.batches evaluation.baselines training.sampling run.cli"
NUMERIC = "stats.intervals stats.scores stats.agreement stats.length_control stats.calibration feedback.choosing"
NUMERIC += " evaluation.reward_bench run.plan"
HEAVY = "torch transformers trl vllm pandas pyarrow sklearn scipy matplotlib openai httpx httpx2 aiohttp"
HEAVY += " huggingface_hub requests pooch filelock ftfy py3langid"


@pytest.mark.parametrize("modules, heavy", [(LEAN, f"{HEAVY} numpy"), (NUMERIC, HEAVY)], ids=["lean", "numeric"])
def test_importing_and_asking_for_help_stay_light(modules, heavy):
    code = f"""
import importlib, sys
for module in "{modules}".split():
    importlib.import_module(f"psycopref.{{module}}")
    if module == "run.cli":
        sys.modules["psycopref.run.cli"].build_parser().format_help()
    if found := {{*"{heavy}".split()}} & {{*sys.modules}}:
        sys.exit(f"{{module}} loads {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def requirement_names(text):
    return {re.split(r"[<>=!~ \[]", item)[0].lower() for item in text.split()}


def test_requirements_agree_and_are_pinned():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(REPOSITORY / "settings.ini")
    ours = settings["DEFAULT"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    dependencies, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    assert sorted(extras) == ["dev", "serve", "train"] and extras["dev"][0] == "psycopref[train]"
    development = [*extras["train"], *extras["dev"][1:]]
    assert requirement_names(ours["requirements"]) == {d.lower() for d in dependencies}
    assert requirement_names(ours["dev_requirements"]) == {d.lower() for d in development}
    assert not {*dependencies} & {*development}
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {d.lower() for d in [*dependencies, *development]} <= pinned
    for name, value in project["tool"]["nbdev"].items():  # nbdev 3 reads these, nbdev 2 settings.ini
        said = " ".join(value) if isinstance(value, list) else str(value)
        assert ours[name] == said, name
    address = ours["git_url"].replace("%(user)s", ours["user"]).replace("%(repo)s", ours["repo"])
    assert project["project"]["urls"]["Repository"] == address
    environment = (REPOSITORY / "environment.yml").read_text()
    assert "--constraint constraints.txt" in environment and "--editable .[dev]" in environment


def test_prompts_and_data_travel_with_the_package():
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert '"resources/**/*"' in project and "[tool.setuptools.packages.find]" in project
    lines = (REPOSITORY / "psycopref/resources/demo_speeches.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    from psycopref.core.paper import coarse_of

    topics = [row["topic"] for row in rows]
    assert len(rows) == 504 and all(topics.count(topic) == 12 for topic in coarse_of())
    assert all(100 <= len(row["speech"]) <= 1000 for row in rows)
    sentences = [s.lower() for row in rows for s in re.split(r"(?<=[.!?]) ", row["speech"]) if len(s) > 25]
    assert len(sentences) == len(set(sentences)), "no two speeches share a sentence"
    opening = [" ".join(row["speech"].lower().split()[:3]) for row in rows]
    assert max(map(opening.count, opening)) <= 4, "no template"


def test_notebooks_and_tests_are_formatted_and_checked():
    for command in (["check", "nbs", "tests"], ["format", "--check", "nbs", "tests"]):
        done = subprocess.run([str(BIN / "ruff"), *command], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


def test_no_public_name_is_defined_twice():
    homes = {}
    for path in sorted((REPOSITORY / "psycopref").rglob("*.py")):
        tree = ast.parse(path.read_text()) if path.name not in ("__init__.py", "_modidx.py") else ast.Module([], [])
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    homes.setdefault(name, []).append(path.name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_the_citation_is_whole_and_of_this_version():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    import psycopref

    assert {"cff-version", "message", "title", "authors", "version", "license"} <= {*cited}
    assert cited["version"] == psycopref.__version__ and cited["license"] == "MIT"
    assert (
        "2502.19731" in str(cited["references"])
        and f"## {psycopref.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
    )
    for path in (REPOSITORY / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        rules = {rule for step in steps for rule in re.findall(r"make ([a-z-]+)", step)}
        targets = {*re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)}
        assert rules and rules <= targets, path.name
