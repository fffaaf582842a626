"""A buffer that was saved, wherever that is: what can be read of it, and the names in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.policies.contents import Contents
from ritornello.policies.selection import State
from ritornello.records.nesting import Batch
from ritornello.saving.manifest import Manifest

POLICY, CONTENTS = "policy.", "contents."
"""Whose arrays they are, by the beginnings of their names: the selection policy's; and those of the
contents, together with what the sampling policy remembers."""

_OF_CONTENTS = tuple(CONTENTS + name for name in Contents.SAVED)


class SavedShard(Protocol):
    """A shard that can be read again: a file, or a part of a ``state_dict``."""

    def arrays(self) -> Arrays:
        """What was saved beside the representatives."""

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """Some representatives, a piece at a time; see ``ShardFile.rows``."""


class SavedBuffer(Protocol):
    """A whole buffer that can be read again.

    Attributes:
        manifest: what all ranks know of it.
    """

    manifest: Manifest

    def shard(self, rank: int) -> AbstractContextManager[SavedShard]:
        """The shard of a rank, open.

        Raises:
            CheckpointError: it is not there, or not as the manifest says.
        """

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """All representatives of a shard, a piece at a time, checked at the end.

        Raises:
            CheckpointError: at the end: it is damaged.
        """

    def has_been_replaced(self) -> bool:
        """Whether another save has taken its place, so that it cannot be read any more."""
        return False


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


def selection_state(arrays: Arrays) -> State:
    """What a shard's selection policy saved.

    Raises:
        ValueError: one is no list of integers.
    """
    part = {name: each for name, each in arrays.items() if name.startswith(POLICY)}
    return _checked(part, POLICY, np.int64)


def contents_state(arrays: Arrays) -> State:
    """What was saved of the contents; nothing if they knew no places.

    Raises:
        ValueError: one is no list of integers.
    """
    part = {name: each for name, each in arrays.items() if name in _OF_CONTENTS}
    return _checked(part, CONTENTS, np.int64)


def sampling_state(arrays: Arrays) -> Arrays:
    """What the sampling policy remembered; nothing if it does not.

    Raises:
        ValueError: one is no list of numbers.
    """
    part = {
        name: each
        for name, each in arrays.items()
        if name.startswith(CONTENTS) and name not in _OF_CONTENTS
    }
    return _checked(part, CONTENTS, np.int64, np.float64)


def selection_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of ``selection_state``, with their names in the shard: copies.

    Raises:
        TypeError: the selection policy gives something else.
    """
    for name, each in state.items():
        if not isinstance(each, np.ndarray) or each.ndim != 1 or each.dtype != np.int64:
            raise TypeError(
                f"the state of the selection policy has {name!r}: it must hold arrays, int64 [n]"
            )
    return {f"{POLICY}{name}": each.copy() for name, each in state.items()}


def contents_arrays(contents: State, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of ``contents_state`` and ``sampling_state``, with their names in the shard.

    Raises:
        TypeError: the sampling policy gives something else.
    """
    for name, each in sampling.items():
        is_list = isinstance(each, np.ndarray) and each.ndim == 1
        if name in Contents.SAVED or not is_list or each.dtype not in (np.int64, np.float64):
            raise TypeError(
                f"the state of the sampling policy has {name!r}: it must hold arrays, int64 or "
                f"float64 [n], with other names than {', '.join(Contents.SAVED)}"
            )
    return {CONTENTS + name: each for name, each in {**contents, **sampling}.items()}


def _checked(part: Arrays, prefix: str, *dtypes: type[np.generic]) -> dict[str, Any]:
    """A part of a shard's arrays, without the beginning of their names."""
    for name, array in part.items():
        if array.dtype not in dtypes or array.ndim != 1:
            kinds = " or ".join(np.dtype(each).name for each in dtypes)
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: it must be {kinds} [n]")
    return {name.removeprefix(prefix): each for name, each in part.items()}


def integers(arrays: Arrays, name: str, num: int) -> Ints:
    """The array of that name.

    Raises:
        ValueError, KeyError: there is none of ``num`` integers.
    """
    array = arrays[name]
    if array.dtype != np.int64 or array.shape != (num,):
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: it must be int64 [{num}]")
    return array


def records_of(arrays: Arrays, name: str, record_bytes: int) -> Bytes:
    """The array of that name.

    Raises:
        ValueError, KeyError: there is none of records.
    """
    array = arrays[name]
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != record_bytes:
        raise ValueError(f"{name} holds no records")
    return array
