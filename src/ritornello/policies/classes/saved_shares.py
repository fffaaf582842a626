"""What the policies of ``class_shares`` know of their shard, and how that is saved.

Here are the classes: their numbers, what each has offered, and which slots it has. Who is admitted
and who gives way is said there.
"""

from __future__ import annotations

import numpy as np

from ritornello.arrays import Bools, Ints
from ritornello.policies.classes.members import ClassMembers
from ritornello.policies.classes.saved import (
    Choose,
    SavedClasses,
    at_random,
    check_classes,
    forget_slots,
    key_array,
    key_of,
)
from ritornello.policies.classes.scores import (
    HASH_BITS,
    fixed_shares,
    lowest,
    num_labels_in_excess,
    precedence,
)
from ritornello.policies.selection import SavedShards, SelectionPolicy, State, checked_num_classes


class KeepsShares(SelectionPolicy):
    """A policy that knows the classes of its shard, and can be saved.

    Attributes:
        shares: "adaptive" or "fixed".
    """

    needs_labels = True
    _orders_alike = False  # see ``precedence``

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
        self._key = self.buffer_seed
        # The classes that hold slots (or, after a load, that other ranks hold; or all, where shares
        # are fixed). Nothing is known of any other.
        self._labels = np.zeros(0, dtype=np.int64)  # class number -> label, as they appeared
        self._known = np.zeros(0, dtype=np.int64)  # the labels, ascending
        self._sorted = np.zeros(0, dtype=np.int64)  # their class numbers
        # By class number: what it has offered, whether all of that is stored, its lowest score,
        # its precedence.
        self._offered = np.zeros(0, dtype=np.int64)
        self._grows = np.zeros(0, dtype=np.bool_)
        self._offsets = np.zeros(0, dtype=np.int64)
        self._order = np.zeros(0, dtype=np.int64)
        self._bound: int | None = None  # where every slot has a class of its own: the last of them
        self._members = ClassMembers()
        self._gone = np.zeros(0, dtype=np.int64)  # class numbers, of those that gave up all
        self._num_used = 0  # slots
        self._limits: Ints | None = None  # fixed shares, by class number
        if self.shares == "fixed":
            assert self.num_classes is not None
            self._add_classes(np.arange(self.num_classes))
            self._limits = fixed_shares(num_slots, self._offsets, self._order, num_ranks)
            if self.num_classes > (num_slots + (num_ranks > 1)) * num_ranks:
                self.excess_labels = self.num_classes

    def _class_numbers(self, labels: Ints) -> Ints:
        """Labels to class numbers; unknown labels get the next ones, or -1 if they are refused."""
        places, known = self._found(labels)
        if not known.all():
            new = self._welcome(np.unique(labels[~known]))
            if len(new):
                self._add_classes(new)
                places, known = self._found(labels)
            if not known.all():
                classes = np.full(len(labels), -1)
                classes[known] = self._sorted[places[known]]
                return classes
        return self._sorted[places]

    def _found(self, labels: Ints) -> tuple[Ints, Bools]:
        """Where among the known labels some are, and which of them are."""
        places = self._known.searchsorted(labels)
        if len(self._known) == 0:
            return places, np.zeros(len(labels), dtype=np.bool_)
        return places, self._known.take(places, mode="clip") == labels

    def _welcome(self, new: Ints) -> Ints:
        """Those of some unknown labels that get a slot: while there are enough, all of them."""
        held = self._order[self._members.counts > 0]
        if len(held) + len(new) <= self.num_slots:
            return new
        order = self._precedence(new)
        if len(held) == self.num_slots:
            if self._bound is None:
                self._bound = int(held.max())
            early = order < self._bound
            if not early.any():
                self._note_excess(len(held) + len(new), self._bound)
                return new[early]
            new, order = new[early], order[early]
        both = np.concatenate([held, order])
        stay = lowest(both, self.num_slots)
        self._note_excess(len(both), int(both[stay].max()))
        return new[stay[len(held) :]]

    def _precedence(self, labels: Ints) -> Ints:
        return precedence(
            labels, self._key, self.rank, self.num_ranks, everywhere_alike=self._orders_alike
        )

    def _note_excess(self, num_seen: int, last: int) -> None:
        """Says so if there are more classes than slots; see ``num_labels_in_excess``."""
        if self.excess_labels == 0:
            self.excess_labels = num_labels_in_excess(
                num_seen, last, self.num_slots, self.num_ranks
            )

    def _add_classes(self, new: Ints) -> None:
        self._labels = np.concatenate([self._labels, new])
        self._offered = np.concatenate([self._offered, np.zeros_like(new)])
        self._grows = np.concatenate([self._grows, np.ones(len(new), dtype=np.bool_)])
        order = self._precedence(new)
        self._order = np.concatenate([self._order, order])
        self._offsets = self._order >> HASH_BITS
        self._members.add_classes(len(new))
        self._sorted = np.argsort(self._labels, kind="stable")
        self._known = self._labels[self._sorted]
        self._bound = None

    def _keep_classes(self, kept: Bools) -> None:
        """Knows no other classes any more; class numbers change."""
        self._labels, self._offered = self._labels[kept], self._offered[kept]
        self._grows, self._order = self._grows[kept], self._order[kept]
        self._members.keep_classes(kept)
        self._add_classes(self._labels[:0])

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        counts = self._members.counts
        owners = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
        return {
            "key": key_array(self._key),
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
            self._key = key_of([state], self._key)
            self._add_classes(labels)
        self._offered, self._grows = state["offered"].copy(), grows != 0
        self._members.append(np.repeat(np.arange(len(labels)), state["counts"]), state["slots"])
        self._num_used = size
        if "key" not in state and self.shares == "adaptive":
            # Of an earlier release, which remembered every label for ever.
            self._keep_classes(self._members.counts > 0)
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
        key = key_of(saved.states, self._key)
        if capacity < saved.capacity:
            shares = whole.shares(capacity, key)
            if self.shares == "fixed":
                order = precedence(whole.labels, key, 0, 1)
                shares = fixed_shares(capacity, np.zeros_like(whole.counts), order, 1)
            whole = whole.cut(shares, self._choice(generator))
        if self.shares == "adaptive":
            whole = whole.without_empty()
        own = whole.of_rank(self.rank, self.num_ranks)
        grows = ~whole.lost | (capacity > whole.counts.sum())
        self.restore(
            own.state() | {"key": key_array(key), "grows": grows.astype(np.int64)}, len(own.slots)
        )
        return own.owners, own.slots

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. All classes may grow again, as in ``adopt``."""
        forgotten, kept = forget_slots(state, size, removed)
        forgotten["grows"] = np.ones_like(state["labels"])
        return forgotten, kept

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
