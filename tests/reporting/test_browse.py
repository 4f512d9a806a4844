"""The page of answers: all that a run knows of a speech, as text, driven by keyboard in a real browser, offline."""

import base64
import gzip
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.files import SCHEMAS, StageWriter, write_json
from psycopref.core.principles import principle_keys, use_principles
from psycopref.core.stages import Run
from psycopref.core.tables import Label
from psycopref.reporting.browse import (
    BLOCK,
    browse_page,
    browse_view,
    index_row,
    packed,
    run_facts,
    run_page,
    shown_records,
    speech_records,
    watched_points,
)

KEYS = principle_keys()
HOSTILE = (
    "</script><script>window.broken=1</script><img src=x onerror='window.broken=2'>\u2028 &lt;b&gt; {{script}} ]]>"
)
SPEECHES = [  # id, topic, coarse topic, split, words
    ("demo-0", "anxiety", "core-mental-health-issues", "test", f"I count the stairs. {HOSTILE}"),
    ("demo-1", "stress", "core-mental-health-issues", "train", "My manager writes on Sundays."),
    ("demo-2", "self-harm", "crisis-and-safety", "dev", "I hurt myself again."),
    ("demo-3", "anxiety", "core-mental-health-issues", "train", "The lift frightens me."),
]


def frame(kind, rows):
    return pd.DataFrame(rows, columns=list(SCHEMAS[kind]))


def write(run, stage, principles=KEYS, files=(), **kinds):
    "Write a stage with rows of some kinds: name -> (kind, frame); files: name -> JSON."
    with StageWriter(run, stage, "tiny", 0, {}) as writer:
        writer.facts |= {"principles": list(principles), "rater": "offline rubric (stand-in)"}
        for name, (kind, rows) in kinds.items():
            writer.rows(kind, rows, name)
        for name, content in dict(files).items():
            path = writer.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)


def speeches(run):
    rows = [(name, "demo", said, topic, coarse, "gold", split) for name, topic, coarse, split, said in SPEECHES]
    write(run, "01_speeches", speeches=("speeches", frame("speeches", rows)))


def answered(run):
    said = [
        (name, model, f"{model} hears {name}. {HOSTILE}", "stop", 5, "k") for name, *_ in SPEECHES for model in "abcd"
    ]
    write(run, "02_responses", responses=("responses", frame("responses", said)))
    marks = {"a": 5, "b": 4, "c": 3, "d": 1}
    rated = [(name, m, key, n, f"reason {m} {HOSTILE}", "r", 0) for name, *_ in SPEECHES for m, n in marks.items()
             for key in KEYS if (name, m) != ("demo-3", "d")]  # fmt: skip
    write(run, "03_ratings", ratings=("ratings", frame("ratings", rated)))


def paired(run, keys=KEYS, texts=None):
    texts = texts or {name: {m: f"{m} hears {name}. {HOSTILE}" for m in "ad"} for name, *_ in SPEECHES}
    rows = []
    for i, (name, *_, split, said) in enumerate(SPEECHES):
        row = {"ID": name, "prefID": i, "question": said, "chosen": texts[name]["a"], "rejected": texts[name]["d"]}
        row |= {"chosen_model": "a", "rejected_model": "d"}
        row |= {f"{side}_{key}_rating": n for side, n in (("chosen", 5), ("rejected", 1)) for key in keys}
        rows.append(row | {"split": split})
    found = pd.DataFrame(rows)
    columns = [name for name in found if name != "split"]
    parts = {"train": found[found.split != "test"][columns], "test": found[found.split == "test"][columns]}
    write(run, "04_pairs", keys, **{name: ("pairs", own.reset_index(drop=True)) for name, own in parts.items()})


def trained(run):
    def block(said):
        return {"made_of": "x", "samples": {"demo-2": [[said, "length", 3]]}}

    names = {"base": "before", "step-2": "early", "step-4": "offline", "iteration-1": "online", "reference": "other"}
    files = {f"m/points/{name}/block-0000.json": block(f"{said} {HOSTILE}") for name, said in names.items()}
    files["m/points/iteration-1/rewards.json"] = {"made_of": "x", "rewards": {"demo-2": [1.25]}}
    write(run, "06_policy", files=files)


def judged(run):
    answers = [("demo-0", policy, setting, f"{policy} says {HOSTILE}", "stop", 4, 0) for setting in ("free", "length")
               for policy in ("reference", "m", "m + DPO")]  # fmt: skip
    rows = [("demo-0", "free", "m + DPO", "ref", order, verdict, *["tie"] * len(KEYS), "rules:rubric")
            for order, verdict in (("policy first", "win"), ("reference first", "loss"))]  # fmt: skip
    write(
        run, "07_win_rates", answers=("answers", frame("answers", answers)), battles=("battles", frame("battles", rows))
    )
    other = [("demo-0", "free", "m + DPO", order, "reward", "win") for order in ("policy first", "reference first")]
    write(run, "10_judges", verdicts=("verdicts", frame("verdicts", other)))


@pytest.fixture
def whole():
    run = Run("example")
    for stage in (speeches, answered, paired, trained, judged):
        stage(run)
    return run


def test_a_record_joins_what_each_stage_left(whole):
    first, second, third, fourth = speech_records(whole)
    assert [answer["model"] for answer in first["pool"]] == ["a", "b", "c", "d"] and first["pairs"] == [(0, 3)]
    assert first["pool"][0]["ratings"][0] == [5, f"reason a {HOSTILE}"] and first["pool"][3]["mean"] == 1
    assert fourth["pool"][3]["ratings"] is None and fourth["pool"][3]["mean"] is None, "not rated is not 0"
    assert [one["policy"] for one in first["policies"]["length"]] == ["reference", "m", "m + DPO"]
    orders = {one["judge"]: one["orders"] for one in first["verdicts"]}
    assert orders == {"rules:rubric": ["win", "loss"], "reward": ["win", "win"]}
    assert [(one["point"], one["reward"]) for one in third["training"]] == [
        ("base", None), ("DPO, step 4", None), ("iteration 1", 1.25)
    ]  # fmt: skip
    assert third["crisis"] == "topic" and second["crisis"] == "" and not second["policies"] and not second["training"]
    assert index_row(first)[4] == 4 and index_row(first)[:4] == ["demo-0", "anxiety", "test", ""]


def test_a_run_of_released_pairs_shows_their_texts_and_says_what_it_has_not_got():
    run = Run("given")
    speeches(run)
    paired(run)
    records = speech_records(run)
    assert [[answer["model"] for answer in record["pool"]] for record in records] == [["a", "d"]] * 4
    assert records[0]["pairs"] == [(0, 1)] and records[0]["pool"][1]["mean"] == 1
    said = run_facts(run)["absent"]
    assert "no answers of a pool" in said and "no further judges" in said and "no pairs" not in said


def test_principles_are_those_of_the_run():
    use_principles("plain-words")
    run, keys = Run("plain"), principle_keys()
    speeches(run)
    paired(run, keys)
    told = run_facts(run)
    assert told["principles"][0] == "Plain words" and len(told["principles"]) == len(keys) == 5
    assert len(speech_records(run)[0]["pool"][0]["ratings"]) == 5


def test_ratings_stand_under_the_principles_that_they_were_made_with():
    use_principles("plain-words")
    run, keys = Run("part"), principle_keys()
    speeches(run)
    said = [("demo-0", "a", "What?", "stop", 1, "k")]
    write(run, "02_responses", keys, responses=("responses", frame("responses", said)))
    rated = [("demo-0", "a", key, i % 5 + 1, "", "r", 0) for i, key in enumerate(keys)]
    write(run, "03_ratings", keys, ratings=("ratings", frame("ratings", rated)))
    use_principles("counselling")
    told = run_facts(run)
    assert told["principles"] == list(keys) and told["rater"] != "nobody", "no name of another set's"


def test_the_page_holds_no_address_and_no_markup_of_others(whole):
    page = run_page(whole, Label("tiny", rater="<i>someone</i>"))
    before = page.split('<script type="module">')[0]
    assert "://" not in before and "<img" not in before
    assert "<i>someone" not in page and page.count('<script type="module">') == 1 and page.count("</html>") == 1
    assert len(page) < 1.2e6 and page == run_page(whole, Label("tiny", rater="<i>someone</i>"))
    assert "default-src 'none'" in page and "connect-src" not in page


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.just(HOSTILE)


@given(st.lists(texts, min_size=1, max_size=60))
@settings(max_examples=25, deadline=None)
def test_what_is_packed_comes_out_as_it_was(said):
    records = [{"speech": text} for text in said]
    assert json.loads(gzip.decompress(base64.b64decode(packed(records)))) == records


def test_iterations_are_at_most_six_with_both_ends():
    for n in range(1, 40):
        found = [name for name in watched_points([f"iteration-{i}" for i in range(1, n + 1)]) if "iteration" in name]
        assert len(found) == min(n, 6) == len({*found}) and found[0] == "iteration-1" and found[-1] == f"iteration-{n}"


def test_a_large_run_shows_its_test_speeches_first():
    records = [{"split": split, "id": i} for i, split in enumerate(["train", "test", "dev", "test", "train"])]
    assert [own["id"] for own in shown_records(records, 3)] == [1, 2, 3] and shown_records(records, 9) == records


def test_a_speech_that_a_run_has_not_got_is_refused(whole):
    assert "demo-9" in one_line(lambda: browse_view(whole, "demo-9"))


# ---- in a browser ----


@pytest.fixture
def opened(browser, tmp_path):
    "Open a page from disk without a network; returns the browser's page, and what it asked for or complained of."
    contexts = []

    def open_(text, anchor="", width=1400, **traits):
        path = tmp_path / "a page.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **traits)
        contexts.append(context)
        context.set_offline(True)
        noted = []
        context.on("request", lambda request: noted.append(request.url))
        context.on("console", lambda message: noted.append(message.text))
        context.on("weberror", lambda error: noted.append(str(error.error)))
        page = context.new_page()
        page.goto(path.as_uri() + anchor)
        page.wait_for_function("document.documentElement.dataset.open")
        return page, noted

    yield open_
    for context in contexts:
        context.close()


def shown(page):
    return page.evaluate("document.documentElement.dataset.open")


def pressed(page, key, name):
    page.keyboard.press(key)
    page.wait_for_function(f"document.documentElement.dataset.open === '{name}'")


def test_nothing_is_asked_of_the_network_and_hostile_words_are_words(whole, opened):
    page, noted = opened(run_page(whole, "tiny"))
    assert shown(page) == "demo-0" and [url for url in noted if not url.startswith("file:")] == []
    assert page.evaluate("window.broken") is None and page.locator("#speech img, #speech script").count() == 0
    said = page.locator("#speech blockquote").text_content()
    assert said == SPEECHES[0][-1] and HOSTILE in page.locator("#speech .card .text").first.text_content()
    assert page.locator("#speech .chosen").count() == page.locator("#speech .rejected").count() == 1
    assert page.locator(".verdicts tbody tr").count() == 1 and "win · loss" in page.locator(".verdicts").text_content()


def test_keys_walk_through_the_speeches_that_are_shown(whole, opened):
    page, _ = opened(run_page(whole, "tiny"))
    pressed(page, "j", "demo-1")
    pressed(page, "ArrowDown", "demo-2")
    assert "crisis" in page.locator("#speech .crisis").text_content() and page.url.endswith("#demo-2")
    assert page.locator("#speech h2", has_text="Answers along training").count() == 1
    pressed(page, "k", "demo-1")
    page.keyboard.press("/")
    page.keyboard.type("lift")
    assert page.locator("#speeches tbody tr").count() == 1 and shown(page) == "demo-1", "keys that are typed are words"
    page.keyboard.press("Escape")
    pressed(page, "j", "demo-3")
    page.keyboard.press("j")
    assert shown(page) == "demo-3", "the last of what is shown"
    assert page.locator("#speech details.reasons[open]").count() == 0
    page.keyboard.press("r")
    assert page.locator("#speech details.reasons[open]").count() == 3


def test_filters_are_exact_and_join(whole, opened):
    page, _ = opened(run_page(whole, "tiny"))
    rows = page.locator("#speeches tbody tr")
    page.select_option("#topic", "anxiety")
    assert rows.count() == 2
    page.select_option("#split", "train")
    assert rows.count() == 1 and "demo-3" in rows.first.text_content()
    page.select_option("#topic", "")
    page.select_option("#split", "")
    page.check("#crisis")
    assert rows.count() == 1 and "demo-2" in rows.first.text_content()
    rows.first.click()
    page.wait_for_function("document.documentElement.dataset.open === 'demo-2'")


def test_a_link_names_a_speech_and_many_are_unpacked_when_asked_for(whole, opened):
    [record, *_] = speech_records(whole)
    many = [record | {"id": f"demo-{i}", "speech": f"speech {i}"} for i in range(5 * BLOCK)]
    page, _ = opened(browse_page(many, "many", "", run_facts(whole)), f"#demo-{4 * BLOCK + 3}")
    assert shown(page) == f"demo-{4 * BLOCK + 3}" and page.locator("#speeches tr.current").count() == 1
    assert page.evaluate("document.querySelectorAll('script.block').length") == 5
    pressed(page, "k", f"demo-{4 * BLOCK + 2}")


@pytest.mark.parametrize("anchor", ["#100%", "#nobody", "#%E0%A4%A"])
def test_an_address_of_nobody_shows_the_first(whole, opened, anchor):
    page, noted = opened(run_page(whole, "tiny"), anchor)
    assert shown(page) == "demo-0" and not [said for said in noted if "Error" in said]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_follows_the_colours(whole, opened, scheme):
    page, _ = opened(run_page(whole, "tiny"), width=390, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 243)"
    assert bright is (scheme == "light")


def test_a_chapter_shows_the_same_view_of_a_few(whole, opened, tmp_path):
    view = browse_view(whole, "demo-2", "demo-0").data
    assert len(view) < 60_000
    path = tmp_path / "view.html"
    path.write_text(f"<!doctype html><html data-open='x'><body>{view}</body></html>", encoding="utf-8")
    page, noted = opened(path.read_text())
    inside = page.frame_locator("iframe")
    inside.locator("#speech blockquote").wait_for()
    assert inside.locator("#speech blockquote").text_content() == "I hurt myself again."
    assert inside.locator("#speeches tr").count() == 2 and page.evaluate("window.broken") is None
