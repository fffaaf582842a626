"""Selection policies that let the largest class give way, one candidate after another.

They come to the same sizes as equal shares without computing any: with room for ``s``
representatives, the sizes are those of ``s`` slots dealt one at a time to the class that has
fewest and has offered more. Which of the classes have one more than others is left to chance, on
each rank for itself. So on many ranks the global sizes are less equal than with the policies of
``class_shares``, and a class may by chance be missing where shards have no room for all classes.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.saved_classes import SavedClasses, at_random, check_classes, forget_slots
from ritornello.policies.selection import (
    Assignment,
    SavedShards,
    SelectionPolicy,
    State,
    checked_num_classes,
)


class _LargestClassGivesWay(SelectionPolicy):
    """What these policies have in common: who is where, and which classes are the largest.

    A candidate changes the size of two classes by one, so the set of largest classes is kept up
    to date in constant time. Only when it has become empty are all classes looked at.
    """

    needs_labels = True

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = checked_num_classes(num_classes)

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._numbers: dict[int, int] = {}  # label -> class number, as they appeared
        self._members: list[array[int]] = []  # class number -> its slots
        self._sizes = np.zeros(0, dtype=np.int64)
        self._offered: list[int] = []
        self._num_used = 0
        # The following say something once the shard is full.
        self._largest: list[int] = []
        self._largest_size = 0
        self._has_been_largest: list[bool] = []

    @abstractmethod
    def _replace(self, number: int, u: float, v: float) -> int | None:
        """Decides about a candidate for a full shard.

        Args:
            number: of its class.
            u: uniform random number in [0, 1).
            v: another one.

        Returns:
            Its slot, or None: rejected.
        """

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        rows, slots = [], []
        # Two numbers for each candidate, needed or not: so that they do not shift.
        draws = generator.random((len(labels), 2)).tolist()
        for row, (label, (u, v)) in enumerate(zip(labels.tolist(), draws, strict=True)):
            number = self._numbers.get(label)
            if number is None:
                number = self._add_class(label)
            self._offered[number] += 1
            if self._num_used < self.num_slots:
                slot: int | None = self._num_used
                self._num_used += 1
                self._members[number].append(self._num_used - 1)
                self._sizes[number] += 1
            else:
                if not self._largest:  # the shard has just become full
                    self._find_largest()
                slot = self._replace(number, u, v)
            if slot is not None:
                rows.append(row)
                slots.append(slot)
        return Assignment(np.array(rows, dtype=np.int64), np.array(slots, dtype=np.int64))

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        return {
            "labels": np.array(list(self._numbers), dtype=np.int64),
            "offered": np.array(self._offered, dtype=np.int64),
            "counts": self._sizes.copy(),
            "slots": np.array([slot for of_class in self._members for slot in of_class], np.int64),
            "largest": np.array(self._largest, dtype=np.int64),
            "has_been_largest": np.array(self._has_been_largest, dtype=np.int64),
        }

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        check_classes(state, size)
        sizes, largest = state["counts"], state["largest"]
        flags = state["has_been_largest"]
        if len(flags) != len(sizes) or len(np.unique(largest)) < len(largest):
            raise ValueError("has_been_largest must be of the length of labels, largest differ")
        if len(largest) and (
            size < self.num_slots
            or largest.min() < 0
            or largest.max() >= len(sizes)
            or np.any(sizes[largest] != sizes.max())
        ):
            raise ValueError("largest must be numbers of the largest classes of a full shard")
        self._numbers = {label: i for i, label in enumerate(state["labels"].tolist())}
        ends = sizes.cumsum()
        self._members = [
            array("q", state["slots"][end - count : end].tolist())
            for end, count in zip(ends.tolist(), sizes.tolist(), strict=True)
        ]
        self._sizes, self._offered = sizes.copy(), state["offered"].tolist()
        self._num_used = size
        self._largest, self._largest_size = largest.tolist(), int(sizes.max(initial=0))
        self._has_been_largest = (flags != 0).tolist()

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``. Of the largest classes random ones leave."""
        whole = SavedClasses.merged(saved)
        whole = whole.cut(whole.shares(capacity), at_random(generator))
        were_largest = np.concatenate(
            [state["labels"][state["has_been_largest"] != 0] for state in saved.states]
        )
        own = whole.of_rank(self.rank, self.num_ranks)
        size = len(own.slots)
        self.restore(
            {
                "labels": own.labels,
                "offered": own.offered,
                "counts": own.counts,
                "slots": np.arange(size),
                "largest": np.zeros(0, dtype=np.int64),
                "has_been_largest": (own.lost | np.isin(own.labels, were_largest)).astype(np.int64),
            },
            size,
        )
        return own.owners, own.slots

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. Until the shard is full again, no class gives way."""
        forgotten, kept = forget_slots(state, size, removed)
        forgotten["largest"] = np.zeros(0, dtype=np.int64)
        forgotten["has_been_largest"] = state["has_been_largest"]
        return forgotten, kept

    def _add_class(self, label: int) -> int:
        number = self._numbers[label] = len(self._members)
        self._members.append(array("q"))
        self._sizes = np.append(self._sizes, 0)
        self._offered.append(0)
        self._has_been_largest.append(False)
        return number

    def _find_largest(self) -> None:
        self._largest_size = int(self._sizes.max())
        self._largest = np.flatnonzero(self._sizes == self._largest_size).tolist()
        for number in self._largest:
            self._has_been_largest[number] = True

    def _take_from_largest(self, place: int, number: int, v: float) -> int:
        """Gives a slot of the class at ``place`` of the largest, chosen by ``v``, to another."""
        loser = self._largest[place]
        members = self._members[loser]
        position = int(v * len(members))
        slot = members[position]
        members[position] = members[-1]  # the order says nothing
        members.pop()
        self._members[number].append(slot)
        self._sizes[loser] -= 1
        self._sizes[number] += 1

        self._largest[place] = self._largest[-1]
        self._largest.pop()
        if len(self._members[number]) == self._largest_size:
            self._largest.append(number)
            self._has_been_largest[number] = True
        if not self._largest:
            self._find_largest()
        return slot


class ClassBalancedReservoir(_LargestClassGivesWay):
    """Class-balancing reservoir sampling (CBRS): small classes are stored whole.

    A class is *full* if it is or was one of the largest of a full shard. A candidate of a class
    that is not replaces a random representative of a largest class (which, if several are, is
    chosen at random). A candidate of a full class is admitted with probability ``m / n`` (``m``
    stored of ``n`` offered, itself included) and replaces a random one of its class.

    What is stored: of a class that is not full, everything; of a full one, at any time a uniform
    sample of all that it has offered to this rank, like ``ClassBalanced``. The two differ in
    whom the last odd slots belong to: here that is left to chance, on each rank for itself.

    Source: Chrysakis, Moens, "Online Continual Learning from Imbalanced Data" (ICML 2020),
    Algorithm 1. Fullness counts from when the shard is full: before, the first class to come
    would be the largest at once, and would never grow.

    Args:
        num_classes: if given, labels must be below it.
    """

    def _replace(self, number: int, u: float, v: float) -> int | None:
        if not self._has_been_largest[number]:
            return self._take_from_largest(int(u * len(self._largest)), number, v)
        members, position = self._members[number], int(u * self._offered[number])
        return members[position] if position < len(members) else None


class GraspEviction(_LargestClassGivesWay):
    """Every candidate enters; in a full shard a random one of the largest class leaves.

    The candidate counts as one of its class. So a class that is the largest already replaces its
    own; if several classes are the largest, one of them is chosen at random.

    What is stored: of a class that never was one of the largest of a full shard, everything. Any
    other loses a random one, whatever its age, whenever it gives way to a candidate of its own or
    of another class: so, as with ``PerClassRandom``, the chances of a sample fall with its age.

    Source: Harun et al., "GRASP: A Rehearsal Policy for Efficient Online Continual Learning"
    (CoLLAs 2024), where it keeps the buffer; GRASP itself says what is drawn from it.

    Args:
        num_classes: if given, labels must be below it.
    """

    def _replace(self, number: int, u: float, v: float) -> int | None:
        members = self._members[number]
        # With the candidate its class is larger than, or as large as, the largest ones. A class
        # of which nothing is stored has nothing to give, as the candidate itself stays.
        exceeds = len(members) == self._largest_size
        equals = 0 < len(members) == self._largest_size - 1
        place = int(u * (len(self._largest) + equals))
        if exceeds or place == len(self._largest):
            return members[int(v * len(members))]
        return self._take_from_largest(place, number, v)
