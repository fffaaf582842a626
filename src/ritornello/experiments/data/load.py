"""Data sets by name or path: digits, MNIST, CIFAR, npz files and folders of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ritornello.experiments.data import diffraction
from ritornello.experiments.data.data_set import (
    Arrival,
    DataSet,
    InMemoryImages,
    LabelledBatch,
    LabelledImages,
    in_memory,
)
from ritornello.experiments.data.folders import (
    FileImages,
    FolderImages,
    arrivals,
    class_folders,
    one_arrival,
    tiny_imagenet,
)
from ritornello.experiments.data.npz import read_npz

__all__ = [
    "Arrival",
    "DataSet",
    "FileImages",
    "FolderImages",
    "InMemoryImages",
    "LabelledBatch",
    "LabelledImages",
    "load",
    "load_arrival",
]

FOLDERS: dict[str, tuple[Callable[[Path, int], DataSet], int]] = {
    "folder": (class_folders, 224),
    "imagenet": (class_folders, 256),
    "tiny-imagenet": (tiny_imagenet, 64),
    "arrivals": (arrivals, 224),
}
"""Data sets whose images are decoded from files: how to read them, and their image_size if none
is given. ImageNet's is above the usual 224, so that random crops have something to choose from."""

OF_OBJECTS = ("digits", "mnist", "cifar10", "cifar100", "npz")
"""Data sets whose images become objects of diffraction patterns, with ``diffraction.SUFFIX``."""

NAMES = (*OF_OBJECTS, *FOLDERS, *(name + diffraction.SUFFIX for name in OF_OBJECTS))


def load(name: str, path: str | None = None, image_size: int | None = None) -> DataSet:
    """Loads a data set.

    Args:
        name: one of ``NAMES``:
            "digits" is embedded in scikit-learn;
            "mnist", "cifar10", "cifar100" are torchvision's, downloaded if need be;
            "npz" is a file with the arrays of all images;
            "folder" holds ``train/CLASS`` and ``val/CLASS`` or ``test/CLASS``;
            "imagenet" is the same, stored somewhat larger than models take it;
            "tiny-imagenet" is the folder as it was published;
            "arrivals" is a folder of folders that arrived over time (``folders.arrivals``);
            with "-diffraction" behind it: diffraction patterns of objects made from its images, to
            find the objects from (``diffraction``).
        path: an npz file, which then takes the place of a download; the folder; else where
            torchvision keeps its files (``data`` if not given).
        image_size: of folders: what is decoded is resized (its shorter side) and cropped at
            the centre to it; None: see ``FOLDERS``. Of diffraction patterns their height and width.

    Raises:
        ValueError: unknown name, or content that does not fit; names file and rule.
        FileNotFoundError: no such file or folder.
        ConnectionError: a download failed; says what to do instead.
    """
    if name in NAMES and name.endswith(diffraction.SUFFIX):
        objects = load(name.removesuffix(diffraction.SUFFIX), path)
        return diffraction.simulated(objects, image_size)
    if path is not None and path.endswith(".npz"):
        return read_npz(name, Path(path))
    if name == "digits":
        return _digits()
    if name in ("mnist", "cifar10", "cifar100"):
        return _torchvision(name, path or "data")
    if name not in NAMES:
        raise ValueError(f"data={name!r}: there are {', '.join(map(repr, NAMES))}")
    if path is None:
        raise ValueError(f"data={name!r} needs a path: --data PATH")
    if name == "npz":
        raise ValueError(f"data='npz': {path} does not end with .npz")
    read, usual_size = FOLDERS[name]
    return read(Path(path), usual_size if image_size is None else image_size)


def load_arrival(path: Path, image_shape: tuple[int, int, int]) -> DataSet:
    """Loads what has arrived together, as images of the same shape as those before.

    Args:
        path: an npz file, or a folder with ``train/CLASS`` and ``val/CLASS`` or ``test/CLASS``, or
            with one folder per class, of which every tenth image is held out for testing.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: content that does not fit; names file and rule.
        FileNotFoundError: no such file or folder.
    """
    channels, height, width = image_shape
    if path.suffix == ".npz":
        data = read_npz("npz", path)
        if data.image_shape != image_shape:
            raise ValueError(
                f"data: {path} has images of {_shape_text(data.image_shape)}, but those before "
                f"are of {_shape_text(image_shape)}: they must be alike"
            )
        return data
    if height != width or channels not in (1, 3):
        raise ValueError(
            f"data: {path}: images of files are square and have 1 or 3 channels, but those before "
            f"are of {_shape_text(image_shape)}: give an npz file"
        )
    return one_arrival(path, height, channels)


def _shape_text(image_shape: tuple[int, int, int]) -> str:
    channels, height, width = image_shape
    return f"{height} x {width} with {channels} channel{'s' if channels > 1 else ''}"


def _digits() -> DataSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    # Every fourth sample of each class is for testing.
    order = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[order[::4]] = True
    return in_memory(
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
    return in_memory(name, arrays[0], arrays[1], tuple(train.classes))
