"""Properties of psycopref.stats.scores, and bins equal to scikit-learn's (test_calibration holds the numbers against
torchmetrics)."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from psycopref.stats.scores import (
    accuracy,
    brier_score,
    expected_calibration_error,
    flip_rate,
    opposite,
    pairwise_metrics,
    preference_probability,
    presented_pairs,
    reliability_bins,
    roc_auc,
    swap_consistent,
    verdict_counts,
    win_rate,
)

TIGHT = 1e-12  # the same sums in another order
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# scores are multiples of 1/8, so that differences and shifts are exact in floating point
score = st.integers(-64, 64).map(lambda k: k / 8)
pairs = st.lists(st.tuples(score, score), min_size=2, max_size=30).map(lambda rows: tuple(np.array(rows).T))
forecasts = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=40).map(
    lambda rows: (np.array([p for p, _ in rows]), np.array([y for _, y in rows]))
)
word = st.sampled_from(["win", "loss", "tie"])
verdict_pairs = st.lists(st.tuples(word, word), min_size=1, max_size=30).map(lambda rows: tuple(map(list, zip(*rows))))


# ---- probability and order ----


@few
@given(pairs)
def test_probability_is_the_logistic_function_and_symmetric(scores):
    first, second = scores
    probability = preference_probability(first, second)
    np.testing.assert_allclose(probability, [1 / (1 + np.exp(b - a)) for a, b in zip(first, second)], rtol=1e-12)
    np.testing.assert_allclose(probability + preference_probability(second, first), 1, atol=TIGHT)


def test_probability_is_stable_far_out():
    with np.errstate(over="raise", invalid="raise"):
        assert preference_probability([1e6, 0.0, 0.0], [0.0, 1e6, 0.0]).tolist() == [1.0, 0.0, 0.5]


@few
@given(pairs, st.integers(0, 5))
def test_presented_pairs_keep_both_scores_and_tell_the_truth(scores, seed):
    chosen, rejected = scores
    first, second, label = presented_pairs(chosen, rejected, "randomised", seed)
    assert np.where(label == 1, first, second).tolist() == chosen.tolist()
    assert np.where(label == 1, second, first).tolist() == rejected.tolist()
    first, second, label = presented_pairs(chosen, rejected)
    rows = sorted(zip(first, second, label))
    assert rows == sorted([(c, r, 1) for c, r in zip(chosen, rejected)] + [(r, c, 0) for c, r in zip(chosen, rejected)])


def test_randomised_order_uses_both_orders_and_the_seed():
    labels = [presented_pairs(np.ones(200), np.zeros(200), "randomised", seed)[2] for seed in (0, 0, 1)]
    assert 60 < labels[0].sum() < 140
    assert (labels[0] == labels[1]).all() and (labels[0] != labels[2]).any()


# ---- the four numbers of Table 1 ----


@few
@given(forecasts, st.sampled_from([2, 5, 10, 15]))
def test_reliability_equals_sklearn_and_sums_to_the_ece(data, bins):
    probability, label = data
    assume(0 < label.sum() < len(label))
    table = reliability_bins(probability, label, bins)
    filled = table[table["count"] > 0]
    frequency, mean_probability = calibration_curve(label, probability, n_bins=bins)
    np.testing.assert_allclose(filled["frequency"], frequency, atol=TIGHT)
    np.testing.assert_allclose(filled["mean_probability"], mean_probability, atol=TIGHT)
    assert len(table) == bins and table["count"].sum() == len(label)
    assert table.loc[table["count"] == 0, ["frequency", "mean_probability"]].isna().all(axis=None)
    gaps = (filled["frequency"] - filled["mean_probability"]).abs() * filled["count"] / len(label)
    assert gaps.sum() == pytest.approx(expected_calibration_error(probability, label, bins), abs=TIGHT)


def test_values_on_an_edge_fall_into_the_lower_bin_as_in_sklearn():
    edges = np.linspace(0, 1, 5)
    assert reliability_bins(edges, [0, 1, 0, 1, 0], bins=4)["count"].tolist() == [2, 1, 1, 1]
    assert len(calibration_curve([0, 1, 0, 1, 0], edges, n_bins=4)[0]) == 4


def test_auc_sees_margins_beyond_the_precision_of_the_probability():
    chosen, rejected = np.array([50.0, 60.0, -45.0]), np.zeros(3)
    assert pairwise_metrics(chosen, rejected)["auc"] == pytest.approx(8 / 9, abs=TIGHT)
    first, second, label = presented_pairs(chosen, rejected)
    assert roc_auc(preference_probability(first, second), label) == pytest.approx(7 / 9, abs=TIGHT)  # saturated: ties


@few
@given(pairs)
def test_swapping_chosen_and_rejected_mirrors_accuracy_and_auc(scores):
    chosen, rejected = scores
    forward, backward = pairwise_metrics(chosen, rejected), pairwise_metrics(rejected, chosen)
    ties = np.mean(chosen == rejected)
    assert forward["accuracy"] + backward["accuracy"] == pytest.approx(1 - ties, abs=TIGHT)
    assert forward["auc"] + backward["auc"] == pytest.approx(1, abs=TIGHT)


@few
@given(pairs, st.integers(-800, 800).map(lambda k: k / 8), st.sampled_from(["mirrored", "randomised"]))
def test_a_constant_added_to_all_scores_changes_nothing(scores, shift, form):
    chosen, rejected = scores
    assume(form == "mirrored" or 0 < presented_pairs(chosen, rejected, form)[2].sum() < len(chosen))
    assert pairwise_metrics(chosen + shift, rejected + shift, form=form) == pairwise_metrics(
        chosen, rejected, form=form
    )


def test_a_scale_changes_calibration_and_not_the_ranking():
    chosen, rejected = np.array([2.0, 1.0, 0.5, 0.0]), np.array([0.0, 0.5, 1.0, 1.5])
    plain, scaled = pairwise_metrics(chosen, rejected), pairwise_metrics(3 * chosen, 3 * rejected)
    assert (plain["accuracy"], plain["auc"]) == (scaled["accuracy"], scaled["auc"])
    assert abs(plain["brier"] - scaled["brier"]) > 0.05 and abs(plain["ece"] - scaled["ece"]) > 0.05


@few
@given(pairs, st.sampled_from([5, 10, 15]))
def test_bounds_between_ece_and_brier(scores, bins):
    chosen, rejected = scores
    always_first, ones = preference_probability(chosen, rejected), np.ones(len(chosen))
    brier = brier_score(always_first, ones)
    assert expected_calibration_error(always_first, ones, bins) >= brier - TIGHT
    mirrored = pairwise_metrics(chosen, rejected, bins=bins)
    assert mirrored["brier"] == pytest.approx(brier, abs=TIGHT)
    assert mirrored["ece"] <= np.sqrt(brier) + TIGHT


def test_mirrored_ece_is_the_confidence_ece_and_at_most_the_mean_over_all_orders():
    margin = np.array([2.1, 1.3, -0.7, 0.4, -1.6, 0.9])
    probability, label = preference_probability(margin, np.zeros(6)), (margin > 0).astype(int)
    confidence = np.maximum(probability, 1 - probability)
    mirrored = pairwise_metrics(margin, np.zeros(6), bins=10)["ece"]
    by_bin = [
        abs(np.sum((label - confidence)[(confidence > low) & (confidence <= low + 0.1)])) / 6
        for low in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    assert mirrored == pytest.approx(sum(by_bin), abs=TIGHT)
    orders = [np.array(order) for order in itertools.product([0, 1], repeat=6)]
    eces = [expected_calibration_error(np.where(order, probability, 1 - probability), order) for order in orders]
    assert np.mean(eces) >= mirrored + 0.01


@few
@given(pairs, st.randoms(use_true_random=False))
def test_shuffling_pairs_changes_nothing_in_the_mirrored_form(scores, random):
    chosen, rejected = scores
    order = list(range(len(chosen)))
    random.shuffle(order)
    assert pairwise_metrics(chosen[order], rejected[order]) == pytest.approx(
        pairwise_metrics(chosen, rejected), abs=TIGHT
    )


# ---- win rates ----


@few
@given(verdict_pairs)
def test_counts_add_up_and_swapping_the_sides_flips_every_verdict(data):
    verdicts, _ = data
    counts, other = verdict_counts(verdicts), verdict_counts(opposite(verdicts))
    assert counts["win"] + counts["loss"] + counts["tie"] == counts["n"] == len(verdicts)
    assert (other["win"], other["loss"], other["tie"]) == (counts["loss"], counts["win"], counts["tie"])
    assert all(a != b or a == "tie" for a, b in zip(verdicts, opposite(verdicts)))
    assert opposite(opposite(verdicts)).tolist() == verdicts
    assert win_rate(verdicts) == pytest.approx(100 * verdicts.count("win") / len(verdicts), abs=1e-9)


@few
@given(verdict_pairs)
def test_swap_consistency_and_flips(data):
    forward, backward = data
    kept = swap_consistent(forward, backward).tolist()
    assert kept == [f if f == b else "tie" for f, b in zip(forward, backward)]
    assert kept == swap_consistent(backward, forward).tolist()
    assert opposite(kept).tolist() == swap_consistent(opposite(forward), opposite(backward)).tolist()
    assert flip_rate(forward, backward) == pytest.approx(
        100 * sum(f != b for f, b in zip(forward, backward)) / len(kept), abs=1e-9
    )
    assert win_rate(kept) <= min(win_rate(forward), win_rate(backward))


# ---- refusals ----

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: accuracy([1, 2], [1]), "accuracy: shapes"),
        (lambda: pairwise_metrics([], []), "one value for each item"),
        (lambda: accuracy([[1, 2]], [[1, 2]]), "shapes"),
        (lambda: accuracy([1, NAN], [0, 0]), "nan at row 1"),
        (lambda: accuracy([1, None], [0, 0]), "nan at row 1"),
        (lambda: pairwise_metrics([1, np.inf], [0, 0]), "finite"),
        (lambda: pairwise_metrics([1, 2], [0, 0], form="both"), "'mirrored' or 'randomised'"),
        (lambda: brier_score([0.5, 1.01], [1, 0]), "1.01|y_prob"),
        (lambda: expected_calibration_error([-0.01, 0.5], [1, 0]), "margin"),
        (lambda: win_rate(["win", "WIN"]), "'WIN'"),
        (lambda: win_rate(["win", None]), "None"),
        (lambda: flip_rate(["win"], ["win", "tie"]), "columns of"),
        (lambda: verdict_counts([]), "one for each battle"),
    ],
)
def test_what_would_give_a_wrong_number_is_refused(call, pattern):
    with pytest.raises(ValueError, match=pattern):
        call()
