"""Dark experience replay with labels (DER++): a second draw comes back by its labels.

Source: Buzzega et al., "Dark Experience for General Continual Learning" (NeurIPS 2020), eq. 6.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.der import DER


class DERPlusPlus(DER):
    """As ``DER``, and a second draw, independent of the first, by its labels.

    Args:
        buffer: of (images, labels, logits), with ``num_draws=2``.
        alpha: weight of the first draw's distance to its stored logits.
        beta: weight of the second draw's labels.
        others: see ``DER``.
    """

    num_draws: ClassVar[int] = 2

    def __init__(
        self, buffer: RehearsalBuffer, *, alpha: float, beta: float, **others: Any
    ) -> None:
        super().__init__(buffer, alpha=alpha, **others)
        self.beta = beta

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {**super().options(recipe), "beta": recipe.beta}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """New samples, distances of the first draw, and labels of the second."""
        draws = self.draw()
        parts = [images, *(past.images for past in draws)]
        new, *old = model(torch.cat(parts)).split([len(part) for part in parts])
        self.offer_with_logits(images, labels, new)
        loss = self.mean_new(self.criterion(new, labels))
        if draws:
            loss = loss + self.alpha * self.mean_past(self.distance(old[0], draws[0].logits))
            loss = loss + self.beta * self.mean_past(self.criterion(old[1], draws[1].labels))
        return loss
