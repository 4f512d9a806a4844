"""DPO-Iter with watching, killed again and again: python iterating.py SCORER FOLDER MOMENT ...

It imports once, and each start is a child: one for each moment, which the child finds by looking for that file (a glob
below FOLDER) whenever it opens, makes, moves or removes one, and then kills itself as a power cut would; and a last one
that does the rest.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import pandas as pd

from psycopref.core.files import write_json
from psycopref.core.settings import load_profile
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway
from psycopref.models.weights import find_weights
from psycopref.training.iteration import Online, iterate
from psycopref.training.watching import Watcher, watched_speeches

SETTINGS = {"dpo.batch_size": 2, "dpo.checkpoints": 2, "evaluation.max_tokens": 8, "evaluation.bootstrap": 20}
SETTINGS |= {"dpo_iter.prompts": 6, "dpo_iter.block": 3, "dpo_iter.candidates": 3, "dpo_iter.checkpoints": 2}
SETTINGS |= {"watch.answers": 2}
PLACES = ("grey", "old", "wooden", "long", "cold", "steep", "narrow", "many", "wet", "dark")
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def work(scorer, folder):
    "Two iterations, the backbone and each policy looked at; the result is written last."
    tiny, profile = find_weights("random-tiny"), load_profile("tiny", SETTINGS)
    texts = {name: f"I count the {name} stairs again and again." for name in PLACES}
    speeches = pd.DataFrame({"speech_id": texts.keys(), "speech": texts.values(), "split": ["dev"] * 4 + ["train"] * 6})
    gateway = Gateway(ReplyCache(folder / "replies.sqlite"))
    watcher = Watcher(folder / "points", tiny, scorer, watched_speeches(speeches, None, 0), profile, 0, gateway)
    own = {name: texts[name] for name in PLACES[4:]}, profile.dpo, profile.dpo_iter, profile.evaluation
    online = Online(folder / "iter", tiny, scorer, *own, "float32", 0)
    write_json(folder / "result.json", iterate(online, watcher.look))


def prepare():
    "Import what the work needs, once for all starts."
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    from trl import DPOTrainer  # noqa: F401

    torch.set_num_threads(1)


def die_at(folder, moment):
    "Kill this process at the first deed on a file behind the moment."
    assert not any(folder.glob(moment)), f"{moment} is there already"
    looking = []

    def hook(event, arguments):
        if event in EVENTS and not looking:
            looking.append(True)  # looking opens folders itself
            if any(folder.glob(moment)):
                os.kill(os.getpid(), signal.SIGKILL)
            looking.clear()

    sys.addaudithook(hook)


def start(scorer, folder, moment):
    "Work in a child, to the moment or to the end; return how it ended."
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if moment:
            die_at(folder, moment)
        work(scorer, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    prepare()
    scorer, folder, *moments = sys.argv[1:]
    for moment in (*moments, None):
        code = start(scorer, Path(folder), moment)
        if code != (-signal.SIGKILL if moment else 0):
            sys.exit(f"{moment}: ended with {code}")
