"""Experience replay (ER) from the distributed rehearsal buffer.

Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
Distributed Rehearsal Buffers" (CCGrid 2024).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from ritornello import RehearsalBuffer
from ritornello.experiments.config import Recipe
from ritornello.experiments.strategies.base import Strategy


class Rehearsal(Strategy):
    """Every mini-batch of ``b`` new samples is joined with ``r`` representatives."""

    def __init__(self, recipe: Recipe, num_ranks: int) -> None:
        num_candidates = recipe.global_num_candidates
        self.buffer = RehearsalBuffer(
            recipe.capacity,
            num_representatives=recipe.global_num_representatives // num_ranks,
            num_candidates=None if num_candidates is None else num_candidates // num_ranks,
            selection=recipe.selection,
            seed=recipe.seed,
        )

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented mini-batch; waits only if the last round is still running."""
        images, labels = self.buffer.update((images, labels))
        return images, labels

    def stats(self) -> dict[str, Any]:
        """The buffer's own."""
        return asdict(self.buffer.stats())

    def close(self) -> None:
        """Closes the buffer."""
        self.buffer.close()
