"""What the first mini-batch fixes: the layout of records, the label's place, the staging memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ritornello.records.layout import Layout
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
        _check_room(layout, arguments)
        num_draws = arguments.num_draws
        num_per_step = arguments.most_per_draw * num_draws
        staging = Staging(
            layout, device, storage.device, num_per_step, streams, reorders=num_draws > 1
        )
        path = arguments.identity_path
        identity = None if path is None else layout.identity_position(path)
        return cls(layout, label, identity, staging)


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


def device_of(leaves: list[Tensor]) -> torch.device:
    """Where mini-batches are: on the accelerator, if a leaf is."""
    cpu = torch.device("cpu")
    return next((leaf.device for leaf in leaves if leaf.device != cpu), cpu)
