"""The pictures of what probes have seen during the stream, and their figures as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ritornello.experiments.reporting.colours import INK, PALETTE
from ritornello.experiments.reporting.figures import (
    MARKERS,
    MAX_LINES,
    SMALL_WIDTH,
    WIDTH,
    Drawing,
    axes_over_tasks,
    colours_of,
    legend,
    legend_inches,
)
from ritornello.experiments.results.anytime import curves_of
from ritornello.experiments.results.groups import Group
from ritornello.experiments.results.measures import Measure
from ritornello.experiments.results.writing import Results

FIGURES = {
    "average anytime": "average_anytime_top1",
    "stability gap": "stability_gap",
    "min-ACC": "min_accuracy",
    "WC-ACC": "worst_case_accuracy",
    "average incremental": "average_incremental_top1",
    "plasticity": "plasticity",
}
"""Header to the figure's name in ``results.json``."""

FIGURES_OF_ERRORS = {
    "average anytime": "average_anytime_error",
    "stability gap": "stability_gap",
    "highest error": "max_error",
    "worst case": "worst_case_error",
    "average incremental": "average_incremental_error",
    "when learnt": "error_when_learnt",
}
"""The same where models are measured by errors."""

LINES = {
    "all tasks so far": ("average", PALETTE[1], "-"),
    "worst of the old ones": ("lowest_old", PALETTE[0], "-."),
    "newest task": ("newest", PALETTE[2], ":"),
}
"""Name in the legend to the curve, its colour and its dashes."""

FEW_POINTS = 20
"""With as many or fewer, points have markers."""


def is_probed(group: Group) -> bool:
    """Whether there are curves of all its runs."""
    return all(run.get("probes") for run in group.runs)


def figures_named(measure: Measure) -> dict[str, str]:
    """``FIGURES`` of accuracies, or those of errors."""
    return FIGURES_OF_ERRORS if measure.lower_is_better else FIGURES


def figures_of(group: Group) -> dict[str, str]:
    """Header to text; "-" for what is not defined."""
    named = figures_named(group.measure)
    return {header: group.text(group.figure(name)) for header, name in named.items()}


def average_over_stream(groups: Sequence[Group]) -> Drawing | None:
    """Mean accuracy or error over the tasks so far, probe by probe; a band as after each task.

    Returns:
        None if nothing was probed.
    """
    probed = [group for group in groups if is_probed(group)]
    if not probed:
        return None
    names = [group.label for group in probed]
    colours = [c for g, c in zip(groups, colours_of(groups), strict=True) if g in probed]

    def draw(axes: Axes) -> None:
        for number, (group, colour) in enumerate(zip(probed, colours, strict=True)):
            x, runs = _over_stream(group, "average")
            values = runs.mean(axis=0)
            marker = MARKERS[number % len(MARKERS)] if len(x) <= FEW_POINTS else None
            axes.plot(x, values, lw=1.3, marker=marker, markersize=5, color=colour)
            axes.plot([], [], marker=marker, color=colour, label=group.label)
            if group.num_runs > 1:
                band = runs.std(axis=0, ddof=1)
                axes.fill_between(x, values - band, values + band, color=colour, alpha=0.2, lw=0)
        num_tasks = max(group.num_tasks for group in probed)
        axes_over_tasks(axes, num_tasks, probed[0].measure)
        axes.set_xlim(-0.02 * num_tasks, 1.02 * num_tasks)
        _mark_ends(axes, range(1, num_tasks))
        axes.set_xlabel("tasks learnt")
        legend(axes, names)

    return (WIDTH, 2.7 + legend_inches(names)), draw


def tasks_over_steps(group: Group) -> Drawing:
    """The tasks so far, the worst of the old ones and the newest, over the steps of a group."""
    names = list(LINES)

    def draw(axes: Axes) -> None:
        first = group.first
        probed = curves_of(first["probes"])
        for name, (curve, colour, dashes) in LINES.items():
            values = _over_stream(group, curve)[1].mean(axis=0)
            x = probed.steps.astype(np.float64)
            if curve == "newest":  # which is another one in each task
                borders = np.flatnonzero(np.diff(probed.tasks)) + 1
                x, values = (np.insert(each, borders, np.nan) for each in (x, values))
            marker = "." if len(probed.steps) <= FEW_POINTS else None
            axes.plot(x, values, dashes, lw=1.3, marker=marker, color=colour, label=name)
        ends = np.cumsum(first["steps_per_task"])
        axes_over_tasks(axes, 1, group.measure)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(-0.02 * ends[-1], 1.02 * ends[-1])
        _mark_ends(axes, ends[:-1].tolist())
        axes.set_xlabel("step")
        legend(axes, names, SMALL_WIDTH)

    return (SMALL_WIDTH, 2.5 + legend_inches(names, SMALL_WIDTH)), draw


def in_words(group: Group) -> str:
    """The figures of a group's probes."""
    return ", ".join(f"{header} {text}" for header, text in figures_of(group).items())


def _over_stream(group: Group, curve: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve of all runs, at the moments at which the first one was probed.

    With other orders of classes, tasks have other numbers of steps.

    Returns:
        The moments in tasks: 1.5 is the middle of the second one. ``[runs, moments]``: the curve,
        as it is shown.
    """
    moments = _moments(group.first)
    values = [
        np.interp(moments, _moments(run), getattr(curves_of(run["probes"]), curve))
        for run in group.runs
    ]
    return moments, group.measure.scale * np.array(values)


def _moments(run: Results) -> NDArray[np.float64]:
    probed = curves_of(run["probes"])
    steps: NDArray[Any] = np.array(run["steps_per_task"])
    begins = np.cumsum(steps) - steps
    moments: NDArray[np.float64] = (
        probed.tasks + (probed.steps - begins[probed.tasks]) / steps[probed.tasks]
    )
    return moments


def _mark_ends(axes: Axes, ends: Sequence[int]) -> None:
    """A line where a task ends and the next one begins."""
    for end in ends if len(ends) <= MAX_LINES else ():
        axes.axvline(end, color=INK, lw=0.8, alpha=0.3, zorder=0)
