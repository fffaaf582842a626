"""Scenarios: how a data set becomes a stream of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.recipes.recipe import Recipe

# What a random stream is for; with the seed, its key. Large: the trainer's streams are keyed by
# the seed and small numbers.
_CLASS_ORDER, _PIXELS, _PARTS, _BLUR = range(1_000_001, 1_000_005)


@dataclass(frozen=True)
class Task:
    """A portion of the stream."""

    name: str
    classes: tuple[int, ...]
    """Those that the task is about; the samples may be of others too, if they are blurry."""
    train_indices: NDArray[np.int64]
    """Into ``DataSet.train``."""
    test_indices: NDArray[np.int64]
    """Into ``DataSet.test``."""
    view: Callable[[Tensor], Tensor] | None = None
    """How the task sees the images, uint8 ``[b, C, H, W]``; None: as they are. It is the same for
    every sample, and applied before anything is offered to the buffer."""
    path: str | None = None
    """Where its samples are, absolute, if each task has a place of its own."""
    num_train_gone: int = 0
    """Training samples that were learnt in an earlier run, and are not at hand."""

    @property
    def num_train(self) -> int:
        """Training samples, also those that are gone."""
        return len(self.train_indices) + self.num_train_gone


def class_incremental(
    data: DataSet, num_tasks: int, class_order: Sequence[int] | None = None
) -> list[Task]:
    """Splits the classes over tasks; each task brings classes that were never seen before.

    Labels stay as they are: one head for all classes. If the classes do not divide evenly,
    the first tasks get one more.

    Args:
        data: the data set.
        num_tasks: at most the number of classes.
        class_order: all classes in the order of their arrival; None: ascending.

    Raises:
        ValueError: more tasks than classes, or an order that is no permutation of the classes.
    """
    _check_num_tasks(num_tasks, data.num_classes, f"classes of {data.name}")
    order = list(range(data.num_classes) if class_order is None else class_order)
    if sorted(order) != list(range(data.num_classes)):
        raise ValueError(
            f"class_order={order}: it must hold each class from 0 to {data.num_classes - 1} once"
        )
    return [
        Task(
            name=_name([data.class_names[each] for each in classes]),
            classes=tuple(classes.tolist()),
            train_indices=np.flatnonzero(np.isin(data.train.labels, classes)),
            test_indices=np.flatnonzero(np.isin(data.test.labels, classes)),
        )
        for classes in np.array_split(np.array(order), num_tasks)
    ]


def group_incremental(
    data: DataSet, num_tasks: int, group_order: Sequence[int] | None = None
) -> list[Task]:
    """As ``class_incremental``, of groups of samples whose targets are tensors.

    Raises:
        ValueError: as there.
    """
    _check_num_tasks(num_tasks, data.num_classes, f"groups of {data.name}")
    return class_incremental(data, num_tasks, group_order)


def task_mask(tasks: Sequence[Task], num_classes: int) -> Tensor:
    """Which outputs compete for a sample whose task is known: those of its task's classes.

    Returns:
        bool ``[num_classes, num_classes]``, row: label, column: output.
    """
    mask = torch.zeros(num_classes, num_classes, dtype=torch.bool)
    for task in tasks:
        classes = torch.tensor(task.classes)
        mask[classes[:, None], classes] = True
    return mask


def permuted(data: DataSet, num_tasks: int, seed: int) -> list[Task]:
    """All samples in every task, each time with the pixels in another order.

    The order is the same for all channels, and in the first task that of the images.
    """
    _check_num_tasks(num_tasks)
    _, height, width = data.image_shape
    tasks = [_everything(data, "as they are")]
    for number in range(1, num_tasks):
        generator = np.random.default_rng([seed, _PIXELS, number])
        order = torch.from_numpy(generator.permutation(height * width))
        view = partial(permute_pixels, order=order)
        tasks.append(replace(tasks[0], name=f"permutation {number}", view=view))
    return tasks


def rotated(data: DataSet, num_tasks: int) -> list[Task]:
    """All samples in every task, each time rotated further: from 0 to below 180 degrees."""
    _check_num_tasks(num_tasks)
    tasks = [_everything(data, "as they are")]
    for number in range(1, num_tasks):
        degrees = number * 180 / num_tasks
        view = partial(rotate, degrees=degrees)
        tasks.append(replace(tasks[0], name=f"by {degrees:g} degrees", view=view))
    return tasks


def permute_pixels(images: Tensor, order: Tensor) -> Tensor:
    """Pixel ``i`` of the result is pixel ``order[i]`` of the image, in all channels."""
    return images.flatten(2)[..., order].view(images.shape)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotates counter-clockwise about the centre, bilinear; what comes in from outside is black."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    rotated_images: Tensor = functional.rotate(
        images, degrees, interpolation=InterpolationMode.BILINEAR
    )
    return rotated_images


def instance_incremental(data: DataSet, num_tasks: int, seed: int) -> list[Task]:
    """All classes in every task: the samples of each are split evenly and at random.

    The test samples are split as well: every one is in exactly one task.
    """
    at_most = min(len(data.train), len(data.test))
    _check_num_tasks(num_tasks, at_most, f"samples of {data.name}'s smaller part")
    generator = np.random.default_rng([seed, _PARTS])
    parts = []
    for labels in (data.train.labels, data.test.labels):
        task_of = np.empty(len(labels), dtype=np.int64)
        task_of[_shuffled_by_class(generator, labels)] = np.arange(len(labels)) % num_tasks
        parts.append(task_of)
    everything = _everything(data, "")
    return [
        replace(
            everything,
            name=f"part {number + 1}",
            train_indices=np.flatnonzero(parts[0] == number),
            test_indices=np.flatnonzero(parts[1] == number),
        )
        for number in range(num_tasks)
    ]


def blurry(
    data: DataSet,
    num_tasks: int,
    class_order: Sequence[int] | None,
    blur: float,
    seed: int,
) -> list[Task]:
    """As ``class_incremental``, but some of a task's samples are of the other tasks' classes.

    The share ``blur`` of every class is taken at random out of its own task and spread evenly over
    the others. Where tasks have equally many samples, it is also the share of a task's samples
    that are of others' classes. Every training sample is in exactly one task. A task is tested on
    its own classes.

    Source: Bang et al., "Rainbow Memory" (CVPR 2021).

    Raises:
        ValueError: as ``class_incremental``, and for a single task.
    """
    tasks = class_incremental(data, num_tasks, class_order)
    if num_tasks == 1:
        raise ValueError("num_tasks=1: scenario='blurry' must have at least 2 tasks")
    generator = np.random.default_rng([seed, _BLUR])
    task_of = np.empty(len(data.train), dtype=np.int64)
    for number, task in enumerate(tasks):
        shuffled = _shuffled_by_class(generator, data.train.labels[task.train_indices])
        mine = task.train_indices[shuffled]
        # Those that leave stand at even distances, so that every class has its share of them.
        leaves = np.diff(np.floor(np.arange(len(mine) + 1) * blur + 0.5)) > 0
        task_of[mine] = number
        task_of[mine[leaves]] = (number + 1 + np.arange(leaves.sum()) % (num_tasks - 1)) % num_tasks
    return [
        replace(task, train_indices=np.flatnonzero(task_of == number))
        for number, task in enumerate(tasks)
    ]


def by_arrival(data: DataSet) -> list[Task]:
    """One task per arrival, in the order of time.

    Raises:
        ValueError: nothing is known of when the samples arrived.
    """
    if data.arrivals is None:
        raise ValueError(
            f"scenario='arrivals' needs a data set that knows when its samples arrived, but "
            f"{data.name} does not: take data='arrivals'"
        )
    return [
        Task(
            arrival.name,
            tuple(np.unique(data.train.labels[arrival.train_indices]).tolist()),
            arrival.train_indices,
            arrival.test_indices,
            path=arrival.path,
        )
        for arrival in data.arrivals
    ]


def _by_class(data: DataSet, recipe: Recipe) -> list[Task]:
    return class_incremental(data, recipe.num_tasks, class_order(data, recipe))


SCENARIOS: dict[str, Callable[[DataSet, Recipe], list[Task]]] = {
    "class-incremental": _by_class,
    "task-incremental": _by_class,
    "group-incremental": lambda data, recipe: group_incremental(
        data, recipe.num_tasks, class_order(data, recipe)
    ),
    "domain-incremental-permuted": lambda data, recipe: permuted(
        data, recipe.num_tasks, recipe.seed
    ),
    "domain-incremental-rotated": lambda data, recipe: rotated(data, recipe.num_tasks),
    "instance-incremental": lambda data, recipe: instance_incremental(
        data, recipe.num_tasks, recipe.seed
    ),
    "blurry": lambda data, recipe: blurry(
        data, recipe.num_tasks, class_order(data, recipe), recipe.blur, recipe.seed
    ),
    "arrivals": lambda data, recipe: by_arrival(data),
}
"""Scenario to what makes its tasks.

"class-incremental": each task brings new classes. "task-incremental": the same tasks, but the
model is told a sample's task, in training and in testing (``task_mask``). "group-incremental":
each task brings new groups of samples, whose targets are tensors.
"domain-incremental-permuted", "domain-incremental-rotated": all classes in every task, each time
seen differently. "instance-incremental": all classes in every task, each time other samples.
"blurry": as class-incremental, without clear borders. "arrivals": as the data arrived; the number
of tasks is that of the arrivals, whatever ``num_tasks`` says.

Online learning, where each sample is seen once, is no scenario of its own: it is ``epochs=1`` in
any of them.
"""


IN_CLASS_ORDER = ("class-incremental", "task-incremental", "group-incremental", "blurry")
"""Scenarios that bring classes (or groups) one after another, so that their order matters."""


def scenario_of(data: DataSet, recipe: Recipe) -> list[Task]:
    """The tasks of a recipe.

    Raises:
        ValueError: no such scenario, or one that does not fit the data; names the setting.
    """
    if recipe.scenario not in SCENARIOS:
        raise ValueError(f"scenario={recipe.scenario!r}: there are {', '.join(SCENARIOS)}")
    if data.targets is None and recipe.predicts_tensors:
        raise ValueError(
            f"loss={recipe.loss!r} is for targets that are tensors, but those of {data.name} are "
            "classes: take loss='cross-entropy', or data with train_targets"
        )
    if data.targets is not None and not recipe.predicts_tensors:
        raise ValueError(
            f"loss={recipe.loss!r} is for classes, but the targets of {data.name} are tensors of "
            f"{list(data.targets.shape)}: take the recipe 'regression', or loss='mae' or 'mse'"
        )
    return SCENARIOS[recipe.scenario](data, recipe)


def class_order(data: DataSet, recipe: Recipe) -> tuple[int, ...] | None:
    """The classes as they arrive; None: ascending.

    Raises:
        ValueError: a word other than "by-seed".
    """
    order = recipe.class_order
    if order == "by-seed":
        order = recipe.seed
    if isinstance(order, int):
        generator = np.random.default_rng([order, _CLASS_ORDER])
        return tuple(generator.permutation(data.num_classes).tolist())
    if isinstance(order, str):
        raise ValueError(f"class_order={order!r}: it must be 'by-seed', or hold each class once")
    return order


def _everything(data: DataSet, name: str) -> Task:
    return Task(
        name, tuple(range(data.num_classes)), np.arange(len(data.train)), np.arange(len(data.test))
    )


def _shuffled_by_class(
    generator: np.random.Generator, labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Positions of all labels, by class, and within a class in random order."""
    order = generator.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _check_num_tasks(num_tasks: int, at_most: int | None = None, of_what: str = "") -> None:
    if num_tasks < 1 or (at_most is not None and num_tasks > at_most):
        rule = "at least 1" if at_most is None else f"from 1 to the number of {of_what} ({at_most})"
        raise ValueError(f"num_tasks={num_tasks}: it must be {rule}")


def _name(class_names: list[str]) -> str:
    if len(class_names) <= 3:
        return ", ".join(class_names)
    return f"{class_names[0]} to {class_names[-1]} ({len(class_names)} classes)"
