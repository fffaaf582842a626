"""Selection policies that give every class an equal share of the capacity."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ritornello.arrays import Bools, Floats, Ints
from ritornello.policies.classes.saved import Choose, first_ones
from ritornello.policies.classes.saved_shares import KeepsShares
from ritornello.policies.classes.scores import highest_scores, lowest
from ritornello.policies.reservoir import reservoir_positions
from ritornello.policies.selection import Assignment


class _ClassShares(KeepsShares):
    """What the class-balanced policies have in common: the shares of the classes.

    Every representative that a class may have on a rank has a fixed score (see ``classes.scores``),
    and a shard keeps the lowest scores that its classes can fill. So the shares are equal (up to
    what a class has offered), adapt as classes appear, and leave no slot empty; remainders fall on
    different ranks for different classes, so that the global shares are equal too; and the ranks
    need not talk about it. As the scores are fixed, a class that once had to give up
    representatives never grows again: what it keeps can stay a uniform sample.

    Where a shard sees more classes than it has slots, those of the lowest precedence have one each.
    A class that gives up its last one is forgotten, and others are not even noted: their precedence
    is above the last one held, and it always will be.

    Fixed shares are those that the labels below ``num_classes`` have when all of them have
    offered enough. They are kept free for their classes, and nobody ever has to give up a
    representative.
    """

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
        if classes[0] < 0:  # refused
            first = int(classes.searchsorted(0))
            rows, classes = rows[first:], classes[first:]
        offered, shares = self._offered[classes], self._members.counts[classes]
        turns = np.arange(len(rows)) - classes.searchsorted(classes)  # which one of its class
        ordinals, new_places = offered + turns, shares + turns
        # If none of the classes grows, nobody's share changes.
        settled = not self._grows[classes].any()
        if not settled:
            filling = self._fill(classes, turns, generator)
            shares = self._members.counts[classes]
        self._offered[classes] = ordinals + 1  # of each class its last, highest ordinal stays

        positions = self._positions(ordinals, shares, generator.random(len(rows)))
        enters = positions < shares
        if not settled:
            positions = np.where(filling, new_places, positions)
            enters |= filling
        slots = self._members.slots(classes[enters], positions[enters])
        if len(self._gone):
            stays = np.ones(len(self._labels), dtype=np.bool_)
            stays[self._gone] = False
            self._keep_classes(stays)
            self._gone = self._gone[:0]
        return Assignment(rows[enters], slots)

    def _fill(self, classes: Ints, turns: Ints, generator: np.random.Generator) -> Bools:
        """Moves the classes' shares to where the candidates put them.

        Returns:
            bool ``[m]``: which candidates take new places, one each.
        """
        seen, counts = np.unique(classes, return_counts=True)
        held = self._members.counts
        shares = self._shares_after(seen, counts)
        losing = np.flatnonzero(shares < held)
        freed = self._drop(losing, held[losing] - shares[losing], generator)
        filling: Bools = turns < (shares - held)[classes]
        self._gone = losing[shares[losing] == 0]
        self._grows[losing] = False
        self._grows[classes[~filling]] = False
        num_fresh = int(filling.sum()) - len(freed)
        fresh = np.arange(self._num_used, self._num_used + num_fresh)
        self._num_used += num_fresh
        self._members.append(classes[filling], np.concatenate([freed, fresh]))
        return filling

    def _shares_after(self, seen: Ints, counts: Ints) -> Ints:
        """The share of every class once ``counts`` more of the classes ``seen`` are offered.

        A full shard of 10 slots, on one rank: A has 6 and B has 4 when C first offers 3. That makes
        (6, 4, 3), 3 too many. The highest scores give way, here A's 5, 4 and 3: (3, 4, 3).
        """
        shares = self._members.counts.copy()
        # A class that has lost some may not grow again: it would lack a part of its past.
        growth = np.where(self._grows[seen], counts, 0)
        shares[seen] += growth
        if self._limits is not None:
            return np.minimum(shares, self._limits)
        holding = np.flatnonzero(shares)
        if len(holding) > self.num_slots:
            stays = holding[lowest(self._order[holding], self.num_slots)]
            shares[:] = 0
            shares[stays] = 1
            return shares
        # Only what does not fit into unused slots makes somebody give way: perhaps the new ones.
        excess = int(growth.sum()) - (self.num_slots - self._num_used)
        if excess > 0:
            shares -= highest_scores(shares, excess, self._offsets, self.num_ranks)
        return shares


class ClassBalanced(_ClassShares):
    """Equal shares of the capacity for all classes; in each, a uniform sample of its past.

    A class with less to offer than its share leaves the rest to the others, so the whole
    capacity is in use. Inside a class the policy is a reservoir (Vitter 1985): at any time a
    uniform sample of all that the class has offered to this rank, also after its share shrank.
    With more classes than slots each slot is of another class, and these are a uniform sample of
    all classes that have come, whenever they came.

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
    arriving forgets its older samples. With more classes than slots see ``ClassBalanced``, too.
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

    Shares as for ``ClassBalanced``, also with more classes than slots. A class with its share in
    use rejects what it offers; when its share shrinks, random ones go. So what is stored of a class
    is at any time a uniform sample of its first ``M`` candidates, with ``M`` the most that it ever
    held on this rank.

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
    chance. Shares as for ``ClassBalanced``, also with more classes than slots. Offer each exemplar
    to the rank that ``rank_of_exemplar`` says, and the ranks together hold the first ones of all.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (CVPR
    2017), Algorithm 5.

    Args:
        num_classes: if given, labels must be below it.
        shares: see ``ClassBalanced``.

    Raises:
        ValueError: see ``ClassBalanced``.
    """

    _orders_alike = True  # else a class could hold a later exemplar, and not the one before

    def _positions(self, ordinals: Ints, shares: Ints, u: Floats) -> Ints:
        return ordinals

    def _drop(self, classes: Ints, num_dropped: Ints, generator: np.random.Generator) -> Ints:
        return self._members.drop_last(classes, num_dropped)

    def _choice(self, generator: np.random.Generator) -> Choose:
        return first_ones
