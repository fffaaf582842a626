"""Tables and pictures of what ``ritornello bench`` has measured."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from ritornello.experiments.speed.bench import Beside, RoundTimes
from ritornello.rounds.round import STAGES
from ritornello.version import __version__

COLOURS = dict(zip(STAGES, ("#0072b2", "#e69f00", "#009e73", "#999999"), strict=True))
PLAIN_COLOUR = "#000000"


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
    parts: list[Any] = [
        f"[bold]Rounds on {rounds[0].num_ranks} rank(s), no training between[/bold]: µs",
        _table(
            ("transport", "round", *STAGES, "plain", "ratio"),
            [
                (
                    each,
                    each.transport,
                    _micro(each.round_seconds),
                    *(_micro(each.stage_seconds[name]) for name in STAGES),
                    _micro(each.plain_seconds),
                    f"{each.ratio:.2f}",
                )
                for each in rounds
            ],
        ),
        "Medians (plan: mean), of the slowest rank; round: all stages. plain: a gather of\n"
        "r and scatter of c rows, all ranks at once, in the same run; ratio: round to it.\n",
        "[bold]What a round moves and takes[/bold]",
        _table(
            ("transport", "GB/s", "update µs", "CPU µs", "bytes/representative"),
            [
                (
                    each,
                    each.transport,
                    f"{each.gigabytes_per_second:.2f}",
                    _micro(each.update_seconds),
                    _micro(each.cpu_seconds),
                    f"{each.bytes_per_representative:.0f}",
                )
                for each in rounds
            ],
        ),
        "update: on the trainer's thread. CPU: of all threads of a rank, update included.",
    ]
    if measured["beside"]:
        parts += [
            f"\n[bold]Beside a training step: {measured['beside'][0]['transport']}[/bold]",
            _table(
                ("step ms", "exposed µs", "% of step", "join µs", "hidden µs", "slower"),
                [
                    (
                        each,
                        f"{1e3 * each.alone_seconds:.2f}",
                        _micro(each.exposed_seconds),
                        f"{100 * each.exposed_seconds / each.alone_seconds:.2f}",
                        _micro(each.join_seconds),
                        _micro(each.hidden_seconds),
                        f"{100 * (each.step_seconds / each.alone_seconds - 1):+.1f}%",
                    )
                    for each in (Beside(**fields) for fields in measured["beside"])
                ],
            ),
            "Means. step ms: without a buffer; slower: the step beside rounds, without\n"
            "update. exposed: what update waits and copies, without the join.",
        ]
    return Group(*parts)


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


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    """A table of figures, each row beginning with the workload."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("workload", no_wrap=True)
    for name in columns:
        left = name == "transport"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for measured, *figures in rows:
        table.add_row(measured.workload, *figures)
    return table


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"
