"""Counter-based random streams: the same numbers for a key, whatever ran before.

A stream is a Philox generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) whose *key* is (seed, purpose) and whose *counter* starts at (rank, step). Streams
never overlap: each has 2**128 blocks of its own. Nothing touches a global random state.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

SHARED = 2**64 - 1
"""In place of the rank: a stream that is the same on every rank."""


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes are independent."""

    CANDIDATES = 1
    SELECTION = 2
    SAMPLING = 3
    ADOPTION = 4
    RATE = 5
    COMPOSITION = 6
    PROTECTION = 7
    GENERATION = 8


class Streams:
    """The random streams of one purpose and rank: one for each step.

    Making a generator takes ten times as long as setting its counter, so there is one, and
    ``at`` sets it to the beginning of the step's stream.

    Args:
        seed: from 0 to 2**64 - 1.
        purpose: what the numbers are for.
        rank: the rank, or ``SHARED`` for numbers that all ranks must agree on.
    """

    def __init__(self, seed: int, purpose: Purpose, rank: int = SHARED) -> None:
        key = np.array([seed, purpose], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, rank, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state
        self._counter = self._start["state"]["counter"]

    def at(self, step: int) -> np.random.Generator:
        """The stream of ``step`` (counts rounds from 0); valid until the next call."""
        self._counter[3] = step
        self._bits.state = self._start
        return self._generator


def stream(seed: int, purpose: Purpose, step: int, rank: int = SHARED) -> np.random.Generator:
    """The random stream of one purpose, step and rank; see ``Streams``."""
    return Streams(seed, purpose, rank).at(step)
