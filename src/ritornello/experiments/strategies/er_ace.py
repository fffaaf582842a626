"""ER-ACE: new samples compete among new classes only, so that they do not push the old ones away.

Source: Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual
Learning" (ICLR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import RehearsalStrategy

MOST_NAMED = 8
"""Classes, in an error."""


class ERACE(RehearsalStrategy):
    """Experience replay with an asymmetric cross-entropy.

    From the second task on, the loss of new samples leaves out the logits of the classes that
    came with earlier tasks; that of representatives compares all. The authors leave out all but
    the classes of the current mini-batch; here it is those of the current task (``begin_task``),
    which are the same on every rank. A sample's own class always takes part.

    Args:
        buffer: of (images, labels).
        is_blurry: whether there are samples of classes that no task has named yet.
        others: see ``RehearsalStrategy``.
    """

    _earlier: frozenset[int] = frozenset()
    _seen: frozenset[int] = frozenset()
    _has_looked = False  # at labels of the running task, on a device

    def __init__(self, buffer: RehearsalBuffer, *, is_blurry: bool = False, **others: Any) -> None:
        super().__init__(buffer, **others)
        self.is_blurry = is_blurry

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {"is_blurry": recipe.scenario == "blurry"}

    def begin_task(self, number: int, classes: tuple[int, ...] = ()) -> None:  # type: ignore[override]
        """See ``Strategy.begin_task``; here the classes must be given."""
        if not classes:
            raise ValueError("ER-ACE: begin_task needs the classes that the task brings")
        super().begin_task(number, classes)
        self._has_looked = False
        self._earlier = self._seen - set(classes)
        self._seen |= set(classes)
        self._outputs = torch.tensor(sorted(self._earlier), dtype=torch.int64)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of new samples among new classes, and of past ones among all.

        Raises:
            RuntimeError: no task has begun.
            ValueError: a class that no task has named, unless it is blurry; on a device, looked for
                in each task's first step alone, as the trainer would wait for it.
        """
        self._check_begun()
        num_new = len(labels)
        images, labels = self.augment(images, labels)
        self._check_named(labels)
        logits = model(images)
        new, past = logits.split([num_new, len(labels) - num_new])
        if self._earlier:
            # Once per task: a copy to a GPU makes the trainer wait for it.
            self._outputs = self._outputs.to(new.device)
            new = without(new, labels[:num_new], self._outputs)
        loss = self.mean_new(self.criterion(new, labels[:num_new]))
        if len(past):
            loss = loss + self.mean_past(self.criterion(past, labels[num_new:]))
        return loss

    def _check_named(self, labels: Tensor) -> None:
        if self.is_blurry or (self._has_looked and labels.device.type != "cpu"):
            return
        self._has_looked = True
        unnamed = sorted(set(labels.unique().tolist()) - self._seen)
        if unnamed:
            raise ValueError(
                f"ER-ACE: no task has named the class(es) {unnamed[:MOST_NAMED]}: call "
                "strategy.begin_task(number, classes) for every task so far, with all its classes; "
                "is_blurry=True lets classes come before their task"
            )


def without(logits: Tensor, labels: Tensor, outputs: Tensor) -> Tensor:
    """Logits of which some take no part in the loss, and get no gradients.

    Args:
        logits: ``[n, num_classes]``.
        labels: ``[n]``; a sample's own class always takes part.
        outputs: int64 ``[k]``: which ones are left out, on the same device.
    """
    own = labels[:, None]
    lowest = torch.finfo(logits.dtype).min
    return logits.index_fill(1, outputs, lowest).scatter(1, own, logits.gather(1, own))
