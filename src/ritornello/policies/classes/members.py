"""Which slots of a shard hold which class: look up, append and drop, by whole arrays."""

from __future__ import annotations

import numpy as np

from ritornello.arrays import Bools, Ints


class ClassMembers:
    """For every class, a list of the slots of its representatives, in the order of appending.

    Dropping random entries disturbs the order of those that stay.

    All classes' lists lie in one array, each with room to grow; when one is full, all are laid
    out anew. Costs depend on the entries touched, not on how many there are.

    Attributes:
        counts: int64 ``[num_classes]``, representatives of each class.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(0, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)
        self._rooms = np.zeros(0, dtype=np.int64)
        self._slots = np.zeros(0, dtype=np.int64)

    def add_classes(self, num_classes: int) -> None:
        """Adds empty classes behind the existing ones."""
        nothing = np.zeros(num_classes, dtype=np.int64)
        self.counts = np.concatenate([self.counts, nothing])
        self._starts = np.concatenate([self._starts, nothing])
        self._rooms = np.concatenate([self._rooms, nothing])

    def keep_classes(self, kept: Bools) -> None:
        """Drops all classes but those, bool ``[num_classes]``; they keep their order."""
        self.counts, self._starts, self._rooms = (
            each[kept] for each in (self.counts, self._starts, self._rooms)
        )

    def slots(self, classes: Ints, positions: Ints) -> Ints:
        """The slots at ``positions`` of the lists of ``classes``; both int64 ``[n]``."""
        slots: Ints = self._slots[self._starts[classes] + positions]
        return slots

    def append(self, classes: Ints, slots: Ints) -> None:
        """Appends ``slots`` to the lists of ``classes``; both int64 ``[n]``, classes ascending."""
        if len(classes) == 0:
            return
        growing, firsts, added = np.unique(classes, return_index=True, return_counts=True)
        if np.any(self.counts[growing] + added > self._rooms[growing]):
            self._lay_out(growing, added)
        positions = self.counts[classes] + np.arange(len(classes)) - np.repeat(firsts, added)
        self._slots[self._starts[classes] + positions] = slots
        self.counts[growing] += added

    def drop(
        self,
        classes: Ints,
        num_dropped: Ints,
        generator: np.random.Generator,
    ) -> Ints:
        """Takes random entries out of the lists of some classes.

        Args:
            classes: int64 ``[n]``, distinct.
            num_dropped: int64 ``[n]``, how many of each; at most what it has.
            generator: chooses; every set of entries of a class is equally likely.

        Returns:
            The slots taken out.
        """
        if len(classes) == 0:
            return np.zeros(0, dtype=np.int64)
        owners, victims = distinct_positions(self.counts[classes], num_dropped, generator)
        starts = self._starts[classes]
        dropped: Ints = self._slots[starts[owners] + victims]
        # The last `num_dropped` entries of each list that survive move into the gaps below.
        remaining = self.counts[classes] - num_dropped
        tail_owners, tail = _ranges(remaining, num_dropped)
        stride = int(self.counts[classes].max()) + 1
        is_victim = np.isin(tail_owners * stride + tail, owners * stride + victims)
        gap = victims < remaining[owners]
        source = (starts[tail_owners] + tail)[~is_victim]
        self._slots[(starts[owners] + victims)[gap]] = self._slots[source]
        self.counts[classes] = remaining
        return dropped

    def drop_last(self, classes: Ints, num_dropped: Ints) -> Ints:
        """Takes the last entries off the lists of some classes; the others keep their order.

        Args:
            classes: int64 ``[n]``, distinct.
            num_dropped: int64 ``[n]``, how many of each; at most what it has.

        Returns:
            The slots taken out.
        """
        remaining = self.counts[classes] - num_dropped
        owners, positions = _ranges(remaining, num_dropped)
        dropped = self.slots(classes[owners], positions)
        self.counts[classes] = remaining
        return dropped

    def _lay_out(self, growing: Ints, added: Ints) -> None:
        """Lays all lists out anew, with room for as much again as they will hold."""
        rooms = self.counts.copy()
        rooms[growing] += added
        rooms = np.maximum(4, 2 * rooms)
        starts = np.cumsum(rooms) - rooms
        owners, positions = _ranges(np.zeros_like(self.counts), self.counts)
        slots = np.zeros(int(rooms.sum()), dtype=np.int64)
        slots[starts[owners] + positions] = self._slots[self._starts[owners] + positions]
        self._starts, self._rooms, self._slots = starts, rooms, slots


def _ranges(firsts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Ranges one after another: which range each element is of, and its value."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return owners, firsts[owners] + np.arange(len(owners)) - starts[owners]


def distinct_positions(
    counts: Ints, wanted: Ints, generator: np.random.Generator
) -> tuple[Ints, Ints]:
    """``wanted[i]`` distinct random positions below ``counts[i]``, for all i; sorted.

    Draws with replacement and draws again what came twice: the first distinct values of a
    uniform sequence are a uniform sample without replacement.
    """
    owners = np.repeat(np.arange(len(counts)), wanted)
    stride = int(counts.max()) + 1
    missing, keys = owners, np.zeros(0, dtype=np.int64)
    while len(missing):
        drawn = generator.integers(counts[missing])
        keys = np.union1d(keys, missing * stride + drawn)
        found = np.bincount(keys // stride, minlength=len(counts))
        missing = np.repeat(np.arange(len(counts)), wanted - found)
    return keys // stride, keys % stride
