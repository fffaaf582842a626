"""Retraining from scratch on all data so far. The upper bound, and the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ritornello.experiments.strategies.base import Strategy, Task


class FromScratch(Strategy):
    """At each task, a new model is trained on the samples of all tasks so far."""

    restarts: ClassVar[bool] = True
    takes_tensors: ClassVar[bool] = True

    def training_tasks(self, tasks: Sequence[Task], number: int) -> Sequence[Task]:
        """All tasks so far."""
        return tasks[: number + 1]
