"""The command that shows what recipes there are."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console

from ritornello.experiments.recipes.named import RECIPES, recipe_named


def recipes(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = None,
) -> None:
    """List the recipes, or show all settings of one.

    Args:
        name: The one to show.
    """
    from ritornello.experiments.recipes.tables import all_recipes, one_recipe

    console = Console()
    if name is None:
        for part in all_recipes([make() for make in RECIPES.values()]):
            console.print(part)
        console.print("\nAll settings of one: ritornello recipes RECIPE", highlight=False)
    else:
        for part in one_recipe(recipe_named(name)):
            console.print(part, highlight=False)
