"""Variants."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict

from ritornello.experiments.recipes.recipe import Recipe, with_changes
from ritornello.experiments.results.labels import labels_of
from ritornello.experiments.strategies import strategy_named


def variants(
    recipe: Recipe,
    strategies: Sequence[str],
    *,
    compositions: Sequence[str] = (),
    capacities: Sequence[int | float] = (),
    representatives: Sequence[int] = (),
    candidates: Sequence[int] = (),
    samplings: Sequence[str] = (),
    draws: Sequence[str] = (),
    selections: Sequence[str] = (),
    class_orders: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> dict[str, Recipe]:
    """The product of everything given; what is not given is as in the recipe.

    A strategy without a buffer appears once per order of classes and seed, not once per setting of
    the buffer; one that generates past samples once per number of these. Nothing appended (no
    representatives, where several compositions are compared) is incremental training, and left out.

    Args:
        recipe: what all of them have in common.
        strategies: see ``strategies``.
        compositions: of a step.
        capacities: of the whole buffer.
        representatives: of all ranks together.
        candidates: of all ranks together.
        samplings: sampling policies.
        draws: where a rank draws from.
        selections: selection policies.
        class_orders: numbers that draw the order in which classes arrive.
        seeds: of everything random.

    Returns:
        A label to a recipe, in the order given, seeds last. The label is the strategy where that
        is enough, else it also names what varies: "rehearsal, capacity 200, r 16, seed 1".

    Raises:
        ValueError: there is no such strategy, or none at all was given.
    """
    if not strategies:
        raise ValueError("strategies: give at least one")
    buffer_settings = {
        "composition": compositions,
        "capacity": capacities,
        "global_num_representatives": representatives,
        "global_num_candidates": candidates,
        "selection": selections,
        "sampling": samplings,
        "draws": draws,
    }
    varied = {name: values for name, values in buffer_settings.items() if values}
    recipes: dict[Recipe, None] = {}  # An ordered set: what is given twice runs once.
    for strategy in strategies:
        settings = dict(varied) if uses_buffer(strategy) else {}
        if strategy_named(strategy).num_draws and representatives:
            settings["global_num_representatives"] = representatives
        if class_orders:
            settings["class_order"] = class_orders
        for values in itertools.product(*settings.values(), seeds or (recipe.seed,)):
            changes = dict(zip((*settings, "seed"), values, strict=True))
            is_append = changes.get("composition") == "append" and len(set(compositions)) > 1
            if is_append and changes.get("global_num_representatives") == 0:
                continue
            recipes[with_changes(recipe, strategy=strategy, **changes)] = None
    as_results = [
        {
            "recipe": each.name,
            "strategy": each.strategy,
            "seed": each.seed,
            "world_size": 1,
            "config": asdict(each),
        }
        for each in recipes
    ]
    return dict(zip(labels_of(as_results), recipes, strict=True))


def uses_buffer(strategy: str) -> bool:
    """Whether a strategy rehearses from a buffer.

    Raises:
        ValueError: there is no such strategy.
    """
    return strategy_named(strategy).rehearses


def folder_name(label: str) -> str:
    """A label as the name of a folder: "rehearsal-capacity-200-seed-1"."""
    return re.sub(r"[^\w.+]+", "-", label).strip("-.")
