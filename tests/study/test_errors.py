"""Every error that a user can mend ends with what to do next: the wording of each StudyError is read, not raised."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "psycopref"
VERBS = """
accept add allow answer ask begin call cancel change check choose compare convert correct delete download draft
export fill finish free give go hand import install join keep learn leave let look lower make mark mend merge move
name open pass paste point press put raise rate read release remove rename retry review run save say score see
serve set sign split standardise start suggest tag take tell train try unpack unset use wait widen write
""".split()
CLAUSE = re.compile(rf"(?:[;,.:?] |\b(?:and|or|so|then|first) )(?:{'|'.join(VERBS)})\b", re.I)
ELSEWHERE = {  # where the words are put together in another function, which says what to do
    "run/runner.py run_notebook": "a StudyError of the notebook, passed on",
    "experiments/policies.py check_trainings": "missing_engine ends with its remedy",
    "gateway/cache.py claim": "its callers word what to do: wait for it, or end it",
    "training/jobs.py _launch": "the error of the training's own process, passed on",
    "training/sampling.py serve_command": "missing_engine ends with its remedy",
    "training/sampling.py check": "last_words begins with where to look",
    "training/sampling.py _wait_until_served": "last_words begins with where to look",
}


def parts(node: ast.AST, known: dict[str, list[ast.AST]], seen=()) -> list[str]:
    "List the literal texts of an expression, those of the names in it too; `suggest` names what is there."
    found = []
    for own in ast.walk(node):
        if isinstance(own, ast.Constant) and isinstance(own.value, str):
            found.append(own.value)
        elif isinstance(own, ast.Call) and getattr(own.func, "id", "") == "suggest":
            found.append("; take one of these")
        elif isinstance(own, ast.Attribute) and own.attr == "remedy":
            found.append("; take this")
        elif isinstance(own, ast.Name) and own.id not in seen:
            found += [text for value in known.get(own.id, ()) for text in parts(value, known, (*seen, own.id))]
            found += ["; take this"] if own.id in ("remedy", "hint") and own.id not in known else []
    return found


def assigned(function: ast.AST) -> dict[str, list[ast.AST]]:
    "Map the names that a function, or a module around it, assigns to the values they may have."
    found = {}
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) else targets
        for target in targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = [*zip(target.elts, node.value.elts)]
            for name, value in pairs:
                for own in ast.walk(name):
                    if isinstance(own, ast.Name) and value is not None:
                        found.setdefault(own.id, []).append(value)
    return found


def raised(path: Path):
    "Yield each StudyError of a module: its place, and the texts that its message is made of, in order."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "id", "") == "StudyError" and call.args:
            around = [own for own in functions if own.lineno <= call.lineno <= own.end_lineno]
            inner = max(around, key=lambda own: own.lineno)
            place = f"{path.relative_to(PACKAGE)} {inner.name}"
            yield place, call.lineno, " ".join(" ".join(parts(call.args[0], assigned(inner))).split())


FOUND = [own for path in sorted(PACKAGE.rglob("*.py")) for own in raised(path)]


def test_errors_are_found():
    assert len(FOUND) > 300 and {*ELSEWHERE} <= {place for place, _, _ in FOUND}


@pytest.mark.parametrize(
    "said, right",
    [
        ("x: not found; run the stage first", True),
        ("x: found 3, expected 4", False),
        ("x: is a runner that sets names", False),
        ("x: no such file. Check the path", True),
        ("x: expected one; do so, or name another", True),
    ],
)
def test_a_remedy_is_an_imperative_at_the_head_of_a_clause(said, right):
    assert bool(CLAUSE.search(said)) is right


def test_every_error_says_what_to_do_next():
    silent = [
        f"{place}, line {line}: {said[:160]}"
        for place, line, said in FOUND
        if place not in ELSEWHERE and not CLAUSE.search(said)
    ]
    assert silent == [], "end the message with what to do next, as in `…; name another file`"
