"""Staging: between the trainer's tensors and the worker's records.

The trainer's thread copies candidates out of the mini-batch and reads representatives; the
worker moves both between the trainer's device and the shard's. On CUDA the worker's copies
run on a stream of their own, through pinned memory, and events order them with the trainer's
stream; with mini-batches on the GPU, nothing here makes the trainer's thread wait for it.

At most one round is under way; it starts only after the representatives of the round before
were taken, and its own are taken before the next candidates come: that is why one buffer for
each direction is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records.layout import Layout


@dataclass(frozen=True)
class Candidates:
    """Copies of the candidates of a round.

    Attributes:
        records: uint8 ``[m, record_bytes]`` on the trainer's device.
        ready: on CUDA, when they are complete.
    """

    records: Tensor
    ready: torch.cuda.Event | None = None


class Staging:
    """The buffers of both directions, and what orders their use.

    Args:
        layout: of the records.
        trainer_device: where the mini-batches are.
        shard_device: where the shard lies.
        num_representatives: per round, at most: ``r``, times the draws.
        reorders: whether representatives arrive in another order than they are taken in.
    """

    def __init__(
        self,
        layout: Layout,
        trainer_device: torch.device,
        shard_device: torch.device,
        num_representatives: int,
        reorders: bool = False,
    ) -> None:
        self._layout = layout
        self.trainer_device = trainer_device
        self._shard_device = shard_device
        self._cuda = next((d for d in (trainer_device, shard_device) if d.type == "cuda"), None)
        self._stream = torch.cuda.Stream(self._cuda) if self._cuda else None
        self._collected = self._rows(0, trainer_device)
        self._num_collected = 0
        self._arrived = self._rows(0, shard_device)
        self._received = self._rows(num_representatives, shard_device)
        self._delivered = (
            self._received
            if trainer_device == shard_device and not reorders
            else self._rows(num_representatives, trainer_device)
        )
        self._delivery: torch.cuda.Event | None = None
        self._taken: torch.cuda.Event | None = None
        if self._stream is not None:  # not before the zeros are there
            self._stream.wait_stream(torch.cuda.current_stream(self._cuda))

    @property
    def on_gpu(self) -> bool:
        """Whether mini-batches are on a GPU."""
        return self.trainer_device.type == "cuda"

    # On the trainer's thread.

    def collect(self, leaves: Sequence[Tensor], rows: Ints | None) -> None:
        """Copies candidates out of a mini-batch.

        Args:
            leaves: one tensor ``[b, *shape]`` per field.
            rows: int64 ``[m]``, the candidates; None: all samples.
        """
        num_rows = leaves[0].shape[0] if rows is None else len(rows)
        if num_rows > len(self._collected):
            self._collected = self._rows(num_rows, self.trainer_device)
        self._layout.pack(
            [leaf.to(self.trainer_device) for leaf in leaves], rows, self._collected[:num_rows]
        )
        self._num_collected = num_rows

    def drop_collected(self) -> None:
        """Drops them again."""
        self._num_collected = 0

    def candidates(self) -> Candidates:
        """What was collected since the last call; must be used up before the next."""
        records = self._collected[: self._num_collected]
        self._num_collected = 0
        return Candidates(records, self._mark(self.trainer_device))

    def take(self, num_rows: int) -> Tensor:
        """The first staged representatives as records, valid until ``release``."""
        if self._delivery is not None:
            if self.trainer_device.type == "cuda":
                torch.cuda.current_stream(self._cuda).wait_event(self._delivery)
            else:
                self._delivery.synchronize()
        return self._delivered[:num_rows]

    def release(self) -> None:
        """Says that all use of the views from ``take`` has been issued."""
        self._taken = self._mark(self.trainer_device)

    def copy_for_trainer(self, rows: Tensor) -> Tensor:
        """A copy of records of the shard, on the trainer's device; blocks until it is there."""
        # Allocated on the trainer's stream, which uses it; what was there before, too.
        copied = torch.empty_like(rows, device=self.trainer_device)
        if self._stream is None:
            return copied.copy_(rows)
        ready = self._mark(self.trainer_device)
        with self.worker_stream():  # after the last round's writes
            if ready is not None:
                self._stream.wait_event(ready)
            copied.copy_(rows)
            self._stream.synchronize()
        return copied

    # On the trainer's thread while no round runs, to save and restore.

    def staged(self, num_rows: int) -> Tensor:
        """A copy of the first representatives that were delivered, in CPU memory."""
        return self.take(num_rows).cpu().clone()

    def put_back(self, staged: Tensor) -> None:
        """Places what ``staged`` gave where it was."""
        self._delivered[: len(staged)] = staged.to(self.trainer_device)

    def await_trainer(self) -> None:
        """Orders the worker's stream behind what the trainer has issued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._cuda))

    def finish_writes(self) -> None:
        """Waits for what was issued on the worker's stream: other streams may read it then."""
        if self._stream is not None:
            self._stream.synchronize()

    # On the worker's thread, inside `worker_stream`.

    def worker_stream(self) -> AbstractContextManager[object]:
        """A context in which the worker's work goes to its own CUDA stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def arrive(self, candidates: Candidates) -> Tensor:
        """The candidates' records on the shard's device; blocks until they are there."""
        if self._stream is not None and candidates.ready is not None:
            self._stream.wait_event(candidates.ready)
        if self.trainer_device == self._shard_device:
            return candidates.records
        num_rows = len(candidates.records)
        if num_rows > len(self._arrived):
            self._arrived = self._rows(num_rows, self._shard_device)
        arrived = self._arrived[:num_rows]
        arrived.copy_(candidates.records, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return arrived

    def receive(self, num_rows: int) -> Tensor:
        """Where the exchange puts this round's records: ``[num_rows, record_bytes]``."""
        if self._delivery is not None:
            self._delivery.synchronize()  # the copy out of it is done
        if self._stream is not None and self._taken is not None:
            self._stream.wait_event(self._taken)
        return self._received[:num_rows]

    def deliver(self, num_rows: int, order: Ints | None) -> None:
        """Starts the copy of the received records to where the trainer takes them.

        Args:
            num_rows: how many.
            order: int64 ``[num_rows]``, the place of each; None: as they came.
        """
        received = self._received[:num_rows]
        if order is not None:
            places = order.argsort()
            if received.is_cuda:
                words = received.view(torch.int64)
                on_gpu = torch.from_numpy(places).to(self._shard_device)
                received = words.index_select(0, on_gpu).view(torch.uint8)
            else:
                received = torch.from_numpy(received.numpy()[places])
        if self._delivered is not self._received:
            self._delivered[:num_rows].copy_(received, non_blocking=True)
        if self._stream is not None:
            self._delivery = self._stream.record_event()

    def _mark(self, device: torch.device) -> torch.cuda.Event | None:
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def _rows(self, num_rows: int, device: torch.device) -> Tensor:
        pinned = device.type == "cpu" and self._cuda is not None
        shape = (num_rows, self._layout.record_bytes)
        rows = torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        if self._stream is not None and device == self._cuda:
            # The worker's stream uses them, too: freed, they are not given away before it is done.
            rows.record_stream(self._stream)
        return rows
