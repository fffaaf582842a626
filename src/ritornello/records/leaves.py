"""What can be a leaf of a mini-batch, and what to do with what cannot."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from ritornello.records.nesting import Path, path_text

GRAPH_PACKAGES = ("torch_geometric", "dgl")


def check_leaf(path: Path, leaf: Any) -> None:
    """Checks that a leaf is a dense tensor with a batch dimension.

    Raises:
        TypeError, ValueError: it is not; names it, and what to do.
    """
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{path_text(path)} is a {type(leaf).__name__}; the buffer holds tensors "
            f"({_remedy_for(leaf)})"
        )
    if type(leaf) is not Tensor or leaf.layout != torch.strided or leaf.is_nested:
        _check_kind(path, leaf)
    if leaf.is_quantized or leaf.is_meta:
        _check_kind(path, leaf)
    if leaf.dim() == 0:
        raise ValueError(
            f"{path_text(path)} has no dimensions; a mini-batch's leaf has the shape [b, ...]"
        )


def _check_kind(path: Path, leaf: Tensor) -> None:
    """Checks that a tensor's values are all there, in memory of its own."""
    classes = {each.__name__ for each in type(leaf).__mro__}
    for applies, kind, remedy in (
        (
            leaf.is_nested,
            "a nested tensor",
            "with layout=torch.jagged it may be one, if it is jagged in the first dimension of "
            "samples; torch.nested.to_padded_tensor pads it",
        ),
        (leaf.is_quantized, f"quantised, {leaf.dtype}", "offer its int_repr() or dequantize()"),
        ("FakeTensor" in classes or leaf.is_meta, "without values", "it only tells a shape"),
        (
            "MaskedTensor" in classes,
            "a masked tensor",
            "offer its values, to_tensor(0), and its mask as two leaves",
        ),
        ("DTensor" in classes, "spread over ranks", "to_local() gives what is on this one"),
        (leaf.layout != torch.strided, f"{leaf.layout}", "to_dense() makes it one"),
    ):
        if applies:
            raise TypeError(
                f"{path_text(path)} is {kind}; the buffer holds dense tensors only ({remedy})"
            )


def plain_tensor(path: Path, leaf: Tensor) -> Tensor:
    """The plain tensor that one of a subclass is.

    Raises:
        TypeError: it only looks like one, and has its values elsewhere.
    """
    if type(leaf).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{path_text(path)} is a {type(leaf).__name__}, which has no values of its own; give "
            "the plain tensor that it stands for"
        )
    return leaf.as_subclass(Tensor)


def _remedy_for(leaf: Any) -> str:
    """What to do with what is no tensor."""
    if isinstance(leaf, (str, bytes)):
        return "leave text out of it, or offer its tokens, a tensor for each sample in a list"
    if leaf is None or "NonTensor" in type(leaf).__name__:  # TensorDict's
        return "leave out what is no tensor"
    if type(leaf).__module__.partition(".")[0] in GRAPH_PACKAGES:
        return (
            "a batch of graphs numbers its nodes through: offer each graph's tensors padded to one "
            "size, [b, n, ...], and build the batch behind update"
        )
    if is_dataclass(leaf):
        return "torch.utils._pytree.register_dataclass makes a dataclass a container of tensors"
    if type(leaf).__module__.startswith("PIL."):
        return "torchvision's pil_to_tensor converts images"
    return "torch.as_tensor converts arrays and numbers"


def remedy_for_another(leaf: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """What to do with a leaf that is not as those of the first mini-batch."""
    if tuple(leaf.shape) == shape and leaf.dtype == dtype:
        return "Give a single sample a batch dimension, with unsqueeze(0)"
    if tuple(leaf.shape[1:]) == shape:
        return f"Convert it, with to({dtype}), before it is offered"
    if leaf.dim() - 1 != len(shape):
        return f"Give all samples {len(shape)} dimensions"
    if leaf.dim() == 2 and leaf.is_floating_point():
        return (
            "Where it has grown on purpose, as logits do with new classes, save the buffer and "
            "load it with convert=, which gives stored samples the new form"
        )
    return "Pad, crop or resize all samples to one shape"
