"""The two forms of a sample: in one it is trained on, in the other it is stored.

Such as pixels and the file that they were decoded from, or a latent. What turns one into the other
is the user's; to the buffer a sample is what is stored, and all that it saves is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ritornello.records import accelerators
from ritornello.records.layout import Layout
from ritornello.records.misread import check_not_misread
from ritornello.records.nesting import Batch, leaves_of, path_text
from ritornello.records.ragged import BYTES, Ragged

Function = Callable[[Batch], Batch]


class Decoded(NamedTuple):
    """Representatives as they are trained on."""

    batches: list[Batch]
    """One for each draw."""
    ready: tuple[torch.Event, ...]
    """Behind what makes them, on each device where they are and work runs late."""

    def taken(self) -> list[Batch]:
        """The batches, for what this thread asks their devices for from now on."""
        for ready in self.ready:
            accelerators.current_stream(ready.device).wait_event(ready)
        for _, leaf in leaves_of(self.batches):
            accelerators.keep_for_this_thread(leaf)
        return self.batches


class Drawn:
    """One step's representatives as they are trained on, if they are known yet."""

    decoded: Decoded | None = None


class Coding:
    """What makes one form of the other.

    Args:
        encode: gives what is stored of a mini-batch; None: it is stored as it is.
        decode: gives what is trained on of representatives; None: what is stored.

    Raises:
        TypeError: one cannot be called.
    """

    def __init__(self, encode: Function | None = None, decode: Function | None = None) -> None:
        for name, function in (("encode", encode), ("decode", decode)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}={function!r}: it must be a function of a mini-batch")
        self._encode, self._decode = encode, decode
        self._trained: Layout | None = None  # what mini-batches are like

    @property
    def is_none(self) -> bool:
        """Whether samples have one form."""
        return self._encode is None and self._decode is None

    @property
    def encodes(self) -> bool:
        """Whether another form is stored than is offered."""
        return self._encode is not None

    @property
    def decodes(self) -> bool:
        """Whether another form is given than is stored."""
        return self._decode is not None

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Batch:
        """What is stored of a mini-batch."""
        return batch if self._encode is None else self._encode(batch)

    @torch.no_grad()
    def decoded(self, stored: Batch) -> Batch:
        """What is trained on of representatives."""
        return stored if self._decode is None else self._decode(stored)

    def decoded_draws(self, draws: Sequence[Batch]) -> Decoded:
        """What is trained on of each draw, made by this thread for another."""
        batches = [self.decoded(each) for each in draws]
        devices = {leaf.device for _, leaf in leaves_of(batches) if isinstance(leaf, Tensor)}
        events = (accelerators.mark(device) for device in devices)
        return Decoded(batches, tuple(event for event in events if event is not None))

    def leaves(self, batch: Batch) -> list[Any]:
        """The leaves of a mini-batch as it is trained on; the first one says what they are like.

        Raises:
            TypeError, ValueError: they are not like the first one's, or may be misread.
        """
        if self._trained is not None:
            return self._like(batch)
        check_not_misread(batch)
        trained = Layout.of(batch)
        leaves = trained.leaves(batch)
        self._trained = trained  # only now: what is refused says nothing
        return leaves

    def learn(self, trained: Layout) -> None:
        """Learns what mini-batches are like, as they are trained on."""
        self._trained = trained

    def alone(self, leaves: Sequence[Any]) -> Batch:
        """A mini-batch without representatives, of plain tensors."""
        assert self._trained is not None
        return self._trained.rebuild(leaves)

    def joined(
        self,
        leaves: Sequence[Any],
        draws: Sequence[Batch],
        num_past: int,
        cat: Callable[[Tensor, Sequence[Tensor]], Tensor],
    ) -> Batch:
        """A mini-batch with representatives behind it.

        Args:
            leaves: of the mini-batch.
            draws: what is trained on of each draw.
            num_past: representatives, of all draws.
            cat: joins a tensor and others.

        Raises:
            TypeError, ValueError: what is drawn is not like the mini-batch; names the leaf.
        """
        past = [self._drawn_like(each) for each in draws]
        num_given = sum(each[0].shape[0] for each in past)
        if num_given != num_past:
            raise ValueError(
                f"decode gave {num_given} samples for {num_past} representatives: it must give as "
                "many"
            )
        assert self._trained is not None
        together = [
            leaf.joined([sample for each in others for sample in each.samples])
            if isinstance(leaf, Ragged)
            else cat(leaf, others)
            for leaf, *others in zip(leaves, *past, strict=True)
        ]
        return self._trained.rebuild(together)

    def _like(self, batch: Batch) -> list[Any]:
        assert self._trained is not None
        try:
            return self._trained.leaves(batch)
        except (TypeError, ValueError) as error:
            # The layout is of what is trained on: no record holds it.
            raise type(error)(_of_mini_batches(str(error))) from None

    def _drawn_like(self, batch: Batch) -> list[Any]:
        if self._decode is None:
            who = "without decode, update joins what is stored, which must be like the mini-batch"
        else:
            who = "decode must give representatives like the mini-batch that they join"
        try:
            leaves = self._like(batch)
            assert self._trained is not None
            for field, leaf in zip(self._trained.fields, leaves, strict=True):
                if field.form and leaf.form.endswith(BYTES) != field.form.endswith(BYTES):
                    raise TypeError(
                        f"{path_text(field.path)} is a {leaf.form}, and there a {field.form}"
                    )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who}: {error}") from None
        return leaves


def _of_mini_batches(text: str) -> str:
    """What a layout says of records, where it is one of mini-batches."""
    return text.replace("the buffer's records hold", "the first mini-batch held").replace(
        "the buffer's samples have", "the first mini-batch had"
    )
