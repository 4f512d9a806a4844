"""A model server of the tests' own: chat completions and batches by OpenAI's protocol, on the loopback address, in a process of its own.

It outlives the client that it answers, and notes what was asked and what was answered. So a test can kill a client at any moment
and see afterwards what was paid for twice. Replies follow from the hash of what was asked: nothing is random, nothing is learnt.
A batch misbehaves by the name of its model: see `FAULTS`.

    python tests/chat_server.py --latency 0.3 --log calls.jsonl
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from aiohttp import web

# the most that a batch, a batch's file and any file may hold
BATCH_LINES, BATCH_BYTES, UPLOAD_BYTES = 50_000, 200 * 1024**2, 512 * 1024**2
FAULTS = {  # by the model's name, up to a hyphen
    "flaky": "a third of the lines new to the server end with status 500; asked again, they are answered",
    "expired": "half of the lines new to the server are left when the time is up; asked again, they are answered",
    "cancelled": "the same, as if the batch's owner had cancelled it meanwhile",
    "rejected": "the batch fails as a whole, whatever it asks",
    "crowded": "it fails while another one of this model is worked on; the first is worked on until another has failed",
}
LOST = {"flaky": 3, "expired": 2, "cancelled": 2}  # of so many new lines one is lost
ENDED = ("failed", "completed", "expired", "cancelled")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)  # what a body of another form leads to
WORDS = (
    "the client is heard and the reply stays with what was said before it asks for more in a calm and open way".split()
)


# ---- what is answered ----


def message_key(messages: list) -> str:
    """Name a question by its messages, as the log does."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def count_texts(schema: dict) -> int:
    """Count the free texts that a schema asks for."""
    if schema.get("type") == "object":
        return sum(map(count_texts, schema.get("properties", {}).values()))
    return schema.get("type") == "string" and "enum" not in schema


def fill(schema: dict, digits, words: int):
    """Make a value that obeys a schema from an endless row of numbers; a form that we don't know is a KeyError."""
    if "enum" in schema:
        return schema["enum"][next(digits) % len(schema["enum"])]
    if schema["type"] == "object":
        return {name: fill(part, digits, words) for name, part in schema["properties"].items()}
    if schema["type"] == "integer":
        low, high = schema.get("minimum", 1), schema.get("maximum", 5)
        return low + next(digits) % (high - low + 1)
    return {"string": lambda: say(digits, words), "boolean": lambda: next(digits) % 2 == 1}[schema["type"]]()


def say(digits, words: int) -> str:
    """Say so many words."""
    return " ".join(WORDS[next(digits) % len(WORDS)] for _ in range(words)).capitalize() + "."


def completion(body: dict, seed: int = 0, tokens: int = 40) -> tuple[str, dict]:
    """Answer the body of a call: the question's key, and a chat completion."""
    key = message_key(body["messages"])
    digits = itertools.cycle(hashlib.shake_256(f"{seed} {key}".encode()).digest(256))
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        schema = form["json_schema"]["schema"]
        text = json.dumps(fill(schema, digits, max(2, tokens // max(1, count_texts(schema)))))
    else:
        text = say(digits, tokens)
    read, said = sum(len(m["content"]) for m in body["messages"]) // 4 + 1, len(text) // 4 + 1
    message = {"role": "assistant", "content": text, "refusal": None}
    return key, {"id": f"chatcmpl-{key[:24]}", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
                 "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                 "usage": {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}}  # fmt: skip


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict:
    """Say an error as OpenAI does."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def no(status: int, message: str, code: str | None = None, **headers) -> web.Response:
    """Refuse a call."""
    kind = "invalid_request_error" if status < 429 else "requests"
    return web.json_response(error_body(message, kind, code), status=status, headers=headers)


# ---- what is kept ----


class EventLog:
    """Append events to a file; what was noted is in the file a moment later, see `flush`."""

    def __init__(self, path):
        self.file, self.lines = open(path, "a", encoding="utf-8"), []

    def note(self, event: str, key: str) -> None:
        self.lines.append(f'{{"event": "{event}", "key": "{key}", "t": {time.monotonic():.6f}}}\n')

    def flush(self) -> None:
        if self.lines:
            self.file.write("".join(self.lines))
            self.file.flush()
            self.lines.clear()


class Store:
    """Keep files, batches and which batch lines were seen; in a file, they are there after a restart."""

    def __init__(self, path=None):
        self.db = sqlite3.connect(path or ":memory:", isolation_level=None)
        self.db.execute("PRAGMA synchronous = OFF")
        for table, column in (("files", ", content BLOB"), ("batches", "")):
            columns = f"n INTEGER PRIMARY KEY, id TEXT UNIQUE, facts TEXT{column}"
            self.db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        self.db.execute("CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY)")

    def new_id(self, table: str) -> str:
        last = self.db.execute(f"SELECT coalesce(max(n), 0) FROM {table}").fetchone()[0]
        return f"{'file-' if table == 'files' else 'batch_'}{last + 1:024x}"

    def add_file(self, content: bytes, name: str, purpose: str) -> dict:
        facts = {"id": self.new_id("files"), "object": "file", "bytes": len(content), "created_at": int(time.time()),
                 "filename": name, "purpose": purpose, "status": "processed"}  # fmt: skip
        self.db.execute(
            "INSERT INTO files (id, facts, content) VALUES (?, ?, ?)", (facts["id"], json.dumps(facts), content)
        )
        return facts

    def file(self, name: str) -> tuple[dict, bytes] | None:
        row = self.db.execute("SELECT facts, content FROM files WHERE id = ?", (name,)).fetchone()
        return row and (json.loads(row[0]), row[1])

    def put_batch(self, batch: dict) -> dict:
        self.db.execute(
            "INSERT INTO batches (id, facts) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET facts = excluded.facts",
            (batch["id"], json.dumps(batch)),
        )
        return batch

    def batches(self) -> list[dict]:
        """Return all batches, newest first."""
        return [json.loads(facts) for [facts] in self.db.execute("SELECT facts FROM batches ORDER BY n DESC")]

    def batch(self, name: str) -> dict | None:
        row = self.db.execute("SELECT facts FROM batches WHERE id = ?", (name,)).fetchone()
        return row and json.loads(row[0])

    def unseen(self, keys: list[str]) -> set[str]:
        """Say which lines are new, and remember them."""
        self.db.execute("BEGIN")
        new = {key for key in keys if self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount}
        self.db.execute("COMMIT")
        return new


# ---- batches ----


def problem(code, message, line=None, param=None) -> dict:
    """Say why a batch's file is refused."""
    return {"code": code, "message": message, "line": line, "param": param}


def line_problem(line: bytes, endpoint: str, ids: set, model: str | None) -> tuple[dict | None, tuple | None]:
    """Read a line of a batch: (what it asks, None), or (None, (code, message, parameter))."""
    try:
        asked = json.loads(line)
        missing = [name for name in ("custom_id", "method", "url", "body") if not asked.get(name)]
        missing = missing or [name for name in ("model", "messages") if not asked["body"].get(name)]
    except (ValueError, AttributeError):
        return None, ("invalid_json_line", "This line is no JSON object.", None)
    if missing:
        return None, ("missing_required_parameter", f"Missing required parameter: '{missing[0]}'.", missing[0])
    name, to, called = asked["custom_id"], (asked["method"], asked["url"]), asked["body"]["model"]
    if name in ids:
        return None, ("duplicate_custom_id", f"The custom_id '{name}' is used before.", "custom_id")
    if to != ("POST", endpoint):
        return None, ("url_mismatch", f"The line asks {' '.join(to)}, the batch is for POST {endpoint}.", "url")
    if model not in (None, called):
        return None, ("model_mismatch", f"The line asks {called}, the batch began with {model}.", "body.model")
    return asked, None


async def read_lines(content: bytes, endpoint: str) -> tuple[list[dict], list[dict]]:
    """Read a batch's file: what is asked, and the problems; other calls are answered meanwhile."""
    lines = content.rstrip().split(b"\n")
    if lines == [b""]:
        return [], [problem("empty_file", "The file holds no request.")]
    if len(lines) > BATCH_LINES or len(content) > BATCH_BYTES:
        found = f"{len(lines)} requests in {len(content)} bytes"
        return [], [problem("too_many_tasks", f"Found {found}, a batch takes {BATCH_LINES} in {BATCH_BYTES}.")]
    asked, problems, ids, model = [], [], set(), None
    for number, line in enumerate(lines, 1):
        found, wrong = line_problem(line, endpoint, ids, model)
        if wrong:
            problems.append(problem(*wrong[:2], number, wrong[2]))
        else:
            asked.append(found)
            ids.add(found["custom_id"])
            model = found["body"]["model"]
        if number % 200 == 0:
            await asyncio.sleep(0)
    return asked, problems


class Batches:
    """Take files and work on batches, one after the clock and not after the work."""

    def __init__(self, options, log: EventLog):
        self.options, self.log, self.store, self.tasks, self.answered = options, log, Store(options.state), set(), 0

    def start(self, name: str) -> None:
        task = asyncio.create_task(self.work(name))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def take_up(self) -> None:
        """Go on with what an earlier server left unfinished."""
        for batch in reversed(self.store.batches()):
            if batch["status"] not in ENDED:
                self.start(batch["id"])

    def step(self, name: str, status: str, **changed) -> dict:
        return self.store.put_batch(
            self.store.batch(name) | {"status": status, f"{status}_at": int(time.time())} | changed
        )

    async def work(self, name: str) -> None:
        """Lead a batch from validating to its end."""
        batch, whole = self.store.batch(name), self.options.batch_seconds
        await asyncio.sleep(whole * 0.2)
        lines, problems = await read_lines(self.store.file(batch["input_file_id"])[1], batch["endpoint"])
        model = lines[0]["body"]["model"] if lines else ""
        fault, others = model.partition("-")[0], {b["status"] for b in self.of_model(model)}
        if fault == "rejected" or fault == "crowded" and others & {"in_progress", "finalizing"}:
            problems = [problem("token_limit_exceeded", "Enqueued token limit reached for this model.")]
        if problems:
            self.step(name, "failed", model=model, errors={"object": "list", "data": problems})
            return
        counts = {"total": len(lines), "completed": 0, "failed": 0}
        if batch["status"] == "validating":
            self.step(name, "in_progress", model=model, request_counts=counts)
            for line in lines:
                self.log.note("asked", message_key(line["body"]["messages"]))
        while fault == "crowded" and "failed" not in {b["status"] for b in self.of_model(model)}:
            await asyncio.sleep(0.02)
        await asyncio.sleep(whole * 0.7)
        self.step(name, "finalizing")
        good, bad = await self.answer(lines, fault)
        await asyncio.sleep(whole * 0.1)
        ids = {kind: self.store.add_file("".join(rows).encode(), f"{name}_{kind}.jsonl", "batch_output")["id"] if rows else None
               for kind, rows in (("output", good), ("error", bad))}  # fmt: skip
        counts |= {"completed": len(good), "failed": len(bad)}
        status = fault if bad and fault in ("expired", "cancelled") else "completed"
        self.step(name, status, output_file_id=ids["output"], error_file_id=ids["error"], request_counts=counts)

    def of_model(self, model: str) -> list[dict]:
        return [batch for batch in self.store.batches() if batch["model"] == model]

    async def answer(self, lines: list[dict], fault: str) -> tuple[list[str], list[str]]:
        """Answer a batch's lines in an order of the server's own: the output file's rows and the error file's rows."""
        keys, good, bad, lost = [message_key(line["body"]["messages"]) for line in lines], [], [], ()
        if fault in LOST:
            new = self.store.unseen(keys)
            lost = [i for i, key in enumerate(keys) if key in new][:: LOST[fault]]
        order = random.Random(f"{self.options.seed} {len(lines)}").sample(range(len(lines)), len(lines))
        for done, i in enumerate(order):
            response, error = None, None
            if i not in lost:
                response = self.one(keys[i], lines[i]["body"])
            elif fault == "flaky":
                response = self.reply(500, keys[i], error_body("The server had an error.", "server_error"))
            else:
                said = f"The batch was {fault} before this request was answered."
                error = {"code": f"batch_{fault}", "message": said}
            row = {"id": f"batch_req_{keys[i][:24]}", "custom_id": lines[i]["custom_id"]}
            row |= {"response": response, "error": error}
            (good if response and response["status_code"] == 200 else bad).append(json.dumps(row) + "\n")
            if done % 200 == 199:
                await asyncio.sleep(0)
        return good, bad

    def one(self, key: str, body: dict) -> dict:
        """Answer one line; what can't be read gets a 400 in its place."""
        try:
            done = completion(body, self.options.seed, self.options.tokens)[1]
        except UNREADABLE as error:
            return self.reply(400, key, error_body(f"{type(error).__name__} {error}"))
        self.log.note("answered", key)
        self.answered += 1
        return self.reply(200, key, done)

    @staticmethod
    def reply(status: int, key: str, body: dict) -> dict:
        return {"status_code": status, "request_id": f"req_{key[:24]}", "body": body}

    async def upload(self, request):
        form = await request.post()
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, web.FileField) or not purpose:
            return no(400, "A file and its purpose are required.")
        if purpose == "batch" and not file.filename.endswith(".jsonl"):
            return no(400, "Invalid file format for Batch API. Must be .jsonl")
        return web.json_response(self.store.add_file(file.file.read(), file.filename, purpose))

    async def file(self, request):
        found = self.store.file(name := request.match_info["id"])
        if not found:
            return no(404, f"No such File object: {name}")
        if request.path.endswith("/content"):
            return web.Response(body=found[1], content_type="application/octet-stream")
        return web.json_response(found[0])

    async def create(self, request):
        asked = await request.json()
        found = self.store.file(asked.get("input_file_id"))
        if asked.get("endpoint") != "/v1/chat/completions" or asked.get("completion_window") != "24h":
            return no(400, "Expected the endpoint /v1/chat/completions and the completion_window 24h.", "invalid_value")
        if not found or found[0]["purpose"] != "batch":
            wrong = f"Invalid input_file_id {asked.get('input_file_id')!r}: expected a file with the purpose batch."
            return no(400, wrong, "invalid_value")
        metadata = asked.get("metadata") or {}
        sizes = [(len(key), len(text) if isinstance(text, str) else 999) for key, text in metadata.items()]
        if len(metadata) > 16 or any(key > 64 or text > 512 for key, text in sizes):
            wrong = "Expected at most 16 pairs of metadata, keys of 64 and texts of 512 characters."
            return no(400, wrong, "invalid_value")
        moments = [f"{status}_at" for status in ("in_progress", "finalizing", "cancelling", *ENDED)]
        now, empty = int(time.time()), ("model", "errors", "output_file_id", "error_file_id", *moments)
        batch = {"id": self.store.new_id("batches"), "object": "batch", "endpoint": asked["endpoint"], "input_file_id": asked["input_file_id"],
                 "completion_window": "24h", "status": "validating", "created_at": now, "expires_at": now + 86_400,
                 "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": asked.get("metadata"), **dict.fromkeys(empty)}  # fmt: skip
        self.store.put_batch(batch)
        self.start(batch["id"])
        return web.json_response(batch)

    async def get(self, request):
        batch = self.store.batch(request.match_info["id"])
        return web.json_response(batch) if batch else no(404, f"No batch found with id '{request.match_info['id']}'.")

    async def page(self, request):
        batches, after, limit = self.store.batches(), request.query.get("after"), int(request.query.get("limit", 20))
        ids = [batch["id"] for batch in batches]
        if not 1 <= limit <= 100 or after not in (None, *ids):
            wrong = f"Expected a limit from 1 to 100 and after a batch's id, found {limit} and {after!r}."
            return no(400, wrong, "invalid_value")
        rest = batches[ids.index(after) + 1 if after else 0 :]
        shown = rest[:limit]
        return web.json_response({"object": "list", "data": shown, "has_more": len(rest) > limit,
                                  "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None})  # fmt: skip


# ---- the server ----


class ChatServer:
    """Answer chat completions after a while, and count."""

    def __init__(self, options):
        self.options, self.log = options, EventLog(options.log)
        self.batches = Batches(options, self.log)
        self.asked = self.answered = self.refused = self.dropped = self.flying = self.most = 0
        self.ended, self.parent = False, os.getppid()  # read before the port is told: from then on the parent may go

    def routes(self):
        batches = self.batches
        return [web.post("/v1/chat/completions", self.chat), web.get("/stats", self.stats),
                web.post("/v1/files", batches.upload), web.get("/v1/files/{id}", batches.file), web.get("/v1/files/{id}/content", batches.file),
                web.post("/v1/batches", batches.create), web.get("/v1/batches", batches.page), web.get("/v1/batches/{id}", batches.get)]  # fmt: skip

    async def chat(self, request):
        """Answer one call; the answer is noted when the transport has it, a client that went away was not answered."""
        if self.options.refuse_above is not None and self.flying >= self.options.refuse_above:
            self.refused += 1
            return no(429, "Too many calls in flight.", "rate_limit_exceeded", **{"retry-after-ms": "50"})
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            body = json.loads(await request.read())
            if body.get("stream") or not body["messages"]:
                raise ValueError("expected messages, and no stream")
            key, done = completion(body, self.options.seed, self.options.tokens)
            self.asked += 1
            self.log.note("asked", key)
            await asyncio.sleep(self.options.latency)
        except UNREADABLE as error:
            return no(400, f"The request can't be read: {type(error).__name__} {error}")
        finally:
            self.flying -= 1
        response = web.Response(
            body=json.dumps(done).encode(), content_type="application/json", headers={"x-request-id": f"req_{key[:24]}"}
        )
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            self.dropped += 1
            return response
        self.log.note("answered", key)
        self.answered += 1
        self.ended = self.ended or self.answered >= self.options.calls
        return response

    async def stats(self, request):
        self.log.flush()
        return web.json_response({"asked": self.asked, "answered": self.answered, "refused": self.refused, "dropped": self.dropped, "in_flight": self.flying,
                                  "most_in_flight": self.most, "batch_answered": self.batches.answered, "cpu_seconds": time.process_time()})  # fmt: skip

    def stop(self) -> None:
        self.ended = True

    async def live(self) -> None:
        """Last until told to stop, until enough was answered, until the time is up, or until the parent is gone."""
        end = time.monotonic() + self.options.seconds
        while not self.ended and time.monotonic() < end and os.getppid() == self.parent:
            self.log.flush()
            await asyncio.sleep(0.02)


async def serve(options) -> None:
    """Bind, say where, live, and end with the log complete."""
    server = ChatServer(options)
    application = web.Application(client_max_size=UPLOAD_BYTES)
    application.add_routes(server.routes())
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port, backlog=1024)
    await site.start()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, server.stop)
    server.batches.take_up()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    try:
        await server.live()
        await runner.cleanup()
    finally:
        server.log.flush()


def read_options(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.3, help="seconds before a call is answered")
    parser.add_argument("--calls", type=int, default=250_000, help="chat completions after which the server stops")
    parser.add_argument("--seconds", type=float, default=900, help="seconds after which the server stops")
    parser.add_argument("--log", required=True, help="file to append events to, one JSON line each")
    parser.add_argument("--refuse-above", type=int, help="calls in flight above which the server answers 429")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other replies")
    parser.add_argument("--tokens", type=int, default=40, help="words of free text in a reply")
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="seconds from a batch's creation to its end")
    parser.add_argument("--state", help="file that keeps files and batches over a restart")
    parser.add_argument("--port", type=int, default=0, help="port to bind; 0 takes a free one")
    return parser.parse_args(arguments)


# ---- for the tests ----


class RunningServer:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log_path = process, log
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {log.with_suffix('.err').read_text()[-500:]}")
        self.port = json.loads(line)["port"]

    def uri(self, model: str) -> str:
        return f"openai:{model}@{self.base_url}"

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            return json.load(answer)

    def log(self) -> list[dict]:
        """Return the events so far, also when the server is gone."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):  # it may end just now, and then the file is complete
                self.stats()
        return [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines()]

    def stop(self) -> int:
        """End the server and return its exit status."""
        return end_process(self.process)


def end_process(process: subprocess.Popen) -> int:
    """End a process that we started, gently if it lets us, and return its exit status."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(10)


@contextlib.contextmanager
def start_server(tmp_path, **options):
    """Run a server while the block lasts; options are those of the command line, such as latency or refuse_above."""
    folder = Path(tmp_path)
    unused = (p for n in itertools.count() if not (p := folder / f"chat_server_{n}.jsonl").exists())
    log = Path(options.pop("log", None) or next(unused))
    named = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with open(log.with_suffix(".err"), "ab") as errors:
        process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--log", str(log), *named], stdout=subprocess.PIPE,
                                   stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    with process.stdout:
        try:
            yield RunningServer(process, log)
        finally:
            end_process(process)


if __name__ == "__main__":
    asyncio.run(serve(read_options()))
