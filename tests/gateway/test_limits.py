"""Pace and purse under any order of events: never too many inside, first come first served, nobody forgotten, not a cent above the budget."""

import asyncio
import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.gateway.limits import FIRST_PAUSE, LONGEST_AFTER, LONGEST_PAUSE, QUICK, Pace, Purse, pause

some = settings(max_examples=150, deadline=None, derandomize=True, database=None)


async def breathe(n=4):
    for _ in range(n):
        await asyncio.sleep(0)


# ---- pace ----

steps = st.lists(st.one_of(
    st.just(("enter",)), st.tuples(st.sampled_from(["leave", "cancel", "break"]), st.integers(0, 30)),
    st.tuples(st.just("note"), st.sampled_from([0.01, 0.3, 0.31, 2.0]), st.booleans()), st.just(("breathe",)), st.just(("tick",))), max_size=80)  # fmt: skip


class Crowd:
    """Callers that stay inside until they are told to leave."""

    def __init__(self, pace):
        self.pace, self.tasks, self.doors, self.came, self.inside, self.left = pace, [], [], [], set(), set()

    async def caller(self, i):
        async with self.pace:
            self.came.append(i)
            self.inside.add(i)
            try:
                assert len(self.inside) <= self.pace.flying
                await self.doors[i].wait()
                if i in self.left:
                    raise ZeroDivisionError
            finally:
                self.inside.discard(i)

    def enter(self):
        self.doors.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self.caller(len(self.tasks))))

    def act(self, step):
        kind, *rest = step
        if kind == "enter":
            self.enter()
        elif kind == "note":
            self.pace.note(*rest)
        elif self.tasks and rest:
            i = rest[0] % len(self.tasks)
            if kind == "cancel":
                self.tasks[i].cancel()
            elif i in self.inside:
                self.left |= {i} if kind == "break" else set()
                self.doors[i].set()

    def check(self):
        """What holds whenever nobody moves."""
        waiting = [turn for turn in self.pace.queue if not turn.done()]
        assert self.pace.flying == len(self.inside) and (not waiting or self.pace.flying >= self.pace.limit), (
            "somebody was forgotten"
        )
        assert self.came == sorted(self.came), "first come, first served"
        assert 1 <= self.pace.limit <= self.pace.most


@some
@given(st.integers(1, 6), st.integers(1, 6), steps)
def test_a_pace_forgets_nobody_and_lets_nobody_slip_in(most, start, actions):
    async def play():
        pace = Pace(most, start)
        crowd = Crowd(pace)
        for step in actions:
            before = len(crowd.inside)
            crowd.act(step)
            if step[0] == "tick":
                await asyncio.sleep(0)
            if step[0] == "breathe":
                await breathe()
                crowd.check()
                assert len(crowd.inside) <= max(before, math.ceil(pace.limit), most if before > pace.limit else 0)
        await breathe()
        crowd.check()
        while not all(task.done() for task in crowd.tasks):
            for i in sorted(crowd.inside):
                crowd.doors[i].set()
            await breathe()
            crowd.check()
            assert crowd.inside or all(task.done() for task in crowd.tasks), (
                "nobody is inside and somebody waits for ever"
            )
        assert pace.flying == 0 and not pace.queue
        await asyncio.gather(*crowd.tasks, return_exceptions=True)

    asyncio.run(play())


@some
@given(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=20))
def test_at_each_admission_there_is_room(most, leaving):
    async def play():
        pace, inside = Pace(most, most), 0

        async def caller(turns):
            nonlocal inside
            async with pace:
                inside += 1
                assert inside <= pace.limit
                await breathe(turns)
                inside -= 1

        await asyncio.gather(*(caller(turns) for turns in leaving))
        assert pace.flying == inside == 0

    asyncio.run(play())


def test_who_goes_at_the_very_moment_of_its_turn_hands_it_on():
    async def play():
        crowd = Crowd(pace := Pace(1))
        for _ in range(3):
            crowd.enter()
            await breathe()
        crowd.doors[0].set()
        while pace.queue and not (passed := len(pace.queue) == 1):
            await asyncio.sleep(0)
        assert passed and crowd.came == [0], "the second has its turn and does not know it yet"
        crowd.tasks[1].cancel()
        await breathe()
        assert crowd.came == [0, 2] and pace.flying == 1
        crowd.doors[2].set()
        await breathe()
        assert pace.flying == 0

    asyncio.run(play())


def rounds(pace, n, seconds=0.3, refused=False):
    """n rounds of as many answers as may be in flight."""
    for _ in range(n):
        for _ in range(math.ceil(pace.limit)):
            pace.note(seconds, refused)
    return pace.limit


def test_a_pace_doubles_until_it_is_hurt_and_then_grows_by_a_tenth():
    pace = Pace(1000, 4)
    assert [rounds(pace, 1) for _ in range(4)] == [8, 16, 32, 64]
    pace.note(0.3, True)
    assert pace.limit == 32
    assert rounds(pace, 1) == pytest.approx(32 * 1.1 + 1) and rounds(pace, 1) == pytest.approx((32 * 1.1 + 1) * 1.1 + 1)
    assert rounds(pace, 100) == 1000, "up to the ceiling, and no further"


def test_one_cut_for_each_round():
    pace = Pace(64, 64)
    for _ in range(20):
        pace.note(0.1, True)
    assert pace.limit == 32, "the others were in flight when the first was refused"
    for _ in range(13):
        pace.note(0.1, True)
    assert pace.limit == 16
    assert rounds(pace, 50, refused=True) == 1


def test_slower_answers_slow_the_pace_and_noise_does_not():
    pace = Pace(256, 32)
    rounds(pace, 2, 0.3)
    assert rounds(pace, 1, 0.59) > 128, "less than twice as slow"
    before = pace.limit
    assert rounds(pace, 1, 0.9) == pytest.approx(before * 0.8)
    quick = Pace(256, 32)
    rounds(quick, 1, 0.001)
    assert rounds(quick, 3, 2 * QUICK) == 256, "nobody is overrun who answers at once"


@some
@given(st.integers(1, 300), st.lists(st.tuples(st.floats(0, 200), st.booleans()), max_size=300))
def test_a_limit_stays_between_one_and_the_ceiling(most, answers):
    pace = Pace(most)
    for answer in answers:
        pace.note(*answer)
        assert 1 <= pace.limit <= most


# ---- purse ----

cents = st.integers(0, 400)


@some
@given(
    st.integers(0, 1000),
    st.integers(0, 300),
    st.lists(st.tuples(cents, st.integers(0, 100), st.booleans()), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_a_purse_is_never_overdrawn_and_nobody_waits_for_ever(budget, spent, calls, chance):
    """Cents, so that sums are exact; a call costs a share of its most, some give up while they wait."""

    async def play():
        purse, inside, refused = Purse(budget, spent), {}, []

        def check():
            assert (
                purse.reserved >= 0
                and purse.flying == len(inside)
                and (not inside or purse.reserved == sum(calls[i][0] for i in inside))
            )
            assert purse.spent + purse.reserved <= max(budget, spent)

        async def call(i):
            try:
                await purse.reserve(calls[i][0], "a shop")
            except StudyError:
                assert not inside and purse.spent + calls[i][0] > budget, (
                    "refused though it would fit once the others are over"
                )
                refused.append(i)
                return
            inside[i] = asyncio.Event()
            check()
            await inside[i].wait()
            del inside[i]
            purse.settle(calls[i][0], calls[i][0] * calls[i][1] // 100)
            check()

        tasks = [asyncio.create_task(call(i)) for i in range(len(calls))]
        await breathe()
        for i, (_, _, gives_up) in enumerate(calls):
            if gives_up and i not in inside and chance.random() < 0.5:
                tasks[i].cancel()
        while not all(task.done() for task in tasks):
            assert inside, "all wait and nobody is left to wake them"
            inside[chance.choice(sorted(inside))].set()
            await breathe(chance.randrange(1, 5))
            await breathe(0 if inside else 4)
        for task in tasks:
            if not task.cancelled():
                task.result()
        assert purse.reserved == 0 and purse.flying == 0 and (refused or purse.spent <= max(budget, spent))

    asyncio.run(play())


def test_a_purse_loses_nothing_to_rounding():
    async def play():
        purse = Purse(1000.0)
        prices = [0.1 * n for n in range(1, 60)]
        await asyncio.gather(*(purse.reserve(price, "a shop") for price in prices))
        for price in prices:
            purse.settle(price, price / 3)
        return purse

    purse = asyncio.run(play())
    assert purse.reserved == 0.0 and purse.spent == pytest.approx(sum(0.1 * n for n in range(1, 60)) / 3)


def test_a_waiting_call_that_is_cancelled_takes_nobody_s_turn():
    async def play():
        purse = Purse(1.0)
        await purse.reserve(1.0, "a shop")
        waiting = [asyncio.create_task(purse.reserve(0.5, "a shop")) for _ in range(4)]
        await breathe()
        waiting[0].cancel(), waiting[2].cancel()
        purse.settle(1.0, 0.0)
        waiting[1].cancel()  # it has its turn, and goes without taking it
        await breathe()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*waiting, return_exceptions=True)
        return purse, waiting[3].done() and not waiting[3].cancelled()

    purse, served = asyncio.run(play())
    assert served and (purse.reserved, purse.flying) == (0.5, 1)


# ---- pauses ----


@some
@given(st.integers(1, 200), st.one_of(st.none(), st.floats(), st.floats(0, 600)))
def test_a_pause_is_bounded(attempt, after):
    for seconds in (pause(attempt, after) for _ in range(20)):
        if after is not None and 0 < after <= LONGEST_AFTER:
            assert after <= seconds <= 1.25 * after
        else:
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
            assert longest / 2 <= seconds <= longest


def test_pauses_are_spread_so_that_calls_do_not_come_back_as_one():
    assert len({pause(3) for _ in range(50)}) > 40 < len({pause(3, 2.0) for _ in range(50)})
