"""Retraining from scratch on all data so far. The upper bound, and the slowest."""

from __future__ import annotations

from typing import ClassVar

from ritornello.experiments.scenarios import Task
from ritornello.experiments.strategies.base import Strategy


class FromScratch(Strategy):
    """At each task, a new model is trained on the samples of all tasks so far."""

    restarts: ClassVar[bool] = True

    def training_tasks(self, tasks_so_far: list[Task]) -> list[Task]:
        """All tasks so far."""
        return tasks_so_far
