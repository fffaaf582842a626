"""Data sets by name or path: digits, MNIST, CIFAR, npz files and folders of images.

Images stay uint8 ``[C, H, W]`` everywhere; they become normalised floats on the device, after
the mini-batch was joined with representatives (``train.py``).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LabelledImages(Dataset[Batch]):
    """A data set that gives whole mini-batches: images ``[b, C, H, W]`` uint8, labels ``[b]``.

    Attributes:
        labels: int64 ``[n]``, known without reading an image.
    """

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One sample: image ``[C, H, W]`` and label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at ``indices``; torch's loaders ask for whole mini-batches by this."""
        raise TypeError(f"{type(self).__name__} must define __getitems__")


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

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """See ``LabelledImages``."""
        index = torch.as_tensor(indices)
        return self.images[index], self._labels[index]


class FolderImages(LabelledImages):
    """A folder with one folder of image files per class; decoded when asked for.

    Args:
        folder: as for ``torchvision.datasets.ImageFolder``.
        image_size: images are resized to it and cropped at the centre.
    """

    def __init__(self, folder: Path, image_size: int) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        transform = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
        try:
            self._folder = ImageFolder(str(folder), transform)
        except FileNotFoundError as error:
            raise ValueError(f"data: {folder}: {error}") from None
        self.class_names = tuple(self._folder.classes)
        self.labels = np.array(self._folder.targets, dtype=np.int64)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """See ``LabelledImages``."""
        images = torch.stack([self._folder[int(index)][0] for index in indices])
        return images, torch.from_numpy(self.labels[np.asarray(indices)])


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

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.train[0][0].shape
        return channels, height, width


def load(name: str, path: str | None = None, image_size: int | None = None) -> DataSet:
    """Loads a data set.

    Args:
        name: "digits" (embedded in scikit-learn), "mnist", "cifar10", "cifar100" (torchvision;
            downloaded if need be), "npz" or "folder".
        path: an npz file, which then takes the place of a download; a folder with ``train``
            and ``val`` or ``test`` for "folder"; else where torchvision keeps its files
            (``data`` if not given).
        image_size: for "folder" only; 224 if not given.

    Raises:
        ValueError: unknown name, or content that does not fit; names file and key.
        FileNotFoundError: no such file or folder.
        ConnectionError: a download failed; says what to do instead.
    """
    if path is not None and path.endswith(".npz"):
        return _npz(name, Path(path))
    if name == "digits":
        return _digits()
    if name in ("mnist", "cifar10", "cifar100"):
        return _torchvision(name, path or "data")
    if name in ("npz", "folder") and path is None:
        raise ValueError(f"data={name!r} needs a path: --data PATH")
    if name == "npz":
        raise ValueError(f"data='npz': {path} does not end with .npz")
    if name == "folder":
        return _folder(Path(str(path)), image_size or 224)
    raise ValueError(
        f"data={name!r}: there are 'digits', 'mnist', 'cifar10', 'cifar100', 'npz', 'folder'"
    )


def _digits() -> DataSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    # Every fourth sample of each class is for testing.
    order = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[order[::4]] = True
    return _in_memory(
        "digits",
        (images[~is_test], labels[~is_test]),
        (images[is_test], labels[is_test]),
        tuple("0123456789"),
    )


def _torchvision(name: str, folder: str) -> DataSet:
    from torchvision import datasets

    maker = {
        "mnist": datasets.MNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[name]
    try:
        train, test = (maker(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"data={name!r} could not be downloaded to {folder!r} ({error}). Put torchvision's "
            "files there, or give an npz file with train_images, train_labels, test_images and "
            "test_labels: --data FILE.npz"
        ) from error
    arrays = [
        (np.asarray(part.data), np.asarray(part.targets, dtype=np.int64)) for part in (train, test)
    ]
    return _in_memory(name, arrays[0], arrays[1], tuple(train.classes))


def _npz(name: str, path: Path) -> DataSet:
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {path}")
    with np.load(path, allow_pickle=False) as archive:
        parts = [_npz_part(path, archive, part) for part in ("train", "test")]
        num_classes = int(max(labels.max(initial=0) for _, labels in parts)) + 1
        names = tuple(str(number) for number in range(num_classes))
        if "class_names" in archive:
            names = tuple(map(str, archive["class_names"]))
    if len(names) < num_classes:
        raise ValueError(
            f"data: {path} has {len(names)} class_names, but labels up to {num_classes - 1}"
        )
    return _in_memory(path.stem if name == "npz" else name, parts[0], parts[1], names)


def _npz_part(path: Path, archive: Any, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    keys = [f"{part}_images"]
    if keys[0] not in archive:
        keys = [f"{part}_jpeg", f"{part}_offsets"]
    missing = [key for key in [*keys, f"{part}_labels"] if key not in archive]
    if missing:
        raise ValueError(
            f"data: {path} has no {', '.join(missing)}: it must hold {part}_images (or "
            f"{part}_jpeg with {part}_offsets) and {part}_labels; it holds {archive.files}"
        )
    labels = archive[f"{part}_labels"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or np.any(labels < 0):
        raise ValueError(
            f"data: {path}: {part}_labels is {labels.dtype} {list(labels.shape)}: it must be a "
            "list of non-negative integers"
        )
    if len(keys) == 2:
        images = _decode_jpegs(archive[keys[0]], archive[keys[1]])
    else:
        images = archive[keys[0]]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"data: {path}: {keys[0]} is {images.dtype} {list(images.shape)}: it must be uint8 "
            "[n, height, width] or [n, height, width, channels]"
        )
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"data: {path} has {len(images)} {keys[0]} but {len(labels)} {part}_labels"
        )
    return images, labels.astype(np.int64)


def _decode_jpegs(stream: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Decodes JPEG files that stand one after another in ``stream``."""
    from PIL import Image

    def decode(number: int) -> NDArray[np.uint8]:
        with Image.open(
            io.BytesIO(stream[offsets[number] : offsets[number + 1]].tobytes())
        ) as image:
            return np.asarray(image)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(decode, range(len(offsets) - 1), chunksize=256)))


def _folder(path: Path, image_size: int) -> DataSet:
    test = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise FileNotFoundError(
            f"data: {path} must hold a folder 'train' and a folder 'val' or 'test', each with "
            "one folder of images per class"
        )
    train_images, test_images = (FolderImages(each, image_size) for each in (path / "train", test))
    if train_images.class_names != test_images.class_names:
        odd = set(train_images.class_names) ^ set(test_images.class_names)
        raise ValueError(f"data: {path / 'train'} and {test} differ in classes: {sorted(odd)}")
    return DataSet(
        path.name, train_images, test_images, train_images.class_names, IMAGENET_MEAN, IMAGENET_STD
    )


def _in_memory(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    class_names: tuple[str, ...],
) -> DataSet:
    """A data set of images ``[n, H, W]`` or ``[n, H, W, C]``."""
    parts = []
    for images, labels in (train, test):
        channels_last = images[..., None] if images.ndim == 3 else images
        parts.append(InMemoryImages(np.moveaxis(channels_last, 3, 1), labels))
    pixels = parts[0].images.numpy()
    mean = pixels.mean(axis=(0, 2, 3), dtype=np.float64) / 255
    std = pixels.std(axis=(0, 2, 3), dtype=np.float64) / 255
    return DataSet(name, parts[0], parts[1], class_names, tuple(mean.tolist()), tuple(std.tolist()))
