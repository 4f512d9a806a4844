"""A checklist's answers lead to tables that there are; where a run has none, the item is open."""

import json
import re
from pathlib import Path

import pytest
from refusals import one_line

from psycopref.core.checklists import checklist_rows, describe_checklist, read_checklists, result_anchor
from psycopref.core.paper import resource_path

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = resource_path("checklists.yaml").read_text(encoding="utf-8")
LISTS = {own.name: own for own in read_checklists()}
LINKS = sorted({link for own in LISTS.values() for item in own.items for link in item.links})


def shown_numbers():
    "The numbers of tables that chapters and experiments show, from their code."
    found = set()
    for path in [*REPOSITORY.glob("nbs/[0-9]*.ipynb"), *REPOSITORY.glob("nbs/experiments/*.ipynb")]:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        found |= set(re.findall(r"\"(S?\d{1,2})\", ?\"[a-z_]+\"", code))
    return found


def test_chart_has_twelve_items_in_order_and_the_reviewers_questions_are_all_there():
    assert [item.id for item in LISTS["chart"].items] == [str(number) for number in range(1, 13)]
    assert "10.1136/bmjmed-2025-001632" in LISTS["chart"].source and "own words" in LISTS["chart"].source
    asked = " ".join(item.asks for item in LISTS["reviewers"].items)
    for word in ("labels also judges", "κ", "Single turn", "suicide", "Averaged principles"):
        assert word in asked


def test_every_item_is_answered_in_one_sentence():
    for item in (item for own in LISTS.values() for item in own.items):
        assert item.said.endswith(".") and item.said.count(". ") == 0 and item.said[0].isupper(), item
        assert item.links or item.answer == "open", item


@pytest.mark.parametrize("link", LINKS)
def test_a_link_names_a_table_that_a_chapter_shows(link):
    kind, number = link.split(" ", 1)
    assert kind == "section" and number == "published" or kind == "table" and number in shown_numbers(), link


def test_with_all_tables_an_item_stands_as_written_and_without_one_it_is_open():
    anchors = {result_anchor(*link.split(" ", 1)) for link in LINKS}
    for own in LISTS.values():
        assert [row["answer"] for row in checklist_rows(own, anchors)] == [item.answer for item in own.items]
        for link in LINKS:
            rows = checklist_rows(own, anchors - {result_anchor(*link.split(" ", 1))})
            for item, row in zip(own.items, rows):
                lost = link in item.links
                assert row["answer"] == (f"open: not in this run ({link})" if lost else item.answer)
                assert [words for words, _ in row["links"]] == [words for words in item.links if words != link]


def test_the_sentence_counts_items_that_a_run_opened():
    rows = checklist_rows(LISTS["reviewers"], set())
    assert describe_checklist(rows) == "Of 7 items 0 answered, 0 in part, 7 open."


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("answer: in part,\n", "answer: perhaps,\n", "Input should be 'answered', 'in part' or 'open'"),
        ("links: [table S7, table S50]", "links: []", "item 1 is in part, expected a link"),
        ("- name: chart", "- nam: chart", "name"),
        ("items:", "items: [", "mend the file"),
    ],
)
def test_a_broken_list_is_one_line(old, new, said):
    assert old in TEXT
    line = one_line(lambda: read_checklists(TEXT.replace(old, new, 1)))
    assert line.startswith("checklists.yaml: ") and said in line
