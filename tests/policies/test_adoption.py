"""What is stored stays a fair sample on other ranks. False-alarm rates of 0.001, fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from played_shard import PlayedShard

from ritornello.policies.class_shares import ClassBalanced, FirstOffered
from ritornello.policies.largest_class import ClassBalancedReservoir
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.policies.reservoir import Reservoir
from ritornello.policies.selection import SavedShards, SelectionPolicy
from ritornello.records.shard import rows_of_rank
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.testing import chi_square_p_value

NUM_TRIALS = 1500


def shards_of(
    make: Callable[[], SelectionPolicy], capacity: int, num_ranks: int, seed: int
) -> list[PlayedShard]:
    rooms = [rows_of_rank(capacity, rank, num_ranks) for rank in range(num_ranks)]
    return [PlayedShard(make(), room, i, num_ranks, seed) for i, room in enumerate(rooms)]


def adopted(
    shards: list[PlayedShard],
    make: Callable[[], SelectionPolicy],
    capacity_then: int,
    capacity: int,
    num_ranks: int,
) -> list[PlayedShard]:
    """The shards of another number of ranks, with what those before held."""
    saved = SavedShards(
        [shard.policy.state() for shard in shards],
        np.array([shard.size for shard in shards]),
        capacity_then,
    )
    others = shards_of(make, capacity, num_ranks, shards[0].seed + 10**6)
    for shard in others:
        generator = stream(shard.seed, Purpose.ADOPTION, 0)
        owners, slots = shard.policy.adopt(saved, capacity, generator)
        shard.size = len(owners)
        for own, (owner, slot) in enumerate(zip(owners, slots, strict=True)):
            shard.labels[own] = shards[owner].labels[slot]
            shard.positions[own] = shards[owner].positions[slot]
    return others


@pytest.mark.parametrize("capacity", [12, 6])
@pytest.mark.parametrize("make", [ClassBalanced, Reservoir, ClassBalancedReservoir])
def test_what_is_stored_stays_a_uniform_sample(
    make: Callable[[], SelectionPolicy], capacity: int
) -> None:
    """Two ranks see 30 candidates each; then three see 20 each. All 120 are equally likely."""
    counts = np.zeros(120, dtype=np.int64)
    for seed in range(NUM_TRIALS):
        before = shards_of(make, 12, 2, seed)
        for shard in before:
            shard.offer_one_by_one(0, 30)
            shard.positions += 30 * shard.rank
        after = adopted(before, make, 12, capacity, 3)
        for shard in after:
            shard.offered[0] = 60 + 20 * shard.rank
            shard.offer_one_by_one(0, 20)
            np.add.at(counts, shard.positions_of(0), 1)
    assert counts.sum() == NUM_TRIALS * capacity
    # Those of one rank exclude each other, which makes counts spread less than a chi-square's.
    assert chi_square_p_value(counts, counts.mean()) > 0.001
    halves = np.array([counts[:60].sum(), counts[60:].sum()])
    assert abs(halves[0] - halves[1]) < 4 * np.sqrt(counts.sum())


@pytest.mark.parametrize("make", [ClassBalanced, Reservoir, ClassBalancedReservoir])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("capacity", [5, 7, 13, 30])
def test_old_and_new_candidates_have_exactly_equal_chances(
    make: Callable[[], SelectionPolicy], num_ranks: int, capacity: int
) -> None:
    """Also where ranks hold unequally many of a class; here two ranks saw 60 candidates, and then
    each of ``num_ranks`` sees 8 more."""
    num_old, num_new = 120, 8
    before = shards_of(make, capacity, 2, 0)
    for shard in before:
        shard.offer_one_by_one(0, num_old // 2)
    stay = Fraction(0)
    for shard in adopted(before, make, capacity, capacity, num_ranks):
        # A candidate that was offered enters with slots / offered, and takes the place of any.
        (offered,) = shard.policy.state()["offered"].tolist()
        stay += shard.size * Fraction(offered, offered + num_new)
    assert stay == capacity * Fraction(num_old, num_old + num_ranks * num_new)


@pytest.mark.parametrize("make", [ClassBalanced, ClassBalancedReservoir])
def test_they_have_equal_chances_with_few_slots_per_class_and_rank(
    make: Callable[[], SelectionPolicy],
) -> None:
    """Seven classes with 6 or 7 slots on 3 ranks, then with 1 or 2 on each of 5 ranks: old ones
    were held 5 to 6 % more often."""
    held = np.zeros(2)
    for seed in range(200):
        dice = np.random.default_rng(seed)
        before = shards_of(make, 48, 3, seed)
        for shard in before:
            shard.offer(dice.permutation(np.repeat(np.arange(7), 40)))
        for shard in adopted(before, make, 48, 48, 5):
            shard.offered = dict.fromkeys(range(7), 1000)
            shard.offer(dice.permutation(np.repeat(np.arange(7), 24)))
            new = shard.positions >= 1000
            held += [np.count_nonzero(~new), np.count_nonzero(new)]
    assert held.sum() == 200 * 48
    assert (
        chi_square_p_value(held, held.mean()) > 0.001
    )  # 120 of each class have come before, and since


@pytest.mark.parametrize("name", ["class-balanced", "class-balanced-reservoir", "grasp"])
@pytest.mark.parametrize(("ranks_before", "ranks"), [(1, 3), (4, 2), (2, 2)])
def test_classes_of_all_tasks_are_held_alike_over_loads(
    name: str, ranks_before: int, ranks: int
) -> None:
    """Five tasks of 100 classes, the last two on other ranks; 200 slots, and then 120."""
    for capacity in (200, 120):
        held = np.zeros(5, dtype=np.int64)
        for seed in range(6):

            def make(seed: int = seed) -> SelectionPolicy:
                policy = SELECTION_POLICIES[name]()
                policy.buffer_seed = seed
                return policy

            shards = shards_of(make, 200, ranks_before, seed)
            for task in range(5):
                if task == 3:
                    shards = adopted(shards, make, 200, capacity, ranks)
                    assert sum(shard.size for shard in shards) == capacity
                for shard in shards:
                    shard.offer(task * 100 + np.arange(100))
            held += np.bincount(
                np.concatenate([shard.labels for shard in shards]) // 100, minlength=5
            )
        assert held.sum() == 6 * capacity
        assert chi_square_p_value(held, held.mean()) > 0.001


def test_a_class_that_never_lost_any_goes_on_growing() -> None:
    before = shards_of(ClassBalanced, 40, 4, 0)
    for shard in before:
        shard.offer_one_by_one(0, 3)
    after = adopted(before, ClassBalanced, 40, 40, 3)
    assert sum(shard.size for shard in after) == 12
    for shard in after:
        shard.offer_one_by_one(0, 5)
    assert sum(shard.size for shard in after) == 27


def test_the_first_ones_stay_in_their_order() -> None:
    before = shards_of(FirstOffered, 24, 2, 0)
    for shard in before:
        for label in (0, 1):
            shard.offer_one_by_one(label, 6)
    after = adopted(before, FirstOffered, 24, 24, 3)
    for label in (2, 3):  # two more classes: six of each stay
        for shard in after:
            shard.offer_one_by_one(label, 6)
    for label in (0, 1):
        assert sorted(each for shard in after for each in shard.positions_of(label)) == [
            0, 0, 1, 1, 2, 2,
        ]  # fmt: skip


def test_fixed_shares_go_on_exactly_after_they_were_dealt_out_anew() -> None:
    """Where each class has its odd representatives is no function of what it holds."""

    def make() -> SelectionPolicy:
        return ClassBalanced(7, shares="fixed")

    for seed in range(60):
        dice = np.random.default_rng(seed)
        before = shards_of(make, 40, 3, seed)
        for shard in before:
            shard.offer(dice.integers(7, size=30))
        for shard in adopted(before, make, 40, 40, 4):
            shard.offer(dice.integers(7, size=5))
            again = PlayedShard(make(), shard.num_slots, shard.rank, 4, shard.seed)
            again.policy.restore(shard.policy.state(), shard.size)
            labels = dice.integers(7, size=20)
            ours, theirs = (
                each.policy.admit(labels, np.random.default_rng(seed)) for each in (shard, again)
            )
            assert np.array_equal(ours.rows, theirs.rows)
            assert np.array_equal(ours.slots, theirs.slots)


def test_states_are_copies() -> None:
    for make in (ClassBalanced, Reservoir, ClassBalancedReservoir):
        (shard,) = shards_of(make, 10, 1, 0)
        shard.offer_one_by_one(0, 30)
        state = shard.policy.state()
        before = {name: array.copy() for name, array in state.items()}
        shard.offer_one_by_one(1, 30)
        assert all(np.array_equal(state[name], array) for name, array in before.items())
