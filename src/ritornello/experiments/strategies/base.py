"""What the training loop asks of a strategy."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ritornello.experiments.config import Recipe
from ritornello.experiments.scenarios import Task


class Strategy:
    """How the model learns.

    The loop asks, task by task and step by step::

        for task in stream:
            if strategy.restarts: re-initialise the model
            for images, labels in mini-batches of strategy.training_tasks(tasks so far):
                images, labels = strategy.augment(images, labels)
                loss(model(images), labels).backward(); step

    Args:
        recipe: the settings.
        num_ranks: over which the recipe's global sizes are split.
    """

    restarts: ClassVar[bool] = False
    """Whether the model is re-initialised at each task."""

    def __init__(self, recipe: Recipe, num_ranks: int) -> None:
        """Every rank makes its own."""

    def training_tasks(self, tasks_so_far: list[Task]) -> list[Task]:
        """The tasks whose samples are trained on now; the newest one is last."""
        return tasks_so_far[-1:]

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mini-batch to train on, in place of the given one."""
        return images, labels

    def stats(self) -> dict[str, Any] | None:
        """What the results say about the buffer, if there is one."""
        return None

    def close(self) -> None:
        """Gives back what the strategy holds."""
