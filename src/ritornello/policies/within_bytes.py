"""Who is kept where samples are of unequal length, and bytes as well as slots are bounded.

Every candidate gets a number, its *key*, and those of the lowest keys stay: as many as fit, into
the shard's slots and into its pages. Where they do not fit, the class that holds most gives way,
and in it the highest key. What a class has lost says how far it may come back: no key from the
lowest lost one on enters again. So what is stored of a class is, at any time, all that it has
offered below one number. With keys at random that is a uniform sample of its past, whatever the
lengths: these decide how many fit, and not which.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.class_shares import ClassBalanced
from ritornello.policies.classes.scores import precedence
from ritornello.policies.largest_class import ClassBalancedReservoir
from ritornello.policies.reservoir import Fifo, Reservoir
from ritornello.policies.selection import Assignment, SavedShards, SelectionPolicy, State

NO_END = 2**63 - 1
"""All keys are below it."""

POLICIES = "'class-balanced' (adaptive), 'class-balanced-reservoir', 'reservoir' or 'fifo'"
"""Whose law ``WithinBytes`` keeps."""


@dataclass(frozen=True)
class Turnover:
    """What becomes of a shard in a round: some leave, then some move, then some come.

    Attributes:
        removed: int64, the slots of those that leave.
        moved_from: int64 ``[k]``, the slots of those that move, so that no slot in between is
            unused.
        moved_to: int64 ``[k]``, where to.
        rows: int64 ``[n]``, positions among the candidates.
        slots: int64 ``[n]``, where these go.
        size: representatives in the shard then.
    """

    removed: Ints
    moved_from: Ints
    moved_to: Ints
    rows: Ints
    slots: Ints
    size: int


@dataclass
class _Class:
    """What is held of a class."""

    precedence: int
    """Among classes that hold equally many, the one of the highest gives way."""
    end: int = NO_END
    """The lowest key that it has lost."""
    keys: list[int] = field(default_factory=list)
    """Ascending."""
    slots: list[int] = field(default_factory=list)
    """Where they are."""


class WithinBytes(SelectionPolicy):
    """Keeps the lowest keys that fit.

    Args:
        num_pages: of the shard.
        by_class: whether the class that holds most gives way; else all are one class.
        newest: whether keys fall from candidate to candidate, so that the newest stay; else they
            are random.
        num_classes: if given, labels must be below it.
    """

    def __init__(
        self, num_pages: int, by_class: bool, newest: bool = False, num_classes: int | None = None
    ) -> None:
        self.num_pages, self.needs_labels, self._newest = num_pages, by_class, newest
        self.num_classes = num_classes
        self._num_offered = self._num_held = self._num_pages_used = 0
        self._classes: dict[int, _Class] = {}
        self._largest: list[tuple[int, int, int]] = []  # a heap; some of it is out of date

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        # One slot more, for a candidate that is there before another one gives way.
        self._keys, self._pages, self._label_of = np.zeros((3, num_slots + 1), dtype=np.int64)

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``: of candidates without pages none moves another."""
        turnover = self.turn_over(labels, np.zeros_like(labels), generator)
        return Assignment(turnover.rows, turnover.slots)

    def turn_over(self, labels: Ints, num_pages: Ints, generator: np.random.Generator) -> Turnover:
        """Decides about the candidates of one round, in their order.

        Args:
            labels: int64 ``[m]``; not looked at where all are one class.
            num_pages: int64 ``[m]``, what each needs; at most as many as the shard has.
            generator: this rank's stream for this round.
        """
        came, removed, unused = dict[int, int](), list[int](), list[int]()
        num_before, end = self._num_held, self._num_held
        keys = self._next_keys(len(labels), generator)
        if not self.needs_labels:
            labels = np.zeros_like(labels)
        for row, (label, key, pages) in enumerate(
            zip(labels.tolist(), keys.tolist(), num_pages.tolist(), strict=True)
        ):
            if key >= self._class(label).end:
                continue
            if unused:
                slot = unused.pop()
            else:
                slot, end = end, end + 1
            came[slot] = row
            self._put(slot, label, key, pages)
            while self._num_held > self.num_slots or self._num_pages_used > self.num_pages:
                slot = self._take_highest(self._most_held())
                unused.append(slot)
                if came.pop(slot, None) is None:
                    removed.append(slot)
        moved_from, moved_to = list[int](), list[int]()
        for slot, last in self._gaps(unused, end):
            self._move(last, slot)
            if last in came:
                came[slot] = came.pop(last)
            else:
                moved_from.append(last)
                moved_to.append(slot)
        assert max(removed, default=-1) < num_before
        return Turnover(
            removed=np.array(removed, dtype=np.int64),
            moved_from=np.array(moved_from, dtype=np.int64),
            moved_to=np.array(moved_to, dtype=np.int64),
            rows=np.array(list(came.values()), dtype=np.int64),
            slots=np.array(list(came), dtype=np.int64),
            size=self._num_held,
        )

    def _next_keys(self, num_keys: int, generator: np.random.Generator) -> Ints:
        first = NO_END - 1 - self._num_offered
        self._num_offered += num_keys
        if self._newest:
            return np.arange(first, first - num_keys, -1)
        return generator.integers(0, NO_END, num_keys)

    def _gaps(self, unused: list[int], end: int) -> Iterator[tuple[int, int]]:
        """Unused slots among the first ones, each with the slot of one that is beyond these."""
        gaps = [slot for slot in unused if slot < self._num_held]
        if gaps:
            beyond = set(range(self._num_held, end)) - set(unused)
            yield from zip(sorted(gaps), sorted(beyond), strict=True)

    def _class(self, label: int) -> _Class:
        found = self._classes.get(label)
        if found is None:
            order = precedence(np.array([label]), self.buffer_seed, self.rank, self.num_ranks)
            found = self._classes[label] = _Class(int(order[0]))
        return found

    def _put(self, slot: int, label: int, key: int, pages: int) -> None:
        of_class = self._class(label)
        place = bisect_left(of_class.keys, key)
        of_class.keys.insert(place, key)
        of_class.slots.insert(place, slot)
        self._keys[slot], self._pages[slot], self._label_of[slot] = key, pages, label
        self._num_held += 1
        self._num_pages_used += pages
        self._note_size(label, of_class)

    def _take_highest(self, label: int) -> int:
        """Takes the highest key of a class out; its slot."""
        of_class = self._classes[label]
        of_class.end = of_class.keys.pop()
        slot = of_class.slots.pop()
        self._num_held -= 1
        self._num_pages_used -= int(self._pages[slot])
        if not of_class.keys and len(self._classes) > self.num_slots:
            del self._classes[label]  # else what is remembered would grow with the classes
        else:
            self._note_size(label, of_class)
        return slot

    def _move(self, slot: int, to: int) -> None:
        key, of_class = int(self._keys[slot]), self._classes[int(self._label_of[slot])]
        place = of_class.slots.index(slot, bisect_left(of_class.keys, key))
        of_class.slots[place] = to
        for each in (self._keys, self._pages, self._label_of):
            each[to] = each[slot]

    def _note_size(self, label: int, of_class: _Class) -> None:
        if len(self._largest) > 4 * (len(self._classes) + 16):
            self._rank_classes()
        heappush(self._largest, (-len(of_class.keys), -of_class.precedence, label))

    def _rank_classes(self) -> None:
        self._largest = [
            (-len(each.keys), -each.precedence, label) for label, each in self._classes.items()
        ]
        heapify(self._largest)

    def _most_held(self) -> int:
        """The class that holds most."""
        while True:
            size, _, label = self._largest[0]
            found = self._classes.get(label)
            if found is not None and len(found.keys) == -size:
                return label
            heappop(self._largest)

    # Saving.

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        classes = list(self._classes.values())
        slots = np.array([slot for each in classes for slot in each.slots], dtype=np.int64)
        state = {
            "offered": np.array([self._num_offered]),
            "ends": np.array([each.end for each in classes], dtype=np.int64),
            "counts": np.array([len(each.slots) for each in classes], dtype=np.int64),
            "slots": slots,
            "keys": self._keys[slots],
            "pages": self._pages[slots],
        }
        if self.needs_labels:
            state["labels"] = np.array(list(self._classes), dtype=np.int64)
        return state

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        saved = _Saved.of(state, size)
        num_pages = int(saved.pages.sum())
        if size > self.num_slots or num_pages > self.num_pages:
            raise ValueError(f"{size} representatives in {num_pages} pages do not fit")
        self._hold(saved)

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``.

        Each class goes to the ranks in turn, its longest first, and of the ranks whose turn it is
        to the one with the fewest pages. Where a rank's do not fit, the law says who gives way. A
        class may come back up to the lowest end that it had on any rank.
        """
        shards = [_Saved.of(*each) for each in zip(saved.states, saved.sizes.tolist(), strict=True)]
        joined = _Saved(
            labels=np.concatenate([each.labels for each in shards]),
            keys=np.concatenate([each.keys for each in shards]),
            pages=np.concatenate([each.pages for each in shards]),
            ends={
                label: min(each.ends.get(label, NO_END) for each in shards)
                for label in sorted({label for each in shards for label in each.ends})
            },
            num_offered=max(each.num_offered for each in shards),
        )
        owners = np.repeat(np.arange(len(shards)), saved.sizes)
        slots = np.concatenate([np.arange(size) for size in saved.sizes.tolist()])
        own = np.flatnonzero(joined.dealt_to(self.num_ranks) == self.rank)
        own = own[self._hold(joined.part(own))]
        return owners[own], slots[own]

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. New ones still come back as far only as before."""
        saved = _Saved.of(state, size)
        kept = np.setdiff1d(np.arange(size), removed)
        left = saved.part(kept)
        policy = WithinBytes(int(left.pages.sum()), "labels" in state)
        policy.bind(len(kept), 0, 1)
        policy._hold(left)
        return policy.state(), kept

    def _hold(self, saved: _Saved) -> Ints:
        """Takes over representatives, from slot 0 on, in place of nothing.

        Returns:
            Which of them, ascending: the law says who gives way where they do not fit.
        """
        num = len(saved.keys)
        self._num_offered = saved.num_offered
        self._keys, self._pages, self._label_of = np.zeros(
            (3, max(num, self.num_slots) + 1), dtype=np.int64
        )
        for label, end in saved.ends.items():
            self._class(label).end = end
        for slot, (label, key, pages) in enumerate(
            zip(saved.labels.tolist(), saved.keys.tolist(), saved.pages.tolist(), strict=True)
        ):
            self._put(slot, label, key, pages)
        stays = np.ones(num, dtype=np.bool_)
        while self._num_held > self.num_slots or self._num_pages_used > self.num_pages:
            stays[self._take_highest(self._most_held())] = False
        slot_after = stays.cumsum() - 1
        for each in self._classes.values():
            each.slots = slot_after[each.slots].tolist()
        kept = np.flatnonzero(stays)
        for values in (self._keys, self._pages, self._label_of):
            values[: len(kept)] = values[kept]
        return kept


@dataclass(frozen=True)
class _Saved:
    """What was saved of a shard, or of several: of each representative, in the order of slots."""

    labels: Ints
    keys: Ints
    pages: Ints
    ends: dict[int, int]
    """By label."""
    num_offered: int

    @classmethod
    def of(cls, state: State, size: int) -> _Saved:
        """A shard's.

        Raises:
            ValueError, KeyError: no ``WithinBytes`` can have given it.
        """
        (num_offered,) = state["offered"].tolist()
        counts, ends, slots = state["counts"], state["ends"], state["slots"]
        labels = state.get("labels", np.zeros(len(counts), dtype=np.int64))
        if not len(labels) == len(np.unique(labels)) == len(counts) == len(ends):
            raise ValueError("counts and ends must be those of the labels, which must differ")
        if counts.min(initial=0) < 0 or counts.sum() != size:
            raise ValueError(f"counts must add up to the {size} representatives")
        if not np.array_equal(np.sort(slots), np.arange(size)):
            raise ValueError("slots must be those of all representatives, once each")
        keys, pages, order = state["keys"], state["pages"], np.argsort(slots)
        if not len(keys) == len(pages) == size or num_offered < size:
            raise ValueError(f"{len(keys)} keys, {len(pages)} pages for {size} representatives")
        for name, numbers in (("labels", labels), ("keys", keys), ("pages", pages), ("ends", ends)):
            if numbers.min(initial=0) < 0:
                raise ValueError(f"{name} must be at least 0")
        if keys.max(initial=0) >= NO_END:
            raise ValueError(f"keys must be below {NO_END}")
        return cls(
            labels=np.repeat(labels, counts)[order],
            keys=keys[order],
            pages=pages[order],
            ends=dict(zip(labels.tolist(), ends.tolist(), strict=True)),
            num_offered=int(num_offered),
        )

    def part(self, chosen: Ints) -> _Saved:
        """Some of them, in that order."""
        return _Saved(
            self.labels[chosen], self.keys[chosen], self.pages[chosen], self.ends, self.num_offered
        )

    def dealt_to(self, num_ranks: int) -> Ints:
        """The rank of each, int64."""
        ranks, num_pages = np.zeros(len(self.keys), dtype=np.int64), [0] * num_ranks
        waiting: list[int] = []
        for each in np.lexsort((self.keys, -self.pages, self.labels)).tolist():
            waiting = waiting or list(range(num_ranks))
            rank = min(waiting, key=lambda rank: num_pages[rank])
            waiting.remove(rank)
            ranks[each] = rank
            num_pages[rank] += int(self.pages[each])
        return ranks


def within_bytes(policy: SelectionPolicy, num_pages: int) -> WithinBytes:
    """What keeps a policy's law where bytes are bounded, too.

    Raises:
        ValueError: there is nothing for such a policy.
    """
    kind = type(policy)
    if kind in (Reservoir, Fifo):
        return WithinBytes(num_pages, by_class=False, newest=kind is Fifo)
    has_adaptive_shares = getattr(policy, "shares", "adaptive") == "adaptive"
    if kind in (ClassBalanced, ClassBalancedReservoir) and has_adaptive_shares:
        return WithinBytes(num_pages, by_class=True, num_classes=policy.num_classes)
    raise ValueError(
        f"selection: {kind.__name__} does not say who gives way where bytes are bounded, as they "
        f"are for samples of unequal length: use {POLICIES}"
    )
