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
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]


class Probe(TypedDict):
    """How well the model did at one moment, on a part of the test samples."""

    step: int
    """How many there had been, of all tasks."""
    task: int
    """That was being learnt, from 0."""
    top1: NotRequired[list[float | None]]
    """On each task so far; None for one without test samples."""
    error: NotRequired[list[float | None]]
    """The same where targets are tensors, in place of ``top1``."""


class Curves(NamedTuple):
    """Accuracies over the steps, from 0 to 1, or errors; NaN where there is nothing to measure."""

    steps: NDArray[np.int64]
    tasks: NDArray[np.int64]
    """The task that was being learnt, from 0."""
    average: Curve
    """Mean over the tasks so far."""
    old: Curve
    """Mean over the tasks before the newest."""
    lowest_old: Curve
    """The lowest of these; of errors the highest."""
    newest: Curve


def curves_of(probes: Sequence[Probe]) -> Curves:
    """The curves of a run's probes."""
    if has_errors(probes):
        steps, tasks, *curves = curves_of(_negated(probes))
        return Curves(steps, tasks, *(-curve for curve in curves))
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

    Of errors: the average, the gap by which errors rise and fall again, and the highest ones.

    Args:
        probes: of one run, at least one.
    """
    if has_errors(probes):
        figures = figures_of(_negated(probes))
        return {
            name: None if figure is None else sign * figure
            for (name, sign), figure in zip(OF_ERRORS.items(), figures.values(), strict=True)
        }
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


OF_ERRORS = {
    "average_anytime_error": -1,
    "stability_gap": 1,
    "max_error": -1,
    "worst_case_error": -1,
}
"""The names of ``figures_of`` where they are of errors, and the sign of each."""


def has_errors(probes: Sequence[Probe]) -> bool:
    """Whether probes are of errors, of which lower is better."""
    return bool(probes) and "error" in probes[0]


def _negated(probes: Sequence[Probe]) -> list[Probe]:
    """Errors as something of which higher is better."""
    return [
        {
            "step": probe["step"],
            "task": probe["task"],
            "top1": [None if each is None else -each for each in probe["error"]],
        }
        for probe in probes
    ]


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
