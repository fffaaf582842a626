"""Dark experience replay (DER): representatives come back with the logits they once had.

Source: Buzzega et al., "Dark Experience for General Continual Learning" (NeurIPS 2020), eq. 5.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello import RehearsalBuffer
from ritornello.experiments.config import Recipe
from ritornello.experiments.strategies.base import RehearsalStrategy


class DER(RehearsalStrategy):
    """New samples by their labels; past ones by the distance to their stored logits.

    New and past samples go through the model in one forward pass. Without batch normalisation
    that is the same as in two.

    Args:
        buffer: of (images, labels, logits).
        alpha: weight of the squared distance between logits, averaged over the classes.
        logits_dtype: of the stored logits, such as ``torch.float16``.
        others: see ``RehearsalStrategy``.
    """

    stores_logits: ClassVar[bool] = True

    def __init__(
        self,
        buffer: RehearsalBuffer,
        *,
        alpha: float,
        logits_dtype: torch.dtype = torch.float32,
        **others: Any,
    ) -> None:
        super().__init__(buffer, **others)
        self.alpha, self.logits_dtype = alpha, logits_dtype

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {"alpha": recipe.alpha, "logits_dtype": getattr(torch, recipe.logits_dtype)}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the new samples, and ``alpha`` times the distance of the past ones."""
        draws = self.draw()
        parts = [images, *(past.images for past in draws)]
        new, *old = model(torch.cat(parts)).split([len(part) for part in parts])
        self.offer(images, labels, new.detach().to(self.logits_dtype))
        loss = self.mean_new(self.criterion(new, labels))
        if draws:
            loss = loss + self.alpha * self.mean_past(distance(old[0], draws[0].logits))
        return loss


def distance(logits: Tensor, stored: Tensor | None) -> Tensor:
    """The squared distance of each sample's logits to the stored ones, mean over the classes."""
    assert stored is not None
    return (logits - stored.to(logits.dtype)).square().mean(dim=1)
