"""Memory of joined mini-batches, used again once nobody holds it any more.

Taking a large block from the system and touching it for the first time takes several times as
long as filling it. So the block behind an augmented mini-batch is kept, and serves a later one
when every tensor, view and array over it is gone: the one that torch was given has then been
freed, and a weak reference to it tells.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ritornello.arrays import Bytes
from ritornello.records.layout import Layout, bytes_of
from ritornello.records.nesting import Batch
from ritornello.records.paging import leaves_of, samples_of

WORTH_BYTES = 2**15
"""Smaller outputs come from the allocator faster."""

MANY_BYTES = 2**22
"""From here on torch's threads pay; below, waking them takes longer than the copy."""

NUM_KEPT = 3
"""Blocks kept per size: one that is trained on, one that is being joined, one in between."""

NUM_SIZES = 8
"""Sizes that are kept: those of a sample's fields, and of a last, smaller mini-batch."""


class _Block:
    """Memory that is lent to one tensor at a time."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes: Bytes = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").numpy()
        self._loan: weakref.ref[Bytes] | None = None

    @property
    def is_free(self) -> bool:
        """Whether all that was made of the last loan is gone."""
        return self._loan is None or self._loan() is None

    def lend(self) -> Tensor:
        """All of it as an uninitialised uint8 tensor."""
        lent = self._bytes[:]
        self._loan = weakref.ref(lent)
        return torch.from_numpy(lent)


class Joiner:
    """Joins mini-batches and representatives, in CPU memory that is used again where safe."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[_Block]] = {}

    def join(
        self, layout: Layout, leaves: Sequence[Any], records: Tensor, pages: Tensor | None = None
    ) -> list[Any]:
        """``torch.cat((leaf, past))`` for each field of some records.

        Args:
            layout: of the records.
            leaves: one tensor ``[b, *shape]`` per field, on any device.
            records: uint8 ``[r, record_bytes]``.
            pages: those that go with them, if some fields are ragged. Of these, new samples stay
                as they are, and past ones are copies.
        """
        if pages is not None:
            return [
                self._join(layout, position, leaf, records)
                if layout.fields[position].form is None
                else leaf.joined(samples_of(layout, records.numpy(), pages, position))
                for position, leaf in enumerate(leaves)
            ]
        return [self._join(layout, position, leaf, records) for position, leaf in enumerate(leaves)]

    def _join(self, layout: Layout, position: int, leaf: Tensor, records: Tensor) -> Tensor:
        field = layout.fields[position]
        num_samples = len(leaf) + len(records)
        num_bytes = num_samples * field.num_bytes
        samples = None if leaf.requires_grad or records.device.type != "cpu" else bytes_of(leaf)
        if samples is None:
            return torch.cat((leaf, layout.view(records, position).to(leaf.device)))
        if num_bytes < WORTH_BYTES:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        else:
            memory = self._free_block(num_bytes).lend()
        joined = memory.view(field.dtype).view(num_samples, *field.shape)
        rows = memory.numpy().reshape(num_samples, field.num_bytes)
        if num_bytes < MANY_BYTES:
            rows[: len(leaf)] = samples
        else:
            joined[: len(leaf)].copy_(leaf)
        rows[len(leaf) :] = records.numpy()[:, field.offset : field.offset + field.num_bytes]
        return joined

    def _free_block(self, num_bytes: int) -> _Block:
        if num_bytes not in self._blocks and len(self._blocks) >= NUM_SIZES:
            self._blocks.clear()
        blocks = self._blocks.setdefault(num_bytes, [])
        for block in blocks:
            if block.is_free:
                return block
        block = _Block(num_bytes)
        if len(blocks) < NUM_KEPT:
            blocks.append(block)
        return block


def copies(
    layout: Layout, staged: Tensor, num_draws: int, pages: Tensor | None = None
) -> list[Batch]:
    """Representatives alone, the caller's own: a batch for each draw.

    Args:
        layout: of the records.
        staged: uint8 ``[num_draws * r, record_bytes]``.
        num_draws: how many there are.
        pages: those that go with them, if some fields are ragged.
    """
    return [
        layout.rebuild(
            [
                past.clone(memory_format=torch.contiguous_format) if field.form is None else past
                for field, past in zip(
                    layout.fields, leaves_of(layout, records, pages), strict=True
                )
            ]
        )
        for records in staged.chunk(num_draws)
    ]
