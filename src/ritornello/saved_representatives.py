"""Reading what a saved buffer holds, without a buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ritornello.arrays import Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.nesting import Batch
from ritornello.saved_arrays import Arrays, integers

if TYPE_CHECKING:
    from ritornello.checkpoint import SavedBuffer
    from ritornello.manifest import Manifest


@dataclass(frozen=True)
class SavedRepresentatives:
    """Some representatives of a saved shard.

    Attributes:
        slots: int64 ``[n]``, where in the shard they are.
        batch: they themselves, nested as they were offered; tensors ``[n, ...]``, copies.
        labels: int64 ``[n]``; None if the buffer knew no labels.
        admitted_in: int64 ``[n]``, the rounds in which they were admitted.
        tasks: int64 ``[n]``, positions in ``manifest.tasks``; -1: before the first.
    """

    slots: Ints
    batch: Batch
    labels: Ints | None
    admitted_in: Ints
    tasks: Ints


def read(saved: SavedBuffer, rank: int, slots: Ints | None) -> Iterator[SavedRepresentatives]:
    """Reads a shard piece by piece; see ``SavedFolder.representatives``."""
    manifest = saved.manifest
    num_held = manifest.held_per_rank[rank]
    layout = manifest.layout
    if slots is not None and (slots.min(initial=0) < 0 or slots.max(initial=-1) >= num_held):
        raise IndexError(f"the shard of rank {rank} has the slots from 0 to {num_held - 1}")
    if layout is None:
        return
    admitted_in = admission_rounds(saved, rank)
    for at, records in _pieces(saved, rank, slots):
        rows = torch.from_numpy(records.copy())
        yield SavedRepresentatives(
            at,
            layout.rebuild(layout.views(rows)),
            None if manifest.label is None else layout.integers(rows, manifest.label),
            admitted_in[at],
            manifest.task_numbers(admitted_in[at]),
        )


def admission_rounds(saved: SavedBuffer, rank: int) -> Ints:
    """The rounds in which the representatives of a shard were admitted, int64 ``[num_held]``.

    Raises:
        CheckpointError: the shard is damaged.
    """
    with saved.shard(rank) as shard:
        arrays = shard.arrays()
    try:
        return admission_rounds_of(arrays, saved.manifest, rank)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the shard of rank {rank} is damaged: {error}") from error


def admission_rounds_of(arrays: Arrays, manifest: Manifest, rank: int) -> Ints:
    """The same, out of the shard's arrays.

    Raises:
        ValueError, KeyError: they are not there, or cannot be.
    """
    rounds = integers(arrays, "admitted_in", manifest.held_per_rank[rank])
    if rounds.min(initial=0) < 0 or rounds.max(initial=-1) >= manifest.num_rounds:
        raise ValueError(f"admitted_in must be from 0 to {manifest.num_rounds - 1}")
    return rounds


def _pieces(saved: SavedBuffer, rank: int, slots: Ints | None) -> Iterator[tuple[Ints, Bytes]]:
    """Slots and their records."""
    if slots is None:
        yield from saved.checked_rows(rank)
        return
    wanted = np.asarray(slots, dtype=np.int64)
    with saved.shard(rank) as shard:
        for positions, records in shard.rows(wanted):
            yield wanted[positions], records
