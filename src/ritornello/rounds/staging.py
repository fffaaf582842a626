"""Staging: between the trainer's tensors and the worker's records.

The trainer's thread copies candidates out of the mini-batch and reads representatives; the
worker moves both between the trainer's device and the shard's. On an accelerator the worker's
copies run on a stream of their own, through pinned memory; with mini-batches on it, nothing here
makes the trainer's thread wait for it.

Trainer and worker use this memory in turns: at most one round is under way; it starts only after
the representatives of the round before were taken, and its own are taken before the next candidates
come. That is why one buffer for each direction is enough, and one event: each turn begins behind
the end of the last one, on whatever streams the two are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records import accelerators
from ritornello.records.layout import Layout, Values
from ritornello.records.pages import expanded
from ritornello.records.paging import Records, pack_pages, pages_of_records, starts_of
from ritornello.rounds.random_streams import Purpose, Streams

WorkerStreams = dict[torch.device, torch.Stream]
"""The worker's streams: one for each accelerator that it uses, for as long as the buffer lives."""


def at_least(pages: Tensor, num_pages: int) -> Tensor:
    """Pages, or, where they are too few, as many anew; a little more, as the next may need it."""
    if num_pages <= len(pages):
        return pages
    return torch.zeros((num_pages + num_pages // 4, pages.shape[1]), dtype=torch.uint8)


def first_rows(rows: Tensor, num_rows: int) -> Tensor:
    """The first ones; themselves if they are all: a view takes longer to make than to look."""
    return rows if num_rows == rows.shape[0] else rows[:num_rows]


class Rows(NamedTuple):
    """Memory for records. One object, as an interrupt may come between two stores."""

    records: Tensor
    columns: Values
    """Its ``Layout.columns``; None where it is not in CPU memory."""

    def first_columns(self, num_rows: int) -> Values:
        """Those of the first records."""
        return [None if column is None else column[:num_rows] for column in self.columns]


class Candidates:
    """Which samples of a mini-batch are candidates: each with the same chance, on its own.

    To choose takes as long as to copy them. So the next choice is made ahead, on the worker's
    thread, for a mini-batch like the last one; another one is chosen from when it comes.

    Args:
        seed: of the choices.
        rank: whose mini-batches.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._streams = Streams(seed, Purpose.CANDIDATES, rank)
        self._last: tuple[int, int, int | None] | None = None
        self._ahead: tuple[tuple[int, int, int | None], Ints | None] | None = None

    def rows(self, step: int, num_samples: int, num_candidates: int | None) -> Ints | None:
        """Those of a mini-batch; while no round runs.

        Args:
            step: whose mini-batch it is.
            num_samples: in the mini-batch.
            num_candidates: how many are expected; None: all.

        Returns:
            int64 ``[m]``, ascending; None: all of them.
        """
        self._last = step, num_samples, num_candidates
        if self._ahead is not None and self._ahead[0] == self._last:
            return self._ahead[1]
        return self._chosen(step, num_samples, num_candidates)

    def look_ahead(self) -> None:
        """Makes the next choice, at the end of a round."""
        if self._last is not None:
            step, num_samples, num_candidates = self._last
            following = step + 1, num_samples, num_candidates
            self._ahead = following, self._chosen(*following)

    def _chosen(self, step: int, num_samples: int, num_candidates: int | None) -> Ints | None:
        if num_candidates == 0:
            return np.zeros(0, dtype=np.int64)
        if num_candidates is None or num_samples <= num_candidates:
            return None
        chance = num_candidates / num_samples
        rows: Ints = (self._streams.at(step).random(num_samples) < chance).nonzero()[0]
        return rows


class Staging:
    """The buffers of both directions, and what orders their use.

    Args:
        layout: of the records.
        trainer_device: where the mini-batches are.
        shard_device: where the shard lies.
        num_representatives: per round, at most: ``r``, times the draws.
        streams: of the buffer; those that are missing are made.
        reorders: whether representatives arrive in another order than they are taken in.

    Attributes:
        trainer_device: where the mini-batches are.
        pages: those of what is staged, if some fields are ragged; in CPU memory, as all is then.
    """

    def __init__(
        self,
        layout: Layout,
        trainer_device: torch.device,
        shard_device: torch.device,
        num_representatives: int,
        streams: WorkerStreams,
        reorders: bool = False,
    ) -> None:
        self._layout = layout
        self.trainer_device = trainer_device
        self._shard_device = shard_device
        for device in (trainer_device, shard_device):
            if accelerators.has_streams(device) and device not in streams:
                streams[device] = accelerators.new_stream(device)
        self._streams = tuple(
            streams[d] for d in dict.fromkeys((trainer_device, shard_device)) if d in streams
        )
        # The one that what is delivered goes through; None: nothing runs late.
        self._stream = streams.get(trainer_device) or streams.get(shard_device)
        self._trainer_stream: torch.Stream | None = None
        self._num_collected = 0
        with self.worker_stream():
            self._collected = self._with_columns(self._rows(0, trainer_device))
            self._arrived = self._rows(0, shard_device)
            self._received = self._rows(num_representatives, shard_device)
            self._delivered = (
                self._received
                if trainer_device == shard_device and not reorders
                else self._rows(num_representatives, trainer_device)
            )
        self._taken = self._with_columns(self._delivered)
        self._turn_end = self._stream.record_event() if self._stream is not None else None
        self._collected_pages = self.pages = None
        self._collected_counts = np.zeros(0, dtype=np.int64)
        if layout.paging is not None:
            page_bytes = layout.paging.page_bytes
            self._collected_pages = self.pages = torch.zeros((0, page_bytes), dtype=torch.uint8)

    @property
    def runs_at_once(self) -> bool:
        """Whether all that is copied is there when the call returns, in memory alone."""
        return self._stream is None and not self.on_gpu and self._shard_device.type == "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether mini-batches are on an accelerator."""
        return self.trainer_device.type != "cpu"

    # On the trainer's thread.

    def collect(self, leaves: Sequence[Any], samples: Values, rows: Ints | None) -> None:
        """Copies candidates out of a mini-batch.

        Args:
            leaves: one tensor ``[b, *shape]`` per field, of ragged ones a ``Ragged``.
            samples: their ``Layout.values_of``.
            rows: int64 ``[m]``, the candidates; None: all samples.
        """
        num_rows = leaves[0].shape[0] if rows is None else len(rows)
        if self._stream is not None:
            self._begin_turn()
        if num_rows > self._collected.records.shape[0]:
            # The worker has read it when its round ends: nothing of it is given away too early.
            self._collected = self._with_columns(self._rows(num_rows, self.trainer_device))
        records, columns = self._collected.records, self._collected.first_columns(num_rows)
        if self._collected_pages is None:  # some may be elsewhere than those of the first one
            leaves = [
                leaf.to(self.trainer_device) if own is None or column is None else leaf
                for leaf, own, column in zip(leaves, samples, columns, strict=True)
            ]
        self._layout.pack_values(leaves, samples, rows, records, columns)
        if self._collected_pages is not None:
            num_bytes = self._layout.bytes_in_pages(leaves)
            counts = -(-(num_bytes if rows is None else num_bytes[rows]) // self._page_bytes)
            pages = at_least(self._collected_pages, int(counts.sum()))
            packed = first_rows(records, num_rows).numpy()
            pack_pages(self._layout, leaves, rows, counts, packed, pages.numpy())
            self._collected_pages, self._collected_counts = pages, counts
        self._num_collected = num_rows
        if self._stream is not None:
            self._end_turn()

    def drop_collected(self) -> None:
        """Drops them again."""
        self._num_collected = 0

    def candidates(self) -> Records:
        """What was collected since the last call; must be used up before the next."""
        num, self._num_collected = self._num_collected, 0
        if self._collected_pages is None:
            return Records(first_rows(self._collected.records, num))
        rows = self._collected.records[:num]
        return Records(rows, self._collected_pages, self._collected_counts[:num])

    def take(self, num_rows: int) -> Tensor:
        """The first staged representatives as records, valid until ``release`` or ``collect``."""
        if self._stream is not None:
            self._begin_turn()
        return first_rows(self._delivered, num_rows)

    def columns_taken(self, num_rows: int) -> Values:
        """``Layout.columns`` of what ``take`` gives; None where it is not in CPU memory."""
        return self._taken.first_columns(num_rows)

    def release(self) -> None:
        """Says that all use of the views from ``take`` has been issued."""
        if self._stream is not None:
            self._end_turn()

    def copy_for_trainer(self, rows: Tensor) -> Tensor:
        """A copy of records of the shard, on the trainer's device; blocks until it is there."""
        # Allocated on the trainer's stream, which uses it; what was there before, too.
        copied = torch.empty_like(rows, device=self.trainer_device)
        if self._stream is None:
            return copied.copy_(rows)
        ready = accelerators.mark(self.trainer_device)
        with self.worker_stream():  # after the last round's writes
            if ready is not None:
                self._stream.wait_event(ready)
            copied.copy_(rows)
            self._stream.synchronize()
        return copied

    # On the trainer's thread while no round runs, to save, restore and rewrite.

    def placed(self, values: Tensor) -> Tensor:
        """The trainer's values on the shard's device; blocks until they are there."""
        placed = values.detach().to(self._shard_device)
        if accelerators.has_streams(self._shard_device):
            accelerators.current_stream(self._shard_device).synchronize()
        return placed

    def finish_writes(self) -> None:
        """Blocks until the worker's streams have done what they were given."""
        for stream in self._streams:
            stream.synchronize()

    def staged(self, num_rows: int) -> Records:
        """Copies of the first representatives that were delivered, in CPU memory."""
        self._await_turn_end()  # `rehearse` may be at its turn on another stream: both only read
        rows, pages = self._delivered[:num_rows].cpu().clone(), None
        if self.pages is not None:
            starts = starts_of(self._layout, rows.numpy())
            counts = pages_of_records(self._layout, rows.numpy(), self._page_bytes)
            pages = self.pages[torch.from_numpy(expanded(starts, counts))]
            starts[:] = counts.cumsum() - counts
        return Records(rows, pages)

    def put_back(self, records: Records) -> None:
        """Places copies of what ``staged`` gave where it was."""
        staged = records.rows
        if records.pages is not None:
            self.pages = records.pages.clone()
        if self._stream is not None:
            self._begin_turn()
        self._delivered[: len(staged)] = staged.to(self.trainer_device)
        if self._stream is not None:
            self._end_turn()

    # On the worker's thread, inside `worker_stream`.

    def worker_stream(self) -> AbstractContextManager[object]:
        """A context in which the worker's work goes to its own streams, where it has any."""
        return accelerators.on_streams(self._streams)

    def arrive(self, candidates: Records) -> Tensor:
        """The candidates' records on the shard's device; if that is the CPU, they are there."""
        if self._stream is not None and self._turn_end is not None:
            self._stream.wait_event(self._turn_end)
        if self.trainer_device == self._shard_device:
            return candidates.rows
        num_rows = len(candidates.rows)
        if num_rows > len(self._arrived):
            self._arrived = self._rows(num_rows, self._shard_device)
        arrived = self._arrived[:num_rows]
        arrived.copy_(candidates.rows, non_blocking=self._stream is not None)
        if self._stream is not None and self._shard_device.type == "cpu":
            self._stream.synchronize()  # also with what was received last, and is overwritten now
        return arrived

    def receive(self, num_rows: int) -> Tensor:
        """Where the exchange puts this round's records: ``[num_rows, record_bytes]``."""
        return first_rows(self._received, num_rows)

    def receive_pages(self, num_pages: int) -> Tensor:
        """Where the exchange puts the pages of this round: ``[num_pages, page_bytes]``."""
        assert self.pages is not None
        self.pages = at_least(self.pages, num_pages)
        return self.pages[:num_pages]

    def deliver(self, num_rows: int, order: Ints | None) -> None:
        """Starts the copy of the received records to where the trainer takes them.

        Args:
            num_rows: how many.
            order: int64 ``[num_rows]``, the place of each; None: as they came.
        """
        received = first_rows(self._received, num_rows)
        if order is not None:
            places = order.argsort()
            if received.device.type != "cpu":
                words = received.view(torch.int64)
                on_device = torch.from_numpy(places).to(self._shard_device)
                received = words.index_select(0, on_device).view(torch.uint8)
            else:
                received = torch.from_numpy(received.numpy()[places])
        if self._delivered is not self._received:
            # What was put in order lies in memory that is given away when this returns.
            non_blocking = self._stream is not None and order is None
            self._delivered[:num_rows].copy_(received, non_blocking=non_blocking)
        if self._stream is not None:
            self._turn_end = self._stream.record_event()

    # Turns, where something runs late.

    def _begin_turn(self) -> None:
        """Orders what the trainer asks for next behind the last turn, on whatever stream it is."""
        self._await_turn_end()
        if not accelerators.has_streams(self.trainer_device):
            return
        stream = accelerators.current_stream(self.trainer_device)
        # PyTorch 2.6 says of a stream and None that they do not differ.
        if self._trainer_stream is None or stream != self._trainer_stream:
            # Freed, this memory is not given away before all who use it are done.
            for rows in (self._collected.records, self._delivered):
                rows.record_stream(stream)
            self._trainer_stream = stream

    def _await_turn_end(self) -> None:
        if self._turn_end is None:
            return
        if accelerators.has_streams(self.trainer_device):
            accelerators.current_stream(self.trainer_device).wait_event(self._turn_end)
        else:
            self._turn_end.synchronize()

    def _end_turn(self) -> None:
        self._turn_end = accelerators.mark(self.trainer_device)

    @property
    def _page_bytes(self) -> int:
        assert self._layout.paging is not None
        return self._layout.paging.page_bytes

    def _with_columns(self, rows: Tensor) -> Rows:
        on_cpu = rows.device.type == "cpu"
        return Rows(
            rows, self._layout.columns(rows) if on_cpu else [None] * len(self._layout.fields)
        )

    def _rows(self, num_rows: int, device: torch.device) -> Tensor:
        pinned = device.type == "cpu" and self._stream is not None
        shape = (num_rows, self._layout.record_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
