"""A holdout: a part of the training samples that stands in for the test samples.

Settings are chosen by it, so that the test samples are looked at once, when all is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import Arrival, DataSet, Part

_HOLDOUT = 1_000_006
"""What the choice is keyed by. No run's seed takes part: all runs are measured by the same."""


def held_out(data: DataSet, share: float) -> DataSet:
    """The data set with a share of its training samples in place of its test samples.

    Of each class the share is taken at random, rounded, at least one sample where there are two;
    where the samples have arrived over time, of each class of each arrival. They are the same
    for all runs on the data set. What is left is trained on. How pixels are normalised stays as
    it was.

    Args:
        data: the data set.
        share: from 0 to below 1; with 0 the data set stays as it is.
    """
    if not share:
        return data
    if data.arrivals is None:
        chosen = _chosen(data.train.labels, share)
        kept, held = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        return replace(data, train=Part(data.train, kept), test=Part(data.train, held))
    parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for arrival in data.arrivals:
        chosen = _chosen(data.train.labels[arrival.train_indices], share)
        parts[0].append(arrival.train_indices[~chosen])
        parts[1].append(arrival.train_indices[chosen])
    kept, held = (np.concatenate(part) for part in parts)
    arrivals = tuple(
        Arrival(arrival.name, train, test, arrival.path)
        for arrival, train, test in zip(
            data.arrivals, _in_turn(parts[0]), _in_turn(parts[1]), strict=True
        )
    )
    return replace(
        data, train=Part(data.train, kept), test=Part(data.train, held), arrivals=arrivals
    )


def _chosen(labels: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which samples are held out, of each class the share."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        own = np.flatnonzero(labels == label)
        number = min(max(1, round(share * len(own))), len(own) - 1)
        generator = np.random.default_rng([_HOLDOUT, label])
        chosen[generator.choice(own, number, replace=False)] = True
    return chosen


def _in_turn(parts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Positions for some parts that stand one after another."""
    ends = np.cumsum([len(part) for part in parts])
    return [np.arange(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
