"""Win rates and what stands beside them: the same whatever the order of the rows, mirrored when the sides are, and never the paper's number in a column of ours."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.evaluation import win_rates
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.tables import Label, html_table, latex_table, markdown_table
from psycopref.feedback.battles import ORDERS, paper_order
from psycopref.stats.intervals import compare_policies
from psycopref.stats.scores import win_interval
from psycopref.core.paper import coarse_of, coarse_topics, paper_values
from psycopref.stats.length_control import length_controlled
from psycopref.evaluation.win_rates import MEAN, READINGS, SETTINGS

SIX = [
    f"Llama-{base}-Instruct{training}" for base in ("3.2-3B", "3.1-8B") for training in ("", " + DPO", " + DPO-Iter")
]
OPPOSITE = {"win": "loss", "loss": "win", "tie": "tie"}
few = settings(deadline=None, derandomize=True, database=None, max_examples=8)


def speeches_of(topics):
    return pd.DataFrame(
        {
            "speech_id": [f"s{i:03d}" for i in range(len(topics))],
            "topic": topics,
            "coarse_topic": [coarse_of()[t] for t in topics],
        }
    )


def battles_of(told, judge="openai:gpt-4o", reference="GPT-4o"):
    "Rows from (policy, setting, speech, order, verdict); principles say what the verdict says."
    rows = [
        {
            "speech_id": s,
            "setting": setting,
            "policy": policy,
            "reference": reference,
            "order": order,
            "verdict": verdict,
            **{f"{key}_verdict": verdict for key in PRINCIPLE_KEYS},
            "judge": judge,
        }
        for policy, setting, s, order, verdict in told
    ]
    return pd.DataFrame(rows)


def answers_of(words):
    "Rows from (policy, setting, speech, words); the reference writes 10 words."
    rows = [(policy, setting, s, " ".join(["word"] * n)) for policy, setting, s, n in words]
    return pd.DataFrame(
        [
            dict(
                speech_id=s,
                policy=policy,
                setting=setting,
                response=text,
                finish_reason="stop",
                n_tokens=5,
                target_words=10 if setting == "length" else 0,
            )
            for policy, setting, s, text in rows
        ]
    )


def study(policies=SIX, chosen=("free", "length"), topics=tuple(coarse_of()), seed=0):
    "Make a whole study by chance."
    chance, speeches = np.random.default_rng(seed), speeches_of(list(topics))
    places = list(itertools.product(policies, chosen, speeches.speech_id))
    battles = battles_of([(*place, order, chance.choice(["win", "loss"])) for place in places for order in ORDERS])
    words = [(*place, int(chance.integers(1, 30))) for place in places] + [
        ("reference", "free", s, 10) for s in speeches.speech_id
    ]
    return battles, answers_of(words), speeches


@st.composite
def studies(draw):
    "Small studies in which orders may be missing and verdicts may be ties."
    speeches = speeches_of(
        draw(
            st.lists(st.sampled_from(["anxiety", "stress", "bullying", "culture", "self-harm"]), min_size=2, max_size=7)
        )
    )
    policies = draw(st.sampled_from([["A-1B"], ["A-1B", "A-1B + DPO"], ["B-2B + DPO", "A-1B"]]))
    places = [
        (p, setting, s, order)
        for p in policies
        for setting in draw(st.sampled_from([["free"], ["length"], ["free", "length"]]))
        for s in speeches.speech_id
        for order in ORDERS
    ]
    verdicts = draw(
        st.lists(st.sampled_from(["win", "loss", "tie", None, "win"]), min_size=len(places), max_size=len(places))
    )
    told = [(*place, verdict) for place, verdict in zip(places, verdicts) if verdict]
    return battles_of(told or [(*places[0], "win")]), speeches


def cells_of(battles, speeches, **keywords):
    return win_rates.win_rate_cells(battles, speeches, 0, **{"samples": 20, **keywords})


# what must hold


@few
@given(studies())
def test_wins_losses_and_ties_make_n_and_rates_are_theirs(made):
    cells = cells_of(*made)
    assert (cells.wins + cells.losses + cells.ties == cells.n).all()
    plain = cells[(cells.group != MEAN) & (cells.n > 0)]
    assert np.allclose(plain.win_rate, 100 * plain.wins / plain.n)
    known = cells[cells.n > 0]
    assert (
        (known.low <= known.win_rate + 1e-9).all()
        and (known.win_rate <= known.high + 1e-9).all()
        and known.low.ge(0).all()
        and known.high.le(100).all()
    )
    assert cells[cells.n == 0][["win_rate", "low", "high"]].isna().all(axis=None)


@few
@given(studies())
def test_swapping_the_sides_mirrors_the_tables(made):
    battles, speeches = made
    turned = battles.assign(order=battles.order.map(dict(zip(ORDERS, ORDERS[::-1]))))
    columns = ["verdict", *(f"{key}_verdict" for key in PRINCIPLE_KEYS)]
    turned[columns] = turned[columns].replace(OPPOSITE)
    cells = cells_of(battles, speeches)
    ours, theirs = (win_rates.pick(made, reading=READINGS[1]) for made in (cells, cells_of(turned, speeches)))
    assert (
        ours.wins.tolist() == theirs.losses.tolist()
        and ours.losses.tolist() == theirs.wins.tolist()
        and ours.ties.tolist() == theirs.ties.tolist()
    )
    first, second = (
        win_rates.shown_first(b).sort_values(["speech_id", "first"])["first"].tolist() for b in (battles, turned)
    )
    assert first == second, "which answer stood first is not changed by telling the battle from the other side"
    retold = battles.assign(**{name: battles[name].map(OPPOSITE) for name in columns})
    one, other = (win_rates.pick(made, reading=READINGS[0]) for made in (cells, cells_of(retold, speeches)))
    assert one.wins.tolist() == other.losses.tolist() and one.ties.tolist() == other.ties.tolist()


@few
@given(studies(), st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing(made, chance):
    battles, speeches = made
    words = [
        (p, setting, s, 7) for p, setting in set(zip(battles.policy, battles.setting)) for s in speeches.speech_id
    ] + [("reference", "free", s, 10) for s in speeches.speech_id]
    frames = [battles, answers_of(words), speeches]
    mixed = [frame.sample(frac=1, random_state=chance.randrange(1000)) for frame in frames]
    for make in (
        lambda b, a, s: cells_of(b, s),
        lambda b, a, s: win_rates.trust_rows(b, a, s, 0, 20),
        lambda b, a, s: win_rates.difference_rows(b, s, 0, 20),
    ):
        pd.testing.assert_frame_equal(make(*frames), make(*mixed))


@few
@given(studies())
def test_micro_averages_speeches_and_macro_topics(made):
    cells = cells_of(*made)
    for (_, _, _), own in cells.groupby(["setting", "policy", "reading"]):
        [overall] = own[own.grouping == "all"].itertuples()
        for grouping in ("coarse topic", "fine topic"):
            part = own[own.grouping == grouping]
            topics, [mean] = part[(part.group != MEAN) & (part.n > 0)], part[part.group == MEAN].itertuples()
            assert topics.n.sum() == overall.n == mean.n and topics.wins.sum() == overall.wins == mean.wins
            if overall.n:
                assert overall.win_rate == pytest.approx(
                    np.average(topics.win_rate, weights=topics.n)
                ) and mean.win_rate == pytest.approx(topics.win_rate.mean())
                assert mean.low <= mean.win_rate <= mean.high


def test_a_missing_order_is_missing_and_no_tie():
    speeches = speeches_of(["anxiety"] * 4)
    lone = {
        s: ORDERS[1 - ORDERS.index(paper_order(s, 0))] for s in ("s002", "s003")
    }  # not the order that the first reading takes
    told = [("A-1B", "free", s, order, "win") for s in ("s000", "s001") for order in ORDERS] + [
        ("A-1B", "free", s, order, "loss") for s, order in lone.items()
    ]
    battles, answers = (
        battles_of(told),
        answers_of([(p, "free", s, 10) for p in ("A-1B", "reference") for s in speeches.speech_id]),
    )
    for reading in READINGS:
        [row] = win_rates.pick(cells_of(battles, speeches), reading=reading, grouping="all").itertuples()
        assert (row.n, row.wins, row.losses, row.ties) == (2, 2, 0, 0)
    [trust] = win_rates.trust_rows(battles, answers, speeches, 0, 20).itertuples()
    assert (trust.asked, trust.coverage, trust.flips) == (8, 75.0, 0.0)
    half = battles[battles.order == ORDERS[0]]
    [strict] = win_rates.pick(cells_of(half, speeches), reading=READINGS[1], grouping="all").itertuples()
    [trust] = win_rates.trust_rows(half, answers, speeches, 0, 20).itertuples()
    assert strict.n == 0 and np.isnan(trust.flips) and np.isnan(trust.first), (
        "a judge who saw one order only can't be asked for its bias"
    )


# numbers worked out by hand


def test_a_small_study_by_hand():
    speeches = speeches_of(["anxiety", "anxiety", "stress", "bullying"])
    pairs = {"s000": ("win", "win"), "s001": ("win", "loss"), "s002": ("loss", "loss"), "s003": ("loss", "win")}
    battles = battles_of(
        [
            ("Llama-1B + DPO", "free", s, order, verdict)
            for s, both in pairs.items()
            for order, verdict in zip(ORDERS, both)
        ]
    )
    words = {"s000": 20, "s001": 10, "s002": 5, "s003": 40}
    answers = answers_of(
        [("Llama-1B + DPO", "free", s, n) for s, n in words.items()] + [("reference", "free", s, 10) for s in words]
    )
    drawn = [dict(zip(ORDERS, pairs[s]))[paper_order(s, 0)] for s in speeches.speech_id]
    cells = cells_of(battles, speeches)
    plain, strict = (win_rates.pick(cells, reading=reading, grouping="all").iloc[0] for reading in READINGS)
    assert (plain.wins, plain.losses, plain.ties) == tuple(drawn.count(word) for word in ("win", "loss", "tie")) and (
        strict.wins,
        strict.losses,
        strict.ties,
    ) == (1, 1, 2)
    mean = win_rates.pick(cells, reading=READINGS[1], group=MEAN).set_index("grouping").win_rate
    assert mean["fine topic"] == pytest.approx((50 + 0 + 0) / 3) and mean["coarse topic"] == pytest.approx(
        (100 / 3 + 0) / 2
    )
    [trust] = win_rates.trust_rows(battles, answers, speeches, 0, 20).itertuples()
    # shown first wins: s000 in its first order, s001 in both, s002 in its second, s003 in none
    assert (trust.flips, trust.first, trust.coverage, trust.length_ratio, trust.kin) == (
        50.0,
        50.0,
        100.0,
        1.5,
        "reference",
    )


def test_six_wins_of_six_are_not_surely_all():
    speeches = speeches_of(["bullying"] * 6 + ["stress"])
    cells = cells_of(
        battles_of([("A-1B", "free", s, order, "win") for s in speeches.speech_id for order in ORDERS]),
        speeches,
        samples=500,
    )
    assert (cells[cells.n > 0].win_rate == 100).all() and (cells[cells.n > 0].low < 96).all()
    assert (
        win_rates.pick(cells, reading=READINGS[0], group="stress").low.iloc[0]
        < 50
        < win_rates.pick(cells, reading=READINGS[0], group="bullying").low.iloc[0]
    )


def test_columns_are_those_of_the_rooms_that_make_them():
    battles, answers, speeches = study(SIX[:2], ("free",), ["anxiety"] * 15 + ["stress"] * 15, seed=3)
    trust = win_rates.trust_rows(battles, answers, speeches, 5, 200).set_index("policy")
    words = win_rates.matched_words(answers)
    for policy in SIX[:2]:
        told = (
            win_rates.read_verdicts(battles[battles.policy == policy], READINGS[0], 5)
            .merge(words, on=["setting", "policy", "speech_id"])
            .sort_values("speech_id")
        )
        wins, speech = (told.verdict == "win").to_numpy().astype(int), told.speech_id.to_numpy()
        found = length_controlled(wins, (told.words - 10).to_numpy(), speech, samples=200, level=0.95, seed=5)
        row = trust.loc[policy]
        assert (row.raw, row.controlled, row.controlled_low, row.controlled_high) == (
            found["raw"],
            found["controlled"],
            found["low"],
            found["high"],
        )
        [overall] = win_rates.pick(
            win_rates.win_rate_cells(battles, speeches, 5, 200), policy=policy, reading=READINGS[0], grouping="all"
        ).itertuples()
        assert (overall.low, overall.high) == win_interval(
            wins, speech, samples=200, seed=5
        ) and row.raw == pytest.approx(overall.win_rate)
    same = answers.assign(
        response=[("word " * (10 if policy == "reference" else 13)).strip() for policy in answers.policy]
    )
    assert win_rates.trust_rows(battles, same, speeches, 5, 20).controlled.isna().all(), (
        "where all answers are three words longer, nothing can be said about length"
    )
    told = win_rates.read_verdicts(battles, READINGS[0], 5).merge(speeches, on="speech_id")
    expected = compare_policies(*(told[told.policy == policy] for policy in (SIX[1], SIX[0])), samples=200, seed=5)
    pd.testing.assert_frame_equal(
        win_rates.difference_rows(battles, speeches, 5, 200)[list(expected.columns)], expected, check_like=True
    )


def test_the_mean_over_topics_is_covered():
    chance, rates, sizes, hits = (
        np.random.default_rng(1),
        np.array([0.95, 0.9, 0.5, 0.8, 0.99, 0.7]),
        (2, 3, 20, 8, 6, 12),
        0,
    )
    for _ in range(200):
        rows = [
            win_rates.rate_row(
                pd.DataFrame({"speech_id": range(n), "verdict": np.where(chance.random(n) < p, "win", "loss")}), 300
            )
            for p, n in zip(rates, sizes)
        ]
        mean = win_rates.macro_row(rows)
        hits += mean["low"] <= 100 * rates.mean() <= mean["high"]
    assert 0.91 <= hits / 200, "nominal 95%, with a Monte-Carlo error of 1.5 points"


# Table 2


def printed(battles, answers, speeches, reference="GPT-4o"):
    cells = cells_of(battles, speeches)
    return cells, win_rates.table_2(
        win_rates.summary_rows(cells, win_rates.trust_rows(battles, answers, speeches, 0, 20)), reference
    )


def test_table_2_has_the_papers_rows_and_columns():
    _, table = printed(*study())
    paper = table[table.model.str.startswith("paper")]
    ours = table[~table.model.str.startswith("paper")]
    assert list(table.columns) == [
        "model",
        "Mental Issues",
        "Emotional Well-being",
        "Relationships",
        "Life Changes",
        "Social Issues",
        "Youth",
        "Safety",
        "Special Topics",
        "Overall",
        "95% interval",
        "n",
    ]
    names = ["Llama-3.2-3B-Instruct", "+ DPO", "+ DPO-Iter", "Llama-3.1-8B-Instruct", "+ DPO", "+ DPO-Iter"]
    assert ours.model.tolist() == [
        "w/o length constraint, against GPT-4o",
        *names,
        "w/ length constraint, against GPT-4o",
        *names,
    ]
    assert table.index[table.model.str.startswith("paper")].min() > ours.index.max() and len(paper) == 14
    published = [list(rates.values()) for setting in SETTINGS for rates in paper_values()["table_2"][setting].values()]
    assert [row[1:10] for row in paper.values.tolist() if row[1] != ""] == published


def test_table_2_from_less():
    battles, answers, speeches = study(["Llama-3.1-8B-Instruct + DPO"], ("length",), ["anxiety", "stress", "bullying"])
    cells, table = printed(battles, answers, speeches)
    assert (
        table.model.tolist()[:2] == ["w/ length constraint, against GPT-4o", "Llama-3.1-8B-Instruct + DPO"]
        and len(table) == 2 + 14
    )
    own = table.iloc[1]
    assert own["Safety"] is None and own["Social Issues"] is not None and own.n == 3
    assert not own["Overall"].marks & {"bold"}, "alone is not best"
    assert (
        len(win_rates.cell_table(cells, "coarse topic")) == 10 and len(win_rates.cell_table(cells, "fine topic")) == 5
    )
    assert len(win_rates.difference_table(win_rates.difference_rows(battles, speeches, 0, 20))) == 0


def test_a_trained_policy_is_named_in_full_where_its_base_is_not_above_it():
    battles, answers, speeches = study(
        ["Llama-1B + DPO", "Llama-1B + DPO-Iter", "Llama-3B", "Llama-3B + DPO"], ("free",), ["anxiety", "stress"]
    )
    _, table = printed(battles, answers, speeches)
    assert table.model.tolist()[1:5] == ["Llama-1B + DPO", "Llama-1B + DPO-Iter", "Llama-3B", "+ DPO"], (
        "the second was not trained from the first"
    )


def test_a_length_controlled_rate_needs_enough_speeches():
    battles, answers, speeches = study(SIX[:1], ("free",), ["anxiety"] * 20)
    [enough] = win_rates.trust_rows(battles, answers, speeches, 0, 20).itertuples()
    fewer = battles[battles.speech_id != "s007"]
    [few_speeches] = win_rates.trust_rows(fewer, answers, speeches, 0, 20).itertuples()
    assert (
        not np.isnan(enough.controlled) and np.isnan(few_speeches.controlled) and np.isnan(few_speeches.controlled_low)
    )
    assert few_speeches.raw == pytest.approx(100 * few_speeches.plain_win / 19) and not np.isnan(
        few_speeches.length_ratio
    ), "what needs no model is told"
    shown = win_rates.trust_table(win_rates.trust_rows(fewer, answers, speeches, 0, 20))
    assert shown["length-controlled %"].tolist() == [None] and shown["longer than the reference, %"][0] == round(
        few_speeches.longer, 1
    )


def test_the_address_of_a_server_is_no_family():
    assert (
        win_rates.family("openai:mine@http://llama-server:8000/v1") == "mine"
        and win_rates.same_family("local:random-tiny", "random two-layer Llama, untrained", "Llama-3.1-8B + DPO")
        == "reference"
    )


def test_the_share_of_longer_answers_stands_beside_the_controlled_rate():
    battles, answers, speeches = study(SIX[:1], ("free",), ["anxiety"] * 20)
    words = win_rates.matched_words(answers)
    [row] = win_rates.trust_rows(battles, answers, speeches, 0, 20).itertuples()
    assert row.longer == pytest.approx(100 * (words.words > 10).mean())


def test_a_policy_may_lack_a_setting():
    battles, answers, speeches = study(SIX[:3])
    battles = battles[~((battles.policy == SIX[1]) & (battles.setting == "length"))]
    cells, table = printed(battles, answers, speeches)
    assert table.model.tolist()[:7] == [
        "w/o length constraint, against GPT-4o",
        SIX[0],
        "+ DPO",
        "+ DPO-Iter",
        "w/ length constraint, against GPT-4o",
        SIX[0],
        "+ DPO-Iter",
    ]
    assert set(win_rates.difference_rows(battles, speeches, 0, 20).query("setting == 'length'")["first"]) == {SIX[2]}
    for figure in (
        win_rates.win_rate_figure(cells, "r"),
        win_rates.topic_figure(cells, "r"),
        win_rates.fine_topic_figure(cells, speeches, "r"),
    ):
        close(figure)


def test_nothing_of_the_paper_is_in_ours(monkeypatch):
    battles, answers, speeches = study(SIX[:2])
    cells, before = printed(battles, answers, speeches)
    false = {
        setting: {model: dict.fromkeys(rates, 99.9) for model, rates in models.items()}
        for setting, models in paper_values()["table_2"].items()
    }
    monkeypatch.setattr(win_rates, "paper_values", lambda: paper_values() | {"table_2": false})
    _, after = printed(battles, answers, speeches)
    theirs = after.model.str.startswith("paper")
    pd.testing.assert_frame_equal(before[~theirs], after[~theirs])
    assert [value.marks for value in before.Overall[~theirs] if value != ""] == [
        value.marks for value in after.Overall[~theirs] if value != ""
    ], "ours are best among ours"
    assert (after[theirs & (after.Safety != "")][list(win_rates._COLUMNS.values())] == 99.9).all(axis=None) and not (
        after[~theirs] == 99.9
    ).any(axis=None)


def test_marks_are_the_papers():
    rows = [
        {"model": model, **{win_rates._COLUMNS[slug]: rate for slug, rate in rates.items()}}
        for model, rates in paper_values()["table_2"]["free"].items()
    ]
    marked = win_rates.mark_best(rows)
    assert [all("bold" in row[name].marks for name in win_rates._COLUMNS.values()) for row in marked] == [False] * 5 + [
        True
    ]
    assert [row["model"] for row in marked if "underlined" in row["Overall"].marks] == [
        model for model, rates in paper_values()["table_2"]["free"].items() if rates["overall"] > 50
    ]


def test_tables_are_printed_in_every_form():
    battles, answers, speeches = study()
    cells, table = printed(battles, answers, speeches)
    tables = [
        table,
        win_rates.cell_table(cells, "coarse topic"),
        win_rates.cell_table(cells, "fine topic"),
        win_rates.trust_table(win_rates.trust_rows(battles, answers, speeches, 0, 20)),
        win_rates.difference_table(win_rates.difference_rows(battles, speeches, 0, 20)),
        win_rates.principle_win_rates(cells),
        win_rates.compliance_table(win_rates.compliance_rows(answers)),
    ]
    assert [len(frame) for frame in tables] == [28, 120, 528, 12, 270, 24, 6]
    for frame in tables:
        for text in (
            markdown_table(frame),
            html_table(frame, "caption", Label("demo")),
            latex_table(frame, "caption", Label("demo")),
        ):
            assert "nan" not in text and "None" not in text
    assert "| 87.0 |" in markdown_table(table).replace("**", "").replace("<u>", "").replace("</u>", "")


def test_summary_rows_are_plain_numbers():
    battles, answers, speeches = study(SIX[:1])
    rows = win_rates.summary_rows(cells_of(battles, speeches), win_rates.trust_rows(battles, answers, speeches, 0, 20))
    assert [row["setting"] for row in rows] == list(SETTINGS.values()) and {
        "model",
        "Overall",
        "95% interval",
        "swap-consistent",
        "flips %",
        "length ratio",
        "n",
    } <= set(rows[0])
    assert {type(value) for row in rows for value in row.values()} <= {str, float, int}


# families, compliance, differences


@pytest.mark.parametrize(
    "name, expected",
    [
        ("openai:gpt-4o-2024-08-06", "gpt"),
        ("chatgpt-4o-latest", "gpt"),
        ("o3-mini", "gpt"),
        ("EleutherAI/gpt-neo-125m", "gpt-neo-125m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("local:/data/outputs/run/06_policy/smollm2-135m/dpo", "smollm"),
        ("Llama3-8B + DPO-Iter", "llama"),
        ("batch:claude-sonnet-4", "claude"),
        ("google/gemma-2-9b-it", "gemini"),
        ("Mistral-Nemo-Instruct-2407", "mistral"),
        ("Qwen2.5-7B-Instruct", "qwen"),
        ("choose:openai:gpt-4o", "gpt"),
        ("rules:rubric", "rubric"),
        ("reward", "reward"),
        ("deepseek-r1-distill-llama-70b", "deepseek"),
        ("openai:ollama", "ollama"),
        ("random-tiny (no language)", "random-tiny"),
        ("Phi-3.5-mini-instruct", "phi"),
        ("sophia-7b", "sophia-7b"),
        ("My-Own + DPO", "my-own"),
    ],
)
def test_families(name, expected):
    assert win_rates.family(name) == expected


def test_kin_of_the_judge():
    assert win_rates.same_family("openai:gpt-4o", "GPT-4o-2024-08-06", "gpt-3.5 + DPO") == "reference and policy"
    assert (
        win_rates.same_family("local:smollm2-135m", "SmolLM2-135M-Instruct, untrained", "Llama3-8B") == "reference"
        and win_rates.same_family("rules:rubric", "random-tiny", "random-tiny + DPO") == "neither"
    )


def test_compliance_is_a_distribution():
    ratios = np.arange(1, 21)  # words for 10 asked words
    answers = answers_of(
        [("A-1B", "length", f"s{i:03d}", n) for i, n in enumerate(ratios)]
        + [("A-1B", "free", f"s{i:03d}", 30) for i in range(20)]
        + [("reference", "free", f"s{i:03d}", 10) for i in range(20)]
    )
    [row] = win_rates.compliance_rows(answers)
    assert (
        row["median of words / asked words"] == 1.05
        and row["median without the instruction"] == 3
        and row["within 20% of the asked length, %"] == 25
        and row["n"] == 20
    )
    assert [row[f"{q}th percentile"] for q in (5, 25, 75, 95)] == [
        round(float(np.quantile(ratios / 10, q / 100)), 2) for q in (5, 25, 75, 95)
    ]


def test_differences_are_corrected_over_the_topics_of_a_pair():
    battles, _, speeches = study(
        SIX[:3],
        ("free",),
        [topic for topic in ("anxiety", "self-esteem", "marriage", "career") for _ in range(12)],
        seed=2,
    )
    rows = win_rates.difference_rows(battles, speeches, 0, 50)
    assert len(rows) == 3 * 5 and (rows.p_holm >= rows.p).all() and (rows.better + rows.worse <= rows.n).all()
    whole = rows[rows.group == "Overall"]
    assert (whole.p_holm == whole.p).all() and list(zip(whole["first"], whole.second)) == [
        (SIX[1], SIX[0]),
        (SIX[2], SIX[0]),
        (SIX[2], SIX[1]),
    ]
    a, b, c = whole.difference
    assert b - a == pytest.approx(c), "differences on the same speeches add up"
    assert win_rates.difference_table(rows)["p, Holm over topics"].isna().sum() == 3


# what cannot be right


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda b, s: (pd.concat([b, b[:1]]), s), "drop the repeated battles"),
        (lambda b, s: (b.assign(judge=["other", *b.judge[1:]]), s), "choose the rows of one judge"),
        (lambda b, s: (b.assign(setting="short"), s), "correct the setting"),
        (lambda b, s: (b.assign(order="ours first"), s), "correct the order"),
        (lambda b, s: (b, s[1:]), "pass the speeches that were judged"),
        (lambda b, s: (b, s.assign(coarse_topic="weather")), "map the topics first"),
        (lambda b, s: (b.drop(columns="judge"), s), "pass the battles as stored"),
        (lambda b, s: (b.assign(verdict="better"), s), "expected 'win', 'loss' or 'tie'"),
    ],
)
def test_wrong_frames_are_refused(spoil, message):
    battles, _, speeches = study(SIX[:1], ("free",), ["anxiety", "stress"])
    with pytest.raises(ValueError, match=message) as caught:
        cells_of(*spoil(battles, speeches))
    assert "\n" not in str(caught.value)


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="expected one of one order, swap-consistent"):
        win_rates.read_verdicts(study(SIX[:1], ("free",), ["anxiety"])[0], "both", 0)


# figures


def close(figure):
    import matplotlib.pyplot as plt

    plt.close(figure)


def overlaps(figure):
    "Find pairs of texts that cover one another; turned ones are left out, since their boxes are larger than they are."
    figure.canvas.draw()
    texts = [
        t
        for axes in figure.axes
        for t in [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.title, axes.xaxis.label]
        if t.get_text() and t.get_visible() and t.get_rotation() == 0
    ]
    shown = [(t.get_text(), t.get_window_extent()) for t in texts]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(shown, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.mark.parametrize("policies, chosen", [(SIX, ("free", "length")), (["warm"], ("length",))])
def test_labels_do_not_overlap(policies, chosen):
    battles, answers, speeches = study(policies, chosen)
    cells = cells_of(battles, speeches)
    drawn = (
        win_rates.win_rate_figure(cells, "GPT-4o-2024-08-06"),
        win_rates.topic_figure(cells, "GPT-4o-2024-08-06"),
        win_rates.fine_topic_figure(cells, speeches, "GPT-4o-2024-08-06"),
        win_rates.compliance_figure(answers),
    )
    for figure in drawn:
        assert overlaps(figure) == []
        close(figure)


def test_a_blank_answer_can_be_drawn():
    answers = answers_of(
        [
            ("A-1B", "length", "s000", 0),
            ("A-1B", "length", "s001", 12),
            ("reference", "free", "s000", 10),
            ("reference", "free", "s001", 10),
        ]
    )
    figure = win_rates.compliance_figure(answers)
    assert figure.axes[0].get_xlim()[0] > 0 and len(coarse_topics()) == 8
    close(figure)
