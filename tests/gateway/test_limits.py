"""Limit and budget under any order of events: never too many inside, nobody forgotten, not a cent above the budget."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.gateway.limits import FAST_SECONDS, AdaptiveLimit, Budget, pause

some = settings(max_examples=150, deadline=None, derandomize=True, database=None)


async def breathe(n=4):
    for _ in range(n):
        await asyncio.sleep(0)


# ---- calls in flight ----

calls = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([0.01, 0.3, 2.0]), st.booleans(), st.booleans()), max_size=60
)


@some
@given(st.integers(1, 9), st.integers(1, 9), calls)
def test_a_limit_forgets_nobody_and_lets_nobody_slip_in(most, start, planned):
    """Each call takes some turns and is answered or refused; some give up, waiting or inside."""

    async def play():
        limit, inside, came = AdaptiveLimit(most, start), 0, []

        async def call(i, turns, seconds, refused):
            nonlocal inside
            async with limit:
                inside += 1
                came.append(i)
                try:
                    assert inside <= limit.limit or limit.unheard > 0, "more than there is room for, and no cut before"
                    await breathe(turns)
                    limit.note(seconds, refused)
                    assert 1 <= limit.limit <= most
                finally:
                    inside -= 1

        tasks = [asyncio.create_task(call(i, *how)) for i, (*how, _) in enumerate(planned)]
        await breathe(5)
        for task in [task for task, (*_, leaves) in zip(tasks, planned) if leaves][::2]:
            task.cancel()
        for done in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20):
            assert done is None or isinstance(done, asyncio.CancelledError), done
        assert inside == 0 == limit.places.borrowed_tokens and came == sorted(came), "first come, first served"

    asyncio.run(play())


def rounds(limit, n=1, seconds=0.3, refused=False):
    """n rounds of as many answers as may be in flight."""
    for _ in range(n):
        for _ in range(limit.limit):
            limit.note(seconds, refused)
    return limit.limit


def test_a_limit_doubles_until_it_is_refused_and_then_grows_by_one():
    limit = AdaptiveLimit(1000, 4)
    assert [rounds(limit) for _ in range(4)] == [8, 16, 32, 64]
    limit.note(0.3, True)
    assert limit.limit == 32 and [rounds(limit) for _ in range(3)] == [33, 34, 35]
    assert rounds(limit, 1000) == 1000, "up to the ceiling, and no further"
    assert rounds(AdaptiveLimit(64), 1, refused=True) == 1, "refused again and again"


def test_calls_that_were_in_flight_at_a_cut_are_no_reason_for_another():
    async def play():
        limit, seen = AdaptiveLimit(64, 64), []

        async def refused():
            async with limit:
                await asyncio.sleep(0.01)
                limit.note(0.01, True)
                seen.append(limit.limit)

        for n in (64, 32):
            await asyncio.gather(*(refused() for _ in range(n)))
        return seen

    assert asyncio.run(play()) == [32] * 64 + [16] * 32


def test_slower_answers_hold_the_limit_and_noise_does_not():
    limit = AdaptiveLimit(256, 32)
    assert [rounds(limit, 1, seconds) for seconds in (0.3, 0.59, 0.9, 0.3)] == [64, 128, 128, 256]
    assert rounds(AdaptiveLimit(256, 32), 3, 2 * FAST_SECONDS) == 256, "nobody is overrun who answers at once"


# ---- budget ----

cents = st.integers(0, 400)


@some
@given(
    st.integers(0, 1000),
    st.integers(0, 300),
    st.lists(st.tuples(cents, st.integers(0, 100), st.booleans()), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_a_budget_is_never_overdrawn_and_nobody_waits_for_ever(limit, spent, planned, chance):
    """Cents, so that sums are exact; a call costs a share of its most, some give up while they wait."""

    async def play():
        budget, inside, refused = Budget(limit, spent), {}, []

        def check():
            assert budget.in_flight == len(inside) and budget.reserved == sum(planned[i][0] for i in inside)
            assert budget.spent + budget.reserved <= max(limit, spent)

        async def call(i):
            try:
                await budget.reserve(planned[i][0], "a shop")
            except StudyError:
                assert not inside and budget.spent + planned[i][0] > limit, "refused though it would fit later"
                refused.append(i)
                return
            inside[i] = asyncio.Event()
            check()
            await inside[i].wait()
            del inside[i]
            budget.settle(planned[i][0], planned[i][0] * planned[i][1] // 100)
            check()

        tasks = [asyncio.create_task(call(i)) for i in range(len(planned))]
        await breathe()
        for i, (_, _, gives_up) in enumerate(planned):
            if gives_up and i not in inside and chance.random() < 0.5:
                tasks[i].cancel()
        while not all(task.done() for task in tasks):
            assert inside, "all wait and nobody is left to wake them"
            inside[chance.choice(sorted(inside))].set()
            await breathe(chance.randrange(1, 5))
            await breathe(0 if inside else 4)
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                task.result()
        assert budget.reserved == 0 == budget.in_flight and (refused or budget.spent <= max(limit, spent))

    asyncio.run(play())


def test_a_budget_loses_nothing_to_rounding():
    async def play():
        budget, prices = Budget(1000.0), [0.1 * n for n in range(1, 60)]
        await asyncio.gather(*(budget.reserve(price, "a shop") for price in prices))
        for price in prices:
            budget.settle(price, price / 3)
        return budget

    budget = asyncio.run(play())
    assert budget.reserved == 0.0 and budget.spent == pytest.approx(sum(0.1 * n for n in range(1, 60)) / 3)


# ---- pauses ----


def test_pauses_are_spread_so_that_calls_do_not_come_back_as_one():
    for bounds, pauses in (
        ((1.0, 2.0), {pause(3) for _ in range(50)}),
        ((2.0, 2.5), {pause(3, 2.0) for _ in range(50)}),
    ):
        assert len(pauses) > 40 and bounds[0] <= min(pauses) <= max(pauses) <= bounds[1]
