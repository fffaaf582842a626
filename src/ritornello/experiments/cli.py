"""The ``ritornello`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import tyro
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # pragma: no cover - the extra is installed in tests
    raise SystemExit(
        f"ritornello: error: the command needs the extra 'experiments' ({error}): "
        "pip install 'ritornello[experiments]'"
    ) from None

from ritornello.experiments.config import Recipe
from ritornello.experiments.recipes import RECIPES, recipe_named
from ritornello.experiments.simulate import Simulation
from ritornello.experiments.step_time import MachineChanges

if TYPE_CHECKING:
    from ritornello.experiments.report import Results

ALL_STRATEGIES = ("incremental", "rehearsal", "from-scratch")


@dataclass
class Changes:
    """Settings to change; what is not given is as in the recipe. Sizes are of all ranks."""

    seed: int | None = None
    """Of everything random."""
    epochs: int | None = None
    """Per task."""
    tasks: int | None = None
    """How many tasks the classes are split into."""
    batch_size: int | None = None
    """New samples per step."""
    representatives: int | None = None
    """Past samples added per step."""
    candidates: int | None = None
    """Samples offered to the buffer per step, expected."""
    capacity: int | None = None
    """Representatives in the whole buffer."""
    selection: str | None = None
    """class-balanced, per-class-random, reservoir or fifo."""
    model: str | None = None
    """mlp, small-cnn, or a model of timm."""
    data: str | None = None
    """An npz file, a folder of images, or where torchvision keeps the data set."""
    learning_rate: float | None = None
    amp: str | None = None
    """Mixed precision: off, bfloat16 or float16."""
    device: str | None = None
    """auto, cpu or cuda."""
    workers: int | None = None
    """Loader processes per rank."""

    def applied_to(self, recipe: str) -> Recipe:
        """The recipe with that name and these changes."""
        names = {
            "tasks": "num_tasks",
            "batch_size": "global_batch_size",
            "representatives": "global_num_representatives",
            "candidates": "global_num_candidates",
            "data": "data_path",
            "workers": "num_workers",
        }
        given = {names.get(name, name): value for name, value in vars(self).items()}
        return recipe_named(recipe, **{k: v for k, v in given.items() if v is not None})


RecipeName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="See 'ritornello recipes'.")
]
Folders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Settings = Annotated[Changes, tyro.conf.arg(name="")]
SimulationSettings = Annotated[Simulation, tyro.conf.arg(name="")]
MachineSettings = Annotated[MachineChanges, tyro.conf.arg(name="")]


def run(
    recipe: RecipeName,
    /,
    changes: Settings,
    strategy: str = "rehearsal",
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with one strategy.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        strategy: incremental, rehearsal or from-scratch.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for results.json, model.pt and report.html; runs/... if not given.
    """
    _train(changes.applied_to(recipe), [strategy], ranks, output, f"{recipe}-{strategy}")


def compare(
    recipe: RecipeName,
    /,
    changes: Settings,
    strategies: tuple[str, ...] = ALL_STRATEGIES,
    ranks: int | None = None,
    output: str | None = None,
) -> None:
    """Run one recipe with several strategies and compare them.

    Args:
        recipe: Which recipe.
        changes: Settings to change.
        strategies: Some of incremental, rehearsal, from-scratch.
        ranks: Local processes to start. Leave it out under torchrun, srun or mpirun.
        output: Folder for comparison.json and report.html; runs/... if not given.
    """
    _train(changes.applied_to(recipe), strategies, ranks, output, f"{recipe}-compare")


def demo(ranks: int = 2, output: str | None = None) -> None:
    """See forgetting happen, and rehearsal undo it: embedded data, about a minute.

    Args:
        ranks: Local processes to start.
        output: Folder for comparison.json and report.html; runs/demo if not given.
    """
    _train(recipe_named("digits"), ALL_STRATEGIES, ranks, output, "demo")


def report(folders: Folders, /, output: str = "report.html") -> None:
    """Write one report of saved results.

    Args:
        folders: Output folders of run or compare.
        output: The HTML file to write.
    """
    from ritornello.experiments.report import load_results

    if not folders:
        raise ValueError("report: give one or more output folders of 'run' or 'compare'")
    _show(load_results(folders), Path(output))


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


def recipes() -> None:
    """List the recipes."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe")
    table.add_column("what it is")
    for make in RECIPES.values():
        each = make()
        table.add_row(each.name, each.description)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command; errors end with one line and status 2."""
    from ritornello.experiments.launch import LaunchError

    commands = {
        each.__name__: each for each in (demo, run, compare, report, bench, simulate, recipes)
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
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
    recipe: Recipe,
    strategies: Sequence[str],
    ranks: int | None,
    output: str | None,
    default_name: str,
) -> None:
    """Trains with one strategy or several on all ranks; the main one shows what came out."""
    from ritornello.experiments.launch import launch, place_in_job
    from ritornello.experiments.strategies import strategy_named

    place = place_in_job(os.environ)
    num_ranks = place.num_ranks if place else ranks or 1
    for strategy in strategies:
        strategy_named(strategy)
    recipe.check(num_ranks)
    is_main = place is None or place.rank == 0
    folder = _output_folder(output, default_name) if is_main else None
    Console(quiet=not is_main).print(
        f"[bold]{recipe.name}[/bold]: {recipe.description}\n"
        f"{', '.join(strategies)} on {num_ranks} rank{'s' if num_ranks > 1 else ''}, "
        f"seed {recipe.seed}",
        highlight=False,
    )
    from ritornello.experiments import train

    path = None if folder is None else str(folder)
    if len(strategies) == 1:
        launch(ranks, train.run, replace(recipe, strategy=strategies[0]), path)
    else:
        launch(ranks, train.compare, recipe, tuple(strategies), path)
    if folder is not None:
        from ritornello.experiments.report import load_results

        _show(load_results([folder]), folder / "report.html")


def _show(results: dict[str, Results], path: Path) -> None:
    from ritornello.experiments.report import summary_of, table_of, write_report

    console = Console()
    console.print()
    console.print(table_of(results))
    if summary := summary_of(results):
        console.print(f"\n{summary}", highlight=False)
    write_report(results, path)
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
