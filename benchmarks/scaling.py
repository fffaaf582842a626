"""A round costs the same whatever has been seen: few or many classes, few or many records.

    python benchmarks/scaling.py

One process; MNIST-like samples, b = c = r = 32. Buffers of all sizes take turns in one run, so that
a busy moment of the machine hits all; shown are medians. Large arrays are cold, which is no part
of the claim: beside each is a plain gather and scatter of as many random rows of an array of the
same size, and the ratio is that of the differences to the first one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from ritornello import RehearsalBuffer

SIZES = ((10, 1_000), (10, 1_000_000), (1_000, 1_000), (1_000, 1_000_000))
NUM_SAMPLES = 32
NUM_BLOCKS = 20


class Measured:
    """A full buffer, and the seconds of its rounds and of plain copies."""

    def __init__(self, num_classes: int, capacity: int) -> None:
        self.num_classes, self.capacity = num_classes, capacity
        self.dice = np.random.default_rng(0)
        self.buffer = RehearsalBuffer(
            capacity,
            num_representatives=NUM_SAMPLES,
            asynchronous=False,
            selection="class-balanced",
        )
        while len(self.buffer) < capacity:
            self.buffer.update(self.batch(20_000))
        for _ in range(20):  # every class is now past its share
            self.buffer.update(self.batch(20_000))
        self.plain = np.ones((capacity, 100), dtype=np.int64)
        self.source = np.ones((NUM_SAMPLES, 100), dtype=np.int64)
        self.rounds: list[float] = []
        self.copies: list[float] = []

    def batch(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples of random classes."""
        labels = torch.from_numpy(self.dice.integers(self.num_classes, size=num_samples))
        return torch.zeros(num_samples, 784, dtype=torch.uint8), labels

    def run(self, num_rounds: int) -> None:
        """Times some rounds, then some plain copies."""
        for _ in range(num_rounds):
            batch = self.batch(NUM_SAMPLES)
            before = self.buffer.stats(per_class=False).seconds_per_stage
            self.buffer.update(batch)
            after = self.buffer.stats(per_class=False).seconds_per_stage
            self.rounds.append(sum(after.values()) - sum(before.values()))
        for _ in range(num_rounds):
            rows = self.dice.integers(self.capacity, size=(2, NUM_SAMPLES))
            began = time.perf_counter()
            self.plain.take(rows[0], axis=0)
            self.plain[rows[1]] = self.source
            self.copies.append(time.perf_counter() - began)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    everyone = [Measured(*sizes) for sizes in SIZES]
    for _ in range(NUM_BLOCKS):
        for each in everyone:
            each.run(options.rounds // NUM_BLOCKS)
    print("classes    records   round us   plain copy us   difference us   ratio")
    first = np.median(everyone[0].rounds) - np.median(everyone[0].copies)
    for each in everyone:
        median, plain = np.median(each.rounds), np.median(each.copies)
        print(
            f"{each.num_classes:7,}{each.capacity:11,}{1e6 * median:11.1f}{1e6 * plain:16.1f}"
            f"{1e6 * (median - plain):16.1f}{(median - plain) / first:8.2f}"
        )
        each.buffer.close()


if __name__ == "__main__":
    main()
