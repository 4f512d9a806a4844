"""The offline rubric takes any text, stays on its scale, and judges a pair the same from both sides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.paper import resource_path
from psycopref.core.prompts import BATTLE_KEYS, parse_battle, parse_choice, parse_ratings
from psycopref.rater import acts, language, rules
from psycopref.rater.rubric import rubric_features, rubric_rationale, rubric_scores, stage_of_change
from psycopref.rater.rubric import to_rating
from psycopref.rater.rules import PHRASES, RulesModel, rubric_reply

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SPEECH = "My wife says I drink too much. Maybe part of me is scared. Since my brother died I can't sleep."
PARTS = ["It sounds like the nights are long.", "That makes sense.", "You must stop drinking.", "Calm down.", SPEECH]
PARTS += ["What do you miss most about your brother?", "I'm sorry to hear that.", "1. Rest\n2. Talk to someone"]
PARTS += [*"don't n't ? !!! ... … ’ ﬁ İ ß 你好 🙂 you i".split(), "\n", "\x00", "\u2028", "not not not"]
PARTS += ["your fault", "it is not your fault", "why don't you just"]
some = st.lists(st.sampled_from(PARTS), max_size=8)
said = st.one_of(st.text(max_size=200), some.map(" ".join), some.map("".join))


@few
@given(said, said)
def test_any_text_is_scored_from_1_to_5_and_always_the_same(speech, response):
    scores = rubric_scores(speech, response)
    assert tuple(scores) == PRINCIPLE_KEYS and all(type(s) is float and 1 <= s <= 5 for s in scores.values())
    for tool in (*vars(language).values(), *vars(acts).values()):
        if hasattr(tool, "cache_clear"):
            tool.cache_clear()
    assert rubric_scores(speech, response) == scores


@few
@given(said, said)
def test_a_score_is_the_clipped_sum_of_its_points_and_the_rationale_says_it(speech, response):
    scores = rubric_scores(speech, response)
    for key, points in rubric_features(speech, response).items():
        assert scores[key] == pytest.approx(min(5, max(1, sum(points.values()))), abs=1e-6)
        why = rubric_rationale(speech, response, key)
        assert why.startswith(f"Rubric (offline stand-in): {key} {scores[key]:.2f}") and "\n" not in why


@few
@given(st.floats(1, 5), st.floats(1, 5))
def test_a_rating_is_the_whole_number_nearest_to_its_score(first, second):
    assert type(to_rating(first)) is int and 1 <= to_rating(first) <= 5 and abs(to_rating(first) - first) <= 0.5
    assert first > second or to_rating(first) <= to_rating(second)


@pytest.mark.parametrize("response", ["", " ", "\n\n", "...", "?!", "🙂"])
def test_silence_gets_the_lowest_score_everywhere(response):
    assert set(rubric_scores(SPEECH, response).values()) == {1.0}


@pytest.mark.parametrize("part", ["a ", "?", "not ", "you ", "\n", "'", "it sounds like you feel "])
def test_a_very_long_text_is_scored_too(part):
    text = part * (80_000 // max(4, len(part)))
    assert all(1 <= s <= 5 for s in rubric_scores(SPEECH, text).values())
    assert all(1 <= s <= 5 for s in rubric_scores(text[:2000], "It sounds like this is hard.").values())


def test_scores_do_not_depend_on_the_process():
    responses = [p.format(word="shifts") for p in PHRASES]
    code = (
        "import json, sys; from psycopref.rater.rubric import rubric_scores; s, r = json.load(sys.stdin); "
        "print(json.dumps([rubric_scores(s, x) for x in r]))"
    )
    for salt in ("1", "2"):
        how = dict(input=json.dumps([SPEECH, responses]), capture_output=True, text=True, check=True)
        done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": salt}, **how)
        assert json.loads(done.stdout) == [rubric_scores(SPEECH, r) for r in responses]


def test_a_model_by_rules_is_another_where_its_lists_are(monkeypatch, tmp_path):
    before = RulesModel("rubric").identity
    (tmp_path / "rubric.yaml").write_text("phrases: {}")
    monkeypatch.setattr(rules, "resource_path", tmp_path.joinpath)
    assert RulesModel("rubric").identity != before


# ---- as a judge ----


def fields(first, second):
    return {"client_speech": SPEECH, "response_1": first, "response_2": second}


@few
@given(said, said)
def test_swapping_the_responses_swaps_the_verdict_where_scores_differ(first, second):
    one, two = rubric_scores(SPEECH, first), rubric_scores(SPEECH, second)
    one, two = one | {"overall": sum(one.values())}, two | {"overall": sum(two.values())}
    here, there = (parse_battle(rubric_reply("battle", fields(*pair))) for pair in ((first, second), (second, first)))
    for key in BATTLE_KEYS:
        if one[key] != two[key]:
            assert here[key] == (1 if one[key] > two[key] else 2) == 3 - there[key]
        else:
            assert here[key] == there[key], "a tie goes to one place, whoever stands there"
    assert parse_choice(rubric_reply("rank", fields(first, second))) == here["overall"]


@few
@given(st.lists(said, min_size=1, max_size=6), st.sampled_from(PRINCIPLE_KEYS))
def test_ratings_are_the_rounded_scores_in_the_order_shown(responses, key):
    shown = {"client_speech": SPEECH, "principle": key} | {f"response_{i}": r for i, r in enumerate(responses, 1)}
    rated = parse_ratings(rubric_reply("rate", shown), len(responses))
    assert [rating for rating, _ in rated] == [to_rating(rubric_scores(SPEECH, r)[key]) for r in responses]


# ---- constructs ----

CONSTRUCTS = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text(encoding="utf-8"))["constructs"]


@pytest.mark.parametrize(("principle", "pair"), [(key, pair) for key, pairs in CONSTRUCTS.items() for pair in pairs])
def test_constructs(principle, pair):
    client, better, worse = pair
    assert rubric_scores(client, better)[principle] > rubric_scores(client, worse)[principle]


def test_stages_of_change():
    stages = [stage_of_change(client) for client, _, _ in CONSTRUCTS["staging"]]
    assert stages == ["early", "early", "ready", "late", "lapse"] and stage_of_change("The bus is green.") == "unclear"


# what was measured, less one or two pairs: a later change that breaks much is seen, one that shifts a pair is not
FLOORS = {
    "develop": dict(empathy=20, relevance=19, clarity=20, safety=20, exploration=22, autonomy=20, staging=21),
    "held-out": dict(empathy=18, relevance=19, clarity=20, safety=12, exploration=18, autonomy=18, staging=17),
}


@pytest.mark.parametrize("half", FLOORS)
def test_minimal_pairs_stay_told_apart(half):
    rows = [json.loads(line) for line in resource_path("minimal_pairs.jsonl").read_text().splitlines()]
    told = dict.fromkeys(FLOORS[half], 0)
    for row in rows:
        if row["set"] == half:
            better, worse = (rubric_scores(row["client"], row[side])[row["principle"]] for side in ("better", "worse"))
            told[row["principle"]] += better > worse
    assert all(told[key] >= floor for key, floor in FLOORS[half].items()), told


@few
@given(said, said)
def test_saying_it_again_never_pays(speech, response):
    once, thrice = (sum(rubric_scores(speech, "\n".join([response] * n)).values()) for n in (1, 3))
    assert thrice <= once + 1e-6
