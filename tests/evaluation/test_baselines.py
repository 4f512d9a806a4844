"""Baselines get the best chance they can have, on the reward model's likelihood, and nothing of the test pairs."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line
from scipy import optimize, sparse, stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from psycopref.core.files import read_rows, write_rows
from psycopref.evaluation import baselines
from psycopref.evaluation.baselines import STRENGTHS, author_gain, author_scores, fit_bradley_terry
from psycopref.evaluation.baselines import length_bradley_terry
from psycopref.evaluation.baselines import length_scores, minilm_scores, score_frame, tfidf_features, tfidf_scores
from psycopref.models.weights import Weights
from psycopref.stats.scores import accuracy, expected_calibration_error, pairwise_metrics, preference_probability
from psycopref.stats.scores import presented_pairs

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
FORMS = {"dense": np.asarray, "sparse": sparse.csr_matrix}


def drawn(seed: int, pairs: int = 120, dimensions: int = 4, noise: float = 1.0):
    """Features of chosen and rejected responses, and speeches of two pairs each."""
    chance = np.random.default_rng(seed)
    truth = chance.normal(size=dimensions)
    features = chance.normal(size=(2, pairs, dimensions)) * np.linspace(0.5, 2, dimensions)
    first = ((features[0] - features[1]) @ truth + noise * chance.logistic(size=pairs) > 0)[:, None]
    groups = [f"s{n // 2:03}" for n in range(pairs)]
    return np.where(first, *features), np.where(first, *features[::-1]), groups


def pairs_of(chosen, rejected, questions="I can't sleep.", name="s", each=1) -> pd.DataFrame:
    frame = pd.DataFrame({"ID": [f"{name}{i // each}" for i in range(len(chosen))], "prefID": range(len(chosen))})
    return frame.assign(question=questions, chosen=list(chosen), rejected=list(rejected))


GOOD = "what do you feel now|it sounds heavy to carry this|tell me more about your nights|you found words".split("|")
BAD = "stop it|you must sleep more|just get over it now|eat well".split("|")
KIND = [f"{GOOD[i % 4]} friend{i % 5}" for i in range(24)]
TRAIN = pairs_of(KIND, [f"{BAD[(i + i // 4) % 4]} friend{i % 3}" for i in range(24)], each=2)
WARM, COLD = ["it sounds heavy friend9", "what do you feel friend8"], ["you must stop it friend8", "just get over it"]
TEST = pairs_of(WARM, COLD, name="t")
SCORERS = [length_bradley_terry, tfidf_scores, minilm_scores]


# the likelihood


@few
@given(seeds, st.sampled_from([0.01, 0.3, 10.0]), st.booleans(), st.sampled_from(list(FORMS)))
def test_the_fit_maximises_the_pairwise_likelihood(seed, strength, standardise, form):
    chosen, rejected, groups = drawn(seed)
    scale = np.concatenate([chosen, rejected]).std(axis=0) if standardise else np.ones(4)
    difference = (chosen - rejected) / scale

    def penalised(weights):
        return np.logaddexp(0, -(difference @ weights)).sum() + weights @ weights / (2 * strength)

    reference = optimize.minimize(penalised, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x / scale
    given_as = np.asarray if standardise else FORMS[form]
    model = fit_bradley_terry(given_as(chosen), given_as(rejected), groups, standardise, [strength])
    assert np.abs(model.weights - reference).max() < 1e-5
    expected = {"strength": strength, "dimensions": 4, "pairs": 120, "speeches": 60}
    assert expected.items() <= model.facts.items()


def test_a_fit_in_standard_units_scores_raw_features_and_ignores_constants():
    chosen, rejected, groups = drawn(1)
    units, constant = np.array([1e-3, 1.0, 1e3, 7.0]), np.full((120, 1), 0.1, np.float32)
    plain, other = (fit_bradley_terry(chosen * u, rejected * u, groups, standardise=True) for u in (1.0, units))
    assert np.allclose(plain.score(chosen), other.score(chosen * units), atol=1e-6) and plain.facts == other.facts
    wider = [np.hstack([side, constant]) for side in (chosen, rejected)]
    with_it = fit_bradley_terry(*wider, groups, standardise=True)
    assert with_it.weights[-1] == 0 and np.allclose(with_it.weights[:-1], plain.weights)


@settings(few, max_examples=5)
@given(seeds, st.sampled_from(list(FORMS)))
def test_swapping_the_responses_turns_the_sign(seed, form):
    chosen, rejected, groups = drawn(seed)
    model, other = fit_bradley_terry(chosen, rejected, groups), fit_bradley_terry(rejected, chosen, groups)
    assert np.allclose(model.weights, -other.weights, atol=1e-6) and model.facts == other.facts
    one, two = (model.score(FORMS[form](side)) for side in (chosen, rejected))
    assert np.array_equal(two - one, -(one - two))


@few
@given(seeds, st.integers(1, 40), st.sampled_from([np.float32, np.float64]), st.sampled_from(list(FORMS)))
def test_a_response_has_the_same_score_in_any_company(seed, n, kind, form):
    chance = np.random.default_rng(seed)
    features = chance.normal(size=(40, 385)).astype(kind)
    model, order = baselines.BradleyTerry(chance.normal(size=385), {}), chance.permutation(40)[:n]
    assert np.array_equal(model.score(FORMS[form](features))[order], model.score(FORMS[form](features[order])))


# the strength


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_the_strength_is_the_one_that_a_full_search_finds(noise):
    chosen, rejected, groups = drawn(3, 100, 12, noise)
    difference, strengths = chosen - rejected, STRENGTHS[4::2]
    plain, grid = LogisticRegression(fit_intercept=False, tol=1e-8, max_iter=5000), {"C": [c / 2 for c in strengths]}
    search = GridSearchCV(plain, grid, cv=GroupKFold(5), scoring="neg_log_loss")
    search.fit(np.vstack([difference, -difference]), np.repeat([1, 0], 100), groups=groups + groups)
    facts = fit_bradley_terry(chosen, rejected, groups, strengths=strengths).facts
    assert facts["strength"] == 2 * search.best_params_["C"] and not facts["at_edge"]
    assert len(facts["losses"]) < len(strengths)
    for (strength, loss), expected in zip(facts["losses"].items(), -search.cv_results_["mean_test_score"]):
        assert abs(loss - expected) < 2e-4, strength  # folds hold 20 pairs each, so both means are alike


def test_no_speech_is_on_both_sides_of_a_fold():
    """Each speech has a feature of its own: where it was not fitted, nothing is known of its pairs."""
    rows = np.vstack([np.repeat(np.eye(10), 2, axis=0), np.zeros((1, 10))])
    losses = baselines.held_out_losses(rows, np.repeat(np.arange(10), 2), [0.1, 1.0, 10.0])
    assert losses == [pytest.approx(np.log(2), abs=1e-5)] * 3


@pytest.mark.parametrize(
    "strengths, at_edge",
    [([1e-6, 1e-5], True), ([100.0, 1.0, 1e4], True), ([1e-6, 100.0, 0.03, 1e4], False), ([1.0], False)],
)
def test_a_best_at_the_edge_is_reported(strengths, at_edge):
    assert fit_bradley_terry(*drawn(3, 100, 12, noise=5.0), strengths=strengths).facts["at_edge"] == at_edge


def test_two_speeches_are_enough_and_fewer_are_refused(monkeypatch):
    assert fit_bradley_terry(np.array([[1.0], [2.0]]), np.array([[0.0], [0.0]]), ["a", "b"]).weights[0] > 0
    for n, said in ((0, "0 pairs of 0 speeches"), (3, "3 pairs of 1 speeches")):
        assert said in one_line(lambda: fit_bradley_terry(np.ones((n, 1)), np.zeros((n, 1)), ["a"] * n))
    monkeypatch.setattr(baselines, "STEPS", 1)
    assert "convergence" in one_line(lambda: fit_bradley_terry(*drawn(0)))


@pytest.mark.parametrize("scores", SCORERS)
def test_training_pairs_are_needed_and_none_of_them_is_tested(scores):
    assert "no training pairs" in one_line(lambda: scores(TRAIN.head(0), {"test": TEST})) or scores is tfidf_scores
    message = one_line(lambda: scores(TRAIN, {"dev": TEST, "test": TRAIN.tail(1)}))
    assert "s11" in message and "test pairs" in message


# the scorers


def wins(frame):
    return (frame.chosen_score > frame.rejected_score).all()


@pytest.mark.parametrize("dev", [TRAIN.head(0), pairs_of(["what"], ["stop"], name="d")], ids=["no dev", "dev"])
def test_a_word_that_decides_is_found(dev):
    frames, facts = tfidf_scores(TRAIN, {"dev": dev, "test": TEST})
    assert wins(frames["test"]) and len(frames["dev"]) == len(dev) and (facts["pairs"], facts["speeches"]) == (24, 12)
    warm = pairs_of([f"warm w{i} x{i % 3} ?" for i in range(20)], [f"cold v{i} x{i % 2}!" for i in range(20)])
    frames, facts = tfidf_scores(warm, {"test": pairs_of(["x0 warm unseen"], ["x1 cold unseen"], name="t")})
    assert set(facts["speak_for"][:2]) == {"warm", "?"} and facts["speak_against"][0] == "cold"
    assert wins(frames["test"]) and json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("longer", [True, False])
def test_length_decides_either_way(longer):
    long, short = ["a word " * (n + 4) for n in range(20)], ["word " * (n + 1) for n in range(20)]
    train = pairs_of(*((long, short) if longer else (short, long)))
    test = pairs_of(["one two three" if longer else ""], ["one"], name="t")
    frames, facts = length_bradley_terry(train, {"dev": TRAIN.head(0), "test": test})
    assert wins(frames["test"]) and (facts["weight"] > 0) is longer and facts["dimensions"] == 1
    [row], (mine, theirs) = frames["test"].itertuples(), np.log1p(length_scores(test))[:, 0]
    assert row.chosen_score - row.rejected_score == pytest.approx(facts["weight"] * (mine - theirs))
    assert length_scores(pairs_of(["  one\ntwo ", "don't"], ["", "a b c"])) == ([2, 1], [0, 3])


def test_length_has_a_calibrated_probability():
    """Counts of words are no log-odds; the fit makes them so."""
    chance = np.random.default_rng(0)
    words = np.exp(chance.normal(4, 0.5, size=(2, 3000))).astype(int) + 1
    first = 1.5 * (np.log1p(words[0]) - np.log1p(words[1])) + chance.logistic(size=3000) > 0
    pairs = pairs_of(*(["w " * n for n in np.where(first, *sides)] for sides in (words, words[::-1])))
    train, test = pairs.head(1500), pairs.tail(1500)
    frames, facts = length_bradley_terry(train, {"test": test})
    raw, fitted = length_scores(test), frames["test"][["chosen_score", "rejected_score"]].to_numpy().T

    def error(chosen, rejected):
        first, second, label = presented_pairs(np.array(chosen), np.array(rejected))
        return expected_calibration_error(preference_probability(first, second), label)

    assert abs(facts["weight"] - 1.5) < 0.25
    assert accuracy(*raw) == accuracy(*fitted) and error(*fitted) < 0.04 < 0.2 < error(*raw)


def test_nothing_of_the_test_pairs_reaches_the_fit():
    alone, facts = tfidf_scores(TRAIN, {"test": TEST}, overlap=True)
    strange = pairs_of(["quartz quartz friend0"] * 2, ["what do you feel"] * 2, "quartz", "u")
    together, same = tfidf_scores(TRAIN, {"other": strange, "test": TEST}, overlap=True)
    assert together["test"].equals(alone["test"]) and same == facts
    names = tfidf_features(TRAIN, overlap=True)[1]
    assert not {"quartz", "friend9", "friend8"} & set(names) and {"what", "what do", "friend0"} < set(names)
    assert len(names) == facts["dimensions"]
    unseen = TEST.assign(chosen=TEST.chosen + " quartz", question="I quartz")
    one, other = (tfidf_scores(TRAIN, {"test": own})[0]["test"].chosen_score for own in (TEST, unseen))
    assert np.array_equal(one, other), "an unseen word counts nothing"
    repeated = pd.concat([TRAIN, TRAIN.head(1), TRAIN.head(1)], ignore_index=True)
    rows = [tfidf_features(own)[0](["?"], ["what do you feel friend0"]).toarray() for own in (TRAIN, repeated)]
    assert np.array_equal(*rows), "a response in many pairs counts once in the vocabulary"


def test_overlap_is_the_cosine_with_the_question():
    features, names = tfidf_features(TRAIN, overlap=True)
    found = features(["what do you feel", "eat well", "quartz"], ["what do you feel"] * 3).toarray()
    assert (
        names[-1].startswith("(overlap") and found[:, -1] == pytest.approx([1, 0, 0]) and found.shape[1] == len(names)
    )
    sides = ([f"night {i} you count" for i in range(12)], [f"dance {i} you sing" for i in range(12)])
    echo = pairs_of(*sides, [f"I count night {i}" if i % 2 else f"I sing dance {i}" for i in range(12)])
    echo.loc[::2, ["chosen", "rejected"]] = echo.loc[::2, ["rejected", "chosen"]].to_numpy()
    test = pairs_of(["you count", "you sing"], ["you sing", "you count"], ["I count", "I sing"], name="t")
    seeing, blind = (tfidf_scores(echo, {"test": test}, overlap=overlap)[0]["test"] for overlap in (True, False))
    assert wins(seeing) and set(seeing.model) == {"tfidf-overlap"}
    assert not wins(blind), "without the question nobody can tell"


def test_texts_without_a_word_are_one_line():
    assert "no words" in one_line(lambda: tfidf_scores(TRAIN.assign(chosen="…", rejected="!"), {"test": TEST}))


@pytest.fixture
def embedded(monkeypatch):
    """Stand in for MiniLM: unit vectors by the words that matter here; return what was embedded."""
    calls = []

    def embed(texts, weights=None, dtype="auto"):
        calls.append((tuple(texts), weights, dtype))
        words = ("you", "it", "feel", "must", "sleep")
        found = np.array([[1 + text.count(word) for word in words] for text in texts], np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    monkeypatch.setattr(baselines, "embed", embed)
    return calls


def test_embeddings_of_the_response_and_its_meeting_with_the_question(embedded, monkeypatch):
    seen, fit = [], fit_bradley_terry
    monkeypatch.setattr(baselines, "fit_bradley_terry", lambda *a, **k: seen.append(a) or fit(*a, **k))
    encoder = Weights("some/Encoder", "there", "an encoder", "0")
    frames, facts = minilm_scores(TRAIN, {"test": TEST}, encoder, "float32")
    asked = sorted(tuple(own[c]) for own in (TRAIN, TEST) for c in ("question", "chosen", "question", "rejected"))
    assert sorted(texts for texts, *_ in embedded) == asked and {call[1:] for call in embedded} == {
        (encoder, "float32")
    }
    said, question = (baselines.embed(TRAIN[column]) for column in ("chosen", "question"))
    assert np.array_equal(seen[0][0], np.hstack([said, question * said])) and seen[0][3] is True
    assert facts["dimensions"] == 10 and set(frames["test"].model) == {"encoder"}
    assert set(minilm_scores(TRAIN, {"test": TEST})[0]["test"].model) == {"minilm"}


@pytest.mark.parametrize("scores", SCORERS)
def test_the_same_pairs_give_the_same_bits_and_equal_texts_tie(embedded, scores):
    (first, facts), (second, same) = (scores(TRAIN, {"test": TEST}) for _ in range(2))
    assert first["test"].equals(second["test"]) and facts == same and json.loads(json.dumps(facts)) == facts
    tied = scores(TRAIN, {"test": TEST.assign(rejected=TEST.chosen)})[0]["test"]
    assert (tied.chosen_score == tied.rejected_score).all()


# the frame


def test_scores_fit_their_schema_whatever_the_index(tmp_path):
    pairs = TEST.set_axis([7, 3])
    frame = score_frame(pairs, "length", *length_scores(pairs))
    assert frame.index.tolist() == [0, 1] and frame.prefID.tolist() == [0, 1] and frame.chosen_score.tolist() == [4, 5]
    frames, _ = tfidf_scores(TRAIN, {"empty": TEST.head(0), "test": pairs})
    back = read_rows(write_rows(tmp_path / "scores.parquet", "scores", [frame, *frames.values()]), "scores")
    assert back.ID.tolist() == ["t0", "t1"] * 2 and pairwise_metrics(back.chosen_score, back.rejected_score)["n"] == 4


@pytest.mark.parametrize(
    "scores, said",
    [([1.0], "shape (1,)"), ([[1.0], [2.0]], "shape (2, 1)"), ([1.0, np.nan], "pair 1"), ([np.inf, 1.0], "pair 0")],
)
def test_scores_that_do_not_fit_the_pairs_are_one_line(scores, said):
    for both in ((scores, [0.0, 0.0]), ([0.0, 0.0], scores)):
        message = one_line(lambda: score_frame(TEST, "mine", *both))
        assert said in message and "mine" in message


# who wrote it


def written(rng, n, effects, scale=1.0, signal=0.0):
    """Pairs of two authors each, drawn by Bradley-Terry on the authors' effects and on a quality of each answer.

    Returns pairs, the difference of the authors' effects, and that of the qualities."""
    names, values = list(effects), np.array(list(effects.values()))
    first = rng.integers(0, len(names), n)
    second = (first + rng.integers(1, len(names), n)) % len(names)
    quality = rng.normal(size=n)
    margin = scale * (values[first] - values[second]) + signal * quality
    won = rng.random(n) < 1 / (1 + np.exp(-margin))
    sides = np.where(won, first, second), np.where(won, second, first)
    frame = pairs_of(["a"] * n, ["b"] * n, name=f"s{rng.integers(10**9)}-")
    frame = frame.assign(**{f"{side}_model": np.take(names, own) for side, own in zip(("chosen", "rejected"), sides)})
    return frame, np.where(won, 1, -1) * (values[first] - values[second]), np.where(won, 1, -1) * quality


@pytest.mark.parametrize("wins, losses", [(150, 50), (120, 80), (20, 180)])
def test_two_authors_have_the_log_odds_of_their_wins(wins, losses):
    frame = pairs_of(["x"] * (wins + losses), ["y"] * (wins + losses))
    frame = frame.assign(chosen_model=["A"] * wins + ["B"] * losses, rejected_model=["B"] * wins + ["A"] * losses)
    test = pairs_of("x", "y", name="t").assign(chosen_model="A", rejected_model="B")
    scores, facts = author_scores(frame, {"test": test, "none": test[:0]})
    margin = scores["test"].chosen_score[0] - scores["test"].rejected_score[0]
    assert margin == pytest.approx(np.log(wins / losses), rel=0.05) and set(facts["authors"]) == {"A", "B"}
    sides = [
        (frame[f"{side}_model"].to_numpy()[:, None] == ["A", "B"]).astype(float) for side in ("chosen", "rejected")
    ]
    exact = fit_bradley_terry(*sides, frame.ID, strengths=[1e6]).weights
    assert exact[0] - exact[1] == pytest.approx(np.log(wins / losses), rel=1e-4)


def test_many_authors_have_the_strengths_of_the_classic_algorithm():
    """Hunter's (2004) minorisation-maximisation, as choix and others use it."""
    rng = np.random.default_rng(1)
    frame, _, _ = written(rng, 2000, dict(zip("ABCDE", (1.5, 0.5, 0.0, -0.7, -1.3))))
    wins = pd.crosstab(frame.chosen_model, frame.rejected_model).reindex(list("ABCDE"), axis=1).to_numpy()
    games, strength = wins + wins.T, np.ones(5)
    for _ in range(2000):
        strength = wins.sum(axis=1) / (games / (strength[:, None] + strength)).sum(axis=1)
    expected = np.log(strength) - np.log(strength).mean()
    found = author_scores(frame, {})[1]["authors"]
    assert np.array(list(found.values())) == pytest.approx(expected, abs=0.02)


def test_an_author_whom_no_training_pair_shows_stands_at_the_average_and_texts_are_not_read():
    frame, _, _ = written(np.random.default_rng(0), 100, {"A": 1.0, "B": 0.0, "C": -1.0})
    test = pairs_of(["x", "x"], ["y", "y"], name="t").assign(chosen_model=["A", "new"], rejected_model=["C", "newer"])
    scores = author_scores(frame, {"test": test})[0]["test"]
    assert scores.chosen_score[0] > scores.chosen_score[1] == scores.rejected_score[1] == 0 > scores.rejected_score[0]
    other = author_scores(frame.assign(chosen="z"), {"test": test.assign(question="?")})[0]["test"]
    pd.testing.assert_frame_equal(scores, other)


FOUR = {"A": 1.2, "B": 0.4, "C": -0.4, "D": -1.2}


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_reward_that_knows_the_author_only_adds_nothing(noise):
    """Its p is uniform, also where test pairs are further apart than training pairs, as the best and the worst are."""
    rng, found = np.random.default_rng(7), []
    for _ in range(150 if noise else 5):
        pairs, known, _ = written(rng, 120, FOUR, scale=1.5)
        found.append(author_gain(pairs, known + noise * rng.normal(size=120)))
    if not noise:
        assert max(own["LR"] for own in found) < 0.2, "what the prior leaves"
    else:
        p = np.array([own["p"] for own in found])
        assert stats.kstest(p, "uniform").pvalue > 0.01 and (p < 0.05).mean() < 0.1


def test_a_reward_that_reads_the_answer_is_found_beside_the_author():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(20):
        pairs, known, quality = written(rng, 120, FOUR, signal=1.5)
        found.append(author_gain(pairs, known + quality)["p"])
    assert np.mean(np.array(found) < 0.05) >= 0.95


def test_an_author_who_always_wins_is_no_stop_and_few_pairs_are_no_test():
    rng = np.random.default_rng(5)
    pairs, known, quality = written(rng, 80, {"A": 50.0, "B": 0.0, "C": -0.5})
    found = author_gain(pairs, quality)
    assert np.isfinite([found["LR"], found["p"]]).all() and (found["pairs"], found["authors"]) == (80, 3)
    assert author_gain(pairs[:29], quality[:29]) == {"pairs": 29, "authors": 3, "LR": None, "p": None}
    assert author_gain(pairs, np.zeros(80))["LR"] == pytest.approx(0, abs=1e-6)
