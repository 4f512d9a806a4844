"""The speeches that the package ships, for every test of the corpus."""

import json

import pytest

from psycopref.core.paper import resource_path


@pytest.fixture(scope="session")
def shipped():
    """Rows of the demonstration corpus: speech and topic."""
    return [json.loads(row) for row in resource_path("demo_speeches.jsonl").read_text(encoding="utf-8").splitlines()]
