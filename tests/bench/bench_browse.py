"""How large the page of answers becomes at the paper's number of test speeches, and how soon a browser shows one."""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench import demo_speeches, keep

from psycopref.core.principles import principle_keys
from psycopref.reporting.browse import browse_page

SPEECHES, WORDS, REASON, POLICIES, OPENED = 3291, 200, 30, 7, 5
LIMITS = {"megabytes": 40, "seconds": 2}


class Writer:
    "Write text in which words follow one another as in the demo corpus, so that it packs about as well as people's."

    def __init__(self, seed: int = 0):
        self.chance, self.after = random.Random(seed), defaultdict(list)
        for speech in demo_speeches():
            words = speech.split()
            for word, following in zip(words, words[1:]):
                self.after[word].append(following)
        self.starts = [*self.after]

    def __call__(self, n: int) -> str:
        words = [self.chance.choice(self.starts)]
        while len(words) < n:
            words.append(self.chance.choice(self.after.get(words[-1]) or self.starts))
        return " ".join(words)


def record(i: int, write: Writer) -> dict:
    "Invent all that the paper's run would know of a test speech: two sizes of base, DPO and DPO-Iter."
    keys, orders = principle_keys(), ["win", "loss"]
    ratings = lambda: [[write.chance.randint(1, 5), write(REASON)] for _ in keys]  # noqa: E731
    pool = [
        {"model": f"m{n}", "text": write(WORDS), "end": "stop", "mean": 3.0, "ratings": ratings()} for n in range(4)
    ]
    answers = {setting: [{"policy": f"p{n}", "text": write(WORDS), "end": "stop"} for n in range(POLICIES)]
               for setting in ("free", "length")}  # fmt: skip
    verdicts = [{"judge": f"j{j}", "setting": setting, "policy": f"p{n}", "orders": orders}
                for j in range(4) for setting in answers for n in range(POLICIES - 1)]  # fmt: skip
    told = {"id": f"speech-{i}", "speech": write(70), "topic": f"topic-{i % 42}", "coarse": "a coarse topic"}
    told |= {"split": "test", "source": "bench", "crisis": "", "pairs": [(0, 3)]}
    return told | {"pool": pool, "policies": answers, "verdicts": verdicts, "training": []}


def seconds_to_open(path: Path, times: int = OPENED) -> list[float] | None:
    "Open a page from disk until it shows the last speech; None without a browser."
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        return None
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(times):
            page, began = browser.new_page(), time.perf_counter()
            page.goto(f"{path.as_uri()}#speech-{SPEECHES - 1}")
            page.wait_for_function("document.documentElement.dataset.open")
            found.append(time.perf_counter() - began)
            page.close()
        browser.close()
    return found


if __name__ == "__main__":
    write = Writer()
    records = [record(i, write) for i in range(SPEECHES)]
    began = time.perf_counter()
    told = {"rater": "nobody", "principles": [*principle_keys()], "absent": ""}
    page = browse_page(records, "bench", "invented words", told)
    written, folder = time.perf_counter() - began, Path(tempfile.mkdtemp())
    (folder / "browse.html").write_text(page, encoding="utf-8")
    size, opened = (folder / "browse.html").stat().st_size / 1e6, seconds_to_open(folder / "browse.html")
    shutil.rmtree(folder)
    result = {"megabytes": round(size, 2), "write s": round(written, 1), "limits": LIMITS}
    result["open s"] = [round(one, 2) for one in opened] if opened else "no browser here"
    print(result)
    keep("browse", result, f"{SPEECHES} test speeches, {WORDS} words an answer, reasons of {REASON} words", "page")
    late = opened and statistics.median(opened) > LIMITS["seconds"]
    sys.exit(bool(late or size > LIMITS["megabytes"]))
