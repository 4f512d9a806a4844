"""What was answered stays, over kills, crashes and shards; no reply is asked for twice, no cent counted twice."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from psycopref.gateway.cache import ReplyCache, open_cache
from psycopref.models.chat import ChatReply, ChatRequest, FreeModel
from psycopref.core.stages import Run, Shard
from psycopref.core.settings import StudyError
from psycopref.gateway.gateway import Gateway, chat_model, open_gateway

from chat_server import message_key, start_server
from refusals import one_line

HERE = Path(__file__).parents[1] / "servers"


def ask(text="Hello", **keywords):
    return ChatRequest(({"role": "user", "content": text},), **keywords)


class Priced(FreeModel):
    """A dollar a call at most, a quarter in the end."""

    uri = identity = label = "priced"
    concurrency = 4

    def __init__(self, real=0.25):
        self.real, self.asked = real, []

    async def answer(self, requests):
        self.asked += [request.messages[0]["content"] for request in requests]
        return [ChatReply(f"re: {request.messages[0]['content']}", "stop", 3, 4) for request in requests]

    def most(self, request):
        return 1.0

    def cost(self, reply):
        return self.real


def books_of(n) -> list[dict]:
    """What the ratings' books say of n calls."""
    return [dict(stage="03_ratings", model="priced", calls=n, prompt_tokens=3 * n, completion_tokens=4 * n, usd=n / 4)]


def caches(run) -> list[str]:
    return sorted(path.name for path in (run.outputs / "cache").glob("*.sqlite"))


@contextlib.contextmanager
def child(code, *arguments, **environment):
    """A process that talks by lines; it is killed with its block."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env={**os.environ, **environment}, cwd=HERE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close(), process.stdout.close()


# ---- on the disk before it is seen ----


def test_what_the_consumer_has_seen_is_on_the_disk(tmp_path):
    path, model = tmp_path / "replies.sqlite", Priced()
    gateway, blocks = Gateway(ReplyCache(path), 1000.0), [[ask(f"{b}-{n}") for n in range(7)] for b in range(25)]
    with contextlib.closing(sqlite3.connect(path)) as other:
        for replies, block in zip(gateway.stream(model, iter(blocks)), blocks):
            assert all(isinstance(reply, ChatReply) for reply in replies)
            kept = {key for [key] in other.execute("SELECT key FROM replies")}
            assert kept >= {request.key(model.identity) for request in block}, "seen by us, but by nobody else"


# ---- SIGKILL ----

ZYGOTE = """
import os, sys, itertools, openai, aiohttp, httpx2, pydantic
from pathlib import Path
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatRequest
from psycopref.gateway.gateway import Gateway, chat_model

for line in sys.stdin:  # each line: fork a process that runs the stream and is killed in its midst
    if (pid := os.fork()) == 0:
        try:
            model = chat_model(sys.argv[1], timeout=120)
            model.concurrency = 8
            asked = [ChatRequest(({"role": "user", "content": f"question {n}"},)) for n in range(400)]
            blocks = (asked[i : i + 40] for i in range(0, 400, 40))
            list(Gateway(ReplyCache(Path(sys.argv[2]))).stream(model, blocks))
        finally:
            os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def test_a_killed_stream_asks_for_nothing_that_was_kept(tmp_path):
    path, asked = tmp_path / "replies.sqlite", [ask(f"question {n}") for n in range(400)]
    with (
        start_server(tmp_path, latency=0.06) as server,
        child(ZYGOTE, server.uri("m"), path, NO_PROXY="127.0.0.1") as zygote,
    ):
        model = chat_model(server.uri("m"), timeout=120)
        names = {request.key(model.identity): message_key(list(request.messages)) for request in asked}
        kept = []
        for goal in (35, 90, 91, 180, 290):  # answered in all, when the kill comes
            print("go", file=zygote.stdin, flush=True)
            pid = int(zygote.stdout.readline())
            while server.stats()["answered"] < goal or server.stats()["in_flight"] < 4:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            assert zygote.stdout.readline() == "gone\n"
            with contextlib.closing(sqlite3.connect(path)) as other:
                kept.append((time.monotonic(), {names[key] for [key] in other.execute("SELECT key FROM replies")}))
        gateway = Gateway(ReplyCache(path))
        replies = gateway.ask(model, asked)
        log = [entry for entry in server.log() if entry["event"] == "asked"]
        for (before, _), (moment, there) in itertools.pairwise([(0.0, ()), *kept]):
            assert not there & {entry["key"] for entry in log if entry["t"] > moment}, "kept, but asked again"
            lost = {entry["key"] for entry in log if before < entry["t"] <= moment} - there
            assert len(lost) <= 2 * 8 + 64, "`Stream.started`: in flight or on its way to the disk"
        assert 20 < len(kept[0][1]) < len(kept[-1][1]) < 400, "the kills came in the midst"
        assert {entry["key"] for entry in log} == set(names.values())
        fresh = Gateway(ReplyCache(tmp_path / "unbroken.sqlite"))
        assert fresh.ask(model, asked) == replies and gateway.counts[model.uri]["failed"] == 0
        assert gateway.counts[model.uri]["calls"] == 400 - len(kept[-1][1])


# ---- large, and odd ----


def test_ten_thousand_replies_are_looked_up_correctly(tmp_path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    ends = ["length" if n % 7 else "stop" for n in range(10_000)]
    whole = {f"{n:064x}": ChatReply(f"reply {n} é\u2028", end, n, 2 * n) for n, end in enumerate(ends)}
    cache.put(whole)
    some = random.Random(0).sample(sorted(whole), 3000)
    assert cache.get([*some, *(f"absent {n}" for n in range(3000))]) == {key: whole[key] for key in some}
    assert cache.get(list(whole)) == whole
    cache.close()


def test_a_reply_that_can_t_be_written_ends_the_run(tmp_path):
    class Odd(Priced):
        async def answer(self, requests):
            return [ChatReply("half a face \ud83d") for _ in requests]

    cache = ReplyCache(tmp_path / "replies.sqlite")
    with pytest.raises(UnicodeEncodeError):
        Gateway(cache, 100.0).ask(Odd(), [ask(str(n)) for n in range(9)])
    assert cache.get([ask(str(n)).key("priced") for n in range(9)]) == {}


def test_a_cache_that_was_killed_at_its_birth_is_an_empty_one():
    run = Run("example")
    (run.outputs / "cache").mkdir(parents=True)
    for name in ("replies.sqlite", "replies-03_ratings-1-of-3.sqlite"):
        sqlite3.connect(run.outputs / "cache" / name).execute("PRAGMA journal_mode=WAL").close()
    shard = open_cache(run, "03_ratings", Shard(1, 2))
    assert shard.get(["a"]) == {} and shard.spent_before() == 0
    shard.close()
    keep_in(run, "a", "03_ratings", Shard(1, 2))
    assert open_cache(run).get(["a"]) and caches(run) == ["replies.sqlite"]


def test_two_threads_do_not_share_a_transaction(tmp_path):
    cache, begun, go_on = ReplyCache(tmp_path / "replies.sqlite"), threading.Event(), threading.Event()

    def rows():
        yield "a", "{}"
        begun.set()
        go_on.wait(0.3)  # the other one would write now
        yield "b", None  # refused: a reply is not null

    failed = []

    def write():
        failed.append(one_line(lambda: cache._write(("INSERT INTO replies VALUES (?, ?)", rows()))))

    first = threading.Thread(target=write)
    first.start()
    assert begun.wait(60)
    cache.keep_jobs({"question": "name"})
    go_on.set()
    first.join(60)
    other = sqlite3.connect(tmp_path / "replies.sqlite")
    assert failed and other.execute("SELECT count(*) FROM replies").fetchone() == (0,), "all or none"
    assert other.execute("SELECT * FROM jobs").fetchall() == [("question", "name")]
    other.close()


# ---- shards ----


def keep_in(run, key, stage="", shard=None) -> None:
    """Open a cache as a process would, keep one reply and close it."""
    cache = open_cache(run, stage, shard)
    cache.put({key: ChatReply(f"reply {key}")})
    cache.close()


def test_shards_write_files_of_their_own_and_read_what_was_before():
    run = Run("example")
    keep_in(run, "a")
    keep_in(run, "b", "03_ratings", Shard(1, 3))  # of another number of shards
    keep_in(run, "c", "02_responses", Shard(2, 2))  # of another stage
    first, second = (open_cache(run, "03_ratings", Shard(i, 2)) for i in (1, 2))
    first.put({"d": ChatReply("first")})
    second.put({"e": ChatReply("second")})
    assert set(first.get(list("abcde"))) == set("abcd") and set(second.get(list("abcde"))) == set("abce")
    one_line(lambda: open_cache(run))
    assert set(first.get(list("abcde"))) == set("abcd"), "a whole run that was refused is in nobody's way"
    parts = ("-02_responses-2-of-2", "-03_ratings-1-of-2", "-03_ratings-1-of-3", "-03_ratings-2-of-2", "")
    assert caches(run) == [f"replies{part}.sqlite" for part in parts]
    for cache in (first, second):
        cache.close()
    assert set(open_cache(run).get(list("abcde"))) == set("abcde") and caches(run) == ["replies.sqlite"]
    left = [path.name for path in (run.outputs / "cache").iterdir() if path.suffix in (".lock", ".working")]
    assert left == ["replies.lock"]


@pytest.mark.parametrize("crash", ["replies-03_ratings-1-of-1.sqlite", "replies-03_ratings-1-of-1.lock"])
def test_a_crash_after_copying_a_shard_counts_nothing_twice(monkeypatch, crash):
    run, model = Run("example"), Priced()
    shard = open_gateway(run, 100.0, "03_ratings", Shard(1, 1))
    shard.ask(model, [ask(str(n)) for n in range(8)])
    shard.cache.keep_jobs({"a name": "batch_1"})
    shard.cache.close()
    unlink = Path.unlink

    def dies(path, **options):
        if path.name == crash:
            raise KeyboardInterrupt("pulled the plug")
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", dies)
        open_cache(run)
    for _ in range(2):
        whole = open_cache(run, "03_ratings")
        assert whole.bill() == books_of(8)
        assert whole.jobs(["a name"]) == {"a name": "batch_1"}
        assert len(whole.get([ask(str(n)).key("priced") for n in range(8)])) == 8
        whole.close()


def test_a_shard_that_went_on_after_the_crash_is_counted_once_and_in_full(tmp_path):
    run, model, whole = Run("example"), Priced(), range(12)
    shard = open_gateway(run, 100.0, "03_ratings", Shard(1, 1))
    shard.ask(model, [ask(str(n)) for n in whole[:8]])
    shard.cache.close()
    path = shard.cache.path
    shutil.copy(path, tmp_path / "copy")
    open_cache(run).close()
    assert not path.exists()
    shutil.copy(tmp_path / "copy", path)  # as if the machine had stopped between copying and removing
    shard = open_gateway(run, 100.0, "03_ratings", Shard(1, 1))
    shard.ask(model, [ask(str(n)) for n in whole])
    shard.cache.close()
    [row] = open_cache(run).bill()
    assert (row["calls"], row["usd"]) == (12, 3.0) and len(model.asked) == 12


HOLDER = """
import sys
from psycopref.gateway.cache import open_cache
from psycopref.models.chat import ChatReply
from psycopref.core.stages import Run, Shard
cache = open_cache(Run("example"), "03_ratings", Shard(1, 2))
cache.put({"held": ChatReply("by the child")})
print("open", flush=True)
sys.stdin.readline()
"""


def test_a_shard_belongs_to_one_process():
    run = Run("example")
    with child(HOLDER) as holder:
        assert holder.stdout.readline() == "open\n"
        assert "another process works on this shard" in one_line(lambda: open_cache(run, "03_ratings", Shard(1, 2)))
        assert "still at work" in one_line(lambda: open_cache(run))
        beside = open_cache(run, "03_ratings", Shard(2, 2))  # the other half is free
        beside.close()
    again = open_cache(run, "03_ratings", Shard(1, 2))  # killed, so its lock is gone
    assert again.get(["held"]) == {"held": ChatReply("by the child")}
    again.close()
    assert open_cache(run).get(["held"]) and caches(run) == ["replies.sqlite"]


def test_nobody_takes_a_file_in_while_a_shard_opens_it(monkeypatch):
    """The mark comes first: a reply must never go into a file that somebody else has just removed."""
    run = Run("example")
    keep_in(run, "a", "03_ratings", Shard(1, 2))
    seen = []

    class Watching(ReplyCache):
        def __init__(self, path, also=()):
            if "1-of-2" in path.name:
                seen.append(one_line(lambda: open_cache(run)))
            super().__init__(path, also)

    monkeypatch.setattr("psycopref.gateway.cache.ReplyCache", Watching)
    open_cache(run, "03_ratings", Shard(1, 2)).close()
    assert len(seen) == 1 and "still at work" in seen[0]


# ---- budgets ----


def spend_all(run, cap, stage, n, names, real=0.25) -> float:
    """Run all shards of a stage until each is refused; returns what this took."""
    taken = 0.0
    for i in range(1, n + 1):
        gateway, model = open_gateway(run, cap, stage, Shard(i, n)), Priced(real)
        with pytest.raises(StudyError, match="budget"):
            gateway.ask(model, [ask(f"{stage} {next(names)}") for _ in range(200)])
        taken += real * len(model.asked)
        gateway.cache.close()
    return taken


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shards_never_spend_more_than_the_cap_together(n):
    run, cap, names = Run("example"), 17.5, itertools.count()
    before = open_gateway(run, cap)
    before.ask(Priced(), [ask(f"before {k}") for k in range(8)])
    before.cache.close()
    taken = 2.0 + spend_all(run, cap, "03_ratings", n, names)
    assert cap - n < taken <= cap, "each keeps less than one call's most"
    for stage, shards in (("03_ratings", n), ("03_ratings", n + 1), ("02_responses", n)):
        taken += spend_all(run, cap, stage, shards, names)
    assert taken <= cap, "starting again gives nobody a new share, nor do other shards or another stage"
    whole = open_gateway(run, cap, "03_ratings")
    assert whole.spent == pytest.approx(taken) and whole.cache.spent() == pytest.approx(taken)
    with pytest.raises(StudyError, match="budget"):
        whole.ask(Priced(1.0), [ask(f"after {k}") for k in range(50)])
    assert whole.spent <= cap


def test_the_books_of_a_stage_span_its_shards_and_runs():
    run = Run("example")
    for i in (1, 2):
        gateway = open_gateway(run, 100.0, "03_ratings", Shard(i, 2))
        gateway.ask(Priced(), [ask(f"{i} {n}") for n in range(5)])
        assert gateway.books() == books_of(5)
        gateway.cache.close()
    whole, model = open_gateway(run, 100.0, "03_ratings"), Priced()
    whole.ask(model, [ask(f"{i} {n}") for i in (1, 2) for n in range(5)])
    other = Gateway(whole.cache, 100.0, stage="02_responses")
    other.ask(Priced(), [ask("of another stage")])
    assert not model.asked and whole.books() == books_of(10) and [row["calls"] for row in other.books()] == [1]
