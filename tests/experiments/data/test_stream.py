"""Which samples come when, and on which rank."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.experiments.data.data_set import InMemoryImages
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.data.stream import (
    TaskImages,
    load_batches,
    positions_of_pass,
    steps_per_pass,
)


def images_of(num_samples: int) -> InMemoryImages:
    """Each image holds its own index."""
    numbers = np.arange(num_samples, dtype=np.uint8)
    return InMemoryImages(numbers[:, None, None, None].copy(), numbers.astype(np.int64) % 3)


def plus(amount: int, images: torch.Tensor) -> torch.Tensor:
    return images + amount


def task_of(train: list[int], test: list[int], shift: int = 0) -> Task:
    view = partial(plus, shift) if shift else None
    return Task("", (0,), np.array(train), np.array(test), view)


def test_samples_are_seen_as_their_task_sees_them() -> None:
    tasks = [task_of([3, 5], [1]), task_of([4, 3, 7], [2], shift=100)]
    stream = TaskImages(images_of(10), tasks)
    assert len(stream) == 5
    assert stream.labels.tolist() == [0, 2, 1, 0, 1]
    images, labels = stream.__getitems__([4, 0, 3, 1, 2])
    assert images.flatten().tolist() == [107, 3, 103, 5, 104]
    assert labels.tolist() == [1, 0, 0, 2, 1]
    testing = TaskImages(images_of(10), tasks, testing=True)
    assert testing.__getitems__([0, 1])[0].flatten().tolist() == [1, 102]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_ranks_split_the_same_global_mini_batches(
    num_samples: int, size: int, num_ranks: int, key: int
) -> None:
    if num_samples < size:
        return
    alone = positions_of_pass(num_samples, size, (key, 0), 0, 1)
    ranks = [
        positions_of_pass(num_samples, size, (key, 0), rank, num_ranks) for rank in range(num_ranks)
    ]
    assert len(alone) == steps_per_pass(num_samples, size) == num_samples // size
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert np.array_equal(np.concatenate(parts), whole)
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        # The first ranks have one more, as GlobalSizes takes for granted.
        assert lengths == sorted(lengths, reverse=True)
    everything = np.concatenate(alone)
    assert len(set(everything.tolist())) == len(everything)


def test_passes_are_shuffled_by_their_key() -> None:
    first, again, other = (positions_of_pass(30, 10, key, 0, 1) for key in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_task_smaller_than_a_mini_batch() -> None:
    with pytest.raises(ValueError, match="fewer than global_batch_size=16: take a smaller one"):
        steps_per_pass(15, 16)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_with_and_without_workers(num_workers: int) -> None:
    stream = TaskImages(images_of(10), [task_of([3, 5, 8], [], shift=1)])
    positions = [np.array([2, 0]), np.array([1])]
    loaded = list(load_batches(stream, positions, num_workers, torch.device("cpu")))
    assert [images.flatten().tolist() for images, _, _ in loaded] == [[9, 4], [6]]
