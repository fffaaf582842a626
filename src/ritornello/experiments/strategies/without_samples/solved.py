"""Last layers that are solved for: no gradient, no buffer, no stored sample. Bounds for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello.experiments.strategies.base import Strategy, bytes_of


class Embeds(Protocol):
    """A model, as these strategies see it."""

    last_layer: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, ``[b, d]``; it does not change."""


class Solved(Strategy):
    """Sums up statistics of features as samples pass by once; at a task's end they give the layer.

    The sums are those of all ranks and of all tasks so far, in float64. So neither the order of the
    samples or tasks nor the number of ranks makes a difference, but for what float64 rounds. A
    class that has not come yet is never predicted: its bias is minus infinity.

    In a loop of one's own: ``observe`` each sample of a task once, on any rank, and call
    ``end_task`` on all ranks.

    Args:
        num_classes: outputs of the last layer.
        others: see ``Strategy``.
    """

    solves: ClassVar[bool] = True

    def __init__(self, num_classes: int, **others: Any) -> None:
        super().__init__(**others)
        self._num_classes = num_classes
        self._own: list[Tensor] = []  # of this rank, in the running task
        self._everyone: list[Tensor] = []  # of all ranks, in all tasks that have ended

    def statistics(self, features: Tensor, classes: Tensor) -> list[Tensor]:
        """What is added up over samples, float64, of features with a 1 behind them.

        Args:
            features: float64 ``[b, d + 1]``.
            classes: float64 ``[b, num_classes]``, 1 where a sample is of the class, else 0.

        Returns:
            First the sums of each class, ``[num_classes, d + 1]``; the last column counts samples.
        """
        return [classes.T @ features]

    def solution(self, *sums: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer, weight ``[num_classes, d]`` and bias ``[num_classes]``, by all sums."""
        raise TypeError(f"{type(self).__name__} must define solution")

    @torch.no_grad()
    def observe(self, model: nn.Module | Embeds, images: Tensor, labels: Tensor) -> None:
        """Adds a mini-batch to the sums."""
        if not len(labels):  # a rank may have none left where others have some
            return
        assert callable(model.features)
        features = model.features(images).double()
        behind = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        classes = nn.functional.one_hot(labels, self._num_classes).double()
        self._own = _added(self._own, self.statistics(behind, classes))

    @torch.no_grad()
    def end_task(self, model: nn.Module | Embeds) -> None:
        """Sets the last layer.

        Raises:
            ValueError: it has no bias.
        """
        layer = model.last_layer
        assert isinstance(layer, nn.Linear)
        if layer.bias is None:
            raise ValueError(f"{type(self).__name__}: the model's last layer has no bias")
        if not self._own:  # this rank has seen nothing
            columns = layer.weight.new_zeros(1, layer.in_features + 1, dtype=torch.float64)
            none = layer.weight.new_zeros(1, self._num_classes, dtype=torch.float64)
            self._own = self.statistics(columns, none)
        self._own = [each.to(layer.weight.device) for each in self._own]  # they may be loaded
        if dist.is_initialized():
            for each in self._own:
                dist.all_reduce(each)
        self._everyone, self._own = _added(self._everyone, self._own), []
        weight, bias = self.solution(*self._everyone)
        bias[self._everyone[0][:, -1] == 0] = -torch.inf
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        if dist.is_initialized():  # other processors may round otherwise
            for part in (layer.weight, layer.bias):
                dist.broadcast(part.data, src=0)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """There is none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__} makes no steps: call observe for each mini-batch, and end_task "
            "at the task's end"
        )

    @property
    def held_bytes(self) -> int:
        """See ``Strategy.held_bytes``: the sums."""
        return bytes_of([*self._own, *self._everyone])

    def state_dict(self) -> dict[str, Any]:
        """See ``Strategy.state_dict``."""
        return {"sums": [each.clone() for each in self._own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_state_dict``."""
        self._own = [each.clone() for each in state["sums"]]

    def adopt(self, states: list[dict[str, Any]]) -> None:
        """See ``Strategy.adopt``: the first rank goes on with the sums of all."""
        self._own = []
        if not dist.is_initialized() or dist.get_rank() == 0:
            for state in states:
                self._own = _added(self._own, state["sums"])

    def shared_state_dict(self) -> dict[str, Any]:
        """See ``Strategy.shared_state_dict``."""
        return {"sums": [each.clone() for each in self._everyone]}

    def load_shared_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_shared_state_dict``."""
        self._everyone = [each.clone() for each in state["sums"]]
        if self._everyone:
            known = self._everyone[0]
            further = self._num_classes - len(known)
            self._everyone[0] = torch.cat([known, known.new_zeros(further, known.shape[1])])


def _added(sums: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    if not sums or not others:
        return [*sums, *others]
    return [a.to(b.device) + b for a, b in zip(sums, others, strict=True)]
