"""The plan of one global draw: which records of which shards go to which ranks.

Every rank knows the sizes of all shards and shares a random stream keyed by (seed, step), so
every rank computes the same draw. What follows from it, whom to send what and what to expect
from whom, needs no request: only records cross the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ritornello.arrays import Ints


class SamplingPolicy(ABC):
    """Which representatives the ranks draw in one step, as global indices.

    A global index counts the representatives of all shards, shard after shard.
    """

    @abstractmethod
    def draw(
        self, num_held: int, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """Draws for all ranks at once; a pure function of its arguments.

        Args:
            num_held: representatives in the whole buffer; at least ``num_drawn``.
            num_ranks: the ranks that draw.
            num_drawn: what each rank gets.
            generator: the same stream on every rank.

        Returns:
            int64 ``[num_ranks, num_drawn]``, each below ``num_held``.
        """


class UniformSampling(SamplingPolicy):
    """Every representative of the buffer equally likely, wherever it is stored.

    As long as the buffer holds at least ``num_ranks * num_drawn``, no representative comes
    twice in the joint draw. While it holds less, as many ranks as possible share one draw
    without replacement, and no rank gets a representative twice.
    """

    def draw(
        self, num_held: int, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        if num_held >= num_ranks * num_drawn:
            everyone = generator.choice(num_held, num_ranks * num_drawn, replace=False)
            return everyone.reshape(num_ranks, num_drawn)
        ranks_per_draw = num_held // num_drawn
        parts = [
            generator.choice(
                num_held, min(ranks_per_draw, num_ranks - first) * num_drawn, replace=False
            )
            for first in range(0, num_ranks, ranks_per_draw)
        ]
        return np.concatenate(parts).reshape(num_ranks, num_drawn)


@dataclass(frozen=True)
class Plan:
    """What one rank sends and receives in a round.

    Both sides list records in the same order (by owner, then by slot), so that each pair of
    ranks exchanges one contiguous block.
    """

    receive_slots: Ints
    """int64 ``[num_drawn]``: the slots, in their owners' shards, of what this rank gets."""
    receive_counts: Ints
    """int64 ``[num_ranks]``: how many of them come from each rank."""
    send_counts: Ints
    """int64 ``[num_ranks]``: how many of this rank's records go to each rank (and itself)."""
    requests: Ints
    """int64 ``[sum(send_counts)]``: ``requester * stride + slot`` of each of those records."""
    stride: int
    order: Ints | None = None
    """With several draws, int64 ``[num_drawn]``: the record received as number ``i`` is number
    ``order[i]`` of what was drawn, draw after draw. None: already in that order."""

    @property
    def num_drawn(self) -> int:
        """Records that this rank gets."""
        return len(self.receive_slots)

    @cached_property
    def send_slots(self) -> Ints:
        """int64: the slots of this rank's shard that others (and itself) get, by requester.

        Found when first asked for: ranks that share memory never ask.
        """
        slots: Ints = np.sort(self.requests) % self.stride
        return slots


def plan_draw(
    sizes: Ints,
    rank: int,
    num_representatives: int,
    policy: SamplingPolicy,
    generator: np.random.Generator,
    num_draws: int = 1,
) -> Plan:
    """Plans one global draw, or several, for one rank.

    Computes what this rank sends and receives, no more.

    Args:
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        rank: whose part of the plan.
        num_representatives: ``r``; each rank gets as many, or all if the buffer holds fewer.
        policy: what to draw.
        generator: the stream that all ranks share for this step.
        num_draws: how many steps' draws, each on its own, to plan as one exchange.

    Raises:
        ValueError: the policy breaks its contract.
    """
    num_ranks = len(sizes)
    bounds = np.zeros(num_ranks + 1, dtype=np.int64)
    np.cumsum(sizes, out=bounds[1:])
    num_held = int(bounds[-1])
    num_drawn = min(num_representatives, num_held)
    if num_drawn == 0:
        nothing = np.zeros(0, dtype=np.int64)
        no_counts = np.zeros(num_ranks, dtype=np.int64)
        return Plan(nothing, no_counts, no_counts, nothing, 1)
    draws = [policy.draw(num_held, num_ranks, num_drawn, generator) for _ in range(num_draws)]
    for drawn in draws:
        _check_draw(drawn, num_ranks, num_drawn, num_held)

    mine = draws[0][rank]
    order = None
    if num_draws > 1:
        mine = np.concatenate([np.sort(drawn[rank]) for drawn in draws])
        order = np.argsort(mine, kind="stable")
    mine = np.sort(mine)
    cuts = mine.searchsorted(bounds)
    receive_counts = cuts[1:] - cuts[:-1]
    receive_slots = mine - bounds[:-1].repeat(receive_counts)

    drawn = draws[0] if num_draws == 1 else np.concatenate(draws, axis=1)
    slots = drawn.ravel() - bounds[rank]
    size = int(sizes[rank])
    # Seen as unsigned, what lies below the shard is also beyond its end.
    asked = np.flatnonzero(slots.view(np.uint64) < size)
    requesters = asked // drawn.shape[1]
    send_counts = np.bincount(requesters, minlength=num_ranks)
    requests = requesters * size + slots[asked]
    return Plan(receive_slots, receive_counts, send_counts, requests, max(1, size), order)


def _check_draw(drawn: Ints, num_ranks: int, num_drawn: int, num_held: int) -> None:
    if drawn.shape != (num_ranks, num_drawn) or drawn.min() < 0 or drawn.max() >= num_held:
        raise ValueError(
            f"the sampling policy gave indices of the shape {list(drawn.shape)}, from "
            f"{drawn.min(initial=0)} to {drawn.max(initial=0)}: they must have the shape "
            f"[{num_ranks}, {num_drawn}] and be from 0 to {num_held - 1}"
        )


def sampling_policy(sampling: str | SamplingPolicy) -> SamplingPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
    """
    if isinstance(sampling, SamplingPolicy):
        return sampling
    if sampling == "uniform":
        return UniformSampling()
    raise ValueError(f"sampling={sampling!r}: there is 'uniform'; or give a SamplingPolicy")
