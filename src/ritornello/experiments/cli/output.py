"""Where the output of a command goes: its folder, and what the terminal shows of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

from rich.console import Console

from ritornello.experiments.results.writing import Results

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="ritornello")
"""The command line, for the results to say how they were made."""

RUN_FILES = (".lock", "results.json", "comparison.json")
"""One of them is in the folder of every run that has begun."""


def output_folder(output: str | None, default_name: str, goes_on: bool = False) -> Path:
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


def show(runs: Iterable[Results], path: Path) -> None:
    """Prints the table and the summary of some runs, and writes their report."""
    from ritornello.experiments.reporting.provenance import tested_on
    from ritornello.experiments.reporting.report import table_of, write_report
    from ritornello.experiments.reporting.summaries import summary_of
    from ritornello.experiments.results.groups import groups_of

    groups = groups_of(runs)
    console = Console()
    console.print()
    console.print(table_of(groups, console.width))
    if shares := tested_on(groups):
        console.print(f"\nTested on {' and '.join(shares)}.", highlight=False)
    if summary := summary_of(groups):
        console.print(f"\n{summary}", highlight=False)
    write_report(groups, path)
    say_where(console, "\nReport:", path)


def say_where(console: Console, what: str, path: Path) -> None:
    """Prints what was written, and where it lies."""
    console.print(what, style="bold", end=" ")
    console.print(str(path.resolve()), highlight=False, soft_wrap=True)
