"""Optimisers, as recipes name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ritornello.experiments.models.stages import last_layer_name
from ritornello.experiments.recipes.recipe import Recipe


def optimiser_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser for what a model learns, without state.

    A group of parameters whose learning rate is another one has its factor as "rate".
    """
    rate, decay = recipe.learning_rate, recipe.weight_decay
    parameters: Any = [each for each in model.parameters() if each.requires_grad]
    if recipe.strategy == "adapter":
        # The outputs of older classes have no gradients, and are to stay as they are.
        parameters = _last_and_others(model, {"weight_decay": 0.0}, {})
    elif recipe.backbone_rate not in (0, 1):  # frozen layers are no part of the model
        parameters = _last_and_others(model, {}, {"rate": recipe.backbone_rate})
    if recipe.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    momentum = recipe.momentum
    return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group of parameters its learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def _last_and_others(
    model: nn.Module, of_last: dict[str, float], of_others: dict[str, float]
) -> list[dict[str, Any]]:
    """The last layer's parameters, and all others that learn, with settings of their own."""
    last = last_layer_name(model) + "."
    groups: list[dict[str, Any]] = [{"params": [], **of_last}, {"params": [], **of_others}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[not name.startswith(last)]["params"].append(parameter)
    return groups
