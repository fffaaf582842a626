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

from ritornello.experiments.reporting.colours import COLOURS, INK, PALETTE, themed
from ritornello.experiments.results.groups import Group
from ritornello.experiments.results.measures import Measure, number_text
from ritornello.experiments.results.metrics import average_after_each_task

MARKERS = "osD^vP*X<"
"""As many as make marker and colour together repeat late."""
PARTS = ("load", "wait", "train")
PART_COLOURS = (4, 0, 1)
"""The parts of a step, and their places in the palette."""

WIDTH, SMALL_WIDTH = 4.6, 4.0
"""The width of a picture of all groups, and of one of a single group, in inches of 72 pixels: as
many as a telephone, and a third of a page, have for it."""
FONT_SIZE = 10.5
LEGEND_FONT_SIZE = 9.5
LETTER_WIDTH = 0.53
"""About that of a letter in a legend, in font sizes: the reader's font is not known."""

MAX_LINES = 12
"""Tasks that one picture can show a line each of, or a number each."""

MAX_ERRORS = 5
"""The same for errors, whose numbers are longer."""

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""A kilobyte less, and the same bytes every time."""

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
    """Mean accuracy or error over the tasks so far; a band of one standard deviation of seeds."""
    names = [group.label for group in groups]

    def draw(axes: Axes) -> None:
        for number, (group, colour) in enumerate(zip(groups, colours_of(groups), strict=True)):
            scale = group.measure.scale
            runs = scale * np.array([average_after_each_task(each) for each in group.matrices])
            values, x = runs.mean(axis=0), range(1, runs.shape[1] + 1)
            marker = MARKERS[number % len(MARKERS)]
            if group.strategy == "joint":  # before the last task it has learnt nothing
                values, x = values[-1:], x[-1:]
            axes.plot(x, values, marker=marker, markersize=5, color=colour, label=group.label)
            if group.num_runs > 1 and len(x) > 1:
                band = runs.std(axis=0, ddof=1)
                axes.fill_between(x, values - band, values + band, color=colour, alpha=0.2, lw=0)
        axes_over_tasks(axes, max(group.num_tasks for group in groups), groups[0].measure)
        legend(axes, names)

    return (WIDTH, 2.7 + legend_inches(names)), draw


def tasks_over_time(group: Group) -> Drawing:
    """Accuracy (or error) on each task from the moment when it was learnt; mean over the seeds."""
    names = _task_names(group)

    def draw(axes: Axes) -> None:
        matrix = _mean_matrix(group)
        for task, name in enumerate(names):
            axes.plot(
                range(task + 1, len(matrix) + 1),
                matrix[task:, task],
                marker=MARKERS[task % len(MARKERS)],
                markersize=5,
                color=PALETTE[task % len(PALETTE)],
                label=name,
            )
        axes_over_tasks(axes, len(matrix), group.measure)
        legend(axes, names, SMALL_WIDTH)

    return (SMALL_WIDTH, 2.4 + legend_inches(names, SMALL_WIDTH)), draw


def heat_map(group: Group) -> Drawing:
    """The matrix of accuracies or errors; mean over the seeds."""
    is_error = group.measure.lower_is_better

    def draw(axes: Axes) -> None:
        matrix = _mean_matrix(group)
        num_tasks = len(matrix)
        # The brighter, the better.
        colours, most = ("viridis_r", np.nanmax(matrix)) if is_error else ("viridis", 100)
        image = axes.imshow(matrix, cmap=colours, vmin=0, vmax=most, aspect="auto")
        axes.set_xlabel(f"{group.measure.noun} on task" + " (%)" * (not is_error))
        axes.set_ylabel("after task")
        every = range(0, num_tasks, 1 + num_tasks // MAX_LINES)
        axes.set_xticks(every, [str(i + 1) for i in every])
        axes.set_yticks(every, [str(i + 1) for i in every])
        axes.spines[:].set_visible(False)
        if num_tasks > (MAX_ERRORS if is_error else MAX_LINES):
            figure = axes.figure
            assert isinstance(figure, Figure)
            label = "error" if is_error else "%"
            figure.colorbar(image, ax=axes, label=label).outline.set_visible(False)
            return
        for (row, column), value in np.ndenumerate(matrix):
            text, colour = _shortly(group, value), colour_on_heat_map(value)
            if is_error:
                colour = colour_on_heat_map(100 * (1 - value / (most or 1)))
            if np.isnan(value):
                text, colour = "-", INK
            axes.text(column, row, text, ha="center", va="center", color=colour)

    return (SMALL_WIDTH, 2.9), draw


def colour_on_heat_map(value: float) -> str:
    """The colour of a number: black or white, whichever stands out more from what is below it."""
    return "black" if value > 43 else "white"


def last_row(group: Group) -> str:
    """The end of the matrix, in words."""
    values = _mean_matrix(group)[-1]
    numbers = ", ".join("-" if np.isnan(value) else _shortly(group, value) for value in values)
    if group.measure.lower_is_better:
        return f"after the last task the errors on all tasks are {numbers}"
    return f"after the last task the accuracies on all tasks are {numbers} %"


def _shortly(group: Group, value: float) -> str:
    """A value of the matrix, for little room."""
    return number_text(value) if group.measure.lower_is_better else f"{value:.0f}"


def legend(axes: Axes, names: Sequence[str], width: float = WIDTH) -> None:
    """Names the lines, below the plot, where that hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles,
        [textwrap.fill(label, _letters(1, width)) for label in labels],
        frameon=False,
        labelcolor=INK,
        fontsize=LEGEND_FONT_SIZE,
        ncols=_columns(names, width),
        columnspacing=1.2,
        handlelength=1.6,
        loc="outside lower left",
    )


def legend_inches(names: Sequence[str], width: float = WIDTH) -> float:
    """The height that ``legend`` needs below the plot."""
    lines = [len(textwrap.wrap(name, _letters(1, width))) for name in names]
    columns = _columns(names, width)
    rows = -(-len(names) // columns)
    by_column = [lines[start : start + rows] for start in range(0, len(lines), rows)]
    return 0.15 + 0.19 * max(sum(column) for column in by_column)


def svg(drawing: Drawing, title: str, description: str = "") -> Markup:
    """Draws a figure as inline SVG that has the page's colours.

    Args:
        drawing: what to draw.
        title: of the picture; each has one of its own in the page.
        description: what is to be seen in it, for those who do not see it.
    """
    size, draw = drawing
    settings: Any = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": FONT_SIZE,
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.color": INK,
        "text.parse_math": False,  # a class may be called $x$
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    text = stream.getvalue()
    text = themed(text[text.index("<svg") :])
    # Ids are per document, and the page holds several.
    prefix = "".join(letter for letter in title.lower() if letter.isalnum())
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{prefix}-")
    label = Markup.escape(f"{title}: {description}" if description else title)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _columns(names: Sequence[str], width: float) -> int:
    """As many as the longest name leaves room for."""
    longest = max(map(len, names))
    return next((n for n in (5, 4, 3, 2) if longest <= _letters(n, width) and n <= len(names)), 1)


def _letters(columns: int, width: float) -> int:
    """How many there is room for in one of the columns, beside its line."""
    points = 72 * width / columns - 3.4 * LEGEND_FONT_SIZE
    return int(points / (LETTER_WIDTH * LEGEND_FONT_SIZE))


def _mean_matrix(group: Group) -> NDArray[np.float64]:
    """The mean of the accuracies, in percent, or of the errors; NaN where some run has none."""
    mean: NDArray[np.float64] = group.measure.scale * np.mean(group.matrices, axis=0)
    return mean


def _task_names(group: Group) -> list[str]:
    """The tasks' own names where all seeds have the same ones, and where they are short.

    Legends leave out what begins with an underscore, so such a name begins with a space.
    """
    names = [[task["name"] for task in run["tasks"]] for run in group.runs]
    same = all(each == names[0] for each in names)
    return [
        " " * name.startswith("_") + name if same and len(name) < 24 else f"task {number + 1}"
        for number, name in enumerate(names[0])
    ]


def value_axis(axes: Axes, measure: Measure, what: str = "", top: float = 103) -> None:
    """The axis upwards, when all is drawn: percent up to 100, or errors from 0 on.

    Args:
        axes: whose.
        measure: accuracies or errors.
        what: the axis's name, if it is not the measure's.
        top: in percent, where accuracies end.
    """
    if measure.lower_is_better:
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(-3, top)
    axes.set_ylabel(what or measure.axis)


def axes_over_tasks(axes: Axes, num_tasks: int, measure: Measure) -> None:
    """Axes of accuracy or error, after each of some tasks."""
    value_axis(axes, measure)
    axes.set_xlim(1 - 0.05 * num_tasks, 1.05 * num_tasks)
    if num_tasks <= MAX_LINES:
        axes.set_xticks(range(1, num_tasks + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("after task")
    axes.grid(axis="y", alpha=0.25)
