"""GDumb: a model trained on nothing but the buffer. How much of a method is its memory?

Source: Prabhu et al., "GDumb: A Simple Approach that Questions Our Progress in Continual
Learning" (ECCV 2020); their sampler is selection="greedy-balanced".
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ritornello.experiments.strategies.base import RehearsalStrategy


class GDumb(RehearsalStrategy):
    """Lets the stream pass by the buffer; then trains a new model on representatives alone.

    In a loop of one's own: ``observe`` each mini-batch of a task, make a new model, and call
    ``backward`` with empty mini-batches (``images[:0]``), each of which trains on one draw.
    """

    restarts: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Offers a mini-batch without learning from it."""
        self.buffer.draw()
        self.offer(images, labels)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean over one draw."""
        draws = self.draw()
        self.offer(images[:0], labels[:0])
        if not draws:
            raise RuntimeError("GDumb: the buffer is empty: let it observe a task first")
        return self.mean_past(self.criterion(model(draws[0].images), draws[0].labels))
