"""Statistical tests have fixed seeds; their false-alarm rate is 0.001 where not said otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from ritornello.experiments.speed.draw_statistics import (
    Fairness,
    FairnessCount,
    TrafficCount,
    _binomial_bounds,
    check_plans,
    draw_blocks,
    plan_seconds,
)
from ritornello.policies.contents import Contents
from ritornello.policies.sampling import SamplingPolicy, UniformSampling
from ritornello.rounds.planner import plan_draw
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.testing import chi_square_p_value


class NeverTheLast(SamplingPolicy):
    """Draws without repetition, but one representative in a hundred never."""

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> np.ndarray:
        reach = Contents(np.array([contents.num_held - contents.num_held // 100]))
        return UniformSampling().draw(reach, num_ranks, num_drawn, generator)


class FirstHalfMoreOften(SamplingPolicy):
    """Representatives in the first half are a tenth more likely than the others."""

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> np.ndarray:
        num_held = contents.num_held
        weights = np.where(np.arange(num_held) < num_held // 2, 1.1, 1.0)
        chances = weights / weights.sum()
        num_all = num_ranks * num_drawn
        drawn = generator.choice(num_held, num_all, replace=False, p=chances)
        return drawn.reshape(num_ranks, num_drawn)


class WithReplacement(SamplingPolicy):
    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> np.ndarray:
        return generator.integers(contents.num_held, size=(num_ranks, num_drawn))


def fairness(
    sizes: Iterable[int], policy: SamplingPolicy, num_steps: int = 400, seed: int = 0, r: int = 7
) -> Fairness:
    sizes = np.array(list(sizes))
    count = FairnessCount(sizes, np.arange(sizes.sum()) % 5)
    for block in draw_blocks(sizes, r, policy, seed, range(num_steps)):
        count.add(block)
    return count.result()


def p_values(fair: Fairness) -> tuple[float, float, float]:
    return fair.record_p_value, fair.shard_p_value, fair.class_p_value


@pytest.mark.parametrize("sizes", [[50] * 8, [200, 3, 0, 90, 60]])
def test_uniform_draws_are_within_sampling_error(sizes: list[int]) -> None:
    fair = fairness(sizes, UniformSampling())
    assert min(p_values(fair)) > 0.001
    assert fair.num_repeated == 0
    assert fair.is_fair
    assert fair.smallest_allowed_ratio <= fair.smallest_ratio < 1
    assert 1 < fair.largest_ratio <= fair.largest_allowed_ratio
    assert fair.draws_per_record == pytest.approx(400 * 7 * len(sizes) / sum(sizes))


@pytest.mark.parametrize("policy", [NeverTheLast(), FirstHalfMoreOften()])
def test_bias_is_flagged(policy: SamplingPolicy) -> None:
    fair = fairness([50] * 8, policy, num_steps=1500)
    assert min(p_values(fair)) < 1e-6
    assert not fair.is_fair


def test_what_is_never_drawn_is_beyond_what_chance_allows() -> None:
    fair = fairness([50] * 8, NeverTheLast())
    assert fair.smallest_ratio == 0
    assert fair.smallest_allowed_ratio > 0.4


def test_repetition_in_a_step_is_flagged() -> None:
    fair = fairness([50] * 8, WithReplacement())
    assert fair.num_repeated > 0
    assert not fair.is_fair


def test_p_values_of_fair_draws_are_uniform_also_when_steps_draw_most_of_the_buffer() -> None:
    seeds = range(1000, 1400)
    results = [p_values(fairness([16, 8, 16], UniformSampling(), 60, seed)) for seed in seeds]
    for of_one_test in np.array(results).T:
        tenths, _ = np.histogram(of_one_test, bins=10, range=(0, 1))
        assert chi_square_p_value(tenths, len(seeds) / 10) > 0.001


def test_draws_of_everything() -> None:
    fair = fairness([7, 14], UniformSampling(), num_steps=20, r=7)
    assert fair.largest_ratio == pytest.approx(1.0, abs=0.5)
    everything = fairness([7, 7], UniformSampling(), num_steps=20, r=7)
    assert everything.is_fair
    assert (everything.smallest_ratio, everything.largest_ratio) == (1.0, 1.0)
    assert (everything.smallest_allowed_ratio, everything.largest_allowed_ratio) == (1.0, 1.0)


@pytest.mark.parametrize(("trials", "probability"), [(300, 0.4), (20_000, 0.002), (50, 0.9)])
def test_bounds_of_a_binomial_count(trials: int, probability: float) -> None:
    tail = 1e-7
    low, high = _binomial_bounds(trials, probability, tail)
    count = binom(trials, probability)
    assert count.cdf(low - 1) <= tail < count.cdf(low)
    assert count.sf(high) <= tail < count.sf(high - 1)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_traffic_is_what_the_plans_of_all_ranks_say(ranks_per_node: int) -> None:
    sizes, num_steps = np.array([30, 4, 0, 60, 25, 9]), 20
    nodes = np.arange(6) // ranks_per_node
    sent = np.zeros((num_steps, 6, 6))  # step, owner, requester
    for step in range(num_steps):
        for rank in range(6):
            generator = stream(0, Purpose.SAMPLING, step)
            plan = plan_draw(sizes, rank, 5, UniformSampling(), generator)
            sent[step, rank] = plan.send_counts
    count = TrafficCount(sizes, ranks_per_node)
    for block in draw_blocks(sizes, 5, UniformSampling(), 0, range(num_steps)):
        count.add(block)
    traffic = count.result()
    elsewhere = sent * ~np.eye(6, dtype=bool)
    network = sent * (nodes[:, None] != nodes)
    assert traffic.messages == pytest.approx((elsewhere > 0).sum() / 6 / num_steps)
    assert traffic.records == pytest.approx(elsewhere.sum() / 6 / num_steps)
    assert traffic.network_messages == pytest.approx((network > 0).sum() / 6 / num_steps)
    assert traffic.network_records == pytest.approx(network.sum() / 6 / num_steps)
    served = sent.sum(axis=2)
    assert traffic.served_max == served.max()
    assert traffic.served_p50 == np.quantile(served, 0.5, method="inverted_cdf")
    assert traffic.served_p99 == np.quantile(served, 0.99, method="inverted_cdf")
    assert traffic.busiest_rank_served == pytest.approx(served.max(axis=1).mean())
    messages = (network > 0).sum(axis=1) + (network > 0).sum(axis=2)
    assert traffic.busiest_rank_messages == pytest.approx(messages.max(axis=1).mean())
    pairs = np.add.reduceat(
        np.add.reduceat(network, np.arange(0, 6, ranks_per_node), 1),
        np.arange(0, 6, ranks_per_node),
        2,
    )
    busiest = np.maximum(pairs.sum(axis=1), pairs.sum(axis=2)).max(axis=1)
    assert traffic.busiest_node_records == pytest.approx(busiest.mean())


def test_what_a_rank_receives_does_not_depend_on_the_number_of_ranks() -> None:
    def records(num_ranks: int) -> float:
        sizes = np.full(num_ranks, 4096 // num_ranks)
        count = TrafficCount(sizes, 1)
        for block in draw_blocks(sizes, 7, UniformSampling(), 0, range(8000 // num_ranks)):
            count.add(block)
        received = count.result().records
        assert received <= 7
        # One in N lies in the rank's own shard.
        return received / (1 - 1 / num_ranks)

    # 56,000 records each, whose number from other ranks is nearly binomial.
    error = np.sqrt(7 * (1 / 8) / (7 / 8) / 8000)
    assert records(8) == pytest.approx(7, abs=3.3 * error)
    assert records(256) == pytest.approx(7, abs=3.3 * error)


def test_plans_of_single_ranks_are_the_joint_draw() -> None:
    sizes = np.array([40, 3, 0, 25, 60])
    assert check_plans(sizes, 7, UniformSampling(), 0, range(5), range(5)) == 25


def test_plans_that_differ_from_the_joint_draw() -> None:
    class Moody(UniformSampling):
        calls = 0

        def draw(self, *arguments: Any) -> np.ndarray:
            self.calls += 1
            return (super().draw(*arguments) + self.calls) % arguments[0].num_held

    with pytest.raises(RuntimeError, match="step 3: the plan of rank 0 is not the joint draw's"):
        check_plans(np.array([40, 40]), 7, Moody(), 0, range(3, 5), range(2))


def test_plans_are_timed() -> None:
    seconds = plan_seconds(np.full(64, 100), 7, UniformSampling(), 0, num_calls=20)
    assert seconds.shape == (20,)
    assert np.all(seconds > 0)
