"""A shard without samples, to play selection policies on, and what is expected of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ritornello.policies.selection import SelectionPolicy, size_after
from ritornello.records.shard import rows_of_rank
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.testing import chi_square_p_value


class PlayedShard:
    """A shard that holds (label, position in its class's stream) instead of samples."""

    def __init__(
        self,
        policy: SelectionPolicy,
        num_slots: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        policy.bind(num_slots, rank, num_ranks)
        self.policy, self.num_slots, self.rank, self.seed = policy, num_slots, rank, seed
        self.labels = np.full(num_slots, -1)
        self.positions = np.full(num_slots, -1)
        self.size = self.step = 0
        self.offered: dict[int, int] = {}

    def offer(self, labels: np.ndarray) -> None:
        positions = np.empty(len(labels), dtype=np.int64)
        for row, label in enumerate(labels.tolist()):
            positions[row] = self.offered.get(label, 0)
            self.offered[label] = int(positions[row]) + 1
        generator = stream(self.seed, Purpose.SELECTION, self.step, rank=self.rank)
        assignment = self.policy.admit(labels, generator)
        self.size = size_after(assignment, self.size, self.num_slots, len(labels))
        self.labels[assignment.slots] = labels[assignment.rows]
        self.positions[assignment.slots] = positions[assignment.rows]
        self.step += 1

    def offer_one_by_one(self, label: int, count: int, round_size: int = 7) -> None:
        """Offers ``count`` candidates of one class, some in each round."""
        for start in range(0, count, round_size):
            self.offer(np.full(min(round_size, count - start), label))

    def positions_of(self, label: int) -> list[int]:
        """Which of a class are stored, ascending."""
        return sorted(self.positions[self.labels == label].tolist())

    @property
    def counts(self) -> dict[int, int]:
        labels, counts = np.unique(self.labels[: self.size], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def played_shards(
    make_policy: Callable[[], SelectionPolicy], capacity: int, num_ranks: int
) -> list[PlayedShard]:
    """The shards of all ranks."""
    return [
        PlayedShard(make_policy(), rows_of_rank(capacity, rank, num_ranks), rank, num_ranks)
        for rank in range(num_ranks)
    ]


def equal_shares(offered: dict[int, int], num_slots: int) -> dict[int, int]:
    """Water-filling by hand: one slot at a time to the class that has least and wants more."""
    shares = dict.fromkeys(offered, 0)
    for _ in range(min(num_slots, sum(offered.values()))):
        wanting = [label for label in offered if shares[label] < offered[label]]
        shares[min(wanting, key=lambda label: shares[label])] += 1
    return shares


def uniformity(
    make_policy: Callable[[], SelectionPolicy], label: int, num_runs: int = 300
) -> float:
    """p-value of "what is stored of a class is a uniform sample of its stream".

    Three classes; the second appears late, the third later: adaptive shares shrink twice.
    """
    length = {0: 160, 1: 120, 2: 80}[label]
    stored = np.zeros(length)
    for seed in range(num_runs):
        generator = np.random.default_rng(seed)
        shard = PlayedShard(make_policy(), 31, rank=1, num_ranks=2, seed=seed)
        late = [np.zeros(40), np.tile([0, 1], 40), np.tile([0, 1, 2], 80)]
        for phase in late:
            shuffled = generator.permutation(phase.astype(np.int64))
            for start in range(0, len(shuffled), 9):
                shard.offer(shuffled[start : start + 9])
        assert shard.offered[label] == length
        stored[shard.positions[shard.labels == label]] += 1
    groups = stored.reshape(20, -1).sum(axis=1)
    return chi_square_p_value(groups, groups.mean())


def forgetting(make_policy: Callable[[], SelectionPolicy], num_runs: int = 400) -> float:
    """p-value of "each candidate enters and replaces a random one" for a class of share 10.

    A candidate that ``k`` others followed is then still there with probability 0.9**k. It offers
    60 to a shard of 20 slots, in which another class came first and has the other half.
    """
    num_offered, share = 60, 10
    stored = np.zeros(num_offered)
    for seed in range(num_runs):
        shard = PlayedShard(make_policy(), 2 * share, seed=seed)
        shard.offer(np.repeat([0, 1], 30))  # so the sizes are settled
        shard.offer_one_by_one(1, num_offered)
        assert shard.counts == {0: share, 1: share}
        held = shard.positions[shard.labels == 1] - 30
        stored[held[held >= 0]] += 1
    expected = num_runs * 0.9 ** np.arange(num_offered - 1, -1, -1)
    # Groups of expected counts above 5, oldest first. The counts of a run are negatively
    # correlated, so the test errs on the safe side.
    groups = np.minimum(np.arange(num_offered) // 5, 11)
    return chi_square_p_value(np.bincount(groups, stored), np.bincount(groups, expected))
