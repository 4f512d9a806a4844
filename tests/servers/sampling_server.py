"""What tests start instead of `vllm serve`: a server of chat completions on the loopback address, with faults to choose from.

A fault is an option, or a word in brackets in what is asked, such as [busy]. Candidates follow from the messages, the seed and the candidate's place, so the same request gets the same words, as it would from vLLM in a perfect world.

    python tests/servers/sampling_server.py --model FOLDER --port 8000 --log calls.jsonl --fault crash
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

from aiohttp import web

FAULTS = {
    "crash": "ends before it listens, with words on its error output",
    "mute": "never listens",
    "die": "ends without a word after `after` answers",
    "root": "serves another model than it was told",
    "busy": "refuses the first call of each prompt with 503",
    "cut": "hangs up on the first call of each prompt",
    "short": "gives one candidate less than was asked for",
    "long": "refuses every prompt as too long",
    "deaf": "ignores SIGTERM, and has a child that does",
}


def candidate(messages, seed: int, place: int) -> tuple[str, str]:
    """Say something that hangs on what was asked, and how it ended."""
    digest = hashlib.sha256(json.dumps([messages, seed + place]).encode()).hexdigest()
    return f"I hear you, {digest[:12]}.", "length" if digest[0] in "01" else "stop"


class SamplingServer:
    def __init__(self, options):
        self.options, self.seen, self.answered = options, set(), 0

    def note(self, **facts) -> None:
        if self.options.log:
            with open(self.options.log, "a", encoding="utf-8") as log:
                log.write(json.dumps(facts) + "\n")

    async def models(self, request):
        root = "/models/last-iteration" if self.options.fault == "root" else self.options.model
        return web.json_response(
            {"object": "list", "data": [{"id": self.options.name, "object": "model", "root": root}]}
        )

    async def chat(self, request):
        body = await request.json()
        key = json.dumps(body["messages"])
        fault = next((name for name in FAULTS if f"[{name}]" in key), self.options.fault)
        first, self.seen = key not in self.seen, self.seen | {key}
        self.note(body=body)
        if body["model"] != self.options.name:
            return web.json_response({"error": {"message": "no such model", "code": 404}}, status=404)
        if fault == "long":
            return web.json_response(
                {"error": {"message": "This model's maximum context length is 8 tokens.", "code": 400}}, status=400
            )
        if fault == "busy" and first:
            return web.json_response(
                {"error": {"message": "busy", "code": 503}}, status=503, headers={"retry-after-ms": "10"}
            )
        if fault == "die" and self.answered >= self.options.after:
            os._exit(9)
        if fault == "cut" and first:
            request.transport.close()
        self.answered += 1
        said = [candidate(body["messages"], body["seed"], place) for place in range(body["n"] - (fault == "short"))]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": why}
            for i, (text, why) in enumerate(said)
        ]
        usage = {"prompt_tokens": 9, "completion_tokens": 9 * len(said)}
        return web.json_response({"object": "chat.completion", "choices": choices, "usage": usage})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (
        ("model", str, None),
        ("port", int, None),
        ("name", str, "policy"),
        ("log", str, ""),
        ("after", int, 0),
        ("fault", str, ""),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    options = parser.parse_args()
    assert options.fault in ("", *FAULTS), options.fault
    if options.fault == "crash":
        sys.exit("torch.OutOfMemoryError: no room for the weights")
    if options.fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = SamplingServer(options)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    server.note(pids=[os.getpid(), child.pid])
    if options.fault == "mute":
        time.sleep(120)
    application = web.Application()
    application.add_routes([web.get("/v1/models", server.models), web.post("/v1/chat/completions", server.chat)])
    web.run_app(
        application,
        host="127.0.0.1",
        port=options.port,
        print=None,
        access_log=None,
        handle_signals=options.fault != "deaf",
    )


if __name__ == "__main__":
    main()
