"""The report of saved results: tables for the terminal, and one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from ritornello.experiments import figures, trade_offs
from ritornello.experiments.figures import COLOURS, Drawing, svg
from ritornello.experiments.sweep import (
    WITHOUT_BUFFER,
    Group,
    Results,
    family_of,
    num_train_samples,
    reference_for,
    summarise,
)

__all__ = ["COLOURS", "summary_of", "table_of", "table_of_tasks", "write_report"]

MAX_OPEN = 8
"""With more groups, the plots of single groups are folded away."""


@dataclass(frozen=True)
class Row:
    """A row of the tables, as texts with units."""

    label: str
    strategy: str
    seeds: str
    top1: str
    top5: str
    forgetting: str
    backward: str
    forward: str
    runtime: str
    step: str
    published: str
    source: str
    emphasised: bool


def table_of(results: Mapping[str, Results]) -> Table:
    """The table that a run ends with."""
    rows = _rows(summarise(results))
    columns = {"avg top-1": "top1", "top-5": "top5", "forgetting": "forgetting"}
    if any(row.seeds != "1" for row in rows):
        columns = {"seeds": "seeds", **columns, "runtime": "runtime"}
    else:
        # Where deviations take the room, the report alone shows the parts of a step.
        columns |= {"runtime": "runtime", "step: load/wait/train": "step"}
    if any(row.published for row in rows):
        columns["published"] = "published"
        del columns["top-5"]  # what was published is top-1, and 80 columns are all there is
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=max(len(row.label) for row in rows) < 24, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        texts = [getattr(row, name) for name in columns.values()]
        table.add_row(row.label, *texts, style="bold" if row.emphasised else None)
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
        texts = ["-" if each is None else f"{100 * each:.1f} %" for each in accuracies]
        style = "bold" if number == numbers[-1] else None
        table.add_row(escape(task["name"]), f"{task['test_samples']:,}", *texts, style=style)
    return table


def summary_of(results: Mapping[str, Results]) -> str:
    """A few sentences that say what happened, for each recipe or family of recipes."""
    families: dict[str, list[Group]] = {}
    for group in summarise(results):
        families.setdefault(family_of(group.recipe), []).append(group)
    summaries = {family: _summary(groups) for family, groups in families.items()}
    if len(summaries) == 1:
        return next(iter(summaries.values()))
    return " ".join(f"{family}: {text}" for family, text in summaries.items() if text)


def write_report(results: Mapping[str, Results], path: Path) -> None:
    """Writes the report, one HTML file with everything in it.

    Args:
        results: from ``saved_results.load_results``.
        path: of the file; its folder is made if need be.
    """
    environment = Environment(
        loader=PackageLoader("ritornello.experiments"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = summarise(results)
    rows = _rows(groups)
    page = environment.get_template("report.html.j2").render(
        title=_title(groups),
        summary=summary_of(results),
        rows=rows,
        several_seeds=any(group.num_runs > 1 for group in groups),
        any_published=any(row.published for row in rows),
        from_scratch=any(group.strategy == "from-scratch" for group in groups),
        folded=len(groups) > MAX_OPEN,
        groups=[
            {
                "label": group.label,
                "over_time": svg(
                    figures.tasks_over_time(group), f"Accuracy per task, {group.label}"
                ),
                "matrix": svg(figures.heat_map(group), f"Accuracy matrix, {group.label}"),
                "json": json.dumps(_provenance(group), indent=1),
            }
            for group in groups
        ],
        average=svg(figures.average_over_time(groups), "Mean accuracy over the tasks seen so far"),
        capacity=_svg_if_any(trade_offs.accuracy_by_capacity(groups), "Accuracy and buffer size"),
        frontier=_svg_if_any(trade_offs.accuracy_by_runtime(groups), "Accuracy and runtime"),
        runtime=svg(figures.runtimes(groups), "Runtime and final accuracy"),
        steps=svg(figures.step_times(groups), "Time of a step"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _svg_if_any(drawing: Drawing | None, title: str) -> Markup | None:
    return None if drawing is None else svg(drawing, title)


def _title(groups: Sequence[Group]) -> str:
    names = list(dict.fromkeys(group.recipe for group in groups))
    if len(names) > 1:
        names = list(dict.fromkeys(family_of(name) for name in names))
    sizes = sorted({group.first["world_size"] for group in groups})
    seeds = sorted({seed for group in groups for seed in group.seeds})
    ranks = f"{' and '.join(map(str, sizes))} rank{'s' if sizes != [1] else ''}"
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{', '.join(names)}: {ranks}, {seed}"


def _summary(groups: Sequence[Group]) -> str:
    by_strategy: dict[str, list[Group]] = {}
    for group in groups:
        by_strategy.setdefault(group.strategy, []).append(group)
    parts = []
    if incremental := by_strategy.get("incremental"):
        group = incremental[0]
        parts.append(
            f"Trained on new data alone, the model ends at {_final(group)} over all tasks: it has "
            f"forgotten {group.forgetting.in_percent()} of what it had learnt."
        )
    for strategy, alike in by_strategy.items():
        if strategy in WITHOUT_BUFFER:
            continue
        best = max(alike, key=lambda group: group.average_top1.mean)
        text = f"With {strategy}{_buffer_share(best)} it ends at {_final(best)}"
        if len(alike) > 1:
            text += f", the best of {len(alike)} settings ({best.label})"
        parts.append(text + _times_incremental(best, groups) + ".")
    for strategy, text in (
        ("from-scratch", "Retraining on everything at every task reaches"),
        ("joint", "Training on everything at once reaches"),
    ):
        if reference := by_strategy.get(strategy):
            group = reference[0]
            parts.append(f"{text} {_final(group)}{_times_incremental(group, groups)}.")
    return " ".join(parts)


def _final(group: Group) -> str:
    seeds = f" (mean of {group.num_runs} seeds)" if group.num_runs > 1 else ""
    return group.average_top1.in_percent() + seeds


def _times_incremental(group: Group, groups: Sequence[Group]) -> str:
    reference = reference_for(group, groups, "incremental")
    if reference is None:
        return ""
    return f", in {group.seconds.mean / reference.seconds.mean:.1f} times the time"


def _buffer_share(group: Group) -> str:
    total = num_train_samples(group.first)
    capacity = group.capacity or 0
    return f" from {capacity:,} representatives ({100 * capacity / total:.1f} % of the data)"


def _rows(groups: Sequence[Group]) -> list[Row]:
    """A row for each group."""
    with_buffer = sum(group.strategy not in WITHOUT_BUFFER for group in groups)
    rows = []
    for group in groups:
        runtime = f"{group.seconds.mean:.1f} s"
        if reference := reference_for(group, groups, "incremental"):
            runtime += f" ({group.seconds.mean / reference.seconds.mean:.1f}x)"
        steps = group.step_seconds
        published = group.published
        rows.append(
            Row(
                label=group.label,
                strategy=group.strategy,
                seeds=str(group.num_runs),
                top1=group.average_top1.in_percent(),
                top5=group.average_top5.in_percent(),
                forgetting=group.forgetting.in_percent(),
                backward=group.backward_transfer.in_percent("+"),
                forward=group.forward_transfer.in_percent("+"),
                runtime=runtime,
                step="/".join(f"{1000 * steps[part]:.2f}" for part in figures.PARTS) + " ms",
                published=_published_text(group),
                source=published.source if published else "",
                emphasised=with_buffer == 1 and group.strategy not in WITHOUT_BUFFER,
            )
        )
    return rows


def _published_text(group: Group) -> str:
    figure, published = group.published_figure, group.published
    if figure is None or published is None:
        return ""
    return ("top-5 " if published.top1 is None else "") + figure.in_percent()


def _provenance(group: Group) -> dict[str, Any]:
    """Where a group's figures come from."""
    runs = [{k: run.get(k) for k in ("seed", "date", "command", "machine")} for run in group.runs]
    first = {k: group.first[k] for k in ("config", "versions", "buffer")}
    return {"runs": runs, **first}
