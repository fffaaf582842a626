"""Live progress: one bar, on the main rank, and only on a terminal; and lines that stay."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str, style: str = "") -> None:
    """Writes a line to stderr, also where there is no terminal."""
    Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class ProgressBar:
    """A bar over all steps of a run; does nothing where nobody would see it.

    Args:
        name: what runs.
        num_steps: of all tasks.
        visible: whether this rank shows it.
        num_done: steps that were made before.
    """

    def __init__(self, name: str, num_steps: int, visible: bool, num_done: int = 0) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[name]:<13}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (visible and sys.stderr.isatty()),
            transient=True,
        )
        self._bar = self._progress.add_task("", total=num_steps, completed=num_done, name=name)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def describe(self, text: str) -> None:
        """Says what is being done."""
        self._progress.update(self._bar, description=text)

    def advance(self) -> None:
        """One more step is done."""
        self._progress.advance(self._bar)
