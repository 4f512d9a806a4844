"""The report's sections: links lead somewhere, folds say what is in them, and no text of a run becomes HTML."""

import html
import re
from html.parser import HTMLParser

import pandas as pd

from psycopref.core.checklists import read_checklists
from psycopref.core.files import StageWriter
from psycopref.core.paper import paper_remarks
from psycopref.core.stages import Run
from psycopref.core.tables import Label
from psycopref.evaluation.published import NOT_RUN, RunValues, describe_published, published_frame, table_of_texts
from psycopref.reporting.report_page import INVENTORY, PUBLISHED_SECTIONS, absent, checklist_section, gather
from psycopref.reporting.report_page import overview_page, published_section, report_tables

EVIL = "<script>alert('x')</script>\"'&"
REWARD = "model,kind,accuracy %,95% interval,AUC,ECE,Brier\nBradley-Terry on {},reward model,98.0,97.0 to 98.5,1,0,0\n"
LABEL = Label("tiny", (EVIL,), EVIL)


def beside(name="M"):
    values = RunValues({"1_reward": table_of_texts(REWARD.format(f'"{name}"'))}, {}, ("a",) * 7)
    return published_frame(values)


def signed_run(evil=""):
    "A run of one stage with two tables of one number, and the report's own folder of tables."
    run, frame = Run("r"), pd.DataFrame({"model": [f"M{evil}"], "rate": [1.0]})
    with StageWriter(run, "05_reward", "tiny", 0, {}) as writer:
        for number, slug in (("1", "reward"), ("S24", "first"), ("S24", "second")):
            writer.table(number, slug, frame, f"Table {number}: {slug}{evil}", LABEL)
    with StageWriter(run, "13_report", "tiny", 0, {}) as writer:
        for number, slug in (("S15", "spending"), ("S7", "headlines"), ("S57", "published")):
            writer.table(number, slug, frame, f"Table {number}: {slug}{evil}", LABEL)
    return run


def whole_page(evil=""):
    run, frame = signed_run(evil), beside(f"M{evil}".replace('"', '""'))
    used = pd.DataFrame({"stage": [f"05{evil}"]})
    tables = report_tables(run.stage("13_report") / "tables", used, LABEL)
    tables.append(published_section(frame, [f"said {evil}", describe_published(frame)]))
    found = gather(run, ("05_reward",))
    return overview_page(f"run {evil}", LABEL, tables, found, absent(found)), frame


def test_every_link_leads_to_one_place_of_the_page():
    page, _ = whole_page()
    anchors = re.findall(r"\bid='([\w-]+)'", page)
    links = set(re.findall(r"href='#([\w-]+)'", page))
    assert len(anchors) == len(set(anchors)) and links <= set(anchors)
    assert {"published", "checklists", "table-1", "table-S7", "published-table_2"} <= links
    assert {"table-S24", "provenance", "absent", "published-remarks"} <= set(anchors)


def test_the_report_s_own_tables_come_first_and_the_published_values_once():
    page, _ = whole_page()
    places = [page.index(f"id='{name}'") for name in ("table-S7", "table-S15", "provenance", "published", "checklists")]
    assert places == sorted(places) and places[-1] < page.index("id='results'") < page.index("id='absent'")
    assert "id='table-S57'" not in page and page.count("<h2>Every published value</h2>") == 1


def test_a_fold_says_how_many_of_its_values_are_reproduced_differ_or_were_not_run():
    page, frame = whole_page()
    assert set(PUBLISHED_SECTIONS) == set(frame.section)
    for section, title in PUBLISHED_SECTIONS.items():
        [fold] = re.findall(
            rf"<details><summary>([^<]*</summary><div id='published-{section}'>.*?)</details>", page, re.S
        )
        own = frame[frame.section == section]
        assert f"{title}: {len(own)} value" in fold and fold.count("<tr>") == len(own) + 1
        assert f"{(own.state == NOT_RUN).sum()} not run" in fold
    assert describe_published(frame) in page
    [last] = re.findall(r"<div id='published-remarks'>(.*?)</details>", page, re.S)
    remarks = paper_remarks()
    assert last.count("<tr>") == len(remarks["does_not_add_up"]) + 1 and "Fig. 4" in last


def test_no_text_of_a_run_becomes_html():
    page, _ = whole_page(EVIL)

    class Reader(HTMLParser):
        scripts = 0

        def handle_starttag(self, tag, attributes):
            self.scripts += tag == "script"
            assert not any(name.startswith("on") for name, _ in attributes)

    reader = Reader()
    reader.feed(page)
    assert reader.scripts == 0 and "alert('x')</script>" not in page and page.count("&lt;script&gt;alert") >= 8
    shape = lambda text: re.findall(r"</?[a-z0-9]+", text)
    assert shape(page) == shape(whole_page()[0]), "the same elements as without"


def test_a_checklist_links_what_the_page_has_and_opens_the_rest():
    page, _ = whole_page()
    [own] = re.findall(r"<section id='checklists'>(.*?)</section>", page, re.S)
    items = [item for checklist in read_checklists() for item in checklist.items]
    there = {anchor for anchor in re.findall(r"\bid='([\w-]+)'", page)}
    for item in items:
        lost = [link for link in item.links if link.removeprefix("section ").replace(" ", "-") not in there]
        shown = f"open: not in this run ({', '.join(lost)})" if lost else item.answer
        assert re.search(rf"{re.escape(html.escape(item.asks))}</td><td[^>]*><span[^>]*>{re.escape(shown)}<", own), item
    assert own.count("open: not in this run") > 9
    whole = {link.removeprefix("section ").replace(" ", "-") for item in items for link in item.links}
    assert "not in this run" not in checklist_section(whole)


def test_what_is_missing_is_listed_with_its_reason():
    page, _ = whole_page()
    listed = page[page.index("id='absent'") :]
    assert listed.count("<li>") == len(INVENTORY) - 1 and "licensed experts" in listed
