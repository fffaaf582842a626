"""Live progress: one bar, on the main rank, and only on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar over all steps of a run; does nothing where nobody would see it.

    Args:
        name: what runs.
        num_steps: of all tasks.
        visible: whether this rank shows it.
    """

    def __init__(self, name: str, num_steps: int, visible: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[name]:<13}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (visible and sys.stderr.isatty()),
            transient=True,
        )
        self._bar = self._progress.add_task("", total=num_steps, name=name)

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
