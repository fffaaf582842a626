"""The layout of a record: nested samples to rows of bytes, and back.

A *record* is one representative as a row of bytes, all its fields side by side. Each field is
aligned to its element size and the row to 16 bytes, so that rows move as 64-bit words and
fields are typed views of the rows: nothing is ever converted.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.arrays import Bytes, Ints
from ritornello.records import accelerators
from ritornello.records.digest import digest
from ritornello.records.leaves import check_leaf, plain_tensor, remedy_for_another
from ritornello.records.nesting import (
    Batch,
    Path,
    Template,
    leaves_like,
    leaves_of,
    path_text,
    rebuild,
    template_of,
)
from ritornello.records.pages import LENGTH_BYTES, START_BYTES, Paging, aligned
from ritornello.records.ragged import BYTES, BYTES_FORMS, Ragged, ragged_paths

ROW_ALIGNMENT = 16

LARGE_FIELD_BYTES = 16_384
"""From here on, copying values one by one is faster than all of them twice."""

INTEGERS = {
    getattr(torch, name): np.dtype(name)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}

IN_NUMPY = INTEGERS | {
    getattr(torch, name): np.dtype(name)
    for name in ("bool", "float16", "float32", "float64", "complex64", "complex128")
}
"""What NumPy calls them."""

Values = Sequence[NDArray[Any] | None]
"""``Field.values`` of some samples, a field each; None where these are no array in one piece."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}
"""Those of fields, by name."""

MOST_FIELDS = 10_000

MOST_FIELD_BYTES = 2**40

MOST_DIMENSIONS = 64

LIST_REMEDY = (
    ". If a list holds a tensor for each sample, make it one tensor [b, ...]; where lengths differ "
    "all must have one dtype, and shapes that differ in the first dimension alone"
)


@dataclass(frozen=True)
class Field:
    """One leaf's place in the record."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of one sample's value, without the batch dimension; of a ragged one without its first
    dimension, the length."""
    offset: int
    num_bytes: int
    """In the row. Of a ragged field the row holds the length alone."""
    form: str | None = None
    """Of a ragged field how it came, see ``Ragged``; None: all samples have the shape."""

    def __str__(self) -> str:
        if self.form is None:
            return f"{path_text(self.path)}: {self.dtype} {list(self.shape)}"
        sizes = ", ".join(map(str, ("length", *self.shape)))
        return f"{path_text(self.path)}: {self.dtype} [{sizes}]"

    @property
    def is_integer(self) -> bool:
        """Whether it is one integer per sample."""
        return self.dtype in INTEGERS and self.shape == () and self.form is None

    def values(self, rows: Bytes) -> NDArray[Any]:
        """Its bytes of some samples, ``[n, num_bytes]``, as ``[n, *shape]`` if NumPy has the dtype.

        Else as they are.
        """
        dtype = IN_NUMPY.get(self.dtype)
        return rows if dtype is None else rows.view(dtype).reshape(len(rows), *self.shape)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """What ``values`` gave as a tensor ``[n, *shape]`` over the same memory."""
        tensor = torch.from_numpy(values)
        if self.dtype in IN_NUMPY:
            return tensor
        return tensor.view(self.dtype).view(len(values), *self.shape)

    @property
    def bytes_per_length(self) -> int:
        """Of a ragged field: what it has in pages, for each of its length."""
        return self.dtype.itemsize * shape_elements(self.shape)


@dataclass(frozen=True)
class Layout:
    """How the fields of a sample lie in a record. Made by ``Layout.of(batch)``."""

    fields: tuple[Field, ...]
    record_bytes: int
    template: Template
    """Containers as in the batch; the leaves are positions in ``fields``."""
    ragged: tuple[int, ...] = ()
    """The positions of fields whose samples differ in length: these lie in pages. The row then
    says, at its end, where."""
    paging: Paging | None = None
    """The pages of the buffer, as soon as they are known."""

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Infers the layout from a mini-batch.

        Raises:
            TypeError: a leaf is no dense tensor.
            ValueError: a leaf has no batch dimension, there is no leaf, or too many or too large
                ones.
        """
        return cls.of_leaves(batch, ragged_paths(batch))

    @classmethod
    def of_leaves(cls, batch: Batch, ragged: Collection[Path]) -> Layout:
        """Infers it from a mini-batch of which it is known where it is ragged.

        Raises:
            TypeError, ValueError: see ``of``.
        """
        fields = list[Field]()
        offset = 0
        for path, leaf in leaves_of(batch, whole=ragged):
            if len(fields) == MOST_FIELDS:
                raise ValueError(
                    f"the mini-batch holds more than {MOST_FIELDS} tensors: stack those that are "
                    "alike"
                )
            form, dtype, shape = _kind_of_leaf(path, leaf, path in ragged)
            try:
                check_field(dtype, shape)
            except ValueError as error:
                raise ValueError(f"{path_text(path)}: {error}") from None
            alignment = min(dtype.itemsize, ROW_ALIGNMENT) if form is None else LENGTH_BYTES
            offset = -(-offset // alignment) * alignment
            num_bytes = LENGTH_BYTES if form else dtype.itemsize * shape_elements(shape)
            fields.append(Field(path, dtype, shape, offset, num_bytes, form))
            offset += num_bytes
        if not fields:
            raise ValueError("the mini-batch holds no tensor; give a tensor, tuple, list or dict")
        offset += START_BYTES * any(field.form for field in fields)
        record_bytes = max(ROW_ALIGNMENT, -(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT)
        positions = {field.path: position for position, field in enumerate(fields)}
        return cls(
            tuple(fields),
            record_bytes,
            template_of(batch, positions.__getitem__, ragged),
            tuple(position for position, field in enumerate(fields) if field.form),
        )

    @property
    def ragged_paths(self) -> frozenset[Path]:
        """Where samples differ in length."""
        return frozenset(self.fields[position].path for position in self.ragged)

    def nested_as(self, batch: Batch) -> Layout:
        """The same fields in the containers of a mini-batch that ``leaves`` has accepted."""
        positions = {field.path: position for position, field in enumerate(self.fields)}
        whole = self.ragged_paths
        fields, forms = list(self.fields), dict(leaves_of(batch, whole=whole)) if whole else {}
        for position in self.ragged:
            leaf = Ragged.of(forms[fields[position].path])
            if leaf is not None and len(leaf):
                fields[position] = replace(fields[position], form=leaf.form)
        template = template_of(batch, positions.__getitem__, whole)
        return replace(self, fields=tuple(fields), template=template)

    def leaves(self, batch: Batch) -> list[Tensor]:
        """The leaves of a mini-batch in the order of ``fields``, checked against the layout.

        Plain tensors: of subclasses, such as torchvision's images, only the values are stored, and
        new samples come as representatives do, in every step alike. Of ragged fields a ``Ragged``.

        Raises:
            TypeError: a leaf is no dense tensor.
            ValueError: another nesting, dtype, shape, or leaves of different batch sizes; or a
                sample that is longer than can be stored.
        """
        found: list[Any] = [None] * len(self.fields)
        leaves_like(self.template, batch, found)
        num_samples: int | None = None
        for position, (field, leaf) in enumerate(zip(self.fields, found, strict=True)):
            if field.form is not None:
                found[position] = leaf = _ragged_like(field, leaf)
                num_in_leaf = len(leaf)
            else:
                check_leaf(field.path, leaf)
                if type(leaf) is not Tensor:
                    found[position] = plain_tensor(field.path, leaf)
                shape = leaf.shape
                num_in_leaf = shape[0]
                if leaf.dtype != field.dtype or shape[1:] != field.shape:
                    raise ValueError(
                        f"{path_text(field.path)} is {leaf.dtype} {list(shape[1:])} per sample, "
                        f"but the buffer's records hold {field.dtype} {list(field.shape)} there: "
                        "dtype and shape are fixed by the first mini-batch. "
                        + remedy_for_another(leaf, field.dtype, field.shape)
                    )
            if num_samples is None:
                num_samples = num_in_leaf
            elif num_in_leaf != num_samples:
                first = self.fields[0].path
                raise ValueError(
                    f"{path_text(field.path)} has {num_in_leaf} samples, but {path_text(first)} "
                    f"has {num_samples}: all leaves of a mini-batch need the same first dimension"
                    + LIST_REMEDY
                    * (_is_in_list(field.path) or _is_in_list(first))
                )
        if self.paging is not None:
            self._check_fits(self.paging, found)
        return found

    def bytes_in_pages(self, leaves: Sequence[Any]) -> Ints:
        """How many bytes in pages each sample of a mini-batch needs, int64 ``[b]``."""
        num_bytes = np.zeros(leaves[0].shape[0], dtype=np.int64)
        for position in self.ragged:
            field = self.fields[position]
            num_bytes += aligned(leaves[position].lengths * field.bytes_per_length)
        return num_bytes

    def _check_fits(self, paging: Paging, leaves: Sequence[Any]) -> None:
        """Checks that each sample of a mini-batch could be stored alone."""
        num_bytes = self.bytes_in_pages(leaves)
        if num_bytes.max(initial=0) <= paging.most_bytes:
            return
        sample = int(num_bytes.argmax())
        lengths = [
            f"{path_text(self.fields[position].path)}[{sample}] has the length "
            f"{leaves[position].lengths[sample]:,}"
            for position in self.ragged
        ]
        raise ValueError(
            f"{' and '.join(lengths)}: {int(num_bytes[sample]):,} bytes, but with "
            f"capacity_bytes={paging.capacity_bytes:,} on {paging.num_ranks} rank(s) at most "
            f"{paging.most_bytes:,} bytes of a sample can be stored: cut it, or raise "
            "capacity_bytes"
        )

    def views(self, rows: Tensor) -> list[Tensor]:
        """The fields of records as typed views ``[num_rows, *shape]`` of ``rows``.

        Args:
            rows: uint8 ``[num_rows, record_bytes]``.
        """
        return [self.view(rows, position) for position in range(len(self.fields))]

    def view(self, rows: Tensor, position: int) -> Tensor:
        """One field of records as a typed view, as in ``views``."""
        field = self.fields[position]
        shape = (rows.shape[0], *field.shape)
        if not field.num_bytes:
            return torch.empty(shape, dtype=field.dtype, device=rows.device)
        columns = rows[:, field.offset : field.offset + field.num_bytes].view(field.dtype)
        return columns.view(shape)

    def columns(self, rows: Tensor) -> Values:
        """``Field.values`` of each field of records in CPU memory: views; None of ragged ones."""
        array = rows.numpy()
        return [
            field.values(array[:, field.offset : field.offset + field.num_bytes])
            if field.form is None
            else None
            for field in self.fields
        ]

    def values_of(self, leaves: Sequence[Any]) -> Values:
        """``values_of`` each leaf of a mini-batch; None for ragged ones."""
        return [
            values_of(leaf) if field.form is None else None
            for field, leaf in zip(self.fields, leaves, strict=True)
        ]

    def integers(self, rows: Tensor, position: int) -> Ints:
        """One integer field of records, ``[num_rows]``, as int64 in CPU memory."""
        if rows.device.type != "cpu":
            return self.view(rows, position).cpu().numpy().astype(np.int64)
        field = self.fields[position]
        columns = rows.numpy()[:, field.offset : field.offset + field.num_bytes]
        return columns.view(INTEGERS[field.dtype])[:, 0].astype(np.int64)

    def num_distinct(self, rows: Bytes) -> int:
        """How many of some records, uint8 ``[n, record_bytes]``, differ in a field."""
        used = np.zeros(self.record_bytes, dtype=np.bool_)  # without what lies between the fields
        for field in self.fields:
            used[field.offset : field.offset + field.num_bytes] = True
        return len({hashlib.blake2b(row[used], digest_size=16).digest() for row in rows})

    def pack(self, leaves: Sequence[Tensor], index: Ints | None, rows: Tensor) -> None:
        """Copies samples into the rows of records; ragged fields are for ``pack_pages``.

        Args:
            leaves: one tensor ``[b, *shape]`` per field, on the device of ``rows``.
            index: int64 ``[num_rows]``, the samples to take; None: all of them.
            rows: uint8 ``[num_rows, record_bytes]``, written; its padding is left as it is.
        """
        columns: Values = [None] * len(leaves)
        if rows.device.type == "cpu":
            columns = self.columns(rows)
        self.pack_values(leaves, self.values_of(leaves), index, rows, columns)

    def pack_values(
        self,
        leaves: Sequence[Tensor],
        samples: Values,
        index: Ints | None,
        rows: Tensor,
        columns: Values,
    ) -> None:
        """As ``pack``, where views of both sides are known.

        Args:
            leaves: see ``pack``.
            samples: their ``values_of``.
            index: see ``pack``.
            rows: see ``pack``; may be more, of which the first are written.
            columns: the ``columns`` of these first; None where they are not in CPU memory.
        """
        for position, (field, own, places) in enumerate(
            zip(self.fields, samples, columns, strict=True)
        ):
            if field.form is not None:
                continue
            if own is None or places is None:
                source = leaves[position].detach()
                if index is not None:
                    on_device = accelerators.copied_to(rows.device, torch.from_numpy(index))
                    source = source.index_select(0, on_device)
                self.view(rows[: source.shape[0]], position).copy_(source)
            elif index is None:
                places[:] = own
            elif field.num_bytes < LARGE_FIELD_BYTES:
                places[:] = own.take(index, axis=0)
            else:
                for place, sample in enumerate(index.tolist()):
                    places[place] = own[sample]

    def rebuild(self, leaves: Sequence[Any]) -> Batch:
        """A batch nested as the samples were, from one tensor per field, or ``Ragged`` leaf."""
        if self.ragged:
            leaves = [each.given if isinstance(each, Ragged) else each for each in leaves]
        return rebuild(self.template, leaves)

    def position(self, path: Path, argument: str) -> int:
        """The position in ``fields`` of the leaf at ``path``.

        Args:
            path: of the leaf.
            argument: the one that names it, for the error: "label" or "identity".

        Raises:
            ValueError: there is none.
        """
        for position, field in enumerate(self.fields):
            if field.path == path:
                return position
        raise ValueError(
            f"{argument}={path[0] if len(path) == 1 else path!r} names no leaf of the samples; "
            f"there are {'; '.join(map(str, self.fields))}. Give the index or key of the "
            f"{argument}, a tuple of them for a nested one, or {argument}=None"
            + " for a policy that needs no labels"
            * (argument == "label")
        )

    def label_position(self, path: Path, required: bool) -> int | None:
        """The position in ``fields`` of the class label at ``path``.

        Args:
            path: of the leaf.
            required: whether labels are needed; if not, None where there is none that fits.

        Raises:
            ValueError: there is no such leaf, or it is not one integer per sample.
        """
        if not required and path not in [field.path for field in self.fields]:
            return None
        position = self.position(path, "label")
        if not required and not self.fields[position].is_integer:
            return None
        return self._checked_integer(position, "label")

    def identity_position(self, path: Path) -> int:
        """The position in ``fields`` of what tells samples apart.

        Raises:
            ValueError: there is no such leaf, or it is not one integer per sample.
        """
        return self._checked_integer(self.position(path, "identity"), "identity")

    def _checked_integer(self, position: int, argument: str) -> int:
        field = self.fields[position]
        if not field.is_integer:
            raise ValueError(
                f"the {argument} {field} per sample: it must be one integer per sample, such as "
                f"int64 []; {argument}= says which leaf it is"
                + f". {_remedy_for_label(field)}"
                * (argument == "label")
            )
        return position

    @property
    def digest(self) -> int:
        """A number that differs between layouts, to compare them over ranks."""
        return digest(";".join(map(str, self.fields)))


def _kind_of_leaf(
    path: Path, leaf: Any, is_ragged: bool
) -> tuple[str | None, torch.dtype, tuple[int, ...]]:
    """Form, dtype and shape of a field."""
    if not is_ragged:
        check_leaf(path, leaf)
        return None, leaf.dtype, tuple(leaf.shape[1:])
    ragged = Ragged.of(leaf)
    assert ragged is not None
    (dtype,), (shape,) = ragged.dtypes, ragged.shapes
    for sample in ragged.samples:
        if isinstance(sample, Tensor):
            check_leaf(path, sample)
    return ragged.form, dtype, shape


def _ragged_like(field: Field, leaf: Any) -> Ragged:
    """A leaf of a ragged field.

    Raises:
        TypeError, ValueError: it is none, or of another dtype or shape.
    """
    ragged = Ragged.of(leaf)
    if ragged is None:
        raise TypeError(
            f"{path_text(field.path)} is a {type(leaf).__name__}, but in the first mini-batch it "
            f"held samples of unequal length, {field.dtype} of the shape "
            f"{str(field).rpartition(str(field.dtype) + ' ')[2]}: give a list or tuple with a "
            "tensor (or bytes) for each sample, or torch.nested.nested_tensor(samples, "
            "layout=torch.jagged), jagged in the first dimension of samples"
        )
    if field.form in BYTES_FORMS and not len(ragged) and ragged.form in ("list", "tuple"):
        ragged.form += f" of {BYTES}"  # a list of nothing does not say what past ones come as
    for number, sample in enumerate(ragged.samples):
        dtype, shape = torch.uint8, tuple[int, ...]()
        if isinstance(sample, Tensor):
            check_leaf((*field.path, number), sample)
            dtype, shape = sample.dtype, tuple(sample.shape[1:])
        if dtype != field.dtype or shape != field.shape:
            sizes = ", ".join(map(str, ("length", *field.shape)))
            raise ValueError(
                f"{path_text((*field.path, number))} is {dtype} {[len(sample), *shape]}, but the "
                f"buffer's records hold {field.dtype} [{sizes}] there: samples may differ in "
                "their first dimension alone"
            )
    return ragged


def values_of(leaf: Tensor) -> NDArray[Any] | None:
    """A leaf's values as ``Field.values`` has them; None if they are not in one piece.

    NumPy copies on the calling thread alone. For such small copies torch would wake all its
    threads, and wait for them.
    """
    if not leaf.is_cpu or not leaf.is_contiguous():
        return None
    if leaf.is_conj() or leaf.is_neg():  # the bytes are not yet the values
        return None
    own = leaf.detach() if leaf.requires_grad else leaf
    if leaf.dtype not in IN_NUMPY:
        if leaf.numel() == 0:
            return None
        own = own.view(leaf.shape[0], -1)
        if own.stride(1) != 1:  # of one element torch takes any stride for contiguous
            return None
        own = own.view(torch.uint8)
    array: NDArray[Any] = own.numpy()
    return array


def check_field(dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Checks that records can have such a field.

    Raises:
        ValueError: they cannot.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"a field of the dtype {dtype} cannot be stored")
    # Zeros count as ones: no stride may be too large for PyTorch.
    num_bytes = dtype.itemsize * math.prod(max(1, size) for size in shape[:MOST_DIMENSIONS])
    if len(shape) > MOST_DIMENSIONS or num_bytes > MOST_FIELD_BYTES:
        raise ValueError(f"a field of the shape {reprlib.repr(list(shape))}")


def shape_elements(shape: Sequence[int]) -> int:
    """The number of elements of a tensor of that shape."""
    return torch.Size(shape).numel()


def _remedy_for_label(field: Field) -> str:
    """What to do with a class label that is not one integer."""
    if shape_elements(field.shape) == 1 and field.shape:
        return "flatten() makes it one number per sample"
    if field.shape:
        return (
            "Samples of several classes, and targets that are no class, need a policy without "
            "labels: selection='reservoir', label=None"
        )
    if field.dtype == torch.bool:
        return "Convert it with to(torch.uint8)"
    return (
        "Convert class numbers with long(); other targets need a policy without labels: "
        "selection='reservoir', label=None"
    )


def _is_in_list(path: Path) -> bool:
    return len(path) > 1 and isinstance(path[-1], int)
