"""The ``ritornello`` command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:  # pragma: no cover - the extra is installed in tests
    raise SystemExit(
        f"ritornello: error: the command needs the extra 'experiments' ({error}): "
        "pip install 'ritornello[experiments]'"
    ) from None

from ritornello.experiments.changes import (
    BufferChanges,
    Changes,
    RehearsalChanges,
    Sweep,
    TaskChanges,
)
from ritornello.experiments.config import Recipe
from ritornello.experiments.progress import say
from ritornello.experiments.recipes import RECIPES, recipe_named
from ritornello.experiments.saving import Saving
from ritornello.experiments.simulate import Simulation
from ritornello.experiments.step_time import MachineChanges
from ritornello.experiments.sweep import Results, variants
from ritornello.experiments.tracking import Tracking

ALL_STRATEGIES = ("incremental", "rehearsal", "from-scratch")

RUN_FILES = (".lock", "results.json", "comparison.json")
"""One of them is in the folder of every run that has begun."""

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="ritornello")
"""The command line, for the results to say how they were made."""

RecipeName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="See 'ritornello recipes'.")
]
SavedBufferFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Folders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))]
Settings = Annotated[Changes, tyro.conf.arg(name="")]
BufferSettings = Annotated[BufferChanges, tyro.conf.arg(name="")]
TaskSettings = Annotated[TaskChanges, tyro.conf.arg(name="")]
RehearsalSettings = Annotated[RehearsalChanges, tyro.conf.arg(name="")]
SweepSettings = Annotated[Sweep, tyro.conf.arg(name="")]
SavingSettings = Annotated[Saving, tyro.conf.arg(name="")]
TrackingSettings = Annotated[Tracking, tyro.conf.arg(name="")]
SimulationSettings = Annotated[Simulation, tyro.conf.arg(name="")]
MachineSettings = Annotated[MachineChanges, tyro.conf.arg(name="")]


def run(
    recipe: RecipeName,
    /,
    changes: Settings,
    buffer: BufferSettings,
    saving: SavingSettings,
    tracking: TrackingSettings,
    strategy: str | None = None,
    seeds: Seeds = (),
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
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for results.json, model.pt, the buffer and report.html; runs/... if not
            given.
    """
    changed = changes.applied_to(recipe, **buffer.as_changes())
    chosen = strategy or changed.strategy
    recipes = variants(changed, [chosen], seeds=seeds)
    _train(recipes, ranks, output, f"{recipe}-{chosen}", saving, tracking)


def compare(
    recipe: RecipeName,
    /,
    changes: Settings,
    sweep: SweepSettings,
    saving: SavingSettings,
    tracking: TrackingSettings,
    seeds: Seeds = (),
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with several strategies, buffers and seeds, and compare them.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        sweep: What to compare.
        saving: Checkpoints.
        tracking: Curves while it runs.
        seeds: Of everything random. Several: every combination runs with each, for means of them.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for comparison.json and report.html; runs/... if not given.
    """
    changed = changes.applied_to(recipe)
    settings = vars(sweep) | {
        "strategies": sweep.strategies or ("incremental", changed.strategy, "from-scratch")
    }
    recipes = variants(changed, **settings, seeds=seeds)
    _train(recipes, ranks, output, f"{recipe}-compare", saving, tracking)


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
    from ritornello.experiments.extension import extend as extend_run
    from ritornello.experiments.extension_plan import plan
    from ritornello.experiments.launch import place_in_job

    settings: dict[str, Any] = {
        "name": name,
        "changes": changes.as_changes() | buffer.as_changes(),
    }
    place = place_in_job(os.environ)
    num_ranks = place.num_ranks if place else ranks or 1
    saving.check()
    tracking.check()
    planned = plan(Path(folder), Path(data), num_ranks=num_ranks, **settings)
    console = Console(quiet=place is not None and place.rank != 0)
    console.print(planned.announcement(num_ranks), highlight=False)
    settings |= {"tests": test, "output": output, "command": COMMAND.get()}
    settings |= {"saving": saving, "tracking": tracking}
    target = partial(extend_run, **settings)
    results = _launch(ranks, saving, "--resume", target, folder, data)
    if not console.quiet:
        from ritornello.experiments.report import table_of_tasks
        from ritornello.experiments.saved_results import load_results

        console.print()
        console.print(table_of_tasks(results))
        where = Path(output or folder)
        _show(load_results([where]), where / "report.html")


def demo(ranks: int = 2, output: str | None = None) -> None:
    """See forgetting happen, and rehearsal undo it: embedded data, about a minute.

    Args:
        ranks: Local processes to start.
        output: Folder for comparison.json and report.html; runs/demo if not given.
    """
    _train(variants(recipe_named("digits"), ALL_STRATEGIES), ranks, output, "demo")


def report(folders: Folders, /, output: str = "report.html") -> None:
    """Write one report of saved results.

    Args:
        folders: Output folders of run or compare.
        output: The HTML file to write.
    """
    from ritornello.experiments.saved_results import load_results

    if not folders:
        raise ValueError("report: give one or more output folders of 'run' or 'compare'")
    _show(load_results(folders), Path(output))


def results(folders: Folders, /, output: str = "results.md", archive: str | None = None) -> None:
    """Write a Markdown page of saved results beside the published figures.

    Args:
        folders: Output folders of run or compare, or folders of those; or archives.
        output: The Markdown file to write.
        archive: A JSON file to keep the results in; the page can be written from it again.
    """
    from ritornello.experiments import results_page, saved_results

    if not folders:
        raise ValueError("results: give output folders of 'run' or 'compare', or an archive")
    runs = saved_results.find_results(folders)
    sources = list(folders)
    if archive is not None:
        saved_results.archive(runs, Path(archive))
        sources = [archive]
    command = shlex.join(["ritornello", "results", *sources, "--output", output])
    results_page.write_results_page(runs, Path(output), command)
    console = Console()
    console.print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}:", style="bold", end=" ")
    console.print(str(Path(output).resolve()), highlight=False, soft_wrap=True)


def simulate(
    simulation: SimulationSettings,
    changes: MachineSettings,
    machine: str = "a100-200gbps",
    bench: str | None = None,
    output: str | None = None,
) -> None:
    """Simulate the buffer on up to thousands of ranks: fairness, traffic, cost, time per step.

    Args:
        simulation: What to simulate.
        changes: Figures of the machine to change.
        machine: Whose time per step to predict: a100-200gbps or this-machine.
        bench: Output folder of bench, for this machine's figures instead.
        output: Folder for simulate.json and simulate.png; runs/simulate if not given.
    """
    from ritornello.experiments import simulate as simulating
    from ritornello.experiments.simulate_report import summary, tables
    from ritornello.experiments.step_time import benched_machine

    cluster = changes.applied_to(benched_machine(Path(bench)) if bench else machine)
    simulation.check()
    folder = _output_folder(output, "simulate")
    console = Console()
    with console.status("simulating") as status:
        results = simulating.simulate(simulation, cluster, report=status.update)
    for table in tables(results):
        console.print(table)
    console.print(f"\n{summary(results)}", highlight=False)
    results.write(folder)
    console.print("\nPicture:", style="bold", end=" ")
    console.print(str((folder / "simulate.png").resolve()), highlight=False, soft_wrap=True)


def inspect(
    folder: SavedBufferFolder,
    /,
    picture: str | None = None,
    export: str | None = None,
    check: Literal["on", "off"] = "on",
) -> None:
    """Show what is in a saved buffer, and whether its files are whole.

    Args:
        folder: Of a saved buffer, or the output of a run.
        picture: A picture to draw of it, such as FILE.png: a row of images for each class.
        export: Where to write all samples: FILE.npz, or a folder for CLASS/NNN.png.
        check: Whether to compare checksums.
    """
    from ritornello.experiments.inspection import find_buffers, inspect_buffer
    from ritornello.experiments.inspection_tables import tables_of

    console = Console()
    if export is not None:
        from ritornello.experiments import export as exporting

        exporting.check_is_free(Path(export))
    with console.status("reading"):
        inspection = inspect_buffer(find_buffers(Path(folder))[0], check == "on")
    for part in tables_of(inspection):
        console.print(part, highlight=False)
    if picture is not None:
        from ritornello.experiments.contact_sheet import draw_contact_sheet

        draw_contact_sheet(inspection, Path(picture))
        console.print("Picture:", style="bold", end=" ")
        console.print(str(Path(picture).resolve()), highlight=False, soft_wrap=True)
    if export is not None:
        num_samples = exporting.export(inspection, Path(export))
        console.print(f"{num_samples:,} samples:", style="bold", end=" ")
        console.print(str(Path(export).resolve()), highlight=False, soft_wrap=True)
    if not inspection.is_whole:
        sys.exit(1)


def forget(
    folder: SavedBufferFolder,
    /,
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    dry_run: bool = False,
) -> None:
    """Remove samples from a saved buffer for good, as when a person's data must be forgotten.

    Args:
        folder: Of a saved buffer; or the output of a run, for its buffer and all its checkpoints.
        where: NAME=VALUE, such as label=3, task=2024-05-01 or id=12,13; all given ones must hold.
        dry_run: Only say what would go.
    """
    from ritornello.experiments.forget import conditions_of, forget_everywhere, outcome_text

    conditions = conditions_of(where)
    console = Console()
    with console.status("reading and writing"):
        outcomes = forget_everywhere(Path(folder), conditions, dry_run)
    for path, outcome in outcomes.items():
        console.print(outcome_text(path, outcome, dry_run), highlight=False, soft_wrap=True)
    if dry_run:
        console.print("Nothing was changed.")


def bench(
    ranks: int | None = None,
    workloads: tuple[str, ...] = ("imagenet-uint8", "imagenet-float32", "cifar", "mnist", "bulk"),
    transports: tuple[str, ...] = (),
    rounds: int = 1000,
    steps: tuple[float, ...] = (1.0, 20.0, 50.0),
    seconds: float = 4.0,
    output: str | None = None,
) -> None:
    """Measure the buffer's speed against this machine's limits.

    Args:
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        workloads: Some of imagenet-uint8, imagenet-float32, cifar, mnist, bulk.
        transports: Some of shared_memory, collective, local, mpi; the first one is also measured
            beside training. If not given, those that the ranks can use.
        rounds: Rounds per workload and transport.
        steps: Training steps, in milliseconds, to measure beside.
        seconds: For each of them, with and without the buffer.
        output: Folder for bench.json and bench.png; runs/bench if not given.
    """
    from ritornello.experiments.bench import check_bench, measure_all
    from ritornello.experiments.bench_report import tables_of, write_bench
    from ritornello.experiments.launch import launch, place_in_job

    place = place_in_job(os.environ)
    num_ranks = place.num_ranks if place else ranks or 1
    under_mpi = place is not None and place.launcher == "mpirun"
    transports = check_bench(workloads, transports, num_ranks, under_mpi, rounds, steps, seconds)
    is_main = place is None or place.rank == 0
    folder = _output_folder(output, "bench") if is_main else None
    console = Console(quiet=not is_main)
    with console.status(f"{num_ranks} rank(s): {', '.join(workloads)}; takes some minutes"):
        measured = launch(ranks, measure_all, workloads, transports, rounds, steps, seconds)
    if folder is not None:
        write_bench(measured, folder)
        console.print(tables_of(measured))
        console.print("\nPicture:", style="bold", end=" ")
        console.print(str((folder / "bench.png").resolve()), highlight=False, soft_wrap=True)


def recipes(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = None,
) -> None:
    """List the recipes, or show all settings of one.

    Args:
        name: The one to show.
    """
    from ritornello.experiments.recipe_tables import all_recipes, one_recipe

    console = Console()
    if name is None:
        for part in all_recipes([make() for make in RECIPES.values()]):
            console.print(part)
        console.print("\nAll settings of one: ritornello recipes RECIPE", highlight=False)
    else:
        for part in one_recipe(recipe_named(name)):
            console.print(part, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command; errors end with one line and status 2."""
    from ritornello.errors import CheckpointError
    from ritornello.experiments.interruption import RunInterruptedError
    from ritornello.experiments.launch import LaunchError, place_in_job

    arguments = sys.argv[1:] if arguments is None else arguments
    COMMAND.set(shlex.join(["ritornello", *arguments]))
    interruption: tuple[str, int] | None = None
    functions = (
        *(demo, run, extend, compare, report, results),
        *(inspect, forget, bench, simulate, recipes),
    )
    try:
        tyro.extras.subcommand_cli_from_dict(
            {each.__name__: each for each in functions},
            prog="ritornello",
            description="Continual learning with a distributed rehearsal buffer.",
            args=arguments,
        )
    except (LaunchError, CheckpointError) as error:
        _fail(error, status=1)
    except RunInterruptedError as end:
        place = place_in_job(os.environ)
        interruption = str(end) if place is None or place.rank == 0 else "", end.status
    except (ValueError, OSError) as error:
        if os.environ.get("RITORNELLO_TRACEBACK"):
            raise
        _fail(error, status=2)
    except ImportError as error:
        if os.environ.get("RITORNELLO_TRACEBACK"):
            raise
        hint = "" if "pip install" in str(error) else ": pip install 'ritornello[experiments]'"
        _fail(f"{error}{hint}", status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    if interruption is not None:
        # Not before the error is gone: it holds what must not outlive the interpreter.
        _fail(*interruption)


def _train(
    recipes: dict[str, Recipe],
    ranks: int | None,
    output: str | None,
    default_name: str,
    saving: Saving | None = None,
    tracking: Tracking | None = None,
) -> None:
    """Trains one variant or several on all ranks; the main one shows what came out."""
    from ritornello.experiments import train
    from ritornello.experiments.launch import place_in_job, restarted

    place = place_in_job(os.environ)
    num_ranks = place.num_ranks if place else ranks or 1
    saving, tracking = saving or train.OFF, tracking or train.UNTRACKED
    saving.check()
    tracking.check()
    for each in recipes.values():
        train.check(each, num_ranks)
    goes_on = saving.is_on and (saving.resume or restarted())
    if goes_on and output is None:
        raise ValueError("--resume: say with --output which run goes on")
    is_main = place is None or place.rank == 0
    folder = _output_folder(output, default_name, goes_on) if is_main else None
    console = Console(quiet=not is_main)
    console.print(_announcement(recipes, num_ranks), highlight=False)
    path = None if folder is None else str(folder)
    command = COMMAND.get()
    if goes_on and output is not None and train.all_finished(recipes, Path(output), num_ranks):
        console.print("has finished before; nothing is run", highlight=False)
    else:
        several = len(recipes) > 1
        settings: dict[str, Any] = {"command": command, "saving": saving, "tracking": tracking}
        target = partial(train.compare if several else train.run, **settings)
        what = recipes if several else next(iter(recipes.values()))
        _launch(ranks, saving, f"--resume --output {path}", target, what, path)
    if folder is not None:
        from ritornello.experiments.saved_results import load_results

        _show(load_results([folder]), folder / "report.html")


def _launch(
    ranks: int | None, saving: Saving, flags: str, target: Callable[..., Any], *arguments: Any
) -> Any:
    """Trains on all ranks. An interruption says with which flags it goes on."""
    from ritornello.experiments.interruption import SIGNALS, RunInterruptedError
    from ritornello.experiments.launch import LaunchError, launch

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


def _show(saved: dict[str, Results], path: Path) -> None:
    from ritornello.experiments.report import summary_of, table_of, write_report

    console = Console()
    console.print()
    console.print(table_of(saved, console.width))
    if summary := summary_of(saved):
        console.print(f"\n{summary}", highlight=False)
    write_report(saved, path)
    console.print("\nReport:", style="bold", end=" ")
    console.print(str(path.resolve()), highlight=False, soft_wrap=True)


def _output_folder(output: str | None, default_name: str, goes_on: bool = False) -> Path:
    """A folder that holds nothing yet, or a run to go on with.

    Raises:
        FileExistsError: the given one holds something, or something else.
    """
    if output is not None:
        folder = Path(output)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"--output {output}: it is no folder; give another one")
        # A lock alone is of a run that failed before it had begun.
        if not folder.exists() or not {each.name for each in folder.iterdir()} - {".lock"}:
            return folder
        is_run = any((folder / name).exists() for name in RUN_FILES)
        if goes_on and is_run:
            return folder
        if goes_on:
            hint = "and holds no run to go on with; give another folder"
        else:
            hint = "and is not empty; give another folder, or remove it"
            hint += ", or go on with the run in it: --resume" * is_run
        raise FileExistsError(f"--output {output}: it exists {hint}")
    folder, number = Path("runs") / default_name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{default_name}-{number}"
    return folder


def _fail(error: Any, status: int) -> None:
    if error:
        say(f"ritornello: error: {error}", style="red")
    sys.exit(status)


if __name__ == "__main__":
    main()
