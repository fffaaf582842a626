"""The training loop on one rank: task by task, step by step, and going on in the middle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.scenarios import Task, scenario_of
from ritornello.experiments.models import build as models
from ritornello.experiments.models.embedding import Embedded, Embeddings
from ritornello.experiments.models.network import Network
from ritornello.experiments.models.optimiser import optimiser_of, set_learning_rate
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.ranks.progress import ProgressBar
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import (
    Results,
    StepSeconds,
    TaskLog,
    outcome_of,
    setting_of,
    weights_digest,
)
from ritornello.experiments.strategies import strategy_named, strategy_of
from ritornello.experiments.training import exemplars
from ritornello.experiments.training.checkpoints import Checkpoint, Position, RunSnapshot
from ritornello.experiments.training.evaluation import Evaluation
from ritornello.experiments.training.probe import probe_of
from ritornello.experiments.training.saver import Saver
from ritornello.experiments.training.schedule import Schedule
from ritornello.experiments.training.stored_files import stored_files
from ritornello.records import accelerators


class Watcher(Protocol):
    """Is told how a run goes on, by every rank alike."""

    def after_step(self, loss: Tensor) -> None:
        """A step is done."""

    def after_task(self) -> None:
        """A task is learnt, and all tasks are tested."""

    def after_probe(self) -> None:
        """The tasks so far were probed."""


class Trainer:
    """One run on one rank. Close it, or use it as a context.

    Args:
        recipe: what to run.
        data: its data set.
        place: of this rank.
        tasks: of the stream; None: those of the recipe's scenario.
        embeddings: where features are stored, those of runs before.
        begins_with: see ``Network``.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: DataSet,
        place: Place,
        tasks: Sequence[Task] | None = None,
        embeddings: Embeddings | None = None,
        begins_with: Path | None = None,
    ) -> None:
        self.recipe, self.data, self.place = recipe.on(place.num_ranks), data, place
        self._begins_with = begins_with
        self.tasks = scenario_of(data, recipe) if tasks is None else list(tasks)
        exemplars.check(recipe, data, self.tasks)
        self.position, self.num_resumed = Position(), 0
        self.seconds, self.log = StepSeconds(), TaskLog()
        self._task_began = self._buffer_seconds = 0.0
        self._saver: Saver | None = None
        self._figures: Watcher | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=recipe.amp == "float16")
        self.start_afresh()
        self._embedded: Embedded | None = None
        if self.network.sees_features:
            embeddings = embeddings or Embeddings()
            self._embedded = embeddings.of(recipe, data, self.network, place)
            self.data = data = self._embedded.data
        self.evaluation = Evaluation(recipe, data, self.tasks, place)
        self._probe = probe_of(recipe, data, self.tasks, place)
        self.strategy = strategy_of(
            self.recipe,
            place.rank,
            place.num_ranks,
            num_train_samples=len(data.train),
            num_classes=data.num_classes,
            criterion=self.evaluation.criterion,
            **stored_files(self.recipe, data, place),
        )
        if self.strategy.solves:
            assert self.network.last_layer is not None  # it raises now, not at the task's end
        self.schedule = Schedule(self.recipe, data, self.tasks, self.strategy, place)

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
            self.log.note_start(self.evaluation.measured(self.network))
        to_come = range(self.position.task, len(self.tasks))
        num_steps = self.seconds.num_steps - self.position.step
        num_steps += sum(self.schedule.num_steps(number) for number in to_come)
        with ProgressBar(
            self.recipe.strategy, num_steps, self.place.rank == 0, self.seconds.num_steps
        ) as bar:
            for number in to_come:
                bar.describe(f"task {number + 1} of {len(self.tasks)}: {self.tasks[number].name}")
                self.train_task(number, bar)
                bar.describe("evaluating")
                self.evaluate()
                if figures is not None:
                    figures.after_task()
                self.position = Position(task=number + 1, count=self.position.count + 1)
                if saver is not None and number + 1 < len(self.tasks):
                    self._save_between(saver.at_task_end)
        self._count_buffer_seconds()
        return {
            **setting_of(self.recipe, self.data, self.tasks, self.place),
            **outcome_of(self.log, self.seconds),
            "samples_per_step": self.schedule.samples_per_step,
            **self.schedule.of_unlike_ranks(),
            "resumed": self.num_resumed,
            "seconds_saving": self.seconds.saving,
            "buffer": self.strategy.stats(),
            "weights_sha256": weights_digest(self.network.whole.state_dict()),
            **({} if self._embedded is None else {"seconds_embedding": self._embedded.seconds}),
            "costs": self.strategy.costs(self.network.model),
            **self.strategy.outcome(),
            **self._of_average(),
            **self.evaluation.pictures(self.network),
        }

    def evaluate(self) -> None:
        """Tests the model on all tasks, and the average of its weights where there is one."""
        self.log.note(self.evaluation.measured(self.network))
        if self.network.average is not None:
            with self.network.averaged():
                self.log.note_average(self.evaluation.measured(self.network))

    def start_afresh(self) -> None:
        """Makes the model as it is before training, the same on every rank."""
        torch.manual_seed(self.recipe.seed)
        restarts = strategy_named(self.recipe.strategy).restarts
        self.network = Network(self.recipe, self.data, self.place, self._begins_with, restarts)
        self._seed_this_rank()
        self.optimiser = None

    def train_task(self, number: int, bar: ProgressBar) -> None:
        """Trains on what is left of a task, for all its epochs; then remembers it."""
        position, buffer = self.position, self.strategy.buffer
        self._task_began = time.perf_counter() - position.seconds
        self.strategy.begin_task(number, self.tasks[number].classes)
        if self.recipe.ranks_differ is not None and self.strategy.sizes is not None:
            num_new = self.schedule.num_new(number)
            self.strategy.sizes = replace(self.strategy.sizes, num_new=num_new)
        if buffer is not None and position == Position(task=number, count=position.count):
            buffer.begin_task(self.tasks[number].name)
        if position.step == 0:
            self.begin_training(number)
        assert self.optimiser is not None
        self.network.train()
        num_steps = self.schedule.num_steps(number)
        steps_per_epoch = self.schedule.steps_per_epoch(number)
        batches = self.schedule.batches(number, position.step)
        for step in range(position.step, num_steps):
            if step % steps_per_epoch == 0:
                self.begin_epoch()
            factor = self.recipe.learning_rate_factor(step / steps_per_epoch, 1 / steps_per_epoch)
            set_learning_rate(self.optimiser, self.recipe.learning_rate * factor)
            began = time.perf_counter()
            images, labels, self.strategy.encoded = next(batches)
            loaded = time.perf_counter()
            if buffer is not None:
                self._set_sizes(buffer, number, step, step + steps_per_epoch >= num_steps)
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.strategy.backward(self.network, images, labels, self._backward)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.strategy.end_step(self.network)
            self.network.follow_step()
            num_past = 0 if buffer is None else buffer.num_past
            self.network.end_local_step(position.step + 1, len(labels) + num_past)
            self.seconds.load += loaded - began
            self.seconds.step += time.perf_counter() - loaded
            self.seconds.num_steps += 1
            position.step += 1
            if self._figures is not None:
                self._tell(self._figures, loss)
            if self._is_probed(position.step, num_steps):
                self._probe_tasks()
            self.between_steps()
            bar.advance()
        self.network.agree()
        self._end_task(number)
        if not self.recipe.offers_stream and buffer is not None:
            tasks, embed = self.tasks[: number + 1], self.network.features
            self.seconds.step += exemplars.remember(
                buffer, self.recipe, self.data, tasks, embed, self.place
            )
        accelerators.synchronize(self.place.device)
        self.log.seconds.append(time.perf_counter() - self._task_began)
        # Without steps, the mini-batches that have passed by.
        self.log.steps.append(num_steps or position.num_observed)

    def _set_sizes(
        self, buffer: RehearsalBuffer, number: int, step: int, is_in_last_epoch: bool
    ) -> None:
        """How many of a step's samples are offered, and how many are drawn for the next one."""
        buffer.num_candidates = self.recipe.own_candidates(self.place.num_ranks, is_in_last_epoch)
        num_past = self.schedule.num_past(number, step + 1)
        if num_past is not None:
            buffer.num_representatives = num_past

    def _end_task(self, number: int) -> None:
        """Lets the strategy look at the model that has learnt the task."""
        began = time.perf_counter()
        reviewed = islice(self.schedule.batches(number, 0), self.strategy.num_reviews)
        for images, labels, _ in reviewed:
            self.strategy.review(self.network, images, labels)
        self.strategy.end_task(self.network)
        self.seconds.step += time.perf_counter() - began

    def begin_training(self, number: int) -> None:
        """What comes before the first step of a task."""
        if self.strategy.observes or self.strategy.solves:
            for batch in self.schedule.observed(number, self.position.num_observed):
                images, labels, self.strategy.encoded = batch
                began = time.perf_counter()
                self.strategy.observe(self.network, images, labels)
                self.seconds.step += time.perf_counter() - began
                self.position.num_observed += 1
                self.seconds.num_steps += self.strategy.solves
                self.between_steps()
        if self.strategy.restarts:
            self.start_afresh()
        self.network.grow(number + 1, self.tasks[number].classes)
        if self.optimiser is None or not self.recipe.keeps_optimiser:
            self.optimiser = optimiser_of(self.recipe, self.network.model)

    def begin_epoch(self) -> None:
        """Measures what the sampling policy goes by, if it goes by anything."""
        buffer = self.strategy.buffer
        if buffer is not None and self.strategy.goes_by_distances:
            with self.network.agreed():
                len(buffer)  # the buffer counts itself what it waits for its round
                began = time.perf_counter()
                buffer.measure_distances(lambda batch: self.network.features(batch[0]))
            self.seconds.in_buffer += time.perf_counter() - began
            self.seconds.step += time.perf_counter() - began

    def between_steps(self) -> None:
        """The moment at which a run can be saved, and go on later."""
        self.position.count += 1
        self.position.seconds = time.perf_counter() - self._task_began
        if self._saver is not None:
            self._save_between(self._saver.between_steps)

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
        return f"{self.place.device.type}_random_state"

    def snapshot(self) -> RunSnapshot:
        """All that ``go_on`` needs. Waits for the buffer's round."""
        self._count_buffer_seconds()
        buffer, average = self.strategy.buffer, self.network.average
        of_rank: dict[str, Any] = {
            "random_state": torch.get_rng_state(),
            "strategy": self.strategy.state_dict(),
        }
        trained = {
            "model": self.network.model.state_dict(),
            "average": None if average is None else average.state_dict(),
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "strategy": self.strategy.shared_state_dict(),
        }
        if self.network.is_local:
            of_rank["trained"] = {**trained, "alone": list(self.network.alone)}
        device = self.place.device
        if device.type != "cpu":
            of_rank[self._random_state_name] = accelerators.random_state(device)
        return RunSnapshot(
            count=self.position.count,
            where=self.where,
            description={
                "recipe": asdict(self.recipe),
                "num_ranks": self.place.num_ranks,
                "data_sizes": self.data_sizes,
                "task_names": [task.name for task in self.tasks],
                "num_resumed": self.num_resumed,
                "position": asdict(self.position),
                "seconds": asdict(self.seconds),
                "log": asdict(self.log),
            },
            tensors=trained,
            of_rank=of_rank,
            save_buffer=None if buffer is None else buffer.save,
        )

    def go_on(self, checkpoint: Checkpoint) -> None:
        """Takes the place of the run that was saved; all ranks call it, before ``train``.

        With as many ranks as there were, all goes on bit by bit as if the run had never stopped.
        With others, what was random on each rank begins anew.

        Raises:
            CheckpointError: on every rank; the buffer cannot be read.
        """
        saved, tensors = checkpoint.description, checkpoint.trained(self.place)
        if self.strategy.buffer is not None:
            self.strategy.buffer.load(checkpoint.buffer_folder)
            self._buffer_seconds = self._seconds_of_buffer()
        self.position = Position(**saved["position"])
        self.seconds, self.log = StepSeconds(**saved["seconds"]), TaskLog(**saved["log"])
        self.num_resumed = saved["num_resumed"] + 1
        for number in range(self.position.task):
            self.strategy.begin_task(number, self.tasks[number].classes)
        self.network.grow(self.position.task + (self.position.step > 0))
        begins_anew = self.strategy.restarts or self.recipe.has_adapters
        num_made = self.position.step if begins_anew else self.seconds.num_steps
        if num_made:
            image = exemplars.nothing_like(self.data.train, self.place.device)[0]
            batch_size = -(-self.recipe.global_batch_size // self.place.num_ranks)
            self.network.rehearse_step(image.new_zeros((max(2, batch_size), *image.shape[1:])))
        self.network.model.load_state_dict(tensors["model"])
        self.network.alone = tensors.get("alone", (0, 0))
        if tensors.get("average") is None:  # of a version that had none
            self.network.begin_average(tensors["model"])
        elif self.network.average is not None:
            self.network.average.load_state_dict(tensors["average"])
        if tensors["optimiser"] is not None:
            self.optimiser = optimiser_of(self.recipe, self.network.model)
            self.optimiser.load_state_dict(tensors["optimiser"])
        self.scaler.load_state_dict(tensors["scaler"])
        if tensors.get("strategy"):  # there was none in earlier versions
            self.strategy.load_shared_state_dict(tensors["strategy"])
        if len(checkpoint.of_ranks) == self.place.num_ranks:
            own = checkpoint.of_ranks[self.place.rank]
            self.strategy.load_state_dict(own["strategy"])
            torch.set_rng_state(own["random_state"])
            if self._random_state_name in own:
                name = self._random_state_name
                accelerators.set_random_state(self.place.device, own[name])
        else:
            self.strategy.adopt([each["strategy"] for each in checkpoint.of_ranks])
            self._seed_this_rank()

    def follow(
        self,
        log: TaskLog,
        weights: Mapping[str, Tensor],
        buffer: Path | None,
        averaged: Mapping[str, Tensor] | None = None,
        strategy: dict[str, Any] | None = None,
    ) -> None:
        """Takes the place of a run that has ended, to go on with the last task.

        All ranks call it, before ``train``. There may be as many ranks as one likes, and classes
        that the run did not know: the first outputs of the last layer are then the old ones. The
        optimiser begins anew.

        Args:
            log: of all tasks but the last one.
            weights: of the run's model.
            buffer: the folder of its buffer, where the strategy has one.
            averaged: their running average; None: it begins with the weights themselves.
            strategy: what its strategy has left, if anything.

        Raises:
            CheckpointError: on every rank; the buffer cannot be read.
            ValueError: the weights are of another model.
        """
        number = len(self.tasks) - 1
        self.network.grow(number)
        whole = self.network.whole
        fresh = whole.state_dict()
        average = models.widened(weights if averaged is None else averaged, fresh)
        self.network.begin_average(average)
        whole.load_state_dict(models.widened(weights, fresh))
        if self.strategy.buffer is not None and buffer is not None:
            convert = self.strategy.widening(self.data.num_classes)
            self.strategy.buffer.load(buffer, convert=convert)
            self._buffer_seconds = self._seconds_of_buffer()
        for earlier in range(number):
            self.strategy.begin_task(earlier, self.tasks[earlier].classes)
        if strategy is not None:
            self.strategy.follow(strategy, self.place.rank, self.place.num_ranks)
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

    def _is_probed(self, step: int, num_steps: int) -> bool:
        """Whether there is a probe after a step of a task.

        There is one at the task's end, too. Until then nobody uses a model that is trained anew.
        """
        if self._probe is None:
            return False
        is_due = step % self.recipe.probe_every == 0 and not self.strategy.restarts
        return is_due or step == num_steps

    def _probe_tasks(self) -> None:
        """Tests the model on a part of the tasks so far; the task's time stands still meanwhile."""
        assert self._probe is not None
        accelerators.synchronize(self.place.device)
        began = time.perf_counter()
        number = self.position.task
        with self.network.agreed():
            measured = self._probe.measured(self.network, num_tasks=number + 1)
        self.log.note_probe(self.num_steps_done, number, measured)
        self.network.train()
        if self._figures is not None:
            self._figures.after_probe()
        seconds = time.perf_counter() - began
        self.seconds.probing += seconds
        self._task_began += seconds

    def _of_average(self) -> Results:
        """What the results say of the average of the weights, where there is one."""
        average = self.network.average
        if average is None:
            return {}
        return {"averaged_sha256": weights_digest(self.network.state_of(average.module))}

    def _save_between(self, save: Callable[[int, Callable[[], RunSnapshot]], None]) -> None:
        """Lets the saver do its work; the task's time stands still meanwhile."""
        began = time.perf_counter()
        save(self.position.count, self.snapshot)
        seconds = time.perf_counter() - began
        self.seconds.saving += seconds
        self._task_began += seconds

    def _seed_this_rank(self) -> None:
        """Augmentation and dropout shall differ between ranks."""
        key = [self.recipe.seed, self.place.rank]
        if self.position.count:
            key.append(self.position.count)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _count_buffer_seconds(self) -> None:
        """Adds what the buffer has cost since the last call."""
        seconds = self._seconds_of_buffer()
        self.seconds.in_buffer += seconds - self._buffer_seconds
        self._buffer_seconds = seconds

    def _seconds_of_buffer(self) -> float:
        if self.strategy.buffer is None:
            return 0.0
        stats = self.strategy.buffer.stats(per_class=False)
        return stats.seconds_waited + stats.seconds_joining + stats.seconds_offering

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
