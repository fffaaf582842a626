"""Trainings under a real SLURM, of one's own: see slurm_cluster.py."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster, ClusterError

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "launchers.md"
REHEARSAL = EXAMPLES / "train_ddp_rehearsal.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

if reason := slurm_cluster.why_not():
    pytestmark.append(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with slurm_cluster.cluster(folder) as cluster:
            scripts = Path(sys.executable).parent
            path = f"{scripts}{os.pathsep}{cluster.environment['PATH']}"
            cluster.environment |= {"PATH": path, "OMP_NUM_THREADS": "1"}
            yield cluster
    except ClusterError as error:
        pytest.skip(str(error))


def average_in(log: Path) -> float:
    """The average accuracy that an example has printed, in percent."""
    found = re.search(r"average: ([\d.]+) %", log.read_text())
    assert found, log.read_text()
    return float(found[1])


def test_a_script_on_two_nodes_with_torchrun_inside_sbatch(slurm: Cluster, tmp_path: Path) -> None:
    size = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=5")
    job = slurm.submit(tmp_path, *size, EXAMPLES / "slurm.sbatch", REHEARSAL)
    log = tmp_path / f"training-{job}.log"
    assert slurm.wait(job, 200) == "COMPLETED 0:0", log.read_text()
    assert average_in(log) > 80.0


def test_the_sbatch_script_without_a_script(slurm: Cluster, tmp_path: Path) -> None:
    size = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=5")
    job = slurm.submit(tmp_path, *size, EXAMPLES / "slurm.sbatch")
    assert slurm.wait(job) == "FAILED 1:0"
    assert "say which script" in (tmp_path / f"training-{job}.log").read_text()


def test_a_script_with_the_lines_of_the_guide(slurm: Cluster, tmp_path: Path) -> None:
    [lines] = [
        block
        for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
        if "SLURM_PROCID" in block
    ]
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\n{lines.replace('train.py', str(REHEARSAL))}")
    job = slurm.submit(tmp_path, "--nodes=2", "--ntasks-per-node=1", "--output=log", script)
    assert slurm.wait(job, 200) == "COMPLETED 0:0", (tmp_path / "log").read_text()
    assert average_in(tmp_path / "log") > 80.0


def test_a_run_that_is_preempted_is_queued_again_and_goes_on(
    slurm: Cluster, tmp_path: Path
) -> None:
    """The script for ImageNet, with another recipe: what it asks for, and then its path."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    slurm.environment["IMAGENET"] = str(tmp_path / "images")
    size = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    recipe = ("run", "digits", "--epochs", 12, "--save-every", 10)
    job = slurm.submit(tmp_path, *size, "--time=5", EXAMPLES / "imagenet.sbatch", *recipe)
    output, log = tmp_path / "runs" / f"imagenet-{job}", tmp_path / f"imagenet-{job}.log"

    def await_that(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120.0
        while not what():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    await_that(lambda: any(output.glob("checkpoints/step-*[0-9]")))
    slurm.run("scancel", "--signal=USR1", job)
    await_that(lambda: slurm.about(job)["Restarts"] == "1")
    await_that(lambda: slurm.about(job)["JobState"] == "PENDING")
    assert "interrupted by SIGUSR1: saved at task 1 of 5" in log.read_text()
    # SLURM would wait two minutes; in the first second it refuses the job as one that was killed.
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    assert slurm.wait(job, 200) == "COMPLETED 0:0", log.read_text()
    results = json.loads((output / "results.json").read_text())
    assert results["resumed"] == 1
    assert results["world_size"] == 2
    assert results["average_top1"] > 0.8
