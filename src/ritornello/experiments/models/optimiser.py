"""Optimisers, as recipes name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ritornello.experiments.models.stages import last_layer_name
from ritornello.experiments.recipes.recipe import Recipe


def optimiser_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser for what a model learns, without state."""
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if recipe.strategy == "adapter":
        # The outputs of older classes have no gradients, and are to stay as they are.
        last = [*model.get_submodule(last_layer_name(model)).parameters()]
        others = [p for p in groups[0]["params"] if not any(p is each for each in last)]
        groups = [{"params": others}, {"params": last, "weight_decay": 0.0}]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay)
    return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, weight_decay=decay)
