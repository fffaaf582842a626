"""The pages of a shard: how many there are, which are free, and which representative has which."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ritornello.arrays import Ints
from ritornello.records.shard import Shard, rows_per_rank

PLACES_PER_ROW = 2
"""Of the table, which has a row for each page."""

TABLE_BYTES = 8 * PLACES_PER_ROW

LEAST_PAGE_BYTES = 64

PAGES_FOR_EACH = 32
"""Of large representatives: half a page is then 1.6 % of one."""

MOST_PAGE_BYTES = 2**16
"""Larger ones are moved no faster."""

START_BYTES = LENGTH_BYTES = 8

ALIGNMENT = 16
"""Of each ragged field in the pages: so any dtype can be viewed there."""


@dataclass(frozen=True)
class Paging:
    """The pages of all shards.

    Attributes:
        page_bytes: of each.
        num_pages: in all shards.
        num_ranks: how many shards there are.
        capacity_bytes: that set the bound.
    """

    page_bytes: int
    num_pages: int
    num_ranks: int
    capacity_bytes: int

    @classmethod
    def within(
        cls, capacity_bytes: int, capacity: int, record_bytes: int, num_ranks: int
    ) -> Paging:
        """As many as there is room for beside the rows.

        A representative wastes half a page, and costs a place in the table for each. The sum is
        least at ``sqrt(2 * TABLE_BYTES * bytes)``; but larger pages are moved faster, so that they
        may be a part of a representative that costs little.

        Args:
            capacity_bytes: of all shards.
            capacity: representatives.
            record_bytes: of each row.
            num_ranks: how many shards there are.

        Raises:
            ValueError: there is no room.
        """
        room = capacity_bytes - capacity * record_bytes
        bytes_for_each = max(1, room) / capacity
        best = max(math.sqrt(2 * TABLE_BYTES * bytes_for_each), bytes_for_each / PAGES_FOR_EACH)
        page_bytes = math.ceil(best / LEAST_PAGE_BYTES) * LEAST_PAGE_BYTES
        page_bytes = min(page_bytes, MOST_PAGE_BYTES)
        num_pages = max(0, room) // (page_bytes + TABLE_BYTES)
        if num_pages < num_ranks:
            raise ValueError(
                f"capacity_bytes={capacity_bytes}: what has a fixed size takes {record_bytes} "
                f"bytes of each of the {capacity} representatives of capacity={capacity}, "
                f"{capacity * record_bytes:,} in all, and leaves no room for the rest: raise "
                "capacity_bytes, or lower the capacity"
            )
        return cls(page_bytes, num_pages, num_ranks, capacity_bytes)

    @property
    def pages_per_rank(self) -> Ints:
        """int64 ``[num_ranks]``."""
        return rows_per_rank(self.num_pages, self.num_ranks)

    @property
    def most_bytes(self) -> int:
        """The most that the ragged fields of one sample may have, on every rank."""
        return self.num_pages // self.num_ranks * self.page_bytes


def aligned(num_bytes: Ints) -> Ints:
    """With what is needed for the next one to be aligned."""
    rounded: Ints = num_bytes + (ALIGNMENT - 1) & -ALIGNMENT
    return rounded


def expanded(starts: Ints, counts: Ints) -> Ints:
    """The numbers from each start on, as many as its count says, one after the other."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(total)
    numbers += np.repeat(starts - (ends - counts), counts)
    return numbers


class Pages:
    """The pages of one rank's shard. Only the owner's worker writes them.

    A representative's pages lie anywhere, so that no room is lost between them; the *table* says
    where, in one run of places for each. When the table is used up, its runs are moved together:
    it has two places for each page, so that happens after as many pages have come as there are, at
    least.

    Args:
        shard: the pages, as rows.
        table: rows of 16 bytes, as many.
        num_slots: of the shard.

    Attributes:
        shard: the pages, as rows.
        table: see above.
        starts: int64 ``[num_slots]``, where in the table each slot's run begins.
        counts: int64 ``[num_slots]``, how many pages it has.
        num_moves: how often the runs were moved together.
    """

    def __init__(self, shard: Shard, table: Shard, num_slots: int) -> None:
        self.shard, self.table = shard, table
        num_pages = len(shard.rows)
        self._numbers = table.words
        self.starts, self.counts = np.zeros((2, num_slots), dtype=np.int64)
        self._free = np.arange(num_pages)[::-1].copy()
        self._num_free = num_pages
        self._end = 0
        self.num_moves = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, and of the table."""
        return self.shard.num_bytes + self.table.num_bytes

    @property
    def num_used(self) -> int:
        """Pages that are not free."""
        return len(self._free) - self._num_free

    def at(self, places: Ints) -> Ints:
        """The pages at some places of the table."""
        found: Ints = self._numbers[places]
        return found

    def of_slots(self, slots: Ints) -> Ints:
        """The pages of some slots, one slot after the other."""
        return self.at(self.places_of(slots))

    def places_of(self, slots: Ints) -> Ints:
        """The places in the table of some slots, one slot after the other."""
        return expanded(self.starts[slots], self.counts[slots])

    def give_back(self, slots: Ints) -> None:
        """Frees the pages of some slots."""
        freed = self.of_slots(slots)
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)
        self.counts[slots] = 0

    def move(self, slots: Ints, to: Ints) -> None:
        """Says that what was in some slots is in others now."""
        starts, counts = self.starts[slots], self.counts[slots]
        self.counts[slots] = 0
        self.starts[to], self.counts[to] = starts, counts

    def take(self, slots: Ints, counts: Ints) -> Ints:
        """Takes pages for some slots that have none, as many as are free at most.

        Returns:
            int64 ``[counts.sum()]``, which, one slot after the other.
        """
        total = int(counts.sum())
        assert total <= self._num_free
        if self._end + total > len(self._numbers):
            self._move_together()
        taken = self._free[self._num_free - total : self._num_free].copy()
        self._num_free -= total
        self.counts[slots] = counts
        self.starts[slots] = self._end + counts.cumsum() - counts
        self._numbers[self._end : self._end + total] = taken
        self._end += total
        return taken

    def _move_together(self) -> None:
        used = np.flatnonzero(self.counts)
        numbers, counts = self.of_slots(used), self.counts[used]
        self.starts[used] = counts.cumsum() - counts
        self._numbers[: len(numbers)] = numbers
        self._end = len(numbers)
        self.num_moves += 1
