"""The report of saved results: tables for the terminal, and one self-contained HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

import ritornello
from ritornello.experiments.recipes.published import family_of
from ritornello.experiments.reporting import colours, figures, stream, trade_offs
from ritornello.experiments.reporting.figures import Drawing, svg
from ritornello.experiments.reporting.generated import strips_of
from ritornello.experiments.reporting.provenance import commands_of, origin_of, tested_on
from ritornello.experiments.reporting.summaries import (
    buffer_of,
    duration,
    families_of,
    findings_of,
    times_incremental,
)
from ritornello.experiments.results.groups import Group, Statistic, parts_of
from ritornello.experiments.results.labels import WITHOUT_BUFFER
from ritornello.experiments.results.measures import Measure, common_measure
from ritornello.experiments.results.writing import Results

MAX_OPEN = 8
"""With more groups, the plots of single groups are folded away."""

NOTHING = "-"

FIGURE = re.compile(r"\d( ± \d+\.\d)? %")
NO_BREAK = "\u00a0"
"""A space at which no line ends."""

TERMINAL_COLUMNS = {
    "seeds": "seeds",
    "avg top-1": "average",
    "averaged": "averaged",
    "worst order": "worst",
    "top-5": "top5",
    "forgetting": "forgetting",
    "anytime": "anytime",
    "gap": "gap",
    "runtime": "runtime",
    "step: load/wait/train": "step",
    "published": "published",
}
"""Header to what stands below it."""

SOMETIMES = ("averaged", "worst", "anytime", "gap", "published")
"""Columns that are there if some row has something to say in them."""

OF_CLASSES = ("top5", "published")
"""Columns that errors do not have."""

DISPENSABLE = ("step", "top5", "seeds", "anytime", "gap", "worst")
"""Columns that a narrow terminal does without, the first one first: the report has them all."""

LABEL_LETTERS = 24
"""A label has as many on a line, if the terminal has room for them; it may take several lines."""


@dataclass(frozen=True)
class Row:
    """A row of the tables, as texts with units."""

    label: str
    seeds: str
    capacity: str
    average: str
    """Over all tasks at the end: accuracy, or error."""
    top5: str
    forgetting: str
    backward: str
    forward: str
    seconds: str
    multiple: str
    published: str
    step_ms: dict[str, float]
    """Its parts, mean of all steps."""
    emphasised: bool
    averaged: str
    """The average of the running average of the weights."""
    worst: str
    """The worst average of an order of classes."""
    orders: str
    loss: str
    risen: str
    """Forgetting in loss."""
    in_stream: dict[str, str]
    """Header to text: see ``stream.FIGURES``."""
    parts: dict[str, str]
    """The error of each part of the targets, where these are tensors: header to text."""

    @property
    def anytime(self) -> str:
        """Average anytime accuracy."""
        return self.in_stream["average anytime"]

    @property
    def gap(self) -> str:
        """The stability gap."""
        return self.in_stream["stability gap"]

    @property
    def runtime(self) -> str:
        """Such as "3.8 s (1.8x)"."""
        return self.seconds if self.multiple == NOTHING else f"{self.seconds} ({self.multiple})"

    @property
    def step(self) -> str:
        """Such as "0.16/0.41/3.37 ms"."""
        return "/".join(f"{milliseconds:.2f}" for milliseconds in self.step_ms.values()) + " ms"

    def cell(self, column: str) -> str:
        """The text in one of ``TERMINAL_COLUMNS``, or of a part."""
        return self.parts[column] if column in self.parts else str(getattr(self, column))


def table_of(groups: Sequence[Group], width: int = 80) -> Table:
    """The table that a run ends with.

    Args:
        groups: of the runs.
        width: of the terminal, in letters; columns that would be cut are left out.

    Raises:
        ValueError: some runs have accuracies, others errors.
    """
    measure, rows = _measure(groups), _rows(groups)
    columns = dict(TERMINAL_COLUMNS)
    dispensable_ones: list[tuple[str, ...]] = [(each,) for each in DISPENSABLE]
    if measure.lower_is_better:
        columns = {
            "avg error": "average",
            **{header: header for header in rows[0].parts},
            **{
                header: name
                for header, name in columns.items()
                if name not in ("average", *OF_CLASSES)
            },
        }
        dispensable_ones.insert(1, tuple(rows[0].parts))
    if all(row.seeds == "1" for row in rows):
        del columns["seeds"]
    columns = {
        header: name
        for header, name in columns.items()
        if name not in SOMETIMES or _says_anything(rows, name)
    }
    longest_label = max(len(row.label) for row in rows)
    for dispensable in dispensable_ones:
        widths = [
            max(len(header), *(len(row.cell(name)) for row in rows)) + 1
            for header, name in columns.items()
        ]
        if min(longest_label, LABEL_LETTERS) + 1 + sum(widths) <= width:
            break
        columns = {header: name for header, name in columns.items() if name not in dispensable}
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=longest_label <= LABEL_LETTERS, overflow="fold")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        texts = [row.cell(name) for name in columns.values()]
        style = "bold" if row.emphasised else None
        table.add_row(escape(row.label), *texts, style=style)
    return table


def table_of_tasks(results: Results, num_tasks: int = 10) -> Table:
    """The last tasks, and the accuracy on each before and after the newest one was learnt.

    Args:
        results: of a run with two tasks or more.
        num_tasks: how many are shown.
    """
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for name in ("test images", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    numbers = range(len(results["tasks"]))[-num_tasks:]
    for number in numbers:
        task = results["tasks"][number]
        accuracies = [results["top1"][row][number] for row in (-2, -1)]
        texts = [NOTHING if each is None else f"{100 * each:.1f} %" for each in accuracies]
        style = "bold" if number == numbers[-1] else None
        table.add_row(escape(task["name"]), f"{task['test_samples']:,}", *texts, style=style)
    return table


def write_report(groups: Sequence[Group], path: Path) -> None:
    """Writes the report, one HTML file with everything in it.

    Args:
        groups: of the runs.
        path: of the file; its folder is made if need be.

    Raises:
        ValueError: some runs have accuracies, others errors.
    """
    contents = _contents(groups)
    environment = Environment(
        loader=PackageLoader("ritornello.experiments.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template("report.html.j2").render(contents))


def _contents(groups: Sequence[Group]) -> dict[str, Any]:
    """All that the template names."""
    measure, rows = _measure(groups), _rows(groups)
    in_time = [group for group in groups if group.num_tasks > 1]
    noun = measure.noun.capitalize()
    return {
        "title": _title(groups),
        "measure": measure,
        "parts_of_targets": list(rows[0].parts),
        "loss": groups[0].first["config"].get("loss"),
        "pictures": [(group.label, pictures) for group in groups if (pictures := _pictures(group))],
        "ranks": _ranks(groups),
        "circumstances": _circumstances(groups),
        "descriptions": _descriptions(groups),
        "findings": {
            family: FIGURE.sub(lambda found: found[0].replace(" ", NO_BREAK), text)
            for family, text in findings_of(groups).items()
        },
        "rows": rows,
        "parts": dict(zip(figures.PARTS, figures.PART_COLOURS, strict=True)),
        "longest_step": max(sum(row.step_ms.values()) for row in rows) or 1.0,
        "several_seeds": any(group.num_runs > 1 for group in groups),
        "any_buffer": any(group.capacity is not None for group in groups),
        "any_multiple": any(row.multiple != NOTHING for row in rows),
        "any_published": any(row.published for row in rows),
        "any_averaged": _says_anything(rows, "averaged"),
        "any_loss": _says_anything(rows, "loss"),
        "any_worst": _says_anything(rows, "worst"),
        "tested_on": " and ".join(tested_on(groups)) or "the test samples",
        "stream_headers": list(stream.figures_named(measure)),
        "in_stream": [
            (
                group.label,
                svg(
                    stream.tasks_over_steps(group),
                    f"{noun} during the stream, {group.label}",
                    stream.in_words(group),
                ),
            )
            for group in groups
            if stream.is_probed(group)
        ],
        "any_anytime": _says_anything(rows, "anytime"),
        "several_tasks": bool(in_time),
        "folded": len(groups) > MAX_OPEN,
        "charts": _charts(groups, in_time, rows),
        "over_time": [
            (
                group.label,
                svg(
                    figures.tasks_over_time(group),
                    f"{noun} on each task, {group.label}",
                    f"the numbers are those of the {measure.noun} matrix",
                ),
            )
            for group in in_time
            if group.num_tasks <= figures.MAX_LINES
        ],
        "matrices": [
            (
                group.label,
                svg(
                    figures.heat_map(group),
                    f"{noun} matrix, {group.label}",
                    figures.last_row(group),
                ),
            )
            for group in in_time
        ],
        "generated": strips_of(groups),
        "origin": origin_of(groups),
        "commands": commands_of(groups),
        "tasks": _tasks(groups),
        "settings": [(group.label, json.dumps(_settings(group), indent=1)) for group in groups],
        "version": ritornello.__version__,
        "style": Markup(colours.style_sheet()),
    }


def _charts(
    groups: Sequence[Group], in_time: Sequence[Group], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The pictures of all groups together, those that there is something to see in."""
    several_seeds = any(group.num_runs > 1 for group in groups)
    several_orders = any(len(group.class_orders) > 1 for group in groups)
    from_scratch = any(group.strategy == "from-scratch" for group in groups)
    measure = groups[0].measure
    noun, better = measure.noun.capitalize(), "Down" if measure.lower_is_better else "Up"
    charts: list[tuple[Drawing | None, str, str, str, str]] = [
        (
            figures.average_over_time(in_time) if in_time else None,
            f"{noun} after each task",
            "Mean over the tasks seen so far.",
            f"Bands: one standard deviation over {'the runs' if several_orders else 'the seeds'}.",
            f"after the last task {_listed(in_time)}",
        ),
        (
            stream.average_over_stream(in_time),
            f"{noun} during the stream",
            "Mean over the tasks so far, on a part of their test samples. Lines: ends of tasks.",
            f"Bands: one standard deviation over {'the runs' if several_orders else 'the seeds'}.",
            ", ".join(
                f"{group.label} {stream.figures_of(group)['average anytime']} on average"
                for group in in_time
                if stream.is_probed(group)
            ),
        ),
        (
            trade_offs.accuracy_by_runtime(groups),
            f"{noun} against training time",
            f"{better} is better, left is faster."
            + " The dotted line is what training from scratch reaches." * from_scratch,
            "Bars: one standard deviation.",
            ", ".join(f"{row.label} {row.average} in {row.runtime}" for row in rows),
        ),
        (
            trade_offs.closeness_by_runtime(groups),
            "How close to training from scratch, at which price",
            "Beside the points: past samples for each new one of a mini-batch (r/b); at 0 no "
            "sample more than incremental training is trained on.",
            "Points: means over the seeds.",
            _listed(groups),
        ),
        (
            trade_offs.accuracy_by_capacity(groups),
            f"{noun} against the size of the buffer",
            f"Average {measure.header} at the end.",
            "Bars: one standard deviation.",
            _listed([group for group in groups if group.capacity]),
        ),
    ]
    return [
        {
            "title": title,
            "text": f"{text} {deviation}" if several_seeds else text,
            "svg": svg(drawing, title, description),
        }
        for drawing, title, text, deviation, description in charts
        if drawing is not None
    ]


def _listed(groups: Sequence[Group]) -> str:
    return ", ".join(f"{group.label} {group.text(group.average)}" for group in groups)


def _measure(groups: Sequence[Group]) -> Measure:
    """What all models were measured by.

    Raises:
        ValueError: some by accuracies, others by errors.
    """
    return common_measure(group.first for group in groups)


def _pictures(group: Group) -> list[dict[str, Any]]:
    """The rows of a table of pictures of the first run: what it is, and one file per task."""
    found = group.first.get("pictures", [])
    if not found:
        return []
    rows = [("what the model sees", [each["input"] for each in found])]
    for number, part in enumerate(found[0]["parts"]):
        for what in ("truth", "prediction"):
            pictures = [each["parts"][number][what] for each in found]
            rows.append((f"{part['name']}: {what}", pictures))
    names = [group.first["tasks"][each["task"]]["name"] for each in found]
    return [
        {"what": what, "pictures": list(zip(names, pictures, strict=True))}
        for what, pictures in rows
        if None not in pictures
    ]


def _title(groups: Sequence[Group]) -> str:
    names = list(dict.fromkeys(group.recipe for group in groups))
    if len(names) > 1:
        names = list(dict.fromkeys(family_of(name) for name in names))
    return ", ".join(names)


def _circumstances(groups: Sequence[Group]) -> str:
    """Such as "2 ranks, seed 0"."""
    ranks = _ranks(groups)
    seeds = sorted({seed for group in groups for seed in group.seeds})
    return f"{ranks} rank{'s' if ranks != '1' else ''}, " + (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    )


def _ranks(groups: Sequence[Group]) -> str:
    return " and ".join(map(str, sorted({group.first["world_size"] for group in groups})))


def _descriptions(groups: Sequence[Group]) -> list[str]:
    """The description of each recipe, or what those of a family have in common."""
    found = []
    for alike in families_of(groups).values():
        texts = {str(group.first["config"].get("description") or "") for group in alike}
        text = min(texts)
        found.append(text if len(texts) == 1 else text.partition(":")[0])
    return list(dict.fromkeys(filter(None, found)))


def _tasks(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The tasks, where all runs had the same ones."""
    runs = [run for group in groups for run in group.runs]
    tasks: list[dict[str, Any]] = runs[0].get("tasks", [])
    return tasks if all(run.get("tasks") == tasks for run in runs) else []


def _rows(groups: Sequence[Group]) -> list[Row]:
    """A row for each group."""
    with_buffer = sum(group.strategy not in WITHOUT_BUFFER for group in groups)
    rows = []
    for group in groups:
        multiple = times_incremental(group, groups)
        steps = group.step_seconds
        # A task that is not trained on when it comes can be neither forgotten nor transferred.
        learns_in_time = all(all(run.get("steps_per_task", [1])) for run in group.runs)
        changes = group.num_tasks > 1 and learns_in_time
        rows.append(
            Row(
                label=group.label,
                seeds=str(len(group.seeds) if len(group.class_orders) > 1 else group.num_runs),
                capacity=buffer_of(group),
                average=group.text(group.average),
                top5=group.text(group.figure("average_top5")),
                forgetting=group.text(group.forgetting) if changes else NOTHING,
                backward=group.text(group.backward_transfer, "+") if changes else NOTHING,
                forward=group.text(group.forward_transfer, "+") if changes else NOTHING,
                seconds=duration(group.seconds.mean),
                multiple=NOTHING if multiple is None else f"{multiple:.1f}x",
                published=_published_text(group),
                step_ms={part: 1000 * steps[part] for part in figures.PARTS},
                emphasised=with_buffer == 1 < len(groups) and group.strategy not in WITHOUT_BUFFER,
                averaged=group.text(group.figure(f"average_averaged_{group.measure.name}")),
                worst=group.text(group.worst),
                orders=str(len(group.class_orders) or 1),
                loss=_in_nats(group.figure("average_loss")),
                risen=_in_nats(group.figure("forgetting_in_loss")) if changes else NOTHING,
                in_stream=stream.figures_of(group),
                parts={
                    f"{part} error": group.text(group.average_of_part(part))
                    for part in parts_of(groups)
                },
            )
        )
    return rows


def _says_anything(rows: Sequence[Row], name: str) -> bool:
    """Whether some row has something to say in a column."""
    return any(getattr(row, name) not in ("", NOTHING) for row in rows)


def _in_nats(figure: Statistic | None) -> str:
    return NOTHING if figure is None else figure.in_nats()


def _published_text(group: Group) -> str:
    figure, published = group.published_figure, group.published
    if figure is None or published is None:
        return ""
    return ("top-5 " if published.top1 is None else "") + figure.in_percent()


def _settings(group: Group) -> dict[str, Any]:
    """A group's runs, and everything that was set."""
    runs = [{k: run.get(k) for k in ("seed", "date", "command", "machine")} for run in group.runs]
    first = {k: group.first[k] for k in ("config", "versions", "buffer")}
    return {"runs": runs, **first}
