"""A server and a gateway of each test's own."""

import pytest
from raw_server import RawServer

from psycopref.gateway import gateway as gateway_module
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway


@pytest.fixture
def server(monkeypatch):
    """Set `server.behave(text, attempt)`; read `server.log`, the last message of every request in order."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    running = RawServer()
    yield running
    running.stop()
    assert not running.thread.is_alive()


@pytest.fixture
def pauses(monkeypatch):
    """Make no pauses, and note which ones were asked for."""
    asked = []
    monkeypatch.setattr(gateway_module, "pause", lambda attempt, after=None: asked.append((attempt, after)) or 0.0)
    return asked


@pytest.fixture
def gateway(tmp_path):
    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))
