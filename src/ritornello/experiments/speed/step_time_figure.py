"""The picture of a simulation: time per step against ranks, and what a round is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ritornello.experiments.reporting.colours import COLOURS
from ritornello.experiments.speed.step_time import StepTime

SETTINGS: Any = {"axes.spines.right": False, "axes.spines.top": False, "font.size": 10}
PARTS = {"exchange": "#5c8a94", "stage": "#a06fc4", "admit": "#b08a1e", "plan": "#c2577f"}


def draw_step_times(step_times: Sequence[StepTime], subtitle: str, num_tasks: int) -> Figure:
    """Draws the predicted times.

    Args:
        step_times: by ascending number of ranks.
        subtitle: which machine, which sizes.
        num_tasks: over which training from scratch is averaged.
    """
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.0, 6.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_times(above, step_times, num_tasks)
        above.set_title(f"Predicted time per step\n{subtitle}", loc="left", fontsize=10)
        _draw_round(below, step_times)
    return figure


def _draw_times(axes: Axes, step_times: Sequence[StepTime], num_tasks: int) -> None:
    ranks = [each.num_ranks for each in step_times]
    markers = {"from-scratch": "D", "rehearsal": "s", "incremental": "o"}
    for name, marker in markers.items():
        key = name.replace("-", "_")
        values = [1000 * getattr(each, f"{key}_seconds") for each in step_times]
        label = key.replace("_", " ")
        if name != "incremental":
            label += f"\n({values[-1] / (1000 * step_times[-1].incremental_seconds):.2f}x"
            label += f", mean of {num_tasks} tasks)" if name == "from-scratch" else ")"
        axes.plot(ranks, values, marker=marker, markersize=5, color=COLOURS[name], label=label)
    axes.set_ylim(0, 1.15 * max(1000 * each.from_scratch_seconds for each in step_times))
    axes.set_ylabel("ms per step of new data")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_round(axes: Axes, step_times: Sequence[StepTime]) -> None:
    ranks = np.array([each.num_ranks for each in step_times])
    bottom = np.zeros(len(ranks))
    for part, colour in PARTS.items():
        values = np.array([1000 * getattr(each, f"{part}_seconds") for each in step_times])
        axes.bar(ranks, values, 0.45 * ranks, bottom=bottom, color=colour, label=f"round: {part}")
        bottom += values
    exposed = [1000 * each.exposed_seconds for each in step_times]
    axes.plot(ranks, exposed, color="black", marker="o", markersize=4, label="exposed time")
    # What a round can hide behind.
    steps = [1000 * (each.rehearsal_seconds - each.exposed_seconds) for each in step_times]
    top = 1.3 * max(*bottom, *exposed)
    if min(steps) < 2 * top:
        axes.plot(ranks, steps, color="grey", linestyle="--", label="training step")
        top = max(top, 1.1 * max(steps))
    else:
        axes.text(
            0.01,
            0.99,
            f"A training step of {min(steps):.1f} ms hides the round.",
            transform=axes.transAxes,
            va="top",
            bbox={"color": "white", "pad": 1},
        )
    axes.set_ylim(0, top)
    axes.set_ylabel("ms per step")
    axes.set_xlabel("ranks")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{each:,}" for each in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
