"""Leaves whose samples differ in length: token ids, boxes, bags of vectors, encoded images.

Such a leaf is a list or tuple with a tensor for each sample, of one dtype and of shapes that differ
in the first dimension alone; a list or tuple of bytes; or a jagged nested tensor. It comes back as
it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Bytes, Ints
from ritornello.records.nesting import MOST_LEVELS, Batch, Path, children_of

BYTES = "bytes"

BYTES_FORMS = (f"list of {BYTES}", f"tuple of {BYTES}")

FORMS = ("list", "tuple", "jagged", *BYTES_FORMS)
"""How a leaf can come, and come back."""


class Ragged:
    """One such leaf of a mini-batch.

    Args:
        given: the leaf.
        samples: what it consists of.

    Attributes:
        given: as it came.
        samples: tensors ``[n_i, *shape]``, or bytes.
        lengths: int64 ``[b]``, the ``n_i``.
        shape: ``(b,)``, as far as it can be said.
        form: how it came: "list", "tuple" or "jagged", the first two with " of bytes" behind them.
    """

    def __init__(self, given: Any, samples: Sequence[Any]) -> None:
        self.given, self.samples = given, samples
        self.lengths: Ints = np.array([len(each) for each in samples], dtype=np.int64)
        self.shape = (len(samples),)
        self.form = "jagged" if isinstance(given, Tensor) else type(given).__name__
        if any(isinstance(each, bytes) for each in samples):
            self.form += " of bytes"

    @classmethod
    def of(cls, leaf: Any) -> Ragged | None:
        """A leaf as what it is; None if it is no such leaf."""
        if isinstance(leaf, Ragged):
            return leaf
        if isinstance(leaf, Tensor):
            return cls(leaf, leaf.unbind()) if is_jagged(leaf) else None
        if type(leaf) not in (list, tuple):
            return None
        kind = bytes if leaf and isinstance(leaf[0], bytes) else Tensor
        if not all(isinstance(each, kind) for each in leaf):
            return None
        if kind is Tensor and any(each.dim() == 0 or each.is_nested for each in leaf):
            return None
        return cls(leaf, leaf)

    @classmethod
    def like(cls, form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Ragged:
        """One with a single sample of no length."""
        sample = b"" if form.endswith(BYTES) else torch.empty((0, *shape), dtype=dtype)
        return cls(in_form(form, [sample]), [sample])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        first = self.samples[0] if self.samples else None
        return first.device if isinstance(first, Tensor) else torch.device("cpu")

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the samples: one, where they are alike; none, where a list holds none."""
        if isinstance(self.given, Tensor):
            return {self.given.dtype}
        return {each.dtype if isinstance(each, Tensor) else torch.uint8 for each in self.samples}

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Of the samples, without the first dimension: as many as ``dtypes``, where alike."""
        if isinstance(self.given, Tensor):
            return {tuple(self.given.values().shape[1:])}
        return {tuple(each.shape[1:]) if isinstance(each, Tensor) else () for each in self.samples}

    def data(self, number: int) -> Bytes:
        """The bytes of a sample, uint8 ``[num_bytes]``, in CPU memory."""
        sample = self.samples[number]
        if isinstance(sample, bytes):
            return np.frombuffer(sample, dtype=np.uint8)
        plain = sample.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.numel() == 0:
            return np.zeros(0, dtype=np.uint8)
        # Of one element torch takes any stride for contiguous, but not to view it as bytes.
        found: Bytes = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
        return found

    def joined(self, past: Sequence[Any]) -> Any:
        """The leaf with other samples behind its own, as it came."""
        if self.form == "jagged":
            parts = [*self.samples, *(each.to(self.device) for each in past)]
            return _jagged(parts)
        if self.form.endswith(BYTES):
            return in_form(self.form, [*self.samples, *past])
        return in_form(self.form, [*self.samples, *(each.to(self.device) for each in past)])


def in_form(form: str, samples: Sequence[Any]) -> Any:
    """A leaf of that form; of bytes, the samples are uint8 tensors or bytes."""
    kind, _, content = form.partition(" of ")
    if kind == "jagged":
        return _jagged(samples)
    if content == BYTES:
        samples = [each if isinstance(each, bytes) else each.numpy().tobytes() for each in samples]
    return list(samples) if kind == "list" else tuple(samples)


def is_jagged(leaf: Any) -> bool:
    """Whether a leaf is a nested tensor with ``layout=torch.jagged``, jagged in dimension 1."""
    if not isinstance(leaf, Tensor) or not leaf.is_nested or leaf.layout != torch.jagged:
        return False
    return getattr(leaf, "_ragged_idx", 1) == 1


def _jagged(samples: Sequence[Tensor]) -> Tensor:
    offsets = np.cumsum([0, *(len(each) for each in samples)])
    values = torch.cat(list(samples))
    return torch.nested.nested_tensor_from_jagged(
        values, torch.from_numpy(offsets).to(values.device)
    )


def pattern_of(leaf: Any) -> Any:
    """What a leaf is like, without its samples: dense, none; ragged, a single one of no length."""
    ragged = Ragged.of(leaf)
    if ragged is not None and ragged.dtypes:
        (dtype, *_), (shape, *_) = ragged.dtypes, ragged.shapes
        return Ragged.like(ragged.form, dtype, shape).given
    if isinstance(leaf, Tensor) and leaf.dim():
        return emptied(leaf)
    return leaf


def emptied(leaf: Any) -> Any:
    """A leaf without samples, that keeps nothing of the other one alive."""
    if not isinstance(leaf, Tensor):
        return type(leaf)()
    if is_jagged(leaf):
        values = emptied(leaf.values())
        offsets = torch.zeros(1, dtype=torch.int64, device=leaf.device)
        return torch.nested.nested_tensor_from_jagged(values, offsets)
    return leaf.new_empty((0, *leaf.shape[1:])) if leaf.dim() else leaf


def ragged_paths(batch: Batch) -> frozenset[Path]:
    """Where a first mini-batch has leaves whose samples differ in length.

    A list of tensors holds the fields of samples, or a sample each. Fields have one first
    dimension, that of all leaves. So it holds samples if its tensors' first dimensions differ; or
    if the mini-batch has, by its other leaves, as many samples as the list has tensors, and these
    are of another first dimension.
    """
    certain, open_ones, counts = set[Path](), dict[Path, Ragged](), set[int]()
    for path, leaf in _candidates(batch, ()):
        ragged = Ragged.of(leaf)
        if ragged is None or not ragged.dtypes:
            if isinstance(leaf, Tensor) and leaf.dim() and not leaf.is_nested:
                counts.add(leaf.shape[0])
            continue
        are_alike = len(ragged.dtypes) == len(ragged.shapes) == 1
        may_be_fields = ragged.form in ("list", "tuple") and len(set(ragged.lengths.tolist())) == 1
        if not may_be_fields and are_alike:
            certain.add(path)
            counts.add(len(ragged))
        elif are_alike:
            open_ones[path] = ragged
        else:
            counts |= set(ragged.lengths.tolist())
    for path, ragged in open_ones.items():
        if counts == {len(ragged)} and int(ragged.lengths[0]) not in counts:
            certain.add(path)
    return frozenset(certain)


def empty_lists(batch: Batch) -> list[tuple[Path, str]]:
    """Where a mini-batch has lists or tuples of nothing, which tell of neither samples nor fields.

    Returns:
        Their paths, and "list" or "tuple".
    """
    found = ((path, Ragged.of(leaf)) for path, leaf in _candidates(batch, ()))
    return [(path, each.form) for path, each in found if each is not None and not each.dtypes]


def _candidates(batch: Batch, path: Path) -> Iterator[tuple[Path, Any]]:
    """The leaves of a mini-batch, and the lists in it that may be one."""
    if isinstance(batch, Tensor) or Ragged.of(batch) is not None:
        yield path, batch
        return
    children = children_of(batch)
    if children is None or len(path) > MOST_LEVELS:  # what is too deep is refused elsewhere
        return
    for step, value in zip(children.steps, children.values, strict=True):
        yield from _candidates(value, (*path, step))
