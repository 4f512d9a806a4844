"""What the scripts of this folder share; each runs in an environment of its own, so nothing but the standard library
is used."""

import json
import sys
import tempfile
import time


def report(rate) -> None:
    """Read BASE_URL PROMPTS.jsonl CONCURRENCY, let `rate(base_url, prompts, concurrency, cache)` send the prompts,
    print one JSON line."""
    base_url, path, concurrency = sys.argv[1:]
    with open(path, encoding="utf-8") as lines:
        prompts = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as cache:
        start = time.monotonic()
        replies = rate(base_url, prompts, int(concurrency), cache)
        seconds = time.monotonic() - start
        failed = len(prompts) - sum(bool(reply) for reply in replies)
    print(json.dumps({"calls": len(prompts), "seconds": round(seconds, 3), "failed": failed}))
