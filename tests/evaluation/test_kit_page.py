"""The page of a kit, driven by keyboard in a headless browser from disk, with the network cut."""

import json
import os
import shutil

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

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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


def compare_kit(count=10, seed=0, **changes):
    """Pairs whose texts say which side they are, as a stand-in for an annotator's judgement."""
    rows = pd.DataFrame([{"speech_id": f"made-{i}", "setting": "labels", "stratum": "Youth", "client_speech": f"Speech {i}.", "name_a": "chosen", "response_a": f"A good answer to {i}.",
                          "name_b": "rejected", "response_b": f"A poor answer to {i}."} for i in range(count)], columns=SIDES)  # fmt: skip
    return make_kit(rows.assign(**changes), "compare", "Comparing two responses", seed)


def score_kit(count=3):
    """Answers of one policy."""
    rows = pd.DataFrame([{"speech_id": f"made-{i}", "setting": "free", "stratum": "Youth", "client_speech": f"Speech {i}.", "name_a": "dpo", "response_a": f"Answer {i}.",
                          "name_b": "", "response_b": ""} for i in range(count)], columns=SIDES)  # fmt: skip
    return make_kit(rows, "score", "Scoring one response", 0)


def written(tmp_path, kit):
    """The kit's page on disk."""
    path = tmp_path / f"kit {kit['task']}.html"  # a blank in the path, as users have
    path.write_text(kit_html(kit), encoding="utf-8")
    return path


def planted(speech):
    """What the annotator thinks of a speech's two answers: for each question good, poor or neither; all three occur everywhere."""
    number = int(speech.removeprefix("Speech ").rstrip("."))
    return {
        key: ("good", "poor", "good" if key == "overall" else "neither")[(number + place) % 3]
        for place, key in enumerate(BATTLE_KEYS)
    }


def press(page, *keys):
    """Press keys one after the other."""
    for key in keys:
        page.keyboard.press(key)


def judge(page):
    """Answer the item on show by what its texts say, by keyboard alone; return the digits."""
    speech, shown = (
        page.inner_text("#speech"),
        [page.inner_text(f"#replies article:nth-child({i}) .said") for i in (1, 2)],
    )
    digits = [
        "0" if side == "neither" else str([side in text for text in shown].index(True) + 1)
        for side in planted(speech).values()
    ]
    press(page, *digits)
    return digits


def export(page, *way):
    """Export by keyboard and read the file."""
    with page.expect_download() as coming:
        press(page, *(way or ("e", "Enter")))
    return coming.value.suggested_filename, json.loads(coming.value.path().read_text(encoding="utf-8"))


def status(page):
    """What the page says to everybody, screen readers included."""
    return page.inner_text("#status")


def test_ten_items_by_keyboard_with_a_reload_in_the_middle(desk, tmp_path):
    kit, key = compare_kit()
    page = desk().sit(written(tmp_path, kit), "Expert 1")
    assert page.title() == "Comparing two responses" and page.inner_text("#where") == "Item 1 of 10"
    for number in range(10):
        assert page.inner_text("#where") == f"Item {number + 1} of 10"
        if number == 4:  # three answers given, then the computer restarts
            press(page, *"120")
            page.reload()
            assert (
                page.inner_text("#where") == "Item 5 of 10"
                and page.inner_text("#count") == "4 of 10 finished · Expert 1"
            )
            assert (
                page.get_attribute(f"#ask-{BATTLE_KEYS[3]}", "aria-current") == "true"
                and page.evaluate("document.activeElement.id") == f"ask-{BATTLE_KEYS[3]}"
            )
            assert page.locator('[aria-pressed="true"]').evaluate_all(
                "nodes => nodes.map(node => node.dataset.value)"
            ) == ["1", "2", "0"]
            press(page, *["ArrowUp"] * 3)
        judge(page)
        press(page, "Enter")  # after the tenth item it asks for the export
    assert "All 10 items are finished" in page.inner_text("#export-said")
    name, found = export(page, "Enter")
    assert name == f"annotations_{kit['kit_id']}_Expert-1.json"
    assert list(found) == ["format", "version", "kit_id", "annotator", "started", "saved", "answers"]
    assert [found[k] for k in ("format", "version", "kit_id", "annotator")] == [
        "psycopref-annotations",
        1,
        kit["kit_id"],
        "Expert 1",
    ] and found["started"] <= found["saved"]
    assert set(found["answers"]) == {item["item_id"] for item in kit["items"]}
    counted = {"good": 0, "poor": 0, "neither": 0}
    for row in key.itertuples():  # the key alone tells whose answer stood first
        given, sides = found["answers"][row.item_id], {0: "neither", 1: row.first, 2: row.second}
        told = {
            k: {"chosen": "good", "rejected": "poor", "neither": "neither"}[sides[value]] for k, value in given.items()
        }
        assert told == planted(f"Speech {row.speech_id.removeprefix('made-')}.")
        counted[told["empathy"]] += 1
    assert all(counted.values()) and set(key["first"]) == {"chosen", "rejected"}, (
        "a test that could not fail would prove nothing"
    )


POLICY = "ours + DPO"


def small_run():
    """Speeches, pairs, answers and battles: of two responses to a speech one calls itself good; the labels, and the judge in either order, take it throughout."""
    ids, good, poor = [f"made-{i}" for i in range(12)], "A good answer to {}.", "A poor answer to {}."
    speeches = pd.DataFrame(
        {"speech_id": ids, "speech": [f"Speech {i}." for i in range(12)], "coarse_topic": ["youth", "safety"] * 6}
    )
    ratings = {
        f"{side}_{key}_rating": rating for side, rating in (("chosen", 4), ("rejected", 2)) for key in PRINCIPLE_KEYS
    }
    pairs = pd.DataFrame([{"ID": name, "prefID": i, "question": f"Speech {i}.", "chosen": good.format(i), "rejected": poor.format(i), "chosen_model": "a", "rejected_model": "b", **ratings}
                          for i, name in enumerate(ids)])  # fmt: skip
    answers = pd.DataFrame([{"speech_id": name, "policy": policy, "setting": setting, "response": text.format(f"{i}, {setting}")}
                            for i, name in enumerate(ids) for policy, setting, text in ((POLICY, "free", good), (POLICY, "length", good), ("reference", "free", poor))])  # fmt: skip
    battles = pd.DataFrame([{"speech_id": name, "setting": setting, "policy": POLICY, "order": order, "verdict": "win", **{f"{key}_verdict": "win" for key in PRINCIPLE_KEYS}}
                            for name in ids for setting in SETTINGS for order in ORDERS])  # fmt: skip
    return pairs, answers, speeches, battles


def sitting(page, kit, say, folder):
    """Answer a kit of ten items by keyboard with a reload in the middle, and export; `say` gets the number of the item's speech, the shown texts and a principle. Return the file."""
    asked = BATTLE_KEYS if kit["task"] == "compare" else PRINCIPLE_KEYS
    for number in range(10):
        assert page.inner_text("#where") == f"Item {number + 1} of 10"
        speech, shown = page.inner_text("#speech"), page.locator("#replies .said").all_inner_texts()
        digits = [str(say(int(speech.removeprefix("Speech ").rstrip(".")), shown, key)) for key in asked]
        press(page, *digits[:3])
        if number == 5:
            page.reload()
            assert (
                page.inner_text("#where") == "Item 6 of 10"
                and page.locator('[aria-pressed="true"]').evaluate_all("nodes => nodes.map(node => node.dataset.value)")
                == digits[:3]
            )
        press(page, *digits[3:], "Enter")
    with page.expect_download() as coming:
        press(page, "Enter")
    coming.value.save_as(folder / coming.value.suggested_filename)
    return folder / coming.value.suggested_filename


def good_side(shown):
    """The digit of the response that calls itself good."""
    return 1 if "good" in shown[0] else 2


def agreed(lines, between, **where):
    """How often two agree, of how many, in one line of the tables."""
    [row] = [
        row for row in lines if row["between"] == between and all(row[name] == value for name, value in where.items())
    ]
    return row["agree"], row["n"], row["agreement %"]


def test_from_keys_pressed_to_the_tables_of_agreement(desk, tmp_path):
    pairs, answers, speeches, battles = small_run()
    kits = run_kits(
        pairs, answers, speeches, POLICY, AgreementSettings(label_pairs=10, battle_pairs=5, scored=5), seed=0
    )
    mistaken = {int(name.removeprefix("made-")) for name in sorted(kits["labels"][1].speech_id)[:2]}
    doubted = {
        int(name.removeprefix("made-")) for name in kits["answers"][1].query("setting == 'length'").speech_id[:3]
    }
    rules = {
        ("labels", "Expert 1"): lambda speech, shown, key: 0 if key == "empathy" and speech in mistaken else good_side(shown),
        ("labels", "Expert 2"): lambda speech, shown, key: 3 - good_side(shown) if key == "overall" and speech in mistaken else good_side(shown),
        ("answers", "Expert 1"): lambda speech, shown, key: 3 - good_side(shown) if speech in doubted else good_side(shown),
        ("scores", "Expert 1"): lambda speech, shown, key: 4 if "length" in shown[0] else 1 + (speech + PRINCIPLE_KEYS.index(key)) % 5,
    }  # fmt: skip
    files = [
        sitting(desk().sit(written(tmp_path, kits[name][0]), who), kits[name][0], rule, tmp_path)
        for (name, who), rule in rules.items()
    ]
    assert [len(read_annotations(path, kits[name][0])) for path, (name, _) in zip(files, rules)] == [80, 80, 80, 70]
    turned = unshuffled_kits(gather_annotations(files, [kit for kit, _ in kits.values()]), kits)
    found = agreement_results(turned, kits, pairs, battles, 0, 200, 0)
    lines, by_principle = found["agreement"], found["principles"]
    assert agreed(lines, "annotator 1 with annotator 2", what=KITS["labels"]) == (8, 10, 80.0)
    assert agreed(lines, "annotator 1 with the labels") == (10, 10, 100.0) and agreed(
        lines, "annotator 2 with the labels"
    ) == (8, 10, 80.0)
    assert agreed(lines, "all annotators with the labels") == (18, 20, 90.0)
    assert agreed(by_principle, "annotators with each other", principle="empathy", what=KITS["labels"]) == (8, 10, 80.0)
    assert agreed(by_principle, "annotators with each other", principle="safety", what=KITS["labels"]) == (
        10,
        10,
        100.0,
    )
    assert agreed(by_principle, "annotators with the labels", principle="empathy") == (18, 20, 90.0)
    for setting, expected in (
        ("both", (7, 10, 70.0)),
        (SETTINGS["free"], (5, 5, 100.0)),
        (SETTINGS["length"], (2, 5, 40.0)),
    ):
        assert agreed(lines, "all annotators with the judge", setting=setting) == expected
    shares = {(row["setting"], row["principle"]): (row["win"], row["tie"], row["loss"]) for row in found["shares"]}
    assert shares == {
        (setting, key): (100, 0, 0) if setting == "free" else (40, 0, 60) for setting in SETTINGS for key in BATTLE_KEYS
    }
    scored = [int(name.removeprefix("made-")) for name in kits["scores"][1].query("setting == 'free'").speech_id]
    means = {(row["setting"], row["principle"]): row["mean"] for row in found["means"]}
    assert means == {
        (setting, key): pytest.approx(
            4 if setting == "length" else sum(1 + (speech + place) % 5 for speech in scored) / 5
        )
        for setting in SETTINGS
        for place, key in enumerate(PRINCIPLE_KEYS)
    }


def test_an_item_left_out_needs_a_note_and_the_page_says_so(desk, tmp_path):
    kit, _ = compare_kit(3)
    page = desk().sit(written(tmp_path, kit), "Ana")
    press(page, *"11111111", "Enter", "o")
    assert "needs a note and no answers" in page.inner_text("#items")
    press(page, "Escape", "e")
    assert "refused" in page.inner_text("#export-said") and "needs a note and no answers" in page.inner_text(
        "#export-said"
    )
    press(page, "Escape")
    name, half = export(page, "e", "Tab", "Enter")
    (tmp_path / name).write_text(json.dumps(half))
    with pytest.raises(StudyError, match="2 of 3 items are unfinished: 2, 3"):
        read_annotations(tmp_path / name, kit)
    press(page, *"12", "x")
    assert page.input_value("#note") == "left out" and page.evaluate("document.activeElement.id") == "note"
    page.keyboard.type("too close to home")
    press(page, "Escape")
    assert page.locator('[aria-pressed="true"]').count() == 0 and page.inner_text("#where") == "Item 2 of 3 – left out"
    press(page, "Enter")
    assert page.inner_text("#where") == "Item 3 of 3", "Enter goes past an item that was left out"
    press(page, "x", "Escape", "u")
    assert page.input_value("#note") == "" and page.inner_text("#count") == "1 of 3 finished, 1 left out · Ana"
    press(page, *"2222222")
    press(page, "2", "o")
    assert page.locator("#tiles button").all_inner_texts() == ["1 ✓", "2 –", "3 ✓"]
    press(page, "Escape", "e")
    said = page.inner_text("#export-said")
    assert "2 of 3 items are finished" in said and "Left out with a note: 2." in said and "refused" not in said
    name, whole = export(page, "Enter")
    (tmp_path / name).write_text(json.dumps(whole))
    assert len(read_annotations(tmp_path / name, kit)) == 16 and left_out(read_sheets(tmp_path / name)[0]) == [
        kit["items"][1]["item_id"]
    ]


def test_what_one_place_of_the_browser_has_lost_the_other_gives(desk, tmp_path):
    kit, _ = compare_kit(2)
    path, one = written(tmp_path, kit), desk()
    page = one.sit(path, "Ana")
    press(page, *"121")
    page.wait_for_timeout(500)  # both places have it for certain; which one is read is the question here
    page.add_init_script(
        "if (!sessionStorage.robbed) { sessionStorage.robbed = 'once'; localStorage.clear(); }"
    )  # as if the browser had not taken it over in time
    page.reload()
    assert (
        page.inner_text("#count").endswith("Ana")
        and page.get_attribute(f"#ask-{BATTLE_KEYS[3]}", "aria-current") == "true"
    )
    press(page, "2")
    page.click("#leave")
    other = one.sit(path)  # a tab of its own, to which only localStorage speaks
    assert other.locator('[aria-pressed="true"]').count() == 4
    press(other, "2", "2")
    key, item = f"psycopref/answers/{kit['kit_id']}/Ana", kit["items"][0]["item_id"]
    page.wait_for_function(
        "([key, item]) => Object.keys(JSON.parse(localStorage[key]).document.answers[item]).length === 6",
        arg=[key, item],
    )
    assert (
        len(
            page.evaluate(
                "([key, item]) => Object.keys(JSON.parse(sessionStorage[key]).document.answers[item])", [key, item]
            )
        )
        == 4
    )
    page.reload()
    assert page.locator('[aria-pressed="true"]').count() == 6, (
        "the tab's own older copy does not stand against a newer one"
    )


def test_what_was_not_written_is_written_when_the_page_is_left(desk, tmp_path):
    kit, _ = compare_kit(2)
    page = desk().sit(written(tmp_path, kit), "Ana")
    page.evaluate(
        "() => { window.write = Storage.prototype.setItem; Storage.prototype.setItem = () => { throw new "
        "DOMException('busy', 'QuotaExceededError'); }; }"
    )
    press(page, *"12")
    assert "Not kept" in page.inner_text("#kept")
    page.evaluate("() => { Storage.prototype.setItem = window.write; }")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    assert page.locator('[aria-pressed="true"]').count() == 2


def test_only_an_export_is_called_safe(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(2)[0]))
    assert "Only an exported file is safe" in page.inner_text("#start")
    page.keyboard.type("Ana")
    press(page, "Enter", "1")
    assert page.inner_text("#kept") == "Kept in this browser only, not exported yet"
    press(page, "e")
    assert "only the exported file is safe" in page.inner_text("#export-said")


def test_scores_by_keyboard(desk, tmp_path):
    kit, key = score_kit()
    page = desk().sit(written(tmp_path, kit), "Expert 1")
    for i, _ in enumerate(kit["items"]):
        press(page, *(str((i + place) % 5 + 1) for place in range(7)), "Enter")
    name, found = export(page, "Enter")
    assert [found["answers"][item["item_id"]] for item in kit["items"]] == [
        {k: (i + place) % 5 + 1 for place, k in enumerate(PRINCIPLE_KEYS)} for i in range(3)
    ]
    assert page.locator(".answers").first.locator("button").all_inner_texts() == list("12345")


def test_an_answer_out_of_range_is_none(desk, tmp_path):
    table = desk()
    page = table.sit(written(tmp_path, score_kit()[0]), "A")
    for digit in "0679":
        press(page, digit)
        assert "no answer here" in status(page)
    page = table.sit(written(tmp_path, compare_kit(2)[0]), "A")
    press(page, "3")
    assert "no answer here" in status(page)
    press(page, *"1111111", "0")
    assert "asks for a choice" in status(page) and page.inner_text("#count").startswith("0 of 2")
    press(page, "2", "1", "2")
    assert "Enter goes on" in status(page) and page.inner_text("#count").startswith("1 of 2"), (
        "digits behind the last question change nothing"
    )
    assert page.locator("#ask-overall [aria-pressed='true']").inner_text() == "Response 2"


def test_two_annotators_on_one_page_keep_apart(desk, tmp_path):
    kit, _ = compare_kit(3)
    page = desk().sit(written(tmp_path, kit), "Ana")
    press(page, *"11111111", "Enter", *"11")
    page.click("#leave")
    page.keyboard.type("  Ben ")
    press(page, "Enter")
    assert page.inner_text("#count") == "0 of 3 finished · Ben" and page.inner_text("#where") == "Item 1 of 3"
    press(page, *"2222222", "2")
    _, ben = export(page, "e", "Tab", "Enter")
    page.click("#leave")
    assert page.locator("#before button").all_inner_texts() == ["Go on as Ana", "Go on as Ben"]
    page.click("text=Go on as Ana")
    assert page.inner_text("#where") == "Item 2 of 3"
    _, ana = export(page, "e", "Tab", "Enter")
    first, second = (item["item_id"] for item in kit["items"][:2])
    assert ben["annotator"] == "Ben" and ben["answers"] == {first: dict.fromkeys(BATTLE_KEYS, 2)}
    assert ana["annotator"] == "Ana" and ana["answers"] == {
        first: dict.fromkeys(BATTLE_KEYS, 1),
        second: {"empathy": 1, "relevance": 1},
    }


def test_an_export_goes_on_in_a_fresh_profile(desk, tmp_path):
    kit, _ = compare_kit(3)
    path, file = written(tmp_path, kit), tmp_path / "half.json"
    page = desk().sit(path, "Ana")
    press(page, *"12121212", "Enter", *"21", "n")
    page.keyboard.type("Both miss the point; 1 more than 2?")
    press(page, "Escape")
    _, half = export(page, "e", "Tab", "Enter")
    file.write_text(json.dumps(half), encoding="utf-8")
    other = desk().sit(path)
    other.set_input_files("#file", file)
    other.wait_for_selector("#work:not([hidden])")
    assert (
        other.inner_text("#count") == "1 of 3 finished · Ana"
        and other.inner_text("#where") == "Item 2 of 3"
        and other.input_value("#note").startswith("Both miss")
    )
    assert other.get_attribute("#ask-clarity", "aria-current") == "true", "at the first open question"
    press(other, *"111111", "Enter", *"22222222", "Enter")
    _, whole = export(other, "Enter")
    ids = [item["item_id"] for item in kit["items"]]
    assert (
        whole["started"] == half["started"]
        and whole["answers"][ids[0]] == half["answers"][ids[0]]
        and len(whole["answers"]) == 3
    )
    assert whole["answers"][ids[1]] == {
        "empathy": 2,
        "relevance": 1,
        **dict.fromkeys(BATTLE_KEYS[2:], 1),
        "note": "Both miss the point; 1 more than 2?",
    }


@pytest.mark.parametrize("button, empathy", [("#keep-mine", 2), ("#take-theirs", 1)])
def test_differing_answers_are_asked_about(button, empathy, desk, tmp_path):
    kit, _ = compare_kit(2)
    first, second = (item["item_id"] for item in kit["items"])
    page = desk().sit(written(tmp_path, kit), "Ana")
    press(page, "2")
    base = {
        "format": "psycopref-annotations",
        "version": 1,
        "kit_id": kit["kit_id"],
        "annotator": "Ana",
        "started": "2026-01-01T00:00:00.000Z",
        "saved": "2026-01-02T00:00:00.000Z",
    }
    (tmp_path / "a.json").write_text(
        json.dumps(base | {"answers": {first: {"empathy": 1, "overall": 0}, second: {"safety": 0}}})
    )
    page.set_input_files("#file", tmp_path / "a.json")
    page.wait_for_selector("#differ[open]")
    page.click(button)
    _, found = export(page, "e", "Tab", "Enter")
    assert found["answers"] == {first: {"empathy": empathy, "overall": 0}, second: {"safety": 0}}


def test_foreign_files_are_refused_in_a_line(desk, tmp_path):
    kit, _ = compare_kit(2)
    item = kit["items"][0]["item_id"]
    page = desk().sit(written(tmp_path, kit), "Ana")
    good = {
        "format": "psycopref-annotations",
        "version": 1,
        "kit_id": kit["kit_id"],
        "annotator": "Ana",
        "started": "",
        "saved": "",
        "answers": {item: {"empathy": 1}},
    }
    cases = [("no JSON", "JSON"), ({"format": "else"}, "no file that this page"), (good | {"version": 2}, "version 2"), (good | {"kit_id": "other"}, "another kit"), (good | {"annotator": "Ben"}, "answers of Ben"),
             (good | {"answers": {"ffff": {}}}, "an item that this kit has not"), (good | {"answers": {item: {"empathy": 3}}}, "empathy is 3"), (good | {"answers": {item: {"empathy": "1"}}}, "cannot be an answer"),
             (good | {"answers": {item: {"warmth": 1}}}, "warmth"), (good | {"answers": [1]}, "no answers"), (good | {"answers": {"__proto__": {"empathy": 1}}}, "an item that this kit has not")]  # fmt: skip
    for content, word in cases:
        (tmp_path / "f.json").write_text(content if isinstance(content, str) else json.dumps(content))
        page.set_input_files("#file", tmp_path / "f.json")
        page.locator("#status", has_text=word).wait_for()
    assert page.inner_text("#count").startswith("0 of 2") and page.locator('[aria-pressed="true"]').count() == 0


def test_a_hostile_speech_is_shown_as_text(desk, tmp_path):
    kit, _ = compare_kit(2, client_speech=HOSTILE, response_a=HOSTILE[::-1])
    page = desk().sit(written(tmp_path, kit), "<b>Ana</b> __proto__")
    assert page.evaluate("window.broken") is None and page.locator("#texts img, #texts b, #texts script").count() == 0
    assert (
        page.evaluate("document.querySelector('#speech').textContent")
        == kit["items"][0]["client_speech"]
        == HOSTILE.strip()
    )
    assert len(HOSTILE) > 5000 and page.locator("#speech").get_attribute("dir") == "auto"
    assert page.inner_text("#count").endswith("<b>Ana</b> __proto__")
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll('.said')].every(node => "
        "node.scrollWidth <= node.clientWidth)"
    )
    press(page, *"11111111", "Enter")
    assert page.inner_text("#where") == "Item 2 of 2"


def test_markup_that_did_break_out_could_not_run(browser, tmp_path):
    table = Desk(browser)
    path = tmp_path / "kit.html"
    path.write_text(
        kit_html(compare_kit(1)[0]).replace(
            "<body>",
            "<body><script>window.broken=1</script><img src='https://example.org/x.png' "
            "onerror='window.broken=2'><iframe src='https://example.org'></iframe>",
        ),
        encoding="utf-8",
    )
    page = table.sit(path, "Ana")
    assert page.evaluate("window.broken") is None and page.inner_text("#where") == "Item 1 of 1"
    assert page.evaluate("fetch('https://example.org').then(() => 'went', () => 'stopped')") == "stopped"
    assert len([text for text in table.complaints if "Content Security Policy" in text]) >= 3
    table.context.close()


def test_an_unfinished_item_is_told(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(3)[0]), "Ana")
    press(page, *"1111", "ArrowRight")
    assert "Item 1 is left unfinished: 4 without an answer" in status(page) and "alarm" in page.get_attribute(
        "#status", "class"
    )
    press(page, *"11111111", "e")
    assert (
        "2 of 3 items are unfinished: 1, 3." in page.inner_text("#export-said")
        and page.evaluate("document.activeElement.id") == "to-unfinished"
    )
    press(page, "Enter")
    assert (
        page.inner_text("#where") == "Item 1 of 3" and page.get_attribute("#ask-exploration", "aria-current") == "true"
    )
    press(page, *"1111", "f")
    assert page.inner_text("#where") == "Item 3 of 3"
    press(page, "o")
    assert page.locator("#tiles button").all_inner_texts() == ["1 ✓", "2 ✓", "3"]
    press(page, "Escape", "Enter")
    assert page.get_attribute("#ask-relevance", "aria-current") == "true", "Enter goes past a question"


def test_undo_notes_and_keys_that_must_not_answer(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(3)[0]), "Ana")
    pressed = lambda: page.locator('[aria-pressed="true"]').evaluate_all(
        "nodes => nodes.map(node => node.dataset.key + node.dataset.value)"
    )  # noqa: E731
    press(page, "1", "2", "u")
    assert (
        pressed() == ["empathy1"]
        and page.get_attribute("#ask-relevance", "aria-current") == "true"
        and "Undone" in status(page)
    )
    press(page, "Control+z", "u")
    assert pressed() == [] and "nothing to undo" in status(page)
    page.keyboard.down("1")
    page.keyboard.down("1")
    page.keyboard.down("1")
    page.keyboard.up("1")
    assert pressed() == ["empathy1"], "a held key answers once"
    press(page, "Control+1", "Alt+2", "n")
    page.keyboard.type("12 of 2, u?")
    assert pressed() == ["empathy1"] and page.input_value("#note") == "12 of 2, u?"
    press(page, "Escape", "?")
    assert page.evaluate("document.querySelector('#help').open")
    press(page, "1", "Escape")
    assert pressed() == ["empathy1"] and not page.evaluate("document.querySelector('#help').open")
    press(page, "ArrowRight", "ArrowLeft", "u", "u")
    assert page.input_value("#note") == "" and pressed() == []
    page.dispatch_event(".question.now", "keydown", {"key": "é", "code": "Digit2", "bubbles": True})
    assert pressed() == ["empathy2"], "on keyboards whose digits need Shift the same keys answer"
    page.click("#open-help")
    page.uncheck("#letters")
    press(page, "Escape")
    before = pressed()
    press(page, "1", "u", "e")
    assert pressed() == before and not page.evaluate("document.querySelector('#export').open"), (
        "keys can be switched off"
    )


def test_it_works_by_mouse_alone_and_by_tab_alone(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(2)[0]), "Ana")
    for key in BATTLE_KEYS:
        page.click(f'#ask-{key} [data-value="2"]')
    page.click("#next")
    assert page.inner_text("#count").startswith("1 of 2")
    press(page, "Tab")
    assert page.evaluate("document.activeElement.dataset.key + document.activeElement.dataset.value") == "empathy1"
    press(page, "Space")
    assert page.get_attribute('#ask-empathy [data-value="1"]', "aria-pressed") == "true"
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, progress')].filter(node => !(node.textContent.trim() "
        "|| node.labels?.length || node.getAttribute('aria-label'))).map(node => node.id)"
    )
    assert names == [], "each control has a name"
    assert page.get_attribute("#status", "aria-live") == "polite" and page.get_attribute("html", "lang") == "en"
    groups = page.locator(".question").evaluate_all(
        "nodes => nodes.map(node => [document.getElementById(node.getAttribute('aria-labelledby')).textContent, "
        "document.getElementById(node.getAttribute('aria-describedby')).textContent])"
    )
    assert len(groups) == 8 and all(name and about for name, about in groups)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        "what has the focus is seen"
    )


def test_what_is_said_before_the_first_item(desk, tmp_path):
    page = desk().sit(written(tmp_path, compare_kit(2)[0]))
    said = page.inner_text("#start")
    for word in (
        "written by machines",
        "distressing",
        "the person who gave you this kit",
        "stay on this computer",
        "crisis line",
        "2 items",
    ):
        assert word in said
    press(page, "Enter")
    assert page.is_visible("#start"), "nobody works without a name"


@pytest.mark.parametrize(
    "width, height", [(390, 844), (320, 640), (820, 1180), (1280, 720), (1366, 768), (1920, 1080), (844, 390)]
)
def test_no_screen_scrolls_sideways(width, height, desk, tmp_path):
    for kit in (compare_kit(2, response_a="unbroken" * 80)[0], score_kit()[0]):
        one = desk(viewport={"width": width, "height": height}, color_scheme="dark" if width == 820 else "light")
        page = one.sit(written(tmp_path, kit))
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(fits)
        page.keyboard.type("Ana")
        for keys in (["Enter"], [*"1211111"], ["?"], ["Escape", "o"], ["Escape", "e"]):
            press(page, *keys)
            assert page.evaluate(fits) and page.evaluate(
                "[...document.querySelectorAll('dialog[open], #texts, #asked')].every(node => node.scrollWidth <= "
                "node.clientWidth)"
            ), keys
        assert page.locator(".question").evaluate_all(
            "nodes => nodes.every(node => node.scrollWidth <= node.clientWidth + 1)"
        )


def test_a_browser_that_keeps_nothing_says_so(desk, tmp_path):
    one = desk()
    one.context.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    )
    page = one.sit(written(tmp_path, compare_kit(2)[0]), "Ana")
    assert "export before you close" in status(page).lower()
    press(page, "1")
    assert "Not kept by this browser" in page.inner_text("#kept")
    _, found = export(page, "e", "Tab", "Enter")
    assert len(found["answers"]) == 1


def test_two_windows_of_one_annotator_do_not_overwrite_each_other(desk, tmp_path):
    kit, _ = compare_kit(3)
    path, one = written(tmp_path, kit), desk()
    first = one.sit(path, "Ana")
    second = one.sit(path)
    assert second.inner_text("#count").endswith("Ana")
    press(first, "1", "1", "ArrowRight")
    second.locator("#status", has_text="another window").wait_for()
    press(second, "ArrowRight", "ArrowRight", "2")
    first.locator("#status", has_text="another window").wait_for()
    press(first, "0")
    _, found = export(first, "e", "Tab", "Enter")
    assert [found["answers"][item["item_id"]] for item in kit["items"]] == [
        {"empathy": 1, "relevance": 1},
        {"empathy": 0},
        {"empathy": 2},
    ]


def test_spoilt_storage_does_not_stop_the_page(desk, tmp_path):
    kit, _ = compare_kit(2)
    path, one = written(tmp_path, kit), desk()
    page, spoil = (
        one.sit(path, "Ana"),
        "([key, value]) => [localStorage, sessionStorage].forEach((place) => place.setItem(key, value))",
    )
    for spoilt in (
        "{",
        "null",
        "[]",
        json.dumps({"document": {"format": "else"}}),
        json.dumps({"document": 3, "place": {"item": 99}}),
    ):
        page.click("#leave")  # or the page would keep what it has when it is left
        page.evaluate(spoil, [f"psycopref/answers/{kit['kit_id']}/Ana", spoilt])
        page.reload()
        assert page.is_visible("#start")
        page.keyboard.type("Ana")
        press(page, "Enter")
        assert page.inner_text("#where") == "Item 1 of 2"
    whole = {
        "format": "psycopref-annotations",
        "version": 1,
        "kit_id": kit["kit_id"],
        "annotator": "Ana",
        "started": "",
        "saved": "",
        "answers": {kit["items"][0]["item_id"]: {"empathy": 2}},
    }
    for place in ({"item": 99, "question": -3}, {"item": "x"}, None):
        page.click("#leave")
        page.evaluate(
            spoil, [f"psycopref/answers/{kit['kit_id']}/Ana", json.dumps({"document": whole, "place": place})]
        )
        page.reload()
        assert (
            page.inner_text("#count") == "0 of 2 finished · Ana"
            and page.inner_text("#where") == f"Item {2 if place and place['item'] == 99 else 1} of 2"
        )
