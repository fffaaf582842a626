"""A loader whose mini-batches come augmented, and on the device, while the model trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count

import torch

from ritornello.buffer import RehearsalBuffer
from ritornello.composition import composed_steps_of
from ritornello.records import accelerators
from ritornello.records.nesting import Batch, leaves_of, rebuild, template_of
from ritornello.rounds.steps import Steps


def rehearse(
    loader: Iterable[Batch],
    buffer: RehearsalBuffer,
    device: str | torch.device | None = None,
) -> Iterator[Batch]:
    """The mini-batches of a loader, each augmented by ``buffer.update``, one step ahead.

    While the model trains on one mini-batch, the next one is loaded, copied to the device and
    joined with its representatives in a thread of its own; with ``device``, on a stream of its
    own, so that nothing waits for the model::

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
        device: where the mini-batches shall be. None: where the loader puts them, on the trainer's
            stream.

    Yields:
        Augmented mini-batches; see ``RehearsalBuffer.update``, which also says what raises.
    """
    target = None if device is None else accelerators.with_index(torch.device(device))
    stream = None
    if target is not None and accelerators.has_streams(target):
        stream = accelerators.new_stream(target)
    batches, steps, composed = iter(loader), buffer._steps, composed_steps_of(loader)

    def prepare(stream: torch.Stream | None) -> tuple[Batch, torch.Event | None] | None:
        with accelerators.on_streams(() if stream is None else (stream,)):
            for batch in batches:
                placed = batch if target is None else _moved(batch, target)
                buffer._check_open("rehearse")
                joined = steps.prepare(placed, "rehearse")
                return joined, accelerators.mark(steps.trainer_device)
        return None

    def submit() -> Future[tuple[Batch, torch.Event | None] | None]:
        """Has the next one prepared, behind all that the trainer has asked the device for."""
        if stream is None:
            return ahead.submit(prepare, _stream_of_the_trainer(steps))
        stream.wait_stream(accelerators.current_stream(stream.device))
        return ahead.submit(prepare, stream)

    with ThreadPoolExecutor(1, thread_name_prefix="ritornello-rehearse") as ahead:
        coming, numbers = submit(), count(1)
        try:
            while (prepared := coming.result()) is not None:
                batch, ready = prepared
                if ready is not None:
                    _hand_over(batch, ready, steps.trainer_device)
                if composed is not None:
                    buffer.num_representatives = composed.num_past(next(numbers))
                steps.start_round()
                coming = submit()
                yield batch
                # Held here, it could not be freed while the next one trains.
                del batch, prepared
        finally:
            wait([coming])
            if stream is not None:  # what was prepared in vain comes before what follows
                accelerators.current_stream(stream.device).wait_stream(stream)
            steps.drop_prepared()


def _stream_of_the_trainer(steps: Steps) -> torch.Stream | None:
    """Where the loader's work goes if it has no stream of its own: to the trainer's."""
    device = steps.trainer_device
    if not accelerators.has_streams(device):  # not known yet, or the loader's alone
        if not accelerators.is_in_use():
            return None
        device = accelerators.current_device()
    return accelerators.current_stream(device) if accelerators.has_streams(device) else None


def _moved(batch: Batch, device: torch.device) -> Batch:
    # What is no tensor is for `update` to refuse.
    leaves = {
        path: _placed(leaf, device) if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in leaves_of(batch)
    }
    positions = {path: position for position, path in enumerate(leaves)}
    return rebuild(template_of(batch, positions.__getitem__), list(leaves.values()))


def _placed(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    if accelerators.has_streams(leaf.device):  # the loader may let it go before it was read
        leaf.record_stream(accelerators.current_stream(leaf.device))
    return leaf.to(device, non_blocking=accelerators.has_streams(device))


def _hand_over(batch: Batch, ready: torch.Event, device: torch.device) -> None:
    """Orders the trainer's stream behind the copy, and its memory's reuse behind the trainer."""
    accelerators.current_stream(device).wait_event(ready)
    for _, leaf in leaves_of(batch):
        if accelerators.has_streams(leaf.device):
            leaf.record_stream(accelerators.current_stream(leaf.device))
