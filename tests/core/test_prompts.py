"""Prompts carry a client's words untouched, and only a well-formed verdict is read as one."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.core.prompts import (
    BATTLE_KEYS,
    BadReply,
    battle_schema,
    comparison_prompt,
    fill,
    find_json,
    parse_all_ratings,
    parse_battle,
    parse_choice,
    parse_ratings,
    principles,
    prompt_text,
    rating_all_schema,
    rating_prompt,
    rating_schema,
    responding_prompt,
)
from psycopref.core.files import PRINCIPLE_KEYS

few = settings(max_examples=120, deadline=None, derandomize=True, database=None)

prose = st.text(max_size=40).filter(lambda t: "{" not in t and "}" not in t)
ratings = st.lists(st.integers(1, 5), min_size=1, max_size=6)
wrappers = st.sampled_from(
    ["{}", "```json\n{}\n```", "```\n{}\n```", "Here it is:\n{}\nI hope this helps.", "\ufeff{}", "**{}**"]
)
not_a_rating = st.one_of(
    st.integers().filter(lambda v: not 1 <= v <= 5), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=5),
    st.lists(st.integers(1, 5), max_size=2), st.sampled_from(["3", "5/5", 3.0, "three", 1.0, {}, {"rating": 3}]))  # fmt: skip


def reply_of(values, rationale='because {it} said "so"'):
    keys = {}
    for i, value in enumerate(values, 1):
        keys |= {f"response_{i}_rating": value, f"rationale_{i}": rationale}
    return keys


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
    with pytest.raises(BadReply, match=f"response_{place + 1}_rating"):
        parse_ratings(json.dumps(reply_of(values)), len(values))


@few
@given(ratings, st.data())
def test_a_missing_rating_is_refused(values, data):
    place = data.draw(st.integers(1, len(values)))
    reply = reply_of(values)
    del reply[f"response_{place}_rating"]
    with pytest.raises(BadReply):
        parse_ratings(json.dumps(reply), len(values))


@few
@given(ratings, st.data())
def test_a_reply_cut_off_before_its_end_is_refused(values, data):
    body = json.dumps(reply_of(values, "no braces here"))
    with pytest.raises(BadReply):
        parse_ratings(body[: data.draw(st.integers(0, len(body) - 1))], len(values))


def test_a_missing_rationale_is_empty():
    assert parse_ratings('{"response_1_rating": 2}', 1) == [(2, "")]


@few
@given(st.one_of(st.text(max_size=60), st.text(st.sampled_from(list('{}[]":,123 aeut\\nrlsf-')), max_size=60)))
def test_any_text_is_read_or_refused_in_one_line(text):
    for parse in (parse_ratings, parse_all_ratings, parse_battle, parse_choice, find_json):
        try:
            parse(text)
        except BadReply as error:
            assert str(error) and (parse is not find_json or "\n" not in str(error))


@pytest.mark.parametrize("text", [
    '{"response_1_rating": ' + "1" * 5000 + "}", '{"a": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": ' * 5000 + "}" * 5000,
    '{"response_1_rating": NaN}', '{"response_1_rating": 1e999}', "{}" * 1000], ids=["digits", "lists", "objects", "nan", "infinity", "many"])  # fmt: skip
def test_a_model_that_repeats_itself_is_refused(text):
    with pytest.raises(BadReply):
        parse_ratings(text)
    try:
        assert all(isinstance(found, BadReply) for found in parse_all_ratings(text).values())
    except BadReply as error:
        assert str(error)


@few
@given(st.integers(1, 6))
def test_the_rating_schema_asks_for_what_the_parser_reads(n):
    schema = rating_schema(n)
    assert (
        set(schema["required"]) == set(schema["properties"]) == set(reply_of([1] * n))
        and schema["additionalProperties"] is False
    )
    for key, rule in schema["properties"].items():
        assert rule == (
            {"type": "integer", "minimum": 1, "maximum": 5} if key.endswith("rating") else {"type": "string"}
        )


# ---- all principles in one reply ----

all_values = st.fixed_dictionaries({key: st.lists(st.integers(1, 5), min_size=4, max_size=4) for key in PRINCIPLE_KEYS})


@few
@given(all_values, wrappers, prose, st.permutations(PRINCIPLE_KEYS), st.sampled_from([None, 2]))
def test_all_principles_are_read_out_of_fences_and_prose_in_any_order(values, wrapper, before, order, indent):
    body = {key: {"note": "extra"} | reply_of(values[key]) for key in order} | {"overall": 5}
    found = parse_all_ratings(before + wrapper.replace("{}", json.dumps(body, indent=indent)))
    assert list(found) == list(PRINCIPLE_KEYS)
    for key in PRINCIPLE_KEYS:
        assert found[key] == parse_ratings(json.dumps(reply_of(values[key]))), (
            "one principle is read alike in both forms"
        )


MISSING = object()
faults = st.one_of(not_a_rating, st.just(MISSING))


@few
@given(all_values, st.sampled_from(PRINCIPLE_KEYS), st.integers(1, 4), faults)
def test_a_bad_rating_takes_its_own_principle_only(values, bad, place, wrong):
    reply = {key: reply_of(values[key]) for key in PRINCIPLE_KEYS}
    reply[bad][f"response_{place}_rating"] = wrong
    if wrong is MISSING:
        del reply[bad][f"response_{place}_rating"]
    found = parse_all_ratings(json.dumps(reply))
    assert isinstance(found[bad], BadReply) and str(found[bad]).startswith(f"{bad}: response_{place}_rating is ")
    assert all([rating for rating, _ in found[key]] == values[key] for key in PRINCIPLE_KEYS if key != bad)


@few
@given(
    all_values,
    st.sampled_from(PRINCIPLE_KEYS),
    st.one_of(
        st.just(MISSING), st.none(), st.integers(), st.booleans(), st.text(max_size=5), st.lists(st.integers(1, 5))
    ),
)
def test_a_principle_that_is_no_object_is_refused_alone(values, bad, wrong):
    reply = {key: reply_of(values[key]) for key in PRINCIPLE_KEYS} | {bad: wrong}
    if wrong is MISSING:
        del reply[bad]
    found = parse_all_ratings(json.dumps(reply))
    assert [key for key in PRINCIPLE_KEYS if isinstance(found[key], BadReply)] == [bad]
    assert "expected an object" in str(found[bad]) and "\n" not in str(found[bad])


@few
@given(all_values, st.data())
def test_a_reply_on_all_principles_cut_off_before_its_end_is_refused_as_a_whole(values, data):
    body = json.dumps({key: reply_of(values[key], "no braces here") for key in PRINCIPLE_KEYS})
    with pytest.raises(BadReply):
        parse_all_ratings(body[: data.draw(st.integers(0, len(body) - 1))])


def test_the_form_of_one_principle_is_no_reply_on_all():
    found = parse_all_ratings(json.dumps(reply_of([1, 2, 3, 4])))
    assert all(isinstance(why, BadReply) for why in found.values())
    with pytest.raises(BadReply):
        parse_ratings(json.dumps({key: reply_of([1, 2, 3, 4]) for key in PRINCIPLE_KEYS}))


@pytest.mark.parametrize("n", [1, 4, 6])
def test_the_schema_of_all_principles_holds_the_papers_keys_under_each(n):
    schema = rating_all_schema(n)
    assert (
        schema["required"] == list(PRINCIPLE_KEYS) == list(schema["properties"])
        and schema["additionalProperties"] is False
    )
    assert all(part == rating_schema(n) for part in schema["properties"].values())
    filled = {
        key: {k: 3 if rule["type"] == "integer" else "" for k, rule in part["properties"].items()}
        for key, part in schema["properties"].items()
    }
    assert parse_all_ratings(json.dumps(filled), n) == dict.fromkeys(PRINCIPLE_KEYS, [(3, "")] * n)


# ---- verdicts ----


@few
@given(st.fixed_dictionaries({key: st.sampled_from([1, 2]) for key in BATTLE_KEYS}), wrappers)
def test_a_verdict_is_read_and_nothing_else_passes_for_one(verdict, wrapper):
    text = wrapper.replace("{}", json.dumps(verdict | {"note": "extra"}))
    assert parse_battle(text) == verdict
    for key in BATTLE_KEYS:
        for wrong in (0, 3, "1", 1.0, True, None, [1]):
            with pytest.raises(BadReply, match=key):
                parse_battle(json.dumps(verdict | {key: wrong}))
        with pytest.raises(BadReply, match=key):
            parse_battle(json.dumps({k: v for k, v in verdict.items() if k != key}))


def test_the_verdict_schema_asks_for_what_the_parser_reads():
    schema = battle_schema()
    assert schema["required"] == [*PRINCIPLE_KEYS, "overall"] == list(schema["properties"])
    assert all(rule["enum"] == [1, 2] for rule in schema["properties"].values())


@pytest.mark.parametrize("template", ["{}", "Response {}", "{}.", "**{}**", "({})", "Reply {} is better.\n", "\n{}\n", "I choose {}!", "#{}", "{}, clearly",
                                      "Response {}: it is warmer. So my answer is {}."])  # fmt: skip
@pytest.mark.parametrize("number", [1, 2])
def test_a_choice_is_read(template, number):
    assert parse_choice(template.replace("{}", str(number))) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "neither",
        "both",
        "0",
        "3",
        "12",
        "21",
        "1.5",
        "2.0",
        "10",
        "0.1",
        "1 or 2",
        "Response 1 beats response 2",
        "first",
        "v1.2",
    ],
)
def test_a_text_without_one_choice_is_refused(text):
    with pytest.raises(BadReply):
        parse_choice(text)


@few
@given(st.text(st.sampled_from(list("01223.. ab-\n")), max_size=12))
def test_a_choice_is_the_only_number_1_or_2_that_stands_alone(text):
    alone = {run.rstrip(".") for run in re.split(r"[^0-9.]+", text)} & {"1", "2"}
    if len(alone) == 1:
        assert parse_choice(text) == int(alone.pop())
    else:
        with pytest.raises(BadReply):
            parse_choice(text)


# ---- prompts ----

pieces = [*"{}\\gn1 aé_%$", "{client_speech}", "{response_1}", "{b}", r"\1", r"\g<0>"]
words = st.lists(st.sampled_from(pieces), max_size=12).map("".join)


@few
@given(words, words)
def test_values_go_in_untouched(first, second):
    assert fill("<{a}|{b}|{a}>", a=first, b=second) == f"<{first}|{second}|{first}>"


@few
@given(words, st.lists(words, min_size=4, max_size=4))
def test_every_prompt_carries_the_words_as_they_are(speech, responses):
    rate, rate_all = (rating_prompt(key, speech, responses) for key in ("safety", None))
    for i, response in enumerate(responses, 1):
        assert f"Response {i}: {response}" in rate and f"Response {i}: {response}" in rate_all
    for text in (
        rate,
        rate_all,
        responding_prompt(speech),
        responding_prompt(speech, 40),
        comparison_prompt("battle", speech, *responses[:2]),
    ):
        assert f"Client: {speech}" in text
    first, second = (comparison_prompt("ranker", speech, *pair) for pair in (responses[:2], responses[1::-1]))
    assert f"Response 1: {responses[0]}" in first and f"Response 1: {responses[1]}" in second


@pytest.mark.parametrize("values", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 3}])
def test_slots_and_values_must_match(values):
    with pytest.raises(StudyError) as error:
        fill("{a} {b}", **values)
    assert "\n" not in str(error.value)


def test_a_rating_prompt_names_the_asked_principle_only():
    for principle in principles():
        text = rating_prompt(principle.key, "I can't sleep.", list("wxyz"))
        assert principle.text in text and sum(p.description in text for p in principles()) == 1


def test_a_prompt_for_all_principles_names_every_principle_and_every_key_of_the_reply():
    text = rating_prompt(None, "I can't sleep.", list("wxyz"))
    assert all(text.count(f"[{p.key}] {p.text}") == 1 for p in principles())
    assert all(key in text for key in rating_schema()["required"])


def test_a_users_prompt_for_all_principles_replaces_ours(tmp_path, monkeypatch):
    (tmp_path / "rating_all.txt").write_text("{principles}|{client_speech}|{response_1}|{response_2}")
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    assert rating_prompt(None, "hello", ["a", "b"]).endswith("|hello|a|b") and "Principle:" in rating_prompt(
        "safety", "hello", list("wxyz")
    )
    with pytest.raises(StudyError, match="response_3") as error:
        rating_prompt(None, "hello", list("abc"))
    assert "\n" not in str(error.value)


def test_a_battle_prompt_names_every_principle_and_key():
    text = comparison_prompt("battle", "I can't sleep.", "a", "b")
    assert all(p.text in text for p in principles()) and ", ".join(PRINCIPLE_KEYS) in text


# ---- a user's own prompts ----


def test_a_users_folder_replaces_the_files_it_has_and_no_other(tmp_path, monkeypatch):
    ours = {
        name: prompt_text(name)
        for name in ("responding", "rating", "rating_all", "ranker", "battle", "principles.json")
    }
    (tmp_path / "responding.txt").write_text("Réponds: {client_speech}\n", encoding="utf-8")
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    assert responding_prompt("hello {x}") == "Réponds: hello {x}"
    assert all(prompt_text(name) == text for name, text in ours.items() if name != "responding")
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path / "nowhere"))
    assert prompt_text("responding") == ours["responding"]


def test_a_users_prompt_with_a_wrong_slot_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "ranker.txt").write_text("{client} {response_1} {response_2}")
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    with pytest.raises(StudyError, match="client_speech") as error:
        comparison_prompt("ranker", "a", "b", "c")
    assert "\n" not in str(error.value)


def test_a_prompt_that_nobody_has_is_one_line_with_the_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    with pytest.raises(StudyError, match="nothing.txt") as error:
        prompt_text("nothing")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda entries: entries[::-1], lambda entries: entries[:6], lambda entries: [*entries, entries[0]],
    lambda entries: [{**entries[0], "key": "warmth"}, *entries[1:]]], ids=["order", "six", "eight", "key"])  # fmt: skip
def test_a_users_principles_keep_keys_and_order(tmp_path, monkeypatch, change):
    entries = json.loads(prompt_text("principles.json"))
    (tmp_path / "principles.json").write_text(json.dumps(change(entries)))
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    with pytest.raises(StudyError, match="principles.json"):
        principles()


def test_a_users_principles_may_have_other_words(tmp_path, monkeypatch):
    entries = json.loads(prompt_text("principles.json"))
    entries[0]["description"] = "Is it kind?"
    (tmp_path / "principles.json").write_text(json.dumps(entries))
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    assert "Is it kind?" in rating_prompt("empathy", "a", list("wxyz"))


@pytest.mark.parametrize("content", ["[{", "[]", '[{"key": "empathy"}]', '{"empathy": "be kind"}', '["empathy"]'])
def test_a_users_broken_principles_are_one_line(tmp_path, monkeypatch, content):
    (tmp_path / "principles.json").write_text(content)
    monkeypatch.setenv("PSYCOPREF_PROMPTS", str(tmp_path))
    with pytest.raises(StudyError, match="principles.json") as error:
        principles()
    assert "\n" not in str(error.value)
