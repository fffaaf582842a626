"""Optimisers, as recipes name them."""

from __future__ import annotations

import torch
from torch import nn

from ritornello.experiments.recipes.recipe import Recipe


def optimiser_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser for a model, without state."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    momentum = recipe.momentum
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
