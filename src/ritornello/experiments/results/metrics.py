"""Measures of continual learning, as functions of the accuracy matrix.

``matrix[i, j]`` is the accuracy on task ``j`` after training on task ``i``, from 0 to 1. Where it
was not measured, as when a task's test samples are gone, it is NaN (null in ``results.json``), and
means are over the others. With negative losses or errors in the place of accuracies, which are
better the higher, too, ``forgetting`` is how far they have risen from their lowest, and a transfer
how far they have fallen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


def matrix_of(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """A matrix as ``results.json`` holds it."""
    return np.array(rows, dtype=np.float64)


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy, loss or error, over all tasks at the end (Lopez-Paz & Ranzato 2017, ACC)."""
    return _mean(matrix[-1])


def average_after_each_task(matrix: Matrix) -> list[float]:
    """Mean accuracy over the tasks seen so far, after each task."""
    return [_mean(row[: number + 1]) for number, row in enumerate(matrix)]


def average_incremental_accuracy(matrix: Matrix) -> float:
    """The mean of ``average_after_each_task`` (Rebuffi et al. 2017, iCaRL)."""
    return _mean(np.array(average_after_each_task(matrix)))


def plasticity(matrix: Matrix) -> float:
    """Mean accuracy on a task when it has just been learnt: how well the new is learnt at all."""
    return _mean(np.diag(matrix))


def forgetting(matrix: Matrix) -> float:
    """Mean drop from a task's best accuracy to its last one (Chaudhry et al. 2018).

    Over all tasks but the last; 0 if there is only one.
    """
    if len(matrix) < 2:
        return 0.0
    before = np.where(np.isnan(matrix), -np.inf, matrix)
    best = np.array([before[task:-1, task].max() for task in range(len(matrix) - 1)])
    return _mean(best - matrix[-1, :-1])


def backward_transfer(matrix: Matrix) -> float:
    """Mean change of a task's accuracy since it was learnt (Lopez-Paz & Ranzato 2017, BWT)."""
    if len(matrix) < 2:
        return 0.0
    return _mean(matrix[-1, :-1] - np.diag(matrix)[:-1])


def forward_transfer(matrix: Matrix, at_start: NDArray[np.float64]) -> float:
    """Mean accuracy on a task just before learning it, above the untrained model's.

    Source: Lopez-Paz & Ranzato 2017, FWT.

    Args:
        matrix: the accuracies.
        at_start: ``[num_tasks]``, of the untrained model.
    """
    if len(matrix) < 2:
        return 0.0
    return _mean(np.diag(matrix, k=1) - at_start[1:])


def top_k_correct(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> Tensor:
    """How many samples have their label among the ``k`` largest logits, for each ``k``.

    Args:
        logits: ``[b, num_classes]``.
        labels: int64 ``[b]``.
        ks: with fewer classes than ``k``, every label counts.

    Returns:
        int64 ``[len(ks)]`` on the device of the logits.
    """
    largest = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = largest == labels[:, None]
    return torch.stack([hits[:, :k].any(dim=1).sum() for k in ks])


def _mean(values: Matrix) -> float:
    """The mean of what was measured; 0 if nothing was."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else 0.0
