"""The commands that tell what the buffer costs: measured here, and simulated on many ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ritornello.experiments.cli.output import output_folder, say_where
from ritornello.experiments.speed.simulate import Simulation
from ritornello.experiments.speed.step_time import MachineChanges

SimulationSettings = Annotated[Simulation, tyro.conf.arg(name="")]
MachineSettings = Annotated[MachineChanges, tyro.conf.arg(name="")]


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
    from ritornello.experiments.speed import simulate as simulating
    from ritornello.experiments.speed.simulate_report import summary, tables
    from ritornello.experiments.speed.step_time import benched_machine

    cluster = changes.applied_to(benched_machine(Path(bench)) if bench else machine)
    simulation.check()
    folder = output_folder(output, "simulate")
    console = Console()
    with console.status("simulating") as status:
        results = simulating.simulate(simulation, cluster, report=status.update)
    for table in tables(results):
        console.print(table)
    console.print(f"\n{summary(results)}", highlight=False)
    results.write(folder)
    say_where(console, "\nPicture:", folder / "simulate.png")


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
        seconds: For each of them without the buffer, with update, and with rehearse.
        output: Folder for bench.json and bench.png; runs/bench if not given.
    """
    from ritornello.experiments.ranks.launch import launch, num_ranks_in, place_in_job
    from ritornello.experiments.speed.bench import check_bench, measure_all
    from ritornello.experiments.speed.bench_report import tables_of, write_bench

    place = place_in_job(os.environ)
    num_ranks = num_ranks_in(place, ranks)
    under_mpi = place is not None and place.launcher == "mpirun"
    transports = check_bench(workloads, transports, num_ranks, under_mpi, rounds, steps, seconds)
    is_main = place is None or place.rank == 0
    folder = output_folder(output, "bench") if is_main else None
    console = Console(quiet=not is_main)
    with console.status(f"{num_ranks} rank(s): {', '.join(workloads)}; takes some minutes"):
        measured = launch(ranks, measure_all, workloads, transports, rounds, steps, seconds)
    if folder is not None:
        write_bench(measured, folder)
        console.print(tables_of(measured))
        say_where(console, "\nPicture:", folder / "bench.png")
