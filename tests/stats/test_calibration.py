"""Calibration: equality with torchmetrics and scikit-learn, temperature against brute force, slices that sum, faults
refused."""

import itertools
from fractions import Fraction

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryCalibrationError
from torchmetrics.regression import MeanSquaredError

from psycopref.core.principles import principle_keys
from psycopref.stats.calibration import (
    GAP_BANDS,
    LENGTH_BANDS,
    comparison_table,
    ece_table,
    fit_temperature,
    gap_groups,
    length_groups,
    negative_log_likelihood,
    no_temperature,
    reliability_figure,
    reliability_table,
    slice_table,
    slices_figure,
    temperature_figure,
    temperature_table,
    topic_groups,
)
from psycopref.core.paper import coarse_topics
from psycopref.stats.intervals import mean_interval
from psycopref.stats.scores import (
    accuracy,
    brier_score,
    expected_calibration_error,
    pairwise_metrics,
    preference_probability,
    presented_pairs,
    roc_auc,
)

matplotlib.use("Agg")

PRINCIPLE_KEYS = principle_keys()
TIGHT = 1e-12  # the same sums in another order
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
BINS = st.sampled_from([5, 10, 15])

# multiples of 1/97 lie on no edge of 5, 10 or 15 bins but 0 and 1, which are left out
forecasts = st.lists(st.tuples(st.integers(1, 96), st.integers(0, 1)), min_size=2, max_size=60).map(
    lambda rows: (np.array([k / 97 for k, _ in rows]), np.array([y for _, y in rows]))
)
margins = st.lists(st.integers(-64, 64).map(lambda k: k / 8), min_size=2, max_size=40).map(np.array)
mixed = margins.filter(lambda m: m.sum() > 0 and (m < 0).any())  # those with a best temperature


def frame(margin, name="m", file="test", pairs_each=2):
    """Scores of one model; consecutive pairs share a speech."""
    n = len(margin)
    return pd.DataFrame(
        dict(
            ID=[f"{file}-{i // pairs_each}" for i in range(n)],
            prefID=range(n),
            model=name,
            chosen_score=np.asarray(margin, float),
            rejected_score=0.0,
        )
    )


def theirs(metric, probability, label):
    """Compute a torchmetrics metric in double precision."""
    return float(metric(torch.tensor(probability, dtype=torch.float64), torch.tensor(label)))


# ---- torchmetrics ----


@few
@given(forecasts, BINS)
def test_ece_equals_torchmetrics_off_the_edges(data, bins):
    """Both compare the mean forecast of the positive class with its frequency; torchmetrics' "confidence" is no
    max(p, 1 - p)."""
    assert expected_calibration_error(*data, bins=bins) == pytest.approx(
        theirs(BinaryCalibrationError(bins, "l1"), *data), abs=TIGHT
    )


def test_ece_differs_from_torchmetrics_on_the_edges_only():
    """Our bins are (low, high], as scikit-learn's; torchmetrics' are [low, high), with a bin of its own for exactly 1
    (its issue 3510)."""
    probability, label = np.array([0.5, 0.7]), np.array([1, 0])
    assert expected_calibration_error(probability, label, 2) == pytest.approx(
        0.5 / 2 + 0.7 / 2, abs=TIGHT
    )  # 0.5 is below
    assert theirs(BinaryCalibrationError(2, "l1"), probability, label) == pytest.approx(
        0.2 / 2, abs=TIGHT
    )  # 0.5 is above, and cancels
    probability, label = np.array([0.95, 1.0]), np.array([1, 0])
    assert expected_calibration_error(probability, label, 10) == pytest.approx(0.95 / 2, abs=TIGHT)  # one bin
    assert theirs(BinaryCalibrationError(10, "l1"), probability, label) == pytest.approx(
        0.05 / 2 + 1 / 2, abs=TIGHT
    )  # two
    assert theirs(BinaryCalibrationError(10, "l1"), probability - 1e-9, label) == pytest.approx(0.95 / 2, abs=1e-8)


@few
@given(margins, BINS, st.sampled_from(["mirrored", "randomised"]))
def test_the_numbers_of_table_1_equal_torchmetrics(margin, bins, form):
    assume((margin != 0).all())  # a tie is a forecast on the edge at 0.5
    first, second, label = presented_pairs(margin, np.zeros(len(margin)), form, seed=1)
    assume(0 < label.sum() < len(label))
    probability = preference_probability(first, second)
    ours = pairwise_metrics(margin, np.zeros(len(margin)), bins, form, seed=1)
    assert ours["ece"] == pytest.approx(theirs(BinaryCalibrationError(bins, "l1"), probability, label), abs=TIGHT)
    assert ours["accuracy"] == pytest.approx(
        theirs(BinaryAccuracy(), probability, label), abs=1e-6
    )  # single precision there
    assert roc_auc(probability, label) == pytest.approx(theirs(BinaryAUROC(), probability, label), abs=1e-6)
    assert brier_score(probability, label) == pytest.approx(
        theirs(MeanSquaredError(), probability, label.astype(float)), abs=1e-6
    )


def test_a_tie_is_wrong_here_and_half_right_in_torchmetrics():
    """There 0.5 is no positive, so of the two orders of a tied pair one counts as right."""
    first, second, label = presented_pairs([1.0, 3.0], [1.0, 0.0])
    assert accuracy([1.0, 3.0], [1.0, 0.0]) == 0.5
    assert theirs(BinaryAccuracy(), preference_probability(first, second), label) == 0.75


# ---- temperature ----


@few
@given(mixed)
def test_temperature_beats_a_grid_and_has_no_slope(margin):
    best = fit_temperature(margin, np.zeros(len(margin)))
    loss = negative_log_likelihood(margin, np.zeros(len(margin)), best)
    grid = np.geomspace(1e-3 * np.abs(margin).max(), 1e3 * np.abs(margin).max(), 2001)
    losses = np.logaddexp(0, -margin[:, None] / grid).mean(axis=0)
    assert loss <= losses.min() + TIGHT
    assert loss < np.log(2)
    if grid[1] < best < grid[-2]:
        place = losses.argmin()
        assert grid[place - 1] <= best <= grid[place + 1] or losses.min() == pytest.approx(loss, abs=1e-9)
    slope = np.mean(margin / (1 + np.exp(np.clip(margin / best, -700, 700))))
    assert slope == pytest.approx(0, abs=1e-12 * np.abs(margin).max())


@few
@given(mixed)
def test_temperature_is_the_inverse_slope_of_a_logistic_regression(margin):
    """Without intercept and penalty, on both orders of every pair."""
    first, second, label = presented_pairs(margin, np.zeros(len(margin)))
    best = fit_temperature(margin, np.zeros(len(margin)))
    assume(0.05 < best < 50)  # scikit-learn's own solver is stopped by its tolerance further out
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit((first - second)[:, None] / best, label)
    assert model.coef_[0, 0] == pytest.approx(1, rel=1e-6)


@few
@given(mixed, st.integers(-300, 300), st.integers(0, 5))
def test_temperature_has_the_unit_of_the_scores_and_ignores_ties(margin, exponent, ties):
    scale = 2.0**exponent
    padded = np.concatenate([margin, np.zeros(ties)])
    best = fit_temperature(margin, np.zeros(len(margin)))
    assert fit_temperature(scale * padded, np.zeros(len(padded))) == pytest.approx(scale * best, rel=1e-9)
    assert fit_temperature(margin + 3, np.full(len(margin), 3.0)) == pytest.approx(best, rel=1e-9)


@few
@given(margins)
def test_a_temperature_exists_unless_the_loss_falls_for_ever(margin):
    zero = np.zeros(len(margin))
    exists = margin.sum() > 0 and margin.min() < 0
    assert (no_temperature(margin, zero) == "") == exists
    if not exists:
        with pytest.raises(ValueError, match="calibration.fit_temperature: "):
            fit_temperature(margin, zero)
        ends = [negative_log_likelihood(margin, zero, t) for t in (1e-6, 1e6)]
        middle = [negative_log_likelihood(margin, zero, t) for t in np.geomspace(1e-5, 1e5, 41)]
        assert min(ends) <= min(middle) + TIGHT
    if exists:
        assert no_temperature(zero, margin).endswith("so no T beats a coin")  # sides swapped


def test_temperature_recovers_the_loudness_of_a_calibrated_model():
    rng = np.random.default_rng(0)
    sure = np.abs(rng.normal(0, 2, 20000))
    margin = np.where(rng.random(20000) < 1 / (1 + np.exp(-sure)), sure, -sure)
    assert fit_temperature(margin, np.zeros(20000)) == pytest.approx(1, abs=0.06)  # 3 standard errors
    assert fit_temperature(0.2 * margin, np.zeros(20000)) == pytest.approx(0.2, abs=0.012)


def test_extreme_margins_have_a_temperature_without_overflow():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for small in (1e-3, 1e-8):
            margin = np.array([1.0, 1.0, -small])
            best = fit_temperature(margin, np.zeros(3))
            assert 0 < best < 1 and negative_log_likelihood(margin, np.zeros(3), best) < negative_log_likelihood(
                margin, np.zeros(3), 2 * best
            )
        for margin in ([1e300, 1e300, -1e300], [1e-300, 1e-300, -1e-300]):
            assert fit_temperature(margin, np.zeros(3)) == pytest.approx(abs(margin[0]) / np.log(2), rel=1e-12)


def noisy(loudness, n, seed, file):
    return frame(loudness * np.random.default_rng(seed).normal(1, 1, n), "loud", file)


def test_temperature_table_fits_on_dev_and_measures_on_test():
    dev, test = noisy(6, 400, 1, "dev"), noisy(6, 300, 2, "test")
    table = temperature_table(dev, test)
    best = fit_temperature(dev.chosen_score, dev.rejected_score)
    assert table.temperature.tolist() == [1.0, best] and best != fit_temperature(test.chosen_score, test.rejected_score)
    for row, scale in zip(table.to_dict("records"), (1, best)):
        found = pairwise_metrics(test.chosen_score / scale, test.rejected_score)
        assert (row["Brier"], row["AUC"], row["accuracy %"] / 100) == pytest.approx(
            (found["brier"], found["auc"], found["accuracy"]), abs=TIGHT
        )
        assert row["NLL"] == pytest.approx(np.mean(np.log1p(np.exp(-test.chosen_score / scale))), abs=TIGHT)
        for bins in (5, 10, 15):
            assert row[f"ECE, {bins} bins"] == pytest.approx(
                pairwise_metrics(test.chosen_score / scale, test.rejected_score, bins)["ece"], abs=TIGHT
            )
    assert table.AUC[0] == table.AUC[1] and table["accuracy %"][0] == table["accuracy %"][1]
    assert table.NLL[1] < table.NLL[0] and table["ECE, 10 bins"][1] < table["ECE, 10 bins"][0]


@pytest.mark.parametrize(
    "margin, word", [([1, 2, 3], "ranked wrongly"), ([-1, -2, -3], "coin"), ([0, 0, 0], "as good as another")]
)
def test_a_table_without_a_temperature_says_so_and_keeps_its_columns(margin, word):
    test = noisy(6, 50, 2, "test")
    table = temperature_table(frame(margin, "loud", "dev"), test)
    assert word in table.scores[1] and table.drop(columns=["model", "scores"]).iloc[1].isna().all()
    assert list(table.columns) == list(temperature_table(noisy(6, 400, 1, "dev"), test).columns)
    assert table.iloc[0].notna().all()


# ---- what ECE leaves open ----


@few
@given(margins, BINS)
def test_ece_table_agrees_with_metrics_and_its_mean_over_all_orders_is_no_smaller(margin, bins):
    scores, zero = frame(margin), np.zeros(len(margin))
    row = ece_table(scores, (bins,), range(4)).iloc[0]
    first, second, label = zip(*(presented_pairs(margin, zero, "randomised", seed) for seed in range(4)))
    drawn = [expected_calibration_error(preference_probability(f, s), y, bins) for f, s, y in zip(first, second, label)]
    assert row[["randomised, mean", "randomised, lowest", "randomised, highest"]].tolist() == pytest.approx(
        [np.mean(drawn), min(drawn), max(drawn)], abs=TIGHT
    )
    both = expected_calibration_error(
        preference_probability(*presented_pairs(margin, zero)[:2]), presented_pairs(margin, zero)[2], bins
    )
    assert row["mirrored"] == pytest.approx(both, abs=TIGHT) and row["orders"] == 4 and 0 <= row["if calibrated"] <= 1
    if len(margin) <= 7:
        p = preference_probability(margin, zero)
        every = [
            expected_calibration_error(np.where(np.array(o) == 1, p, 1 - p), o, bins)
            for o in itertools.product([0, 1], repeat=len(margin))
        ]
        assert np.mean(every) >= both - TIGHT


def test_the_calibrated_column_is_what_a_calibrated_model_shows():
    rng = np.random.default_rng(3)
    sure = np.abs(rng.normal(0, 1.5, 400))
    shown = []
    for _ in range(60):
        margin = np.where(rng.random(400) < 1 / (1 + np.exp(-sure)), sure, -sure)
        shown.append(pairwise_metrics(margin, np.zeros(400))["ece"])
    floor = ece_table(frame(sure), (10,), range(60))["if calibrated"][0]
    assert floor == pytest.approx(np.mean(shown), abs=4 * np.std(shown) * np.sqrt(2 / 60))
    assert ece_table(frame(8 * margin), (10,), range(20)).eval("mirrored > 3 * `if calibrated`").all()


# ---- slices ----

slice_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(-8, 8)), min_size=2, max_size=40)


@few
@given(slice_rows, st.randoms(use_true_random=False))
def test_slices_sum_to_the_whole_in_any_order_of_rows(rows, random):
    scores = frame([m for _, _, m in rows]).assign(ID=[f"s-{s}" for s, _, _ in rows])
    keys = pd.MultiIndex.from_frame(scores[["ID", "prefID"]])
    groups = pd.Series(pd.Categorical([f"g{g}" for _, g, _ in rows], [f"g{i}" for i in (3, 1, 0, 2)]), index=keys)
    order = random.sample(range(len(rows)), len(rows))
    table = slice_table(scores, groups.iloc[order], samples=20)
    parts, whole = table.iloc[:-1], table.iloc[-1]
    assert whole["group"] == "all" and whole["pairs"] == parts["pairs"].sum() == len(rows)
    assert whole["accuracy %"] == pytest.approx((parts["accuracy %"] * parts["pairs"]).sum() / len(rows), abs=1e-9)
    assert whole["accuracy %"] == pytest.approx(100 * accuracy(scores.chosen_score, scores.rejected_score), abs=1e-9)
    assert parts["group"].tolist() == [g for g in ("g3", "g1", "g0", "g2") if g in set(groups)]
    for row in parts.to_dict("records"):
        mine = [(s, m) for s, g, m in rows if f"g{g}" == row["group"]]
        assert (row["pairs"], row["speeches"]) == (len(mine), len({s for s, _ in mine}))
        assert row["accuracy %"] == pytest.approx(100 * np.mean([m > 0 for _, m in mine]), abs=1e-9)
        assert row["low"] <= row["accuracy %"] <= row["high"]
    assert table["speeches"].max() == whole["speeches"] <= parts["speeches"].sum()


def test_slice_intervals_are_clustered_and_those_of_table_1():
    right = np.repeat(np.arange(60) % 3 > 0, 4)
    scores = frame(np.where(right, 1.0, -1.0), pairs_each=4)
    groups = pd.Series("one", index=pd.MultiIndex.from_frame(scores[["ID", "prefID"]]))
    table = slice_table(scores, groups, samples=400, seed=0)
    assert table.loc[0, ["low", "high"]].tolist() == table.loc[1, ["low", "high"]].tolist()
    low, high = mean_interval(right, scores.ID, samples=400)
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([100 * low, 100 * high], abs=1e-9)
    low, high = mean_interval(right, samples=400)
    assert table.high[1] - table.low[1] > 1.5 * 100 * (high - low)
    alone = scores.assign(ID=[f"alone-{i}" for i in range(240)])
    top, other = (reliability_table(own, 5, 400).iloc[-2] for own in (scores, alone))  # a margin of 1: 0.73
    assert top.frequency_high - top.frequency_low > 1.5 * (other.frequency_high - other.frequency_low)


def pairs_frame(rows):
    table = {"ID": [f"s-{i}" for i in range(len(rows))], "prefID": range(len(rows))}
    for side, which in (("chosen", 0), ("rejected", 1)):
        table |= {f"{side}_{key}_rating": [row[which][i] for row in rows] for i, key in enumerate(PRINCIPLE_KEYS)}
    return pd.DataFrame(table)


def test_gap_bands_are_those_of_exact_fractions_for_every_sum():
    def rated(total):  # seven ratings that sum to 7 + total
        return [1 + total // 7 + (i < total % 7) for i in range(7)]

    rows = [(rated(max(total, 0)), rated(max(-total, 0))) for total in range(-28, 29)]
    assert [sum(c) - sum(r) for c, r in rows] == list(range(-28, 29)) and {
        x for row in rows for side in row for x in side
    } == {1, 2, 3, 4, 5}
    edges, bands = [Fraction(1), Fraction(3, 2), Fraction(2)], list(GAP_BANDS)
    expected = [bands[sum(Fraction(total, 7) >= edge for edge in edges)] for total in range(-28, 29)]
    assert gap_groups(pairs_frame(rows)).tolist() == expected


@few
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=20))
def test_length_bands_mirror_when_the_sides_are_swapped(counts):
    pairs = pd.DataFrame(
        dict(
            ID="s",
            prefID=range(len(counts)),
            chosen=["w " * c for c, _ in counts],
            rejected=["w\n" * r for _, r in counts],
        )
    )
    forward, backward = (
        length_groups(pairs),
        length_groups(pairs.rename(columns=dict(chosen="rejected", rejected="chosen"))),
    )
    mirror = dict(zip(LENGTH_BANDS, LENGTH_BANDS[::-1]))
    assert [mirror[band] for band in forward] == backward.tolist()
    assert [band == "within 20%" for band in forward] == [max(c, r) * 5 <= min(c, r) * 6 for c, r in counts]


def test_topics_are_named_in_the_papers_order_and_may_be_unknown():
    slugs = list(coarse_topics())
    speeches = pd.DataFrame(dict(speech_id=[f"test-{i}" for i in range(10)], coarse_topic=[*slugs[::-1], None, ""]))
    scores = frame(np.ones(11), pairs_each=1)
    groups = topic_groups(scores, speeches)
    assert groups.tolist() == [node["short"] for node in coarse_topics().values()][::-1] + ["unknown"] * 3
    assert slice_table(scores, groups, 5).group.tolist() == [
        *(node["short"] for node in coarse_topics().values()),
        "unknown",
        "all",
    ]


# ---- models side by side ----


@few
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30),
    st.randoms(use_true_random=False),
)
def test_comparison_is_antisymmetric_and_independent_of_the_order_of_rows(rows, random):
    a, b = frame([x for x, _ in rows], "a"), frame([y for _, y in rows], "b")
    forward = comparison_table(dict(a=a, b=b.iloc[random.sample(range(len(rows)), len(rows))]), "b", samples=40).iloc[0]
    backward = comparison_table(dict(a=a, b=b), "a", samples=40).iloc[0]
    difference = 100 * (accuracy(a.chosen_score, a.rejected_score) - accuracy(b.chosen_score, b.rejected_score))
    assert forward["difference, points"] == pytest.approx(difference, abs=1e-9) == -backward["difference, points"]
    assert (forward["low"], forward["high"]) == pytest.approx((-backward["high"], -backward["low"]), abs=1e-9)
    assert forward["McNemar p"] == backward["McNemar p"]
    assert forward["only model right"] == sum(x > 0 >= y for x, y in rows) == backward["only reference right"]
    assert forward["accuracy %"] - forward["reference accuracy %"] == pytest.approx(difference, abs=1e-9)


# ---- mirrors ----


@few
@given(margins, BINS)
def test_reliability_is_point_symmetric_and_swapping_the_sides_turns_frequencies(margin, bins):
    assume((margin != 0).all() and np.abs(margin).max() < 30)  # ties and saturated forecasts lie on an edge
    table = reliability_table(frame(margin), bins, 20)
    np.testing.assert_allclose(table["frequency"], 1 - table["frequency"][::-1], atol=TIGHT)
    np.testing.assert_allclose(table["frequency_low"], 1 - table["frequency_high"][::-1], atol=TIGHT)
    swapped = reliability_table(frame(-margin), bins, 20)
    np.testing.assert_allclose(swapped["frequency"], 1 - table["frequency"], atol=TIGHT)
    assert swapped["count"].tolist() == table["count"].tolist()
    known = table["frequency_low"].notna()
    assert (table["frequency_low"][known] <= table["frequency_high"][known]).all()


@few
@given(margins)
def test_swapping_the_sides_mirrors_slices(margin):
    assume((margin != 0).all())
    forward, backward = (
        frame(margin),
        frame(margin).rename(columns=dict(chosen_score="rejected_score", rejected_score="chosen_score")),
    )
    groups = pd.Series(np.arange(len(margin)) % 2, index=pd.MultiIndex.from_frame(forward[["ID", "prefID"]]))
    one, other = slice_table(forward, groups, 20), slice_table(backward, groups, 20)
    np.testing.assert_allclose(one["accuracy %"], 100 - other["accuracy %"], atol=1e-9)
    np.testing.assert_allclose(one["low"], 100 - other["high"], atol=1e-9)
    assert one["pairs"].tolist() == other["pairs"].tolist()


# ---- figures ----


@pytest.fixture
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def test_reliability_figure_shows_the_table(close_figures):
    one, two = noisy(1, 60, 0, "test"), noisy(6, 60, 1, "test")
    figure = reliability_figure({"one": one, "a long name that needs more than one line": two}, 10, 20)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:2]] == ["one", "a long name that needs"]
    for i, scores in enumerate((one, two)):
        table = reliability_table(scores, 10, 20)
        filled = table[table["count"] > 0]
        np.testing.assert_allclose(figure.axes[i].lines[1].get_ydata(), filled["frequency"])
        assert [bar.get_height() for bar in figure.axes[2 + i].patches] == table["count"].tolist()
        assert (
            f"{pairwise_metrics(scores.chosen_score, scores.rejected_score)['ece']:.3f}" in figure.axes[i].get_title()
        )


def test_temperature_figure_divides_the_margins(close_figures):
    scores = noisy(6, 60, 1, "test").assign(rejected_score=0.5)
    figure = temperature_figure(scores, 4.0, 10, 20)
    scaled = reliability_table(scores.assign(chosen_score=scores.chosen_score / 4, rejected_score=0.125), 10, 20)
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), scaled[scaled["count"] > 0]["frequency"])


def test_slices_figure_shows_every_group(close_figures):
    scores = frame([1, 1, -1, 1, 1, -1, 1, 1], pairs_each=1)
    names = ["lonely", *["mixed"] * 5, *["all right"] * 2]
    groups = pd.Series(
        pd.Categorical(names, ["lonely", "mixed", "all right"]),
        index=pd.MultiIndex.from_frame(scores[["ID", "prefID"]]),
    )
    figure = slices_figure({"one": slice_table(scores, groups, 50), "two": slice_table(scores, groups, 50)})
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["lonely", "mixed", "all right", "all"]
    assert [dots.get_offsets()[0].tolist() for dots in axes.collections] == [[100, 3], [60, 2], [100, 1], [75, 0]]
    assert all(tuple(dots.get_facecolor()[0]) != (1, 1, 1, 1) for dots in axes.collections)
    assert [text.get_text() for text in axes.texts][:4] == ["1 / 1", "5 / 5", "2 / 2", "8 / 8"]


# ---- faults ----

good = frame([1.0, -0.5, 2.0, 1.0])
other_file = frame([1.0, -0.5, 2.0, 1.0], file="train")
by_pair = pd.Series(list("aabb"), index=pd.MultiIndex.from_frame(good[["ID", "prefID"]]))
topics = pd.DataFrame(dict(speech_id=["test-0", "test-1"], coarse_topic=list(coarse_topics())[:2]))
NAN = float("nan")
REFUSED = {
    "no pairs": (lambda: fit_temperature([], []), "one value for each"),
    "NaN score": (lambda: fit_temperature([1, NAN], [0, 0]), "nan at row"),
    "infinite score": (lambda: fit_temperature([1, np.inf], [0, 0]), "finite"),
    "lengths": (lambda: fit_temperature([1, 2], [0]), "shapes"),
    "separable": (lambda: fit_temperature([1, 2, 0], [0, 0, 0]), "none of 3 pairs"),
    "all wrong": (lambda: fit_temperature([0, 0], [1, 2]), "no T beats a coin"),
    "all ties": (lambda: fit_temperature([1, 1], [1, 1]), "as good as another"),
    "speech on both sides": (lambda: temperature_table(good, good), "2 speeches are in"),
    "two models": (lambda: temperature_table(other_file.assign(model="n"), good), r"models \['m', 'n'\]"),
    "model twice": (lambda: temperature_table(pd.concat([other_file] * 2), good), "twice"),
    "no score column": (lambda: ece_table(good.drop(columns="chosen_score")), "chosen_score"),
    "groups of another file": (lambda: slice_table(other_file, by_pair), "4 pairs only in scores, 4 only in groups"),
    "a group short": (lambda: slice_table(good, by_pair[1:]), "1 pairs only in scores"),
    "a group too many": (lambda: slice_table(good[1:], by_pair), "1 only in groups"),
    "an empty group": (lambda: slice_table(good, by_pair.where(by_pair == "a")), "2 pairs have no group"),
    "NaN in a slice": (lambda: slice_table(good.assign(chosen_score=NAN), by_pair), "nan at row"),
    "shifted prefIDs": (
        lambda: comparison_table(dict(a=good, b=good.assign(prefID=good.prefID + 1)), "a"),
        "only in those of b",
    ),
    "speeches exchanged": (
        lambda: comparison_table(dict(a=good, b=good.assign(ID=good.ID[::-1].tolist())), "a"),
        "4 pairs only in the scores of a",
    ),
    "train against test": (lambda: comparison_table(dict(a=good, b=other_file), "a"), "score both on one file"),
    "dropped pair": (lambda: comparison_table(dict(a=good, b=good[:-1]), "a"), "1 pairs only in the scores of a"),
    "repeated pair": (lambda: comparison_table(dict(a=good, b=good.iloc[[0, 1, 2, 2]]), "a"), "twice"),
    "NaN in a comparison": (lambda: comparison_table(dict(a=good, b=good.assign(chosen_score=NAN)), "a"), "nan at row"),
    "unknown topic": (lambda: topic_groups(good, topics.assign(coarse_topic="golf")), "'golf'"),
    "no ratings": (lambda: gap_groups(good), "chosen_empathy_rating"),
    "no texts": (lambda: length_groups(good), "chosen"),
    "no models to draw": (lambda: reliability_figure({}), "0 models"),
    "too many to draw": (lambda: reliability_figure(dict.fromkeys("abcde", good)), "5 models"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_faults_are_refused_in_one_line(name):
    call, pattern = REFUSED[name]
    with pytest.raises(ValueError, match=pattern) as refused:
        call()
    message = str(refused.value)
    assert (
        message.startswith(("calibration", "scores."))
        and "expected" in message
        and ";" in message
        and "\n" not in message
    )
