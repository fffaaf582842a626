"""The shard: the rows that one rank holds in its own memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints

LARGE_RECORD_BYTES = 16_384
"""From here on, copying records one by one is faster than all of them twice."""


class Shard:
    """Records in one array. Only the owner's worker writes it.

    Args:
        rows: uint8 ``[num_rows, record_bytes]``, contiguous; ``record_bytes`` a multiple of 16.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._words = rows.view(torch.int64)
        # NumPy moves rows on the calling thread alone; torch would start a second pool of
        # threads in the worker, which then competes with the trainer's.
        self._array = self._words.numpy() if rows.device.type == "cpu" else None

    @property
    def words(self) -> Ints:
        """All of it in CPU memory as int64, one row after the other: a view."""
        assert self._array is not None
        words: Ints = self._array.reshape(-1)
        return words

    @property
    def num_bytes(self) -> int:
        """Bytes of all the rows."""
        return self.rows.numel()

    def write(self, slots: Ints, records: Tensor, rows: Ints) -> None:
        """Writes ``records[rows]`` to ``slots``, in that order.

        Args:
            slots: int64 ``[n]``; where one comes twice, the later record stays.
            records: uint8 ``[m, record_bytes]`` on the shard's device.
            rows: int64 ``[n]``, which of the records.
        """
        words = records.view(torch.int64)
        if self._array is None:
            device = self.rows.device
            # A GPU writes in no order: of records for one slot, only the last is given to it.
            last = dict(zip(slots.tolist(), rows.tolist(), strict=True))
            slots = np.array(list(last), dtype=np.int64)
            rows = np.array(list(last.values()), dtype=np.int64)
            source = words.index_select(0, torch.from_numpy(rows).to(device))
            self._words.index_copy_(0, torch.from_numpy(slots).to(device), source)
        elif records.shape[1] >= LARGE_RECORD_BYTES:
            array = words.numpy()
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                self._array[slot] = array[row]
        else:
            self._array[slots] = words.numpy()[rows]

    def write_run(self, slots: Ints, records: Tensor) -> None:
        """Writes records in CPU memory to as many slots, in that order: copies them once.

        Args:
            slots: int64 ``[n]``, none twice.
            records: uint8 ``[n, record_bytes]``, contiguous.
        """
        assert self._array is not None
        self._array[slots] = records.view(torch.int64).numpy()

    def gather(self, slots: Ints, out: Tensor) -> None:
        """Reads ``slots`` (int64 ``[n]``) into ``out``, uint8 ``[n, record_bytes]``, contiguous."""
        words = out.view(torch.int64)
        if self._array is not None:
            # mode="clip" lets NumPy write to `out` without a buffer; the slots are in range.
            self._array.take(slots, axis=0, out=words.numpy(), mode="clip")
        else:
            index = torch.from_numpy(slots).to(self.rows.device)
            torch.index_select(self._words, 0, index, out=words)


def rows_of_rank(capacity: int, rank: int, num_ranks: int) -> int:
    """A rank's part of the capacity; the parts add up to it exactly."""
    return capacity // num_ranks + (rank < capacity % num_ranks)


def rows_per_rank(capacity: int, num_ranks: int) -> Ints:
    """Every rank's part of the capacity, int64 ``[num_ranks]``."""
    return np.array([rows_of_rank(capacity, rank, num_ranks) for rank in range(num_ranks)])
