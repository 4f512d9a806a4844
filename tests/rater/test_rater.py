"""The offline rater takes any text, stays on its scale, judges a pair alike from both sides, knows its constructs."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from psycopref.core.principles import principle_keys, use_principles
from psycopref.core.paper import resource_path
from psycopref.core.prompts import battle_keys, parse_battle, parse_choice, parse_ratings
from psycopref.core.settings import StudyError, load_profile
from psycopref.rater import rules, scoring
from psycopref.rater.dialogue_acts import DIALOGUE_ACTS
from psycopref.rater.heads import read_heads
from psycopref.rater.language import plain, words_of
from psycopref.rater.rules import PHRASES, RulesModel, rubric_reply, score_batch, to_rating
from psycopref.run.plan import plan_run
from psycopref.rater.scoring import answer_features, contributions, explain_answers, score_answers

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

few = settings(max_examples=5, deadline=None, derandomize=True, database=None)

SPEECH = "My wife says I drink too much. Maybe part of me is scared. Since my brother died I can't sleep."
PARTS = ["It sounds like the nights are long.", "That makes sense.", "You must stop drinking.", "Calm down.", SPEECH]
PARTS += ["What do you miss most about your brother?", "I'm sorry to hear that.", "1. Rest\n2. Talk to someone"]
PARTS += [*"don't n't ? !!! ... … ’ ﬁ İ ß 你好 🙂 you i".split(), "\n", "\x00", "\u2028", "not not not"]
some = st.lists(st.sampled_from(PARTS), max_size=8)
said = st.one_of(st.text(max_size=200), some.map(" ".join), some.map("".join))
many = st.lists(st.tuples(said, said), min_size=1, max_size=8)


def held_answers(count):
    "Draw answers from the sentences held back: client speeches, responses."
    lines = [json.loads(line) for line in resource_path("rater/sentences.jsonl").read_text().splitlines()]
    rows = [(row["client"], " ".join(said for said, _ in row["answer"])) for row in lines if row["set"] == "held"]
    drawn = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
    return [list(column) for column in zip(*drawn)]


@few
@given(many)
def test_any_text_is_scored_from_1_to_5_whoever_is_scored_beside_it(pairs):
    clients, responses = map(list, zip(*pairs))
    scores = score_answers(clients, responses)
    assert tuple(scores) == PRINCIPLE_KEYS and scores.notna().all(axis=None) and scores.stack().between(1, 5).all()
    turned = score_answers(clients[::-1], responses[::-1])[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(scores, turned)
    pd.testing.assert_frame_equal(scores[:1], score_answers(clients[:1], responses[:1]))


@few
@given(many)
def test_a_score_is_the_clipped_sum_of_its_points_and_the_rationale_says_it(pairs):
    for pair, own in score_batch(pairs).items():
        for key, points in own.points.items():
            if re.search(r"[^\W\d_]", pair[1]):
                assert own.scores[key] == pytest.approx(min(5, max(1, sum(points.values()))), abs=1e-5)
            why = rules.rubric_rationale(own, key)
            assert why.startswith(f"Rubric (offline stand-in): {key} {own.scores[key]:.2f}") and "\n" not in why


@given(st.floats(1, 5), st.floats(1, 5))
@settings(deadline=None, derandomize=True, database=None)
def test_a_rating_is_the_whole_number_nearest_to_its_score(first, second):
    assert type(to_rating(first)) is int and 1 <= to_rating(first) <= 5 and abs(to_rating(first) - first) <= 0.5
    assert first > second or to_rating(first) <= to_rating(second)


def test_silence_gets_the_lowest_score_everywhere():
    silent = ["", " ", "\n\n", "...", "?!", "🙂", "1.", "ʼ"]
    assert (score_answers([SPEECH] * len(silent), silent) == 1).all(axis=None)
    assert score_answers([], []).empty and explain_answers([], [])[1] == [] and score_batch([]) == {}


def test_faults_of_form_are_those_of_the_text_and_no_others():
    found = lambda text: scoring.form_features(SPEECH, text)
    listed = "I hear the wine, the bills, the shame, the silence, again."
    assert found(f"Hard. {listed}")["chopped"] == found(f"Hard. Hard. Hard. {listed}")["chopped"] == 1
    assert found("That is hard.\r\n")["cut off"] == 0 and found("That is\n")["cut off"] == 1
    prose = ("You came back - after all that - and told me.", "He left in 2019. You moved in 2021. Was it hard?")
    assert [found(text)["list"] for text in (*prose, "- rest\n- eat", "1. rest 2) eat")] == [0, 0, 1, 1]


def test_clients_and_responses_are_as_many():
    with pytest.raises(ValueError, match="longer"):
        score_answers([SPEECH], ["Hard.", "What helps?"])


def test_a_feature_that_is_misspelt_is_refused(tmp_path):
    place, one = tmp_path / "own.yaml", {"key": "kind", "name": "Kind", "description": "It is kind."}
    one["points"] = {"base": 2.0, "early × any advise": 1.0}
    place.write_text(yaml.safe_dump({"title": "sums", "principles": [one]}))
    use_principles(str(place))
    with pytest.raises(StudyError, match="principles 'sums', kind: 'any advise' .* any advice"):
        scoring.principle_points()


def test_very_long_texts_are_scored_too():
    parts = ["a ", "?", "not ", "you ", "\n", "'", "it sounds like you feel "]
    long = [part * (20_000 // max(4, len(part))) for part in parts]
    assert score_answers([SPEECH] * len(long), long).stack().between(1, 5).all()
    assert score_answers([text[:2000] for text in long], ["Hard."] * len(long)).stack().between(1, 5).all()


def test_scores_do_not_depend_on_the_process():
    responses = [phrase.format(word="shifts") for phrase in PHRASES]
    code = (
        "import json, sys; from psycopref.rater.scoring import score_answers; s, r = json.load(sys.stdin); "
        "print(score_answers([s] * len(r), r).to_json())"
    )
    how = dict(input=json.dumps([SPEECH, responses]), capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert json.loads(done.stdout) == json.loads(score_answers([SPEECH] * len(responses), responses).to_json())


def test_every_feature_of_the_points_is_one_that_can_be_found():
    found = answer_features([SPEECH], ["What do you miss most?"], read_heads())[0]
    known = {*found, *(f"{how} {act}" for how in ("any", "share") for act in DIALOGUE_ACTS)}
    points = scoring.principle_points()
    assert tuple(points) == PRINCIPLE_KEYS
    for key, own in points.items():
        named = {part for name in own if name != "base" for part in name.split(" × ")}
        assert named <= known, f"{key}: {named - known}"
        assert contributions(found, key).sum(axis=1).shape == (1,)


def test_acts_are_named_by_sentence():
    text = "You lost him in spring. What do you miss most? My own brother died when I was twenty."
    [told] = map(json.loads, explain_answers([SPEECH], [text])[1])
    assert [sentence for sentence, _ in told] == ["You lost him in spring.", "What do you miss most?", text[47:]]
    assert told[1][1] == ["open_question"] and told[2][1] == ["self_disclosure"]


def test_the_names_that_points_may_count_are_those_of_every_answer():
    found, _ = answer_features([SPEECH, ""], ["What is it like?", "You must stop."], read_heads("acts"))
    assert {*scoring.feature_names()} == {*found.columns} - {"silent"}


def test_a_plan_refuses_points_that_the_rubric_cannot_count(tmp_path):
    place = tmp_path / "own.yaml"
    one = {"key": "right", "name": "Right", "description": "It is right.", "safety": True}
    for points, said in (({"base": 3.0, "share advicee": 1.0}, "Did you mean share advice"), ({}, "has no points")):
        place.write_text(yaml.safe_dump({"title": "sums", "principles": [one | {"points": points}]}))
        with pytest.raises(StudyError, match=said):
            plan_run(load_profile("tiny", {"principles": str(place)}), 100)


def test_a_model_by_rules_is_another_where_its_points_or_heads_are(monkeypatch):
    before = RulesModel("rubric").identity
    assert before != RulesModel("rubric-annomi").identity != RulesModel("phrases").identity
    use_principles("plain-words")
    assert RulesModel("rubric").identity != before and "diagnoses" in RulesModel("rubric").label
    use_principles("counselling")
    monkeypatch.setattr(rules, "resource_path", lambda file: resource_path("screen_cases.jsonl"))
    assert RulesModel("rubric").identity != before
    with pytest.raises(StudyError, match="rubric-annomi"):
        RulesModel("rubric-anomi")


def test_a_models_identity_holds_all_code_and_inputs_that_answers_depend_on():
    own = rules.rules_source("rubric")
    beside = {
        value for value in vars(scoring).values() if getattr(value, "__module__", "").startswith("psycopref.rater")
    }
    modules = {scoring.__name__, *(value.__module__ for value in beside if callable(value))}
    assert len(modules) == 5 and all(inspect.getsource(sys.modules[name]) in own for name in modules)
    assert inspect.getsource(to_rating) in own


# ---- as a judge ----


def fields(first, second):
    return {"client_speech": SPEECH, "response_1": first, "response_2": second}


@few
@given(many)
def test_swapping_the_responses_swaps_the_verdict_where_scores_differ(pairs):
    known = score_batch((SPEECH, text) for pair in pairs for text in pair)
    for first, second in pairs:
        one, two = ({**known[SPEECH, text].scores} for text in (first, second))
        one, two = one | {"overall": sum(one.values())}, two | {"overall": sum(two.values())}
        here = parse_battle(rubric_reply("battle", fields(first, second), known))
        there = parse_battle(rubric_reply("battle", fields(second, first), known))
        for key in BATTLE_KEYS:
            if one[key] != two[key]:
                assert here[key] == (1 if one[key] > two[key] else 2) == 3 - there[key]
            else:
                assert here[key] == there[key], "a tie goes to one place, whoever stands there"
        assert parse_choice(rubric_reply("rank", fields(first, second), known)) == here["overall"]


@few
@given(st.lists(said, min_size=1, max_size=6), st.sampled_from(PRINCIPLE_KEYS))
def test_ratings_are_the_rounded_scores_in_the_order_shown(responses, key):
    shown = {"client_speech": SPEECH, "principle": key} | {f"response_{i}": r for i, r in enumerate(responses, 1)}
    rated = parse_ratings(rubric_reply("rate", shown), len(responses))
    scores = score_answers([SPEECH] * len(responses), responses)
    assert [rating for rating, _ in rated] == [to_rating(score) for score in scores[key]]


# ---- constructs: floors are what was measured, less a few, so that a change that breaks much is seen ----

CONSTRUCTS = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text(encoding="utf-8"))["constructs"]


def test_constructs():
    pairs = [(key, *pair) for key, pairs in CONSTRUCTS.items() for pair in pairs]
    better, worse = (score_answers([p[1] for p in pairs], [p[side] for p in pairs]) for side in (2, 3))
    missed = [pair for i, pair in enumerate(pairs) if better[pair[0]][i] <= worse[pair[0]][i]]
    assert len(missed) <= 7, missed


FLOORS = {
    "develop": dict(empathy=18, relevance=18, clarity=20, safety=17, exploration=17, autonomy=19, staging=21),
    "held-out": dict(empathy=17, relevance=17, clarity=20, safety=18, exploration=20, autonomy=18, staging=19),
}


def test_minimal_pairs_stay_told_apart():
    rows = pd.read_json(resource_path("minimal_pairs.jsonl"), lines=True, dtype=False)
    better, worse = (score_answers(rows.client.tolist(), rows[side].tolist()) for side in ("better", "worse"))
    told = [better[key][i] > worse[key][i] for i, key in enumerate(rows.principle)]
    counts = rows.assign(told=told).groupby(["set", "principle"]).told.sum()
    assert all(counts[half, key] >= floor for half, floors in FLOORS.items() for key, floor in floors.items()), counts


@pytest.mark.parametrize("heads", ["acts", "acts-annomi"])
def test_warm_answers_that_reinforce_rate_below_those_that_ask(heads):
    rows = pd.read_json(resource_path("rater/triples.jsonl"), lines=True, dtype=False)
    rows = rows[rows.set == "held-out"]
    sides = ("warm_sound", "warm_reinforcing", "cold_sound")
    sound, flattering, cold = (score_answers(rows.client.tolist(), rows[s].tolist(), heads).mean(axis=1) for s in sides)
    assert (sound > flattering).mean() > 0.85 and (sound > cold).mean() > 0.75


def test_length_is_not_quality():
    clients, responses = held_answers(120)
    empty = ("Thank you for sharing this with me.", "These things can be difficult.", "I see.", "Change takes time.")
    forms = ["{0}", "{0}\n{0}", "{0}\n{0}\n{0}", *("{0}\n" + more for more in empty)]
    texts = [form.format(text) for form in forms for text in responses]
    once, twice, thrice, *padded = score_answers(clients * len(forms), texts).mean(axis=1).to_numpy().reshape(7, -1)
    assert abs(spearmanr(once, [len(response.split()) for response in responses])[0]) < 0.3
    assert (twice <= once + 0.05).all() and (thrice <= once + 0.05).all()
    for more, scores in zip(empty, padded):
        assert (scores - once).mean() < 0.05 and (scores - once > 0.1).mean() < 0.25, more


def test_an_answer_that_turns_in_circles_is_worth_less_on_every_principle():
    "Optimised policies found this hole: each round takes up a client's words, and no sentence is said twice."
    client = "Two weeks ago I stopped taking naps. The days are awful, and the nights are slowly getting better."
    said = "It sounds like the days are awful. It's not just your sleep, it's your day."
    circles = " It's not just your day, it's your sleep. It's not just your nights, it's your sleep."
    once, again = score_answers([client] * 2, [said, said + circles]).to_numpy()
    assert (again <= once).all() and (once - again).mean() > 0.5
    rows = pd.read_json(resource_path("minimal_pairs.jsonl"), lines=True, dtype=False)
    written = [scoring.said_again(words_of(plain(text))) for text in [*rows.better, *rows.worse]]
    assert np.mean(np.array(written) < 0.03) > 0.98
