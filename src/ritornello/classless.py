"""Selection policies that look at no labels: the most recent, or a sample of everything."""

from __future__ import annotations

import numpy as np

from ritornello.arrays import Floats, Ints
from ritornello.assignment import Assignment, SelectionPolicy


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
        slots = reservoir_positions(ordinals, self.num_slots, generator.random(len(labels)))
        self._num_offered += len(labels)
        rows = np.flatnonzero(slots < self.num_slots)
        return Assignment(rows, slots[rows])


def reservoir_positions(ordinals: Ints, size: Ints | int, u: Floats) -> Ints:
    """Algorithm R: where each candidate of a stream goes; at or above ``size``: nowhere."""
    return np.where(ordinals < size, ordinals, (u * (ordinals + 1)).astype(np.int64))
