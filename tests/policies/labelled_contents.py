"""A buffer without samples for sampling policies to draw from: unequal shards and classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ritornello import SamplingPolicy
from ritornello.policies.contents import Contents
from ritornello.rounds.planner import draw_all
from ritornello.rounds.random_streams import Purpose, Streams

# Three unequal shards with room to spare; the classes 3, 5 and 8 hold 40, 8 and 24.
SIZES = (30, 30, 12)
ROWS = (40, 30, 25)
LABELS = np.array([3] * 30 + [3] * 10 + [5] * 8 + [8] * 12 + [8] * 12)


def labelled_contents() -> Contents:
    made = Contents(np.array(SIZES), np.array(ROWS))
    for rank, labels in enumerate(np.split(LABELS, np.cumsum(SIZES)[:-1])):
        made.admit(rank, np.arange(len(labels)), labels)
    return made


def draws(policy: SamplingPolicy, num_drawn: int, num_steps: int) -> Iterator[np.ndarray]:
    """Joint draws of three ranks."""
    held, streams = labelled_contents(), Streams(3, Purpose.SAMPLING)
    policy.bind(sum(ROWS))
    for step in range(num_steps):
        yield draw_all(held, num_drawn, 1, policy, streams.at(step))[0]
