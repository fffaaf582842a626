"""The mini-batches of a stream: which samples come when, and which of them on which rank."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ritornello.experiments.data.data_set import LabelledBatch, LabelledImages
from ritornello.experiments.data.scenarios import Task
from ritornello.records import accelerators


class Files(NamedTuple):
    """What the images of a mini-batch are decoded from, in CPU memory."""

    contents: list[Tensor]
    """uint8, one for each."""
    labels: Tensor

    @classmethod
    def none(cls) -> Files:
        """Those of no images."""
        return cls([], torch.zeros(0, dtype=torch.int64))


class LoadedBatch(NamedTuple):
    """A mini-batch on the device of the training."""

    images: Tensor
    labels: Tensor
    files: Files | None = None
    """Where these are to be stored."""


class TaskImages(LabelledImages):
    """The samples of some tasks one after another, each as its task sees it.

    Args:
        images: the data set that the tasks' indices point into.
        tasks: at least one.
        testing: their test samples instead of those for training.
    """

    def __init__(
        self, images: LabelledImages, tasks: Sequence[Task], testing: bool = False
    ) -> None:
        parts = [task.test_indices if testing else task.train_indices for task in tasks]
        self._images = images
        self._indices = np.concatenate(parts)
        self._views = [task.view for task in tasks]
        self._task_of_sample = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.labels = images.labels[self._indices]

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        positions = np.asarray(indices)
        images, labels, *files = self._images.__getitems__(self._indices[positions].tolist())
        tasks = self._task_of_sample[positions]
        for number in np.unique(tasks).tolist():
            view = self._views[number]
            if view is not None:
                own = torch.from_numpy(np.flatnonzero(tasks == number))
                images[own] = view(images[own])
        return images, labels, *files


def steps_per_pass(num_samples: int, global_batch_size: int) -> int:
    """Full global mini-batches in one pass; what is left over comes in another one.

    Raises:
        ValueError: not even one.
    """
    if num_samples < global_batch_size:
        raise ValueError(
            f"a task has {num_samples} training samples, fewer than "
            f"global_batch_size={global_batch_size}: take a smaller one"
        )
    return num_samples // global_batch_size


def positions_of_pass(
    num_samples: int, global_batch_size: int, key: Sequence[int], rank: int, num_ranks: int
) -> list[NDArray[np.int64]]:
    """One rank's mini-batches in one pass over a task, as positions among its samples.

    The global mini-batches do not depend on the number of ranks. Ranks have equal parts of them,
    up to one sample.

    Args:
        num_samples: of the task.
        global_batch_size: of all ranks together.
        key: of the shuffling: seed, task, pass.
        rank: whose.
        num_ranks: how many there are.
    """
    num_steps = steps_per_pass(num_samples, global_batch_size)
    order = np.random.default_rng(list(key)).permutation(num_samples)
    whole = order[: num_steps * global_batch_size].reshape(num_steps, global_batch_size)
    return [np.array_split(each, num_ranks)[rank] for each in whole]


def positions_of_passes(
    num_samples: int,
    global_batch_size: int,
    key: Sequence[int],
    rank: int,
    num_ranks: int,
    *,
    num_passes: int,
    first: int = 0,
) -> Iterator[NDArray[np.int64]]:
    """One rank's mini-batches in several passes over a task: see ``positions_of_pass``.

    Args:
        num_samples: of the task.
        global_batch_size: of all ranks together.
        key: of the shuffling, without the pass.
        rank: whose.
        num_ranks: how many there are.
        num_passes: in all, with those that are skipped.
        first: so many mini-batches are left out; they cost nothing.
    """
    first_pass, within = divmod(first, steps_per_pass(num_samples, global_batch_size))
    positions = (
        each
        for number in range(first_pass, num_passes)
        for each in positions_of_pass(
            num_samples, global_batch_size, (*key, number), rank, num_ranks
        )
    )
    return islice(positions, within, None)


def load_batches(
    images: LabelledImages,
    positions: Iterable[NDArray[np.int64]],
    num_workers: int,
    device: torch.device,
) -> Iterator[LoadedBatch]:
    """Loads given mini-batches, in worker processes if there are any, onto a device.

    Starting workers takes seconds: better one call for many passes than one for each. Nothing
    is drawn from torch's global random state, so that a run that goes on in the middle of a task
    draws the same numbers as one that never stopped.
    """
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=(each.tolist() for each in positions),
        collate_fn=_packed,
        num_workers=num_workers,
        pin_memory=accelerators.has_streams(device),
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    for pixels, labels, *packed in loader:
        files = None
        if packed:
            content, lengths = packed
            files = Files(list(content.split(lengths.tolist())), labels)
        yield LoadedBatch(
            pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True), files
        )


def _ignore_signals(worker: int) -> None:
    """Has workers outlive a signal to all processes of a job: the trainer ends them.

    It still needs its next mini-batch to come to the step after which it is saved.
    """
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)


def _packed(batch: Any) -> Any:
    """The data sets give whole mini-batches; what is in files becomes one tensor, and lengths."""
    images, labels, *files = batch
    if not files:
        return images, labels
    [contents] = files
    content = torch.from_numpy(np.frombuffer(bytearray().join(contents), dtype=np.uint8))
    return images, labels, content, torch.tensor([len(each) for each in contents])
