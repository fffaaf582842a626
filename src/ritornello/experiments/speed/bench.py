"""How fast rounds are on this machine, against a plain copy of the same rows in the same run.

The functions here run on every rank; ``bench_report`` shows what they return.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ritornello.experiments.speed.training_step import seconds_of
from ritornello.experiments.speed.update_times import measure_beside, measure_update, quartiles
from ritornello.experiments.speed.workloads import (
    WORKLOADS,
    PlainRound,
    Workload,
    barrier,
    everybodys,
    filled_buffer,
    num_ranks,
)
from ritornello.rounds.round import STAGES

NUM_BLOCKS = 5
"""Rounds and plain copies take turns, so that a busy moment of the machine hits both."""

LIST_WORDS = 2
"""int64 per representative in the lists of a class-balanced policy: each list has room for as
much again as it holds."""


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
    """The trainer's thread's time per step, without rounds: join, copy of the candidates."""
    cpu_seconds: float
    """Processor time of all threads of the rank, per round and update."""
    record_bytes: int
    rows_per_round: int
    """r + c."""
    bytes_per_representative: float
    """Memory of the shard and of the buffer's lists, per representative that fits."""
    round_middle_half: tuple[float, float] = (math.nan, math.nan)
    """The quartiles of ``round_seconds``; files of earlier versions have none."""
    plain_middle_half: tuple[float, float] = (math.nan, math.nan)
    """Those of ``plain_seconds``."""

    @property
    def ratio(self) -> float:
        """A round's time, in multiples of the plain copy's."""
        return self.round_seconds / self.plain_seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Rows gathered and scattered, over the time of a round."""
        return self.rows_per_round * self.record_bytes / self.round_seconds / 1e9


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
    batch = workload.batch()
    plain = PlainRound(workload)
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    copies, updates, processor = [], [], []
    with filled_buffer(workload, transport, selection) as buffer:
        for _ in range(NUM_BLOCKS):
            barrier()
            for _ in range(num_rounds // NUM_BLOCKS):
                plain.choose()
                copies.append(seconds_of(plain.copy))
            barrier()
            for _ in range(num_rounds // NUM_BLOCKS):
                before = buffer.stats(per_class=False)
                began, began_processor = time.perf_counter(), time.process_time()
                joined = buffer.update(batch)
                seconds = time.perf_counter() - began
                after = buffer.stats(per_class=False)  # waits for the round
                processor.append(time.process_time() - began_processor)
                del joined  # freeing it is no part of the round
                spent = after.since(before)
                updates.append(seconds - spent.seconds_here)
                for name in STAGES:
                    stages[name].append(spent.seconds_per_stage[name])
        stats = buffer.stats(per_class=False)
    # One round in several plans for all of them, so a median would not see the plan at all.
    plan_seconds = float(np.mean(stages.pop("plan")))
    rounds = quartiles(np.sum(list(stages.values()), axis=0) + plan_seconds)
    plain_copies = quartiles(copies)
    medians = {name: float(np.median(spent)) for name, spent in stages.items()}
    mine = RoundTimes(
        workload=workload.name,
        transport=transport,
        num_ranks=num_ranks(),
        num_rounds=len(updates),
        stage_seconds=medians | {"plan": plan_seconds},
        round_seconds=rounds[1],
        plain_seconds=plain_copies[1],
        update_seconds=float(np.median(updates)),
        cpu_seconds=float(np.mean(processor)),
        record_bytes=stats.record_bytes,
        rows_per_round=workload.num_representatives + workload.num_candidates,
        bytes_per_representative=stats.record_bytes + 8.0 * LIST_WORDS,
        round_middle_half=rounds[::2],
        plain_middle_half=plain_copies[::2],
    )
    slowest: RoundTimes = max(everybodys(mine), key=lambda each: each.round_seconds)
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
        "rounds", "update" and "beside": lists of ``RoundTimes``, ``UpdateTimes`` and ``Beside``,
        as plain dicts.
    """
    chosen = [WORKLOADS[name] for name in workloads]
    rounds = [
        measure_rounds(workload, transport, _fewer(workload, num_rounds))
        for workload in chosen
        for transport in transports
    ]
    update = [
        measure_update(workload, transports[0], _fewer(workload, num_rounds)) for workload in chosen
    ]
    beside = [
        measure_beside(workload, transports[0], milliseconds, seconds)
        for milliseconds in step_milliseconds
        for workload in chosen
    ]
    return {
        "rounds": [asdict(each) for each in rounds],
        "update": [asdict(each) for each in update],
        "beside": [asdict(each) for each in beside],
    }


def _fewer(workload: Workload, num_rounds: int) -> int:
    """Large records need fewer rounds for a steady median."""
    return num_rounds if workload.rows_per_rank > 5000 else max(NUM_BLOCKS, num_rounds // 3)
