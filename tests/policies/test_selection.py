"""Selection policies in general; those that look at no labels.

Statistical tests have fixed seeds and a false-alarm rate of 0.001.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_shard import PlayedShard, equal_shares

from ritornello.policies.class_shares import ClassBalanced, PerClassRandom
from ritornello.policies.largest_class import ClassBalancedReservoir
from ritornello.policies.names import SELECTION_POLICIES, selection_policy
from ritornello.policies.reservoir import Fifo, Reservoir
from ritornello.policies.selection import (
    MANY_TOLD,
    Assignment,
    Journal,
    SelectionPolicy,
    check_labels,
    size_after,
)
from ritornello.records.shard import rows_of_rank
from ritornello.testing import chi_square_p_value

BALANCED = [name for name in SELECTION_POLICIES if name not in ("reservoir", "fifo")]


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from(BALANCED),
    st.integers(1, 60),
    st.lists(st.lists(st.integers(0, 11), max_size=25), max_size=25),
    st.integers(1, 5),
)
def test_shares_are_equal_and_the_shard_is_full(
    name: str, num_slots: int, rounds: list[list[int]], num_ranks: int
) -> None:
    shard = PlayedShard(selection_policy(name), num_slots, rank=num_ranks - 1, num_ranks=num_ranks)
    for labels in rounds:
        shard.offer(np.array(labels, dtype=np.int64))
        assert shard.size == min(num_slots, sum(shard.offered.values()))
        ideal = sorted(equal_shares(shard.offered, num_slots).values())
        assert sorted([*shard.counts.values()] + [0] * (len(ideal) - len(shard.counts))) == ideal


def uniformity_of_one_class(policy: type[SelectionPolicy]) -> float:
    """p-value of "what is stored is a uniform sample of a stream of one class"."""
    stored = np.zeros(400)
    for seed in range(400):
        shard = PlayedShard(policy(), 40, seed=seed)
        shard.offer_one_by_one(0, 400, round_size=16)
        stored[shard.positions] += 1
    assert stored.sum() == 400 * 40
    return chi_square_p_value(stored.reshape(40, 10).sum(axis=1), 400.0)


@pytest.mark.parametrize("policy", [Reservoir, ClassBalancedReservoir, ClassBalanced])
def test_reservoirs_keep_a_uniform_sample_of_the_whole_stream(
    policy: type[SelectionPolicy],
) -> None:
    assert uniformity_of_one_class(policy) > 0.001


def test_that_the_test_of_reservoirs_can_fail() -> None:
    assert uniformity_of_one_class(PerClassRandom) < 1e-9


def test_fifo_keeps_the_latest() -> None:
    shard = PlayedShard(Fifo(), 10)
    for size in (4, 3, 25, 2):
        shard.offer(np.zeros(size, dtype=np.int64))
        total = shard.offered[0]
        assert sorted(shard.positions[: shard.size]) == list(range(max(0, total - 10), total))


@pytest.mark.parametrize("name", SELECTION_POLICIES)
def test_no_candidates(name: str) -> None:
    shard = PlayedShard(selection_policy(name), 5)
    shard.offer(np.zeros(0, dtype=np.int64))
    shard.offer(np.zeros(3, dtype=np.int64))
    shard.offer(np.zeros(0, dtype=np.int64))
    assert shard.size == 3


@pytest.mark.parametrize("name", SELECTION_POLICIES)
def test_the_same_stream_gives_the_same_shard(name: str) -> None:
    shards = [PlayedShard(selection_policy(name), 30, seed=4) for _ in range(2)]
    for shard in shards:
        generator = np.random.default_rng(9)
        for step in range(40):
            shard.offer(generator.integers(1 + step // 5, size=9))
    assert np.array_equal(shards[0].labels, shards[1].labels)
    assert np.array_equal(shards[0].positions, shards[1].positions)


@pytest.mark.parametrize("name", BALANCED)
def test_labels_may_be_any_non_negative_integers(name: str) -> None:
    shard = PlayedShard(selection_policy(name), 30)
    for labels in ([2**62, 5], [7, 5, 5, 2**62], [0]):
        shard.offer(np.repeat(np.array(labels), 20))
    assert sorted(shard.counts) == [0, 5, 7, 2**62]
    assert set(shard.counts.values()) <= {7, 8}


@pytest.mark.parametrize("name", SELECTION_POLICIES)
def test_a_policy_belongs_to_one_buffer(name: str) -> None:
    policy = selection_policy(name)
    policy.bind(10, 0, 1)
    with pytest.raises(ValueError, match=f"{type(policy).__name__} already belongs to a buffer"):
        policy.bind(10, 0, 1)


def test_unknown_policies() -> None:
    with pytest.raises(ValueError, match="selection='lifo': there are 'class-balanced'"):
        selection_policy("lifo")
    with pytest.raises(TypeError, match="selection=3: give a name"):
        selection_policy(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BALANCED)
def test_the_number_of_classes(name: str) -> None:
    assert SELECTION_POLICIES[name](num_classes=3).num_classes == 3  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="num_classes=0: it must be at least 1"):
        SELECTION_POLICIES[name](num_classes=0)  # type: ignore[call-arg]


def test_labels_out_of_range() -> None:
    check_labels(np.array([0, 9]), None)
    with pytest.raises(ValueError, match=r"label -1 is out of range: .* at least 0 \(1 of 3"):
        check_labels(np.array([0, -1, 5]), None)
    with pytest.raises(ValueError, match="label 10 is out of range: labels must be from 0 to 9"):
        check_labels(np.array([0, 10]), 10)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
@pytest.mark.parametrize("num_classes", [None, 7, 100, 1000])
def test_labels_of_any_integer_type(dtype: str, num_classes: int | None) -> None:
    info = np.iinfo(dtype)
    end = min(num_classes or 2**63, int(info.max) + 1)
    for label in (0, 1, end - 1, end, int(info.max), -1, int(info.min)):
        if not info.min <= label <= info.max:
            continue
        labels = np.array([0, label, 0, 0], dtype=dtype)[:: 2 if label == 0 else 1]
        if 0 <= label < end:
            check_labels(labels, num_classes)
        else:
            with pytest.raises(ValueError, match=f"the label {label} is out of range"):
                check_labels(labels, num_classes)


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


def test_a_journal_counts_a_round_that_is_done_again_once() -> None:
    policy = selection_policy("class-balanced")
    policy.bind(4, 0, 1)
    journal, labels = Journal(policy, 0), np.zeros(MANY_TOLD - 1, dtype=np.int64)
    journal.note(0, labels)
    journal.note(0, labels)
    assert not journal.is_long
    journal.note(1, labels)
    assert journal.is_long
