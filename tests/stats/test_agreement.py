"""Raters: equality with the package krippendorff and scikit-learn, raters that may be permuted, and intervals
that cover."""

import krippendorff
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from refusals import value_error

from psycopref.stats.intervals import win_interval
from psycopref.stats.agreement import (
    FEWEST_UNCOMMON,
    LEVELS,
    alpha_interval,
    intraclass,
    krippendorff_alpha,
    pairwise_agreement,
    ratings_matrix,
)

TIGHT = 1e-9
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def gappy(draw):
    """Ratings from 1 to 5 of two to five raters, some missing, that α is defined on."""
    raters, items = draw(st.integers(2, 5)), draw(st.integers(2, 15))
    cell = st.sampled_from([1.0, 2.0, 3.0, 5.0, np.nan])
    ratings = np.array(draw(st.lists(cell, min_size=raters * items, max_size=raters * items))).reshape(raters, items)
    paired = (~np.isnan(ratings)).sum(axis=0) >= 2
    assume(len(set(ratings[:, paired][~np.isnan(ratings[:, paired])])) > 1)
    return ratings


def long_form(ratings, names=None, speeches=None):
    """Rows of item, rater and label."""
    raters, items = np.shape(ratings)
    rows = [(i, (names or "abcdefgh")[r], ratings[r][i]) for r in range(raters) for i in range(items)]
    frame = pd.DataFrame(rows, columns=["item", "rater", "label"])
    return frame if speeches is None else frame.assign(speech_id=[speeches[i] for i in frame.item])


def two_raters(n, rng, share=0.5, right=0.93):
    """Two raters of a hidden label, each right with the same probability."""
    hidden = rng.random(n) < share
    return np.where(rng.random((2, n)) < right, hidden, ~hidden).astype(int)


# ---- Krippendorff's α ----


@few
@given(gappy(), st.sampled_from(LEVELS))
def test_alpha_equals_the_package(ratings, level):
    # only labels that meet another count; the package's value domain would also hold those of lonely items, which
    # changes nothing
    assert krippendorff_alpha(ratings, level) == pytest.approx(
        krippendorff.alpha(ratings, level_of_measurement=level), abs=TIGHT
    )


@few
@given(gappy(), st.sampled_from(LEVELS), st.randoms(use_true_random=False))
def test_permuting_raters_or_items_changes_nothing(ratings, level, random):
    rows, columns = list(range(len(ratings))), list(range(ratings.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    mixed = ratings[rows][:, columns]
    assert krippendorff_alpha(mixed, level) == pytest.approx(krippendorff_alpha(ratings, level), abs=TIGHT)
    one, other = (alpha_interval(table, level, samples=50, fewest=0) for table in (mixed, ratings))
    assert one == pytest.approx(other, abs=1e-6)


@few
@given(gappy())
def test_alpha_is_blind_to_what_its_level_is_blind_to(ratings):
    renamed = np.select([ratings == v for v in (1, 2, 3, 5)], [3.0, 1.0, 5.0, 2.0], np.nan)
    assert krippendorff_alpha(renamed) == pytest.approx(krippendorff_alpha(ratings), abs=TIGHT)
    assert krippendorff_alpha(ratings**3, "ordinal") == pytest.approx(krippendorff_alpha(ratings, "ordinal"), abs=TIGHT)
    assert krippendorff_alpha(10 - 2 * ratings, "interval") == pytest.approx(
        krippendorff_alpha(ratings, "interval"), abs=TIGHT
    )


@few
@given(gappy(), st.sampled_from(LEVELS))
def test_lonely_labels_and_silent_raters_count_for_nothing(ratings, level):
    lonely = np.full((len(ratings) + 1, 2), np.nan)
    lonely[0, 0] = 4.0
    wider = np.hstack([np.vstack([ratings, np.full((1, ratings.shape[1]), np.nan)]), lonely])
    assert krippendorff_alpha(wider, level) == pytest.approx(krippendorff_alpha(ratings, level), abs=TIGHT)


def test_two_complete_raters_are_nearly_kappa():
    a, b = two_raters(5000, np.random.default_rng(0))
    assert krippendorff_alpha([a, b]) == pytest.approx(cohen_kappa_score(a, b), abs=0.002)


def test_text_labels_are_nominal():
    ratings = [["win", "loss", "win", None], ["win", "tie", "win", "loss"], ["loss", "loss", None, "loss"]]
    codes = {"win": 0.0, "loss": 1.0, "tie": 2.0, None: np.nan}
    assert krippendorff_alpha(ratings) == pytest.approx(
        krippendorff.alpha([[codes[v] for v in row] for row in ratings], level_of_measurement="nominal"), abs=TIGHT
    )
    assert krippendorff_alpha(ratings_matrix(long_form(ratings).dropna())) == pytest.approx(
        krippendorff_alpha(ratings), abs=TIGHT
    )


@few
@given(gappy(), st.sampled_from(LEVELS))
def test_the_interval_holds_alpha_and_has_a_width(ratings, level):
    low, high = alpha_interval(ratings, level, samples=60, fewest=0)
    assert low <= krippendorff_alpha(ratings, level) <= high <= 1 + TIGHT and high - low > 1e-3


# ---- pairs ----


@settings(few, max_examples=20)
@given(st.lists(st.tuples(*[st.sampled_from("xyz")] * 3), min_size=2, max_size=60))
def test_pairs_equal_sklearn_and_may_be_permuted(items):
    ratings = list(zip(*items))
    table = pairwise_agreement(long_form(ratings), samples=50)
    assert (
        table[["first", "second"]].values.tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
        and (table.n == len(items)).all()
    )
    for row in table.itertuples():
        a, b = (ratings["abc".index(name)] for name in (row.first, row.second))
        assert row.agreement == pytest.approx(100 * np.mean([x == y for x, y in zip(a, b)]), abs=TIGHT)
        assert row.low <= row.agreement <= row.high
        if len({*a, *b}) == 1:
            assert np.isnan([row.kappa, row.kappa_low, row.kappa_high]).all()
        else:
            assert row.kappa == pytest.approx(cohen_kappa_score(a, b), abs=TIGHT)
            uncommon = len(a) - max((a + b).count(label) for label in "xyz") / 2
            assert (row.kappa_low <= row.kappa <= row.kappa_high) == (uncommon >= FEWEST_UNCOMMON)
    swapped = pairwise_agreement(
        long_form(ratings[::-1], "cba"), samples=50
    )  # the same raters, named in the other order
    swapped = swapped.assign(first=swapped.second, second=swapped["first"]).iloc[::-1].reset_index(drop=True)
    numbers = ["n", "agreement", "low", "high", "kappa"]
    pd.testing.assert_frame_equal(
        swapped[["first", "second", *numbers]], table[["first", "second", *numbers]], rtol=1e-9
    )
    shuffled = long_form(ratings).sample(frac=1, random_state=2)
    shuffled = shuffled.sort_values("rater", kind="stable")  # items in disorder, raters in the order of the table
    pd.testing.assert_frame_equal(pairwise_agreement(shuffled, samples=50), table, rtol=1e-9)


def test_only_shared_items_are_compared_and_none_is_told():
    long = pd.DataFrame(
        [(0, "a", 1), (1, "a", 2), (1, "b", 2), (2, "b", 1), (3, "c", 1)], columns=["item", "rater", "label"]
    )
    table = pairwise_agreement(long).set_index(["first", "second"])
    assert table.n.tolist() == [1, 0, 0] and table.loc[("a", "b"), "agreement"] == 100
    assert table.loc[("a", "c")].drop("n").isna().all()
    missing = pd.concat([long, pd.DataFrame([(0, "b", np.nan)], columns=long.columns)])
    pd.testing.assert_frame_equal(pairwise_agreement(missing).set_index(["first", "second"]), table)


def test_agreement_has_the_interval_of_a_share_by_speech():
    a, b = two_raters(60, np.random.default_rng(4))
    speeches = np.repeat(np.arange(20), 3)
    row = pairwise_agreement(long_form([a, b], speeches=speeches), cluster="speech_id").iloc[0]
    assert (row.low, row.high) == pytest.approx(win_interval(a == b, speeches), abs=TIGHT)
    copies = pairwise_agreement(
        long_form(np.tile([a, b], 4), speeches=np.tile(np.arange(60), 4)), cluster="speech_id"
    ).iloc[0]
    once = pairwise_agreement(long_form([a, b])).iloc[0]
    assert copies[["low", "high", "kappa_low", "kappa_high"]].tolist() == pytest.approx(
        once[["low", "high", "kappa_low", "kappa_high"]].tolist(), abs=1e-6
    )


@pytest.mark.parametrize(("n", "share", "lowest"), [(40, 0.5, 0.91), (79, 0.5, 0.91), (200, 0.9, 0.91)])
def test_intervals_of_alpha_and_kappa_cover(n, share, lowest):
    rng, alpha_held, kappa_held = np.random.default_rng(n), [], []
    # α of endlessly many items: disagreement of two independent slips over that of two dealt labels
    ones = share * 0.93 + (1 - share) * 0.07
    truth = 1 - (2 * 0.93 * 0.07) / (2 * ones * (1 - ones))
    for trial in range(300):
        ratings = two_raters(n, rng, share)
        low, high = alpha_interval(ratings, samples=300, seed=trial)
        if low == low:
            alpha_held.append(low <= truth <= high)
        if trial < 100:
            row = pairwise_agreement(long_form(ratings), samples=300, seed=trial).iloc[0]
            if row.kappa_low == row.kappa_low:
                kappa_held.append(row.kappa_low <= truth <= row.kappa_high)
    assert lowest < np.mean(alpha_held) < 0.995 and np.mean(kappa_held) > lowest - 0.05


def test_few_labels_of_the_rarer_kind_give_no_interval():
    rare = [[1] * 70 + [2] * 11, [1] * 71 + [2] * 10]
    assert np.isnan(alpha_interval(rare)).all() and not np.isnan(alpha_interval(np.tile(rare, 2))).any()
    assert np.isnan(alpha_interval(np.tile(rare, 2), clusters=np.tile(np.arange(81), 2))).all()  # copies add nothing


def test_perfect_agreement_on_few_items_is_no_certainty():
    perfect = [[1, 2] * 15] * 2
    assert krippendorff_alpha(perfect) == 1 and alpha_interval(perfect)[0] < 0.95
    row = pairwise_agreement(long_form(perfect)).iloc[0]
    assert row.kappa == 1 == row.kappa_high and row.kappa_low < 0.95 and row.low < 95


# ---- refusals ----

table = long_form([["x", "y"], ["x", "y"]])
REFUSED = {
    "one label": (lambda: krippendorff_alpha([["x", "x"], ["x", None]]), "all labels are 'x'"),
    "one label among the paired": (lambda: krippendorff_alpha([[1, 1, 2], [1, 1, None]]), "all labels are 1"),
    "nobody meets": (lambda: krippendorff_alpha([[1, None], [None, 2]]), "labels of two raters"),
    "one rater": (lambda: krippendorff_alpha([[1, 2]]), "labels of two raters"),
    "one dimension": (lambda: krippendorff_alpha([1, 2]), "shape"),
    "text and numbers": (lambda: krippendorff_alpha([["1", "2"], [1, 2]]), "text and numbers"),
    "text as scores": (lambda: krippendorff_alpha([["1", "2"], ["1", "2"]], "ordinal"), "text '1'"),
    "unknown level": (lambda: krippendorff_alpha([[1, 2], [1, 2]], "ratio"), "'ratio'"),
    "interval of one label": (lambda: alpha_interval([[1, 1], [1, 1]]), "all labels"),
    "too many values": (lambda: alpha_interval(np.arange(404).reshape(2, 202), "interval"), "404 different"),
    "ids of other length": (lambda: alpha_interval([[1, 2], [1, 2]], clusters=[1, 2, 3]), "2 rows and 3 ids"),
    "rated twice": (lambda: pairwise_agreement(pd.concat([table, table[:1]])), "'a' has labelled item 0 twice"),
    "one rater in the frame": (lambda: pairwise_agreement(table[:2]), "expected two"),
    "no column": (lambda: ratings_matrix(table.drop(columns="label")), "label"),
    "no rows": (lambda: ratings_matrix(table[:0]), "0 rows"),
    "no such cluster": (lambda: pairwise_agreement(table, cluster="speech_id"), "'speech_id'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_say_what_was_expected(name):
    value_error(*REFUSED[name], ("agreement", "intervals"))


# ---- intraclass correlations ----

JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]).T


def test_intraclass_correlations_are_those_of_shrout_and_fleiss():
    "Their Table 2 gives 0.29 for ICC(2,1) and 0.71 for ICC(3,1); the intervals are those of R's psych on it."
    found = {name: round(value, 2) for name, value in intraclass(JUDGES).items()}
    ends = {"icc_c_low": 0.34, "icc_c_high": 0.95, "icc_a_low": 0.02, "icc_a_high": 0.76}
    assert found == ends | {"n": 6, "icc_c": 0.71, "icc_a": 0.29, "bias": 3.17}


@few
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(5, 30), st.floats(-3, 3))
def test_a_shift_of_one_rater_is_bias_and_costs_absolute_agreement_alone(seed, k, n, shift):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=n) + rng.normal(size=(k, n))
    table -= table.mean(axis=1, keepdims=True)
    moved = table + np.eye(k)[0][:, None] * shift
    own, other = intraclass(table), intraclass(moved)
    assert other["icc_c"] == pytest.approx(own["icc_c"], abs=TIGHT) and other["bias"] == pytest.approx(shift, abs=1e-8)
    assert abs(other["icc_a"]) <= abs(own["icc_a"]) + TIGHT
    for name in ("icc_c", "icc_a"):
        assert other[f"{name}_low"] <= other[name] <= other[f"{name}_high"] <= 1 + TIGHT
    permuted = intraclass(moved[:, rng.permutation(n)])
    assert all(permuted[name] == pytest.approx(other[name], abs=1e-8) for name in other)


def test_intraclass_correlations_equal_pingouin():
    pingouin = pytest.importorskip("pingouin")
    rng = np.random.default_rng(0)
    for k, n in ((2, 8), (3, 20), (5, 40)):
        table = (3 + rng.normal(size=n) + rng.normal(size=(k, n)) + rng.normal(size=(k, 1))).round(2)
        frame = long_form(table)
        found = pingouin.intraclass_corr(frame, targets="item", raters="rater", ratings="label").reset_index()
        own = intraclass(table)
        assert (own["icc_a"], own["icc_c"]) == pytest.approx(tuple(found.ICC[1:3]), abs=1e-8)
        ends = [pair for pair in next(own for name, own in found.items() if name.startswith("CI95"))][1:3]
        for name, pair in zip(("icc_a", "icc_c"), ends):  # rounded to two digits there
            assert (own[f"{name}_low"], own[f"{name}_high"]) == pytest.approx(tuple(pair), abs=0.006)


def test_few_speeches_and_raters_who_contradict_in_full_have_no_interval_and_no_warning(recwarn):
    rng = np.random.default_rng(2)
    table = rng.normal(size=36) + rng.normal(size=(2, 36))
    for speeches, known in ((11, False), (12, True), (36, True)):
        found = intraclass(table, np.arange(36) % speeches)
        assert np.isfinite([found[f"icc_{kind}_{end}"] for kind in "ca" for end in ("low", "high")]).all() == known
        assert np.isfinite([found["icc_c"], found["icc_a"]]).all()
    opposite = intraclass([[1, 2, 3, 4], [4, 3, 2, 1]])
    assert opposite["icc_c"] == -1 and np.isnan([opposite["icc_c_low"], opposite["icc_a_high"]]).all() and not recwarn


def test_copies_of_a_speech_are_no_more_data_and_gaps_are_left_out():
    rng = np.random.default_rng(1)
    table = rng.normal(size=40) + rng.normal(size=(2, 40))
    speeches = np.tile(np.arange(40), 4)
    one, four = intraclass(table), intraclass(np.tile(table, 4), speeches)
    width = {name: own["icc_a_high"] - own["icc_a_low"] for name, own in (("one", one), ("four", four))}
    assert width["four"] == pytest.approx(width["one"], rel=0.25)
    gaps = table.copy()
    gaps[0, :10] = np.nan
    assert intraclass(gaps) == intraclass(table[:, 10:]) and intraclass(gaps)["n"] == 30
    value_error(lambda: intraclass(table[:1]), "40 items that all of 1 raters", "agreement.intraclass")
    shifted = intraclass([[1, 2, 3, 4], [2, 3, 4, 5]])
    assert shifted["icc_c_low"] == shifted["icc_c"] == 1 > shifted["icc_a_high"] > shifted["icc_a"] > 0
    flat = intraclass([[3, 3, 3], [4, 4, 4]])
    assert np.isnan([flat[name] for name in ("icc_c", "icc_c_low", "icc_a_high")]).all() and flat["bias"] == -1
