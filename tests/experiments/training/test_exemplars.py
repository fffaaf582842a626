"""What the buffer gets at a task's end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import RehearsalBuffer
from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import class_incremental
from ritornello.experiments.data.stream import TaskImages
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.training import exemplars
from ritornello.testing import run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

pytestmark = pytest.mark.usefixtures("forked_ranks")

LABELS = np.array([4, 7, 4, 4, 7, 4])


def features_of(classes: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Class 4 has its mean direction at positions 2 and 3, class 7 at position 4."""
    for positions in classes:
        angles = torch.tensor([0.9, 0.8, 0.5, 0.5, 0.1, 0.1])[torch.from_numpy(positions)]
        yield torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("how", exemplars.CHOICES)
def test_exemplars_of_every_class(how: str) -> None:
    chosen = exemplars.choose(how, LABELS, 2, np.random.default_rng(0), features_of)
    assert sorted(chosen) == [4, 7]
    for label, positions in chosen.items():
        assert len(set(positions.tolist())) == 2
        assert (LABELS[positions] == label).all()
    if how == "closest-to-mean":
        assert chosen[4].tolist() == [2, 3]
    if how == "herding":
        assert chosen[4][0] == 2


def test_random_exemplars_need_no_features() -> None:
    def never(classes: list[np.ndarray]) -> Iterator[torch.Tensor]:
        raise AssertionError

    chosen = exemplars.choose("random", LABELS, 2, np.random.default_rng(0), never)
    assert [len(positions) for positions in chosen.values()] == [2, 2]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_ranks_together_store_what_one_would(num_ranks: int) -> None:
    """And keep what is most important, when classes that come later take their shares."""
    digits = load("digits")
    tasks = class_incremental(digits, 5)
    kept: list[Any] = []

    def rank_main(transport: Transport) -> list[bytes]:
        buffer = RehearsalBuffer(
            60, num_representatives=2, selection="first-offered", transport=transport
        )
        place = Place(transport.rank, num_ranks, torch.device("cpu"))
        for number, task in enumerate(tasks):
            images = TaskImages(digits.train, [task])
            num_per_class = 60 // (2 * (number + 1))
            chosen = exemplars.choose(
                "random", images.labels, num_per_class, np.random.default_rng(number), features_of
            )
            if transport.rank == 0:
                # By the end each class has six: its first ones.
                kept.extend(
                    images.__getitems__(positions[:6].tolist())[0] for positions in chosen.values()
                )
            hands = exemplars.deal(chosen, num_ranks)
            exemplars.store(buffer, images, hands, place, num_workers=0)
        stored = [
            image.numpy().tobytes() for images, _ in buffer.representatives() for image in images
        ]
        buffer.close()
        return stored

    everyone = run_ranks(LocalTransport.connect(num_ranks), rank_main)
    stored = [image for of_rank in everyone for image in of_rank]
    expected = [image.numpy().tobytes() for images in kept for image in images]
    assert sorted(stored) == sorted(expected)


def rank_main(rank: int, num_ranks: int) -> list[torch.Tensor]:
    images = TaskImages(load("digits").train, class_incremental(load("digits"), 5)[:1])
    classes = [np.array([5, 1, 9, 2, 30, 31, 8]), np.array([3]), np.arange(40, 46)]
    return list(
        exemplars.features_over_ranks(
            classes,
            images,
            lambda batch: batch.float().flatten(1)[:, :20],
            Place(rank, num_ranks, torch.device("cpu")),
            num_workers=0,
        )
    )


def test_features_are_computed_in_parts_and_gathered() -> None:
    alone = rank_main(0, 1)
    assert [list(each.shape) for each in alone] == [[7, 20], [1, 20], [6, 20]]
    for gathered in spawn_ranks(3, rank_main, 3):
        assert all(torch.equal(a, b) for a, b in zip(gathered, alone, strict=True))  # type: ignore[arg-type]
