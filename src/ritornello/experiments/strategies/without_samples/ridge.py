"""Ridge regression of the classes on features: the best that squares give a linear layer.

The sums that it needs do not depend on the order in which samples come, so that nothing is
forgotten. Source: Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute
Memorization and Privacy Protection" (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import Strategy
from ritornello.experiments.strategies.without_samples.solved import Solved


class Ridge(Solved):
    """Minimises ``sum of |W x + b - y|² + penalty * s * |W|²``, where ``y`` is 1 for the class.

    ``s`` is the sum of a feature's squares over all samples, the mean over features, so that the
    penalty does not depend on how large they are; the bias has none.

    Args:
        num_classes: outputs of the last layer.
        penalty: above 0.
        others: see ``Strategy``.
    """

    def __init__(self, num_classes: int, *, penalty: float = 0.03, **others: Any) -> None:
        super().__init__(num_classes, **others)
        self.penalty = penalty

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``."""
        return cls(penalty=recipe.ridge_penalty, **common)

    def statistics(self, features: Tensor, classes: Tensor) -> list[Tensor]:
        """See ``Solved``; behind them ``X'X``, ``[d + 1, d + 1]``."""
        return [*super().statistics(features, classes), features.T @ features]

    def solution(self, *sums: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Solved``."""
        of_classes, squares = sums
        penalties = (self.penalty * squares.diagonal()[:-1].mean()).expand(len(squares)).clone()
        penalties[-1] = 0
        layer = torch.linalg.solve(squares + penalties.diag(), of_classes.T).T
        return layer[:, :-1], layer[:, -1].clone()
