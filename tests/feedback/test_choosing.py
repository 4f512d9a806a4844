"""A ranker is judged in both orders; what it said badly is its own, what the server lost is not."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import error, good
from refusals import one_line
from test_gateway import again

from psycopref.feedback import choosing
from psycopref.feedback.choosing import COLUMNS, SHOWN_ORDERS, pair_verdicts, rank_pairs, ranker_row
from psycopref.feedback.choosing import ranker_summary, ranker_table, ranking_request, read_verdict
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway
from psycopref.models.chat import Failure
from psycopref.rater.rules import score_batch
from psycopref.stats.intervals import mean_interval

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def pairs_of(n: int, each: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "ID": [f"s{i // each}" for i in range(n)],
            "prefID": range(n),
            "question": [f"I count the stairs {i // each} times." for i in range(n)],
            "chosen": [f"It sounds tiring to count ({i}). What happens then?" for i in range(n)],
            "rejected": [f"You must stop it ({i})." for i in range(n)],
        }
    )


PAIRS = pairs_of(6)


@pytest.fixture
def ranked(gateway, scripted):
    """Rank with a model that says what a script says."""

    def rank(answer, pairs=PAIRS, **how):
        scripted(answer)
        return rank_pairs(gateway, "scripted:model", pairs, **how)

    return rank


def place_of_chosen(request) -> int:
    return 1 if request.fields["response_1"].startswith("It sounds") else 2


def number_of(request) -> int:
    return int(request.fields["response_1"].split("(")[1].split(")")[0])


# ---- what is asked ----


def test_both_orders_show_the_same_two_responses():
    pair = next(PAIRS.itertuples())
    for order, shown in zip(SHOWN_ORDERS, ([pair.chosen, pair.rejected], [pair.rejected, pair.chosen])):
        request = ranking_request(pair, order, 3, 9)
        fields = {f"response_{i}": text for i, text in enumerate(shown, 1)}
        assert request.fields == {"client_speech": pair.question} | fields
        assert all(f"Response {i}: {text}" in request.messages[0]["content"] for i, text in enumerate(shown, 1))
        assert (request.task, request.decoding.seed, request.decoding.max_tokens) == ("rank", 3, 9)


def test_a_verdict_stands_in_the_order_of_the_pairs(ranked):
    verdicts, failures = ranked(lambda request: str(place_of_chosen(request)))
    assert verdicts.columns.tolist() == ["ID", "prefID", "order", "choice", "readable", "correct"] and not failures
    asked = [(pair.ID, pair.prefID, order) for pair in PAIRS.itertuples() for order in SHOWN_ORDERS]
    assert list(zip(verdicts.ID, verdicts.prefID, verdicts.order)) == asked
    assert verdicts.choice.tolist() == [1, 2] * 6 and (verdicts.correct == 1).all()


def test_the_rubric_ranks_by_its_scores(gateway):
    verdicts, _ = rank_pairs(gateway, "rules:rubric", PAIRS)
    asked = [[(p.question, text) for text in (p.chosen, p.rejected)] for p in PAIRS.itertuples()]
    known = score_batch(pair for both in asked for pair in both)
    sums = [[sum(known[pair].scores.values()) for pair in both] for both in asked]
    assert (verdicts.correct == 1).all() and all(chosen > rejected for chosen, rejected in sums)
    swapped, _ = rank_pairs(gateway, "rules:rubric", PAIRS.rename(columns={"chosen": "rejected", "rejected": "chosen"}))
    assert (swapped.correct == 0).all() and gateway.counts["rules:rubric"]["calls"] == 12, "the same twelve questions"


@few
@given(st.integers(1, 13), st.integers(1, 15))
def test_verdicts_are_the_same_in_any_blocks(tmp_path_factory, n, block):
    gateway = Gateway(ReplyCache(tmp_path_factory.getbasetemp() / "any blocks.sqlite"))
    whole, parts = (rank_pairs(gateway, "rules:rubric", pairs_of(n, 1), block=size)[0] for size in (256, block))
    assert parts.equals(whole)
    gateway.cache.close()


def test_requests_are_made_as_the_work_goes_on(ranked, monkeypatch):
    built, answered, held = [], [], []
    monkeypatch.setattr(choosing, "ranking_request", lambda *how: built.append(0) or ranking_request(*how))

    def answer(request):
        answered.append(0)
        held.append(len(built) - len(answered))
        return "1"

    ranked(answer, pairs_of(400), block=8)
    assert len(answered) == len(built) == 800 and max(held) < 16 * 12, "a few blocks of 16 calls, and not all 800"


# ---- what is said ----


def summary_of(ranked, answer, pairs=PAIRS) -> dict:
    return ranker_summary(ranked(answer, pairs)[0], samples=50)


replies = st.sampled_from([1, 2, None])


@few
@given(st.lists(st.tuples(replies, replies), min_size=2, max_size=20))
def test_the_summary_is_what_one_counts_by_hand(told):
    pairs = pairs_of(len(told)).itertuples()
    rows = [read_verdict(pair, order, str(n)) for pair, two in zip(pairs, told) for order, n in zip(SHOWN_ORDERS, two)]
    summary = ranker_summary(pd.DataFrame(rows).astype(COLUMNS).sample(frac=1, random_state=0), samples=60)
    read = [c for two in told for c in two if c]
    clear = [two for two in told if None not in two]
    same = [two for two in clear if two[0] != two[1]]  # the same winner stands once first and once second
    points = [(0.5 if a is None else float(a == 1), 0.5 if b is None else float(b == 2)) for a, b in told]
    expected = {
        "accuracy": points,
        "unreadable": [c is None for two in told for c in two],
        "position_1": [c == 1 for c in read],
        "same_winner": [two in same for two in clear],
        "accuracy_same_winner": [two == (1, 2) for two in same],
        "accuracy_readable": [p for pt, two in zip(points, told) for p, c in zip(pt, two) if c],
    }
    for key, values in expected.items():
        assert summary[key] == (pytest.approx(float(np.mean(values))) if values else None), key
    assert json.loads(json.dumps(summary)) == summary and summary["pairs"] == len(told)
    if len(told) > 2:
        assert summary["low"] - 1e-9 <= summary["accuracy"] <= summary["high"] + 1e-9


def test_the_interval_draws_whole_speeches(ranked):
    right, speeches = np.array([1.0, 1, 0, 0, 0, 0]), np.array(["s0", "s0", "s1", "s1", "s2", "s2"])

    def answer(request):
        return str(place_of_chosen(request) if number_of(request) < 2 else 3 - place_of_chosen(request))

    summary = summary_of(ranked, answer)
    assert (summary["low"], summary["high"]) == mean_interval(right, speeches, samples=50)


# ---- what is lost ----


def test_a_failed_call_is_no_bad_reply(ranked):
    """The other order of its pair alone would show the model's liking for a place as a merit."""

    def answer(request):
        if number_of(request) != 3:
            return "1"
        return Failure("timed out", "half") if place_of_chosen(request) == 2 else "both"

    verdicts, failures = ranked(answer, coverage=0.8)
    lost = {"ID": "s1", "prefID": 3, "order": "rejected first", "reason": "timed out", "raw": "half"}
    assert failures == [lost] and len(verdicts) == 11 and verdicts.readable.sum() == 10
    summary = ranker_summary(verdicts, failures, samples=50)
    expected = {"accuracy": 0.5, "position_1": 1.0, "unreadable": 0.0, "pairs": 5, "failed_calls": 1}
    assert {key: summary[key] for key in expected} == expected
    assert pair_verdicts(verdicts).prefID.tolist() == [0, 1, 2, 4, 5]


def test_coverage_counts_pairs_with_both_orders(ranked):
    def losing(lost):
        failed = Failure("content filter")
        return lambda request: failed if number_of(request) < lost and place_of_chosen(request) == 1 else "1"

    assert len(ranked(losing(1), pairs_of(50))[1]) == 1
    message = one_line(lambda: ranked(losing(2), pairs_of(50)))
    assert all(said in message for said in ("48 of 50 pairs", "96.0%", "98.0%", "content filter", "scripted:model"))
    assert len(ranked(losing(2), pairs_of(50), coverage=0.9)[1]) == 2


def test_a_server_that_fails_is_refused_and_asked_again_only_for_what_is_missing(server, gateway):
    server.behave = lambda text, attempt: error(400) if "(4)" in text or "(5)" in text else good("2")
    message = one_line(lambda: rank_pairs(gateway, server.uri, PAIRS))
    assert "4 of 6 pairs" in message and "400" in message and len(server.log) == 12
    server.behave = lambda text, attempt: good("2")
    later = again(gateway)
    verdicts, failures = rank_pairs(later, server.uri, PAIRS)
    assert len(verdicts) == 12 and not failures and len(server.log) == 16
    third = again(later)
    assert rank_pairs(third, server.uri, PAIRS)[0].equals(verdicts) and len(server.log) == 16, "nothing is asked twice"
    assert third.counts[server.uri]["calls"] == 0 and third.counts[server.uri]["cached"] == 12


def test_no_pairs_and_pairs_that_stand_there_twice_are_refused(gateway):
    assert "found 0 pairs" in one_line(lambda: rank_pairs(gateway, "rules:rubric", PAIRS.head(0)))
    assert "6 of them twice" in one_line(lambda: rank_pairs(gateway, "rules:rubric", pd.concat([PAIRS, PAIRS])))
    none = pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    assert "no pair" in one_line(lambda: ranker_summary(none))


# ---- how it is shown ----


def test_rows_stand_in_percent_and_empty_cells_stay_empty(ranked):
    first, garbage = summary_of(ranked, lambda request: "1"), summary_of(ranked, lambda request: "?", PAIRS.head(2))
    row = ranker_row("first", first)
    low, high = map(float, row.pop("95% interval").split(" to "))
    assert low + high == 100 and 0 < low < 50
    known = {"model": "first (0% unreadable)", "kind": "LLM as ranker", "accuracy %": 50.0, "pairs": 6}
    assert row == known | {"AUC": None, "ECE": None, "Brier": None}
    table = ranker_table({"first": first, "one speech": garbage}).set_index("ranker")
    assert table.loc["first", ["first shown chosen %", "accuracy where the same %"]].tolist() == [100.0, None]
    assert table.loc["one speech", "unreadable %"] == 100.0
