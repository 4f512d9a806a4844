"""Pauses are noted and not made."""

import pytest

from psycopref.gateway import gateway as gateway_module


@pytest.fixture
def pauses(monkeypatch):
    """Make no pauses, and note which ones were asked for."""
    asked = []
    monkeypatch.setattr(gateway_module, "pause", lambda attempt, after=None: asked.append((attempt, after)) or 0.0)
    return asked
