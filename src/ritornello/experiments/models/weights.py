"""What a model of timm begins with: tensors out of a file, or timm's own download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ritornello.experiments.models.stages import last_layer_names

DOWNLOAD = "timm"
"""Stands for a file: what timm downloads for the model, and keeps."""

ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def begin_with(model: nn.Module, name: str, source: str | Path) -> None:
    """Gives a model the weights that it begins with.

    The tensors are found by their names; or where the file has names of its own, by their order, if
    all have the shapes that they need. The last layer stays as it is if it has another size there.

    Args:
        model: from ``build``.
        name: of the model.
        source: a file of tensors, or ``DOWNLOAD``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of another model; or timm has no weights for it.
        ConnectionError: timm cannot download them.
    """
    found = _downloaded(name) if str(source) == DOWNLOAD else tensors_in(Path(source))
    own = model.state_dict()
    last = tuple(f"{each}." for each in last_layer_names(model))
    matched = _by_name(own, found, last) or _by_order(own, found, last)
    if matched is None:
        raise ValueError(
            f"weights={str(source)!r} with model={name!r}: {_difference(own, found, last)}"
        )
    for each, tensor in matched.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"weights={str(source)!r} with model={name!r}: the file's tensor for {each} has "
                "values that are not finite"
            )
    model.load_state_dict(own | matched)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds something else.
    """
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is raised depends on where a file is broken
        raise ValueError(f"weights={str(path)!r}: it cannot be read: {error}") from error
    for wrapped in ("state_dict", "model"):  # as training scripts save them
        if isinstance(found, Mapping) and isinstance(found.get(wrapped), Mapping):
            found = found[wrapped]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"weights={str(path)!r}: it holds no tensors by their names")
    if unnamed := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"weights={str(path)!r}: {unnamed[0]!r} is no name of a tensor")
    if odd := [name for name, each in found.items() if not isinstance(each, Tensor)]:
        raise ValueError(f"weights={str(path)!r}: {odd[0]!r} is no tensor")
    return {name.removeprefix("module."): each for name, each in found.items()}


def check_file(path: Path) -> None:
    """Checks that there is such a file of weights, without reading it.

    Raises:
        FileNotFoundError, ValueError: see ``tensors_in``.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"weights={str(path)!r}: a file of weights ends with {', '.join(ENDINGS)}; or take "
            f"{DOWNLOAD!r}, what timm downloads"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")


def normalisation_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of the pixels that timm's model was trained with.

    Raises:
        ValueError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"weights with model={name!r}: only models of timm begin with weights; take one of "
            "them, such as 'resnet18'"
        )
    config: Any = timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else ((0.5,) * 3, (0.5,) * 3)


def _downloaded(name: str) -> dict[str, Tensor]:
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(
            f"weights={DOWNLOAD!r} with model={name!r}: timm has no weights for it; give a file"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # depends on where the weights lie, and on what is missing
        raise ConnectionError(
            f"weights={DOWNLOAD!r} with model={name!r}: timm could not download them ({error}). "
            "Get them elsewhere, and give the file: --weights FILE"
        ) from error
    return model.state_dict()


def _by_name(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], last: tuple[str, ...]
) -> dict[str, Tensor] | None:
    """What to load; None if the names or shapes are not the model's."""
    matched = {}
    for name, tensor in own.items():
        other = found.get(name)
        if other is not None and other.shape == tensor.shape:
            matched[name] = other
        elif not name.startswith(last) and not _is_count(tensor):
            return None
    return matched


def _by_order(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], last: tuple[str, ...]
) -> dict[str, Tensor] | None:
    """What to load if the n-th tensor is the model's n-th one; None if it is not."""
    names = [name for name, tensor in own.items() if not _is_count(tensor)]
    others = [tensor for tensor in found.values() if not _is_count(tensor)]
    if len(names) != len(others):
        return None
    matched = {}
    for name, other in zip(names, others, strict=True):
        if other.shape == own[name].shape:
            matched[name] = other
        elif not name.startswith(last):
            return None
    return matched


def _is_count(tensor: Tensor) -> bool:
    """Whether it counts mini-batches: many files have none, and evaluation does not need it."""
    return tensor.dim() == 0 and not tensor.is_floating_point()


def _difference(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], last: tuple[str, ...]
) -> str:
    """In which respect tensors are not the model's."""
    needed = [
        name for name, tensor in own.items() if not name.startswith(last) and not _is_count(tensor)
    ]
    for name in needed:
        if name in found and found[name].shape != own[name].shape:
            there, here = list(found[name].shape), list(own[name].shape)
            return f"the file's {name} has the shape {there}, and the model's {here}"
    missing = [name for name in needed if name not in found]
    return (
        f"the file has no {missing[0]}, nor the model's tensors under other names: it holds "
        f"{len(found)} tensors, the model {len(own)}"
    )
