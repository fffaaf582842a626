"""The rate: how many representatives are drawn, where that is a fraction or changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello import PeerLostError, RehearsalBuffer, RoundError
from ritornello.arrays import Ints
from ritornello.policies.contents import Contents
from ritornello.policies.sampling import UniformSampling
from ritornello.rounds.planner import ROUNDS_AHEAD, Planner, plan_draw
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.testing import (
    chi_square_p_value,
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, Transport
from ritornello.transports.plan import Plan

Connect = Callable[..., list[Any]]

CONNECTS = [LocalTransport.connect, connect_collective, connect_shared_memory]

SCHEDULE = (0, 0.5, 3, 1.25, 2, 2, 0.75, 4)
"""Rates of one step after another, again and again."""


def batch_of(rank: int, step: int, num_samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (step * 10 + rank) * 100 + torch.arange(num_samples)
    return numbers, numbers % 3


def count_of(rate: float, seed: int, step: int) -> int:
    """How many are drawn in a round, by the law and its random stream."""
    whole = math.floor(rate)
    return whole + int(stream(seed, Purpose.RATE, step).random() < rate - whole)


# The planner.


def assert_same_plan(ours: Plan, theirs: Plan) -> None:
    for name in ("receive_slots", "receive_counts", "send_slots", "send_counts", "order"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("rate", [0.02, 0.25, 1.5, 6.9])
def test_a_fraction_is_rounded_up_as_often_as_it_says(rate: float) -> None:
    contents, num_rounds = Contents(np.array([9, 0, 14])), 4000
    planners = [Planner(rank, rate, UniformSampling(), seed=3) for rank in range(3)]
    counts = np.array(
        [
            [planner.plan(step, contents, sizes_are_final=True).num_drawn for planner in planners]
            for step in range(num_rounds)
        ]
    )
    assert np.all(counts == counts[:, :1]), "all ranks draw alike"
    assert set(counts[:, 0].tolist()) == {math.floor(rate), math.ceil(rate)}
    # Binomial: beyond four deviations once in 16,000 seeds.
    part = rate % 1
    deviation = math.sqrt(num_rounds * part * (1 - part))
    assert abs(counts[:, 0].sum() - num_rounds * rate) < 4 * deviation


def test_rounding_up_does_not_depend_on_the_round_before() -> None:
    """Pairs of successive rounds: all four kinds equally often; false alarm 0.001."""
    counts = [count_of(0.5, 8, step) for step in range(4001)]
    pairs = np.bincount([2 * a + b for a, b in pairwise(counts)])
    assert chi_square_p_value(pairs, 1000.0) > 0.001


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(
        st.one_of(
            st.integers(0, 6), st.floats(0, 6, allow_subnormal=False), st.just(2.5), st.just(2)
        ),
        min_size=1,
        max_size=45,
    ),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    num_draws=st.integers(1, 3),
)
def test_rounds_planned_ahead_are_those_planned_one_by_one(
    rates: list[float], sizes: list[int], num_draws: int
) -> None:
    rank, contents = len(sizes) - 1, Contents(np.array(sizes))
    planner = Planner(rank, rates[0], UniformSampling(), seed=5, num_draws=num_draws)
    for step, rate in enumerate(rates):
        planner.change_rate(rate)
        ours = planner.plan(step, contents, sizes_are_final=True)
        count = count_of(rate, 5, step)
        generator = stream(5, Purpose.SAMPLING, step)
        theirs = plan_draw(
            contents.sizes, rank, count, UniformSampling(), generator, num_draws=num_draws
        )
        assert_same_plan(ours, theirs)
        assert ours.num_drawn == min(count, sum(sizes)) * num_draws


@pytest.mark.parametrize(
    ("rate_of", "most_calls"),
    [
        (lambda step: 3.5, 200 + ROUNDS_AHEAD),
        (lambda step: 1 + step % 2, 200),  # another one each round: nothing is planned ahead
        (lambda step: 1 + step // 10 % 2, 2 * 200),  # it lasts ten rounds
    ],
)
def test_little_is_planned_in_vain(rate_of: Callable[[int], float], most_calls: int) -> None:
    class Counting(UniformSampling):
        num_calls = 0

        def draw(self, *arguments: Any) -> Ints:
            self.num_calls += 1
            return super().draw(*arguments)

    policy, contents = Counting(), Contents(np.array([30]))
    planner = Planner(0, rate_of(0), policy, seed=0)
    planner.change_rate(9)
    for step in range(200):
        planner.change_rate(rate_of(step))
        planner.plan(step, contents, sizes_are_final=True)
    assert policy.num_calls <= most_calls


# The whole buffer.


def scheduled(end: Transport, num_steps: int = 60, **arguments: Any) -> list[torch.Tensor]:
    """What comes of a rate that is set before each step; batches vary in length."""
    given = {"num_representatives": 0, "most_representatives": 4, "seed": 7, **arguments}
    with RehearsalBuffer(31, transport=end, **given) as buffer:
        out = []
        for step in range(num_steps):
            buffer.num_representatives = SCHEDULE[step % len(SCHEDULE)]
            batch = batch_of(end.rank, step, (5, 3, 0, 8)[(step + end.rank) % 4])
            augmented = buffer.update(batch)
            assert buffer.num_past == len(augmented[1]) - len(batch[1])
            out += augmented
    return out


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_result_depends_on_the_seed_alone(num_draws: int) -> None:
    reference = run_ranks(
        LocalTransport.connect(3), lambda end: scheduled(end, num_draws=num_draws)
    )
    for connect in CONNECTS:
        for asynchronous in (True, False):
            again = run_ranks(
                connect(3),
                lambda end, a=asynchronous: scheduled(end, num_draws=num_draws, asynchronous=a),
            )
            for first, second in zip(reference, again, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sampling", ["uniform", "class-balanced", "grasp"])
def test_what_is_set_is_drawn_for_the_step_after_the_next(sampling: str) -> None:
    def rank_main(end: Transport) -> list[int]:
        found = []
        with RehearsalBuffer(
            30, num_representatives=1, most_representatives=4, sampling=sampling, transport=end
        ) as buffer:
            for step in range(30):
                buffer.num_representatives = SCHEDULE[step % len(SCHEDULE)]
                assert buffer.num_representatives == SCHEDULE[step % len(SCHEDULE)]
                buffer.update(batch_of(end.rank, step))
                found.append(buffer.num_past)
        return found

    everyone = run_ranks(LocalTransport.connect(2), rank_main)
    expected = [0, *(count_of(SCHEDULE[step % len(SCHEDULE)], 0, step) for step in range(29))]
    assert everyone == [expected, expected]


def test_every_representative_is_equally_likely_at_any_rate() -> None:
    """30 / 6 / 12 records on 3 ranks, 4,000 rounds of changing rates; false alarm 0.001 a row."""
    sizes, num_rounds = (30, 6, 12), 4000

    def rank_main(end: Transport) -> tuple[np.ndarray, list[list[int]]]:
        size, start = sizes[end.rank], sum(sizes[: end.rank])
        counts, drawn = np.zeros(sum(sizes)), []
        with RehearsalBuffer(
            90,
            num_representatives=0,
            most_representatives=4,
            transport=end,
            asynchronous=False,
            seed=5,
        ) as buffer:
            buffer.update((torch.arange(start, start + size), torch.zeros(size).long()))
            nothing = (torch.zeros(0).long(), torch.zeros(0).long())
            for step in range(num_rounds):
                buffer.num_representatives = SCHEDULE[step % len(SCHEDULE)]
                numbers = buffer.update(nothing)[0]
                counts[numbers.numpy()] += 1
                drawn.append(numbers.tolist())
        return counts, drawn

    everyone = run_ranks(LocalTransport.connect(3), rank_main, seconds=240.0)
    for of_ranks in zip(*(drawn for _, drawn in everyone), strict=True):
        assert len({len(drawn) for drawn in of_ranks}) == 1
        joint = [number for drawn in of_ranks for number in drawn]
        assert len(set(joint)) == len(joint)
    counts = np.stack([counts for counts, _ in everyone])
    expected = counts[0].sum() / sum(sizes)
    # Rounding adds up to a deviation of 18.
    assert abs(counts[0].sum() - num_rounds / len(SCHEDULE) * sum(SCHEDULE)) < 4 * 18
    for row in counts:
        assert chi_square_p_value(row, expected) > 0.001
    assert chi_square_p_value(counts.sum(axis=0), 3 * expected) > 0.001


def test_several_draws_have_the_same_rate_and_no_repeats() -> None:
    def rank_main(end: Transport) -> list[list[list[int]]]:
        found = []
        with RehearsalBuffer(
            40, num_representatives=2.5, num_draws=3, transport=end, seed=1
        ) as buffer:
            for step in range(60):
                draws = buffer.draw() or []
                assert buffer.num_past == sum(len(labels) for _, labels in draws)
                found.append([numbers.tolist() for numbers, _ in draws])
                buffer.offer(batch_of(end.rank, step))
        return found

    everyone = run_ranks(LocalTransport.connect(2), rank_main)
    sizes = set()
    for of_ranks in list(zip(*everyone, strict=True))[10:]:
        lengths = {len(drawn) for draws in of_ranks for drawn in draws}
        assert len(lengths) == 1
        sizes |= lengths
        for number in range(3):
            joint = [each for draws in of_ranks for each in draws[number]]
            assert len(set(joint)) == len(joint)
    assert sizes == {2, 3}


def test_a_whole_rate_draws_what_it_always_drew() -> None:
    """Whether it is an integer or a float, and whether it might change."""

    def stream_of(rate: float, most: int | None) -> list[torch.Tensor]:
        with RehearsalBuffer(
            20, num_representatives=rate, most_representatives=most, seed=2
        ) as buffer:
            return [buffer.update(batch_of(0, step))[0] for step in range(40)]

    plain = stream_of(3, None)
    for rate, most in ((3.0, None), (np.float32(3), None), (np.int64(3), 3), (3, 9)):
        again = stream_of(rate, most)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("connect", CONNECTS)
def test_a_buffer_that_only_fills(connect: Connect, most: int | None) -> None:
    def rank_main(end: Transport) -> int:
        with RehearsalBuffer(
            20, num_representatives=0, most_representatives=most, transport=end
        ) as buffer:
            for step in range(12):
                batch = batch_of(end.rank, step)
                assert buffer.update(batch) is batch
                assert buffer.num_past == 0
            assert buffer.draw() is None
            buffer.offer(batch_of(end.rank, 12))
            return len(buffer)

    assert run_ranks(connect(2), rank_main) == [20, 20]


def test_a_rate_without_most_gathers_nothing_more() -> None:
    def num_gathered(most: int | None) -> int:
        calls = []

        class Counted(LocalTransport):
            def all_gather(self, values: Ints) -> Ints:
                calls.append(len(values))
                return super().all_gather(values)

        with RehearsalBuffer(
            8, num_representatives=1.5, most_representatives=most, transport=Counted()
        ) as buffer:
            for step in range(10):  # full after two
                buffer.update(batch_of(0, step))
            len(buffer)
            before = len(calls)
            for step in range(10, 30):
                buffer.update(batch_of(0, step))
            len(buffer)
            assert set(calls[before:]) <= {1}
            return len(calls) - before

    assert num_gathered(None) == 0
    assert num_gathered(2) == 20


# Ranks that do not agree.


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize("sets", [(2, 3), (None, 3), (2.5, 2.25)], ids=["both", "one", "fractions"])
def test_ranks_that_set_different_rates(connect: Connect, sets: tuple[Any, Any]) -> None:
    def rank_main(end: Transport) -> str:
        buffer = RehearsalBuffer(
            8, num_representatives=1, most_representatives=4, transport=end, timeout_seconds=20.0
        )
        for step in range(6):
            buffer.update(batch_of(end.rank, step))
        rate = sets[end.rank]
        if rate is not None:
            buffer.num_representatives = rate
        began = time.monotonic()
        buffer.update(batch_of(end.rank, 6))  # starts the round that finds it
        with pytest.raises(RoundError) as caught:
            buffer.update(batch_of(end.rank, 7))
        assert not isinstance(caught.value, PeerLostError)
        assert time.monotonic() - began < 20.0
        with pytest.raises(RoundError):
            buffer.draw()
        buffer.close()
        return str(caught.value)

    first, second = run_ranks(connect(2, timeout_seconds=20.0), rank_main)
    mine, other = (1 if rate is None else rate for rate in sets)
    rates = sorted([(mine, 0), (other, 1)])
    told = ", ".join(f"{rate} on rank(s) [{rank}]" for rate, rank in rates)
    for rank, message in enumerate((first, second)):
        assert message.startswith(f"rank {rank}: round 6 (plan) failed: num_representatives is")
        assert f"num_representatives is {told}: all ranks must set the same" in message


@pytest.mark.parametrize("connect", CONNECTS)
def test_a_rank_that_saves_while_another_is_in_a_round(connect: Connect, tmp_path: Any) -> None:
    """The gathered rate is no negative number: those that are say where their ranks are."""

    def rank_main(end: Transport) -> str:
        buffer = RehearsalBuffer(
            8, num_representatives=1.5, most_representatives=4, transport=end, timeout_seconds=20.0
        )
        for step in range(6):
            buffer.update(batch_of(end.rank, step))
        len(buffer)
        with pytest.raises(PeerLostError) as caught:
            if end.rank == 0:
                buffer.save(tmp_path)
            buffer.update(batch_of(end.rank, 6))
            buffer.update(batch_of(end.rank, 7))
        buffer.close()
        return str(caught.value)

    first, second = run_ranks(connect(2, timeout_seconds=20.0), rank_main)
    assert "rank(s) [1] are in a round" in first
    assert "rank(s) [0] are in save, and" in second


def test_the_most_is_an_argument_like_others() -> None:
    def rank_main(end: Transport) -> str:
        with pytest.raises(ValueError, match="different arguments") as caught:
            RehearsalBuffer(
                20,
                num_representatives=2.0 if end.rank else 2,
                most_representatives=4 if end.rank else None,
                transport=end,
            )
        return str(caught.value)

    for message in run_ranks(LocalTransport.connect(2), rank_main):
        assert "most_representatives is None on rank 0, 4 on rank 1" in message
        assert "num_representatives is" not in message.replace("most_representatives", "")
