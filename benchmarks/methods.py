"""All methods beside each other on one recipe: what they reach, and what they cost. In Markdown.

    python benchmarks/methods.py mnist --data mnist.npz --output runs/methods --seeds 0 1 2 \
        --methods incremental rehearsal der:alpha=0.2 "grasp:strategy=rehearsal,sampling=grasp"

A method is a strategy, or any name, with what it changes in the recipe. For each there are

- a run with each seed, for accuracy and forgetting (or errors), and for what it keeps beside the
  model, as the runs have measured it (``costs`` in ``results.json``);
- a run on two ranks for a few steps, for what it sends in a step beside the gradients of training;
- runs for its time, in multiples of the first method's: the processor's time of all threads, so
  that it does not matter what else the machine does meanwhile. Counted is all that steps and the
  ends of tasks take, the buffer's thread too, but not the tests.

Nothing is run twice: what lies below ``--output``, or in the folders and archives of ``--runs``, is
taken from there. A method with ``ranks=2`` among its changes runs on as many, and is not timed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ritornello.experiments.data.holdout import held_out
from ritornello.experiments.data.load import load
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.ranks.progress import ProgressBar, say
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe, with_changes
from ritornello.experiments.results.groups import Group, num_train_samples
from ritornello.experiments.results.reading import find_results
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import STRATEGIES, Strategy, strategy_named
from ritornello.experiments.training import run as train
from ritornello.experiments.training.stored_files import data_of
from ritornello.experiments.training.trainer import Trainer

NOTHING = "-"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    recipe: Recipe
    changes: str
    """What it changes in the recipe, as it was written."""
    num_ranks: int = 1


def changes_in(text: str) -> dict[str, Any]:
    """Such as ``alpha=0.2,strategy=der++``: what is no number, tuple, ... is a word."""
    changes = {}
    for part in re.split(r",(?=\w+=)", text) if text else []:
        field, is_given, value = part.partition("=")
        if not is_given:
            raise ValueError(f"{part!r}: write FIELD=VALUE, separated by commas")
        try:
            changes[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            changes[field] = value
    return changes


def method_of(text: str, base: Recipe) -> Method:
    """A method as it is written on the command line.

    Raises:
        ValueError: it is no strategy, or a setting breaks its rule.
    """
    name, _, written = text.partition(":")
    changes = changes_in(written)
    num_ranks = changes.pop("ranks", 1)
    try:
        recipe = with_changes(base, **{"strategy": name} | changes)
    except TypeError as error:
        raise ValueError(f"method {text!r}: {error}") from error
    train.check(recipe, num_ranks)
    return Method(name, recipe, written, num_ranks)


def usual_methods(base: Recipe) -> list[str]:
    """All strategies that this recipe can have on one process."""
    names = []
    for name in STRATEGIES:
        try:
            train.check(with_changes(base, strategy=name), 1)
        except ValueError:
            continue
        names.append(name)
    return names


class Runs:
    """Finished runs, and those that are still to be made.

    Args:
        output: where the new ones go.
        others: folders and archives with further ones.
    """

    def __init__(self, output: Path, others: Sequence[str]) -> None:
        self._output = output
        sources: list[str | Path] = [
            *others,
            *([output] if any(output.rglob("results.json")) else []),
        ]
        self._known = {self._key(run): run for run in (find_results(sources) if sources else [])}

    def of(self, name: str, recipe: Recipe, num_ranks: int) -> Results:
        """A run of a recipe, from disk if it is there."""
        config = json.loads(json.dumps(asdict(recipe.on(num_ranks))))
        key = self._key({"config": config, "world_size": num_ranks})
        if key not in self._known:
            say(f"{recipe.name}: {name}, seed {recipe.seed}, {num_ranks} rank(s)")
            number = len(list(self._output.glob("*/results.json")))
            folder = self._output / f"{number:03}-{re.sub(r'[^A-Za-z0-9+]+', '-', name)}"
            command = f"python {shlex.join(sys.argv)}"
            self._known[key] = launch(
                num_ranks, train.run, recipe, str(folder), None, command, WITHOUT_BUFFER
            )
        return self._known[key]

    @staticmethod
    def _key(run: Results) -> str:
        config = {name: run["config"][name] for name in run["config"] if name not in NO_MATTER}
        return json.dumps([config, run["world_size"]], sort_keys=True)


WITHOUT_BUFFER = replace(train.OFF, keep_buffer="off")

NO_MATTER = train.MAY_CHANGE
"""Settings by which runs do not differ."""


class Timed(Trainer):
    """A trainer that counts the processor's time of all its threads, tests left out."""

    seconds_used = 0.0

    def train_task(self, number: int, bar: ProgressBar) -> None:
        """As ever; the time of the buffer's thread is counted, too."""
        began = time.process_time()
        super().train_task(number, bar)
        if self.strategy.buffer is not None:
            len(self.strategy.buffer)  # waits for the round under way
        self.seconds_used += time.process_time() - began


def multiples(
    methods: Sequence[Method], changes: dict[str, Any], num_repeats: int, file: Path
) -> list[float | None]:
    """The time of each method in multiples of the first one's, from the file where it knows it."""
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    measured: list[Recipe] = []

    def seconds_of(recipe: Recipe, repeat: int) -> float:
        key = json.dumps([repeat, asdict(recipe)], sort_keys=True)
        key = hashlib.sha256(key.encode()).hexdigest()
        if key not in known:
            say(f"{recipe.name}: time of {recipe.strategy}")
            if not measured:  # what a process does first takes longer
                seconds_used(recipe)
            measured.append(recipe)
            known[key] = seconds_used(recipe)
            file.write_text(json.dumps(known, indent=1))
        return known[key]

    found: list[float | None] = []
    for method in methods:
        multiple = None
        if method.num_ranks == 1:
            # What lets a task pass by first does so once, however few steps follow: timed whole.
            kind = strategy_named(method.recipe.strategy)
            timed = {} if kind.observes or kind.solves else changes
            own, first = (with_changes(each.recipe, **timed) for each in (method, methods[0]))
            turns = [
                (seconds_of(own, each), seconds_of(first, each)) for each in range(num_repeats)
            ]
            multiple = sum(a for a, _ in turns) / sum(b for _, b in turns)
        found.append(multiple)
    return found


def seconds_used(recipe: Recipe) -> float:
    """The processor's time for training by a recipe, on this process."""
    data = load(recipe.data, recipe.data_path, recipe.image_size)
    data = data_of(recipe, held_out(data, recipe.holdout))
    with Timed(recipe, data, Place(0, 1, torch.device("cpu"))) as trainer:
        trainer.train()
    return trainer.seconds_used


def as_bytes(number: float) -> str:
    """Such as "3.1 MB"."""
    if number < 1:
        return "0"
    power = min(3, int(math.log10(number)) // 3)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def held(group: Group) -> str:
    """What a method keeps beside the model; some keep all data."""
    kind = strategy_named(group.strategy)
    if kind.training_tasks is not Strategy.training_tasks:
        shape = group.first["data"]["image_shape"]
        return f"all data: {as_bytes(num_train_samples(group.first) * math.prod(shape))}"
    costs = [run["costs"]["held_bytes"] for run in group.runs]
    return as_bytes(sum(costs) / len(costs))


def row_of(group: Group, method: Method, sent: float | None, multiple: float | None) -> list[str]:
    """One row of the table."""
    waits = all(run["steps_per_task"][0] == 0 for run in group.runs)  # until all data are there
    return [
        method.name,
        method.changes.replace(",", ", ") or NOTHING,
        group.text(group.average).removesuffix(" %"),
        NOTHING if waits else group.text(group.forgetting).removesuffix(" %"),
        NOTHING if multiple is None else f"{multiple:.2f}",
        held(group),
        NOTHING if sent is None else as_bytes(sent),
    ]


def table(rows: Sequence[Sequence[str]], measure: str) -> str:
    """Names to the left, figures to the right."""
    header = ["method", "settings", measure, "forgetting", "time", "held", "sent per step"]
    ruler = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="such as mnist; its buffer is that of all methods")
    parser.add_argument("--data", help="where its data set is")
    parser.add_argument("--methods", nargs="+", help="NAME[:FIELD=VALUE,...]; else all strategies")
    parser.add_argument("--settings", default="", help="of all methods: FIELD=VALUE,...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="where runs go, or have gone")
    parser.add_argument("--runs", nargs="+", default=[], help="further folders of finished runs")
    parser.add_argument("--sent-steps", type=int, default=20, help="per task, on 2 ranks; 0: none")
    parser.add_argument("--repeats", type=int, default=2, help="of runs for the time; 0: none")
    parser.add_argument("--timed", default="", help="settings of these, such as iterations=100")
    arguments = parser.parse_args()
    settings = {"device": "cpu", **changes_in(arguments.settings)}
    base = recipe_named(arguments.recipe, data_path=arguments.data, **settings)
    written = arguments.methods or usual_methods(base)
    methods = [method_of(text, base) for text in written]
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.output, arguments.runs)
    groups: list[Group] = []
    sent: list[float | None] = []
    for method in methods:
        of_seeds = [
            runs.of(method.name, with_changes(method.recipe, seed=seed), method.num_ranks)
            for seed in arguments.seeds
        ]
        groups.append(Group(method.name, tuple(of_seeds)))
    for method in methods:
        short = with_changes(method.recipe, iterations=arguments.sent_steps or None)
        run = runs.of(method.name, short, 2) if arguments.sent_steps else None
        sent.append(None if run is None else float(run["costs"]["sent_bytes_per_step"]))
    file = arguments.output / "times.json"
    times: list[float | None] = [None] * len(methods)
    if arguments.repeats:
        times = multiples(methods, changes_in(arguments.timed), arguments.repeats, file)
    rows = [
        row_of(group, method, count, multiple)
        for group, method, count, multiple in zip(groups, methods, sent, times, strict=True)
    ]
    print(table(rows, groups[0].measure.header))


if __name__ == "__main__":
    main()
