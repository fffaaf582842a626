"""The lines of docs/guides/launchers.md, as far as this machine has the launcher."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_mpi import mpiexec, needs_mpi

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "launchers.md"
SCRIPT = """\
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer

dist.init_process_group("gloo")
with RehearsalBuffer(8, num_representatives=4) as buffer:
    for step in range(5):
        images, labels = buffer.update((torch.rand(4, 2), torch.arange(4)))
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {len(labels)} samples")
dist.destroy_process_group()
"""
BOTH = ["rank 0 of 2: 8 samples", "rank 1 of 2: 8 samples"]


def blocks(language: str, containing: str) -> list[str]:
    """The code blocks of the guide in which a text occurs."""
    found = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return [block for block in found if containing in block]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def lines_of(output: str) -> list[str]:
    """Launchers may join what two ranks print."""
    return sorted(re.findall(r"rank \d of \d: \d samples", output))


@needs_mpi
def test_mpirun_with_the_line_of_the_guide(script: Path) -> None:
    from test_mpi import launcher

    is_open_mpi = len(launcher()) > 1
    [block] = blocks("sh", "OMPI_COMM_WORLD_RANK" if is_open_mpi else "PMI_RANK")
    [inner] = re.findall(r"bash -c '(.*)'", block, re.DOTALL)
    inner = inner.replace("python train.py", f"{sys.executable} {script}")
    told = mpiexec(2, "env", "MASTER_ADDR=127.0.0.1", "bash", "-c", inner)
    assert lines_of(told) == BOTH, told


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_submitit_on_this_machine(script: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "submitit_launch.py", "--cluster", "local", script],
        env={
            # submitit refuses to set what another test of this process may have set.
            **{name: each for name, each in os.environ.items() if not name.startswith("MASTER_")},
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert lines_of(ran.stdout) == BOTH
    assert list((tmp_path / "submitit").glob("*_log.out"))
    [line] = blocks("python", "TorchDistributedEnvironment")
    assert line.strip() in (EXAMPLES / "submitit_launch.py").read_text()


def test_the_manifest_for_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    [container] = pod["containers"]
    [*shell, line] = container["command"]
    assert shell == ["bash", "-c"]
    [in_guide] = blocks("sh", "JOB_COMPLETION_INDEX")
    assert line == f"exec {' '.join(in_guide.replace(chr(92), ' ').split())}"
    assert f"--nnodes {spec['completions']} " in line
    assert spec["completions"] == spec["parallelism"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr {first} " in line
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node {gpus} " in line
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_the_guide_and_the_sbatch_script_agree() -> None:
    """The script's line is run in test_slurm.py."""
    [line] = blocks("sh", "--rdzv-id job42")
    script = (EXAMPLES / "slurm.sbatch").read_text()
    [started] = re.findall(r"torchrun \\\n(.*)", script, re.DOTALL)
    assert re.findall(r"--[\w-]+", line) == re.findall(r"--[\w-]+", started)
