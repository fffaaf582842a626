"""What of a sample has no fixed size, in pages: the other half of a record.

The row of a record holds, for each ragged field, how long it is, and at its end where its pages
begin. Its ragged fields lie in these one behind the other. What "where" counts depends on what the
rows belong to: in a shard it is a place in the shard's table of pages (``Pages``); of records on
their way it is a row of the pages that go with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Bytes, Ints
from ritornello.records.layout import Layout
from ritornello.records.pages import START_BYTES, aligned
from ritornello.records.ragged import Ragged, in_form


class Records(NamedTuple):
    """Records on their way: both parts of them."""

    rows: Tensor
    """uint8 ``[m, record_bytes]``."""
    pages: Tensor | None = None
    """uint8 ``[num_pages, page_bytes]``: those that go with them, if some fields are ragged;
    they begin where the rows say."""
    counts: Ints | None = None
    """int64 ``[m]``: how many of them each record has, of candidates."""


def bytes_of_records(layout: Layout, rows: Bytes) -> Ints:
    """How many bytes in pages records have, int64 ``[n]``."""
    first, *others = (
        aligned(lengths_of(layout, rows, position) * layout.fields[position].bytes_per_length)
        for position in layout.ragged
    )
    return sum(others, first)


def pages_of_records(layout: Layout, rows: Bytes, page_bytes: int) -> Ints:
    """How many pages records have, int64 ``[n]``."""
    return (bytes_of_records(layout, rows) + (page_bytes - 1)) // page_bytes


def lengths_of(layout: Layout, rows: Bytes, position: int) -> Ints:
    """How long a ragged field is in records, int64 ``[n]``."""
    return _words(rows, layout.fields[position].offset)


def starts_of(layout: Layout, rows: Bytes) -> Ints:
    """Where the pages of records begin, int64 ``[n]``: a view, to be written, too."""
    return _words(rows, layout.record_bytes - START_BYTES)


def _words(rows: Bytes, first: int) -> Ints:
    words: Ints = rows.view(np.int64)[:, first // 8]
    return words


def pack_pages(
    layout: Layout,
    leaves: Sequence[Any],
    index: Ints | None,
    counts: Ints,
    rows: Bytes,
    pages: Bytes,
) -> None:
    """Copies the ragged fields of samples into pages; says in their rows how long and where.

    Args:
        layout: of the records.
        leaves: of a mini-batch.
        index: int64 ``[num_rows]``, the samples to take; None: all of them.
        counts: int64 ``[num_rows]``, how many pages each has.
        rows: uint8 ``[num_rows, record_bytes]``, written.
        pages: uint8 ``[num_pages, page_bytes]``, written from its beginning.
    """
    numbers = np.arange(len(rows)) if index is None else index
    for position in layout.ragged:
        lengths_of(layout, rows, position)[:] = leaves[position].lengths[numbers]
    starts = starts_of(layout, rows)
    starts[:] = counts.cumsum() - counts
    flat = pages.reshape(-1)
    places, after = starts * pages.shape[1], (starts + counts) * pages.shape[1]
    for position in layout.ragged:
        leaf: Ragged = leaves[position]
        each = layout.fields[position].bytes_per_length
        ends = places + aligned(lengths_of(layout, rows, position) * each)
        if position == layout.ragged[-1]:
            ends = after
        for place, end, number in zip(
            places.tolist(), ends.tolist(), numbers.tolist(), strict=True
        ):
            data = leaf.data(number)
            flat[place : place + len(data)] = data
            flat[place + len(data) : end] = 0  # there must be nothing left of another sample
        places = ends


def samples_of(layout: Layout, rows: Bytes, pages: Tensor, position: int) -> list[Tensor]:
    """A ragged field of records as tensors ``[n_i, *shape]``, copies.

    Args:
        layout: of the records.
        rows: uint8 ``[n, record_bytes]``, in CPU memory.
        pages: uint8 ``[num_pages, page_bytes]``, in which they begin where the rows say.
        position: of the field.
    """
    field = layout.fields[position]
    places = starts_of(layout, rows) * pages.shape[1]
    for before in layout.ragged:
        if before == position:
            break
        places = places + aligned(
            lengths_of(layout, rows, before) * layout.fields[before].bytes_per_length
        )
    lengths, size = lengths_of(layout, rows, position), field.bytes_per_length
    flat, found = pages.reshape(-1), []
    for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
        if length * size == 0:
            empty = torch.empty((length, *field.shape), dtype=field.dtype, device=pages.device)
            found.append(empty)
            continue
        data = flat[place : place + length * size].clone()
        found.append(data.view(field.dtype).view(length, *field.shape))
    return found


def leaves_of(layout: Layout, rows: Tensor, pages: Tensor | None) -> list[Any]:
    """The leaves of records: typed views of the rows; ragged ones as they came, copies.

    Args:
        layout: of the records.
        rows: uint8 ``[n, record_bytes]``.
        pages: those that go with them, if the layout has any.
    """
    if pages is None:
        return list(layout.views(rows))
    found = list[Any]()
    for position, field in enumerate(layout.fields):
        if field.form is None:
            found.append(layout.view(rows, position))
        else:
            found.append(in_form(field.form, samples_of(layout, rows.numpy(), pages, position)))
    return found


def repaged(layout: Layout, records: Records, page_bytes: int) -> Records:
    """The same records in pages of another size; rows and pages are copies."""
    rows, pages = records.rows, records.pages
    assert pages is not None
    if pages.shape[1] == page_bytes:
        return records
    rows = rows.clone()
    starts, num_bytes = starts_of(layout, rows.numpy()), bytes_of_records(layout, rows.numpy())
    counts = -(-num_bytes // page_bytes)
    before = starts * pages.shape[1]
    starts[:] = counts.cumsum() - counts
    anew = torch.zeros((int(counts.sum()), page_bytes), dtype=torch.uint8)
    source, target = pages.reshape(-1), anew.reshape(-1)
    for first, place, size in zip(
        before.tolist(), (starts * page_bytes).tolist(), num_bytes.tolist(), strict=True
    ):
        target[place : place + size] = source[first : first + size]
    return Records(rows, anew)
