"""What GRASP draws: from prototypical representatives to atypical ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Arrays, Floats, Ints
from ritornello.policies.contents import Contents
from ritornello.policies.sampling import SamplingPolicy

MOST_DISTANCE = 1e150
"""Distances are far smaller; sums of smaller ones are finite."""


class GraspSampling(SamplingPolicy):
    """From prototypical representatives to atypical ones, class after class.

    The classes take turns. In its turn a class gives one representative, with a probability
    proportional to ``1 / (d + 1e-7)``, where ``d`` is its cosine distance to the mean of its
    class; its ``d`` then grows by the largest one of the class. The ranks' draws follow one
    another, so that all ranks together draw what one rank with ``N * r`` would.

    The distances come from ``RehearsalBuffer.measure_distances``, which is to be called before
    each period of rehearsal. A representative that was admitted since has the mean distance of
    its class; in a class that was never measured all are equally likely, and then take turns.

    Source: Harun et al., "GRASP: A Rehearsal Policy for Efficient Online Continual Learning"
    (CoLLAs 2024).
    """

    needs_labels = True
    needs_distances = True

    EPSILON = 1e-7

    LARGE = 1e100
    """Distances double each time a class has been gone through. Only their ratios matter: from
    here on they are divided by the largest."""

    def bind(self, capacity: int) -> None:
        """See ``SamplingPolicy.bind``."""
        self._num_turns = 0
        self._distances = np.full(capacity, np.nan)  # by place; NaN: not measured

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``. Also raises the distances of what was drawn."""
        labels = contents.class_labels
        turns = (self._num_turns + np.arange(num_ranks * num_drawn)) % len(labels)
        self._num_turns = int(turns[-1]) + 1
        drawn = np.empty(len(turns), dtype=np.int64)
        for number in np.unique(turns).tolist():
            own = np.flatnonzero(turns == number)
            places = contents.places(labels[number])
            drawn[own] = self._draw_of_class(places, generator.random(len(own)))
        return contents.indices(drawn).reshape(num_ranks, num_drawn)

    def _draw_of_class(self, places: Ints, u: Floats) -> Ints:
        """The places of what a class gives in ``len(u)`` turns, one random number for each."""
        distances = self._distances[places]
        unknown = np.isnan(distances)
        if unknown.any():
            distances[unknown] = 1.0 if unknown.all() else distances[~unknown].mean()
        chosen = np.empty(len(u), dtype=np.int64)
        for turn, number in enumerate(u.tolist()):
            chances = (1.0 / (distances + self.EPSILON)).cumsum()
            position = min(
                int(chances.searchsorted(number * chances[-1], side="right")), len(places) - 1
            )
            distances[position] += distances.max()
            chosen[turn] = position
        largest = distances.max()
        self._distances[places] = distances / largest if largest > self.LARGE else distances
        return places[chosen]

    def overwritten(self, places: Ints) -> None:
        """See ``SamplingPolicy.overwritten``."""
        self._distances[places] = np.nan

    def moved(self, before: Ints, after: Ints) -> None:
        """See ``SamplingPolicy.moved``. Distances go with their representatives."""
        self._distances[after] = self._distances[before]
        self._distances[before] = np.nan

    def measured(self, places: Ints, distances: Floats) -> None:
        """See ``SamplingPolicy.measured``."""
        self._distances[places] = distances

    def state(self) -> Arrays:
        """See ``SamplingPolicy.state``. A distance for each place, and the turns."""
        return {"distances": self._distances.copy(), "turns": np.array([self._num_turns])}

    def restore(self, state: Arrays) -> None:
        """See ``SamplingPolicy.restore``."""
        distances, turns = state["distances"], state["turns"]
        if distances.shape != self._distances.shape:
            raise ValueError(f"distances must be {len(self._distances)}, as many as there is room")
        if turns.dtype != np.int64 or turns.shape != (1,) or turns[0] < 0:
            raise ValueError("turns must be one number, at least 0")
        self._distances[:] = _checked(distances)
        self._num_turns = int(turns[0])

    def adopt(self, state: Arrays, before: Ints, after: Ints) -> None:
        """See ``SamplingPolicy.adopt``. The classes begin to take turns anew."""
        if "distances" in state:
            self._distances[after] = _checked(state["distances"])[before]

    def forget(self, state: Arrays, before: Ints, after: Ints) -> Arrays:
        """See ``SamplingPolicy.forget``. Distances stay with their representatives."""
        distances = np.full(len(state["distances"]), np.nan)
        distances[after] = state["distances"][before]
        return {"distances": distances, "turns": state["turns"]}


def _checked(distances: NDArray[Any]) -> Floats:
    """What was saved as distances, which ``draw`` may have raised.

    Raises:
        ValueError: some cannot be.
    """
    if distances.dtype != np.float64:
        raise ValueError(f"distances are {distances.dtype}: they must be float64")
    if not (np.isnan(distances) | ((distances >= 0) & (distances < MOST_DISTANCE))).all():
        raise ValueError("distances must be at least 0, or not measured")
    return distances
