"""Accuracies and losses on every task, each sample counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.scenarios import Task, task_mask
from ritornello.experiments.data.stream import TaskImages, load_batches
from ritornello.experiments.models.network import Network
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results import metrics

BATCH_SIZE = 500


@dataclass
class Accuracies:
    """Top-1 and top-5 accuracies on every task, and the mean loss; None where there is none."""

    top1: list[float | None] = field(default_factory=list)
    top5: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    """Cross-entropy in nats; None also where it is not finite."""


class Evaluation:
    """The test samples of all tasks, and this rank's part of them.

    Args:
        recipe: of the run.
        data: its data set.
        tasks: of the stream.
        place: of this rank.
    """

    def __init__(self, recipe: Recipe, data: DataSet, tasks: Sequence[Task], place: Place) -> None:
        self._tasks, self._place, self._num_workers = tasks, place, recipe.num_workers
        self._images = TaskImages(data.test, tasks, testing=True)
        self.mask: Tensor | None = None
        """bool ``[num_classes, num_classes]``: which classes compete with a sample's; None: all."""
        if recipe.scenario == "task-incremental":
            self.mask = task_mask(tasks, data.num_classes).to(place.device)

    @torch.no_grad()
    def accuracies(self, network: Network, num_tasks: int | None = None) -> Accuracies:
        """The same on every rank; blocks until all have called it.

        Args:
            network: to evaluate; it is in evaluation mode afterwards.
            num_tasks: the first ones alone; None: all.
        """
        tasks = self._tasks[:num_tasks]
        sums = torch.zeros(len(tasks), 3, dtype=torch.float64)  # counts are exact, too
        network.eval()
        parts = self._positions(tasks)
        batches = load_batches(
            self._images, (part for _, part in parts), self._num_workers, self._place.device
        )
        for (number, _), (images, labels, _) in zip(parts, batches, strict=True):
            logits = network(images)
            if self.mask is not None:
                logits = logits.masked_fill(~self.mask[labels], -torch.inf)
            sums[number, :2] += metrics.top_k_correct(logits, labels, (1, 5)).cpu()
            losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            sums[number, 2] += losses.cpu().double().sum()
        if self._place.num_ranks > 1:
            dist.all_reduce(sums)
        accuracies = Accuracies()
        for task, (top1, top5, loss) in zip(tasks, sums.tolist(), strict=True):
            size = len(task.test_indices)
            accuracies.top1.append(top1 / size if size else None)
            accuracies.top5.append(top5 / size if size else None)
            accuracies.loss.append(loss / size if size and math.isfinite(loss) else None)
        return accuracies

    def _positions(self, tasks: Sequence[Task]) -> list[tuple[int, NDArray[np.int64]]]:
        """This rank's part of each task's test samples, in mini-batches: task, positions."""
        parts, first = [], 0
        for number, task in enumerate(tasks):
            end = first + len(task.test_indices)
            mine = np.arange(first + self._place.rank, end, self._place.num_ranks)
            batches = np.array_split(mine, -(-len(mine) // BATCH_SIZE) or 1)
            parts += [(number, batch) for batch in batches if len(batch)]
            first = end
        return parts
