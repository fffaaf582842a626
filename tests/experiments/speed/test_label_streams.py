from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ritornello import RehearsalBuffer
from ritornello.experiments.speed.label_streams import LabelStream, fill
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport


def stream(**changes: Any) -> LabelStream:
    settings: dict[str, Any] = {"classes": 10, "samples_per_class": 60, "tasks": 5, "seed": 1}
    return LabelStream(**(settings | changes))


@pytest.mark.parametrize("skew", [None, 0.3])
def test_every_sample_goes_to_one_rank_in_each_epoch(skew: float | None) -> None:
    epochs = list(stream(epochs=2, skew=skew).epochs_of(4))
    assert len(epochs) == 10
    for task, labels in enumerate(stream().task_labels()):
        first, second = epochs[2 * task : 2 * task + 2]
        assert len(np.unique(labels)) == 2
        for epoch in (first, second):
            assert sorted(np.concatenate(epoch)) == sorted(labels)
        for mine, again in zip(first, second, strict=True):
            assert sorted(mine) == sorted(again)
        assert any(not np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_a_small_concentration_makes_ranks_unequal() -> None:
    even = [len(labels) for labels in next(stream().epochs_of(4))]
    skewed = [len(labels) for labels in next(stream(skew=0.1).epochs_of(4))]
    assert max(even) - min(even) <= 1
    assert max(skewed) > 2 * min(skewed)


def test_imbalance_is_between_the_largest_and_the_smallest_class() -> None:
    sizes = np.bincount(np.concatenate(stream(imbalance=6.0).task_labels()))
    assert sizes.max() == 60
    assert sizes.min() == 10
    assert np.all(np.diff(sizes) < 0)


def test_growth_of_training_from_scratch() -> None:
    assert stream(tasks=4, classes=8).growth() == (1 + 2 + 3 + 4) / 4
    assert stream(tasks=1).growth() == 1


@pytest.mark.parametrize("num_candidates", [None, 5])
def test_virtual_ranks_store_what_real_ranks_store(num_candidates: int | None) -> None:
    labels_seen = stream(skew=0.5)
    arguments: dict[str, Any] = {"num_candidates": num_candidates, "seed": 3}
    filled = fill(
        labels_seen, 3, capacity=100, batch_size=8, selection="class-balanced", **arguments
    )

    def rank_main(transport: Transport) -> list[int]:
        buffer = RehearsalBuffer(
            100,
            num_representatives=2,
            label=0,
            transport=transport,
            asynchronous=False,
            **arguments,
        )
        with buffer:
            for parts in labels_seen.epochs_of(3):
                for first in range(0, max(map(len, parts)), 8):
                    labels = torch.from_numpy(parts[transport.rank][first : first + 8].copy())
                    buffer.update((labels,))
            held = buffer.stats().held_per_class
            return [held.get(label, 0) for label in range(10)]

    held = run_ranks(LocalTransport.connect(3), rank_main)
    assert filled.sizes.tolist() == [sum(each) for each in held]
    shards = np.split(filled.labels, np.cumsum(filled.sizes)[:-1])
    assert [np.bincount(each, minlength=10).tolist() for each in shards] == held


def test_sizes_are_gathered_until_all_shards_are_full() -> None:
    arguments: dict[str, Any] = {"batch_size": 10, "num_candidates": None, "seed": 0}
    filled = fill(stream(), 4, capacity=80, selection="fifo", **arguments)
    assert filled.sizes.tolist() == [20] * 4
    assert filled.num_rounds == 5 * 3
    assert filled.num_gathering_rounds == 2
    never = fill(stream(), 4, capacity=10_000, selection="fifo", **arguments)
    assert never.num_gathering_rounds == never.num_rounds
    assert never.sizes.sum() == 600
