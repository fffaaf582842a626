"""The commands on saved results: a report of some, a page of all."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ritornello.experiments.cli.output import say_where, show

Folders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


def report(folders: Folders, /, output: str = "report.html") -> None:
    """Write one report of saved results.

    Args:
        folders: Output folders of run or compare.
        output: The HTML file to write.
    """
    from ritornello.experiments.results.reading import load_results

    if not folders:
        raise ValueError("report: give one or more output folders of 'run' or 'compare'")
    show(load_results(folders).values(), Path(output))


def results(folders: Folders, /, output: str = "results.md", archive: str | None = None) -> None:
    """Write a Markdown page of saved results beside the published figures.

    Args:
        folders: Output folders of run or compare, or folders of those; or archives.
        output: The Markdown file to write.
        archive: A JSON file to keep the results in; the page can be written from it again.
    """
    from ritornello.experiments.reporting.results_page import write_results_page
    from ritornello.experiments.results import reading

    if not folders:
        raise ValueError("results: give output folders of 'run' or 'compare', or an archive")
    runs = reading.find_results(folders)
    sources = list(folders)
    if archive is not None:
        reading.archive(runs, Path(archive))
        sources = [archive]
    command = shlex.join(["ritornello", "results", *sources, "--output", output])
    write_results_page(runs, Path(output), command)
    say_where(Console(), f"{len(runs)} run{'s' if len(runs) > 1 else ''}:", Path(output))
