"""The page of a kit, driven by keyboard in a headless browser from disk, with the network cut."""

import json

import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.principles import principle_keys
from psycopref.core.prompts import battle_keys
from psycopref.evaluation.annotations import read_annotations, unshuffle
from psycopref.evaluation.kits import SIDES, kit_html, make_kit

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

HOSTILE = ("</script><script>window.broken=1</script><img src=x onerror=\"window.broken=2\"> <b>bold</b> &lt;i&gt; "
           "\u202edesrever\u202c\n\nשלום, אני לא ישן 😀👩‍👩‍👧\u2028line\n"
           + "unbroken" * 60 + " " + "A long complaint, told slowly.\n" * 160)  # fmt: skip


class Desk:
    """One annotator's browser profile, offline, which notes every request and every complaint of the page."""

    def __init__(self, browser, folder, width=1366, height=768, **traits):
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(accept_downloads=True, viewport=viewport, **traits)
        self.context.set_offline(True)
        self.folder, self.requests, self.complaints = folder, [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("console", lambda message: self.complaints.append(message.text))
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def sit(self, kit, name="Ana", page=""):
        """Open a kit's page and, where a name is given, begin."""
        path = self.folder / f"kit {kit['task']}.html"  # a blank in the path, as users have
        path.write_text(page or kit_html(kit), encoding="utf-8")
        page = self.context.new_page()
        page.goto(path.as_uri())
        follow(page, *([f"type:{name}", "Enter"] if name else []))
        return page

    def leave(self):
        """Close, and hold that nothing was asked of any network."""
        self.context.close()
        assert self.requests and [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert self.complaints == []


@pytest.fixture
def desks(browser, tmp_path):
    """A maker of desks that are all checked when they close."""
    made = []

    def make(**traits):
        made.append(Desk(browser, tmp_path, **traits))
        return made[-1]

    yield make
    for desk in made:
        desk.leave()


@pytest.fixture
def desk(desks):
    return desks()


def made_kit(count=3, task="compare", **changes):
    """A kit whose texts say which side they are, as a stand-in for an annotator's judgement; and its key."""
    two, numbers = task == "compare", range(count)
    rows = pd.DataFrame({"speech_id": [f"made-{i}" for i in numbers], "setting": "labels", "stratum": "Youth"})
    rows["client_speech"] = [f"Speech {i}." for i in numbers]
    rows["response_a"], rows["response_b"] = "A good answer.", "A poor answer." if two else ""
    rows = rows.assign(name_a="chosen", name_b="rejected" if two else "", **changes)[SIDES]
    return make_kit(rows, task, "Comparing two responses", 0)


def filled(kit, answers, **changes):
    """A file as the page exports it."""
    document = {"format": "psycopref-annotations", "version": 1, "kit_id": kit["kit_id"], "annotator": "Ana"}
    return document | {"started": "", "saved": "", "answers": answers} | changes


FACTS = {
    "chosen": """[...document.querySelectorAll('[aria-pressed="true"]')].map(
        node => node.dataset.key + node.dataset.value).join(' ')""",
    "question": "document.querySelector('.question[aria-current=true]').id",
    "focus": "document.activeElement.id",
    "dialog": "document.querySelector('dialog[open]')?.id ?? ''",
    "tiles": "[...document.querySelectorAll('#tiles button')].map(node => node.innerText).join(', ')",
    "written": "document.querySelector('#note').value",
}


def follow(page, *steps):
    """Take steps: keys to press, parted by blanks; type:TEXT; click:PLACE; or a dict of what is then seen.

    A key of FACTS is seen as a whole; of the text of any other #place a part is named."""
    for step in steps:
        if isinstance(step, dict):
            for what, said in step.items():
                for _ in range(50):  # a busy machine draws a page later; five seconds at most
                    found = page.evaluate(FACTS[what]) if what in FACTS else page.inner_text(f"#{what}")
                    if said == found if what in FACTS else said in found:
                        break
                    page.wait_for_timeout(100)
                assert said == found if what in FACTS else said in found, what
        elif step.startswith("type:"):
            page.keyboard.type(step.removeprefix("type:"))
        elif step.startswith("click:"):
            page.click(step.removeprefix("click:"))
        else:
            for key in step.split():
                page.keyboard.press(key)


def export(page, *way):
    """Export by keyboard; the file."""
    with page.expect_download() as coming:
        follow(page, *(way or ("e Tab Enter",)))
    return coming.value.suggested_filename, json.loads(coming.value.path().read_text(encoding="utf-8"))


def saved(folder, content, name="file.json"):
    """A file on disk."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / name


# from keys pressed to what was said of each side


def planted(speech, place, task):
    """What is thought of a speech: a score, or the good answer, the poor one or neither; overall is a choice."""
    if task == "score":
        return 1 + (speech + place) % 5
    return ("good", "poor", "good" if place == 7 else "neither")[(speech + place) % 3]


@pytest.mark.parametrize("task", ["compare", "score"])
def test_ten_items_by_keyboard_with_a_reload_in_the_middle(task, desk, tmp_path):
    (kit, key), asked = made_kit(10, task), BATTLE_KEYS if task == "compare" else PRINCIPLE_KEYS
    page = desk.sit(kit, "Expert 1")
    assert page.title() == "Comparing two responses"
    for number in range(1, 11):
        follow(page, {"where": f"Item {number} of 10"})
        speech = int(page.inner_text("#speech").removeprefix("Speech ").rstrip("."))
        shown = ["neither", *(text.split()[1] for text in page.locator("#replies .said").all_inner_texts())]
        said = [planted(speech, place, task) for place in range(len(asked))]
        digits = [str(value if task == "score" else shown.index(value)) for value in said]
        follow(page, " ".join(digits[:3]))
        if number == 6:  # three answers given, then the computer restarts
            page.reload()
            kept = " ".join(map("".join, zip(asked, digits[:3])))
            follow(page, {"where": "Item 6 of 10", "chosen": kept, "count": "5 of 10 finished"})
            follow(page, {"question": f"ask-{asked[3]}", "focus": f"ask-{asked[3]}"})
        follow(page, " ".join(digits[3:]), "Enter")  # after the tenth item it asks for the export
    follow(page, {"export-said": "All 10 items are finished"})
    name, found = export(page, "Enter")
    assert name == f"annotations_{kit['kit_id']}_Expert-1.json"
    assert list(found) == ["format", "version", "kit_id", "annotator", "started", "saved", "answers"]
    assert found | {"started": "", "saved": ""} == filled(kit, found["answers"], annotator="Expert 1")
    assert found["started"] <= found["saved"]
    words = {"win": "good", "loss": "poor", "tie": "neither"}
    turned = unshuffle(read_annotations([saved(tmp_path, found)], [kit]), key)
    assert len(turned) == 10 * len(asked)
    for row in turned.itertuples():
        said = row.rating if task == "score" else words[row.verdict]
        assert said == planted(int(row.speech_id.removeprefix("made-")), asked.index(row.principle), task)


# what each key does

SCRIPTS = {
    "the first page says what an annotator must know, and nobody works without a name": (made_kit(2), "", [
        *({"start": said} for said in ("written by machines", "distressing", "the person who gave you this kit")),
        *({"start": said} for said in ("stay on this computer", "crisis line", "Only an exported file is safe")),
        "Enter", {"start": "2 items"}, "type:Ana", "Enter 1", {"kept": "Kept in this browser only, not exported yet"},
        "e", {"export-said": "only the exported file is safe"},
    ]),
    "a score is 1 to 5": (made_kit(3, "score"), "Ana", [
        *(step for digit in "0679" for step in (digit, {"status": "no answer here"})), "5", {"chosen": "empathy5"},
    ]),
    "a comparison is 1, 2 or 0, overall 1 or 2, and digits behind change nothing": (made_kit(2), "Ana", [
        "3", {"status": "no answer here"}, "1 1 1 1 1 1 1 0", {"status": "asks for a choice", "count": "0 of 2"},
        "2 1 2", {"status": "Enter goes on", "count": "1 of 2", "ask-overall": "Response 2"},
    ]),
    "an unfinished item is reported and found again": (made_kit(), "Ana", [
        "1 1 1 1 ArrowRight", {"status": "Item 1 is left unfinished: 4 without an answer"},
        "1 1 1 1 1 1 1 1 e", {"export-said": "2 of 3 items are unfinished: 1, 3.", "focus": "to-unfinished"},
        "Enter", {"where": "Item 1 of 3", "question": "ask-exploration"},
        "1 1 1 1 f", {"where": "Item 3 of 3"}, "o", {"tiles": "1 ✓, 2 ✓, 3"},
        "Escape Enter", {"question": "ask-relevance"},  # Enter goes past a question
    ]),
    "undo takes back answers and notes": (made_kit(), "Ana", [
        "1 2 u", {"chosen": "empathy1", "status": "Undone", "question": "ask-relevance"},
        "Control+z u", {"chosen": "", "status": "nothing to undo"},
        "1 n", "type:12 of 2, u?", {"chosen": "empathy1", "written": "12 of 2, u?"},  # letters of a note do nothing
        "Escape ArrowRight ArrowLeft u u", {"chosen": "", "written": ""},
    ]),
    "keys that must not answer": (made_kit(), "Ana", [
        "Control+1 Alt+2", {"chosen": ""}, "?", {"dialog": "help"}, "1", {"chosen": ""},
        "Escape 1", {"chosen": "empathy1"},
        "click:#open-help", "click:#letters", "Escape 2 u e", {"chosen": "empathy1", "dialog": ""},  # switched off
    ]),
    "an item left out needs a note and no answers": (made_kit(), "Ana", [
        "1 1 1 1 1 1 1 1 Enter o", {"items": "needs a note and no answers"}, "Escape e",
        {"export-said": "refused"}, {"export-said": "needs a note and no answers"}, "Escape 1 2 x",
        {"written": "left out", "focus": "note"}, "type:too close to home", "Escape",
        {"chosen": "", "where": "Item 2 of 3 – left out"}, "Enter", {"where": "Item 3 of 3"},
        "x Escape u", {"written": "", "count": "1 of 3 finished, 1 left out · Ana"},
        "2 2 2 2 2 2 2 2 o", {"tiles": "1 ✓, 2 –, 3 ✓"}, "Escape e", {"export-said": "2 of 3 items are finished"},
        {"export-said": "Left out with a note: 2."},
    ]),
    "by mouse alone": (made_kit(2), "Ana", [
        *(f'click:#ask-{key} [data-value="2"]' for key in BATTLE_KEYS), "click:#next", {"count": "1 of 2"},
        "Tab Space", {"chosen": "empathy1"},  # and by tab alone
    ]),
    "an annotator with markup for a name": (made_kit(2), "<b>Ana</b> __proto__", [{"count": "<b>Ana</b> __proto__"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_does_what_its_script_says(name, desk):
    (kit, _), who, steps = SCRIPTS[name]
    follow(desk.sit(kit, who), *steps)


def test_a_held_key_answers_once_and_digits_need_no_shift(desk):
    page = desk.sit(made_kit()[0])
    for _ in range(3):
        page.keyboard.down("1")
    page.keyboard.up("1")
    follow(page, {"chosen": "empathy1"}, "u")
    page.dispatch_event(".question.now", "keydown", {"key": "é", "code": "Digit2", "bubbles": True})
    follow(page, {"chosen": "empathy2"})


def test_a_file_with_an_item_left_out_is_read_and_one_unfinished_is_not(desk, tmp_path):
    kit, _ = made_kit()
    page = desk.sit(kit)
    follow(page, "1 1 1 1 1 1 1 1 Enter")
    half = saved(tmp_path, export(page)[1])
    assert "2 of 3 items are unfinished: 2, 3" in one_line(lambda: read_annotations([half], [kit]))
    follow(page, "x Escape Enter 2 2 2 2 2 2 2 2")
    whole = read_annotations([saved(tmp_path, export(page, "e Enter")[1])], [kit])
    left = whole[whole.item_id == kit["items"][1]["item_id"]]
    assert len(whole) == 17 and left[["principle", "note"]].values.tolist() == [["left out", "left out"]]
    assert whole.time.str.match(r"\d{4}-\d\d-\d\dT").all()


# what the browser keeps

FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
ANSWERED = """([place, key, item]) => {
  const kept = JSON.parse(window[place][key] || 'null');
  return kept ? Object.keys(kept.document.answers[item] || {}).length : 0;
}"""


def test_what_one_place_of_the_browser_has_lost_the_other_gives(desk):
    kit, _ = made_kit(2)
    page = desk.sit(kit)
    follow(page, "1 2 1")
    asked = [f"psycopref/answers/{kit['kit_id']}/Ana", kit["items"][0]["item_id"]]
    for place in ("localStorage", "sessionStorage"):  # both have it; which one is read is the question here
        page.wait_for_function(f"asked => ({ANSWERED})(asked) === 3", arg=[place, *asked])
    page.wait_for_timeout(500)
    robbed = "if (!sessionStorage.robbed) { sessionStorage.robbed = 'once'; localStorage.clear(); }"
    page.add_init_script(robbed)  # as if the browser had not taken it over in time
    page.reload()
    follow(page, {"count": "Ana", "question": f"ask-{BATTLE_KEYS[3]}"}, "2", "click:#leave")
    other = desk.sit(kit, "")  # a tab of its own, to which only localStorage speaks
    follow(other, {"chosen": "empathy1 relevance2 clarity1 safety2"}, "2 2")
    page.wait_for_function(f"asked => ({ANSWERED})(asked) === 6", arg=["localStorage", *asked])
    assert page.evaluate(ANSWERED, ["sessionStorage", *asked]) == 4
    page.reload()  # the tab's own older copy does not stand against a newer one
    follow(page, {"chosen": "empathy1 relevance2 clarity1 safety2 exploration2 autonomy2"})


def test_what_was_not_written_is_written_when_the_page_is_left(desk):
    page = desk.sit(made_kit(2)[0])
    page.evaluate(f"() => {{ window.write = Storage.prototype.setItem; {FULL} }}")
    follow(page, "1 2", {"kept": "Not kept"})
    page.evaluate("() => { Storage.prototype.setItem = window.write; }")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    follow(page, {"chosen": "empathy1 relevance2"})


def test_a_browser_that_keeps_nothing_says_so(desk):
    desk.context.add_init_script(FULL)
    page = desk.sit(made_kit(2)[0])
    follow(page, {"status": "export before you close"}, "1", {"kept": "Not kept by this browser"})
    assert len(export(page)[1]["answers"]) == 1


def test_two_annotators_on_one_page_keep_apart(desk):
    kit, _ = made_kit()
    page = desk.sit(kit)
    follow(page, "1 1 1 1 1 1 1 1 Enter 1 1", "click:#leave", "type:  Ben ", "Enter")
    follow(page, {"count": "0 of 3 finished · Ben", "where": "Item 1 of 3"}, "2 2 2 2 2 2 2 2")
    ben = export(page)[1]
    follow(page, "click:#leave", {"before": "Go on as Ana"}, {"before": "Go on as Ben"}, "click:text=Go on as Ana")
    follow(page, {"where": "Item 2 of 3"})
    first, second = (item["item_id"] for item in kit["items"][:2])
    ana = {first: dict.fromkeys(BATTLE_KEYS, 1), second: {"empathy": 1, "relevance": 1}}
    assert (ben["annotator"], ben["answers"]) == ("Ben", {first: dict.fromkeys(BATTLE_KEYS, 2)})
    assert export(page)[1]["answers"] == ana


def test_two_windows_of_one_annotator_do_not_overwrite_each_other(desk):
    kit, _ = made_kit()
    first, second = desk.sit(kit), desk.sit(kit, "")
    follow(second, {"count": "Ana"})
    follow(first, "1 1 ArrowRight")
    second.locator("#status", has_text="another window").wait_for()
    follow(second, "ArrowRight ArrowRight 2")
    first.locator("#status", has_text="another window").wait_for()
    follow(first, "0")
    found = export(first)[1]["answers"]
    expected = [{"empathy": 1, "relevance": 1}, {"empathy": 0}, {"empathy": 2}]
    assert [found[item["item_id"]] for item in kit["items"]] == expected


def test_spoilt_storage_does_not_stop_the_page(desk):
    kit, _ = made_kit(2)
    page = desk.sit(kit)
    whole = filled(kit, {kit["items"][0]["item_id"]: {"empathy": 2}})
    places = [({"item": 99, "question": -3}, 2), ({"item": "x"}, 1), (None, 1)]
    spoilt = [{"document": {"format": "else"}}, {"document": 3, "place": {"item": 99}}, [], None, "{"]
    for content, number in [(each, 0) for each in spoilt] + [({"document": whole, "place": p}, n) for p, n in places]:
        follow(page, "click:#leave")  # or the page would keep what it has when it is left
        set_both = "([key, value]) => [localStorage, sessionStorage].forEach(place => place.setItem(key, value))"
        text = content if content == "{" else json.dumps(content)
        page.evaluate(set_both, [f"psycopref/answers/{kit['kit_id']}/Ana", text])
        page.reload()
        if number == 0:  # nothing could be read
            follow(page, {"start": "2 items"}, "type:Ana", "Enter")
        follow(page, {"count": "0 of 2 finished · Ana", "where": f"Item {number or 1} of 2"})


# files that go on


def test_an_export_goes_on_in_a_fresh_profile(desks, tmp_path):
    (kit, _), note = made_kit(), "Both miss the point; 1 more than 2?"
    page, other = desks().sit(kit), desks().sit(kit, "")
    follow(page, "1 2 1 2 1 2 1 2 Enter 2 1 n", f"type:{note}", "Escape")
    half = export(page)[1]
    other.set_input_files("#file", saved(tmp_path, half))
    other.wait_for_selector("#work:not([hidden])")
    follow(
        other, {"count": "1 of 3 finished · Ana", "where": "Item 2 of 3", "written": note, "question": "ask-clarity"}
    )
    follow(other, "1 1 1 1 1 1 Enter 2 2 2 2 2 2 2 2 Enter")
    whole = export(other, "Enter")[1]
    first, second, _ = whole["answers"]
    assert whole["started"] == half["started"] and whole["answers"][first] == half["answers"][first]
    expected = dict.fromkeys(BATTLE_KEYS, 1) | {"empathy": 2, "note": note}
    assert whole["answers"][second] == expected


@pytest.mark.parametrize("button, empathy", [("#keep-mine", 2), ("#take-theirs", 1)])
def test_differing_answers_are_asked_about(button, empathy, desk, tmp_path):
    kit, _ = made_kit(2)
    first, second = (item["item_id"] for item in kit["items"])
    page = desk.sit(kit)
    follow(page, "2")
    times = {"started": "2026-01-01T00:00:00.000Z", "saved": "2026-01-02T00:00:00.000Z"}
    theirs = filled(kit, {first: {"empathy": 1, "overall": 0}, second: {"safety": 0}}, **times)
    page.set_input_files("#file", saved(tmp_path, theirs))
    page.wait_for_selector("#differ[open]")
    follow(page, f"click:{button}")
    assert export(page)[1]["answers"] == {first: {"empathy": empathy, "overall": 0}, second: {"safety": 0}}


def test_foreign_files_are_refused_in_a_line(desk, tmp_path):
    kit, _ = made_kit(2)
    item = kit["items"][0]["item_id"]
    page, good = desk.sit(kit), filled(kit, {item: {"empathy": 1}})
    cases = {
        "JSON": "no JSON",
        "no file that this page": {"format": "else"},
        "version 2": good | {"version": 2},
        "another kit": good | {"kit_id": "other"},
        "answers of Ben": good | {"annotator": "Ben"},
        "an item that this kit has not": filled(kit, {"ffff": {}}),
        "empathy is 3": filled(kit, {item: {"empathy": 3}}),
        "cannot be an answer": filled(kit, {item: {"empathy": "1"}}),
        "warmth": filled(kit, {item: {"warmth": 1}}),
        "no answers": filled(kit, [1]),
        "item that this kit has not": filled(kit, {"__proto__": {"empathy": 1}}),
    }
    for word, content in cases.items():
        page.set_input_files("#file", saved(tmp_path, content))
        page.locator("#status", has_text=word).wait_for()
    follow(page, {"count": "0 of 2", "chosen": ""})


# what is shown, and to whom

FITS = "document.documentElement.scrollWidth <= innerWidth"
INSIDE = "where => [...document.querySelectorAll(where)].every(node => node.scrollWidth <= node.clientWidth + 1)"
NAMELESS = """[...document.querySelectorAll('button, input, textarea, progress')].filter(node =>
  !(node.textContent.trim() || node.labels?.length || node.getAttribute('aria-label'))).map(node => node.id)"""
GROUPS = """nodes => nodes.map(node => ['aria-labelledby', 'aria-describedby'].map(name =>
  document.getElementById(node.getAttribute(name)).textContent))"""


def test_a_hostile_speech_is_shown_as_text(desk):
    kit, _ = made_kit(2, client_speech=HOSTILE, response_a=HOSTILE[::-1])
    page = desk.sit(kit)
    assert page.evaluate("window.broken") is None and page.locator("#texts img, #texts b, #texts script").count() == 0
    shown = page.evaluate("document.querySelector('#speech').textContent")
    assert shown == kit["items"][0]["client_speech"] == HOSTILE.strip() and len(HOSTILE) > 5000
    assert page.locator("#speech").get_attribute("dir") == "auto"
    assert page.evaluate(FITS) and page.evaluate(INSIDE, ".said")
    follow(page, "1 1 1 1 1 1 1 1 Enter", {"where": "Item 2 of 2"})


def test_markup_that_did_break_out_could_not_run(browser, tmp_path):
    table, (kit, _) = Desk(browser, tmp_path), made_kit(1)
    evil = "<script>window.broken=1</script><iframe src='https://example.org'></iframe>"
    evil += "<img src='https://example.org/x.png' onerror='window.broken=2'>"
    page = table.sit(kit, page=kit_html(kit).replace("<body>", f"<body>{evil}"))
    assert page.evaluate("window.broken") is None and page.inner_text("#where") == "Item 1 of 1"
    assert page.evaluate("fetch('https://example.org').then(() => 'went', () => 'stopped')") == "stopped"
    assert len([text for text in table.complaints if "Content Security Policy" in text]) >= 3
    table.context.close()


def test_each_control_has_a_name_and_the_focus_is_seen(desk):
    page = desk.sit(made_kit(2)[0])
    follow(page, "1 ArrowRight")
    assert "alarm" in page.get_attribute("#status", "class"), "an item left unfinished"
    assert page.evaluate(NAMELESS) == []
    assert page.get_attribute("#status", "aria-live") == "polite" and page.get_attribute("html", "lang") == "en"
    groups = page.locator(".question").evaluate_all(GROUPS)
    assert len(groups) == 8 and all(name and about for name, about in groups)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


SCREENS = [(390, 844), (320, 640), (820, 1180), (1280, 720), (1366, 768), (1920, 1080), (844, 390)]


@pytest.mark.parametrize("width, height", SCREENS)
def test_no_screen_scrolls_sideways(width, height, desks):
    for kit, _ in (made_kit(2, response_a="unbroken" * 80), made_kit(3, "score")):
        page = desks(width=width, height=height, color_scheme="dark" if width == 820 else "light").sit(kit, "")
        assert page.evaluate(FITS)
        for keys in ("type:Ana", "Enter", "1 2 1 1 1 1 1", "?", "Escape o", "Escape e"):
            follow(page, keys)
            assert page.evaluate(FITS) and page.evaluate(INSIDE, "dialog[open], #texts, #asked, .question"), keys
