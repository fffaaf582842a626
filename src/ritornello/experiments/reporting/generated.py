"""What a run's generator makes, as strips of images: one for each class."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.image import imsave
from numpy.typing import NDArray

from ritornello.experiments.results.groups import Group
from ritornello.experiments.results.writing import Results

GAP = 1
"""Between two images of a strip, in their own pixels."""

ROWS_WITHOUT_LABELS = 5
"""Strips of a generator that is told no class."""


def strips_of(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """The label of each group that generates images, and its strips; those of the first seed.

    Returns:
        A strip is the name of its class, or "" where the generator knows none, and its picture.
    """
    return [(group.label, _strips(group.first)) for group in groups if group.first.get("generated")]


def _strips(run: Results) -> list[tuple[str, Markup]]:
    images = images_of(run)
    labels = run["generated"]["labels"]
    if labels is None:
        parts = np.array_split(images, ROWS_WITHOUT_LABELS)
        return [("", _picture(part, "generated images")) for part in parts if len(part)]
    names = run["class_names"]
    strips = []
    for label in dict.fromkeys(labels):
        of_class = images[np.array(labels) == label]
        strips.append((names[label], _picture(of_class, f"generated images of {names[label]}")))
    return strips


def images_of(run: Results) -> NDArray[np.uint8]:
    """The images ``[n, C, H, W]`` that a run has written down."""
    pixels = zlib.decompress(base64.b64decode(run["generated"]["pixels"]))
    return np.frombuffer(pixels, dtype=np.uint8).reshape(run["generated"]["shape"])


def _picture(images: NDArray[np.uint8], text: str) -> Markup:
    """Images ``[n, C, H, W]`` side by side, as one PNG inside the page."""
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    apart = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, GAP)))[..., : images.shape[3] + GAP]
    strip = np.concatenate(list(apart), axis=2)[..., :-GAP].transpose(1, 2, 0)
    file = io.BytesIO()
    imsave(file, np.broadcast_to(strip, (*strip.shape[:2], 3)), format="png", metadata={})
    source = base64.b64encode(file.getvalue()).decode()
    height, width = strip.shape[:2]
    return Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">').format(
        source, text, 2 * width, 2 * height
    )
