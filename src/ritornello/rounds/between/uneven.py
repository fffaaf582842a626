"""Ranks whose loaders give unequally many mini-batches: all go on until the last one has ended."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch, Path, leaves_of, mapped
from ritornello.records.ragged import emptied, empty_lists, pattern_of, ragged_paths
from ritornello.rounds.first_batch import bounded
from ritornello.rounds.steps import Steps
from ritornello.transports.agreement import gather_counts, gather_padded

ENDED_WITHOUT, ENDED, FAILED, HAS = range(4)
"""What a rank tells the others of its loader: it has ended, and never gave anything; it has ended;
it failed; it has given a mini-batch, and so many samples more than this number says."""


class _Pattern(NamedTuple):
    """What mini-batches are like."""

    batch: Batch
    """One without samples; but of ragged leaves a single one, of no length."""
    ragged: frozenset[Path]
    """Where these are."""
    stored: tuple[Batch, frozenset[Path]] | None = None
    """The same two of what is stored of them, if that is something else."""


class Together:
    """What a rank and the others know of each other's loaders.

    Args:
        steps: of this rank.
        call: in which all of them are.
        like: a mini-batch as those of the loader are; None: the first one that comes tells.
    """

    def __init__(self, steps: Steps, call: str, like: Batch | None = None) -> None:
        self._steps, self._call = steps, call
        self._pattern: _Pattern | None = None if like is None else self._pattern_of(like)

    def says_nothing(self, batch: Batch) -> bool:
        """Whether a mini-batch does not say what such are like, as ``[]``, and none has before."""
        return self._pattern is None and not list(leaves_of(batch, whole=self._ragged_in(batch)))

    def tell(self, batch: Batch | None, num_samples: int = 0, has_failed: bool = False) -> Ints:
        """Tells the other ranks what this one's loader has given; blocks until all have.

        Args:
            batch: what it has given; None if it has ended.
            num_samples: in it.
            has_failed: whether it raised an error.

        Returns:
            int64 ``[num_ranks]``: ``ENDED``, ``FAILED``, or ``HAS`` and the number of samples.

        Raises:
            CheckpointError, PeerLostError: see ``Steps.with_peers``.
        """
        if batch is not None and self._pattern is None and not has_failed:
            self._pattern = self._pattern_of(batch)
        own = HAS + num_samples
        if batch is None:
            own = ENDED_WITHOUT if self._pattern is None else ENDED
        told: Ints = self._steps.with_peers(
            self._call, partial(self._exchange, FAILED if has_failed else own)
        )
        return told

    def empty(self) -> Batch:
        """An empty mini-batch, for a rank whose loader has ended, where another one goes on.

        Raises:
            TypeError: nobody could say what it is like.
        """
        if self._pattern is None:
            raise TypeError(
                self._steps.here(
                    f"{self._call}: the loader has given nothing, and what the mini-batches of the "
                    "other ranks are like could not be sent from them, as something in them cannot "
                    "be pickled: let this loader give an empty one first (or evenly, with like=)"
                )
            )
        does_not_say = (
            self._pattern.ragged or self._pattern.stored or empty_lists(self._pattern.batch)
        )
        if does_not_say and self._steps.begun is None:
            self._begin(self._pattern)
        return mapped(self._pattern.batch, emptied, self._pattern.ragged)

    def _begin(self, pattern: _Pattern) -> None:
        """Tells the steps what an empty mini-batch does not: what ragged samples are like."""
        arguments, rounds = self._steps.arguments, self._steps.rounds
        if self._steps.outputs.coding.encodes:
            trained = Layout.of_leaves(pattern.batch, pattern.ragged)
            self._steps.outputs.coding.learn(trained)
        layout = Layout.of_leaves(*(pattern.stored or (pattern.batch, pattern.ragged)))
        layout = bounded(layout, arguments, rounds.transport.num_ranks)
        label = layout.label_position(arguments.label_path, rounds.needs_labels)
        self._steps.begin_restored(layout, label, on_gpu=False)

    def _pattern_of(self, batch: Batch) -> _Pattern:
        ragged, coding = self._ragged_in(batch), self._steps.outputs.coding
        stored = None
        if coding.encodes:
            encoded = coding.encoded(batch)
            in_stored = ragged_paths(encoded)
            stored = mapped(encoded, pattern_of, in_stored), in_stored
        return _Pattern(mapped(batch, pattern_of, ragged), ragged, stored)

    def _ragged_in(self, batch: Batch) -> frozenset[Path]:
        begun = None if self._steps.outputs.coding.encodes else self._steps.begun
        return ragged_paths(batch) if begun is None else begun.layout.ragged_paths

    def _exchange(self, own: int) -> Ints:
        """On the worker's thread."""
        transport = self._steps.rounds.transport
        told = gather_counts(transport, own)
        if told.max() >= HAS and told.min() == ENDED_WITHOUT:
            sender = int((told >= HAS).argmax())
            content = self._as_bytes() if transport.rank == sender else b""
            sent = gather_padded(np.frombuffer(content, np.uint8).astype(np.int64), transport)
            if own == ENDED_WITHOUT:
                with suppress(Exception):  # what is not known here, or could not be sent
                    # Of a rank of our own job, which could do as much without.
                    pattern, kinds = pickle.loads(bytes(sent[sender].astype(np.uint8)))
                    places = iter(kinds)
                    batch, stored = pattern.batch, pattern.stored
                    batch = mapped(batch, lambda leaf: leaf.to(next(places)))
                    if stored is not None:
                        stored = mapped(stored[0], lambda leaf: leaf.to(next(places))), stored[1]
                    self._pattern = pattern._replace(batch=batch, stored=stored)
        return told

    def _as_bytes(self) -> bytes:
        """The pattern, in CPU memory, and where its tensors are; nothing if it cannot be.

        A kind of device, such as "cuda", is another rank's own.
        """
        kinds = list[str]()

        def noted(leaf: Tensor) -> Tensor:
            kinds.append(leaf.device.type)
            return leaf.cpu()

        assert self._pattern is not None
        try:
            batch, stored = mapped(self._pattern.batch, noted), self._pattern.stored
            if stored is not None:
                stored = mapped(stored[0], noted), stored[1]
            return pickle.dumps((self._pattern._replace(batch=batch, stored=stored), kinds))
        except Exception:  # containers may raise anything
            return b""


def _batches_of(loader: Iterable[Batch]) -> Iterator[Batch]:
    """What a loader gives.

    Raises:
        TypeError: it is none, but such as a mini-batch.
    """
    if isinstance(loader, (Tensor, Mapping)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"fill: loader is a {type(loader).__name__}: it must give mini-batches, such as a "
            "DataLoader or a list of mini-batches"
        )
    return iter(loader)


def fill(steps: Steps, loader: Iterable[Batch], progress: Callable[[int], None] | None) -> int:
    """Offers all samples of a loader; see ``RehearsalBuffer.fill``."""
    ranks, num_offered = Together(steps, "fill"), 0
    batches, has_offered = None, False
    while True:
        batch, num_samples, failure = None, 0, None
        try:
            if has_offered and progress is not None:
                progress(num_offered)
            batches = _batches_of(loader) if batches is None else batches
            batch = next(batches, None)
            if batch is not None:
                num_samples = steps.collect(batch)
        except Exception as error:  # then all ranks end here
            failure = error
        told = ranks.tell(batch, num_samples, failure is not None)
        if failure is not None:
            raise failure
        if (told == FAILED).any():
            steps.drop_prepared()
            raise RuntimeError(
                steps.here(
                    f"fill failed on rank(s) {np.flatnonzero(told == FAILED).tolist()}: see the "
                    "error there. What was offered before is stored, and the buffer goes on"
                )
            )
        if told.max() < HAS:
            return num_offered
        if batch is None:
            steps.collect(ranks.empty())
        steps.start_between_steps(steps.rate)
        num_offered += int((told - HAS).clip(min=0).sum())
        has_offered = True
