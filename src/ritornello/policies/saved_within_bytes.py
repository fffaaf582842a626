"""What was saved of who is kept where bytes are bounded, and how it is dealt out to other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.classes.saved import MOST_OFFERED
from ritornello.policies.selection import State

NO_END = 2**63 - 1
"""All keys are below it."""

PROTECTED, OFFERED, LEFT = range(3)
"""What is held is protected, or was offered since something was, or was there before. Of these,
the last ones give way first, and the first ones to nobody."""

Group = tuple[int, int]
"""One of these, and a label."""


@dataclass(frozen=True)
class SavedWithinBytes:
    """What was saved of a shard, or of several: of each representative, in the order of slots."""

    kinds: Ints
    labels: Ints
    keys: Ints
    pages: Ints
    ends: dict[Group, int]
    num_offered: int

    @classmethod
    def of(cls, state: State, size: int) -> SavedWithinBytes:
        """A shard's.

        Raises:
            ValueError, KeyError: no ``WithinBytes`` can have given it.
        """
        (num_offered,) = state["offered"].tolist()
        counts, ends, slots = state["counts"], state["ends"], state["slots"]
        labels = state.get("labels", np.zeros(len(counts), dtype=np.int64))
        kinds = state.get("kinds", np.full(len(counts), OFFERED))
        if not len(kinds) == len(labels) == len(counts) == len(ends):
            raise ValueError("counts, ends, labels and kinds must be as many")
        groups = list(zip(kinds.tolist(), labels.tolist(), strict=True))
        if len(set(groups)) < len(groups) or not np.isin(kinds, (PROTECTED, OFFERED, LEFT)).all():
            raise ValueError("labels of one kind must differ, and be of a kind that there is")
        if counts.min(initial=0) < 0 or counts.sum() != size:
            raise ValueError(f"counts must add up to the {size} representatives")
        if not np.array_equal(np.sort(slots), np.arange(size)):
            raise ValueError("slots must be those of all representatives, once each")
        keys, pages, order = state["keys"], state["pages"], np.argsort(slots)
        if not len(keys) == len(pages) == size:
            raise ValueError(f"{len(keys)} keys, {len(pages)} pages for {size} representatives")
        if not size <= num_offered < MOST_OFFERED:
            raise ValueError(f"offered={num_offered}, but {size} are stored")
        for name, numbers in (("labels", labels), ("keys", keys), ("pages", pages), ("ends", ends)):
            if numbers.min(initial=0) < 0:
                raise ValueError(f"{name} must be at least 0")
        if keys.max(initial=0) >= NO_END:
            raise ValueError(f"keys must be below {NO_END}")
        return cls(
            kinds=np.repeat(kinds, counts)[order],
            labels=np.repeat(labels, counts)[order],
            keys=keys[order],
            pages=pages[order],
            ends=dict(zip(groups, ends.tolist(), strict=True)),
            num_offered=int(num_offered),
        )

    def part(self, chosen: Ints) -> SavedWithinBytes:
        """Some of them, in that order."""
        return replace(
            self,
            kinds=self.kinds[chosen],
            labels=self.labels[chosen],
            keys=self.keys[chosen],
            pages=self.pages[chosen],
        )

    @classmethod
    def joined(cls, shards: Sequence[SavedWithinBytes], newest: bool) -> SavedWithinBytes:
        """All of several shards, one after the other.

        Args:
            shards: at least one.
            newest: whether keys say who is newer: then they are given anew, none twice, as if all
                ranks had been offered equally many.
        """
        kinds = np.concatenate([each.kinds for each in shards])
        keys = np.concatenate([each.keys for each in shards])
        ends = {
            group: min(each.ends.get(group, NO_END) for each in shards)
            for group in sorted({group for each in shards for group in each.ends})
            if group[0] == OFFERED
        }
        if newest:
            ages = np.concatenate([each.ages for each in shards])
            anew = np.empty_like(keys)
            anew[np.argsort(-ages, kind="stable")] = NO_END - 1 - np.arange(len(keys))
            keys, ends = np.where(kinds == OFFERED, anew, keys), {}
        return cls(
            kinds=kinds,
            labels=np.concatenate([each.labels for each in shards]),
            keys=keys,
            pages=np.concatenate([each.pages for each in shards]),
            ends=ends,
            num_offered=max(len(keys), *(each.num_offered for each in shards)),
        )

    @property
    def ages(self) -> Ints:
        """Of each its place from the newest on, where lower keys are newer; others come last."""
        keys = np.where(self.kinds == OFFERED, self.keys, NO_END)
        return keys.argsort(kind="stable").argsort()

    def dealt_to(self, slots_per_rank: Sequence[int], pages_per_rank: Sequence[int]) -> Ints:
        """The rank of each, int64.

        Group by group, or, where then not all find room that would alone, the longest of all groups
        first.

        Args:
            slots_per_rank: of the shards.
            pages_per_rank: of the shards.
        """
        rooms = list(zip(slots_per_rank, pages_per_rank, strict=True))
        by_group = np.lexsort((self.keys, -self.pages, self.labels, self.kinds))
        ranks, all_fit = self._dealt(by_group, rooms)
        if not all_fit:
            longest_first = np.lexsort((self.keys, self.labels, self.kinds, -self.pages))
            others, all_fit = self._dealt(longest_first, rooms)
            ranks = others if all_fit else ranks
        return ranks

    def _dealt(self, order: Ints, rooms: Sequence[tuple[int, int]]) -> tuple[Ints, bool]:
        """Deals them out in some order.

        Of the ranks that have room for one, it goes to that with the fewest, and of these to that
        with the fewest pages. What finds no room goes round all ranks in the same way.

        Returns:
            The rank of each, int64; and whether all found room for which there is a rank at all.
        """
        ranks, all_fit = np.zeros(len(order), dtype=np.int64), True
        dealt, beyond = [(0, 0)] * len(rooms), [(0, 0)] * len(rooms)
        most = max(num_pages for _, num_pages in rooms)
        for each in order.tolist():
            pages = int(self.pages[each])
            with_room = [
                rank
                for rank, (count, used) in enumerate(dealt)
                if count < rooms[rank][0] and used + pages <= rooms[rank][1]
            ]
            to = dealt if with_room else beyond
            ranks[each] = rank = min(with_room or range(len(rooms)), key=to.__getitem__)
            to[rank] = to[rank][0] + 1, to[rank][1] + pages
            all_fit &= bool(with_room) or pages > most
        return ranks, all_fit
