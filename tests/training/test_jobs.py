"""Jobs: kept or cleared, settings that come back, one at a time whoever was killed, launches that fail or are interrupted, and goals that are whole."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from psycopref.training import jobs
from psycopref.core.settings import DpoSettings, LoraSettings, RewardSettings, StudyError, load_profile
from psycopref.training.jobs import (
    JOB_KINDS,
    do_job,
    launch_command,
    launch_plan,
    load_job,
    locked,
    pair_columns,
    restore,
    run_or_launch,
    store_job,
    whole_folder,
)
from psycopref.models.weights import Weights
from refusals import one_line

PAIRS = pd.DataFrame(
    {
        "ID": ["a", "b"],
        "prefID": [3, 4],
        "question": ["I count the stairs.", "No."],
        "chosen": ["What then?", "I see."],
        "rejected": ["Stop.", "Why?"],
    }
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    "Tests of launching say what they want themselves."
    for name in ("PSYCOPREF_PROCESSES", "PSYCOPREF_ACCELERATE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def stored(folder, goal=None, pairs=PAIRS, **more):
    job = {"kind": "dpo", "goal": goal or folder / "model", "settings": dataclasses.asdict(DpoSettings())} | more
    store_job(folder, job, {"train": pairs, "dev": None})
    return folder


# What a job is


def test_the_same_job_is_kept_and_another_one_cleared(tmp_path):
    job = stored(tmp_path / "job")
    (job / "checkpoints").mkdir()
    stored(job, pairs=PAIRS.assign(note="nobody reads this"))
    assert (job / "checkpoints").is_dir()
    changed, beta = PAIRS.assign(chosen=["What then?", "I hear you."]), dataclasses.asdict(DpoSettings(beta=0.2))
    lora = dataclasses.asdict(DpoSettings(lora=LoraSettings(rank=2)))
    others = [{"pairs": own} for own in (changed, PAIRS[:1], PAIRS[::-1])] + [{"settings": beta}, {"settings": lora}]
    others += [{"goal": tmp_path / "elsewhere"}, {"kind": "reward"}, {"seed": 1}]
    for more in others:
        (job / "checkpoints").mkdir(exist_ok=True)
        stored(job, **more)
        assert not (job / "checkpoints").exists(), more
        stored(job)


def test_a_job_comes_back_as_it_was_stored(tmp_path):
    wide = PAIRS.assign(
        messages=[[{"role": "user", "content": "Why?"}], None],
        gap=[1.5, 2.0],
        chosen_empathy_rating=[5, 4],
        chosen_model=["x", "y"],
    )
    own = {"kind": "dpo", "goal": tmp_path / "model", "schedule": (0, 8)}
    store_job(tmp_path / "job", own, {"train": wide, "dev": PAIRS[:0], "more": PAIRS})
    job, frames = load_job(tmp_path / "job")
    assert job["goal"] == tmp_path / "model" and job["schedule"] == [0, 8]
    assert list(frames) == ["train", "more"], "an empty frame is none"
    read = {"prefID", "question", "chosen", "rejected", "messages", "gap", "chosen_empathy_rating"}
    assert set(frames["train"]) == read == set(pair_columns(wide))
    assert frames["train"].chosen.tolist() == PAIRS.chosen.tolist()
    assert [dict(message) for message in frames["train"].messages[0]] == wide.messages[0]


def test_a_job_that_was_half_written_is_none_and_is_written_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs, "write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
        stored(tmp_path / "job")
    assert "job.json" in one_line(lambda: load_job(tmp_path / "job"))
    (tmp_path / "job" / "left").write_text("by who was interrupted")
    assert len(load_job(stored(tmp_path / "job"))[1]["train"]) == 2 and not (tmp_path / "job" / "left").exists()


@pytest.mark.parametrize("profile", ["tiny", "demo", "paper"])
def test_settings_come_back_from_plain_data(profile):
    found = load_profile(profile)
    own = [
        found,
        *(part for part in vars(found).values() if dataclasses.is_dataclass(part)),
        Weights("a", "b", "c", "d"),
    ]
    assert len(own) > 8
    for part in own:
        assert restore(type(part), json.loads(json.dumps(dataclasses.asdict(part)))) == part
    assert restore(Weights, None) is None
    with pytest.raises(ValueError, match="no_such_setting"):
        restore(RewardSettings, {"no_such_setting": 1})


def test_a_job_of_an_unknown_kind_is_refused(tmp_path):
    assert "'dpo2'" in one_line(lambda: do_job(stored(tmp_path / "job", kind="dpo2")))
    assert set(JOB_KINDS) == {"reward", "dpo"}


# One at a time


def held(folder):
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True


def gone(pid, seconds=20.0):
    "Wait until a process is gone, or only waits to be reaped."
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def appears(condition, process, seconds=90.0):
    "Wait for what a process will do."
    limit = time.monotonic() + seconds
    while not (found := condition()):
        if process.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"did not come; the process ended with {process.returncode}")
        time.sleep(0.05)
    return found


PARENT = """
import subprocess, sys, time
from pathlib import Path
from psycopref.training.jobs import locked
folder = Path(sys.argv[1])
with locked(folder) as lock:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(folder)], pass_fds=[lock])
    (folder / "child").write_text(str(child.pid))
    child.wait()
"""
CHILD = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.05)
(folder / "model").mkdir()
(folder / "result.json").write_text('{"by": "the orphan"}')
"""


def test_a_start_waits_for_the_orphan_of_a_killed_one_and_finds_the_job_done(tmp_path, monkeypatch, capsys):
    import threading

    job = stored(tmp_path / "job")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(job), CHILD])
    child = int(appears(lambda: (job / "child").is_file() and (job / "child").read_text(), parent))
    parent.kill()
    parent.wait()
    assert held(job), "its parent is dead, the child holds the job"
    monkeypatch.setattr(jobs, "do_job", None)
    found = []
    thread = threading.Thread(target=lambda: found.append(run_or_launch(job)))
    thread.start()
    time.sleep(0.5)
    assert not found and thread.is_alive()
    (job / "go").touch()
    thread.join(timeout=60)
    assert found == [{"by": "the orphan"}] and gone(child) and not held(job)
    assert "is still being trained by a process of an earlier start" in capsys.readouterr().err


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


# Launching, with stand-ins for the command


@pytest.fixture
def launched(monkeypatch):
    "Let a launch start this Python code in place of accelerate."

    def use(code, processes=2):
        command = lambda folder, processes, config="": [sys.executable, "-c", code, str(folder)]
        monkeypatch.setattr(jobs, "launch_command", command)
        monkeypatch.setattr(jobs, "launch_plan", lambda batch_size: (processes, ""))

    return use


def test_a_launch_s_own_refusal_comes_back_as_one_line(tmp_path, launched):
    launched(
        'import sys; print("W0101 noise", file=sys.stderr); print("psycopref: dpo.beta: found 0", file=sys.stderr); '
        'print("Traceback\\nChildFailedError", file=sys.stderr); sys.exit(1)'
    )
    said = one_line(lambda: run_or_launch(stored(tmp_path / "job")))
    assert said == "training on 2 processes ended with 1: dpo.beta: found 0" and not held(tmp_path / "job")


ENDS = {
    'import sys; sys.exit("first\\nRuntimeError: out of memory")': "ended with 1: RuntimeError: out of memory",
    "import os; os.kill(os.getpid(), 9)": "ended with -9: no message",
    "pass": "ended with 0: no message",
    'import sys; sys.stderr.buffer.write(b"\\xff" * 900); sys.exit(2)': "ended with 2: ",
}


@pytest.mark.parametrize("code, expected", ENDS.items(), ids=ENDS.values())
def test_any_other_end_is_one_line_too(code, expected, tmp_path, launched):
    launched(code)
    said = one_line(lambda: run_or_launch(stored(tmp_path / "job")))
    assert expected in said and len(said) < 600


def test_a_launch_hands_down_the_lock(tmp_path, launched):
    launched(
        f"import os, sys; assert any(os.path.realpath(f'/proc/self/fd/{{n}}') == sys.argv[1] + '/lock' for n in "
        f"os.listdir('/proc/self/fd')), 'no lock'\n{CHILD.replace('while', 'while 0 and')}"
    )
    assert run_or_launch(stored(tmp_path / "job")) == {"by": "the orphan"}


INTERRUPTED = """
import sys
from pathlib import Path
from psycopref.training import jobs
jobs.launch_command = lambda folder, processes, config="": [sys.executable, "-c", "import os, sys, time; open(sys.argv[1] + '/child', 'w').write(str(os.getpid())); time.sleep(600)", str(folder)]
jobs.launch_plan = lambda batch_size: (2, "")
try:
    jobs.run_or_launch(Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_start_ends_what_it_launched(tmp_path):
    job = stored(tmp_path / "job")
    start = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(job)], start_new_session=True)
    child = int(appears(lambda: (job / "child").is_file() and (job / "child").read_text(), start))
    os.kill(start.pid, signal.SIGINT)  # to the start alone, not to its group
    assert start.wait(timeout=60) == 130 and gone(child, 1.0) and not held(job)


TOLD = """
import os, sys, time
from pathlib import Path
open(os.environ["PSYCOPREF_PROGRESS"], "a").write("DPO 3/8")
time.sleep(1.5)
folder = Path(sys.argv[1])
(folder / "model").mkdir()
(folder / "result.json").write_text("{}")
"""


@pytest.mark.parametrize("followed", [True, False])
def test_progress_is_written_where_somebody_follows_else_shown_here(followed, tmp_path, launched, monkeypatch, capsys):
    log = tmp_path / "progress"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if followed:
        monkeypatch.setenv("PSYCOPREF_PROGRESS", str(log))
    launched(TOLD)
    run_or_launch(stored(tmp_path / "job"))
    assert followed == log.exists() and (log.read_text() if followed else capsys.readouterr().err) == "DPO 3/8"


def test_the_command_names_processes_or_a_configuration(monkeypatch):
    two, own = (" ".join(launch_command(Path("job"), *how)) for how in ((2,), (8, "zero3.yaml")))
    assert "--num_processes 2 " in two and "--multi_gpu" in two and two.endswith(" train job")
    assert "--multi_gpu" not in " ".join(launch_command(Path("job"), 1))
    assert "--config_file zero3.yaml" in own and "--num_processes 8 " in own and "--multi_gpu" not in own
    command = launch_command(Path("job"), 2)
    assert all(Path(program).is_file() for program in (command[0], command[-3]))
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
folder = Path(sys.argv[-1])

def run_job(folder):
    (folder / f"worker-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.05)

sys.modules["standing"], jobs.JOB_KINDS["dpo"] = sys.modules["__main__"], "standing:run_job"
jobs.do_job(folder)
"""
LAUNCHED = """
import sys
from pathlib import Path
from psycopref.training import jobs
real = jobs.launch_command
jobs.launch_command = lambda *a: [*real(*a)[:-3], sys.executable, str(Path(sys.argv[1]).parent / "standing.py"), sys.argv[1]]
jobs.launch_plan = lambda batch_size: (int(sys.argv[2]), sys.argv[3])
try:
    jobs.run_or_launch(Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""
CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nnum_machines: 1\nnum_processes: 1\nuse_cpu: true\n"


@contextlib.contextmanager
def standing(tmp_path, processes, config=""):
    "Start a job whose workers stand and wait; yields the start and the workers' ids, and leaves nobody behind."
    (tmp_path / "standing.py").write_text(STANDING)
    job = stored(tmp_path / "job")
    command = [sys.executable, "-c", LAUNCHED, str(job), str(processes), config]
    own = dict(start_new_session=True, stderr=subprocess.DEVNULL)
    start = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **own)

    def all_there():
        found = sorted(job.glob("worker-*"))
        return found if len(found) == processes and all(path.read_text() for path in found) else None

    try:
        files = appears(all_there, start)
        yield job, start, [int(path.read_text()) for path in files]
    finally:
        (job / "go").touch()
        start.kill()
        start.wait()
        for path in job.glob("worker-*"):
            assert gone(int(path.read_text())), "a worker is left"


@pytest.mark.parametrize("processes", [2, 1], ids=["two", "one by a configuration"])
def test_interrupting_a_launch_ends_it(processes, tmp_path):
    (tmp_path / "own.yaml").write_text(CONFIG)
    with standing(tmp_path, processes, "" if processes == 2 else str(tmp_path / "own.yaml")) as (job, start, workers):
        os.kill(start.pid, signal.SIGINT)
        assert start.wait(timeout=60) == 130 and all(gone(pid, 5.0) for pid in workers) and not held(job)


def test_workers_hold_the_job_when_start_and_launcher_were_killed(tmp_path):
    "Workers lead sessions of their own, so a killed process group leaves them."
    with standing(tmp_path, 2) as (job, start, workers):
        os.killpg(start.pid, signal.SIGKILL)
        start.wait()
        assert not any(gone(pid, 0.2) for pid in workers), "they go on"
        with open(job / "workers", "a") as workers, pytest.raises(BlockingIOError):
            fcntl.flock(workers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code = "import sys; from pathlib import Path; from psycopref.training.jobs import locked\n"
        code += "with locked(Path(sys.argv[1])): print('free')"
        waiting = subprocess.Popen([sys.executable, "-c", code, str(job)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
        (job / "go").touch()
        assert waiting.communicate(timeout=60)[0] == "free\n"


# The goal


def test_nothing_half_stands_at_the_goal(tmp_path):
    goal = tmp_path / "policy"
    with pytest.raises(KeyboardInterrupt), whole_folder(goal) as partial:
        partial.mkdir()
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert not goal.exists()
    with whole_folder(goal) as partial:
        assert not partial.exists(), "what was left half is gone"
        partial.mkdir()
        (partial / "weights").write_text("first")
        assert not goal.exists()
    assert [path.name for path in goal.iterdir()] == ["weights"] and [path.name for path in tmp_path.iterdir()] == [
        "policy"
    ]
    with pytest.raises(StudyError), whole_folder(goal) as partial:
        partial.mkdir()
        raise StudyError("the disk is full")
    assert (goal / "weights").read_text() == "first", "an older one stays"


def test_only_the_main_process_moves_the_folder(tmp_path):
    goal = tmp_path / "policy"
    with whole_folder(goal) as outer:
        outer.mkdir()
        (outer / "weights").write_text("")
        with whole_folder(goal, main=False) as inner:
            assert inner == outer and (outer / "weights").is_file()
        assert not goal.exists() and (outer / "weights").is_file()
    assert (goal / "weights").is_file()


MOVING = """
import os, signal, sys
from pathlib import Path
from psycopref.training.jobs import whole_folder
goal, deed = Path(sys.argv[1]), int(sys.argv[2])
seen = []
def hook(event, arguments):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and any(str(goal.parent) in str(own) for own in arguments):
        seen.append(event)
        if len(seen) == deed:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with whole_folder(goal) as partial:
    partial.mkdir()
    for name in ("a", "b", "c"):
        (partial / name).write_text("new")
"""


def test_killed_at_any_deed_the_goal_is_whole_or_missing(tmp_path):
    "Old, new, or none at all for a moment: never something between."
    places, states = [], []
    for deed in range(1, 30):
        goal = tmp_path / str(deed) / "policy"
        goal.mkdir(parents=True)
        for name in ("a", "b", "c"):
            (goal / name).write_text("old")
        places.append((goal, subprocess.Popen([sys.executable, "-c", MOVING, str(goal), str(deed)])))
        if len(places) % 4 == 0:
            places[-1][1].wait()
        if deed > 8 and deed % 4 == 0 and places[-1][1].returncode == 0:
            break
    whole = [[(name, own) for name in ("a", "b", "c")] for own in ("old", "new")]
    for goal, process in places:
        process.wait()
        found = sorted((path.name, path.read_text()) for path in goal.iterdir()) if goal.is_dir() else []
        assert found in [*whole, []], found
        states.append((process.returncode, found))
    assert states[-1] == (0, whole[1]) and sum(code == -9 for code, _ in states) > 5
