"""Selection policies that look at no labels: the most recent, or a sample of everything."""

from __future__ import annotations

import numpy as np

from ritornello.arrays import Floats, Ints
from ritornello.policies.saved.classes import MOST_OFFERED
from ritornello.policies.selection import (
    Assignment,
    SavedShards,
    SelectionPolicy,
    State,
    part_of_rank,
)


class Fifo(SelectionPolicy):
    """The most recent candidates: each replaces the oldest one."""

    _num_offered = 0

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        rows = np.arange(max(0, len(labels) - self.num_slots), len(labels))
        slots = (self._num_offered + rows) % self.num_slots
        self._num_offered += len(labels)
        return Assignment(rows, slots)

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        return {"offered": np.array([self._num_offered])}

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        self._num_offered = _num_offered(state, size)
        if size < self.num_slots and self._num_offered != size:
            raise ValueError(f"offered={self._num_offered}, but only {size} are stored")

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``. The oldest go first, counted on each rank alike."""
        ages, owners, slots = [], [], []
        for owner, (state, size) in enumerate(zip(saved.states, saved.sizes.tolist(), strict=True)):
            slots.append(self._by_age(state, size))
            ages.append(np.arange(size, 0, -1))
            owners.append(np.full(size, owner))
        order = np.argsort(-np.concatenate(ages), kind="stable")[-capacity:]
        own = order[part_of_rank(self.rank, self.num_ranks)]
        self._num_offered = len(own)
        return np.concatenate(owners)[own], np.concatenate(slots)[own]

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``."""
        by_age = self._by_age(state, size)
        kept = by_age[~np.isin(by_age, removed)]
        return {"offered": np.array([len(kept)])}, kept

    @staticmethod
    def _by_age(state: State, size: int) -> Ints:
        """A shard's slots, the oldest first."""
        # A shard that is not full has its oldest in slot 0, where the remainder is 0, too.
        return (_num_offered(state, size) + np.arange(size)) % max(1, size)


class Reservoir(SelectionPolicy):
    """A uniform sample of all candidates so far, whatever their class.

    Source: Vitter, "Random sampling with a reservoir" (1985), Algorithm R. The n-th candidate
    is admitted with probability slots / n and replaces any representative with equal chance.
    """

    _num_offered = 0
    _num_used = 0

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        ordinals = self._num_offered + np.arange(len(labels))
        slots = reservoir_positions(ordinals, self.num_slots, generator.random(len(labels)))
        if self._num_used < self.num_slots:
            unused = self._num_used + np.arange(len(labels))
            slots = np.where(unused < self.num_slots, unused, slots)
            self._num_used = min(self.num_slots, self._num_used + len(labels))
        self._num_offered += len(labels)
        rows = np.flatnonzero(slots < self.num_slots)
        return Assignment(rows, slots[rows])

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        return {"offered": np.array([self._num_offered])}

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        self._num_offered, self._num_used = _num_offered(state, size), size

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``.

        A sample of a uniform sample is one. Into a larger capacity every candidate enters until
        it is in use; nothing old goes for it, but recent samples are then more likely stored.
        """
        num_held = int(saved.sizes.sum())
        owners = np.repeat(np.arange(len(saved.sizes)), saved.sizes)
        slots = np.concatenate([np.arange(size) for size in saved.sizes.tolist()])
        kept = np.arange(num_held)
        if num_held > capacity:
            kept = np.sort(generator.choice(num_held, capacity, replace=False))
        own = kept[part_of_rank(self.rank, self.num_ranks)]
        num_offered = sum(
            _num_offered(state, size)
            for state, size in zip(saved.states, saved.sizes.tolist(), strict=True)
        )
        self._num_used = len(own)
        # Equally many for all ranks, whichever have an odd representative: so old and new
        # candidates have equal chances over all ranks, if those are fed alike.
        each, rest = divmod(num_offered, self.num_ranks)
        each += self.num_ranks - 1 - self.rank < rest
        self._num_offered = len(own) if num_offered == len(kept) else max(len(own), each)
        return owners[own], slots[own]

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``.

        What is stored is a sample of what was offered: so as large a part of that is forgotten.
        """
        num_offered = _num_offered(state, size)
        kept = np.setdiff1d(np.arange(size), removed)
        return {"offered": np.array([-(-len(kept) * num_offered // size)])}, kept


def _num_offered(state: State, size: int) -> int:
    (num_offered,) = state["offered"].tolist()
    if not size <= num_offered < MOST_OFFERED:
        raise ValueError(f"offered={num_offered}, but {size} are stored")
    return int(num_offered)


def reservoir_positions(ordinals: Ints, size: Ints | int, u: Floats) -> Ints:
    """Algorithm R: where each candidate of a stream goes; at or above ``size``: nowhere."""
    return np.where(ordinals < size, ordinals, (u * (ordinals + 1)).astype(np.int64))
