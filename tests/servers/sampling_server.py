"""What tests start instead of `vllm serve`: a chat server on the loopback address, with faults to order.

A fault is an option, or a word in brackets in what is asked, such as [busy]. Candidates follow from the messages, the
seed and the candidate's place, so the same request gets the same words, as it would from vLLM in a perfect world.

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


def no(status: int, message: str, **headers) -> web.Response:
    """Refuse a call."""
    return web.json_response({"error": {"message": message, "code": status}}, status=status, headers=headers)


class SamplingServer:
    def __init__(self, options):
        self.options, self.seen, self.answered = options, set(), 0

    def note(self, **facts) -> None:
        if self.options.log:
            with open(self.options.log, "a", encoding="utf-8") as log:
                log.write(json.dumps(facts) + "\n")

    async def models(self, request):
        root = "/models/last-iteration" if self.options.fault == "root" else self.options.model
        cards = [{"id": self.options.name, "root": root}]
        for module in self.options.lora_modules:
            name, _, path = module.partition("=")
            cards.append({"id": name, "root": path, "parent": self.options.name})
        return web.json_response({"object": "list", "data": cards})

    async def chat(self, request):
        body = await request.json()
        key = json.dumps(body["messages"])
        fault = next((name for name in FAULTS if f"[{name}]" in key), self.options.fault)
        first, self.seen = key not in self.seen, self.seen | {key}
        self.note(body=body)
        if body["model"] not in (self.options.name, *(own.partition("=")[0] for own in self.options.lora_modules)):
            return no(404, "no such model")
        if fault == "long":
            return no(400, "This model's maximum context length is 8 tokens.")
        if fault == "busy" and first:
            return no(503, "busy", **{"retry-after-ms": "10"})
        if fault == "die" and self.answered >= self.options.after:
            os._exit(9)
        if fault == "cut" and first:
            request.transport.close()
        self.answered += 1
        said = [candidate(body["messages"], body["seed"], place) for place in range(body["n"] - (fault == "short"))]
        messages = [({"role": "assistant", "content": text}, why) for text, why in said]
        choices = [{"index": i, "message": one, "finish_reason": why} for i, (one, why) in enumerate(messages)]
        usage = {"prompt_tokens": 9, "completion_tokens": 9 * len(said)}
        return web.json_response({"object": "chat.completion", "choices": choices, "usage": usage})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--name", default="policy")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    parser.add_argument("--max-lora-rank", type=int, choices=[16, 32, 64, 128, 256, 320, 512])
    parser.add_argument("--tokenizer")
    parser.add_argument("--log", default="")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--fault", choices=["", *FAULTS], default="")
    options = parser.parse_args()
    signal.alarm(300)  # whoever started it may have been killed
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
    where = {"host": "127.0.0.1", "port": options.port, "handle_signals": options.fault != "deaf"}
    web.run_app(application, **where, print=None, access_log=None)


if __name__ == "__main__":
    main()
