"""The stream of a run that goes on: a new task, and what earlier ones can still be tested with."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import DataSet, Joined, LabelledImages, Relabelled
from ritornello.experiments.data.holdout import held_out
from ritornello.experiments.data.load import load, load_arrival
from ritornello.experiments.data.scenarios import Task, scenario_of
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import Results


@dataclass
class EarlierTasks:
    """The earlier tasks of a run, for testing."""

    tasks: list[Task]
    """All of them, with no samples to train on, and none to test with if these cannot be read."""
    images: list[LabelledImages] = field(default_factory=list)
    """What the tasks' test indices point into, one after another."""
    not_read: dict[int, str] = field(default_factory=dict)
    """Those whose test samples cannot be read, and why."""


def image_shape_of(before: Results) -> tuple[int, int, int]:
    """``(C, H, W)`` of the images of a run."""
    channels, height, width = before["data"]["image_shape"]
    return channels, height, width


def earlier_tasks(before: Results, moved: Sequence[Path], new: Path) -> EarlierTasks:
    """Finds the test samples of all tasks of a run, where they can still be read.

    Args:
        before: the run.
        moved: where data lie now that were moved: they themselves, or the folders that hold them.
        new: what has arrived; no earlier task's data can be there any more.

    Raises:
        ValueError: no task's data have the name of one of ``moved``, or lie in it.
    """
    entries = before["tasks"]
    earlier = EarlierTasks(
        [
            Task(
                entry["name"],
                tuple(entry["classes"]),
                np.zeros(0, dtype=np.int64),
                np.zeros(0, dtype=np.int64),
                path=entry.get("path"),
                num_train_gone=entry["train_samples"],
            )
            for entry in entries
        ]
    )
    places = _places(before, moved)
    by_path: dict[str | None, list[int]] = {}
    for number, entry in enumerate(entries):
        by_path.setdefault(entry.get("path"), []).append(number)
    for path, numbers in by_path.items():
        try:
            if path is not None and (len(numbers) > 1 or places[path].absolute() == new.absolute()):
                raise ValueError(f"{path} holds the data of a later task now")
            found, tasks = _read(before, path, places)
            sizes = [len(task.test_indices) for task in tasks]
            expected = [entries[number]["test_samples"] for number in numbers]
            if sizes != expected:
                raise ValueError(f"there are {sizes} test samples, but there were {expected}")
            labels = _new_labels(found.class_names, before["class_names"])
            _check_all_known(found, labels)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            earlier.not_read |= dict.fromkeys(numbers, str(error))
            continue
        first = sum(map(len, earlier.images))
        earlier.images.append(Relabelled(found.test, labels))
        for number, task in zip(numbers, tasks, strict=True):
            earlier.tasks[number] = replace(
                earlier.tasks[number], test_indices=first + task.test_indices, view=task.view
            )
    return earlier


def with_new_task(
    before: Results, new: DataSet, name: str, path: Path, earlier: EarlierTasks
) -> tuple[DataSet, list[Task]]:
    """The data set and the tasks of a run that goes on; classes are matched by their names.

    Args:
        before: the run so far.
        new: what has arrived.
        name: of the new task.
        path: of what has arrived.
        earlier: its earlier tasks.

    Raises:
        ValueError: a new class without images to train on.
    """
    known = tuple(before["class_names"])
    trained, tested = (
        {new.class_names[label] for label in np.unique(part.labels)}
        for part in (new.train, new.test)
    )
    if lacking := sorted(tested - trained - set(known)):
        raise ValueError(f"data: {path} has no image to train on of {', '.join(lacking)}")
    class_names = known + tuple(
        each for each in new.class_names if each in trained and each not in known
    )
    labels = _new_labels(new.class_names, class_names)
    train = Relabelled(new.train, labels)
    first = sum(map(len, earlier.images))
    task = Task(
        name,
        tuple(np.unique(train.labels).tolist()),
        np.arange(len(new.train)),
        first + np.arange(len(new.test)),
        path=str(path.absolute()),
    )
    data = DataSet(
        new.name,
        train,
        Joined([*earlier.images, Relabelled(new.test, labels)]),
        class_names,
        tuple(before["data"]["mean"]),
        tuple(before["data"]["std"]),
    )
    return data, [*earlier.tasks, task]


def _read(before: Results, path: str | None, places: dict[str, Path]) -> tuple[DataSet, list[Task]]:
    """The data of a task that has a place of its own, or of all tasks that have none.

    Raises:
        OSError, ValueError: they cannot be read, or are others.
    """
    recipe = Recipe.from_results(before["config"])
    if path is not None:
        data = held_out(load_arrival(places[path], image_shape_of(before)), recipe.holdout)
        task = Task("", (), np.zeros(0, dtype=np.int64), np.arange(len(data.test)))
        return data, [task]
    path = before["data"]["path"]
    if path is not None and not places[path].exists():  # which might be downloaded otherwise
        raise FileNotFoundError(f"there is no {places[path]}")
    data = load(recipe.data, None if path is None else str(places[path]), recipe.image_size)
    if data.image_shape != image_shape_of(before):
        raise ValueError("the images have another shape")
    data = held_out(data, recipe.holdout)
    return data, scenario_of(data, recipe)


def _places(before: Results, moved: Sequence[Path]) -> dict[str, Path]:
    """Where each path of the data is now."""
    paths = {entry.get("path") or before["data"]["path"] for entry in before["tasks"]} - {None}
    places = {path: Path(path) for path in paths}
    for each in moved:
        found = {
            path: place
            for path in paths
            for place in (each, each / Path(path).name)
            if place.name == Path(path).name and place.exists()
        }
        if not found:
            names = sorted(Path(path).name for path in paths)
            raise ValueError(
                f"--test {each}: no data of an earlier task have that name, or are in it: they are "
                f"named {', '.join(names)}"
            )
        places |= found
    return places


def _new_labels(class_names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """The labels that classes have among the known ones; -1: in none."""
    labels = {name: label for label, name in enumerate(known)}
    return np.array([labels.get(name, -1) for name in class_names], dtype=np.int64)


def _check_all_known(data: DataSet, labels: NDArray[np.int64]) -> None:
    unknown = [data.class_names[each] for each in np.unique(data.test.labels) if labels[each] < 0]
    if unknown:
        raise ValueError(f"it has the classes {', '.join(unknown)}, which the run did not know")
