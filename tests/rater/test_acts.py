"""Speech acts and text tools: negation, quotation, questions, directives and reflections are told apart."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.rater.acts import adds_meaning, capped, directive, discloses, faults, incoherent, orders, question_kind
from psycopref.rater.acts import reflections, reflects, suggests, told_words, two_sided, wrong_role
from psycopref.rater.language import LISTS, NEVER, asserted, feelings, found, gist, lexicon, plain, read_exchange
from psycopref.rater.language import read_lists, sentences_of, spoken, stem, words_of

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
WORDS = "you i not never must feel sad , . ? “ \" my wife never at least why don't".split()
text = st.one_of(st.text(max_size=120), st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join))
CLIENT = "My mother rings me ten times a day. If I don't pick up, she says I don't love her."
CASES = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kind", "question"), [(kind, one) for kind, own in CASES["questions"].items() for one in own])
def test_questions(kind, question):
    assert question_kind(plain(question)) == kind


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("directives", lambda said: directive(plain(said))),
        ("belittling", lambda said: found(LISTS.minimising, plain(said), NEVER)),
        ("reflections", lambda said: reflections(read_exchange(CLIENT, said))),
    ],
)
def test_acts_are_told_from_their_look_alikes(name, is_one):
    assert [said for said in CASES[name] if not is_one(said)] == []
    assert [said for said in CASES[f"no {name}"] if is_one(said)] == []


def test_a_suggestion_is_no_order_and_permission_is_asked():
    assert suggests("you could write to her.") and not directive("you could write to her.")
    assert not suggests("you might feel torn.") and not found(LISTS.permission, "i shared a thought.")
    assert found(LISTS.permission, plain("Would it be all right if I shared a thought?"))
    assert orders("write to her.") and not orders("tell me more about her.")


def test_negation_and_quotation():
    fault = lexicon("your fault; blam* yourself")
    assert found(fault, "it is your fault") and not found(fault, "it is not your fault")
    assert not found(fault, "nobody says it is your fault") and spoken("no quotes here") == "no quotes here"
    assert "fault" not in spoken(plain("“It's your fault,” she said."))
    assert not feelings(words_of(asserted("there is no reason to be afraid.")))
    assert feelings(words_of(asserted("you cannot stop crying."))) == {"sadness"}


def test_lists_are_read_from_files(monkeypatch, tmp_path):
    path = tmp_path / "lists.yaml"
    path.write_text("parts: {pet: cat|dog}\npatterns: {two: '{pet} {pet}'}\nphrases: {own: 'my {pet}; purr*'}\n")
    monkeypatch.setattr("psycopref.rater.language.resource_path", lambda name: path)
    lists = read_lists("lists.yaml")
    assert lists.two.search("cat dog") and found(lists.own, "my dog purrs at my cats") == {"my dog", "purrs"}


def test_reflections_have_forms():
    assert not reflects("i know how you feel.") and not discloses("i noticed that you paused.")
    assert discloses("i went through that too.") and two_sided("you want it, and yet you fear it.")
    assert not two_sided("you should want it, and yet you fear it.")


def test_a_parrot_adds_nothing():
    parrot = "You don't pick up and she says you don't love her."
    complex_one = "It sounds like a missed call turns into a verdict on your heart."
    copied = "Your mother rings you ten times a day and if you don't pick up she says you don't love her."
    assert adds_meaning(plain(complex_one), read_exchange(CLIENT, complex_one))
    assert not adds_meaning(plain(parrot), read_exchange(CLIENT, parrot))
    assert read_exchange(CLIENT, copied).copied > 0.5 and read_exchange(CLIENT, complex_one).copied == 0
    assert faults(read_exchange(CLIENT, copied), 1.0)["echoes the client"] < -0.5


def test_faults():
    assert wrong_role(read_exchange(CLIENT, "I'm struggling with my mother and I don't know what to do.")) == 1
    assert wrong_role(read_exchange(CLIENT, "I don't know what the judge will decide. What frightens you most?")) == 0
    assert incoherent(read_exchange(CLIENT, "mother call guilt love phone ring duty")) == 1
    assert told_words(read_exchange(CLIENT, "You wait. It rained.")) == 2 and stem("calls") == stem("calling")
    assert gist(words_of("my mum phoned")) & gist(words_of("your mother")) == {"mother"}


@few
@given(text)
def test_any_text_is_read(said):
    for sentence in sentences_of(said):
        assert question_kind(sentence) in ("open", "closed", "rhetorical", "none")
        assert isinstance(directive(sentence), bool) and isinstance(reflects(sentence), bool)
    exchange = read_exchange(CLIENT, said)
    assert set(reflections(exchange)) <= set(exchange.sentences) and 0 <= exchange.copied <= 1
    assert all(-2 <= points <= 0 for points in faults(exchange, 2.0).values())
    assert spoken(spoken(said)) == spoken(said)


@few
@given(st.floats(-9, 9), st.floats(-3, 3), st.floats(0, 4))
def test_a_count_is_capped(count, each, most):
    assert -most <= capped(count, each, most) <= most
