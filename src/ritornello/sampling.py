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

from ritornello.arrays import Bools, Floats, Ints
from ritornello.class_members import distinct_positions
from ritornello.contents import Contents
from ritornello.random_streams import Streams

ROUNDS_AHEAD = 16
"""How many rounds are planned at once when the shards are full."""

NUMBERS_AHEAD = 2**16
"""How many indices are drawn ahead at most; at thousands of ranks one round has as many."""


class SamplingPolicy(ABC):
    """Which representatives the ranks draw in one step, as global indices.

    A global index counts the representatives of all shards, shard after shard.

    Attributes:
        needs_labels: whether ``draw`` looks at more of the contents than how many there are.
            Rounds then tell every rank the labels of what was admitted on all.
    """

    needs_labels = False

    @abstractmethod
    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """Draws for all ranks at once. Every rank computes it, and must get the same.

        Args:
            contents: the whole buffer; holds at least ``num_drawn`` representatives.
            num_ranks: the ranks that draw.
            num_drawn: what each rank gets.
            generator: the same stream on every rank.

        Returns:
            int64 ``[num_ranks, num_drawn]``, each below ``contents.num_held``.
        """


class UniformSampling(SamplingPolicy):
    """Every representative of the buffer equally likely, wherever it is stored.

    As long as the buffer holds at least ``num_ranks * num_drawn``, no representative comes
    twice in the joint draw. While it holds less, as many ranks as possible share one draw
    without replacement, and no rank gets a representative twice.
    """

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        num_held = contents.num_held
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


class ClassBalancedSampling(SamplingPolicy):
    """Every class equally often, whatever it holds; inside a class every representative alike.

    The joint draw of all ranks takes from each class equally many, up to one: which classes give
    one more is random. Inside a class nothing comes twice as long as it holds that many; a
    class that holds fewer gives all that it has as often as it takes, and the rest at random.
    The draw is then dealt to the ranks in random order.
    """

    needs_labels = True

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        num_all = num_ranks * num_drawn
        labels = generator.permutation(contents.class_labels)[:num_all].tolist()
        counts = contents.counts(labels)
        wanted = np.full(len(labels), num_all // len(labels))
        wanted[: num_all % len(labels)] += 1
        num_passes, num_left = np.divmod(wanted, counts)
        owners, positions = distinct_positions(counts, num_left, generator)
        parts = [contents.places_at([labels[owner] for owner in owners.tolist()], positions)]
        for owner in np.flatnonzero(num_passes).tolist():
            parts += [contents.places(labels[owner])] * int(num_passes[owner])
        everyone = generator.permutation(np.concatenate(parts))
        return contents.indices(everyone).reshape(num_ranks, num_drawn)


class GraspSampling(SamplingPolicy):
    """From prototypical representatives to atypical ones, class after class.

    The classes take turns. In its turn a class gives one representative, with a probability
    proportional to ``1 / (d + 1e-7)``, where ``d`` is its cosine distance to the mean of its
    class; its ``d`` then grows by the largest one of the class. The ranks' draws follow one
    another, so that all ranks together draw what one rank with ``N * r`` would.

    The distances come from ``RehearsalBuffer.measure_distances``, which is to be called before
    each period of rehearsal. A representative that was admitted since has the mean distance of
    its class; in a class that was never measured all are equally likely, and then take turns.

    Source: Harun et al., "GRASP: A Rehearsal Policy for Efficient Online Continual Learning"
    (CoLLAs 2024).
    """

    needs_labels = True

    EPSILON = 1e-7

    LARGE = 1e100
    """Distances double each time a class has been gone through. Only their ratios matter: from
    here on they are divided by the largest."""

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``. Also raises the distances of what was drawn."""
        labels = contents.class_labels
        turns = (contents.num_turns + np.arange(num_ranks * num_drawn)) % len(labels)
        contents.num_turns = int(turns[-1]) + 1
        drawn = np.empty(len(turns), dtype=np.int64)
        for number in np.unique(turns).tolist():
            own = np.flatnonzero(turns == number)
            drawn[own] = self._draw_of_class(contents, labels[number], generator.random(len(own)))
        return contents.indices(drawn).reshape(num_ranks, num_drawn)

    def _draw_of_class(self, contents: Contents, label: int, u: Floats) -> Ints:
        """The places of what a class gives in ``len(u)`` turns, one random number for each."""
        places = contents.places(label)
        distances = contents.distances_at(places)
        unknown = np.isnan(distances)
        if unknown.any():
            distances[unknown] = 1.0 if unknown.all() else distances[~unknown].mean()
        chosen = np.empty(len(u), dtype=np.int64)
        for turn, number in enumerate(u.tolist()):
            chances = (1.0 / (distances + self.EPSILON)).cumsum()
            position = min(
                int(chances.searchsorted(number * chances[-1], side="right")), len(places) - 1
            )
            distances[position] += distances.max()
            chosen[turn] = position
        largest = distances.max()
        contents.set_distances(places, distances / largest if largest > self.LARGE else distances)
        return places[chosen]


@dataclass
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
    drawn_slots: Ints
    """int64 ``[num_ranks, num_drawn]``: what each rank draws, counted from the beginning of this
    rank's shard."""
    is_asked: Bools
    """bool ``[num_ranks, num_drawn]``: which of them lie in this rank's shard."""
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
        requesters, places = self.is_asked.nonzero()
        slots: Ints = self.drawn_slots[requesters, places]
        stride = int(slots.max(initial=0)) + 1
        return np.sort(requesters * stride + slots) % stride


class Planner:
    """Plans the rounds of one rank.

    While shards fill, round by round; from then on several rounds with the same few calls, as
    calls, not numbers, are what a plan costs. Each round's draw has a stream of its own, so
    the plans are the same either way. Policies that look at labels see other ones each round.

    Args:
        rank: whose plans.
        num_representatives: ``r``; each rank gets as many, or all if the buffer holds fewer.
        policy: what to draw.
        streams: that all ranks share.
        num_draws: how many steps' draws, each on its own, make one round's exchange.
    """

    def __init__(
        self,
        rank: int,
        num_representatives: int,
        policy: SamplingPolicy,
        streams: Streams,
        num_draws: int = 1,
    ) -> None:
        self._rank = rank
        self._num_representatives = num_representatives
        self._policy = policy
        self._streams = streams
        self._num_draws = num_draws
        self._ahead: dict[int, Plan] = {}

    def forget(self) -> None:
        """Drops what was planned ahead: the shards are others now."""
        self._ahead.clear()

    def plan(self, step: int, contents: Contents, sizes_are_final: bool) -> Plan:
        """Plans one round.

        Args:
            step: the round's number.
            contents: the whole buffer.
            sizes_are_final: whether later rounds will find the same sizes.

        Raises:
            ValueError: the policy breaks its contract.
        """
        if step not in self._ahead:
            num_numbers = len(contents.sizes) * self._num_representatives * self._num_draws
            ahead = sizes_are_final and not self._policy.needs_labels
            num_rounds = min(ROUNDS_AHEAD, NUMBERS_AHEAD // num_numbers) if ahead else 1
            steps = range(step, step + max(1, num_rounds))
            shape = (contents, self._num_representatives, self._num_draws)
            draws = [draw_all(*shape, self._policy, self._streams.at(each)) for each in steps]
            plans = plans_of_draws(np.stack(draws), contents.sizes, self._rank)
            self._ahead = dict(zip(steps, plans, strict=True))
        return self._ahead.pop(step)


def plan_draw(
    sizes: Ints,
    rank: int,
    num_representatives: int,
    policy: SamplingPolicy,
    generator: np.random.Generator,
    num_draws: int = 1,
) -> Plan:
    """Plans a single round for one rank; see ``Planner``.

    Raises:
        ValueError: the policy breaks its contract.
    """
    draws = draw_all(Contents(sizes), num_representatives, num_draws, policy, generator)
    return plans_of_draws(draws[None], sizes, rank)[0]


def draw_all(
    contents: Contents,
    num_representatives: int,
    num_draws: int,
    policy: SamplingPolicy,
    generator: np.random.Generator,
) -> Ints:
    """One round's draws for all ranks: int64 ``[num_draws, num_ranks, num_drawn]``.

    Raises:
        ValueError: the policy breaks its contract.
    """
    num_ranks, num_held = len(contents.sizes), contents.num_held
    num_drawn = min(num_representatives, num_held)
    if num_drawn == 0:
        return np.zeros((num_draws, num_ranks, 0), dtype=np.int64)
    draws = [policy.draw(contents, num_ranks, num_drawn, generator) for _ in range(num_draws)]
    if type(policy) not in POLICIES.values():
        for drawn in draws:
            _check_draw(drawn, num_ranks, num_drawn, num_held)
    return draws[0][None] if num_draws == 1 else np.stack(draws)


def plans_of_draws(draws: Ints, sizes: Ints, rank: int) -> list[Plan]:
    """What draws mean for one rank.

    Computes what this rank sends and receives, no more.

    Args:
        draws: int64 ``[num_rounds, num_draws, num_ranks, num_drawn]``, global indices.
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        rank: whose plans.
    """
    num_rounds, num_draws, num_ranks, num_drawn = draws.shape
    num_received = num_draws * num_drawn
    ends = sizes.cumsum()
    starts = ends - sizes

    received = np.sort(draws[:, :, rank], axis=-1).reshape(num_rounds, num_received)
    order = None
    if num_draws > 1:
        order = received.argsort(axis=-1, kind="stable")
        received = np.sort(received, axis=-1)
    owners = ends.searchsorted(received.ravel(), side="right").reshape(received.shape)
    receive_slots = received - starts[owners]
    rows = np.arange(num_rounds)[:, None] * num_ranks
    receive_counts = np.bincount((rows + owners).ravel(), minlength=num_rounds * num_ranks)
    receive_counts = receive_counts.reshape(num_rounds, num_ranks)

    slots = draws - starts[rank]
    if num_draws > 1:
        slots = slots.swapaxes(1, 2)
    slots = slots.reshape(num_rounds, num_ranks, num_received)
    # Seen as unsigned, what lies below the shard is also beyond its end.
    is_asked = slots.view(np.uint64) < int(sizes[rank])
    send_counts = is_asked.sum(axis=-1)
    return [
        Plan(
            receive_slots[i],
            receive_counts[i],
            send_counts[i],
            slots[i],
            is_asked[i],
            None if order is None else order[i],
        )
        for i in range(num_rounds)
    ]


def _check_draw(drawn: Ints, num_ranks: int, num_drawn: int, num_held: int) -> None:
    if not isinstance(drawn, np.ndarray) or not np.issubdtype(drawn.dtype, np.integer):
        kind = getattr(drawn, "dtype", type(drawn).__name__)
        raise ValueError(
            f"the sampling policy gave indices of the kind {kind}: it must give an array of "
            "integers"
        )
    if drawn.shape != (num_ranks, num_drawn) or drawn.min() < 0 or drawn.max() >= num_held:
        raise ValueError(
            f"the sampling policy gave indices of the shape {list(drawn.shape)}, from "
            f"{drawn.min(initial=0)} to {drawn.max(initial=0)}: they must have the shape "
            f"[{num_ranks}, {num_drawn}] and be from 0 to {num_held - 1}"
        )


POLICIES: dict[str, type[SamplingPolicy]] = {
    "uniform": UniformSampling,
    "class-balanced": ClassBalancedSampling,
    "grasp": GraspSampling,
}


def sampling_policy(sampling: str | SamplingPolicy) -> SamplingPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
        TypeError: neither a name nor a policy.
    """
    if isinstance(sampling, SamplingPolicy):
        return sampling
    if not isinstance(sampling, str):
        raise TypeError(
            f"sampling={sampling!r}: give a name ({', '.join(POLICIES)}) or a SamplingPolicy"
        )
    if sampling not in POLICIES:
        raise ValueError(f"sampling={sampling!r}: there are {', '.join(map(repr, POLICIES))}")
    return POLICIES[sampling]()
