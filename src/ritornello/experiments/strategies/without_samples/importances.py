"""How much each weight has done for what was learnt, and what it costs to change it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ritornello.experiments.strategies.base import bytes_of


class Importances:
    """The importances of synaptic intelligence: plain functions of weights and gradients.

    In each step of a task a weight has lowered the loss by about ``-g * (after - before)``, where
    ``g`` is the gradient of the task's own loss. At the task's end what it has done altogether,
    divided by the square of how far it has gone, is added to its importance::

        importance += sum over steps of -g * (after - before) / ((end - start) ** 2 + damping)

    It is never below 0, as in the authors' code: else the surrogate would have no minimum.

    Args:
        damping: what keeps weights that have hardly moved from a large importance.

    Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence" (ICML 2017),
    eq. 3 to 5.
    """

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self.anchor: list[Tensor] | None = None
        """The weights at the end of the last task; before it, at the beginning of the first."""
        self.importance: list[Tensor] = []
        self._done: list[Tensor] = []  # for the running task
        self._before: list[Tensor] = []

    def begin(self, model: nn.Module) -> None:
        """Begins with a model's weights, where it has not begun.

        What was loaded may be of a model with fewer classes: weights of further ones are not
        important yet, and their anchor is where they begin.

        Raises:
            ValueError: it is of another model.
        """
        weights = [weight.detach() for weight in trainable(model)]
        nothing = [torch.zeros_like(weight) for weight in weights]
        if self.anchor is None:
            self.anchor = [weight.clone() for weight in weights]
            self.importance, self._done = nothing, [each.clone() for each in nothing]
        elif not _are_alike(self.anchor, weights):  # they were loaded
            self.anchor = _widened(self.anchor, weights)
            self.importance = _widened(self.importance, nothing)
            self._done = _widened(self._done, nothing)

    def surrogate(self, model: nn.Module) -> Tensor:
        """The sum of ``importance * (weight - anchor) ** 2`` over all weights."""
        assert self.anchor is not None
        parts = zip(self.importance, trainable(model), self.anchor, strict=True)
        return torch.stack(
            [(importance * (weight - anchor) ** 2).sum() for importance, weight, anchor in parts]
        ).sum()

    def begin_step(self, model: nn.Module) -> None:
        """Notes the weights before a step."""
        self._before = [weight.detach().clone() for weight in trainable(model)]

    @torch.no_grad()
    def end_step(self, model: nn.Module, strength: float = 0.0) -> None:
        """Adds what the step has done.

        Args:
            model: after the step, with the gradients of the step.
            strength: how much of the surrogate was part of the loss; it counts for nothing.
        """
        assert self.anchor is not None
        parts = zip(
            trainable(model), self._before, self.anchor, self.importance, self._done, strict=True
        )
        for weight, before, anchor, importance, done in parts:
            if weight.grad is not None:
                gradient = weight.grad - 2 * strength * importance * (before - anchor)
                moved = weight - before
                # A step that a gradient scaler has left out had gradients that are not finite.
                done -= torch.where(moved == 0, moved, gradient * moved)

    @torch.no_grad()
    def end_task(self, model: nn.Module) -> None:
        """Makes importances of what was done, and the weights the new anchor."""
        assert self.anchor is not None
        self.add(
            [weight - start for weight, start in zip(trainable(model), self.anchor, strict=True)]
        )
        self.anchor = [weight.detach().clone() for weight in trainable(model)]

    def add(self, moved: list[Tensor]) -> None:
        """Adds what was done to the importances.

        Args:
            moved: how far each weight has gone meanwhile.
        """
        parts = zip(self.importance, self._done, moved, strict=True)
        self.importance = [
            (importance + done / (far**2 + self.damping)).clamp(min=0)
            for importance, done, far in parts
        ]
        self._done = [torch.zeros_like(done) for done in self._done]

    @property
    def held_bytes(self) -> int:
        """The memory of all that is kept for each weight."""
        return bytes_of([*(self.anchor or []), *self.importance, *self._done, *self._before])

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on between two steps: copies."""
        parts = {"anchor": self.anchor, "importance": self.importance, "done": self._done}
        return {
            name: None if part is None else [each.clone() for each in part]
            for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""
        copies = {
            name: None if part is None else [each.clone() for each in part]
            for name, part in state.items()
        }
        self.anchor = copies["anchor"]
        self.importance, self._done = copies["importance"] or [], copies["done"] or []

    def adopt(self, states: list[dict[str, Any]]) -> None:
        """Goes on from the mean of what several ranks gave."""
        self.load_state_dict(states[0])
        if self.anchor is not None:
            for name, own in (("importance", self.importance), ("done", self._done)):
                everyone = zip(*(each[name] for each in states), strict=True)
                own[:] = [torch.stack(each).mean(dim=0) for each in everyone]


def _are_alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return [(each.shape, each.device) for each in some] == [
        (each.shape, each.device) for each in others
    ]


def _widened(old: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
    """What each weight has, where the fresh ones are; further classes have the fresh rows.

    Raises:
        ValueError: they are not of the same model.
    """
    shapes = [(tuple(own.shape), tuple(new.shape)) for own, new in zip(old, fresh, strict=False)]
    odd = [each for each in shapes if each[0] != each[1] and not _is_wider(*each)]
    if odd or len(old) != len(fresh):
        what = "{} and {}".format(*odd[0]) if odd else f"{len(old)} and {len(fresh)} weights"
        raise ValueError(f"the importances are those of another model: see {what}")
    moved = [own.to(new.device) for own, new in zip(old, fresh, strict=True)]
    return [
        own if own.shape == new.shape else torch.cat((own, new[len(own) :]))
        for own, new in zip(moved, fresh, strict=True)
    ]


def _is_wider(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return shape[1:] == other[1:] and shape[:1] < other[:1]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are learnt, always in the same order."""
    return [weight for weight in model.parameters() if weight.requires_grad]
