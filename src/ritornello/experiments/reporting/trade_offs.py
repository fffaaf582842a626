"""The pictures of what accuracy is paid with: the buffer's size, and the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ritornello.experiments.recipes.published import family_of
from ritornello.experiments.reporting.colours import INK, PALETTE
from ritornello.experiments.reporting.figures import (
    LEGEND_FONT_SIZE,
    LETTER_WIDTH,
    MARKERS,
    WIDTH,
    Drawing,
    colours_of,
    legend,
    legend_inches,
    value_axis,
)
from ritornello.experiments.results.groups import Group, reference_for
from ritornello.experiments.results.labels import labels_of
from ritornello.experiments.results.measures import Measure

MAX_LABELS = 6
"""Points beyond these are named in a legend; beside them there would be no room."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def accuracy_by_capacity(groups: Sequence[Group]) -> Drawing | None:
    """Accuracy against the size of the buffer, a line per strategy and other settings.

    Returns:
        None if nothing was run with buffers of several sizes.
    """
    lines = _lines_by_capacity(groups)
    if all(len({group.capacity for group in line}) < 2 for line in lines.values()):
        return None
    levels = [group for group in groups if group.capacity is None]
    colours = [colour for colour in PALETTE if colour not in colours_of(levels)]
    names = [*lines, *(group.label for group in levels)]
    measure = groups[0].measure

    def draw(axes: Axes) -> None:
        for number, (label, line) in enumerate(lines.items()):
            axes.errorbar(
                [group.capacity or 0 for group in line],
                [measure.scale * group.average.mean for group in line],
                yerr=[measure.scale * (group.average.std or 0.0) for group in line],
                marker=MARKERS[number % len(MARKERS)],
                color=colours[number % len(colours)],
                capsize=3,
                label=label,
            )
        for group, colour, style in zip(levels, colours_of(levels), _dashes(levels), strict=True):
            level = measure.scale * group.average.mean
            axes.axhline(level, color=colour, linestyle=style, label=group.label)
        axes.set_xscale("log")
        capacities = sorted({group.capacity or 0 for line in lines.values() for group in line})
        axes.set_xticks(_apart(capacities))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("representatives in the whole buffer")
        value_axis(axes, measure, _at_the_end(measure))
        axes.grid(axis="y", alpha=0.25)
        legend(axes, names)

    return (WIDTH, 2.7 + legend_inches(names)), draw


def accuracy_by_runtime(groups: Sequence[Group]) -> Drawing | None:
    """Accuracy against runtime, a point per group, with one standard deviation of both.

    Runtimes are in multiples of incremental training's where all groups have that to compare
    with, else in seconds.

    Returns:
        None if there is nothing to compare.
    """
    if len(groups) < 2:
        return None
    references = [reference_for(group, groups, "incremental") for group in groups]
    units = [1.0 if each is None else each.seconds.mean for each in references]
    in_multiples = None not in references and all(units)
    if not in_multiples:
        units = [1.0] * len(groups)
    measure = groups[0].measure
    from_scratch = [each for each in groups if each.strategy == "from-scratch"]
    levels = [measure.scale * each.average.mean for each in from_scratch]
    names = [group.label for group in groups]
    in_legend = len(groups) > MAX_LABELS

    def draw(axes: Axes) -> None:
        points = []
        for number, (group, unit, colour) in enumerate(
            zip(groups, units, colours_of(groups), strict=True)
        ):
            x, y = group.seconds.mean / unit, measure.scale * group.average.mean
            axes.errorbar(
                x,
                y,
                xerr=(group.seconds.std or 0.0) / unit,
                yerr=measure.scale * (group.average.std or 0.0),
                marker=MARKERS[number % len(MARKERS)],
                color=colour,
                elinewidth=1,
                linestyle="none",
                label=group.label,
            )
            points.append((x, y))
        for level in levels:
            axes.axhline(level, color=INK, lw=0.8, linestyle=":")
        ends = [group.seconds.mean + (group.seconds.std or 0.0) for group in groups]
        axes.set_xlim(0, 1.12 * max(end / unit for end, unit in zip(ends, units, strict=True)))
        unit_name = "multiples of incremental training" if in_multiples else "s"
        axes.set_xlabel(f"training time ({unit_name})")
        value_axis(axes, measure, _at_the_end(measure), top=106)
        axes.grid(alpha=0.25)
        if in_legend:
            legend(axes, names)
        else:
            _name_points(axes, points, names, levels)

    return (WIDTH, 3.0 + (legend_inches(names) if in_legend else 0.0)), draw


def closeness_by_runtime(groups: Sequence[Group]) -> Drawing | None:
    """Accuracy in percent of from scratch, against runtime in multiples of incremental training.

    A line joins groups that differ in nothing but the representatives per step.

    Returns:
        None if there is no line, or some group has nothing to compare with; of errors, too.
    """
    if groups[0].measure.lower_is_better:
        return None
    references = [
        (reference_for(group, groups, "incremental"), reference_for(group, groups, "from-scratch"))
        for group in groups
    ]
    labels = labels_of(
        [group.first for group in groups], ignored=["seed", "global_num_representatives"]
    )
    lines: dict[str, list[tuple[Group, float, float]]] = {}
    for label, group, (fastest, best) in zip(labels, groups, references, strict=True):
        if fastest is None or best is None or not (fastest.seconds.mean and best.average.mean):
            return None
        price = group.seconds.mean / fastest.seconds.mean
        closeness = 100 * group.average.mean / best.average.mean
        lines.setdefault(label, []).append((group, price, closeness))
    if all(len(line) < 2 for line in lines.values()):
        return None
    colours = colours_of([line[0][0] for line in lines.values()])

    def draw(axes: Axes) -> None:
        for number, ((label, line), colour) in enumerate(zip(lines.items(), colours, strict=True)):
            line = sorted(line, key=lambda each: _num_representatives(each[0]))
            prices, closenesses = [each[1] for each in line], [each[2] for each in line]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(prices, closenesses, marker=marker, color=colour, label=label)
            if len(line) < 2:
                continue
            for group, price, closeness in line:
                share = Fraction(
                    _num_representatives(group), group.first["config"]["global_batch_size"]
                )
                axes.annotate(
                    str(share),
                    (price, closeness),
                    (4, -11),
                    textcoords="offset points",
                    fontsize=LEGEND_FONT_SIZE,
                    color=INK,
                )
        axes.axhline(100, color=INK, lw=0.8, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 112)
        axes.set_xlabel("training time (multiples of incremental training)")
        axes.set_ylabel("average top-1 (% of from scratch)")
        axes.grid(alpha=0.25)
        legend(axes, list(lines))

    return (WIDTH, 3.0 + legend_inches(list(lines))), draw


def _at_the_end(measure: Measure) -> str:
    return f"average {measure.header} at the end" + " (%)" * (not measure.lower_is_better)


def _num_representatives(group: Group) -> int:
    return int(group.first["config"].get("global_num_representatives", 0))


def _lines_by_capacity(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """A label to the groups that differ in the capacity, by ascending capacity.

    Recipes of one family may differ in more: in what their authors found best for a capacity.
    """
    sized = sorted(
        (group for group in groups if group.capacity is not None),
        key=lambda group: group.capacity or 0,
    )
    labels = labels_of([group.in_common for group in sized], ignored=["seed", "capacity"])
    recipes = {group.recipe for group in sized}
    families = {family_of(recipe) for recipe in recipes}
    lines: dict[str, list[Group]] = {}
    for label, group in zip(labels, sized, strict=True):
        if len(families) < len(recipes):
            family = family_of(group.recipe)
            label = group.strategy if len(families) == 1 else f"{family}: {group.strategy}"
        lines.setdefault(label, []).append(group)
    return lines


def _dashes(groups: Sequence[Group]) -> list[str]:
    return [("--", ":", "-.")[number % 3] for number in range(len(groups))]


def _apart(values: Sequence[int]) -> list[int]:
    """Those of ascending values that leave room for each other's text on a logarithmic axis."""
    kept: list[int] = []
    smallest_step = (np.log(values[-1]) - np.log(values[0])) / 8
    for value in values:
        if not kept or np.log(value) - np.log(kept[-1]) >= smallest_step:
            kept.append(value)
    return kept


def _name_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    levels: Sequence[float],
) -> None:
    """Writes each label beside its point where it covers no point, other label or level."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # Only now is it known where in the figure the axes are.
    points_per_pixel = 72 / figure.dpi
    area = axes.get_window_extent()
    left, right = area.x0 * points_per_pixel, area.x1 * points_per_pixel
    places = axes.transData.transform(points) * points_per_pixel
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for level in levels:
        y = axes.transData.transform((0.0, level))[1] * points_per_pixel
        taken.append((left, y, right, y))
    for (x, y), point, label in zip(places, points, labels, strict=True):
        width, height = LETTER_WIDTH * LEGEND_FONT_SIZE * len(label), 1.2 * LEGEND_FONT_SIZE
        offsets = [
            (beside, up * height)
            for up in (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0)
            for beside in (7.0, -7.0 - width, -width / 2)
            if up or beside != -width / 2  # Not on the point itself.
        ]
        boxes: list[Box] = [
            (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2) for dx, dy in offsets
        ]
        free = [
            box
            for box in boxes
            if left <= box[0] and box[2] <= right and not any(_overlap(box, o) for o in taken)
        ]
        box = (free or boxes)[0]
        taken.append(box)
        axes.annotate(
            label,
            point,
            (box[0] - x, box[1] + height / 2 - y),
            textcoords="offset points",
            va="center",
            fontsize=LEGEND_FONT_SIZE,
            color=INK,
        )


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
