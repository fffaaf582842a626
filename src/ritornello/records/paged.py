"""A shard whose records lie in two parts: rows, and what of them differs in length in pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records.layout import Layout
from ritornello.records.pages import TABLE_BYTES, Pages
from ritornello.records.paging import (
    Records,
    leaves_of,
    pages_of_records,
    repaged,
    starts_of,
)
from ritornello.records.shard import Shard


class PagedShard:
    """Both parts of one rank's records.

    Args:
        layout: of the records.
        shard: their rows.
        pages: and their pages.

    Attributes:
        shard: their rows.
        pages: and their pages.
        before_write: told which pages are about to be overwritten, if anybody wants to know.
    """

    def __init__(self, layout: Layout, shard: Shard, pages: Pages) -> None:
        self._layout, self.shard, self.pages = layout, shard, pages
        self.before_write: Callable[[Ints], None] | None = None

    @property
    def page_bytes(self) -> int:
        """Of each page."""
        return int(self.pages.shard.rows.shape[1])

    @property
    def num_used_bytes(self) -> int:
        """Of the pages that are in use, with their places in the table."""
        return self.pages.num_used * (self.page_bytes + TABLE_BYTES)

    def pages_of(self, rows: Tensor) -> Ints:
        """How many pages some records have, int64 ``[n]``."""
        return pages_of_records(self._layout, rows.numpy(), self.page_bytes)

    def starts_of(self, rows: Tensor) -> Ints:
        """Where the pages of some records begin, int64 ``[n]``: a view, to be written, too."""
        return starts_of(self._layout, rows.numpy())

    def make_room(self, removed: Ints, moved_from: Ints, moved_to: Ints) -> None:
        """Some representatives leave, then some move: all int64, slots.

        Args:
            removed: of those that leave.
            moved_from: of those that move.
            moved_to: where to.
        """
        if len(removed):
            self.pages.give_back(removed)
        if not len(moved_from):
            return
        self.pages.move(moved_from, moved_to)
        moved = torch.empty((len(moved_from), self._layout.record_bytes), dtype=torch.uint8)
        self.shard.gather(moved_from, moved)
        self.shard.write(moved_to, moved, np.arange(len(moved)))

    def clear(self) -> None:
        """Frees the pages of all slots."""
        self.pages = Pages(self.pages.shard, self.pages.table, len(self.pages.counts))

    def write(self, slots: Ints, records: Records, num_held: int) -> None:
        """Writes records to slots that have no pages.

        Args:
            slots: int64 ``[n]``, none twice.
            records: as many, with pages of any size.
            num_held: representatives in the shard then.
        """
        records = repaged(self._layout, records, self.page_bytes)
        rows, pages = records.rows, records.pages
        assert pages is not None
        counts, num_moves = self.pages_of(rows), self.pages.num_moves
        taken = self.pages.take(slots, counts)
        if self.before_write is not None:
            self.before_write(taken)
        ends, starts = counts.cumsum().tolist(), starts_of(self._layout, rows.numpy()).tolist()
        for start, num, end in zip(starts, counts.tolist(), ends, strict=True):
            self.pages.shard.write_run(taken[end - num : end], pages[start : start + num])
        self._write_rows(slots, rows.clone())
        if self.pages.num_moves > num_moves:
            self._write_rows(np.arange(num_held), self.shard.rows[:num_held].clone())

    def _write_rows(self, slots: Ints, rows: Tensor) -> None:
        """Writes rows to slots, with where the pages of these are."""
        starts_of(self._layout, rows.numpy())[:] = self.pages.starts[slots]
        self.shard.write(slots, rows, np.arange(len(slots)))

    def pages_in(self, slots: Ints) -> Tensor:
        """Copies of the pages of some slots, one slot after the other."""
        return self.pages.shard.rows[torch.from_numpy(self.pages.of_slots(slots))]

    def without_starts(self, rows: Tensor) -> Tensor:
        """Copies of rows that do not say where their pages begin."""
        rows = rows.clone()
        self.starts_of(rows)[:] = 0
        return rows

    def num_distinct(self, num_held: int) -> int:
        """How many of the first representatives differ in a field."""
        rows = self.without_starts(self.shard.rows[:num_held])
        found = set[bytes]()
        for slot in range(num_held):
            digest = hashlib.blake2b(rows[slot].numpy().tobytes(), digest_size=16)
            digest.update(self.pages_in(np.array([slot])).numpy().tobytes())
            found.add(digest.digest())
        return len(found)

    def leaves(self, layout: Layout, first: int, num_rows: int) -> list[Any]:
        """Copies of the representatives from a slot on, field by field, for a layout."""
        slots = np.arange(first, first + num_rows)
        rows, counts = self.shard.rows[first : first + num_rows].clone(), self.pages.counts[slots]
        starts_of(self._layout, rows.numpy())[:] = counts.cumsum() - counts
        return leaves_of(layout, rows, self.pages_in(slots))
