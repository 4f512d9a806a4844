"""Annotations: planted answers come back from all three forms the right way round, and whatever is wrong with a file is named."""

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

from psycopref.evaluation.annotations import (
    TASK_QUESTIONS,
    VALUES,
    annotation_files,
    completeness,
    gather_annotations,
    left_out,
    read_annotations,
    read_sheets,
    simulate,
    unshuffle,
)  # fmt: skip
from psycopref.core.settings import StudyError
from psycopref.evaluation.kits import kit_csv, kit_html, label_studio_config, label_studio_tasks, make_kit
from psycopref.core.prompts import BATTLE_KEYS
from psycopref.core.files import PRINCIPLE_KEYS

WORD = "lantern"
FORMS = ("page", "studio", "minimal", "csv", "semicolons", "tabs", "utf-16", "cp1252")
bounded = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def planted(n=12, task="compare", seed=0, texts=()):
    "A kit in which one response of each pair holds the word; the truth from the side of the policy."
    chance = random.Random(seed)
    rows, truth = [], {}
    for i in range(n):
        won = chance.random() < 0.5
        sides = [f"{texts[i % len(texts)] if texts else 'A long evening.'} {i} {WORD}", f"Another, {i}."]
        speech_id, setting = f"s{i // 2}", ("free", "length")[i % 2]
        rows.append(
            {
                "speech_id": speech_id,
                "setting": setting,
                "stratum": "a",
                "client_speech": f'Speech {i};\n"quoted", é',
                "name_a": "ours + DPO",
                "response_a": sides[0 if won else 1],
                "name_b": "reference" if task == "compare" else "",
                "response_b": sides[1 if won else 0] if task == "compare" else "",
            }
        )
        truth[speech_id, setting] = "win" if won else "loss"
    return *make_kit(pd.DataFrame(rows), task, "A kit", seed), truth


def seeing(item, turn=False):
    "Answer an item by what stands in it."
    if item["task"] == "score":
        return {key: 5 if WORD in item["responses"][0] else 2 for key in PRINCIPLE_KEYS}
    return {key: 1 if (WORD in item["responses"][0]) != turn else 2 for key in BATTLE_KEYS}


def page(kit, answers, annotator="Ada"):
    return {
        "format": "psycopref-annotations",
        "version": 1,
        "kit_id": kit["kit_id"],
        "annotator": annotator,
        "started": "",
        "saved": "",
        "answers": answers,
    }


def studio(kit, answers, person=3):
    "What Label Studio exports after our configuration: the alias of a choice where it has one, a rating as a number."
    controls = {
        node.get("name"): node for node in ElementTree.fromstring(label_studio_config(kit)).iter() if node.get("toName")
    }
    tasks = []
    for number, task in enumerate(label_studio_tasks(kit), 100):
        result = []
        for key, value in answers.get(task["data"]["item_id"], {}).items():
            control = controls[key]
            words = {child.get("alias"): child.get("alias") or child.get("value") for child in control}
            said = {
                "Choices": lambda: {"choices": [words[str(value)]]},
                "Rating": lambda: {"rating": value},
                "TextArea": lambda: {"text": [value]},
            }[control.tag]()
            result.append(
                {
                    "id": f"r{key}",
                    "from_name": key,
                    "to_name": control.get("toName"),
                    "type": control.tag.lower(),
                    "value": said,
                    "origin": "manual",
                }
            )
        done = {
            "id": number + 900,
            "completed_by": person,
            "result": result,
            "was_cancelled": False,
            "ground_truth": False,
        }
        tasks.append({"id": number, **task, "project": 1, "annotations": [done], "predictions": []})
    return tasks


def minimal(kit, answers, person=3):
    "The same as JSON-MIN."

    def flat(value):
        return value["choices"][0] if "choices" in value else value["text"][0] if "text" in value else [value]

    return [
        {
            "id": task["id"],
            **task["data"],
            "annotator": person,
            "annotation_id": 7,
            "lead_time": 3.5,
            **{part["from_name"]: flat(part["value"]) for part in task["annotations"][0]["result"]},
        }
        for task in studio(kit, answers)
    ]


def table(kit, answers, delimiter=","):
    "The kit's own table, filled in and saved by a spreadsheet."
    lines = list(csv.DictReader(io.StringIO(kit_csv(kit), newline="")))
    for line in lines:
        line |= answers.get(line["item_id"], {})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def save(folder, form, kit, answers, annotator="Ada"):
    "Write answers in a form; the path."
    path = Path(folder) / (
        f"{form}.json"
        if form in ("page", "studio", "minimal")
        else f"annotations_{kit['kit_id']}_{annotator}.{'tsv' if form == 'tabs' else 'csv'}"
    )
    if path.suffix == ".json":
        path.write_text(
            json.dumps(
                {"page": page, "studio": studio, "minimal": minimal}[form](
                    kit, answers, *([annotator] if form == "page" else [])
                )
            ),
            encoding="utf-8",
        )
    else:
        delimiter = {"semicolons": ";", "cp1252": ";", "tabs": "\t", "utf-16": "\t"}.get(form, ",")
        text = table(kit, answers, delimiter)
        path.write_bytes(
            text.encode(
                {"semicolons": "utf-8-sig", "utf-16": "utf-16", "cp1252": "cp1252"}.get(form, "utf-8"), errors="replace"
            )
        )
    return path


@pytest.mark.parametrize("form", FORMS)
def test_planted_answers_come_back_the_right_way_round(tmp_path, form):
    kit, key, truth = planted()
    assert set(key["first"]) == {"ours + DPO", "reference"}
    for turn, wanted in ((False, 100.0), (True, 0.0)):
        answers = {item["item_id"]: seeing(item, turn) for item in kit["items"]}
        turned = unshuffle(read_annotations(save(tmp_path, form, kit, answers), kit), key)
        right = [row.verdict == truth[row.speech_id, row.setting] for row in turned.itertuples()]
        assert len(turned) == 12 * 8 and 100 * sum(right) / len(right) == wanted
    assert turned.annotator.unique().tolist() == ["3" if form in ("studio", "minimal") else "Ada"]


@pytest.mark.parametrize("form", FORMS)
def test_scores_come_back_with_their_answers(tmp_path, form):
    kit, key, truth = planted(task="score")
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    turned = unshuffle(read_annotations(save(tmp_path, form, kit, answers), kit), key)
    assert [row.rating for row in turned.itertuples()] == [
        5 if truth[row.speech_id, row.setting] == "win" else 2 for row in turned.itertuples()
    ]


@bounded
@given(st.data(), st.sampled_from(FORMS), st.sampled_from(["compare", "score"]))
def test_any_answers_survive_any_form(tmp_path_factory, data, form, task):
    texts = data.draw(
        st.lists(
            st.text(alphabet=st.characters(codec="cp1252", exclude_characters="\x00"), min_size=1, max_size=30),
            min_size=1,
            max_size=3,
        )
    )
    kit, key, _ = planted(data.draw(st.integers(1, 6)), task, data.draw(st.integers(0, 5)), texts)
    answers = {
        item["item_id"]: {name: data.draw(st.sampled_from(VALUES[task])) for name in TASK_QUESTIONS[task]}
        for item in kit["items"]
    }
    if task == "compare":
        answers = {
            item: said | {"overall": said["overall"] or 1} for item, said in answers.items()
        }  # overall has no third choice there
    frame = read_annotations(save(tmp_path_factory.mktemp("any"), form, kit, answers), kit)
    assert {(row.item_id, row.principle): row.value for row in frame.itertuples()} == {
        (item, name): value for item, said in answers.items() for name, value in said.items()
    }


@bounded
@given(st.integers(1, 12), st.integers(0, 20), st.data())
def test_swapping_sides_flips_every_verdict(n, seed, data):
    kit, key, _ = planted(n, seed=seed)
    rows = [
        ("Ada", kit["kit_id"], item["item_id"], name, data.draw(st.sampled_from((0, 1, 2))))
        for item in kit["items"]
        for name in ("empathy", "overall")
    ]
    frame = pd.DataFrame(rows, columns=["annotator", "kit_id", "item_id", "principle", "value"])
    turned, swapped = (
        unshuffle(frame, key),
        unshuffle(frame, key.rename(columns={"first": "second", "second": "first"})),
    )
    other = unshuffle(frame.assign(value=frame.value.map({0: 0, 1: 2, 2: 1})), key)
    assert (
        swapped.verdict.tolist()
        == other.verdict.tolist()
        == [{"win": "loss", "loss": "win", "tie": "tie"}[verdict] for verdict in turned.verdict]
    )
    assert (
        turned.verdict.value_counts().sum() == len(frame)
        and (turned.verdict == "tie").tolist() == (frame.value == 0).tolist()
    )
    shuffled = unshuffle(frame, key.sample(frac=1, random_state=seed)).equals(turned)
    assert shuffled


def test_sorting_a_table_changes_nothing(tmp_path):
    kit, key, _ = planted()
    path = save(tmp_path, "csv", kit, {item["item_id"]: seeing(item) for item in kit["items"]})
    before = read_annotations(path, kit)
    head, *lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *sorted(lines, key=lambda line: line[3])])
    assert read_annotations(path, kit).equals(before)


def test_what_excel_does_to_numbers_is_read(tmp_path):
    kit, _, _ = planted(2)
    answers = {
        kit["items"][0]["item_id"]: dict.fromkeys(BATTLE_KEYS, "1.0"),
        kit["items"][1]["item_id"]: dict.fromkeys(BATTLE_KEYS, " 2,0 "),
    }
    assert read_annotations(save(tmp_path, "semicolons", kit, answers), kit).value.tolist() == [1] * 8 + [2] * 8


def test_an_unfinished_file_says_which_items(tmp_path):
    kit, _, _ = planted()
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    del answers[kit["items"][3]["item_id"]], answers[kit["items"][6]["item_id"]]["safety"]
    for form in FORMS[:1] + FORMS[3:]:
        path = save(tmp_path, form, kit, answers)
        message = one_line(lambda: read_annotations(path, kit))
        assert (
            "2 of 12 items are unfinished: 4, 7" in message
            and "item 4 lacks" in message
            and "Ada" in message
            and path.name in message
        )
        partial = read_annotations(path, kit, partial=True)
        assert len(partial) == 10 * 8 + 7
    assert completeness(partial, kit).to_dict("records") == [
        {"annotator": "Ada", "items": 12, "finished": 10, "unfinished": "4, 7"}
    ]
    skipped = studio(kit, {item["item_id"]: seeing(item) for item in kit["items"]})
    skipped[3]["annotations"][0]["was_cancelled"] = True
    (tmp_path / "skipped.json").write_text(json.dumps(skipped))
    assert (
        left_out(read_sheets(tmp_path / "skipped.json")[0]) == [kit["items"][3]["item_id"]]
        and len(read_annotations(tmp_path / "skipped.json", kit)) == 11 * 8
    )
    skipped[3]["annotations"].append(
        skipped[3]["annotations"][0] | {"was_cancelled": False}
    )  # skipped at first, then answered
    (tmp_path / "skipped.json").write_text(json.dumps(skipped))
    assert len(read_annotations(tmp_path / "skipped.json", kit)) == 12 * 8
    (tmp_path / "half.json").write_text(
        json.dumps(studio(kit, answers)[:2] + studio(kit, {item["item_id"]: seeing(item) for item in kit["items"]})[4:])
    )
    assert "2 of 12 items are unfinished: 3, 4" in one_line(lambda: read_annotations(tmp_path / "half.json", kit))


@pytest.mark.parametrize("form", ["page", "studio", "csv", "semicolons"])
def test_an_item_may_be_left_out_with_a_note(tmp_path, form):
    kit, key, _ = planted()
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    answers[kit["items"][5]["item_id"]] = {"note": "Too close; I stopped."}
    path = save(tmp_path, form, kit, answers)
    assert left_out(read_sheets(path)[0]) == [kit["items"][5]["item_id"]]
    assert unshuffle(read_annotations(path, kit), key).item_id.nunique() == 11


def broken(kit, answers):
    "Files with one fault each, and what the error says."
    first, second = kit["items"][0]["item_id"], kit["items"][1]["item_id"]
    tasks = studio(kit, answers)
    twice = json.loads(json.dumps(tasks))
    twice[1]["annotations"] *= 2
    return {
        "other.json": (json.dumps(page(kit, answers) | {"kit_id": "0123456789abcdef"}), "0123456789abcdef"),
        "unknown.json": (json.dumps(page(kit, answers | {"f00": answers[first]})), "f00"),
        "range.json": (json.dumps(page(kit, answers | {second: answers[second] | {"clarity": 3}})), f"item 2 ({second}) has clarity = '3', expected one of 1, 2, 0"),
        "text.json": (json.dumps(page(kit, answers | {second: answers[second] | {"clarity": "left"}})), "clarity = 'left'"),
        "bool.json": (json.dumps(page(kit, answers | {second: answers[second] | {"clarity": True}})), "clarity = 'True'"),
        "list.json": (json.dumps(page(kit, answers | {second: [1, 2]})), second),
        "nobody.json": (json.dumps(page(kit, answers, " ")), "annotator"),
        "twice.json": (json.dumps(page(kit, answers)).replace(f'"{second}"', f'"{first}"'), f"'{first}' stands twice"),
        "twice_studio.json": (json.dumps(twice), f"{second} is answered more than once"),
        "twice.csv": (table(kit, answers) + table(kit, answers).split("\r\n", 1)[1], "more than once"),
        "foreign.json": (json.dumps([{"id": 1, "data": {"text": "x"}, "annotations": []}]), "item_id"),
        "kit.json": (json.dumps(kit), "the kit itself"),
        "version.json": (json.dumps(page(kit, answers) | {"version": 2}), "version 2"),
        "half.json": (json.dumps(page(kit, answers))[:-20], "no whole JSON"),
        "null.json": ("null", "no annotation"),
        "empty.csv": ("", "kit_id"),
        "nameless.csv": (table(kit, answers).replace('kit_id', 'kit', 1), "kit_id"),
        "moved.csv": (f"kit_id,item_id,empathy\n{kit['kit_id']},{first},1,2\n", "row 2 has 4 cells"),
        "page.html": (kit_html(kit), ".html"),
    }  # fmt: skip


def test_every_fault_is_named_in_one_line(tmp_path):
    kit, _, _ = planted()
    for name, (text, said) in broken(kit, {item["item_id"]: seeing(item) for item in kit["items"]}).items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        message = one_line(lambda: read_annotations(tmp_path / name, kit))
        assert said in message and name in message, (name, message)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xff")
    assert "binary.json" in one_line(lambda: read_annotations(tmp_path / "binary.json", kit))
    assert "not found" in one_line(lambda: read_annotations(tmp_path / "nowhere.json", kit))


def test_one_label_studio_file_holds_several_annotators(tmp_path):
    kit, key, _ = planted()
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    both, others = (
        studio(kit, answers, 3),
        studio(
            kit, {item["item_id"]: seeing(item, True) for item in kit["items"]}, {"id": 5, "email": "ben@example.org"}
        ),
    )
    for task, other in zip(both, others):
        task["annotations"] += other["annotations"]
    (tmp_path / "export.json").write_text(json.dumps(both))
    frame = unshuffle(read_annotations(tmp_path / "export.json", kit), key)
    sides = {name: own.verdict.tolist() for name, own in frame.groupby("annotator")}
    assert list(sides) == ["3", "ben@example.org"] and sides["3"] != sides["ben@example.org"]


def test_a_run_takes_each_annotator_once_and_nothing_simulated(tmp_path):
    kit, _, _ = planted()
    scores, _, _ = planted(task="score")
    kits, answers = [kit, scores], {item["item_id"]: seeing(item) for item in kit["items"]}
    rated = {item["item_id"]: seeing(item) for item in scores["items"]}
    (tmp_path / "deep").mkdir()
    for name, document in {
        "a": page(kit, answers),
        "deep/b": page(scores, rated, "ada "),
        "c": page(kit, answers, "Ben"),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    files = annotation_files([str(tmp_path), str(tmp_path / "a.json")])
    assert [path.name for path in files] == ["a.json", "c.json", "b.json"]
    frame = gather_annotations(files, kits)
    assert frame.groupby("annotator").kit_id.nunique().to_dict() == {"Ada": 2, "Ben": 1}
    (tmp_path / "again.json").write_text(json.dumps(page(kit, answers, " ADA")))
    assert "a.json" in one_line(lambda: gather_annotations([*files, tmp_path / "again.json"], kits))
    made = simulate(kit, 1, 0)
    for document in (made, made | {"annotator": "Eve"}, {**page(kit, answers), "annotator": "Simulated 7"}):
        (tmp_path / "made.json").write_text(json.dumps(document))
        assert "simulated" in one_line(lambda: gather_annotations([tmp_path / "made.json"], kits))
    (tmp_path / "old.json").write_text(json.dumps(page(kit | {"kit_id": "abandoned"}, answers)))
    message = one_line(lambda: gather_annotations([tmp_path / "old.json"], kits))
    assert "old.json" in message and "abandoned" in message and kit["kit_id"] in message
    with pytest.raises(StudyError, match="is not there"):
        annotation_files([str(tmp_path / "nowhere")])


def test_paths_begin_in_the_projects_folder(tmp_path, monkeypatch):
    kit, _, _ = planted(2)
    (tmp_path / "filled").mkdir()
    save(tmp_path / "filled", "page", kit, {item["item_id"]: seeing(item) for item in kit["items"]})
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert len(gather_annotations(annotation_files(["filled"]), [kit])) == 16


def test_a_table_is_named_after_its_annotator(tmp_path):
    kit, _, _ = planted(2)
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    path = save(tmp_path, "csv", kit, answers)
    again = path.rename(path.with_stem(f"{path.stem} (1)"))
    assert read_sheets(again)[0].annotator == "Ada"
    assert "annotations_" in one_line(lambda: read_annotations(again.rename(tmp_path / "kit.csv"), kit))


def test_two_policies_without_a_reference_are_no_kit_of_ours():
    kit, key, _ = planted()
    answers = {item["item_id"]: seeing(item) for item in kit["items"]}
    rows = [("Ada", kit["kit_id"], item, name, value) for item, said in answers.items() for name, value in said.items()]
    frame = pd.DataFrame(rows, columns=["annotator", "kit_id", "item_id", "principle", "value"])
    for names in (("one policy", "another policy"), ("rejected", "reference")):  # a win of which of the two?
        other = key.assign(first=names[0], second=names[1])
        assert "expected one side that is rejected or reference" in one_line(lambda: unshuffle(frame, other))


def test_what_was_simulated_has_a_name_that_says_so(tmp_path):
    kit, _, _ = planted()
    (tmp_path / "a.json").write_text(json.dumps(simulate(kit, 1, 0)))
    assert set(read_annotations(tmp_path / "a.json", kit).annotator) == {"simulated 1"}
    (tmp_path / "b.json").write_text(json.dumps(simulate(kit, 1, 0) | {"annotator": "Eve"}))
    assert "was simulated" in one_line(lambda: read_annotations(tmp_path / "b.json", kit))


def test_a_key_of_another_kit_is_refused():
    kit, key, _ = planted()
    frame = pd.DataFrame(
        [("Ada", kit["kit_id"], item["item_id"], "overall", 1) for item in kit["items"]],
        columns=["annotator", "kit_id", "item_id", "principle", "value"],
    )
    assert "not in the key" in one_line(lambda: unshuffle(frame, key.assign(kit="other")))
    assert "not in the key" in one_line(lambda: unshuffle(frame, key.iloc[1:]))


def test_simulated_annotators_see_the_kit_alone_and_say_what_they_are(tmp_path):
    kit, key, _ = planted(4)
    one, same, other = simulate(kit, 1, 0), simulate(kit, 1, 0), simulate(kit, 2, 0)
    assert (
        one == same
        and one["answers"] != other["answers"]
        and one["simulated"]
        and (one["annotator"], other["annotator"]) == ("simulated 1", "simulated 2")
    )
    path = tmp_path / "simulated.json"
    path.write_text(json.dumps(one))
    frame = unshuffle(read_annotations(path, kit), key)
    assert set(frame.annotator) == {"simulated 1"} and set(frame[frame.principle == "overall"].verdict) <= {
        "win",
        "loss",
    }
    reversed_items = kit | {"items": kit["items"][::-1]}
    assert simulate(reversed_items, 1, 0)["answers"] == one["answers"]
