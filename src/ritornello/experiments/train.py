"""The training loop: build, train task by task, evaluate, write down.

Every rank calls ``run``; with a default process group the model is trained data-parallel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ritornello import sampling, selection
from ritornello.experiments import exemplars, metrics
from ritornello.experiments.augmentation import AUGMENTATIONS
from ritornello.experiments.config import Recipe
from ritornello.experiments.data import Batch, DataSet, load
from ritornello.experiments.network import Network
from ritornello.experiments.progress import ProgressBar
from ritornello.experiments.results import Results, TaskLog, results_of
from ritornello.experiments.scenarios import SCENARIOS, scenario_of, task_mask
from ritornello.experiments.strategies import GDumb, RehearsalStrategy, strategy_named, strategy_of
from ritornello.experiments.strategies.base import Criterion, cross_entropy
from ritornello.experiments.stream import (
    TaskImages,
    load_batches,
    positions_of_pass,
    steps_per_pass,
)
from ritornello.experiments.sweep import folder_name

EVALUATION_BATCH_SIZE = 500

EXEMPLARS = 1_000_005
"""What the random choice of exemplars is keyed by, beside the seed and the task."""


def compare(
    variants: Mapping[str, Recipe], output: str | None, command: str = ""
) -> dict[str, Results]:
    """Runs several recipes, one after another; data sets that they share are loaded once.

    Args:
        variants: label to recipe.
        output: where the main rank writes a folder for each and ``comparison.json``.
        command: what was typed, for the results.

    Returns:
        Label to results.
    """
    for recipe in variants.values():
        check(recipe, _num_ranks())
    loaded: dict[tuple[Any, ...], DataSet] = {}
    comparison = {}
    for label, recipe in variants.items():
        key = (recipe.data, recipe.data_path, recipe.image_size)
        if key not in loaded:
            loaded.clear()  # two at a time might not fit
            loaded[key] = load(*key)
        folder = None if output is None else f"{output}/{folder_name(label)}"
        comparison[label] = run(recipe, folder, loaded[key], command)
        if output is not None and _rank() == 0:
            _write_json(Path(output) / "comparison.json", comparison)
    return comparison


def run(
    recipe: Recipe, output: str | None = None, data: DataSet | None = None, command: str = ""
) -> Results:
    """Runs a recipe.

    Args:
        recipe: what to run.
        output: where the main rank writes ``results.json`` and ``model.pt``; None: nowhere.
        data: the data set, if it is loaded already.
        command: what was typed, for the results.

    Returns:
        The results, the same on every rank but for times and the buffer's statistics.
    """
    check(recipe, _num_ranks())
    data = data or load(recipe.data, recipe.data_path, recipe.image_size)
    device = _device(recipe.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trainer = Trainer(recipe, data, device)
        try:
            # As JSON would give it back: what is returned is what is written.
            results: Results = json.loads(json.dumps({**trainer.train(), "command": command}))
        finally:
            trainer.close()
    if output is not None and _rank() == 0:
        Path(output).mkdir(parents=True, exist_ok=True)
        torch.save(trainer.network.model.state_dict(), Path(output) / "model.pt")
        _write_json(Path(output) / "results.json", results)
    return results


def check(recipe: Recipe, num_ranks: int) -> None:
    """Checks what can be checked of a recipe before anything is loaded.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    kind = strategy_named(recipe.strategy)
    recipe.check(num_ranks)
    for name, allowed in (
        ("scenario", SCENARIOS),
        ("augmentation", AUGMENTATIONS),
        ("selection", selection.POLICIES),
        ("sampling", sampling.POLICIES),
    ):
        if getattr(recipe, name) not in allowed:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: there are {', '.join(allowed)}")
    if recipe.remembers == "stream":
        return
    if recipe.remembers not in exemplars.CHOICES:
        raise ValueError(
            f"remembers={recipe.remembers!r}: there are stream, {', '.join(exemplars.CHOICES)}"
        )
    if issubclass(kind, RehearsalStrategy) and (kind.stores_logits or kind is GDumb):
        raise ValueError(
            f"remembers={recipe.remembers!r}: the strategy {recipe.strategy!r} fills its buffer "
            "from the stream; use remembers='stream'"
        )
    if recipe.remembers != "random" and recipe.selection != "first-offered":
        raise ValueError(
            f"remembers={recipe.remembers!r} with selection={recipe.selection!r}: exemplars come "
            "in the order of their importance, which only selection='first-offered' keeps"
        )


@dataclass
class StepSeconds:
    """Where the time of the steps went, in seconds altogether."""

    load: float = 0.0
    """Waiting for the loader."""
    step: float = 0.0
    """Everything else that is done for a step."""
    measuring: float = 0.0
    """Of it, measuring what the sampling policy goes by."""
    num_steps: int = 0


@dataclass
class _Accuracies:
    """Top-1 and top-5 accuracies on every task."""

    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)


class Trainer:
    """One run on one rank.

    Args:
        recipe: what to run.
        data: its data set.
        device: of this rank.
    """

    def __init__(self, recipe: Recipe, data: DataSet, device: torch.device) -> None:
        self.rank, self.num_ranks = _rank(), _num_ranks()
        self.recipe, self.data, self.device = recipe.on(self.num_ranks), data, device
        self.tasks = scenario_of(data, recipe)
        self._check_exemplars()
        self.seconds = StepSeconds()
        self.log = TaskLog()
        self.optimiser: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        self.start_afresh()
        self.strategy = strategy_of(
            self.recipe,
            self.rank,
            self.num_ranks,
            num_train_samples=len(data.train),
            num_classes=data.num_classes,
            criterion=self._criterion(),
        )

    def train(self) -> Results:
        """Trains on all tasks, one after another."""
        at_start = self.evaluate()
        num_steps = sum(self.num_steps(number) for number in range(len(self.tasks)))
        with ProgressBar(self.recipe.strategy, num_steps, visible=self.rank == 0) as bar:
            for number, task in enumerate(self.tasks):
                bar.describe(f"task {number + 1} of {len(self.tasks)}: {task.name}")
                began, steps_before = time.perf_counter(), self.seconds.num_steps
                self.train_task(number, bar)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.log.seconds.append(time.perf_counter() - began)
                self.log.steps.append(self.seconds.num_steps - steps_before)
                bar.describe("evaluating")
                accuracies = self.evaluate()
                self.log.top1.append(accuracies.top1)
                self.log.top5.append(accuracies.top5)
        return results_of(
            self.recipe,
            self.tasks,
            self.log,
            at_start=(at_start.top1, at_start.top5),
            load_seconds=self.seconds.load,
            step_seconds=self.seconds.step,
            measuring_seconds=self.seconds.measuring,
            num_steps=self.seconds.num_steps,
            buffer=self.strategy.stats(),
            model=self.network.model,
            device=self.device,
            num_ranks=self.num_ranks,
            num_train_samples=len(self.data.train),
        )

    def start_afresh(self) -> None:
        """Makes the untrained model, the same on every rank."""
        torch.manual_seed(self.recipe.seed)
        self.network = Network(self.recipe, self.data, self.device, self.num_ranks)
        # Augmentation and dropout shall differ between ranks.
        torch.manual_seed(
            int(np.random.SeedSequence([self.recipe.seed, self.rank]).generate_state(1)[0])
        )
        self.optimiser = None

    def train_task(self, number: int, bar: ProgressBar) -> None:
        """Trains on one task, for all its epochs; then remembers it."""
        self.strategy.begin_task(number, self.tasks[number].classes)
        if isinstance(self.strategy, GDumb):
            for images, labels in self.batches(number, 1):
                began = time.perf_counter()
                self.strategy.observe(images, labels)
                self.seconds.step += time.perf_counter() - began
        if self.strategy.restarts:
            self.start_afresh()
        if self.optimiser is None or not self.recipe.keeps_optimiser:
            self.optimiser = self.new_optimiser()
        self.network.train()
        num_steps = self.num_steps(number)
        steps_per_epoch = self.steps_per_epoch(number)
        batches = self.batches(number, -(-num_steps // max(1, steps_per_epoch)))
        if isinstance(self.strategy, GDumb):  # it learns from the buffer alone
            batches = repeat(exemplars.nothing_like(self.data.train, self.device))
        for step in range(num_steps):
            if step % steps_per_epoch == 0:
                self.begin_epoch()
            factor = self.recipe.learning_rate_factor(step / steps_per_epoch, 1 / steps_per_epoch)
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * factor
            began = time.perf_counter()
            images, labels = next(batches)
            loaded = time.perf_counter()
            self.optimiser.zero_grad(set_to_none=True)
            self.strategy.backward(self.network, images, labels, self._backward)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.seconds.load += loaded - began
            self.seconds.step += time.perf_counter() - loaded
            self.seconds.num_steps += 1
            bar.advance()
        self.network.agree()
        if self.recipe.remembers != "stream" and isinstance(self.strategy, RehearsalStrategy):
            self.remember(number, self.strategy)

    def begin_epoch(self) -> None:
        """Measures what the sampling policy goes by, if it goes by anything."""
        if self.recipe.sampling == "grasp" and isinstance(self.strategy, RehearsalStrategy):
            self.network.agree()
            len(self.strategy.buffer)  # the buffer counts itself what it waits for its round
            began = time.perf_counter()
            self.strategy.buffer.measure_distances(lambda batch: self.network.features(batch[0]))
            self.seconds.measuring += time.perf_counter() - began
            self.seconds.step += time.perf_counter() - began

    def new_optimiser(self) -> torch.optim.Optimizer:
        """The recipe's optimiser for the model as it is."""
        recipe, parameters = self.recipe, self.network.model.parameters()
        if recipe.optimiser == "adam":
            return torch.optim.Adam(
                parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
            )
        return torch.optim.SGD(
            parameters,
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def training_images(self, number: int) -> TaskImages | None:
        """The samples that the strategy trains on when a task has come; None: no training yet."""
        tasks = self.strategy.training_tasks(self.tasks, number)
        return TaskImages(self.data.train, tasks) if tasks else None

    def num_steps(self, number: int) -> int:
        """The steps that the strategy trains for when a task has come."""
        if self.recipe.iterations is not None:
            return self.recipe.iterations * len(self.strategy.training_tasks(self.tasks, number))
        return self.recipe.epochs * self.steps_per_epoch(number)

    def steps_per_epoch(self, number: int) -> int:
        """Full global mini-batches in one pass; what is left over comes another epoch."""
        if isinstance(self.strategy, GDumb):  # a pass over what the buffer can hold by then
            num_seen = sum(len(task.train_indices) for task in self.tasks[: number + 1])
            num_held = min(num_seen, self.recipe.num_stored(len(self.data.train)))
            return max(1, num_held // self.recipe.global_num_representatives)
        images = self.training_images(number)
        return 0 if images is None else steps_per_pass(len(images), self.recipe.global_batch_size)

    def batches(self, number: int, num_passes: int) -> Iterator[Batch]:
        """This rank's mini-batches in some passes over the training samples of a task."""
        images = self.training_images(number)
        if images is None:
            return
        size, seed = self.recipe.global_batch_size, self.recipe.seed
        positions = (
            positions
            for each in range(num_passes)
            for positions in positions_of_pass(
                len(images), size, (seed, number, each), self.rank, self.num_ranks
            )
        )
        yield from load_batches(images, positions, self.recipe.num_workers, self.device)

    def remember(self, number: int, strategy: RehearsalStrategy) -> None:
        """Fills the buffer with exemplars of the task that has ended."""
        recipe, device = self.recipe, self.device
        images = TaskImages(self.data.train, self.tasks[number : number + 1])
        seen = set[int]().union(*self._labels_of_tasks()[: number + 1])
        num_sharing = self.data.num_classes if recipe.fixed_shares else len(seen)
        num_stored = recipe.num_stored(len(self.data.train))
        hands = exemplars.deal(
            exemplars.choose(
                recipe.remembers,
                images.labels,
                num_stored // num_sharing,
                np.random.default_rng([recipe.seed, number, EXEMPLARS]),
                lambda classes: exemplars.features_over_ranks(
                    classes,
                    images,
                    self.network.features,
                    self.rank,
                    self.num_ranks,
                    recipe.num_workers,
                    device,
                ),
            ),
            self.num_ranks,
        )
        began = time.perf_counter()
        exemplars.store(strategy, images, hands, self.rank, recipe.num_workers, device)
        self.seconds.step += time.perf_counter() - began

    def _labels_of_tasks(self) -> list[set[int]]:
        """The labels of each task's training samples, which may be more than its own classes."""
        labels = self.data.train.labels
        return [set(np.unique(labels[task.train_indices]).tolist()) for task in self.tasks]

    def _check_exemplars(self) -> None:
        """Checks, before anything is trained, that all classes can have exemplars.

        Raises:
            ValueError: the buffer is too small, or would keep those of the first task alone.
        """
        recipe = self.recipe
        if recipe.remembers == "stream" or not strategy_named(recipe.strategy).rehearses:
            return
        of_tasks = self._labels_of_tasks()
        num_classes = len(set[int]().union(*of_tasks))
        if recipe.fixed_shares:
            num_classes = self.data.num_classes
        if recipe.num_stored(len(self.data.train)) < num_classes:
            raise ValueError(
                f"capacity={recipe.capacity}: with remembers={recipe.remembers!r} it must be at "
                f"least the number of classes ({num_classes}), so that each has an exemplar"
            )
        if sum(map(len, of_tasks)) > len(set[int]().union(*of_tasks)) and recipe.selection in (
            "first-offered",
            "greedy-balanced",
        ):
            raise ValueError(
                f"scenario={recipe.scenario!r}: classes come again in later tasks, and "
                f"selection={recipe.selection!r} keeps the exemplars of the first one alone; use "
                "remembers='random' with selection='class-balanced'"
            )

    @torch.no_grad()
    def evaluate(self) -> _Accuracies:
        """Accuracy on every task, each sample counted once over all ranks."""
        correct = torch.zeros(len(self.tasks), 2, dtype=torch.int64)
        mask = self._task_mask()
        self.network.eval()
        images_of_tasks = TaskImages(self.data.test, self.tasks, testing=True)
        parts = self._positions_for_evaluation()
        batches = load_batches(
            images_of_tasks, (part for _, part in parts), self.recipe.num_workers, self.device
        )
        for (number, _), (images, labels) in zip(parts, batches, strict=True):
            logits = self.network(images)
            if mask is not None:
                logits = logits.masked_fill(~mask[labels], -torch.inf)
            correct[number] += metrics.top_k_correct(logits, labels, (1, 5)).cpu()
        if self.num_ranks > 1:
            dist.all_reduce(correct)
        sizes = torch.tensor([[max(1, len(task.test_indices))] for task in self.tasks])
        return _Accuracies(*(correct / sizes).T.tolist())

    def _positions_for_evaluation(self) -> list[tuple[int, NDArray[np.int64]]]:
        """This rank's part of each task's test samples, in mini-batches: task, positions."""
        parts, first = [], 0
        for number, task in enumerate(self.tasks):
            end = first + len(task.test_indices)
            mine = np.arange(first + self.rank, end, self.num_ranks)
            batches = np.array_split(mine, -(-len(mine) // EVALUATION_BATCH_SIZE) or 1)
            parts += [(number, batch) for batch in batches if len(batch)]
            first = end
        return parts

    def close(self) -> None:
        """Gives back what the strategy holds."""
        self.strategy.close()

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _criterion(self) -> Criterion:
        """The loss of a sample; if its task is known, only that task's classes compete."""
        mask = self._task_mask()
        if mask is None:
            return cross_entropy
        return lambda logits, labels: cross_entropy(
            logits.masked_fill(~mask[labels], torch.finfo(logits.dtype).min), labels
        )

    def _task_mask(self) -> Tensor | None:
        if self.recipe.scenario != "task-incremental":
            return None
        return task_mask(self.tasks, self.data.num_classes).to(self.device)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}: this machine has no CUDA device; use 'cpu'")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _write_json(path: Path, content: Any) -> None:
    """Writes beside, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(path)
