"""What a run trains on when a task has come: how many steps, and with which mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from ritornello.experiments.data.data_set import DataSet, LabelledBatch
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.data.stream import (
    TaskImages,
    load_batches,
    positions_of_passes,
    steps_per_pass,
)
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies import Strategy
from ritornello.experiments.training import exemplars


class Schedule:
    """The steps and mini-batches of every task, on one rank.

    Args:
        recipe: with sizes of all ranks.
        data: its data set.
        tasks: of the stream.
        strategy: says which tasks' samples it trains on, and whether it trains on them at all.
        place: of this rank.
    """

    def __init__(
        self, recipe: Recipe, data: DataSet, tasks: Sequence[Task], strategy: Strategy, place: Place
    ) -> None:
        self._recipe, self._data, self._tasks = recipe, data, tasks
        self._strategy, self._place = strategy, place

    def num_steps(self, number: int) -> int:
        """The steps that the strategy trains for when a task has come."""
        if self._recipe.iterations is not None:
            return self._recipe.iterations * len(self._training_tasks(number))
        return self._recipe.epochs * self.steps_per_epoch(number)

    def steps_per_epoch(self, number: int) -> int:
        """Full global mini-batches in one pass; what is left over comes another epoch."""
        recipe = self._recipe
        if self._strategy.observes:  # a pass over what the buffer can hold by then
            num_seen = sum(task.num_train for task in self._tasks[: number + 1])
            num_held = min(num_seen, recipe.num_stored(len(self._data.train)))
            return max(1, num_held // recipe.global_num_representatives)
        images = self._training_images(number)
        return 0 if images is None else steps_per_pass(len(images), recipe.global_batch_size)

    def batches(self, number: int, first: int) -> Iterator[LabelledBatch]:
        """This rank's mini-batches of a task, from step ``first`` on; empty if it only observes."""
        if self._strategy.observes:
            return repeat(exemplars.nothing_like(self._data.train, self._place.device))
        num_passes = -(-self.num_steps(number) // max(1, self.steps_per_epoch(number)))
        return self._passes(number, num_passes, first)

    def observed(self, number: int, first: int) -> Iterator[LabelledBatch]:
        """What a strategy that ``observes`` sees before it trains: one pass, from ``first`` on."""
        return self._passes(number, 1, first)

    def _passes(self, number: int, num_passes: int, first: int) -> Iterator[LabelledBatch]:
        images = self._training_images(number)
        if images is None:
            return
        positions = positions_of_passes(
            len(images),
            self._recipe.global_batch_size,
            (self._recipe.seed, number),
            self._place.rank,
            self._place.num_ranks,
            num_passes=num_passes,
            first=first,
        )
        yield from load_batches(images, positions, self._recipe.num_workers, self._place.device)

    def _training_tasks(self, number: int) -> Sequence[Task]:
        return self._strategy.training_tasks(self._tasks, number)

    def _training_images(self, number: int) -> TaskImages | None:
        """The samples that the strategy trains on when a task has come; None: no training yet."""
        tasks = self._training_tasks(number)
        return TaskImages(self._data.train, tasks) if tasks else None
