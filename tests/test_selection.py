"""Selection policies. Statistical tests have fixed seeds and a false-alarm rate of 0.001."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.random_streams import Purpose, stream
from ritornello.rounds import check_labels, rows_of_rank, size_after
from ritornello.selection import (
    POLICIES,
    Assignment,
    ClassBalanced,
    Fifo,
    PerClassRandom,
    Reservoir,
    SelectionPolicy,
    selection_policy,
)
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

    @property
    def counts(self) -> dict[int, int]:
        labels, counts = np.unique(self.labels[: self.size], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def equal_shares(offered: dict[int, int], num_slots: int) -> dict[int, int]:
    """Water-filling by hand: one slot at a time to the class that has least and wants more."""
    shares = dict.fromkeys(offered, 0)
    for _ in range(min(num_slots, sum(offered.values()))):
        wanting = [label for label in offered if shares[label] < offered[label]]
        shares[min(wanting, key=lambda label: shares[label])] += 1
    return shares


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([ClassBalanced, PerClassRandom]),
    st.integers(1, 60),
    st.lists(st.lists(st.integers(0, 11), max_size=25), max_size=25),
    st.integers(1, 5),
)
def test_shares_are_equal_and_the_shard_is_full(
    policy: type[SelectionPolicy], num_slots: int, rounds: list[list[int]], num_ranks: int
) -> None:
    shard = PlayedShard(policy(), num_slots, rank=num_ranks - 1, num_ranks=num_ranks)
    for labels in rounds:
        shard.offer(np.array(labels, dtype=np.int64))
        assert shard.size == min(num_slots, sum(shard.offered.values()))
        ideal = sorted(equal_shares(shard.offered, num_slots).values())
        assert sorted([*shard.counts.values()] + [0] * (len(ideal) - len(shard.counts))) == ideal


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 40), st.integers(0, 2**32))
def test_the_global_budget_is_exact_and_no_class_is_lost(
    num_ranks: int, num_classes: int, extra: int, seed: int
) -> None:
    capacity = max(num_ranks, num_classes) + extra
    generator = np.random.default_rng(seed)
    shards = [
        PlayedShard(ClassBalanced(), rows_of_rank(capacity, rank, num_ranks), rank, num_ranks)
        for rank in range(num_ranks)
    ]
    stream_of_labels = np.repeat(np.arange(num_classes), 60)  # class after class
    for shard in shards:
        for start in range(0, len(stream_of_labels), 30):
            shard.offer(generator.permutation(stream_of_labels[start : start + 30]))
    assert sum(shard.size for shard in shards) == capacity
    totals = sum(np.bincount(shard.labels, minlength=num_classes) for shard in shards)
    assert totals.min() >= 1
    assert totals.min() >= capacity // num_classes - 2
    assert totals.max() <= -(-capacity // num_classes) + 2


def uniformity(policy: type[SelectionPolicy], label: int, num_runs: int = 300) -> float:
    """p-value of "what is stored of a class is a uniform sample of its stream".

    Three classes; the second appears late, the third later: shares shrink twice.
    """
    length = {0: 160, 1: 120, 2: 80}[label]
    stored = np.zeros(length)
    for seed in range(num_runs):
        generator = np.random.default_rng(seed)
        shard = PlayedShard(policy(), 31, rank=1, num_ranks=2, seed=seed)
        late = [np.zeros(40), np.tile([0, 1], 40), np.tile([0, 1, 2], 80)]
        for phase in late:
            shuffled = generator.permutation(phase.astype(np.int64))
            for start in range(0, len(shuffled), 9):
                shard.offer(shuffled[start : start + 9])
        assert shard.offered[label] == length
        stored[shard.positions[shard.labels == label]] += 1
    groups = stored.reshape(20, -1).sum(axis=1)
    return chi_square_p_value(groups, groups.mean())


@pytest.mark.parametrize("label", [0, 1, 2])
def test_class_balanced_keeps_a_uniform_sample_of_each_class(label: int) -> None:
    assert uniformity(ClassBalanced, label) > 0.001


def test_per_class_random_forgets_the_older_samples_of_a_class() -> None:
    # Also shows that the test above can fail.
    assert uniformity(PerClassRandom, 0) < 1e-9


def test_per_class_random_keeps_mostly_the_last_tenth_of_a_long_stream() -> None:
    # 8,000 samples of which every fourth is a candidate, as with b=56, c=14.
    shard = PlayedShard(PerClassRandom(), 100)
    for _ in range(200):
        shard.offer(np.zeros(10, dtype=np.int64))
    assert 78 <= np.count_nonzero(shard.positions >= 1800) <= 95


def test_reservoir_keeps_a_uniform_sample_of_the_whole_stream() -> None:
    stored = np.zeros(400)
    for seed in range(400):
        shard = PlayedShard(Reservoir(), 40, seed=seed)
        for start in range(0, 400, 16):
            shard.offer(np.zeros(min(16, 400 - start), dtype=np.int64))
        stored[shard.positions] += 1
    assert stored.sum() == 400 * 40
    assert chi_square_p_value(stored.reshape(40, 10).sum(axis=1), 400.0) > 0.001


def test_fifo_keeps_the_latest() -> None:
    shard = PlayedShard(Fifo(), 10)
    for size in (4, 3, 25, 2):
        shard.offer(np.zeros(size, dtype=np.int64))
        total = shard.offered[0]
        assert sorted(shard.positions[: shard.size]) == list(range(max(0, total - 10), total))


@pytest.mark.parametrize("name", POLICIES)
def test_no_candidates(name: str) -> None:
    shard = PlayedShard(selection_policy(name), 5)
    shard.offer(np.zeros(0, dtype=np.int64))
    shard.offer(np.zeros(3, dtype=np.int64))
    shard.offer(np.zeros(0, dtype=np.int64))
    assert shard.size == 3


def test_labels_may_be_any_non_negative_integers() -> None:
    shard = PlayedShard(ClassBalanced(), 30)
    for labels in ([2**62, 5], [7, 5, 5, 2**62], [0]):
        shard.offer(np.repeat(np.array(labels), 20))
    assert sorted(shard.counts) == [0, 5, 7, 2**62]
    assert set(shard.counts.values()) <= {7, 8}


@pytest.mark.parametrize(
    ("num_classes", "num_ranks", "capacity"), [(10, 64, 320), (10, 128, 128), (100, 128, 2000)]
)
def test_shares_are_fair_with_more_ranks_than_classes(
    num_classes: int, num_ranks: int, capacity: int
) -> None:
    """Also where a shard has no room for every class."""
    held = np.zeros(num_classes)
    for rank in range(num_ranks):
        shard = PlayedShard(
            ClassBalanced(), rows_of_rank(capacity, rank, num_ranks), rank, num_ranks
        )
        for start in range(0, num_classes, 10):
            shard.offer(np.repeat(np.arange(start, start + 10), 30))
        for label, count in shard.counts.items():
            held[label] += count
    assert held.sum() == capacity
    fair = capacity / num_classes
    assert 0.6 * fair < held.min() <= held.max() < 1.6 * fair


def test_a_policy_belongs_to_one_buffer() -> None:
    policy = ClassBalanced()
    policy.bind(10, 0, 1)
    with pytest.raises(ValueError, match="ClassBalanced already belongs to a buffer"):
        policy.bind(10, 0, 1)


def test_unknown_policies() -> None:
    with pytest.raises(ValueError, match="selection='lifo': there are 'class-balanced'"):
        selection_policy("lifo")
    with pytest.raises(TypeError, match="selection=3: give a name"):
        selection_policy(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes=0: it must be at least 1"):
        ClassBalanced(num_classes=0)


def test_labels_out_of_range() -> None:
    check_labels(np.array([0, 9]), None)
    with pytest.raises(ValueError, match=r"label -1 is out of range: .* at least 0 \(1 of 3"):
        check_labels(np.array([0, -1, 5]), None)
    with pytest.raises(ValueError, match="label 10 is out of range: labels must be from 0 to 9"):
        check_labels(np.array([0, 10]), 10)


@pytest.mark.parametrize(
    ("rows", "slots", "message"),
    [
        ([0], [1, 2], "1 rows but 2 slots"),
        ([0], [9], "slots must be from 0 to 7"),
        ([4], [0], "rows from 0 to 3"),
        ([0], [5], "fill without gaps"),
        ([0, 1], [5, 5], "fill without gaps"),
    ],
)
def test_assignments_that_break_the_contract(
    rows: list[int], slots: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        size_after(
            Assignment(np.array(rows), np.array(slots)), size=4, num_rows=8, num_candidates=4
        )


def test_capacity_is_split_to_the_last_one() -> None:
    assert [rows_of_rank(11, rank, 4) for rank in range(4)] == [3, 3, 3, 2]
    assert all(
        sum(rows_of_rank(c, i, n) for i in range(n)) == c for c in range(40) for n in range(1, 9)
    )
