"""Scenarios: how a data set becomes a stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data import DataSet


@dataclass(frozen=True)
class Task:
    """A portion of the stream."""

    name: str
    classes: tuple[int, ...]
    train_indices: NDArray[np.int64]
    """Into ``DataSet.train``."""
    test_indices: NDArray[np.int64]
    """Into ``DataSet.test``."""


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
    if not 1 <= num_tasks <= data.num_classes:
        raise ValueError(
            f"num_tasks={num_tasks}: it must be from 1 to the number of classes of "
            f"{data.name} ({data.num_classes})"
        )
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


def _name(class_names: list[str]) -> str:
    if len(class_names) <= 3:
        return ", ".join(class_names)
    return f"{class_names[0]} to {class_names[-1]} ({len(class_names)} classes)"
