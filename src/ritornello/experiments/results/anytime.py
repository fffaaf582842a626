"""What happens during the stream: curves and figures of the probes of a run.

The accuracy matrix looks at a model when a task has ended. What it loses in between and wins back
until then, the *stability gap*, is in no figure of it.

Source: De Lange, van de Ven, Tuytelaars, "Continual evaluation for lifelong learning: Identifying
the stability gap" (ICLR 2023), which defines the minimum and the worst-case accuracy; the average
anytime accuracy is that of Caccia et al., "New Insights on Reducing Abrupt Representation Change
in Online Continual Learning" (ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]


class Probe(TypedDict):
    """How well the model did at one moment, on a part of the test samples."""

    step: int
    """How many there had been, of all tasks."""
    task: int
    """That was being learnt, from 0."""
    top1: list[float | None]
    """On each task so far; None for one without test samples."""


class Curves(NamedTuple):
    """Accuracies over the steps, from 0 to 1; NaN where there is nothing to measure."""

    steps: NDArray[np.int64]
    tasks: NDArray[np.int64]
    """The task that was being learnt, from 0."""
    average: Curve
    """Mean over the tasks so far."""
    old: Curve
    """Mean over the tasks before the newest."""
    lowest_old: Curve
    """The lowest of these."""
    newest: Curve


def curves_of(probes: Sequence[Probe]) -> Curves:
    """The curves of a run's probes."""
    rows = [np.array(probe["top1"], dtype=np.float64) for probe in probes]
    olds = [row[:-1][np.isfinite(row[:-1])] for row in rows]
    return Curves(
        np.array([probe["step"] for probe in probes], dtype=np.int64),
        np.array([probe["task"] for probe in probes], dtype=np.int64),
        np.array([_mean(row) for row in rows]),
        np.array([_mean(old) for old in olds]),
        np.array([old.min() if len(old) else np.nan for old in olds]),
        np.array([row[-1] for row in rows]),
    )


def figures_of(probes: Sequence[Probe]) -> dict[str, float | None]:
    """The figures, as ``results.json`` names them; None for one that is not defined.

    Args:
        probes: of one run, at least one.
    """
    curves = curves_of(probes)
    return {
        name: None if np.isnan(figure) else float(figure)
        for name, figure in (
            ("average_anytime_top1", _mean(curves.average)),
            ("stability_gap", stability_gap(curves)),
            ("min_accuracy", min_accuracy(probes)),
            ("worst_case_accuracy", worst_case_accuracy(probes)),
        )
    }


def stability_gap(curves: Curves) -> float:
    """How far accuracy on the old tasks falls within a task, and rises again.

    Within a task the mean over the old tasks falls to a lowest value. The gap is from there to
    what it was at the task's beginning or at its end, whichever is lower: what is lost for good
    is forgetting, and not part of it. Mean over all tasks but the first; NaN if there is no other.
    """
    gaps = []
    for task in np.unique(curves.tasks).tolist():
        within, before = curves.old[curves.tasks == task], curves.average[curves.tasks == task - 1]
        # What is all tasks so far at the end of one is the old ones at the beginning of the next.
        if len(before) and np.isfinite(within).any():
            gaps.append(max(0.0, min(before[-1], within[-1]) - np.nanmin(within)))
    return _mean(np.array(gaps))


def min_accuracy(probes: Sequence[Probe]) -> float:
    """The lowest accuracy that a task has had since it was learnt (min-ACC).

    Mean over all tasks but the last; NaN if there is no other.
    """
    num_tasks = len(probes[-1]["top1"])
    lowest = []
    for task in range(num_tasks - 1):
        later = [each["top1"][task] for each in probes if each["task"] > task]
        measured = [accuracy for accuracy in later if accuracy is not None]
        lowest.append(min(measured, default=np.nan))
    return _mean(np.array(lowest))


def worst_case_accuracy(probes: Sequence[Probe]) -> float:
    """``1/k`` of the newest task's accuracy at the end, the rest ``min_accuracy`` (WC-ACC)."""
    num_tasks, newest = len(probes[-1]["top1"]), probes[-1]["top1"][-1]
    if newest is None:
        return np.nan
    if num_tasks == 1:
        return newest
    return newest / num_tasks + (1 - 1 / num_tasks) * min_accuracy(probes)


def _mean(values: Curve) -> float:
    """The mean of what was measured; NaN if nothing was."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else np.nan
