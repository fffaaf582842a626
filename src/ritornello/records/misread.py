"""First mini-batches that would be taken for what they are not, refused where it can be known.

The buffer takes each leaf for a field of the samples, which lie along its first dimension, and
joins samples of many mini-batches. What counts places in *its* mini-batch points elsewhere then;
and a list with a tensor for each sample is no field, even if it looks like several.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ritornello.records.layout import INTEGERS
from ritornello.records.nesting import MOST_LEVELS, Batch, Path, children_of, leaves_of, path_text
from ritornello.records.ragged import empty_lists, ragged_paths

PLACES = frozenset({"batch_idx", "batch_index", "batch_indices", "batch_ids", "edge_index"})
"""What detectors and graphs call a field that counts places in the mini-batch."""

IMAGE_DIMENSIONS = 3
"""Of one image, ``[channels, height, width]``."""

IMAGE_CHANNELS = (3, 4)


def check_not_misread(batch: Batch) -> None:
    """Checks a first mini-batch.

    Raises:
        ValueError: a field counts places in the mini-batch, or a list may be one of samples.
    """
    ragged = ragged_paths(batch)
    _check(batch, (), None, ragged)
    _check_empty(batch, ragged)


def _check_empty(batch: Batch, ragged: Collection[Path]) -> None:
    """Checks that lists of nothing are beside samples: then they are known to hold no samples."""
    leaves = [leaf for _, leaf in leaves_of(batch, whole=ragged)]
    if not leaves or not all(isinstance(each, Tensor) and _is_empty(each) for each in leaves):
        return
    for path, kind in empty_lists(batch):
        raise ValueError(
            f"{path_text(path)} is an empty {kind}, and this first mini-batch has no samples: it "
            "does not say what they are. Begin with one that has some, or give jagged nested "
            "tensors, which say it also without"
        )


def _is_empty(leaf: Tensor) -> bool:
    return leaf.dim() > 0 and leaf.size(0) == 0


def _check(batch: Batch, path: Path, name: Any, ragged: Collection[Path]) -> None:
    if path in ragged:
        return
    if isinstance(batch, Tensor):
        if _counts_places(name, batch):
            raise ValueError(
                f"{path_text(path)} counts places in its mini-batch ({name}): a sample that comes "
                "back is at another place, beside others. Leave the field out, and make it anew "
                "behind update, from fields that each sample has for itself, such as a padded "
                "[b, n, ...] and the number of what is no padding"
            )
        return
    children = children_of(batch) if len(path) <= MOST_LEVELS else None
    if children is None:
        return  # what is no tensor, or too deep, is refused elsewhere
    names = getattr(batch, "_fields", children.steps)
    if isinstance(batch, (list, tuple)) and names is children.steps:
        _check_list(batch, path)
    for step, each, value in zip(children.steps, names, children.values, strict=True):
        _check(value, (*path, step), each, ragged)


def _counts_places(name: Any, leaf: Tensor) -> bool:
    """Whether a field numbers the mini-batch's samples: 0, 0, 0, 1, 1, 2, ..."""
    if name in PLACES:
        return True
    if name != "batch" and not str(name).endswith("_batch"):
        return False
    if leaf.dtype not in INTEGERS or leaf.layout != torch.strided or leaf.dim() != 1:
        return False
    numbers = leaf.tolist()
    rises = {later - earlier for earlier, later in pairwise(numbers)}
    return numbers[:1] == [0] and 1 in rises <= {0, 1}


def _check_list(parts: Sequence[Any], path: Path) -> None:
    """Checks a list or tuple: its parts are taken for fields, and could as well be samples."""
    num_parts = len(parts)
    if num_parts < 2:
        return
    leaves = [[leaf for _, leaf in leaves_of(part)] for part in parts]
    if any(
        not isinstance(leaf, Tensor)
        or leaf.layout != torch.strided
        or leaf.is_nested
        or leaf.dim() == 0
        or leaf.shape[0] != num_parts
        for part in leaves
        for leaf in part
    ):
        return
    if not leaves[0] or not all(_are_alike(part, leaves[0]) for part in leaves):
        return
    # Two or three fields around all are what loaders make of samples (x, y).
    are_images = leaves[0][0].dim() == IMAGE_DIMENSIONS and num_parts in IMAGE_CHANNELS
    if path or are_images:
        raise ValueError(
            f"{path_text(path)} has {num_parts} parts, each with {num_parts} as its first "
            f"dimension: it cannot be told whether they are {num_parts} samples or {num_parts} "
            "fields. Samples: make them one tensor [b, ...] (torch.stack), or, where lengths "
            "differ, torch.nested.nested_tensor(samples, layout=torch.jagged). Fields: give them "
            "as a dict"
        )


def _are_alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether the leaves of two parts may be the same field of two samples."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and (a.shape == b.shape or a.dim() == b.dim() == IMAGE_DIMENSIONS)
        for a, b in zip(one, other, strict=True)
    )
