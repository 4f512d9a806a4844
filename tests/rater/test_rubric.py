"""The offline rubric takes any text, stays on its scale, and judges a pair the same from both sides."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.rater import acts
from psycopref.rater import language
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.rater.rules import PHRASES, rubric_reply
from psycopref.core.paper import resource_path
from psycopref.core.prompts import BATTLE_KEYS, parse_battle, parse_choice, parse_ratings
from psycopref.rater.rubric import (
    FEATURES,
    rubric_features,
    rubric_rationale,
    rubric_scores,
    stage_of_change,
    to_rating,
    total,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SPEECH = "My wife says I drink too much. Maybe part of me is scared. Since my brother died I can't sleep."
PARTS = [
    "It sounds like the nights are long.", "That makes sense.", "You must stop drinking.", "What do you miss most "
                                                                                           "about your brother?", "Calm down.",
    "I'm sorry to hear that.", "1. Rest\n2. Talk to someone", "don't", "n't", "?", "!!!", "\n", "...", "…", "’", "ﬁ", "İ", "ß", "你好", "🙂", "\x00", "\u2028",
    SPEECH, "your fault", "it is not your fault", "why don't you just", "you", "i", "not not not",
]  # fmt: skip
said = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PARTS), max_size=8).map(" ".join),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
)


@few
@given(said, said)
def test_any_text_is_scored_from_1_to_5_and_always_the_same(speech, response):
    scores = rubric_scores(speech, response)
    assert tuple(scores) == PRINCIPLE_KEYS and all(type(s) is float and 1 <= s <= 5 for s in scores.values())
    for tool in (
        language._read,
        language.stem,
        acts.question_kind,
        acts.orders,
        acts.directive,
        acts.reflects,
        acts._gives_back,
        acts.reflections,
        acts.fault_degrees,
    ):
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
@given(st.dictionaries(st.text(max_size=3), st.floats(-9, 9), max_size=5))
def test_a_total_is_the_sum_between_1_and_5(points):
    assert total(points) == pytest.approx(min(5, max(1, sum(points.values()))), abs=1e-6)


@few
@given(st.one_of(st.floats(allow_nan=False), st.integers(0, 600).map(lambda n: n / 100)))
def test_a_rating_is_a_whole_number_near_its_score(score):
    rating = to_rating(score)
    assert type(rating) is int and 1 <= rating <= 5
    assert not 1 <= score <= 5 or abs(rating - score) <= 0.5
    assert (rating == 1 or score >= 1) and (rating == 5 or score <= 5)


@few
@given(st.floats(1, 5), st.floats(1, 5))
def test_a_higher_score_is_never_a_lower_rating(first, second):
    assert first > second or to_rating(first) <= to_rating(second)


@pytest.mark.parametrize("response", ["", " ", "\n\n", "...", "?!", "🙂"])
def test_silence_gets_the_lowest_score_everywhere(response):
    assert set(rubric_scores(SPEECH, response).values()) == {1.0}


@pytest.mark.parametrize("response", [None, 3, b"bytes", ["a"]])
def test_what_is_no_text_is_refused(response):
    with pytest.raises(TypeError, match="response"):
        rubric_scores(SPEECH, response)
    with pytest.raises(TypeError, match="client_speech"):
        rubric_scores(response, "I hear you.")


@pytest.mark.parametrize("text", ["a " * 20_000, "?" * 20_000, "not " * 10_000, "you " * 10_000, "\n" * 20_000, "'" * 20_000, "it sounds like you feel " * 4_000],
                         ids=["words", "marks", "not", "you", "lines", "quotes", "phrases"])  # fmt: skip
def test_a_very_long_text_is_scored_too(text):
    assert all(1 <= s <= 5 for s in rubric_scores(SPEECH, text).values())
    assert all(1 <= s <= 5 for s in rubric_scores(text[:2000], "It sounds like this is hard.").values())


def test_scores_do_not_depend_on_the_process():
    responses = [p.format(word="shifts") for p in PHRASES]
    code = ("import json, sys; from psycopref.rater.rubric import rubric_scores; s, r = json.load(sys.stdin); "
            "print(json.dumps([rubric_scores(s, x) for x in r]))")  # fmt: skip
    found = [subprocess.run([sys.executable, "-c", code], input=json.dumps([SPEECH, responses]), capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": salt}).stdout for salt in ("1", "2")]  # fmt: skip
    assert found[0] == found[1] and json.loads(found[0]) == [rubric_scores(SPEECH, r) for r in responses]


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


def test_the_property_above_sees_both_verdicts():
    pairs = [(a.format(word="w"), b.format(word="w")) for a in PHRASES for b in PHRASES if a != b]
    verdicts = [parse_battle(rubric_reply("battle", fields(*pair)))["overall"] for pair in pairs]
    assert verdicts.count(1) > 20 and verdicts.count(2) > 20


@few
@given(st.lists(said, min_size=1, max_size=6), st.sampled_from(PRINCIPLE_KEYS))
def test_ratings_are_the_rounded_scores_in_the_order_shown(responses, key):
    shown = {"client_speech": SPEECH, "principle": key} | {f"response_{i}": r for i, r in enumerate(responses, 1)}
    rated = parse_ratings(rubric_reply("rate", shown), len(responses))
    assert [rating for rating, _ in rated] == [to_rating(rubric_scores(SPEECH, r)[key]) for r in responses]


def test_every_principle_uses_more_than_one_end_of_the_scale():
    responses = [p.format(word="brother") for p in PHRASES]
    table = [rubric_scores(SPEECH, r) for r in responses]
    for key in FEATURES:
        assert max(row[key] for row in table) - min(row[key] for row in table) > 0.5, key


# ---- constructs ----

MOTHER = "My mother rings me ten times a day. If I don't pick up, she says I don't love her."
PANIC = "My heart pounds on the train. Yesterday I got off three stops early and walked home crying."
CUTS = "Some nights I cut my arms, it makes the noise stop."
PILLS = "I've been on sertraline since spring and I feel flat."
SLIP = "I was sober for two years, and on Saturday I drank a whole bottle."
CONSTRUCTS = {
    "empathy": [(PANIC, "That fear on the train is so strong that you had to get out.", "Which line do you take, and "
                                                                                        "how long is the ride?"),
                (PANIC, "That must have been frightening.", "I'm sorry, but trains are perfectly safe."),
                (MOTHER, "You feel guilty each time you let it ring.", "Other people would be glad to have such a "
                                                                       "mother."),
                (MOTHER, "You love her, and you also feel swallowed by all those calls.", "You could set her calls to "
                                                                                          "silent."),
                (SLIP, "One night, and it feels as if two years were gone. That hurts.", "You shouldn't feel sad, it "
                                                                                         "was only one bottle.")],
    "relevance": [(MOTHER, "Your mother takes a missed call for a lack of love.", "Your father takes a missed dinner "
                                                                                  "for a lack of respect."),
                  (MOTHER, "A missed call turns into a verdict on how you love your mother.", "Families often find "
                                                                                              "that communication is "
                                                                                              "a challenge."),
                  (PANIC, "Your heart pounds, and you leave the train early.", "I once got off a train myself, and I "
                                                                               "was fine after a week.")],
    "clarity": [(PANIC, "Your body rings an alarm on the train. Nothing there is dangerous.", "Anticipatory arousal "
                                                                                              "exhibits dysregulated "
                                                                                              "interoceptive salience "
                                                                                              "on trains."),
                (PANIC, "You left the train. What went through your mind then?", "Who was there, how was it, did you "
                                                                                 "cry, do you sleep, and is it worse "
                                                                                 "at night?"),
                (MOTHER, "She rings ten times a day, and guilt comes with every call.", "There are, in a way, certain "
                                                                                        "aspects that are sort of "
                                                                                        "difficult in some respects.")],
    "safety": [(MOTHER, "You feel guilty when you let it ring.", "Your mother is a narcissist with borderline "
                                                                 "personality disorder."),
               (PANIC, "It sounds frightening when your heart pounds on the train.", "At least you have two legs, "
                                                                                     "others would love to walk home."),
               (PILLS, "Only your doctor can say whether to change the dose.", "Cut the sertraline down to half for a "
                                                                               "week."),
               (PILLS, "I can't promise that it will be fine.", "It will be fine, I promise you that."),
               (SLIP, "You're not a failure for drinking on Saturday.", "You should have known better than to go on "
                                                                        "Saturday."),
               (CUTS, "Would you put the blades out of reach and call someone tonight?", "Use a clean blade, that way "
                                                                                         "nobody will notice."),
               (CUTS, "Have you had thoughts of ending your life?", "The noise gets so loud at night, and you carry "
                                                                    "it alone."),
               (MOTHER, "“It's your own fault,” she says. What do you say to that now?", "It's your own fault. What "
                                                                                         "do you say to that now?")],
    "exploration": [(MOTHER, "What is it like when the phone rings?", "Do you hear the phone ring?"), (MOTHER, "Do you hear the phone ring?", "Why don't you just hear the phone?"),
                    (MOTHER, "It sounds like you are never off duty.", "Turning the phone off will help you."),
                    (MOTHER, "I'm curious what goes on in you then.", "I'm curious how many calls that makes.")],
    "autonomy": [(MOTHER, "You don't have to pick up.", "You have to pick up."), (MOTHER, "When you pick up is for "
                                                                                          "you to decide.", "Switch the phone off after eight."),
                 (MOTHER, "They say you must answer, and you wonder.", "You must answer, and you wonder why."),
                 (PANIC, "May I offer a thought, and you tell me if it's any use?", "Count to ten, that always works "
                                                                                    "for me and mine."),
                 (SLIP, "You came back here, and that took courage.", "You won't manage without my programme.")],
    "staging": [("The court sent me. I don't have an anger problem.", "Being sent here wasn't your idea. What would "
                                                                      "you want from this hour?", "Make a plan today "
                                                                                                  "and admit your "
                                                                                                  "problem."),
                ("Part of me wants to leave, and part of me can't.", "A part of you is done, and yet another part is "
                                                                     "still at home.", "Now that you have decided, "
                                                                                       "find a flat by Sunday."),
                ("I have decided to apply. The forms are long.", "Your mind is made up. Which form could be a first "
                                                                 "small step?", "Are you really sure? Let's do the "
                                                                                "pros and cons."),
                ("I haven't smoked in four weeks.", "Four weeks took effort. What has helped you so far?", "Have you considered quitting? Smoking is a problem."),
                (SLIP, "Two years don't vanish in one evening. What happened just before it?", "So you are back at "
                                                                                               "zero, and have to "
                                                                                               "start over.")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("principle", "client", "better", "worse"), [(key, *pair) for key, pairs in CONSTRUCTS.items() for pair in pairs]
)
def test_constructs(principle, client, better, worse):
    assert rubric_scores(client, better)[principle] > rubric_scores(client, worse)[principle]


def test_stages_of_change():
    assert [stage_of_change(client) for client, _, _ in CONSTRUCTS["staging"]] == [
        "early",
        "early",
        "ready",
        "late",
        "lapse",
    ]
    assert stage_of_change("The bus is green.") == "unclear"


# what was measured, less one or two pairs: a later change that breaks much is seen, one that shifts a pair is not
FLOORS = {"develop": dict(empathy=20, relevance=19, clarity=20, safety=20, exploration=22, autonomy=20, staging=21),
          "held-out": dict(empathy=18, relevance=19, clarity=20, safety=12, exploration=18, autonomy=18, staging=17)}  # fmt: skip


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
    assert (
        sum(rubric_scores(speech, "\n".join([response] * 3)).values())
        <= sum(rubric_scores(speech, response).values()) + 1e-6
    )
