"""The chain through Slurm's real scheduler: the bytes of a run without it, also where a job was killed; CI runs it."""

import os
import shutil
import subprocess

import pytest
import yaml

from bench_kills import compared, signed
from chains import BIN, REPOSITORY, environment
from slurm import asked, cluster, lacking, wait_until

from psycopref.core.paper import resource_path
from psycopref.core.stages import STAGES

CONFIGURATIONS = sorted(path.parent for path in resource_path("snakemake").glob("*/config.yaml"))


@pytest.mark.parametrize("place", CONFIGURATIONS, ids=lambda place: place.name)
def test_a_configuration_names_rules_that_there_are(place):
    known = {*STAGES} - {"13_report"} | {"report"}
    known |= {f"{name}_{part}" for name, stage in STAGES.items() for part in ("shard", "cell", "seed")
              if getattr(stage, f"{part}s")}  # fmt: skip
    told = yaml.safe_load((place / "config.yaml").read_text())
    assert {*told.get("set-resources", {}), *told.get("set-threads", {})} <= known
    trains = {"05_reward", "06_policy", "08_ablations", "09_mixing_cell"}
    if "gpu" in place.name or place.name == "kubernetes":
        assert all(told["set-resources"][name]["gpu"] >= 1 for name in trains)
        asks = {"02_responses", "03_ratings", "04_pairs", "11_experts"}
        assert not any("gpu" in told["set-resources"].get(name, {}) for name in asks)


@pytest.mark.chain
def test_through_slurm_all_is_the_same_bytes_and_a_killed_job_is_made_again(copy, tmp_path):
    why = lacking()
    if why and not os.environ.get("PSYCOPREF_SLURM"):  # CI sets it: there it can't be skipped
        pytest.skip(why)
    assert not why, why
    project = tmp_path / "project"
    project.mkdir()
    for name in ("nbs", "Snakefile", "settings.ini"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, project / name)
    command = [str(BIN / "snakemake"), "--workflow-profile", str(resource_path("snakemake/slurm")), "--cores", "2"]
    command += ["--slurm-no-account", "--slurm-status-command", "squeue", "--seconds-between-status-checks", "2"]
    command += ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5"]
    command += ["--default-resources", "slurm_partition=tests", "mem_mb=1500", "runtime=20"]
    command += ["--set-resources", *(f"{name}:mem_mb=1500" for name in rules_with_more_memory())]
    command += ["--config", "profile=tiny"]
    with cluster(
        tmp_path / "slurm", cores=4
    ) as jobs:  # two jobs of two threads at once: most of a job's time is its start
        log = open(tmp_path / "log", "w")
        running = subprocess.Popen(command, cwd=project, env=environment(), stdout=log, stderr=log)
        try:
            policies = project / "outputs/tiny/06_policy.partial"
            wait_until(lambda: policies.exists() or running.poll() is not None, 900, "chapter 6 did not begin")
            [killed] = asked("squeue", "--noheader", "--states=RUNNING", "--format=%A").split()[:1]
            asked("scancel", killed)
            assert running.wait(1500) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            running.kill()
        ended = dict(line.split(" ", 1) for line in jobs.read_text().splitlines())
    states = [dict(part.split("=", 1) for part in line.split() if "=" in part)["JobState"] for line in ended.values()]
    assert states.count("CANCELLED") == 1 and states.count("COMPLETED") == len(states) - 1 >= 16
    found = compared(signed(copy), signed(project))
    assert found["files"] > 100 and found["differ"] == []


def rules_with_more_memory() -> list[str]:
    "Rules whose memory the configuration sets: more than the test's node has."
    told = yaml.safe_load((resource_path("snakemake/slurm") / "config.yaml").read_text())
    return [name for name, own in told["set-resources"].items() if "mem_mb" in own and not name.endswith("_seed")]
