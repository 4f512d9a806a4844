"""One form of labelled text, what is refused, and the guide's recipes on corpora as published."""

import json
from pathlib import Path

import pandas as pd
import pytest

from psycopref.core.settings import StudyError
from psycopref.corpus.labelled_text import COMPARISONS, CORPORA, LABEL_COLUMNS, TITLES, labelled_files
from psycopref.corpus.labelled_text import label_comparison_table, read_labelled

GUIDE = Path(__file__).parents[2] / "nbs" / "guide" / "10_labelled_text.ipynb"
ROW = {"context": "I smoke.", "text": "Do you?", "construct": "question, not input", "label": 1, "group": 3}


@pytest.fixture(scope="module")
def recipes():
    """The functions that the guide shows; the page runs them on made rows."""
    names = {}
    for cell in json.loads(GUIDE.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and ("\ndef " in f"\n{source}" or "import pandas" in source):
            exec(source, names)
    yield names
    names["scratch"].cleanup()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_one_form_in_any_table(tmp_path, ending):
    path = tmp_path / f"labels.{ending}"
    frame = pd.DataFrame([ROW, {**ROW, "label": 0, "text": " Stop. "}, {**ROW, "context": ""}])
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet}
    frame.to_json(path, orient="records", lines=True) if ending == "jsonl" else write[ending](path, index=False)
    found = read_labelled(f"annomi={path}")
    assert tuple(found.rows.columns) == LABEL_COLUMNS and found.rows.text.tolist() == ["Do you?", "Stop."]
    assert found.rows.label.tolist() == [1, 0] and set(found.rows.group) == {"3"}
    assert list(found.dropped.values()) == [1] and found.paths == (path,) == tuple(labelled_files(f"annomi={path}"))
    assert found.origin["source"] == "annomi" and found.origin["files"][0]["file"] == path.name


@pytest.mark.parametrize("label", ["few", "", None, float("nan"), float("inf")])
def test_a_label_is_a_number(tmp_path, label):
    path = tmp_path / "odd.csv"
    pd.DataFrame([ROW, {**ROW, "label": label}]).to_csv(path, index=False)
    with pytest.raises(StudyError, match=r"odd.csv, row 1: label is [^\n]*, expected a number[^\n]*$"):
        read_labelled(f"annomi={path}")


@pytest.mark.parametrize(
    ("spec", "content", "expected"),
    [
        ("annomi={}", b"", "is empty"),
        ("annomi={}", b"transcript_id,utterance_text\n1,a\n", "columns .* are missing.*10_labelled_text"),
        ("annomi={}", ",".join(LABEL_COLUMNS).encode() + b"\n", "no rows"),
        ("anno=/a", None, "Did you mean annomi"),
        ("annomi", None, "needs a local copy.*github.com"),
        ("annomi=", None, "nothing follows"),
        ("esconv=/no/where", None, "no such file"),
    ],
)
def test_wrong_files_and_places_are_one_line(tmp_path, spec, content, expected):
    path = tmp_path / "odd.csv"
    path.write_bytes(content or b"")
    with pytest.raises(StudyError, match=expected) as error:
        read_labelled(spec.format(path))
    assert "\n" not in str(error.value)


def test_files_are_listed_only_where_they_are():
    assert [labelled_files(spec) for spec in ("annomi", "annomi=", "annomi=/no/where", "other=/a")] == [[]] * 4


def test_comparisons_are_declared():
    table = label_comparison_table()
    assert len(table) == len(COMPARISONS) and set(table.corpus) == set(TITLES.values()) and set(TITLES) == set(CORPORA)
    assert table.map(bool).all(axis=None) and "all seven, mean" in set(table["compared with"])


def test_every_recipe_names_declared_constructs(recipes):
    source = GUIDE.read_text(encoding="utf-8")
    assert all(one.construct in source for one in COMPARISONS)


def test_nobody_hears_what_is_said_later(recipes):
    turns = [(True, "a"), (False, "x"), (True, ""), (True, "b"), (True, "c"), (True, "d"), (False, "y")]
    assert recipes["heard_before"](turns) == ["", "a", "a", "a", "a b", "a b c", "b c d"]


def test_annotators_vote_and_a_tie_is_no_label(recipes):
    votes = {"open closed closed": "closed", "open": "open", "open closed": "", "n/a n/a open": "n/a"}
    assert {words: recipes["majority"](pd.Series(words.split())) for words in votes} == votes


def test_annomi_as_published(recipes, tmp_path):
    path = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "annomi" / "annomi_dev.csv"
    if not path.is_file():
        pytest.skip("AnnoMI is not at hand")
    found = recipes["annomi"](path)
    found.to_csv(tmp_path / "annomi.csv", index=False)
    rows = read_labelled(f"annomi={tmp_path / 'annomi.csv'}").rows
    assert set(rows.construct) == {one.construct for one in COMPARISONS if one.corpus == "annomi"}
    assert 60 < rows.group.nunique() <= 67 and rows.groupby("construct").label.nunique().eq(2).all()


def test_the_published_counsel_chat_file_has_no_votes(recipes, counsel_chat):
    found = recipes["counsel_chat"](counsel_chat)
    assert len(found) > 1000 and set(found.label) == {0}
