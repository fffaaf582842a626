"""What a data set is: images for training and for testing, with what is to be predicted of them.

That is a class, or a tensor (``Targets``). Images stay uint8 ``[C, H, W]`` everywhere; they become
normalised floats on the device, after the mini-batch was joined with representatives
(``augmentation.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

LabelledBatch = tuple[Tensor, Tensor, *tuple[list[bytes], ...]]
"""Images ``[b, C, H, W]`` uint8 and labels ``[b]``; of ``KeptFiles`` with what their files hold."""


class LabelledImages(Dataset[LabelledBatch]):
    """A data set that gives whole mini-batches: images ``[b, C, H, W]`` uint8, labels ``[b]``.

    Where targets are tensors, ``[b, *shape]`` of them take the labels' place in a mini-batch.

    Attributes:
        labels: int64 ``[n]``, known without reading an image; where targets are tensors, the
            group of each sample.
    """

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledBatch:
        """One sample: image ``[C, H, W]`` and label."""
        images, labels, *_ = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """The samples at ``indices``; torch's loaders ask for whole mini-batches by this."""
        raise TypeError(f"{type(self).__name__} must define __getitems__")

    def file_of(self, index: int) -> str:
        """The path of the file that a sample's image is decoded from.

        Raises:
            ValueError: there is none.
        """
        raise ValueError("the images have no files of their own")


class InMemoryImages(LabelledImages):
    """Images in one array.

    Args:
        images: uint8 ``[n, C, H, W]``; beside tensors as targets float32, too; or features.
        labels: int64 ``[n]``, of classes or groups.
        targets: float32 ``[n, *shape]``; None: the labels.
    """

    def __init__(
        self,
        images: NDArray[Any],
        labels: NDArray[np.int64],
        targets: NDArray[np.float32] | None = None,
    ) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = labels
        self._targets = torch.from_numpy(labels if targets is None else targets)

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        index = torch.as_tensor(indices)
        return self.images[index], self._targets[index]


class Relabelled(LabelledImages):
    """Images whose classes have other numbers.

    Args:
        images: with their own labels.
        new_labels: int64 ``[num_classes]``, the new label for each of theirs.
    """

    def __init__(self, images: LabelledImages, new_labels: NDArray[np.int64]) -> None:
        self._images, self._new_labels = images, torch.from_numpy(new_labels)
        self.labels = new_labels[images.labels]

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        images, labels, *_ = self._images.__getitems__(indices)
        return images, self._new_labels[labels]

    def file_of(self, index: int) -> str:
        """See ``LabelledImages``."""
        return self._images.file_of(index)


class Part(LabelledImages):
    """Some of the images of another data set.

    Args:
        images: all.
        indices: int64 ``[n]``, those that are part of it.
    """

    def __init__(self, images: LabelledImages, indices: NDArray[np.int64]) -> None:
        self._images, self._indices = images, indices
        self.labels = images.labels[indices]

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        return self._images.__getitems__(self._indices[np.asarray(indices)].tolist())

    def file_of(self, index: int) -> str:
        """See ``LabelledImages``."""
        return self._images.file_of(int(self._indices[index]))


class Joined(LabelledImages):
    """Several data sets one after another, of images of one shape.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.labels = np.concatenate([part.labels for part in parts])

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        positions = np.asarray(indices, dtype=np.int64)
        owners = self._ends.searchsorted(positions, side="right")
        batches, order = [], []
        for owner in np.unique(owners).tolist():
            asked = np.flatnonzero(owners == owner)
            first = self._ends[owner] - len(self._parts[owner])
            batches.append(self._parts[owner].__getitems__((positions[asked] - first).tolist()))
            order.append(asked)
        places = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        images, labels = (torch.cat(leaves)[places] for leaves in zip(*batches, strict=True))
        return images, labels

    def file_of(self, index: int) -> str:
        """See ``LabelledImages``."""
        owner = int(self._ends.searchsorted(index, side="right"))
        return self._parts[owner].file_of(index - int(self._ends[owner]) + len(self._parts[owner]))


@dataclass(frozen=True)
class Arrival:
    """The samples that arrived together, such as those of one day."""

    name: str
    train_indices: NDArray[np.int64]
    """Into ``DataSet.train``."""
    test_indices: NDArray[np.int64]
    """Into ``DataSet.test``."""
    path: str | None = None
    """The folder that holds them, absolute."""


@dataclass(frozen=True)
class Targets:
    """What is to be predicted of a sample where it is no class: a tensor."""

    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    """Names of what lies along the first axis, if each part has an error of its own."""


@dataclass(frozen=True)
class DataSet:
    """A data set for classification, or for regression in groups."""

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    """Where targets are tensors, the names of the groups."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    arrivals: tuple[Arrival, ...] | None = None
    """In the order of time; None: nothing is known of when the samples arrived."""
    targets: Targets | None = None
    """None: a sample's class."""
    embedded_from: tuple[int, int, int] | None = None
    """``(C, H, W)`` of the images, where what is given of them are features; None: images are."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, or groups."""
        return len(self.class_names)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of what a model says of one sample: a logit for each class, or a target."""
        return (self.num_classes,) if self.targets is None else self.targets.shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        if self.embedded_from is not None:
            return self.embedded_from
        channels, height, width = self.train[0][0].shape
        return channels, height, width


def in_memory(
    name: str,
    train: tuple[NDArray[Any], NDArray[np.int64]],
    test: tuple[NDArray[Any], NDArray[np.int64]],
    class_names: tuple[str, ...],
) -> DataSet:
    """A data set of images ``[n, H, W]`` or ``[n, H, W, C]`` with the labels of their classes."""
    parts = []
    for images, labels in (train, test):
        channels_last = images[..., None] if images.ndim == 3 else images
        parts.append(InMemoryImages(np.moveaxis(channels_last, 3, 1), labels))
    return of_parts(name, parts[0], parts[1], class_names)


def of_parts(
    name: str,
    train: InMemoryImages,
    test: InMemoryImages,
    class_names: tuple[str, ...],
    targets: Targets | None = None,
) -> DataSet:
    """A data set whose pixels are normalised by those of its training images."""
    pixels = train.images.numpy()
    mean = pixels.mean(axis=(0, 2, 3), dtype=np.float64) / 255
    std = pixels.std(axis=(0, 2, 3), dtype=np.float64) / 255
    if targets is not None:
        std[std == 0] = 1  # of a feature that is the same in all samples
    return DataSet(
        name,
        train,
        test,
        class_names,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        targets=targets,
    )
