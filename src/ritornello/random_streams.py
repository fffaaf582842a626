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


def stream(seed: int, purpose: Purpose, step: int, rank: int = SHARED) -> np.random.Generator:
    """The random stream of one purpose, step and rank.

    Args:
        seed: from 0 to 2**64 - 1.
        purpose: what the numbers are for.
        step: counts rounds from 0.
        rank: the rank, or ``SHARED`` for numbers that all ranks must agree on.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, rank, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
