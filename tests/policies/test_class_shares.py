"""Equal shares. Statistical tests have fixed seeds and a false-alarm rate of 0.001."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from played_shard import PlayedShard, forgetting, played_shards, uniformity

from ritornello.policies.class_shares import (
    ClassBalanced,
    FirstOffered,
    GreedyBalanced,
    PerClassRandom,
)
from ritornello.policies.classes.scores import rank_of_exemplar
from ritornello.policies.selection import SelectionPolicy
from ritornello.testing import chi_square_p_value

SHARING = [ClassBalanced, PerClassRandom, GreedyBalanced, FirstOffered]


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(SHARING),
    st.sampled_from(["adaptive", "fixed"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 40),
    st.integers(0, 2**32),
)
def test_the_global_budget_is_exact_and_no_class_is_lost(
    policy: Callable[..., SelectionPolicy],
    shares: str,
    num_ranks: int,
    num_classes: int,
    extra: int,
    seed: int,
) -> None:
    capacity = max(num_ranks, num_classes) + extra
    generator = np.random.default_rng(seed)
    shards = played_shards(lambda: policy(num_classes, shares), capacity, num_ranks)
    stream_of_labels = np.repeat(np.arange(num_classes), 60)  # class after class
    for shard in shards:
        for start in range(0, len(stream_of_labels), 30):
            shard.offer(generator.permutation(stream_of_labels[start : start + 30]))
    assert sum(shard.size for shard in shards) == capacity
    totals = sum(np.bincount(shard.labels, minlength=num_classes) for shard in shards)
    if capacity >= 2 * num_classes:  # with less, remainders may leave out a class on every rank
        assert totals.min() >= 1
    assert totals.min() >= capacity // num_classes - 2
    assert totals.max() <= -(-capacity // num_classes) + 2


@pytest.mark.parametrize("shares", ["adaptive", "fixed"])
@pytest.mark.parametrize("policy", SHARING)
@pytest.mark.parametrize(
    ("num_classes", "num_ranks", "capacity"), [(10, 64, 320), (10, 128, 128), (100, 128, 2000)]
)
def test_shares_are_fair_with_more_ranks_than_classes(
    policy: Callable[..., SelectionPolicy],
    shares: str,
    num_classes: int,
    num_ranks: int,
    capacity: int,
) -> None:
    """Also where a shard has no room for every class."""
    held = np.zeros(num_classes)
    for shard in played_shards(lambda: policy(num_classes, shares), capacity, num_ranks):
        for start in range(0, num_classes, 10):
            shard.offer(np.repeat(np.arange(start, start + 10), 30))
        for label, count in shard.counts.items():
            held[label] += count
    assert held.sum() == capacity
    fair = capacity / num_classes
    assert 0.6 * fair < held.min() <= held.max() < 1.6 * fair


@pytest.mark.parametrize("shares", ["adaptive", "fixed"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_class_balanced_keeps_a_uniform_sample_of_each_class(label: int, shares: str) -> None:
    assert uniformity(lambda: ClassBalanced(3, shares), label) > 0.001


def test_per_class_random_forgets_the_older_samples_of_a_class() -> None:
    # Also shows that the test above can fail.
    assert uniformity(PerClassRandom, 0) < 1e-9


def test_per_class_random_keeps_mostly_the_last_tenth_of_a_long_stream() -> None:
    # 8,000 samples of which every fourth is a candidate, as with b=56, c=14.
    shard = PlayedShard(PerClassRandom(), 100)
    for _ in range(200):
        shard.offer(np.zeros(10, dtype=np.int64))
    assert 78 <= np.count_nonzero(shard.positions >= 1800) <= 95


@pytest.mark.parametrize("shares", ["adaptive", "fixed"])
def test_per_class_random_forgets_at_the_rate_of_its_share(shares: str) -> None:
    assert forgetting(lambda: PerClassRandom(2, shares)) > 0.001


@pytest.mark.parametrize("policy", [ClassBalanced, GreedyBalanced])
def test_that_the_test_of_forgetting_can_fail(policy: type[SelectionPolicy]) -> None:
    assert forgetting(policy) < 1e-9


# Fixed shares.


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(SHARING),
    st.integers(1, 40),
    st.lists(st.lists(st.integers(0, 7), max_size=25), max_size=25),
    st.integers(1, 5),
)
@example(FirstOffered, 3, [[1]], 3)
def test_fixed_shares_are_kept_free_for_their_classes(
    policy: Callable[..., SelectionPolicy],
    num_slots: int,
    rounds: list[list[int]],
    num_ranks: int,
) -> None:
    # The shares that adaptive ones become once every class has offered enough, in order.
    # Exemplars have one order of classes on all ranks, where there is no room for all of them.
    adaptive = FirstOffered() if policy is FirstOffered else ClassBalanced()
    settled = PlayedShard(adaptive, num_slots, rank=num_ranks - 1, num_ranks=num_ranks)
    for label in range(8):
        settled.offer(np.full(num_slots, label))
    shard = PlayedShard(policy(8, "fixed"), num_slots, rank=num_ranks - 1, num_ranks=num_ranks)
    for labels in rounds:
        shard.offer(np.array(labels, dtype=np.int64))
        for label, offered in shard.offered.items():
            assert shard.counts.get(label, 0) == min(offered, settled.counts.get(label, 0))
    assert shard.size == sum(shard.counts.values())


def test_fixed_shares_with_classes_that_come_unequally() -> None:
    shards = played_shards(lambda: PerClassRandom(5, "fixed"), capacity=53, num_ranks=4)
    for shard in shards:
        shard.offer_one_by_one(3, 100)
        shard.offer_one_by_one(0, 2)
    totals = sum(np.bincount(shard.labels[: shard.size], minlength=5) for shard in shards)
    assert totals[0] == 4 * 2  # all it has
    assert 10 <= totals[3] <= 11  # a fifth of the capacity, not more
    assert totals.sum() == totals[[0, 3]].sum()  # the rest is empty


@pytest.mark.parametrize("policy", SHARING)
def test_rules_for_shares(policy: Callable[..., SelectionPolicy]) -> None:
    with pytest.raises(ValueError, match="shares='fixed' needs num_classes"):
        policy(shares="fixed")
    with pytest.raises(ValueError, match="shares='equal': there are 'adaptive' and 'fixed'"):
        policy(3, shares="equal")


# What came first.


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([GreedyBalanced, FirstOffered]),
    st.sampled_from(["adaptive", "fixed"]),
    st.integers(1, 60),
    st.lists(st.lists(st.integers(0, 7), max_size=25), max_size=20),
)
def test_only_what_a_class_offered_first_is_stored(
    policy: Callable[..., SelectionPolicy], shares: str, num_slots: int, rounds: list[list[int]]
) -> None:
    shard = PlayedShard(policy(8, shares), num_slots)
    before: dict[int, set[int]] = {}
    most = dict.fromkeys(range(8), 0)
    for labels in rounds:
        shard.offer(np.array(labels, dtype=np.int64))
        for label, count in shard.counts.items():
            held = set(shard.positions_of(label))
            grown = held - before.get(label, set())
            most[label] = max(most[label], count)
            assert max(held) < most[label]
            assert not grown or held >= before.get(label, set())  # grows or shrinks
            if policy is FirstOffered:
                assert held == set(range(count))
            before[label] = held


def survivors(policy: type[SelectionPolicy]) -> np.ndarray:
    """How often each of a class's 200 candidates is stored, after its share fell to a third."""
    stored = np.zeros(200)
    for seed in range(300):
        shard = PlayedShard(policy(), 30, seed=seed)
        shard.offer_one_by_one(0, 100)
        for label in (1, 2):
            shard.offer_one_by_one(label, 50)
            shard.offer_one_by_one(0, 50)
        assert shard.counts == {0: 10, 1: 10, 2: 10}
        stored[shard.positions_of(0)] += 1
    return stored


def test_greedy_balanced_keeps_a_random_part_of_what_came_first() -> None:
    stored = survivors(GreedyBalanced)
    assert stored[30:].sum() == 0
    # The counts of a run are negatively correlated, so the test errs on the safe side.
    assert chi_square_p_value(stored[:30], 300 * 10 / 30) > 0.001
    # Two others, to see that both parts can fail.
    assert survivors(ClassBalanced)[30:].sum() > 0
    assert chi_square_p_value(survivors(FirstOffered)[:30], 300 * 10 / 30) < 1e-9


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_ranks_keep_together_the_first_exemplars_of_every_class(
    num_ranks: int, classes_per_task: list[int], extra: int, random: object
) -> None:
    num_classes = sum(classes_per_task)
    order = list(range(num_classes))
    random.shuffle(order)  # type: ignore[attr-defined]
    capacity = max(num_ranks, num_classes) + extra
    shards = played_shards(FirstOffered, capacity, num_ranks)
    places = np.arange(capacity + num_ranks)  # enough for every shard
    seen: list[int] = []
    for task in np.split(np.array(order), np.cumsum(classes_per_task)[:-1]):
        for rank, shard in enumerate(shards):
            for label in task.tolist():
                mine = places[rank_of_exemplar(label, places, num_ranks) == rank]
                shard.offer_one_by_one(label, len(mine))
        seen += task.tolist()
        assert sum(shard.size for shard in shards) == capacity
        for label in seen:
            shares = [shard.counts.get(label, 0) for shard in shards]
            stored = set()
            for rank, shard in enumerate(shards):
                mine = places[rank_of_exemplar(label, places, num_ranks) == rank]
                stored |= set(mine[shard.positions_of(label)].tolist())
            assert max(shares) - min(shares) <= 1
            # Exact with shards of one size; else once a class has come whose label is a multiple
            # of the number of ranks, as the larger shards are those of the first ranks.
            if capacity % num_ranks == 0 or 0 in seen:
                assert stored == set(range(len(stored)))
            assert stored >= set(range(min(shares) * num_ranks))
            assert max(stored, default=-1) < max(shares) * num_ranks


def test_where_exemplars_belong_depends_on_the_class() -> None:
    """Or else the first ranks would get more of every class than they have room for."""
    places = np.arange(13)
    dealt = rank_of_exemplar(0, places, 5)
    assert dealt.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1, 2]
    first = rank_of_exemplar(np.arange(5), 0, 5)
    assert sorted(first.tolist()) == [0, 1, 2, 3, 4]
    assert rank_of_exemplar(np.array([[2], [3]]), places, 5).shape == (2, 13)
    assert rank_of_exemplar(2**62, 1, 5) == rank_of_exemplar(2**62 % 5, 1, 5)

    def misplaced(deal: Callable[[int, np.ndarray], np.ndarray]) -> int:
        shards = played_shards(FirstOffered, capacity=210, num_ranks=4)
        stored: dict[int, list[int]] = {label: [] for label in range(10)}
        for rank, shard in enumerate(shards):
            for label in range(10):
                mine = np.arange(240)[deal(label, np.arange(240)) == rank]
                shard.offer(np.full(len(mine), label))
        for rank, shard in enumerate(shards):
            for label, held in stored.items():
                mine = np.arange(240)[deal(label, np.arange(240)) == rank]
                held += mine[shard.positions_of(label)].tolist()
        return sum(place >= len(held) for held in stored.values() for place in held)

    assert misplaced(lambda label, place: rank_of_exemplar(label, place, 4)) == 0
    assert misplaced(lambda label, place: place % 4) > 0
