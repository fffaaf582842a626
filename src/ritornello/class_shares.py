"""Selection policies that give every class an equal share of the capacity."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from ritornello.arrays import Bools, Floats, Ints
from ritornello.assignment import Assignment, SelectionPolicy, checked_num_classes
from ritornello.class_members import ClassMembers
from ritornello.classless import reservoir_positions


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

    Fixed shares are those that the labels below ``num_classes`` have when all of them have
    offered enough. They are kept free for their classes, and nobody ever has to give up a
    representative.

    Attributes:
        shares: "adaptive" or "fixed".
    """

    needs_labels = True

    def __init__(self, num_classes: int | None = None, shares: str = "adaptive") -> None:
        self.num_classes = checked_num_classes(num_classes)
        if shares not in ("adaptive", "fixed"):
            raise ValueError(f"shares={shares!r}: there are 'adaptive' and 'fixed'")
        if shares == "fixed" and num_classes is None:
            raise ValueError(
                "shares='fixed' needs num_classes: a class's share is the capacity divided by it"
            )
        self.shares = shares

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._rank, self._num_ranks = rank, num_ranks
        self._labels = np.zeros(0, dtype=np.int64)  # class number -> label, as they appeared
        self._known = np.zeros(0, dtype=np.int64)  # the labels, ascending
        self._sorted = np.zeros(0, dtype=np.int64)  # their class numbers
        self._offered = np.zeros(0, dtype=np.int64)
        self._offsets = np.zeros(0, dtype=np.int64)
        self._members = ClassMembers()
        self._num_used = 0
        self._limits: Ints | None = None
        if self.shares == "fixed":
            assert self.num_classes is not None
            self._add_classes(np.arange(self.num_classes))
            wanted = np.full(self.num_classes, num_slots)
            self._limits = wanted - self._highest_scores(wanted, int(wanted.sum()) - num_slots)

    @abstractmethod
    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        """The place in its class that each candidate asks for; at or above its share: rejected.

        Args:
            ordinals: how many the class had offered before the candidate.
            shares: the share of its class on this rank.
            u: uniform random numbers in [0, 1).
        """

    def _drop(self, classes: Ints, num_dropped: Ints, generator: np.random.Generator) -> Ints:
        """Takes representatives out of classes whose shares shrink; random ones by default.

        Args:
            classes: distinct.
            num_dropped: how many of each.
            generator: this rank's stream for this round.

        Returns:
            Their slots.
        """
        return self._members.drop(classes, num_dropped, generator)

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
        freed = self._drop(losing, held[losing] - shares[losing], generator)
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
        first_ranks = _rank_of_lowest_score(self._labels, self._num_ranks)
        self._offsets = (self._rank - first_ranks) % self._num_ranks
        self._members.add_classes(len(new))
        self._sorted = np.argsort(self._labels, kind="stable")
        self._known = self._labels[self._sorted]

    def _shares_after(self, seen: Ints, counts: Ints) -> Ints:
        """The share of every class once ``counts`` more of the classes ``seen`` are offered."""
        shares = self._members.counts.copy()
        never_dropped = self._offered[seen] == shares[seen]
        growth = np.where(never_dropped, counts, 0)
        shares[seen] += growth
        if self._limits is not None:
            return np.minimum(shares, self._limits)
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
        shares: "adaptive": equal among the classes so far; "fixed": the capacity divided by
            ``num_classes`` from the start, so that the buffer is full only when all have come.

    Raises:
        ValueError: ``num_classes`` is below 1, or missing where shares are fixed.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return reservoir_positions(ordinals, shares, u)


class PerClassRandom(_ClassShares):
    """The paper's policy: every candidate enters and evicts a random one of its class.

    Shares as for ``ClassBalanced``; the authors' code has fixed ones. A class that keeps
    arriving forgets its older samples.
    Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
    Distributed Rehearsal Buffers" (CCGrid 2024), Algorithm 1.

    Args:
        num_classes: if given, labels must be below it.
        shares: see ``ClassBalanced``.

    Raises:
        ValueError: see ``ClassBalanced``.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return np.where(shares > 0, (u * shares).astype(np.int64), 0)


class GreedyBalanced(_ClassShares):
    """The sampler of GDumb: what a class offers first stays, until its share shrinks.

    Shares as for ``ClassBalanced``. A class with its share in use rejects what it offers; when
    its share shrinks, random ones go. So what is stored of a class is at any time a uniform
    sample of its first ``M`` candidates, with ``M`` the most that it ever held on this rank.

    Source: Prabhu, Torr, Dokania, "GDumb: A Simple Approach that Questions Our Progress in
    Continual Learning" (ECCV 2020), Algorithm 1.

    Args:
        num_classes: if given, labels must be below it.
        shares: see ``ClassBalanced``.

    Raises:
        ValueError: see ``ClassBalanced``.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return ordinals  # below the share only where the class takes a new place


class FirstOffered(_ClassShares):
    """What a class offers first stays; when its share shrinks, the last of it go.

    For exemplars that come in order of importance (see ``exemplars``): what is stored of a class
    is at any time exactly what it offered first to this rank, as many as its share, without any
    chance. Shares as for ``ClassBalanced``. Offer each exemplar to the rank that
    ``rank_of_exemplar`` says, and the ranks together hold the first ones of all.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (CVPR
    2017), Algorithm 5.

    Args:
        num_classes: if given, labels must be below it.
        shares: see ``ClassBalanced``.

    Raises:
        ValueError: see ``ClassBalanced``.
    """

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return ordinals

    def _drop(self, classes: Ints, num_dropped: Ints, generator: np.random.Generator) -> Ints:
        return self._members.drop_last(classes, num_dropped)


def rank_of_exemplar(label: int | Ints, place: int | Ints, num_ranks: int) -> Ints:
    """The rank to offer an exemplar to, so that all ranks together keep a class's first ones.

    Exemplars go round the ranks in the order in which shares grow. Where every class offers at
    least its share, classes appear in the same order on all ranks, and the ranks divide the
    capacity evenly, ``FirstOffered`` stores exactly the first ones. Otherwise ranks may differ by
    one exemplar more or less at the end of what is stored of a class.

    Args:
        label: of the class; an integer or int64 ``[n]``.
        place: in the class's order of importance, from 0; an integer or int64 ``[n]``.
        num_ranks: how many.

    Returns:
        int64, of the shape of ``label`` and ``place`` together.
    """
    return (_rank_of_lowest_score(np.asarray(label), num_ranks) + place) % num_ranks


def _rank_of_lowest_score(labels: Ints, num_ranks: int) -> Ints:
    """Where the first representative of each class belongs."""
    return labels % num_ranks * spreading_stride(num_ranks) % num_ranks


def spreading_stride(num_ranks: int) -> int:
    """A step that visits all ranks, and spreads any few of its first stops evenly over them.

    The golden section of ``num_ranks``, lowered until the two have no common divisor.
    """
    stride = max(1, int(num_ranks * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, num_ranks) > 1:
        stride -= 1
    return stride
