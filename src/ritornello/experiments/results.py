"""What a run writes down: ``results.json``."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

import ritornello
from ritornello.experiments import metrics
from ritornello.experiments.config import Recipe
from ritornello.experiments.scenarios import Task

Results = dict[str, Any]


@dataclass
class TaskLog:
    """What is written down task by task."""

    top1: list[list[float]] = field(default_factory=list)
    top5: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def results_of(
    recipe: Recipe,
    tasks: Sequence[Task],
    log: TaskLog,
    *,
    at_start: tuple[list[float], list[float]],
    load_seconds: float,
    step_seconds: float,
    measuring_seconds: float,
    num_steps: int,
    buffer: dict[str, Any] | None,
    model: nn.Module,
    device: torch.device,
    num_ranks: int,
    num_train_samples: int,
) -> Results:
    """Everything that ``results.json`` holds.

    Args:
        recipe: with sizes of all ranks.
        tasks: of the stream.
        log: of all tasks.
        at_start: top-1 and top-5 accuracies of the untrained model.
        load_seconds: that the steps waited for the loader.
        step_seconds: that they took besides.
        measuring_seconds: of these, what the sampling policy took outside of the buffer's calls.
        num_steps: of all tasks.
        buffer: its statistics, if there is one.
        model: trained.
        device: it was trained on.
        num_ranks: by how many.
        num_train_samples: of the whole data set.
    """
    top1, top5 = np.array(log.top1), np.array(log.top5)
    # A task that is not trained on when it comes can be neither forgotten nor transferred.
    learnt = top1 if all(log.steps) else top1[-1:]
    in_buffer = measuring_seconds
    if buffer is not None:
        parts = ("seconds_waited", "seconds_joining", "seconds_offering")
        in_buffer += sum(buffer[part] for part in parts)
    steps = max(1, num_steps)
    return {
        "format": 1,
        "recipe": recipe.name,
        "strategy": recipe.strategy,
        "seed": recipe.seed,
        "world_size": num_ranks,
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
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "train_samples": num_train_samples,
        "tasks": [
            {
                "name": task.name,
                "classes": list(task.classes),
                "train_samples": len(task.train_indices),
                "test_samples": len(task.test_indices),
            }
            for task in tasks
        ],
        "top1": log.top1,
        "top5": log.top5,
        "top1_at_start": at_start[0],
        "top5_at_start": at_start[1],
        "average_top1": metrics.average_accuracy(top1),
        "average_top5": metrics.average_accuracy(top5),
        "forgetting": metrics.forgetting(learnt),
        "backward_transfer": metrics.backward_transfer(learnt),
        "forward_transfer": metrics.forward_transfer(learnt, np.array(at_start[0])),
        "seconds": sum(log.seconds),
        "seconds_per_task": log.seconds,
        "steps_per_task": log.steps,
        "step_seconds": {
            "load": load_seconds / steps,
            "wait": in_buffer / steps,
            "train": (step_seconds - in_buffer) / steps,
        },
        "buffer": buffer,
        "weights_sha256": weights_digest(model),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights: equal only if the models are bit-identical."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
