"""Selection policies: who is admitted to a shard, and who is replaced.

A policy sees labels and a random stream, never a sample, and answers with an *assignment*
(candidate -> slot). Each rank has a policy object of its own for its own shard.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ritornello.arrays import Bools, Floats, Ints
from ritornello.class_members import ClassMembers


@dataclass(frozen=True)
class Assignment:
    """Candidates to store, and where.

    Attributes:
        rows: int64 ``[n]``, positions among the candidates.
        slots: int64 ``[n]``, of the shard. Where one comes twice, the later candidate stays.
    """

    rows: Ints
    slots: Ints


class SelectionPolicy(ABC):
    """Decides about the candidates of one rank's shard.

    Attributes:
        needs_labels: whether ``admit`` looks at the labels.
        num_classes: labels must be below it; None: any non-negative label.
        num_slots: the shard's rows, known once the buffer has called ``bind``.
    """

    needs_labels = False
    num_classes: int | None = None
    num_slots = 0

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """Ties the policy to one shard; called once, by the buffer.

        Raises:
            ValueError: it belongs to another buffer already.
        """
        if self.num_slots:
            raise ValueError(
                f"this {type(self).__name__} already belongs to a buffer: its counts are those "
                "of one shard. Make a new one for each buffer"
            )
        self.num_slots = num_slots

    @abstractmethod
    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """Decides about the candidates of one round, in their order.

        Slots must fill without gaps: a slot that was never used may be given only together
        with all those below it.

        Args:
            labels: int64 ``[m]``; zeros where the policy needs none.
            generator: this rank's stream for this round.
        """


class Fifo(SelectionPolicy):
    """The most recent candidates: each replaces the oldest one."""

    _num_offered = 0

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        rows = np.arange(max(0, len(labels) - self.num_slots), len(labels))
        slots = (self._num_offered + rows) % self.num_slots
        self._num_offered += len(labels)
        return Assignment(rows, slots)


class Reservoir(SelectionPolicy):
    """A uniform sample of all candidates so far, whatever their class.

    Source: Vitter, "Random sampling with a reservoir" (1985), Algorithm R. The n-th candidate
    is admitted with probability slots / n and replaces any representative with equal chance.
    """

    _num_offered = 0

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        ordinals = self._num_offered + np.arange(len(labels))
        slots = _reservoir_positions(ordinals, self.num_slots, generator.random(len(labels)))
        self._num_offered += len(labels)
        rows = np.flatnonzero(slots < self.num_slots)
        return Assignment(rows, slots[rows])


class _ClassShares(SelectionPolicy):
    """What the class-balanced policies have in common: the shares of the classes.

    The representatives that a class may have on a rank are numbered, and each number has a
    fixed score: number ``q`` of class ``label`` on rank ``i`` of ``N`` has the score
    ``q * N + (i - label * stride) % N``. A shard keeps the lowest scores that its classes can fill.
    So the shares are equal (up to what a class has offered), adapt as classes appear, and
    leave no slot empty; remainders fall on different ranks for different classes, so that
    the global shares are equal too; and the ranks need not talk about it. As the scores are
    fixed, a class that once had to give up representatives never grows again: what it keeps
    can stay a uniform sample.
    """

    needs_labels = True

    def __init__(self, num_classes: int | None = None) -> None:
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: it must be at least 1, or None")
        self.num_classes = num_classes

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._rank, self._num_ranks = rank, num_ranks
        self._stride = spreading_stride(num_ranks)
        self._labels = np.zeros(0, dtype=np.int64)  # class number -> label, as they appeared
        self._known = np.zeros(0, dtype=np.int64)  # the labels, ascending
        self._sorted = np.zeros(0, dtype=np.int64)  # their class numbers
        self._offered = np.zeros(0, dtype=np.int64)
        self._offsets = np.zeros(0, dtype=np.int64)
        self._members = ClassMembers()
        self._num_used = 0

    @abstractmethod
    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        """The place in its class that each candidate asks for; at or above its share: rejected.

        Args:
            ordinals: how many the class had offered before the candidate.
            shares: the share of its class on this rank.
            u: uniform random numbers in [0, 1).
        """

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        if len(labels) == 0:
            return Assignment(*np.zeros((2, 0), dtype=np.int64))
        classes = self._class_numbers(labels)
        rows = classes.argsort(kind="stable")
        classes = classes[rows]
        offered, shares = self._offered[classes], self._members.counts[classes]
        ordinals = offered + np.arange(len(rows)) - classes.searchsorted(classes)
        # A class that has offered more than it holds never grows again: nobody's share changes.
        settled = bool((offered > shares).all())
        if not settled:
            filling = self._fill(classes, ordinals, generator)
            shares = self._members.counts[classes]
        self._offered[classes] = ordinals + 1  # of each class its last, highest ordinal stays

        positions = self._positions(ordinals, shares, generator.random(len(rows)))
        enters = positions < shares
        if not settled:
            positions = np.where(filling, ordinals, positions)
            enters |= filling
        slots = self._members.slots(classes[enters], positions[enters])
        return Assignment(rows[enters], slots)

    def _fill(self, classes: Ints, ordinals: Ints, generator: np.random.Generator) -> Bools:
        """Moves the classes' shares to where the candidates put them.

        Returns:
            bool ``[m]``: which candidates take new places, one each.
        """
        seen, counts = np.unique(classes, return_counts=True)
        held = self._members.counts
        shares = self._shares_after(seen, counts)
        losing = np.flatnonzero(shares < held)
        freed = self._members.drop(losing, held[losing] - shares[losing], generator)
        filling: Bools = ordinals < shares[classes]
        num_fresh = int(filling.sum()) - len(freed)
        fresh = np.arange(self._num_used, self._num_used + num_fresh)
        self._num_used += num_fresh
        self._members.append(classes[filling], np.concatenate([freed, fresh]))
        return filling

    def _class_numbers(self, labels: Ints) -> Ints:
        """Labels to class numbers; unknown labels get the next ones."""
        places = self._known.searchsorted(labels)
        if len(self._known) == 0 or (self._known.take(places, mode="clip") != labels).any():
            self._add_classes(np.setdiff1d(labels, self._known))
            places = self._known.searchsorted(labels)
        classes: Ints = self._sorted[places]
        return classes

    def _add_classes(self, new: Ints) -> None:
        self._labels = np.concatenate([self._labels, new])
        self._offered = np.concatenate([self._offered, np.zeros_like(new)])
        self._offsets = (self._rank - self._labels * self._stride) % self._num_ranks
        self._members.add_classes(len(new))
        self._sorted = np.argsort(self._labels, kind="stable")
        self._known = self._labels[self._sorted]

    def _shares_after(self, seen: Ints, counts: Ints) -> Ints:
        """The share of every class once ``counts`` more of the classes ``seen`` are offered."""
        shares = self._members.counts.copy()
        never_dropped = self._offered[seen] == shares[seen]
        growth = np.where(never_dropped, counts, 0)
        shares[seen] += growth
        excess = int(growth.sum()) - (self.num_slots - self._num_used)
        if excess > 0:
            shares -= self._highest_scores(shares, excess)
        return shares

    def _highest_scores(self, shares: Ints, excess: int) -> Ints:
        """How many of each class's representatives are among the ``excess`` highest scores."""
        tops = (shares - 1) * self._num_ranks + self._offsets
        # The lowest level that no more than `excess` scores lie above.
        high = int(tops.max())
        low = max(-1, high - excess * self._num_ranks - 1)
        while low < high:
            level = (low + high) // 2
            if self._num_above(tops, shares, level).sum() <= excess:
                high = level
            else:
                low = level + 1
        above = self._num_above(tops, shares, low)
        # Those exactly at the level are of different classes: the later a class appeared, the
        # sooner it gives way, on even levels; the other way round on odd ones.
        at_level = np.flatnonzero(self._num_above(tops, shares, low - 1) > above)
        if (low // self._num_ranks) % 2 == 0:
            at_level = at_level[::-1]
        above[at_level[: excess - int(above.sum())]] += 1
        return above

    def _num_above(self, tops: Ints, shares: Ints, level: int) -> Ints:
        return np.clip(-((level - tops) // self._num_ranks), 0, shares)


class ClassBalanced(_ClassShares):
    """Equal shares of the capacity for all classes; in each, a uniform sample of its past.

    A class with less to offer than its share leaves the rest to the others, so the whole
    capacity is in use. Inside a class the policy is a reservoir (Vitter 1985): at any time a
    uniform sample of all that the class has offered to this rank, also after its share shrank.

    Args:
        num_classes: if given, labels must be below it.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return _reservoir_positions(ordinals, shares, u)


class PerClassRandom(_ClassShares):
    """The paper's policy: every candidate enters and evicts a random one of its class.

    Shares as for ``ClassBalanced``. A class that keeps arriving forgets its older samples.
    Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
    Distributed Rehearsal Buffers" (CCGrid 2024), Algorithm 1.

    Args:
        num_classes: if given, labels must be below it.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return np.where(shares > 0, (u * shares).astype(np.int64), 0)


def spreading_stride(num_ranks: int) -> int:
    """A step that visits all ranks, and spreads any few of its first stops evenly over them.

    The golden section of ``num_ranks``, lowered until the two have no common divisor.
    """
    stride = max(1, int(num_ranks * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, num_ranks) > 1:
        stride -= 1
    return stride


def _reservoir_positions(ordinals: Ints, size: Ints | int, u: Floats) -> Ints:
    """Algorithm R: where each candidate of a stream goes; at or above ``size``: nowhere."""
    return np.where(ordinals < size, ordinals, (u * (ordinals + 1)).astype(np.int64))


POLICIES: dict[str, type[SelectionPolicy]] = {
    "class-balanced": ClassBalanced,
    "per-class-random": PerClassRandom,
    "reservoir": Reservoir,
    "fifo": Fifo,
}


def selection_policy(selection: str | SelectionPolicy) -> SelectionPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
        TypeError: neither a name nor a policy.
    """
    if isinstance(selection, SelectionPolicy):
        return selection
    if not isinstance(selection, str):
        raise TypeError(
            f"selection={selection!r}: give a name ({', '.join(POLICIES)}) or a SelectionPolicy"
        )
    if selection not in POLICIES:
        raise ValueError(f"selection={selection!r}: there are {', '.join(map(repr, POLICIES))}")
    return POLICIES[selection]()
