"""What ranks tell each other once, in the first round: what they are fed, and in which order.

Ranks that were given the same samples, or that have made several buffers in different order, would
work on without an error.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ritornello.records.layout import Layout
from ritornello.records.ragged import Ragged
from ritornello.transports.agreement import gather_counts, gather_padded, random_number
from ritornello.transports.base import Transport

logger = logging.getLogger(__name__)


class _Other(NamedTuple):
    """Another buffer of this rank."""

    number: int
    has_begun: bool


class OpenBuffer:
    """A buffer among those that this rank has open.

    Args:
        transport: to the other ranks. Blocks until all have called it.
    """

    _all: ClassVar[weakref.WeakSet[OpenBuffer]] = weakref.WeakSet()
    _lock: ClassVar = threading.Lock()

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._number = random_number(transport)
        self._made_by = threading.get_ident()
        self._content = 0
        self._others: list[_Other] = []
        self._has_begun = False
        with self._lock:
            self._all.add(self)

    def begin(self) -> None:
        """Notes which buffers have begun before this one; on the trainer's thread."""
        if self._has_begun:
            return
        self._has_begun = True
        with self._lock:  # ranks may be threads of one process
            others = [each for each in self._all if each._made_by == self._made_by]
        self._others = [
            _Other(each._number, each._has_begun) for each in others if each is not self
        ]

    def note(self, leaves: list[Any]) -> None:
        """Notes what the first mini-batch holds."""
        self._content = _content_number(leaves)

    def close(self) -> None:
        """It is no longer one of the open ones."""
        with self._lock:
            self._all.discard(self)

    def compare(self) -> None:
        """Compares with the other ranks; all call it, in the first round.

        Raises:
            ValueError: on every rank: they have made, or begin with, their buffers in different
                order.
        """
        if self._transport.num_ranks == 1:
            return
        told = np.array([(self._content, 0), *self._others], dtype=np.int64)
        everyone = gather_padded(told, self._transport)
        self._warn_of_equal([int(each[0, 0]) for each in everyone])
        begun = [set(each[1:][each[1:, 1] == 1, 0].tolist()) for each in everyone]
        waiting = [set(each[1:][each[1:, 1] == 0, 0].tolist()) for each in everyone]
        first = [rank for rank, each in enumerate(waiting) if any(each & other for other in begun)]
        if first:
            raise ValueError(
                f"rank(s) {first} begin with this buffer before another one, and other ranks with "
                "the other one before it: all ranks must make their buffers in the same order, and "
                "offer the first mini-batches to them in the same order"
            )

    def _warn_of_equal(self, contents: list[int]) -> None:
        rank = self._transport.rank
        alike = [i for i, each in enumerate(contents) if each == contents[rank]]
        if contents[rank] and len(alike) > 1 and alike[0] == rank:
            logger.warning(
                "ranks %s have given the same first mini-batch: each rank is to train on samples "
                "of its own, as with a DistributedSampler; else the buffer holds each of them "
                "several times",
                alike,
            )


def compare_layouts(layout: Layout, transport: Transport) -> None:
    """Compares it with those of the other ranks; all call it, in the first round.

    Raises:
        ValueError: on every rank: they are not the same.
    """
    digests = gather_counts(transport, layout.digest)
    others = np.flatnonzero(digests != layout.digest).tolist()
    if not others:
        return
    text = (
        f"the samples of rank(s) {others} have another layout than this rank's "
        f"({'; '.join(map(str, layout.fields))}): all ranks must give the same nesting, dtypes and "
        "shapes"
    )
    if gather_counts(transport, len(layout.ragged)).any():
        text += (
            ". (A list whose tensors are by chance of one length may be taken for the fields of a "
            "sample: give jagged nested tensors, which never are)"
        )
    raise ValueError(text)


def _content_number(leaves: list[Any]) -> int:
    """A number that equal mini-batches share; 0 for one in which nothing differs from anything."""
    content, tells = hashlib.sha256(), False
    for leaf in leaves:
        if isinstance(leaf, Ragged):
            parts = [leaf.data(number) for number in range(len(leaf))]
            data = np.concatenate([np.zeros(0, dtype=np.uint8), *parts])
            elements = data[:, None]
            content.update(leaf.lengths.tobytes())
        else:
            plain = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu").copy_(leaf.detach())
            data = plain.reshape(-1).view(torch.uint8).numpy()
            elements = data.reshape(-1, leaf.element_size())
        tells = tells or bool((elements != elements[:1]).any())
        content.update(data.tobytes())
    return int.from_bytes(content.digest()[:8], "little") >> 1 if tells else 0
