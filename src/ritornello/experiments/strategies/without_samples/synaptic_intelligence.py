"""Synaptic intelligence (SI): weights that were important stay where they are.

Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence" (ICML 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import Strategy
from ritornello.experiments.strategies.rehearsal import Rehearsal
from ritornello.experiments.strategies.without_samples.importances import Importances


class Consolidation(Strategy):
    """What strategies with importances have in common: the surrogate is added to the loss.

    Args:
        strength: of the surrogate.
        damping: see ``Importances``.
        is_alone: whether each rank makes steps of its own, and so has importances of its own.
        others: see the strategy that it is joined with.
    """

    remembers_in_itself: ClassVar[bool] = True

    def __init__(
        self,
        *buffer: RehearsalBuffer,
        strength: float,
        damping: float = 0.1,
        is_alone: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(*buffer, **others)
        self.strength, self.importances = strength, Importances(damping)
        self.is_alone = is_alone

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``."""
        return super().of(
            recipe,
            new_buffer,
            strength=recipe.si_strength,
            damping=recipe.si_damping,
            is_alone=recipe.local_steps > 0,
            **common,
        )

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """That of the strategy that it is joined with, and the surrogate."""
        self.importances.begin(model)
        loss = super().loss(model, images, labels)
        if self.task_number:
            loss = loss + self.strength * self.importances.surrogate(model)
        return loss

    @property
    def held_bytes(self) -> int:
        """See ``Strategy.held_bytes``."""
        return super().held_bytes + self.importances.held_bytes

    def state_dict(self) -> dict[str, Any]:
        """See ``Strategy.state_dict``."""
        return super().state_dict() | self._importances(self.is_alone)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_state_dict``."""
        super().load_state_dict(state)
        if self.is_alone:
            self.importances.load_state_dict(state["importances"])

    def adopt(self, states: list[dict[str, Any]]) -> None:
        """See ``Strategy.adopt``."""
        super().adopt(states)
        if self.is_alone:
            self.importances.adopt([each["importances"] for each in states])

    def shared_state_dict(self) -> dict[str, Any]:
        """See ``Strategy.shared_state_dict``."""
        return super().shared_state_dict() | self._importances(not self.is_alone)

    def load_shared_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_shared_state_dict``."""
        super().load_shared_state_dict(state)
        if "importances" in state:
            self.importances.load_state_dict(state["importances"])

    def left(self, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """See ``Strategy.left``."""
        left = super().left(gather)
        if self.is_alone:
            left["of_ranks"] = gather(self.importances.state_dict())
        return left

    def follow(self, left: dict[str, Any], rank: int, num_ranks: int) -> None:
        """See ``Strategy.follow``."""
        super().follow(left, rank, num_ranks)
        of_ranks = left.get("of_ranks", [])
        if self.is_alone and len(of_ranks) == num_ranks:
            self.importances.load_state_dict(of_ranks[rank])
        elif of_ranks:
            self.importances.adopt(of_ranks)

    def _importances(self, are_wanted: bool) -> dict[str, Any]:
        return {"importances": self.importances.state_dict()} if are_wanted else {}


class SI(Consolidation):
    """Trains on new samples alone, and holds back weights that earlier tasks need.

    Gradients that are averaged over the ranks, and the weights that follow, are the same on all of
    them: so are importances, and nothing is sent for them. With local steps each rank has its own,
    of its own way.

    In a loop of one's own: ``begin_task``, behind each step of the optimiser ``end_step(model)``,
    and ``end_task(model)`` behind the last one.

    Args:
        strength: of the surrogate.
        damping: see ``Importances``.
        is_alone: see ``Consolidation``.
        others: see ``Strategy``.
    """

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """``mean CE(B) + strength * surrogate``.

        Raises:
            RuntimeError: no task has begun.
        """
        self._check_begun()
        loss = super().loss(model, images, labels)
        self.importances.begin_step(model)
        return loss

    def end_step(self, model: nn.Module) -> None:
        """See ``Strategy.end_step``."""
        self.importances.end_step(model, self.strength if self.task_number else 0.0)

    def end_task(self, model: nn.Module) -> None:
        """See ``Strategy.end_task``."""
        super().end_task(model)
        self.importances.end_task(model)


class SIRehearsal(SI, Rehearsal):
    """As ``Rehearsal``, and weights are held back as by ``SI``.

    Args:
        buffer: of (images, labels).
        strength: of the surrogate.
        damping: see ``Importances``.
        is_alone: see ``Consolidation``.
        others: see ``Rehearsal``.
    """

    takes_tensors: ClassVar[bool] = False
