"""Exemplars: which samples of a class to keep, once all of them are known.

Pure functions, to call at the end of a task with the samples (or their features) of one class.
They give indices in order of importance. Offered in that order to a buffer with the policy
"first-offered", the first ones stay when the class's share shrinks; which rank to offer each to,
``selection.rank_of_exemplar`` says.
"""

from __future__ import annotations

import numpy as np
import torch

from ritornello.arrays import Floats, Ints

_DECIMALS = 12
"""Digits of distances between vectors of unit length. What is equal up to rounding errors counts as
equal, so that the choice depends neither on the machine nor on the order of its additions."""


def herding(features: torch.Tensor, num_chosen: int) -> Ints:
    """The samples whose mean follows the mean of the class most closely, step by step.

    Features are scaled to unit length (zeros stay). Each step takes the sample, of those not yet
    taken, that brings the mean of the taken ones closest to the mean of all; the first of
    several that are equal. So the first ``k`` are the choice for every smaller ``k`` too.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (CVPR
    2017), Algorithm 4. Computed in float64 on the CPU; one matrix-vector product per step.

    Args:
        features: ``[n, d]``, of the samples of one class; any real dtype, any device.
        num_chosen: how many; more than ``n`` gives all ``n``.

    Returns:
        int64 ``[min(n, num_chosen)]``, indices in the order in which they were taken.

    Raises:
        ValueError: features of another shape or not finite; ``num_chosen`` below 0.
    """
    rows = _unit_rows(features)
    num_chosen = _at_most(num_chosen, len(rows))
    chosen = np.zeros(num_chosen, dtype=np.int64)
    mean, total = _mean(rows), np.zeros(rows.shape[1])
    half_squares = (rows**2).sum(axis=1) / 2  # not all 1/2: zeros have no length
    for step in range(num_chosen):
        # |mean - (total + row) / k|^2 for k = step + 1, times k^2 / 2, less what all rows share.
        distances = np.round(rows @ (total - (step + 1) * mean) + half_squares, _DECIMALS)
        distances[chosen[:step]] = np.inf
        chosen[step] = distances.argmin()
        total += rows[chosen[step]]
    return chosen


def closest_to_mean(features: torch.Tensor, num_chosen: int) -> Ints:
    """The samples that are nearest to the mean of the class, nearest first.

    Features are scaled to unit length (zeros stay). Of equally near ones the first comes first.

    Args:
        features: ``[n, d]``, of the samples of one class; any real dtype, any device.
        num_chosen: how many; more than ``n`` gives all ``n``.

    Returns:
        int64 ``[min(n, num_chosen)]``, indices.

    Raises:
        ValueError: features of another shape or not finite; ``num_chosen`` below 0.
    """
    rows = _unit_rows(features)
    num_chosen = _at_most(num_chosen, len(rows))
    distances = ((rows - _mean(rows)) ** 2).sum(axis=1)
    nearest: Ints = np.round(distances, _DECIMALS).argsort(kind="stable")[:num_chosen]
    return nearest


def at_random(num_samples: int, num_chosen: int, generator: np.random.Generator) -> Ints:
    """Random samples in random order, none twice.

    Args:
        num_samples: to choose from.
        num_chosen: how many; more than ``num_samples`` gives all.
        generator: chooses.

    Returns:
        int64 ``[min(num_samples, num_chosen)]``, indices.

    Raises:
        ValueError: a number is below 0.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples}: it must be at least 0")
    num_chosen = _at_most(num_chosen, num_samples)
    chosen: Ints = generator.permutation(num_samples)[:num_chosen]
    return chosen


def _unit_rows(features: torch.Tensor) -> Floats:
    """Features as float64 rows of length 1, or 0 where all are 0."""
    shape = list(features.shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"features of shape {shape}: it must be [samples, features per sample]")
    rows: Floats = features.detach().to("cpu", torch.float64).numpy()
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"features[{int(finite.argmin())}] is not finite ({int((~finite).sum())} of "
            f"{len(rows)} samples are not): features must be finite numbers"
        )
    # First by the largest number, as the squares of very large or small ones have no place.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1.0)
    lengths = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return rows / np.where(lengths > 0, lengths, 1.0)


def _mean(rows: Floats) -> Floats:
    mean: Floats = rows.sum(axis=0) / max(1, len(rows))
    return mean


def _at_most(num_chosen: int, num_samples: int) -> int:
    if num_chosen < 0:
        raise ValueError(f"num_chosen={num_chosen}: it must be at least 0")
    return min(num_chosen, num_samples)
