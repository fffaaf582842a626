"""The largest class gives way. Statistical tests: fixed seeds, a false-alarm rate of 0.001."""

from __future__ import annotations

import numpy as np
import pytest
from played_shard import PlayedShard, equal_shares, forgetting, uniformity

from ritornello.policies.class_shares import FirstOffered
from ritornello.policies.largest_class import ClassBalancedReservoir, GraspEviction
from ritornello.policies.selection import SelectionPolicy
from ritornello.testing import chi_square_p_value

SEQUENTIAL = [ClassBalancedReservoir, GraspEviction]


@pytest.mark.parametrize("policy", SEQUENTIAL)
@pytest.mark.parametrize("round_size", [1, 14, 128])
def test_sizes_after_classes_that_came_one_after_another(
    policy: type[SelectionPolicy], round_size: int
) -> None:
    shard = PlayedShard(policy(), 50)
    for label in range(7):
        shard.offer_one_by_one(label, 200, round_size)
    assert sorted(shard.counts.values()) == [7] * 6 + [8]


@pytest.mark.parametrize("policy", SEQUENTIAL)
def test_small_classes_are_stored_whole(policy: type[SelectionPolicy]) -> None:
    shard = PlayedShard(policy(), 60)
    shard.offer(np.array([1, 1, 2]))
    generator = np.random.default_rng(0)
    for _ in range(200):
        shard.offer(generator.permutation(np.repeat([3, 4, 5], [20, 5, 1])))
        if shard.offered[3] in (500, 1000, 1500):
            shard.offer(np.array([1, 2, 2, 2, 6]))
    assert shard.positions_of(1) == list(range(5))
    assert shard.positions_of(2) == list(range(10))
    assert shard.positions_of(6) == list(range(3))
    assert [shard.counts[label] for label in (3, 4, 5)] == [14, 14, 14]


@pytest.mark.parametrize("policy", SEQUENTIAL)
def test_more_classes_than_slots(policy: type[SelectionPolicy]) -> None:
    shard = PlayedShard(policy(), 4)
    for _ in range(3):
        for label in range(11):
            shard.offer_one_by_one(label, 5, round_size=3)
            expected = equal_shares(shard.offered, 4).values()
            assert sorted(shard.counts.values()) == sorted(filter(None, expected))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_cbrs_keeps_a_uniform_sample_of_each_class(label: int) -> None:
    assert uniformity(ClassBalancedReservoir, label) > 0.001


def test_grasp_forgets_the_older_samples_of_a_class() -> None:
    # Also shows that the test above can fail.
    assert uniformity(GraspEviction, 0) < 1e-9


def test_grasp_forgets_at_the_rate_of_the_size_of_a_class() -> None:
    assert forgetting(GraspEviction) > 0.001
    assert forgetting(ClassBalancedReservoir) < 1e-9


def evicted(
    policy: type[SelectionPolicy], filling: list[int], label: int, num_runs: int = 3000
) -> np.ndarray:
    """How often each representative of a full shard gives way to the next candidate.

    Returns:
        By its place in ``filling``, which gives the sizes of the classes 0, 1, ...
    """
    times = np.zeros(sum(filling))
    for seed in range(num_runs):
        shard = PlayedShard(policy(), sum(filling), seed=seed)
        shard.offer(np.repeat(np.arange(len(filling)), filling))
        before = np.stack([shard.labels, shard.positions])
        shard.offer(np.array([label]))
        times += (before != np.stack([shard.labels, shard.positions])).any(axis=0)
    return times


@pytest.mark.parametrize(
    ("policy", "filling", "label", "shares"),
    [
        (ClassBalancedReservoir, [8, 4], 1, [1, 0]),
        (ClassBalancedReservoir, [6, 6], 2, [1 / 2, 1 / 2]),
        (ClassBalancedReservoir, [6, 5], 1, [1, 0]),  # the candidate itself does not count
        (ClassBalancedReservoir, [6, 5], 0, [6 / 7, 0]),  # with m / n
        (GraspEviction, [8, 4], 1, [1, 0]),
        (GraspEviction, [6, 6], 2, [1 / 2, 1 / 2]),
        (GraspEviction, [6, 5], 1, [1 / 2, 1 / 2]),  # it does
        (GraspEviction, [6, 5], 0, [1, 0]),
        (GraspEviction, [6, 6], 0, [1, 0]),
    ],
)
def test_who_gives_way(
    policy: type[SelectionPolicy], filling: list[int], label: int, shares: list[float]
) -> None:
    num_runs = 3000
    times = evicted(policy, filling, label, num_runs)
    expected = num_runs * np.repeat(np.array(shares) / filling, filling)
    assert np.all(times[expected == 0] == 0)
    stays = num_runs - times.sum()
    assert (stays == 0) == (sum(shares) == 1)
    observed, expected = times[expected > 0], expected[expected > 0]
    if stays:
        observed, expected = np.append(observed, stays), np.append(expected, num_runs / 7)
    assert chi_square_p_value(observed, expected) > 0.001


def test_that_the_test_of_who_gives_way_can_fail() -> None:
    times = evicted(FirstOffered, [8, 4], 1)
    assert chi_square_p_value(times[:8], 3000 / 8) < 1e-9
