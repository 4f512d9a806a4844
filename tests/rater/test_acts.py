"""Speech acts and text tools: negation, quotation, questions, directives and reflections are told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.rater.acts import (
    MINIMISING,
    PERMISSION,
    adds_meaning,
    capped,
    directive,
    discloses,
    faults,
    incoherent,
    orders,
    question_kind,
    reflections,
    reflects,
    suggests,
    told_words,
    two_sided,
    wrong_role,
)  # fmt: skip
from psycopref.rater.language import (
    NEVER,
    asserted,
    feelings,
    found,
    gist,
    lexicon,
    plain,
    read_exchange,
    sentences_of,
    spoken,
    stem,
    words_of,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
text = st.one_of(
    st.text(max_size=120),
    st.lists(
        st.sampled_from("you i not never must feel sad , . ? “ \" my wife never at least why don't".split()),
        max_size=25,
    ).map(" ".join),
)
CLIENT = "My mother rings me ten times a day. If I don't pick up, she says I don't love her."


def kinds(*questions):
    return {question_kind(plain(question)) for question in questions}


def test_questions():
    assert kinds(
        "What was it like?",
        "How do you see it?",
        "Tell me about that day.",
        "I'd love to hear how it went.",
        "I wonder what it stands for.",
    ) == {"open"}
    assert kinds("Did you sleep?", "How old is he?", "Is it her voice?", "How many came?") == {"closed"}
    assert kinds(
        "Why don't you call?",
        "Isn't it time?",
        "What on earth did you think?",
        "What kind of mother does that?",
        "Who cares?",
    ) == {"rhetorical"}
    assert kinds("I hear you.", "What you want matters.", "You left.") == {"none"}


@pytest.mark.parametrize("said", ["You must rest.", "You'd better go.", "Pack a bag.", "Write him a letter.", "The only way is to stay.", "Here's what you do: rest.",
                                  "I want you to stop.", "Have you tried yoga?", "If I were you, I'd go.", "It's time to stop."])  # fmt: skip
def test_directives(said):
    assert directive(plain(said))


@pytest.mark.parametrize("said", ["You don't have to rest.", "Your sister says you must rest.", "You feel you should "
                                                                                                "go.", "“Pack a bag,” he said.", "It sounds like you have to hide.",
                                  "Missing a train is hard.", "Since the day he left, you wait.", "Take your time.", "You must be exhausted."])  # fmt: skip
def test_look_alikes_of_directives(said):
    assert not directive(plain(said))


def test_a_suggestion_is_no_order_and_permission_is_asked():
    assert (
        suggests("you could write to her.")
        and not directive("you could write to her.")
        and not suggests("you might feel torn.")
    )
    assert found(PERMISSION, plain("Would it be all right if I shared a thought?")) and not found(
        PERMISSION, "i shared a thought."
    )
    assert orders("write to her.") and not orders("tell me more about her.")


def test_negation_and_quotation():
    fault = lexicon("your fault; blam* yourself")
    assert (
        found(fault, "it is your fault")
        and not found(fault, "it is not your fault")
        and not found(fault, "nobody says it is your fault")
    )
    assert "fault" not in spoken(plain("“It's your fault,” she said.")) and spoken("no quotes here") == "no quotes here"
    assert not feelings(words_of(asserted("there is no reason to be afraid."))) and feelings(
        words_of(asserted("you cannot stop crying."))
    ) == {"sadness"}


def test_belittling_has_shapes():
    for said in (
        "At least you have a job.",
        "It's only an exam.",
        "Everyone goes through that.",
        "I'm sorry, but trains are safe.",
        "You shouldn't feel sad.",
        "No need to worry.",
    ):
        assert found(MINIMISING, plain(said), NEVER), said
    for said in (
        "You're only human.",
        "You shouldn't feel obliged to go.",
        "It isn't only about the exam for you.",
        "I'm sorry you lost him.",
    ):
        assert not found(MINIMISING, plain(said), NEVER), said


def test_reflections_give_back_and_advice_does_not():
    given_back = (
        "You love her, and you also feel swallowed by all those calls.",
        "It's as if you were never off duty.",
        "Part of you dreads the ring.",
        "That is a deep hurt.",
    )
    for said in given_back:
        assert reflections(read_exchange(CLIENT, said)), said
    for said in (
        "You could silence her calls.",
        "Block her number.",
        "When my father died I was sad.",
        "At least you have a mother who calls.",
        "Do you feel guilty?",
    ):
        assert not reflections(read_exchange(CLIENT, said)), said
    assert (
        not reflects("i know how you feel.")
        and discloses("i went through that too.")
        and not discloses("i noticed that you paused.")
    )
    assert two_sided("you want it, and yet you fear it.") and not two_sided("you should want it, and yet you fear it.")


def test_a_parrot_adds_nothing():
    parrot, complex_one = (
        "You don't pick up and she says you don't love her.",
        "It sounds like a missed call turns into a verdict on your heart.",
    )
    assert adds_meaning(plain(complex_one), read_exchange(CLIENT, complex_one)) and not adds_meaning(
        plain(parrot), read_exchange(CLIENT, parrot)
    )
    copied = "Your mother rings you ten times a day and if you don't pick up she says you don't love her."
    assert read_exchange(CLIENT, copied).copied > 0.5 and read_exchange(CLIENT, complex_one).copied == 0
    assert faults(read_exchange(CLIENT, copied), 1.0)["echoes the client"] < -0.5


def test_faults():
    assert wrong_role(read_exchange(CLIENT, "I'm struggling with my mother and I don't know what to do.")) == 1
    assert wrong_role(read_exchange(CLIENT, "I don't know what the judge will decide. What frightens you most?")) == 0
    assert incoherent(read_exchange(CLIENT, "mother call guilt love phone ring duty")) == 1
    assert told_words(read_exchange(CLIENT, "You wait. It rained.")) == 2
    assert gist(words_of("my mum phoned")) & gist(words_of("your mother")) == {"mother"} and stem("calls") == stem(
        "calling"
    )


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
