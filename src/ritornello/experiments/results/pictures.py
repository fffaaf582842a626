"""Pictures of what a model predicts beside the truth, where both are images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDES = (4, 256)
"""Height and width of what is worth a picture, and not too large to be written down."""

MOST_PARTS = 4
"""Images of one target that are shown."""

MOST_TASKS = 10
"""Tasks that are shown one sample of."""


def names_of_images(shape: Sequence[int], parts: Sequence[str]) -> list[str]:
    """The images in a target of a shape; none if it holds no images.

    Args:
        shape: ``(H, W)``, or ``(n, H, W)`` of n images.
        parts: their names, if they have any.
    """
    if len(shape) not in (2, 3) or not all(SIDES[0] <= side <= SIDES[1] for side in shape[-2:]):
        return []
    if len(shape) == 2:
        return ["target"]
    if shape[0] > MOST_PARTS:
        return []
    return list(parts) or [f"target {number + 1}" for number in range(shape[0])]


def pictures_of(
    tasks: Sequence[int], images: Tensor, targets: Tensor, outputs: Tensor, parts: Sequence[str]
) -> list[dict[str, Any]]:
    """One sample of each of some tasks, as ``results.json`` holds it.

    A part's truth and prediction have the same shades: from the least to the greatest true value
    of all samples; what is predicted beyond is cut off.

    Args:
        tasks: their numbers, ``n``.
        images: ``[n, C, H, W]``, what the model has seen.
        targets: ``[n, *shape]``.
        outputs: the same.
        parts: see ``names_of_images``.

    Returns:
        One entry for each task; pictures are PNG files in base64. Empty if there are none.
    """
    names = names_of_images(targets.shape[1:], parts)
    if not names or not len(tasks):
        return []
    shape = (len(tasks), len(names), *targets.shape[-2:])
    true, said, seen = targets.reshape(shape), outputs.reshape(shape), images.float().mean(dim=1)
    is_seen = all(SIDES[0] <= side <= SIDES[1] for side in seen.shape[1:])
    shades = [(float(part.min()), float(part.max())) for part in true.unbind(1)]
    of_input = (float(seen.min()), float(seen.max())) if images.dtype != torch.uint8 else (0, 255)
    return [
        {
            "task": task,
            "input": _png(seen[number], of_input) if is_seen else None,
            "parts": [
                {
                    "name": name,
                    "truth": _png(true[number, place], shades[place]),
                    "prediction": _png(said[number, place], shades[place]),
                }
                for place, name in enumerate(names)
            ],
        }
        for number, task in enumerate(tasks)
    ]


def _png(image: Tensor, shades: tuple[float, float]) -> str:
    """A grey picture of ``[H, W]``, black at the first of two values and white at the second."""
    from PIL import Image

    low, high = shades
    grey = (image.float() - low) * (255 / (high - low or 1))
    pixels: NDArray[np.uint8] = grey.round().clamp(0, 255).to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
