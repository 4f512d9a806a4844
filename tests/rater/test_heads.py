"""Heads equal the reference, come back from their file, and are what the package's sentences teach."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from psycopref.core.settings import StudyError
from psycopref.rater import heads as h
from psycopref.rater.dialogue_acts import (
    DIALOGUE_ACTS,
    Said,
    fluent,
    labelled_sentences,
    split_sentences,
    surface_features,
)
from psycopref.stats.scores import roc_auc

ANNOMI = Path(__file__).parents[2] / "shared/data/annomi/annomi_dev.csv"
ANNOMI = ANNOMI if ANNOMI.exists() else Path(__file__).parents[3] / "shared/data/annomi/annomi_dev.csv"


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", "c"]])
def test_a_head_is_scikit_learns_regression_of_standardised_inputs(labels):
    rng = np.random.default_rng(0)
    inputs = rng.normal(3, 2, (300, 4)).astype(np.float32)
    told = [labels[int(row[0] > 3) + int(len(labels) > 2 and row[1] > 4)] for row in inputs]
    found = h.fit_head(inputs, [{label} for label in told], c=0.5)
    scaled = (inputs - inputs.mean(0)) / (1.4 * inputs.std(0))
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(scaled, told).predict_proba(scaled)
    assert found.labels == tuple(labels) and np.allclose(found.probabilities(inputs), expected, atol=1e-3)


def test_two_acts_of_one_sentence_share_it_and_weights_repeat_rows():
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(60, 3)).astype(np.float32)
    acts = [{"a", "b"} if row[0] > 0 else {"c"} for row in inputs]
    found = h.fit_head(inputs, acts).probabilities(inputs)
    assert np.allclose(found[:, 0], found[:, 1], atol=1e-3)
    tripled = h.fit_head(inputs, acts, np.full(60, 3.0), c=0.1).probabilities(inputs)
    assert np.allclose(tripled, h.fit_head(inputs, acts, c=0.3).probabilities(inputs), atol=1e-3)


def test_heads_come_back_from_their_file(tmp_path, monkeypatch):
    shipped = h.read_heads()
    h.write_heads(shipped, tmp_path / "acts.safetensors")
    monkeypatch.setattr(h, "resource_path", lambda file: tmp_path / Path(file).name)
    h.read_heads.cache_clear()
    again = h.read_heads()
    h.read_heads.cache_clear()
    assert again.identity == shipped.identity and again.facts == shipped.facts | {"labels": again.facts["labels"]}
    assert set(shipped.acts.labels) == set(DIALOGUE_ACTS) and (tmp_path / "acts.safetensors").stat().st_size < 300_000
    with pytest.raises(StudyError, match="acts-annomi"):
        h.read_heads("acts-anomi")


@pytest.mark.parametrize("changed", [{"layers": [0, 2, 5]}, {"sha256": "0" * 64}, {"features": ["asks"]}])
def test_heads_of_other_inputs_are_refused(tmp_path, monkeypatch, changed):
    shipped = h.read_heads()
    other = replace(shipped, facts=shipped.facts | {"inputs": h.inputs_described() | changed})
    h.write_heads(other, tmp_path / "acts.safetensors")
    monkeypatch.setattr(h, "resource_path", lambda file: tmp_path / Path(file).name)
    h.read_heads.cache_clear()
    with pytest.raises(StudyError, match="heads 'acts': were learned with another encoder"):
        h.read_heads()
    h.read_heads.cache_clear()


def test_the_second_file_says_what_it_learned_from():
    ours, theirs = (h.read_heads(name).facts["learned from"] for name in h.HEADS)
    assert (
        len(ours) == 1 and theirs[0] == ours[0] and "AnnoMI" in theirs[1]["source"] and len(theirs[1]["sha256"]) == 64
    )


def test_sentences_held_back_are_told_apart():
    rows = [row for row in labelled_sentences() if row[2] == "held"]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:250]]
    found, inputs = h.read_heads().acts, h.sentence_inputs([row[0] for row in rows])
    likely = found.probabilities(inputs)
    areas = {
        act: roc_auc(likely[:, i], np.array([act in row[1] for row in rows], float))
        for i, act in enumerate(found.labels)
    }
    assert np.mean(list(areas.values())) > 0.93, areas


def test_clients_held_back_are_told_apart():
    rows = [row for row in h.labelled_clients() if row[3] == "held"]
    heads, inputs = h.read_heads(), h.client_inputs([row[0] for row in rows])
    stages = heads.stages.probabilities(inputs).argmax(1)
    assert np.mean([heads.stages.labels[stage] == row[1] for stage, row in zip(stages, rows)]) > 0.65
    assert roc_auc(heads.crisis.probabilities(inputs)[:, 1], np.array([row[2] for row in rows], float)) > 0.78


@pytest.mark.chain
def test_the_installed_heads_are_what_the_packages_sentences_teach():
    rows = [row[0] for row in labelled_sentences()[::40]]
    inputs, shipped, taught = h.sentence_inputs(rows, "float32"), h.read_heads(), h.learn_heads()
    assert np.allclose(shipped.acts.probabilities(inputs), taught.acts.probabilities(inputs), atol=0.02)
    assert shipped.facts["learned from"] == taught.facts["learned from"]


@given(st.text(max_size=80), st.text(max_size=80))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_sentence_has_all_features(sentence, client):
    found = surface_features(Said(sentence, client))
    assert list(found) == list(surface_features(Said("Why?", "I left."))) and all(0 <= v < 6 for v in found.values())
    assert fluent(fluent(sentence)) == fluent(sentence) or "-" in sentence
    assert all(any(c.isalpha() for c in part) for part in split_sentences(sentence))


def test_a_turn_of_annomi_shares_its_labels_out():
    kinds = ("question", "reflection", "therapist_input")
    turn = {f"{kind}_exists": "False" for kind in kinds} | {f"{kind}_subtype": "n/a" for kind in kinds}
    two = ["So you stopped.", "Was it hard?"]
    assert h.turn_acts(turn, two) == [{"other"}, {"other"}]
    asks = turn | {"question_exists": "True", "question_subtype": "closed"}
    assert h.turn_acts(asks, two) == [set(), {"closed_question"}]
    assert h.turn_acts(asks, ["Okay.", "How many a day"]) == [set(), {"closed_question"}], "no mark: the last sentence"
    both = asks | {"therapist_input_exists": "True", "therapist_input_subtype": "negotiation"}
    assert h.turn_acts(both, two) == [{"options"}, {"closed_question"}]
    three = both | {"reflection_exists": "True", "reflection_subtype": "simple"}
    assert h.turn_acts(three, two) == [set(), {"closed_question"}], "the rest could be either"


@pytest.mark.skipif(not ANNOMI.exists(), reason="half of AnnoMI is not at hand")
def test_annomi_teaches_what_its_turns_say():
    sentences, acts, transcripts = h.annomi_sentences(ANNOMI)
    assert len(sentences) == len(acts) == len(transcripts) > 3000 and len(set(transcripts)) > 50
    told = Counter(act for own in acts for act in own)
    assert set(told) == {
        *h._ANNOMI["question"].values(),
        *h._ANNOMI["reflection"].values(),
        "information",
        "advice",
        "options",
        "other",
    }
    taught = h.annomi_taught(ANNOMI)
    assert taught.sha256 == h.read_heads("acts-annomi").facts["learned from"][1]["sha256"]
    assert len(taught.sentences) == h.read_heads("acts-annomi").facts["learned from"][1]["sentences"]
