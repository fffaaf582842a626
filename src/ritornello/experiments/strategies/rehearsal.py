"""Experience replay (ER) from the distributed rehearsal buffer.

Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
Distributed Rehearsal Buffers" (CCGrid 2024); for one process Chaudhry et al., "On Tiny Episodic
Memories in Continual Learning" (2019).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import RehearsalStrategy

LOSS_WEIGHTS = ("by-sample", "by-task")


class Rehearsal(RehearsalStrategy):
    """Every mini-batch of ``b`` new samples is joined with ``r`` representatives.

    Args:
        buffer: of (images, labels).
        loss_weights: "by-sample": all ``b + r`` count the same; "by-task": in task k the new
            ones count 1/k and the past ones 1 - 1/k, each together (van de Ven et al. 2022), so
            that ``begin_task`` must be called.
        others: see ``RehearsalStrategy``.

    Raises:
        ValueError: other ``loss_weights``. See ``RehearsalStrategy``.
    """

    takes_tensors: ClassVar[bool] = True

    def __init__(
        self, buffer: RehearsalBuffer, *, loss_weights: str = "by-sample", **others: Any
    ) -> None:
        super().__init__(buffer, **others)
        self.loss_weights = checked_weights(loss_weights)

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {"loss_weights": recipe.loss_weights}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean over the augmented mini-batch.

        Raises:
            RuntimeError: tasks are weighed, and none has begun.
        """
        if self.loss_weights == "by-task":
            self._check_begun()
        num_new = len(labels)
        images, labels = self.augment(images, labels)
        return self.weighed(self.criterion(model(images), labels), num_new)


def checked_weights(loss_weights: str) -> str:
    """The same.

    Raises:
        ValueError: they are not among ``LOSS_WEIGHTS``.
    """
    if loss_weights not in LOSS_WEIGHTS:
        raise ValueError(f"loss_weights={loss_weights!r}: there are {', '.join(LOSS_WEIGHTS)}")
    return loss_weights
