"""Memory of joined mini-batches, used again once nobody holds it any more.

Taking a large block from the system and touching it for the first time takes several times as
long as filling it. So the block behind an augmented mini-batch is kept, and serves a later one
when every tensor, view and array over it is gone: the one that torch was given has then been
freed, and a weak reference to it tells.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.records.coding import Coding, Decoded
from ritornello.records.layout import Field, Layout, Values
from ritornello.records.nesting import Batch
from ritornello.records.nesting import leaves_of as nested_leaves_of
from ritornello.records.paging import leaves_of, samples_of
from ritornello.rounds.first_batch import Begun, device_of

WORTH_BYTES = 2**15
"""Smaller outputs come from the allocator faster."""

MANY_BYTES = 2**22
"""From here on torch's threads pay; below, waking them takes longer than the copy."""

NUM_KEPT = 3
"""Blocks kept per size: one that is trained on, one that is being joined, one in between."""

NUM_SIZES = 16
"""Sizes that are kept: those of a sample's fields, and of a last, smaller mini-batch."""


class _Block:
    """Memory that is lent to one tensor at a time.

    Args:
        field: whose values it holds.
        num_samples: how many of them.

    Attributes:
        values: all of it, see ``Field.values``.
    """

    def __init__(self, field: Field, num_samples: int) -> None:
        num_bytes = num_samples * field.num_bytes
        memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").numpy()
        self.values = field.values(memory.reshape(num_samples, field.num_bytes))
        self._field = field
        self._loan: weakref.ref[Any] | None = None

    @property
    def is_free(self) -> bool:
        """Whether all that was made of the last loan is gone."""
        return self._loan is None or self._loan() is None

    def lend(self) -> Tensor:
        """All of it as an uninitialised tensor ``[num_samples, *shape]``."""
        lent = self.values[:]
        self._loan = weakref.ref(lent)
        return self._field.tensor(lent)


class Joiner:
    """Joins mini-batches and representatives, in CPU memory that is used again where safe."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Any, ...], list[_Block]] = {}

    def join(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        samples: Values,
        records: Tensor,
        columns: Values,
        pages: Tensor | None = None,
    ) -> list[Any]:
        """``torch.cat((leaf, past))`` for each field of some records.

        Args:
            layout: of the records.
            leaves: one tensor ``[b, *shape]`` per field, on any device.
            samples: their ``Layout.values_of``.
            records: uint8 ``[r, record_bytes]``.
            columns: their ``Layout.columns``; None where they are not in CPU memory.
            pages: those that go with them, if some fields are ragged. Of these, new samples stay
                as they are, and past ones are copies.
        """
        joined: list[Any] = []
        for position, (field, leaf, own, past) in enumerate(
            zip(layout.fields, leaves, samples, columns, strict=True)
        ):
            if field.form is not None:
                assert pages is not None
                ragged = samples_of(layout, records.numpy(), pages, position)
                joined.append(leaf.joined(ragged))
            elif own is None or past is None or leaf.requires_grad:
                on_device = layout.view(records, position).to(leaf.device)
                joined.append(torch.cat((leaf, on_device)))
            else:
                joined.append(self._join(field, leaf, own, past))
        return joined

    def cat(self, leaf: Tensor, others: Sequence[Tensor]) -> Tensor:
        """``torch.cat((leaf, *others))``, where the leaf is.

        Args:
            leaf: a tensor ``[b, *shape]``, on any device.
            others: as many samples as there are, on any device.
        """
        parts = [leaf, *(each.to(leaf.device, non_blocking=True) for each in others)]
        num_samples = sum(map(len, parts))
        num_bytes = sum(each.nbytes for each in parts)
        if leaf.device.type != "cpu" or num_bytes < WORTH_BYTES or leaf.requires_grad:
            return torch.cat(parts)
        shape = tuple(leaf.shape[1:])
        field = Field((), leaf.dtype, shape, 0, num_bytes // num_samples)
        return torch.cat(parts, out=self._free_block(field, num_samples).lend())

    def _join(
        self, field: Field, leaf: Tensor, samples: NDArray[Any], past: NDArray[Any]
    ) -> Tensor:
        """One field of mini-batch and records, whose values are in one piece."""
        num_samples = len(samples) + len(past)
        num_bytes = num_samples * field.num_bytes
        if num_bytes < WORTH_BYTES:
            return field.tensor(np.concatenate((samples, past)))
        block = self._free_block(field, num_samples)
        joined = block.lend()
        if num_bytes < MANY_BYTES:
            np.concatenate((samples, past), out=block.values)
        else:
            joined[: len(samples)].copy_(leaf)
            block.values[len(samples) :] = past
        return joined

    def _free_block(self, field: Field, num_samples: int) -> _Block:
        size = num_samples, field.dtype, field.shape
        if size not in self._blocks and len(self._blocks) >= NUM_SIZES:
            self._blocks.clear()
        blocks = self._blocks.setdefault(size, [])
        for block in blocks:
            if block.is_free:
                return block
        block = _Block(field, num_samples)
        if len(blocks) < NUM_KEPT:
            blocks.append(block)
        return block


class Outputs:
    """What the trainer gets: mini-batches with representatives behind them, or these alone.

    Args:
        coding: between the form of a sample that is trained on and the one that is stored.
        num_draws: of each step.

    Attributes:
        coding: what it gets.
        device: where mini-batches are that are stored in another form; None: not known.
        seconds: that joining has taken.
    """

    def __init__(self, coding: Coding, num_draws: int) -> None:
        self.coding, self._num_draws = coding, num_draws
        self.device: torch.device | None = None
        self.seconds = 0.0
        self._joiner = Joiner()
        self._learnt: Layout | None = None  # where what is stored is what is offered

    def alone(self, begun: Begun, batch: Batch, leaves: Sequence[Any]) -> Batch:
        """A mini-batch without representatives: itself, or of plain tensors, if it is of others."""
        if all(type(leaf) is Tensor for _, leaf in nested_leaves_of(batch)):
            return batch
        if self.coding.is_none:
            return begun.layout.rebuild(leaves)
        return self.coding.alone(leaves)

    def joined(self, begun: Begun, leaves: Sequence[Any], samples: Values, staged: Tensor) -> Batch:
        """A mini-batch with what is staged behind it.

        Args:
            begun: what is known of samples.
            leaves: of the mini-batch.
            samples: their ``Layout.values_of``.
            staged: records.
        """
        began = time.perf_counter()
        layout, staging = begun.layout, begun.staging
        columns = staging.columns_taken(staged.shape[0])
        joined = self._joiner.join(layout, leaves, samples, staged, columns, staging.pages)
        augmented = layout.rebuild(joined)
        self.seconds += time.perf_counter() - began
        return augmented

    def copies(self, begun: Begun, staged: Tensor) -> list[Batch]:
        """What is staged alone, the caller's own, as it is stored: a batch for each draw.

        Args:
            begun: what is known of samples.
            staged: uint8 ``[num_draws * r, record_bytes]``.
        """
        began = time.perf_counter()
        found = self._copies(begun, staged)
        self.seconds += time.perf_counter() - began
        return found

    def _copies(self, begun: Begun, staged: Tensor) -> list[Batch]:
        layout, pages = begun.layout, begun.staging.pages
        return [
            layout.rebuild(
                [
                    past if field.form else past.clone(memory_format=torch.contiguous_format)
                    for field, past in zip(
                        layout.fields, leaves_of(layout, records, pages), strict=True
                    )
                ]
            )
            for records in staged.chunk(self._num_draws)
        ]

    # Where samples have two forms.

    def understood(self, begun: Begun, batch: Batch, stored: list[Any]) -> list[Any]:
        """The leaves of a mini-batch in the form that is trained on.

        Args:
            begun: what is known of samples.
            batch: the mini-batch.
            stored: the leaves of what is stored of it.

        Raises:
            TypeError, ValueError: it is not like the first one, or of another size.
        """
        if not self.coding.encodes:
            if self._learnt is not begun.layout:
                self._learnt = begun.layout
                self.coding.learn(replace(begun.layout, paging=None))
            self.device = device_of(stored)
            return stored
        leaves = self.coding.leaves(batch)
        self.device = device_of(leaves)
        if leaves[0].shape[0] != stored[0].shape[0]:
            raise ValueError(
                f"encode gave {stored[0].shape[0]} samples for a mini-batch of "
                f"{leaves[0].shape[0]}: it must give as many"
            )
        return leaves

    def joined_with(
        self,
        begun: Begun,
        leaves: Sequence[Any],
        draws: Sequence[Batch],
        num_past: int,
    ) -> Batch:
        """A mini-batch with what is staged behind it.

        Args:
            begun: what is known of samples.
            leaves: of the mini-batch, from ``understood``.
            draws: what is staged, as it is trained on.
            num_past: representatives, of all draws.

        Raises:
            TypeError, ValueError: what is drawn is not like the mini-batch; names the leaf.
        """
        began = time.perf_counter()
        augmented = self.coding.joined(leaves, draws, num_past, self._joiner.cat)
        begun.staging.release()
        self.seconds += time.perf_counter() - began
        return augmented

    def decoded(self, begun: Begun, num_staged: int) -> Decoded:
        """What is staged in the form that is trained on; on the worker's thread.

        Args:
            begun: what is known of samples.
            num_staged: how many representatives.
        """
        with begun.staging.worker_stream():
            stored = self._copies(begun, begun.staging.take(num_staged))
            begun.staging.release()
            return self.coding.decoded_draws(stored)
