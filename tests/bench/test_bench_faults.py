"""The bench of bad input at its smallest size: nothing crashes, and no value is taken that was not meant."""

import random

import pytest

from bench_faults import (
    READERS,
    choice_fault,
    count_entries,
    count_replies,
    entry_points,
    faults,
    mutated,
    read_or_refuse,
)
from psycopref.core.settings import StudyError

ENTRIES = ("settings", "chapters' parameters", "environment", "names of runs, seeds, shards, cells", "tables")
ENTRIES += ("JSON tables", "JSON lines", "parquet", "annotations", "filled-in tables", "pools", "general pairs")
ENTRIES += ("labelled text", "RewardBench", "servers' replies", "kept samples", "seeds' files")


def test_malformed_replies_crash_no_reader_and_give_no_wrong_value():
    counts = count_replies(400, seed=1)
    assert set(counts) == {*READERS, "choice"} and faults(counts) == 0, counts
    assert all(own["taken"] > 0 and own["refused"] > own["taken"] for own in counts.values()), "both happen"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_accepts_or_refuses_in_one_line(name):
    counts = count_entries(50, seed=1, names=[name])
    assert faults(counts) == 0, counts


def test_every_entry_point_is_tried():
    assert set(entry_points()) == {*ENTRIES, "command line"}


def test_the_command_line_accepts_or_refuses_in_one_line():
    counts = count_entries(10, seed=1, names=["command line"])
    assert faults(counts) == 0, counts


def test_the_count_would_see_a_fault():
    assert "FAULT ValueError" in read_or_refuse(lambda data: int(data), b"x")
    assert read_or_refuse(lambda data: None, b"x") == "accepted"

    def refuse(data):
        raise StudyError(data.decode())

    assert read_or_refuse(refuse, b"two\nlines") == "refused", "an error of ours is one line, whatever it quotes"
    assert faults({"a": {"WRONG x": 2, "taken": 3}, "b": {"FAULT y": 1, "CRASH z": 1}}) == 4
    chance = random.Random(0)
    assert len({mutated(b"a good input", chance) for _ in range(50)}) > 45
    assert {choice_fault(chance) for _ in range(200)} == {"taken", "refused"}
