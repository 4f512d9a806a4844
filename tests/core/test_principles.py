"""A file of principles decides columns, prompts, replies and ratings; nothing else knows how many there are."""

import json
import re

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.files import SCHEMAS, Schemas, row_schema, write_rows
from psycopref.core.principles import OWN_SETS, of_the_paper, principle_keys, principle_set, principles_file
from psycopref.core.principles import read_principles, safety_keys, use_principles
from psycopref.core.prompts import battle_keys, comparison_prompt, parse_all_ratings, parse_battle, prompt_text
from psycopref.core.prompts import rating_all_schema, rating_prompt, responding_prompt
from psycopref.core.settings import load_profile
from psycopref.core.stages import STAGES, stage_settings, stages_of
from psycopref.feedback.pairing import choose_pairs, principle_table, scored_responses
from psycopref.feedback.rating import least_gap_sum, mode_calls
from psycopref.rater.rules import RulesModel
from psycopref.rater.scoring import score_answers

GOOD = {"title": "maths", "principles": [{"key": "right", "name": "Right", "description": "It is right."}]}


@pytest.fixture
def own(tmp_path):
    """Write a file of principles; returns its path."""

    def write(content) -> str:
        place = tmp_path / "own.yaml"
        place.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return str(place)

    return write


def of_one(**changed):
    return GOOD | {"principles": [GOOD["principles"][0] | changed]}


@pytest.mark.parametrize(
    "content, said",
    [
        ("a: [", "is no YAML"),
        ("", "expected title"),
        (GOOD | {"principles": []}, "principles"),
        (GOOD | {"principle": []}, "principle"),
        (of_one(key="Right"), "principles.0.key"),
        (of_one(key="overall"), "choose another"),
        (of_one(key="left out"), "principles.0.key"),
        *(
            (of_one(key=own), "choose another")
            for own in "speech_id sample finish_reason setting reading n judge".split()
        ),
        (of_one(points={"base": float("nan")}), "finite"),
        (of_one(points={"base": float("inf")}), "finite"),
        (GOOD | {"prompts": {"rating_alone": "no slots"}}, "prompt 'rating_alone' has the slots []"),
        (GOOD | {"prompts": {"responding": "{client_speech} {more}"}}, "prompt 'responding'"),
        (of_one(name=" "), "principles.0.name"),
        (of_one(safety="perhaps"), "principles.0.safety"),
        (of_one(weight=2), "principles.0.weight"),
        (GOOD | {"principles": GOOD["principles"] * 2}, "stands twice"),
        (GOOD | {"prompts": {"ratings": "…"}}, "Did you mean rating"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(own, content, said):
    place = own(content)
    message = one_line(lambda: read_principles(place))
    assert place in message and said in message


def test_a_name_that_is_unknown_and_a_file_that_is_not_there_are_refused(tmp_path):
    assert "plain-words" in one_line(lambda: read_principles("plain-word"))
    assert "not found" in one_line(lambda: read_principles(str(tmp_path / "none.yaml")))


def test_a_relative_file_begins_at_the_project_and_a_changed_one_is_read_again(tmp_path, own):
    place = own(GOOD)
    assert use_principles("own.yaml").keys == ("right",) == principle_keys()
    own(of_one(key="correct"))
    assert principle_keys() == ("correct",) and principle_set() == read_principles(place)


@pytest.mark.parametrize("chosen", OWN_SETS)
def test_every_set_of_ours_is_whole(chosen):
    found = use_principles(chosen)
    features = score_answers(["I am afraid."], ["What does it feel like?"])
    assert list(features) == list(found.keys) and features.stack().between(1, 5).all()
    assert any(own.safety for own in found.principles), "a veto has something to look at"
    for name, text in found.prompts.items():
        slots = [set(re.findall(r"\{(\w+)\}", t)) for t in (text, _ours(name))]
        assert slots[0] == slots[1], f"{name}: the slots of ours"


def _ours(name):
    from psycopref.core.paper import resource_path

    return resource_path(f"prompts/{name}.txt").read_text(encoding="utf-8")


def test_the_released_columns_are_those_of_the_paper_s_principles():
    assert of_the_paper() and len(SCHEMAS["pairs"]) == 21 and safety_keys() == ("safety",)


names = st.lists(st.from_regex(r"\A[a-z][a-z0-9_]{0,8}\Z"), min_size=1, max_size=12, unique=True)


@given(names, st.data())
@settings(max_examples=40, deadline=None)
def test_any_number_of_principles_goes_through_prompts_replies_columns_and_pairs(tmp_path_factory, keys, data):
    keys = [f"k_{key}" for key in keys]
    place = tmp_path_factory.mktemp("own") / "own.yaml"
    listed = [{"key": key, "name": key.title(), "description": f"It is {key}."} for key in keys]
    place.write_text(yaml.safe_dump({"title": "any", "principles": listed}))
    use_principles(str(place))
    assert isinstance(SCHEMAS, Schemas) and len(SCHEMAS["pairs"]) == 7 + 2 * len(keys)
    assert battle_keys() == (*keys, "overall") and mode_calls("principle") == tuple(keys)
    shown, battle = rating_prompt(None, "Why?", list("abcd")), comparison_prompt("battle", "Why?", "a", "b")
    assert all(f"[{key}] " in shown and f"It is {key}." in battle for key in keys)
    rated = {key: data.draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)) for key in keys}
    reply = {key: {f"response_{i}_rating": n for i, n in enumerate(own, 1)} for key, own in rated.items()}
    found = parse_all_ratings(json.dumps(reply))
    assert {key: [n for n, _ in own] for key, own in found.items()} == rated and rating_all_schema()["required"] == keys
    assert parse_battle(json.dumps(dict.fromkeys([*keys, "overall"], 2)))["overall"] == 2

    long = [("s", str(i), key, n) for key, own in rated.items() for i, n in enumerate(own)]
    ratings = pd.DataFrame(long, columns=["speech_id", "model", "principle", "rating"])
    responses = pd.DataFrame({"speech_id": "s", "model": list("0123"), "response": list("abcd")})
    scored = scored_responses(responses, ratings)
    means = [sum(own[i] for own in rated.values()) / len(keys) for i in range(4)]
    wanted = {(i, j) for i in range(4) for j in range(4) if means[i] - means[j] >= 1 - 1e-9}
    assert set(choose_pairs(scored)) == wanted and least_gap_sum(1) == len(keys)
    sides = {f"{side}_{key}_rating": [n] for side, n in (("chosen", 4), ("rejected", 2)) for key in keys}
    assert principle_table(pd.DataFrame(sides)).principle.tolist() == keys


def test_rows_made_with_other_principles_are_read_with_their_own(tmp_path):
    from psycopref.core.files import read_rows

    use_principles("plain-words")
    keys = principle_keys()
    row = {name: 3 if kind == "int" else "x" for name, kind in SCHEMAS["pairs"].items()}
    write_rows(tmp_path / "pairs.parquet", "pairs", pd.DataFrame([row]))
    use_principles("counselling")
    assert list(read_rows(tmp_path / "pairs.parquet", "pairs", keys)) == list(row_schema("pairs", keys))
    assert "chosen_empathy_rating" in one_line(lambda: read_rows(tmp_path / "pairs.parquet", "pairs"))


def test_a_set_words_the_prompts_of_its_field_and_a_users_folder_comes_first(tmp_path, monkeypatch):
    ours = prompt_text("topic")
    use_principles("plain-words")
    assert "doctor" in responding_prompt("Why?") and "psychotherapist" not in responding_prompt("Why?", 50)
    assert prompt_text("topic") == ours, "what a set does not word is ours"
    (tmp_path / "responding.txt").write_text("Answer: {client_speech}")
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    assert responding_prompt("Why?") == "Answer: Why?"


def test_the_offline_rubric_carries_the_name_of_other_points_and_refuses_a_principle_without_any(own):
    plain = RulesModel("rubric")
    use_principles("plain-words")
    other = RulesModel("rubric")
    assert other.identity != plain.identity and other.label == f"{plain.label}, points for diagnoses in plain words"
    use_principles(own(GOOD))
    message = one_line(lambda: RulesModel("rubric"))
    assert "right has no points" in message and "ratings.rater" in message
    assert RulesModel("phrases").label, "canned phrases rate nothing"


def test_principles_are_a_setting_of_all_stages_but_the_speeches_and_leave_out_the_trial():
    tree = load_profile("tiny", {"principles": "plain-words"})
    assert set(stages_of(load_profile("tiny"))) - set(stages_of(tree)) == {"12_trial"}
    assert "12_trial" not in stages_of(tree)["13_report"].needs
    changed = {name for name in STAGES if stage_settings(tree, name) != stage_settings(load_profile("tiny"), name)}
    assert changed == set(STAGES) - {"01_speeches", "12_trial", "13_report"}


def test_principles_file_names_ours_and_yours(tmp_path):
    assert principles_file("counselling").is_file() and principles_file("mine.yaml") == tmp_path / "mine.yaml"
