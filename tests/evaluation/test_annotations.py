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

from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.prompts import BATTLE_KEYS
from psycopref.evaluation.annotations import (
    ANNOTATION_COLUMNS,
    VALUES,
    annotation_files,
    completeness,
    gather_annotations,
    left_out,
    read_annotations,
    read_sheets,
    simulate,
    unshuffle,
)
from psycopref.evaluation.kits import SIDES, TASK_QUESTIONS, kit_csv, kit_html, label_studio_config, label_studio_tasks
from psycopref.evaluation.kits import make_kit

WORD = "lantern"
TABLES = {"csv": (",", "utf-8"), "semicolons": (";", "utf-8-sig"), "tabs": ("\t", "utf-8"), "utf-16": ("\t", "utf-16")}
TABLES["cp1252"] = (";", "cp1252")
FORMS = ("page", "studio", "minimal", *TABLES)
OPPOSITE = {"win": "loss", "loss": "win", "tie": "tie"}
bounded = settings(deadline=None, derandomize=True, database=None, max_examples=30)


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

    def said(item):
        if item["task"] == "score":
            return dict.fromkeys(PRINCIPLE_KEYS, 5 if WORD in item["responses"][0] else 2)
        return dict.fromkeys(BATTLE_KEYS, 1 if (WORD in item["responses"][0]) != turn else 2)

    return {item["item_id"]: said(item) for item in kit["items"]}


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

    def flat(value):
        return value["choices"][0] if "choices" in value else value["text"][0] if "text" in value else [value]

    found = []
    for task in studio(kit, answers):
        said = {part["from_name"]: flat(part["value"]) for part in task["annotations"][0]["result"]}
        found.append({"id": task["id"], **task["data"], "annotator": person, "annotation_id": 7, **said})
    return found


def table(kit, answers, delimiter=","):
    "The kit's own table, filled in and saved by a spreadsheet."
    lines = list(csv.DictReader(io.StringIO(kit_csv(kit), newline="")))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(line | answers.get(line["item_id"], {}) for line in lines)
    return text.getvalue()


def save(folder, form, kit, answers):
    "Write answers in a form; the path."
    if form in TABLES:
        delimiter, encoding = TABLES[form]
        path = Path(folder) / f"annotations_{kit['kit_id']}_Ada.{'tsv' if form == 'tabs' else 'csv'}"
        path.write_bytes(table(kit, answers, delimiter).encode(encoding, errors="replace"))
        return path
    return dumped(
        Path(folder) / f"{form}.json", {"page": page, "studio": studio, "minimal": minimal}[form](kit, answers)
    )


def dumped(path, document):
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_planted_answers_come_back_the_right_way_round(tmp_path, form):
    kit, key, truth = planted()
    assert set(key["first"]) == {"ours + DPO", "reference"}
    for turn in (False, True):
        turned = unshuffle(read_annotations(save(tmp_path, form, kit, seeing(kit, turn)), kit), key)
        found = [row.verdict == truth[row.speech_id, row.setting] for row in turned.itertuples()]
        assert found == [not turn] * 12 * 8
    assert set(turned.annotator) == {"3" if form in ("studio", "minimal") else "Ada"}
    kit, key, truth = planted(task="score")
    scored = unshuffle(read_annotations(save(tmp_path, form, kit, seeing(kit)), kit), key)
    for row in scored.itertuples():
        assert row.rating == (5 if truth[row.speech_id, row.setting] == "win" else 2)


@bounded
@given(st.data(), st.sampled_from(FORMS), st.sampled_from(["compare", "score"]))
def test_any_answers_survive_any_form(tmp_path_factory, data, form, task):
    text = st.text(alphabet=st.characters(codec="cp1252", exclude_characters="\x00"), min_size=1, max_size=30)
    texts = data.draw(st.lists(text, min_size=1, max_size=3))
    kit, _, _ = planted(data.draw(st.integers(1, 6)), task, data.draw(st.integers(0, 5)), texts)
    asked, answers = [(item["item_id"], name) for item in kit["items"] for name in TASK_QUESTIONS[task]], {}
    for item, name in asked:
        value = data.draw(st.sampled_from(VALUES[task]))
        answers.setdefault(item, {})[name] = value or int(name == "overall")  # overall has no third choice
    frame = read_annotations(save(tmp_path_factory.mktemp("any"), form, kit, answers), kit)
    found = frame.set_index(["item_id", "principle"]).value.to_dict()
    assert found == {(item, name): answers[item][name] for item, name in asked}


@bounded
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


def test_what_a_spreadsheet_does_to_a_table_is_read(tmp_path):
    kit, _, _ = planted()
    path = save(tmp_path, "csv", kit, seeing(kit))
    before = read_annotations(path, kit)
    head, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *sorted(lines, key=lambda line: line[3])])
    assert read_annotations(path, kit).equals(before), "sorted lines"
    again = path.rename(path.with_stem(f"{path.stem} (1)"))
    assert read_sheets(again)[0].annotator == "Ada", "a second download"
    assert "annotations_" in one_line(lambda: read_annotations(again.rename(tmp_path / "kit.csv"), kit))
    kit, _, _ = planted(2)
    answers = {item["item_id"]: dict.fromkeys(BATTLE_KEYS, text) for item, text in zip(kit["items"], ("1.0", " 2,0 "))}
    assert read_annotations(save(tmp_path, "semicolons", kit, answers), kit).value.tolist() == [1] * 8 + [2] * 8


@pytest.mark.parametrize("form", ["page", *TABLES])
def test_an_unfinished_file_says_which_items(tmp_path, form):
    kit, _, _ = planted()
    answers = seeing(kit)
    del answers[kit["items"][3]["item_id"]], answers[kit["items"][6]["item_id"]]["safety"]
    path = save(tmp_path, form, kit, answers)
    message = one_line(lambda: read_annotations(path, kit))
    parts = "2 of 12 items are unfinished: 4, 7", "item 4 lacks", "Ada", path.name
    assert all(part in message for part in parts)
    partial = read_annotations(path, kit, partial=True)
    row = {"annotator": "Ada", "items": 12, "finished": 10, "unfinished": "4, 7"}
    assert len(partial) == 10 * 8 + 7 and completeness(partial, kit).to_dict("records") == [row]


def test_a_task_may_be_skipped_in_label_studio_and_answered_later(tmp_path):
    kit, _, _ = planted()
    tasks = studio(kit, seeing(kit))
    del tasks[2:4]
    path = dumped(tmp_path / "half.json", tasks)
    assert "2 of 12 items are unfinished: 3, 4" in one_line(lambda: read_annotations(path, kit))
    tasks = studio(kit, seeing(kit))
    done = tasks[3]["annotations"]
    done[0]["was_cancelled"] = True
    path = dumped(tmp_path / "skipped.json", tasks)
    assert left_out(read_sheets(path)[0]) == [kit["items"][3]["item_id"]] and len(read_annotations(path, kit)) == 11 * 8
    done.append(done[0] | {"was_cancelled": False})
    assert len(read_annotations(dumped(path, tasks), kit)) == 12 * 8


@pytest.mark.parametrize("form", ["page", "studio", "csv", "semicolons"])
def test_an_item_may_be_left_out_with_a_note(tmp_path, form):
    kit, key, _ = planted()
    item = kit["items"][5]["item_id"]
    path = save(tmp_path, form, kit, seeing(kit) | {item: {"note": "Too close; I stopped."}})
    assert left_out(read_sheets(path)[0]) == [item]
    assert unshuffle(read_annotations(path, kit), key).item_id.nunique() == 11


KIT, KEY, _ = planted()
ANSWERS = seeing(KIT)
FIRST, SECOND = list(ANSWERS)[:2]
TWICE = studio(KIT, ANSWERS)
TWICE[1]["annotations"] *= 2


def paged(**changes):
    return page(KIT, ANSWERS | {SECOND: ANSWERS[SECOND] | changes})


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("other.json", page(KIT, ANSWERS) | {"kit_id": "0123456789abcdef"}, "0123456789abcdef"),
        ("unknown.json", page(KIT, ANSWERS | {"f00": ANSWERS[FIRST]}), "f00"),
        ("range.json", paged(clarity=3), f"item 2 ({SECOND}) has clarity = '3', expected one of 1, 2, 0"),
        ("text.json", paged(clarity="left"), "clarity = 'left'"),
        ("bool.json", paged(clarity=True), "clarity = 'True'"),
        ("list.json", page(KIT, ANSWERS | {SECOND: [1, 2]}), SECOND),
        ("nobody.json", page(KIT, ANSWERS, " "), "annotator"),
        ("twice.json", json.dumps(page(KIT, ANSWERS)).replace(f'"{SECOND}"', f'"{FIRST}"'), f"'{FIRST}' stands twice"),
        ("twice_studio.json", TWICE, f"{SECOND} is answered more than once"),
        ("twice.csv", table(KIT, ANSWERS) + table(KIT, ANSWERS).split("\r\n", 1)[1], "more than once"),
        ("foreign.json", [{"id": 1, "data": {"text": "x"}, "annotations": []}], "item_id"),
        ("kit.json", KIT, "format is 'psycopref-kit'"),
        ("version.json", page(KIT, ANSWERS) | {"version": 2}, "version is '2'"),
        ("half.json", json.dumps(page(KIT, ANSWERS))[:-20], "no whole JSON"),
        ("null.json", "null", "no annotation"),
        ("empty.csv", "", "kit_id"),
        ("nameless.csv", table(KIT, ANSWERS).replace("kit_id", "kit", 1), "kit_id"),
        ("moved.csv", f"kit_id,item_id,empathy\n{KIT['kit_id']},{FIRST},1,2\n", "row 2 has 4 cells"),
        ("page.html", kit_html(KIT), ".html"),
        ("made.json", simulate(KIT, 1, 0) | {"annotator": "Eve"}, "was simulated"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-6:] else "",
)
def test_every_fault_is_named_in_one_line(tmp_path, name, content, said):
    path = dumped(tmp_path / name, content)
    message = one_line(lambda: read_annotations(path, KIT))
    assert said in message and name in message


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xff")
    assert "binary.json" in one_line(lambda: read_annotations(tmp_path / "binary.json", KIT))
    assert "not found" in one_line(lambda: read_annotations(tmp_path / "nowhere.json", KIT))
    assert "is not there" in one_line(lambda: annotation_files([str(tmp_path / "nowhere")]))


def test_one_label_studio_file_holds_several_annotators(tmp_path):
    tasks, person = studio(KIT, ANSWERS), {"id": 5, "email": "ben@example.org"}
    for task, other in zip(tasks, studio(KIT, seeing(KIT, True), person)):
        task["annotations"] += other["annotations"]
    frame = unshuffle(read_annotations(dumped(tmp_path / "export.json", tasks), KIT), KEY)
    sides = {name: own.verdict.tolist() for name, own in frame.groupby("annotator")}
    assert list(sides) == ["3", "ben@example.org"] and sides["3"] != sides["ben@example.org"]


def test_a_run_takes_each_annotator_once_and_nothing_simulated(tmp_path):
    scores, _, _ = planted(task="score")
    kits = [KIT, scores]
    dumped(tmp_path / "a.json", page(KIT, ANSWERS))
    dumped(tmp_path / "deep" / "b.json", page(scores, seeing(scores), "ada "))
    dumped(tmp_path / "c.json", page(KIT, ANSWERS, "Ben"))
    files = annotation_files([str(tmp_path), str(tmp_path / "a.json")])
    assert [path.name for path in files] == ["a.json", "c.json", "b.json"]
    frame = gather_annotations(files, kits)
    assert frame.groupby("annotator").kit_id.nunique().to_dict() == {"Ada": 2, "Ben": 1}
    again = dumped(tmp_path / "again.json", page(KIT, ANSWERS, " ADA"))
    assert "a.json" in one_line(lambda: gather_annotations([*files, again], kits))
    made = simulate(KIT, 1, 0)
    for document in (made, made | {"annotator": "Eve"}, page(KIT, ANSWERS, "Simulated 7")):
        path = dumped(tmp_path / "made.json", document)
        assert "simulated" in one_line(lambda: gather_annotations([path], kits))
    old = dumped(tmp_path / "old.json", page(KIT | {"kit_id": "abandoned"}, ANSWERS))
    message = one_line(lambda: gather_annotations([old], kits))
    assert all(part in message for part in ("old.json", "abandoned", KIT["kit_id"]))


def test_paths_begin_in_the_projects_folder(tmp_path, monkeypatch):
    for name in ("filled", "nbs"):
        (tmp_path / name).mkdir()
    save(tmp_path / "filled", "page", KIT, ANSWERS)
    monkeypatch.chdir(tmp_path / "nbs")
    assert len(gather_annotations(annotation_files(["filled"]), [KIT])) == 12 * 8


@pytest.mark.parametrize(
    "key, said",
    [
        (KEY.assign(kit="other"), "not in the key"),
        (KEY.iloc[1:], "not in the key"),
        (KEY.assign(first="one policy", second="another"), "expected one side that is rejected or reference"),
        (KEY.assign(first="rejected", second="reference"), "expected one side that is rejected or reference"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(key, said):
    frame = pd.DataFrame([("Ada", KIT["kit_id"], i, "overall", 1) for i in ANSWERS], columns=list(ANNOTATION_COLUMNS))
    assert said in one_line(lambda: unshuffle(frame, key))


def test_simulated_annotators_see_the_kit_alone_and_say_what_they_are(tmp_path):
    kit, key, _ = planted(4)
    one, other = simulate(kit, 1, 0), simulate(kit, 2, 0)
    assert one == simulate(kit, 1, 0) and one["answers"] != other["answers"] and one["simulated"]
    assert (one["annotator"], other["annotator"]) == ("simulated 1", "simulated 2")
    frame = unshuffle(read_annotations(dumped(tmp_path / "made.json", one), kit), key)
    assert set(frame.annotator) == {"simulated 1"}
    assert set(frame[frame.principle == "overall"].verdict) <= {"win", "loss"}
    assert simulate(kit | {"items": kit["items"][::-1]}, 1, 0)["answers"] == one["answers"]
