"""What a data set is: labelled images for training and for testing.

Images stay uint8 ``[C, H, W]`` everywhere; they become normalised floats on the device, after
the mini-batch was joined with representatives (``augmentation.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

LabelledBatch = tuple[Tensor, Tensor, *tuple[list[bytes], ...]]
"""Images ``[b, C, H, W]`` uint8 and labels ``[b]``; of ``KeptFiles`` with what their files hold."""


class LabelledImages(Dataset[LabelledBatch]):
    """A data set that gives whole mini-batches: images ``[b, C, H, W]`` uint8, labels ``[b]``.

    Attributes:
        labels: int64 ``[n]``, known without reading an image.
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
        images: uint8 ``[n, C, H, W]``.
        labels: int64 ``[n]``.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = labels
        self._labels = torch.from_numpy(labels)

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``."""
        index = torch.as_tensor(indices)
        return self.images[index], self._labels[index]


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
class DataSet:
    """A data set for classification."""

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    arrivals: tuple[Arrival, ...] | None = None
    """In the order of time; None: nothing is known of when the samples arrived."""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.train[0][0].shape
        return channels, height, width
