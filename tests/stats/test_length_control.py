"""Length control: equality with scikit-learn, sides that mirror, known behaviour, and an interval that covers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from refusals import value_error

from psycopref.stats.intervals import win_interval
from psycopref.stats.length_control import PRIOR_SD, length_controlled

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
battles = st.lists(st.tuples(st.integers(0, 1), st.integers(-40, 40)), min_size=3, max_size=40).filter(
    lambda rows: len({extra for _, extra in rows}) > 1
)


def logistic(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def judged(rng, skill, extra, love):
    """Let a judge that loves length decide; extra in standard deviations."""
    return (rng.random(len(extra)) < logistic(skill + love * np.tanh(extra))).astype(float)


# ---- the fit ----


@few
@given(battles)
def test_the_fit_is_scikit_learns_with_the_same_prior(rows):
    wins, extra = (np.array(column, float) for column in zip(*rows))
    found = length_controlled(wins, extra, samples=2)
    if 0 < wins.mean() < 1:
        bend = np.tanh(extra / extra.std(ddof=1))
        theirs = LogisticRegression(C=PRIOR_SD**2, tol=1e-10, max_iter=1000).fit(bend[:, None], wins)
        assert found["controlled"] == pytest.approx(100 * logistic(theirs.intercept_[0]), abs=2e-3)
        assert found["length_effect"] == pytest.approx(theirs.coef_[0, 0], abs=1e-3)
    else:
        assert found["controlled"] == 100 * wins.mean() and found["length_effect"] == 0
    assert found["raw"] == 100 * wins.mean() and found["n"] == len(wins) and found["longer"] == 100 * np.mean(extra > 0)


@few
@given(battles)
def test_sides_mirror_and_order_and_unit_do_not_matter(rows):
    wins, extra = (np.array(column, float) for column in zip(*rows))
    speeches = np.array([f"s{i:02d}" for i in range(len(wins))])
    found = length_controlled(wins, extra, speeches, samples=50)
    assert 0 <= found["low"] <= found["controlled"] <= found["high"] <= 100 and found["low"] < found["high"]
    assert all(np.isfinite(value) for value in found.values())
    mirror = length_controlled(1 - wins, -extra, speeches, samples=50)
    assert [mirror["controlled"], mirror["length_effect"]] == pytest.approx(
        [100 - found["controlled"], found["length_effect"]], abs=1e-6
    )
    order = np.random.default_rng(0).permutation(len(wins))
    for again in (
        length_controlled(wins[order], extra[order], speeches[order], samples=50),
        length_controlled(wins, 7 * extra, speeches, samples=50),
    ):
        assert again == pytest.approx(found, abs=1e-4)
    free = length_controlled(wins, extra, samples=50)
    assert length_controlled(wins[order], extra[order], samples=50) == pytest.approx(free, abs=1e-4)


def test_the_mirrored_interval_is_the_interval_mirrored():
    rng = np.random.default_rng(5)
    extra = rng.normal(0.5, 1, 60)
    wins = judged(rng, 1.0, extra, 1.0)
    found, mirror = (length_controlled(w, e, samples=4000) for w, e in ((wins, extra), (1 - wins, -extra)))
    assert [mirror["low"], mirror["high"]] == pytest.approx([100 - found["high"], 100 - found["low"]], abs=1.5)


@few
@given(st.lists(st.integers(0, 1), min_size=3, max_size=60))
def test_equal_lengths_change_nothing(wins):
    found = length_controlled(wins, np.zeros(len(wins)), samples=400)
    assert found["controlled"] == pytest.approx(found["raw"], abs=1e-6) and found["length_effect"] == 0
    assert win_interval(wins)[0] < found["high"] and found["low"] < win_interval(wins)[1]


def test_equal_lengths_give_about_the_interval_of_a_win_rate():
    for won, lost in ((30, 10), (60, 4), (20, 20)):
        wins = np.repeat([1, 0], [won, lost])
        found = length_controlled(wins, np.zeros(won + lost), samples=4000)
        assert [found["low"], found["high"]] == pytest.approx(win_interval(wins), abs=2.5)


def test_length_that_does_not_matter_changes_little():
    rng = np.random.default_rng(3)
    extra = rng.normal(0, 1, 2000)
    found = length_controlled(judged(rng, 1.0, extra, 0.0), extra, samples=200)
    assert abs(found["controlled"] - found["raw"]) < 0.5 and found["effect_low"] < 0 < found["effect_high"]


def test_separation_is_finite_and_uncertain():
    swept = length_controlled(np.ones(12), np.arange(12) - 5.0)
    assert swept["controlled"] == 100 == swept["high"] and 40 < swept["low"] < 95
    split = length_controlled([1] * 6 + [0] * 6, [*range(1, 7), *range(-6, 0)])
    assert (
        0 < split["length_effect"] < 3 * PRIOR_SD
        and split["low"] < 50 < split["high"]
        and split["high"] - split["low"] > 25
    )
    never_short = length_controlled(np.ones(12), np.arange(50.0, 62))  # nothing is known at equal length
    assert never_short["longer"] == 100 and never_short["low"] < swept["low"]


def test_verdicts_of_one_speech_are_drawn_together():
    rng = np.random.default_rng(8)
    extra = rng.normal(0.5, 1, 50)
    wins = judged(rng, 0.5, extra, 1.0)
    once = length_controlled(wins, extra, np.arange(50), samples=800)
    tiled, flat = (
        length_controlled(np.tile(wins, 2), np.tile(extra, 2), ids, samples=800)
        for ids in (np.tile(np.arange(50), 2), None)
    )
    width = lambda found: found["high"] - found["low"]
    assert abs(width(tiled) - width(once)) < 2 and width(flat) < 0.85 * width(once)


@pytest.mark.parametrize(("n", "rate", "orders"), [(20, 0.5, 1), (79, 0.9, 1), (79, 0.5, 1), (40, 0.8, 2)])
def test_the_interval_covers_the_rate_at_equal_length(n, rate, orders):
    rng, held, raw, truth = np.random.default_rng([n, orders]), [], [], np.log(rate / (1 - rate))
    for trial in range(300):
        extra = rng.normal(0.5, 1, n)
        wins = judged(rng, truth, extra, 1.0)
        if orders == 2:  # the other order says the same in most cases
            wins, extra = (
                np.append(wins, np.where(rng.random(n) < 0.7, wins, judged(rng, truth, extra, 1.0))),
                np.tile(extra, 2),
            )
        found = length_controlled(wins, extra, np.tile(np.arange(n), orders), samples=250, seed=trial)
        held.append(found["low"] <= 100 * rate <= found["high"])
        raw.append(found["raw"])
    assert 0.91 < np.mean(held) < 0.99 and np.mean(raw) > 100 * rate


# ---- a file of AlpacaEval's form ----


def test_a_verbose_policy_falls_and_a_brief_one_rises():
    skills = {"brief": (0.6, -30), "like the baseline": (0.1, 0), "verbose": (-0.3, 45), "weak": (-0.9, 0)}
    rng, found = np.random.default_rng(0), {}
    for name, (skill, surplus) in skills.items():
        extra = rng.normal(surplus, 35, 600)
        found[name] = length_controlled(judged(rng, skill, extra / 30, 1.5), extra, samples=100)
        assert found[name]["low"] < 100 * logistic(skill) < found[name]["high"] and found[name]["length_effect"] > 0.5
    assert found["verbose"]["controlled"] < found["verbose"]["raw"] - 8
    assert found["brief"]["controlled"] > found["brief"]["raw"] + 5
    assert max(found, key=lambda name: found[name]["raw"]) == "verbose"
    assert sorted(found, key=lambda name: -found[name]["controlled"]) == list(skills)  # the order of skill comes back


def test_a_soft_preference_counts_in_part():
    assert length_controlled([0, 1, 0.5, 0.5, 0.25], [3, -1, 2, 0, 1], samples=20)["raw"] == pytest.approx(45)


REFUSED = {
    "all longer by the same": (lambda: length_controlled([1, 0, 1], [5, 5, 5]), "cannot be told apart"),
    "other lengths": (lambda: length_controlled([1, 0], [1, 2, 3]), "align"),
    "no battles": (lambda: length_controlled([], []), "align"),
    "a gap": (lambda: length_controlled([1, 0], [1, np.nan]), "a gap"),
    "a win of 2": (lambda: length_controlled([2, 0], [1, 2]), "outside"),
    "ids of other length": (lambda: length_controlled([1, 0], [1, 2], ["a"]), "1 clusters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_say_what_was_expected(name):
    value_error(*REFUSED[name], "length_control")
