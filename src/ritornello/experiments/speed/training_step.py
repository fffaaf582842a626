"""A training step that lasts about as long as is wished, to measure beside."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from ritornello.experiments.speed.workloads import everybodys


def training_step(seconds: float) -> Callable[[], None]:
    """A step of SGD on a perceptron whose width makes it last about that long here.

    With several ranks it averages gradients, so that ranks keep step as they do in training.

    Args:
        seconds: that it shall last, at least.
    """
    width, taken = 32, 0.0
    step: Callable[[], None] = lambda: None  # noqa: E731
    while taken < seconds:
        width = int(width * max(1.15, min(2.0, (seconds / max(taken, 1e-5)) ** 0.4)))
        step = _perceptron_step(width)
        taken = float(np.median([seconds_of(step) for _ in range(7)]))
        taken = max(everybodys(taken))
    return step


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _perceptron_step(width: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(256, width), torch.nn.ReLU(), torch.nn.Linear(width, width),
        torch.nn.ReLU(), torch.nn.Linear(width, 10),
    )  # fmt: skip
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(64, 256, generator=generator)
    labels = torch.arange(64) % 10

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step
