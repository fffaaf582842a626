"""What rehearsal costs beside incremental training: whole runs that take turns.

    python benchmarks/price.py cifar10-frontier --data cifar10.npz --epochs 2

Machines are shared, and the same step may take half as long again a minute later. So each run has
a process of its own and trains for some steps while all others wait; what is compared are turns
that lie side by side. Counted is all that a run's steps take: loading, buffer, strategy, optimiser,
what is refreshed at a task's end; not the evaluation, which is the same for all. Shown are the
ratio of the sums, and between which values the middle half of the turns lies.
"""

from __future__ import annotations

import argparse
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ritornello.experiments.data.load import load
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.stored_files import data_of
from ritornello.experiments.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "incremental": {"strategy": "incremental"},
    "in proportion, no sample more": {"global_num_representatives": 0},
    "in proportion": {},
    "in proportion, soft targets": {"soft_targets": 1.0},
    "appended": {"composition": "append"},
}
"""The recipe, with these changes. The first one is what others are compared with."""


class TakingTurns(Trainer):
    """A trainer that tells what some steps have taken, and waits until the next ones may begin.

    Its first turn does not count: caches fill, and the buffer begins.
    """

    turns: Connection
    num_steps: int
    _seconds_told = 0.0

    def between_steps(self) -> None:
        """Ends a turn after ``num_steps``."""
        super().between_steps()
        if self.seconds.num_steps % self.num_steps == 0:
            seconds = self.seconds.load + self.seconds.step
            self.turns.send(seconds - self._seconds_told)
            self._seconds_told = seconds
            self.turns.recv()


def train(recipe: Recipe, num_steps: int, turns: Connection) -> None:
    """One run, in its own process; sends None at its end."""
    turns.recv()
    data = data_of(recipe, load(recipe.data, recipe.data_path, recipe.image_size))
    with TakingTurns(recipe, data, Place(0, 1, torch.device("cpu"))) as trainer:
        trainer.turns, trainer.num_steps = turns, num_steps
        trainer.train()
    turns.send(None)


def seconds_in_turns(recipes: list[Recipe], num_steps: int) -> np.ndarray[Any, Any]:
    """The seconds of each run's turns, ``[turns, runs]``; as many as the shortest run has."""
    context = get_context("spawn")
    ends, processes = [], []
    for recipe in recipes:
        own, other = context.Pipe()
        ends.append(own)
        processes.append(context.Process(target=train, args=(recipe, num_steps, other)))
        processes[-1].start()
        other.close()
    seconds: list[list[float]] = []
    try:
        for number in count():
            turn = []
            for end in ends[:: 1 if number % 2 == 0 else -1]:
                end.send(None)
                turn.append(end.recv())
            if None in turn:
                break
            if number > 0:
                seconds.append(turn[:: 1 if number % 2 == 0 else -1])
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return np.array(seconds)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="such as cifar10-frontier; its steps composed in proportion")
    parser.add_argument("--data", help="where its data set is", default=None)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of one turn")
    arguments = parser.parse_args()
    recipes = [
        recipe_named(arguments.recipe, data_path=arguments.data, epochs=arguments.epochs, **changes)
        for changes in VARIANTS.values()
    ]
    seconds = seconds_in_turns(recipes, arguments.steps)
    print(f"{len(seconds)} turns of {arguments.steps} steps each")
    for number, name in enumerate(VARIANTS):
        ratio = seconds[:, number].sum() / seconds[:, 0].sum()
        low, high = np.quantile(seconds[:, number] / seconds[:, 0], (0.25, 0.75))
        step = 1e3 * np.median(seconds[:, number]) / arguments.steps
        print(f"{name:<30} {step:6.1f} ms per step   {ratio:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
