"""Statistics of many draws: fairness, traffic, load, and the time of a plan.

A plan depends on the shards' sizes, the seed and the step alone, so one joint draw per step
says what all ranks get. ``check_plans`` holds the ranks' own plans against it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ritornello.arrays import Floats, Ints
from ritornello.policies.contents import Contents
from ritornello.policies.sampling import SamplingPolicy
from ritornello.rounds.planner import plan_draw
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.testing import chi_square_p_value

FALSE_ALARM_RATE = 0.001
"""How often each test of fairness calls a fair draw unfair."""

BLOCK = 2**20
"""Indices that are looked at together."""


@dataclass(frozen=True)
class Fairness:
    """How often representatives were drawn, against the promise: all equally often.

    ``*_ratio`` is a drawing probability divided by the promised one. The p-values are those of
    chi-square tests, with the variance of draws without replacement.
    """

    num_steps: int
    draws_per_record: float
    """Expected."""
    smallest_ratio: float
    largest_ratio: float
    """Over the single representatives."""
    smallest_allowed_ratio: float
    largest_allowed_ratio: float
    """A fair draw stays within these for all representatives at once, but for the false-alarm
    rate."""
    smallest_shard_ratio: float
    largest_shard_ratio: float
    smallest_class_ratio: float
    largest_class_ratio: float
    record_p_value: float
    shard_p_value: float
    class_p_value: float
    num_repeated: int
    """Representatives that were drawn twice in one step; the promise is 0."""

    @property
    def is_fair(self) -> bool:
        """Whether all is within sampling error."""
        p_values = (self.record_p_value, self.shard_p_value, self.class_p_value)
        return min(p_values) >= FALSE_ALARM_RATE and self.num_repeated == 0


@dataclass(frozen=True)
class Traffic:
    """What draws move, per step. Means over ranks and steps unless the name says otherwise."""

    messages: float
    """To other ranks, per rank."""
    records: float
    """From other ranks, per rank."""
    network_messages: float
    network_records: float
    """The same, from other nodes only."""
    served_p50: int
    served_p99: int
    served_max: int
    """Records that an owner serves in a step, itself included: over all owners and steps."""
    busiest_rank_served: float
    """Records that the busiest owner of a step serves; mean over the steps."""
    busiest_rank_messages: float
    """Messages between nodes, sent and received, of the busiest rank of a step; mean."""
    busiest_node_records: float
    """Records that leave, or enter, the busiest node of a step; mean over the steps."""


def draw_blocks(
    sizes: Ints,
    num_representatives: int,
    policy: SamplingPolicy,
    seed: int,
    steps: range,
) -> Iterator[Ints]:
    """The joint draws of the steps, int64 ``[block, num_ranks, r]`` at a time."""
    contents, num_ranks = Contents(sizes), len(sizes)
    streams = Streams(seed, Purpose.SAMPLING)
    per_block = max(1, BLOCK // (num_ranks * num_representatives))
    for first in range(steps.start, steps.stop, per_block):
        block = range(first, min(first + per_block, steps.stop))
        yield np.stack(
            [
                policy.draw(contents, num_ranks, num_representatives, streams.at(step))
                for step in block
            ]
        )


class FairnessCount:
    """Counts how often each representative is drawn.

    Args:
        sizes: int64 ``[num_ranks]``, of the shards.
        labels: int64 ``[num_held]``, by global index.
    """

    def __init__(self, sizes: Ints, labels: Ints) -> None:
        self._counts = np.zeros(len(labels), dtype=np.int64)
        self._owners = np.repeat(np.arange(len(sizes)), sizes)
        self._labels = labels
        self._num_steps = self._num_repeated = self._num_per_step = 0

    def add(self, drawn: Ints) -> None:
        """Counts a block ``[steps, num_ranks, r]``."""
        joint = np.sort(drawn.reshape(len(drawn), -1), axis=1)
        self._num_repeated += int((joint[:, 1:] == joint[:, :-1]).sum())
        self._counts += np.bincount(joint.ravel(), minlength=len(self._counts))
        self._num_steps += len(drawn)
        self._num_per_step = joint.shape[1]

    def result(self) -> Fairness:
        """What the counts say."""
        num_held = len(self._counts)
        expected = self._num_steps * self._num_per_step / num_held
        low, high = _binomial_bounds(
            self._num_steps, self._num_per_step / num_held, FALSE_ALARM_RATE / (2 * num_held)
        )
        shards, shard_p_value = self._by(self._owners)
        classes, class_p_value = self._by(self._labels)
        _, record_p_value = self._by(np.arange(num_held))
        return Fairness(
            num_steps=self._num_steps,
            draws_per_record=expected,
            smallest_ratio=float(self._counts.min() / expected),
            largest_ratio=float(self._counts.max() / expected),
            smallest_allowed_ratio=low / expected,
            largest_allowed_ratio=high / expected,
            smallest_shard_ratio=float(shards.min()),
            largest_shard_ratio=float(shards.max()),
            smallest_class_ratio=float(classes.min()),
            largest_class_ratio=float(classes.max()),
            record_p_value=record_p_value,
            shard_p_value=shard_p_value,
            class_p_value=class_p_value,
            num_repeated=self._num_repeated,
        )

    def _by(self, groups: Ints) -> tuple[Floats, float]:
        """Each group's drawing probability over the promised one, and the p-value of all."""
        held = np.bincount(groups)
        counts = np.bincount(groups, weights=self._counts)[held > 0]
        held = held[held > 0]
        expected = self._num_steps * self._num_per_step * held / len(groups)
        ratios = counts / expected
        small = expected < 5
        if small.any():
            counts = np.append(counts[~small], counts[small].sum())
            expected = np.append(expected[~small], expected[small].sum())
        if len(counts) < 2:
            return ratios, 1.0
        left = len(groups) - self._num_per_step
        if left == 0:  # every step draws everything
            return ratios, float(np.allclose(counts, expected))
        # What one draw takes, the others of its step cannot: counts vary less by this factor.
        wider = np.sqrt((len(groups) - 1) / left)
        return ratios, chi_square_p_value(expected + wider * (counts - expected), expected)


class TrafficCount:
    """Counts messages, records and load.

    Args:
        sizes: int64 ``[num_ranks]``, of the shards.
        ranks_per_node: ranks on one node share memory: no message, no traffic.
    """

    def __init__(self, sizes: Ints, ranks_per_node: int) -> None:
        self._num_ranks = len(sizes)
        self._ends = np.cumsum(sizes)
        self._nodes = np.arange(len(sizes)) // ranks_per_node
        self._served = np.zeros(1, dtype=np.int64)
        self._totals = np.zeros(7)
        self._num_steps = 0

    def add(self, drawn: Ints) -> None:
        """Counts a block ``[steps, num_ranks, r]``."""
        num_steps, num_ranks, _ = drawn.shape
        owners = np.sort(self._ends.searchsorted(drawn, side="right"), axis=2)
        requesters = np.broadcast_to(np.arange(num_ranks)[:, None], owners.shape)
        first = np.ones(owners.shape, dtype=np.bool_)  # of its pair
        np.not_equal(owners[:, :, 1:], owners[:, :, :-1], out=first[:, :, 1:])
        elsewhere = owners != requesters
        leaves = self._nodes[owners] != self._nodes[requesters]

        def per_step(places: Ints, chosen: np.ndarray, num_places: int) -> Ints:
            keys = places + num_places * np.arange(num_steps)[:, None, None]
            counts = np.bincount(keys[chosen], minlength=num_steps * num_places)
            return counts.reshape(num_steps, num_places)

        served = per_step(owners, np.ones_like(first), num_ranks)
        messages = per_step(owners, first & leaves, num_ranks)
        messages = messages + per_step(requesters, first & leaves, num_ranks)
        num_nodes = int(self._nodes[-1]) + 1
        leaving = per_step(self._nodes[owners], leaves, num_nodes)
        entering = per_step(self._nodes[requesters], leaves, num_nodes)
        self._totals += [
            (first & elsewhere).sum(),
            elsewhere.sum(),
            (first & leaves).sum(),
            leaves.sum(),
            served.max(axis=1).sum(),
            messages.max(axis=1).sum(),
            np.maximum(leaving, entering).max(axis=1).sum(),
        ]
        counts = np.bincount(served.ravel(), minlength=len(self._served))
        counts[: len(self._served)] += self._served
        self._served = counts
        self._num_steps += num_steps

    def result(self) -> Traffic:
        """The means and quantiles."""
        cumulative = np.cumsum(self._served) / self._served.sum()
        means = self._totals / self._num_steps
        per_rank = (means / self._num_ranks).tolist()
        return Traffic(
            messages=per_rank[0],
            records=per_rank[1],
            network_messages=per_rank[2],
            network_records=per_rank[3],
            served_p50=int(cumulative.searchsorted(0.50)),
            served_p99=int(cumulative.searchsorted(0.99)),
            served_max=len(self._served) - 1,
            busiest_rank_served=float(means[4]),
            busiest_rank_messages=float(means[5]),
            busiest_node_records=float(means[6]),
        )


def plan_seconds(
    sizes: Ints, num_representatives: int, policy: SamplingPolicy, seed: int, num_calls: int = 200
) -> Floats:
    """Times one rank's plan of one step, everything that its round needs of it.

    Returns:
        float64 ``[num_calls]``, of calls for different ranks and steps.
    """
    streams = Streams(seed, Purpose.SAMPLING)
    seconds = np.empty(num_calls)
    for step in range(num_calls):
        rank = step * len(sizes) // num_calls
        began = time.perf_counter()
        plan = plan_draw(sizes, rank, num_representatives, policy, streams.at(step))
        assert plan.send_slots is not None  # found when first asked for
        seconds[step] = time.perf_counter() - began
    return seconds


def check_plans(
    sizes: Ints,
    num_representatives: int,
    policy: SamplingPolicy,
    seed: int,
    steps: range,
    ranks: range,
) -> int:
    """Checks that ranks which plan on their own, plan their part of the joint draw.

    Returns:
        How many plans were checked.

    Raises:
        RuntimeError: a plan is not what the joint draw says.
    """
    contents, num_ranks = Contents(sizes), len(sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    for step in steps:
        generator = Streams(seed, Purpose.SAMPLING).at(step)
        joint = policy.draw(contents, num_ranks, num_representatives, generator)
        for rank in ranks:
            generator = Streams(seed, Purpose.SAMPLING).at(step)
            plan = plan_draw(sizes, rank, num_representatives, policy, generator)
            owners = np.repeat(np.arange(num_ranks), plan.receive_counts)
            received = bounds[owners] + plan.receive_slots
            asked = (joint >= bounds[rank]) & (joint < bounds[rank + 1])
            requesters = np.nonzero(asked)[0]
            slots = joint[asked] - bounds[rank]
            slots = slots[np.lexsort((slots, requesters))]
            if not (
                np.array_equal(received, np.sort(joint[rank]))
                and np.array_equal(plan.send_slots, slots)
                and np.array_equal(plan.send_counts, np.bincount(requesters, minlength=num_ranks))
            ):
                raise RuntimeError(f"step {step}: the plan of rank {rank} is not the joint draw's")
    return len(steps) * len(ranks)


def _binomial_bounds(num_trials: int, probability: float, tail: float) -> tuple[int, int]:
    """Counts that are exceeded below, and above, with at most the probability ``tail`` each."""
    if probability >= 1.0:
        return num_trials, num_trials
    mean = num_trials * probability
    reach = 12 * np.sqrt(mean) + 60
    low, high = max(0, int(mean - reach)), min(num_trials, int(mean + reach))
    counts = torch.arange(low, high + 1, dtype=torch.float64)
    log_chances = (
        torch.special.gammaln(torch.tensor(num_trials + 1.0, dtype=torch.float64))
        - torch.special.gammaln(counts + 1)
        - torch.special.gammaln(num_trials - counts + 1)
        + counts * np.log(probability)
        + (num_trials - counts) * np.log1p(-probability)
    )
    chances = log_chances.exp().numpy()
    below = np.cumsum(chances)
    above = np.cumsum(chances[::-1])
    return (
        low + int(below.searchsorted(tail, side="right")),
        high - int(above.searchsorted(tail, side="right")),
    )
