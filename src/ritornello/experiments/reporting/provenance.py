"""Where figures come from: commands, seeds, machines, versions, dates."""

from __future__ import annotations

from collections.abc import Sequence

from ritornello.experiments.results.groups import Group


def commands_of(groups: Sequence[Group]) -> list[str]:
    """Those that made the runs, each once; none where they were not written down."""
    commands = (run.get("command") for group in groups for run in group.runs)
    return list(dict.fromkeys(command for command in commands if command))


def tested_on(groups: Sequence[Group]) -> list[str]:
    """What the figures are of, each once; none if all are of the test samples."""
    shares = list(dict.fromkeys(group.holdout for group in groups))
    if shares == [0.0]:
        return []
    return [
        f"{100 * share:g} % of the training samples, held out" if share else "the test samples"
        for share in shares
    ]


def origin_of(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Seeds, versions, machines, dates, and the source of the published figures.

    Returns:
        What it is to its values, each once; without what the runs do not know.
    """
    runs = [run for group in groups for run in group.runs]
    dates = sorted(str(run["date"])[:10] for run in runs)
    machines = [
        ", ".join(
            [
                str(machine[name]) + (" cores" if name == "cores" else "")
                for name in ("device", "processor", "cores")
                if machine.get(name)
            ]
        )
        for machine in (run["machine"] for run in runs)
    ]
    versions = [
        ", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs
    ]
    orders = {order for group in groups for order in group.class_orders}
    found = {
        "Published": (group.published.source for group in groups if group.published),
        "Tested on": tested_on(groups),
        "Settings chosen by": [str(run["config"].get("tuned_on") or "") for run in runs],
        "Seeds": [_range(sorted({run["seed"] for run in runs}))],
        "Class orders": [_range(sorted(orders))],
        "Machine": machines,
        "Versions": versions,
        "Date": [dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"],
    }
    unique = {name: list(dict.fromkeys(filter(None, texts))) for name, texts in found.items()}
    return {name: texts for name, texts in unique.items() if texts}


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
