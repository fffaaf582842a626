"""What is protected stays; what comes later shares the rest as in a smaller shard of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from played_shard import PlayedShard

from ritornello.policies.class_shares import ClassBalanced
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.policies.protection import Protected, is_protected, protectable, staying
from ritornello.policies.reservoir import Reservoir
from ritornello.policies.selection import SavedShards, SelectionPolicy
from ritornello.testing import chi_square_p_value

POLICIES = list(SELECTION_POLICIES.values())


def begun(
    make_policy: Callable[[], SelectionPolicy],
    num_slots: int,
    protected: np.ndarray,
    others: np.ndarray,
    seed: int = 0,
) -> PlayedShard:
    """A shard in which slots hold the labels 100 to 102, and some are protected."""
    shard = PlayedShard(Protected(make_policy()), num_slots, seed=seed)
    shard.size = len(protected) + len(others)
    shard.labels[: shard.size] = 100 + np.arange(shard.size) % 3
    assert isinstance(shard.policy, Protected)
    shard.policy.begin(protected, shard.labels[protected], others)
    return shard


def stream_of(num_rounds: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 4, 5) for _ in range(num_rounds)]


@pytest.mark.parametrize("make_policy", POLICIES)
def test_the_rest_is_a_smaller_shard_of_its_own(make_policy: Callable[[], SelectionPolicy]) -> None:
    """Slot for slot; whatever else is stored gives way to it, in its order, and no sooner."""
    protected, others = np.array([8, 1, 4]), np.array([3, 0, 7, 2, 5, 6])
    shard = begun(make_policy, 20, protected, others)
    alone = PlayedShard(make_policy(), 17)
    before = shard.labels.copy()
    slots = np.concatenate([others, np.arange(9, 20)])
    for labels in stream_of(40, 1):
        shard.offer(labels)
        alone.offer(labels)
        assert (shard.labels[protected] == before[protected]).all()
        used = slots[: alone.size]
        assert (shard.labels[used] == alone.labels[: alone.size]).all()
        assert (shard.positions[used] == alone.positions[: alone.size]).all()
        left = others[alone.size :]
        assert (shard.labels[left] == before[left]).all()
        assert shard.size == 3 + max(6, alone.size)


@pytest.mark.parametrize("make_policy", POLICIES)
def test_where_all_is_protected_nothing_is_admitted(
    make_policy: Callable[[], SelectionPolicy],
) -> None:
    shard = begun(make_policy, 6, np.arange(6), np.arange(0))
    shard.offer(np.arange(5))
    assert (shard.positions == -1).all()
    assert is_protected(shard.policy.state())


def test_a_share_of_the_capacity_is_divided_to_the_last_one() -> None:
    for capacity, percent, num_ranks in [
        *[(100, percent, 1) for percent in range(101)],  # 0.29 * 100 is 28.999999999999996
        *[(97, 31, 5), (10, 100, 3), (7, 10, 3), (10**9, 57, 2)],
    ]:
        share = percent / 100
        parts = [protectable(capacity, share, rank, num_ranks) for rank in range(num_ranks)]
        assert sum(parts) == percent * capacity // 100
        assert max(parts) - min(parts) <= 1


# Which stay.


def kept(labels: np.ndarray, num_staying: int, seed: int = 0, rank: int = 0) -> np.ndarray:
    return staying(labels, num_staying, 7, rank, 4, np.random.default_rng(seed))


def test_of_each_class_equally_many_stay() -> None:
    labels = np.repeat([1, 2, 3], [30, 4, 16])
    assert kept(labels, 60).all()
    assert np.bincount(labels[kept(labels, 24)])[1:].tolist() == [10, 4, 10]
    assert np.bincount(labels[kept(labels, 0)], minlength=4).sum() == 0
    whole = sum(np.bincount(labels[kept(labels, 7, rank=rank)], minlength=4) for rank in range(4))
    assert sorted(whole[1:].tolist()) == [9, 9, 10]


def test_classes_that_find_no_room_on_one_rank_have_some_on_others() -> None:
    labels = np.repeat(np.arange(12), 3)
    found = [set(labels[kept(labels, 3, rank=rank)].tolist()) for rank in range(4)]
    assert [len(each) for each in found] == [3] * 4
    assert set.union(*found) == set(range(12))


def test_those_of_a_class_that_stay_are_a_uniform_sample() -> None:
    """With a false alarm in 1,000 seeds."""
    labels, counts = np.repeat([0, 1], [20, 5]), np.zeros(25)
    for seed in range(400):
        counts[kept(labels, 13, seed)] += 1
    assert (counts[20:] == 400).all()
    assert chi_square_p_value(counts[:20], 400 * 8 / 20) > 0.001


# Saved, dealt out anew, forgotten.


def continued(shard: PlayedShard, make_policy: Callable[[], SelectionPolicy]) -> PlayedShard:
    """The same shard, with a policy that goes on from the state of the other."""
    again = PlayedShard(Protected(make_policy()), shard.num_slots)
    again.policy.restore(shard.policy.state(), shard.size)
    again.size, again.step, again.offered = shard.size, shard.step, dict(shard.offered)
    again.labels, again.positions = shard.labels.copy(), shard.positions.copy()
    return again


@pytest.mark.parametrize("num_rounds", [0, 1, 3, 20])
@pytest.mark.parametrize("make_policy", POLICIES)
def test_it_goes_on_from_its_state(
    make_policy: Callable[[], SelectionPolicy], num_rounds: int
) -> None:
    """Also while some of what is not protected is still there."""
    shard = begun(make_policy, 20, np.array([8, 1, 4]), np.array([3, 0, 7, 2, 5, 6]))
    for labels in stream_of(num_rounds, 2):
        shard.offer(labels)
    again = continued(shard, make_policy)
    for labels in stream_of(20, 3):
        shard.offer(labels)
        again.offer(labels)
    assert (again.labels == shard.labels).all()
    assert (again.positions == shard.positions).all()


def test_an_earlier_release_does_not_take_it_for_its_own() -> None:
    """It would let go what is protected."""
    shard = begun(Reservoir, 20, np.arange(3), np.arange(3, 9))
    shard.offer(np.zeros(30, dtype=np.int64))
    for make_policy in POLICIES:
        policy = make_policy()
        policy.bind(20, 0, 1)
        with pytest.raises(KeyError):
            policy.restore(shard.policy.state(), shard.size)


WRONG = {
    "protected": np.array([0, 1, 3]),
    "protected_labels": np.array([1]),
    "others": np.array([3, 4, 4]),
    "num_used": np.array([99]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    shard = begun(ClassBalanced, 20, np.arange(3), np.arange(3, 9))
    shard.offer(np.arange(4))
    policy = Protected(ClassBalanced())
    policy.bind(20, 0, 1)
    with pytest.raises(ValueError, match="must"):
        policy.restore(shard.policy.state() | {name: WRONG[name]}, shard.size)


def saved_shards(
    make_policy: Callable[[], SelectionPolicy], num_rounds: int
) -> tuple[SavedShards, list[PlayedShard]]:
    """Three shards of 7, 7 and 6 slots: with 3 protected, with 2, and with none."""
    shards = []
    for rank, (num_slots, num_protected, size) in enumerate([(7, 3, 7), (7, 2, 5), (6, 0, 2)]):
        shard = PlayedShard(Protected(make_policy()), num_slots, rank, 3, seed=rank)
        shard.size = size
        shard.labels[:size] = 100 + np.arange(size) % 3
        shard.positions[:size] = np.arange(size) - 1000 * (rank + 1)
        protected, others = np.split(np.random.default_rng(rank).permutation(size), [num_protected])
        assert isinstance(shard.policy, Protected)
        shard.policy.begin(protected, shard.labels[protected], others)
        for labels in stream_of(num_rounds, rank):
            shard.offer(labels)
        shards.append(shard)
    states = [shard.policy.state() for shard in shards]
    return SavedShards(states, np.array([shard.size for shard in shards]), 20), shards


@pytest.mark.parametrize("num_rounds", [0, 1, 12])
@pytest.mark.parametrize(("num_ranks", "capacity"), [(1, 20), (2, 20), (5, 20), (3, 31), (2, 9)])
@pytest.mark.parametrize("make_policy", POLICIES)
def test_dealt_out_anew_protected_ones_stay_so_and_come_first(
    make_policy: Callable[[], SelectionPolicy], num_ranks: int, capacity: int, num_rounds: int
) -> None:
    saved, _ = saved_shards(make_policy, num_rounds)
    protected = {
        (rank, slot) for rank, state in enumerate(saved.states) for slot in state["protected"]
    }
    everything = {(rank, slot) for rank, size in enumerate(saved.sizes) for slot in range(size)}
    found, still = [], []
    for rank in range(num_ranks):
        num_slots = capacity // num_ranks + (rank < capacity % num_ranks)
        policy = Protected(make_policy())
        policy.bind(num_slots, rank, num_ranks)
        owners, slots = policy.adopt(saved, capacity, np.random.default_rng(4))
        assert len(owners) <= num_slots
        places = list(zip(owners.tolist(), slots.tolist(), strict=True))
        found += places
        still += [places[slot] for slot in policy.protected.tolist()]
        assert abs(len(policy.protected) - len(protected) / num_ranks) < 1
        again = Protected(make_policy())  # what it knows can be saved again
        again.bind(num_slots, rank, num_ranks)
        again.restore(policy.state(), len(owners))
        # And it goes on: protected ones stay, and the whole shard comes to use.
        played = PlayedShard(Protected(make_policy()), num_slots, rank, num_ranks)
        played.policy.restore(policy.state(), len(owners))
        played.size = len(owners)
        played.positions[:] = -7
        for labels in stream_of(60, 9):
            played.offer(labels)
        assert (played.positions[policy.protected] == -7).all()
        assert played.size == num_slots
    assert len(set(found)) == len(found) == min(capacity, len(everything))
    assert set(found) <= everything
    assert set(still) == protected


def test_where_not_all_that_is_protected_finds_room_each_class_keeps_as_many() -> None:
    saved, shards = saved_shards(ClassBalanced, 5)
    policy = Protected(ClassBalanced())
    policy.bind(4, 0, 1)
    owners, slots = policy.adopt(saved, 4, np.random.default_rng(4))
    assert len(policy.protected) == len(owners) == 4
    labels = [shards[owner].labels[slot] for owner, slot in zip(owners, slots, strict=True)]
    assert set(labels) == {100, 101, 102}


@pytest.mark.parametrize("num_rounds", [0, 1, 12])
@pytest.mark.parametrize("which", ["protected", "used", "left", "all"])
@pytest.mark.parametrize("make_policy", POLICIES)
def test_what_is_forgotten_leaves_room(
    make_policy: Callable[[], SelectionPolicy], which: str, num_rounds: int
) -> None:
    shard = begun(make_policy, 12, np.array([8, 1, 4]), np.array([3, 0, 7, 2, 5, 6]))
    for labels in stream_of(num_rounds, 5):
        shard.offer(labels)
    state = shard.policy.state()
    used, left = np.split(state["others"], state["num_used"])
    removed = {
        "protected": state["protected"][:2],
        "used": used[::2],
        "left": left[1:],
        "all": np.arange(shard.size),
    }[which]
    if not len(removed):
        return
    forgotten, slots = Protected(make_policy()).forget(state, shard.size, np.sort(removed))
    assert sorted(slots.tolist()) == sorted(set(range(shard.size)) - set(removed.tolist()))
    again = PlayedShard(Protected(make_policy()), 12)
    again.policy.restore(forgotten, len(slots))
    again.size = len(slots)
    again.labels[: again.size] = shard.labels[slots]
    assert isinstance(again.policy, Protected)
    protected = again.policy.protected
    assert set(slots[protected].tolist()) == {8, 1, 4} - set(removed.tolist())
    before = again.labels[protected].copy()
    for labels in stream_of(60, 6):
        again.offer(labels)
    assert (again.labels[protected] == before).all()
    assert again.size == 12
