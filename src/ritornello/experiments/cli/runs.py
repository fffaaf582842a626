"""The commands that train: one run, several to compare, and what goes on with a finished one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ritornello.experiments.cli.flags import (
    BufferChanges,
    Changes,
    RehearsalChanges,
    Sweep,
    TaskChanges,
)
from ritornello.experiments.cli.output import COMMAND, show
from ritornello.experiments.cli.start import launch_ranks, train
from ritornello.experiments.recipes.named import SWEEPS, recipe_named
from ritornello.experiments.training.saver import CheckpointSettings
from ritornello.experiments.training.tracking import Tracking
from ritornello.experiments.training.variants import variants

ALL_STRATEGIES = ("incremental", "rehearsal", "from-scratch")

RecipeName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="See 'ritornello recipes'.")
]
RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))]
Settings = Annotated[Changes, tyro.conf.arg(name="")]
BufferSettings = Annotated[BufferChanges, tyro.conf.arg(name="")]
TaskSettings = Annotated[TaskChanges, tyro.conf.arg(name="")]
RehearsalSettings = Annotated[RehearsalChanges, tyro.conf.arg(name="")]
SweepSettings = Annotated[Sweep, tyro.conf.arg(name="")]
SavingSettings = Annotated[CheckpointSettings, tyro.conf.arg(name="")]
TrackingSettings = Annotated[Tracking, tyro.conf.arg(name="")]


def run(
    recipe: RecipeName,
    /,
    changes: Settings,
    buffer: BufferSettings,
    saving: SavingSettings,
    tracking: TrackingSettings,
    strategy: str | None = None,
    seeds: Seeds = (),
    class_orders: tuple[int, ...] = (),
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with one strategy.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        buffer: Settings of the buffer to change.
        saving: Checkpoints.
        tracking: Curves while it runs.
        strategy: incremental, rehearsal, from-scratch, ...; if not given, the recipe's own.
        seeds: Of everything random. Several: one run each, and means of them.
        class_orders: Numbers that each draw an order in which classes arrive: one run each with
            every seed, and their mean and worst.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for results.json, model.pt, the buffer and report.html; runs/... if not
            given.
    """
    changed = changes.applied_to(recipe, **buffer.as_changes())
    chosen = strategy or changed.strategy
    recipes = variants(changed, [chosen], class_orders=class_orders, seeds=seeds)
    train(recipes, ranks, output, f"{recipe}-{chosen}", saving, tracking)


def compare(
    recipe: RecipeName,
    /,
    changes: Settings,
    sweep: SweepSettings,
    saving: SavingSettings,
    tracking: TrackingSettings,
    seeds: Seeds = (),
    class_orders: tuple[int, ...] = (),
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with several strategies, buffers and seeds, and compare them.

    Recipes whose name ends with frontier have a sweep of their own: what is not given is as there.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        sweep: What to compare.
        saving: Checkpoints.
        tracking: Curves while it runs.
        seeds: Of everything random. Several: every combination runs with each, for means of them.
        class_orders: Numbers that each draw an order in which classes arrive: every combination
            runs with each, for their mean and worst.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for comparison.json and report.html; runs/... if not given.
    """
    changed = changes.applied_to(recipe)
    usual: dict[str, tuple[Any, ...]] = {
        "strategies": ("incremental", changed.strategy, "from-scratch")
    }
    usual |= SWEEPS.get(recipe, {})
    settings = {name: given or usual.get(name, ()) for name, given in vars(sweep).items()}
    recipes = variants(changed, **settings, class_orders=class_orders, seeds=seeds)
    train(recipes, ranks, output, f"{recipe}-compare", saving, tracking)


def extend(
    folder: RunFolder,
    /,
    changes: TaskSettings,
    buffer: RehearsalSettings,
    saving: SavingSettings,
    tracking: TrackingSettings,
    data: str,
    name: str | None = None,
    test: tuple[str, ...] = (),
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Go on with a finished run: learn new data, with new classes or without, and rehearse the old.

    Args:
        folder: Output folder of run; model, buffer and results in it are replaced when all is done.
        changes: Settings to change, from now on.
        buffer: Settings of the buffer to change, from now on.
        saving: Checkpoints.
        tracking: Curves while it runs.
        data: What is new: a folder with CLASS/*.jpg (every tenth image is held out for testing), or
            with train/CLASS and val/CLASS; or an npz file.
        name: Of the new task; if not given, that of the folder or file.
        test: Where data of earlier tasks lie now, if they were moved.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Another folder to write to; the run then stays as it is.
    """
    from ritornello.experiments.ranks.launch import num_ranks_in, place_in_job
    from ritornello.experiments.training.extension import extend as extend_run
    from ritornello.experiments.training.extension_plan import plan

    settings: dict[str, Any] = {
        "name": name,
        "changes": changes.as_changes() | buffer.as_changes(),
    }
    place = place_in_job(os.environ)
    num_ranks = num_ranks_in(place, ranks)
    saving.check()
    tracking.check()
    planned = plan(Path(folder), Path(data), num_ranks=num_ranks, **settings)
    console = Console(quiet=place is not None and place.rank != 0)
    console.print(planned.announcement(num_ranks), highlight=False)
    settings |= {"tests": test, "output": output, "command": COMMAND.get()}
    settings |= {"saving": saving, "tracking": tracking}
    target = partial(extend_run, **settings)
    results = launch_ranks(ranks, saving, "--resume", target, folder, data)
    if not console.quiet:
        from ritornello.experiments.reporting.report import table_of_tasks
        from ritornello.experiments.results.reading import load_results

        console.print()
        console.print(table_of_tasks(results))
        where = Path(output or folder)
        show(load_results([where]).values(), where / "report.html")


def demo(ranks: int = 2, output: str | None = None) -> None:
    """See forgetting happen, and rehearsal undo it: embedded data, about a minute.

    Args:
        ranks: Local processes to start.
        output: Folder for comparison.json and report.html; runs/demo if not given.
    """
    train(variants(recipe_named("digits"), ALL_STRATEGIES), ranks, output, "demo")
