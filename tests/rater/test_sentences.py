"""Sentences and triples written for the rater: form, enough of every act, no repeated frame, parts kept apart."""

import json
import re
from collections import Counter

import pytest

from psycopref.core.paper import resource_path

ACTS = set(
    "open_question closed_question simple_reflection complex_reflection emotional_reaction validation information"
    " advice options self_disclosure dismissal command harm over_validation other".split()
)
ANSWERS = ["warm_reinforcing", "warm_sound", "cold_sound"]


def rows(name):
    return [json.loads(line) for line in resource_path(f"rater/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def shingles(text, n):
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}


ROWS, TRIPLES = rows("sentences"), rows("triples")
SENTENCES = [(sentence, act.split("+"), row["set"]) for row in ROWS for sentence, act in row["answer"]]


def test_lines_have_one_form_and_known_acts():
    assert {tuple(row) for row in ROWS} == {("style", "set", "client", "answer")}
    assert {row["set"] for row in ROWS} == {"learn", "held"}
    assert all(row["style"] and row["answer"] and isinstance(row["client"], str) for row in ROWS)
    assert all(sentence == sentence.strip() != "" for sentence, _, _ in SENTENCES)
    assert {act for _, acts, _ in SENTENCES for act in acts} == ACTS
    assert all(len(acts) == len(set(acts)) <= 2 for _, acts, _ in SENTENCES)


@pytest.mark.parametrize("act", sorted(ACTS))
def test_every_act_has_enough_sentences(act):
    counted = Counter(part for _, acts, part in SENTENCES if act in acts)
    assert counted.total() >= 150 and counted["held"] >= 30


def test_no_frame_is_in_more_than_three_sentences():
    counted = Counter(shingle for sentence, _, _ in SENTENCES for shingle in shingles(sentence, 5))
    assert {shingle: n for shingle, n in counted.items() if n > 3} == {}


def test_no_sentence_is_there_twice():
    counted = Counter(" ".join(words(sentence)) or sentence for sentence, _, _ in SENTENCES)
    assert {sentence: n for sentence, n in counted.items() if n > 1 and len(sentence.split()) > 2} == {}


def test_held_clients_are_no_learn_clients():
    clients = {
        part: {" ".join(words(row["client"])) for row in ROWS if row["set"] == part} for part in ("learn", "held")
    }
    assert clients["learn"] & clients["held"] <= {""}


def test_triples_are_enough_and_half_held_out():
    assert {tuple(row) for row in TRIPLES} == {("triple_id", "set", "kind", "client", *ANSWERS)}
    assert len({row["triple_id"] for row in TRIPLES}) == len({row["client"] for row in TRIPLES}) == len(TRIPLES) >= 80
    assert {row["kind"] for row in TRIPLES} == {"distortion", "flattery", "promise"}
    counted = Counter(row["set"] for row in TRIPLES)
    assert set(counted) == {"develop", "held-out"} and counted["held-out"] * 2 == len(TRIPLES)


@pytest.mark.parametrize("part", ["develop", "held-out"])
def test_lengths_do_not_tell_warm_answers_apart(part):
    lengths = {kind: [len(words(row[kind])) for row in TRIPLES if row["set"] == part] for kind in ANSWERS}
    mean = {kind: sum(found) / len(found) for kind, found in lengths.items()}
    assert mean["warm_reinforcing"] == pytest.approx(mean["warm_sound"], rel=0.15)
    assert mean["cold_sound"] == pytest.approx(mean["warm_sound"], rel=0.15)


def test_triples_share_no_text_with_what_heads_learn_from():
    learned = {
        shingle
        for row in ROWS
        for text in (row["client"], *(s for s, _ in row["answer"]))
        for shingle in shingles(text, 8)
    }
    shared = {row["triple_id"]: shingles(row[part], 8) & learned for row in TRIPLES for part in ("client", *ANSWERS)}
    assert {name: found for name, found in shared.items() if found} == {}
