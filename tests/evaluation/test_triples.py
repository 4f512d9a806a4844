"""Triples tell judges that like warmth from judges that like soundness; what was not read is no preference."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.principles import principle_keys
from psycopref.core.settings import load_profile
from psycopref.core.tables import Label
from psycopref.evaluation.judging import extra_words, parse_judge, scored_verdicts
from psycopref.evaluation.triples import AGAINST, SOUND, judge_triples, preferred, read_triples, triple_contests
from psycopref.evaluation.triples import triple_counts, triple_judges, triple_table, triple_verdicts
from psycopref.models.chat import ChatReply, Failure, FreeModel
from psycopref.run.plan import TRIPLES, plan_run

PRINCIPLE_KEYS = principle_keys()

TEXTS = read_triples(200).set_index("triple_id")
OF = {TEXTS[side][name]: side for side in (SOUND, *AGAINST) for name in TEXTS.index}  # answer -> which of the three


class Replying(FreeModel):
    """A judge of one's own making: `reply` is a function of the request."""

    def __init__(self, reply):
        self.uri = self.identity = self.label = "openai:own"
        self.reply, self.asked = reply, 0

    async def answer(self, requests):
        self.asked += len(requests)
        replies = [self.reply(request) for request in requests]
        return [found if isinstance(found, Failure) else ChatReply(found) for found in replies]


@pytest.fixture
def asked(gateway, monkeypatch):
    """Ask a judge that answers by a function about n triples: counts of Table S42 by set and other side."""

    def ask(reply, n, calls=4):
        model = Replying(reply)
        monkeypatch.setattr("psycopref.feedback.battles.chat_model", lambda uri: model)
        triples, judge = read_triples(n), parse_judge("openai:own")
        verdicts, unread = triple_verdicts([judge], triples, gateway, "", "")
        assert model.asked == calls * n, "what the gateway's cache holds is not asked again"
        return triple_counts(verdicts, triples, {"openai:own": "Own"}).set_index(["set", "against"]), unread

    return ask


def saying(number: int) -> str:
    return json.dumps(dict.fromkeys([*PRINCIPLE_KEYS, "overall"], number))


def liking(*sides):
    """Prefer the answer that stands first in `sides`."""

    def reply(request):
        first, second = (sides.index(OF[request.fields[f"response_{i}"]]) for i in (1, 2))
        return saying(1 if first < second else 2)

    return reply


def test_the_package_has_at_least_eighty_triples_half_held_out_of_like_length():
    assert len(TEXTS) == TRIPLES >= 80 and TEXTS.set.value_counts().tolist() == [TRIPLES // 2] * 2
    assert len(OF) == 3 * len(TEXTS) and TEXTS.client.is_unique
    words = {side: TEXTS[side].str.split().str.len() for side in (SOUND, *AGAINST)}
    for side in AGAINST:
        assert abs(words[SOUND].mean() / words[side].mean() - 1) < 0.05
        assert 0.35 < ((words[SOUND] > words[side]) + (words[SOUND] == words[side]) / 2).mean() < 0.65


@pytest.mark.parametrize(
    "order, warm, cold",
    [
        (["warm_reinforcing", SOUND, "cold_sound"], "loss", "win"),
        (["cold_sound", SOUND, "warm_reinforcing"], "win", "loss"),
        ([SOUND, "cold_sound", "warm_reinforcing"], "win", "win"),
    ],
)
def test_what_a_judge_likes_is_found_out_in_both_orders_and_not_asked_again(asked, order, warm, cold):
    counts, unread = asked(liking(*order), 6)
    assert unread == [] and counts.n.tolist() == [3] * 4
    assert counts[warm].xs("warm_reinforcing", level="against").tolist() == [3, 3]
    assert counts[cold].xs("cold_sound", level="against").tolist() == [3, 3]
    again, _ = asked(liking(*order), 6, calls=0)
    assert again.equals(counts)


@pytest.mark.parametrize("place", [1, 2])
def test_a_judge_that_likes_a_place_prefers_nothing(asked, place):
    counts, _ = asked(lambda request: saying(place), 4)
    assert counts.tie.tolist() == [2] * 4 and counts.win.sum() == counts.loss.sum() == 0


def test_what_is_not_read_is_counted_and_no_preference(asked):
    lost = TEXTS.client.iloc[1], TEXTS.client.iloc[2]

    def reply(request):
        said, first = request.fields["client_speech"], OF[request.fields["response_1"]] == SOUND
        if said == lost[0]:
            return "Both are fine."
        return Failure("the server is gone") if said == lost[1] and first else liking(SOUND, *AGAINST)(request)

    counts, unread = asked(reply, 4)
    assert counts.unread.tolist() == [1] * 4 and counts.n.tolist() == [1] * 4 and counts.win.tolist() == [1] * 4
    assert [entry["kind"] for entry in unread].count("failed") == 2 and len(unread) == 2 + 4
    table = triple_table(counts.reset_index().assign(judge="a"), {"a": "Own"})
    assert table["sound one preferred %"].tolist() == [preferred(1, 1)] * 4


def test_a_judge_of_which_nothing_was_read_has_no_share(asked):
    counts, unread = asked(lambda request: "no", 2)
    table = triple_table(counts.reset_index().assign(judge="a"), {"a": "Own"})
    assert table["sound one preferred %"].isna().all() and table["triples"].tolist() == [0] * 4 and len(unread) == 8


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 110).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilson_s(drawn):
    wins, n = drawn
    z, p = 1.959963984540054, wins / n
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert preferred(
        wins, n
    ) == f"{100 * p:.1f} ({100 * (middle - half) + 0:.1f} to {100 * (middle + half):.1f})".replace("(-0.0", "(0.0")


def test_the_length_baseline_counts_words():
    triples = read_triples(40)
    table = triple_contests(triples)
    verdicts = scored_verdicts(parse_judge("longer"), table, extra_words(table))
    counts = triple_counts(verdicts, triples, {"longer": "longer"})
    for row in counts.itertuples():
        own = triples[triples.set == row.set]
        gap = own[SOUND].str.split().str.len() - own[row.against].str.split().str.len()
        assert (row.win, row.loss, row.tie) == ((gap > 0).sum(), (gap < 0).sum(), (gap == 0).sum())


def test_none_asks_nobody_and_a_negative_number_is_refused():
    found = judge_triples([parse_judge("openai:own")], 0, Label("tiny"), None, "", "")
    assert "judges.triples is 0" in found.sentences[0] == found.table.remark[0] and found.kept["triples"] == []
    assert "judges.triples" in one_line(lambda: load_profile("demo", {"judges.triples": -1}))


@pytest.mark.parametrize("n", [0, 4, 110, 500])
def test_the_plan_counts_what_is_asked(n):
    profile = load_profile("demo", {"judges.triples": n})
    table = triple_contests(read_triples(n))
    judges = triple_judges(profile.evaluation.judge, profile.judges.others)
    calls = [
        3 * table.speech_id.nunique() if own.kind == "reward" else len(table)
        for own in judges
        if own.place or own.kind == "reward"
    ]
    assert [row.calls for row in plan_run(profile).triples()] == (calls if n else [])


def test_whoever_is_not_named_is_asked_once():
    assert [own.spec for own in triple_judges("openai:m", ["reward:a", "longer"])] == [
        "openai:m",
        "reward:a",
        "longer",
        "reward",
        "rules:rubric",
    ]
    assert pd.Series([own.spec for own in triple_judges("rules:rubric", ["reward"])]).is_unique
