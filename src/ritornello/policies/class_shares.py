"""Selection policies that give every class an equal share of the capacity."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ritornello.arrays import Bools, Floats, Ints
from ritornello.policies.class_members import ClassMembers
from ritornello.policies.reservoir import reservoir_positions
from ritornello.policies.saved_classes import (
    Choose,
    SavedClasses,
    at_random,
    check_classes,
    first_ones,
    forget_slots,
)
from ritornello.policies.selection import (
    Assignment,
    SavedShards,
    SelectionPolicy,
    State,
    checked_num_classes,
)
from ritornello.policies.share_scores import highest_scores, rank_of_lowest_score


class _ClassShares(SelectionPolicy):
    """What the class-balanced policies have in common: the shares of the classes.

    Every representative that a class may have on a rank has a fixed score (see ``scores``), and
    a shard keeps the lowest scores that its classes can fill. So the shares are equal (up to what
    a class has offered), adapt as classes appear, and leave no slot empty; remainders fall on
    different ranks for different classes, so that the global shares are equal too; and the ranks
    need not talk about it. As the scores are fixed, a class that once had to give up
    representatives never grows again: what it keeps can stay a uniform sample.

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
        self._labels = np.zeros(0, dtype=np.int64)  # class number -> label, as they appeared
        self._known = np.zeros(0, dtype=np.int64)  # the labels, ascending
        self._sorted = np.zeros(0, dtype=np.int64)  # their class numbers
        self._offered = np.zeros(0, dtype=np.int64)
        self._grows = np.zeros(0, dtype=np.bool_)  # whether all that a class offers is stored
        self._offsets = np.zeros(0, dtype=np.int64)
        self._members = ClassMembers()
        self._num_used = 0
        self._limits: Ints | None = None
        if self.shares == "fixed":
            assert self.num_classes is not None
            self._add_classes(np.arange(self.num_classes))
            wanted = np.full(self.num_classes, num_slots)
            excess = int(wanted.sum()) - num_slots
            self._limits = wanted - highest_scores(wanted, excess, self._offsets, num_ranks)

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
        self._grows[losing] = False
        self._grows[classes[~filling]] = False
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
        self._grows = np.concatenate([self._grows, np.ones(len(new), dtype=np.bool_)])
        first_ranks = rank_of_lowest_score(self._labels, self.num_ranks)
        self._offsets = (self.rank - first_ranks) % self.num_ranks
        self._members.add_classes(len(new))
        self._sorted = np.argsort(self._labels, kind="stable")
        self._known = self._labels[self._sorted]

    def _shares_after(self, seen: Ints, counts: Ints) -> Ints:
        """The share of every class once ``counts`` more of the classes ``seen`` are offered."""
        shares = self._members.counts.copy()
        growth = np.where(self._grows[seen], counts, 0)
        shares[seen] += growth
        if self._limits is not None:
            return np.minimum(shares, self._limits)
        excess = int(growth.sum()) - (self.num_slots - self._num_used)
        if excess > 0:
            shares -= highest_scores(shares, excess, self._offsets, self.num_ranks)
        return shares

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        counts = self._members.counts
        owners = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
        return {
            "labels": self._labels.copy(),
            "offered": self._offered.copy(),
            "counts": counts.copy(),
            "grows": self._grows.astype(np.int64),
            "slots": self._members.slots(owners, positions),
        } | ({} if self._limits is None else {"limits": self._limits.copy()})

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        check_classes(state, size)
        labels, grows = state["labels"], state["grows"]
        if len(grows) != len(labels):
            raise ValueError(f"{len(labels)} labels, but {len(grows)} values of grows")
        if self.shares == "fixed":
            assert self.num_classes is not None
            if not np.array_equal(labels, np.arange(self.num_classes)):
                raise ValueError(f"labels must be those from 0 to {self.num_classes - 1}")
        else:
            self._add_classes(labels)
        self._offered, self._grows = state["offered"].copy(), grows != 0
        self._members.append(np.repeat(np.arange(len(labels)), state["counts"]), state["slots"])
        self._num_used = size
        if self._limits is None:
            return
        if "limits" not in state:  # dealt out anew
            self._make_room(state["counts"])
            return
        limits = state["limits"]
        if limits.shape != self._limits.shape or np.any(limits < state["counts"]):
            raise ValueError("limits must be one for each class, and at least counts")
        if limits.sum() > self.num_slots or limits.max() > self.num_slots:
            raise ValueError(f"limits must add up to at most {self.num_slots}")
        self._limits = limits.copy()

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``.

        Where there is room, every candidate enters until it is in use; nothing old goes for it,
        but recent samples of a class that had lost some are then more likely stored.
        """
        whole = SavedClasses.merged(saved)
        if capacity < saved.capacity:
            shares = whole.shares(capacity)
            if self.shares == "fixed":
                assert self.num_classes is not None
                wanted = np.full(self.num_classes, capacity)
                excess = int(wanted.sum()) - capacity
                shares = wanted - highest_scores(wanted, excess, np.zeros_like(wanted), 1)
            whole = whole.cut(shares, self._choice(generator))
        own = whole.of_rank(self.rank, self.num_ranks)
        grows = ~whole.lost | (capacity > whole.counts.sum())
        size = len(own.slots)
        self.restore(
            {
                "labels": own.labels,
                "offered": own.offered,
                "counts": own.counts,
                "grows": grows.astype(np.int64),
                "slots": np.arange(size),
            },
            size,
        )
        return own.owners, own.slots

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. All classes may grow again, as in ``adopt``."""
        forgotten, kept = forget_slots(state, size, removed)
        return forgotten | {"grows": np.ones_like(state["labels"])}, kept

    def _choice(self, generator: np.random.Generator) -> Choose:
        """Who stays of a class that has more than its share, like ``_drop``."""
        return at_random(generator)

    def _make_room(self, counts: Ints) -> None:
        """Shifts fixed shares between classes such that each has room for what it holds.

        With another number of ranks the odd ones of a class belong to other ranks.
        """
        assert self._limits is not None
        self._limits = np.maximum(self._limits, counts)
        while self._limits.sum() > self.num_slots:
            self._limits[np.argmax(self._limits - counts)] -= 1


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

    def _choice(self, generator: np.random.Generator) -> Choose:
        return first_ones
