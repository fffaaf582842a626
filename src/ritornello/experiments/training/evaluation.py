"""Accuracies and losses, or errors, on every task, each sample counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

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
from ritornello.experiments.results.measures import Accuracies, Errors, Measured
from ritornello.experiments.results.pictures import MOST_TASKS, pictures_of
from ritornello.experiments.strategies.base import Criterion, cross_entropy
from ritornello.experiments.strategies.errors import error_criterion, errors_of

BATCH_SIZE = 500


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
        self._loss, self._targets = recipe.loss, data.targets
        self.mask: Tensor | None = None
        """bool ``[num_classes, num_classes]``: which classes compete with a sample's; None: all."""
        if recipe.scenario == "task-incremental":
            self.mask = task_mask(tasks, data.num_classes).to(place.device)

    @property
    def criterion(self) -> Criterion:
        """The loss of a sample; if its task is known, only that task's classes compete."""
        if self._targets is not None:
            return error_criterion(self._loss, max(1, len(self._targets.parts)))
        mask = self.mask
        if mask is None:
            return cross_entropy
        return lambda logits, labels: cross_entropy(
            logits.masked_fill(~mask[labels], torch.finfo(logits.dtype).min), labels
        )

    def measured(self, network: Network, num_tasks: int | None = None) -> Measured:
        """Accuracies where targets are classes, else errors; see ``accuracies``."""
        return (self.accuracies if self._targets is None else self.errors)(network, num_tasks)

    @torch.no_grad()
    def accuracies(self, network: Network, num_tasks: int | None = None) -> Accuracies:
        """The same on every rank; blocks until all have called it.

        Args:
            network: to evaluate; it is in evaluation mode afterwards.
            num_tasks: the first ones alone; None: all.
        """
        tasks = self._tasks[:num_tasks]
        sums = torch.zeros(len(tasks), 3, dtype=torch.float64)  # counts are exact, too
        for number, logits, labels in self._predictions(network, tasks):
            if self.mask is not None:
                logits = logits.masked_fill(~self.mask[labels], -torch.inf)
            sums[number, :2] += metrics.top_k_correct(logits, labels, (1, 5)).cpu()
            losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            sums[number, 2] += losses.cpu().double().sum()
        self._add_up(sums)
        accuracies = Accuracies()
        for task, (top1, top5, loss) in zip(tasks, sums.tolist(), strict=True):
            size = len(task.test_indices)
            accuracies.top1.append(top1 / size if size else None)
            accuracies.top5.append(top5 / size if size else None)
            accuracies.loss.append(loss / size if size and math.isfinite(loss) else None)
        return accuracies

    @torch.no_grad()
    def errors(self, network: Network, num_tasks: int | None = None) -> Errors:
        """Those of targets that are tensors; see ``accuracies``.

        Raises:
            FloatingPointError: on every rank; they are not finite.
        """
        assert self._targets is not None
        tasks, parts = self._tasks[:num_tasks], self._targets.parts
        num_parts = max(1, len(parts))
        sums = torch.zeros(len(tasks), num_parts, dtype=torch.float64)
        for number, outputs, targets in self._predictions(network, tasks):
            sums[number] += errors_of(self._loss, outputs, targets, num_parts).cpu().double().sum(0)
        self._add_up(sums)
        found = Errors(of_parts={part: [] for part in parts})
        for task, of_parts in zip(tasks, sums.tolist(), strict=True):
            size = len(task.test_indices)
            if not all(map(math.isfinite, of_parts)):
                raise FloatingPointError(
                    f"the model's errors on the task {task.name!r} are not finite: it has "
                    "diverged; take a lower learning rate"
                )
            found.error.append(sum(of_parts) / size if size else None)
            for part, error in zip(parts, of_parts, strict=False):
                found.of_parts[part].append(error / size if size else None)
        return found

    @torch.no_grad()
    def pictures(self, network: Network) -> dict[str, Any]:
        """What the model says of one test sample of each task: ``pictures``, if they are images.

        Of ``MOST_TASKS`` tasks at most, evenly spread over the stream; of each the middle sample.
        """
        ends = np.cumsum([len(task.test_indices) for task in self._tasks])
        tested = [n for n, task in enumerate(self._tasks) if len(task.test_indices)]
        if self._targets is None or not tested:
            return {}
        places = np.linspace(0, len(tested) - 1, min(MOST_TASKS, len(tested))).round().astype(int)
        shown = [tested[place] for place in places.tolist()]
        middles = [int(ends[n]) - 1 - len(self._tasks[n].test_indices) // 2 for n in shown]
        network.eval()
        images, targets, *_ = self._images.__getitems__(middles)
        outputs = network(images.to(self._place.device)).cpu()
        pictures = pictures_of(shown, images, targets, outputs, self._targets.parts)
        return {"pictures": pictures} if pictures else {}

    def _predictions(
        self, network: Network, tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What the model says of this rank's part of some tasks: task, outputs, targets."""
        network.eval()
        parts = self._positions(tasks)
        batches = load_batches(
            self._images, (part for _, part in parts), self._num_workers, self._place.device
        )
        for (number, _), (images, targets, _) in zip(parts, batches, strict=True):
            yield number, network(images), targets

    def _add_up(self, sums: Tensor) -> None:
        """Over all ranks, in place."""
        if self._place.num_ranks > 1:
            dist.all_reduce(sums)

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
