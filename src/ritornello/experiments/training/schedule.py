"""What a run trains on when a task has come: how many steps, and with which mini-batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.data.stream import (
    LoadedBatch,
    TaskImages,
    load_batches,
    positions_of_passes,
    steps_per_pass,
)
from ritornello.experiments.data.unlike_ranks import batches_of_own, rank_of_samples
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies import Strategy
from ritornello.experiments.training import exemplars
from ritornello.loaders.composition import ComposedSteps
from ritornello.records.shard import rows_of_rank

logger = logging.getLogger(__name__)

TOGETHER = 256
"""Samples of all ranks that pass by together, where there is no step."""

MOSTLY = 0.95
"""A buffer that is filled so far is not worth a warning."""


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
        self._ranks: NDArray[np.int64] | None = None
        """Of each training sample, where ranks have samples of their own."""
        if recipe.ranks_differ is not None:
            labels, num_ranks = data.train.labels, place.num_ranks
            self._ranks = rank_of_samples(labels, num_ranks, recipe.ranks_differ, recipe.seed)
        self.is_composed = recipe.is_proportional and strategy.rehearses
        # One task's: its steps are asked for again and again.
        self._composed = lru_cache(maxsize=1)(self._composed_steps)

    @property
    def samples_per_step(self) -> int:
        """New and past ones that a step trains on, of all ranks together.

        Of a strategy that ``solves``, those that pass by together.
        """
        recipe, strategy = self._recipe, self._strategy
        if strategy.solves:
            return TOGETHER
        if self.is_composed:
            return recipe.composed_samples
        num_new = 0 if strategy.observes else recipe.global_batch_size
        return num_new + strategy.num_draws * recipe.global_num_representatives

    def num_new(self, number: int) -> int:
        """New samples in each step of a task, of all ranks; with local steps, of this one alone."""
        recipe, num_ranks = self._recipe, self._place.num_ranks
        counts = self.num_own(number) if self._training_tasks(number) else [1] * num_ranks
        sizes = [
            rows_of_rank(recipe.global_batch_size, rank, num_ranks) * (count > 0)
            for rank, count in enumerate(counts)
        ]
        return sizes[self._place.rank] if recipe.local_steps else sum(sizes)

    def num_own(self, number: int) -> list[int]:
        """How many of the samples that are trained on in a task each rank has as its own."""
        assert self._ranks is not None
        held = self._ranks[_indices_of(self._training_tasks(number))]
        return [int(each) for each in np.bincount(held, minlength=self._place.num_ranks)]

    def of_unlike_ranks(self) -> dict[str, list[list[int]]]:
        """What the results say of ranks with unlike data: of each task, each rank's samples."""
        if self._ranks is None:
            return {}
        held = [self._ranks[task.train_indices] for task in self._tasks]
        counts = [np.bincount(each, minlength=self._place.num_ranks).tolist() for each in held]
        return {"train_samples_per_rank": counts}

    def num_past(self, number: int, step: int) -> int | None:
        """How many past samples join a step of a task on each rank; None: as many as always.

        Args:
            number: of the task.
            step: from 0; the one after the last takes as many as the last.
        """
        if not self.is_composed:
            return None
        steps = self._composed(number)
        epoch, within = divmod(step, len(steps))
        if epoch == steps.num_epochs:
            epoch, within = epoch - 1, len(steps)
        steps.set_epoch(epoch)
        return steps.num_past(within)

    def num_steps(self, number: int) -> int:
        """The steps that the strategy trains for when a task has come."""
        if self._strategy.solves:
            return 0
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
        if self.is_composed:
            return len(self._composed(number))
        images = self._training_images(number)
        return 0 if images is None else steps_per_pass(len(images), recipe.global_batch_size)

    def warn_of_room(self) -> None:
        """Says so where what tasks offer in their last epochs does not fill the buffer.

        The last epoch of a composed task has but a part of its samples: the others are past ones.
        """
        recipe = self._recipe
        is_bounded_by_bytes = recipe.capacity_bytes is not None or recipe.stores == "files"
        if recipe.remembers != "last-epoch" or not self._strategy.rehearses or is_bounded_by_bytes:
            return
        num_train = sum(task.num_train for task in self._tasks)
        room = min(recipe.num_stored(len(self._data.train)), num_train)
        num_offered = sum(self.num_offered_last(number) for number in range(len(self._tasks)))
        if num_offered < MOSTLY * room and self._place.rank == 0:
            logger.warning(
                "remembers='last-epoch': all tasks together offer about %d samples in their last "
                "epochs, and the buffer has room for %d (capacity=%g): it is not filled. "
                "remembers='stream' fills it",
                num_offered,
                room,
                recipe.capacity,
            )

    def num_offered_last(self, number: int) -> int:
        """How many samples a task offers in its last epoch, expected, on all ranks together."""
        recipe, num_ranks = self._recipe, self._place.num_ranks
        num_steps = self.steps_per_epoch(number)
        new = [recipe.global_batch_size // num_ranks] * num_steps
        if self.is_composed:
            own, first = recipe.composed_samples // num_ranks, self.num_steps(number) - num_steps
            new = [own - (self.num_past(number, first + step) or 0) for step in range(num_steps)]
        most = recipe.own_candidates(num_ranks)
        return num_ranks * sum(each if most is None else min(each, most) for each in new)

    def batches(self, number: int, first: int) -> Iterator[LoadedBatch]:
        """This rank's mini-batches of a task, from step ``first`` on; empty if it only observes."""
        if self._strategy.observes:
            return repeat(exemplars.nothing_like(self._data.train, self._place.device))
        num_passes = -(-self.num_steps(number) // max(1, self.steps_per_epoch(number)))
        return self._passes(number, num_passes, first)

    def observed(self, number: int, first: int) -> Iterator[LoadedBatch]:
        """What a strategy that ``observes`` sees before it trains: one pass, from ``first`` on.

        One that ``solves`` sees every sample; else what fills no mini-batch is left out.
        """
        if self._strategy.solves:
            return self._each_once(number, first)
        return self._passes(number, 1, first)

    def _each_once(self, number: int, first: int) -> Iterator[LoadedBatch]:
        images, place = self._training_images(number), self._place
        if images is None:
            return
        every = np.arange(len(images))
        together = [every[start : start + TOGETHER] for start in range(0, len(every), TOGETHER)]
        if self._ranks is None:
            own = [np.array_split(each, place.num_ranks)[place.rank] for each in together]
        else:
            ranks = self._ranks[_indices_of(self._training_tasks(number))]
            own = [each[ranks[each] == place.rank] for each in together]
        own = own[first:]
        loaded = load_batches(
            images, [each for each in own if len(each)], self._recipe.num_workers, place.device
        )
        nothing = exemplars.nothing_like(self._data.train, place.device)
        for each in own:
            yield next(loaded) if len(each) else nothing

    def _passes(self, number: int, num_passes: int, first: int) -> Iterator[LoadedBatch]:
        images = self._training_images(number)
        if images is None:
            return
        positions: Iterator[NDArray[np.int64]]
        if self._ranks is not None:
            of_rank = self._ranks[_indices_of(self._training_tasks(number))]
            own = np.flatnonzero(of_rank == self._place.rank)
            num_batches = num_passes * steps_per_pass(len(images), self._recipe.global_batch_size)
            if not len(own):
                nothing = exemplars.nothing_like(self._data.train, self._place.device)
                yield from repeat(nothing, num_batches - first)
                return
            positions = self._own_positions(number, own, num_batches, first)
        elif self.is_composed:
            positions = self._composed_positions(number, first)
        else:
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

    def _own_positions(
        self, number: int, own: NDArray[np.int64], num_batches: int, first: int
    ) -> Iterator[NDArray[np.int64]]:
        recipe, rank = self._recipe, self._place.rank
        return batches_of_own(
            own,
            rows_of_rank(recipe.global_batch_size, rank, self._place.num_ranks),
            (recipe.seed, number, rank),
            num_batches=num_batches,
            first=first,
        )

    def _composed_positions(self, number: int, first: int) -> Iterator[NDArray[np.int64]]:
        steps = self._composed(number)
        first_epoch, within = divmod(first, len(steps))
        for epoch in range(first_epoch, steps.num_epochs):
            first_step = within if epoch == first_epoch else 0
            yield from map(np.array, steps.positions(epoch, first_step))

    def _composed_steps(self, number: int) -> ComposedSteps:
        """What the steps of a task are made of."""
        recipe, num_ranks = self._recipe, self._place.num_ranks
        num_new = len(self._tasks[number].train_indices)
        batch_size = recipe.global_batch_size // num_ranks
        num_epochs = recipe.epochs
        if recipe.iterations is not None:
            steps_per_epoch = max(1, num_new // recipe.global_batch_size)
            num_epochs = -(-recipe.iterations // steps_per_epoch)
        return ComposedSteps(
            num_new,
            sum(task.num_train for task in self._tasks[:number]),
            samples_per_step=recipe.composed_samples // num_ranks,
            batch_size=batch_size,
            num_epochs=num_epochs,
            first_share=recipe.first_share,
            floor=recipe.share_floor,
            rank=self._place.rank,
            num_ranks=num_ranks,
            seed=recipe.seed,
        )

    def _training_tasks(self, number: int) -> Sequence[Task]:
        return self._strategy.training_tasks(self._tasks, number)

    def _training_images(self, number: int) -> TaskImages | None:
        """The samples that the strategy trains on when a task has come; None: no training yet."""
        tasks = self._training_tasks(number)
        return TaskImages(self._data.train, tasks) if tasks else None


def _indices_of(tasks: Sequence[Task]) -> NDArray[np.int64]:
    """The training samples of some tasks, one after another, as ``TaskImages`` counts them."""
    return np.concatenate([task.train_indices for task in tasks])
