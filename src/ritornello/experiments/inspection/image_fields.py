"""Which fields of a saved buffer are images, or the files of images, and what is in them."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ritornello.experiments.inspection.inspection import Inspection
from ritornello.records.layout import Field
from ritornello.records.ragged import Ragged
from ritornello.saving.saved_buffer import SavedRepresentatives

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
"""How names of files end, by what Pillow calls their content, where that is not the same."""

LEAST_PIXELS = 4
"""The least height and width of an image; what is smaller is hardly one."""


def image_position(inspection: Inspection) -> int:
    """The position of the first field that is an image, or else of the first that is a file.

    Raises:
        ValueError: there is none.
    """
    if inspection.stores == "features":
        raise ValueError(
            "the run stores features, of which there are no pictures: they can be exported to a "
            "FILE.npz"
        )
    layout = inspection.manifest.layout
    fields = layout.fields if layout else ()
    for is_one in (_is_image, is_file):
        for position, field in enumerate(fields):
            if is_one(field):
                return position
    there_are = "; ".join(map(str, fields)) or "no samples yet"
    raise ValueError(
        "no field of the samples is an image (uint8 or floating-point, [C, H, W] with C of 1 or 3, "
        f"or [H, W]), or a file of one (uint8 [length]): there are {there_are}"
    )


def images_of(read: SavedRepresentatives, position: int) -> Tensor:
    """The images ``[n, C, H, W]``, as they were stored."""
    images: Tensor = leaf_of(read, position)
    return images if images.dim() == 4 else images[:, None]


def leaf_of(read: SavedRepresentatives, position: int) -> Tensor:
    """One field of what was read, ``[n, ...]``."""
    leaf: Tensor = read.leaves[position]
    return leaf


def is_file(field: Field) -> bool:
    """Whether a field may be what is in files."""
    return field.form is not None and field.dtype == torch.uint8 and not field.shape


def files_of(read: SavedRepresentatives, position: int) -> list[tuple[bytes, str]]:
    """What is in the images' files, and how such files' names end.

    Raises:
        ValueError: one is no image.
    """
    from PIL import Image, UnidentifiedImageError

    files = Ragged.of(leaf_of(read, position))
    assert files is not None
    found = []
    for number, slot in enumerate(read.slots.tolist()):
        content = files.data(number).tobytes()
        try:
            with Image.open(io.BytesIO(content)) as image:
                kind = str(image.format)
        except UnidentifiedImageError:
            raise ValueError(
                f"the field of bytes of the representative in slot {slot} holds no image file: "
                f"it begins with {content[:8]!r}"
            ) from None
        found.append((content, ENDINGS.get(kind, kind.lower())))
    return found


def _is_image(field: Field) -> bool:
    shape = field.shape
    if field.form is not None:  # its samples differ in length
        return False
    if field.dtype != torch.uint8 and not field.dtype.is_floating_point:
        return False
    has_channels = len(shape) == 3 and shape[0] in (1, 3)
    return (has_channels or len(shape) == 2) and min(shape[-2:]) >= LEAST_PIXELS
