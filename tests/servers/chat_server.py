"""A model server of the tests' own: chat completions and batches by OpenAI's protocol, in a process of its own.

It outlives the client that it answers, and notes what was asked and what was answered. So a test can kill a client at
any moment and see afterwards what was paid for twice. Replies follow from the hash of what was asked.
A batch misbehaves by the name of its model, up to a hyphen:
flaky: a third of the lines new to the server end with status 500; asked again, they are answered
expired, cancelled: half of the lines new to the server are left; asked again, they are answered
rejected: the batch fails as a whole, as if the queue were full
crowded: it fails while another one of this model is worked on; the first is worked on until another has failed
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
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from aiohttp import web

ENDPOINT = "/v1/chat/completions"
LOST = {"flaky": 3, "expired": 2, "cancelled": 2}  # of so many new lines one is lost
ENDED = ("failed", "completed", "expired", "cancelled")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)  # what a body of another form leads to
WORDS = "the client is heard and the reply stays with what was said before it asks for more in a calm and open way"


# ---- what is answered ----


def message_key(messages: list) -> str:
    """Name a question by its messages, as the log does."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


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
    known = WORDS.split()
    return " ".join(known[next(digits) % len(known)] for _ in range(words)).capitalize() + "."


def completion(body: dict, words: int = 40) -> tuple[str, dict]:
    """Answer the body of a call: the question's key, and a chat completion."""
    key = message_key(body["messages"])
    digits, form = itertools.cycle(hashlib.shake_256(key.encode()).digest(256)), body.get("response_format")
    text = json.dumps(fill(form["json_schema"]["schema"], digits, 5)) if form else say(digits, words)
    tokens = [sum(len(m["content"]) for m in body["messages"]) // 4 + 1, len(text) // 4 + 1]
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*tokens, sum(tokens))))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    done = {"id": f"chatcmpl-{key[:24]}", "object": "chat.completion", "created": int(time.time())}
    return key, done | {"model": body["model"], "choices": [choice], "usage": usage}


def no(status: int, message: str) -> web.Response:
    """Refuse a call."""
    return web.json_response({"error": {"message": message, "type": "x", "code": None}}, status=status)


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


# ---- batches ----


class Batches:
    """Take files and work on batches, one after the clock and not after the work; `state` keeps them over a restart."""

    def __init__(self, options, log: EventLog):
        self.options, self.log, self.tasks, self.answered = options, log, set(), 0
        self.files, self.batches, self.seen = {}, {}, {}  # id -> text, id -> batch, keys of lines
        if options.state and Path(options.state).is_file():
            self.files, self.batches, self.seen = json.loads(Path(options.state).read_text())

    def start(self, name: str) -> None:
        task = asyncio.create_task(self.work(name))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def take_up(self) -> None:
        """Go on with what an earlier server left unfinished."""
        for name, batch in self.batches.items():
            if batch["status"] not in ENDED:
                self.start(name)

    def step(self, name: str, status: str, **changed) -> None:
        self.batches[name] |= {"status": status} | changed
        if self.options.state:
            Path(self.options.state).write_text(json.dumps([self.files, self.batches, self.seen]))

    def keep(self, text: str) -> str:
        """Keep a file; return its id."""
        name = f"file-{len(self.files):024x}"
        self.files[name] = text
        return name

    async def work(self, name: str) -> None:
        """Lead a batch from validating to its end."""
        batch, whole = self.batches[name], self.options.batch_seconds
        await asyncio.sleep(whole * 0.2)
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].split("\n") if line]
        model = lines[0]["body"]["model"]
        others = [other for other in self.batches.values() if other["model"] == model]
        fault, problems, batch["model"] = model.partition("-")[0], wrong_lines(lines), model
        busy = any(other["status"] in ("in_progress", "finalizing") for other in others)
        if fault == "rejected" or fault == "crowded" and busy:
            problems = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None}]
        if problems:
            return self.step(name, "failed", errors={"object": "list", "data": problems})
        if batch["status"] == "validating":
            self.step(name, "in_progress", request_counts={"total": len(lines), "completed": 0, "failed": 0})
            for line in lines:
                self.log.note("asked", message_key(line["body"]["messages"]))
        while fault == "crowded" and not any(b["model"] == model and b["errors"] for b in self.batches.values()):
            await asyncio.sleep(0.02)
        await asyncio.sleep(whole * 0.7)
        self.step(name, "finalizing")
        good, bad = self.answer(lines, fault)
        await asyncio.sleep(whole * 0.1)
        ids = [self.keep("".join(rows)) if rows else None for rows in (good, bad)]
        status = fault if bad and fault in ("expired", "cancelled") else "completed"
        self.step(name, status, output_file_id=ids[0], error_file_id=ids[1])

    def answer(self, lines: list[dict], fault: str) -> tuple[list[str], list[str]]:
        """Answer a batch's lines in an order of the server's own: the output file's rows and the error file's rows."""
        keys, rows = [message_key(line["body"]["messages"]) for line in lines], ([], [])
        new = [i for i, key in enumerate(keys) if key not in self.seen]
        lost = new[:: LOST[fault]] if fault in LOST else []
        self.seen |= dict.fromkeys(keys)
        for i in random.Random(len(lines)).sample(range(len(lines)), len(lines)):
            response, error = None, None
            if i not in lost:
                response = self.one(keys[i], lines[i]["body"])
            elif fault == "flaky":
                response = {"status_code": 500, "body": {"error": {"message": "The server had an error."}}}
            else:
                error = {
                    "code": f"batch_{fault}",
                    "message": f"The batch was {fault} before this request was answered.",
                }
            row = {"custom_id": lines[i]["custom_id"], "response": response, "error": error}
            rows[not response or response["status_code"] != 200].append(json.dumps(row) + "\n")
        return rows

    def one(self, key: str, body: dict) -> dict:
        """Answer one line; what can't be read gets a 400 in its place."""
        try:
            done = completion(body)[1]
        except UNREADABLE as error:
            return {"status_code": 400, "body": {"error": {"message": f"{type(error).__name__} {error}"}}}
        self.log.note("answered", key)
        self.answered += 1
        return {"status_code": 200, "body": done}

    async def upload(self, request):
        form = await request.post()
        if form["purpose"] != "batch" or not form["file"].filename.endswith(".jsonl"):
            return no(400, "Expected a file .jsonl with the purpose batch.")
        return web.json_response({"id": self.keep(form["file"].file.read().decode()), "object": "file"})

    async def content(self, request):
        found = self.files.get(request.match_info["id"])
        return no(404, "No such file.") if found is None else web.Response(text=found)

    async def create(self, request):
        asked = await request.json()
        if asked["endpoint"] != ENDPOINT or asked["input_file_id"] not in self.files:
            return no(400, f"Expected the endpoint {ENDPOINT} and a file that is here.")
        empty = ("model", "errors", "output_file_id", "error_file_id", "request_counts")
        batch = {"id": f"batch_{len(self.batches):024x}", "object": "batch", **asked, **dict.fromkeys(empty)}
        self.batches[batch["id"]] = batch
        self.step(batch["id"], "validating", created_at=int(time.time()))
        self.start(batch["id"])
        return web.json_response(batch)

    async def get(self, request):
        found = self.batches.get(request.match_info["id"])
        return web.json_response(found) if found else no(404, "No such batch.")

    async def page(self, request):
        """List the newest batches, or those behind the batch `after`."""
        newest = list(self.batches.values())[::-1]
        start = 1 + list(self.batches)[::-1].index(after) if (after := request.query.get("after")) else 0
        end = start + int(request.query["limit"])
        return web.json_response({"object": "list", "data": newest[start:end], "has_more": end < len(newest)})


def wrong_lines(lines: list[dict]) -> list[dict]:
    """Say what OpenAI would refuse in a batch's lines."""
    ids, problems = set(), []
    for number, line in enumerate(lines, 1):
        wrong = {
            "duplicate_custom_id": line["custom_id"] in ids,
            "url_mismatch": (line["method"], line["url"]) != ("POST", ENDPOINT),
            "model_mismatch": line["body"]["model"] != lines[0]["body"]["model"],
        }
        ids.add(line["custom_id"])
        problems += [
            {"code": code, "message": "This is wrong.", "line": number} for code, found in wrong.items() if found
        ]
    return problems


# ---- the server ----


class ChatServer:
    """Answer chat completions after a while, and count."""

    def __init__(self, options):
        self.options, self.log = options, EventLog(options.log)
        self.batches = Batches(options, self.log)
        self.answered = self.dropped = self.flying = self.most = 0
        self.ended, self.parent = False, os.getppid()  # read before the port is told: from then on the parent may go

    def routes(self):
        batches = self.batches
        posts = {ENDPOINT: self.chat, "/v1/files": batches.upload, "/v1/batches": batches.create}
        gets = {"/stats": self.stats, "/v1/files/{id}/content": batches.content}
        gets |= {"/v1/batches": batches.page, "/v1/batches/{id}": batches.get}
        return [*(web.post(*route) for route in posts.items()), *(web.get(*route) for route in gets.items())]

    async def chat(self, request):
        """Answer one call; the answer is noted when the transport has it, a client that went away was not answered."""
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            key, done = completion(await request.json())
            self.log.note("asked", key)
            await asyncio.sleep(self.options.latency)
        except UNREADABLE as error:
            return no(400, f"The request can't be read: {type(error).__name__} {error}")
        finally:
            self.flying -= 1
        response = web.json_response(done)
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
        counts = {"answered": self.answered, "dropped": self.dropped, "in_flight": self.flying}
        counts |= {"most_in_flight": self.most, "cpu_seconds": time.process_time()}
        return web.json_response(counts)

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
    application = web.Application(client_max_size=512 * 1024**2)
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


def read_options():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.3, help="seconds before a call is answered")
    parser.add_argument("--calls", type=int, default=250_000, help="chat completions after which the server stops")
    parser.add_argument("--seconds", type=float, default=900, help="seconds after which the server stops")
    parser.add_argument("--log", required=True, help="file to append events to, one JSON line each")
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="seconds from a batch's creation to its end")
    parser.add_argument("--state", help="file that keeps files and batches over a restart")
    parser.add_argument("--port", type=int, default=0, help="port to bind; 0 takes a free one")
    return parser.parse_args()


# ---- for the tests ----


class RunningServer:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log_path = process, log
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {log.with_suffix('.err').read_text()[-500:]}")
        self.port = json.loads(line)["port"]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def uri(self, model: str) -> str:
        return f"openai:{model}@{self.base_url}"

    def read(self, path: str):
        """Get what lies at a path of the server, through no proxy."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def stats(self) -> dict:
        return self.read("/stats")

    def log(self) -> list[dict]:
        """Return the events so far, also when the server is gone."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):  # it may end just now, and then the file is complete
                self.stats()
        return [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines()]

    def stop(self) -> int:
        """End the server, gently if it lets us, and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)


@contextlib.contextmanager
def start_server(tmp_path, **options):
    """Run a server while the block lasts; options are those of the command line, such as latency."""
    unused = (p for n in itertools.count() if not (p := Path(tmp_path) / f"chat_server_{n}.jsonl").exists())
    log = Path(options.pop("log", None) or next(unused))
    named = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(Path(__file__).resolve()), "--log", str(log), *named]
    with open(log.with_suffix(".err"), "ab") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, **pipes, start_new_session=True)
    with process.stdout:
        running = RunningServer(process, log)
        try:
            yield running
        finally:
            running.stop()


if __name__ == "__main__":
    asyncio.run(serve(read_options()))
