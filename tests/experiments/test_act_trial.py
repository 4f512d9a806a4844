"""The rater's heads on trial: planted acts are found, folds share no transcript, triples and length are counted."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from psycopref.core.files import SCHEMAS
from psycopref.core.principles import principle_keys
from psycopref.corpus.labelled_text import LABEL_COLUMNS, Labelled
from psycopref.experiments import act_trial as acts
from psycopref.experiments.rater_trial import OWN_HEADS, corpus_table
from psycopref.rater.dialogue_acts import DIALOGUE_ACTS, labelled_sentences

PRINCIPLE_KEYS = principle_keys()

COLOURS = {"Blue": 1, "Green": 0}  # planted: blue lamps are open questions
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=20)


def scorer(score):
    "Let a function of the response stand for every principle."
    return lambda clients, responses: pd.DataFrame(
        {k: [float(score(one)) for one in responses] for k in PRINCIPLE_KEYS}
    )


RATERS = {OWN_HEADS: scorer(len), acts.ANNOMI_HEADS: scorer(len)}


def test_a_head_is_measured_as_sklearn_does_and_its_confusions_are_named():
    rng = np.random.default_rng(0)
    truth = [{("advice", "command", "harm")[i % 3]} | ({"harm"} if i % 7 == 0 else set()) for i in range(120)]
    found = rng.dirichlet(np.ones(3), 120) + [[2.0 * ("advice" in one), 0.0, 0.0] for one in truth]
    rows = acts.head_rows("act", ("advice", "command", "harm"), found, truth, np.arange(120) // 4, 200, 0)
    for i, row in enumerate(rows):
        own = [row["label"] in one for one in truth]
        low, high = map(float, row["95% interval"].split(" to "))
        assert row["AUC"] == pytest.approx(roc_auc_score(own, found[:, i]), abs=5e-4) and low <= row["AUC"] <= high
        assert row["n"] == sum(own) and row["of"] == 120
    assert rows[0]["most often taken for"] == "—" and rows[1]["most often taken for"].startswith(("harm", "advice"))


def test_sentences_of_one_client_count_together():
    rng = np.random.default_rng(1)
    client = np.repeat(rng.integers(0, 2, 20), 10)
    found = np.column_stack([1 - client, client]) + rng.normal(0, 0.8, (200, 2))
    truth = [{"b"} if one else {"a"} for one in client]
    width = []
    for groups in (np.repeat(np.arange(20), 10), np.arange(200)):
        low, high = acts.head_rows("act", ("a", "b"), found, truth, groups, 300, 0)[1]["95% interval"].split(" to ")
        width.append(float(high) - float(low))
    assert width[0] > width[1]


def test_a_label_that_nobody_or_everybody_has_gets_no_row():
    found = np.full((4, 3), 1 / 3)
    assert acts.head_rows("act", ("a", "b", "c"), found, [{"a"}] * 4, range(4), 50, 0) == []


def triples(sets=("develop", "held-out"), kinds=("distortion", "promise")):
    rows = [{"set": one, "kind": kind, "client": f"{one} {kind}"} for one in sets for kind in kinds for _ in range(3)]
    sides = {"warm_reinforcing": "yes yes yes yes", "warm_sound": "oh? go on", "cold_sound": "facts"}
    return pd.DataFrame([row | sides for row in rows])


def test_triples_tell_a_rater_of_warmth_from_one_of_soundness():
    likes = {"yes yes yes yes": 5, "oh? go on": 3, "facts": 1}
    for score, above in ((likes.get, 0), (lambda text: 4 * ("yes" not in text) + ("oh" in text), 100)):
        table = acts.kinds_table(acts.score_triples(triples(), scorer(score))).set_index(["set", "against", "kind"])
        share = table["warm and sound above %"]
        assert (share.xs(acts.AGAINST["warm_reinforcing"], level="against") == above).all()
        assert (share.xs(acts.AGAINST["cold_sound"], level="against") == 100).all()
        assert (table["shorter is better %"].xs(acts.AGAINST["warm_reinforcing"], level="against") == 100).all()
        assert table.loc[("held-out", acts.AGAINST["cold_sound"], "all"), "n"] == 6 and len(table) == 12
    ties = acts.kinds_table(acts.score_triples(triples(), scorer(lambda text: 3)))
    assert (ties["ties %"] == 100).all() and (ties["warm and sound above %"] == 0).all()
    said = acts.kinds_sentences(ties)
    assert len(said) == 2 and "On 6 held-out triples" in said[0] and "the shorter in 100.0%" in said[0]


def test_the_packages_triples_are_whole_and_halved_by_kind():
    table = acts.read_triples(acts.MOST_TRIPLES)
    counts = table.groupby(["kind", "set"]).size().unstack()
    assert len(table) >= 80 and set(counts.index) == {"distortion", "flattery", "promise"}
    assert ((counts.develop - counts["held-out"]).abs() <= 1).all() and table.triple_id.is_unique
    assert table.map(lambda value: isinstance(value, str) and bool(value.strip())).all(axis=None)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
@QUICK
def test_folds_share_no_transcript_and_every_row_is_scored_once(transcripts):
    rows = pd.DataFrame({"context": "I drink.", "group": list(map(str, transcripts))})
    rows["text"] = [f"So {i}." for i in range(len(rows))]
    told = []

    def learn(known):
        def score(clients, responses):
            scored = set(rows.group[rows.text.isin(responses)])
            assert not scored & known and scored | known == set(rows.group)
            told.extend(responses)
            return scorer(lambda text: int(text[3:-1]))(clients, responses)

        return score

    found = acts.out_of_fold_scores(rows, learn)
    assert sorted(told) == sorted(rows.text) and found["mean"].tolist() == list(range(len(rows)))


def annomi(sessions=12):
    "A corpus in which good sessions ask, and others advise."
    rows = []
    for session in range(sessions):
        for turn in range(4):
            asks = (session + turn) % 2
            text = f"What is {session} {turn} like for you?" if asks else f"You should stop {session} {turn} now."
            for construct in ("question, not input", "open question, not closed" if asks else "high-quality session"):
                rows.append(("I drink.", text, construct, asks, str(session)))
            if not asks:
                rows.append(("I drink.", text, "options or negotiation, not advice", 0, str(session)))
    return Labelled(pd.DataFrame(rows, columns=list(LABEL_COLUMNS)), {}, {"source": "annomi"}, ())


def test_annomi_is_cross_validated_and_other_corpora_see_both_files_of_heads():
    learner = lambda rows: lambda known: scorer(lambda text: "What" in text)
    found = acts.trial_results([annomi()], 50, 0, RATERS, learner)
    table = corpus_table(found)
    own = table[table.construct == "question, not input"].set_index("heads learned from")
    assert list(own.index) == [OWN_HEADS, acts.CROSS_VALIDATED] and own.rubric[acts.CROSS_VALIDATED] == 1
    votes = Labelled(annomi().rows.assign(construct="more upvotes, same question"), {}, {"source": "counsel-chat"}, ())
    assert {one["heads"] for _, rows, _ in acts.trial_results([votes], 50, 0, RATERS, None) for one in rows} == {
        *RATERS
    }


def test_too_few_transcripts_are_not_cross_validated():
    found = acts.trial_results([annomi(acts.TRANSCRIPT_FOLDS - 1)], 50, 0, RATERS, None)
    assert {one["heads"] for _, rows, _ in found for one in rows} == {OWN_HEADS}


def test_turns_become_sentences_with_acts():
    sentences, found, transcripts = acts.labelled_turns(annomi(2).rows)
    assert set(transcripts) == {"0", "1"} and len(sentences) == len(found) == len(transcripts) == 8
    assert {"".join(own) for own in found} == {"open_question", "advice"}
    assert all(("?" in one.sentence) == ("open_question" in own) for one, own in zip(sentences, found))


def test_heads_learn_from_the_transcripts_that_are_named_and_no_others():
    own = [row for act in DIALOGUE_ACTS for row in [r for r in labelled_sentences() if r[1] == {act}][:2]]
    lamps = [("I drink.", f"{colour} lamp {n}?", str(n), open_) for n in range(8) for colour, open_ in COLOURS.items()]
    rows = pd.DataFrame(lamps, columns=["context", "text", "group", "label"]).assign(
        construct="open question, not closed"
    )
    learn = acts.act_learner(rows, sentences=[(said, told, "learn") for said, told, _ in own])
    asked = ["I drink."] * 2, ["Blue lamp 9?", "Green lamp 9?"]
    gap = [np.subtract(*learn(known)(*asked).exploration) for known in (set(), set(rows.group))]
    assert gap[1] > 0.3 and gap[1] > gap[0] + 0.3


def test_length_is_read_from_a_runs_own_ratings():
    rng = np.random.default_rng(0)
    answers = pd.DataFrame({"speech_id": np.repeat(np.arange(30), 4).astype(str), "model": list("abcd") * 30})
    words = rng.integers(3, 60, 120)
    answers["response"] = ["word " * n for n in words]
    ratings = pd.concat([answers.drop(columns="response").assign(principle=key) for key in PRINCIPLE_KEYS])
    ratings = ratings.assign(rating=rng.integers(1, 6, len(ratings)), rater="rules:rubric")
    value = spearmanr(
        ratings.groupby(["speech_id", "model"]).rating.mean(),
        answers.set_index(["speech_id", "model"]).response.str.split().str.len().sort_index(),
    )[0]
    [said] = acts.length_sentences(100, 0, answers, ratings)
    assert f"correlation of {value:.2f}" in said and "within ±0.3" in said and "rated by rules:rubric" in said
    assert {*ratings.columns} - {"rating"} <= {*SCHEMAS["ratings"]} and {*answers.columns} <= {*SCHEMAS["responses"]}
    long = ratings.assign(rating=1 + np.tile(words // 12, len(PRINCIPLE_KEYS)))
    assert "outside ±0.3" in acts.length_sentences(100, 0, answers, long)[0]
    assert "not measured" in acts.length_sentences(100, 0)[0]
    one, alike = ratings[ratings.speech_id == "0"], ratings.assign(rating=3)
    assert all("not measured" in acts.length_sentences(50, 0, answers, some)[0] for some in (one, alike))
