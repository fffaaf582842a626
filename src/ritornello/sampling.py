"""The plan of one global draw: which records of which shards go to which ranks.

Every rank knows the sizes of all shards and shares a random stream keyed by (seed, step), so
every rank computes the same draw. What follows from it, whom to send what and what to expect
from whom, needs no request: only records cross the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
        ranks_per_draw = min(num_ranks, num_held // num_drawn)
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
    send_slots: Ints
    """int64: the slots of this rank's shard that others (and itself) get, by requester."""
    send_counts: Ints
    """int64 ``[num_ranks]``: how many of them go to each rank."""

    @property
    def num_drawn(self) -> int:
        """Records that this rank gets."""
        return len(self.receive_slots)


def plan_draw(
    sizes: Ints,
    rank: int,
    num_representatives: int,
    policy: SamplingPolicy,
    generator: np.random.Generator,
) -> Plan:
    """Plans one global draw for one rank.

    Args:
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        rank: whose part of the plan.
        num_representatives: ``r``; each rank gets as many, or all if the buffer holds fewer.
        policy: what to draw.
        generator: the stream that all ranks share for this step.

    Raises:
        ValueError: the policy breaks its contract.
    """
    num_ranks = len(sizes)
    ends = np.cumsum(sizes)
    num_held = int(ends[-1])
    num_drawn = min(num_representatives, num_held)
    if num_drawn == 0:
        nothing = np.zeros(0, dtype=np.int64)
        no_counts = np.zeros(num_ranks, dtype=np.int64)
        return Plan(nothing, no_counts, nothing, no_counts)
    drawn = policy.draw(num_held, num_ranks, num_drawn, generator)
    if drawn.shape != (num_ranks, num_drawn) or drawn.min() < 0 or drawn.max() >= num_held:
        raise ValueError(
            f"the sampling policy gave indices of the shape {list(drawn.shape)}, from "
            f"{drawn.min(initial=0)} to {drawn.max(initial=0)}: they must have the shape "
            f"[{num_ranks}, {num_drawn}] and be from 0 to {num_held - 1}"
        )

    mine = np.sort(drawn[rank])
    cuts = np.searchsorted(mine, ends)
    receive_counts = np.diff(cuts, prepend=0)
    starts = ends - sizes
    receive_slots = mine - np.repeat(starts, receive_counts)

    start, end = starts[rank], ends[rank]
    requesters, places = np.nonzero((drawn >= start) & (drawn < end))
    slots = drawn[requesters, places] - start
    order = np.lexsort((slots, requesters))
    send_counts = np.bincount(requesters, minlength=num_ranks)
    return Plan(receive_slots, receive_counts, slots[order], send_counts)


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
