"""Baselines get the best chance they can have, on the reward model's likelihood, and nothing of the test pairs."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from psycopref.evaluation import baselines
from psycopref.core.files import read_rows, write_rows
from psycopref.evaluation.baselines import (
    STRENGTHS,
    bradley_terry_scores,
    fit_bradley_terry,
    held_out_losses,
    length_bradley_terry,
    length_scores,
    minilm_scores,
    score_frame,
    tfidf_features,
    tfidf_scores,
)
from psycopref.stats.scores import (
    accuracy,
    expected_calibration_error,
    pairwise_metrics,
    preference_probability,
    presented_pairs,
)

from refusals import one_line

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
fewer = settings(few, max_examples=5)
seeds = st.integers(0, 2**31)


def drawn(seed: int, pairs: int = 120, dimensions: int = 4, noise: float = 1.0):
    """Features of chosen and rejected responses, and speeches of two pairs each."""
    chance = np.random.default_rng(seed)
    truth, features = (
        chance.normal(size=dimensions),
        chance.normal(size=(2, pairs, dimensions)) * np.linspace(0.5, 2, dimensions),
    )
    first = (features[0] - features[1]) @ truth + noise * chance.logistic(size=pairs) > 0
    return (
        np.where(first[:, None], *features),
        np.where(first[:, None], *features[::-1]),
        [f"s{n // 2:03}" for n in range(pairs)],
    )


def pairs_of(chosen, rejected, questions=None, name="s", each=1) -> pd.DataFrame:
    n = len(chosen)
    return pd.DataFrame({"ID": [f"{name}{i // each}" for i in range(n)], "prefID": range(n), "question": questions or ["I can't sleep."] * n,
                         "chosen": list(chosen), "rejected": list(rejected)})  # fmt: skip


GOOD, BAD = (
    (
        "what do you feel now",
        "it sounds heavy to carry this",
        "tell me more about your nights",
        "you found words for it",
    ),
    ("stop it", "you must sleep more", "just get over it now", "eat well"),
)
TRAIN = pairs_of(
    [f"{GOOD[i % 4]} friend{i % 5}" for i in range(24)],
    [f"{BAD[(i + i // 4) % 4]} friend{i % 3}" for i in range(24)],
    each=2,
)
TEST = pairs_of(
    ["it sounds heavy friend9", "what do you feel friend8"], ["you must stop it friend8", "just get over it"], name="t"
)


# ---- the likelihood ----


def penalised(weights, difference, strength):
    return np.logaddexp(0, -(difference @ weights)).sum() + weights @ weights / (2 * strength)


@few
@given(seeds, st.sampled_from([0.01, 0.3, 10.0]), st.booleans(), st.booleans())
def test_the_fit_maximises_the_pairwise_likelihood(seed, strength, standardise, thin):
    chosen, rejected, groups = drawn(seed)
    scale = np.concatenate([chosen, rejected]).std(axis=0) if standardise else np.ones(4)
    difference = (chosen - rejected) / scale
    reference = (
        optimize.minimize(penalised, np.zeros(4), (difference, strength), method="BFGS", options={"gtol": 1e-8}).x
        / scale
    )
    given_as = sparse.csr_matrix if thin and not standardise else np.asarray
    model = fit_bradley_terry(given_as(chosen), given_as(rejected), groups, standardise, [strength])
    assert np.abs(model.weights - reference).max() < 1e-5
    assert (
        model.facts["strength"] == strength
        and model.facts["dimensions"] == 4
        and model.facts["pairs"] == 120
        and model.facts["speeches"] == 60
    )


def test_the_fit_is_what_gradient_descent_on_the_reward_loss_finds():
    import torch

    chosen, rejected, groups = drawn(7, 400)
    difference, weights = torch.tensor(chosen - rejected), torch.zeros(4, dtype=torch.double, requires_grad=True)
    descent = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        descent.zero_grad()
        found = -torch.nn.functional.logsigmoid(difference @ weights).mean()
        found.backward()
        return found

    descent.step(loss)
    assert (
        np.abs(fit_bradley_terry(chosen, rejected, groups, strengths=[1e8]).weights - weights.detach().numpy()).max()
        < 1e-3
    )


def test_a_fit_in_standard_units_scores_raw_features():
    chosen, rejected, groups = drawn(1)
    units = np.array([1e-3, 1.0, 1e3, 7.0])
    plain, other = (fit_bradley_terry(chosen * u, rejected * u, groups, standardise=True) for u in (1.0, units))
    assert np.allclose(plain.score(chosen), other.score(chosen * units), atol=1e-6) and plain.facts == other.facts


def test_a_constant_feature_weighs_nothing_and_breaks_nothing():
    chosen, rejected, groups = drawn(1)
    constant = np.full((120, 1), 0.1, np.float32)
    with_it = fit_bradley_terry(
        np.hstack([chosen, constant]), np.hstack([rejected, constant]), groups, standardise=True
    )
    assert with_it.weights[-1] == 0 and np.allclose(
        with_it.weights[:-1], fit_bradley_terry(chosen, rejected, groups, standardise=True).weights
    )


@fewer
@given(seeds, st.booleans())
def test_swapping_the_responses_turns_the_sign(seed, thin):
    chosen, rejected, groups = drawn(seed)
    model, other = fit_bradley_terry(chosen, rejected, groups), fit_bradley_terry(rejected, chosen, groups)
    assert np.allclose(model.weights, -other.weights, atol=1e-6) and model.facts == other.facts
    given_as = sparse.csr_matrix if thin else np.asarray
    margin = model.score(given_as(chosen)) - model.score(given_as(rejected))
    assert np.array_equal(model.score(given_as(rejected)) - model.score(given_as(chosen)), -margin)


@few
@given(seeds, st.integers(1, 40), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_a_response_has_the_same_score_in_any_company(seed, n, kind, thin):
    chance = np.random.default_rng(seed)
    features = chance.normal(size=(40, 385)).astype(kind)
    model = baselines.BradleyTerry(chance.normal(size=385), {})
    given_as = sparse.csr_matrix if thin else np.asarray
    order = chance.permutation(40)[:n]
    assert np.array_equal(model.score(given_as(features))[order], model.score(given_as(features[order])))


# ---- the strength ----


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_the_strength_is_the_one_that_a_full_search_finds(noise):
    chosen, rejected, groups = drawn(3, 100, 12, noise)
    difference, strengths = chosen - rejected, STRENGTHS[4::2]
    search = GridSearchCV(
        LogisticRegression(fit_intercept=False, tol=1e-8, max_iter=5000),
        {"C": [c / 2 for c in strengths]},
        cv=GroupKFold(5),
        scoring="neg_log_loss",
    )
    search.fit(np.vstack([difference, -difference]), np.repeat([1, 0], 100), groups=groups + groups)
    facts = fit_bradley_terry(chosen, rejected, groups, strengths=strengths).facts
    assert (
        facts["strength"] == 2 * search.best_params_["C"]
        and not facts["at_edge"]
        and len(facts["losses"]) < len(strengths)
    )
    for (strength, loss), expected in zip(facts["losses"].items(), -search.cv_results_["mean_test_score"]):
        assert abs(loss - expected) < 2e-4, strength  # folds hold 20 pairs each, so both means are alike


def test_no_speech_is_on_both_sides_of_a_fold():
    """Each speech has a feature of its own: where it was not fitted, nothing is known of its pairs."""
    features = np.repeat(np.eye(10), 2, axis=0)
    rows = np.vstack([features, np.zeros((1, 10))])
    assert (
        held_out_losses(rows, np.repeat(np.arange(10), 2), [0.1, 1.0, 10.0]) == [pytest.approx(np.log(2), abs=1e-5)] * 3
    )


def test_a_best_at_the_edge_is_said():
    features = drawn(3, 100, 12, noise=5.0)
    assert (
        fit_bradley_terry(*features, strengths=[1e-6, 1e-5]).facts["at_edge"]
        and fit_bradley_terry(*features, strengths=[100.0, 1.0, 1e4]).facts["at_edge"]
    )
    assert not fit_bradley_terry(*features, strengths=[1e-6, 100.0, 0.03, 1e4]).facts["at_edge"], (
        "strengths are sorted first"
    )
    assert not fit_bradley_terry(*features, strengths=[1.0]).facts["at_edge"], "one strength is no choice"


def test_two_speeches_are_enough_and_fewer_are_refused():
    assert fit_bradley_terry(np.array([[1.0], [2.0]]), np.array([[0.0], [0.0]]), ["a", "b"]).weights[0] > 0
    for n, told in ((0, "0 pairs of 0 speeches"), (1, "1 pairs of 1 speeches"), (3, "3 pairs of 1 speeches")):
        assert told in one_line(lambda: fit_bradley_terry(np.ones((n, 1)), np.zeros((n, 1)), ["a"] * n))
    assert "2 speeches" in one_line(lambda: tfidf_scores(TRAIN.head(2), {"test": TEST}))
    for scores in (length_bradley_terry, tfidf_scores, minilm_scores):
        one_line(lambda: scores(TRAIN.head(0), {"test": TEST}))


def test_a_fit_that_does_not_end_is_one_line(monkeypatch):
    monkeypatch.setattr(baselines, "STEPS", 1)
    assert "convergence" in one_line(lambda: fit_bradley_terry(*drawn(0)))


# ---- the scorers ----


def decided(model, dev):
    return (
        accuracy(model["test"].chosen_score, model["test"].rejected_score) == 1.0
        and list(model) == ["dev", "test"]
        and len(model["dev"]) == len(dev)
    )


@pytest.mark.parametrize("dev", [TRAIN.head(0), pairs_of(["what"], ["stop"], name="d")], ids=["no dev", "dev"])
def test_a_word_that_decides_is_found(dev):
    frames, facts = tfidf_scores(TRAIN, {"dev": dev, "test": TEST})
    assert decided(frames, dev) and facts["pairs"] == 24 and facts["speeches"] == 12
    warm = pairs_of([f"warm w{i} x{i % 3}" for i in range(20)], [f"cold v{i} x{i % 2}" for i in range(20)])
    test = pairs_of(["x0 warm unseen"], ["x1 cold unseen"], name="t")
    frames, facts = tfidf_scores(warm, {"test": test})
    assert (
        facts["speak_for"][0] == "warm"
        and facts["speak_against"][0] == "cold"
        and json.loads(json.dumps(facts)) == facts
    )
    assert (frames["test"].chosen_score > frames["test"].rejected_score).all()


@pytest.mark.parametrize("longer", [True, False])
def test_length_decides_either_way(longer):
    long, short = ["a word " * (n + 4) for n in range(20)], ["word " * (n + 1) for n in range(20)]
    train, dev = pairs_of(*((long, short) if longer else (short, long))), TRAIN.head(0)
    test = pairs_of(["one two three"], ["one"], name="t") if longer else pairs_of([""], ["one"], name="t")
    frames, facts = length_bradley_terry(train, {"dev": dev, "test": test})
    assert decided(frames, dev) and (facts["weight"] > 0) is longer and facts["dimensions"] == 1
    [row] = frames["test"].itertuples()
    words = [test[side].str.split().str.len().iloc[0] for side in ("chosen", "rejected")]
    assert row.chosen_score - row.rejected_score == pytest.approx(
        facts["weight"] * (np.log1p(words[0]) - np.log1p(words[1]))
    )


def test_length_has_a_calibrated_probability():
    """Counts of words are no log-odds; the fit makes them so."""
    chance = np.random.default_rng(0)
    words = np.exp(chance.normal(4, 0.5, size=(2, 3000))).astype(int) + 1
    first = 1.5 * (np.log1p(words[0]) - np.log1p(words[1])) + chance.logistic(size=3000) > 0
    texts = [["w " * n for n in row] for row in (np.where(first, *words), np.where(first, *words[::-1]))]
    pairs = pairs_of(*texts)
    train, test = pairs.head(1500), pairs.tail(1500)
    frames, facts = length_bradley_terry(train, {"test": test})
    assert abs(facts["weight"] - 1.5) < 0.25
    raw, fitted = (
        length_scores(test),
        (frames["test"].chosen_score.to_numpy(), frames["test"].rejected_score.to_numpy()),
    )

    def error(chosen, rejected):
        first, second, label = presented_pairs(np.array(chosen), np.array(rejected))
        return expected_calibration_error(preference_probability(first, second), label)

    assert accuracy(*raw) == accuracy(*fitted) and error(*fitted) < 0.04 < 0.2 < error(*raw)


def test_length_is_counted_in_words():
    assert length_scores(pairs_of(["  one\ntwo ", "don't"], ["", "a b c"])) == ([2, 1], [0, 3])


def test_nothing_of_the_test_pairs_reaches_the_fit():
    alone, facts = tfidf_scores(TRAIN, {"test": TEST}, overlap=True)
    strange = TEST.assign(
        ID=["u0", "u1"], chosen="quartz quartz friend0", rejected="what do you feel", question="quartz"
    )
    together, same = tfidf_scores(TRAIN, {"other": strange, "test": TEST}, overlap=True)
    assert together["test"].equals(alone["test"]) and same == facts
    names = tfidf_features(TRAIN, overlap=True)[1]
    assert (
        not {"quartz", "friend9", "friend8"} & set(names)
        and {"what", "what do", "friend0"} < set(names)
        and len(names) == facts["dimensions"]
    )
    unseen = tfidf_scores(TRAIN, {"test": TEST.assign(chosen=TEST.chosen + " quartz", question="I quartz")})[0]["test"]
    assert np.array_equal(unseen.chosen_score, tfidf_scores(TRAIN, {"test": TEST})[0]["test"].chosen_score), (
        "an unseen word counts nothing"
    )


def test_a_response_in_many_pairs_counts_once_in_the_vocabulary():
    repeated = pd.concat([TRAIN, TRAIN.head(1), TRAIN.head(1)], ignore_index=True)
    first, second = (
        tfidf_features(frame)[0](["?"], ["what do you feel friend0"]).toarray() for frame in (TRAIN, repeated)
    )
    assert np.array_equal(first, second)


def test_a_question_mark_is_a_word():
    asking = pairs_of([f"you sleep w{i} ?" for i in range(12)], [f"you sleep v{i}!" for i in range(12)])
    frames, facts = tfidf_scores(asking, {"test": pairs_of(["and then?"], ["and then."], name="t")})
    assert facts["speak_for"][0] == "?" and (frames["test"].chosen_score > frames["test"].rejected_score).all()


def test_overlap_is_the_cosine_with_the_question():
    features, names = tfidf_features(TRAIN, overlap=True)
    found = features(
        ["what do you feel", "eat well", "quartz"], ["what do you feel", "what do you feel", "what do you feel"]
    ).toarray()[:, -1]
    assert (
        names[-1].startswith("(overlap")
        and found == pytest.approx([1.0, 0.0, 0.0])
        and features(["a"], ["b"]).shape[1] == len(names)
    )
    echo = pairs_of(
        [f"night {i} you count" for i in range(12)],
        [f"dance {i} you sing" for i in range(12)],
        [f"I count night {i}" if i % 2 else f"I sing dance {i}" for i in range(12)],
    )
    echo.loc[::2, ["chosen", "rejected"]] = echo.loc[::2, ["rejected", "chosen"]].to_numpy()
    test = pairs_of(["you count", "you sing"], ["you sing", "you count"], ["I count", "I sing"], name="t")
    frames, _ = tfidf_scores(echo, {"test": test}, overlap=True)
    blind, _ = tfidf_scores(echo, {"test": test})
    assert (frames["test"].chosen_score > frames["test"].rejected_score).all() and set(frames["test"].model) == {
        "tfidf-overlap"
    }
    assert not (blind["test"].chosen_score > blind["test"].rejected_score).all(), "without the question nobody can tell"


def test_a_speech_in_training_and_test_pairs_is_refused():
    for scores in (length_bradley_terry, tfidf_scores, minilm_scores):
        message = one_line(lambda: scores(TRAIN, {"dev": TEST, "test": TRAIN.tail(1)}))
        assert "s11" in message and "test pairs" in message


def test_texts_without_a_word_are_one_line():
    assert "no words" in one_line(lambda: tfidf_scores(TRAIN.assign(chosen="…", rejected="!"), {"test": TEST}))


def test_equal_texts_tie_and_are_not_won():
    for scores in (length_bradley_terry, tfidf_scores):
        frame = scores(TRAIN, {"test": TEST.assign(rejected=TEST.chosen)})[0]["test"]
        assert (frame.chosen_score == frame.rejected_score).all()


def words_as_vectors(calls):
    """Stand in for MiniLM: unit vectors by the words that matter here."""

    def embed(texts, weights=None, dtype="auto"):
        calls.append((list(texts), weights, dtype))
        found = np.array(
            [[1 + text.count(word) for word in ("you", "it", "feel", "must", "sleep")] for text in texts], np.float32
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return embed


def test_embeddings_of_the_response_and_its_meeting_with_the_question(monkeypatch):
    from psycopref.models.weights import Weights

    calls, seen = [], []
    monkeypatch.setattr(baselines, "embed", words_as_vectors(calls))
    fit = fit_bradley_terry
    monkeypatch.setattr(baselines, "fit_bradley_terry", lambda *a, **k: seen.append(a) or fit(*a, **k))
    encoder = Weights("some/Encoder", "there", "an encoder", "0")
    frames, facts = minilm_scores(TRAIN, {"test": TEST}, encoder, "float32")
    said, asked = (words_as_vectors([])(TRAIN[column]) for column in ("chosen", "question"))
    assert np.array_equal(seen[0][0], np.hstack([said, asked * said])) and seen[0][3] is True
    assert (
        facts["dimensions"] == 10
        and set(frames["test"].model) == {"encoder"}
        and all((w, d) == (encoder, "float32") for _, w, d in calls)
    )
    assert sorted(map(tuple, (texts for texts, _, _ in calls))) == sorted(
        tuple(frame[c]) for frame in (TRAIN, TEST) for c in ("question", "chosen", "question", "rejected")
    )
    assert set(minilm_scores(TRAIN, {"test": TEST})[0]["test"].model) == {"minilm"}


def test_the_same_pairs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(baselines, "embed", words_as_vectors([]))
    for scores in (length_bradley_terry, tfidf_scores, minilm_scores):
        (first, facts), (second, same) = (scores(TRAIN, {"test": TEST}) for _ in range(2))
        assert first["test"].equals(second["test"]) and facts == same and json.loads(json.dumps(facts)) == facts


def test_features_of_ones_own():
    frames, model = bradley_terry_scores(
        "vowels",
        TRAIN,
        {"test": TEST},
        lambda questions, responses: np.array([[text.count("e")] for text in responses]),
    )
    assert np.array_equal(frames["test"].chosen_score, TEST.chosen.str.count("e") * model.weights[0])


# ---- the frame ----


def test_scores_fit_their_schema_whatever_the_index(tmp_path):
    pairs = TEST.set_axis([7, 3])
    frame = score_frame(pairs, "length", *length_scores(pairs))
    assert (
        frame.index.tolist() == [0, 1]
        and frame.prefID.tolist() == TEST.prefID.tolist()
        and frame.chosen_score.tolist() == [4.0, 5.0]
    )
    frames, _ = tfidf_scores(TRAIN, {"empty": TEST.head(0), "test": pairs})
    back = read_rows(write_rows(tmp_path / "scores.parquet", "scores", [frame, *frames.values()]), "scores")
    assert back.ID.tolist() == ["t0", "t1"] * 2 and pairwise_metrics(back.chosen_score, back.rejected_score)["n"] == 4


@pytest.mark.parametrize(
    "scores, told",
    [([1.0], "shape (1,)"), ([[1.0], [2.0]], "shape (2, 1)"), ([1.0, np.nan], "pair 1"), ([np.inf, 1.0], "pair 0")],
)
def test_scores_that_do_not_fit_the_pairs_are_one_line(scores, told):
    for both in ((scores, [0.0, 0.0]), ([0.0, 0.0], scores)):
        message = one_line(lambda: score_frame(TEST, "mine", *both))
        assert told in message and "mine" in message


def test_the_modules_stay_light():
    code = "import sys, psycopref.evaluation.baselines, psycopref.feedback.choosing; print([m for m in ('torch', 'pandas', 'sklearn', 'scipy', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
