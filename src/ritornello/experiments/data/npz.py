"""Data sets in npz files: images with labels, or with targets that are no classes."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import (
    DataSet,
    InMemoryImages,
    Targets,
    in_memory,
    of_parts,
)


def read_npz(name: str, path: Path) -> DataSet:
    """Reads a file with the arrays of all samples.

    Args:
        name: of the data set; "npz": that of the file.
        path: of a file with ``train_images`` and ``test_images``, and for each of them ``_labels``,
            or ``_targets`` where these are tensors (then perhaps ``_groups``).

    Raises:
        ValueError: content that does not fit; names file and rule.
        FileNotFoundError: no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: {path} is damaged, or no npz file")
    name = path.stem if name == "npz" else name
    with np.load(path, allow_pickle=False) as archive:
        if "train_targets" in archive:
            return _with_targets(name, path, archive)
        parts = [_npz_part(path, archive, part) for part in ("train", "test")]
        num_classes = int(max(labels.max(initial=0) for _, labels in parts)) + 1
        names = tuple(str(number) for number in range(num_classes))
        if "class_names" in archive:
            names = tuple(map(str, archive["class_names"]))
    if len(names) < num_classes:
        raise ValueError(
            f"data: {path} has {len(names)} class_names, but labels up to {num_classes - 1}"
        )
    return in_memory(name, parts[0], parts[1], names)


def _npz_part(path: Path, archive: Any, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    keys = _keys_of_images(path, archive, part, "labels")
    labels = archive[f"{part}_labels"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or np.any(labels < 0):
        raise ValueError(
            f"data: {path}: {part}_labels is {labels.dtype} {list(labels.shape)}: it must be a "
            f"list of non-negative integers; numbers to predict are {part}_targets"
        )
    images = _images(archive, keys)
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


def _with_targets(name: str, path: Path, archive: Any) -> DataSet:
    """A data set whose targets are tensors."""
    train, test = (_part_with_targets(path, archive, part) for part in ("train", "test"))
    images, targets = (tuple(each[place].shape[1:] for each in (train, test)) for place in (0, 1))
    for what, (of_train, of_test) in (("images", images), ("targets", targets)):
        if of_train != of_test:
            raise ValueError(
                f"data: {path}: train_{what} are {list(of_train)} each, but test_{what} "
                f"{list(of_test)}: they must be alike"
            )
    num_groups = int(max(groups.max(initial=0) for _, _, groups in (train, test))) + 1
    names = tuple(str(number) for number in range(num_groups))
    if "group_names" in archive:
        names = tuple(map(str, archive["group_names"]))
    if len(names) < num_groups:
        raise ValueError(
            f"data: {path} has {len(names)} group_names, but groups up to {num_groups - 1}"
        )
    parts = tuple(map(str, archive["target_names"])) if "target_names" in archive else ()
    if parts and len(parts) != targets[0][0]:
        raise ValueError(
            f"data: {path} has {len(parts)} target_names, but targets of {list(targets[0])}: each "
            "name is of what lies at one place of their first axis"
        )
    train_images, test_images = (
        InMemoryImages(images, groups, targets) for images, targets, groups in (train, test)
    )
    return of_parts(name, train_images, test_images, names, Targets(targets[0], parts))


def _part_with_targets(
    path: Path, archive: Any, part: str
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int64]]:
    """Images ``[n, C, H, W]``, targets ``[n, *shape]`` and groups ``[n]``."""
    keys = _keys_of_images(path, archive, part, "targets")
    images = _images(archive, keys)
    is_float = np.issubdtype(images.dtype, np.floating)
    if not (images.dtype == np.uint8 or is_float) or images.ndim not in (2, 3, 4):
        raise ValueError(
            f"data: {path}: {keys[0]} is {images.dtype} {list(images.shape)}: it must be uint8 or "
            "floating-point, [n, height, width], [n, height, width, channels] or [n, features]"
        )
    targets = archive[f"{part}_targets"]
    if not np.issubdtype(targets.dtype, np.floating) or targets.ndim < 1:
        raise ValueError(
            f"data: {path}: {part}_targets is {targets.dtype} {list(targets.shape)}: it must be "
            f"floating-point, [n] or [n, ...]; classes are {part}_labels"
        )
    groups = np.zeros(len(targets), dtype=np.int64)
    if f"{part}_groups" in archive:
        groups = archive[f"{part}_groups"]
    if groups.ndim != 1 or not np.issubdtype(groups.dtype, np.integer) or np.any(groups < 0):
        raise ValueError(
            f"data: {path}: {part}_groups is {groups.dtype} {list(groups.shape)}: it must be a "
            "list of non-negative integers"
        )
    for what, each in (("targets", targets), ("groups", groups)):
        if len(images) != len(each) or len(each) == 0:
            raise ValueError(
                f"data: {path} has {len(images)} {keys[0]} but {len(each)} {part}_{what}"
            )
    for key, each in ((keys[0], images), (f"{part}_targets", targets)):
        if not np.isfinite(each).all():
            raise ValueError(f"data: {path}: {key} holds values that are not finite")
    channels_first = images[:, :, None, None]
    if images.ndim > 2:
        channels_first = np.moveaxis(images[..., None] if images.ndim == 3 else images, 3, 1)
    if is_float:
        channels_first = channels_first.astype(np.float32)
    columns = targets[:, None] if targets.ndim == 1 else targets
    return channels_first, columns.astype(np.float32), groups.astype(np.int64)


def _keys_of_images(path: Path, archive: Any, part: str, what: str) -> list[str]:
    """The arrays that hold a part's images.

    Raises:
        ValueError: one of them is not there, or what is to be predicted.
    """
    keys = [f"{part}_images"]
    if keys[0] not in archive and f"{part}_jpeg" in archive:
        keys = [f"{part}_jpeg", f"{part}_offsets"]
    missing = [key for key in [*keys, f"{part}_{what}"] if key not in archive]
    if missing:
        others = " (or train_targets and test_targets, if they are no classes)"
        raise ValueError(
            f"data: {path} has no {', '.join(missing)}: it must hold {part}_images (or "
            f"{part}_jpeg with {part}_offsets) and {part}_{what}{others * (what == 'labels')}; it "
            f"holds {archive.files}"
        )
    return keys


def _images(archive: Any, keys: list[str]) -> NDArray[Any]:
    """The array of images, or what their JPEG files hold."""
    if len(keys) == 2:
        return _decode_jpegs(archive[keys[0]], archive[keys[1]])
    images: NDArray[Any] = archive[keys[0]]
    return images


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
