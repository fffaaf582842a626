"""Training on all ranks, as a command asks for it; then what came out is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ritornello.experiments.cli.output import COMMAND, output_folder, show
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.saver import CheckpointSettings
from ritornello.experiments.training.tracking import Tracking


def train(
    recipes: dict[str, Recipe],
    ranks: int | None,
    output: str | None,
    default_name: str,
    saving: CheckpointSettings | None = None,
    tracking: Tracking | None = None,
) -> None:
    """Trains one variant or several on all ranks; the main one shows what came out."""
    from ritornello.experiments.models.pretrained import check_weights
    from ritornello.experiments.ranks.launch import num_ranks_in, place_in_job, restarted
    from ritornello.experiments.training.run import (
        OFF,
        UNTRACKED,
        all_finished,
        check,
        run_checked,
    )

    place = place_in_job(os.environ)
    num_ranks = num_ranks_in(place, ranks)
    saving, tracking = saving or OFF, tracking or UNTRACKED
    saving.check()
    tracking.check()
    for each in recipes.values():
        check(each, num_ranks)
    goes_on = saving.is_on and (saving.resume or restarted())
    if not goes_on:  # one that has finished needs no weights
        for each in recipes.values():
            check_weights(each)
    if goes_on and output is None:
        raise ValueError("--resume: say with --output which run goes on")
    is_main = place is None or place.rank == 0
    folder = output_folder(output, default_name, goes_on) if is_main else None
    console = Console(quiet=not is_main)
    console.print(_announcement(recipes, num_ranks), highlight=False)
    path = None if folder is None else str(folder)
    command = COMMAND.get()
    if goes_on and output is not None and all_finished(recipes, Path(output), num_ranks):
        console.print("has finished before; nothing is run", highlight=False)
    else:
        settings: dict[str, Any] = {"command": command, "saving": saving, "tracking": tracking}
        target = partial(run_checked, **settings)
        launch_ranks(ranks, saving, f"--resume --output {path}", target, recipes, path)
    if folder is not None:
        from ritornello.experiments.results.reading import load_results

        show(load_results([folder]).values(), folder / "report.html")


def launch_ranks(
    ranks: int | None,
    saving: CheckpointSettings,
    flags: str,
    target: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """Trains on all ranks. An interruption says with which flags it goes on."""
    from ritornello.experiments.ranks.interruption import SIGNALS, RunInterruptedError
    from ritornello.experiments.ranks.launch import LaunchError, launch

    try:
        return launch(ranks, target, *arguments, num_restarts=saving.restarts)
    except LaunchError as error:
        if saving.is_on and error.signal_number in SIGNALS:
            raise RunInterruptedError(
                error.signal_number, f"all ranks were ended; goes on with {flags}"
            ) from None
        raise


def _announcement(recipes: dict[str, Recipe], num_ranks: int) -> str:
    """What is about to run."""
    first = next(iter(recipes.values()))
    strategies = dict.fromkeys(each.strategy for each in recipes.values())
    seeds = list(dict.fromkeys(each.seed for each in recipes.values()))
    text = f"{', '.join(strategies)} on {num_ranks} rank{'s' if num_ranks > 1 else ''}, "
    text += f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    if len(recipes) > len(strategies):
        text += f": {len(recipes)} runs"
    return f"[bold]{first.name}[/bold]: {escape(first.description)}\n{text}"
