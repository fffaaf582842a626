"""A loader whose mini-batches come augmented, and on the device, while the model trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import count

import torch

from ritornello.buffer import RehearsalBuffer
from ritornello.composition import composed_steps_of
from ritornello.records.nesting import Batch, leaves_of, rebuild, template_of


def rehearse(
    loader: Iterable[Batch],
    buffer: RehearsalBuffer,
    device: str | torch.device | None = None,
) -> Iterator[Batch]:
    """The mini-batches of a loader, each augmented by ``buffer.update``, one step ahead.

    While the model trains on one mini-batch, the next one is loaded, copied to the device and
    joined with its representatives in a thread of its own; on CUDA on a stream of its own, so
    that nothing waits for the model::

        for images, labels in ritornello.rehearse(loader, buffer, device="cuda"):
            ...  # forward, backward, step

    The mini-batches are those that the plain loop would give, bit for bit, if the loader gives
    new tensors each time. A mini-batch is offered when the loop gets it, so that the buffer can
    be saved inside the loop, and a loop that is left early has offered what it trained on. Until
    the loop has ended the buffer is not used otherwise, nor closed.

    Args:
        loader: any iterable of mini-batches; ``pin_memory=True`` in a ``DataLoader`` lets the
            copy to a GPU overlap too. Where its ``batch_sampler`` is a ``ComposedSteps``, the
            buffer's ``num_representatives`` follows it.
        buffer: the rehearsal buffer.
        device: where the mini-batches shall be. None: where the loader puts them.

    Yields:
        Augmented mini-batches; see ``RehearsalBuffer.update``, which also says what raises.
    """
    target = None if device is None else torch.device(device)
    stream = torch.cuda.Stream(target) if target is not None and target.type == "cuda" else None
    batches, steps, composed = iter(loader), buffer._steps, composed_steps_of(loader)

    def prepare() -> tuple[Batch, torch.cuda.Event | None] | None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for batch in batches:
                placed = batch if target is None else _moved(batch, target)
                buffer._check_open("rehearse")
                joined = steps.prepare(placed, "rehearse")
                return joined, stream.record_event() if stream is not None else None
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="ritornello-rehearse") as ahead:
        coming, numbers = ahead.submit(prepare), count(1)
        try:
            while (prepared := coming.result()) is not None:
                batch, ready = prepared
                if ready is not None:
                    assert target is not None
                    _hand_over(batch, ready, target)
                if composed is not None:
                    buffer.num_representatives = composed.num_past(next(numbers))
                steps.start_round()
                coming = ahead.submit(prepare)
                yield batch
                # Held here, it could not be freed while the next one trains.
                del batch, prepared
        finally:
            wait([coming])
            steps.drop_prepared()


def _moved(batch: Batch, device: torch.device) -> Batch:
    # What is no tensor is for `update` to refuse.
    leaves = {
        path: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in leaves_of(batch)
    }
    positions = {path: position for position, path in enumerate(leaves)}
    return rebuild(template_of(batch, positions.__getitem__), list(leaves.values()))


def _hand_over(batch: Batch, ready: torch.cuda.Event, device: torch.device) -> None:
    """Orders the trainer's stream behind the copy, and its memory's reuse behind the trainer."""
    trainer = torch.cuda.current_stream(device)
    trainer.wait_event(ready)
    for _, leaf in leaves_of(batch):
        if leaf.is_cuda:
            leaf.record_stream(trainer)
