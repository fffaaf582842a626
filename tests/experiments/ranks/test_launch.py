from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ritornello.experiments.ranks.interruption import RunInterruptedError
from ritornello.experiments.ranks.launch import LaunchError, launch, place_in_job, restarted
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training import run as train
from ritornello.experiments.training.saver import CheckpointSettings, Saver


def _place(*_: Any) -> tuple[int, int, str | None]:
    if not dist.is_initialized():
        return 0, 1, None
    return dist.get_rank(), dist.get_world_size(), os.environ["OMP_NUM_THREADS"]


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("one bad apple")
    time.sleep(60)


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_one_rank_needs_no_process() -> None:
    assert launch(None, _place) == launch(1, _place) == (0, 1, None)


def test_two_local_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert launch(2, _place) == (0, 2, str(threads))
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_rank_that_raises_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match="rank 1 failed: .*one bad apple; the other ranks"):
        launch(2, _fail_on_rank_1)
    assert time.monotonic() - began < 50


def test_a_killed_rank_ends_the_others() -> None:
    with pytest.raises(LaunchError, match=r"rank 1 was killed \(signal 9\)"):
        launch(2, _die_on_rank_1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, ("torchrun", 3, 8, 1, "a", 29500)),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node7", "SLURM_JOB_ID": "123"},
            ("srun", 2, 4, 0, "node7", 20123),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("mpirun", 1, 2, 1, "127.0.0.1", 29500),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "1234"},
            ("mpirun", 1, 2, 0, "b", 1234),
        ),
        (  # srun with an MPI plugin
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "1", "PMI_SIZE": "4", "MASTER_ADDR": "c"},
            ("srun", 1, 4, 0, "c", 20000),
        ),
        (  # mpirun, whose daemons srun has started: one task on each of two nodes
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "5", "PMI_SIZE": "8", "MASTER_ADDR": "c"},
            ("mpirun", 5, 8, 0, "c", 29500),
        ),
    ],
)  # fmt: skip
def test_the_place_in_a_job(environment: dict[str, str], expected: tuple[Any, ...]) -> None:
    place = place_in_job(environment)
    assert place is not None
    assert (
        place.launcher,
        place.rank,
        place.num_ranks,
        place.local_rank,
        place.address,
        place.port,
    ) == expected


def test_outside_of_a_job() -> None:
    assert place_in_job({}) is None
    # A batch script of SLURM, before srun.
    assert place_in_job({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_mpirun_over_hosts_needs_an_address() -> None:
    with pytest.raises(ValueError, match="several hosts: set MASTER_ADDR"):
        place_in_job({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"})


def test_ranks_that_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--ranks 0: it must be at least 1"):
        launch(0, _place)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--ranks 3, but torchrun has started 2 rank\(s\)"):
        launch(3, _place)


def test_restarts_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--restarts 3, but torchrun has started the ranks"):
        launch(2, _place, num_restarts=3)


def _die_once(recipe: Recipe, folder: str, count: int) -> Any:
    """A run of which the last rank is killed at some moment, the first time."""
    between_steps = Saver.between_steps

    def dying(saver: Saver, now: int, *rest: Any) -> None:
        between_steps(saver, now, *rest)
        if now == count and not restarted() and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Saver.between_steps = dying  # type: ignore[method-assign]
    return train.run(recipe, folder, saving=CheckpointSettings(save_every=7, restarts=1))


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_killed_rank_starts_again_and_goes_on(num_ranks: int, tmp_path: Path) -> None:
    recipe = recipe_named("digits", epochs=1, num_tasks=2)
    results = launch(num_ranks, _die_once, recipe, str(tmp_path), 40, num_restarts=1)
    assert results["resumed"] == 1
    undisturbed = launch(num_ranks, train.run, recipe)
    for name in ("weights_sha256", "top1", "steps_per_task"):
        assert results[name] == undisturbed[name]


def test_a_signal_to_a_rank_alone_ends_the_job(tmp_path: Path) -> None:
    recipe = recipe_named("digits", epochs=2, num_tasks=2)
    with pytest.raises(RunInterruptedError, match="interrupted by SIGUSR1: all ranks were ended"):
        launch(2, _signalled, recipe, str(tmp_path))
    assert launch(2, train.run, recipe, str(tmp_path), None, "", RESUME)["resumed"] == 1


RESUME = CheckpointSettings(resume=True)


def _signalled(recipe: Recipe, folder: str) -> None:
    between_steps = Saver.between_steps

    def signalling(saver: Saver, now: int, *rest: Any) -> None:
        if now == 20 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGUSR1)
        between_steps(saver, now, *rest)

    Saver.between_steps = signalling  # type: ignore[method-assign]
    train.run(recipe, folder, saving=RESUME)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_torchrun_goes_on_with_the_agent_that_is_left(tmp_path: Path) -> None:
    """Two agents with a rank each; one is killed with its rank, as when a node is lost."""
    output = tmp_path / "out"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def agent(is_host: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
             "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--rdzv-conf",
             f"last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3,is_host={is_host}",
             "-m", "ritornello.experiments.cli", "run", "digits", "--epochs", "40",
             "--save-every", "20", "--resume", "--output", str(output)],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def children(pid: int) -> list[int]:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    left, lost = agent(1), agent(0)
    try:
        deadline = time.monotonic() + 90
        while not list(output.glob("checkpoints/step-*0")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in (lost.pid, *children(lost.pid)):
            os.kill(pid, signal.SIGKILL)
        lost.communicate(timeout=20)
        printed, _ = left.communicate(timeout=150)
    finally:
        for each in (left, lost):
            for pid in children(each.pid) if each.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            each.kill()
            each.communicate()
    assert left.returncode == 0, printed
    assert "on 2 ranks" in printed
    assert "on 1 rank," in printed
    assert "resumed at task" in printed
    results = json.loads((output / "results.json").read_text())
    assert results["world_size"] == 1
    assert results["average_top1"] > 0.85


def test_joining_torchrun(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ran = subprocess.run(
        [*command, "2", "-m", "ritornello.experiments.cli", "run", "digits", "--epochs", "1",
         "--output", str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("avg top-1") == 1
    assert "on 2 ranks" in ran.stdout
    assert (tmp_path / "out" / "report.html").exists()
