"""Errors of predictions where targets are tensors: what is learnt by, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ritornello.experiments.strategies.base import Criterion

ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {"mae": torch.abs, "mse": torch.square}
"""A loss's name to the error of one number, from its difference."""


def errors_of(loss: str, outputs: Tensor, targets: Tensor, num_parts: int) -> Tensor:
    """The mean error of each part of each sample, ``[n, num_parts]``.

    Args:
        loss: one of ``ELEMENTS``.
        outputs: ``[n, *shape]``.
        targets: the same.
        num_parts: 1: the whole target; else the parts lie along its first axis.

    Raises:
        ValueError: outputs and targets differ in shape.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"the model says {list(outputs.shape)} where the targets are {list(targets.shape)}: "
            "they must be alike"
        )
    elements = ELEMENTS[loss](outputs - targets)
    size = math.prod(targets.shape[1:]) // num_parts
    return elements.reshape(len(targets), num_parts, size).mean(dim=2)


def error_criterion(loss: str, num_parts: int = 1) -> Criterion:
    """The loss of each sample: the sum of its parts' errors. For arguments see ``errors_of``."""
    return partial(_sum_of_errors, loss, num_parts)


def _sum_of_errors(loss: str, num_parts: int, outputs: Tensor, targets: Tensor) -> Tensor:
    return errors_of(loss, outputs, targets, num_parts).sum(dim=1)
