"""Pairs are exact, crowds stay bounded, sketches miss next to nothing, the kept texts do not depend on the order of
rows."""

import itertools
import json
import math
import random

import numpy as np
import pandas as pd
import pytest
from bench_duplicates import EDITS, edited, growth, library_comparison, synthetic_speeches
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.corpus import duplicates
from psycopref.corpus.duplicates import (
    MISSED,
    canonical_key,
    cluster_report,
    clusters,
    exact_join,
    jaccard,
    keep_one,
    leaked,
    near_pairs,
    same_text,
    shingle_matrix,
    shingles,
)

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ODD = ["", " ", "!!!", "...", "hm", "Hm!", "a b", "😀", "😀" * 6, "😭 😭", "\ud800", "\x00\x00", "ß SS", "İ"]
ODD += ["لا أستطيع النوم منذ أسابيع", "לא ישנתי כל הלילה"]
some_text = st.one_of(st.text(max_size=60), st.sampled_from(ODD), st.text(alphabet="ab c.", max_size=30))


@st.composite
def corpora(draw):
    """A few originals of any kind, each with edited copies, in any order."""
    originals = draw(st.lists(some_text, max_size=8))
    dice = random.Random(draw(st.integers(0, 2**16)))
    copies = [
        edited(draw(st.sampled_from(originals)), draw(st.sampled_from(EDITS)), dice.randrange)
        for _ in range(draw(st.integers(0, 10)))
        if originals and min(map(len, originals)) > 1
    ]
    return draw(st.permutations(originals + copies))


def brute_force(left, right, threshold):
    sets = [list(map(shingles, side)) for side in (left, right)]
    index = {(i, j): len(a & b) / len(a | b) for (i, a), (j, b) in itertools.product(*map(enumerate, sets))}
    return {pair: value for pair, value in index.items() if value >= threshold}


def as_dict(pairs):
    assert not pairs.duplicated(["i", "j"]).any()
    return dict(zip(zip(pairs.i.tolist(), pairs.j.tolist()), pairs.jaccard.tolist()))


def upper(pairs):
    return {(i, j): value for (i, j), value in pairs.items() if i < j}


def partition(labels, names):
    groups = {}
    for label, name in zip(np.asarray(labels).tolist(), names):
        groups.setdefault(label, []).append(name)
    return {frozenset(group) for group in groups.values()}


@pytest.fixture(scope="module")
def made():
    return synthetic_speeches(400, 0.5, seed=11)


# ---- keys and shingles ----


@few
@given(some_text)
def test_same_text_settles_and_ignores_case_space_and_punctuation(text):
    key = same_text(text)
    assert same_text(key) == key
    assert same_text(f"  {text} \n") == key
    if key and any(character.isalnum() for character in text):
        assert same_text(text + "!?") == key


def test_texts_without_words_stay_apart():
    keys = [same_text(text) for text in ("😀", "😭", "😀😭", "!!!", "...", "")]
    assert len(set(keys)) == len(keys)
    assert near_pairs(["😀" * 120, "😭" * 120, "?" * 120]).empty


@few
@given(st.lists(some_text, max_size=12))
def test_codes_number_the_shingles(texts):
    matrix, sets = shingle_matrix(texts), list(map(shingles, texts))
    common = (matrix @ matrix.T).toarray()
    assert all(common[i, j] == len(a & b) for i, a in enumerate(sets) for j, b in enumerate(sets))


@pytest.mark.parametrize("chunk", [8192, 3])
def test_jaccard_is_that_of_the_sets_whatever_the_chunks(made, chunk, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    texts = made[0][:20] + ODD
    i, j = map(list, zip(*itertools.product(range(len(texts)), repeat=2)))
    expected = brute_force(texts, texts, 0)
    assert jaccard(texts, i, j).tolist() == [expected[pair] for pair in zip(i, j)]
    assert jaccard(texts, [], []).tolist() == []


# ---- near pairs ----


@few
@given(corpora(), st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_near_pairs_are_those_of_brute_force(texts, threshold):
    """With the fixed seed the sketches miss none of these; a false pair or a wrong index would never be right."""
    truth = upper(brute_force(texts, texts, threshold))
    assert as_dict(near_pairs(texts, threshold)) == truth == as_dict(near_pairs(texts, threshold, exact_rows=0))


def test_planted_pairs_are_found_with_any_seed(made):
    texts = made[0][:250]
    truth = upper(brute_force(texts, texts, 0.7))
    assert len(truth) > 60
    for seed in (0, 1, 2**63):
        assert as_dict(near_pairs(texts, seed=seed, exact_rows=0)) == truth


def test_few_pairs_at_the_very_threshold_are_missed():
    """3,000 pairs of 119 shared shingles of 170: the formula says at most 0.25 of them are missed."""
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    base = ["".join(row) for row in letters[draw.integers(0, 36, (3000, 123))]]
    left = [key + "".join(row) for key, row in zip(base, letters[draw.integers(0, 18, (3000, 26))])]
    right = [key + "".join(row) for key, row in zip(base, letters[draw.integers(18, 36, (3000, 25))])]
    exactly = jaccard(left + right, range(3000), range(3000, 6000)) == 0.7
    assert exactly.sum() > 2990  # but where a text repeats itself
    assert len(near_pairs(left + right, 0.7)) >= 2990
    found = near_pairs(left + right, 0.7, exact_rows=0)
    assert set(zip(found.i, found.j)) <= {(row, row + 3000) for row in range(3000)}
    assert len(found) >= 2990 - 3


@pytest.mark.parametrize("exact_rows", [0, 10**6])
def test_same_seed_same_pairs_in_steps_of_any_size(made, monkeypatch, exact_rows):
    first = near_pairs(made[0], seed=5, exact_rows=exact_rows)
    for name, value in (("CHUNK", 37), ("JOIN_ROWS", 11)):
        monkeypatch.setattr(duplicates, name, value)
    pd.testing.assert_frame_equal(first, near_pairs(made[0], seed=5, exact_rows=exact_rows))


def test_nothing_one_and_equal_rows():
    for texts in ([], ["alone"], [""], ["I sleep badly", "Nobody calls"]):
        found = near_pairs(texts)
        assert found.empty and list(found.columns) == ["i", "j", "jaccard"]
        assert clusters(len(texts), found).tolist() == list(range(len(texts)))
    equal = near_pairs(["I sleep badly."] * 9)
    assert as_dict(equal) == {pair: 1.0 for pair in itertools.combinations(range(9), 2)}
    assert (clusters(500, near_pairs(["I sleep badly."] * 500)) == 0).all()
    assert near_pairs(pd.Series(["a text", "b text", "a text!"], index=[7, 8, 9])).i.tolist() == [0]


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6, 0.7, 0.8, 0.95, 0.999, 1.0])
def test_bands_keep_their_promise(threshold):
    bands, rows = duplicates._bands(threshold)
    assert bands * rows <= duplicates.SLOTS and (1 - threshold**rows) ** bands < MISSED


@pytest.mark.parametrize("threshold", [0, 0.29, 1.01, math.nan])
def test_senseless_thresholds_are_one_line(threshold):
    for find in (near_pairs, lambda *given: exact_join(["a"], *given)):
        with pytest.raises(StudyError, match=r"^threshold: found .* expected [^\n]*$"):
            find(["a"], threshold)


# ---- crowds ----


@pytest.mark.parametrize("exact_rows", [0, 10**6])
def test_a_crowd_hangs_together_without_all_its_pairs(shipped, monkeypatch, exact_rows):
    """Families that drift apart: rows at, below and above the threshold, far more alike than CROWD."""
    monkeypatch.setattr(duplicates, "CROWD", 1)
    monkeypatch.setattr(duplicates, "JOIN_ROWS", 16)
    dice = random.Random(3)
    texts = []
    for text in (row["speech"] for row in shipped[:2]):
        words = text.split()
        for _ in range(110):
            words = words[:] if dice.random() < 0.7 else [*words[:-1], dice.choice("one two three four five".split())]
            words[dice.randrange(len(words))] = dice.choice(text.split())
            texts += [" ".join(words)] * dice.choice([1, 1, 2])
    pairs = near_pairs(texts, exact_rows=exact_rows)
    truth = upper(brute_force(texts, texts, 0.7))
    assert 0 < len(pairs) < len(truth) and as_dict(pairs).items() <= truth.items()
    whole = pd.DataFrame(list(truth), columns=["i", "j"])
    assert clusters(len(texts), pairs).tolist() == clusters(len(texts), whole).tolist()
    assert clusters(len(texts), pairs).max() > 0


# ---- exact join ----


@few
@given(corpora(), corpora(), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_exact_join_is_brute_force(left, right, threshold):
    assert as_dict(exact_join(left, right, threshold)) == brute_force(left, right, threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shared", [1, 2, 16, 500])
def test_exact_join_misses_nothing_however_many_rare_shingles_it_asks_for(made, threshold, shared, monkeypatch):
    monkeypatch.setattr(duplicates, "SHARED", shared)
    left, right = made[0][:60], made[0][60:160]
    assert as_dict(exact_join(left, right, threshold)) == brute_force(left, right, threshold)


def test_exact_join_compares_few(made):
    joined = exact_join(*([made[0]] * 2))
    assert len(joined) <= joined.attrs["compared"] < 3 * len(joined)


# ---- clusters and what stays ----


def graphs(n):
    """A number of rows, edges between them, and another order."""
    edges = st.lists(st.tuples(*[st.integers(0, n - 1)] * 2))
    return st.tuples(st.just(n), edges, st.permutations(range(n)))


@few
@given(st.integers(1, 12).flatmap(graphs))
def test_clusters_do_not_depend_on_order(case):
    n, edges, order = case
    frame = pd.DataFrame(edges, columns=["i", "j"], dtype=int)
    labels = clusters(n, frame)
    turned = frame.sample(frac=1, random_state=1).rename(columns={"i": "j", "j": "i"})
    assert labels.tolist() == clusters(n, turned).tolist() == clusters(n, pd.concat([frame, frame])).tolist()
    firsts = [labels.tolist().index(label) for label in range(labels.max() + 1)]
    assert firsts == sorted(firsts)
    moved = frame.replace(dict(enumerate(order))) if len(frame) else frame
    assert partition(clusters(n, moved), np.argsort(order).tolist()) == partition(labels, range(n))


@few
@given(corpora(), st.randoms(use_true_random=False))
def test_the_same_texts_stay_in_any_order_of_rows(texts, dice):
    rows = [(dice.randrange(3), text) for text in texts]

    def stay(rows):
        labels = clusters(len(rows), near_pairs([text for _, text in rows]))
        kept = keep_one(labels, [(rank, *canonical_key(text)) for rank, text in rows])
        assert [int(kept[labels == label].sum()) for label in set(labels.tolist())] == [1] * len(set(labels.tolist()))
        return sorted(row for row, keep in zip(rows, kept) if keep)

    assert stay(rows) == stay(dice.sample(rows, len(rows)))


# ---- reports ----


@pytest.fixture(scope="module")
def table(made):
    texts, _ = made
    frame = pd.DataFrame({"speech": texts, "source": "s", "speech_id": [f"s-{row}" for row in range(len(texts))]})
    frame["split"] = ["test" if row % 5 == 0 else "train" for row in range(len(texts))]
    pairs = near_pairs(texts)
    labels = clusters(len(texts), pairs)
    return frame, pairs, labels, keep_one(labels, list(map(canonical_key, texts)))


def test_leaks_before_and_after(table):
    frame, pairs, labels, kept = table
    test = (frame.split == "test").to_numpy()
    truth = brute_force(frame.speech[test].tolist(), frame.speech[~test].tolist(), 0.7)
    assert leaked(test, pairs) == len({i for i, _ in truth}) > 10
    left = frame[kept]
    assert leaked(test[kept], near_pairs(left.speech)) == 0
    assert exact_join(left.speech[left.split == "test"], left.speech[left.split == "train"]).empty


def test_cluster_report_shows_each_removed_row(table):
    frame, _, labels, kept = table
    report = cluster_report(frame, labels, kept)
    sizes = np.bincount(labels)
    assert [cluster["size"] for cluster in report] == sorted(sizes[sizes > 1], reverse=True)
    members = [member for cluster in report for member in cluster["members"]]
    removed = {member["speech_id"] for member in members if not member["kept"]}
    assert removed == set(frame.speech_id[~kept]) and len(members) == sum(sizes[sizes > 1])
    for cluster in report:
        first, *others = cluster["members"]
        assert first["kept"] and first["similarity"] == 1 and not any(m["kept"] for m in others)
        assert {labels[int(m["speech_id"][2:])] for m in cluster["members"]} == {cluster["label"]}
        own = frame.set_index("speech_id").speech
        for m in others:
            a, b = shingles(own[first["speech_id"]]), shingles(own[m["speech_id"]])
            assert m["similarity"] == len(a & b) / len(a | b) and m["excerpt"] == own[m["speech_id"]][:160]
    json.dumps(report)
    assert cluster_report(frame.iloc[:0], [], []) == [] == cluster_report(frame.iloc[:2], [0, 1], [True, True])


# ---- synthetic speeches and benches ----


def test_synthetic_speeches_look_like_speeches():
    texts, origin = synthetic_speeches(3000, 0.1, seed=2)
    lengths = np.array(list(map(len, texts)))
    assert len(texts) == 3000 and 100 <= lengths.min() and lengths.max() <= 1000 and 350 < lengths.mean() < 382
    copies = np.flatnonzero(origin >= 0)
    assert len(copies) == 300 and (origin[origin[copies]] == -1).all()
    assert (jaccard(texts, copies, origin[copies]) >= 0.7).mean() > 0.97


def test_benches_report_both_libraries_and_honest_memory():
    big = bytearray(300 * 2**20)  # of this process, which must not show in those measured
    rows = library_comparison(400)
    assert [row["library"] for row in rows] == ["rensa", "datasketch"]
    for row in rows:
        assert row["wrong"] == 0 and row["recall"] == 1 and row["pairs"] <= row["compared"]
        assert 0 < row["ready_mb"] <= row["peak_mb"] and row["seconds"] > 0
    (row,) = growth([200], seed=1)
    assert row["pairs"] == len(near_pairs(synthetic_speeches(200, seed=1)[0])) and row["ready_mb"] < 300
    del big
