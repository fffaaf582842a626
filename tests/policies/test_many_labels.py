"""More classes than slots, and where classes belong. Fixed seeds, false-alarm rates of 0.001."""

from __future__ import annotations

import numpy as np
import pytest
from played_shard import PlayedShard, played_shards

from ritornello.policies.class_shares import ClassBalanced, GreedyBalanced
from ritornello.policies.contents import Contents
from ritornello.policies.largest_class import ClassBalancedReservoir
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.policies.selection import SelectionPolicy
from ritornello.testing import chi_square_p_value

WITH_CLASSES = [name for name, kind in SELECTION_POLICIES.items() if kind.needs_labels]

of_any_policy = pytest.mark.parametrize("name", WITH_CLASSES)


def policy_of(name: str, seed: int) -> SelectionPolicy:
    policy = SELECTION_POLICIES[name]()
    policy.buffer_seed = seed
    return policy


def offered_tasks(name: str, num_ranks: int, seed: int, capacity: int = 200) -> list[PlayedShard]:
    """Shards after five tasks of 100 classes each, in two epochs."""
    shards = played_shards(lambda: policy_of(name, seed), capacity, num_ranks)
    dice = np.random.default_rng(seed)
    for first in range(0, 500, 100):
        for _ in range(2):
            for shard in shards:
                for labels in np.split(first + dice.permutation(100), 4):
                    shard.offer(labels)
    return shards


def labels_of(shards: list[PlayedShard]) -> np.ndarray:
    return np.concatenate([shard.labels[: shard.size] for shard in shards])


@of_any_policy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_classes_of_all_tasks_are_held_alike(name: str, num_ranks: int) -> None:
    num_runs, held = 8, np.zeros(5, dtype=np.int64)
    for seed in range(num_runs):
        labels = labels_of(offered_tasks(name, num_ranks, seed))
        assert len(labels) == 200
        assert len(np.unique(labels)) > 190  # a class or two of some rank may be on the next one
        held += np.bincount(labels // 100, minlength=5)
    # The counts of a run exclude each other, so the test errs on the safe side.
    assert chi_square_p_value(held, held.mean()) > 0.001
    assert held.min() > 0.85 * held.mean()


def test_every_class_is_as_likely_held_as_any_other() -> None:
    num_runs, held = 60, np.zeros(500, dtype=np.int64)
    for seed in range(num_runs):
        held[labels_of(offered_tasks("class-balanced", 1, seed))] += 1
    assert held.sum() == num_runs * 200
    assert chi_square_p_value(held, held.mean()) > 0.001
    assert chi_square_p_value(held, np.where(np.arange(500) < 250, 20.0, 28.0)) < 1e-5


@pytest.mark.parametrize("make", [ClassBalanced, ClassBalancedReservoir])
def test_of_a_class_that_holds_a_slot_every_candidate_is_as_likely_held(
    make: type[SelectionPolicy],
) -> None:
    """Also of those before others came."""
    held = np.zeros(30, dtype=np.int64)
    for seed in range(60):
        policy = make()
        policy.buffer_seed = seed
        shard = PlayedShard(policy, 10, seed=seed)
        for labels in (np.arange(10), np.arange(40)):
            for _ in range(15):
                shard.offer(np.random.default_rng(seed).permutation(labels))
        early = shard.labels < 10
        held += np.bincount(shard.positions[early], minlength=30)
    assert held.sum() > 100
    groups = held.reshape(6, 5).sum(axis=1)
    assert chi_square_p_value(groups, groups.mean()) > 0.001


@of_any_policy
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_nothing_is_remembered_of_classes_that_hold_nothing(name: str, num_ranks: int) -> None:
    num_slots = 30
    shard = PlayedShard(policy_of(name, 1), num_slots, rank=0, num_ranks=num_ranks)
    dice = np.random.default_rng(0)
    for _ in range(300):
        shard.offer(dice.integers(2**62, size=40))
    state = shard.policy.state()
    assert state["counts"].tolist() == [1] * num_slots
    assert max(map(len, state.values())) == num_slots
    held = vars(shard.policy).values()
    assert max(len(each) for each in held if hasattr(each, "__len__")) <= num_slots


@of_any_policy
def test_the_number_of_labels_is_told_once_they_exceed_the_slots(name: str) -> None:
    for num_ranks in (1, 4):
        shards = played_shards(lambda: policy_of(name, 1), 400, num_ranks)
        for shard in shards:
            shard.offer(np.arange(400))  # a slot for each class
            assert shard.policy.excess_labels == 0
            assert set(shard.labels) <= set(range(400))
            for first in range(400, 2000, 40):
                shard.offer(np.arange(first, first + 40))
            assert 400 < shard.policy.excess_labels < (600 if num_ranks == 1 else 1000)
    # So few more that it may be by chance.
    for shard in played_shards(lambda: policy_of(name, 1), 11, 4):
        shard.offer(np.tile(np.arange(12), 5))
        assert shard.policy.excess_labels == 0
    # Many small shards have no room for every class; the whole buffer has.
    for shard in played_shards(lambda: policy_of(name, 1), 128, 64):
        shard.offer(np.tile(np.arange(20), 5))
        assert shard.policy.excess_labels == 0


@of_any_policy
def test_the_key_is_saved_and_goes_on(name: str) -> None:
    shard = PlayedShard(policy_of(name, 5), 30)
    shard.offer(np.arange(100))
    again = PlayedShard(policy_of(name, 6), 30)  # whose own order of classes is another one
    again.policy.restore(shard.policy.state(), shard.size)
    again.labels, again.positions, again.size = shard.labels.copy(), shard.positions.copy(), 30
    again.step = shard.step
    for first in range(100, 300, 20):
        for each in (shard, again):
            each.offer(np.arange(first, first + 20))
        assert np.array_equal(shard.labels, again.labels)
    state = shard.policy.state()
    other = SELECTION_POLICIES[name]()
    other.bind(30, 0, 1)
    with pytest.raises(ValueError, match="key must be one number, the same in all shards"):
        other.restore(state | {"key": np.array([1, 2])}, 30)


def test_of_fixed_shares_some_classes_have_none_where_there_are_too_many() -> None:
    held = np.zeros(5, dtype=np.int64)
    for seed in range(10):
        policy = ClassBalanced(500, shares="fixed")
        policy.buffer_seed = seed
        shard = PlayedShard(policy, 200)
        assert policy.excess_labels == 500
        shard.offer(np.repeat(np.arange(500), 2))
        assert shard.size == 200
        held += np.bincount(shard.labels // 100, minlength=5)
    assert chi_square_p_value(held, held.mean()) > 0.001


def test_what_all_ranks_know_of_classes_does_not_grow() -> None:
    contents = Contents(np.array([0]), np.array([10]))
    for label in range(100):
        contents.admit(0, np.arange(10), np.full(10, label))
    assert contents.counts([3, 99]).tolist() == [0, 10]
    assert contents.places(3).tolist() == []
    assert contents.state()["labels"].tolist() == [99]
    assert len(contents._members) == 1


# Where classes belong.


@pytest.mark.parametrize("step", [1, 8, 7, 24, 64, 1000, 2**40])
@pytest.mark.parametrize("num_ranks", [2, 5, 8])
def test_classes_are_held_alike_whatever_their_labels(step: int, num_ranks: int) -> None:
    """With labels that are multiples of the number of ranks, 75 of 100 were held."""
    labels = 3 * step + step * np.arange(100)
    shards = played_shards(ClassBalanced, 600, num_ranks)
    for shard in shards:
        for each in np.split(np.repeat(labels, 12), 10):
            shard.offer(each)
    found, counts = np.unique(labels_of(shards), return_counts=True)
    assert np.array_equal(found, labels)
    assert counts.min() >= 3
    assert counts.max() <= 12


def test_a_shard_with_a_slot_for_each_class_that_it_sees_holds_all_of_them() -> None:
    """Whoever else sees them, and whatever the labels."""
    for seed in range(30):
        dice = np.random.default_rng(seed)
        labels = dice.integers(2**40, size=20)
        seen: set[int] = set()
        shards = played_shards(ClassBalanced, 48, 8)
        for shard in shards:
            own = dice.choice(labels, 6, replace=False)
            shard.offer(dice.permutation(np.repeat(own, 30)))
            seen |= set(own.tolist())
        assert set(labels_of(shards).tolist()) == seen


def num_lost(labels: np.ndarray, capacity: int, num_ranks: int) -> int:
    shards = played_shards(GreedyBalanced, capacity, num_ranks)
    for shard in shards:
        shard.offer(np.repeat(labels, 2))
    return len(labels) - len(np.unique(labels_of(shards)))


def test_how_many_classes_are_lost_with_twice_as_many_slots() -> None:
    """What docs/semantics.md says of classes that all ranks see."""
    dice = np.random.default_rng(0)
    for num_ranks in (2, 5, 8):
        for num_classes in (num_ranks + 1, 20, 53):
            assert num_lost(np.arange(num_classes), 2 * num_classes, num_ranks) == 0
    lost = [num_lost(dice.integers(2**40, size=20), 40, 8) for _ in range(50)]
    assert sum(lost) <= 0.01 * 20 * 50
    assert num_lost(8 * np.arange(20), 40, 8) == 0
