"""Win rates: independent of the order of rows, mirrored with the sides, and never the paper's number in a column of
ours."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.principles import principle_keys
from psycopref.core.paper import coarse_of, coarse_topics, paper_values
from psycopref.core.tables import Label, html_table, latex_table, markdown_table
from psycopref.evaluation import win_rates
from psycopref.evaluation.win_rates import MEAN, READINGS, SETTINGS, pick, trust_rows
from psycopref.feedback.battles import ORDERS, paper_order
from psycopref.stats.intervals import compare_policies, win_interval
from psycopref.stats.length_control import length_controlled

PRINCIPLE_KEYS = principle_keys()

SIX = [f"Llama-{base}-Instruct{way}" for base in ("3.2-3B", "3.1-8B") for way in ("", " + DPO", " + DPO-Iter")]
OPPOSITE = {"win": "loss", "loss": "win", "tie": "tie"}
EACH = [next(iter(node["topics"])) for node in coarse_topics().values()]  # a fine topic of each coarse one
VERDICTS = ["verdict", *(f"{key}_verdict" for key in PRINCIPLE_KEYS)]
few = settings(deadline=None, derandomize=True, database=None, max_examples=8)


def speeches_of(topics):
    ids = [f"s{i:03d}" for i in range(len(topics))]
    return pd.DataFrame({"speech_id": ids, "topic": topics, "coarse_topic": [coarse_of()[t] for t in topics]})


def battles_of(found):
    "Rows from (policy, setting, speech, order, verdict); principles say what the verdict says."
    frame = pd.DataFrame(found, columns=["policy", "setting", "speech_id", "order", "verdict"])
    return frame.assign(reference="GPT-4o", judge="openai:gpt-4o", **{name: frame.verdict for name in VERDICTS})


def answers_of(words):
    "Rows from (policy, setting, speech, words); for every speech the reference writes 10 words."
    words = [*words, *(("reference", "free", s, 10) for s in dict.fromkeys(s for _, _, s, _ in words))]
    frame = pd.DataFrame(words, columns=["policy", "setting", "speech_id", "words"])
    asked = frame.setting.map({"free": 0, "length": 10})
    texts = frame.words.map(lambda n: " ".join(["word"] * n))
    return frame.drop(columns="words").assign(response=texts, finish_reason="stop", n_tokens=5, target_words=asked)


def study(policies=SIX, chosen=("free", "length"), topics=tuple(coarse_of()), seed=0):
    "Make a whole study by chance."
    chance, speeches = np.random.default_rng(seed), speeches_of(list(topics))
    places = list(itertools.product(policies, chosen, speeches.speech_id))
    battles = battles_of([(*place, order, chance.choice(["win", "loss"])) for place in places for order in ORDERS])
    return battles, answers_of([(*place, int(chance.integers(1, 30))) for place in places]), speeches


@st.composite
def studies(draw):
    "Small studies in which orders may be missing and verdicts may be ties."
    topics = st.sampled_from(["anxiety", "stress", "bullying", "culture", "self-harm"])
    speeches = speeches_of(draw(st.lists(topics, min_size=2, max_size=7)))
    policies = draw(st.sampled_from([["A-1B"], ["A-1B", "A-1B + DPO"], ["B-2B + DPO", "A-1B"]]))
    chosen = draw(st.sampled_from([["free"], ["length"], ["free", "length"]]))
    places = list(itertools.product(policies, chosen, speeches.speech_id, ORDERS))
    verdicts = st.sampled_from(["win", "loss", "tie", None, "win"])
    drawn = draw(st.lists(verdicts, min_size=len(places), max_size=len(places)))
    found = [(*place, verdict) for place, verdict in zip(places, drawn) if verdict]
    return battles_of(found or [(*places[0], "win")]), speeches


def cells_of(battles, speeches, samples=20):
    return win_rates.win_rate_cells(battles, speeches, 0, samples)


def overall(cells, reading=READINGS[0], **wanted):
    [row] = pick(cells, reading=reading, grouping="all", **wanted).itertuples()
    return row


# what must hold


@few
@given(studies())
def test_counts_make_the_rates_of_speeches_and_of_topics(made):
    cells = cells_of(*made)
    assert (cells.wins + cells.losses + cells.ties == cells.n).all()
    known = cells[cells.n > 0]
    plain = known[known.group != MEAN]
    assert np.allclose(plain.win_rate, 100 * plain.wins / plain.n)
    assert (known.low - 1e-9).le(known.win_rate).all() and (known.win_rate - 1e-9).le(known.high).all()
    assert known.low.ge(0).all() and known.high.le(100).all()
    assert cells[cells.n == 0][["win_rate", "low", "high"]].isna().all(axis=None)
    for _, own in cells.groupby(["setting", "policy", "reading"]):
        whole = own[own.grouping == "all"].iloc[0]
        for grouping in ("coarse topic", "fine topic"):
            part = own[own.grouping == grouping]
            topics, [mean] = part[(part.group != MEAN) & (part.n > 0)], part[part.group == MEAN].itertuples()
            assert topics.n.sum() == whole.n == mean.n and topics.wins.sum() == whole.wins == mean.wins
            if whole.n:
                assert whole.win_rate == pytest.approx(np.average(topics.win_rate, weights=topics.n))
                assert mean.win_rate == pytest.approx(topics.win_rate.mean()) and mean.low <= mean.win_rate <= mean.high


@few
@given(studies())
def test_swapping_the_sides_mirrors_the_tables(made):
    battles, speeches = made
    retold = battles.assign(**{name: battles[name].map(OPPOSITE) for name in VERDICTS})
    turned = retold.assign(order=retold.order.map(dict(zip(ORDERS, ORDERS[::-1]))))
    for reading, other in ((READINGS[0], retold), (READINGS[1], turned)):
        ours, theirs = (pick(cells_of(own, speeches), reading=reading) for own in (battles, other))
        assert ours.wins.tolist() == theirs.losses.tolist() and ours.ties.tolist() == theirs.ties.tolist()
    first, second = (sorted(win_rates.shown_first(own).itertuples(index=False)) for own in (battles, turned))
    assert first == second, "which answer stood first is the same from either side"


@few
@given(studies(), st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing(made, chance):
    battles, speeches = made
    places = itertools.product(set(zip(battles.policy, battles.setting)), speeches.speech_id)
    frames = [battles, speeches, answers_of([(*place, speech, 7) for place, speech in places])]
    mixed = [frame.sample(frac=1, random_state=chance.randrange(1000)) for frame in frames]
    for make in (
        lambda b, s, a: cells_of(b, s),
        lambda b, s, a: trust_rows(b, a, s, 0, 20),
        lambda b, s, a: win_rates.difference_rows(b, s, 0, 20),
    ):
        pd.testing.assert_frame_equal(make(*frames), make(*mixed))


def test_a_missing_order_is_missing_and_no_tie():
    speeches = speeches_of(["anxiety"] * 4)
    lone = {s: next(o for o in ORDERS if o != paper_order(s, 0)) for s in ("s002", "s003")}  # not the order drawn
    found = [("A-1B", "free", s, order, "win") for s in ("s000", "s001") for order in ORDERS]
    battles = battles_of([*found, *(("A-1B", "free", s, order, "loss") for s, order in lone.items())])
    answers = answers_of([("A-1B", "free", s, 10) for s in speeches.speech_id])
    for reading in READINGS:
        row = overall(cells_of(battles, speeches), reading)
        assert (row.n, row.wins, row.losses, row.ties) == (2, 2, 0, 0)
    [trust] = trust_rows(battles, answers, speeches, 0, 20).itertuples()
    assert (trust.asked, trust.coverage, trust.flips) == (8, 75.0, 0.0)
    half = battles[battles.order == ORDERS[0]]
    [trust] = trust_rows(half, answers, speeches, 0, 20).itertuples()
    assert overall(cells_of(half, speeches), READINGS[1]).n == 0
    assert np.isnan(trust.flips) and np.isnan(trust.first), "a judge who saw one order only shows no bias"


# numbers worked out by hand


def test_a_small_study_by_hand():
    speeches = speeches_of(["anxiety", "anxiety", "stress", "bullying"])
    pairs = {"s000": ("win", "win"), "s001": ("win", "loss"), "s002": ("loss", "loss"), "s003": ("win", "loss")}
    place = ("Llama-1B + DPO", "free")
    battles = battles_of([(*place, s, *one) for s, both in pairs.items() for one in zip(ORDERS, both)])
    battles = battles.assign(safety_verdict="win")
    answers = answers_of([(*place, s, n) for s, n in zip(pairs, (20, 10, 5, 40))])
    drawn = [dict(zip(ORDERS, pairs[s]))[paper_order(s, 0)] for s in speeches.speech_id]
    cells = cells_of(battles, speeches)
    plain, strict = (overall(cells, reading) for reading in READINGS)
    assert (plain.wins, plain.losses, plain.ties) == tuple(drawn.count(word) for word in ("win", "loss", "tie"))
    assert (strict.wins, strict.losses, strict.ties) == (1, 1, 2)
    assert pick(cells, reading=READINGS[1], grouping="principle", group="safety").wins.tolist() == [4]
    mean = pick(cells, reading=READINGS[1], group=MEAN).set_index("grouping").win_rate
    assert mean["fine topic"] == pytest.approx(50 / 3) and mean["coarse topic"] == pytest.approx(100 / 3 / 2)
    [trust] = trust_rows(battles, answers, speeches, 0, 20).itertuples()
    # shown first wins: s000 in its first order, s002 in its second, s001 and s003 in both
    assert (trust.flips, trust.first, trust.coverage) == (50.0, 75.0, 100.0)
    assert (trust.length_ratio, trust.longer, trust.kin) == (1.5, 50.0, "reference")


def test_columns_are_those_of_the_modules_that_make_them():
    battles, answers, speeches = study(SIX[:2], ("free",), ["anxiety"] * 15 + ["stress"] * 15, seed=3)
    trust, cells = trust_rows(battles, answers, speeches, 5, 200), win_rates.win_rate_cells(battles, speeches, 5, 200)
    verdicts = win_rates.read_verdicts(battles, READINGS[0], 5).merge(speeches, on="speech_id")
    for row in trust.itertuples():
        words = win_rates.matched_words(answers)[["policy", "speech_id", "words"]]
        own = verdicts[verdicts.policy == row.policy].merge(words, on=["policy", "speech_id"])
        wins, speech = (own.verdict == "win").to_numpy(int), own.speech_id.to_numpy()
        found = length_controlled(wins, (own.words - 10).to_numpy(), speech, samples=200, level=0.95, seed=5)
        assert (row.raw, row.controlled) == (found["raw"], found["controlled"])
        assert (row.controlled_low, row.controlled_high) == (found["low"], found["high"])
        first = win_rates.shown_first(battles[battles.policy == row.policy])
        both = win_interval(first["first"].to_numpy(), first.speech_id.to_numpy(), samples=200, seed=5)
        assert (row.first_low, row.first_high) == pytest.approx(both), "both orders of a speech are one observation"
        whole = overall(cells, policy=row.policy)
        assert (whole.low, whole.high) == win_interval(wins, speech, samples=200, seed=5)
        assert row.raw == pytest.approx(whole.win_rate)
    expected = compare_policies(*(verdicts[verdicts.policy == name] for name in SIX[1::-1]), samples=200, seed=5)
    found = win_rates.difference_rows(battles, speeches, 5, 200)
    pd.testing.assert_frame_equal(found[list(expected.columns)], expected, check_like=True)


def test_a_length_controlled_rate_needs_enough_speeches_and_more_than_one_length():
    battles, answers, speeches = study(SIX[:1], ("free",), ["anxiety"] * 20)
    [enough] = trust_rows(battles, answers, speeches, 0, 20).itertuples()
    trust = trust_rows(battles[battles.speech_id != "s007"], answers, speeches, 0, 20)
    [fewer] = trust.itertuples()
    assert not np.isnan(enough.controlled) and np.isnan(fewer.controlled) and np.isnan(fewer.controlled_low)
    assert fewer.raw == pytest.approx(100 * fewer.plain_win / 19) and not np.isnan(fewer.length_ratio)
    shown = win_rates.trust_table(trust).iloc[0]
    assert shown["length-controlled %"] is None and shown["longer than the reference, %"] == round(fewer.longer, 1)
    same = answers_of([(SIX[0], "free", s, 13) for s in speeches.speech_id])
    assert trust_rows(battles, same, speeches, 0, 20).controlled.isna().all(), "always three words more tells nothing"


def test_the_mean_over_topics_is_covered():
    chance, hits = np.random.default_rng(1), 0
    rates, sizes = np.array([0.95, 0.9, 0.5, 0.8, 0.99, 0.7]), (2, 3, 20, 8, 6, 12)
    for _ in range(200):
        drawn = [np.where(chance.random(n) < p, "win", "loss") for p, n in zip(rates, sizes)]
        frames = [pd.DataFrame({"speech_id": range(len(own)), "verdict": own}) for own in drawn]
        mean = win_rates.macro_row([win_rates.rate_row(frame, samples=300) for frame in frames])
        hits += mean["low"] <= 100 * rates.mean() <= mean["high"]
    assert 0.91 <= hits / 200, "nominal 95%, with a Monte-Carlo error of 1.5 points"


# Table 2


def printed(battles, answers, speeches):
    cells = cells_of(battles, speeches)
    rows = win_rates.summary_rows(cells, trust_rows(battles, answers, speeches, 0, 20))
    assert {type(value) for row in rows for value in row.values()} <= {str, float, int, type(None)}, "for JSON"
    return cells, win_rates.table_2(rows, "GPT-4o")


FREE, LENGTH = "w/o length constraint, against GPT-4o", "w/ length constraint, against GPT-4o"


def test_table_2_has_the_papers_rows_and_columns():
    _, table = printed(*study(topics=EACH))
    paper = table[table.model.str.startswith("paper")]
    topics = "Mental Issues,Emotional Well-being,Relationships,Life Changes,Social Issues,Youth,Safety,Special Topics"
    assert list(table.columns) == ["model", *topics.split(","), "Overall", "95% interval", "n"]
    assert table.index[table.model.str.startswith("paper")].tolist() == list(range(14, 28))
    published = [list(rates.values()) for setting in SETTINGS for rates in paper_values()["table_2"][setting].values()]
    assert [row[1:10] for row in paper.values.tolist() if row[1] != ""] == published


def test_a_policy_may_lack_a_setting_and_a_base():
    battles, answers, speeches = study(SIX[:3] + SIX[4:])
    left = battles[~((battles.policy == SIX[1]) & (battles.setting == "length"))]
    cells, table = printed(left, answers, speeches)
    rest = [SIX[4], SIX[5]]  # neither was trained from the other
    assert table.model.tolist()[:11] == [
        FREE,
        SIX[0],
        "+ DPO",
        "+ DPO-Iter",
        *rest,
        LENGTH,
        SIX[0],
        "+ DPO-Iter",
        *rest,
    ]
    assert SIX[1] not in set(win_rates.difference_rows(left, speeches, 0, 20).query("setting == 'length'")["first"])
    for figure in (win_rates.topic_figure(cells, "r"), win_rates.fine_topic_figure(cells, speeches, "r")):
        plt.close(figure)


def test_table_2_from_less():
    battles, answers, speeches = study(SIX[4:5], ("length",), ["anxiety", "stress", "bullying"])
    cells, table = printed(battles, answers, speeches)
    assert table.model.tolist()[:2] == [LENGTH, SIX[4]] and len(table) == 2 + 14
    own = table.iloc[1]
    assert own["Safety"] is None and own["Social Issues"] is not None and own.n == 3
    assert "bold" not in own["Overall"].marks, "alone is not best"
    assert [len(win_rates.cell_table(cells, f"{word} topic")) for word in ("coarse", "fine")] == [10, 5]
    empty = win_rates.difference_table(win_rates.difference_rows(battles, speeches, 0, 20))
    assert len(empty) == 0 and "p, sign test" in empty


def test_nothing_of_the_paper_is_in_ours(monkeypatch):
    frames = study(SIX[:2], topics=EACH)
    _, before = printed(*frames)
    published = paper_values()["table_2"].items()
    false = {setting: {m: dict.fromkeys(rates, 99.9) for m, rates in own.items()} for setting, own in published}
    monkeypatch.setattr(win_rates, "paper_values", lambda: paper_values() | {"table_2": false})
    _, after = printed(*frames)
    theirs, titles = after.model.str.startswith("paper"), after.Safety == ""
    pd.testing.assert_frame_equal(before[~theirs], after[~theirs])
    marks = [[value.marks for value in table.Overall[~theirs & ~titles]] for table in (before, after)]
    assert marks[0] == marks[1], "ours are best among ours"
    assert (after[theirs & ~titles].drop(columns=["model", "95% interval", "n"]) == 99.9).all(axis=None)


def test_marks_are_the_papers():
    paper = paper_values()["table_2"]["free"]
    [slug] = [slug for slug, node in coarse_topics().items() if node["short"] == "Safety"]
    rows = [{"model": model, "Safety": r[slug], "Overall": r["overall"]} for model, r in paper.items()]
    marked = win_rates.mark_best(rows)
    assert ["bold" in row["Safety"].marks and "bold" in row["Overall"].marks for row in marked] == [False] * 5 + [True]
    above = [row["model"] for row in marked if "underlined" in row["Overall"].marks]
    assert above == [model for model, rates in paper.items() if rates["overall"] > 50]


def test_tables_are_printed_in_every_form():
    battles, answers, speeches = study()
    cells, table = printed(battles, answers, speeches)
    tables = {
        28: table,
        120: win_rates.cell_table(cells, "coarse topic"),
        528: win_rates.cell_table(cells, "fine topic"),
        12: win_rates.trust_table(trust_rows(battles, answers, speeches, 0, 20)),
        270: win_rates.difference_table(win_rates.difference_rows(battles, speeches, 0, 20)),
        24: win_rates.principle_win_rates(cells),
        6: win_rates.compliance_table(win_rates.compliance_rows(answers)),
    }
    for rows, frame in tables.items():
        texts = [markdown_table(frame), *(form(frame, "caption", Label("demo")) for form in (html_table, latex_table))]
        assert len(frame) == rows and not any(word in text for text in texts for word in ("nan", "None"))
    assert "| 87.0 |" in markdown_table(table).replace("**", "").replace("<u>", "").replace("</u>", "")


# families, compliance, differences


@pytest.mark.parametrize(
    "judge, reference, policy, expected",
    [
        ("openai:gpt-4o", "GPT-4o-2024-08-06", "gpt-3.5 + DPO", "reference and policy"),
        ("local:smollm2-135m", "SmolLM2-135M-Instruct, untrained", "Llama3-8B", "reference"),
        ("local:random-tiny", "random two-layer Llama, untrained", "Llama-3.1-8B + DPO", "reference"),
        ("rules:rubric", "random-tiny", "random-tiny + DPO", "neither"),
    ],
)
def test_the_family_of_the_judge(judge, reference, policy, expected):
    assert win_rates.same_family(judge, reference, policy) == expected


def test_compliance_is_a_distribution():
    ids, ratios = [f"s{i:03d}" for i in range(20)], np.arange(1, 21)  # words for 10 asked words
    words = [("A-1B", "length", s, n) for s, n in zip(ids, ratios)] + [("A-1B", "free", s, 30) for s in ids]
    [row] = win_rates.compliance_rows(answers_of(words))
    assert (row["median of words / asked words"], row["median without the instruction"], row["n"]) == (1.05, 3, 20)
    assert row["within 20% of the asked length, %"] == 25
    for q in (5, 25, 75, 95):
        assert row[f"{q}th percentile"] == round(float(np.quantile(ratios / 10, q / 100)), 2)


def test_differences_are_corrected_over_the_topics_of_a_pair():
    topics = [topic for topic in ("anxiety", "self-esteem", "marriage", "career") for _ in range(12)]
    battles, _, speeches = study(SIX[:3], ("free",), topics, seed=2)
    rows = win_rates.difference_rows(battles, speeches, 0, 50)
    assert len(rows) == 3 * 5 and (rows.p_holm >= rows.p).all() and (rows.better + rows.worse <= rows.n).all()
    whole = rows[rows.group == "Overall"]
    assert (whole.p_holm == whole.p).all()
    assert list(zip(whole["first"], whole.second)) == [(SIX[1], SIX[0]), (SIX[2], SIX[0]), (SIX[2], SIX[1])]
    a, b, c = whole.difference
    assert b - a == pytest.approx(c), "differences on the same speeches add up"
    shown = win_rates.difference_table(rows)
    gained = (shown["wins only here"] - shown["wins only there"]) / shown.n
    assert (100 * gained).astype(float).tolist() == pytest.approx(shown["difference, points"].tolist(), abs=0.06)
    assert shown["p, Holm over topics"].isna().sum() == 3


# figures


def overlaps(figure):
    "Find pairs of texts that cover one another; turned ones are left out: their boxes are larger than they are."
    figure.canvas.draw()
    texts = []
    for axes in figure.axes:
        texts += [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.title, axes.xaxis.label]
    shown = [t for t in texts if t.get_text() and t.get_visible() and t.get_rotation() == 0]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.mark.parametrize("policies, chosen", [(SIX, ("free", "length")), (["warm"], ("length",))])
def test_labels_do_not_overlap(policies, chosen):
    battles, answers, speeches = study(policies, chosen)
    cells, name = cells_of(battles, speeches), "GPT-4o-2024-08-06"
    drawn = [win_rates.win_rate_figure(cells, name), win_rates.topic_figure(cells, name)]
    for figure in [*drawn, win_rates.fine_topic_figure(cells, speeches, name), win_rates.compliance_figure(answers)]:
        assert overlaps(figure) == []
        plt.close(figure)


def test_a_blank_answer_can_be_drawn():
    figure = win_rates.compliance_figure(answers_of([("A-1B", "length", "s000", 0), ("A-1B", "length", "s001", 12)]))
    assert figure.axes[0].get_xlim()[0] > 0
    plt.close(figure)
