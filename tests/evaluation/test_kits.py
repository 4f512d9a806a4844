"""Kits are blind, balanced and stable, and whatever a client says stays text in each of their forms."""

import csv
import io
import json
import re
from xml.etree import ElementTree

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.evaluation import kits as room
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.settings import AgreementSettings
from psycopref.evaluation.kits import (
    SIDES,
    data_block,
    draw_answer_pairs,
    draw_answers,
    draw_evenly,
    draw_label_pairs,
    kit_csv,
    kit_html,
    kit_table,
    label_studio_config,
    label_studio_tasks,
    make_kit,
    allocate_proportionally,
    run_kits,
    safe_cell,
    side_orders,
    write_kits,
)  # fmt: skip
from psycopref.core.prompts import BATTLE_KEYS, prompt_text

FORMULA = "=+-@＝＋－＠"
quick = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def rows_of(count, settings_=("free", "length"), name="dpo"):
    """Rows as a draw returns them; each text names its side, and nothing but the texts does."""
    return pd.DataFrame([{"speech_id": f"psycho8k-{i}", "setting": settings_[i % len(settings_)], "stratum": "Youth", "client_speech": f"I lost {i} nights.",
                          "name_a": name, "response_a": f"Own {i}.", "name_b": "reference", "response_b": f"Other {i}."} for i in range(count)], columns=SIDES)  # fmt: skip


def run_of(count):
    """Pairs, answers and speeches of a small made run."""
    ids = [f"counsel-chat-{i}" for i in range(count)]
    speeches = pd.DataFrame(
        {
            "speech_id": ids,
            "speech": [f"Speech {i}." for i in range(count)],
            "coarse_topic": [("Youth", "Safety", "Life")[i % 3] for i in range(count)],
        }
    )
    answers = pd.DataFrame(
        [
            {"speech_id": s, "policy": p, "setting": k, "response": f"{p}/{k}/{s}"}
            for s in ids
            for p, k in (("dpo", "free"), ("dpo", "length"), ("reference", "free"))
        ]
    )
    pairs = pd.DataFrame([{"ID": s, "prefID": 2 * i + j, "question": f" Speech {i}.", "chosen": f"better {i} {j}", "rejected": f"worse {i} {j}", "chosen_model": "m1", "rejected_model": "m2",
                           **{f"chosen_{key}_rating": 5 if j else 4 for key in PRINCIPLE_KEYS}, **{f"rejected_{key}_rating": 3 for key in PRINCIPLE_KEYS}}
                          for i, s in enumerate(ids) for j in range(2)])  # fmt: skip
    return pairs, answers, speeches


@quick
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=8),
    st.integers(1, 200),
)
def test_places_are_proportional(sizes, n):
    given_, total = allocate_proportionally(sizes, n), sum(sizes.values())
    assert sum(given_.values()) == min(n, total) and all(given_[name] <= sizes[name] for name in sizes)
    if n < total:
        assert all(abs(given_[name] - n * sizes[name] / total) < 1 for name in sizes)
    assert allocate_proportionally(dict(reversed(sizes.items())), n) == given_


@settings(quick, max_examples=12)
@given(st.permutations(range(24)), st.integers(0, 5))
def test_shuffled_rows_give_the_same_draw_and_the_same_kit(order, seed):
    pairs, answers, speeches = run_of(12)
    mixed = pairs.iloc[order].reset_index(drop=True)
    assert draw_label_pairs(mixed, 7, seed, speeches).equals(draw_label_pairs(pairs, 7, seed, speeches))
    assert draw_label_pairs(mixed, 7, seed).equals(draw_label_pairs(pairs, 7, seed))
    assert draw_answer_pairs(
        answers.iloc[[*order, *range(24, 36)]], speeches.sample(frac=1, random_state=seed), "dpo", "length", 5, seed
    ).equals(draw_answer_pairs(answers, speeches, "dpo", "length", 5, seed))
    rows = rows_of(24)
    kit, key = make_kit(rows, "compare", "Title", seed)
    again, same = make_kit(rows.iloc[order], "compare", "Title", seed)
    assert again == kit and same.equals(key)


def test_draws_follow_the_seed_and_the_purpose():
    rows = rows_of(40)
    first = draw_evenly(rows, 10, 0, "a")
    assert (
        set(first.speech_id)
        != set(draw_evenly(rows, 10, 1, "a").speech_id)
        != set(draw_evenly(rows, 10, 0, "b").speech_id)
    )
    assert draw_evenly(rows, 99, 0, "a").speech_id.nunique() == 40, "all of them where more are asked"


def test_a_speech_is_drawn_once_and_taken_speeches_come_last():
    pairs, answers, speeches = run_of(30)
    labels = draw_label_pairs(pairs, 20, 0)
    assert labels.speech_id.is_unique
    free = draw_answer_pairs(answers, speeches, "dpo", "free", 12, 0)
    length = draw_answer_pairs(answers, speeches, "dpo", "length", 12, 0, later=free.speech_id)
    assert (
        not set(free.speech_id) & set(length.speech_id)
        and free.stratum.value_counts().eq(4).all()
        and length.stratum.value_counts().eq(4).all()
    )
    assert len(draw_answer_pairs(answers, speeches, "dpo", "length", 25, 0, later=free.speech_id)) == 25, (
        "they come last, not never"
    )


def test_pairs_of_a_speech_have_the_same_chance():
    pairs, *_ = run_of(60)
    second = sum(draw_label_pairs(pairs, 60, seed).response_a.str.endswith(" 1").sum() for seed in range(10))
    assert 240 < second < 360


def test_strata_are_topics_where_known_and_gaps_elsewhere():
    pairs, _, speeches = run_of(30)
    assert set(draw_label_pairs(pairs, 12, 0).stratum) == {"gap under 1.5", "gap of 2 or more"}
    assert draw_label_pairs(pairs, 12, 0, speeches).stratum.value_counts().to_dict() == {
        "Youth": 4,
        "Safety": 4,
        "Life": 4,
    }
    assert "unknown topic" in set(draw_label_pairs(pairs, 30, 0, speeches.head(5)).stratum)
    assert [room.gap_stratum(gap) for gap in (7, 10, 11, 13, 14, 28)] == ["gap under 1.5"] * 2 + [
        "gap 1.5 to 2"
    ] * 2 + ["gap of 2 or more"] * 2


@quick
@given(st.integers(1, 40), st.integers(0, 30))
def test_sides_are_balanced_in_each_setting(count, seed):
    _, key = make_kit(rows_of(count), "compare", "Title", seed)
    for _, part in key.groupby("setting"):
        assert abs((part["first"] == "dpo").sum() - (part["first"] == "reference").sum()) <= 1


def test_the_odd_item_goes_to_either_side_and_the_order_tells_nothing():
    firsts = [make_kit(rows_of(1), "compare", "Title", seed)[1]["first"][0] for seed in range(40)]
    assert 8 < firsts.count("dpo") < 32
    early = sum(
        (make_kit(rows_of(20, ("free",)), "compare", "Title", seed)[1]["first"].head(10) == "dpo").sum()
        for seed in range(40)
    )
    assert 160 < early < 240, "the first half of a kit does not lean to one side"
    assert len(side_orders(rows_of(3).assign(_lot=["a", "b", "c"]))) == 3


@quick
@given(st.integers(1, 25), st.integers(0, 9))
def test_the_key_tells_what_is_shown(count, seed):
    rows = rows_of(count)
    kit, key = make_kit(rows, "compare", "Title", seed)
    assert (
        key.item_id.tolist() == [item["item_id"] for item in kit["items"]]
        and key.item_id.is_unique
        and set(key.kit) == {kit["kit_id"]}
    )
    assert sorted(zip(key.speech_id, key.setting)) == sorted(zip(rows.speech_id, rows.setting))
    for item, row in zip(kit["items"], key.itertuples()):
        number = row.speech_id.split("-")[1]
        words = {"dpo": f"Own {number}.", "reference": f"Other {number}."}
        assert (
            item["responses"] == [words[row.first], words[row.second]]
            and item["client_speech"] == f"I lost {number} nights."
        )


def test_nothing_public_tells_sides():
    pairs, answers, speeches = run_of(30)
    for kit, key in run_kits(
        pairs, answers, speeches, "dpo", AgreementSettings(label_pairs=9, battle_pairs=6, scored=6), seed=0
    ).values():
        assert set(kit) == {"format", "version", "kit_id", "title", "task", "principles", "items"} and all(
            set(item) == {"item_id", "task", "client_speech", "responses"} for item in kit["items"]
        )
        bare = json.dumps([kit["title"], [{**item, "responses": [], "client_speech": ""} for item in kit["items"]]])
        assert not re.search("dpo|reference|chosen|rejected|counsel|free|length|m1|m2", bare)
        assert not set(key.speech_id) & {
            word for item in kit["items"] for word in item.values() if isinstance(word, str)
        }


def test_white_space_at_the_edges_does_not_mark_a_side():
    kit, _ = make_kit(rows_of(4).assign(response_a=lambda frame: " " + frame.response_a + "\n"), "compare", "Title", 0)
    assert all(text == text.strip() for item in kit["items"] for text in [*item["responses"], item["client_speech"]])


def test_kits_and_items_have_names_of_their_own():
    one, two = make_kit(rows_of(5), "compare", "First", 0), make_kit(rows_of(5), "compare", "Second", 0)
    assert not set(one[1].item_id) & set(two[1].item_id) and one[0]["kit_id"] != two[0]["kit_id"]
    assert make_kit(rows_of(5).assign(response_b="Else."), "compare", "First", 0)[0]["kit_id"] != one[0]["kit_id"]


def test_no_spreadsheet_takes_an_id_for_a_number():
    for seed in range(20):
        kit, _ = make_kit(rows_of(30), "compare", "T", seed)
        assert all(
            re.fullmatch("[ik][0-9a-f]{11,15}", name)
            for name in [kit["kit_id"], *(item["item_id"] for item in kit["items"])]
        )


def test_other_principles_are_another_kit(tmp_path, monkeypatch):
    before = make_kit(rows_of(2), "compare", "T", 0)[0]
    (tmp_path / "principles.json").write_text(prompt_text("principles.json").replace("Empathy", "Warmth"))
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    after = make_kit(rows_of(2), "compare", "T", 0)[0]
    assert after["principles"][0]["name"].startswith("Warmth") and after["kit_id"] != before["kit_id"]


def test_scores_show_one_response():
    _, answers, speeches = run_of(12)
    kit, key = make_kit(draw_answers(answers, speeches, "dpo", "length", 5, 0), "score", "One", 0)
    assert all(
        item["task"] == "score" and len(item["responses"]) == 1 and item["responses"][0].startswith("dpo/length/")
        for item in kit["items"]
    )
    assert set(key["first"]) == {"dpo"} and set(key.second) == {""}


def test_the_three_kits_of_a_run():
    pairs, answers, speeches = run_of(60)
    numbers = AgreementSettings(label_pairs=20, battle_pairs=10, scored=8)
    kits = run_kits(pairs, answers, speeches, "dpo", numbers, seed=3)
    table = kit_table(kits, numbers)
    assert table[["kit", "setting", "items"]].values.tolist() == [
        ["labels", "labels", 20],
        ["answers", "free", 10],
        ["answers", "length", 10],
        ["scores", "free", 8],
        ["scores", "length", 8],
    ]
    assert table.iloc[:3, -1].tolist() == [50.0] * 3 and table.iloc[3:, -1].isna().all()
    assert (
        kits["answers"][1].speech_id.is_unique
        and kits["answers"][1].setting.ne(kits["answers"][1].setting.shift()).sum() > 3
    ), "settings are mixed"


def test_a_run_with_too_few_speeches_says_how_many_it_has():
    pairs, answers, speeches = run_of(6)
    numbers = AgreementSettings(label_pairs=20, battle_pairs=4, scored=8)
    kits = run_kits(pairs, answers, speeches, "dpo", numbers, seed=3)
    table = kit_table(kits, numbers)
    assert table[["kit", "setting", "asked", "items"]].values.tolist() == [
        ["labels", "labels", 20, 6],
        ["answers", "free", 4, 4],
        ["answers", "length", 4, 4],
        ["scores", "free", 8, 6],
        ["scores", "length", 8, 6],
    ]
    assert dict(zip(table.kit, table.kit_id)) == {name: kit["kit_id"] for name, (kit, _) in kits.items()}


def test_what_cannot_be_drawn_is_refused_in_one_line():
    pairs, answers, speeches = run_of(6)
    cases = [(lambda: draw_answers(answers, speeches, "ppo", "free", 2, 0), "'ppo'"), (lambda: draw_answer_pairs(answers[answers.policy == "dpo"], speeches, "dpo", "free", 2, 0), "'reference'"),
             (lambda: draw_answers(answers, speeches.head(2), "dpo", "free", 2, 0), "not among the speeches"), (lambda: draw_label_pairs(pairs.head(0), 2, 0), "nothing to draw"),
             (lambda: draw_label_pairs(pairs, 0, 0), "0 items"), (lambda: make_kit(rows_of(3), "rank", "T", 0), "'rank'"), (lambda: make_kit(rows_of(0), "compare", "T", 0), "no rows"),
             (lambda: make_kit(rows_of(3).drop(columns="setting"), "compare", "T", 0), "setting"), (lambda: make_kit(rows_of(3).assign(name_b=""), "compare", "T", 0), "needs two sides"),
             (lambda: make_kit(rows_of(3).assign(response_b=float("nan")), "compare", "T", 0), "response_b")]  # fmt: skip
    for call, word in cases:
        assert word in one_line(call)


@quick
@given(st.text(), st.text())
def test_no_text_breaks_out_of_the_data_block(speech, title):
    value = {
        "title": title,
        "items": [{"client_speech": speech}, {"client_speech": f"</script><!--<script>{speech}\u2028"}],
    }
    block = data_block(value)
    assert json.loads(block) == value and not set("<>&\u2028\u2029") & set(block)


def test_the_page_is_whole_and_names_no_other_place():
    kit, _ = make_kit(
        rows_of(3).assign(client_speech="</script><script>alert(1)</script> __POLICY__ __CONTACT__ \\1 \\g<0>"),
        "compare",
        "Title",
        0,
    )
    page = kit_html(kit, contact='"><script>alert(2)</script>')
    assert page.count("<script") == 2 == page.count("</script") and "alert(1)" in page
    assert json.loads(re.search(r'id="kit">(.*?)</script>', page, re.DOTALL)[1]) == kit, (
        "slots inside a text are left alone"
    )
    assert not re.search(r"https?:|//www|@import|url\(|\bsrc=|unsafe|\beval\(|innerHTML|document\.write", page)
    assert 'content="&quot;&gt;&lt;script&gt;' in page and re.search(
        r"default-src 'none'; script-src 'sha256-[\w+/=]{44}'; style-src 'sha256-[\w+/=]{44}'", page
    )


def test_label_studio_asks_what_the_page_asks():
    for task, tag, keys in (("compare", "Choices", BATTLE_KEYS), ("score", "Rating", PRINCIPLE_KEYS)):
        rows = rows_of(4) if task == "compare" else rows_of(4).assign(name_b="", response_b="")
        kit, _ = make_kit(rows, task, 'A "title" <with> & signs', 0)
        view, tasks = ElementTree.fromstring(label_studio_config(kit)), label_studio_tasks(kit)
        assert view.tag == "View" and view.find("Header").get("value") == kit["title"]
        assert [node.get("name") for node in view.iter(tag)] == list(keys) and all(
            node.get("required") == "true" for node in view.iter(tag)
        )
        texts = {node.get("name"): node.get("value") for node in view.iter("Text")}
        assert {node.get("toName") for node in view.iter() if node.get("toName")} <= set(texts)
        assert all(
            set(t) == {"data"} and set(t["data"]) == {"kit_id", "item_id", *(value[1:] for value in texts.values())}
            for t in tasks
        )
        assert [t["data"]["response_1"] for t in tasks] == [item["responses"][0] for item in kit["items"]]
    choices = {
        node.get("name"): [c.get("alias") for c in node]
        for node in ElementTree.fromstring(label_studio_config(make_kit(rows_of(2), "compare", "T", 0)[0])).iter(
            "Choices"
        )
    }
    assert choices == {**dict.fromkeys(PRINCIPLE_KEYS, ["1", "2", "0"]), "overall": ["1", "2"]}


risky = st.text(st.sampled_from(list(FORMULA + " \t\n\r;,\"'ab1()|!") + ["\u00a0", "\x00", "😀"]), max_size=30)


@quick
@given(risky)
def test_no_cell_of_a_sheet_is_a_formula(text):
    cell = safe_cell(text)
    assert cell.lstrip(' \t\n\r"')[:1] not in tuple(FORMULA) and "\x00" not in cell
    for piece in re.split("[\n;\t,]", cell):
        assert piece.lstrip(' "')[:1] not in tuple(FORMULA), "also where a spreadsheet splits elsewhere"
    assert re.sub(r"[\s'\x00-\x20]", "", cell) == re.sub(r"[\s'\x00-\x20]", "", text), (
        "nothing but marks and blanks is changed"
    )


@quick
@given(st.lists(risky, min_size=1, max_size=4))
def test_a_sheet_reads_back_item_by_item(texts):
    rows = pd.concat([rows_of(1).assign(client_speech=text, speech_id=str(i)) for i, text in enumerate(texts)])
    kit, _ = make_kit(rows, "compare", "T", 0)
    read = list(csv.DictReader(io.StringIO(kit_csv(kit), newline="")))
    assert [row["item_id"] for row in read] == [item["item_id"] for item in kit["items"]] and {
        row["kit_id"] for row in read
    } == {kit["kit_id"]}
    assert [row["client_speech"] for row in read] == [safe_cell(item["client_speech"]) for item in kit["items"]]
    assert all(row[key] == "" for row in read for key in (*BATTLE_KEYS, "note"))
    assert list(pd.read_csv(io.StringIO(kit_csv(kit)))) == [
        "kit_id",
        "item_id",
        "client_speech",
        "response_1",
        "response_2",
        *BATTLE_KEYS,
        "note",
    ]


def test_a_folder_holds_the_kit_and_not_the_key(tmp_path):
    kit, key = make_kit(rows_of(6).assign(client_speech="“Quoted” — naïve, 😀"), "compare", "Two responses", 0)
    paths = write_kits(tmp_path / "a", kit, contact="Dr. M, m@example.org")
    assert (
        {path.name for path in paths}
        == {path.name for path in (tmp_path / "a").iterdir()}
        == {"kit.json", "kit.html", "kit.csv", "label_studio_tasks.json", "label_studio_config.xml", "README.txt"}
    )
    assert json.loads((tmp_path / "a" / "kit.json").read_text(encoding="utf-8")) == kit
    assert (tmp_path / "a" / "kit.csv").read_bytes().startswith(b'\xef\xbb\xbf"kit_id"') and "“Quoted”" in pd.read_csv(
        tmp_path / "a" / "kit.csv"
    ).client_speech[0]
    handed_out = b" ".join(path.read_bytes() for path in paths)
    assert b"psycho8k" not in handed_out and b"reference" not in handed_out.replace(
        b"Specific references", b""
    ).replace(b"preference", b"")
    readme = (tmp_path / "a" / "README.txt").read_text(encoding="utf-8")
    assert all(
        word in readme
        for word in (
            "machines",
            "distressing",
            "Dr. M, m@example.org",
            kit["kit_id"],
            "stay on this computer",
            "6 items",
        )
    )
    assert all(
        word in readme
        for word in ("needs a note and no answers", "is refused", "safe for long", 'column "note"', "press Skip")
    )
    again = write_kits(tmp_path / "b", kit, contact="Dr. M, m@example.org")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths], (
        "the same kit gives the same bytes"
    )
