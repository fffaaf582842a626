"""A loader that gives all ranks equally many mini-batches, however many each of them has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ritornello.buffer import RehearsalBuffer
from ritornello.records.nesting import Batch
from ritornello.rounds.between.uneven import FAILED, HAS, Together


def evenly(
    loader: Iterable[Batch], buffer: RehearsalBuffer, *, like: Batch | None = None
) -> Evenly:
    """The mini-batches of a loader, and empty ones behind them until all ranks' loaders have ended.

    For streams that give ranks unequally many mini-batches. Before each one the ranks tell each
    other whether they have one; so all of them train on equally many, and none of those is lost::

        for images, labels in ritornello.evenly(loader, buffer):
            images, labels = buffer.update((images, labels))
            losses = criterion(model(images), labels)  # reduction="none"
            ...

    A rank that has run out of new samples trains on ``r`` past ones alone, or, where nothing is
    drawn, on an empty mini-batch, whose mean loss would be NaN: sum the losses. All ranks call
    ``update`` (or ``draw`` and ``offer``) once for each mini-batch.

    Args:
        loader: any iterable of mini-batches; each iteration begins a new one.
        buffer: the rehearsal buffer, over whose ranks it goes. With ``rehearse``, give that the
            same buffer: ``rehearse(evenly(loader, buffer), buffer)``.
        like: a mini-batch as the loader's, of which empty ones are made. None: the rank's first
            one, or, if it never has any, another rank's, which must then be such that it can be
            pickled.

    Raises:
        TypeError: a rank never had a mini-batch, and what those of the others are like is not
            known.
        ValueError: a rank's first mini-batch holds nothing that says what it is like, as ``[]``;
            on the other ranks a RuntimeError that names this one.
        PeerLostError: also where ranks do not call ``update`` equally often.
        RoundError, BufferClosedError: see ``RehearsalBuffer.update``.
    """
    return Evenly(loader, buffer, like)


class Evenly(Iterable[Batch]):
    """What ``evenly`` returns.

    Args:
        loader: see ``evenly``.
        buffer: see ``evenly``.
        like: see ``evenly``.

    Attributes:
        loader: as it was given.
    """

    def __init__(
        self, loader: Iterable[Batch], buffer: RehearsalBuffer, like: Batch | None
    ) -> None:
        self.loader, self._buffer = loader, buffer
        self._ranks = Together(buffer._steps, "evenly", like)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            batch = next(batches, None)
            if not self.go_on(batch):
                return
            yield self.empty() if batch is None else batch
            del batch  # held here, it could not be freed while the next one is loaded

    def go_on(self, batch: Batch | None) -> bool:
        """Whether some rank has a mini-batch; blocks until all have said.

        Args:
            batch: this rank's; None if its loader has ended.

        Raises:
            ValueError, RuntimeError: see ``evenly``.
        """
        self._buffer._check_open("evenly")
        says_nothing = batch is not None and self._ranks.says_nothing(batch)
        told = self._ranks.tell(batch, has_failed=says_nothing)
        here = self._buffer._steps.here
        if says_nothing:
            raise ValueError(
                here(
                    f"evenly: the loader's first mini-batch is {batch!r}, which does not say what "
                    "mini-batches are like: leave it out, as ranks may have unequally many, or let "
                    "it hold tensors without samples, such as images[:0]"
                )
            )
        if failed := np.flatnonzero(told == FAILED).tolist():
            raise RuntimeError(here(f"evenly failed on rank(s) {failed}: see the error there"))
        return bool(told.max() >= HAS)

    def empty(self) -> Batch:
        """What a rank gets whose loader has ended."""
        return self._ranks.empty()
