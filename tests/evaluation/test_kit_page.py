"""The page of a kit, driven by keyboard in a headless browser from disk, with the network cut."""

import json
import os
import shutil
from itertools import product

import pandas as pd
import pytest

from psycopref.evaluation.win_rates import SETTINGS
from psycopref.experiments.expert_study import KITS, agreement_results, unshuffled_kits
from psycopref.evaluation.annotations import gather_annotations, left_out, read_annotations, read_sheets
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.feedback.battles import ORDERS
from psycopref.core.settings import AgreementSettings, StudyError
from psycopref.evaluation.kits import SIDES, kit_html, make_kit, run_kits
from psycopref.core.prompts import BATTLE_KEYS

FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking".split()
FLAGS = [f"--{name}" for name in (*FLAGS, "disable-component-update", "disable-sync")]
HOSTILE = ("</script><script>window.broken=1</script><img src=x onerror=\"window.broken=2\"> <b>bold</b> &lt;i&gt; "
           "\u202edesrever\u202c\n\nשלום, אני לא ישן 😀👩‍👩‍👧\u2028line\n"
           + "unbroken" * 60 + " " + "A long complaint, told slowly.\n" * 160)  # fmt: skip


def missing(reason):
    """Skip, unless the browser was asked for."""
    (pytest.fail if os.environ.get("PSYCOPREF_BROWSER") == "required" else pytest.skip)(
        f"{reason}; the page of a kit is not driven"
    )


@pytest.fixture(scope="module")
def browser():
    """A headless browser found on PATH."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("none of chromium, chromium-browser and google-chrome is on PATH")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


class Desk:
    """One annotator's browser profile, offline, which notes every request and every complaint of the page."""

    def __init__(self, browser, **traits):
        self.context = browser.new_context(
            accept_downloads=True, **{"viewport": {"width": 1366, "height": 768}} | traits
        )
        self.context.set_offline(True)
        self.requests, self.complaints = [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("console", lambda message: self.complaints.append(message.text))
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def sit(self, path, name=None):
        """Open the page and, where a name is given, begin."""
        page = self.context.new_page()
        page.goto(path.as_uri())
        if name:
            page.keyboard.type(name)
            page.keyboard.press("Enter")
        return page

    def leave(self):
        """Close, and hold that nothing was asked of any network."""
        self.context.close()
        assert self.requests and [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert self.complaints == []


@pytest.fixture
def desk(browser):
    """A maker of desks that are all checked when they close."""
    desks = []

    def make(**traits):
        desks.append(Desk(browser, **traits))
        return desks[-1]

    yield make
    for one in desks:
        one.leave()


def made_kit(task, count, seed=0, **changes):
    """A kit whose texts say which side they are, as a stand-in for an annotator's judgement."""
    rows = pd.DataFrame({"speech_id": [f"made-{i}" for i in range(count)], "setting": "labels", "stratum": "Youth"})
    rows["client_speech"] = [f"Speech {i}." for i in range(count)]
    good, poor = ([f"A {word} answer to {i}." for i in range(count)] for word in ("good", "poor"))
    second = {"name_b": "rejected", "response_b": poor} if task == "compare" else {"name_b": "", "response_b": ""}
    rows = rows.assign(name_a="chosen", response_a=good, **second).assign(**changes)[SIDES]
    return make_kit(rows, task, "Comparing two responses", seed)


def compare_kit(count=10, **changes):
    return made_kit("compare", count, **changes)


def score_kit(count=3):
    return made_kit("score", count)


def written(tmp_path, kit):
    """The kit's page on disk."""
    path = tmp_path / f"kit {kit['task']}.html"  # a blank in the path, as users have
    path.write_text(kit_html(kit), encoding="utf-8")
    return path


def filled(kit, answers, **changes):
    """A file as the page exports it."""
    document = {"format": "psycopref-annotations", "version": 1, "kit_id": kit["kit_id"], "annotator": "Ana"}
    return document | {"started": "", "saved": "", "answers": answers} | changes


def press(page, *keys):
    """Press keys one after the other."""
    for key in keys:
        page.keyboard.press(key)


def export(page, *way):
    """Export by keyboard and read the file."""
    with page.expect_download() as coming:
        press(page, *(way or ("e", "Tab", "Enter")))
    return coming.value.suggested_filename, json.loads(coming.value.path().read_text(encoding="utf-8"))


def status(page):
    """What the page says to everybody, screen readers included."""
    return page.inner_text("#status")


def pressed(page, *names):
    """The values, or the named facts, of the answers that are chosen."""
    facts = "+".join(f"node.dataset.{name}" for name in names or ["value"])
    return page.locator('[aria-pressed="true"]').evaluate_all(f"nodes => nodes.map(node => {facts})")


POLICY = "ours + DPO"


def small_run():
    """Speeches, pairs, answers and battles: of two responses to a speech one calls itself good; the labels, and the judge in either order, take it throughout."""
    ids, good, poor = [f"made-{i}" for i in range(12)], "A good answer to {}.", "A poor answer to {}."
    speeches = pd.DataFrame({"speech_id": ids, "speech": [f"Speech {i}." for i in range(12)]})
    speeches["coarse_topic"] = ["youth", "safety"] * 6
    pairs = pd.DataFrame({"ID": ids, "prefID": range(12), "question": speeches.speech})
    for side, text, rating in (("chosen", good, 4), ("rejected", poor, 2)):
        ratings = {f"{side}_{key}_rating": rating for key in PRINCIPLE_KEYS}
        pairs = pairs.assign(**{side: [text.format(i) for i in range(12)], f"{side}_model": side}, **ratings)
    said = ((POLICY, "free", good), (POLICY, "length", good), ("reference", "free", poor))
    rows = [(s, who, how, text.format(f"{i}, {how}")) for i, s in enumerate(ids) for who, how, text in said]
    answers = pd.DataFrame(rows, columns=["speech_id", "policy", "setting", "response"])
    battles = pd.DataFrame(product(ids, SETTINGS, ORDERS), columns=["speech_id", "setting", "order"])
    won = {f"{key}_verdict": "win" for key in PRINCIPLE_KEYS}
    return pairs, answers, speeches, battles.assign(policy=POLICY, verdict="win", **won)


def sitting(page, kit, say, folder):
    """Answer a kit of ten items by keyboard with a reload in the middle, and export; `say` gets the number of the item's speech, the shown texts and a question. Return the file."""
    asked = BATTLE_KEYS if kit["task"] == "compare" else PRINCIPLE_KEYS
    for number in range(10):
        assert page.inner_text("#where") == f"Item {number + 1} of 10"
        speech, shown = page.inner_text("#speech"), page.locator("#replies .said").all_inner_texts()
        digits = [str(say(int(speech.removeprefix("Speech ").rstrip(".")), shown, key)) for key in asked]
        press(page, *digits[:3])
        if number == 5:  # three answers given, then the computer restarts
            page.reload()
            assert page.inner_text("#where") == "Item 6 of 10" and pressed(page) == digits[:3]
            assert page.inner_text("#count").startswith("5 of 10 finished")
            assert page.get_attribute(f"#ask-{asked[3]}", "aria-current") == "true"
            assert page.evaluate("document.activeElement.id") == f"ask-{asked[3]}"
        press(page, *digits[3:], "Enter")  # after the tenth item it asks for the export
    assert "All 10 items are finished" in page.inner_text("#export-said")
    with page.expect_download() as coming:
        press(page, "Enter")
    coming.value.save_as(folder / coming.value.suggested_filename)
    return folder / coming.value.suggested_filename


def good_side(shown):
    """The digit of the response that calls itself good."""
    return 1 if "good" in shown[0] else 2


def planted(speech, place):
    """What the annotator thinks of a speech's two answers: good, poor or neither; all three occur everywhere."""
    return ("good", "poor", "good" if place == 7 else "neither")[(speech + place) % 3]


def test_ten_items_by_keyboard_with_a_reload_in_the_middle(desk, tmp_path):
    kit, key = compare_kit()

    def judged(speech, shown, question):
        side = planted(speech, BATTLE_KEYS.index(question))
        return 0 if side == "neither" else 1 + (side not in shown[0])

    page = desk().sit(written(tmp_path, kit), "Expert 1")
    assert page.title() == "Comparing two responses"
    path = sitting(page, kit, judged, tmp_path)
    assert path.name == f"annotations_{kit['kit_id']}_Expert-1.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["format", "version", "kit_id", "annotator", "started", "saved", "answers"]
    assert found | {"started": "", "saved": ""} == filled(kit, found["answers"], annotator="Expert 1")
    assert found["started"] <= found["saved"] and set(found["answers"]) == {item["item_id"] for item in kit["items"]}
    words, seen = {"chosen": "good", "rejected": "poor", "neither": "neither"}, set()
    for row in key.itertuples():  # the key alone tells whose answer stood first
        sides = {0: "neither", 1: row.first, 2: row.second}
        said = [words[sides[found["answers"][row.item_id][k]]] for k in BATTLE_KEYS]
        assert said == [planted(int(row.speech_id.removeprefix("made-")), place) for place in range(8)]
        seen.add(said[0])
    assert len(seen) == 3 and set(key["first"]) == {"chosen", "rejected"}, "else the test could not fail"


def agreed(lines, between, **where):
    """How often two agree, of how many, in one line of the tables."""
    wanted = {"between": between} | where
    [row] = [row for row in lines if wanted.items() <= row.items()]
    return row["agree"], row["n"], row["agreement %"]


def test_from_keys_pressed_to_the_tables_of_agreement(desk, tmp_path):
    pairs, answers, speeches, battles = small_run()
    asked = AgreementSettings(label_pairs=10, battle_pairs=5, scored=5)
    kits = run_kits(pairs, answers, speeches, POLICY, asked, seed=0)

    def numbers(names):
        return [int(name.removeprefix("made-")) for name in names]

    mistaken = numbers(sorted(kits["labels"][1].speech_id)[:2])
    doubted = numbers(kits["answers"][1].query("setting == 'length'").speech_id[:3])

    def first(speech, shown, key):
        return 0 if key == "empathy" and speech in mistaken else good_side(shown)

    def second(speech, shown, key):
        return 3 - good_side(shown) if key == "overall" and speech in mistaken else good_side(shown)

    def doubting(speech, shown, key):
        return 3 - good_side(shown) if speech in doubted else good_side(shown)

    def scoring(speech, shown, key):
        return 4 if "length" in shown[0] else 1 + (speech + PRINCIPLE_KEYS.index(key)) % 5

    rules = [("labels", "Expert 1", first), ("labels", "Expert 2", second), ("answers", "Expert 1", doubting)]
    rules.append(("scores", "Expert 1", scoring))
    files = []
    for name, who, rule in rules:
        kit = kits[name][0]
        files.append(sitting(desk().sit(written(tmp_path, kit), who), kit, rule, tmp_path))
        assert len(read_annotations(files[-1], kit)) == (70 if name == "scores" else 80)
    turned = unshuffled_kits(gather_annotations(files, [kit for kit, _ in kits.values()]), kits)
    found = agreement_results(turned, kits, pairs, battles, 0, 200, 0)
    lines, by_principle, labels = found["agreement"], found["principles"], KITS["labels"]
    assert agreed(lines, "annotator 1 with annotator 2", what=labels) == (8, 10, 80.0)
    assert agreed(lines, "annotator 1 with the labels") == (10, 10, 100.0)
    assert agreed(lines, "annotator 2 with the labels") == (8, 10, 80.0)
    assert agreed(lines, "all annotators with the labels") == (18, 20, 90.0)
    for principle, each, other in (
        ("empathy", (8, 10, 80.0), (18, 20, 90.0)),
        ("safety", (10, 10, 100.0), (20, 20, 100.0)),
    ):
        assert agreed(by_principle, "annotators with each other", principle=principle, what=labels) == each
        assert agreed(by_principle, "annotators with the labels", principle=principle) == other
    judged = {"both": (7, 10, 70.0), SETTINGS["free"]: (5, 5, 100.0), SETTINGS["length"]: (2, 5, 40.0)}
    for setting, expected in judged.items():
        assert agreed(lines, "all annotators with the judge", setting=setting) == expected
    shares = {"free": (100, 0, 0), "length": (40, 0, 60)}
    assert len(found["shares"]) == 16 and len(found["means"]) == 14
    for row in found["shares"]:
        assert (row["win"], row["tie"], row["loss"]) == shares[row["setting"]]
    scored = numbers(kits["scores"][1].query("setting == 'free'").speech_id)
    for row in found["means"]:
        place = PRINCIPLE_KEYS.index(row["principle"])
        free = sum(1 + (speech + place) % 5 for speech in scored) / 5
        assert row["mean"] == pytest.approx(4 if row["setting"] == "length" else free)


def begun(desk, tmp_path, kit, name="Ana"):
    """A page on which an annotator has begun."""
    return desk().sit(written(tmp_path, kit), name)


def test_an_item_left_out_needs_a_note_and_the_page_says_so(desk, tmp_path):
    kit, _ = compare_kit(3)
    page = begun(desk, tmp_path, kit)
    press(page, *"11111111", "Enter", "o")
    assert "needs a note and no answers" in page.inner_text("#items")
    press(page, "Escape", "e")
    said = page.inner_text("#export-said")
    assert "refused" in said and "needs a note and no answers" in said
    press(page, "Escape")
    name, half = export(page)
    (tmp_path / name).write_text(json.dumps(half))
    with pytest.raises(StudyError, match="2 of 3 items are unfinished: 2, 3"):
        read_annotations(tmp_path / name, kit)
    press(page, *"12", "x")
    assert page.input_value("#note") == "left out" and page.evaluate("document.activeElement.id") == "note"
    page.keyboard.type("too close to home")
    press(page, "Escape")
    assert pressed(page) == [] and page.inner_text("#where") == "Item 2 of 3 – left out"
    press(page, "Enter")
    assert page.inner_text("#where") == "Item 3 of 3", "Enter goes past an item that was left out"
    press(page, "x", "Escape", "u")
    assert page.input_value("#note") == "" and page.inner_text("#count") == "1 of 3 finished, 1 left out · Ana"
    press(page, *"22222222", "o")
    assert page.locator("#tiles button").all_inner_texts() == ["1 ✓", "2 –", "3 ✓"]
    press(page, "Escape", "e")
    said = page.inner_text("#export-said")
    assert "2 of 3 items are finished" in said and "Left out with a note: 2." in said and "refused" not in said
    name, whole = export(page, "Enter")
    (tmp_path / name).write_text(json.dumps(whole))
    assert len(read_annotations(tmp_path / name, kit)) == 16
    assert left_out(read_sheets(tmp_path / name)[0]) == [kit["items"][1]["item_id"]]


ANSWERED = """([place, key, item]) => {
  const kept = JSON.parse(window[place][key] || 'null');
  return kept ? Object.keys(kept.document.answers[item] || {}).length : 0;
}"""


def test_what_one_place_of_the_browser_has_lost_the_other_gives(desk, tmp_path):
    kit, _ = compare_kit(2)
    path, one = written(tmp_path, kit), desk()
    page = one.sit(path, "Ana")
    press(page, *"121")
    asked = [f"psycopref/answers/{kit['kit_id']}/Ana", kit["items"][0]["item_id"]]
    for place in ("localStorage", "sessionStorage"):  # both have it; which one is read is the question here
        page.wait_for_function(f"asked => ({ANSWERED})(asked) === 3", arg=[place, *asked])
    page.wait_for_timeout(500)
    robbed = "if (!sessionStorage.robbed) { sessionStorage.robbed = 'once'; localStorage.clear(); }"
    page.add_init_script(robbed)  # as if the browser had not taken it over in time
    page.reload()
    assert page.inner_text("#count").endswith("Ana")
    assert page.get_attribute(f"#ask-{BATTLE_KEYS[3]}", "aria-current") == "true"
    press(page, "2")
    page.click("#leave")
    other = one.sit(path)  # a tab of its own, to which only localStorage speaks
    assert len(pressed(other)) == 4
    press(other, "2", "2")
    page.wait_for_function(f"asked => ({ANSWERED})(asked) === 6", arg=["localStorage", *asked])
    assert page.evaluate(ANSWERED, ["sessionStorage", *asked]) == 4
    page.reload()
    assert len(pressed(page)) == 6, "the tab's own older copy does not stand against a newer one"


def test_what_was_not_written_is_written_when_the_page_is_left(desk, tmp_path):
    page = begun(desk, tmp_path, compare_kit(2)[0])
    full = "Storage.prototype.setItem = () => { throw new DOMException('busy', 'QuotaExceededError'); };"
    page.evaluate(f"() => {{ window.write = Storage.prototype.setItem; {full} }}")
    press(page, *"12")
    assert "Not kept" in page.inner_text("#kept")
    page.evaluate("() => { Storage.prototype.setItem = window.write; }")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    assert len(pressed(page)) == 2


def test_a_browser_that_keeps_nothing_says_so(desk, tmp_path):
    one = desk()
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    one.context.add_init_script(full)
    page = one.sit(written(tmp_path, compare_kit(2)[0]), "Ana")
    assert "export before you close" in status(page).lower()
    press(page, "1")
    assert "Not kept by this browser" in page.inner_text("#kept")
    assert len(export(page)[1]["answers"]) == 1


def test_what_is_said_before_the_first_item_and_only_an_export_is_called_safe(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(2)[0]))
    words = "written by machines|distressing|the person who gave you this kit|stay on this computer|crisis line|2 items"
    said = page.inner_text("#start")
    assert [word for word in f"{words}|Only an exported file is safe".split("|") if word not in said] == []
    press(page, "Enter")
    assert page.is_visible("#start"), "nobody works without a name"
    page.keyboard.type("Ana")
    press(page, "Enter", "1")
    assert page.inner_text("#kept") == "Kept in this browser only, not exported yet"
    press(page, "e")
    assert "only the exported file is safe" in page.inner_text("#export-said")


def test_an_answer_out_of_range_is_none(desk, tmp_path):
    page = begun(desk, tmp_path, score_kit()[0])
    assert page.locator(".answers").first.locator("button").all_inner_texts() == list("12345")
    for digit in "0679":
        press(page, digit)
        assert "no answer here" in status(page)
    page = begun(desk, tmp_path, compare_kit(2)[0])
    press(page, "3")
    assert "no answer here" in status(page)
    press(page, *"1111111", "0")
    assert "asks for a choice" in status(page) and page.inner_text("#count").startswith("0 of 2")
    press(page, "2", "1", "2")
    assert "Enter goes on" in status(page) and page.inner_text("#count").startswith("1 of 2")
    assert page.locator("#ask-overall [aria-pressed='true']").inner_text() == "Response 2", (
        "digits behind change nothing"
    )


def test_two_annotators_on_one_page_keep_apart(desk, tmp_path):
    kit, _ = compare_kit(3)
    page = begun(desk, tmp_path, kit)
    press(page, *"11111111", "Enter", *"11")
    page.click("#leave")
    page.keyboard.type("  Ben ")
    press(page, "Enter")
    assert page.inner_text("#count") == "0 of 3 finished · Ben" and page.inner_text("#where") == "Item 1 of 3"
    press(page, *"22222222")
    _, ben = export(page)
    page.click("#leave")
    assert page.locator("#before button").all_inner_texts() == ["Go on as Ana", "Go on as Ben"]
    page.click("text=Go on as Ana")
    assert page.inner_text("#where") == "Item 2 of 3"
    _, ana = export(page)
    first, second = (item["item_id"] for item in kit["items"][:2])
    assert (ben["annotator"], ben["answers"]) == ("Ben", {first: dict.fromkeys(BATTLE_KEYS, 2)})
    expected = {first: dict.fromkeys(BATTLE_KEYS, 1), second: {"empathy": 1, "relevance": 1}}
    assert (ana["annotator"], ana["answers"]) == ("Ana", expected)


def test_an_export_goes_on_in_a_fresh_profile(desk, tmp_path):
    kit, _ = compare_kit(3)
    page, note = begun(desk, tmp_path, kit), "Both miss the point; 1 more than 2?"
    press(page, *"12121212", "Enter", *"21", "n")
    page.keyboard.type(note)
    press(page, "Escape")
    _, half = export(page)
    (tmp_path / "half.json").write_text(json.dumps(half), encoding="utf-8")
    other = desk().sit(written(tmp_path, kit))
    other.set_input_files("#file", tmp_path / "half.json")
    other.wait_for_selector("#work:not([hidden])")
    assert other.inner_text("#count") == "1 of 3 finished · Ana" and other.inner_text("#where") == "Item 2 of 3"
    assert other.input_value("#note") == note
    assert other.get_attribute("#ask-clarity", "aria-current") == "true", "at the first open question"
    press(other, *"111111", "Enter", *"22222222", "Enter")
    _, whole = export(other, "Enter")
    first, second, _ = whole["answers"]
    assert whole["started"] == half["started"] and whole["answers"][first] == half["answers"][first]
    expected = {"empathy": 2, "relevance": 1, **dict.fromkeys(BATTLE_KEYS[2:], 1), "note": note}
    assert whole["answers"][second] == expected


@pytest.mark.parametrize("button, empathy", [("#keep-mine", 2), ("#take-theirs", 1)])
def test_differing_answers_are_asked_about(button, empathy, desk, tmp_path):
    kit, _ = compare_kit(2)
    first, second = (item["item_id"] for item in kit["items"])
    page = begun(desk, tmp_path, kit)
    press(page, "2")
    times = {"started": "2026-01-01T00:00:00.000Z", "saved": "2026-01-02T00:00:00.000Z"}
    theirs = filled(kit, {first: {"empathy": 1, "overall": 0}, second: {"safety": 0}}, **times)
    (tmp_path / "a.json").write_text(json.dumps(theirs))
    page.set_input_files("#file", tmp_path / "a.json")
    page.wait_for_selector("#differ[open]")
    page.click(button)
    _, found = export(page)
    assert found["answers"] == {first: {"empathy": empathy, "overall": 0}, second: {"safety": 0}}


def test_foreign_files_are_refused_in_a_line(desk, tmp_path):
    kit, _ = compare_kit(2)
    item = kit["items"][0]["item_id"]
    page, good = begun(desk, tmp_path, kit), filled(kit, {item: {"empathy": 1}})
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
        (tmp_path / "f.json").write_text(content if isinstance(content, str) else json.dumps(content))
        page.set_input_files("#file", tmp_path / "f.json")
        page.locator("#status", has_text=word).wait_for()
    assert page.inner_text("#count").startswith("0 of 2") and pressed(page) == []


def test_a_hostile_speech_is_shown_as_text(desk, tmp_path):
    kit, _ = compare_kit(2, client_speech=HOSTILE, response_a=HOSTILE[::-1])
    page = begun(desk, tmp_path, kit, "<b>Ana</b> __proto__")
    assert page.evaluate("window.broken") is None and page.locator("#texts img, #texts b, #texts script").count() == 0
    shown = page.evaluate("document.querySelector('#speech').textContent")
    assert shown == kit["items"][0]["client_speech"] == HOSTILE.strip() and len(HOSTILE) > 5000
    assert page.locator("#speech").get_attribute("dir") == "auto"
    assert page.inner_text("#count").endswith("<b>Ana</b> __proto__")
    assert page.evaluate(FITS) and page.evaluate(INSIDE, ".said")
    press(page, *"11111111", "Enter")
    assert page.inner_text("#where") == "Item 2 of 2"


def test_markup_that_did_break_out_could_not_run(browser, tmp_path):
    table, path = Desk(browser), tmp_path / "kit.html"
    evil = "<script>window.broken=1</script><iframe src='https://example.org'></iframe>"
    evil += "<img src='https://example.org/x.png' onerror='window.broken=2'>"
    path.write_text(kit_html(compare_kit(1)[0]).replace("<body>", f"<body>{evil}"), encoding="utf-8")
    page = table.sit(path, "Ana")
    assert page.evaluate("window.broken") is None and page.inner_text("#where") == "Item 1 of 1"
    assert page.evaluate("fetch('https://example.org').then(() => 'went', () => 'stopped')") == "stopped"
    assert len([text for text in table.complaints if "Content Security Policy" in text]) >= 3
    table.context.close()


def test_an_unfinished_item_is_reported(desk, tmp_path):
    page = begun(desk, tmp_path, compare_kit(3)[0])
    press(page, *"1111", "ArrowRight")
    assert "Item 1 is left unfinished: 4 without an answer" in status(page)
    assert "alarm" in page.get_attribute("#status", "class")
    press(page, *"11111111", "e")
    assert "2 of 3 items are unfinished: 1, 3." in page.inner_text("#export-said")
    assert page.evaluate("document.activeElement.id") == "to-unfinished"
    press(page, "Enter")
    assert page.inner_text("#where") == "Item 1 of 3"
    assert page.get_attribute("#ask-exploration", "aria-current") == "true"
    press(page, *"1111", "f")
    assert page.inner_text("#where") == "Item 3 of 3"
    press(page, "o")
    assert page.locator("#tiles button").all_inner_texts() == ["1 ✓", "2 ✓", "3"]
    press(page, "Escape", "Enter")
    assert page.get_attribute("#ask-relevance", "aria-current") == "true", "Enter goes past a question"


def test_undo_notes_and_keys_that_must_not_answer(desk, tmp_path):
    page = begun(desk, tmp_path, compare_kit(3)[0])

    def shown():
        return pressed(page, "key", "value")

    press(page, "1", "2", "u")
    assert shown() == ["empathy1"] and "Undone" in status(page)
    assert page.get_attribute("#ask-relevance", "aria-current") == "true"
    press(page, "Control+z", "u")
    assert shown() == [] and "nothing to undo" in status(page)
    for _ in range(3):
        page.keyboard.down("1")
    page.keyboard.up("1")
    assert shown() == ["empathy1"], "a held key answers once"
    press(page, "Control+1", "Alt+2", "n")
    page.keyboard.type("12 of 2, u?")
    assert shown() == ["empathy1"] and page.input_value("#note") == "12 of 2, u?"
    press(page, "Escape", "?")
    assert page.evaluate("document.querySelector('#help').open")
    press(page, "1", "Escape")
    assert shown() == ["empathy1"] and not page.evaluate("document.querySelector('#help').open")
    press(page, "ArrowRight", "ArrowLeft", "u", "u")
    assert page.input_value("#note") == "" and shown() == []
    page.dispatch_event(".question.now", "keydown", {"key": "é", "code": "Digit2", "bubbles": True})
    assert shown() == ["empathy2"], "on keyboards whose digits need Shift the same keys answer"
    page.click("#open-help")
    page.uncheck("#letters")
    press(page, "Escape")
    before = shown()
    press(page, "1", "u", "e")
    assert shown() == before and not page.evaluate("document.querySelector('#export').open"), "keys can be switched off"


NAMELESS = """[...document.querySelectorAll('button, input, textarea, progress')].filter(node =>
  !(node.textContent.trim() || node.labels?.length || node.getAttribute('aria-label'))).map(node => node.id)"""
GROUPS = """nodes => nodes.map(node => ['aria-labelledby', 'aria-describedby'].map(name =>
  document.getElementById(node.getAttribute(name)).textContent))"""


def test_it_works_by_mouse_alone_and_by_tab_alone(desk, tmp_path):
    page = begun(desk, tmp_path, compare_kit(2)[0])
    for key in BATTLE_KEYS:
        page.click(f'#ask-{key} [data-value="2"]')
    page.click("#next")
    assert page.inner_text("#count").startswith("1 of 2")
    press(page, "Tab")
    assert page.evaluate("document.activeElement.dataset.key + document.activeElement.dataset.value") == "empathy1"
    press(page, "Space")
    assert page.get_attribute('#ask-empathy [data-value="1"]', "aria-pressed") == "true"
    assert page.evaluate(NAMELESS) == [], "each control has a name"
    assert page.get_attribute("#status", "aria-live") == "polite" and page.get_attribute("html", "lang") == "en"
    groups = page.locator(".question").evaluate_all(GROUPS)
    assert len(groups) == 8 and all(name and about for name, about in groups)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "what has the focus is seen"


FITS = "document.documentElement.scrollWidth <= innerWidth"
INSIDE = "where => [...document.querySelectorAll(where)].every(node => node.scrollWidth <= node.clientWidth + 1)"
SCREENS = [(390, 844), (320, 640), (820, 1180), (1280, 720), (1366, 768), (1920, 1080), (844, 390)]


@pytest.mark.parametrize("width, height", SCREENS)
def test_no_screen_scrolls_sideways(width, height, desk, tmp_path):
    for kit in (compare_kit(2, response_a="unbroken" * 80)[0], score_kit()[0]):
        one = desk(viewport={"width": width, "height": height}, color_scheme="dark" if width == 820 else "light")
        page = one.sit(written(tmp_path, kit))
        assert page.evaluate(FITS)
        page.keyboard.type("Ana")
        for keys in (["Enter"], [*"1211111"], ["?"], ["Escape", "o"], ["Escape", "e"]):
            press(page, *keys)
            assert page.evaluate(FITS) and page.evaluate(INSIDE, "dialog[open], #texts, #asked, .question"), keys


def test_two_windows_of_one_annotator_do_not_overwrite_each_other(desk, tmp_path):
    kit, _ = compare_kit(3)
    path, one = written(tmp_path, kit), desk()
    first, second = one.sit(path, "Ana"), one.sit(path)
    assert second.inner_text("#count").endswith("Ana")
    press(first, "1", "1", "ArrowRight")
    second.locator("#status", has_text="another window").wait_for()
    press(second, "ArrowRight", "ArrowRight", "2")
    first.locator("#status", has_text="another window").wait_for()
    press(first, "0")
    _, found = export(first)
    expected = [{"empathy": 1, "relevance": 1}, {"empathy": 0}, {"empathy": 2}]
    assert [found["answers"][item["item_id"]] for item in kit["items"]] == expected


def test_spoilt_storage_does_not_stop_the_page(desk, tmp_path):
    kit, _ = compare_kit(2)
    page = begun(desk, tmp_path, kit)

    def spoil(content):
        page.click("#leave")  # or the page would keep what it has when it is left
        set_both = "([key, value]) => [localStorage, sessionStorage].forEach(place => place.setItem(key, value))"
        page.evaluate(set_both, [f"psycopref/answers/{kit['kit_id']}/Ana", content])
        page.reload()

    for document in ({"document": {"format": "else"}}, {"document": 3, "place": {"item": 99}}, [], None, "{"):
        spoil(document if document == "{" else json.dumps(document))
        assert page.is_visible("#start")
        page.keyboard.type("Ana")
        press(page, "Enter")
        assert page.inner_text("#where") == "Item 1 of 2"
    whole = filled(kit, {kit["items"][0]["item_id"]: {"empathy": 2}})
    for place, number in (({"item": 99, "question": -3}, 2), ({"item": "x"}, 1), (None, 1)):
        spoil(json.dumps({"document": whole, "place": place}))
        assert page.inner_text("#count") == "0 of 2 finished · Ana"
        assert page.inner_text("#where") == f"Item {number} of 2"
