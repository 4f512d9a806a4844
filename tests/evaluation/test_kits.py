"""Kits are blind, balanced and stable, and whatever a client says stays text in each of their forms."""

import csv
import io
import itertools
import json
import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.principles import principle_keys, principles_file, use_principles
from psycopref.core.prompts import battle_keys
from psycopref.core.settings import AgreementSettings
from psycopref.evaluation import kits
from psycopref.evaluation.kits import SIDES, draw_answers, draw_evenly, draw_label_pairs, make_kit
from psycopref.evaluation.kits import kit_csv, label_studio_config, run_kits, safe_cell, write_kits

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

FORMULA = "=+-@＝＋－＠"
quick = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def rows_of(count, settings_=("free", "length"), task="compare"):
    """Rows as a draw returns them; each text names its side, and nothing but the texts does."""
    rows = []
    for i, setting in zip(range(count), itertools.cycle(settings_)):
        other = ("reference", f"Other {i}.") if task == "compare" else ("", "")
        rows.append((f"psycho8k-{i}", setting, "Youth", f"I lost {i} nights.", "dpo", f"Own {i}.", *other))
    return pd.DataFrame(rows, columns=SIDES)


def run_of(count):
    """Pairs, two of each speech, answers and speeches of a small made run."""
    ids = [f"counsel-chat-{i}" for i in range(count)]
    speeches = pd.DataFrame({"speech_id": ids, "speech": [f"Speech {i}." for i in range(count)]})
    speeches["coarse_topic"] = [("Youth", "Safety", "Life")[i % 3] for i in range(count)]
    sides = [("dpo", "free"), ("dpo", "length"), ("reference", "free")]
    answers = pd.DataFrame([(s, *side) for s in ids for side in sides], columns=["speech_id", "policy", "setting"])
    answers["response"] = answers.policy + "/" + answers.setting + "/" + answers.speech_id
    texts = [(s, f" Speech {i}.", f"better {i} {j}", f"worse {i} {j}") for i, s in enumerate(ids) for j in (0, 1)]
    return pd.DataFrame(texts, columns=["ID", "question", "chosen", "rejected"]), answers, speeches


PAIRS, ANSWERS, SPEECHES = run_of(30)


# draws


@quick
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=8),
    st.integers(1, 200),
)
def test_places_are_proportional(sizes, n):
    found, total = kits.allocate_proportionally(sizes, n), sum(sizes.values())
    assert sum(found.values()) == min(n, total) and all(found[name] <= sizes[name] for name in sizes)
    if n < total:
        assert all(abs(found[name] - n * sizes[name] / total) < 1 for name in sizes)
    assert kits.allocate_proportionally(dict(reversed(sizes.items())), n) == found


@settings(quick, max_examples=12)
@given(st.permutations(range(24)), st.integers(0, 5))
def test_shuffled_rows_give_the_same_draw_and_the_same_kit(order, seed):
    own, same = (draw_label_pairs(pairs, SPEECHES, 7, seed) for pairs in (PAIRS.iloc[:24], PAIRS.iloc[order]))
    assert same.equals(own)
    mixed = [frame.sample(frac=1, random_state=seed) for frame in (ANSWERS, SPEECHES)]
    drawn = [draw_answers(*given, "dpo", "length", 5, seed) for given in ((ANSWERS, SPEECHES), mixed)]
    assert drawn[0].equals(drawn[1])
    rows = rows_of(24)
    (kit, key), (again, same) = (make_kit(own, "compare", "Title", seed) for own in (rows, rows.iloc[order]))
    assert again == kit and same.equals(key)


def test_draws_follow_the_seed_and_the_purpose():
    rows = rows_of(40)
    drawn = [set(draw_evenly(rows, 10, *how).speech_id) for how in ((0, "a"), (1, "a"), (0, "b"))]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))
    assert draw_evenly(rows, 99, 0, "a").speech_id.nunique() == 40, "all of them where more are asked"


def test_a_speech_is_drawn_once_and_taken_speeches_come_last():
    free = draw_answers(ANSWERS, SPEECHES, "dpo", "free", 12, 0)
    length, more = (draw_answers(ANSWERS, SPEECHES, "dpo", "length", n, 0, later=free.speech_id) for n in (12, 25))
    assert not set(free.speech_id) & set(length.speech_id) and more.speech_id.nunique() == 25
    assert all(own.stratum.value_counts().eq(4).all() for own in (free, length))
    assert "unknown topic" in set(draw_label_pairs(PAIRS, SPEECHES.head(5), 30, 0).stratum)
    pairs, _, speeches = run_of(60)
    drawn = [draw_label_pairs(pairs, speeches, 60, seed) for seed in range(10)]
    assert all(own.speech_id.is_unique for own in drawn)
    second = sum(own.response_a.str.endswith(" 1").sum() for own in drawn)
    assert 240 < second < 360, "pairs of a speech have the same chance"


@pytest.mark.parametrize("speeches, found", [(60, [20, 10, 10, 8, 8]), (6, [6, 6, 6, 6, 6])])
def test_the_three_kits_of_a_run_count_what_they_have_and_show_their_sides(speeches, found):
    numbers = AgreementSettings(label_pairs=20, battle_pairs=10, scored=8)
    made = run_kits(*run_of(speeches), "dpo", numbers, seed=3)
    table = kits.kit_table(made, numbers)
    assert table.kit.tolist() == ["labels", "answers", "answers", "scores", "scores"]
    assert table.setting.tolist() == ["labels", "free", "length", "free", "length"]
    assert table.asked.tolist() == [20, 10, 10, 8, 8] and table["items"].tolist() == found
    assert dict(zip(table.kit, table.kit_id)) == {name: kit["kit_id"] for name, (kit, _) in made.items()}
    assert table.iloc[:3, -1].tolist() == [50.0] * 3 and table.iloc[3:, -1].isna().all()
    key = made["answers"][1]
    assert key.setting.ne(key.setting.shift()).sum() > 3, "settings are mixed"
    kit, key = made["scores"]
    assert set(key["first"]) == {"dpo"} and set(key.second) == {""}
    assert all(len(item["responses"]) == 1 and item["responses"][0].startswith("dpo/") for item in kit["items"])


# blinding


@quick
@given(st.integers(1, 40), st.integers(0, 30))
def test_sides_are_balanced_and_the_key_says_what_is_shown(count, seed):
    rows = rows_of(count)
    kit, key = make_kit(rows.assign(response_a=" " + rows.response_a + "\n"), "compare", "Title", seed)
    for _, part in key.groupby("setting"):
        assert abs((part["first"] == "dpo").sum() - (part["first"] == "reference").sum()) <= 1
    assert key.item_id.tolist() == [item["item_id"] for item in kit["items"]]
    assert key.item_id.is_unique and set(key.kit) == {kit["kit_id"]}
    assert sorted(zip(key.speech_id, key.setting)) == sorted(zip(rows.speech_id, rows.setting))
    for item, row in zip(kit["items"], key.itertuples()):
        number = row.speech_id.split("-")[1]
        words = {"dpo": f"Own {number}.", "reference": f"Other {number}."}
        assert item["responses"] == [words[row.first], words[row.second]], "blanks at the edges do not mark a side"
        assert item["client_speech"] == f"I lost {number} nights."


def test_the_odd_item_goes_to_either_side_and_the_order_tells_nothing():
    keys = [make_kit(rows_of(1), "compare", "Title", seed)[1] for seed in range(40)]
    assert 8 < sum(key["first"][0] == "dpo" for key in keys) < 32
    keys = [make_kit(rows_of(20, ("free",)), "compare", "Title", seed)[1] for seed in range(40)]
    early = sum((key["first"].head(10) == "dpo").sum() for key in keys)
    assert 160 < early < 240, "the first half of a kit does not lean to one side"


def test_nothing_public_tells_sides():
    numbers = AgreementSettings(label_pairs=9, battle_pairs=6, scored=6)
    for kit, key in run_kits(PAIRS, ANSWERS, SPEECHES, "dpo", numbers, seed=0).values():
        assert set(kit) == {"format", "version", "kit_id", "title", "task", "principles", "items"}
        assert all(set(item) == {"item_id", "task", "client_speech", "responses"} for item in kit["items"])
        bare = json.dumps([kit["title"], [{**item, "responses": [], "client_speech": ""} for item in kit["items"]]])
        assert not re.search("dpo|reference|chosen|rejected|counsel|free|length|m1|m2", bare)
        assert not set(key.speech_id) & {word for item in kit["items"] for word in map(str, item.values())}


def test_kits_and_items_have_names_of_their_own(tmp_path):
    rows = rows_of(30)
    one, two = make_kit(rows, "compare", "First", 0), make_kit(rows, "compare", "Second", 0)
    assert not set(one[1].item_id) & set(two[1].item_id)
    other = make_kit(rows.assign(response_b="Else."), "compare", "First", 0)[0]
    (tmp_path / "own.yaml").write_text(principles_file("counselling").read_text().replace("Empathy", "Warmth"))
    use_principles(str(tmp_path / "own.yaml"))
    after = make_kit(rows, "compare", "First", 0)[0]
    ids = {kit["kit_id"] for kit in (one[0], two[0], other, after)}
    assert after["principles"][0]["name"].startswith("Warmth") and len(ids) == 4
    for name in (*ids, *one[1].item_id, *two[1].item_id):
        assert re.fullmatch("[ik][0-9a-f]{11,15}", name), "no spreadsheet takes an id for a number"


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: draw_answers(ANSWERS, SPEECHES, "ppo", "free", 2, 0), "'ppo'"),
        (lambda: draw_answers(ANSWERS[ANSWERS.policy == "dpo"], SPEECHES, "dpo", "free", 2, 0), "'reference'"),
        (lambda: draw_label_pairs(PAIRS, SPEECHES, 0, 0), "0 items"),
        (lambda: make_kit(rows_of(3), "rank", "T", 0), "'rank'"),
        (lambda: make_kit(rows_of(0), "compare", "T", 0), "no rows"),
        (lambda: draw_evenly(rows_of(3).head(0), 3, 0, "labels"), "nothing to draw"),
        (lambda: make_kit(rows_of(3).drop(columns="setting"), "compare", "T", 0), "setting missing"),
        (lambda: make_kit(rows_of(3).assign(name_b=""), "compare", "T", 0), "needs two sides"),
        (lambda: make_kit(rows_of(3), "score", "T", 0), "needs two sides"),
        (lambda: make_kit(rows_of(3).assign(response_b=float("nan")), "compare", "T", 0), "response_b"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(make, word):
    assert word in one_line(make)


# forms


def test_the_page_is_whole_and_names_no_other_place():
    hostile = "</script><!--<script>alert(1)</script> {{ contact }} {% if %} \u2028 \\1 \\g<0>"
    kit, _ = make_kit(rows_of(3).assign(client_speech=hostile), "compare", hostile, 0)
    page = kits.kit_html(kit, contact='"><script>alert(2)</script>')
    assert page.count("<script") == 2 == page.count("</script") and "alert(1)" in page
    block = re.search(r'id="kit">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(block) == kit, "slots inside a text are left alone"
    assert not set("<>&\u2028\u2029") & set(block), "no text ends the block"
    assert not re.search(r"https?:|//www|@import|url\(|\bsrc=|unsafe|\beval\(|innerHTML|document\.write", page)
    assert 'content="&#34;&gt;&lt;script&gt;' in page
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/=]{44}'; style-src 'sha256-[\w+/=]{44}'", page)


@pytest.mark.parametrize("task, tag, keys", [("compare", "Choices", BATTLE_KEYS), ("score", "Rating", PRINCIPLE_KEYS)])
def test_label_studio_asks_what_the_page_asks(task, tag, keys):
    kit, _ = make_kit(rows_of(4, task=task), task, 'A "title" <with> & signs', 0)
    view, tasks = ElementTree.fromstring(label_studio_config(kit)), kits.label_studio_tasks(kit)
    assert view.tag == "View" and view.find("Header").get("value") == kit["title"]
    asked = {node.get("name"): node for node in view.iter(tag)}
    assert list(asked) == list(keys) and all(node.get("required") == "true" for node in asked.values())
    texts = {node.get("name"): node.get("value") for node in view.iter("Text")}
    assert {node.get("toName") for node in view.iter() if node.get("toName")} <= set(texts)
    names = {"kit_id", "item_id", *(value[1:] for value in texts.values())}
    assert all(set(one) == {"data"} and set(one["data"]) == names for one in tasks)
    assert [one["data"]["response_1"] for one in tasks] == [item["responses"][0] for item in kit["items"]]
    if task == "compare":
        aliases = {name: [choice.get("alias") for choice in node] for name, node in asked.items()}
        assert aliases == {**dict.fromkeys(PRINCIPLE_KEYS, ["1", "2", "0"]), "overall": ["1", "2"]}


risky = st.text(st.sampled_from(list(FORMULA + " \t\n\r;,\"'ab1()|!") + ["\u00a0", "\x00", "😀"]), max_size=30)


@quick
@given(risky)
def test_no_cell_of_a_sheet_is_a_formula(text):
    cell = safe_cell(text)
    assert cell.lstrip(' \t\n\r"')[:1] not in tuple(FORMULA) and "\x00" not in cell
    for piece in re.split("[\n;\t,]", cell):
        assert piece.lstrip(' "')[:1] not in tuple(FORMULA), "also where a spreadsheet splits elsewhere"
    marks = r"[\s'\x00-\x20]"
    assert re.sub(marks, "", cell) == re.sub(marks, "", text), "nothing but marks and blanks is changed"


@quick
@given(st.lists(risky, min_size=1, max_size=4))
def test_a_sheet_reads_back_item_by_item(texts):
    rows = pd.concat([rows_of(1).assign(client_speech=text, speech_id=str(i)) for i, text in enumerate(texts)])
    kit, _ = make_kit(rows, "compare", "T", 0)
    read = list(csv.DictReader(io.StringIO(kit_csv(kit), newline="")))
    asked = [*BATTLE_KEYS, "note"]
    assert list(read[0]) == ["kit_id", "item_id", "client_speech", "response_1", "response_2", *asked]
    for row, item in zip(read, kit["items"], strict=True):
        assert (row["kit_id"], row["item_id"]) == (kit["kit_id"], item["item_id"])
        assert row["client_speech"] == safe_cell(item["client_speech"]) and not any(row[key] for key in asked)


def test_a_folder_holds_the_kit_and_not_the_key(tmp_path):
    kit, _ = make_kit(rows_of(6).assign(client_speech="“Quoted” — naïve, 😀"), "compare", "Two responses", 0)
    paths, again = (write_kits(tmp_path / name, kit, contact="Dr. M, m@example.org") for name in "ab")
    files = {path.name: path.read_bytes() for path in paths}
    names = "kit.json kit.html kit.csv label_studio_tasks.json label_studio_config.xml README.txt"
    assert set(files) == {path.name for path in (tmp_path / "a").iterdir()} == set(names.split())
    assert json.loads(files["kit.json"]) == kit and files["kit.csv"].startswith(b'\xef\xbb\xbf"kit_id"')
    assert "“Quoted”" in pd.read_csv(tmp_path / "a" / "kit.csv").client_speech[0]
    handed_out = b" ".join(files.values()).replace(b"Specific references", b"").replace(b"preference", b"")
    assert b"psycho8k" not in handed_out and b"reference" not in handed_out
    readme = files["README.txt"].decode()
    said = ["machines", "distressing", "Dr. M, m@example.org", kit["kit_id"], "stay on this computer", "6 items"]
    said += ["needs a note and no answers", "is refused", "safe for long", 'column "note"', "press Skip"]
    assert [word for word in said if word not in readme] == []
    assert [path.read_bytes() for path in again] == list(files.values()), "the same kit gives the same bytes"
