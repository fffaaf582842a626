"""What a simulation prints: three tables and a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ritornello.experiments.speed.draw_statistics import FALSE_ALARM_RATE
from ritornello.experiments.speed.simulate import SimulatedRanks, SimulationResults
from ritornello.experiments.speed.step_time import StepTime


def tables(results: SimulationResults) -> list[Table]:
    """The tables that a simulation ends with."""
    return [
        _fairness_table(results.simulated),
        _cost_table(results.simulated, results.machine.ranks_per_node),
        _step_time_table(results.step_times),
    ]


def summary(results: SimulationResults) -> str:
    """A few sentences that say what was found."""
    unfair = [each.num_ranks for each in results.simulated if not each.fairness.is_fair]
    if unfair:
        fair = (
            f"NOT within sampling error at {', '.join(f'{each:,}' for each in unfair)} ranks "
            "(p below"
        )
    else:
        fair = "All draws are within sampling error of the promise (no p below"
    slowest = max(results.simulated, key=lambda each: each.plan_seconds)
    largest = results.step_times[-1]
    return (
        f"{fair} {FALSE_ALARM_RATE:g}, the false-alarm rate of each test). A plan takes at most "
        f"{1000 * slowest.plan_seconds:.2f} ms (median, at {slowest.num_ranks:,} ranks). Each "
        f"rank draws {_megabytes(results.simulated[0].bytes_drawn)} a step at any number of "
        f"ranks. At {largest.num_ranks:,} ranks {1000 * largest.exposed_seconds:.2f} ms of a "
        f"step of {1000 * largest.rehearsal_seconds:.1f} ms are exposed."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom")
    return table


def _fairness_table(simulated: Sequence[SimulatedRanks]) -> Table:
    table = _table(
        "How often a representative is drawn, over how often is promised",
        "ranks",
        "held",
        "of each\nclass",
        "smallest,\nlargest",
        "allowed by\nchance",
        "shards, classes\noff by at most",
        "p-value",
    )
    for each in simulated:
        fair = each.fairness
        shard = max(fair.largest_shard_ratio - 1, 1 - fair.smallest_shard_ratio)
        of_class = max(fair.largest_class_ratio - 1, 1 - fair.smallest_class_ratio)
        p_value = min(fair.record_p_value, fair.shard_p_value, fair.class_p_value)
        table.add_row(
            f"{each.num_ranks:,}",
            f"{each.num_held:,}",
            f"{each.smallest_class}-{each.largest_class}",
            f"{fair.smallest_ratio:.2f}-{fair.largest_ratio:.2f}",
            f"{fair.smallest_allowed_ratio:.2f}-{fair.largest_allowed_ratio:.2f}",
            f"{100 * shard:.1f} %, {100 * of_class:.1f} %",
            f"{p_value:.2g}" + ("" if fair.is_fair else "\nUNFAIR"),
        )
    return table


def _cost_table(simulated: Sequence[SimulatedRanks], ranks_per_node: int) -> Table:
    table = _table(
        f"\nPer rank and step, with {ranks_per_node} ranks on a node",
        "ranks",
        "drawn",
        "from\nothers",
        "other\nnodes",
        "messages\nto others",
        "between\nnodes",
        "records served\np50/p99/max",
        "plan\n(median)",
    )
    for each in simulated:
        moved = each.traffic
        table.add_row(
            f"{each.num_ranks:,}",
            _megabytes(each.bytes_drawn),
            _megabytes(each.bytes_received),
            _megabytes(each.network_bytes_received),
            f"{moved.messages:.2f}",
            f"{moved.network_messages:.2f}",
            f"{moved.served_p50}/{moved.served_p99}/{moved.served_max}",
            f"{1000 * each.plan_seconds:.2f} ms",
        )
    return table


def _step_time_table(step_times: Sequence[StepTime]) -> Table:
    table = _table(
        "\nPredicted time per step of new data, in ms",
        "ranks",
        "incremental",
        "rehearsal",
        "from\nscratch",
        "round",
        "exposed",
        "rehearsed\nsamples/s",
        "slowdown",
    )
    for each in step_times:
        table.add_row(
            f"{each.num_ranks:,}",
            f"{1000 * each.incremental_seconds:.2f}",
            f"{1000 * each.rehearsal_seconds:.2f}",
            f"{1000 * each.from_scratch_seconds:.2f}",
            f"{1000 * each.round_seconds:.2f}",
            f"{1000 * each.exposed_seconds:.2f}",
            f"{each.rehearsal_throughput:,.0f}",
            f"{each.rehearsal_seconds / each.incremental_seconds:.2f}x",
        )
    return table


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.2f} kB"
