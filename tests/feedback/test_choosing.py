"""A ranker is judged in both orders; what it said badly is its own, what the server lost is not."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.feedback import choosing as ranking
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, Failure, FreeModel
from psycopref.gateway.gateway import Gateway
from psycopref.stats.intervals import mean_interval
from psycopref.core.prompts import parse_choice
from psycopref.feedback.choosing import (
    SHOWN_ORDERS,
    pair_verdicts,
    rank_pairs,
    ranker_row,
    ranker_summary,
    ranker_table,
    ranking_request,
    read_choice,
)
from psycopref.rater.rubric import rubric_scores

from chat_server import start_server
from refusals import one_line
from test_gateway import again, completion, error, gateway, server  # noqa: F401 (fixtures)

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def pairs_of(n: int, each: int = 2) -> pd.DataFrame:
    return pd.DataFrame({"ID": [f"s{i // each}" for i in range(n)], "prefID": range(n), "question": [f"I count the stairs {i // each} times." for i in range(n)],
                         "chosen": [f"It sounds tiring to count ({i}). What happens then?" for i in range(n)], "rejected": [f"You must stop it ({i})." for i in range(n)]})  # fmt: skip


PAIRS = pairs_of(6)


class Scripted(FreeModel):
    """Answer by a function of the request; a Failure in its place is one."""

    made = itertools.count()

    def __init__(self, answer):
        self.uri, self.label, self.identity = "x:ranker", "a ranker", f"x:ranker#{next(self.made)}"
        self.script, self.requests = answer, []

    async def answer(self, requests):
        self.requests += requests
        return [reply if isinstance(reply, Failure) else ChatReply(reply) for reply in map(self.script, requests)]


@pytest.fixture
def ranked(gateway, monkeypatch):  # noqa: F811
    """Rank with a scripted model."""

    def rank(answer, pairs=PAIRS, **how):
        model = Scripted(answer)
        monkeypatch.setattr(ranking, "chat_model", lambda uri: model)
        return *rank_pairs(gateway, "x:ranker", pairs, **how), model

    return rank


def place_of_chosen(request) -> int:
    return 1 if request.fields["response_1"].startswith("It sounds") else 2


# ---- what is asked ----


def test_both_orders_show_the_same_two_responses():
    for pair in PAIRS.itertuples():
        forward, backward = (ranking_request(pair, order, 3, 9) for order in SHOWN_ORDERS)
        assert forward.fields == {
            "client_speech": pair.question,
            "response_1": pair.chosen,
            "response_2": pair.rejected,
        }
        assert backward.fields == {
            "client_speech": pair.question,
            "response_1": pair.rejected,
            "response_2": pair.chosen,
        }
        for request in (forward, backward):
            text = request.messages[0]["content"]
            assert all(f"Response {i}: {request.fields[f'response_{i}']}" in text for i in (1, 2)) and (
                request.task,
                request.decoding.seed,
                request.decoding.max_tokens,
            ) == ("rank", 3, 9)


def test_a_verdict_stands_in_the_order_of_the_pairs(ranked):
    verdicts, failures, model = ranked(lambda request: str(place_of_chosen(request)))
    assert verdicts.columns.tolist() == ["ID", "prefID", "order", "choice", "readable", "correct"] and not failures
    assert list(zip(verdicts.ID, verdicts.prefID, verdicts.order)) == [
        (p.ID, p.prefID, order) for p in PAIRS.itertuples() for order in SHOWN_ORDERS
    ]
    assert verdicts.choice.tolist() == [1, 2] * 6 and (verdicts.correct == 1).all() and len(model.requests) == 12


def test_the_rubric_ranks_by_its_scores(gateway):  # noqa: F811
    verdicts, _ = rank_pairs(gateway, "rules:rubric", PAIRS)
    better = [
        sum(rubric_scores(p.question, p.chosen).values()) > sum(rubric_scores(p.question, p.rejected).values())
        for p in PAIRS.itertuples()
    ]
    assert verdicts.correct.tolist() == np.repeat(better, 2).astype(float).tolist() and all(better)
    swapped, _ = rank_pairs(gateway, "rules:rubric", PAIRS.rename(columns={"chosen": "rejected", "rejected": "chosen"}))
    assert (verdicts.correct + swapped.correct == 1).all() and gateway.counts["rules:rubric"]["calls"] == 12, (
        "the same twelve questions"
    )


@few
@given(st.integers(1, 13), st.integers(1, 15))
def test_verdicts_are_the_same_in_any_blocks(tmp_path_factory, n, block):
    gateway = Gateway(ReplyCache(tmp_path_factory.getbasetemp() / "any blocks.sqlite"))  # noqa: F811
    pairs = pairs_of(n, 1)
    assert rank_pairs(gateway, "rules:rubric", pairs, block=block)[0].equals(
        rank_pairs(gateway, "rules:rubric", pairs)[0]
    )
    gateway.cache.close()


def test_requests_are_made_as_the_work_goes_on(ranked, monkeypatch):
    built, held = [], []

    def request(*arguments):
        built.append(0)
        return ranking_request(*arguments)

    monkeypatch.setattr(ranking, "ranking_request", request)
    answered = []

    def answer(asked):
        answered.append(0)
        held.append(len(built) - len(answered))
        return "1"

    ranked(answer, pairs_of(400), block=8)
    assert len(answered) == len(built) == 800 and max(held) < 16 * 12, "a few blocks of 16 calls, and not all 800"


# ---- what is said ----


def test_always_the_first_is_half_right_and_its_row_tells_why(ranked):
    summary = ranker_summary(ranked(lambda request: "1")[0], samples=50)
    assert summary == {"pairs": 6, "speeches": 3, "failed_calls": 0, "accuracy": 0.5, "low": 0.5, "high": 0.5, "accuracy_readable": 0.5, "unreadable": 0.0, "position_1": 1.0,
                       "same_winner": 0.0, "accuracy_same_winner": None}  # fmt: skip
    assert ranker_summary(ranked(lambda request: "2", PAIRS.assign(ID="t"))[0], samples=50) | {"low": 0} == summary | {
        "speeches": 1,
        "position_1": 0.0,
        "low": 0,
        "high": None,
    }


def test_garbage_is_counted_and_worth_a_coin(ranked):
    def answer(request):  # chosen first: garbage for half of the pairs, else right; rejected first: always right
        number = int(request.fields["response_1"].split("(")[1].split(")")[0])
        return (
            ("both are kind", "1 or 2")[number % 4 // 2]
            if number % 2 and place_of_chosen(request) == 1
            else str(place_of_chosen(request))
        )

    verdicts, failures, _ = ranked(answer)
    summary = ranker_summary(verdicts, failures, samples=50)
    assert (
        not failures
        and verdicts.readable.tolist() == [True, True, False, True] * 3
        and verdicts.correct.tolist() == [1.0, 1.0, 0.5, 1.0] * 3
    )
    assert verdicts.choice.isna().tolist() == [False, False, True, False] * 3
    assert (summary["unreadable"], summary["accuracy"], summary["accuracy_readable"]) == (0.25, 0.875, 1.0)
    assert (summary["same_winner"], summary["accuracy_same_winner"]) == (1.0, 1.0) and summary[
        "position_1"
    ] == pytest.approx(1 / 3)
    assert ranker_row("r", summary)["model"] == "r (25% unreadable)"


def test_nothing_but_garbage_is_a_coin_and_no_choice(ranked):
    summary = ranker_summary(ranked(lambda request: "I can't decide.")[0], samples=50)
    assert summary["accuracy"] == 0.5 and summary["unreadable"] == 1.0
    assert [summary[key] for key in ("accuracy_readable", "position_1", "same_winner", "accuracy_same_winner")] == [
        None
    ] * 4


def test_a_steady_ranker_that_is_wrong(ranked):
    summary = ranker_summary(ranked(lambda request: str(3 - place_of_chosen(request)))[0], samples=50)
    assert (summary["accuracy"], summary["position_1"], summary["same_winner"], summary["accuracy_same_winner"]) == (
        0.0,
        0.5,
        1.0,
        0.0,
    )


replies = st.sampled_from([1, 2, None])


@few
@given(st.lists(st.tuples(replies, replies), min_size=2, max_size=20))
def test_the_summary_is_what_one_counts_by_hand(told):
    rows = [
        ranking.read_verdict(pair, order, choice)
        for pair, two in zip(pairs_of(len(told)).itertuples(), told)
        for order, choice in zip(SHOWN_ORDERS, two)
    ]
    frame = pd.DataFrame(rows).astype(ranking.COLUMNS)
    summary, read = (
        ranker_summary(frame.sample(frac=1, random_state=0), samples=60),
        [c for two in told for c in two if c],
    )
    clear = [two for two in told if None not in two]
    same = [two for two in clear if two[0] != two[1]]  # the same winner stands once first and once second
    points = [(0.5 if a is None else float(a == 1), 0.5 if b is None else float(b == 2)) for a, b in told]

    def share(values):
        return float(np.mean(values)) if len(values) else None

    expected = {"accuracy": share(points), "unreadable": 1 - len(read) / (2 * len(told)), "position_1": share([c == 1 for c in read]), "same_winner": share([two in same for two in clear]),
                "accuracy_same_winner": share([two == (1, 2) for two in same]), "accuracy_readable": share([p for pt, two in zip(points, told) for p, c in zip(pt, two) if c])}  # fmt: skip
    for key, value in expected.items():
        assert summary[key] == (value if value is None else pytest.approx(value)), key
    assert json.loads(json.dumps(summary)) == summary and summary["pairs"] == len(told)
    if len(told) > 2:
        assert summary["low"] <= summary["accuracy"] + 1e-9 and summary["high"] >= summary["accuracy"] - 1e-9


def test_the_interval_draws_whole_speeches(ranked):
    verdicts = ranked(
        lambda request: str(
            place_of_chosen(request)
            if "(0)" in str(request.fields) or "(1)" in str(request.fields)
            else 3 - place_of_chosen(request)
        )
    )[0]
    summary = ranker_summary(verdicts, samples=200)
    assert (summary["low"], summary["high"]) == mean_interval(
        np.array([1.0, 1, 0, 0, 0, 0]), np.array(["s0", "s0", "s1", "s1", "s2", "s2"]), samples=200
    )


# ---- what is lost ----


def test_a_failed_call_is_no_bad_reply(ranked):
    """The other order of its pair alone would show the model's liking for a place as a merit."""

    def answer(request):
        if "(3)" not in request.fields["response_1"]:
            return "1"
        return Failure("timed out", "half") if place_of_chosen(request) == 2 else "both"

    verdicts, failures, _ = ranked(answer, coverage=0.8)
    assert (
        failures == [{"ID": "s1", "prefID": 3, "order": "rejected first", "reason": "timed out", "raw": "half"}]
        and len(verdicts) == 11
        and verdicts.readable.sum() == 10
    )
    summary = ranker_summary(verdicts, failures, samples=50)
    assert (
        summary["accuracy"],
        summary["position_1"],
        summary["unreadable"],
        summary["pairs"],
        summary["failed_calls"],
    ) == (0.5, 1.0, 0.0, 5, 1)
    assert pair_verdicts(verdicts).prefID.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("lost, passes", [(1, True), (2, False)])
def test_coverage_counts_pairs_with_both_orders(ranked, lost, passes):
    pairs = pairs_of(50)

    def answer(request):
        number = int(request.fields["response_1"].split("(")[1].split(")")[0])
        return Failure("content filter") if number < lost and place_of_chosen(request) == 1 else "1"

    if passes:
        assert len(ranked(answer, pairs)[1]) == lost
    else:
        message = one_line(lambda: ranked(answer, pairs))
        assert (
            "48 of 50 pairs" in message
            and "96.0%" in message
            and "98.0%" in message
            and "content filter" in message
            and "x:ranker" in message
        )
        assert len(ranked(answer, pairs, coverage=0.9)[1]) == 2


def test_a_server_that_fails_is_refused_and_asked_again_only_for_what_is_missing(server, gateway):  # noqa: F811
    server.behave = lambda text, attempt: error(400) if "(4)" in text or "(5)" in text else completion("2")
    message = one_line(lambda: rank_pairs(gateway, server.uri, PAIRS))
    assert "4 of 6 pairs" in message and "400" in message and len(server.log) == 12
    server.behave = lambda text, attempt: completion("2")
    later = again(gateway)
    verdicts, failures = rank_pairs(later, server.uri, PAIRS)
    assert (
        len(verdicts) == 12
        and not failures
        and len(server.log) == 16
        and ranker_summary(verdicts, samples=20)["position_1"] == 0.0
    )
    third = again(later)
    assert rank_pairs(third, server.uri, PAIRS)[0].equals(verdicts) and len(server.log) == 16, "nothing is asked twice"
    assert third.counts[server.uri]["calls"] == 0 and third.counts[server.uri]["cached"] == 12


def test_a_server_that_goes_away_is_one_line_and_what_it_said_is_kept(tmp_path, gateway, monkeypatch):  # noqa: F811
    from psycopref.gateway.gateway import chat_model

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ranking, "chat_model", lambda uri: chat_model(uri, max_retries=0, timeout=5))
    pairs = pairs_of(60)
    with start_server(tmp_path, latency=0, calls=25) as running:
        uri = running.uri("m")
        message = one_line(lambda: rank_pairs(gateway, uri, pairs, block=4))
        answered = {event["key"] for event in running.log() if event["event"] == "answered"}
    kept = gateway.cache.db.execute("SELECT count(*) FROM replies").fetchone()[0]
    assert "kept" in message and uri in message and 25 <= len(answered) == kept


def test_no_pairs_and_pairs_that_stand_there_twice_are_refused(gateway):  # noqa: F811
    assert "found 0 pairs" in one_line(lambda: rank_pairs(gateway, "rules:rubric", PAIRS.head(0)))
    assert "6 of them twice" in one_line(lambda: rank_pairs(gateway, "rules:rubric", pd.concat([PAIRS, PAIRS])))
    none = pd.DataFrame(columns=list(ranking.COLUMNS)).astype(ranking.COLUMNS)
    assert "no pair" in one_line(lambda: ranker_summary(none))


# ---- how it is shown ----


@few
@given(st.text(max_size=40))
def test_a_reply_is_read_as_the_parser_reads_it(text):
    choice = read_choice(ChatReply(text))
    assert choice in (1, 2, None) and (choice is None or parse_choice(text) == choice)


def test_rows_stand_in_percent_and_empty_cells_stay_empty(ranked):
    summaries = {
        "first": ranker_summary(ranked(lambda request: "1")[0], samples=20),
        "one speech": ranker_summary(ranked(lambda request: "?", PAIRS.head(2))[0]),
    }
    row = ranker_row("first", summaries["first"])
    low, high = map(float, row.pop("95% interval").split(" to "))
    assert low + high == 100 and 0 < low < 50
    assert row == {
        "model": "first (0% unreadable)",
        "kind": "LLM as ranker",
        "accuracy %": 50.0,
        "AUC": None,
        "ECE": None,
        "Brier": None,
        "pairs": 6,
    }
    table = ranker_table(summaries).set_index("ranker")
    assert (
        table.loc["first", "first shown chosen %"] == 100.0 and table.loc["first", "accuracy where the same %"] is None
    )
    assert table.loc["one speech", "unreadable %"] == 100.0
