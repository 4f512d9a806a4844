"""Models that answer as a script says."""

import itertools

import pytest

from psycopref.gateway.gateway import PROVIDERS
from psycopref.models.chat import ChatReply, FreeModel


class Scripted(FreeModel):
    """Answer by a function of the request: a text, a ChatReply or a Failure."""

    uri = label = "scripted:model"
    made = itertools.count()

    def __init__(self, script):
        self.script, self.requests, self.identity = script, [], f"{self.uri}#{next(self.made)}"

    async def answer(self, requests):
        self.requests += requests
        return [ChatReply(reply) if isinstance(reply, str) else reply for reply in map(self.script, requests)]


@pytest.fixture
def scripted(monkeypatch):
    """Let the URI `scripted:model` be a model that answers by a function of the request."""

    def script(answer):
        model = Scripted(answer)
        monkeypatch.setitem(PROVIDERS, "scripted", lambda name: model)
        return model

    return script
