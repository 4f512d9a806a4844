"""Correcting a judge: equality with ppi-python and with sums by hand, the ends of the scale, coverage, and refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from psycopref.stats.intervals import mean_interval
from psycopref.stats.judge_error import prediction_powered, rogan_gladen, tuned_power

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BOTH = pytest.mark.parametrize("correct", [prediction_powered, rogan_gladen])


def battles(n, labelled, seed=0, rate=0.5, sensitivity=0.9, specificity=0.7):
    "Verdicts of a judge who sees too many wins, and labels of the first of them."
    chance = np.random.default_rng(seed)
    truth = chance.random(n) < rate
    judged = np.where(truth, chance.random(n) < sensitivity, chance.random(n) > specificity).astype(float)
    return judged, np.where(np.arange(n) < labelled, truth, np.nan)


def ends(found):
    return found["low"], found["high"]


def width(found):
    return found["high"] - found["low"]


def normal_ends(value, influence):
    "The interval of the delta method: each speech's influence on the value, summed in squares."
    half = norm.ppf(0.975) * np.sqrt((np.asarray(influence) ** 2).sum())
    return value - half, value + half


# ---- equality ----


@pytest.mark.parametrize("seed", range(4))
def test_prediction_powered_is_ppi_pythons(seed):
    ppi = pytest.importorskip("ppi_py")
    judged, labels = battles(2400, 400, seed)
    rows = labels[:400], judged[:400], judged[400:]
    found = prediction_powered(judged, labels)
    assert found["estimate"] == pytest.approx(float(np.ravel(ppi.ppi_mean_pointestimate(*rows))[0]), abs=1e-12)
    theirs = [float(np.ravel(end)[0]) for end in ppi.ppi_mean_ci(*rows, alpha=0.05)]
    assert ends(found) == pytest.approx(theirs, abs=0.003)
    for power in (0.3, 1.0):
        fixed = prediction_powered(judged, labels, power=power)
        assert fixed["estimate"] == pytest.approx(float(np.ravel(ppi.ppi_mean_pointestimate(*rows, lam=power))[0]))
        theirs = [float(np.ravel(end)[0]) for end in ppi.ppi_mean_ci(*rows, alpha=0.05, lam=power)]
        assert ends(fixed) == pytest.approx(theirs, abs=0.003)


@pytest.mark.parametrize("seed", range(4))
def test_prediction_powered_is_what_a_hand_would_sum(seed):
    judged, labels = battles(2400, 400, seed)
    y, f, others = labels[:400].tolist(), judged[:400].tolist(), judged[400:].tolist()
    mean = lambda values: sum(values) / len(values)
    covariance = mean([a * b for a, b in zip(y, f)]) - mean(y) * mean(f)
    spread = sum((one - mean(f + others)) ** 2 for one in f + others) / 2399
    power = covariance / ((1 + 400 / 2000) * spread)
    left = [a - power * b for a, b in zip(y, f)]
    value = power * mean(others) + mean(left)
    found = prediction_powered(judged, labels)
    assert (found["power"], found["estimate"]) == pytest.approx((power, value), abs=1e-12)
    influence = [power * (one - mean(others)) / 2000 for one in others] + [(one - mean(left)) / 400 for one in left]
    assert ends(found) == pytest.approx(normal_ends(value, influence), abs=0.003)


@pytest.mark.parametrize("seed", range(4))
def test_rogan_gladen_is_the_delta_method_where_labels_are_many(seed):
    judged, labels = battles(4000, 1500, seed)
    y, f = labels[:1500], judged[:1500]
    p, s, a = judged.mean(), f[y == 1].mean(), f[y == 0].mean()
    found, value = rogan_gladen(judged, labels), (p - a) / (s - a)
    assert (found["sensitivity"], found["specificity"]) == pytest.approx((s, 1 - a))
    assert found["estimate"] == pytest.approx((p + (1 - a) - 1) / (s + (1 - a) - 1)) == pytest.approx(value)
    influence = (judged - p) / 4000
    influence[:1500] -= value * y * (f - s) / y.sum() + (1 - value) * (1 - y) * (f - a) / (1 - y).sum()
    assert ends(found) == pytest.approx(normal_ends(value, influence / (s - a)), abs=0.005)


def test_textbook_numbers():
    judged = np.repeat([1, 0, 1, 0, 1, 0], [90, 10, 30, 70, 420, 380])  # labelled: wins, others; then judged only
    labels = np.repeat([1, 0, np.nan], [100, 100, 800])
    found = rogan_gladen(judged, labels)
    assert (found["sensitivity"], found["specificity"]) == (0.9, 0.7)
    assert found["estimate"] == pytest.approx((0.54 + 0.7 - 1) / 0.6) == pytest.approx(0.4)


# ---- the ends of the scale ----


def test_without_the_judge_only_the_labels_speak():
    judged, labels = battles(300, 60)
    found = prediction_powered(judged, labels, power=0)
    assert ends(found) == mean_interval(labels[:60]) and found["estimate"] == labels[:60].mean()
    everything = prediction_powered(judged[:60], labels[:60])
    assert ends(everything) == ends(found) and everything["power"] == 0
    assert rogan_gladen(judged[:60], labels[:60])["estimate"] == pytest.approx(labels[:60].mean())


def test_a_perfect_judge_has_the_interval_of_all_rows():
    judged, labels = battles(1500, 500, sensitivity=1, specificity=1)
    for found in (prediction_powered(judged, labels), rogan_gladen(judged, labels)):
        assert found["estimate"] == pytest.approx(judged.mean(), abs=0.003)
        assert ends(found) == pytest.approx(mean_interval(judged), abs=0.004)
    few_labels = [prediction_powered(judged, np.where(np.arange(1500) < n, judged, np.nan)) for n in (20, 100, 500)]
    assert width(few_labels[0]) > width(few_labels[1]) > width(few_labels[2]), "20 of 20 is no proof of no error"


@BOTH
def test_no_label_no_correction(correct):
    judged, labels = battles(100, 0)
    assert all(np.isnan(correct(judged, labels)[name]) for name in ("estimate", "low", "high"))


def test_one_label_and_all_alike():
    judged, labels = battles(100, 1)
    one = prediction_powered(judged, labels)
    assert one["power"] == 0 and width(one) > 0.8 and np.isnan(rogan_gladen(judged, labels)["estimate"])
    for verdict in (0, 1):
        same = prediction_powered(np.full(100, verdict), battles(100, 40)[1])
        assert same["power"] == 0 and ends(same) == mean_interval(battles(100, 40)[1][:40])
        assert np.isnan(rogan_gladen(np.full(100, verdict), battles(100, 40)[1])["estimate"])
    agreed = prediction_powered(np.ones(100), np.where(np.arange(100) < 40, 1, np.nan))
    assert agreed["high"] == 1 == agreed["estimate"] and 0.85 < agreed["low"] < 0.96
    assert np.isnan(rogan_gladen(judged, np.where(np.arange(100) < 40, 1, np.nan))["estimate"]), "no specificity"


def test_a_judge_no_better_than_a_coin_has_no_rogan_gladen():
    judged, labels = battles(400, 200, sensitivity=0.3, specificity=0.4)
    found = rogan_gladen(judged, labels)
    assert found["sensitivity"] + found["specificity"] < 1 and np.isnan(found["low"])
    assert "coin" in found["note"]
    assert prediction_powered(judged, labels)["power"] == 0
    weak = rogan_gladen(*battles(400, 60, sensitivity=0.75, specificity=0.4, seed=1))
    assert weak["sensitivity"] + weak["specificity"] > 1 and ends(weak) == (0, 1), "nothing is ruled out"


def test_an_impossible_rate_is_cut_or_refused_and_says_so():
    judged, labels = np.repeat([1, 0, 1, 0], [18, 2, 8, 12]), np.repeat([1, 0], [20, 20])

    def others(n):
        return np.append(judged, np.zeros(n)), np.append(labels, np.full(n, np.nan))

    found = rogan_gladen(*others(60))
    assert found["note"] == "cut" and found["estimate"] == found["low"] == 0 < found["high"] < 0.2
    verdicts, people = others(60)
    turned = rogan_gladen(1 - verdicts, 1 - people)
    assert turned["note"] == "cut" and turned["estimate"] == turned["high"] == 1
    assert turned["low"] == pytest.approx(1 - found["high"], abs=0.02)
    beyond = rogan_gladen(*others(200))
    assert np.isnan(beyond["estimate"]) and "unlike the others" in beyond["note"], "0 to 0 would be a false certainty"
    assert rogan_gladen(*battles(300, 100))["note"] == ""


def test_twenty_labels_that_agree_leave_a_doubt_of_half_a_speech_either_way():
    labels = np.where(np.arange(20_000) < 20, np.arange(20_000) % 2, np.nan)
    found = prediction_powered(np.arange(20_000) % 2, labels, power=1.0)
    weights = np.random.default_rng(5).dirichlet([20, 0.5, 0.5], 40_000)  # agree, people alone say win, the judge alone
    assert ends(found) == pytest.approx(0.5 + np.quantile(weights[:, 1] - weights[:, 2], [0.025, 0.975]), abs=0.006)


def test_a_mean_beyond_the_scale_is_cut_or_refused():
    labels = np.repeat([1, np.nan], [20, 80])
    cut, beyond = (prediction_powered(np.repeat([1, 0, 1], [n, 20 - n, 80]), labels, power=1.0) for n in (18, 10))
    assert cut["note"] == "cut" and cut["estimate"] == cut["high"] == 1 and 0.9 < cut["low"] < 1
    assert np.isnan(beyond["estimate"]) and "unlike the others" in beyond["note"]


# ---- speeches ----


@BOTH
def test_rows_of_a_speech_count_as_one(correct):
    judged, labels = battles(300, 100)
    twice, ids = (np.tile(column, 2) for column in ((judged, labels), np.arange(300)))
    own, speeches, rows = correct(judged, labels), correct(*twice, clusters=ids), correct(*twice)
    assert (
        speeches["estimate"] == pytest.approx(own["estimate"], abs=0.001) == pytest.approx(rows["estimate"], abs=0.005)
    )
    assert width(speeches) == pytest.approx(width(own), abs=0.02)
    assert width(rows) == pytest.approx(width(own) / np.sqrt(2), rel=0.12)
    if correct is prediction_powered:
        assert ends(correct(*twice, clusters=ids, power=0)) == mean_interval(labels[:100])


def test_a_speech_may_have_labelled_and_unlabelled_rows():
    judged, labels = battles(400, 200)
    ids = np.arange(400) % 200  # each speech has one of each
    together, apart = (prediction_powered(judged, labels, clusters=own, power=1.0) for own in (ids, None))
    assert together["estimate"] == apart["estimate"] and ends(together) != ends(apart)
    same = np.tile(judged[:200], 2)  # the judge says the same of both: people are all that is left
    found = prediction_powered(same, labels, clusters=ids, power=1.0)
    assert ends(found) == pytest.approx(mean_interval(labels[:200]), abs=0.02)
    assert width(found) < 0.85 * width(prediction_powered(same, labels, power=1.0))


@few
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 0.5, 1, np.nan])), min_size=1, max_size=40))
def test_estimates_lie_in_their_intervals_and_order_does_not_matter(rows):
    judged, labels = np.array(rows, float).T
    shuffled = np.random.default_rng(1).permutation(len(rows))
    for correct in (prediction_powered, rogan_gladen):
        found, again = correct(judged, labels, samples=200), correct(judged[shuffled], labels[shuffled], samples=200)
        assert found.pop("note", "") == again.pop("note", "")
        assert list(found.values()) == pytest.approx(list(again.values()), nan_ok=True, abs=1e-9)
        assert np.isnan(found["estimate"]) or 0 <= found["low"] <= found["estimate"] <= found["high"] <= 1
    assert 0 <= tuned_power(judged, labels) <= 1


def test_labels_of_two_people_may_be_shares():
    judged, labels = battles(200, 80)
    second = np.where(np.arange(200) % 3 == 0, 1 - labels, labels)
    shares, ids = rogan_gladen(judged, (labels + second) / 2), np.tile(np.arange(200), 2)
    rows = rogan_gladen(np.tile(judged, 2), np.append(labels, second), clusters=ids)
    assert shares.pop("note") == rows.pop("note") == ""
    assert list(shares.values()) == pytest.approx(list(rows.values()), abs=0.02)
    assert shares["sensitivity"] == pytest.approx(rows["sensitivity"])


# ---- coverage ----


def test_the_naive_interval_fails_and_the_corrected_hold():
    rate, draws, covers = 0.7, 120, {"naive": 0, "powered": 0, "solved": 0}
    for seed in range(draws):
        judged, labels = battles(400, 60, seed, rate, 0.8, 0.85)  # too few wins
        own = {"naive": mean_interval(judged, samples=1)}
        own["powered"] = ends(prediction_powered(judged, labels, samples=1000))
        own["solved"] = ends(rogan_gladen(judged, labels, samples=1000))
        covers = {name: covers[name] + (low <= rate <= high) for name, (low, high) in own.items()}
    assert covers["naive"] < 0.2 * draws and min(covers["powered"], covers["solved"]) > 0.88 * draws


# ---- refusals ----


@BOTH
def test_what_is_no_share_is_refused(correct):
    judged, labels = battles(20, 10)
    refused = [(judged, labels[:5], "align them"), (judged * 2, labels, "code a win 1")]
    refused += [(judged, labels * 100, "code a win 1"), (np.append(judged[1:], np.nan), labels, "no verdict found")]
    for *columns, told in refused:
        with pytest.raises(ValueError, match=told):
            correct(*columns)
    with pytest.raises(ValueError, match="one id for each"):
        correct(judged, labels, clusters=["a"])
