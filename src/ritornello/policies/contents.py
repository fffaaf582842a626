"""What all ranks know of the whole buffer's representatives: how many, and of which classes.

Uniform sampling needs the shards' sizes alone. Policies that look at labels, or go by what lies
where, need to know it of every representative on every rank: a round then all-gathers what it has
admitted, 16 bytes for each, and every rank keeps the same list. No sample is among it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np

from ritornello.arrays import Ints

HAS_LEFT, HAS_COME, HAS_MOVED = range(3)
"""What became of a representative, where bytes are bounded; the last one and more: which slot it
had before."""


class Contents:
    """The whole buffer as a sampling policy sees it; the same on every rank.

    A *global index* counts the representatives of all shards, shard after shard. Labels are kept
    by *place*, which counts the rows of all shards, used or not, so that nothing moves while
    shards fill; once all are full, the two are the same.

    Args:
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        rows_per_rank: int64 ``[num_ranks]``, room in each shard, if it is to be known what lies
            where.
        with_labels: whether its labels are to be known, too; else all are as if of one class.

    Attributes:
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        num_held: representatives in the whole buffer.
        knows_places: whether it is known what lies where, not sizes alone.
        knows_labels: whether labels are known.
    """

    SAVED = ("labels", "counts", "places")
    """What ``state`` consists of."""

    def __init__(
        self, sizes: Ints, rows_per_rank: Ints | None = None, *, with_labels: bool = True
    ) -> None:
        self.sizes = sizes
        self.num_held = int(sizes.sum())
        self.knows_places = rows_per_rank is not None
        self.knows_labels = self.knows_places and with_labels
        if rows_per_rank is not None:
            num_places = int(rows_per_rank.sum())
            self._ends = rows_per_rank.cumsum()
            self._starts = self._ends - rows_per_rank
            self._labels = np.full(num_places, -1, dtype=np.int64)
            # Of each class the places of its representatives, in no particular order, and of
            # each place where in that list it stands: so that taking one out is one swap.
            self._members: dict[int, array[int]] = {}
            self._positions = array("q", bytes(8 * num_places))
            self._class_labels: list[int] | None = None

    @property
    def labels(self) -> Ints:
        """int64 ``[num_held]``, by global index.

        Raises:
            TypeError: the sampling policy has not said that it needs labels.
        """
        self._check_knows_labels()
        return self._labels[self.used_places]

    @property
    def used_places(self) -> slice | Ints:
        """The place of each representative, by global index: what picks them out of all places.

        Raises:
            TypeError: the sampling policy has not said that it needs places.
        """
        self._check_knows_places()
        if self.num_held == len(self._labels):
            return slice(None)
        return np.concatenate(
            [
                np.arange(start, start + size)
                for start, size in zip(self._starts, self.sizes, strict=True)
            ]
        )

    @property
    def class_labels(self) -> list[int]:
        """The labels that some representative has, ascending.

        Raises:
            TypeError: see ``labels``.
        """
        self._check_knows_labels()
        if self._class_labels is None:
            self._class_labels = sorted(self._members)
        return self._class_labels

    def counts(self, labels: list[int]) -> Ints:
        """How many representatives each of some classes has; int64, of the length of ``labels``."""
        return np.array([len(self._members.get(label, ())) for label in labels], dtype=np.int64)

    def places(self, label: int) -> Ints:
        """The places of a class's representatives, int64, in the same order on every rank."""
        return np.array(self._members.get(label, ()), dtype=np.int64)

    def places_at(self, labels: list[int], positions: Ints) -> Ints:
        """The places at some positions of classes' lists; one position for each label."""
        members = self._members
        pairs = zip(labels, positions.tolist(), strict=True)
        return np.array([members[label][position] for label, position in pairs], dtype=np.int64)

    def places_of_slots(self, rank: int, slots: Ints) -> Ints:
        """The places of some slots of a rank's shard.

        Raises:
            TypeError: see ``used_places``.
        """
        self._check_knows_places()
        places: Ints = slots + self._starts[rank]
        return places

    def indices(self, places: Ints) -> Ints:
        """The global indices of what lies at some places."""
        if self.num_held == len(self._labels):
            return places
        owners = self._ends.searchsorted(places, side="right")
        firsts = self.sizes.cumsum() - self.sizes
        return places - self._starts[owners] + firsts[owners]

    def resize(self, sizes: Ints) -> None:
        """Says how many representatives each shard holds now."""
        self.sizes = sizes
        self.num_held = int(sizes.sum())

    def admit(self, rank: int, slots: Ints, labels: Ints) -> Ints:
        """Says what a rank has admitted, in that order; both int64 ``[n]``.

        Returns:
            int64 ``[n]``, the places where it is now.
        """
        places = self.places_of_slots(rank, slots)
        # Most replace one of their own class. Of those for one place the last one stays.
        for place, label in zip(places.tolist(), labels.tolist(), strict=True):
            before = int(self._labels[place])
            if before == label:
                continue
            if before >= 0:
                self._take_out(place, before)
            members = self._members.setdefault(label, array("q"))
            if not members:
                self._class_labels = None
            self._positions[place] = len(members)
            members.append(place)
            self._labels[place] = label
        return places

    def change(self, rank: int, changes: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Says what became of a rank's representatives, where bytes are bounded.

        Args:
            rank: whose.
            changes: int64 ``[n, 3]``, see ``Turnover.changes``.

        Returns:
            The places where nothing is now; where those that have moved were, and where they are;
            and where those are that came.
        """
        slots, what, labels = changes.T
        came, moved = what == HAS_COME, what >= HAS_MOVED
        left = self.places_of_slots(rank, slots[what == HAS_LEFT])
        for place in left.tolist():
            self._take_out(place, int(self._labels[place]))
        self._labels[left] = -1
        before = self.places_of_slots(rank, what[moved] - HAS_MOVED)
        after = self.places_of_slots(rank, slots[moved])
        for place, now in zip(before.tolist(), after.tolist(), strict=True):
            self._move(place, now)
        return left, before, after, self.admit(rank, slots[came], labels[came])

    def state(self) -> dict[str, Ints]:
        """All that it knows beside the sizes, to be saved: copies.

        The places of the first class, of the second, and so on, and how many each has.
        """
        lists = self._members.values()
        return {
            "labels": np.array(list(self._members), np.int64),
            "counts": np.array([len(members) for members in lists], np.int64),
            "places": np.array([place for members in lists for place in members], np.int64),
        }

    def restore(self, state: Mapping[str, Ints]) -> None:
        """Goes on from ``state``; sizes and room must be those of the contents that gave it.

        Raises:
            ValueError, KeyError: it contradicts itself or the sizes.
        """
        labels, counts, places = (state[name] for name in self.SAVED)
        used = np.zeros(len(self._labels), dtype=np.bool_)
        used[self.used_places] = True
        if len(labels) != len(counts) or counts.min(initial=1) < 1 or counts.sum() != len(places):
            raise ValueError("counts must be those of the labels, and add up to the places")
        if not np.array_equal(np.sort(places), np.flatnonzero(used)):
            raise ValueError("places must be those of all representatives, once each")
        if len(np.unique(labels)) < len(labels) or labels.min(initial=0) < 0:
            raise ValueError("labels must differ and be at least 0")
        ends = counts.cumsum()
        self._members = {
            label: array("q", places[end - count : end].tolist())
            for label, end, count in zip(
                labels.tolist(), ends.tolist(), counts.tolist(), strict=True
            )
        }
        for label, members in self._members.items():
            for position, place in enumerate(members):
                self._positions[place] = position
                self._labels[place] = label
        self._class_labels = None

    @staticmethod
    def moved(
        state: Mapping[str, Ints], before: Ints, after: Ints, num_places: int
    ) -> dict[str, Ints]:
        """A ``state`` when representatives have moved, and others are gone.

        Args:
            state: from ``state``.
            before: int64 ``[n]``, the places of those that are left.
            after: int64 ``[n]``, where they are now.
            num_places: how many places there are.

        Raises:
            ValueError, KeyError: it contradicts itself or the places.
        """
        labels, counts, places = (state[name] for name in Contents.SAVED)
        if len(labels) != len(counts) or counts.min(initial=0) < 0 or counts.sum() != len(places):
            raise ValueError("counts must be those of the labels, and add up to the places")
        if places.min(initial=0) < 0 or places.max(initial=-1) >= num_places:
            raise ValueError(f"places must be from 0 to {num_places - 1}")
        place_after = np.full(num_places, -1)
        place_after[before] = after
        stays = place_after[places] >= 0
        if stays.sum() != len(before):
            raise ValueError("places must be those of all representatives, once each")
        classes = np.repeat(np.arange(len(labels)), counts)[stays]
        left = np.bincount(classes, minlength=len(labels))
        return {
            "labels": labels[left > 0],
            "counts": left[left > 0],
            "places": place_after[places[stays]],
        }

    def _take_out(self, place: int, label: int) -> None:
        members, position = self._members[label], self._positions[place]
        last = members.pop()
        if not members:  # nothing is remembered of a class that has nothing
            del self._members[label]
            self._class_labels = None
        if last != place:
            members[position] = last
            self._positions[last] = position

    def _move(self, place: int, to: int) -> None:
        label, position = int(self._labels[place]), self._positions[place]
        self._members[label][position] = to
        self._positions[to], self._labels[to], self._labels[place] = position, label, -1

    def _check_knows_labels(self) -> None:
        if not self.knows_labels:
            raise TypeError(
                "labels are only known to sampling policies that say so: give the class "
                "needs_labels = True"
            )

    def _check_knows_places(self) -> None:
        if not self.knows_places:
            raise TypeError(
                "what lies where is only known to sampling policies that say so: give the class "
                "needs_places = True"
            )
