"""Jobs: kept or cleared, one at a time whoever was killed, launches that fail or are interrupted, whole goals."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from psycopref.core.settings import DpoSettings, LoraSettings, load_profile
from psycopref.models.weights import Weights
from psycopref.training import jobs
from psycopref.training.dpo import DpoJob
from psycopref.training.jobs import do_job, launch_command, launch_plan, load_job, locked
from psycopref.training.jobs import read_job, run_or_launch, store_job, whole_folder
from psycopref.training.reward_model import RewardJob
from refusals import one_line

PAIRS = pd.DataFrame({"prefID": [3, 4], "question": ["I count the stairs.", "No."]})
PAIRS = PAIRS.assign(chosen=["What then?", "I see."], rejected=["Stop.", "Why?"])


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    "Tests of launching say what they want themselves."
    for name in ("PSYCOPREF_PROCESSES", "PSYCOPREF_ACCELERATE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


JOB = DpoJob(Weights("a", "b", "c", "d"), DpoSettings(), Path("model"))


def stored(folder, pairs=PAIRS, **more):
    job = dataclasses.replace(JOB, **{"goal": folder / "model"} | more)
    store_job(folder, job, {"train": pairs, "dev": None})
    return folder


# What a job is


def test_the_same_job_is_kept_and_another_one_cleared(tmp_path):
    job = stored(tmp_path / "job")
    (job / "checkpoints").mkdir()
    stored(job, pairs=PAIRS.assign(note="nobody reads this"))
    assert (job / "checkpoints").is_dir()
    changed = PAIRS.assign(chosen=["What then?", "I hear you."])
    others = [{"pairs": own} for own in (changed, PAIRS[:1], PAIRS[::-1])]
    others += [{"settings": DpoSettings(beta=0.2)}, {"settings": DpoSettings(lora=LoraSettings(rank=2))}]
    others += [{"goal": tmp_path / "elsewhere"}, {"kind": "reward"}, {"seed": 1}]
    for more in others:
        (job / "checkpoints").mkdir(exist_ok=True)
        stored(job, **more)
        assert not (job / "checkpoints").exists(), more
        stored(job)


def test_a_job_that_other_code_did_is_cleared(tmp_path, monkeypatch):
    (stored(tmp_path / "job") / "checkpoints").mkdir()
    monkeypatch.setattr(jobs, "modules_hash", lambda module, *wings: "other code")
    assert not (stored(tmp_path / "job") / "checkpoints").exists()


def test_a_job_comes_back_as_it_was_stored(tmp_path):
    talk = [{"role": "user", "content": "Why?"}]
    wide = PAIRS.assign(messages=[talk, None], gap=[1.5, 2.0], chosen_empathy_rating=[5, 4], chosen_model=["x", "y"])
    lora = LoraSettings(rank=2, last_layers=3)
    own = dataclasses.replace(JOB, settings=DpoSettings(lora=lora), schedule=(0, 8), reference=JOB.start, optimiser="")
    store_job(tmp_path / "job", own, {"train": wide, "dev": PAIRS[:0], "more": PAIRS})
    job, frames = load_job(tmp_path / "job", DpoJob)
    assert job == own
    assert list(frames) == ["train", "more"], "an empty frame is none"
    assert set(frames["train"]) == {*PAIRS, "messages", "gap", "chosen_empathy_rating"}
    assert frames["train"].chosen.tolist() == PAIRS.chosen.tolist()
    assert [dict(message) for message in frames["train"].messages[0]] == talk


def test_a_job_that_was_half_written_is_none_and_is_written_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs, "write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
        stored(tmp_path / "job")
    assert "job.json" in one_line(lambda: read_job(tmp_path / "job"))
    (tmp_path / "job" / "left").write_text("by who was interrupted")
    assert len(load_job(stored(tmp_path / "job"), DpoJob)[1]["train"]) == 2
    assert not (tmp_path / "job" / "left").exists()


@pytest.mark.parametrize("profile", ["tiny", "demo", "paper"])
def test_the_settings_of_a_profile_come_back_and_unknown_ones_are_refused(profile, tmp_path):
    own = load_profile(profile)
    place = stored(tmp_path / "job", settings=own.dpo) / "job.json"
    assert load_job(place.parent, DpoJob)[0].settings == own.dpo
    job = RewardJob(JOB.start, own.reward, Path("model"))
    store_job(tmp_path / "reward", job, {"train": PAIRS})
    assert load_job(tmp_path / "reward", RewardJob)[0] == job
    place.write_text(place.read_text().replace('"beta"', '"no_such_setting"'))
    assert "settings.no_such_setting" in one_line(lambda: load_job(place.parent, DpoJob))


def test_a_job_of_an_unknown_kind_is_refused(tmp_path):
    assert "'dpo2'" in one_line(lambda: do_job(stored(tmp_path / "job", kind="dpo2")))


# Launching, with stand-ins for the command


@pytest.fixture
def launched(monkeypatch):
    "Let a launch start this Python code in place of accelerate."

    def use(code, processes=2, config=""):
        command = lambda folder, processes, config="": [sys.executable, "-c", code, str(folder)]
        monkeypatch.setattr(jobs, "launch_command", command)
        monkeypatch.setattr(jobs, "launch_plan", lambda batch_size: (processes, config))

    return use


def held(folder):
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True


def test_a_job_is_free_behind_its_lock_even_after_an_error(tmp_path):
    job = stored(tmp_path / "job")
    with pytest.raises(ZeroDivisionError), locked(job):
        assert held(job)
        raise ZeroDivisionError
    assert not held(job)


@pytest.mark.parametrize("missing", ["result.json", "model"])
def test_a_job_is_done_only_with_its_result_and_its_goal(missing, tmp_path, monkeypatch):
    job = stored(tmp_path / "job")
    monkeypatch.setattr(jobs, "launch_plan", lambda batch_size: (1, ""))
    monkeypatch.setattr(jobs, "do_job", lambda folder: {"by": "this start"})
    (job / "model").mkdir()
    (job / "result.json").write_text('{"by": "an earlier start"}')
    assert run_or_launch(job) == {"by": "an earlier start"}
    (job / missing).rmdir() if missing == "model" else (job / missing).unlink()
    assert run_or_launch(job) == {"by": "this start"}


OWN = 'import sys; sys.exit("W0101 noise\\npsycopref: dpo.beta: found 0\\nTraceback\\nChildFailedError")'
ENDS = {
    OWN: "training on 2 processes ended with 1: dpo.beta: found 0",
    'import sys; sys.exit("first\\nRuntimeError: out of memory")': "ended with 1: RuntimeError: out of memory",
    "import os; os.kill(os.getpid(), 9)": "ended with -9: no message",
    "pass": "ended with 0: no message",
    'import sys; sys.stderr.buffer.write(b"\\xff" * 900); sys.exit(2)': "ended with 2: ",
}


@pytest.mark.parametrize("code, expected", ENDS.items(), ids=ENDS.values())
def test_the_end_of_a_launch_is_told_in_one_line(code, expected, tmp_path, launched):
    launched(code)
    said = one_line(lambda: run_or_launch(stored(tmp_path / "job")))
    assert expected in said and len(said) < 600 and not held(tmp_path / "job")


DONE = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
assert any(os.path.realpath(f"/proc/self/fd/{n}") == f"{folder}/lock" for n in os.listdir("/proc/self/fd")), "no lock"
open(os.environ["PSYCOPREF_PROGRESS"], "a").write("DPO 3/8")
time.sleep(0.7)
(folder / "model").mkdir()
(folder / "result.json").write_text("{}")
"""


@pytest.mark.parametrize("followed", [True, False])
def test_a_launch_hands_down_the_lock_and_its_progress_is_shown_where_nobody_above_follows(
    followed, tmp_path, launched, monkeypatch, capsys
):
    log = tmp_path / "progress"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if followed:
        monkeypatch.setenv("PSYCOPREF_PROGRESS", str(log))
    launched(DONE, *(() if followed else (1, "own.yaml")))  # one process is launched where a configuration is named
    assert run_or_launch(stored(tmp_path / "job")) == {}
    assert followed == log.exists() and (log.read_text() if followed else capsys.readouterr().err) == "DPO 3/8"


def test_the_command_names_processes_or_a_configuration(monkeypatch):
    two, own = (" ".join(launch_command(Path("job"), *how)) for how in ((2,), (8, "zero3.yaml")))
    assert "--num_processes 2 " in two and "--multi_gpu" in two and two.endswith(" train job")
    assert "--multi_gpu" not in " ".join(launch_command(Path("job"), 1))
    assert "--config_file zero3.yaml" in own and "--num_processes 8 " in own and "--multi_gpu" not in own
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    plans = [launch_plan(n) for n in (64, 12, 7, 11)]
    assert plans == [(8, ""), (6, ""), (7, ""), (1, "")], "as many GPUs as divide a batch"
    monkeypatch.setenv("PSYCOPREF_PROCESSES", "3")
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", "zero3.yaml")
    assert launch_plan(64) == (3, "zero3.yaml")


# Launching, with accelerate itself

STANDING = """
import os, sys, time
from pathlib import Path
from psycopref.training import jobs

def build(folder):
    rank = os.environ["RANK"]
    (folder / f"worker-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    while not (folder / "go").exists():
        time.sleep(0.05)
    if rank == "0":
        (folder / "model").mkdir()
        (folder / "result.json").write_text('{"by": "the orphans"}')
    sys.exit()

sys.modules["standing"], jobs.JOB_KINDS["dpo"] = sys.modules["__main__"], "standing:build"
jobs.do_job(Path(sys.argv[-1]))
"""
LAUNCHED = """
import sys
from pathlib import Path
from psycopref.training import jobs
real, job = jobs.launch_command, Path(sys.argv[1])
jobs.launch_command = lambda *how: [*real(*how)[:-3], sys.executable, str(job.parent / "standing.py"), str(job)]
jobs.launch_plan = lambda batch_size: (2, "")
try:
    jobs.run_or_launch(job)
except KeyboardInterrupt:
    sys.exit(130)
"""


def soon(condition, seconds):
    "Wait for what other processes will do; say whether it came."
    limit = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return found


def gone(pid, seconds=20.0):
    "Wait until a process is gone, or only waits to be reaped."

    def ended():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return soon(ended, seconds)


@contextlib.contextmanager
def standing(tmp_path):
    "Start a job whose two workers stand and wait; yields start, launcher and workers, and leaves nobody behind."
    (tmp_path / "standing.py").write_text(STANDING)
    job = stored(tmp_path / "job")
    own = dict(stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    start = subprocess.Popen([sys.executable, "-c", LAUNCHED, str(job)], **own)

    def workers():
        return [path.read_text().split() for path in job.glob("worker-*")]

    try:
        assert soon(lambda: start.poll() is not None or list(map(len, workers())) == [2, 2], 90)
        (first, launcher), (second, _) = workers()
        yield job, start, int(launcher), [int(first), int(second)]
    finally:
        (job / "go").touch()
        start.kill()
        start.wait()
        assert all(gone(int(pid)) for pid, _ in workers()), "a worker is left"


def test_interrupting_a_launch_ends_it(tmp_path):
    with standing(tmp_path) as (job, start, launcher, workers):
        os.kill(start.pid, signal.SIGINT)  # to the start alone, not to its group
        assert start.wait(timeout=60) == 130 and all(gone(pid, 5.0) for pid in (launcher, *workers)) and not held(job)


def test_a_start_waits_for_the_orphans_of_a_killed_one_and_finds_the_job_done(tmp_path, monkeypatch, capsys):
    "First the launcher holds the job, then the workers do, who lead sessions of their own."
    monkeypatch.setattr(jobs, "do_job", None)
    found = []
    with standing(tmp_path) as (job, start, launcher, workers):
        start.kill()
        start.wait()
        assert held(job), "the start is dead, the launcher holds the job"
        thread = threading.Thread(target=lambda: found.append(run_or_launch(job)))
        thread.start()
        said = soon(lambda: capsys.readouterr().err, 20)
        os.kill(launcher, signal.SIGKILL)
        assert gone(launcher) and not any(gone(pid, 0.5) for pid in workers), "they go on"
        thread.join(timeout=0.5)
        assert thread.is_alive() and not found
        (job / "go").touch()
        thread.join(timeout=60)
    assert found == [{"by": "the orphans"}] and not held(job)
    assert "is still being trained by a process of an earlier start" in said


# The goal


def test_only_the_main_process_moves_the_folder(tmp_path):
    goal = tmp_path / "policy"
    with whole_folder(goal) as outer:
        outer.mkdir()
        with whole_folder(goal, main=False) as inner:
            assert inner == outer and outer.is_dir()
        assert not goal.exists() and outer.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


MOVING = """
import os, signal, sys
from pathlib import Path
from psycopref.training.jobs import whole_folder
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def move(goal, deed):
    seen = []

    def hook(event, arguments):
        if event in EVENTS and any(str(goal.parent) in str(own) for own in arguments):
            seen.append(event)
            if len(seen) == deed:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with whole_folder(goal) as partial:
        partial.mkdir()
        for name in "abc":
            (partial / name).write_text("new")
    os._exit(0)

for goal in sorted(Path(sys.argv[1]).glob("*/policy")):
    if not os.fork():
        move(goal, int(goal.parent.name))
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_killed_at_any_deed_the_goal_is_whole_or_missing(tmp_path):
    "Old, new, or none at all for a moment: never something between; what was left half is no hindrance."
    goals = [tmp_path / f"{deed:02}" / "policy" for deed in range(1, 30)]
    for goal in goals:
        for place in (goal, goal.with_name("policy.saving")):
            place.mkdir(parents=True)
            for name in "abc":
                (place / name).write_text("old")
    run = subprocess.run([sys.executable, "-c", MOVING, str(tmp_path)], capture_output=True, text=True, check=True)
    codes = list(map(int, run.stdout.split()))
    whole = [[(name, own) for name in "abc"] for own in ("old", "new")]
    for goal in goals:
        found = sorted((path.name, path.read_text()) for path in goal.iterdir()) if goal.is_dir() else []
        assert found in [*whole, []], (goal, found)
    assert (codes[-1], found) == (0, whole[1]) and codes.count(-9) > 5 and set(codes) == {0, -9}
