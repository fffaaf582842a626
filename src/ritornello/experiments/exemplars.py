"""Exemplars: what the buffer gets when a task has ended, instead of candidates from the stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ritornello import exemplars
from ritornello.experiments.data import LabelledImages
from ritornello.experiments.strategies import RehearsalStrategy
from ritornello.experiments.stream import load_batches
from ritornello.selection import rank_of_exemplar

Ints = NDArray[np.int64]

CHOICES = ("random", "herding", "closest-to-mean")
"""How exemplars are chosen: see ``ritornello.exemplars``."""

BATCH_SIZE = 256
"""Samples that are embedded, or offered, at a time."""


def choose(
    how: str,
    labels: Ints,
    num_per_class: int,
    generator: np.random.Generator,
    features_of: Callable[[Ints], Tensor],
) -> dict[int, Ints]:
    """Chooses exemplars of every class of a task, the most important ones first.

    Args:
        how: one of ``CHOICES``.
        labels: int64 ``[n]``, of the task's samples.
        num_per_class: at most so many.
        generator: the same on every rank.
        features_of: gives the features ``[m, d]`` of ``m`` samples; only called if needed.

    Returns:
        Label to positions among the task's samples.
    """
    chosen = {}
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        if how == "random":
            order = exemplars.at_random(len(members), num_per_class, generator)
        elif how == "herding":
            order = exemplars.herding(features_of(members), num_per_class)
        else:
            order = exemplars.closest_to_mean(features_of(members), num_per_class)
        chosen[label] = members[order]
    return chosen


def deal(chosen: dict[int, Ints], num_ranks: int) -> list[Ints]:
    """Which rank stores which exemplars, in the order in which it offers them.

    All ranks' first ones come first, so that with the policy "first-offered" the buffer keeps
    what is most important over all ranks.
    """
    hands: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for label, positions in chosen.items():
        ranks = rank_of_exemplar(label, np.arange(len(positions)), num_ranks)
        for order, (rank, position) in enumerate(zip(ranks, positions.tolist(), strict=True)):
            hands[rank].append((order, position))
    return [np.array([position for _, position in sorted(hand)], dtype=np.int64) for hand in hands]


def store(
    strategy: RehearsalStrategy,
    images: LabelledImages,
    hands: list[Ints],
    rank: int,
    num_workers: int,
    device: torch.device,
) -> None:
    """Offers a rank's exemplars; all ranks take part in equally many rounds."""
    num_rounds = -(-max(len(hand) for hand in hands) // BATCH_SIZE)
    parts = [hands[rank][i * BATCH_SIZE : (i + 1) * BATCH_SIZE] for i in range(num_rounds)]
    nothing = _nothing_like(images, device)
    batches = load_batches(images, [part for part in parts if len(part)], num_workers, device)
    for part in parts:
        strategy.buffer.draw()
        strategy.buffer.offer(next(batches) if len(part) else nothing)


def features_over_ranks(
    positions: Ints,
    images: LabelledImages,
    embed: Callable[[Tensor], Tensor],
    rank: int,
    num_ranks: int,
    num_workers: int,
    device: torch.device,
) -> Tensor:
    """The features ``[n, d]`` of some samples, each embedded by one rank, on all ranks."""
    parts = np.array_split(positions, num_ranks)
    size = len(parts[0])
    own = np.resize(parts[rank], size) if len(parts[rank]) else np.resize(positions, size)
    batches = np.array_split(own, -(-size // BATCH_SIZE))
    features = torch.cat(
        [embed(images).cpu() for images, _ in load_batches(images, batches, num_workers, device)]
    )
    if num_ranks == 1:
        return features
    everyone = [torch.empty_like(features) for _ in range(num_ranks)]
    dist.all_gather(everyone, features)
    return torch.cat([each[: len(part)] for each, part in zip(everyone, parts, strict=True)])


def _nothing_like(images: LabelledImages, device: torch.device) -> tuple[Tensor, Tensor]:
    image, labels = images.__getitems__([0])
    return image[:0].to(device), labels[:0].to(device)
