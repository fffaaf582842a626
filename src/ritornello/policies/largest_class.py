"""Selection policies that let the largest class give way, one candidate after another.

They come to the same sizes as equal shares without computing any: with room for ``s``
representatives, the sizes are those of ``s`` slots dealt one at a time to the class that has
fewest and has offered more. Which of the classes have one more than others is left to chance, on
each rank for itself. So on many ranks the global sizes are less equal than with the policies of
``class_shares``. Where every slot has a class of its own, classes of a lower precedence replace
those of the highest, as there (see ``classes.scores``).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.classes.saved_largest import KeepsLargest
from ritornello.policies.selection import Assignment


class _LargestClassGivesWay(KeepsLargest):
    """What these policies have in common: who is where, and which classes are the largest.

    A candidate changes the size of two classes by one, so the set of largest classes is kept up
    to date in constant time. Only when it has become empty are all classes looked at.
    """

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

    @abstractmethod
    def _wants_its_first(self, number: int) -> bool:
        """Whether a class has nothing, and would have a slot in a full shard."""

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        rows, slots = [], []
        # Two numbers for each candidate, needed or not: so that they do not shift.
        draws = generator.random((len(labels), 2)).tolist()
        order = self._precedence(labels).tolist() if self._is_crowded else [None] * len(labels)
        for row, (label, own, (u, v)) in enumerate(zip(labels.tolist(), order, draws, strict=True)):
            slot = self._slot_of(label, own, u, v)
            if slot is not None:
                rows.append(row)
                slots.append(slot)
        return Assignment(np.array(rows, dtype=np.int64), np.array(slots, dtype=np.int64))

    def _slot_of(self, label: int, order: int | None, u: float, v: float) -> int | None:
        """Where a candidate goes; None: nowhere. ``order`` is its precedence, if known."""
        number = self._numbers.get(label)
        is_full = self._num_used == self.num_slots
        if is_full and not self._largest:  # it has just become so
            self._find_largest()
        if self._is_crowded and (number is None or self._wants_its_first(number)):
            return self._replace_last(label, order)
        if number is None:
            number = self._add_class(label)
        self._offered[number] += 1
        if is_full:
            return self._replace(number, u, v)
        slot = self._num_used
        self._num_used += 1
        self._members[number].append(slot)
        self._sizes[number] += 1
        return slot

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

    With more classes than slots each slot is of another class, see ``ClassBalanced``.

    Args:
        num_classes: if given, labels must be below it.
    """

    def _replace(self, number: int, u: float, v: float) -> int | None:
        if not self._has_been_largest[number]:
            return self._take_from_largest(int(u * len(self._largest)), number, v)
        members, position = self._members[number], int(u * self._offered[number])
        return members[position] if position < len(members) else None

    def _wants_its_first(self, number: int) -> bool:
        return not self._has_been_largest[number]


class GraspEviction(_LargestClassGivesWay):
    """Every candidate enters; in a full shard a random one of the largest class leaves.

    The candidate counts as one of its class. So a class that is the largest already replaces its
    own; if several classes are the largest, one of them is chosen at random.

    What is stored: of a class that never was one of the largest of a full shard, everything. Any
    other loses a random one, whatever its age, whenever it gives way to a candidate of its own or
    of another class: so, as with ``PerClassRandom``, the chances of a sample fall with its age.

    Source: Harun et al., "GRASP: A Rehearsal Policy for Efficient Online Continual Learning"
    (CoLLAs 2024), where it keeps the buffer; GRASP itself says what is drawn from it.

    With more classes than slots each slot is of another class, see ``ClassBalanced``.

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

    def _wants_its_first(self, number: int) -> bool:
        return not self._members[number]
