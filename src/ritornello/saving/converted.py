"""A saved buffer whose samples are given another form while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch
from ritornello.saving.saved_buffer import SavedBuffer, SavedShard

Convert = Callable[[Batch], Batch]


class Converted(SavedBuffer):
    """A saved buffer, each sample converted. What was drawn for the next step is left out.

    Args:
        saved: as it is.
        convert: gives representatives ``[n, ...]`` in their new form: as many, in the same order,
            with the same labels at the same place. The tensors that it gets are copies.

    Raises:
        CheckpointError: the converted samples have their label elsewhere.
    """

    def __init__(self, saved: SavedBuffer, convert: Convert) -> None:
        self._saved, self._convert = saved, convert
        self.manifest = saved.manifest
        if saved.manifest.layout is None:
            return
        old = self._old = saved.manifest.layout
        if old.ragged:
            raise CheckpointError("convert: samples of unequal length cannot be converted")
        one = torch.zeros((1, old.record_bytes), dtype=torch.uint8)
        self._new = Layout.of(convert(old.rebuild(old.views(one))))
        if self._new.ragged:
            raise CheckpointError("convert: samples cannot become ones of unequal length")
        label = saved.manifest.label
        if label is not None:
            path = old.fields[label].path
            positions = [n for n, field in enumerate(self._new.fields) if field.path == path]
            if not positions:
                raise CheckpointError(f"the converted samples have no label at {path}")
            label = positions[0]
        self.manifest = replace(saved.manifest, layout=self._new, label=label, num_staged=0)

    @contextmanager
    def shard(self, rank: int) -> Iterator[SavedShard]:
        """See ``SavedBuffer.shard``."""
        with self._saved.shard(rank) as shard:
            yield _ConvertedShard(shard, self)

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedBuffer.checked_rows``."""
        for positions, rows in self._saved.checked_rows(rank):
            yield positions, self.converted(rows)

    def has_been_replaced(self) -> bool:
        """See ``SavedBuffer.has_been_replaced``."""
        return self._saved.has_been_replaced()

    def converted(self, rows: Bytes) -> Bytes:
        """Records in their new form, uint8 ``[n, record_bytes]``."""
        if len(rows) == 0:
            return self.no_records()
        records = torch.zeros((len(rows), self._new.record_bytes), dtype=torch.uint8)
        old = self._old
        batch = self._convert(old.rebuild(old.views(torch.from_numpy(rows.copy()))))
        leaves = self._new.leaves(batch)
        if len(leaves[0]) != len(rows):
            raise ValueError(f"convert: {len(rows)} samples have become {len(leaves[0])}")
        self._new.pack(leaves, None, records)
        before, after = self._saved.manifest.label, self.manifest.label
        if before is not None and after is not None:
            labels = old.integers(torch.from_numpy(rows), before)
            if not np.array_equal(labels, self._new.integers(records, after)):
                raise ValueError("convert: labels have changed; a buffer is saved by its labels")
        return records.numpy()

    def no_records(self) -> Bytes:
        """None in their new form, with strides, so that they can be viewed as words."""
        return np.zeros((1, self._new.record_bytes), dtype=np.uint8)[:0]


class _ConvertedShard(SavedShard):
    """A shard of a ``Converted`` buffer."""

    def __init__(self, shard: SavedShard, buffer: Converted) -> None:
        self._shard, self._buffer = shard, buffer

    def arrays(self) -> Arrays:
        """See ``SavedShard.arrays``."""
        arrays = dict(self._shard.arrays())
        if self._buffer.manifest.layout is not None:
            arrays["staged"] = self._buffer.no_records()
        return arrays

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedShard.rows``."""
        for positions, rows in self._shard.rows(slots):
            yield positions, self._buffer.converted(rows)
