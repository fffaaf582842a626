"""Adapters beside a frozen network learn, alone or with rehearsal; see ``models.adapters``.

Source: Gao et al., "Beyond Prompt Learning: Continual Adapter for Efficient Rehearsal-Free
Continual Learning" (C-ADA, ECCV 2024). To rehearse with adapters is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.models.adapters import orthogonal_loss
from ritornello.experiments.models.build import OWN
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import Strategy
from ritornello.experiments.strategies.er_ace import without
from ritornello.experiments.strategies.rehearsal import Rehearsal


class Adapting(Strategy):
    """What strategies with adapters have in common: the orthogonal loss is added to theirs.

    In a loop of one's own: put adapters into the model once (``adapt``); at each task's beginning
    let them ``grow``, and make the optimiser, and ``DistributedDataParallel``, anew.

    Args:
        orthogonality: weight of the orthogonal loss.
        others: see the strategy that it is joined with.
    """

    def __init__(self, *buffer: RehearsalBuffer, orthogonality: float = 1.0, **others: Any) -> None:
        super().__init__(*buffer, **others)
        self.orthogonality = orthogonality

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``."""
        return super().of(recipe, new_buffer, orthogonality=recipe.orthogonality, **common)

    def apart(self, model: nn.Module) -> Tensor:
        """What is added to the loss: how far the newest adapters are from being orthogonal.

        It is one of weights alone, which all ranks have alike, so that its mean is itself.

        Raises:
            ValueError: the model has no adapters.
        """
        return self.orthogonality * orthogonal_loss(model)


class Adapter(Adapting):
    """Trains adapters on new samples alone, of which only the current task's classes compete.

    So the outputs of all other classes get no gradients, and stay as they are, unless the optimiser
    changes them all the same: give it no weight decay for the last layer, and make it anew with
    each task.

    Args:
        orthogonality: weight of the orthogonal loss.
        others: see ``Strategy``.
    """

    _classes: Sequence[int] = ()
    _others: Tensor | None = None  # outputs of other classes

    def begin_task(self, number: int, classes: Sequence[int] = ()) -> None:
        """See ``Strategy.begin_task``; here the classes must be given.

        Raises:
            ValueError: they are not.
        """
        if not classes:
            raise ValueError("adapter: begin_task needs the classes that the task brings")
        super().begin_task(number, classes)
        self._classes, self._others = classes, None

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy among the task's classes and a sample's own, and the orthogonal loss.

        Raises:
            RuntimeError: no task has begun.
            ValueError: the model has no adapters.
        """
        self._check_begun()
        logits = model(images)
        if self._others is None:  # once per task: a copy to a GPU makes the trainer wait for it
            others = set(range(logits.shape[1])) - set(self._classes)
            self._others = torch.tensor(sorted(others), dtype=torch.int64, device=logits.device)
        losses = self.criterion(without(logits, labels, self._others), labels)
        return self.mean_new(losses) + self.apart(model)


class AdapterRehearsal(Adapting, Rehearsal):
    """As ``Rehearsal``, with adapters and the last layer as all that learns.

    Args:
        buffer: of (images, labels).
        orthogonality: weight of the orthogonal loss.
        others: see ``Rehearsal``.
    """

    takes_tensors: ClassVar[bool] = False

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """That of ``Rehearsal``, and the orthogonal loss.

        Raises:
            RuntimeError, ValueError: see ``Rehearsal``; or the model has no adapters.
        """
        return super().loss(model, images, labels) + self.apart(model)


def check(recipe: Recipe) -> None:
    """Checks what a recipe with adapters can have; others may have all.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    if not recipe.has_adapters:
        return
    if recipe.model in OWN and recipe.model != "cifar-resnet18":
        raise ValueError(
            f"model={recipe.model!r} with strategy={recipe.strategy!r}: adapters stand beside the "
            "stages of a trained model; take one of timm, such as model='resnet18'"
        )
    for name in ("adapted_stages", "adapter_width"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}={getattr(recipe, name)}: it must be at least 1")
    if not 0 < recipe.adapter_scale < float("inf"):
        raise ValueError(f"adapter_scale={recipe.adapter_scale}: it must be above 0")
    if not 0 <= recipe.orthogonality < float("inf"):
        raise ValueError(f"orthogonality={recipe.orthogonality}: it must be 0 or more")
    if 0 < recipe.backbone_rate < 1:
        raise ValueError(
            f"backbone_rate={recipe.backbone_rate} with strategy={recipe.strategy!r}: all "
            "layers but the last one are frozen; use backbone_rate=0"
        )
    if recipe.keeps_optimiser:
        raise ValueError(
            f"keeps_optimiser=True with strategy={recipe.strategy!r}: each task has weights of its "
            "own; use keeps_optimiser=False"
        )
