"""The plan of a draw. Statistical tests have fixed seeds and a false-alarm rate of 0.001."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.policies.contents import Contents
from ritornello.policies.sampling import SamplingPolicy, UniformSampling
from ritornello.rounds.planner import ROUNDS_AHEAD, Planner, plan_draw
from ritornello.rounds.random_streams import Purpose, stream
from ritornello.testing import chi_square_p_value
from ritornello.transports.plan import Plan


def plans(sizes: list[int], num_representatives: int, step: int, seed: int = 0) -> list[Plan]:
    """Every rank's plan, each from its own stream object, as in real life."""
    return [
        plan_draw(
            np.array(sizes),
            rank,
            num_representatives,
            UniformSampling(),
            stream(seed, Purpose.SAMPLING, step),
        )
        for rank in range(len(sizes))
    ]


def received(plan: Plan, sizes: list[int]) -> np.ndarray:
    """The global indices that a rank gets."""
    owners = np.repeat(np.arange(len(sizes)), plan.receive_counts)
    return np.cumsum([0, *sizes])[owners] + plan.receive_slots


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(0, 2**40),
)
def test_plans_fit_together(sizes: list[int], num_representatives: int, step: int) -> None:
    everyone = plans(sizes, num_representatives, step)
    num_ranks, num_held = len(sizes), sum(sizes)
    num_drawn = min(num_representatives, num_held)
    for requester, plan in enumerate(everyone):
        assert plan.num_drawn == num_drawn == plan.receive_counts.sum()
        assert len(set(received(plan, sizes).tolist())) == num_drawn
        for owner, other in enumerate(everyone):
            got = np.split(plan.receive_slots, np.cumsum(plan.receive_counts))[owner]
            sent = np.split(other.send_slots, np.cumsum(other.send_counts))[requester]
            assert np.array_equal(got, sent)
            assert np.all((got >= 0) & (got < sizes[owner]))
    if num_held >= num_ranks * num_representatives:
        joint = np.concatenate([received(plan, sizes) for plan in everyone])
        assert len(set(joint.tolist())) == num_ranks * num_representatives


def test_draws_from_unequal_shards_are_uniform_per_rank_and_jointly() -> None:
    sizes, num_representatives, num_rounds = [30, 6, 12], 7, 4000
    per_rank = np.zeros((3, sum(sizes)))
    for step in range(num_rounds):
        drawn = [received(plan, sizes) for plan in plans(sizes, num_representatives, step)]
        assert len(np.unique(np.concatenate(drawn))) == 3 * num_representatives
        for rank, indices in enumerate(drawn):
            per_rank[rank, indices] += 1
    expected = num_rounds * num_representatives / sum(sizes)
    for counts in per_rank:
        assert chi_square_p_value(counts, expected) > 0.001
    assert chi_square_p_value(per_rank.sum(axis=0), 3 * expected) > 0.001


def test_pairs_of_representatives_are_drawn_together_uniformly() -> None:
    together = np.zeros((8, 8))
    for step in range(6000):
        first, second = received(plans([5, 3], 2, step)[0], [5, 3])
        together[first, second] += 1
    pairs = together[np.triu_indices(8, k=1)]
    assert chi_square_p_value(pairs, 6000 / 28) > 0.001


@pytest.mark.parametrize("sizes", [[1], [2, 0, 1], [0, 0, 5], [3, 3, 3, 3]])
def test_while_the_buffer_holds_less_than_all_ranks_want(sizes: list[int]) -> None:
    num_held, counts = sum(sizes), np.zeros((len(sizes), sum(sizes)))
    for step in range(2000):
        for rank, plan in enumerate(plans(sizes, 7, step)):
            assert plan.num_drawn == min(7, num_held)
            counts[rank, received(plan, sizes)] += 1
    expected = 2000 * min(7, num_held) / num_held
    if expected < 2000:
        assert all(chi_square_p_value(row, expected) > 0.001 for row in counts)
    else:
        assert np.all(counts == 2000)


def test_an_empty_buffer_gives_an_empty_plan() -> None:
    assert [plan.num_drawn for plan in plans([0, 0], 3, 0)] == [0, 0]


@pytest.mark.parametrize("num_draws", [1, 3])
def test_rounds_planned_ahead_are_those_planned_one_by_one(num_draws: int) -> None:
    sizes = np.array([9, 0, 14])
    for rank in range(3):
        planner = Planner(rank, 4, UniformSampling(), seed=8, num_draws=num_draws)
        for step in range(2 * ROUNDS_AHEAD + 3):
            ours = planner.plan(step, Contents(sizes), sizes_are_final=step > 5)
            generator = stream(8, Purpose.SAMPLING, step)
            theirs = plan_draw(sizes, rank, 4, UniformSampling(), generator, num_draws)
            for name in ("receive_slots", "receive_counts", "send_slots", "send_counts"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            assert ours.num_drawn == 4 * num_draws
            if num_draws > 1:
                assert np.array_equal(ours.order, theirs.order)


def test_steps_and_seeds_give_different_draws() -> None:
    drawn = {
        tuple(plans([500], 5, step, seed)[0].receive_slots) for step in (0, 1) for seed in (0, 1)
    }
    assert len(drawn) == 4


def test_load_is_spread_at_many_ranks() -> None:
    sizes = [300] * 128
    plan = plan_draw(np.array(sizes), 5, 7, UniformSampling(), stream(0, Purpose.SAMPLING, 3))
    assert plan.num_drawn == 7
    assert 0 < len(plan.send_slots) < 30


def test_a_sampling_policy_that_gives_no_array_of_integers() -> None:
    class Fixed(SamplingPolicy):
        def draw(self, *_: object) -> np.ndarray:
            return np.array([[0.0, 1.0]])

    with pytest.raises(ValueError, match="of the kind float64: it must give an array of integers"):
        plan_draw(np.array([5]), 0, 2, Fixed(), np.random.default_rng(0))


def test_a_sampling_policy_that_forgets_to_say_what_it_needs() -> None:
    class Forgetful(SamplingPolicy):
        def draw(self, contents: Contents, *_: object) -> np.ndarray:
            return contents.labels

    with pytest.raises(TypeError, match="give the class needs_labels = True"):
        plan_draw(np.array([5]), 0, 2, Forgetful(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("indices", "message"),
    [([[0, 1, 2]], r"shape \[1, 3\]"), ([[0, 5]], "from 0 to 5"), ([[-1, 0]], "from -1 to 0")],
)
def test_a_sampling_policy_that_breaks_its_contract(indices: list[list[int]], message: str) -> None:
    class Fixed(SamplingPolicy):
        def draw(self, *_: object) -> np.ndarray:
            return np.array(indices)

    with pytest.raises(ValueError, match=message):
        plan_draw(np.array([5]), 0, 2, Fixed(), np.random.default_rng(0))
