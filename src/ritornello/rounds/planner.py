"""The plans of one rank's rounds, made several at a time where nothing changes between them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.contents import Contents
from ritornello.policies.names import SAMPLING_POLICIES
from ritornello.policies.sampling import SamplingPolicy
from ritornello.rounds.random_streams import SHARED, Purpose, Streams
from ritornello.transports.plan import Plan, plans_of_draws

ROUNDS_AHEAD = 16
"""How many rounds are planned at once when the shards are full."""

NUMBERS_AHEAD = 2**16
"""How many indices are drawn ahead at most; at thousands of ranks one round has as many."""


class Planner:
    """Plans the rounds of one rank.

    While shards fill, round by round; from then on several rounds with the same few calls, as
    calls, not numbers, are what a plan costs. Each round's draw has a stream of its own, so
    the plans are the same either way. Policies that know what lies where see other contents each
    round, and may remember what they drew: theirs are always planned one by one.

    A rate that changes drops what was planned ahead, and so do sizes, where bytes are bounded. Then
    one round is planned, then two, and so on: as many as it has lasted, so that no more is dropped
    than was of use.

    Args:
        rank: whose plans.
        rate: ``r``, expected: each rank gets as many, a fraction rounded up or down by chance, or
            all if the buffer holds fewer.
        policy: what to draw.
        seed: of the streams, that all ranks share.
        num_draws: how many draws, each on its own, make one round's exchange.
        draws_alone: whether each rank draws out of its own shard, with a stream of its own.
    """

    def __init__(
        self,
        rank: int,
        rate: float,
        policy: SamplingPolicy,
        seed: int,
        num_draws: int = 1,
        draws_alone: bool = False,
    ) -> None:
        self._rank, self._draws_alone = rank, draws_alone
        self._rate = rate
        self._policy = policy
        self._streams = Streams(seed, Purpose.SAMPLING, rank if draws_alone else SHARED)
        self._rate_streams = Streams(seed, Purpose.RATE)
        self._num_draws = num_draws
        self._ahead: dict[int, Plan] = {}
        self._most_ahead = ROUNDS_AHEAD

    def go_on(self, policy: SamplingPolicy) -> None:
        """Goes on with another policy and other shards: drops what was planned ahead."""
        self._policy = policy
        self._ahead.clear()

    def change_rate(self, rate: float) -> None:
        """Goes on with a rate, perhaps another one."""
        if rate != self._rate:
            self.drop()  # first: a round that is broken off here is planned anew
            self._rate = rate

    def drop(self) -> None:
        """Drops what was planned ahead, as it was for other rates or sizes."""
        self._ahead.clear()
        self._most_ahead = 1

    def plan(self, step: int, contents: Contents, sizes_are_final: bool) -> Plan:
        """Plans one round; of local draws the plan is that of a single rank with a single shard.

        Args:
            step: the round's number.
            contents: the whole buffer.
            sizes_are_final: whether later rounds will find the same sizes, or ``drop`` is called.

        Raises:
            ValueError: the policy breaks its contract.
        """
        rank = self._rank
        if self._draws_alone:
            contents, rank = Contents(contents.sizes[rank : rank + 1]), 0
        if step not in self._ahead:
            num_numbers = len(contents.sizes) * math.ceil(self._rate) * self._num_draws
            ahead = sizes_are_final and not self._policy.knows_places
            num_rounds = min(self._most_ahead, NUMBERS_AHEAD // max(1, num_numbers)) if ahead else 1
            self._most_ahead = min(2 * self._most_ahead, ROUNDS_AHEAD)
            for count, steps in self._by_count(range(step, step + max(1, num_rounds))).items():
                shape = (contents, count, self._num_draws)
                draws = [draw_all(*shape, self._policy, self._streams.at(each)) for each in steps]
                plans = plans_of_draws(np.stack(draws), contents.sizes, rank)
                self._ahead.update(zip(steps, plans, strict=True))
        return self._ahead.pop(step)

    def most_drawn(self, step: int, plan: Plan, contents: Contents) -> int:
        """How many the rank draws that draws most in a round: the same on every rank."""
        if not self._draws_alone:
            return plan.num_drawn
        [count] = self._by_count([step])
        return min(count, int(contents.sizes.max())) * self._num_draws

    def _by_count(self, steps: Iterable[int]) -> dict[int, list[int]]:
        """Rounds by how many each rank shall draw: the rate, rounded up as often as its part says.

        A draw of fewer is no part of a draw of more, so each count is planned on its own.
        """
        whole = math.floor(self._rate)
        part = self._rate - whole
        if part == 0:
            return {whole: list(steps)}
        found: dict[int, list[int]] = {}
        for step in steps:
            count = whole + (self._rate_streams.at(step).random() < part)
            found.setdefault(count, []).append(step)
        return found


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
    num_drawn = min(num_representatives, policy.num_drawable(contents))
    if num_drawn == 0:
        return np.zeros((num_draws, num_ranks, 0), dtype=np.int64)
    draws = [policy.draw(contents, num_ranks, num_drawn, generator) for _ in range(num_draws)]
    if type(policy) not in SAMPLING_POLICIES.values():
        for drawn in draws:
            _check_draw(drawn, num_ranks, num_drawn, num_held)
    return draws[0][None] if num_draws == 1 else np.stack(draws)


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
