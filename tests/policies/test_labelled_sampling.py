"""Sampling policies that look at labels: their laws, over unequal shards.

Statistical tests have fixed seeds and a false-alarm rate of 0.001.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from labelled_contents import LABELS, draws

from ritornello import RehearsalBuffer, SamplingPolicy
from ritornello.policies.contents import Contents
from ritornello.policies.names import sampling_policy
from ritornello.policies.sampling import ClassBalancedSampling, UniformSampling
from ritornello.testing import (
    chi_square_p_value,
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, Transport


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
