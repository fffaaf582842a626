"""Data sets that are folders of image files: the files are decoded when they are asked for.

What is decoded is resized (its shorter side) and cropped at the centre, so that all images have
one size and the rehearsal buffer can store them. Random crops come later, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import Arrival, DataSet, LabelledBatch, LabelledImages
from ritornello.experiments.data.decoding import Decoder

Samples = list[tuple[str, int]]
"""File and label."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY_IMAGENET_MEAN, TINY_IMAGENET_STD = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)

HELD_OUT = 10
"""Where an arrival has no test images of its own: every so many-th image of a class becomes one."""


class FileImages(LabelledImages):
    """Image files; decoded when asked for.

    Args:
        samples: file and label of each.
        image_size: images are resized to it (their shorter side) and cropped at the centre.
        num_channels: 3, or 1: shades of grey.
    """

    def __init__(self, samples: Samples, image_size: int, num_channels: int = 3) -> None:
        self.files = [file for file, _ in samples]
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        self._decode = Decoder(image_size, num_channels)

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``.

        Raises:
            ValueError: a file is not an image, or is broken; names the file.
        """
        images = torch.stack([self._decode.file(self.files[index])[0] for index in indices])
        return images, torch.from_numpy(self.labels[np.asarray(indices)])

    def file_of(self, index: int) -> str:
        """See ``LabelledImages``."""
        return self.files[index]


class FolderImages(FileImages):
    """A folder with one folder of image files per class; decoded when asked for.

    Args:
        folder: as for ``torchvision.datasets.ImageFolder``.
        image_size: images are resized to it (their shorter side) and cropped at the centre.

    Raises:
        ValueError: no class folders, or one without images; names it.
    """

    def __init__(self, folder: Path, image_size: int) -> None:
        from torchvision.datasets import ImageFolder

        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ValueError(f"data: {folder}: {error}") from None
        super().__init__(found.samples, image_size)
        self.class_names = tuple(found.classes)


def class_folders(path: Path, image_size: int) -> DataSet:
    """``train/CLASS`` and ``val/CLASS`` or ``test/CLASS``, with the same classes in both."""
    test = _test_folder(path)
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


def tiny_imagenet(path: Path, image_size: int) -> DataSet:
    """Tiny ImageNet as it was published.

    It holds ``train/CLASS/images``, ``val/images`` and ``val/val_annotations.txt``. ``wnids.txt``
    gives the order of the classes; without it they are in the order of their names.
    """
    if not (path / "train").is_dir():
        raise FileNotFoundError(
            f"data: {path} must hold a folder 'train' with CLASS/images, and a folder 'val' with "
            "images and val_annotations.txt, as Tiny ImageNet was published"
        )
    classes = _folder_names(path / "train")
    order = path / "wnids.txt"
    if order.exists():
        listed = order.read_text().split()
        if sorted(listed) != classes:
            odd = sorted(set(listed) ^ set(classes))
            raise ValueError(f"data: {order} and {path / 'train'} differ in classes: {odd}")
        classes = listed
    train = _class_samples(path / "train", classes)
    _check_that_all_occur(path / "train", classes, train)
    return DataSet(
        "tiny-imagenet",
        FileImages(train, image_size),
        FileImages(_annotated_samples(path / "val", classes), image_size),
        tuple(classes),
        TINY_IMAGENET_MEAN,
        TINY_IMAGENET_STD,
    )


def arrivals(path: Path, image_size: int) -> DataSet:
    """A folder of folders that arrived over time, in the order of their names, such as dates.

    An arrival holds ``train/CLASS`` and ``val/CLASS`` or ``test/CLASS``; or one folder per class,
    and every tenth image of a class is held out for testing (of fewer than ten: the last one, as
    long as one is left to train on). The classes are those of all arrivals, sorted by name: an
    arrival may lack classes, or bring new ones.

    Raises:
        FileNotFoundError: no such folder, or nothing arrived.
        ValueError: an arrival without images to train on or to test with, or a class without
            images to train on; names it.
    """
    folders = [path / name for name in _folder_names(path)]
    if not folders:
        raise FileNotFoundError(
            f"data: {path} must hold one folder per arrival, each with one folder of images per "
            "class, or with 'train' and 'val' or 'test'"
        )
    parts = [_parts(folder) for folder in folders]
    classes = sorted(
        {name for part in parts for each in part if each for name in _folder_names(each)}
    )
    train: Samples = []
    test: Samples = []
    found = []
    for folder, (train_folder, test_folder) in zip(folders, parts, strict=True):
        for_training, for_testing = _samples_of(folder, train_folder, test_folder, classes)
        found.append(
            Arrival(
                folder.name,
                len(train) + np.arange(len(for_training)),
                len(test) + np.arange(len(for_testing)),
                str(folder.absolute()),
            )
        )
        train += for_training
        test += for_testing
    _check_that_all_occur(path, classes, train)
    return DataSet(
        path.name,
        FileImages(train, image_size),
        FileImages(test, image_size),
        tuple(classes),
        IMAGENET_MEAN,
        IMAGENET_STD,
        tuple(found),
    )


def one_arrival(path: Path, image_size: int, num_channels: int = 3) -> DataSet:
    """A folder as ``arrivals`` reads several; the classes are its own, sorted by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images to train on or to test with.
    """
    train_folder, test_folder = _parts(path)
    both = [each for each in (train_folder, test_folder) if each]
    classes = sorted({name for each in both for name in _folder_names(each)})
    train, test = _samples_of(path, train_folder, test_folder, classes)
    return DataSet(
        path.name,
        FileImages(train, image_size, num_channels),
        FileImages(test, image_size, num_channels),
        tuple(classes),
        IMAGENET_MEAN,
        IMAGENET_STD,
    )


def _annotated_samples(folder: Path, classes: list[str]) -> Samples:
    """The images of ``folder/images``, whose classes stand in ``val_annotations.txt``."""
    annotations = folder / "val_annotations.txt"
    if not annotations.exists():
        raise FileNotFoundError(
            f"data: there is no file {annotations}: it must hold file, tab, class for each of "
            f"{folder / 'images'} (if there is val/CLASS instead, take data='folder')"
        )
    labels = {name: number for number, name in enumerate(classes)}
    samples = []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        file, name = [*line.split("\t"), ""][:2]
        if name not in labels:
            raise ValueError(
                f"data: {annotations}: line {number} is {line!r}: it must be a file, a tab, and "
                f"one of the {len(classes)} classes"
            )
        samples.append((str(folder / "images" / file), labels[name]))
    odd = {Path(file) for file, _ in samples} ^ set(_image_files(folder / "images"))
    if odd or not samples:
        raise ValueError(
            f"data: {annotations} must have one line for each image of {folder / 'images'}; "
            + (f"only one of them has {min(odd).name}" if odd else "both are empty")
        )
    return samples


def _samples_of(
    arrival: Path, train_folder: Path, test_folder: Path | None, classes: list[str]
) -> tuple[Samples, Samples]:
    """An arrival's samples for training and for testing."""
    for_training = _class_samples(train_folder, classes)
    if test_folder is None:
        for_training, for_testing = _hold_out(for_training)
    else:
        for_testing = _class_samples(test_folder, classes)
    if not for_training:
        raise ValueError(f"data: {train_folder} has no images to train on")
    if not for_testing:
        raise ValueError(
            f"data: {arrival} has no image to test with: a class must have two or more images, "
            "or 'val' or 'test' must hold some"
        )
    return for_training, for_testing


def _parts(arrival: Path) -> tuple[Path, Path | None]:
    """Where an arrival has its training images, and its test images if they are apart."""
    test = _test_folder(arrival)
    # A folder "train" may also be the class of trains: then it holds images, not folders.
    if not (arrival / "train").is_dir() or not _folder_names(arrival / "train"):
        return arrival, None
    if test is None:
        raise ValueError(f"data: {arrival} has a folder 'train', but neither 'val' nor 'test'")
    return arrival / "train", test


def _hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """Samples for training and for testing, out of samples that are sorted by label."""
    labels = np.array([label for _, label in samples], dtype=np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        held_out = positions[HELD_OUT - 1 :: HELD_OUT]
        if len(held_out) == 0 and len(positions) >= 2:
            held_out = positions[-1:]
        is_test[held_out] = True
    return _pick(samples, ~is_test), _pick(samples, is_test)


def _pick(samples: Samples, mask: NDArray[np.bool_]) -> Samples:
    return [sample for sample, picked in zip(samples, mask, strict=True) if picked]


def _class_samples(folder: Path, classes: list[str]) -> Samples:
    """The images below ``folder/CLASS``, by class and then by name; a class may have none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = {name: number for number, name in enumerate(classes)}
    if not labels:
        return []
    samples: Samples = make_dataset(str(folder), labels, IMG_EXTENSIONS, allow_empty=True)
    return sorted(samples, key=lambda sample: sample[1])  # stable: files stay sorted


def _check_that_all_occur(folder: Path, classes: list[str], train: Samples) -> None:
    lacking = sorted(set(classes) - {classes[label] for _, label in train})
    if lacking:
        raise ValueError(f"data: {folder} has no image to train on of {', '.join(lacking)}")
    if not classes:
        raise ValueError(f"data: {folder} has no class folders")


def _image_files(folder: Path) -> list[Path]:
    from torchvision.datasets.folder import is_image_file

    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if is_image_file(each.name))


def _folder_names(folder: Path) -> list[str]:
    """Folders in ``folder``, sorted; hidden ones are no data."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {folder}")
    return sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )


def _test_folder(folder: Path) -> Path | None:
    return next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
