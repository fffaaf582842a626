"""The pictures of a report: accuracy over time, and what it costs. Each is inline SVG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ritornello.experiments.metrics import average_after_each_task, matrix_of
from ritornello.experiments.sweep import Group

COLOURS = {
    "incremental": "#d9662b",
    "rehearsal": "#2a85d0",
    "from-scratch": "#2e9e6b",
    "joint": "#c2577f",
}
"""Told apart also by colour-blind readers, on light and on dark."""
PALETTE = (*list(COLOURS.values())[:3], "#a06fc4", "#b08a1e", "#5c8a94", COLOURS["joint"])
MARKERS = "osD^vP*X<"
"""As many as make marker and colour together repeat late."""
INK = "#123456"
"""Drawn in the page's text colour: replaced in the SVG."""
PARTS = {"load": "#b08a1e", "wait": "#d9662b", "train": "#5c8a94"}

MAX_IN_PLOT = 3
"""Longer legends stand below the plot, where they hide nothing."""

Drawing = tuple[tuple[float, float], Callable[[Axes], None]]
"""Size in inches, and what draws."""


def colours_of(groups: Sequence[Group]) -> list[str]:
    """A colour for each group: a strategy's own where the strategy appears once."""
    strategies = [group.strategy for group in groups]
    fixed = {each for each in COLOURS if strategies.count(each) == 1}
    taken = {COLOURS[each] for each in fixed}
    others = [colour for colour in PALETTE if colour not in taken]
    colours, number = [], 0
    for strategy in strategies:
        if strategy in fixed:
            colours.append(COLOURS[strategy])
        else:
            colours.append(others[number % len(others)])
            number += 1
    return colours


def average_over_time(groups: Sequence[Group]) -> Drawing:
    """Mean accuracy over the tasks seen so far; a band of one standard deviation of the seeds."""

    def draw(axes: Axes) -> None:
        for number, (group, colour) in enumerate(zip(groups, colours_of(groups), strict=True)):
            runs = np.array([average_after_each_task(matrix_of(run["top1"])) for run in group.runs])
            values, x = 100 * runs.mean(axis=0), range(1, runs.shape[1] + 1)
            marker = MARKERS[number % len(MARKERS)]
            if group.strategy == "joint":  # before the last task it has learnt nothing
                values, x = values[-1:], x[-1:]
            axes.plot(x, values, marker=marker, markersize=5, color=colour, label=group.label)
            if group.num_runs > 1 and len(x) > 1:
                band = 100 * runs.std(axis=0, ddof=1)
                axes.fill_between(x, values - band, values + band, color=colour, alpha=0.2, lw=0)
        _accuracy_axes(axes, max(len(group.first["top1"]) for group in groups))
        legend(axes, len(groups))

    return (6.4, 3.2 + legend_inches(len(groups))), draw


def tasks_over_time(group: Group) -> Drawing:
    """Accuracy on each task from the moment when it was learnt; mean over the seeds."""

    def draw(axes: Axes) -> None:
        matrix = _mean_matrix(group)
        num_tasks = len(matrix)
        for task, name in enumerate(_task_names(group)):
            axes.plot(
                range(task + 1, num_tasks + 1),
                matrix[task:, task],
                marker=MARKERS[task % len(MARKERS)],
                color=PALETTE[task % len(PALETTE)],
                label=name,
            )
        _accuracy_axes(axes, num_tasks)
        if num_tasks <= 10:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left")

    return (4.6, 3.2), draw


def heat_map(group: Group) -> Drawing:
    """The accuracy matrix; mean over the seeds."""

    def draw(axes: Axes) -> None:
        matrix = _mean_matrix(group)
        num_tasks = len(matrix)
        axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_xlabel("accuracy on task (%)")
        axes.set_ylabel("after task")
        every = range(0, num_tasks, 1 + num_tasks // 20)
        axes.set_xticks(every, [str(i + 1) for i in every])
        axes.set_yticks(every, [str(i + 1) for i in every])
        axes.spines[:].set_visible(False)
        if num_tasks <= 12:
            for (row, column), value in np.ndenumerate(matrix):
                text, colour = f"{value:.0f}", "black" if value > 55 else "white"
                if np.isnan(value):
                    text, colour = "-", INK
                axes.text(column, row, text, ha="center", va="center", color=colour)

    return (4.6, 3.2), draw


def runtimes(groups: Sequence[Group]) -> Drawing:
    """Training time, with the accuracy that it buys; bars of one standard deviation."""

    def draw(axes: Axes) -> None:
        places, seconds = range(len(groups)), [group.seconds.mean for group in groups]
        axes.barh(places, seconds, color=colours_of(groups), height=0.6)
        for place, group in enumerate(groups):
            mean, std = group.seconds.mean, group.seconds.std or 0.0
            if std:
                axes.errorbar(mean, place, xerr=std, color=INK, capsize=2, lw=1)
            _beside_bar(axes, mean + std, place, f"{mean:.1f} s, {group.average_top1.in_percent()}")
        _bars(axes, groups, 1.8 * max(seconds))
        axes.set_xlabel("training time (s), and average top-1 at the end")

    return (5.2, 0.9 + 0.5 * len(groups)), draw


def step_times(groups: Sequence[Group]) -> Drawing:
    """Where a step's time goes."""

    def draw(axes: Axes) -> None:
        steps = [group.step_seconds for group in groups]
        left = np.zeros(len(groups))
        for part, colour in PARTS.items():
            values = np.array([1000 * each[part] for each in steps])
            axes.barh(range(len(groups)), values, left=left, color=colour, height=0.6, label=part)
            left += values
        for place, (each, total) in enumerate(zip(steps, left, strict=True)):
            share = 100 * 1000 * each["wait"] / total if total else 0.0
            _beside_bar(axes, total, place, f"{total:.2f} ms, wait {share:.1f} %")
        _bars(axes, groups, 1.7 * max(left))
        axes.set_xlabel("mean time of a step (ms)")
        axes.figure.legend(frameon=False, labelcolor=INK, ncols=3, loc="outside upper right")

    return (5.2, 1.2 + 0.5 * len(groups)), draw


def legend(axes: Axes, num_entries: int, columns: int = 2) -> None:
    """Names the lines: in the plot, or below it if there are many."""
    if num_entries <= MAX_IN_PLOT:
        axes.legend(frameon=False, labelcolor=INK)
    else:
        axes.figure.legend(
            frameon=False, labelcolor=INK, fontsize=8, ncols=columns, loc="outside lower left"
        )


def legend_inches(num_entries: int, columns: int = 2) -> float:
    """The height that ``legend`` needs below the plot."""
    return 0.0 if num_entries <= MAX_IN_PLOT else 0.1 + 0.18 * -(-num_entries // columns)


def svg(drawing: Drawing, title: str) -> Markup:
    """Draws a figure as inline SVG whose text and axes have the page's text colour."""
    size, draw = drawing
    settings: Any = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Ids are per document, and the page holds several.
    prefix = "".join(letter for letter in title.lower() if letter.isalnum())
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{prefix}-")
    label = Markup.escape(title)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _mean_matrix(group: Group) -> NDArray[np.float64]:
    """Of the accuracies, in percent; NaN where some run has none."""
    mean: NDArray[np.float64] = 100 * np.mean(
        [matrix_of(run["top1"]) for run in group.runs], axis=0
    )
    return mean


def _task_names(group: Group) -> list[str]:
    """The tasks' own names where all seeds have the same ones, and where they are short."""
    names = [[task["name"] for task in run["tasks"]] for run in group.runs]
    same = all(each == names[0] for each in names)
    return [
        name if same and len(name) < 24 else f"task {number + 1}"
        for number, name in enumerate(names[0])
    ]


def _bars(axes: Axes, groups: Sequence[Group], right: float) -> None:
    """Names the bars, from above, and leaves room for the texts beside them."""
    axes.set_yticks(range(len(groups)), [textwrap.fill(group.label, 18) for group in groups])
    axes.set_xlim(0, right)
    axes.set_ylim(len(groups) - 0.4, -0.6)


def _beside_bar(axes: Axes, length: float, place: int, text: str) -> None:
    axes.annotate(text, (length, place), (5, 0), textcoords="offset points", va="center", color=INK)


def _accuracy_axes(axes: Axes, num_tasks: int) -> None:
    axes.set_ylim(-3, 103)
    if num_tasks <= 20:
        axes.set_xticks(range(1, num_tasks + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("after task")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(axis="y", alpha=0.25)
