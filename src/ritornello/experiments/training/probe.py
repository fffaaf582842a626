"""Probes: how well the model does on the tasks so far, at many steps, by a few test samples.

The whole test set after every few steps would take longer than the training. A probe takes a
fixed part of it, the same classes in the same proportion, which each rank keeps in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.experiments.data.data_set import DataSet, LabelledBatch, LabelledImages
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.evaluation import Evaluation

MOST_OF_TASK, MOST = 500, 2_000
"""Samples that a probe takes at most, of each task and altogether."""

_PROBE = 1_000_007
"""What the choice of samples is keyed by; no run's seed takes part."""


class Kept(LabelledImages):
    """Images that stay in memory from the first time that they are asked for.

    Args:
        images: where they come from.
    """

    def __init__(self, images: LabelledImages) -> None:
        self._images, self.labels = images, images.labels
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        missing = [index for index in indices if index not in self._kept]
        if missing:
            images, labels, *_ = self._images.__getitems__(missing)
            self._kept |= zip(missing, zip(images.clone(), labels, strict=True), strict=True)
        kept = [self._kept[index] for index in indices]
        return torch.stack([image for image, _ in kept]), torch.stack([label for _, label in kept])


def probe_of(
    recipe: Recipe, data: DataSet, tasks: Sequence[Task], place: Place
) -> Evaluation | None:
    """What evaluates a run's model on the way; None if the recipe asks for no probes.

    Args:
        recipe: of the run.
        data: its data set.
        tasks: of the stream.
        place: of this rank.
    """
    if not recipe.probe_every:
        return None
    of_task = max(1, min(MOST_OF_TASK, MOST // len(tasks)))
    thinned = [
        replace(task, test_indices=few_of(task.test_indices, data.test.labels, of_task))
        for task in tasks
    ]
    in_memory = replace(data, test=Kept(data.test))
    return Evaluation(replace(recipe, num_workers=0), in_memory, thinned, place)


def few_of(indices: NDArray[np.int64], labels: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """At most so many of some samples, at random, the classes in their proportion.

    Args:
        indices: of the samples.
        labels: of all samples of the data set.
        number: at most.
    """
    if len(indices) <= number:
        return indices
    mixed = np.random.default_rng([_PROBE, len(indices)]).permutation(indices)
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    # At even distances, so that every class has its share of them.
    return np.sort(by_class[(np.arange(number) * len(indices)) // number])
