"""Which fields of a saved buffer are images, and their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ritornello.records.layout import Field
from ritornello.saving.manifest import Manifest
from ritornello.saving.saved_buffer import SavedRepresentatives

LEAST_PIXELS = 4
"""The least height and width of an image; what is smaller is hardly one."""


def image_position(manifest: Manifest) -> int:
    """The position of the first field that is an image.

    Raises:
        ValueError: there is none.
    """
    fields = manifest.layout.fields if manifest.layout else ()
    for position, field in enumerate(fields):
        if _is_image(field):
            return position
    raise ValueError(
        "no field of the samples is an image (uint8 or floating-point, [C, H, W] with C of 1 or 3, "
        f"or [H, W]): there are {'; '.join(map(str, fields)) or 'no samples yet'}"
    )


def images_of(read: SavedRepresentatives, position: int) -> Tensor:
    """The images ``[n, C, H, W]``, as they were stored."""
    images: Tensor = leaf_of(read, position)
    return images if images.dim() == 4 else images[:, None]


def leaf_of(read: SavedRepresentatives, position: int) -> Tensor:
    """One field of what was read, ``[n, ...]``."""
    leaf: Tensor = read.leaves[position]
    return leaf


def _is_image(field: Field) -> bool:
    shape = field.shape
    if field.form is not None:  # its samples differ in length
        return False
    if field.dtype != torch.uint8 and not field.dtype.is_floating_point:
        return False
    has_channels = len(shape) == 3 and shape[0] in (1, 3)
    return (has_channels or len(shape) == 2) and min(shape[-2:]) >= LEAST_PIXELS
