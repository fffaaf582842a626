"""How far what a model says is from what one has said before: two distances of logits."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor | None], Tensor]
"""Logits and wanted logits, ``[n, num_classes]`` each, to a distance for each sample, ``[n]``."""


def squared(logits: Tensor, wanted: Tensor | None) -> Tensor:
    """The squared distance of logits, mean over the classes, or over all numbers of a tensor."""
    assert wanted is not None
    return (logits - wanted.to(logits.dtype)).square().flatten(1).mean(dim=1)


def jensen_shannon(logits: Tensor, wanted: Tensor | None) -> Tensor:
    """The Jensen-Shannon divergence of the softmaxes of logits, in nats.

    ``(KL(p, m) + KL(q, m)) / 2`` with ``m = (p + q) / 2``: symmetric, and at most ``ln 2``. What
    it asks for a sample is bounded, therefore, however large the logits are.
    """
    assert wanted is not None
    said, meant = (each.log_softmax(dim=1) for each in (logits, wanted.to(logits.dtype)))
    middle = torch.logaddexp(said, meant) - log(2)
    parts = said.exp() * (said - middle) + meant.exp() * (meant - middle)
    return parts.sum(dim=1) / 2


DISTANCES: dict[str, Distance] = {"mse": squared, "js": jensen_shannon}
"""Name to distance."""


def distance_named(name: str) -> Distance:
    """A distance by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in DISTANCES:
        raise ValueError(f"distance={name!r}: there are {', '.join(DISTANCES)}")
    return DISTANCES[name]
