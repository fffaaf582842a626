"""The classes of a saved buffer: merged over its shards, cut to a capacity, dealt out anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ritornello.arrays import Bools, Ints
from ritornello.policies.selection import SavedShards, State
from ritornello.policies.share_scores import (
    highest_scores,
    lowest,
    mixed,
    precedence,
    rank_of_lowest_score,
)

MOST_OFFERED = 2**48
"""No class offers as many candidates; what is computed from fewer fits into 64 bits."""

Choose = Callable[[int, int], Ints]
"""How many a class has, and how many of them stay: the positions of those, ascending."""


def check_classes(state: State, size: int) -> None:
    """Checks what a policy with classes has saved.

    Its state holds, for each class as they appeared, ``labels``, ``offered`` and ``counts``; and
    ``slots``, of the first class, of the second, and so on.

    Raises:
        ValueError, KeyError: it contradicts itself or the size of the shard.
    """
    labels, offered, counts, slots = (state[n] for n in ("labels", "offered", "counts", "slots"))
    if not len(labels) == len(offered) == len(counts):
        raise ValueError(f"{len(labels)} labels, {len(offered)} offered, {len(counts)} counts")
    if len(np.unique(labels)) < len(labels) or labels.min(initial=0) < 0:
        raise ValueError("labels must differ and be at least 0")
    if counts.min(initial=0) < 0 or counts.max(initial=0) > size or counts.sum() != size:
        raise ValueError(f"counts must add up to {size}")
    if np.any(offered < counts) or offered.max(initial=0) >= MOST_OFFERED:
        raise ValueError(f"offered must be at least counts, and below {MOST_OFFERED}")
    if not np.array_equal(np.sort(slots), np.arange(size)):
        raise ValueError(f"slots must be those from 0 to {size - 1}, once each")


def forget_slots(state: State, size: int, removed: Ints) -> tuple[State, Ints]:
    """The same of a shard without some representatives; each class keeps its order.

    What is stored of a class is a sample of what it has offered: so as large a part of that is
    forgotten, and of what was stored whole, one for each.

    Args:
        state: as ``check_classes`` wants it.
        size: of the shard.
        removed: int64 ``[n]``, slots.

    Returns:
        That state; and the slots of those that stay, ascending: their new order.

    Raises:
        ValueError, KeyError: see ``check_classes``.
    """
    check_classes(state, size)
    before, slots = state["counts"], state["slots"]
    stays = ~np.isin(slots, removed)
    classes = np.repeat(np.arange(len(before)), before)[stays]
    counts = np.bincount(classes, minlength=len(before))
    kept = np.sort(slots[stays])
    forgotten = state | {
        "offered": np.where(
            counts < before, in_proportion(state["offered"], counts, before), state["offered"]
        ),
        "counts": counts,
        "slots": kept.searchsorted(slots[stays]),
    }
    return forgotten, kept


def key_array(key: int) -> Ints:
    """What is saved of the key of the precedence of classes."""
    return np.array([key], dtype=np.uint64).view(np.int64)


def key_of(states: Sequence[State], otherwise: int) -> int:
    """The key of the precedence of classes, as shards have saved it.

    Args:
        states: of the shards' policies.
        otherwise: if they have none, as those of earlier releases.

    Raises:
        ValueError: they contradict each other.
    """
    keys = np.unique(np.concatenate([state.get("key", np.zeros(0, np.int64)) for state in states]))
    if len(keys) > 1:
        raise ValueError("key must be one number, the same in all shards")
    return int(keys.view(np.uint64)[0]) if len(keys) else otherwise


def in_proportion(offered: Ints, counts: Ints, whole: Ints) -> Ints:
    """The part of what classes have offered that ``counts`` out of ``whole`` stand for."""
    each, rest = np.divmod(offered, np.maximum(1, whole))  # no product exceeds what was offered
    return counts * each - (-counts * rest // np.maximum(1, whole))


@dataclass(frozen=True)
class SavedClasses:
    """All representatives of a buffer, class by class; in each from the first to go last.

    Attributes:
        labels: int64 ``[num_classes]``, in the order in which they appeared.
        offered: int64 ``[num_classes]``, to all ranks.
        counts: int64 ``[num_classes]``, representatives.
        owners: int64 ``[num_held]``, whose shard each is in.
        slots: int64 ``[num_held]``, where in it.
        lost: bool ``[num_classes]``, whether some of what was offered is not stored.
    """

    labels: Ints
    offered: Ints
    counts: Ints
    owners: Ints
    slots: Ints
    lost: Bools

    @classmethod
    def merged(cls, saved: SavedShards) -> SavedClasses:
        """The classes of the shards of all ranks.

        Raises:
            ValueError, KeyError: see ``check_classes``.
        """
        num_ranks = len(saved.states)
        for state, size in zip(saved.states, saved.sizes.tolist(), strict=True):
            check_classes(state, size)
        appeared = [np.arange(len(state["labels"])) for state in saved.states]
        in_order = np.argsort(np.concatenate(appeared), kind="stable")
        everywhere = np.concatenate([state["labels"] for state in saved.states])[in_order]
        labels = everywhere[np.sort(np.unique(everywhere, return_index=True)[1])]
        ascending = np.argsort(labels, kind="stable")
        offered = np.zeros_like(labels)
        num_known = np.zeros_like(labels)  # ranks that know what they were offered
        num_refusing = np.zeros_like(labels)  # ranks that may have refused, and know nothing
        parts = []
        for rank, state in enumerate(saved.states):
            numbers = ascending[labels[ascending].searchsorted(state["labels"])]
            offered[numbers] += state["offered"]
            num_known[numbers] += 1
            if np.count_nonzero(state["counts"]) == saved.num_slots(rank):
                num_refusing += 1
                num_refusing[numbers] -= 1
            classes = np.repeat(numbers, state["counts"])
            ends = state["counts"].cumsum()
            firsts = np.repeat(ends - state["counts"], state["counts"])
            first_ranks = rank_of_lowest_score(labels[classes], num_ranks)
            scores = (np.arange(len(classes)) - firsts) * num_ranks
            scores += (rank - first_ranks) % num_ranks
            owners = np.full(len(classes), rank)
            parts.append(np.stack([classes, scores, owners, state["slots"]]))
        # Those are taken to have seen as many as the others.
        offered += num_refusing * offered // np.maximum(1, num_known)
        classes, scores, owners, slots = np.concatenate(parts, axis=1)
        order = np.lexsort([scores, classes])
        counts = np.bincount(classes, minlength=len(labels))
        return cls(labels, offered, counts, owners[order], slots[order], offered > counts)

    def shares(self, capacity: int, key: int) -> Ints:
        """What each class keeps where there is room for so many: the largest ones give way.

        Args:
            capacity: the room.
            key: of the precedence of classes, by which some go if there is no room for all.
        """
        if np.count_nonzero(self.counts) > capacity:
            held = np.flatnonzero(self.counts)
            shares = np.zeros_like(self.counts)
            shares[held[lowest(precedence(self.labels[held], key, 0, 1), capacity)]] = 1
            return shares
        excess = int(self.counts.sum()) - capacity
        if excess <= 0:
            return self.counts
        offsets = np.zeros_like(self.counts)
        return self.counts - highest_scores(self.counts, excess, offsets, 1)

    def cut(self, shares: Ints, choose: Choose) -> SavedClasses:
        """With no more than its share of each class.

        Args:
            shares: int64 ``[num_classes]``.
            choose: who stays of a class that has more.
        """
        shares = np.minimum(shares, self.counts)
        firsts = self.counts.cumsum() - self.counts
        kept = [
            first + (choose(count, share) if share < count else np.arange(count))
            for first, count, share in zip(
                firsts.tolist(), self.counts.tolist(), shares.tolist(), strict=True
            )
        ]
        index = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)
        return replace(
            self,
            counts=shares,
            owners=self.owners[index],
            slots=self.slots[index],
            lost=self.lost | (shares < self.counts),
        )

    def without_empty(self) -> SavedClasses:
        """Without those of which nothing is stored."""
        held = self.counts > 0
        return replace(
            self,
            labels=self.labels[held],
            offered=self.offered[held],
            counts=self.counts[held],
            lost=self.lost[held],
        )

    def of_rank(self, rank: int, num_ranks: int) -> SavedClasses:
        """The part of one of ``num_ranks`` ranks.

        Every rank has equally many of each class and altogether, up to one. What was offered of a
        class is divided equally, however many of it a rank holds: so old and new candidates have
        equal chances over all ranks, if those are fed alike. Of a class of which all is stored it
        is what a rank holds.
        """
        classes = np.repeat(np.arange(len(self.labels)), self.counts)
        part = np.flatnonzero(self._dealt(classes, num_ranks) == rank)
        counts = np.bincount(classes[part], minlength=len(self.labels))
        each, rest = np.divmod(self.offered, num_ranks)
        first = (mixed(self.labels + self.offered) % np.uint64(num_ranks)).astype(np.int64)
        each += (rank - first) % num_ranks < rest
        offered = np.where(self.lost, np.maximum(each, counts), counts)
        return replace(
            self, counts=counts, offered=offered, owners=self.owners[part], slots=self.slots[part]
        )

    def _dealt(self, classes: Ints, num_ranks: int) -> Ints:
        """The rank of each representative, whose class is given; they are dealt turn by turn.

        Where a rank has no room for all classes, the next class is one that begins on the rank
        whose turn it is, as long as there is one: there it stays longest.
        """
        turns = np.arange(len(classes)) % num_ranks
        if np.count_nonzero(self.counts) <= len(classes) // num_ranks:
            return turns
        homes = rank_of_lowest_score(self.labels, num_ranks)
        waiting = [np.flatnonzero(homes == rank)[::-1].tolist() for rank in range(num_ranks)]
        starts, at = np.zeros_like(self.counts), 0
        for _ in range(len(self.labels)):
            number = (waiting[at % num_ranks] or max(waiting, key=len)).pop()
            starts[number] = at
            at += int(self.counts[number])
        firsts = self.counts.cumsum() - self.counts
        return (starts[classes] + np.arange(len(classes)) - firsts[classes]) % num_ranks

    def state(self) -> State:
        """What their policy knows once they are in the slots from 0 on; see ``check_classes``."""
        return {
            "labels": self.labels,
            "offered": self.offered,
            "counts": self.counts,
            "slots": np.arange(len(self.slots)),
        }


def at_random(generator: np.random.Generator) -> Choose:
    """Every set of positions equally likely."""
    return lambda count, share: np.sort(generator.choice(count, share, replace=False))


def first_ones(count: int, share: int) -> Ints:
    """The first ones."""
    return np.arange(share)
