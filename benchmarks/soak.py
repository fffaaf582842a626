"""Many rounds over shared memory with random pauses: no record may ever be torn.

    python benchmarks/soak.py --ranks 4 --rounds 100000

Each record carries numbers that follow from its own first one, and a checksum. Every rank checks
each record that it draws, now and then also that the joint draw holds nothing twice. Trainers and
workers pause at random, workers also in the middle of a write, when the shard holds half-written
records. Ends with status 1 at the first fault; with ``--no-waiting``, which takes the semaphores
away, it must.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer
from ritornello.records.shard import Shard
from ritornello.testing import spawn_ranks
from ritornello.transports.shared_memory import GATHERED, SharedMemoryTransport

NUM_WORDS = 96  # with 2,500 records are large ones, which are gathered owner by owner


def records(numbers: np.ndarray) -> np.ndarray:
    """int64 ``[n, NUM_WORDS + 1]``: a number, others that follow from it, and the sum of all."""
    factors = np.arange(1, NUM_WORDS, dtype=np.int64) * 0x9E3779B97F4A7C1
    words = numbers[:, None] * factors
    words[:, 0] = numbers
    return np.concatenate([words, words.sum(axis=1, keepdims=True)], axis=1)


def check(drawn: np.ndarray) -> None:
    """Raises AssertionError for a record that is not as it was offered."""
    assert np.array_equal(drawn, records(drawn[:, 0])), "a torn record"


def make_writes_slow(dice: np.random.Generator, pause_seconds: float) -> None:
    """Lets some writes to the shard pause with the second half of each record missing."""
    write = Shard.write

    def slow_write(self: Shard, slots: np.ndarray, records: torch.Tensor, rows: np.ndarray) -> None:
        if dice.random() < 0.05:
            half = records.clone()
            half[:, records.shape[1] // 2 :] = 0
            write(self, slots, half, rows)
            time.sleep(dice.random() * pause_seconds)
        write(self, slots, records, rows)

    Shard.write = slow_write  # type: ignore[method-assign]


def play(rank: int, num_rounds: int, pause_seconds: float, waiting: bool) -> dict[str, float]:
    """One rank's part."""
    make_writes_slow(np.random.default_rng([rank, 2]), pause_seconds)
    if not waiting:
        wait = SharedMemoryTransport._wait
        SharedMemoryTransport._wait = (  # type: ignore[method-assign]
            lambda self, kind, *rest: wait(self, kind, *rest) if kind == GATHERED else None
        )
    dice = np.random.default_rng([rank, 1])
    began = time.monotonic()
    with RehearsalBuffer(
        600,
        transport="shared_memory",
        num_representatives=5,
        num_candidates=4,
        selection="fifo",
        label=None,
        seed=3,
    ) as buffer:
        for step in range(num_rounds):
            mine = records((step * dist.get_world_size() + rank) * 100 + np.arange(8))
            augmented = buffer.update(torch.from_numpy(mine)).numpy()
            check(augmented[8:])
            if step % 1000 == 0 and step:
                everyone = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, augmented[8:, 0].tolist())
                joint = [number for drawn in everyone for number in drawn]
                assert len(set(joint)) == len(joint), "a representative was drawn twice in a step"
            if dice.random() < 0.02:
                time.sleep(dice.random() * pause_seconds)
        num_done = buffer.stats().num_rounds
    return {"rounds": num_done, "seconds": time.monotonic() - began}


def main() -> None:
    """Runs the ranks and prints what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--pause", type=float, default=0.004, help="seconds, at most")
    parser.add_argument("--no-waiting", action="store_true", help="show that it would be noticed")
    options = parser.parse_args()
    arguments = (options.rounds, options.pause, not options.no_waiting)
    outcomes = spawn_ranks(options.ranks, play, *arguments, seconds=60 + options.rounds * 0.05)
    for rank, outcome in enumerate(outcomes):
        if not isinstance(outcome, dict):
            raise SystemExit(f"rank {rank}: {outcome!r}")
        print(f"rank {rank}: {outcome['rounds']} rounds in {outcome['seconds']:.0f} s, none torn")


if __name__ == "__main__":
    main()
