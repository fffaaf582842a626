"""What is drawn where a step's new samples are composed with those of earlier tasks alone."""

from __future__ import annotations

from array import array

import numpy as np

from ritornello.arrays import Arrays, Ints
from ritornello.policies.contents import Contents
from ritornello.policies.sampling import SamplingPolicy, uniform_draw


class EarlierTasks(SamplingPolicy):
    """Every representative of an earlier task equally likely, wherever it is stored.

    Of an earlier task is what was admitted before ``RehearsalBuffer.begin_task`` was called last.
    While the buffer holds none of them, as in the first task, nothing is drawn; where no task has
    begun, ``update`` is an error. No representative comes twice in a joint draw, as with
    ``UniformSampling``.
    """

    needs_places = True
    needs_tasks = True

    def bind(self, capacity: int) -> None:
        """See ``SamplingPolicy.bind``."""
        # Of each place where in the list of earlier ones it stands, -1: it does not. So taking
        # one out is one swap, and a draw costs the same however many there are.
        self._positions = np.full(capacity, -1, dtype=np.int64)
        self._earlier = array("q")

    def num_drawable(self, contents: Contents) -> int:
        """See ``SamplingPolicy.num_drawable``."""
        return len(self._earlier)

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        drawn = uniform_draw(len(self._earlier), num_ranks, num_drawn, generator)
        return contents.indices(np.frombuffer(self._earlier, dtype=np.int64)[drawn])

    def begin_task(self, contents: Contents) -> None:
        """See ``SamplingPolicy.begin_task``."""
        self._set_earlier(np.arange(len(self._positions))[contents.used_places])

    def overwritten(self, places: Ints) -> None:
        """See ``SamplingPolicy.overwritten``. What is there now is of the running task."""
        for place in places[self._positions[places] >= 0].tolist():
            position = int(self._positions[place])
            if position < 0:  # it came twice
                continue
            self._positions[place] = -1
            last = self._earlier.pop()
            if last != place:
                self._earlier[position] = last
                self._positions[last] = position

    def moved(self, before: Ints, after: Ints) -> None:
        """See ``SamplingPolicy.moved``. They are of the same task as before."""
        self.overwritten(after)
        for place, now in zip(before.tolist(), after.tolist(), strict=True):
            position = int(self._positions[place])
            if position < 0:
                continue
            self._earlier[position] = now
            self._positions[now], self._positions[place] = position, -1

    def state(self) -> Arrays:
        """See ``SamplingPolicy.state``. The places of what is of earlier tasks."""
        return {"earlier": np.array(self._earlier, dtype=np.int64)}

    def restore(self, state: Arrays) -> None:
        """See ``SamplingPolicy.restore``."""
        self._set_earlier(_checked(state["earlier"], len(self._positions)))

    def adopt(self, state: Arrays, before: Ints, after: Ints) -> None:
        """See ``SamplingPolicy.adopt``."""
        if "earlier" in state:
            self._set_earlier(_moved(state["earlier"], before, after))

    def forget(self, state: Arrays, before: Ints, after: Ints) -> Arrays:
        """See ``SamplingPolicy.forget``. What stays is of the same task as before."""
        return {"earlier": _moved(state["earlier"], before, after)}

    def _set_earlier(self, places: Ints) -> None:
        self._earlier = array("q", places.tolist())
        self._positions[:] = -1
        self._positions[places] = np.arange(len(places))


def _checked(places: Ints, num_places: int) -> Ints:
    """What was saved as places of earlier tasks.

    Raises:
        ValueError: they cannot be.
    """
    if places.dtype != np.int64 or len(np.unique(places)) < len(places):
        raise ValueError("earlier must be places, none of them twice")
    if places.min(initial=0) < 0 or places.max(initial=-1) >= num_places:
        raise ValueError(f"earlier must be places from 0 to {num_places - 1}")
    return places


def _moved(places: Ints, before: Ints, after: Ints) -> Ints:
    """Where representatives at some places are now, of those that are left; in the same order."""
    order = before.argsort()
    if not len(order):
        return places[:0]
    found = order[before[order].searchsorted(places).clip(max=len(order) - 1)]
    moved: Ints = after[found[before[found] == places]]
    return moved
