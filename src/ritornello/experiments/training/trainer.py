"""The training loop on one rank: task by task, step by step, and going on in the middle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ritornello.experiments.data.data_set import Batch, DataSet
from ritornello.experiments.data.scenarios import Task, scenario_of
from ritornello.experiments.data.stream import (
    TaskImages,
    load_batches,
    positions_of_passes,
    steps_per_pass,
)
from ritornello.experiments.models import build as models
from ritornello.experiments.models.network import Network
from ritornello.experiments.ranks.progress import ProgressBar
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import Results, StepSeconds, TaskLog, results_of
from ritornello.experiments.strategies import GDumb, RehearsalStrategy, strategy_of
from ritornello.experiments.strategies.base import Criterion, cross_entropy
from ritornello.experiments.strategies.der import with_further_logits
from ritornello.experiments.training import exemplars
from ritornello.experiments.training.checkpoints import Checkpoint, Snapshot
from ritornello.experiments.training.evaluation import Evaluation
from ritornello.experiments.training.exemplars import EXEMPLARS
from ritornello.experiments.training.saver import Saver
from ritornello.records import accelerators


class Watcher(Protocol):
    """Is told how a run goes on, by every rank alike."""

    def after_step(self, loss: Tensor) -> None:
        """A step is done."""

    def after_task(self) -> None:
        """A task is learnt, and all tasks are tested."""


@dataclass
class Position:
    """Where a run stands, between two steps."""

    task: int = 0
    """From 0."""
    num_observed: int = 0
    """The task's mini-batches that the buffer has seen before the training (GDumb)."""
    step: int = 0
    """The task's steps that are done."""
    seconds: float = 0.0
    """That the task has taken."""
    count: int = 0
    """Steps, mini-batches observed and tasks ended, in the whole run."""


class Trainer:
    """One run on one rank. Close it, or use it as a context.

    Args:
        recipe: what to run.
        data: its data set.
        device: of this rank.
        rank: this rank.
        num_ranks: how many there are.
        tasks: of the stream; None: those of the recipe's scenario.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: DataSet,
        device: torch.device,
        rank: int,
        num_ranks: int,
        tasks: Sequence[Task] | None = None,
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.recipe, self.data, self.device = recipe.on(num_ranks), data, device
        self.tasks = scenario_of(data, recipe) if tasks is None else list(tasks)
        exemplars.check(recipe, data, self.tasks)
        self.evaluation = Evaluation(recipe, data, self.tasks, device, rank, num_ranks)
        self.position, self.num_resumed = Position(), 0
        self.seconds, self.log = StepSeconds(), TaskLog()
        self._task_began = self._buffer_seconds = 0.0
        self._saver: Saver | None = None
        self._figures: Watcher | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        self.start_afresh()
        self.strategy = strategy_of(
            self.recipe,
            rank,
            num_ranks,
            num_train_samples=len(data.train),
            num_classes=data.num_classes,
            criterion=self._criterion(),
        )

    def train(self, saver: Saver | None = None, figures: Watcher | None = None) -> Results:
        """Trains on all tasks, one after another, from the position on.

        Args:
            saver: makes checkpoints on the way.
            figures: are told to trackers on the way.

        Raises:
            RunInterruptedError: the saver has been told to stop.
        """
        self._saver, self._figures = saver, figures
        if self.log.at_start is None:
            at_start = self.evaluation.accuracies(self.network)
            self.log.at_start = at_start.top1, at_start.top5
        to_come = range(self.position.task, len(self.tasks))
        num_steps = self.seconds.num_steps - self.position.step
        num_steps += sum(self.num_steps(number) for number in to_come)
        with ProgressBar(
            self.recipe.strategy, num_steps, self.rank == 0, self.seconds.num_steps
        ) as bar:
            for number in to_come:
                bar.describe(f"task {number + 1} of {len(self.tasks)}: {self.tasks[number].name}")
                self.train_task(number, bar)
                bar.describe("evaluating")
                accuracies = self.evaluation.accuracies(self.network)
                self.log.top1.append(accuracies.top1)
                self.log.top5.append(accuracies.top5)
                if figures is not None:
                    figures.after_task()
                self.position = Position(task=number + 1, count=self.position.count + 1)
                if saver is not None and number + 1 < len(self.tasks):
                    self._save_between(saver.at_task_end)
        self._count_buffer_seconds()
        return results_of(
            self.recipe,
            self.tasks,
            self.log,
            self.seconds,
            num_resumed=self.num_resumed,
            buffer=self.strategy.stats(),
            model=self.network.model,
            device=self.device,
            num_ranks=self.num_ranks,
            data=self.data,
        )

    def start_afresh(self) -> None:
        """Makes the untrained model, the same on every rank."""
        torch.manual_seed(self.recipe.seed)
        self.network = Network(self.recipe, self.data, self.device, self.num_ranks)
        self._seed_this_rank()
        self.optimiser = None

    def train_task(self, number: int, bar: ProgressBar) -> None:
        """Trains on what is left of a task, for all its epochs; then remembers it."""
        position = self.position
        self._task_began = time.perf_counter() - position.seconds
        self.strategy.begin_task(number, self.tasks[number].classes)
        if isinstance(self.strategy, RehearsalStrategy) and position == Position(
            task=number, count=position.count
        ):
            self.strategy.buffer.begin_task(self.tasks[number].name)
        if position.step == 0:
            self.begin_training(number)
        assert self.optimiser is not None
        self.network.train()
        num_steps, steps_per_epoch = self.num_steps(number), self.steps_per_epoch(number)
        batches = self.batches(number, -(-num_steps // max(1, steps_per_epoch)), position.step)
        if isinstance(self.strategy, GDumb):  # it learns from the buffer alone
            batches = repeat(exemplars.nothing_like(self.data.train, self.device))
        for step in range(position.step, num_steps):
            if step % steps_per_epoch == 0:
                self.begin_epoch()
            factor = self.recipe.learning_rate_factor(step / steps_per_epoch, 1 / steps_per_epoch)
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * factor
            began = time.perf_counter()
            images, labels = next(batches)
            loaded = time.perf_counter()
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.strategy.backward(self.network, images, labels, self._backward)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.seconds.load += loaded - began
            self.seconds.step += time.perf_counter() - loaded
            self.seconds.num_steps += 1
            position.step += 1
            if self._figures is not None:
                self._tell(self._figures, loss)
            self.between_steps()
            bar.advance()
        self.network.agree()
        if self.recipe.remembers != "stream" and isinstance(self.strategy, RehearsalStrategy):
            self.remember(number, self.strategy)
        accelerators.synchronize(self.device)
        self.log.seconds.append(time.perf_counter() - self._task_began)
        self.log.steps.append(num_steps)

    def begin_training(self, number: int) -> None:
        """What comes before the first step of a task."""
        if isinstance(self.strategy, GDumb):
            for images, labels in self.batches(number, 1, self.position.num_observed):
                began = time.perf_counter()
                self.strategy.observe(images, labels)
                self.seconds.step += time.perf_counter() - began
                self.position.num_observed += 1
                self.between_steps()
        if self.strategy.restarts:
            self.start_afresh()
        if self.optimiser is None or not self.recipe.keeps_optimiser:
            self.optimiser = self.new_optimiser()

    def begin_epoch(self) -> None:
        """Measures what the sampling policy goes by, if it goes by anything."""
        if self.recipe.sampling == "grasp" and isinstance(self.strategy, RehearsalStrategy):
            self.network.agree()
            len(self.strategy.buffer)  # the buffer counts itself what it waits for its round
            began = time.perf_counter()
            self.strategy.buffer.measure_distances(lambda batch: self.network.features(batch[0]))
            self.seconds.in_buffer += time.perf_counter() - began
            self.seconds.step += time.perf_counter() - began

    def between_steps(self) -> None:
        """The moment at which a run can be saved, and go on later."""
        self.position.count += 1
        self.position.seconds = time.perf_counter() - self._task_began
        if self._saver is not None:
            self._save_between(self._saver.between_steps)

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
            num_seen = sum(task.num_train for task in self.tasks[: number + 1])
            num_held = min(num_seen, self.recipe.num_stored(len(self.data.train)))
            return max(1, num_held // self.recipe.global_num_representatives)
        images = self.training_images(number)
        return 0 if images is None else steps_per_pass(len(images), self.recipe.global_batch_size)

    def batches(self, number: int, num_passes: int, first: int) -> Iterator[Batch]:
        """This rank's mini-batches in some passes over a task's training samples, from one on."""
        images = self.training_images(number)
        if images is None:
            return
        positions = positions_of_passes(
            len(images),
            self.recipe.global_batch_size,
            (self.recipe.seed, number),
            self.rank,
            self.num_ranks,
            num_passes=num_passes,
            first=first,
        )
        yield from load_batches(images, positions, self.recipe.num_workers, self.device)

    def remember(self, number: int, strategy: RehearsalStrategy) -> None:
        """Fills the buffer with exemplars of the task that has ended."""
        recipe, device = self.recipe, self.device
        images = TaskImages(self.data.train, self.tasks[number : number + 1])
        of_tasks = exemplars.labels_of_tasks(self.data, self.tasks[: number + 1])
        num_seen = len(set[int]().union(*of_tasks))
        num_sharing = self.data.num_classes if recipe.fixed_shares else num_seen
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

    @property
    def num_steps_done(self) -> int:
        """Steps so far, of all tasks."""
        return sum(self.log.steps[: self.position.task]) + self.position.step

    @property
    def where(self) -> str:
        """The position in words."""
        position = self.position
        observed = f", {position.num_observed} mini-batches observed" * bool(position.num_observed)
        return f"task {position.task + 1} of {len(self.tasks)}, step {position.step}{observed}"

    @property
    def data_sizes(self) -> list[list[int]]:
        """Training and test samples of each task: by them other data are recognised."""
        return [[len(task.train_indices), len(task.test_indices)] for task in self.tasks]

    @property
    def _random_state_name(self) -> str:
        return f"{self.device.type}_random_state"

    def snapshot(self) -> Snapshot:
        """All that ``go_on`` needs. Waits for the buffer's round."""
        self._count_buffer_seconds()
        of_rank = {"random_state": torch.get_rng_state(), "strategy": self.strategy.state_dict()}
        if self.device.type != "cpu":
            of_rank[self._random_state_name] = accelerators.random_state(self.device)
        strategy = self.strategy
        return Snapshot(
            count=self.position.count,
            where=self.where,
            description={
                "recipe": asdict(self.recipe),
                "num_ranks": self.num_ranks,
                "data_sizes": self.data_sizes,
                "task_names": [task.name for task in self.tasks],
                "num_resumed": self.num_resumed,
                "position": asdict(self.position),
                "seconds": asdict(self.seconds),
                "log": asdict(self.log),
            },
            tensors={
                "model": self.network.model.state_dict(),
                "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
            of_rank=of_rank,
            save_buffer=strategy.buffer.save if isinstance(strategy, RehearsalStrategy) else None,
        )

    def go_on(self, checkpoint: Checkpoint) -> None:
        """Takes the place of the run that was saved; all ranks call it, before ``train``.

        With as many ranks as there were, all goes on bit by bit as if the run had never stopped.
        With others, what was random on each rank begins anew.

        Raises:
            CheckpointError: on every rank; the buffer cannot be read.
        """
        saved, tensors = checkpoint.description, checkpoint.tensors
        if isinstance(self.strategy, RehearsalStrategy):
            self.strategy.buffer.load(checkpoint.buffer_folder)
            self._buffer_seconds = self._seconds_of_buffer()
        self.position = Position(**saved["position"])
        self.seconds, self.log = StepSeconds(**saved["seconds"]), TaskLog(**saved["log"])
        self.num_resumed = saved["num_resumed"] + 1
        for number in range(self.position.task):
            self.strategy.begin_task(number, self.tasks[number].classes)
        num_made = self.position.step if self.strategy.restarts else self.seconds.num_steps
        if num_made:
            image = exemplars.nothing_like(self.data.train, self.device)[0]
            batch_size = -(-self.recipe.global_batch_size // self.num_ranks)
            self.network.rehearse_step(image.new_zeros((max(2, batch_size), *image.shape[1:])))
        self.network.model.load_state_dict(tensors["model"])
        if tensors["optimiser"] is not None:
            self.optimiser = self.new_optimiser()
            self.optimiser.load_state_dict(tensors["optimiser"])
        self.scaler.load_state_dict(tensors["scaler"])
        if len(checkpoint.of_ranks) == self.num_ranks:
            own = checkpoint.of_ranks[self.rank]
            self.strategy.load_state_dict(own["strategy"])
            torch.set_rng_state(own["random_state"])
            if self._random_state_name in own:
                accelerators.set_random_state(self.device, own[self._random_state_name])
        else:
            self._seed_this_rank()

    def follow(self, log: TaskLog, weights: Mapping[str, Tensor], buffer: Path | None) -> None:
        """Takes the place of a run that has ended, to go on with the last task.

        All ranks call it, before ``train``. There may be as many ranks as one likes, and classes
        that the run did not know: the first outputs of the last layer are then the old ones. The
        optimiser begins anew.

        Args:
            log: of all tasks but the last one.
            weights: of the run's model.
            buffer: the folder of its buffer, where the strategy has one.

        Raises:
            CheckpointError: on every rank; the buffer cannot be read.
            ValueError: the weights are of another model.
        """
        number = len(self.tasks) - 1
        model = self.network.model
        model.load_state_dict(models.widened(weights, model.state_dict()))
        if isinstance(self.strategy, RehearsalStrategy) and buffer is not None:
            convert = None
            if self.strategy.stores_logits:
                convert = partial(with_further_logits, num_classes=self.data.num_classes)
            self.strategy.buffer.load(buffer, convert=convert)
            self._buffer_seconds = self._seconds_of_buffer()
        for earlier in range(number):
            self.strategy.begin_task(earlier, self.tasks[earlier].classes)
        self.position, self.log = Position(task=number, count=number), log
        self._seed_this_rank()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error nothing is waited for: other ranks may be gone.
        self.strategy.__exit__(kind, error, traceback)

    def _tell(self, figures: Watcher, loss: Tensor) -> None:
        """Tells the trackers of a step; the task's time stands still meanwhile."""
        began = time.perf_counter()
        figures.after_step(loss)
        self._task_began += time.perf_counter() - began

    def _save_between(self, save: Callable[[int, Callable[[], Snapshot]], None]) -> None:
        """Lets the saver do its work; the task's time stands still meanwhile."""
        began = time.perf_counter()
        save(self.position.count, self.snapshot)
        seconds = time.perf_counter() - began
        self.seconds.saving += seconds
        self._task_began += seconds

    def _seed_this_rank(self) -> None:
        """Augmentation and dropout shall differ between ranks."""
        key = [self.recipe.seed, self.rank]
        if self.position.count:
            key.append(self.position.count)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _count_buffer_seconds(self) -> None:
        """Adds what the buffer has cost since the last call."""
        seconds = self._seconds_of_buffer()
        self.seconds.in_buffer += seconds - self._buffer_seconds
        self._buffer_seconds = seconds

    def _seconds_of_buffer(self) -> float:
        if not isinstance(self.strategy, RehearsalStrategy):
            return 0.0
        stats = self.strategy.buffer.stats(per_class=False)
        return stats.seconds_waited + stats.seconds_joining + stats.seconds_offering

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _criterion(self) -> Criterion:
        """The loss of a sample; if its task is known, only that task's classes compete."""
        mask = self.evaluation.mask
        if mask is None:
            return cross_entropy
        return lambda logits, labels: cross_entropy(
            logits.masked_fill(~mask[labels], torch.finfo(logits.dtype).min), labels
        )
