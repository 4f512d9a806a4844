"""Planted answers come back from all forms the right way round, and whatever is wrong with a file is named."""

import csv
import io
import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.principles import principle_keys
from psycopref.core.prompts import battle_keys
from psycopref.evaluation.annotations import ANNOTATION_COLUMNS, VALUES, annotation_files, simulate, unshuffle
from psycopref.evaluation.annotations import ITEM_LEFT_OUT, read_annotations
from psycopref.evaluation.kits import SIDES, task_questions, kit_csv, kit_html, label_studio_config, label_studio_tasks
from psycopref.evaluation.kits import make_kit

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

WORD = "lantern"
TABLES = {"csv": (",", "utf-8"), "semicolons": (";", "utf-8-sig"), "tabs": ("\t", "utf-8"), "utf-16": ("\t", "utf-16")}
TABLES["cp1252"] = (";", "cp1252")
FORMS = ("page", "studio", "minimal", *TABLES)
OPPOSITE = {"win": "loss", "loss": "win", "tie": "tie"}


def bounded(examples):
    return settings(deadline=None, derandomize=True, database=None, max_examples=examples)


def planted(n=12, task="compare", seed=0, texts=("A long evening.",)):
    "A kit in which one response of each pair holds the word; the truth from the side of the policy."
    chance, rows, truth = random.Random(seed), [], {}
    for i in range(n):
        won, speech_id, setting = chance.random() < 0.5, f"s{i // 2}", ("free", "length")[i % 2]
        sides = [f"{texts[i % len(texts)]} {i} {WORD}", f"Another, {i}."][:: 1 if won else -1]
        other = ("reference", sides[1]) if task == "compare" else ("", "")
        rows.append((speech_id, setting, "a", f'Speech {i};\n"quoted", é', "ours + DPO", sides[0], *other))
        truth[speech_id, setting] = "win" if won else "loss"
    return *make_kit(pd.DataFrame(rows, columns=SIDES), task, "A kit", seed), truth


def seeing(kit, turn=False):
    "Answer a kit by what stands in its items."
    warm = {item["item_id"]: (WORD in item["responses"][0]) != turn for item in kit["items"]}
    if kit["task"] == "score":
        return {item: dict.fromkeys(PRINCIPLE_KEYS, 5 if first else 2) for item, first in warm.items()}
    return {item: dict.fromkeys(BATTLE_KEYS, 1 if first else 2) for item, first in warm.items()}


def page(kit, answers, annotator="Ada"):
    document = {"format": "psycopref-annotations", "version": 1, "kit_id": kit["kit_id"], "annotator": annotator}
    return document | {"started": "", "saved": "", "answers": answers}


def studio(kit, answers, person=3):
    "What Label Studio exports after our configuration: the alias of a choice where it has one, a rating as a number."
    controls = {node.get("name"): node for node in ElementTree.fromstring(label_studio_config(kit)).iter()}
    tasks = []
    for number, task in enumerate(label_studio_tasks(kit), 100):
        result = []
        for key, value in answers.get(task["data"]["item_id"], {}).items():
            control = controls[key]
            words = {child.get("alias"): child.get("alias") or child.get("value") for child in control}
            said = {"Choices": {"choices": [words.get(str(value))]}, "Rating": {"rating": value}}
            said["TextArea"] = {"text": [value]}
            part = {"from_name": key, "to_name": control.get("toName"), "type": control.tag.lower()}
            result.append(part | {"value": said[control.tag], "origin": "manual"})
        done = {"id": number + 900, "completed_by": person, "result": result, "was_cancelled": False}
        tasks.append({"id": number, **task, "project": 1, "annotations": [done], "predictions": []})
    return tasks


def minimal(kit, answers, person=3):
    "The same as JSON-MIN."
    found = []
    for task in studio(kit, answers):
        values = {part["from_name"]: part["value"] for part in task["annotations"][0]["result"]}
        flat = {name: [value] if "rating" in value else [*value.values()][0][0] for name, value in values.items()}
        found.append({"id": task["id"], **task["data"], "annotator": person, "annotation_id": 7, **flat})
    return found


def table(kit, answers, delimiter=","):
    "The kit's own table, filled in and saved by a spreadsheet."
    lines = list(csv.DictReader(io.StringIO(kit_csv(kit), newline="")))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(line | answers.get(line["item_id"], {}) for line in lines)
    return text.getvalue()


def dumped(path, document):
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8", newline="")
    return path


def save(folder, form, kit, answers):
    "Write answers in a form; the path."
    if form not in TABLES:
        write = {"page": page, "studio": studio, "minimal": minimal}[form]
        return dumped(Path(folder) / f"{form}.json", write(kit, answers))
    delimiter, encoding = TABLES[form]
    path = Path(folder) / f"annotations_{kit['kit_id']}_Ada.{'tsv' if form == 'tabs' else 'csv'}"
    path.write_bytes(table(kit, answers, delimiter).encode(encoding, errors="replace"))
    return path


def read(path, kit, **how):
    return read_annotations([path], [kit], **how)


# the right answers, the right way round


@pytest.mark.parametrize("form", FORMS)
@bounded(8)
@given(st.data(), st.sampled_from(["compare", "score"]))
def test_any_answers_survive_any_form(tmp_path_factory, form, data, task):
    text = st.text(alphabet=st.characters(codec="cp1252", exclude_characters="\x00"), min_size=1, max_size=30)
    texts = data.draw(st.lists(text, min_size=1, max_size=3))
    kit, _, _ = planted(data.draw(st.integers(1, 6)), task, data.draw(st.integers(0, 5)), texts)
    asked, answers = [(item["item_id"], name) for item in kit["items"] for name in task_questions(task)], {}
    for item, name in asked:
        value = data.draw(st.sampled_from(VALUES[task]))
        answers.setdefault(item, {})[name] = value or int(name == "overall")  # overall has no third choice
    frame = read(save(tmp_path_factory.mktemp("any"), form, kit, answers), kit)
    assert set(frame.annotator) == {"3" if form in ("studio", "minimal") else "Ada"}
    found = frame.set_index(["item_id", "principle"]).value.to_dict()
    assert found == {(item, name): answers[item][name] for item, name in asked}


def test_planted_answers_come_back_the_right_way_round(tmp_path):
    kit, key, truth = planted()
    assert set(key["first"]) == {"ours + DPO", "reference"}
    for turn in (False, True):
        turned = unshuffle(read(save(tmp_path, "page", kit, seeing(kit, turn)), kit), key)
        found = [row.verdict == truth[row.speech_id, row.setting] for row in turned.itertuples()]
        assert found == [not turn] * 12 * 8
    kit, key, truth = planted(task="score")
    for row in unshuffle(read(save(tmp_path, "page", kit, seeing(kit)), kit), key).itertuples():
        assert row.rating == (5 if truth[row.speech_id, row.setting] == "win" else 2)


@bounded(30)
@given(st.integers(1, 12), st.integers(0, 20), st.data())
def test_swapping_sides_flips_every_verdict(n, seed, data):
    kit, key, _ = planted(n, seed=seed)
    values = data.draw(st.lists(st.sampled_from((0, 1, 2)), min_size=2 * n, max_size=2 * n))
    asked = [(item["item_id"], name) for item in kit["items"] for name in ("empathy", "overall")]
    rows = [("Ada", kit["kit_id"], *place, value) for place, value in zip(asked, values)]
    frame = pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS))
    turned = unshuffle(frame, key)
    swapped = unshuffle(frame, key.rename(columns={"first": "second", "second": "first"}))
    other = unshuffle(frame.assign(value=frame.value.map({0: 0, 1: 2, 2: 1})), key)
    assert swapped.verdict.tolist() == other.verdict.tolist() == turned.verdict.map(OPPOSITE).tolist()
    assert (turned.verdict == "tie").tolist() == (frame.value == 0).tolist()
    assert unshuffle(frame, key.sample(frac=1, random_state=seed)).equals(turned)


KIT, KEY, _ = planted()
ANSWERS = seeing(KIT)
FIRST, SECOND, *_ = ANSWERS


def test_what_a_spreadsheet_does_to_a_table_is_read(tmp_path):
    path = save(tmp_path, "csv", KIT, ANSWERS)
    before = read(path, KIT)
    head, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    with path.open("w", newline="", encoding="utf-8") as handle:  # sorted lines, and blank columns at the right
        csv.writer(handle).writerows([*line, "", ""] for line in [head, *sorted(lines, key=lambda line: line[3])])
    assert read(path, KIT).equals(before)
    again = path.rename(path.with_stem(f"{path.stem} (1)"))
    assert set(read(again, KIT).annotator) == {"Ada"}, "a second download"
    assert "annotations_" in one_line(lambda: read(again.rename(tmp_path / "kit.csv"), KIT))
    kit, _, _ = planted(2)
    answers = {item["item_id"]: dict.fromkeys(BATTLE_KEYS, text) for item, text in zip(kit["items"], ("1.0", " 2,0 "))}
    assert read(save(tmp_path, "semicolons", kit, answers), kit).value.tolist() == [1] * 8 + [2] * 8


# what is not answered


@pytest.mark.parametrize("form", ["page", "studio", "csv", "semicolons"])
def test_an_item_may_be_left_out_with_a_note_and_an_unfinished_file_says_which_items(tmp_path, form):
    fourth, seventh = (KIT["items"][place]["item_id"] for place in (3, 6))
    noted = read(save(tmp_path, form, KIT, ANSWERS | {fourth: {"note": "Too close; I stopped."}}), KIT)
    assert noted[noted.item_id == fourth][["principle", "note"]].values.tolist() == [
        [ITEM_LEFT_OUT, "Too close; I stopped."]
    ]
    answered = unshuffle(noted, KEY)
    assert len(answered) == 11 * 8 and fourth not in set(answered.item_id)
    half = {name: value for name, value in ANSWERS[seventh].items() if name != "safety"} | {"note": "later"}
    path = save(tmp_path, form, KIT, ANSWERS | {fourth: {}, seventh: half})
    message = one_line(lambda: read(path, KIT))
    assert all(part in message for part in (f"{path} (", "2 of 12 items are unfinished: 4, 7", "item 4 lacks"))


def test_a_task_may_be_skipped_in_label_studio_and_answered_later(tmp_path):
    tasks = studio(KIT, ANSWERS)
    skipped, missing = tasks[3]["annotations"], tasks.pop(2)
    assert "1 of 12 items are unfinished: 3" in one_line(lambda: read(dumped(tmp_path / "a.json", tasks), KIT))
    skipped[0]["was_cancelled"] = True
    for more, found in (([], 11), ([skipped[0] | {"was_cancelled": False}], 12)):
        tasks[2]["annotations"] = skipped + more
        assert len(unshuffle(read(dumped(tmp_path / "a.json", [*tasks, missing]), KIT), KEY)) == found * 8


@pytest.mark.parametrize("form", ["page", "studio", "minimal", "csv"])
def test_notes_and_times_are_kept_as_they_were_given(tmp_path, form):
    said, saved = "Both are cold,\nbut =2 is shorter.", "2026-11-30T10:00:00.000Z"
    path = save(tmp_path, form, KIT, ANSWERS | {FIRST: ANSWERS[FIRST] | {"note": said}})
    if form != "csv":
        found = json.loads(path.read_text())
        times = {"created_at": "2026-11-29T08:00:00Z", "updated_at": saved}
        for own in [found] if form == "page" else [one["annotations"][0] if form == "studio" else one for one in found]:
            own |= {"saved": saved} if form == "page" else times
        dumped(path, found)
    frame = read(path, KIT)
    assert frame.note[frame.item_id == FIRST].tolist() == [said] * 8 and frame.note[frame.item_id != FIRST].eq("").all()
    assert frame.time.eq("" if form == "csv" else saved).all()


def test_the_note_of_a_skipped_task_is_kept(tmp_path):
    tasks = studio(KIT, ANSWERS | {FIRST: {"note": "My brother."}})
    tasks[0]["annotations"][0]["was_cancelled"] = True
    frame = read(dumped(tmp_path / "a.json", tasks), KIT)
    assert frame.note[frame.principle == ITEM_LEFT_OUT].tolist() == ["My brother."]


def test_one_label_studio_file_holds_several_annotators(tmp_path):
    tasks, person = studio(KIT, ANSWERS), {"id": 5, "email": "ben@example.org"}
    for task, other in zip(tasks, studio(KIT, seeing(KIT, True), person)):
        task["annotations"] += other["annotations"]
    frame = unshuffle(read(dumped(tmp_path / "export.json", tasks), KIT), KEY)
    sides = {name: own.verdict.tolist() for name, own in frame.groupby("annotator")}
    assert list(sides) == ["3", "ben@example.org"] and sides["3"] != sides["ben@example.org"]


# what is wrong with a file

TWICE = studio(KIT, ANSWERS)
TWICE[1]["annotations"] *= 2


def paged(**changes):
    return page(KIT, ANSWERS | {SECOND: ANSWERS[SECOND] | changes})


FAULTS = {
    "other.json": (page(KIT, ANSWERS) | {"kit_id": "0123456789abcdef"}, "0123456789abcdef"),
    "unknown.json": (page(KIT, ANSWERS | {"f00": ANSWERS[FIRST]}), "f00"),
    "range.json": (paged(clarity=3), f"item 2 ({SECOND}) has clarity = '3', expected one of 1, 2, 0"),
    "text.json": (paged(clarity="left"), "clarity = 'left'"),
    "bool.json": (paged(clarity=True), "clarity = 'True'"),
    "list.json": (page(KIT, ANSWERS | {SECOND: [1, 2]}), SECOND),
    "nobody.json": (page(KIT, ANSWERS, " "), "annotator"),
    "twice.json": (json.dumps(page(KIT, ANSWERS)).replace(f'"{SECOND}"', f'"{FIRST}"'), f"'{FIRST}' stands twice"),
    "twice_studio.json": (TWICE, f"{SECOND} is answered more than once"),
    "twice.csv": (table(KIT, ANSWERS) + table(KIT, ANSWERS).split("\r\n", 1)[1], "more than once"),
    "foreign.json": ([{"id": 1, "data": {"text": "x"}, "annotations": []}], "item_id"),
    "none.json": ([task | {"annotations": None} for task in studio(KIT, {})], "no annotation"),
    "kit.json": (KIT, "format is 'psycopref-kit'"),
    "version.json": (page(KIT, ANSWERS) | {"version": 2}, "version is '2'"),
    "half.json": (json.dumps(page(KIT, ANSWERS))[:-20], "no whole JSON"),
    "null.json": ("null", "no annotation"),
    "empty.csv": ("", "kit_id"),
    "nameless.csv": (table(KIT, ANSWERS).replace("kit_id", "kit", 1), "kit_id"),
    "moved.csv": (f"kit_id,item_id,empathy\n{KIT['kit_id']},{FIRST},1,2\n", "line 2 has 4 of 3 cells"),
    "page.html": (kit_html(KIT), ".html"),
    "made.json": (simulate(KIT, 1, 0) | {"annotator": "Eve"}, "was simulated"),
    "made2.json": (page(KIT, ANSWERS, "Simulated 7"), "was simulated"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_in_one_line(tmp_path, name):
    content, said = FAULTS[name]
    message = one_line(lambda: read(dumped(tmp_path / name, content), KIT))
    assert said in message and name in message


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xff")
    assert "binary.json" in one_line(lambda: read(tmp_path / "binary.json", KIT))
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        assert name in one_line(lambda: annotation_files([str(tmp_path / name)]))


def test_a_run_takes_each_annotator_once(tmp_path, monkeypatch):
    scores, _, _ = planted(task="score")
    dumped(tmp_path / "a.json", page(KIT, ANSWERS))
    dumped(tmp_path / "deep" / "b.json", page(scores, seeing(scores), "ada "))
    dumped(tmp_path / "c.json", page(KIT, seeing(KIT, turn=True), "Ben"))
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")  # a path begins in the project's folder
    files = annotation_files([str(tmp_path), "a.json", "deep"])
    assert [path.name for path in files] == ["a.json", "c.json", "b.json"]
    frame = read_annotations(files, [KIT, scores])
    assert frame.groupby("annotator").kit_id.nunique().to_dict() == {"Ada": 2, "Ben": 1}
    again = dumped(tmp_path / "again.json", page(KIT, ANSWERS, " ADA"))
    message = one_line(lambda: read_annotations([*files, again], [KIT, scores]))
    assert "a.json" in message and "again.json" in message


@pytest.mark.parametrize("sides, said", [({"kit": "other"}, "not in the key"), ({"first": "x"}, "expected one side")])
def test_a_key_that_does_not_fit_is_refused(sides, said):
    frame = pd.DataFrame([("Ada", KIT["kit_id"], i, "overall", 1) for i in ANSWERS], columns=list(ANNOTATION_COLUMNS))
    assert said in one_line(lambda: unshuffle(frame, KEY.assign(second="y", **sides)))


def test_simulated_annotators_see_the_kit_alone_and_say_what_they_are(tmp_path):
    kit, key, _ = planted(4)
    one, other = simulate(kit, 1, 0), simulate(kit, 2, 0)
    assert one == simulate(kit, 1, 0) and one["answers"] != other["answers"] and one["simulated"]
    frame = unshuffle(read(dumped(tmp_path / "made.json", one), kit, simulated=True), key)
    assert set(frame.annotator) == {"simulated 1"}
    assert set(frame[frame.principle == "overall"].verdict) <= {"win", "loss"}
    assert simulate(kit | {"items": kit["items"][::-1]}, 1, 0)["answers"] == one["answers"]


# one person, one sheet

COPIES = {  # how a sheet comes twice -> what is said of it
    "copied": (lambda kit: page(kit, seeing(kit), "Ben"), "looks like a copy"),
    "its name in other code points": (lambda kit: page(kit, seeing(kit, turn=True), "Jose\u0301"), "in "),
    "blanks and capitals": (lambda kit: page(kit, seeing(kit, turn=True), " JOS\u00c9\u00a0 "), "in "),
    "nobody's": (lambda kit: page(kit, seeing(kit), "\u200b"), "no annotator"),
    "answered twice": (lambda kit: doubled(studio(kit, seeing(kit))), "answers a question twice"),
    "an old export": (
        lambda kit: [task | {"completions": [], "annotations": None} for task in studio(kit, {})],
        "before",
    ),
}


def doubled(tasks):
    result = tasks[0]["annotations"][0]["result"]
    result.append(result[0])
    return tasks


@pytest.mark.parametrize("name", COPIES)
def test_one_sheet_is_one_annotator_whatever_it_is_called(tmp_path, name):
    (kit, _, _), (make, said) = planted(), COPIES[name]
    files = [dumped(tmp_path / "Ada.json", page(kit, seeing(kit), "Jos\u00e9"))]
    files.append(dumped(tmp_path / "other.json", make(kit)))
    assert said in one_line(lambda: read_annotations(files, [kit]))


@pytest.mark.parametrize("name", ["Ben.xlsx", "Ben.CSV.gz", "sub/Ben.ods", "Ben.zip"])
def test_no_file_of_answers_is_passed_over(tmp_path, name):
    dumped(tmp_path / "Ada.json", "{}")
    assert annotation_files([str(tmp_path)]) == [tmp_path / "Ada.json"]
    dumped(tmp_path / "README.txt", "Thank you.")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert "may hold annotations" in one_line(lambda: annotation_files([str(tmp_path)]))
