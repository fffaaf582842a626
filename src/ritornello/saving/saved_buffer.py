"""A buffer that was saved, wherever that is: what can be read of it, and the names in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.policies.contents import Contents
from ritornello.policies.selection import State
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch
from ritornello.records.paging import (
    Records,
    leaves_of,
    lengths_of,
    pages_of_records,
    starts_of,
)
from ritornello.saving.manifest import Manifest
from ritornello.saving.shard_file import PIECE_BYTES

POLICY, CONTENTS = "policy.", "contents."
"""Whose arrays they are, by the beginnings of their names: the selection policy's; and those of the
contents, together with what the sampling policy remembers."""

BYTES_IN_PAGES = "bytes_in_pages"
"""The array that says, where samples differ in length, how much of each is in pages."""

STAGED_PAGES = "staged_pages"
"""The array of the pages of what is staged."""

MOST_BYTES_IN_PAGES = 2**40
"""Of a representative."""

_OF_CONTENTS = tuple(CONTENTS + name for name in Contents.SAVED)


class SavedShard(Protocol):
    """A shard that can be read again: a file, or a part of a ``state_dict``."""

    def arrays(self) -> Arrays:
        """What was saved beside the representatives."""

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """Some representatives, a piece at a time; see ``ShardFile.rows``."""

    def pages(self, first: int, num_pages: int) -> Bytes:
        """Some pages, if samples differ in length; see ``ShardFile.pages``."""
        raise ValueError(f"there are no pages from {first} to {first + num_pages}")


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
        leaves: the batch field by field.
    """

    slots: Ints
    batch: Batch
    labels: Ints | None
    admitted_in: Ints
    tasks: Ints
    leaves: Sequence[Any] = ()


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
        rows = records.rows
        leaves = leaves_of(layout, rows, records.pages)
        yield SavedRepresentatives(
            at,
            layout.rebuild(leaves),
            None if manifest.label is None else layout.integers(rows, manifest.label),
            admitted_in[at],
            manifest.task_numbers(admitted_in[at]),
            leaves,
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


def _pieces(saved: SavedBuffer, rank: int, slots: Ints | None) -> Iterator[tuple[Ints, Records]]:
    """Slots and copies of their records."""
    if slots is None and saved.manifest.paging is None:
        for at, records in saved.checked_rows(rank):
            yield at, Records(torch.from_numpy(records.copy()))
        return
    if slots is None:
        for _ in saved.checked_rows(rank):
            pass
        slots = np.arange(saved.manifest.held_per_rank[rank])
    wanted = np.asarray(slots, dtype=np.int64)
    for positions, found in records_in(saved, rank, wanted):
        yield wanted[positions], Records(found.rows.clone(), found.pages)


def records_in(saved: SavedBuffer, rank: int, slots: Ints) -> Iterator[tuple[Ints, Records]]:
    """Reads records of a shard, as many at a time as fit into a piece, one at least.

    Args:
        saved: the buffer.
        rank: whose shard.
        slots: int64 ``[n]``, which of its representatives.

    Yields:
        Positions in ``slots`` (int64 ``[m]``) and the records there, valid until the next ones.

    Raises:
        CheckpointError: they cannot be read.
        ValueError, KeyError: what is saved of their pages contradicts itself.
    """
    layout = saved.manifest.layout
    with saved.shard(rank) as shard:
        if layout is None or layout.paging is None:
            for positions, found in shard.rows(slots):
                yield positions, Records(torch.from_numpy(found))
            return
        counts = num_pages_of(shard.arrays(), saved.manifest, rank, layout.paging.page_bytes)
        starts = counts.cumsum() - counts
        most = max(1, PIECE_BYTES // layout.paging.page_bytes)
        for positions, found in shard.rows(slots):
            check_lengths(layout, found, layout.paging.page_bytes, counts[slots[positions]])
            ends, first = counts[slots[positions]].cumsum(), 0
            while first < len(positions):
                before = int(ends[first - 1]) if first else 0
                end = max(first + 1, int(ends.searchsorted(before + most, side="right")))
                part = slots[positions[first:end]]
                pages = [
                    shard.pages(start, num)
                    for start, num in zip(starts[part].tolist(), counts[part].tolist(), strict=True)
                ]
                if any(each.shape[1] != layout.paging.page_bytes for each in pages):
                    raise ValueError(f"its pages have not {layout.paging.page_bytes} bytes")
                rows = np.ascontiguousarray(found[first:end]).copy()
                starts_of(layout, rows)[:] = counts[part].cumsum() - counts[part]
                yield (
                    positions[first:end],
                    Records(torch.from_numpy(rows), torch.from_numpy(np.concatenate(pages))),
                )
                first = end


def num_pages_of(arrays: Arrays, manifest: Manifest, rank: int, page_bytes: int) -> Ints:
    """How many pages of some size the representatives of a shard need, int64 ``[num_held]``.

    Raises:
        ValueError, KeyError: it is not said, or cannot be.
    """
    num_bytes = integers(arrays, BYTES_IN_PAGES, manifest.held_per_rank[rank])
    if num_bytes.min(initial=0) < 0 or num_bytes.max(initial=0) > MOST_BYTES_IN_PAGES:
        raise ValueError(f"{BYTES_IN_PAGES} must be from 0 to {MOST_BYTES_IN_PAGES}")
    counts: Ints = -(-num_bytes // page_bytes)
    return counts


def check_lengths(layout: Layout, rows: Bytes, page_bytes: int, counts: Ints | int) -> None:
    """Checks that records have the pages that are said to be theirs, each or together.

    Raises:
        ValueError: they have others.
    """
    for position in layout.ragged:
        lengths = lengths_of(layout, rows, position)
        most = MOST_BYTES_IN_PAGES // max(1, layout.fields[position].bytes_per_length)
        if lengths.min(initial=0) < 0 or lengths.max(initial=0) > most:
            raise ValueError(f"{layout.fields[position]} of a length that cannot be")
    found = pages_of_records(layout, rows, page_bytes)
    if not np.array_equal(found if isinstance(counts, np.ndarray) else found.sum(), counts):
        raise ValueError("lengths and pages of records contradict each other")


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
