"""A stream of tasks for the tests of saving, and buffers that run on it with ranks as threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ritornello import RehearsalBuffer
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

Augmented = list[tuple[Tensor, Tensor]]

STEPS_PER_TASK = 20


def batch_of(step: int, rank: int, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    """A mini-batch whose samples all differ; each task brings two new classes."""
    numbers = (step * 64 + rank) * 64 + torch.arange(batch_size)
    generator = torch.Generator().manual_seed(step * 64 + rank)
    labels = torch.randint(0, 3, (batch_size,), generator=generator)
    return numbers, labels + 2 * (step // STEPS_PER_TASK)


def make(end: Transport, capacity: int = 97, **arguments: Any) -> RehearsalBuffer:
    """A buffer; a policy that is an object is given by what makes it, as each needs its own."""
    given = {"num_representatives": 5, "num_candidates": 4, "seed": 3, **arguments}
    if callable(given.get("selection")):
        given["selection"] = given["selection"]()
    return RehearsalBuffer(capacity, transport=end, **given)


def run_on(buffer: RehearsalBuffer, rank: int, steps: range) -> Augmented:
    return [buffer.update(batch_of(step, rank)) for step in steps]


def on_ranks(num_ranks: int, rank_main: Callable[[Transport], Any]) -> list[Any]:
    return run_ranks(LocalTransport.connect(num_ranks, 30.0), rank_main)


def held(buffer: RehearsalBuffer) -> list[tuple[int, int]]:
    """This rank's representatives: number and label."""
    return [
        (int(number), int(label))
        for numbers, labels in buffer.representatives()
        for number, label in zip(numbers, labels, strict=True)
    ]


def saved_after(
    folder: Path, num_ranks: int, num_steps: int, capacity: int = 97, **arguments: Any
) -> list[tuple[int, int]]:
    """Saves a buffer after some steps; what all ranks held."""

    def rank_main(end: Transport) -> list[tuple[int, int]]:
        with make(end, capacity, **arguments) as buffer:
            run_on(buffer, end.rank, range(num_steps))
            buffer.save(folder)
            return held(buffer)

    return joined(on_ranks(num_ranks, rank_main))


def loaded_on(
    folder: Path, num_ranks: int, capacity: int = 97, **arguments: Any
) -> list[list[tuple[int, int]]]:
    """What each of some ranks holds after it has loaded."""

    def rank_main(end: Transport) -> list[tuple[int, int]]:
        with make(end, capacity, **arguments) as buffer:
            buffer.load(folder)
            return held(buffer)

    return on_ranks(num_ranks, rank_main)


def assert_same(ours: Augmented, theirs: Augmented) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def counts_of(labels: list[int]) -> Mapping[int, int]:
    return {label: labels.count(label) for label in sorted(set(labels))}
