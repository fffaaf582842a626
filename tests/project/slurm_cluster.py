"""A SLURM cluster of one's own: two nodes that are both this machine, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"

COMMANDS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue", "sinfo")

NODES = ("127.0.0.1", "127.0.0.2")
"""The first one must have an address, as ranks look for it there."""

START_SECONDS, END_SECONDS = 20.0, 5.0

CONFIGURATION = """\
ClusterName=ritornello
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=3
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=5
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=10 State=UP
"""


class ClusterError(RuntimeError):
    """The cluster did not come up; says why."""


class Cluster:
    """Sends jobs and looks after them."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """What a command prints."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, cwd: Path, *arguments: object) -> str:
        """Sends a job; its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def about(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        told = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait(self, job: str, seconds: float = 100.0) -> str:
        """Waits until a job has ended; its state and exit code, as ``COMPLETED 0:0``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            about = self.about(job)
            if about["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
                break
            time.sleep(0.2)
        return f"{about['JobState']} {about['ExitCode']}"


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if lacking := [each for each in COMMANDS if shutil.which(each, path=PATH) is None]:
        return f"needs SLURM: there is no {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "needs root, for slurmd"
    return None


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts the daemons, and ends them.

    Raises:
        ClusterError: they do not come up.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=_host(),
            folder=folder,
            ports=ports,
            # Jobs take their ports from their numbers, and another process may have a cluster, too.
            first_job=10 * os.getpid() + 1,
        )
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(configuration)}
    commands = [["slurmctld", "-D", "-c"]]
    commands += [["slurmd", "-D", "-N", node] for node in NODES]
    daemons: list[subprocess.Popen[bytes]] = []
    found = Cluster(environment)
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(
                    [*command, "-f", str(configuration)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        _await_nodes(found, daemons, folder)
        yield found
        for job in found.run("squeue", "--noheader", "--format=%A").split():
            found.run("scancel", "--signal=KILL", "--full", job)
            found.run("scancel", job)
            found.wait(job, END_SECONDS)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _await_nodes(found: Cluster, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and all(each.poll() is None for each in daemons):
        told = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=found.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if told.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.2)
    logs = [each.read_text().splitlines()[-3:] for each in sorted(folder.glob("*.log"))]
    raise ClusterError(f"SLURM's daemons do not come up here: {logs}")


def _host() -> str:
    return socket.gethostname().partition(".")[0]
