"""Prompts carry a client's words untouched, and only a well-formed verdict is read as one."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.principles import principle_keys
from psycopref.core.prompts import battle_keys, BadReply, battle_schema, comparison_prompt, fill, find_json
from psycopref.core.prompts import parse_all_ratings, parse_battle, parse_choice, parse_ratings, principles, prompt_text
from psycopref.core.prompts import rating_all_schema, rating_prompt, rating_schema, responding_prompt

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

few = settings(max_examples=120, deadline=None, derandomize=True, database=None)

MISSING = object()
prose = st.text(max_size=40).filter(lambda t: "{" not in t and "}" not in t)
ratings = st.lists(st.integers(1, 5), min_size=1, max_size=6)
fences = ["{}", "```json\n{}\n```", "```\n{}\n```", "Here it is:\n{}\nI hope this helps.", "\ufeff{}", "**{}**"]
wrappers = st.sampled_from(fences)
other_numbers = st.integers().filter(lambda v: not 1 <= v <= 5)
odd = st.sampled_from(["3", "5/5", 3.0, "three", 1.0, {}, {"rating": 3}, MISSING])
lists = st.lists(st.integers(1, 5), max_size=2)
not_a_rating = st.one_of(
    other_numbers, st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=5), lists, odd
)


def reply_of(values, rationale='because {it} said "so"'):
    keys = {}
    for i, value in enumerate(values, 1):
        keys |= {f"response_{i}_rating": value, f"rationale_{i}": rationale}
    return {key: value for key, value in keys.items() if value is not MISSING}


# ---- ratings ----


@few
@given(ratings, wrappers, prose, prose, st.text(max_size=30), st.sampled_from([None, 2]), st.booleans())
def test_ratings_are_read_out_of_fences_and_prose(values, wrapper, before, after, rationale, indent, ascii_only):
    body = json.dumps(reply_of(values, rationale), indent=indent, ensure_ascii=ascii_only)
    text = before + wrapper.replace("{}", body) + after
    assert parse_ratings(text, len(values)) == [(value, rationale) for value in values]


@few
@given(ratings, not_a_rating, st.data())
def test_anything_but_a_whole_number_from_1_to_5_is_refused(values, wrong, data):
    place = data.draw(st.integers(0, len(values) - 1))
    values = [*values[:place], wrong, *values[place + 1 :]]
    with pytest.raises(BadReply, match=f"response_{place + 1}_rating is .*, expected a whole number from 1 to 5"):
        parse_ratings(json.dumps(reply_of(values)), len(values))


@few
@given(ratings, st.data())
def test_a_reply_cut_off_before_its_end_is_refused(values, data):
    one = reply_of(values, "no braces here")
    for parse, body in ((parse_ratings, one), (parse_all_ratings, dict.fromkeys(PRINCIPLE_KEYS, one))):
        text = json.dumps(body)
        with pytest.raises(BadReply):
            parse(text[: data.draw(st.integers(0, len(text) - 1))], len(values))


def test_a_rationale_may_be_missing_and_is_text():
    assert parse_ratings('{"response_1_rating": 2}', 1) == [(2, "")]
    for wrong in ("3", "null", '["a"]'):
        with pytest.raises(BadReply, match="rationale_1 is .*, expected text"):
            parse_ratings(f'{{"response_1_rating": 2, "rationale_1": {wrong}}}', 1)


@few
@given(st.one_of(st.text(max_size=60), st.text(st.sampled_from(list('{}[]":,123 aeut\\nrlsf-')), max_size=60)))
def test_any_text_is_read_or_refused_in_one_line(text):
    for parse in (parse_ratings, parse_all_ratings, parse_battle, parse_choice, find_json):
        try:
            parse(text)
        except BadReply as error:
            assert str(error) and (parse is not find_json or "\n" not in str(error))


LONG = {"digits": '{"response_1_rating": ' + "1" * 5000 + "}", "lists": '{"a": ' + "[" * 5000 + "]" * 5000 + "}"}
LONG |= {"objects": '{"a": ' * 5000 + "}" * 5000, "nan": '{"response_1_rating": NaN}', "many": "{}" * 1000}
LONG |= {"infinity": '{"response_1_rating": 1e999}'}


@pytest.mark.parametrize("name", LONG)
def test_a_model_that_repeats_itself_is_refused(name):
    with pytest.raises(BadReply):
        parse_ratings(LONG[name])
    try:
        assert all(isinstance(found, BadReply) for found in parse_all_ratings(LONG[name]).values())
    except BadReply as error:
        assert str(error)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_the_rating_schemas_ask_for_what_the_parsers_read(n):
    schema, every = rating_schema(n), rating_all_schema(n)
    keys = reply_of([1] * n)
    assert set(schema["required"]) == set(schema["properties"]) == set(keys) and not schema["additionalProperties"]
    number, text = {"type": "integer", "minimum": 1, "maximum": 5}, {"type": "string"}
    rules = {key: number if key.endswith("rating") else text for key in keys}
    assert schema["properties"] == rules and every["properties"] == dict.fromkeys(PRINCIPLE_KEYS, schema)
    assert every["required"] == list(PRINCIPLE_KEYS) and every["additionalProperties"] is False
    filled = {key: 3 if rule is number else "" for key, rule in rules.items()}
    found = parse_all_ratings(json.dumps(dict.fromkeys(PRINCIPLE_KEYS, filled)), n)
    assert found == dict.fromkeys(PRINCIPLE_KEYS, [(3, "")] * n)


# ---- all principles in one reply ----

all_values = st.fixed_dictionaries({key: st.lists(st.integers(1, 5), min_size=4, max_size=4) for key in PRINCIPLE_KEYS})
a_key = st.sampled_from(PRINCIPLE_KEYS)


@few
@given(all_values, wrappers, prose, st.permutations(PRINCIPLE_KEYS), st.sampled_from([None, 2]))
def test_all_principles_are_read_as_one_is_in_any_order(values, wrapper, before, order, indent):
    body = {key: {"note": "extra"} | reply_of(values[key]) for key in order} | {"overall": 5}
    found = parse_all_ratings(before + wrapper.replace("{}", json.dumps(body, indent=indent)))
    assert list(found) == list(PRINCIPLE_KEYS)
    assert all(found[key] == parse_ratings(json.dumps(reply_of(values[key]))) for key in PRINCIPLE_KEYS)


@few
@given(all_values, a_key, st.integers(1, 4), not_a_rating)
def test_a_bad_rating_takes_its_own_principle_only(values, bad, place, wrong):
    wrongly = [*values[bad][: place - 1], wrong, *values[bad][place:]]
    found = parse_all_ratings(json.dumps({key: reply_of(values[key]) for key in values} | {bad: reply_of(wrongly)}))
    assert isinstance(found[bad], BadReply) and str(found[bad]).startswith(f"{bad}: response_{place}_rating is ")
    assert all([rating for rating, _ in found[key]] == values[key] for key in PRINCIPLE_KEYS if key != bad)


no_object = st.one_of(st.none(), st.integers(), st.booleans(), st.text(max_size=5), lists, st.just(MISSING))


@few
@given(all_values, a_key, no_object)
def test_a_principle_that_is_no_object_is_refused_alone(values, bad, wrong):
    reply = {key: reply_of(values[key]) for key in values} | {bad: wrong}
    found = parse_all_ratings(json.dumps({key: own for key, own in reply.items() if own is not MISSING}))
    assert [key for key in PRINCIPLE_KEYS if isinstance(found[key], BadReply)] == [bad]
    assert "expected an object" in str(found[bad]) and "\n" not in str(found[bad])


def test_the_form_of_one_principle_is_no_reply_on_all():
    one = reply_of([1, 2, 3, 4])
    assert all(isinstance(why, BadReply) for why in parse_all_ratings(json.dumps(one)).values())
    with pytest.raises(BadReply):
        parse_ratings(json.dumps(dict.fromkeys(PRINCIPLE_KEYS, one)))
    with pytest.raises(BadReply, match="response_4_rating is there, expected ratings of 3"):
        parse_ratings(json.dumps(one), 3)


# ---- verdicts ----


@few
@given(st.fixed_dictionaries({key: st.sampled_from([1, 2]) for key in BATTLE_KEYS}), wrappers)
def test_a_verdict_is_read_and_nothing_else_passes_for_one(verdict, wrapper):
    schema = battle_schema()
    assert schema["required"] == list(BATTLE_KEYS) == list(schema["properties"])
    assert all(rule["enum"] == [1, 2] for rule in schema["properties"].values())
    assert parse_battle(wrapper.replace("{}", json.dumps(verdict | {"note": "extra"}))) == verdict
    for key in BATTLE_KEYS:
        without = {name: own for name, own in verdict.items() if name != key}
        for wrong in (without, *(verdict | {key: value} for value in (0, 3, "1", 1.0, True, None, [1]))):
            with pytest.raises(BadReply, match=key):
                parse_battle(json.dumps(wrong))


CHOICES = ["{}", "Response {}", "{}.", "**{}**", "({})", "Reply {} is better.\n", "\n{}\n", "I choose {}!", "#{}"]
CHOICES += [
    "Final answer: {}",
    "I would say that response {} is more helpful.",
    '{"choice": {}}',
    "Response {}. Response {}.",
]
NO_CHOICES = [
    "1, clearly",
    "Not 1",
    "1 is worse",
    "-1",
    "1-800-555-0199",
    "1/2",
    "1:2",
    "1st",
    "①",
    "one",
    "1 5 stars",
    "1 No 2",
]
NO_CHOICES += [
    "Response 1: it is warmer.",
    "I can't choose. If you are in danger call 1-800-555-0199.",
    "回答1",
    "1.",
    "2!",
][:3]
NO_CHOICES += ["", "neither", "both", "0", "3", "12", "21", "1.5", "2.0", "10", "0.1", "1 or 2", "first", "v1.2"]


def test_a_choice_is_read_and_a_text_without_one_refused():
    for template in CHOICES:
        assert [parse_choice(template.replace("{}", str(number))) for number in (1, 2)] == [1, 2], template
    for text in (*NO_CHOICES, "Response 1 beats response 2"):
        with pytest.raises(BadReply):
            parse_choice(text)


@few
@given(st.text(st.sampled_from(list("01223.. ab-\n")), max_size=12))
def test_a_choice_is_the_only_number_1_or_2_that_stands_alone(text):
    numbers, words = re.findall(r"[0-9][0-9.-]*", text), re.findall(r"[ab]+", text)
    try:
        assert {str(parse_choice(text))} == {number.strip(".-") for number in numbers} and set(words) <= {"a"}
    except BadReply:
        one = len({number.strip(".-") for number in numbers} & {"1", "2"}) == 1
        assert not one or len(set(numbers)) > 1 or set(words) - {"a"} or "-" in text


# ---- prompts ----

pieces = [*"{}\\gn1 aé_%$", "{client_speech}", "{response_1}", "{b}", r"\1", r"\g<0>"]
words = st.lists(st.sampled_from(pieces), max_size=12).map("".join)
FOUR = list("wxyz")


@few
@given(words, words)
def test_values_go_in_untouched(first, second):
    assert fill("<{a}|{b}|{a}>", a=first, b=second) == f"<{first}|{second}|{first}>"


@few
@given(words, st.lists(words, min_size=4, max_size=4))
def test_every_prompt_carries_the_words_as_they_are(speech, responses):
    rated = [rating_prompt(key, speech, responses) for key in ("safety", None)]
    for i, response in enumerate(responses, 1):
        assert all(f"Response {i}: {response}" in text for text in rated)
    first, second = (comparison_prompt("ranker", speech, *pair) for pair in (responses[:2], responses[1::-1]))
    assert f"Response 1: {responses[0]}" in first and f"Response 1: {responses[1]}" in second
    others = [responding_prompt(speech), responding_prompt(speech, 40), comparison_prompt("battle", speech, "a", "b")]
    assert all(f"Client: {speech}" in text for text in (*rated, *others, first))


def test_slots_and_values_must_match():
    for values in ({}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 3}):
        one_line(lambda values=values: fill("{a} {b}", **values))


def test_prompts_name_the_principles_and_keys_they_ask_for():
    for principle in principles():
        text = rating_prompt(principle.key, "I can't sleep.", FOUR)
        assert principle.text in text and sum(p.description in text for p in principles()) == 1
    text, battle = rating_prompt(None, "I can't sleep.", FOUR), comparison_prompt("battle", "I can't sleep.", "a", "b")
    assert all(text.count(f"[{p.key}] {p.text}") == 1 and p.text in battle for p in principles())
    assert all(key in text for key in rating_schema()["required"]) and ", ".join(PRINCIPLE_KEYS) in battle


# ---- a user's own prompts ----


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a file into the user's folder of prompts."""

    def write(name, text):
        monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
        (tmp_path / name).write_text(text, encoding="utf-8")

    return write


def test_a_users_folder_replaces_the_files_it_has_and_no_other(tmp_path, monkeypatch, own):
    names = ("responding", "rating", "rating_all", "rating_alone", "ranker", "battle", "topics.json")
    ours = {name: prompt_text(name) for name in names}
    own("responding.txt", "Réponds: {client_speech}\n")
    assert responding_prompt("hello {x}") == "Réponds: hello {x}"
    assert all(prompt_text(name) == text for name, text in ours.items() if name != "responding")
    own("rating_all.txt", "{principles}|{client_speech}|{response_1}|{response_2}")
    assert rating_prompt(None, "hello", ["a", "b"]).endswith("|hello|a|b")
    assert "response_3" in one_line(lambda: rating_prompt(None, "hello", list("abc")))
    own("ranker.txt", "{client} {response_1} {response_2}")
    assert "client_speech" in one_line(lambda: comparison_prompt("ranker", "a", "b", "c"))
    said = one_line(lambda: prompt_text("nothing"))
    assert "nothing.txt" in said and str(tmp_path) in said
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path / "nowhere"))
    assert "found no folder there" in one_line(lambda: prompt_text("responding")), "ours would be another study"
    monkeypatch.setenv("PSYCOPREF_ROOT", str(tmp_path.parent))
    monkeypatch.setenv("PSYCOPREF_PROMPTS", tmp_path.name)
    assert "client_speech" in one_line(lambda: comparison_prompt("ranker", "a", "b", "c")), "relative: in the project"


@pytest.mark.parametrize("key", ["Response_1_rating", "response_1_rating ", "RESPONSE_1_RATING"])
def test_keys_that_differ_in_capitals_or_blanks_alone_are_one_key_twice(key):
    good = {f"response_{i}_rating": i for i in range(1, 5)} | {f"rationale_{i}": "so" for i in range(1, 5)}
    assert [rating for rating, _ in parse_ratings(json.dumps(good))] == [1, 2, 3, 4]
    with pytest.raises(BadReply, match="capitals or blanks"):
        parse_ratings(json.dumps(good | {key: 5}))
