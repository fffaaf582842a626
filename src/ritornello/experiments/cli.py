"""The ``ritornello`` command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:  # pragma: no cover - the extra is installed in tests
    raise SystemExit(
        f"ritornello: error: the command needs the extra 'experiments' ({error}): "
        "pip install 'ritornello[experiments]'"
    ) from None

from ritornello.experiments.changes import BufferChanges, Changes, Sweep
from ritornello.experiments.config import Recipe
from ritornello.experiments.recipes import RECIPES, recipe_named
from ritornello.experiments.simulate import Simulation
from ritornello.experiments.step_time import MachineChanges
from ritornello.experiments.sweep import Results, variants

ALL_STRATEGIES = ("incremental", "rehearsal", "from-scratch")

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="ritornello")
"""The command line, for the results to say how they were made."""

RecipeName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="See 'ritornello recipes'.")
]
Folders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))]
Settings = Annotated[Changes, tyro.conf.arg(name="")]
BufferSettings = Annotated[BufferChanges, tyro.conf.arg(name="")]
SweepSettings = Annotated[Sweep, tyro.conf.arg(name="")]
SimulationSettings = Annotated[Simulation, tyro.conf.arg(name="")]
MachineSettings = Annotated[MachineChanges, tyro.conf.arg(name="")]


def run(
    recipe: RecipeName,
    /,
    changes: Settings,
    buffer: BufferSettings,
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
        strategy: incremental, rehearsal, from-scratch, ...; if not given, the recipe's own.
        seeds: Of everything random. Several: one run each, and means of them.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for results.json, model.pt and report.html; runs/... if not given.
    """
    changed = changes.applied_to(recipe, **buffer.as_changes())
    chosen = strategy or changed.strategy
    _train(variants(changed, [chosen], seeds=seeds), ranks, output, f"{recipe}-{chosen}")


def compare(
    recipe: RecipeName,
    /,
    changes: Settings,
    sweep: SweepSettings,
    seeds: Seeds = (),
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with several strategies, buffers and seeds, and compare them.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        sweep: What to compare.
        seeds: Of everything random. Several: every combination runs with each, for means of them.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for comparison.json and report.html; runs/... if not given.
    """
    changed = changes.applied_to(recipe)
    settings = vars(sweep) | {
        "strategies": sweep.strategies or ("incremental", changed.strategy, "from-scratch")
    }
    _train(variants(changed, **settings, seeds=seeds), ranks, output, f"{recipe}-compare")


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
    from ritornello.experiments.launch import LaunchError

    arguments = sys.argv[1:] if arguments is None else arguments
    COMMAND.set(shlex.join(["ritornello", *arguments]))
    functions = (demo, run, compare, report, results, bench, simulate, recipes)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {each.__name__: each for each in functions},
            prog="ritornello",
            description="Continual learning with a distributed rehearsal buffer.",
            args=arguments,
        )
    except LaunchError as error:
        _fail(error, status=1)
    except (ValueError, FileNotFoundError, FileExistsError, ConnectionError) as error:
        if os.environ.get("RITORNELLO_TRACEBACK"):
            raise
        _fail(error, status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)


def _train(
    recipes: dict[str, Recipe], ranks: int | None, output: str | None, default_name: str
) -> None:
    """Trains one variant or several on all ranks; the main one shows what came out."""
    from ritornello.experiments import train
    from ritornello.experiments.launch import launch, place_in_job

    place = place_in_job(os.environ)
    num_ranks = place.num_ranks if place else ranks or 1
    for each in recipes.values():
        train.check(each, num_ranks)
    is_main = place is None or place.rank == 0
    folder = _output_folder(output, default_name) if is_main else None
    Console(quiet=not is_main).print(_announcement(recipes, num_ranks), highlight=False)
    path = None if folder is None else str(folder)
    command = COMMAND.get()
    if len(recipes) == 1:
        launch(ranks, partial(train.run, command=command), *recipes.values(), path)
    else:
        launch(ranks, partial(train.compare, command=command), recipes, path)
    if folder is not None:
        from ritornello.experiments.saved_results import load_results

        _show(load_results([folder]), folder / "report.html")


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
    console.print(table_of(saved))
    if summary := summary_of(saved):
        console.print(f"\n{summary}", highlight=False)
    write_report(saved, path)
    console.print("\nReport:", style="bold", end=" ")
    console.print(str(path.resolve()), highlight=False, soft_wrap=True)


def _output_folder(output: str | None, default_name: str) -> Path:
    """A folder that holds nothing yet.

    Raises:
        FileExistsError: the given one holds something.
    """
    if output is not None:
        folder = Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"--output {output}: it exists and is not empty; give another folder, or remove it"
            )
        return folder
    folder, number = Path("runs") / default_name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{default_name}-{number}"
    return folder


def _fail(error: Any, status: int) -> None:
    Console(stderr=True).print(
        f"ritornello: error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
