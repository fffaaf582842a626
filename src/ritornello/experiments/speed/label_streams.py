"""Filling the shards of virtual ranks, in one process, with class-incremental label streams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.names import selection_policy
from ritornello.policies.selection import size_after
from ritornello.records.shard import rows_of_rank
from ritornello.rounds.random_streams import Purpose, Streams


@dataclass(frozen=True)
class LabelStream:
    """A class-incremental stream of labels; no samples, as policies never see any.

    Attributes:
        classes: how many, in a random order.
        samples_per_class: of the largest class.
        tasks: how many the classes are split into.
        epochs: per task; each rank's part is shuffled anew in each.
        imbalance: the largest class has as many times the samples of the smallest; sizes fall
            geometrically in between.
        skew: None: the samples of a task are dealt out evenly at random. Otherwise each
            class's samples are split over the ranks by a Dirichlet distribution with this
            concentration, so that ranks differ in labels and in number of samples.
        seed: of the order of the classes and of all shuffles.
    """

    classes: int
    samples_per_class: int
    tasks: int
    epochs: int = 1
    imbalance: float = 1.0
    skew: float | None = None
    seed: int = 0

    def task_labels(self) -> list[Ints]:
        """The labels of each task's samples, int64, one epoch of them."""
        place = np.linspace(0.0, 1.0, self.classes)
        sizes = np.maximum(1, np.rint(self.samples_per_class * self.imbalance**-place))
        order = np.random.default_rng(self.seed).permutation(self.classes)
        return [
            np.repeat(classes, sizes[classes].astype(np.int64))
            for classes in np.array_split(order, self.tasks)
        ]

    def epochs_of(self, num_ranks: int) -> Iterator[list[Ints]]:
        """For each epoch of each task: every rank's labels in the order in which it sees them."""
        for task, labels in enumerate(self.task_labels()):
            dealing = np.random.default_rng([self.seed, task, num_ranks])
            ranks = self._deal(labels, num_ranks, dealing)
            for epoch in range(self.epochs):
                shuffle = np.random.default_rng([self.seed, task, num_ranks, 1 + epoch])
                order = np.lexsort((shuffle.random(len(labels)), ranks))
                ends = np.cumsum(np.bincount(ranks, minlength=num_ranks))
                yield np.split(labels[order], ends[:-1])

    def growth(self) -> float:
        """Samples that training from scratch passes over, per sample of new data."""
        sizes = np.array([len(labels) for labels in self.task_labels()])
        return float(np.cumsum(sizes).sum() / sizes.sum())

    def _deal(self, labels: Ints, num_ranks: int, generator: np.random.Generator) -> Ints:
        """The rank of each sample."""
        if self.skew is None:
            return generator.permutation(len(labels)) % num_ranks
        ranks = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            mine = np.flatnonzero(labels == label)
            shares = generator.dirichlet(np.full(num_ranks, self.skew))
            counts = generator.multinomial(len(mine), shares)
            ranks[mine] = np.repeat(np.arange(num_ranks), counts)
        return ranks


@dataclass(frozen=True)
class FilledBuffer:
    """What all shards hold after the stream.

    Attributes:
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        labels: int64 ``[num_held]``, by global index: shard after shard.
        num_rounds: how many rounds the stream took.
        num_gathering_rounds: in how many of them sizes were all-gathered, as some shard was
            still filling.
        admit_seconds: median time of the selection policy in a round of one rank.
    """

    sizes: Ints
    labels: Ints
    num_rounds: int
    num_gathering_rounds: int
    admit_seconds: float


class VirtualRank:
    """One rank's shard as labels alone: its policy, its streams, its slots."""

    def __init__(self, selection: str, capacity: int, rank: int, num_ranks: int, seed: int) -> None:
        num_rows = rows_of_rank(capacity, rank, num_ranks)
        self.policy = selection_policy(selection)
        self.policy.buffer_seed = seed
        self.policy.bind(num_rows, rank, num_ranks)
        self.labels = np.zeros(num_rows, dtype=np.int64)
        self.size = 0
        self._candidates = Streams(seed, Purpose.CANDIDATES, rank)
        self._selection = Streams(seed, Purpose.SELECTION, rank)

    def admit(self, labels: Ints, num_candidates: int | None, step: int) -> None:
        """Offers a mini-batch, as ``RehearsalBuffer`` does."""
        if num_candidates is not None and num_candidates < len(labels):
            draws = self._candidates.at(step).random(len(labels))
            labels = labels[draws < num_candidates / len(labels)]
        assignment = self.policy.admit(labels, self._selection.at(step))
        self.size = size_after(assignment, self.size, len(self.labels), len(labels))
        self.labels[assignment.slots] = labels[assignment.rows]


def fill(
    stream: LabelStream,
    num_ranks: int,
    *,
    capacity: int,
    batch_size: int,
    num_candidates: int | None,
    selection: str,
    seed: int,
) -> FilledBuffer:
    """Runs the stream through the selection policies of all virtual ranks.

    Ranks take part in equally many rounds; one whose samples have run out offers none.

    Args:
        stream: what the ranks see.
        num_ranks: how many.
        capacity: of the whole buffer.
        batch_size: ``b``, per rank.
        num_candidates: ``c``, per rank; None: every sample is a candidate.
        selection: name of the policy.
        seed: of the buffer's random streams.
    """
    ranks = [VirtualRank(selection, capacity, i, num_ranks, seed) for i in range(num_ranks)]
    step = num_gathering = num_held = 0
    seconds = []
    for parts in stream.epochs_of(num_ranks):
        for first in range(0, max(map(len, parts)), batch_size):
            for rank, labels in zip(ranks, parts, strict=True):
                if first < len(labels):
                    began = time.perf_counter()
                    rank.admit(labels[first : first + batch_size], num_candidates, step)
                    seconds.append(time.perf_counter() - began)
            step += 1
            if num_held < capacity:
                num_gathering += 1
                num_held = sum(rank.size for rank in ranks)
    return FilledBuffer(
        sizes=np.array([rank.size for rank in ranks]),
        labels=np.concatenate([rank.labels[: rank.size] for rank in ranks]),
        num_rounds=step,
        num_gathering_rounds=num_gathering,
        admit_seconds=float(np.median(seconds)),
    )
