"""Dark experience replay (DER): representatives come back with the logits they once had.

Source: Buzzega et al., "Dark Experience for General Continual Learning" (NeurIPS 2020), eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import Past, RehearsalStrategy
from ritornello.experiments.strategies.distances import distance_named
from ritornello.experiments.strategies.finite_logits import FiniteLogits


class DER(RehearsalStrategy):
    """New samples by their labels; past ones by the distance to their stored logits.

    New and past samples go through the model in one forward pass. Without batch normalisation
    that is the same as in two. Where targets are tensors, what the model says takes the logits'
    place, such as images.

    Args:
        buffer: of (images, labels, logits).
        alpha: weight of the distance between logits.
        logits_dtype: of the stored logits, such as ``torch.float16``.
        distance: one of ``distances.DISTANCES``: "mse", as published, or "js".
        others: see ``RehearsalStrategy``.
    """

    stores_logits: ClassVar[bool] = True
    takes_tensors: ClassVar[bool] = True

    def __init__(
        self,
        buffer: RehearsalBuffer,
        *,
        alpha: float,
        logits_dtype: torch.dtype = torch.float32,
        distance: str = "mse",
        **others: Any,
    ) -> None:
        super().__init__(buffer, **others)
        self.alpha, self.logits_dtype = alpha, logits_dtype
        self.distance = distance_named(distance)
        self._finite_logits = FiniteLogits()

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {
            "alpha": recipe.alpha,
            "logits_dtype": getattr(torch, recipe.logits_dtype),
            "distance": recipe.distance,
        }

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the new samples, and ``alpha`` times the distance of the past ones."""
        draws = self.draw()
        parts = [images, *(past.images for past in draws)]
        new, *old = model(torch.cat(parts)).split([len(part) for part in parts])
        self.offer_with_logits(images, labels, new)
        loss = self.mean_new(self.criterion(new, labels))
        if draws:
            loss = loss + self.alpha * self.mean_past(self.distance(old[0], draws[0].logits))
        return loss

    def draw(self) -> list[Past]:
        """See ``RehearsalStrategy.draw``.

        Raises:
            FloatingPointError: logits that were offered on a GPU are not finite.
        """
        self._finite_logits.check(self.task_number)
        return super().draw()

    def offer_with_logits(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Offers a mini-batch with the model's logits for it.

        Raises:
            FloatingPointError: they are not finite (on a GPU, the next ``draw`` says so).
        """
        stored = logits.detach().to(self.logits_dtype)
        self._finite_logits.look(stored, self.task_number)
        self.offer(images, labels, stored)

    def widening(self, num_classes: int) -> Callable[[Any], Any]:
        """See ``Strategy.widening``; here their logits are too few."""
        return partial(with_further_logits, num_classes=num_classes)

    def state_dict(self) -> dict[str, Any]:
        """See ``Strategy.state_dict``.

        Raises:
            FloatingPointError: logits in the buffer are not finite, so that it must not be saved.
        """
        self._finite_logits.check(self.task_number, wait=True)
        return super().state_dict()


def with_further_logits(batch: tuple[Tensor, Tensor, Tensor], num_classes: int) -> Any:
    """Representatives of a buffer that knew fewer classes, with logits for all of them.

    A class that is not a sample's own gets a low logit in training. So a class that nobody knew
    yet gets the lowest of the sample's logits.

    Args:
        batch: images, labels, and logits ``[n, num_known]``.
        num_classes: of the model as it is now.
    """
    images, labels, logits = batch
    lowest = logits.min(dim=1, keepdim=True).values
    further = lowest.expand(-1, num_classes - logits.shape[1])
    return images, labels, torch.cat((logits, further), dim=1)
