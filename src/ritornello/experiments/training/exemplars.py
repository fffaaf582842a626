"""Exemplars: what the buffer gets when a task has ended, instead of candidates from the stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.data.data_set import DataSet, LabelledImages
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.data.stream import Files, LoadedBatch, TaskImages, load_batches
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies import strategy_named
from ritornello.policies import exemplars
from ritornello.policies.classes.scores import rank_of_exemplar

Ints = NDArray[np.int64]

CHOICES = ("random", "herding", "closest-to-mean")
"""How exemplars are chosen: see ``ritornello.policies.exemplars``."""

BATCH_SIZE = 256
"""Samples that are embedded, or offered, at a time."""

EXEMPLARS = 1_000_005
"""What the random choice of exemplars is keyed by, beside the seed and the task."""


def check(recipe: Recipe, data: DataSet, tasks: Sequence[Task]) -> None:
    """Checks, before anything is trained, that all classes can have exemplars.

    Raises:
        ValueError: the buffer is too small, or would keep those of the first task alone.
    """
    if recipe.offers_stream or not strategy_named(recipe.strategy).rehearses:
        return
    of_tasks = labels_of_tasks(data, tasks)
    num_classes = len(set[int]().union(*of_tasks))
    if recipe.fixed_shares:
        num_classes = data.num_classes
    if recipe.num_stored(len(data.train)) < num_classes:
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


def remember(
    buffer: RehearsalBuffer,
    recipe: Recipe,
    data: DataSet,
    tasks: Sequence[Task],
    embed: Callable[[Tensor], Tensor],
    place: Place,
) -> float:
    """Fills the buffer with exemplars of the task that has ended; all ranks take part.

    Args:
        buffer: to fill.
        recipe: with sizes of all ranks.
        data: its data set.
        tasks: all so far; the last one has ended.
        embed: features of images.
        place: of this rank.

    Returns:
        The seconds that it took to offer them.
    """
    number = len(tasks) - 1
    images = TaskImages(data.train, tasks[number:])
    num_seen = len(set[int]().union(*labels_of_tasks(data, tasks)))
    num_sharing = data.num_classes if recipe.fixed_shares else num_seen
    chosen = choose(
        recipe.remembers,
        images.labels,
        recipe.num_stored(len(data.train)) // num_sharing,
        np.random.default_rng([recipe.seed, number, EXEMPLARS]),
        lambda classes: features_over_ranks(classes, images, embed, place, recipe.num_workers),
    )
    hands = deal(chosen, place.num_ranks)
    began = time.perf_counter()
    store(buffer, images, hands, place, recipe.num_workers)
    return time.perf_counter() - began


def labels_of_tasks(data: DataSet, tasks: Sequence[Task]) -> list[set[int]]:
    """The labels of each task's training samples, which may be more than its own classes.

    For a task whose samples are gone, its classes.
    """
    return [
        set(task.classes)
        if task.num_train_gone
        else set(np.unique(data.train.labels[task.train_indices]).tolist())
        for task in tasks
    ]


def choose(
    how: str,
    labels: Ints,
    num_per_class: int,
    generator: np.random.Generator,
    features_of: Callable[[list[Ints]], Iterable[Tensor]],
) -> dict[int, Ints]:
    """Chooses exemplars of every class of a task, the most important ones first.

    Args:
        how: one of ``CHOICES``.
        labels: int64 ``[n]``, of the task's samples.
        num_per_class: at most so many.
        generator: the same on every rank.
        features_of: gives the features ``[m, d]`` of each class's ``m`` samples in turn; only
            called if needed.

    Returns:
        Label to positions among the task's samples.
    """
    classes = np.unique(labels).tolist()
    members = [np.flatnonzero(labels == label) for label in classes]
    if how == "random":
        orders = [exemplars.at_random(len(own), num_per_class, generator) for own in members]
    else:
        choice = exemplars.herding if how == "herding" else exemplars.closest_to_mean
        orders = [choice(features, num_per_class) for features in features_of(members)]
    return {label: own[order] for label, own, order in zip(classes, members, orders, strict=True)}


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
    buffer: RehearsalBuffer,
    images: LabelledImages,
    hands: list[Ints],
    place: Place,
    num_workers: int,
) -> None:
    """Offers a rank's exemplars; all ranks take part in equally many rounds."""
    num_rounds = -(-max(len(hand) for hand in hands) // BATCH_SIZE)
    parts = [hands[place.rank][i * BATCH_SIZE : (i + 1) * BATCH_SIZE] for i in range(num_rounds)]
    nothing = nothing_like(images, place.device)
    batches = load_batches(images, [part for part in parts if len(part)], num_workers, place.device)
    for part in parts:
        buffer.draw()
        images_and_labels = (next(batches) if len(part) else nothing)[:2]
        buffer.offer(images_and_labels)


def features_over_ranks(
    classes: list[Ints],
    images: LabelledImages,
    embed: Callable[[Tensor], Tensor],
    place: Place,
    num_workers: int,
) -> Iterator[Tensor]:
    """The features ``[n, d]`` of each class's samples, on all ranks; each embeds a part of them."""
    batches = []
    for positions in classes:
        # All ranks embed equally many, as they are gathered; what is too much is cut off below.
        size = -(-len(positions) // place.num_ranks)
        padded = np.resize(positions, size * place.num_ranks)
        own = padded[place.rank * size : (place.rank + 1) * size]
        batches.append(np.array_split(own, -(-size // BATCH_SIZE)))
    loaded = load_batches(
        images, [batch for of_class in batches for batch in of_class], num_workers, place.device
    )
    for positions, of_class in zip(classes, batches, strict=True):
        features = torch.cat([embed(next(loaded)[0]).cpu() for _ in of_class])
        if place.num_ranks > 1:
            everyone = [torch.empty_like(features) for _ in range(place.num_ranks)]
            dist.all_gather(everyone, features)
            features = torch.cat(everyone)
        yield features[: len(positions)]


def nothing_like(images: LabelledImages, device: torch.device) -> LoadedBatch:
    """A mini-batch without samples, of the kind that a data set gives."""
    image, labels, *files = images.__getitems__([0])
    nothing = image[:0].to(device), labels[:0].to(device)
    return LoadedBatch(*nothing, Files.none() if files else None)
