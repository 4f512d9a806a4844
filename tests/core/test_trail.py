"""The audit trail: every change shows, a stopped writer is told from a forger, and writers don't mix their lines."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.settings import StudyError
from psycopref.core.trail import Entry, Seal, Trail, canonical_json, find_trail, read_seal, seal_path, verified

CLOCK = "2025-05-01T08:00:00+00:00"


def made(folder, n=4) -> Trail:
    trail = Trail(Path(folder) / "trail.jsonl", {"of": "a test"}, lambda: CLOCK)
    for i in range(n):
        trail.append("note", {"said": f"{i} – ü\n", "value": i / 3})
    return trail


def lines_of(trail) -> list[bytes]:
    return trail.path.read_bytes().splitlines(keepends=True)


def wrong_line(trail) -> int:
    "Return the line that a refusal names."
    said = one_line(lambda: verified(trail.path))
    assert one_line(lambda: trail.append("note", {})) == said, "nothing is added to a broken trail"
    return int(said.split(", line ")[1].split(":")[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole"))


edits = st.tuples(st.sampled_from(["replace", "insert", "delete"]), st.integers(0), st.integers(0, 255))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits, st.booleans())
def test_any_single_edit_of_any_byte_is_noticed(whole, edit, of_the_seal):
    what, place, byte = edit
    path = seal_path(whole.path) if of_the_seal else whole.path
    before = path.read_bytes()
    place %= len(before)
    new = before[:place] + bytes([byte] * (what != "delete")) + before[place + (what != "insert") :]
    try:
        path.write_bytes(new)
        if new == before:
            assert len(verified(whole.path)) == 5
            return
        said = one_line(lambda: verified(whole.path))
        if not of_the_seal:  # the line of the byte, or the one that is not whole any more
            first = before[:place].count(b"\n") + 1
            assert f", line {first}:" in said or f", line {first + 1}:" in said
    finally:
        path.write_bytes(before)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations(range(5)), st.sets(st.integers(0, 4)), st.lists(st.integers(0, 4), max_size=2))
def test_removed_moved_and_repeated_lines_are_noticed(whole, order, left_out, again):
    lines = lines_of(whole)
    new = [lines[i] for i in [*(i for i in order if i not in left_out), *again]]
    try:
        whole.path.write_bytes(b"".join(new))
        if new == lines:
            assert verified(whole.path)
            return
        first = next((i for i, pair in enumerate(zip(new, lines)) if pair[0] != pair[1]), min(len(new), len(lines)))
        assert f", line {first + 1}:" in one_line(lambda: verified(whole.path))
    finally:
        whole.path.write_bytes(b"".join(lines))


def forged(entry: Entry, **changes) -> bytes:
    "A line with a right hash of its own."
    return replace(entry, **changes).hashed().line


def test_the_first_wrong_line_and_what_was_done_are_named(tmp_path):
    trail = made(tmp_path)
    lines, entries = lines_of(trail), verified(trail.path)
    a, b, c, d, e = lines
    cases = {
        "was changed": (3, [a, b, c.replace(b"note", b"nate"), d, e]),
        "1 entry before it removed": (3, [a, b, d, e]),
        "lines were moved": (3, [a, b, d, c, e]),
        "inserted or repeated": (4, [a, b, c, c, d, e]),
        "inserted or replaced": (4, [a, b, forged(entries[2], data={"said": "else"}), d, e]),
        "the seal holds another hash": (5, [a, b, c, d, forged(entries[4], data={"said": "else"})]),
        "2 cut off the end": (4, [a, b, c]),
        "5 cut off the end": (1, []),
        "was changed or cut short": (5, [a, b, c, d, e[:-1]]),
        "the seal counts 5": (6, [*lines, forged(entries[4], n=5, previous=entries[4].sha256)]),
        "no whole entry": (6, [*lines, b"{"]),
    }
    for said, (line, new) in cases.items():
        trail.path.write_bytes(b"".join(new))
        assert wrong_line(trail) == line and said in one_line(lambda: verified(trail.path)), said


def test_without_its_seal_or_its_file_a_trail_is_refused(tmp_path):
    trail = made(tmp_path)
    seal = seal_path(trail.path).read_bytes()
    seal_path(trail.path).unlink()
    assert "the seal is missing" in one_line(lambda: verified(trail.path))
    assert wrong_line(trail) == 6
    seal_path(trail.path).write_bytes(seal)
    trail.path.unlink()
    assert "cut off the end" in one_line(lambda: verified(trail.path))
    assert "not found" in one_line(lambda: verified(tmp_path / "none.jsonl")) and not list(tmp_path.glob("none*"))
    assert "its folder" in one_line(lambda: Trail(tmp_path / "no" / "trail.jsonl", {}).append("note", {}))


def test_a_chain_made_anew_whole_is_not_noticed_and_so_we_say(tmp_path):
    "What the page says that a chain can't tell: if this fails, the page is wrong."
    trail = made(tmp_path)
    head = verified(trail.path)[-1].sha256
    for path in (trail.path, seal_path(trail.path)):
        path.unlink()
    trail.append("note", {"said": "something else"})
    assert head not in {entry.sha256 for entry in verified(trail.path)}


def test_only_its_owner_may_read_a_trail(tmp_path):
    trail = made(tmp_path)
    assert {path.stat().st_mode & 0o077 for path in (trail.path, seal_path(trail.path))} == {0}


# Stopped writers


KILLED = """
import os, signal, sys
from pathlib import Path
from psycopref.core import trail
write, where, left = trail._write_bytes, sys.argv[2], [int(sys.argv[3])]

def torn(path, data, how=os.O_APPEND):
    if (path.name == "trail.jsonl") == (where == "line"):
        left[0] -= 1
        if not left[0]:
            write(path, data[: len(data) * int(sys.argv[4]) // 100], how)
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, data, how)

trail._write_bytes = torn
own = trail.Trail(Path(sys.argv[1]), {"of": "a test"})
own.append("note", {"said": "one"})
own.append("note", {"said": "two"})
"""


TORN = [
    ("line", 1, 50),
    ("line", 3, 0),
    ("line", 3, 50),
    ("line", 3, 100),
    ("seal", 1, 50),
    ("seal", 2, 100),
    ("seal", 6, 50),
]


@pytest.mark.parametrize("where, nth, percent", TORN)
def test_a_killed_writer_is_noticed_and_the_next_one_says_so(tmp_path, where, nth, percent):
    path = tmp_path / "trail.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), where, str(nth), str(percent)])
    assert done.returncode == -signal.SIGKILL
    announced = read_seal(path) is not None and read_seal(path).announced
    before = path.read_bytes() if path.exists() else b""
    if announced:
        assert "a writer was stopped" in one_line(lambda: verified(path))
        assert path.read_bytes() == before, "who only looks changes nothing"
    Trail(path, {"of": "a test"}).append("note", {"said": "three"})
    entries = verified(path)
    assert [entry.kind for entry in entries].count("recovered") == bool(announced)
    assert entries[-1].data == {"said": "three"}
    kept = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(kept), "what was whole stays"
    if announced and before[len(kept) :]:
        assert [e for e in entries if e.kind == "recovered"][0].data["half_line_bytes"] == len(before) - len(kept)


def test_half_a_line_that_no_writer_announced_is_no_accident(tmp_path):
    trail = made(tmp_path)
    with open(trail.path, "ab") as file:
        file.write(b'{"data":{"approved"')
    assert wrong_line(trail) == 6


def test_writers_at_the_same_time_make_one_chain(tmp_path):
    code = "import sys; from pathlib import Path; from psycopref.core.trail import Trail\n"
    code += (
        "trail = Trail(Path(sys.argv[1]), {})\nfor i in range(15): trail.append('note', {'who': sys.argv[2], 'i': i})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "trail.jsonl")]
    running = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [process.wait() for process in running] == [0] * 3
    entries = verified(tmp_path / "trail.jsonl")
    assert len(entries) == 46
    for name in "abc":
        assert [entry.data["i"] for entry in entries[1:] if entry.data["who"] == name] == list(range(15))


def test_a_check_that_refuses_leaves_the_trail_as_it_was(tmp_path):
    trail = made(tmp_path)

    def no(entries):
        raise StudyError("no")

    before = trail.path.read_bytes()
    assert one_line(lambda: trail.append("note", {}, no)) == "no"
    assert trail.path.read_bytes() == before and not find_trail(trail.path).stopped


def test_a_seal_announces_nothing_once_all_is_written(tmp_path):
    trail = made(tmp_path)
    assert read_seal(trail.path) == Seal(5, verified(trail.path)[-1].sha256)
    forged_seal = asdict(Seal(5, "0" * 64))
    seal_path(trail.path).write_text(canonical_json(forged_seal) + "\n")
    assert wrong_line(trail) == 5
    seal_path(trail.path).write_text(json.dumps(forged_seal))
    assert "was changed" in one_line(lambda: verified(trail.path))
    assert os.access(trail.path, os.R_OK)
