"""What the buffer's speed is measured with: samples of usual sizes, and full buffers of them.

And the copies that any buffer has to make, plainly, on the same sizes: the floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.buffer import RehearsalBuffer


@dataclass(frozen=True)
class Workload:
    """Sizes per rank and step."""

    name: str
    shape: tuple[int, ...]
    """The shape of one image; each has an int64 label beside it."""
    dtype: torch.dtype
    batch_size: int
    num_candidates: int
    num_representatives: int
    rows_per_rank: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """A mini-batch of ten classes, another one on each rank."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        images = torch.full((self.batch_size, *self.shape), rank % 256, dtype=self.dtype)
        return images, torch.arange(self.batch_size) % 10


WORKLOADS = {
    each.name: each
    for each in (
        Workload("imagenet-uint8", (3, 224, 224), torch.uint8, 56, 14, 7, 2000),
        Workload("imagenet-float32", (3, 224, 224), torch.float32, 56, 14, 7, 1000),
        Workload("cifar", (3, 32, 32), torch.uint8, 128, 16, 16, 10_000),
        Workload("mnist", (1, 28, 28), torch.uint8, 128, 32, 32, 10_000),
        Workload("bulk", (3, 32, 32), torch.uint8, 128, 32, 512, 10_000),
    )
}


@contextmanager
def filled_buffer(
    workload: Workload, transport: str, selection: str = "per-class-random"
) -> Iterator[RehearsalBuffer]:
    """A full buffer.

    Args:
        workload: sizes.
        transport: by its name.
        selection: the policy; that of the paper stores every candidate.
    """
    capacity = workload.rows_per_rank * num_ranks()
    with RehearsalBuffer(
        capacity,
        num_representatives=workload.num_representatives,
        num_candidates=workload.num_candidates,
        selection=selection,
        transport=transport,
        timeout_seconds=120.0,
    ) as buffer:
        images, labels = replace(workload, batch_size=1).batch()[0], torch.arange(512) % 10
        while len(buffer) < capacity:
            buffer.draw()
            buffer.offer((images.expand(512, *workload.shape), labels))
        yield buffer


class PlainRound:
    """Gathers r and scatters c random rows of an array of the shard's size, with NumPy."""

    def __init__(self, workload: Workload) -> None:
        elements = int(np.prod(workload.shape)) * workload.dtype.itemsize + 8
        self._shard = np.ones((workload.rows_per_rank, -(-elements // 16) * 2), dtype=np.int64)
        self._out = np.ones_like(self._shard[: workload.num_representatives])
        self._source = np.ones_like(self._shard[: workload.num_candidates])
        self._random = np.random.default_rng(0)

    def choose(self) -> None:
        """Draws the rows of the next time, which is no part of the copy."""
        self._reads = self._random.permutation(len(self._shard))[: len(self._out)]
        self._writes = self._random.permutation(len(self._shard))[: len(self._source)]

    def copy(self) -> None:
        """Copies those rows."""
        np.take(self._shard, self._reads, axis=0, out=self._out, mode="clip")
        self._shard[self._writes] = self._source


class PlainUpdate:
    """What ``update`` copies on the trainer's thread, field by field, into memory that is kept."""

    def __init__(self, workload: Workload) -> None:
        self._batch = workload.batch()
        past = [leaf[:1] for leaf in self._batch]
        self._past = [
            leaf.expand(workload.num_representatives, *leaf.shape[1:]).clone() for leaf in past
        ]
        self._joined = [torch.cat(pair) for pair in zip(self._batch, self._past, strict=True)]
        rows = np.random.default_rng(0).permutation(workload.batch_size)
        self._rows = np.sort(rows[: workload.num_candidates])
        self._candidates = [leaf[torch.from_numpy(self._rows)].numpy() for leaf in self._batch]

    def join(self) -> None:
        """``torch.cat`` of a mini-batch and r samples."""
        for leaf, past, joined in zip(self._batch, self._past, self._joined, strict=True):
            torch.cat((leaf, past), out=joined)

    def copy(self) -> None:
        """Gathers c rows out of the mini-batch."""
        for leaf, candidates in zip(self._batch, self._candidates, strict=True):
            np.take(leaf.numpy(), self._rows, axis=0, out=candidates, mode="clip")


def num_ranks() -> int:
    """That measure together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def everybodys(mine: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
