"""What the tests of fetching and of sources share: servers and a hub on the loopback address."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

from psycopref.corpus import fetching

from refusals import one_line  # noqa: F401, for those who test fetching

BODY = ("Context,Response\n" + "".join(f"I count the stairs {n} times.,Tell me more.\n" for n in range(4000))).encode()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


def open_loopback(tmp_path, monkeypatch):
    """Keep downloads of one test apart, allow the loopback address and don't wait between attempts."""
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "FETCH_WAIT_SECONDS", 0.0)
    return tmp_path / "cache"


@contextlib.contextmanager
def serve(answer):
    """Answer requests on a loopback port by `answer(handler, n)`; the list of requests' headers is yielded."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append({"method": self.command, "path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
            answer(self, len(seen))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def send(handler, body, status=200, cut=None, **headers):
    """Send an answer; with `cut`, promise all and send so many bytes."""
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body[:cut])
    handler.close_connection = True


def ranged(handler, body, etag, cut=None):
    """Serve a file as a good server does: ranges, and the whole file when If-Range does not match."""
    start = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if start and handler.headers.get("If-Range") == etag:
        n = int(start[1])
        send(handler, body[n:], 206, cut, Content_Range=f"bytes {n}-{len(body) - 1}/{len(body)}", ETag=etag)
    else:
        send(handler, body, 200, cut, ETag=etag)


class Hub:
    """Speak as much of the hub's protocol as a download needs."""

    def __init__(self):
        self.files, self.commit = {"train.csv": BODY, "data/more.csv": BODY, "README.md": b"# words"}, COMMIT

    def __call__(self, handler, n):
        whole = re.fullmatch(
            r"/(api/)?datasets/([\w.-]+/[\w.-]+)(?:/(?:revision|resolve)/([^/]+))?(?:/(.+))?",
            handler.path.partition("?")[0],
        )
        listing, repo, revision, path = whole.groups()
        if repo == "any/gated":
            return send(handler, b"no", 403, X_Error_Code="GatedRepo")
        if repo != "any/set":
            return send(handler, b"no", 404, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", self.commit, COMMIT):
            return send(handler, b"no", 404, X_Error_Code="RevisionNotFound", X_Repo_Commit=self.commit)
        if listing:
            body = {"id": repo, "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            body |= {"private": False, "gated": False, "downloads": 0, "tags": []}
            return send(handler, json.dumps(body).encode(), Content_Type="application/json")
        if path not in self.files:
            return send(handler, b"no", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        commit, body = COMMIT if revision == COMMIT else self.commit, self.files[path]
        named = {"ETag": f'"{len(body)}-{commit[:4]}"', "X_Repo_Commit": commit, "Content_Type": "text/plain"}
        return send(handler, body, **named)


def in_child(code, tmp_path, endpoint, *addresses, offline="0"):
    """Run code that prints JSON lines, in a process of its own: huggingface_hub reads its settings when imported."""
    keep = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
    }
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"PSYCOPREF_CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    command, how = [sys.executable, "-c", code, *addresses], dict(env=keep | own, cwd=tmp_path, timeout=120)
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
