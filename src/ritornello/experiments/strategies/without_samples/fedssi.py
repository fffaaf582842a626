"""FedSSI: synaptic intelligence for ranks with unlike data, which make steps of their own.

Source: Li et al., "Synaptic Intelligence for Federated Continual Learning" as of arXiv 2412.13779
(ICML 2025), equations 2, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import Strategy
from ritornello.experiments.strategies.without_samples.importances import trainable
from ritornello.experiments.strategies.without_samples.synaptic_intelligence import Consolidation


class FedSSI(Consolidation):
    """Importances of each rank by itself, measured on the way of a model between it and all ranks.

    At a task's end, when weights were averaged, each rank has a surrogate model walk from where the
    task began, on the rank's own samples and pulled to the averaged weights ``w``, and measures
    importances on the way (eq. 5 and 6)::

        v <- v - rate * (g(v) + (1 - locality) / (2 * locality) * (v - w))
        done <- done - g(v) * (v after - v before)

    Then all go on from ``w``, and the next task's loss (eq. 2) is ``mean CE(B)`` and ``strength``
    times the sum of ``importance * (weight - w) ** 2``. Importances stay on their rank; nothing but
    weights is sent.

    Args:
        strength: of the surrogate loss.
        damping: see ``Importances``.
        locality: above 0 (the surrogate model goes where all go) and below 1 (its own way).
        num_reviews: steps of the surrogate model at each task's end.
        rate: of these steps.
        is_alone: see ``Consolidation``.
        others: see ``Strategy``.
    """

    def __init__(
        self,
        *,
        strength: float,
        damping: float = 0.1,
        locality: float = 0.5,
        num_reviews: int = 100,
        rate: float = 0.05,
        is_alone: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(strength=strength, damping=damping, is_alone=is_alone, **others)
        self.locality, self.num_reviews, self.rate = locality, num_reviews, rate
        self._averaged: dict[str, Tensor] | None = None
        self._towards: list[Tensor] = []  # the weights in it

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``."""
        return super().of(
            recipe,
            new_buffer,
            locality=recipe.locality,
            num_reviews=recipe.surrogate_steps,
            rate=recipe.learning_rate,
            **common,
        )

    @property
    def pull(self) -> float:
        """How strongly the surrogate model is pulled to the averaged weights."""
        return (1 - self.locality) / (2 * self.locality)

    def review(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """A step of the surrogate model: see ``Strategy.review``."""
        importances = self.importances
        importances.begin(model)
        if self._averaged is None:
            self._averaged = {name: each.clone() for name, each in model.state_dict().items()}
            self._towards = [weight.detach().clone() for weight in trainable(model)]
            assert importances.anchor is not None
            with torch.no_grad():
                for weight, start in zip(trainable(model), importances.anchor, strict=True):
                    weight.copy_(start)
        model.zero_grad(set_to_none=True)
        logits = model(images)
        (self.criterion(logits, labels).mean() if len(labels) else logits.sum()).backward()
        importances.begin_step(model)
        with torch.no_grad():
            for weight, towards in zip(trainable(model), self._towards, strict=True):
                if weight.grad is not None:
                    weight.sub_(self.rate * (weight.grad + self.pull * (weight - towards)))
        importances.end_step(model)
        model.zero_grad(set_to_none=True)

    def end_task(self, model: nn.Module) -> None:
        """Makes importances of the surrogate model's way, and goes back to the averaged weights."""
        importances = self.importances
        importances.begin(model)
        if self._averaged is not None:
            assert importances.anchor is not None
            pairs = zip(trainable(model), importances.anchor, strict=True)
            importances.add([weight.detach() - start for weight, start in pairs])
            model.load_state_dict(self._averaged)
            self._averaged, self._towards = None, []
        importances.anchor = [weight.detach().clone() for weight in trainable(model)]
