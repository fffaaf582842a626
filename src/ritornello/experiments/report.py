"""The report of saved results: tables for the terminal, and one self-contained HTML file."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ritornello.experiments.metrics import average_after_each_task

Results = Mapping[str, Any]

COLOURS = {"incremental": "#d9662b", "rehearsal": "#2a85d0", "from-scratch": "#2e9e6b"}
"""Told apart also by colour-blind readers, on light and on dark."""
PALETTE = (*COLOURS.values(), "#a06fc4", "#b08a1e", "#5c8a94", "#c2577f")
MARKERS = "osD^vP*"
INK = "#123456"
"""Drawn in the page's text colour: replaced in the SVG."""
PARTS = {"load": "#b08a1e", "wait": "#d9662b", "train": "#5c8a94"}


def load_results(folders: Sequence[str | Path]) -> dict[str, Results]:
    """Reads what ``ritornello run`` and ``compare`` have written.

    Returns:
        A label for each run to its results; the label is the strategy where that is enough.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError: a file that is no results of this format.
    """
    found: list[tuple[str, Results]] = []
    for folder in map(Path, folders):
        comparison, single = folder / "comparison.json", folder / "results.json"
        if comparison.exists():
            found += [(str(folder), each) for each in _read(comparison).values()]
        elif single.exists():
            found.append((str(folder), _read(single)))
        else:
            raise FileNotFoundError(
                f"{folder} holds neither results.json nor comparison.json: give the output "
                "folder of 'ritornello run' or 'ritornello compare'"
            )
    results: dict[str, Results] = {}
    for folder_name, each in found:
        _check_format(folder_name, each)
        strategies = [other["strategy"] for _, other in found]
        alone = strategies.count(each["strategy"]) == 1
        results[each["strategy"] if alone else f"{each['strategy']} ({folder_name})"] = each
    return results


def table_of(results: Mapping[str, Results]) -> Table:
    """The table that a run ends with."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for name in ("avg top-1", "top-5", "forgetting", "runtime", "step: load/wait/train"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(results):
        style = "bold" if row["strategy"] == "rehearsal" else None
        table.add_row(
            row["label"],
            row["top1"],
            row["top5"],
            row["forgetting"],
            row["runtime"],
            row["step"],
            style=style,
        )
    return table


def summary_of(results: Mapping[str, Results]) -> str:
    """One or two sentences that say what happened."""
    by_strategy = {each["strategy"]: each for each in results.values()}
    parts = []
    if incremental := by_strategy.get("incremental"):
        parts.append(
            f"Trained on new data alone, the model ends at {_percent(incremental['average_top1'])} "
            f"over all tasks: it has forgotten {_percent(incremental['forgetting'])} of what it "
            "had learnt."
        )
    if rehearsal := by_strategy.get("rehearsal"):
        share = _buffer_share(rehearsal)
        text = f"With rehearsal{share} it ends at {_percent(rehearsal['average_top1'])}"
        if incremental:
            text += f", in {rehearsal['seconds'] / incremental['seconds']:.1f} times the time"
        parts.append(text + ".")
    if scratch := by_strategy.get("from-scratch"):
        text = f"Retraining on everything at every task reaches {_percent(scratch['average_top1'])}"
        if incremental:
            text += f", in {scratch['seconds'] / incremental['seconds']:.1f} times the time"
        parts.append(text + ".")
    return " ".join(parts)


def write_report(results: Mapping[str, Results], path: Path) -> None:
    """Writes the report, one HTML file with everything in it.

    Args:
        results: from ``load_results``.
        path: of the file; its folder is made if need be.
    """
    environment = Environment(
        loader=PackageLoader("ritornello.experiments"), autoescape=True, trim_blocks=True
    )
    first = next(iter(results.values()))
    page = environment.get_template("report.html.j2").render(
        title=_title(first),
        summary=summary_of(results),
        rows=_rows(results),
        runs=[
            {
                "label": label,
                "over_time": _svg(_tasks_over_time(each), f"Accuracy per task, {label}"),
                "matrix": _svg(_heat_map(each), f"Accuracy matrix, {label}"),
                "json": json.dumps(
                    {k: each[k] for k in ("config", "versions", "machine", "date", "buffer")},
                    indent=1,
                ),
            }
            for label, each in results.items()
        ],
        average=_svg(_average_over_time(results), "Mean accuracy over the tasks seen so far"),
        runtime=_svg(_runtime(results), "Runtime and final accuracy"),
        steps=_svg(_step_times(results), "Time of a step"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _title(each: Results) -> str:
    ranks = each["world_size"]
    return f"{each['recipe']}: {ranks} rank{'s' if ranks > 1 else ''}, seed {each['seed']}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _check_format(folder: str, results: Any) -> None:
    if not isinstance(results, dict) or results.get("format") != 1:
        raise ValueError(f"{folder} holds no results of format 1, as 'ritornello run' writes them")


def _rows(results: Mapping[str, Results]) -> list[dict[str, str]]:
    """The table's rows as texts with units."""
    incremental = next((r for r in results.values() if r["strategy"] == "incremental"), None)
    rows = []
    for label, each in results.items():
        runtime = f"{each['seconds']:.1f} s"
        if incremental:
            runtime += f" ({each['seconds'] / incremental['seconds']:.1f}x)"
        seconds = each["step_seconds"]
        rows.append(
            {
                "label": label,
                "strategy": each["strategy"],
                "top1": _percent(each["average_top1"]),
                "top5": _percent(each["average_top5"]),
                "forgetting": _percent(each["forgetting"]),
                "backward": f"{100 * each['backward_transfer']:+.1f} %",
                "forward": f"{100 * each['forward_transfer']:+.1f} %",
                "runtime": runtime,
                "step": "/".join(f"{1000 * seconds[part]:.2f}" for part in PARTS) + " ms",
            }
        )
    return rows


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _buffer_share(rehearsal: Results) -> str:
    total = sum(task["train_samples"] for task in rehearsal["tasks"])
    capacity = rehearsal["config"]["capacity"]
    return f" from {capacity:,} representatives ({_percent(capacity / total)} of the data)"


def _colour(results: Mapping[str, Results], label: str) -> str:
    strategies = [each["strategy"] for each in results.values()]
    strategy = results[label]["strategy"]
    if strategy in COLOURS and strategies.count(strategy) == 1:
        return COLOURS[strategy]
    return PALETTE[list(results).index(label) % len(PALETTE)]


Drawing = tuple[tuple[float, float], Callable[[Axes], None]]
"""Size in inches, and what draws."""


def _average_over_time(results: Mapping[str, Results]) -> Drawing:
    def draw(axes: Axes) -> None:
        for number, (label, each) in enumerate(results.items()):
            values = 100 * np.array(average_after_each_task(np.array(each["top1"])))
            axes.plot(
                range(1, len(values) + 1),
                values,
                marker=MARKERS[number % len(MARKERS)],
                color=_colour(results, label),
                label=label,
            )
        _accuracy_axes(axes, len(values))
        axes.legend(frameon=False, labelcolor=INK)

    return (6.4, 3.2), draw


def _tasks_over_time(each: Results) -> Drawing:
    def draw(axes: Axes) -> None:
        matrix = 100 * np.array(each["top1"])
        num_tasks = len(matrix)
        for task in range(num_tasks):
            name = each["tasks"][task]["name"]
            axes.plot(
                range(task + 1, num_tasks + 1),
                matrix[task:, task],
                marker=MARKERS[task % len(MARKERS)],
                color=PALETTE[task % len(PALETTE)],
                label=name if len(name) < 24 else f"task {task + 1}",
            )
        _accuracy_axes(axes, num_tasks)
        if num_tasks <= 10:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left")

    return (4.6, 3.2), draw


def _heat_map(each: Results) -> Drawing:
    def draw(axes: Axes) -> None:
        matrix = 100 * np.array(each["top1"])
        num_tasks = len(matrix)
        axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_xlabel("accuracy on task (%)")
        axes.set_ylabel("after task")
        axes.set_xticks(range(num_tasks), [str(i + 1) for i in range(num_tasks)])
        axes.set_yticks(range(num_tasks), [str(i + 1) for i in range(num_tasks)])
        axes.spines[:].set_visible(False)
        if num_tasks <= 12:
            for (row, column), value in np.ndenumerate(matrix):
                colour = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)

    return (4.6, 3.2), draw


def _runtime(results: Mapping[str, Results]) -> Drawing:
    def draw(axes: Axes) -> None:
        labels = [_wrapped(label) for label in results]
        seconds = [each["seconds"] for each in results.values()]
        axes.barh(labels, seconds, color=[_colour(results, label) for label in results], height=0.6)
        for place, each in enumerate(results.values()):
            text = f"{each['seconds']:.1f} s, {_percent(each['average_top1'])}"
            _beside_bar(axes, each["seconds"], place, text)
        axes.set_xlim(0, 1.6 * max(seconds))
        axes.invert_yaxis()
        axes.set_xlabel("training time (s), and average top-1 at the end")

    return (5.2, 0.9 + 0.5 * len(results)), draw


def _step_times(results: Mapping[str, Results]) -> Drawing:
    def draw(axes: Axes) -> None:
        labels, left = [_wrapped(label) for label in results], np.zeros(len(results))
        for part, colour in PARTS.items():
            values = np.array([1000 * each["step_seconds"][part] for each in results.values()])
            axes.barh(labels, values, left=left, color=colour, height=0.6, label=part)
            left += values
        for place, (each, total) in enumerate(zip(results.values(), left, strict=True)):
            share = 1000 * each["step_seconds"]["wait"] / total
            axes.text(
                total, place, f" {total:.2f} ms, wait {_percent(share)}", va="center", color=INK
            )
        axes.set_xlim(0, 1.7 * max(left))
        axes.invert_yaxis()
        axes.set_xlabel("mean time of a step (ms)")
        axes.legend(
            frameon=False, labelcolor=INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
        )

    return (5.2, 1.2 + 0.5 * len(results)), draw


def _wrapped(label: str) -> str:
    """A label that leaves room for the bars."""
    return textwrap.fill(label, 18)


def _beside_bar(axes: Axes, length: float, place: int, text: str) -> None:
    axes.annotate(text, (length, place), (5, 0), textcoords="offset points", va="center", color=INK)


def _accuracy_axes(axes: Axes, num_tasks: int) -> None:
    axes.set_ylim(-3, 103)
    axes.set_xticks(range(1, num_tasks + 1))
    axes.set_xlabel("after task")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(axis="y", alpha=0.25)


def _svg(drawing: Drawing, title: str) -> Markup:
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
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Ids are per document, and the page holds several.
    prefix = "".join(letter for letter in title.lower() if letter.isalnum())
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{prefix}-")
    label = Markup.escape(title)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
