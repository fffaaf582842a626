"""A picture of what a saved buffer holds: a row of images for each class, from old to new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from torchvision.utils import make_grid

from ritornello.arrays import Ints
from ritornello.experiments.data.decoding import Decoder
from ritornello.experiments.inspection.image_fields import (
    files_of,
    image_position,
    images_of,
    is_file,
)
from ritornello.experiments.inspection.inspection import Inspection
from ritornello.saving.saved_buffer import SavedRepresentatives

MOST_ROWS, MOST_COLUMNS = 20, 24

CELL = 64
"""The side of an image in the picture, in pixels: small images grow to about it, whole times."""

GAP = 4

DPI = 100

MARGINS = (160, 24, 64, 24)
"""Left, right, above and below, in pixels."""

INK, FAINT = "#1d2733", "#6b7785"


def draw_contact_sheet(inspection: Inspection, path: Path) -> None:
    """Draws some images of some classes; at most 24 of each of 20, evenly chosen.

    Raises:
        ValueError: no field is an image, or there are none; or the file's ending says no picture.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--picture {path}: the name must end with .png or .jpg")
    position = image_position(inspection)
    rows = _rows(inspection)
    if not rows:
        raise ValueError("--picture: the saved buffer holds no representatives")
    images = _images(inspection, np.concatenate(list(rows.values())), position)
    num_columns = max(map(len, rows.values()))
    blank = torch.ones_like(images[0])
    cells, first = [], 0
    for members in rows.values():
        cells += list(images[first : first + len(members)])
        cells += [blank] * (num_columns - len(members))
        first += len(members)
    grid = make_grid(torch.stack(cells), nrow=num_columns, padding=GAP, pad_value=1.0)
    figure = _figure(inspection, grid, list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _groups(inspection: Inspection) -> Ints:
    """What makes a row: the class, or where labels are not known the task."""
    return inspection.tasks if inspection.labels is None else inspection.labels


def _rows(inspection: Inspection) -> dict[int, Ints]:
    """The groups shown, and which representatives of each; from the oldest to the newest."""
    groups = _groups(inspection)
    found = _evenly(np.unique(groups), MOST_ROWS)
    rows = {}
    for group in found.tolist():
        members = np.flatnonzero(groups == group)
        by_age = members[inspection.admitted_in[members].argsort(kind="stable")]
        rows[group] = _evenly(by_age, MOST_COLUMNS)
    return rows


def _evenly(values: Ints, most: int) -> Ints:
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).round().astype(np.int64)]


def _images(inspection: Inspection, chosen: Ints, position: int) -> Tensor:
    """RGB images ``[n, 3, height, width]`` from 0 to 1, as large as they are drawn."""
    drawn: list[Tensor | None] = [None] * len(chosen)
    for rank in np.unique(inspection.ranks[chosen]).tolist():
        places = np.flatnonzero(inspection.ranks[chosen] == rank)
        slots = inspection.slots[chosen[places]]
        order = slots.argsort()
        ascending = slots[order]
        for part in inspection.saved.representatives(rank, ascending):
            images = _drawn(inspection, part, position)
            at = places[order[ascending.searchsorted(part.slots)]]
            for place, image in zip(at.tolist(), images, strict=True):
                drawn[place] = image
    return torch.stack([each for each in drawn if each is not None])


def _drawn(inspection: Inspection, part: SavedRepresentatives, position: int) -> Tensor:
    """RGB images ``[n, 3, height, width]`` of some representatives; of files, their middle."""
    layout = inspection.manifest.layout
    assert layout is not None
    if not is_file(layout.fields[position]):
        return _as_drawn(images_of(part, position))
    decode = Decoder(CELL)
    return torch.stack([decode(content).float() / 255 for content, _ in files_of(part, position)])


def _as_drawn(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        pixels = images.float() / 255
    else:  # perhaps normalised: each over its whole range
        pixels = images.float()
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        if low.min() < 0 or high.max() > 1:
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    longest = max(pixels.shape[2:])
    if longest <= CELL:
        pixels = functional.interpolate(pixels, scale_factor=CELL // longest, mode="nearest")
    else:
        size = [max(1, round(side * CELL / longest)) for side in pixels.shape[2:]]
        pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels.expand(-1, 3, -1, -1).clamp(0, 1)


def _figure(inspection: Inspection, grid: Tensor, groups: list[int]) -> Figure:
    left, right, above, below = MARGINS
    grid_height, grid_width = grid.shape[1:]
    width, height = max(640, left + grid_width + right), above + grid_height + below
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    # As large as the grid to the pixel, so that nothing is blurred.
    axes = figure.add_axes((left / width, below / height, grid_width / width, grid_height / height))
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    row_height = (grid_height - GAP) / len(groups)
    held = _groups(inspection)
    for number, group in enumerate(groups):
        middle = GAP / 2 + (number + 0.5) * row_height
        axes.annotate(
            _name(inspection, group),
            (0, middle),
            (-10, 1),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )
        axes.annotate(
            f"{int((held == group).sum()):,} held",
            (0, middle),
            (-10, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=FAINT,
        )
    what = "class" if inspection.labels is not None else "task"
    num_groups = len(np.unique(held))
    title = f"{len(held):,} representatives of {num_groups:,} {_plural(what, num_groups)}"
    text = f"each row a {what}, from the oldest to the newest"
    if num_groups > len(groups):
        text += f"; {len(groups)} of {num_groups:,} {_plural(what, num_groups)}"
    if saved_at := inspection.manifest.saved_at[:10]:
        text += f"; saved {saved_at}"
    x = (left + GAP) / width
    figure.text(x, 1 - 14 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
    figure.text(x, 1 - 40 / height, text, fontsize=9, color=FAINT, va="top")
    return figure


def _name(inspection: Inspection, group: int) -> str:
    if inspection.labels is not None:
        name = inspection.class_name(group)
    else:
        name = inspection.manifest.tasks[group].name if group >= 0 else "all"
    name = name.replace("$", r"\$")  # else it would be a formula
    return name if len(name) <= 18 else name[:17] + "…"


def _plural(what: str, number: int) -> str:
    return what if number == 1 else {"class": "classes", "task": "tasks"}[what]
