"""What a saved buffer holds, as image files or as arrays for other programs."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.experiments.inspection.image_fields import (
    files_of,
    image_position,
    images_of,
    is_file,
    leaf_of,
)
from ritornello.experiments.inspection.inspection import Inspection
from ritornello.records.layout import Field
from ritornello.saving.saved_buffer import SavedRepresentatives

Array = NDArray[Any]


def check_is_free(path: Path) -> None:
    """Checks that nothing would be overwritten.

    Raises:
        FileExistsError: something is there already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"--export {path}: it exists; give another name, or remove it")


def export(inspection: Inspection, path: Path) -> int:
    """Writes all representatives in whole files; to FILE.npz, or else to a folder.

    Returns:
        How many.

    Raises:
        ValueError: no field is an image, or they cannot be image files.
        FileExistsError: see ``check_is_free``.
    """
    check_is_free(path)
    if path.suffix == ".npz":
        _to_npz(inspection, path)
    else:
        _to_folder(inspection, path)
    return len(inspection.slots)


def array_names(inspection: Inspection) -> list[str]:
    """The name of each field's array.

    The first images are ``train_images``, the class label ``train_labels``, as ``--data FILE.npz``
    reads them; other fields have their keys and indices, ``field_2`` or ``meta.id``.
    """
    manifest = inspection.manifest
    names = []
    try:
        images = image_position(inspection)
    except ValueError:
        images = -1
    for position, field in enumerate(manifest.layout.fields if manifest.layout else ()):
        name = ".".join(map(str, field.path))
        if not name or name.isdecimal():
            name = f"field_{name}"
        if position == images:
            name = "train_images"
        elif position == manifest.label:
            name = "train_labels"
        while name in names or name in ("admitted_in", "task", "class_names"):
            name += "_"
        names.append(re.sub(r"[/\\]", "_", name))
    return names


def _to_folder(inspection: Inspection, folder: Path) -> None:
    """``folder/CLASS/NNN.png``, as ``torchvision.datasets.ImageFolder`` reads it; or the files."""
    if inspection.labels is None:
        raise ValueError(f"--export {folder}: the buffer knows no labels; take a FILE.npz")
    position = image_position(inspection)
    classes, counts = np.unique(inspection.labels, return_counts=True)
    names = _folder_names(inspection, classes.tolist())
    digits = len(str(max(counts.tolist(), default=1)))
    written = Counter[int]()
    for each in _read(inspection):
        assert each.labels is not None
        files = _files(inspection, each, position, folder)
        for label, (content, ending) in zip(each.labels.tolist(), files, strict=True):
            written[label] += 1
            file = folder / names[label] / f"{written[label]:0{digits}}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def _files(
    inspection: Inspection, each: SavedRepresentatives, position: int, path: Path
) -> Iterator[tuple[bytes, str]]:
    """What is in the file of each image, and how its name ends."""
    from PIL import Image

    layout = inspection.manifest.layout
    assert layout is not None
    if is_file(layout.fields[position]):
        yield from files_of(each, position)
        return
    for pixels in _pixels(images_of(each, position), path):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        yield content.getvalue(), "png"


def _folder_names(inspection: Inspection, labels: list[int]) -> dict[int, str]:
    """Names whose order is that of the labels where these have no names of their own."""
    width = len(str(max(labels, default=0)))
    names = {
        label: re.sub(r"[^\w .()+-]", "_", inspection.class_name(label)).lstrip(".")
        for label in labels
    }
    if not inspection.class_names or len({name for name in names.values() if name}) < len(names):
        return {label: f"{label:0{width}}" for label in labels}
    return names


def _pixels(images: torch.Tensor, path: Path) -> NDArray[np.uint8]:
    """Pixels ``[n, H, W]`` or ``[n, H, W, 3]``, for files."""
    if images.dtype != torch.uint8:
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"--export {path}: the images are floating-point and not from 0 to 1, as after a "
                "normalisation, so image files cannot hold them; take a FILE.npz"
            )
        images = (images * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = images.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels[..., 0] if pixels.shape[3] == 1 else pixels


def _to_npz(inspection: Inspection, path: Path) -> None:
    """One array for each field, written piece by piece; see ``array_names``."""
    manifest = inspection.manifest
    fields = manifest.layout.fields if manifest.layout else ()
    ragged = [str(field) for field in fields if field.form is not None]
    if ragged:
        raise ValueError(
            f"--export {path}: {'; '.join(ragged)} differ in length, and no array holds that; "
            "read them with SavedFolder.representatives"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    names = array_names(inspection)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for position, (name, field) in enumerate(zip(names, fields, strict=True)):
            pieces = (_as_array(each, position, name) for each in _read(inspection))
            _write_pieces(archive, name, len(inspection.slots), pieces, _empty(field, name))
        tasks = np.array(["", *(task.name for task in manifest.tasks)], dtype=np.str_)
        further: dict[str, Array] = {
            "admitted_in": inspection.admitted_in,
            "task": tasks[inspection.tasks + 1],
        }
        if inspection.class_names:
            further["class_names"] = np.array(inspection.class_names)
        for name, array in further.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _as_array(each: SavedRepresentatives, position: int, name: str) -> Array:
    """A field of what was read; images with their channels last, or without a single one."""
    leaf = images_of(each, position) if name == "train_images" else leaf_of(each, position)
    if leaf.dtype.is_floating_point and leaf.dtype.itemsize <= 2 and leaf.dtype != torch.float16:
        leaf = leaf.float()  # NumPy has no bfloat16 or float8; nothing is lost
    if name != "train_images":
        return leaf.contiguous().numpy()
    array: Array = leaf.permute(0, 2, 3, 1).contiguous().numpy()
    return array[..., 0] if array.shape[3] == 1 else array


def _empty(field: Field, name: str) -> Array:
    """What ``_as_array`` makes of no samples."""
    leaf = torch.zeros((0, *field.shape), dtype=field.dtype)
    nothing = np.zeros(0, dtype=np.int64)
    return _as_array(SavedRepresentatives(nothing, leaf, None, nothing, nothing, (leaf,)), 0, name)


def _write_pieces(
    archive: zipfile.ZipFile, name: str, num: int, pieces: Iterator[Array], empty: Array
) -> None:
    """Writes one array ``[num, ...]``, never whole in memory."""
    header = {
        "descr": np.lib.format.dtype_to_descr(empty.dtype),
        "fortran_order": False,
        "shape": (num, *empty.shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).data)


def _read(inspection: Inspection) -> Iterator[SavedRepresentatives]:
    """All representatives in whole files, in the order of the inspection."""
    for rank, file in enumerate(inspection.files):
        if not file.damage:
            slots = np.arange(inspection.manifest.held_per_rank[rank])
            yield from inspection.saved.representatives(rank, slots)
