"""Properties of psycopref.stats.scores, and equality with scikit-learn and scipy."""

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, cohen_kappa_score, roc_auc_score

from psycopref.stats.scores import (
    accuracy,
    bootstrap,
    brier_score,
    cohen_kappa,
    expected_calibration_error,
    flip_rate,
    length_ratio,
    opposite,
    pairwise_metrics,
    percent_agreement,
    preference_probability,
    presented_pairs,
    reliability_bins,
    roc_auc,
    swap_consistent,
    verdict_counts,
    win_interval,
    win_rate,
    win_rate_table,
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
label_pairs = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=40).map(
    lambda rows: tuple(map(list, zip(*rows)))
)


def ece_by_loop(probability, label, bins):
    """Expected calibration error as one would write it on paper."""
    edges, total = np.linspace(0, 1, bins + 1), 0.0
    for b in range(bins):
        members = [
            i for i, p in enumerate(probability) if (edges[b] < p or b == 0) and (p <= edges[b + 1] or b == bins - 1)
        ]
        if members:
            gap = np.mean([label[i] for i in members]) - np.mean([probability[i] for i in members])
            total += len(members) / len(probability) * abs(gap)
    return total


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
@given(forecasts)
def test_auc_equals_sklearn_and_the_count_of_won_comparisons(data):
    probability, label = data
    assume(0 < label.sum() < len(label))
    ours = roc_auc(probability, label)
    assert ours == pytest.approx(roc_auc_score(label, probability), abs=TIGHT)
    won = [(p > q) + 0.5 * (p == q) for p, q in itertools.product(probability[label == 1], probability[label == 0])]
    assert ours == pytest.approx(np.mean(won), abs=TIGHT)


@few
@given(forecasts)
def test_brier_equals_sklearn_and_the_mean_square(data):
    probability, label = data
    ours = brier_score(probability, label)
    assert ours == pytest.approx(np.mean((probability - label) ** 2), abs=TIGHT)
    assume(0 < label.sum() < len(label))
    assert ours == pytest.approx(brier_score_loss(label, probability), abs=TIGHT)


@few
@given(forecasts, st.sampled_from([1, 2, 5, 10, 15]))
def test_ece_equals_the_plain_loop(data, bins):
    assert expected_calibration_error(*data, bins=bins) == pytest.approx(ece_by_loop(*data, bins), abs=TIGHT)


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


@few
@given(pairs, st.sampled_from(["mirrored", "randomised"]), st.sampled_from([5, 10, 15]))
def test_pairwise_metrics_equal_sklearn_on_the_presented_pairs(scores, form, bins):
    chosen, rejected = scores
    first, second, label = presented_pairs(chosen, rejected, form, seed=1)
    assume(0 < label.sum() < len(label))
    probability = 1 / (1 + np.exp(second - first))
    ours = pairwise_metrics(chosen, rejected, bins=bins, form=form, seed=1)
    assert ours["n"] == len(chosen)
    assert ours["accuracy"] == np.mean([c > r for c, r in zip(chosen, rejected)])
    assert ours["auc"] == pytest.approx(roc_auc_score(label, first - second), abs=TIGHT)
    assert ours["brier"] == pytest.approx(brier_score_loss(label, probability), abs=1e-9)
    assert ours["ece"] == pytest.approx(
        expected_calibration_error(preference_probability(first, second), label, bins), abs=TIGHT
    )


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


# ---- intervals ----


def test_bootstrap_covers_the_truth_only_when_it_resamples_speeches():
    """200 repeats of 40 speeches of 5 equal rows; a 95% interval ignoring speeches covers about 62%."""
    rng, speech = np.random.default_rng(7), np.repeat(np.arange(40), 5)
    covered = dict(speeches=0, rows=0)
    for repeat in range(200):
        values = rng.normal(size=40)[speech]
        for name, clusters in dict(speeches=speech, rows=None).items():
            low, high = bootstrap(np.mean, values, clusters=clusters, samples=200, seed=repeat)
            covered[name] += low <= 0 <= high
    assert 0.88 <= covered["speeches"] / 200 <= 0.99  # 0.95 less the small-sample loss, ± 3 standard errors
    assert 0.50 <= covered["rows"] / 200 <= 0.75


def test_bootstrap_without_clusters_has_the_normal_width():
    values = np.tile([0.0, 1.0], 500)
    low, high = bootstrap(np.mean, values, samples=2000)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 1000), rel=0.08)
    assert bootstrap(np.mean, values, level=0.5, samples=2000)[1] - 0.5 == pytest.approx(
        0.674 * np.sqrt(0.25 / 1000), rel=0.15
    )


def test_bootstrap_resamples_columns_together_and_clusters_whole():
    speech = np.array(["c", "a", "b", "a", "c", "a"])
    seen = []

    def watch(rows, doubled, ids):
        assert (doubled == 2 * rows).all()
        assert all(count % (speech == name).sum() == 0 for name, count in zip(*np.unique(ids, return_counts=True)))
        seen.append(len(rows))
        return 0.0

    bootstrap(watch, np.arange(6), 2 * np.arange(6), speech, clusters=speech, samples=100)
    assert len(seen) == 100 and min(seen) < 6 < max(seen)


@few
@given(st.lists(st.tuples(st.integers(0, 5), score), min_size=4, max_size=30), st.randoms(use_true_random=False))
def test_shuffling_rows_keeps_the_clustered_interval(rows, random):
    assume(len({speech for speech, _ in rows}) > 1)
    shuffled = random.sample(rows, len(rows))
    intervals = [
        bootstrap(np.mean, [v for _, v in order], clusters=[s for s, _ in order], samples=30)
        for order in (rows, shuffled)
    ]
    assert intervals[0] == pytest.approx(intervals[1], abs=1e-9)


def test_bootstrap_depends_on_the_seed_and_nothing_else():
    values = np.random.default_rng(0).normal(size=50)
    np.random.seed(1)
    one = bootstrap(np.mean, values, seed=3)
    np.random.seed(2)
    assert one == bootstrap(np.mean, values, seed=3) != bootstrap(np.mean, values, seed=4)


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


def battles_of(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        dict(
            speech_id=[f"psycho8k-{i // 2}" for i in range(n)],
            coarse_topic=[["Safety", "Youth", "Life Changes"][i // 2 % 3] for i in range(n)],
            verdict=rng.choice(["win", "loss", "tie"], size=n, p=[0.6, 0.3, 0.1]),
        )
    )


def test_win_rate_table_is_the_micro_average_with_clustered_intervals():
    battles = battles_of(240)
    table = win_rate_table(battles, samples=300)
    assert table.columns.tolist() == ["group", "n", "win_rate", "low", "high"]
    assert table["group"].tolist() == ["Life Changes", "Safety", "Youth", "Overall"]
    topics, overall = table.iloc[:-1], table.iloc[-1]
    assert overall["n"] == topics["n"].sum() == 240
    assert overall["win_rate"] == pytest.approx((topics["win_rate"] * topics["n"]).sum() / 240, abs=1e-9)
    assert ((table["low"] < table["win_rate"]) & (table["win_rate"] < table["high"])).all()
    wins = battles["verdict"] == "win"
    assert (overall["low"], overall["high"]) == win_interval(wins, battles["speech_id"], samples=300)
    plain = bootstrap(np.mean, 100.0 * wins, clusters=battles["speech_id"], samples=300)
    assert (overall["low"], overall["high"]) == pytest.approx(
        plain, abs=1.5
    )  # 120 speeches near the middle: nothing to repair
    assert overall["high"] - overall["low"] < (topics["high"] - topics["low"]).min()


def test_shuffling_speeches_changes_no_win_rate_and_no_interval():
    battles = battles_of(120)
    shuffled = battles.sample(frac=1, random_state=3)
    assert shuffled["speech_id"].tolist() != battles["speech_id"].tolist()
    pd.testing.assert_frame_equal(
        win_rate_table(battles, samples=100), win_rate_table(shuffled, samples=100), rtol=1e-12
    )


def test_win_rate_table_keeps_the_order_of_a_categorical_topic():
    order = ["Youth", "Life Changes", "Safety", "Special Topics"]
    battles = battles_of(60)
    battles["coarse_topic"] = pd.Categorical(battles["coarse_topic"], categories=order)
    assert win_rate_table(battles, samples=20)["group"].tolist() == [*order[:3], "Overall"]


def test_length_ratio_is_a_median_of_ratios():
    assert length_ratio(["a " * 30, "a", "a a a"], ["a " * 10, "a a", "a a a"]) == 1.0
    assert length_ratio(["one  two\nthree"], ["one"]) == 3.0
    assert length_ratio(["a", "a a a a", "a a"], ["a a", "a", "a a a a"]) == 0.5  # the ratio of medians would be 1


# ---- agreement ----


@few
@given(label_pairs)
def test_kappa_equals_sklearn_and_agreement_the_share_of_equal_labels(data):
    a, b = data
    assert percent_agreement(a, b) == pytest.approx(100 * sum(x == y for x, y in zip(a, b)) / len(a), abs=1e-9)
    assume(len(set(a + b)) > 1)
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-9)
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa(b, a), abs=1e-9)


def test_kappa_is_the_same_for_lists_series_and_numbers():
    a, b = list("xxyyz"), list("xyyyz")
    code = dict(x=1, y=2, z=3)
    expected = cohen_kappa_score(a, b)
    assert cohen_kappa(pd.Series(a), pd.Series(b, index=range(5, 10))) == pytest.approx(expected, abs=TIGHT)
    assert cohen_kappa([code[v] for v in a], [code[v] for v in b]) == pytest.approx(expected, abs=TIGHT)


# ---- refusals ----

NAN = float("nan")
battle = dict(speech_id=["a", "b"], coarse_topic=["Youth", "Youth"], verdict=["win", "tie"])
REFUSED = {
    "lengths": (lambda: accuracy([1, 2], [1]), "accuracy: lengths differ"),
    "empty": (lambda: pairwise_metrics([], []), "empty"),
    "two dimensions": (lambda: accuracy([[1, 2]], [[1, 2]]), "one dimension"),
    "NaN score": (lambda: accuracy([1, NAN], [0, 0]), "missing"),
    "missing score": (lambda: accuracy([1, None], [0, 0]), "missing"),
    "NA score": (lambda: accuracy(pd.Series([1, pd.NA], dtype="Int64"), [0, 0]), "missing"),
    "infinite score": (lambda: pairwise_metrics([1, np.inf], [0, 0]), "finite"),
    "text score": (lambda: accuracy(["2", "3"], ["1", "1"]), "expected numbers"),
    "unknown form": (lambda: pairwise_metrics([1, 2], [0, 0], form="both"), "'mirrored' or 'randomised'"),
    "probability above 1": (lambda: brier_score([0.5, 1.01], [1, 0]), r"\[0, 1\]"),
    "probability below 0": (lambda: expected_calibration_error([-0.01, 0.5], [1, 0]), r"\[0, 1\]"),
    "label": (lambda: roc_auc([0.5, 0.4], [1, 2]), "expected 0 or 1"),
    "one class": (lambda: roc_auc([0.5, 0.4], [0, 0]), "both 0 and 1"),
    "no bins": (lambda: reliability_bins([0.5], [1], bins=0), "bins=0"),
    "half a bin": (lambda: expected_calibration_error([0.5], [1], bins=2.5), "bins=2.5"),
    "level in percent": (lambda: bootstrap(np.mean, [1, 2], level=95), "0.95"),
    "no samples": (lambda: bootstrap(np.mean, [1, 2], samples=0), "samples=0"),
    "no columns": (lambda: bootstrap(np.mean), "no column"),
    "one cluster": (lambda: bootstrap(np.mean, [1, 2], clusters=["a", "a"]), "1 cluster"),
    "cluster lengths": (lambda: bootstrap(np.mean, [1, 2], clusters=["a", "b", "c"]), "lengths differ"),
    "NaN statistic": (lambda: bootstrap(lambda v: NAN, [1.0, 2.0], samples=5), "5 of 5"),
    "unknown verdict": (lambda: win_rate(["win", "WIN"]), "'WIN' at row 1"),
    "missing verdict": (lambda: win_rate(["win", None]), "missing"),
    "verdict of another kind": (lambda: swap_consistent(["win"], ["first"]), "verdict_backward 'first'"),
    "no verdicts": (lambda: verdict_counts([]), "empty"),
    "absent column": (lambda: win_rate_table(pd.DataFrame(battle), by="topic"), "topic"),
    "missing topic": (lambda: win_rate_table(pd.DataFrame(battle | dict(coarse_topic=["Youth", None]))), "missing"),
    "unknown verdict in table": (
        lambda: win_rate_table(pd.DataFrame(battle | dict(verdict=["win", "draw"]))),
        "'draw'",
    ),
    "blank reference": (lambda: length_ratio(["a", "b"], ["a", " "]), "row 1 is blank"),
    "token counts": (lambda: length_ratio([3, 4], [3, 4]), "not text"),
    "one label": (lambda: cohen_kappa(["x", "x"], ["x", "x"]), "at least two labels"),
    "mixed labels": (lambda: cohen_kappa(["1", "2"], [1, 2]), "text and numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_name_the_place(name):
    call, pattern = REFUSED[name]
    with pytest.raises(ValueError, match=pattern) as refused:
        call()
    message = str(refused.value)
    assert message.startswith("scores.") and "expected" in message and ";" in message and "\n" not in message


def test_import_loads_neither_pandas_nor_sklearn_nor_scipy():
    code = "import sys, psycopref.stats.scores; print([m for m in ('pandas', 'sklearn', 'scipy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
