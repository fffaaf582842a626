"""Output."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path

from rich.console import Console

from ritornello.experiments.results.writing import Results

RUN_FILES = (".lock", "results.json", "comparison.json")
"""One of them is in the folder of every run that has begun."""


COMMAND: ContextVar[str] = ContextVar("COMMAND", default="ritornello")
"""The command line, for the results to say how they were made."""


def _show(saved: dict[str, Results], path: Path) -> None:
    from ritornello.experiments.reporting.report import table_of, write_report
    from ritornello.experiments.reporting.summaries import summary_of

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
