"""What every test stands on: its own project folder, one shared cache of weights, and no way out to the network."""

import os
import shutil
import signal
from pathlib import Path

import pytest

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a caller in the background ignores it, and so would all children
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module

COUNSEL_CHAT = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "counsel-chat" / "counselchat-data.csv"


def pytest_collection_modifyitems(items):
    "Begin with the chain, which takes minutes by itself, so that no worker waits for it in the end."
    items.sort(key=lambda item: item.path.parent.name != "study")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Where `random-tiny` is made once."""
    return os.environ.get("PSYCOPREF_CACHE") or str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_project(tmp_path, shared_cache, monkeypatch):
    """Write outputs below `tmp_path`, keep weights in the shared cache, and leave the user's settings and key
    outside."""
    monkeypatch.setenv("PSYCOPREF_ROOT", str(tmp_path))
    monkeypatch.setenv("PSYCOPREF_CACHE", shared_cache)
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "PSYCOPREF_SERVER_KEY",
        "PSYCOPREF_PROMPTS",
        "PSYCOPREF_PRINCIPLES",
        "PSYCOPREF_PROGRESS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def marked(tmp_path):
    """Take the paper's principles with others about safety: called with their keys; returns the file."""
    import yaml

    from psycopref.core.principles import principles_file, use_principles

    def take(*keys: str) -> str:
        own = yaml.safe_load(principles_file("counselling").read_text(encoding="utf-8"))
        own["principles"] = [one | {"safety": one["key"] in keys} for one in own["principles"]]
        place = tmp_path / f"marked-{'-'.join(keys)}.yaml"
        place.write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
        use_principles(str(place))
        return str(place)

    return take


@pytest.fixture
def counsel_chat():
    """The published counsel-chat table, where a copy of it lies beside the repository."""
    if not COUNSEL_CHAT.is_file():
        pytest.skip("counsel-chat's CSV is not here")
    return COUNSEL_CHAT.resolve()


@pytest.fixture
def gateway(tmp_path):
    from psycopref.gateway.cache import ReplyCache
    from psycopref.gateway.gateway import Gateway

    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))


@pytest.fixture
def server(monkeypatch):
    """Set `server.behave(text, attempt)`; read `server.log`, the last message of every request in order."""
    from raw_server import RawServer

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    running = RawServer()
    yield running
    running.stop()
    assert not running.thread.is_alive()


@pytest.fixture(scope="module")
def one_thread():
    """Threads only wait for each other in models as small as a test's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking".split()
FLAGS = [f"--{name}" for name in (*FLAGS, "disable-component-update", "disable-sync")]


@pytest.fixture(scope="module")
def browser():
    """A headless browser found on PATH; without one the tests are skipped, unless it was asked for."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        give_up = pytest.fail if os.environ.get("PSYCOPREF_BROWSER") == "required" else pytest.skip
        give_up(f"playwright, or {' and '.join(programs)} are missing; our pages are not driven")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()
