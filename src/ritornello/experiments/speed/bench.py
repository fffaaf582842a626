"""How fast rounds are on this machine, against a plain copy of the same rows in the same run.

The functions here run on every rank; ``bench_report`` shows what they return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.buffer import RehearsalBuffer
from ritornello.rounds.round import STAGES

NUM_BLOCKS = 5
"""Rounds and plain copies take turns, so that a busy moment of the machine hits both."""

LIST_WORDS = 2
"""int64 per representative in the lists of a class-balanced policy: each list has room for as
much again as it holds."""

MOST_STEPS = 200
"""Per block, beside training; more make no steadier mean."""


@dataclass(frozen=True)
class Workload:
    """Sizes per rank and step."""

    name: str
    shape: tuple[int, ...]
    """The shape of one image; each has an int64 label beside it."""
    dtype: torch.dtype
    batch_size: int
    num_candidates: int
    num_representatives: int
    rows_per_rank: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """A mini-batch of ten classes."""
        images = torch.zeros((self.batch_size, *self.shape), dtype=self.dtype)
        return images, torch.arange(self.batch_size) % 10


WORKLOADS = {
    each.name: each
    for each in (
        Workload("imagenet-uint8", (3, 224, 224), torch.uint8, 56, 14, 7, 2000),
        Workload("imagenet-float32", (3, 224, 224), torch.float32, 56, 14, 7, 1000),
        Workload("cifar", (3, 32, 32), torch.uint8, 128, 16, 16, 10_000),
        Workload("mnist", (1, 28, 28), torch.uint8, 128, 32, 32, 10_000),
        Workload("bulk", (3, 32, 32), torch.uint8, 128, 32, 512, 10_000),
    )
}


@dataclass
class RoundTimes:
    """Rounds of one workload over one transport; medians (the plan: mean), of the slowest rank."""

    workload: str
    transport: str
    num_ranks: int
    num_rounds: int
    stage_seconds: dict[str, float]
    round_seconds: float
    """All stages of a round."""
    plain_seconds: float
    """A plain gather of r rows and scatter of c rows in an array of the shard's size, on all
    ranks at once."""
    update_seconds: float
    """The trainer's thread's time per step: join, copy of the candidates."""
    cpu_seconds: float
    """Processor time of all threads of the rank, per round and update."""
    record_bytes: int
    rows_per_round: int
    """r + c."""
    bytes_per_representative: float
    """Memory of the shard and of the buffer's lists, per representative that fits."""

    @property
    def ratio(self) -> float:
        """A round's time, in multiples of the plain copy's."""
        return self.round_seconds / self.plain_seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Rows gathered and scattered, over the time of a round."""
        return self.rows_per_round * self.record_bytes / self.round_seconds / 1e9


@dataclass
class Beside:
    """What rehearsal costs a training step that runs at the same time; means per step."""

    workload: str
    transport: str
    alone_seconds: float
    """The training step without a buffer."""
    step_seconds: float
    """The same step with rounds in the background, without ``update``."""
    exposed_seconds: float
    """In ``update``: waiting for the round, and copying and offering the candidates."""
    join_seconds: float
    """In ``update``: joining mini-batch and representatives."""
    hidden_seconds: float
    """The part of the round during which the step runs."""


def check_bench(
    workloads: Sequence[str],
    transports: Sequence[str],
    num_ranks: int,
    under_mpi: bool,
    num_rounds: int,
    step_milliseconds: Sequence[float],
    seconds: float,
) -> tuple[str, ...]:
    """Checks what shall be measured; the transports to measure, if none are given.

    Raises:
        ValueError: names the option, its value and the rule.
    """
    for name in workloads:
        if name not in WORKLOADS:
            raise ValueError(f"--workloads {name}: there are {', '.join(WORKLOADS)}")
    possible = ["local"] if num_ranks == 1 else ["shared_memory", "collective"]
    possible += ["mpi"] if under_mpi else []
    for name in transports:
        if name == "mpi" and not under_mpi:
            raise ValueError(
                "--transports mpi: start the ranks by MPI: mpirun -n 2 ritornello bench"
            )
        if name not in possible:
            raise ValueError(
                f"--transports {name}: with {num_ranks} rank(s) there are {', '.join(possible)}"
            )
    if num_rounds < NUM_BLOCKS:
        raise ValueError(f"--rounds {num_rounds}: it must be at least {NUM_BLOCKS}")
    if not seconds > 0 or not all(each > 0 for each in step_milliseconds):
        raise ValueError("--seconds and --steps must be above 0")
    return tuple(transports or possible)


def measure_rounds(
    workload: Workload, transport: str, num_rounds: int, selection: str = "per-class-random"
) -> RoundTimes:
    """Times rounds with no training between them.

    Args:
        workload: sizes.
        transport: by its name.
        num_rounds: in all, when the buffer is full.
        selection: the policy; that of the paper stores every candidate.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    batch = workload.batch()
    plain = _PlainCopy(workload)
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    updates, processor = [], []
    with _filled_buffer(workload, transport, selection) as buffer:
        for _ in range(NUM_BLOCKS):
            _barrier()
            plain.run(num_rounds // NUM_BLOCKS)
            _barrier()
            for _ in range(num_rounds // NUM_BLOCKS):
                before = buffer.stats(per_class=False)
                began, began_processor = time.perf_counter(), time.process_time()
                joined = buffer.update(batch)
                updates.append(time.perf_counter() - began)
                after = buffer.stats(per_class=False)  # waits for the round
                processor.append(time.process_time() - began_processor)
                del joined  # freeing it is no part of the round
                for name in STAGES:
                    spent = after.seconds_per_stage[name] - before.seconds_per_stage[name]
                    stages[name].append(spent)
        stats = buffer.stats(per_class=False)
    # One round in several plans for all of them, so a median would not see the plan at all.
    plan_seconds = float(np.mean(stages.pop("plan")))
    rounds = np.sum(list(stages.values()), axis=0)
    medians = {name: float(np.median(spent)) for name, spent in stages.items()}
    mine = RoundTimes(
        workload=workload.name,
        transport=transport,
        num_ranks=num_ranks,
        num_rounds=len(updates),
        stage_seconds=medians | {"plan": plan_seconds},
        round_seconds=float(np.median(rounds)) + plan_seconds,
        plain_seconds=float(np.median(plain.seconds)),
        update_seconds=float(np.median(updates)),
        cpu_seconds=float(np.mean(processor)),
        record_bytes=stats.record_bytes,
        rows_per_round=workload.num_representatives + workload.num_candidates,
        bytes_per_representative=stats.record_bytes + 8.0 * LIST_WORDS,
    )
    slowest: RoundTimes = max(_everybodys(mine), key=lambda each: each.round_seconds)
    return slowest


def measure_beside(
    workload: Workload, transport: str, step_milliseconds: float, seconds: float
) -> Beside:
    """Times a real training step with and without rounds beside it.

    Args:
        workload: sizes.
        transport: by its name.
        step_milliseconds: how long the step shall take, alone.
        seconds: how long to measure, for each of both.
    """
    batch = workload.batch()
    step = _training_step(step_milliseconds / 1e3)
    num_steps = int(seconds / NUM_BLOCKS / (step_milliseconds / 1e3))
    num_steps = min(MOST_STEPS, max(10, num_steps))
    alone, beside = [], []
    with _filled_buffer(workload, transport, "per-class-random") as buffer:
        before = buffer.stats(per_class=False)
        for _ in range(NUM_BLOCKS):
            _barrier()
            alone += [_seconds(step) for _ in range(num_steps)]
            _barrier()
            for _ in range(num_steps):
                joined = buffer.update(batch)
                beside.append(_seconds(step))
                del joined
        after = buffer.stats(per_class=False)
    spent = {
        name: (getattr(after, name) - getattr(before, name)) / len(beside)
        for name in ("seconds_waited", "seconds_offering", "seconds_joining", "seconds_here")
    }
    rounds = sum(after.seconds_per_stage.values()) - sum(before.seconds_per_stage.values())
    mine = Beside(
        workload=workload.name,
        transport=transport,
        alone_seconds=float(np.mean(alone)),
        step_seconds=float(np.mean(beside)),
        exposed_seconds=spent["seconds_waited"] + spent["seconds_offering"],
        join_seconds=spent["seconds_joining"],
        hidden_seconds=max(
            0.0, rounds / len(beside) - spent["seconds_waited"] - spent["seconds_here"]
        ),
    )
    slowest: Beside = max(_everybodys(mine), key=lambda each: each.exposed_seconds)
    return slowest


def measure_all(
    workloads: tuple[str, ...],
    transports: tuple[str, ...],
    num_rounds: int,
    step_milliseconds: tuple[float, ...],
    seconds: float,
) -> dict[str, Any]:
    """Everything, on one rank of several; what rank 0 returns is of all.

    Returns:
        "rounds" and "beside": lists of ``RoundTimes`` and ``Beside``, as plain dicts.
    """
    chosen = [WORKLOADS[name] for name in workloads]
    rounds = [
        measure_rounds(workload, transport, _fewer(workload, num_rounds))
        for workload in chosen
        for transport in transports
    ]
    beside = [
        measure_beside(workload, transports[0], milliseconds, seconds)
        for workload in chosen
        for milliseconds in step_milliseconds
    ]
    return {
        "rounds": [asdict(each) for each in rounds],
        "beside": [asdict(each) for each in beside],
    }


class _PlainCopy:
    """Gathers r and scatters c random rows of an array, with NumPy."""

    def __init__(self, workload: Workload) -> None:
        elements = int(np.prod(workload.shape)) * workload.dtype.itemsize + 8
        self._shard = np.ones((workload.rows_per_rank, -(-elements // 16) * 2), dtype=np.int64)
        self._out = np.ones_like(self._shard[: workload.num_representatives])
        self._source = np.ones_like(self._shard[: workload.num_candidates])
        self._random = np.random.default_rng(0)
        self.seconds: list[float] = []

    def run(self, times: int) -> None:
        """Copies, and notes the seconds of each time."""
        num_rows = len(self._shard)
        for _ in range(times):
            reads = self._random.permutation(num_rows)[: len(self._out)]
            writes = self._random.permutation(num_rows)[: len(self._source)]
            began = time.perf_counter()
            np.take(self._shard, reads, axis=0, out=self._out, mode="clip")
            self._shard[writes] = self._source
            self.seconds.append(time.perf_counter() - began)


@contextmanager
def _filled_buffer(workload: Workload, transport: str, selection: str) -> Iterator[RehearsalBuffer]:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    capacity = workload.rows_per_rank * num_ranks
    with RehearsalBuffer(
        capacity,
        num_representatives=workload.num_representatives,
        num_candidates=workload.num_candidates,
        selection=selection,
        transport=transport,
        timeout_seconds=120.0,
    ) as buffer:
        images, labels = replace(workload, batch_size=1).batch()[0], torch.arange(512) % 10
        while len(buffer) < capacity:
            buffer.draw()
            buffer.offer((images.expand(512, *workload.shape), labels))
        yield buffer


def _training_step(seconds: float) -> Callable[[], None]:
    """A step of SGD on a perceptron whose width makes it last about that long here.

    With several ranks it averages gradients, so that ranks keep step as they do in training.
    """
    width, taken = 32, 0.0
    step: Callable[[], None] = lambda: None  # noqa: E731
    while taken < seconds:
        width = int(width * max(1.15, min(2.0, (seconds / max(taken, 1e-5)) ** 0.4)))
        step = _perceptron_step(width)
        taken = float(np.median([_seconds(step) for _ in range(7)]))
        taken = max(_everybodys(taken))
    return step


def _perceptron_step(width: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(256, width), torch.nn.ReLU(), torch.nn.Linear(width, width),
        torch.nn.ReLU(), torch.nn.Linear(width, 10),
    )  # fmt: skip
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(64, 256, generator=generator)
    labels = torch.arange(64) % 10

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step


def _fewer(workload: Workload, num_rounds: int) -> int:
    """Large records need fewer rounds for a steady median."""
    return num_rounds if workload.rows_per_rank > 5000 else max(NUM_BLOCKS, num_rounds // 3)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _everybodys(mine: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
