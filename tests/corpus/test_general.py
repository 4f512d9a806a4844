"""General pairs: rows are read or refused, the rule is exact, a prompt has one side, a mixture is what it is called."""

import gzip
import itertools
import json
import math
from fractions import Fraction

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import COMMIT, Hub, in_child, one_line, serve

from psycopref.corpus.duplicates import same_text
from psycopref.corpus.general import (
    ATTRIBUTES,
    FATES,
    GENERAL_COLUMNS,
    HELPFULNESS,
    PAIR_COLUMNS,
    REVISION,
    RULES,
    SEVENTY_B,
    RatingRule,
    collect_general,
    draw_pairs,
    grid,
    mix_pairs,
    open_general,
    pairs_from_ratings,
    parse_place,
    parse_prompt,
    read_rating_rows,
    ready_pairs,
    split_by_prompt,
    split_general,
    weighted_sums,
)
from psycopref.corpus.collection import split_of

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def rated(prompt="Why is the sky blue?", response="Air scatters it.", *ratings, **changed):
    return dict(zip(GENERAL_COLUMNS, (prompt, response, *ratings, *(3, 3, 4, 2, 2)[len(ratings) :]))) | changed


READY = {"prompt": "a", "response_1": "one", "response_2": "two", "preference_strength": 1}
SKY = [rated(), rated(response="The sea.", helpfulness=1)]
TWO = [*SKY, rated("Name a prime.", "Seven.", 4), rated("Name a prime.", "Nine.", 0)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def frame_of(rows):
    return pd.DataFrame(rows, columns=list(GENERAL_COLUMNS))


def read_general(place):
    return read_rating_rows(open_general(str(place)))[list(GENERAL_COLUMNS)]


def read_ready(place):
    return ready_pairs(open_general(str(place)))


# ---- places ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.gz", "a.parquet", "a.csv.gz"])
def test_every_form_gives_the_same_rows(tmp_path, name):
    rows = [*TWO, rated('One,\n"two"\n<extra_id_1>Assistant\né\n<extra_id_1>User\n…', "")]
    path, frame = tmp_path / name, frame_of(rows)
    if name == "a.parquet":
        frame.astype(dict.fromkeys(ATTRIBUTES, "int32")).to_parquet(path)
    else:
        data = frame.to_csv(index=False).encode() if "csv" in name else jsonl(rows)
        put(path, gzip.compress(data) if name.endswith("gz") else data)
    found = read_general(f"mine={path}")
    assert found.to_dict("records") == rows and found.index.tolist() == list(range(5))


def test_a_folder_gives_its_parts_in_order_and_a_file_itself(tmp_path):
    train = put(tmp_path / "data" / "train.jsonl.gz", gzip.compress(jsonl(TWO[:2])))
    validation = put(tmp_path / "data" / "validation.jsonl.gz", gzip.compress(jsonl(TWO[2:])))
    put(tmp_path / "data" / "preference.jsonl.gz", b"other things")
    put(tmp_path / "data" / "README.md", b"# words")
    assert read_general(f"helpsteer2={tmp_path}").to_dict("records") == TWO
    validation.unlink()
    assert "not ['validation*.jsonl.gz']" in one_line(lambda: read_general(f"helpsteer2={tmp_path}"))
    for place in (str(train), f"helpsteer2={train}"):
        assert read_general(place).to_dict("records") == TWO[:2]
    put(tmp_path / "one" / "rated.csv", frame_of(TWO).to_csv(index=False).encode())
    assert len(read_general(f"{tmp_path / 'one'}")) == 4


PLACES = {
    "here.jsonl": ("general", "here.jsonl"),
    "mine=here.jsonl": ("mine", "here.jsonl"),
    "./a=b": ("general", "./a=b"),
    "https://a.b/c?d=e": ("general", "https://a.b/c?d=e"),
    "hf://datasets/o/n@main/f.csv": ("general", "hf://datasets/o/n@main/f.csv"),
    "helpsteer2": ("helpsteer2", f"hf://datasets/nvidia/HelpSteer2@{REVISION}"),
}
NO_PLACES = ("helpster2", "nothing-here", "helpsteer2=", "mine= ", "", "=", "./absent.jsonl", "mine=./absent")


def test_places_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "here.jsonl", jsonl(TWO))
    for place, (name, where) in PLACES.items():
        source, found = parse_place(place)
        assert (source.name, found) == (name, where)
    assert len(REVISION) == 40 and open_general("helpsteer2=here.jsonl").origin["licence"] == "CC-BY-4.0"
    assert open_general("mine=here.jsonl").origin["licence"].startswith("not known")
    for place in (*NO_PLACES, "hf://models/a/b"):
        one_line(lambda place=place: open_general(place))


FAULTS = [
    ("helpfulness", 5, "is 5 (int), expected a whole number from 0 to 4"),
    ("verbosity", -1, "is -1"),
    ("correctness", None, "is None"),
    ("coherence", 2.5, "is 2.5"),
    ("coherence", 2.0, "is 2.0"),
    ("complexity", True, "is True"),
    ("complexity", "high", "is 'high'"),
    ("complexity", "10", "is '10'"),
    ("response", None, "is None"),
    ("prompt", [{"role": "user"}], "is"),
]


@pytest.mark.parametrize("column, value, words", FAULTS)
def test_a_faulty_row_is_one_line(tmp_path, column, value, words):
    path = put(tmp_path / "a.jsonl", jsonl([*TWO[:3], {**TWO[3], column: value}]))
    message = one_line(lambda: read_general(f"mine={path}"))
    assert f"row 3: {column} {words}" in message and str(path) in message and message.endswith("give mine=/path/to/it")


@pytest.mark.parametrize("missing", GENERAL_COLUMNS)
def test_a_missing_column_is_one_line(tmp_path, missing):
    path = put(tmp_path / "a.jsonl", jsonl({k: v for k, v in row.items() if k != missing} for row in TWO))
    message = one_line(lambda: read_general(path))
    assert f"columns ['{missing}'] are missing" in message and "mixing.rule=ready" in message


IN_CHILD = """
import json, sys
from psycopref.core.settings import StudyError
from psycopref.corpus.general import HELPFULNESS, collect_general, open_general
for spec in sys.argv[1:]:
    rule = None if spec.startswith("ready=") else HELPFULNESS
    try:
        found = collect_general(spec, rule)
        files = open_general(spec).origin["files"]
        print(json.dumps({"counts": found.counts, "ids": list(found.pairs.ID), "files": files, "title": found.title}))
    except StudyError as error:
        print(json.dumps({"error": str(error)}))
"""


def test_a_set_of_the_hub_is_read_at_its_commit(tmp_path):
    hub, place = Hub(), "helpsteer2=hf://datasets/any/set"
    strong = [READY | {"preference_strength": n} for n in (-2, 0, -1)]
    hub.files = {
        "README.md": b"# words",
        "train.jsonl.gz": gzip.compress(jsonl(TWO[:2])),
        "validation.jsonl.gz": gzip.compress(jsonl(TWO[2:])),
        "preference/preference.jsonl.gz": gzip.compress(jsonl(strong)),
    }
    one_file = "hf://datasets/any/set@main/train.jsonl.gz"
    ready = "ready=hf://datasets/any/set@main/preference/preference.jsonl.gz"
    places = (place, one_file, ready, f"{place}@other", "mine=hf://datasets/any/gated")
    with serve(hub) as (address, seen):
        found, one, pairs, wrong, gated = in_child(IN_CHILD, tmp_path, address, *places)
    assert found["counts"]["rows"] == 4 and found["ids"] == ["helpsteer2-0", "helpsteer2-2"]
    files = [(entry["file"], entry["commit"]) for entry in found["files"]]
    assert files == [("train.jsonl.gz", COMMIT), ("validation.jsonl.gz", COMMIT)] and found["title"] == "HelpSteer2"
    assert one["ids"] == ["general-0"] and (pairs["counts"]["pairs"], pairs["counts"]["ties"]) == (2, 1)
    assert "RevisionNotFound" in wrong["error"] and "GatedRepo" in gated["error"]
    assert gated["error"].endswith("give mine=/path/to/it")
    offline = in_child(IN_CHILD, tmp_path, "http://127.0.0.1:9", place, "helpsteer2", offline="1")
    assert offline[0]["ids"] == found["ids"] and "HF_HUB_OFFLINE" in offline[1]["error"]


# ---- turns ----

content = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<extra_id_" not in text
)
MARK = "<extra_id_1>"


@few
@given(st.lists(content, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2))
def test_turns_are_taken_apart_as_they_were_put_together(turns):
    roles = ["user", "assistant"] * 4
    later = (f"\n{MARK}{role.title()}\n{turn}" for role, turn in zip(roles[1:], turns[1:]))
    expected = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    assert parse_prompt(turns[0] + "".join(later)) == expected


UNREADABLE = [
    "",
    " \n",
    "<extra_id_0>System\na",
    f"{MARK}User\na",
    f"a\n{MARK}User\nb",
    f"a\n{MARK}Assistant",
    f"a\n{MARK}Assistant\nb",
    f"a\n{MARK}Assistant\nb\n{MARK}User\n",
    f"a\n{MARK}Assistant\n{MARK}User\nb",
    f"a\n{MARK}Assistant\nb\n{MARK}Assistant\nc",
    f"a\n{MARK}Assistant\nb\n{MARK}User\nc\n{MARK}User\nd",
    f"a {MARK}Assistant\nb\n{MARK}User\nc",
    f"a\n{MARK}assistant\nb\n{MARK}User\nc",
]


@pytest.mark.parametrize("prompt", UNREADABLE)
def test_what_cannot_be_told_apart_is_set_aside(prompt):
    assert parse_prompt(prompt) is None
    rows = frame_of([*TWO, rated(prompt, "x"), rated(prompt, "y", 0)])
    pairs, counts = pairs_from_ratings(rows)
    assert counts["unreadable prompts"] == 1
    assert len(pairs) == 2 and counts["response pairs"] == 2 and counts["single responses"] == 0


# ---- the rule ----

decimals = st.decimals(-2, 2, places=2, allow_nan=False).map(lambda value: float(str(value)))
weightings = st.dictionaries(st.sampled_from(ATTRIBUTES), decimals, min_size=1).filter(lambda w: any(w.values()))
ratings = st.lists(st.integers(0, 4), min_size=5, max_size=5)


@few
@given(weightings, st.lists(ratings, min_size=2, max_size=5), st.data())
def test_gaps_are_those_of_exact_fractions(weights, rows, data):
    hundredths = [round(weights.get(name, 0) * 100) for name in ATTRIBUTES]
    expected = [Fraction(sum(h * value for h, value in zip(hundredths, row)), 100) for row in rows]
    frame = frame_of([rated("p", f"response {n}", *row) for n, row in enumerate(rows)])
    gaps = sorted(abs(a - b) for a, b in itertools.combinations(expected, 2))
    least = data.draw(st.sampled_from(gaps))
    kept = [gap for gap in gaps if gap and gap >= least]
    rule = RatingRule(weights, float(least))
    assert weighted_sums(frame, rule).tolist() == expected
    if not kept:
        one_line(lambda: pairs_from_ratings(frame, rule))
        return
    pairs, counts = pairs_from_ratings(frame, rule)
    assert sorted(pairs.gap) == [float(gap) for gap in kept], "a gap that equals min_gap counts"
    assert (counts["ties"], counts["too small gap"]) == (gaps.count(0), sum(0 < gap < least for gap in gaps))
    by_text = dict(zip(frame.response, expected))
    assert all(by_text[chosen] - by_text[rejected] >= least for chosen, rejected in zip(pairs.chosen, pairs.rejected))


def test_declared_rules():
    assert RULES == {"helpfulness": HELPFULNESS, "70b": SEVENTY_B}
    assert HELPFULNESS == RatingRule({"helpfulness": 1.0}, 1.0)
    assert SEVENTY_B.weights == dict(zip(ATTRIBUTES, (0.65, 0.8, 0.45, 0.55, -0.4)))
    talks = frame_of([rated(response="short", verbosity=0), rated(response="long", verbosity=4)])
    assert pairs_from_ratings(talks, SEVENTY_B)[0].chosen.tolist() == ["short"], "verbosity counts against"


# ---- pairs from ratings ----

texts = st.sampled_from(["one", "two", "three", "two "])
some_rows = st.lists(st.tuples(st.sampled_from("abcd"), texts, st.integers(0, 4)), min_size=2, max_size=14)


@few
@given(some_rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_and_every_pair_is_counted(rows, random):
    frame = frame_of([rated(*row) for row in rows])
    shuffled = frame.iloc[random.sample(range(len(rows)), len(rows))]
    first = {prompt: [p for p, *_ in rows].index(prompt) for prompt, *_ in rows}
    groups = [[(text.strip(), h) for p, text, h in rows if p == prompt] for prompt in first]
    both = [pair for group in groups for pair in itertools.combinations(group, 2)]
    wide = [(prompt, a, b) for prompt, group in zip(first, groups) for a, b in itertools.combinations(group, 2)]
    wide = [(prompt, *sorted(own, key=lambda one: -one[1])) for prompt, *own in wide]
    wide = [(prompt, a, b) for prompt, a, b in wide if a[0] != b[0] and a[1] != b[1]]
    said = {(prompt, a[0], b[0]) for prompt, a, b in wide}
    wide = [(prompt, a, b) for prompt, a, b in wide if (prompt, b[0], a[0]) not in said]
    if not wide:
        assert "none has a gap of 1" in one_line(lambda: pairs_from_ratings(frame))
        return
    pairs, counts = pairs_from_ratings(frame)
    again, counts_again = pairs_from_ratings(shuffled)
    assert pairs.equals(again) and counts == counts_again
    assert [*pairs] == list(PAIR_COLUMNS) and pairs.prefID.tolist() == list(range(len(pairs)))
    assert pairs.groupby("ID").gap.agg(lambda gaps: gaps.is_monotonic_decreasing).all(), "the widest gap first"
    columns = ["question", "chosen", "rejected", "gap"]
    elsewhere = pairs_from_ratings(shuffled.reset_index(drop=True))[0]
    stay = sorted(elsewhere[columns].values.tolist()) == sorted(pairs[columns].values.tolist())
    assert stay, "in another file the same pairs stay, if not the ids"
    assert counts["response pairs"] == len(both) == sum(counts[fate] for fate in FATES[1:])
    assert counts["pairs"] == len(pairs) == len(wide)
    assert counts["same text"] == sum(a[0] == b[0] for a, b in both)
    assert (counts["rows"], counts["prompts"]) == (len(rows), len(groups))
    assert counts["single responses"] == sum(len(group) == 1 for group in groups)
    assert set(zip(pairs.ID, pairs.question)) <= {(f"helpsteer2-{row}", prompt) for prompt, row in first.items()}
    rows_of = pairs.ID.str.rpartition("-")[2].astype(int)
    assert rows_of.is_monotonic_increasing and (pairs.gap.groupby(rows_of).diff().fillna(0) <= 0).all(), "widest first"


def test_messages_end_with_the_question():
    prompt = f"a\n{MARK}Assistant\nb\n{MARK}User\nc"
    pairs, _ = pairs_from_ratings(frame_of([rated(prompt, "x", 4), rated(prompt, "y", 0)]), source="mine")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc")]
    expected = {"ID": "mine-0", "prefID": 0, "question": "c", "chosen": "x", "rejected": "y", "gap": 4.0}
    assert pairs.to_dict("records") == [expected | {"messages": turns}]


# ---- ready pairs ----


@pytest.mark.parametrize(
    "rows, kept, counted",
    [
        (["axy", "ayx", "bxy"], ["b"], {"contradictions": 2}),
        (["axy", "axy", "ayx", "bxy"], ["b"], {"contradictions": 3}),
        (["axy", "byx"], ["a", "b"], {"contradictions": 0}),
        (["axy", "ayz", "azx"], ["a", "a", "a"], {"contradictions": 0}),
        (["axx", "a x", "bxy"], ["b"], {"same text": 1, "no words": 1}),
        (["a…x", "bxy"], ["b"], {"no words": 1}),
    ],
)
def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path, rows, kept, counted):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    pairs, counts = read_ready(f"mine={put(tmp_path / 'a.jsonl', jsonl(rows))}")
    assert pairs.question.tolist() == kept and counted.items() <= counts.items()


def test_ready_pairs_in_both_forms(tmp_path):
    plain = [{"prompt": "a", "chosen": "x", "rejected": "y", "preference_strength": n} for n in (2, 0, -1)]
    plain.append({"prompt": "", "chosen": "x", "rejected": "y", "preference_strength": 1})
    pairs, counts = read_ready(f"mine={put(tmp_path / 'a.jsonl', jsonl(plain))}")
    assert pairs[["ID", "chosen", "gap"]].values.tolist() == [["mine-0", "x", 2.0], ["mine-0", "x", 1.0]]
    names = ("rows", "prompts", "unreadable prompts", "response pairs", "same text", "ties", "pairs")
    assert [counts[name] for name in names] == [4, 2, 1, 3, 0, 1, 2]
    published = [READY | {"preference_strength": n, "split": "train"} for n in (-3, -1, 0, 2)]
    published[-1] |= {"prompt": "another"}
    pd.DataFrame(published).to_parquet(tmp_path / "b.parquet")
    pairs, counts = read_ready(tmp_path / "b.parquet")
    expected = [["one", "two", 3.0], ["one", "two", 1.0], ["two", "one", 2.0]]
    assert pairs[["chosen", "rejected", "gap"]].values.tolist() == expected and counts["ties"] == 1
    no_strength = read_ready(put(tmp_path / "c.csv", b"prompt,chosen,rejected\na,x,y\n"))[0]
    assert no_strength.gap.isna().all() and no_strength.ID[0] == "general-0"


STRENGTHS = [("preference_strength", value) for value in (4, 0.5, None)]


@pytest.mark.parametrize("column, value", [*STRENGTHS, ("response_1", None), ("prompt", 3)])
def test_faults_of_ready_pairs_are_one_line(tmp_path, column, value):
    less = {name: cell for name, cell in READY.items() if name != column}
    for rows, words in (([READY, READY | {column: value}], "row 1"), ([less], "missing")):
        path = put(tmp_path / "a.jsonl", jsonl(rows))
        assert words in one_line(lambda path=path: read_ready(path))


# ---- split ----

worded = st.text("abc ,.A", min_size=1, max_size=6).filter(lambda text: same_text(text).strip())


@few
@given(st.lists(worded, min_size=30, max_size=60), st.integers(0, 5))
def test_a_prompt_is_never_on_two_sides(prompts, seed):
    rows = [(f"x-{n}", n, [{"role": "user", "content": prompt}]) for n, prompt in enumerate(prompts)]
    pairs = pd.DataFrame(rows, columns=["ID", "prefID", "messages"])
    sides = [split_of(prompt, 0.3, 0.2, seed) for prompt in prompts]
    if set(sides) < {"train", "dev", "test"}:
        one_line(lambda: split_by_prompt(pairs, 0.3, 0.2, seed))
    else:
        assert split_by_prompt(pairs, 0.3, 0.2, seed).split.tolist() == sides, "as a client speech of these words"


def test_the_whole_conversation_counts_and_parts_may_be_left_out():
    last = f"a\n{MARK}Assistant\n{{}}\n{MARK}User\nGo on."
    rows = [rated(last.format(n), text, h) for n in range(80) for text, h in (("x", 4), ("y", 2), ("z", 0))]
    pairs, _ = pairs_from_ratings(frame_of(rows))
    split = split_by_prompt(pairs, 0.3, 0.2, 0)
    assert set(split.split) == {"train", "dev", "test"} and set(pairs.question) == {"Go on."}
    assert split.groupby("ID").split.nunique().max() == 1
    shuffled = split_by_prompt(pairs.sample(frac=1, random_state=0), 0.3, 0.2, 0)
    assert shuffled.sort_values("prefID").split.tolist() == split.split.tolist()
    assert set(split_by_prompt(pairs, 0.0, 0.0, 0).split) == {"train"}
    for shares in ((1.0, 0.1), (-0.1, 0.1), (0.1, math.nan)):
        one_line(lambda shares=shares: split_by_prompt(pairs, *shares, 0))


def test_a_published_validation_split_is_never_trained_on(tmp_path):
    rows = [rated(f"{n} stairs?", text, h) for n in range(40) for text, h in (("x", 4), ("y", 0))]
    for name, own in (("train", rows[:40]), ("validation", rows[40:])):
        put(tmp_path / f"{name}.jsonl", jsonl(own))
    train, dev, test = split_general(collect_general(f"mine={tmp_path}"), 0.2, 0.1, 0).values()
    assert train.question.tolist() == [f"{n} stairs?" for n in range(20)] and min(len(dev), len(test)) > 0
    assert {*dev.question, *test.question} == {f"{n} stairs?" for n in range(20, 40)} and len(dev) + len(test) == 20


# ---- mixtures ----

PSY = pd.DataFrame({"ID": [f"demo-{n // 3}" for n in range(90)], "prefID": range(90), "question": "I am tired."})
PSY = PSY.assign(chosen="Tell me more.", rejected="Sleep.", chosen_model="any")
GENERAL, _ = pairs_from_ratings(
    frame_of([rated(f"Count to {n}.", text, h) for n in range(70) for text, h in (("Yes", 4), ("No", 2))])
)
psy_sizes, general_sizes = (st.tuples(*[st.integers(0, most)] * 2) for most in (90, 70))


def keys(frame, domain):
    own = frame[frame.domain == domain]
    return list(zip(own.ID, own.prefID))


@few
@given(psy_sizes.map(sorted), general_sizes, st.integers(0, 3), st.randoms(use_true_random=False))
def test_mixtures_are_nested_and_repeatable_and_draw_nothing_twice(psy, general, seed, random):
    (a, b), (c, d) = psy, general
    if not a + c or not b + d:
        one_line(lambda: mix_pairs(PSY, GENERAL, 0, 0, seed))
        return
    small, large = mix_pairs(PSY, GENERAL, a, c, seed), mix_pairs(PSY, GENERAL, b, d, seed)
    assert len(small) == a + c and len(set(zip(small.ID, small.prefID))) == a + c
    assert set(keys(small, "counselling")) <= set(keys(large, "counselling")), "whatever the second part is"
    assert len(keys(small, "counselling")) == a and len(keys(large, "general")) == d
    shuffled = PSY.iloc[random.sample(range(90), 90)]
    assert mix_pairs(shuffled, GENERAL.iloc[::-1], a, c, seed).equals(small)
    nested = [set(keys(mix_pairs(PSY, GENERAL, 0, n, seed), "general")) for n in sorted((c, d)) if n]
    assert len(nested) < 2 or nested[0] <= nested[1]


def test_a_mixture_keeps_messages_and_texts():
    mixed = mix_pairs(PSY, GENERAL, None, None, 0)
    assert len(mixed) == 160 and [*mixed] == ["ID", "prefID", "question", "messages", "chosen", "rejected", "domain"]
    assert all((row.messages is None) == (row.domain == "counselling") for row in mixed.itertuples())
    back = mixed[mixed.domain == "general"].sort_values("prefID")
    assert back.messages.tolist() == GENERAL.messages.tolist() and back.chosen.tolist() == GENERAL.chosen.tolist()
    half = mix_pairs(PSY, GENERAL, 45, 45, 0)
    changes = sum(x != y for x, y in itertools.pairwise(half.domain))
    assert 25 < changes < 65, "shuffled, not one after the other (45 changes are expected)"
    assert keys(half, "counselling") != keys(mix_pairs(PSY, GENERAL, 45, 45, 1), "counselling")
    assert draw_pairs(PSY, 10, 0, "counselling").equals(draw_pairs(PSY, 30, 0, "counselling").head(10))


UNMIXABLE = {
    "too few of ours": (PSY, GENERAL, 91, 0, "found 90, expected at least 91"),
    "too few of theirs": (PSY, GENERAL, 0, 71, "general pairs: found 70"),
    "nothing": (PSY, GENERAL, 0, 0, ""),
    "less than nothing": (PSY, GENERAL, -1, 3, ""),
    "no pairs": (PSY.head(0), GENERAL, None, 3, ""),
    "the same ids": (PSY, PSY, 1, 1, ""),
    "pairs twice": (pd.concat([PSY, PSY]), GENERAL, 1, 1, ""),
}


@pytest.mark.parametrize("psy, general, n, m, words", UNMIXABLE.values(), ids=UNMIXABLE)
def test_what_cannot_be_mixed_is_one_line(psy, general, n, m, words):
    assert words in one_line(lambda: mix_pairs(psy, general, n, m, 0))


@few
@given(st.integers(2, 60_000))
def test_a_cell_of_the_grid_is_what_its_name_says(budget):
    for cell in grid(budget, ("PsyCoPref", "mine"))[3:]:
        said = cell.name.replace("k", "000").removeprefix("Psy").split("Help")
        assert [int(part or 0) for part in (*said, 0)[:2]] == [cell.psy, cell.help] and cell.psy + cell.help == budget


# ---- our own set ----


def test_our_own_set_is_whole():
    demo = collect_general()
    assert demo.counts["rows"] == 400 and demo.counts["unreadable prompts"] == 0
    assert len(mix_pairs(PSY, demo.pairs, 80, 80, 0)) == 160
