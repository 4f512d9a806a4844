"""What a run has spent is read from its books, whole, once and without a change to them, and the report's table adds
up."""

import multiprocessing
import os
import sqlite3

import pytest

from psycopref.core.files import StageWriter, sha256_file
from psycopref.gateway.cache import open_cache, run_bill
from psycopref.core.stages import Run, Shard
from psycopref.reporting.report_page import all_receipts, asked_name, run_books, spending_caption, spending_table

from refusals import one_line


def row(stage, model, calls, prompt_tokens=0, completion_tokens=0, usd=0.0):
    return dict(
        stage=stage, model=model, calls=calls, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, usd=usd
    )


def sign(run, stage, books):
    with StageWriter(run, stage, "tiny", 0, {}) as writer:
        writer.facts |= {"books": books} if books is not None else {}
        writer.json("done", {})


# ---- the books ----


def test_the_bill_holds_the_books_of_all_files_once():
    run = Run("r")
    whole = open_cache(run)
    whole.spend("02_responses", "openai:m", 3, 30, 60, 0.25)
    whole.close()
    for i in (1, 2):
        part = open_cache(run, "03_ratings", Shard(i, 2))
        for _ in range(2):
            part.spend("03_ratings", "batch:m", i, 10 * i, i, 0.5)
        part.close()
    expected = [row("02_responses", "openai:m", 3, 30, 60, 0.25), row("03_ratings", "batch:m", 6, 60, 6, 2.0)]
    assert run_bill(run) == expected
    path = run.outputs / "cache" / "replies-03_ratings-1-of-2.sqlite"
    copy = path.read_bytes()
    taken = open_cache(run)
    assert taken.bill() == expected == run_bill(run), "while somebody has it open"
    taken.close()
    path.write_bytes(copy)  # killed between taking a shard's file in and removing it
    assert run_bill(run) == expected and run_bill(Run("nobody")) == [] and not Run("nobody").outputs.exists()


def hold(path, ready, done):
    "Write and stay, with the log not folded in."
    db = sqlite3.connect(path)
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE spent SET calls = 999")
    ready.set()
    done.wait(30)


def test_reading_the_books_changes_nothing_and_waits_for_nobody():
    run = Run("r")
    cache = open_cache(run, "02_responses", Shard(1, 2))
    cache.spend("02_responses", "openai:m", 3, 30, 60, 0.25)
    path, context = run.outputs / "cache" / "replies-02_responses-1-of-2.sqlite", multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    writer = context.Process(target=hold, args=(path, ready, done))
    writer.start()
    try:
        assert ready.wait(30)
        before = sha256_file(path)
        assert run_bill(run) == [row("02_responses", "openai:m", 3, 30, 60, 0.25)], "what is not finished is not there"
        assert sha256_file(path) == before
    finally:
        done.set()
        writer.join(30)
    assert cache.mark and cache.bill() == run_bill(run), "the shard still has its file"


def spend_and_die():
    "Book a call and end without closing anything."
    open_cache(Run("r")).spend("02_responses", "openai:m", 3, 30, 60, 0.25)
    os._exit(0)


def test_the_books_of_a_killed_process_are_read_and_left_as_they_are():
    writer = multiprocessing.get_context("spawn").Process(target=spend_and_die)
    writer.start()
    writer.join(60)
    path = Run("r").outputs / "cache" / "replies.sqlite"
    log = path.with_name("replies.sqlite-wal")
    before = sha256_file(path), sha256_file(log)
    assert log.stat().st_size and run_bill(Run("r")) == [row("02_responses", "openai:m", 3, 30, 60, 0.25)]
    assert (sha256_file(path), sha256_file(log)) == before


@pytest.mark.parametrize(
    "content", [b"no database, but long enough to be looked at" * 9, b"SQLite format 3\0" + bytes(200), b""]
)
def test_broken_books_are_one_line(content):
    run = Run("r")
    (run.outputs / "cache").mkdir(parents=True)
    (run.outputs / "cache" / "replies.sqlite").write_bytes(content)
    assert "its books can't be read" in one_line(lambda: run_bill(run))


# ---- caches and receipts ----


def test_the_receipt_is_believed_where_the_cache_was_moved_away():
    run = Run("r")
    sign(run, "02_responses", [row("02_responses", "openai:m", 10, 100, 200, 1.0)])
    sign(run, "03_ratings", [row("03_ratings", "openai:m", 5, 50, 60, 0.5)])
    sign(run, "04_pairs", None)
    stages = ("02_responses", "03_ratings", "04_pairs")
    assert [r["usd"] for r in run_books(run, all_receipts(run, stages))] == [1.0, 0.5], "no cache at all"
    cache = open_cache(run)
    cache.spend("03_ratings", "openai:m", 8, 80, 90, 0.8)  # more than was signed: the stage ran again, and failed
    cache.spend("07_win_rates", "openai:j", 1, 10, 10, 0.1)  # not signed yet
    cache.spend("02_responses", "openai:m", 2, 20, 30, 0.2)  # a new cache, a part asked again
    cache.close()
    assert run_books(run, all_receipts(run, stages)) == [
        row("02_responses", "openai:m", 10, 100, 200, 1.0),
        row("03_ratings", "openai:m", 8, 80, 90, 0.8),
        row("07_win_rates", "openai:j", 1, 10, 10, 0.1),
    ]


# ---- the table ----


def test_the_table_adds_up():
    run = Run("r")
    books = [
        row("02_responses", "openai:a", 4, 40, 80, 0.004),
        row("02_responses", "openai:b", 1, 5, 5, 0.004),
        row("03_ratings", "batch:a", 7, 700, 70, 3.992),
        row("07_win_rates", "local:smollm2-135m", 2, 3, 4),
        *(row("07_win_rates", f"local:{run.outputs}/06_policy/{i}", i, 10, 10) for i in (1, 2, 3)),
    ]
    table = spending_table(run, books)
    assert list(table.columns) == ["stage", "model", "calls", "tokens in", "tokens out", "US dollars", "share %"]
    assert table.to_numpy().tolist() == [
        ["02_responses", "openai:a", 4, 40, 80, "0.00", "0.1"], ["02_responses", "openai:b", 1, 5, 5, "0.00", "0.1"],
        ["03_ratings", "batch:a", 7, 700, 70, "3.99", "99.8"],
        ["07_win_rates", "local:smollm2-135m", 2, 3, 4, "0.00", "0.0"], ["07_win_rates", "weights of this run", 6, 30,
        30, "0.00", "0.0"],
        ["all", "", 20, 778, 189, "4.00", "100.0"]]  # fmt: skip
    assert "nothing was paid" not in spending_caption(books), "cents were"
    assert str(run.outputs) not in table.to_csv(), "no place on anybody's machine"


def test_a_free_run_says_so():
    free = [row("03_ratings", "rules:rubric", 70), row("07_win_rates", "local:random-tiny", 4, 50, 60)]
    table = spending_table(Run("r"), free)
    assert table["US dollars"].eq("0.00").all() and table["share %"].isna().all() and table.iloc[-1]["calls"] == 74
    assert "nothing was paid: no model asked has a price" in spending_caption(free)
    served = [row("02_responses", "openai:command-r@https://api.example.org/v1", 70)]
    assert "servers other than OpenAI's stand at 0.00, whatever they charge" in spending_caption(served)


def test_the_same_books_make_the_same_table_wherever_the_run_lies(tmp_path):
    tables = []
    for place in ("/home/one/study", "/mnt/two"):
        books = [
            row("07_win_rates", f"local:{place}/outputs/r/{path}", 1)
            for path in ("06_policy/smollm2-135m/dpo", "08_ablations.partial/scratch/online/step-4")
        ]
        tables.append(spending_table(Run("r"), books).to_csv())
    assert (
        tables[0] == tables[1]
        and asked_name(Run("r"), "local:/models/outputs/other/x") == "local:/models/outputs/other/x"
    )
