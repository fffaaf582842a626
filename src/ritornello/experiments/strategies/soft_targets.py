"""Rehearsal with soft targets: representatives also keep what the model said of them.

Sources: Benjamin et al., "Measuring and Regularizing Networks in Function Space" (ICLR 2019), for
outputs that are kept at the end of a task; Li and Hoiem, "Learning without Forgetting" (ECCV
2016), for the loss and its temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.rehearsal import Rehearsal

NOT_KNOWN = float("nan")
"""Stands for the logit of a class that the model did not know."""


class SoftTargets(Rehearsal):
    """As ``Rehearsal``, and past samples keep the logits that they had at the last task's end.

    A sample is offered without logits. At each task's end (``end_task``) all representatives get
    those of the model as it is then, for the classes that have come so far. Samples of the running
    task therefore have labels alone.

    Args:
        buffer: of (images, labels, logits).
        weight: of the divergence, beside the cross-entropy of the same sample.
        num_classes: of the model.
        temperature: what logits are divided by.
        logits_dtype: of the stored logits, such as ``torch.float16``.
        others: see ``Rehearsal``.
    """

    stores_logits: ClassVar[bool] = True
    takes_tensors: ClassVar[bool] = False

    def __init__(
        self,
        buffer: RehearsalBuffer,
        *,
        weight: float,
        num_classes: int,
        temperature: float = 2.0,
        logits_dtype: torch.dtype = torch.float32,
        **others: Any,
    ) -> None:
        super().__init__(buffer, **others)
        self.weight, self.num_classes = weight, num_classes
        self.temperature, self.logits_dtype = temperature, logits_dtype
        self._known: frozenset[int] = frozenset()
        self._is_unended = False  # whether the running task has had steps, and no end

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """See ``RehearsalStrategy.options``."""
        return {
            **super().options(recipe),
            "weight": recipe.soft_targets,
            "temperature": recipe.soft_temperature,
            "logits_dtype": getattr(torch, recipe.logits_dtype),
        }

    def begin_task(self, number: int, classes: Sequence[int] = ()) -> None:
        """See ``Strategy.begin_task``; here the classes must be given.

        Raises:
            ValueError: they are not.
            RuntimeError: another task was trained on, and ``end_task`` was not called.
        """
        if not classes:
            raise ValueError("soft targets: begin_task needs the classes that the task brings")
        if self._is_unended and number != self.task_number:
            raise RuntimeError(
                f"soft targets: task {self.task_number} has not ended, so that its samples have "
                "none: call strategy.end_task(model) behind the last step of each task"
            )
        super().begin_task(number, classes)
        self._known |= set(classes)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean over the augmented mini-batch; past samples count their divergence, too.

        Raises:
            RuntimeError: no task has begun.
        """
        self._check_begun()
        self._is_unended = True
        num_new = len(labels)
        images, labels, targets = self.augment(images, labels, self._without_logits(images))
        logits = model(images)
        losses = self.criterion(logits, labels)
        if len(labels) > num_new:
            new, past = losses.split([num_new, len(labels) - num_new])
            away = divergence(logits[num_new:], targets[num_new:], self.temperature)
            losses = torch.cat((new, past + self.weight * away))
        return self.weighed(losses, num_new)

    @torch.no_grad()
    def end_task(self, model: nn.Module) -> None:
        """Gives all representatives the logits of the model. Each rank looks at its own shard.

        Raises:
            RuntimeError: no task has begun.
        """
        self._check_begun()
        was_training = model.training
        model.eval()
        known = torch.zeros(self.num_classes, dtype=torch.bool)
        known[sorted(self._known)] = True

        def logits_of(images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
            found: Tensor = model(images)
            return found.masked_fill(~known.to(found.device), NOT_KNOWN).to(logits.dtype)

        self.buffer.rewrite(lambda batch: logits_of(*batch), fields=2)
        model.train(was_training)
        self._is_unended = False

    def widening(self, num_classes: int) -> Callable[[Any], Any]:
        """See ``Strategy.widening``; also of a buffer that has stored no logits."""
        return partial(with_further_targets, num_classes=num_classes, dtype=self.logits_dtype)

    def _without_logits(self, images: Tensor) -> Tensor:
        shape = (len(images), self.num_classes)
        return torch.full(shape, NOT_KNOWN, dtype=self.logits_dtype, device=images.device)


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence of each sample from its soft target.

    It is multiplied by the square of the temperature, so that its gradient has the same size at
    every temperature.

    Args:
        logits: ``[n, num_classes]``.
        targets: as many; classes whose logit is not finite take part in neither softmax.
        temperature: what both are divided by.

    Returns:
        ``[n]``; 0 for a sample that has no soft target.
    """
    known = targets.isfinite()
    lowest = torch.finfo(logits.dtype).min
    said, wanted = (
        (each / temperature).masked_fill(~known, lowest).log_softmax(dim=1)
        for each in (logits, targets.to(logits.dtype))
    )
    return temperature**2 * (wanted.exp() * (wanted - said)).sum(dim=1)


def with_further_targets(batch: tuple[Tensor, ...], num_classes: int, dtype: torch.dtype) -> Any:
    """Representatives of a buffer that knew fewer classes, or stored no logits.

    Args:
        batch: images, labels, and perhaps logits ``[n, num_known]``.
        num_classes: of the model as it is now.
        dtype: of the logits.
    """
    images, labels, *stored = batch
    known = stored[0] if stored else torch.empty(len(labels), 0, dtype=dtype)
    further = known.new_full((len(labels), num_classes - known.shape[1]), NOT_KNOWN)
    return images, labels, torch.cat((known, further), dim=1)
