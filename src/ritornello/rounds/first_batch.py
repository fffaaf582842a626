"""What the first mini-batch fixes: the layout of records, the label's place, the staging memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ritornello.policies.names import selection_policy
from ritornello.policies.within_bytes import within_bytes
from ritornello.records.layout import Layout
from ritornello.records.misread import check_not_misread
from ritornello.records.nesting import Batch, path_text
from ritornello.records.pages import Paging
from ritornello.records.storage import Storage, free_memory_bytes
from ritornello.rounds.arguments import Arguments
from ritornello.rounds.staging import Staging, WorkerStreams


@dataclass
class Begun:
    """What is known of the samples from the first mini-batch on, or from a load."""

    layout: Layout
    label: int | None
    """The position of the class label among the fields."""
    identity: int | None
    """The position of the field that tells samples apart."""
    staging: Staging

    @classmethod
    def on(
        cls,
        device: torch.device,
        layout: Layout,
        label: int | None,
        arguments: Arguments,
        storage: Storage,
        streams: WorkerStreams,
    ) -> Begun:
        """With mini-batches on a device.

        Args:
            device: where they are.
            layout: of the records.
            label: the position of the class label.
            arguments: of the buffer.
            storage: where the shard lies.
            streams: of the worker; see ``Staging``.

        Raises:
            MemoryError: what is drawn in a step does not fit.
            ValueError: ``identity=`` names no leaf that can be it.
        """
        _check_place(layout, device, storage)
        _check_room(layout, arguments)
        num_draws = arguments.num_draws
        num_per_step = arguments.most_per_draw * num_draws
        staging = Staging(
            layout, device, storage.device, num_per_step, streams, reorders=num_draws > 1
        )
        path = arguments.identity_path
        identity = None if path is None else layout.identity_position(path)
        return cls(layout, label, identity, staging)


def understood(batch: Batch, arguments: Arguments, num_ranks: int) -> tuple[Layout, list[Any]]:
    """The layout of a first mini-batch, and its leaves.

    Raises:
        TypeError, ValueError: it is none, may be misread, or nothing says how much memory it takes.
    """
    check_not_misread(batch)
    layout = Layout.of(batch)
    mean_bytes = 0
    if layout.ragged:
        num_bytes = layout.bytes_in_pages(layout.leaves(batch))
        mean_bytes = int(num_bytes.mean()) + layout.record_bytes if len(num_bytes) else 0
    layout = bounded(layout, arguments, num_ranks, mean_bytes)
    return layout, layout.leaves(batch)


def bounded(layout: Layout, arguments: Arguments, num_ranks: int, mean_bytes: int = 0) -> Layout:
    """A layout with the pages that its ragged fields have in this buffer, if any.

    Args:
        layout: of the first mini-batch, or of a saved buffer.
        arguments: of the buffer.
        num_ranks: that share it.
        mean_bytes: of a sample, if known.

    Raises:
        ValueError: bytes are not bounded, though samples differ in length; or so little that no
            representative fits on some rank.
    """
    capacity, capacity_bytes = int(arguments.capacity), arguments.capacity_bytes
    if not layout.ragged:
        if capacity_bytes is not None and capacity_bytes // layout.record_bytes < num_ranks:
            raise ValueError(
                f"capacity_bytes={capacity_bytes}: a representative takes {layout.record_bytes} "
                f"bytes, and each rank must hold one ({num_ranks} rank(s))"
            )
        return layout
    field = layout.fields[layout.ragged[0]]
    if capacity_bytes is None:
        like_these = (
            f"; {capacity} samples like those of this mini-batch take about "
            f"{capacity * mean_bytes:,} bytes"
        )
        raise ValueError(
            f"{path_text(field.path)} holds samples of unequal length (if these are the fields of "
            "a sample, give them as a dict): the buffer must know how much memory it may take for "
            f"them. Give capacity_bytes=, over all ranks{like_these if mean_bytes else ''}"
        )
    within_bytes(selection_policy(arguments.selection), 1)
    paging = Paging.within(capacity_bytes, capacity, layout.record_bytes, num_ranks)
    return replace(layout, paging=paging)


def _check_place(layout: Layout, device: torch.device, storage: Storage) -> None:
    """Checks that ragged fields are where they can be.

    Raises:
        ValueError: mini-batches or shards are on an accelerator.
    """
    if not layout.ragged:
        return
    path = path_text(layout.fields[layout.ragged[0]].path)
    if device.type != "cpu":
        raise ValueError(
            f"{path} holds samples of unequal length, and the mini-batch is on {device}: offer "
            "such mini-batches from CPU memory, and move what update returns (with encode=, let it "
            "give every leaf in CPU memory)"
        )
    if storage.device.type != "cpu" or storage.kind == "pinned":
        raise ValueError(
            f"storage={str(storage)!r}: samples of unequal length ({path}) are stored in CPU "
            "memory or in a file; use 'auto', 'cpu', 'shared' or 'file:DIR'"
        )


def _check_room(layout: Layout, arguments: Arguments) -> None:
    """Checks that the staging memory fits: the system may give it, and end the process later."""
    num_per_step = arguments.most_per_draw * arguments.num_draws
    needed, free = 2 * num_per_step * layout.record_bytes, free_memory_bytes()
    if free is not None and needed > free:
        rate = "num_representatives" if not arguments.rate_may_change else "most_representatives"
        draws = f", num_draws={arguments.num_draws}" if arguments.num_draws > 1 else ""
        raise MemoryError(
            f"{rate}={arguments.most_per_draw}{draws}: a step's representatives of "
            f"{layout.record_bytes:,} bytes need {needed / 1e9:.2f} GB beside the shard, and "
            f"{free / 1e9:.2f} GB are free"
        )


def device_of(leaves: list[Any]) -> torch.device:
    """Where mini-batches are: on the accelerator, if a leaf is."""
    cpu = torch.device("cpu")
    return next((leaf.device for leaf in leaves if leaf.device != cpu), cpu)
