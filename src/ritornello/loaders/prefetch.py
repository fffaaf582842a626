"""A loader whose mini-batches come augmented, and on the device, while the model trains."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from copy import deepcopy
from functools import partial
from itertools import count
from typing import Any

import torch

from ritornello.buffer import RehearsalBuffer
from ritornello.loaders.composition import composed_steps_of
from ritornello.loaders.evenly import Evenly
from ritornello.records import accelerators
from ritornello.records.nesting import Batch, leaves_of, mapped
from ritornello.rounds.steps import Steps
from ritornello.rounds.worker import EXIT_SECONDS, Errand, Worker

Prepared = tuple[Batch, torch.Event | None, Any]
"""A mini-batch, what marks that it is ready, and the loader's state behind it."""


def rehearse(
    loader: Iterable[Batch],
    buffer: RehearsalBuffer,
    device: str | torch.device | None = None,
    *,
    with_mask: bool = False,
) -> Rehearsed:
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
            buffer's ``num_representatives`` follows it. Of ``evenly``, where ranks have unequally
            many mini-batches.
        buffer: the rehearsal buffer.
        device: where the mini-batches shall be. None: where the loader puts them, on the trainer's
            stream. A buffer's ``encode`` gets them as the loader gives them.
        with_mask: whether each mini-batch comes as ``(batch, mask)``, with its own
            ``RehearsalBuffer.past_mask``. It stays right where others, such as a trainer that is
            given this loop as its loader, take mini-batches ahead of time.

    Returns:
        An iterator over augmented mini-batches; see ``RehearsalBuffer.update``, which also says
        what raises. Of a loader with ``state_dict`` and ``load_state_dict``, such as torchdata's
        ``StatefulDataLoader``, it has both, too: the loader itself is a step ahead, but this state
        is of the mini-batch that the loop has got last, so that one that goes on from it trains on
        each mini-batch once. ``load_state_dict`` comes before the first mini-batch.
    """
    even = loader if isinstance(loader, Evenly) else None
    loader = loader if even is None else even.loader
    is_stateful = all(
        callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
    )
    received = _received(loader, even, buffer, device, with_mask, is_stateful)
    return StatefulRehearsed(loader, received) if is_stateful else Rehearsed(received)


class Rehearsed(Iterator[Batch]):
    """What ``rehearse`` returns: augmented mini-batches, until the loader or the loop ends.

    Args:
        received: each with the loader's state when it had given it; returns that at the end.
    """

    def __init__(self, received: Generator[tuple[Batch, Any], None, Any]) -> None:
        self._received = received
        self._has_begun = False
        self._state: Any = None  # of the loader, at what the loop has got last

    def __next__(self) -> Batch:
        self._has_begun = True
        try:
            batch, self._state = next(self._received)
        except StopIteration as end:
            self._state = self._state if end.value is None else end.value
            raise StopIteration from None
        return batch

    def close(self) -> None:
        """Ends it early. To let it go does the same."""
        self._received.close()


class StatefulRehearsed(Rehearsed):
    """What ``rehearse`` returns of a loader that has a state.

    Args:
        loader: whose mini-batches come.
        received: see ``Rehearsed``.
    """

    def __init__(self, loader: Any, received: Generator[tuple[Batch, Any], None, Any]) -> None:
        super().__init__(received)
        self._loader = loader

    def state_dict(self) -> Any:
        """The loader's state at the mini-batch that the loop has got last."""
        return self._loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: Any) -> None:
        """Has the loader go on from there.

        Raises:
            RuntimeError: a mini-batch has come already.
        """
        if self._has_begun:
            raise RuntimeError(
                "rehearse: load_state_dict comes before the first mini-batch: call rehearse again, "
                "and load the state into what it returns"
            )
        self._loader.load_state_dict(state)


def _state_of(loader: Any) -> Any:
    """A copy of a loader's state, which it may go on to change."""
    try:
        return deepcopy(loader.state_dict())
    except AttributeError:  # it only wraps one that has none, as Accelerate's do
        return None


def _received(
    loader: Iterable[Batch],
    even: Evenly | None,
    buffer: RehearsalBuffer,
    device: str | torch.device | None,
    with_mask: bool,
    is_stateful: bool,
) -> Generator[tuple[Batch, Any], None, Any]:
    target = None if device is None else accelerators.with_index(torch.device(device))
    stream = None
    if target is not None and accelerators.has_streams(target):
        stream = accelerators.new_stream(target)
    batches, steps, composed = iter(loader), buffer._steps, composed_steps_of(loader)

    def prepare(batches: Iterable[Batch], stream: torch.Stream | None) -> Prepared | None:
        with accelerators.on_streams(() if stream is None else (stream,)):
            for batch in batches:
                state = _state_of(loader) if is_stateful else None
                placed = batch if target is None else _moved(batch, target)
                buffer._check_open("rehearse")
                # What is stored may be something else, that is better left where it is.
                joined = steps.prepare(placed, "rehearse", offered=batch)
                return joined, accelerators.mark(steps.trainer_device), state
        return None

    def begin_next(batches: Iterable[Batch]) -> Errand[Prepared | None]:
        """Has the next one prepared, behind all that the trainer has asked the device for."""
        if stream is None:
            preparing = Errand(partial(prepare, batches, _stream_of_the_trainer(steps)))
        else:
            stream.wait_stream(accelerators.current_stream(stream.device))
            preparing = Errand(partial(prepare, batches, stream))
        ahead.start(preparing)
        return preparing

    ahead = Worker("ritornello-rehearse")
    coming = None
    try:
        coming = begin_next(batches)
        for number in count(1):
            ahead.finish(coming)
            prepared = coming.result
            # Ranks talk on the trainer's thread alone, so that all do it in the same order.
            if even is not None and even.go_on(prepared and prepared[0]) and prepared is None:
                coming = begin_next((even.empty(),))
                ahead.finish(coming)
                prepared = coming.result
            if prepared is None:
                return _state_of(loader) if is_stateful else None
            batch, ready, state = prepared
            if ready is not None:
                _hand_over(batch, ready, steps.trainer_device)
            if composed is not None:
                buffer.num_representatives = composed.num_past(number)
            steps.start_round()
            if with_mask:
                batch = batch, steps.past_mask()
            coming = begin_next(batches)
            yield batch, state
            # Held here, it could not be freed while the next one trains.
            del batch, prepared
    finally:
        if coming is not None:
            ahead.finish(coming)
        ahead.stop(EXIT_SECONDS)
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
    return mapped(batch, partial(_placed, device=device))


def _placed(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    accelerators.keep_for_this_thread(leaf)  # the loader may let it go before it was read
    return leaf.to(device, non_blocking=accelerators.has_streams(device))


def _hand_over(batch: Batch, ready: torch.Event, device: torch.device) -> None:
    """Orders the trainer's stream behind the copy, and its memory's reuse behind the trainer."""
    accelerators.current_stream(device).wait_event(ready)
    for _, leaf in leaves_of(batch):
        accelerators.keep_for_this_thread(leaf)
