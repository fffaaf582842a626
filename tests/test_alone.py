"""A buffer for one process where there are several: made too early, or on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer
from ritornello.transports.launched import RANKS_AND_SIZES

BATCH = torch.arange(4), torch.arange(4)


def make(**options: Any) -> RehearsalBuffer:
    return RehearsalBuffer(8, num_representatives=2, **options)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in RANKS_AND_SIZES:
        for name in variables:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("rank", "size"), RANKS_AND_SIZES)
def test_several_ranks_without_a_group(
    rank: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank, "1")
    monkeypatch.setenv(size, "4")
    message = (
        f"^rank 1: {size}=4 in the environment says that there are 4 ranks, .* Make the buffer after "
        "torch.distributed.init_process_group .* say so: transport='local'"
    )
    with pytest.raises(ValueError, match=message):
        make()
    with make(transport="local") as buffer:  # as the message says
        buffer.update(BATCH)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},  # of somebody else
        {"RANK": "0", "WORLD_SIZE": "several"},
        # An sbatch script that starts one process; and srun, torchrun of one process inside a step.
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_a_single_process_is_no_false_alarm(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with make() as buffer:
        buffer.update(BATCH)


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    timeout = timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_a_group_says_how_many_ranks_there_are() -> None:
    with make() as buffer:
        buffer.update(BATCH)


def test_a_group_that_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    early, used, private = make(), make(), make(transport="local")
    used.update(BATCH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for buffer in (early, used, private):
            buffer.update(BATCH)  # it is one of one rank
    finally:
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    try:
        for buffer in (early, used):
            for call in (lambda b=buffer: b.update(BATCH), lambda b=buffer: b.save("nowhere")):
                with pytest.raises(
                    RuntimeError,
                    match=r"(update|save): the buffer was made for 1 rank, but .* of 4 ranks",
                ):
                    call()
        private.update(BATCH)
    finally:
        dist.destroy_process_group()
        for buffer in (early, used, private):
            buffer.close()
