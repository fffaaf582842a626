"""Tables and pictures of what ``ritornello bench`` has measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from ritornello.experiments.speed.bench import RoundTimes
from ritornello.experiments.speed.update_times import Beside, Quartiles, UpdateTimes
from ritornello.rounds.round import STAGES
from ritornello.version import __version__

COLOURS = dict(zip(STAGES, ("#0072b2", "#e69f00", "#009e73", "#999999"), strict=True))
PLAIN_COLOUR = "#000000"

ROUNDS_CAPTION = (
    "Medians (plan: mean), of the slowest rank; below them the middle half. round: all stages. "
    "plain: a gather of r and scatter of c rows, all ranks at once, in the same run; ratio: round "
    "to it.\n"
)
PARTS_CAPTION = (
    "Per step, on the slowest rank: medians over turns of some steps; below them the middle half "
    "of the turns. plain: copies of the same bytes, in turns without the buffer. round: where the "
    "trainer runs it itself. handing over: all that is left of update."
)
PRICES_CAPTION = (
    "rehearse: what it keeps the trainer's thread, joining included. hidden: the part of the round "
    "during which the step runs. In % of the step alone: exposed, update without joining; slower, "
    "what the step beside rounds takes longer. In % of step and plain join: what step and update, "
    "and what step and rehearse, take longer than these."
)


def write_bench(measured: dict[str, Any], folder: Path) -> None:
    """Writes ``bench.json`` and ``bench.png``.

    Args:
        measured: from ``bench.measure_all``.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "ritornello": __version__,
    }
    text = json.dumps({"machine": machine, **measured}, indent=2)
    (folder / "bench.json").write_text(text + "\n")
    rounds = [RoundTimes(**each) for each in measured["rounds"]]
    figure_of_rounds(rounds).savefig(folder / "bench.png", dpi=130)


def tables_of(measured: dict[str, Any]) -> Group:
    """What was measured, for the terminal: at most 80 columns wide."""
    rounds = [RoundTimes(**each) for each in measured["rounds"]]
    update = [UpdateTimes(**each) for each in measured["update"]]
    beside = [Beside(**each) for each in measured["beside"]]
    parts: list[Any] = [
        f"[bold]Rounds on {rounds[0].num_ranks} rank(s), no training between[/bold]: µs",
        _table(
            ("workload", "round", *STAGES, "plain", "ratio"),
            [
                (
                    f"{each.workload}\n  {each.transport}",
                    f"{_micro(each.round_seconds)}\n{_range(each.round_middle_half, _micro)}",
                    *(_micro(each.stage_seconds[name]) for name in STAGES),
                    f"{_micro(each.plain_seconds)}\n{_range(each.plain_middle_half, _micro)}",
                    f"{each.ratio:.2f}",
                )
                for each in rounds
            ],
        ),
        ROUNDS_CAPTION,
        "[bold]What a round moves and takes[/bold]",
        _table(
            ("workload", "transport", "GB/s", "CPU µs", "bytes/representative"),
            [
                (
                    each.workload,
                    each.transport,
                    f"{each.gigabytes_per_second:.2f}",
                    _micro(each.cpu_seconds),
                    f"{each.bytes_per_representative:.0f}",
                )
                for each in rounds
            ],
        ),
        "CPU: of all threads of a rank, update included.\n",
        f"[bold]The trainer's thread, no training between: {update[0].transport}[/bold], µs",
        _table_of_parts([_parts_of(each) for each in update], update),
        PARTS_CAPTION,
    ]
    for _, group in groupby(beside, key=lambda each: each.wished_seconds):
        together = list(group)
        milliseconds = 1e3 * together[0].wished_seconds
        parts += [
            f"\n[bold]Beside a step of about {milliseconds:g} ms[/bold], µs",
            _table_of_parts([_parts_of(each) | _prices_of(each) for each in together], together),
        ]
    if beside:
        parts.append(PRICES_CAPTION)
    return Group(*parts)


def _parts_of(each: UpdateTimes) -> dict[str, str]:
    """Label to cell: what ``update`` takes, in parts, with the floor of those that have one."""
    cells = {"update": _cell(each.update_seconds, _micro)}
    for part, seconds in each.part_seconds.items():
        label = part.replace("_", " ")
        cells[f"  {label}"] = _cell(seconds, _micro)
        if part in each.floor_seconds:
            cells[f"  plain {label}"] = _cell(each.floor_seconds[part], _micro)
    return cells


def _prices_of(each: Beside) -> dict[str, str]:
    """Label to cell: what a step pays."""
    return {
        "rehearse": _cell(each.rehearse_seconds, _micro),
        "hidden": _cell(each.hidden_seconds, _micro),
        "step alone, ms": _cell(each.alone_seconds, lambda seconds: f"{1e3 * seconds:.3g}"),
        "exposed, %": _cell(each.exposed_share, _percent),
        "slower, %": _cell(each.slower, _percent),
        "  with update": _cell(each.slower_with_update, _percent),
        "  with rehearse": _cell(each.slower_with_rehearse, _percent),
    }


def _table_of_parts(columns: list[dict[str, str]], measured: Sequence[UpdateTimes]) -> Table:
    """A column of cells for each workload."""
    return _table(
        ("", *(each.workload for each in measured)),
        [(label, *(cells[label] for cells in columns)) for label in columns[0]],
    )


def figure_of_rounds(rounds: list[RoundTimes]) -> Figure:
    """One panel per workload: a bar per transport, made of its stages, and the plain copy."""
    workloads = list(dict.fromkeys(each.workload for each in rounds))
    figure = Figure(figsize=(2.6 + 2.4 * len(workloads), 3.6), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for panel, workload in zip(panels, workloads, strict=True):
        mine = [each for each in rounds if each.workload == workload]
        bottoms = np.zeros(len(mine))
        for name in STAGES:
            heights = np.array([1e6 * each.stage_seconds[name] for each in mine])
            panel.bar(range(len(mine)), heights, 0.6, bottoms, label=name, color=COLOURS[name])
            bottoms += heights
        plain = 1e6 * np.mean([each.plain_seconds for each in mine])
        panel.axhline(plain, color=PLAIN_COLOUR, linestyle="--", label="plain copy")
        panel.set_xticks(
            range(len(mine)), [each.transport.replace("_", "\n") for each in mine], fontsize=8
        )
        panel.set_xlim(-0.6, len(mine) - 0.4)
        panel.set_title(workload, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("µs per round")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
    num_ranks = rounds[0].num_ranks
    figure.suptitle(f"One round on {num_ranks} rank{'s' if num_ranks > 1 else ''}", fontsize=11)
    return figure


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A table of figures."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        left = number == 0 or name == "transport"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _cell(values: Quartiles, shown: Callable[[float], str]) -> str:
    """The median, and below it the middle half."""
    low, median, high = values
    return f"{shown(median)}\n{_range((low, high), shown)}"


def _range(ends: Sequence[float], shown: Callable[[float], str]) -> str:
    return "[dim]" + "..".join(map(shown, ends)) + "[/dim]"


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if abs(percent) >= 10 else f"{percent:.1f}"
