"""What a run writes down: ``results.json``."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ritornello
from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results import anytime, metrics
from ritornello.experiments.results.anytime import Probe
from ritornello.experiments.results.measures import Accuracies, Measured
from ritornello.records import accelerators

Results = Mapping[str, Any]
"""What ``results.json`` holds, of one run."""


@dataclass
class StepSeconds:
    """Where the time of the steps went, in seconds altogether."""

    load: float = 0.0
    """Waiting for the loader."""
    step: float = 0.0
    """Everything else that is done for a step."""
    in_buffer: float = 0.0
    """Of it, in the buffer, and measuring what the sampling policy goes by."""
    saving: float = 0.0
    """Making checkpoints; part of no step."""
    num_steps: int = 0
    probing: float = 0.0
    """Evaluating the model on the way; part of no step."""


@dataclass
class TaskLog:
    """What is written down task by task."""

    at_start: Sequence[list[float | None]] | None = None
    """Top-1 and top-5 accuracies of the untrained model, or its errors; None: not measured."""
    top1: list[list[float | None]] = field(default_factory=list)
    top5: list[list[float | None]] = field(default_factory=list)
    loss: list[list[float | None]] = field(default_factory=list)
    """Shorter than the others in a run that an earlier release has begun."""
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    averaged_top1: list[list[float | None]] = field(default_factory=list)
    """Of the running average of the weights, where there is one."""
    averaged_top5: list[list[float | None]] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    error: list[list[float | None]] = field(default_factory=list)
    """Where targets are tensors, in the place of accuracies and losses."""
    error_of_parts: dict[str, list[list[float | None]]] = field(default_factory=dict)
    averaged_error: list[list[float | None]] = field(default_factory=list)

    def note_start(self, measured: Measured) -> None:
        """Writes down what the untrained model can do."""
        if isinstance(measured, Accuracies):
            self.at_start = measured.top1, measured.top5
        else:
            self.at_start = (measured.error,)

    def note(self, measured: Measured) -> None:
        """Writes down what the model can do after a task."""
        if isinstance(measured, Accuracies):
            self.top1.append(measured.top1)
            self.top5.append(measured.top5)
            self.loss.append(measured.loss)
            return
        self.error.append(measured.error)
        for part, errors in measured.of_parts.items():
            self.error_of_parts.setdefault(part, []).append(errors)

    def note_average(self, measured: Measured) -> None:
        """Writes down what the running average of the weights can do after a task."""
        if isinstance(measured, Accuracies):
            self.averaged_top1.append(measured.top1)
            self.averaged_top5.append(measured.top5)
        else:
            self.averaged_error.append(measured.error)

    def note_probe(self, step: int, task: int, measured: Measured) -> None:
        """Writes down what the model can do on a part of the test samples, at a step of a task."""
        probe: Probe = {"step": step, "task": task}
        if isinstance(measured, Accuracies):
            probe["top1"] = measured.top1
        else:
            probe["error"] = measured.error
        self.probes.append(probe)


def setting_of(recipe: Recipe, data: DataSet, tasks: Sequence[Task], place: Place) -> Results:
    """What ``results.json`` says of a run before it has begun, with where and when it was.

    Args:
        recipe: with sizes of all ranks.
        data: that the model is trained on.
        tasks: of the stream.
        place: of this rank.
    """
    device = place.device
    return {
        "format": 1,
        "recipe": recipe.name,
        "strategy": recipe.strategy,
        "seed": recipe.seed,
        "world_size": place.num_ranks,
        "config": asdict(recipe),
        "versions": {
            "ritornello": ritornello.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": accelerators.name_of(device),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "kind": recipe.data,
            "path": _absolute_path(recipe),
            "image_shape": list(data.image_shape),
            "mean": list(data.mean),
            "std": list(data.std),
            **({} if data.targets is None else {"targets": asdict(data.targets)}),
        },
        "train_samples": len(data.train),
        "class_names": list(data.class_names),
        "tasks": [
            {
                "name": task.name,
                "classes": list(task.classes),
                "train_samples": task.num_train,
                "test_samples": len(task.test_indices),
                **({} if task.path is None else {"path": task.path}),
            }
            for task in tasks
        ],
    }


def outcome_of(log: TaskLog, seconds: StepSeconds) -> Results:
    """What ``results.json`` says of accuracies or errors, and of time.

    Args:
        log: of all tasks.
        seconds: of all tasks' steps.
    """
    # A task that is not trained on when it comes can be neither forgotten nor transferred.
    learns_in_time = all(log.steps)
    steps = max(1, seconds.num_steps)
    return {
        **(_of_errors if log.error else _of_accuracies)(log, learns_in_time),
        **_of_probes(log, seconds, learns_in_time),
        "seconds": sum(log.seconds),
        "seconds_per_task": log.seconds,
        "steps_per_task": log.steps,
        "step_seconds": {
            "load": seconds.load / steps,
            "wait": seconds.in_buffer / steps,
            "train": (seconds.step - seconds.in_buffer) / steps,
        },
    }


def _of_accuracies(log: TaskLog, learns_in_time: bool) -> Results:
    top1, top5 = metrics.matrix_of(log.top1), metrics.matrix_of(log.top5)
    learnt = top1 if learns_in_time else top1[-1:]
    at_start = log.at_start
    assert at_start is not None
    return {
        "top1": log.top1,
        "top5": log.top5,
        "top1_at_start": at_start[0],
        "top5_at_start": at_start[1],
        "average_top1": metrics.average_accuracy(top1),
        "average_top5": metrics.average_accuracy(top5),
        "forgetting": metrics.forgetting(learnt),
        "backward_transfer": metrics.backward_transfer(learnt),
        "forward_transfer": metrics.forward_transfer(
            learnt, np.array(at_start[0], dtype=np.float64)
        ),
        "average_incremental_top1": (
            metrics.average_incremental_accuracy(top1) if learns_in_time else None
        ),
        "plasticity": metrics.plasticity(top1) if learns_in_time else None,
        **_of_loss(log, learns_in_time),
        **_of_average(log),
    }


def _of_errors(log: TaskLog, learns_in_time: bool) -> Results:
    """What is said of errors; figures of changes are of negative ones: see ``measures``."""
    error = metrics.matrix_of(log.error)
    learnt = -error if learns_in_time else -error[-1:]
    at_start = log.at_start
    assert at_start is not None
    figures: dict[str, Any] = {
        "error": log.error,
        "error_at_start": at_start[0],
        "average_error": metrics.average_accuracy(error),
        "forgetting": metrics.forgetting(learnt),
        "backward_transfer": metrics.backward_transfer(learnt),
        "forward_transfer": metrics.forward_transfer(
            learnt, -np.array(at_start[0], dtype=np.float64)
        ),
        "average_incremental_error": (
            metrics.average_incremental_accuracy(error) if learns_in_time else None
        ),
        "error_when_learnt": metrics.plasticity(error) if learns_in_time else None,
    }
    if log.error_of_parts:
        figures["error_of_parts"] = log.error_of_parts
        figures["average_error_of_parts"] = {
            part: metrics.average_accuracy(metrics.matrix_of(matrix))
            for part, matrix in log.error_of_parts.items()
        }
    if log.averaged_error:
        figures["averaged_error"] = log.averaged_error
        figures["average_averaged_error"] = metrics.average_accuracy(
            metrics.matrix_of(log.averaged_error)
        )
    return figures


def _of_loss(log: TaskLog, learns_in_time: bool) -> Results:
    """The loss on all tasks, and how far it has risen again, if it was measured after each."""
    if len(log.loss) < len(log.top1):
        return {}
    loss, top1 = metrics.matrix_of(log.loss), metrics.matrix_of(log.top1)
    if (np.isnan(loss[-1]) & ~np.isnan(top1[-1])).any():  # it has diverged: no mean is without it
        return {"loss": log.loss, "average_loss": None, "forgetting_in_loss": None}
    return {
        "loss": log.loss,
        "average_loss": metrics.average_accuracy(loss),
        "forgetting_in_loss": metrics.forgetting(-loss if learns_in_time else -loss[-1:]),
    }


def _of_average(log: TaskLog) -> Results:
    """Accuracies of the running average of the weights, if there is one."""
    if not log.averaged_top1:
        return {}
    return {
        "averaged_top1": log.averaged_top1,
        "averaged_top5": log.averaged_top5,
        "average_averaged_top1": metrics.average_accuracy(metrics.matrix_of(log.averaged_top1)),
        "average_averaged_top5": metrics.average_accuracy(metrics.matrix_of(log.averaged_top5)),
    }


def _of_probes(log: TaskLog, seconds: StepSeconds, learns_in_time: bool) -> Results:
    """What probes have shown, if there were any."""
    if not log.probes:
        return {}
    is_whole = learns_in_time and log.probes[-1]["task"] == len(log.steps) - 1
    figures = anytime.figures_of(log.probes) if is_whole else {}
    return {"probes": log.probes, **figures, "seconds_probing": seconds.probing}


def _absolute_path(recipe: Recipe) -> str | None:
    """Where the data are, for runs that go on in another folder; None if they come with a package.

    Without a path it is torchvision's folder; see ``data.load``.
    """
    if recipe.data_path is not None:
        return os.path.abspath(recipe.data_path)
    return None if recipe.data == "digits" else os.path.abspath("data")


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights of a model's state: equal only if they are bit-identical."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
