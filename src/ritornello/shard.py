"""The shard: the rows that one rank holds in its own memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints


class Shard:
    """``num_rows`` records of ``record_bytes`` bytes in one array.

    Only the rank's worker touches it. Memory is taken, and touched, once, here.

    Args:
        num_rows: this rank's part of the capacity.
        record_bytes: a multiple of 16.
        device: where the rows lie: the CPU or a CUDA device.

    Raises:
        MemoryError: it does not fit; says how much is needed.
    """

    def __init__(self, num_rows: int, record_bytes: int, device: torch.device) -> None:
        try:
            # Zeros written, not merely promised: the first touch of memory is slow, and
            # belongs here rather than in some later round.
            self.rows = torch.empty((num_rows, record_bytes), dtype=torch.uint8, device=device)
            self.rows.zero_()
        except RuntimeError as error:
            gigabytes = num_rows * record_bytes / 1e9
            raise MemoryError(
                f"the shard needs {gigabytes:.2f} GB on {device} ({num_rows} records of "
                f"{record_bytes} bytes): lower the capacity, or use more ranks"
            ) from error
        self._words = self.rows.view(torch.int64)
        # NumPy moves rows on the calling thread alone; torch would start a second pool of
        # threads in the worker, which then competes with the trainer's.
        self._array = self._words.numpy() if device.type == "cpu" else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all the rows."""
        return self.rows.numel()

    def write(self, slots: Ints, records: Tensor, rows: Ints) -> None:
        """Writes ``records[rows]`` to ``slots``.

        Args:
            slots: int64 ``[n]``, distinct.
            records: uint8 ``[m, record_bytes]`` on the shard's device.
            rows: int64 ``[n]``, which of the records.
        """
        words = records.view(torch.int64)
        if self._array is not None:
            self._array[slots] = words.numpy()[rows]
        else:
            device = self.rows.device
            source = words.index_select(0, torch.from_numpy(rows).to(device))
            self._words.index_copy_(0, torch.from_numpy(slots).to(device), source)

    def gather(self, slots: Ints, out: Tensor) -> None:
        """Reads ``slots`` (int64 ``[n]``) into ``out``, uint8 ``[n, record_bytes]``, contiguous."""
        words = out.view(torch.int64)
        if self._array is not None:
            # mode="clip" lets NumPy write to `out` without a buffer; the slots are in range.
            np.take(self._array, slots, axis=0, out=words.numpy(), mode="clip")
        else:
            index = torch.from_numpy(slots).to(self.rows.device)
            torch.index_select(self._words, 0, index, out=words)
