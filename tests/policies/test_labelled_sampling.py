"""Sampling policies that look at labels: their laws, over unequal shards.

Statistical tests have fixed seeds and a false-alarm rate of 0.001.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ritornello import RehearsalBuffer, SamplingPolicy
from ritornello.policies.contents import Contents
from ritornello.policies.names import sampling_policy
from ritornello.policies.sampling import ClassBalancedSampling, GraspSampling, UniformSampling
from ritornello.rounds.planner import draw_all
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.testing import (
    chi_square_p_value,
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, Transport

# Three unequal shards with room to spare; the classes 3, 5 and 8 hold 40, 8 and 24.
SIZES = (30, 30, 12)
ROWS = (40, 30, 25)
LABELS = np.array([3] * 30 + [3] * 10 + [5] * 8 + [8] * 12 + [8] * 12)


def contents() -> Contents:
    made = Contents(np.array(SIZES), np.array(ROWS))
    for rank, labels in enumerate(np.split(LABELS, np.cumsum(SIZES)[:-1])):
        made.admit(rank, np.arange(len(labels)), labels)
    return made


def draws(policy: SamplingPolicy, num_drawn: int, num_steps: int) -> Iterator[np.ndarray]:
    """Joint draws of three ranks."""
    held, streams = contents(), Streams(3, Purpose.SAMPLING)
    for step in range(num_steps):
        yield draw_all(held, num_drawn, 1, policy, streams.at(step))[0]


def test_class_balanced_draws_every_class_and_every_member_equally_often() -> None:
    num_steps = 3000
    per_rank = np.zeros((3, len(LABELS)))
    for drawn in draws(ClassBalancedSampling(), 7, num_steps):
        classes = Counter(LABELS[drawn.ravel()].tolist())
        assert set(classes.values()) == {7}  # 21 over three classes
        assert len(np.unique(drawn)) == 21
        for rank, row in enumerate(drawn):
            per_rank[rank, row] += 1
    # Each class has a third of each rank's draws, and each member its part of that.
    for label in (3, 5, 8):
        members = per_rank[:, label == LABELS]
        expected = num_steps * 7 / 3 / members.shape[1]
        assert chi_square_p_value(members.sum(axis=0), 3 * expected) > 0.001
        for row in members[:, : members.shape[1] - 1]:
            assert chi_square_p_value(row, expected) > 0.001
    # Uniform sampling fails the same test.
    uniform = np.zeros(len(LABELS))
    for drawn in draws(UniformSampling(), 7, num_steps):
        uniform[drawn.ravel()] += 1
    fives = uniform[LABELS == 5]
    assert chi_square_p_value(fives, num_steps * 7 / 8) < 1e-9


def test_class_balanced_gives_what_is_left_over_to_random_classes() -> None:
    larger: Counter[int] = Counter()
    for drawn in draws(ClassBalancedSampling(), 5, 2000):  # 15 drawn: 5 each; with 4: 12
        assert set(Counter(LABELS[drawn.ravel()].tolist()).values()) == {5}
    for drawn in draws(ClassBalancedSampling(), 1, 3000):
        assert len(set(LABELS[drawn.ravel()].tolist())) == 3
        larger[int(LABELS[drawn[0, 0]])] += 1
    assert chi_square_p_value(np.array(list(larger.values())), 1000) > 0.001


def test_a_class_that_holds_less_than_its_part_gives_all_of_it_in_turn() -> None:
    for drawn in draws(ClassBalancedSampling(), 20, 50):
        assert Counter(LABELS[drawn.ravel()].tolist()) == {3: 20, 5: 20, 8: 20}
        times = Counter(drawn[LABELS[drawn] == 5].tolist())
        assert set(times.values()) == {2, 3}
        assert len(times) == 8


def test_grasp_classes_take_turns_over_steps_and_ranks() -> None:
    turns = np.concatenate([LABELS[drawn.ravel()] for drawn in draws(GraspSampling(), 4, 10)])
    assert turns.tolist() == np.tile([3, 5, 8], 40).tolist()


def test_grasp_draws_in_proportion_to_closeness() -> None:
    distances = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, len(LABELS)))
    counts = np.zeros(len(LABELS))
    num_runs = 4000
    for run in range(num_runs):
        held = contents()
        for rank, part in enumerate(np.split(distances, np.cumsum(SIZES)[:-1])):
            held.set_rank_distances(rank, part)
        generator = Streams(run, Purpose.SAMPLING).at(0)
        first = draw_all(held, 1, 1, GraspSampling(), generator)[0].ravel()
        counts[first] += 1
        # What was drawn is now as far as it was, and the farthest of its class, together.
        for index in first:
            farthest = distances[LABELS[index] == LABELS].max()
            assert held.distances[index] == pytest.approx(distances[index] + farthest)
    for label in (3, 5, 8):
        members = label == LABELS
        chances = 1 / (distances[members] + 1e-7)
        expected = num_runs * chances / chances.sum()
        assert chi_square_p_value(counts[members], expected) > 0.001
        assert chi_square_p_value(counts[members], expected.mean()) < 1e-9


def test_grasp_runs_from_prototypes_to_the_atypical() -> None:
    held = contents()
    distances = np.where(np.arange(len(LABELS)) % 2, 0.001, 0.9)
    for rank, part in enumerate(np.split(distances, np.cumsum(SIZES)[:-1])):
        held.set_rank_distances(rank, part)
    policy, streams = GraspSampling(), Streams(0, Purpose.SAMPLING)
    joint = [draw_all(held, 3, 1, policy, streams.at(step))[0].ravel() for step in range(8)]
    drawn = distances[np.concatenate(joint)]
    assert (drawn[:12] == 0.001).mean() > 0.9  # 4 of each class; the smallest has 4 prototypes
    assert (drawn[60:] == 0.001).mean() < 0.7


def test_grasp_without_distances_is_uniform_inside_classes() -> None:
    held, streams = contents(), Streams(1, Purpose.SAMPLING)
    counts = np.zeros(len(LABELS))
    for step in range(3000):
        fresh = contents()
        counts[draw_all(fresh, 1, 1, GraspSampling(), streams.at(step))[0].ravel()] += 1
    for label in (3, 5, 8):
        members = counts[label == LABELS]
        assert chi_square_p_value(members, 3000 / len(members)) > 0.001
    assert np.isnan(held.distances).all()


def test_grasp_gives_new_ones_the_mean_distance_of_their_class() -> None:
    held = contents()
    held.set_rank_distances(0, np.linspace(0.2, 0.4, 30))  # of class 3; rank 1 holds 10 more
    places = held.places(3)
    draw_all(held, 1, 1, GraspSampling(), np.random.default_rng(0))
    measured = held.distances_at(places)
    assert not np.isnan(measured).any()
    assert np.count_nonzero(np.isclose(measured, 0.3)) >= 9


def test_grasp_goes_on_for_ever_without_a_new_measurement() -> None:
    """Distances double each time round; they must not overflow."""
    held, streams = contents(), Streams(0, Purpose.SAMPLING)
    for rank, part in enumerate(np.split(np.linspace(0.1, 0.9, 72), np.cumsum(SIZES)[:-1])):
        held.set_rank_distances(rank, part)
    counts = np.zeros(len(LABELS))
    for step in range(1500):  # 7 draws in each of three turns: 1,300 times through class 5
        counts[draw_all(held, 7, 1, GraspSampling(), streams.at(step))[0].ravel()] += 1
    assert np.isfinite(held.distances).all()
    fives = counts[LABELS == 5]
    assert fives.min() > 0.9 * fives.mean()


def test_unknown_sampling() -> None:
    with pytest.raises(ValueError, match="sampling='best': there are 'uniform', 'class-balanced'"):
        sampling_policy("best")
    with pytest.raises(TypeError, match="sampling=3: give a name"):
        sampling_policy(3)  # type: ignore[arg-type]


class RareClassesMoreOften(SamplingPolicy):
    """The one of the documentation."""

    needs_labels = True

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> np.ndarray:
        _, class_numbers, counts = np.unique(
            contents.labels, return_inverse=True, return_counts=True
        )
        weights = 1 / np.sqrt(counts[class_numbers])
        num_all = num_ranks * num_drawn
        replace = num_all > contents.num_held
        drawn = generator.choice(
            contents.num_held, num_all, replace=replace, p=weights / weights.sum()
        )
        return drawn.reshape(num_ranks, num_drawn)


def batch_of(rank: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng([rank, step])
    numbers = (step * 10 + rank) * 100 + np.arange(size)
    labels = generator.integers(1 + step // 10, size=size) ** 2
    return torch.from_numpy(numbers), torch.from_numpy(labels)


@pytest.mark.parametrize("selection", ["class-balanced", "reservoir", "fifo"])
@pytest.mark.parametrize("sampling", ["class-balanced", "grasp", RareClassesMoreOften])
def test_what_is_drawn_depends_on_the_seed_alone(selection: str, sampling: object) -> None:
    """Whatever the transport, and whether or not in the background; and draws are real samples."""

    def rank_main(transport: Transport, asynchronous: bool = True) -> list[torch.Tensor]:
        seen: dict[int, int] = {}
        out = []
        with RehearsalBuffer(
            37,
            num_representatives=5,
            num_candidates=4,
            selection=selection,
            sampling=sampling if isinstance(sampling, str) else sampling(),  # type: ignore[operator]
            transport=transport,
            asynchronous=asynchronous,
            seed=4,
        ) as buffer:
            for step in range(60):
                size = (7, 0, 12, 3)[(step + transport.rank) % 4]
                if step % 15 == 14 and sampling == "grasp":
                    buffer.measure_distances(lambda batch: batch[0][:, None] % torch.arange(2, 9))
                numbers, labels = buffer.update(batch_of(transport.rank, step, size))
                for other in range(transport.num_ranks):
                    everyone, theirs = batch_of(other, step, 12)
                    seen |= dict(zip(everyone.tolist(), theirs.tolist(), strict=True))
                assert all(
                    seen[number] == label
                    for number, label in zip(
                        numbers[size:].tolist(), labels[size:].tolist(), strict=True
                    )
                )
                out += [numbers, labels]
        return out

    reference = run_ranks(LocalTransport.connect(3), rank_main)
    for again in (
        run_ranks(LocalTransport.connect(3), lambda end: rank_main(end, False)),
        run_ranks(connect_collective(3), rank_main),
        run_ranks(connect_shared_memory(3), rank_main),
        run_ranks(connect_shared_memory(3, hosts=[0, 0, 2]), rank_main),
    ):
        for first, second in zip(reference, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_whole_buffer_draws_every_class_equally_often() -> None:
    def rank_main(transport: Transport) -> np.ndarray:
        counts = np.zeros((1, 3))
        with RehearsalBuffer(
            90,
            num_representatives=6,
            selection="reservoir",
            sampling="class-balanced",
            transport=transport,
            asynchronous=False,
        ) as buffer:
            # Rank 0 holds two classes, rank 1 little, rank 2 nothing.
            labels = [[0] * 25 + [1] * 3, [2] * 4, []][transport.rank]
            filled = torch.tensor(labels, dtype=torch.int64)
            buffer.update((filled, filled))
            nothing = (filled[:0], filled[:0])
            for _ in range(1500):
                counts[0] += np.bincount(buffer.update(nothing)[1].numpy(), minlength=3)
        return counts

    counts = np.concatenate(run_ranks(LocalTransport.connect(3), rank_main))
    assert counts.sum(axis=0).tolist() == [9000, 9000, 9000]
    # Each rank's part is a random one of the joint draw: rank by rank nearly equal, too.
    assert np.abs(counts - 3000).max() < 6 * np.sqrt(3000 * 2 / 3)
