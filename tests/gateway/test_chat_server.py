"""The tests' own model server: its log is the witness of what was answered, and it leaves no process behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from chat_server import start_server

CALL = {"model": "any", "messages": [{"role": "user", "content": "My sister has called."}]}


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return found


def test_a_client_that_went_away_was_asked_but_not_answered(tmp_path):
    with start_server(tmp_path, latency=0.5) as server:
        with pytest.raises(httpx.ReadTimeout):
            timeout = httpx.Timeout(10, read=0.1)
            httpx.post(f"{server.base_url}/chat/completions", json=CALL, timeout=timeout, trust_env=False)
        until(lambda: server.stats()["dropped"])
        assert [e["event"] for e in server.log()] == ["asked"] and server.stats()["answered"] == 0


ORPHAN = """
import chat_server, os, signal, sys
with chat_server.start_server(sys.argv[1], seconds=60) as server:
    print(server.port, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_stops_when_the_time_is_up_when_enough_was_answered_and_when_its_parent_is_gone(tmp_path):
    with start_server(tmp_path, seconds=0.1) as server:
        assert server.process.wait(10) == 0
    with start_server(tmp_path, latency=0, calls=1) as server:
        httpx.post(f"{server.base_url}/chat/completions", json=CALL, trust_env=False)
        assert server.process.wait(10) == 0 and [e["event"] for e in server.log()] == ["asked", "answered"]
    servers = Path(__file__).parents[1] / "servers"
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    parent = subprocess.run(command, cwd=servers, capture_output=True, text=True, timeout=30)
    assert parent.returncode == -signal.SIGKILL

    def gone():
        try:
            return httpx.get(f"http://127.0.0.1:{int(parent.stdout)}/stats", trust_env=False) and False
        except httpx.TransportError:
            return True

    until(gone)


def test_one_that_can_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --latancy"):
        with start_server(tmp_path, latancy=1):
            pass
