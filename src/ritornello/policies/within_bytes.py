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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.class_shares import ClassBalanced
from ritornello.policies.classes.scores import num_labels_in_excess, precedence
from ritornello.policies.contents import HAS_COME, HAS_LEFT, HAS_MOVED
from ritornello.policies.largest_class import ClassBalancedReservoir
from ritornello.policies.reservoir import Fifo, Reservoir
from ritornello.policies.saved_within_bytes import (
    LEFT,
    NO_END,
    OFFERED,
    PROTECTED,
    Group,
    SavedWithinBytes,
)
from ritornello.policies.selection import (
    Assignment,
    SavedShards,
    SelectionPolicy,
    State,
    part_of_rank,
)

POLICIES = "'class-balanced' (adaptive), 'class-balanced-reservoir', 'reservoir' or 'fifo'"
"""Whose law ``WithinBytes`` keeps."""


NOBODY = np.zeros(0, dtype=np.int64)


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

    def changes(self, labels: Ints) -> Ints:
        """All of it as a table: int64 ``[n, 3]``.

        Args:
            labels: int64 ``[m]``, of the candidates.

        Returns:
            Of each a slot; ``HAS_LEFT`` it, ``HAS_COME`` to it, or ``HAS_MOVED`` to it plus the
            slot where it was; and the label of what came.
        """
        left, came = np.full_like(self.removed, HAS_LEFT), np.full_like(self.slots, HAS_COME)
        changes = np.zeros((len(left) + len(self.moved_to) + len(came), 3), dtype=np.int64)
        changes[:, 0] = np.concatenate([self.removed, self.moved_to, self.slots])
        changes[:, 1] = np.concatenate([left, self.moved_from + HAS_MOVED, came])
        changes[len(changes) - len(came) :, 2] = labels[self.rows]
        return changes


@dataclass
class _Held:
    """What is held of a group."""

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
        pages_per_rank: of all shards; if not given, each has as many as this one.
    """

    def __init__(
        self,
        num_pages: int,
        by_class: bool,
        newest: bool = False,
        num_classes: int | None = None,
        pages_per_rank: Sequence[int] | None = None,
    ) -> None:
        self.num_pages, self.needs_labels, self._newest = num_pages, by_class, newest
        self.num_classes, self._pages_per_rank = num_classes, pages_per_rank
        self._num_offered = self._num_held = self._num_pages_used = 0
        self.num_protected = self._num_pages_protected = 0
        self._groups: dict[Group, _Held] = {}
        self._largest: list[tuple[int, int, int, int]] = []  # a heap; some of it is out of date

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._make_room(num_slots)

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
        most_pages = self.num_pages - self._num_pages_protected
        num_before, end = self._num_held, self._num_held
        keys = self._next_keys(len(labels), generator)
        class_of = labels.tolist() if self.needs_labels else [0] * len(labels)
        for row, (label, key, pages) in enumerate(
            zip(class_of, keys.tolist(), num_pages.tolist(), strict=True)
        ):
            # Pages first: of a class that is refused for these alone nothing is remembered.
            if pages > most_pages or key >= self._group((OFFERED, label)).end:
                continue
            if unused:
                slot = unused.pop()
            else:
                slot, end = end, end + 1
            came[slot] = row
            self._put(slot, (OFFERED, label), key, pages)
            while self._is_over_full:
                group = self._gives_way()
                self._note_excess(group)
                slot = self._take_highest(group)
                unused.append(slot)
                if came.pop(slot, None) is None:
                    removed.append(slot)
        if end == num_before:
            return Turnover(NOBODY, NOBODY, NOBODY, NOBODY, NOBODY, num_before)
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

    def _group(self, group: Group) -> _Held:
        found = self._groups.get(group)
        if found is None:
            labels = np.array(group[1:])
            order = precedence(labels, self.buffer_seed, self.rank, self.num_ranks)
            found = self._groups[group] = _Held(int(order[0]))
        return found

    def _make_room(self, num_slots: int) -> None:
        # One slot more, for a candidate that is there before another one gives way.
        self._keys, self._pages, self._label_of, self._kind_of = np.zeros(
            (4, num_slots + 1), dtype=np.int64
        )

    @property
    def _is_over_full(self) -> bool:
        return self._num_held > self.num_slots or self._num_pages_used > self.num_pages

    def _put(self, slot: int, group: Group, key: int, pages: int) -> None:
        held = self._group(group)
        place = bisect_left(held.keys, key)
        held.keys.insert(place, key)
        held.slots.insert(place, slot)
        self._keys[slot], self._pages[slot] = key, pages
        self._kind_of[slot], self._label_of[slot] = group
        self._num_held += 1
        self._num_pages_used += pages
        self._note_size(group, held)

    def _take_highest(self, group: Group) -> int:
        """Takes the highest key of a group out; its slot."""
        held = self._groups[group]
        held.end = min(held.end, held.keys.pop())
        slot = held.slots.pop()
        self._num_held -= 1
        self._num_pages_used -= int(self._pages[slot])
        if not held.keys and (group[0] != OFFERED or len(self._groups) > self.num_slots):
            del self._groups[group]  # else what is remembered would grow with the classes
        else:
            self._note_size(group, held)
        return slot

    def _move(self, slot: int, to: int) -> None:
        key, group = int(self._keys[slot]), (int(self._kind_of[slot]), int(self._label_of[slot]))
        held = self._groups[group]
        place = held.slots.index(slot, bisect_left(held.keys, key))
        held.slots[place] = to
        for each in (self._keys, self._pages, self._label_of, self._kind_of):
            each[to] = each[slot]

    def _note_size(self, group: Group, held: _Held) -> None:
        if len(self._largest) > 4 * (len(self._groups) + 16):
            self._largest = [self._rank(*each) for each in self._groups.items()]
            heapify(self._largest)
        heappush(self._largest, self._rank(group, held))

    def _note_excess(self, group: Group) -> None:
        """Says so if one gives way as there are more classes than slots."""
        held, num_others = self._groups[group], self._num_held - self.num_protected - 1
        if self.excess_labels or len(held.keys) > 1 or group[0] != OFFERED or not num_others:
            return
        num_slots = self.num_slots - self.num_protected
        self.excess_labels = num_labels_in_excess(
            num_others + 1, held.precedence, num_slots, self.num_ranks, num_others
        )

    def _rank(self, group: Group, held: _Held) -> tuple[int, int, int, int]:
        """Who gives way before whom."""
        kind, label = group
        return -kind, -len(held.keys), -held.precedence, label

    def _gives_way(self) -> Group:
        """The group that gives way: of those that do first, the one that holds most."""
        while True:
            kind, size, _, label = self._largest[0]
            group = -kind, label
            held = self._groups.get(group)
            if size and held is not None and len(held.keys) == -size:
                return group
            heappop(self._largest)

    # Protecting.

    def protect(self, num_slots: int, num_pages: int, generator: np.random.Generator) -> int:
        """Protects what it holds, in a part of the shard; what else it holds gives way first.

        Who is protected says the law, too: of each class as many as of the others, and random
        ones. What is offered from now on shares what is left as in a shard that has no more.

        Args:
            num_slots: that may be protected altogether.
            num_pages: in which they must fit.
            generator: chooses.

        Returns:
            How many are protected now.
        """
        saved = self._saved
        before = saved.kinds == PROTECTED
        anew = generator.integers(0, NO_END, len(saved.keys))
        saved = replace(saved, keys=np.where(before, saved.keys, anew), ends={})
        num_pages = max(num_pages, int(saved.pages[before].sum()))
        part = WithinBytes(num_pages, self.needs_labels)
        part.buffer_seed = self.buffer_seed
        part.bind(max(num_slots, int(before.sum())), self.rank, self.num_ranks)
        kinds = np.full_like(saved.kinds, LEFT)
        kinds[part._hold(replace(saved, kinds=np.where(before, PROTECTED, OFFERED)))] = PROTECTED
        self._hold(replace(saved, kinds=kinds))
        return int((kinds == PROTECTED).sum())

    @property
    def _saved(self) -> SavedWithinBytes:
        held = slice(self._num_held)
        return SavedWithinBytes(
            kinds=self._kind_of[held],
            labels=self._label_of[held],
            keys=self._keys[held],
            pages=self._pages[held],
            ends={group: each.end for group, each in self._groups.items()},
            num_offered=self._num_offered,
        )

    # Saving.

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        groups = list(self._groups.values())
        kinds, labels = np.array(list(self._groups), dtype=np.int64).reshape(-1, 2).T
        slots = np.array([slot for each in groups for slot in each.slots], dtype=np.int64)
        state = {
            "offered": np.array([self._num_offered]),
            "ends": np.array([each.end for each in groups], dtype=np.int64),
            "counts": np.array([len(each.slots) for each in groups], dtype=np.int64),
            "slots": slots,
            "keys": self._keys[slots],
            "pages": self._pages[slots],
        }
        if self.needs_labels:
            state["labels"] = labels.copy()
        if (kinds != OFFERED).any():
            state["kinds"] = kinds.copy()
        return state

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        saved = SavedWithinBytes.of(state, size)
        num_pages = int(saved.pages.sum())
        if size > self.num_slots or num_pages > self.num_pages:
            raise ValueError(f"{size} representatives in {num_pages} pages do not fit")
        self._hold(saved)

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``.

        Each group goes to the ranks in turn, its longest first (``SavedWithinBytes.dealt_to``).
        Where a rank's do not fit, the law says who gives way: what is protected only where nothing
        else is left. A class may come back up to the lowest end that it had on any rank. Where the
        newest stay, the oldest of each rank are as old as those of the others.
        """
        shards = [
            SavedWithinBytes.of(*each)
            for each in zip(saved.states, saved.sizes.tolist(), strict=True)
        ]
        joined = SavedWithinBytes.joined(shards, self._newest)
        owners = np.repeat(np.arange(len(shards)), saved.sizes)
        slots = np.concatenate([np.arange(size) for size in saved.sizes.tolist()])
        parts = [part_of_rank(rank, self.num_ranks) for rank in range(self.num_ranks)]
        slots_per_rank = [len(range(capacity)[part]) for part in parts]
        pages_per_rank = self._pages_per_rank or [self.num_pages] * self.num_ranks
        own = np.flatnonzero(joined.dealt_to(slots_per_rank, pages_per_rank) == self.rank)
        own = own[self._hold(joined.part(own))]
        for group in [group for group, held in self._groups.items() if not held.keys]:
            if len(self._groups) > self.num_slots:  # as where one gives way
                del self._groups[group]
        return owners[own], slots[own]

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. New ones still come back as far only as before."""
        saved = SavedWithinBytes.of(state, size)
        kept = np.setdiff1d(np.arange(size), removed)
        left = saved.part(kept)
        policy = WithinBytes(int(left.pages.sum()), "labels" in state)
        policy.bind(len(kept), 0, 1)
        policy._hold(left)
        return policy.state(), kept

    def _hold(self, saved: SavedWithinBytes) -> Ints:
        """Takes over representatives, from slot 0 on, in place of what it held.

        Returns:
            Which of them, ascending: the law says who gives way where they do not fit.
        """
        num = len(saved.keys)
        self._num_offered = saved.num_offered
        self._num_held = self._num_pages_used = 0
        self._groups, self._largest = {}, []
        self._make_room(max(num, self.num_slots))
        for group, end in saved.ends.items():
            self._group(group).end = end
        rows = zip(
            saved.kinds.tolist(),
            saved.labels.tolist(),
            saved.keys.tolist(),
            saved.pages.tolist(),
            strict=True,
        )
        # As of candidates: one that would not fit alone moves no other.
        protected = saved.kinds == PROTECTED
        num_protected = int(saved.pages[protected & (saved.pages <= self.num_pages)].sum())
        most = np.where(protected, self.num_pages, max(0, self.num_pages - num_protected))
        stays = saved.pages <= most
        for slot, (kind, label, key, pages) in enumerate(rows):
            if stays[slot]:
                self._put(slot, (kind, label), key, pages)
        while self._is_over_full:
            stays[self._take_highest(self._gives_way())] = False
        slot_after = stays.cumsum() - 1
        for each in self._groups.values():
            each.slots = slot_after[each.slots].tolist()
        kept = np.flatnonzero(stays)
        for values in (self._keys, self._pages, self._label_of, self._kind_of):
            values[: len(kept)] = values[kept]
        protected = self._kind_of[: len(kept)] == PROTECTED
        self.num_protected = int(protected.sum())
        self._num_pages_protected = int(self._pages[: len(kept)][protected].sum())
        return kept


def within_bytes(
    policy: SelectionPolicy, num_pages: int, pages_per_rank: Sequence[int] | None = None
) -> WithinBytes:
    """What keeps a policy's law where bytes are bounded, too.

    Args:
        policy: whose law.
        num_pages: of the shard.
        pages_per_rank: of all shards.

    Raises:
        ValueError: there is nothing for such a policy.
    """
    kind = type(policy)
    if kind in (Reservoir, Fifo):
        return WithinBytes(num_pages, False, kind is Fifo, pages_per_rank=pages_per_rank)
    has_adaptive_shares = getattr(policy, "shares", "adaptive") == "adaptive"
    if kind in (ClassBalanced, ClassBalancedReservoir) and has_adaptive_shares:
        return WithinBytes(
            num_pages, True, num_classes=policy.num_classes, pages_per_rank=pages_per_rank
        )
    raise ValueError(
        f"selection: {kind.__name__} does not say who gives way where bytes are bounded, as they "
        f"are for samples of unequal length: use {POLICIES}"
    )
