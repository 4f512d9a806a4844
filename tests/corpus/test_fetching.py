"""A fetched file is whole, known and unchanged; whatever a server does, there is one line or the right bytes."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import BODY, COMMIT, LATER, Hub, in_child, one_line, open_loopback, send, serve

from psycopref.corpus import fetching
from psycopref.core.files import sha256_file
from psycopref.corpus.fetching import fetch_url, hub_note, parse_hub, url_is_here, url_place

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    return open_loopback(tmp_path, monkeypatch)


def left(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


# ---- files of the web ----


def test_a_url_is_fetched_once_and_checked_at_every_use(own_cache):
    with serve(lambda handler, n: send(handler, BODY)) as (address, seen):
        url = f"{address}/data/a.csv"
        assert not url_is_here(url)
        path, origin = fetch_url(url, "give up")
        again = fetch_url(url, "give up")
    assert path.read_bytes() == BODY and again == (path, origin) and len(seen) == 1
    assert url_is_here(url) and path == url_place(url)
    assert origin == {"file": "a.csv", "from": url, "bytes": len(BODY), "sha256": sha256_file(path)}
    assert left(own_cache) == ["a.csv", "a.csv.json"]
    path.write_bytes(BODY[:-1])
    assert "has changed" in one_line(lambda: fetch_url(url, "give up"))
    path.unlink()
    assert not url_is_here(url)


def test_what_passes_is_tried_again_and_never_mixed(own_cache):
    """Two servers' faults, half a file, then another version of the file, whole."""
    new = BODY.replace(b"stairs", b"floors")

    def answer(handler, n):
        return send(handler, b"", 503) if n < 3 else send(handler, BODY, cut=50_000) if n == 3 else send(handler, new)

    with serve(answer) as (address, seen):
        path, _ = fetch_url(f"{address}/a.csv", "give up")
    assert path.read_bytes() == new and len(seen) == 4 and left(own_cache) == ["a.csv", "a.csv.json"]


@pytest.mark.parametrize("status, calls", [(404, 1), (401, 1), (410, 1), (500, 5), (503, 5), (429, 5)])
def test_a_refusal_is_one_line_after_a_bounded_number_of_attempts(own_cache, status, calls):
    with serve(lambda handler, n: send(handler, b"sorry", status)) as (address, seen):
        message = one_line(lambda: fetch_url(f"{address}/a.csv", "give up"))
    assert str(status) in message and message.endswith("give up") and len(seen) == calls <= fetching.FETCH_ATTEMPTS


def test_a_body_that_never_ends_well_is_one_line(own_cache):
    with serve(lambda handler, n: send(handler, BODY, cut=1000)) as (address, seen):
        assert "could not be downloaded" in one_line(lambda: fetch_url(f"{address}/a.csv", "give up"))
    assert len(seen) == fetching.FETCH_ATTEMPTS and left(own_cache) == []


def test_no_network_a_web_page_and_a_wrong_address_are_one_line(own_cache, monkeypatch):
    with serve(lambda handler, n: send(handler, b"<html>log in</html>")) as (address, seen):
        assert "web page" in one_line(lambda: fetch_url(f"{address}/a.csv", "give up")) and left(own_cache) == []
    assert "ConnectionError" in one_line(lambda: fetch_url(f"{address}/gone.csv", "give up")), "nobody listens there"
    with serve(lambda handler, n: send(handler, b"", 302, Location=f"/{n}")) as (address, seen):
        monkeypatch.setattr(fetching, "FETCH_ATTEMPTS", 1)
        assert "TooManyRedirects" in one_line(lambda: fetch_url(f"{address}/loop.csv", "give up"))
    monkeypatch.setattr(fetching, "FETCH_TIMEOUT", 0.2)
    stop = threading.Event()
    with serve(lambda handler, n: stop.wait(2)) as (address, seen):
        assert "Timeout" in one_line(lambda: fetch_url(f"{address}/slow.csv", "give up"))
        stop.set()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve(lambda handler, n: send(handler, BODY)) as (address, seen):
        assert "HF_HUB_OFFLINE" in one_line(lambda: fetch_url(f"{address}/a.csv", "give up")) and not seen


def test_a_pinned_hash_is_held(own_cache):
    right = hashlib.sha256(BODY).hexdigest()
    with serve(lambda handler, n: send(handler, BODY)) as (address, seen):
        assert fetch_url(f"{address}/a.csv", "give up", right)[1]["sha256"] == right
        assert "another file" in one_line(lambda: fetch_url(f"{address}/b.csv", "give up", "0" * 64))
        assert not url_place(f"{address}/b.csv").exists()
        assert "pinned" in one_line(lambda: fetch_url(f"{address}/a.csv", "give up", "0" * 64))
    assert len(seen) == 2


def test_two_fetch_the_same_file_at_once(own_cache):
    with serve(lambda handler, n: send(handler, BODY)) as (address, seen), ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: fetch_url(f"{address}/a.csv", "give up"), range(3)))
    assert len(seen) == 1 and results[0][0].read_bytes() == BODY


@few
@given(st.text(max_size=30))
def test_a_url_never_leaves_the_cache(path):
    place = url_place("https://example.org/" + path)
    assert place.resolve().is_relative_to(fetching.cache_root().resolve() / "sources") and len(place.name) <= 80
    assert place.parent != url_place("https://example.org/other/" + path).parent


# ---- files of the hub ----

IN_CHILD = """
import json, sys
from psycopref.core.settings import StudyError
from psycopref.corpus.fetching import fetch_hub, hub_is_here
for uri in sys.argv[1:]:
    asked = []
    def choose(names, where):
        asked.append([sorted(names), where])
        return [name for name in names if name.endswith(".csv")]
    try:
        before, files = hub_is_here(uri), fetch_hub(uri, "give up", choose)
        print(json.dumps({"before": before, "bytes": [len(path.read_bytes()) for path, _ in files],
        "files": [origin for _, origin in files], "asked": asked, "now": hub_is_here(uri)}))
    except StudyError as error:
        print(json.dumps({"error": str(error)}))
"""


def test_a_hub_dataset_is_fetched_at_the_commit_that_was_found(tmp_path):
    hub, at, silent = Hub(), "hf://datasets/any/set", "http://127.0.0.1:9"
    one = f"{at}@main/train.csv"
    with serve(hub) as (address, seen):
        first, listed = in_child(IN_CHILD, tmp_path, address, one, at)
        hub.commit, hub.files = LATER, {**hub.files, "train.csv": BODY + b"a later row,ok\n"}
        asked = len(seen)
        again = in_child(IN_CHILD, tmp_path, address, one, at)
        assert len(seen) == asked, "a branch is looked up once"
        pinned, later = in_child(IN_CHILD, tmp_path, address, f"{at}@{COMMIT}/train.csv", f"{at}@main/data/more.csv")
    assert not first["before"] and first["now"] and first["asked"] == []
    known = {"file": "train.csv", "from": one, "commit": COMMIT, "bytes": len(BODY)}
    assert first["files"] == [known | {"sha256": hashlib.sha256(BODY).hexdigest()}]
    assert [(own["file"], own["commit"]) for own in listed["files"]] == [
        ("train.csv", COMMIT),
        ("data/more.csv", COMMIT),
    ]
    assert listed["asked"] == [[["README.md", "data/more.csv", "train.csv"], f"{at}@main"]]
    assert [result["files"] for result in again] == [first["files"], listed["files"]]
    assert [(result["before"], result["asked"]) for result in again] == [(True, [])] * 2, "the choice is noted too"
    assert pinned["files"][0]["commit"] == COMMIT and later["files"][0]["commit"] == LATER
    *offline, other = in_child(IN_CHILD, tmp_path, silent, one, at, "hf://datasets/any/other@main/a.csv", offline="1")
    assert [result["bytes"] for result in offline] == [[len(BODY)], [len(BODY)] * 2]
    assert "HF_HUB_OFFLINE" in other["error"]
    next((tmp_path / "hf").rglob(f"snapshots/{COMMIT}/train.csv")).write_bytes(BODY[:100])
    assert "has changed" in in_child(IN_CHILD, tmp_path, silent, one, offline="1")[0]["error"]


REFUSALS = {
    "gated@main/a.csv": "GatedRepo",
    "absent@main/a.csv": "RepositoryNotFound",
    "set@other/train.csv": "RevisionNotFound",
    "set@main/absent.csv": "EntryNotFound",
    "gated": "GatedRepo",
    "set@other": "RevisionNotFound",
}


def test_the_refusals_of_the_hub_are_one_line(tmp_path):
    with serve(Hub()) as (address, seen):
        found = in_child(IN_CHILD, tmp_path, address, *(f"hf://datasets/any/{rest}" for rest in REFUSALS))
    found += in_child(IN_CHILD, tmp_path, address, "hf://datasets/any/set")  # nobody listens there any more
    for kind, result in zip([*REFUSALS.values(), "ConnectError"], found, strict=True):
        assert kind in result["error"] and result["error"].endswith("or give up") and "\n" not in result["error"]


part = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,11}", fullmatch=True)


@few
@given(part, part, part, st.lists(part, max_size=3).map("/".join))
def test_a_hub_address_is_taken_apart_as_it_was_put_together(owner, name, revision, path):
    uri = f"hf://datasets/{owner}/{name}@{revision}" + (f"/{path}" if path else "")
    assert parse_hub(uri) == (f"{owner}/{name}", revision, path)
    note = hub_note(uri)
    assert note.resolve().is_relative_to(fetching.cache_root().resolve() / "sources" / "hub")
    assert note != hub_note(uri + "x")
