"""Slurm's real scheduler on this machine alone: munged, slurmctld and slurmd, on loopback, ended with the block."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
import typing
from pathlib import Path

SYSTEM = Path("/etc/slurm/slurm.conf")  # where a job's srun looks; never replaced if it is there
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")

CONFIGURATION = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1
SlurmdParameters=config_overrides
MinJobAge=600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=60 State=UP
"""


def lacking() -> str:
    "Say why no cluster can be started here; empty where it can."
    if missing := [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        return f"{missing[0]} is not installed (slurm-wlm and munge of Debian)"
    if SYSTEM.exists() or SYSTEM.is_symlink():
        return f"{SYSTEM} is there: this machine is a cluster's"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def free_ports(n: int) -> list[int]:
    "Find ports of loopback that nobody listens on."
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def cluster(folder: Path, cores: int = 2, seconds: float = 30.0) -> typing.Iterator[Path]:
    """Run a cluster of one node while the block lasts; yields the file of finished jobs.

    folder: for all that it writes; cores: of the node, as it says; seconds: until it is up. Ends only what it began."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    told = {"host": host, "folder": folder, "ports": free_ports(2), "cores": cores}
    configuration.write_text(CONFIGURATION.format(**told))
    places = {"socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2"]
    munge += [f"--{name}={folder / place}" for name, place in places.items()]
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]]
    env = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    SYSTEM.parent.mkdir(exist_ok=True)
    SYSTEM.symlink_to(configuration)
    running = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "wb")
            running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        wait_until(lambda: "idle" in asked("sinfo", "--noheader", "--format=%T"), seconds, "no node is idle")
        yield folder / "jobs.txt"
    finally:
        SYSTEM.unlink()
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def asked(*command: str) -> str:
    "Ask Slurm something; empty where it does not answer."
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def wait_until(true: typing.Callable[[], bool], seconds: float, what: str) -> None:
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} after {seconds:.0f} s")
        time.sleep(0.5)
