from __future__ import annotations

import pytest

from ritornello.experiments.recipes import RECIPES, recipe_named


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_1_2_and_4_ranks(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.name == name
    for num_ranks in (1, 2, 4):
        recipe.check(num_ranks)


def test_an_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'minst' \(did you mean 'mnist'\?\)"):
        recipe_named("minst")
