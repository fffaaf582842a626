"""What a round costs, stage by stage, against a plain copy of the same rows in the same run.

    python benchmarks/rounds.py --ranks 2

Each rank is a process with one thread for torch. Rounds follow one another with no training in
between; medians over the second half, when the buffer is full. "plain" gathers r and scatters c
random rows of an array of the shard's size with NumPy, on all ranks at once.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer
from ritornello.rounds import STAGES
from ritornello.testing import spawn_ranks


@dataclass(frozen=True)
class Workload:
    """Sizes per rank."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int
    num_candidates: int
    num_representatives: int
    rows_per_rank: int


WORKLOADS = (
    Workload("ImageNet-like, uint8", (3, 224, 224), torch.uint8, 56, 14, 7, 2000),
    Workload("ImageNet-like, float32", (3, 224, 224), torch.float32, 56, 14, 7, 1000),
    Workload("CIFAR-like, uint8", (3, 32, 32), torch.uint8, 128, 16, 16, 10_000),
    Workload("MNIST-like, uint8", (1, 28, 28), torch.uint8, 128, 32, 32, 10_000),
)


def measure(rank: int, workload: Workload, num_rounds: int) -> dict[str, float]:
    """One rank's medians in microseconds, and its memory in MB."""
    images = torch.zeros((workload.batch_size, *workload.shape), dtype=workload.dtype)
    labels = torch.arange(workload.batch_size) % 10
    num_ranks = dist.get_world_size()
    rows = workload.rows_per_rank
    with RehearsalBuffer(
        rows * num_ranks,
        num_representatives=workload.num_representatives,
        num_candidates=workload.num_candidates,
    ) as buffer:
        # The first offers fill the buffer.
        while len(buffer) < rows * num_ranks:
            buffer.update((images, labels))
        before = buffer.stats()
        memory_before = _memory_mb()
        rounds, updates = [], []
        for _ in range(num_rounds):
            began = time.perf_counter()
            joined = buffer.update((images, labels))
            handed_over = time.perf_counter()
            len(buffer)  # waits for the round
            rounds.append(time.perf_counter() - handed_over)
            del joined  # to free a large tensor takes time too, and is no part of the round
            updates.append(handed_over - began)
        after = buffer.stats()
        memory_grown = _memory_mb() - memory_before
    stages = {
        name: (after.seconds_per_stage[name] - before.seconds_per_stage[name]) / num_rounds
        for name in STAGES
    }
    dist.barrier()
    plain = _plain_copy(workload, after.record_bytes, num_rounds)
    micro = {"round": _median(rounds), "update": _median(updates), "plain": plain, **stages}
    return {name: 1e6 * value for name, value in micro.items()} | {"grown": memory_grown}


def _plain_copy(workload: Workload, record_bytes: int, num_rounds: int) -> float:
    """Seconds to gather r and scatter c random rows."""
    shard = np.zeros((workload.rows_per_rank, record_bytes // 8), dtype=np.int64)
    out = np.zeros((workload.num_representatives, shard.shape[1]), dtype=np.int64)
    source = np.zeros((workload.num_candidates, shard.shape[1]), dtype=np.int64)
    generator = np.random.default_rng(0)

    def copy(reads: np.ndarray, writes: np.ndarray) -> None:
        np.take(shard, reads, axis=0, out=out, mode="clip")
        shard[writes] = source

    times = []
    for _ in range(num_rounds):
        reads = generator.integers(len(shard), size=len(out))
        writes = generator.permutation(len(shard))[: len(source)]
        times.append(_seconds(lambda reads=reads, writes=writes: copy(reads, writes)))
    return _median(times)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _median(times: list[float]) -> float:
    return float(np.median(times[len(times) // 2 :]))


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Measures all workloads and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    print(f"{options.ranks} rank(s), microseconds, median (stages: mean), rank 0")
    columns = ("round", *STAGES, "update", "plain")
    print(f"{'workload':<24}" + "".join(f"{name:>10}" for name in columns) + "     ratio  grown MB")
    for workload in WORKLOADS:
        outcome = spawn_ranks(options.ranks, measure, workload, options.rounds)[0]
        if not isinstance(outcome, dict):
            raise SystemExit(f"{workload.name}: {outcome!r}")
        figures = "".join(f"{outcome[name]:>10.0f}" for name in columns)
        ratio = outcome["round"] / outcome["plain"]
        print(f"{workload.name:<24}{figures}{ratio:>9.1f}x{outcome['grown']:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
