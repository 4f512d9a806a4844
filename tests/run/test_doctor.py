"""What this machine can run: ten lines, a time for each profile with its basis, and what to do about gaps."""

import os
import socket
import time

import pytest

from psycopref.core.files import StageWriter
from psycopref.core.settings import load_profile
from psycopref.core.stages import Run, stage_settings, stages_of
from psycopref.run import doctor
from psycopref.run.cli import main
from psycopref.run.doctor import doctor_lines, granted_cores, granted_memory, keys_line, profile_line, servers_line

NAMES = ["memory", "cores", "arithmetic", "GPU", "disk, free", "keys", "servers", "weights", "browser", "versions"]


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    "A machine without keys, browser, servers and GPU, whose speed is known."
    for name in [name for name in os.environ if name.startswith(("PSYCOPREF_KEY_", "PSYCOPREF_SERVER", "HF_TOKEN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "machine_gpus", lambda: [])
    monkeypatch.setattr(doctor, "matmul_gflops", lambda **_: 100.0)
    monkeypatch.setattr(doctor, "bf16_gflops", lambda: 50.0)


def system(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_ten_lines_then_each_profile_then_what_to_start(capsys):
    start = time.monotonic()
    assert main(["doctor"]) == 0
    assert time.monotonic() - start < 60
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines[:10]] == NAMES and lines[10].startswith("How long")
    assert [line.split()[0] for line in lines[11:15]] == ["tiny", "demo", "laptop", "paper"]
    assert lines[15].startswith("Start with `make reproduce PROFILE=") and len(lines) == 16
    for line in lines[:10]:
        if "none" in line:
            assert "; " in line, f"says what to do: {line}"
    for line in lines[12:15]:
        assert "about" in line and "(as " in line or "(by its plan)" in line, "an estimate says its basis"


def test_keys_are_named_and_never_shown(monkeypatch, capsys):
    secrets = {"OPENAI_API_KEY": "sk-one-secret", "PSYCOPREF_KEY_API_EXAMPLE_ORG": "two-secret", "HF_TOKEN": "hf_three"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    told = "\n".join(doctor_lines(profiles=["tiny"]))
    assert all(name in told for name in secrets) and not any(value in told for value in secrets.values())
    assert keys_line().endswith("for others set PSYCOPREF_SERVER_KEY")


def test_servers_are_only_knocked_at_where_they_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "answers", lambda address: asked.append(address))
    assert "none is named; set OPENAI_BASE_URL" in servers_line() and not asked
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    assert "OpenAI's, not asked" in servers_line() and not asked
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:password@127.0.0.1:1/v1")
    line = servers_line()
    assert "does not answer within 1 s; start it" in line and "password" not in line and len(asked) == 1
    monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    assert "no address" in servers_line()


def test_a_server_that_listens_answers_and_one_that_does_not_is_left_soon():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert doctor.answers(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
    start = time.monotonic()
    assert not doctor.answers("http://127.0.0.1:9/v1", 0.2) and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "files, memory, cores",
    [
        ({}, None, None),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "max"}, None, None),
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__memory.max": "5000\n"}, 5000, None),
        ({"proc__self__cgroup": "0::/a\n", "sys__fs__cgroup__a__cpu.max": "50000 100000"}, None, 0.5),
        (
            {
                "proc__self__cgroup": "3:cpu,cpuacct:/c\n2:memory:/m\n",
                "sys__fs__cgroup__cpu__c__cpu.cfs_quota_us": "300000",
                "sys__fs__cgroup__cpu__c__cpu.cfs_period_us": "100000",
                "sys__fs__cgroup__memory__m__memory.limit_in_bytes": "7000",
                "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712",
            },
            7000,
            3.0,
        ),
    ],
)
def test_a_container_is_as_small_as_its_control_group_says(files, memory, cores, tmp_path):
    root = system(tmp_path / "root", **files)
    assert (granted_memory(root), granted_cores(root)) == (memory, cores)


def test_a_small_container_does_not_fit_and_is_told_what_to_do(tmp_path):
    limit = {"proc__self__cgroup": "0::/a\n", "sys__fs__cgroup__a__memory.max": str(10**9)}
    told = [*doctor_lines(system(tmp_path / "root", **limit), ["demo"])]
    assert "1.0 GB granted by its control group" in told[1] and "; close other programs, or grant more" in told[1]
    assert "does not fit: memory: takes about 2.5 GB, 1.0 GB are here; grant more" in told[12]
    assert told[-1] == "Mend what is named above, then ask again"


def test_instructions_are_read_from_the_flags_alone(tmp_path):
    told = doctor.arithmetic_line(10, 20, system(tmp_path, proc__cpuinfo="model name: amx_bf16\nflags: avx512_bf16\n"))
    assert "float32 10 and bfloat16 20 GFLOP/s (AVX-512 BF16)" in told
    assert "no instructions for bfloat16" in doctor.arithmetic_line(10, 1, tmp_path / "none")


def test_time_is_scaled_from_a_published_run_and_says_so():
    demo = load_profile("demo")
    jobs = [*stages_of(demo), "09_mixing_cell"]
    published = {"demo": {"gflops": 200.0, "seconds": dict.fromkeys(jobs, 60.0)}}
    cells = len(demo.mixing.cells) * len(demo.backbones)
    seconds, basis = doctor.run_seconds(demo, 100.0, published)
    assert seconds == pytest.approx(2 * 60 * (len(stages_of(demo)) + cells)) and "speed of float32 here" in basis
    assert doctor.run_seconds(demo, 400.0, published)[0] == pytest.approx(seconds / 4)
    assert doctor.run_seconds(demo, 100.0, {}) == (None, "no run of it was timed yet; run it once to know")


def test_runs_that_finished_here_know_better():
    demo = load_profile("demo")
    for name in stages_of(demo):
        with StageWriter(Run("mine"), name, "demo", 0, stage_settings(demo, name)) as writer:
            writer.started -= 100
    published = {"demo": {"gflops": 200.0, "seconds": {"09_mixing_cell": 0.0}}}
    seconds, basis = doctor.run_seconds(demo, 100.0, published)
    assert basis == "as runs here took" and seconds == pytest.approx(104 * len(stages_of(demo)), rel=0.05)


def test_the_papers_scale_is_told_with_hours_money_and_what_lacks(monkeypatch):
    line, fits = profile_line("paper", 64e9, 100.0)
    assert not fits and "GPU hours" in line and "US dollars at list prices (by its plan)" in line
    assert "OPENAI_API_KEY is not set" in line and "GPUs" in line and "psycopref plan --profile paper" in line
    monkeypatch.setattr(doctor, "machine_gpus", lambda: [("H", 80 * 10**9)] * 2)
    assert "on the 2 here if each is as fast" in profile_line("paper", 64e9, 100.0)[0]


def test_a_profile_that_can_not_be_planned_is_one_line_with_the_reason():
    line, fits = profile_line("demmo", 64e9, 100.0)
    assert not fits and "can't be estimated" in line and "demo" in line
