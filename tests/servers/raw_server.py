"""A chat server that controls every byte: it answers, stalls, dribbles, resets and lies as a test tells it to."""

import asyncio
import contextlib
import json
import socket
import struct
import threading

from psycopref.gateway.gateway import chat_model
from psycopref.models.chat import ChatRequest


def ask(text="Hello", **keywords):
    return ChatRequest(({"role": "user", "content": text},), **keywords)


def said(text="fine", usage=(5, 2), **changed) -> bytes:
    counts = usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(
        {"choices": [{"finish_reason": "stop", "message": {"content": text}}], "usage": counts} | changed
    ).encode()


def answer(body: bytes = b"", status: int = 200, length: int | None = None, **headers) -> bytes:
    """One HTTP answer; `length` is what it promises."""
    lines = {"Content-Type": "application/json", "Content-Length": len(body) if length is None else length} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    return (f"HTTP/1.1 {status} x\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode() + body


def good(text="fine", **how) -> bytes:
    return answer(said(text, **how))


def error(status: int, message="no", code=None, **headers) -> bytes:
    return answer(json.dumps({"error": {"message": message, "type": "x", "code": code}}).encode(), status, **headers)


class Cut(bytes):
    """Send this much, then reset the connection."""


class Closed(bytes):
    """Send this much, then close the connection in order."""


class Dribbled(bytes):
    """Send the first bytes, then one now and then."""


class Silent:
    """Say nothing."""


class RawServer:
    """Answer by `behave(text, attempt)`: bytes to send, or how to misbehave; it ends after a minute by itself."""

    def __init__(self):
        self.behave, self.log, self.bodies, self.headers = lambda text, attempt: answer(said(f"re: {text}")), [], [], []
        self.flying = self.most = 0
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main(started)), daemon=True)
        self.thread.start()
        assert started.wait(10)
        self.uri = f"openai:some/model@http://127.0.0.1:{self.port}/v1"

    async def main(self, started):
        self.loop, self.over, self.tasks = asyncio.get_running_loop(), asyncio.Event(), set()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=512)
        self.port = self.server.sockets[0].getsockname()[1]
        started.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await self.over.wait()
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self.one(reader, writer):
                pass
        writer.transport.abort()

    async def one(self, reader, writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:])}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        text = body["messages"][-1]["content"]
        attempt = self.log.count(text)
        self.log.append(text), self.bodies.append(body), self.headers.append(headers)
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            how = self.behave(text, attempt)
            if asyncio.iscoroutine(how):
                how = await how
            if how is Silent:
                await asyncio.sleep(30)
            for i in range(0 if not isinstance(how, Dribbled) else len(how)):
                writer.write(how[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0 if i < 80 else 0.04)
            if not isinstance(how, Dribbled):
                writer.write(how)
                await writer.drain()
        finally:
            self.flying -= 1
        if isinstance(how, Cut):
            await asyncio.sleep(0.02)  # let it arrive
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif isinstance(how, Closed):
            writer.close()
        return not isinstance(how, (Cut, Closed))

    def stop_listening(self):
        """Vanish: nobody listens any more, and open connections are cut."""
        self.server.close()
        for task in self.tasks:
            task.cancel()

    def stop(self):
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)


def open_model(server, attempts=2, timeout=5.0, concurrency=None, price=None):
    model = chat_model(server.uri, max_retries=attempts - 1, timeout=timeout)
    model.concurrency, model.price = concurrency or model.concurrency, price or model.price
    return model
