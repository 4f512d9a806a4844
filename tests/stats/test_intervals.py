"""Comparing: equality with scipy's Beta, binomial and Holm's paper, sides that mirror, order that does not matter,
and intervals that cover."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, multinomial

from psycopref.stats.intervals import compare_policies, holm, mean_interval, sign_test, weighted_totals, win_interval
from psycopref.stats.scores import win_rate

TIGHT = 1e-9  # points; the same sums in another order
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
words = st.lists(st.sampled_from(["win", "loss", "tie"]), min_size=1, max_size=30)
pairs = st.lists(
    st.tuples(st.sampled_from(["win", "loss", "tie"]), st.sampled_from(["win", "loss", "tie"])), min_size=1, max_size=30
)
rows = st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abcdefgh")), min_size=1, max_size=40)


def frames(both, topics="xy"):
    """Two frames of one policy each, on the same speeches."""
    ids = [f"s{i:02d}" for i in range(len(both))]
    groups = [topics[i % len(topics)] for i in range(len(both))]
    return [pd.DataFrame({"speech_id": ids, "coarse_topic": groups, "verdict": column}) for column in zip(*both)]


# ---- the interval of a win rate ----


@few
@given(words)
def test_one_verdict_a_speech_gives_jeffreys_interval(verdicts):
    wins = (np.array(verdicts) == "win").astype(int)
    won, n = wins.sum(), len(wins)
    low, high = beta.ppf([0.025, 0.975], won + 0.5, n - won + 0.5)
    expected = 100 * min(low, won / n), 100 * max(high, won / n)
    assert win_interval(wins) == pytest.approx(expected, abs=TIGHT)
    assert win_interval(wins, [f"speech {i}" for i in range(n)]) == pytest.approx(expected, abs=TIGHT)


@few
@given(rows)
def test_sides_mirror_and_neither_order_nor_names_matter(data):
    wins, speeches = (np.array(column) for column in zip(*data))
    low, high = win_interval(wins, speeches, samples=200)
    assert 0 <= low <= 100 * wins.mean() <= high <= 100 and high - low > 1
    shuffled = np.random.default_rng(1).permutation(len(wins))
    renamed = np.array(["hgfedcba"["abcdefgh".index(name)] for name in speeches])
    assert win_interval(wins[shuffled], renamed[shuffled], samples=200) == pytest.approx((low, high), abs=TIGHT)
    if wins.mean() != 0.5:
        assert win_interval(1 - wins, speeches, samples=200) == pytest.approx((100 - high, 100 - low), abs=TIGHT)


def test_a_clean_sweep_is_no_certainty():
    low, high = win_interval(np.ones(6))
    assert high == 100.0 and 60 < low < 70
    assert win_interval([1])[0] < 20 and win_interval([1])[1] == 100.0
    swept = [win_interval(np.ones(n))[0] for n in (1, 2, 6, 20, 79, 1000)]
    assert swept == sorted(swept) and swept[-1] > 99.5


def test_copies_of_verdicts_add_no_knowledge():
    wins, speeches = np.repeat([1, 0], [12, 8]), np.arange(20)
    once = win_interval(wins, speeches)
    for copies in (2, 5):
        assert win_interval(np.tile(wins, copies), np.tile(speeches, copies)) == pytest.approx(once, abs=TIGHT)
    uneven = win_interval(np.append(wins, [1] * 20), np.append(speeches, [0] * 20))  # one speech counts for 21 rows
    assert uneven[1] - uneven[0] > once[1] - once[0]


def test_weights_follow_the_beta_distribution_of_rubin():
    won, battles = weighted_totals([[1, 1]] * 7 + [[0, 1]] * 3, np.empty((0, 2)), 40_000, seed=3).T
    np.testing.assert_allclose(
        np.quantile(won / battles, [0.05, 0.5, 0.95]), beta.ppf([0.05, 0.5, 0.95], 7, 3), atol=0.01
    )
    assert battles.mean() == pytest.approx(10, rel=0.02)


# ---- what the intervals cover ----


def coverage(interval, chances, truth, n):
    """Add up the probabilities of all outcomes of n speeches, of three kinds, whose interval holds the truth, in
    percent."""
    outcomes = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
    probability = multinomial.pmf(outcomes, n, chances)
    common = probability > 1e-5
    held = [low - TIGHT <= truth <= high + TIGHT for low, high in map(interval, outcomes[common])]
    return 100 * np.dot(probability[common], held) / probability[common].sum()


def percentile(values):
    """The percentile bootstrap of counts of three kinds of speeches."""

    def interval(kinds):
        draws = np.random.default_rng(0).multinomial(kinds.sum(), kinds / kinds.sum(), size=500)
        return np.quantile(draws @ values / kinds.sum(), [0.025, 0.975])

    return interval


@pytest.mark.parametrize("n", [6, 8, 20, 79])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_the_interval_of_a_win_rate_covers(n, rate):
    covered = coverage(lambda kinds: win_interval(np.repeat([1, 0], kinds[[0, 2]])), [rate, 0, 1 - rate], 100 * rate, n)
    assert 92.5 < covered < 99.5
    if rate == 0.97:
        assert coverage(percentile(np.array([100, 50, 0])), [rate, 0, 1 - rate], 97, n) < covered - 4


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize(("rate", "correlation"), [(0.5, 0.6), (0.9, 0.6), (0.97, 0.6), (0.5, -0.8)])
def test_the_interval_over_both_orders_covers(n, rate, correlation):
    split = 2 * rate * (1 - rate) * (1 - correlation)
    chances = [rate - split / 2, split, 1 - rate - split / 2]

    def interval(kinds):
        verdicts = np.repeat([[1, 1], [1, 0], [0, 0]], kinds, axis=0)
        return win_interval(verdicts.ravel(), np.repeat(np.arange(n), 2), samples=400)

    assert coverage(interval, chances, 100 * rate, n) > 91


def test_rows_taken_as_independent_would_not_cover():
    flat = coverage(
        lambda kinds: win_interval(np.repeat([1, 0], [2 * kinds[0] + kinds[1], 2 * kinds[2] + kinds[1]])),
        [0.4, 0.2, 0.4],
        50,
        20,
    )
    assert flat < 91


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize(("better", "worse"), [(0.25, 0.25), (0.09, 0.02), (0.5, 0.1)])
def test_the_interval_of_a_paired_difference_covers(n, better, worse):
    def interval(kinds):
        verdicts = np.repeat([["win", "loss"], ["win", "win"], ["tie", "win"]], kinds, axis=0)
        return compare_policies(*frames(verdicts.tolist(), "x"), samples=400)[["low", "high"]].to_numpy()[-1]

    quick = lambda kinds: 100 * np.array(mean_interval(np.repeat([1, 0, -1], kinds), None, (-1, 1)))
    some = np.array([n // 2, n - n // 2 - 1, 1])
    np.testing.assert_allclose(interval(some), quick(some), atol=TIGHT)
    assert coverage(quick, [better, 1 - better - worse, worse], 100 * (better - worse), n) > 92.5


# ---- the sign test and Holm ----


@few
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_sign_test_is_an_exact_binomial_and_mirrors(both):
    first, second = [a for a, _ in both], [b for _, b in both]
    found = sign_test(first, second)
    better, worse = sum(a > b for a, b in both), sum(b > a for a, b in both)
    assert (found["better"], found["worse"], found["tied"]) == (better, worse, len(both) - better - worse)
    assert found["p"] == pytest.approx(binomtest(better, better + worse).pvalue if better + worse else 1.0, abs=1e-12)
    assert sign_test(second, first) == {**found, "better": worse, "worse": better}


def test_sign_test_keeps_its_level_when_nothing_differs():
    rng = np.random.default_rng(0)
    rejected = np.mean([sign_test(*rng.integers(0, 2, (2, 40)))["p"] < 0.05 for _ in range(500)])
    assert 0.005 < rejected < 0.06  # exact, so never above 5%, and not idle


def test_holm_is_the_step_down_rule_in_any_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


# ---- two policies ----


@few
@given(pairs)
def test_comparison_adds_up_and_mirrors(both):
    first, second = frames(both)
    table = compare_policies(first, second, samples=100)
    assert table.columns.tolist() == ["group", "n", "difference", "low", "high", "better", "worse", "p", "p_holm"]
    groups, overall = table.iloc[:-1], table.iloc[-1]
    assert overall.group == "Overall" and overall.n == groups.n.sum() == len(both) and overall.p_holm == overall.p
    assert overall.better == groups.better.sum() and overall.worse == groups.worse.sum()
    assert overall.difference == pytest.approx(win_rate(first.verdict) - win_rate(second.verdict), abs=TIGHT)
    assert ((table.low <= table.difference) & (table.difference <= table.high) & (table.low < table.high)).all()
    assert groups.p_holm.tolist() == holm(groups.p)
    other = compare_policies(second, first, samples=100)
    apart = (table.difference != 0).to_numpy()
    np.testing.assert_allclose(
        other.loc[apart, ["difference", "low", "high"]], -table.loc[apart, ["difference", "high", "low"]], atol=TIGHT
    )
    assert other.p.tolist() == table.p.tolist() and other.better.tolist() == table.worse.tolist()


@few
@given(pairs)
def test_shuffling_either_frame_changes_nothing(both):
    first, second = frames(both)
    shuffled = [frame.sample(frac=1, random_state=seed) for seed, frame in enumerate((first, second))]
    pd.testing.assert_frame_equal(compare_policies(*shuffled, samples=50), compare_policies(first, second, samples=50))


def test_speeches_of_one_policy_only_are_left_out_and_counted():
    first, second = frames([("win", "loss")] * 10)
    table = compare_policies(first.iloc[2:], second.iloc[:-1])
    assert table.attrs == {"only_first": 1, "only_second": 2} and table.n.iloc[-1] == 7
    extra = first.assign(setting="free")  # columns that are not asked for do no harm
    pd.testing.assert_frame_equal(compare_policies(extra, second), compare_policies(first, second))


def test_a_categorical_topic_keeps_its_order():
    first, second = frames([("win", "loss")] * 9, "cab")
    order = pd.CategoricalDtype(["b", "a", "c", "unused"])
    table = compare_policies(first.astype({"coarse_topic": order}), second.astype({"coarse_topic": order}))
    assert table.group.tolist() == ["b", "a", "c", "Overall"]


# ---- refusals ----

one, two = frames([("win", "loss")] * 4)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: win_interval([1, 0], ["a"]), "2 rows and 1 ids"),
        (lambda: mean_interval([1, 2]), "outside \\(0, 1\\)"),
        (lambda: compare_policies(one, pd.concat([two, two])), "one-to-one"),
        (lambda: compare_policies(one, two.assign(coarse_topic="z")), "same coarse_topic"),
    ],
)
def test_what_would_give_a_wrong_interval_is_refused(call, pattern):
    with pytest.raises(ValueError, match=pattern):
        call()
