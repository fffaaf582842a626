from __future__ import annotations

from rich.console import Console

from ritornello.experiments.recipes.named import RECIPES
from ritornello.experiments.recipes.published import PUBLISHED
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.recipes.tables import all_recipes, one_recipe


def lines_of(parts: list[object]) -> list[str]:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for part in parts:
            console.print(part)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_every_recipe_has_a_line_of_at_most_100_columns() -> None:
    lines = lines_of([*all_recipes([make() for make in RECIPES.values()])])
    assert max(map(len, lines)) <= 100
    for name in RECIPES:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    own = lines[: lines.index("")]
    assert [line.split()[0] for line in own] == ["To", *(n for n in RECIPES if n not in PUBLISHED)]


def test_recipes_of_one_table_stand_together_with_what_was_published() -> None:
    lines = lines_of([*all_recipes([make() for make in PUBLISHED.values()])])
    start = lines.index("buzzega-mnist: Split MNIST, one pass")
    assert "NeurIPS 2020" in lines[start + 1]
    table = lines[start + 2 : lines.index("", start)]
    assert [line.split()[0] for line in table] == [
        name for name in PUBLISHED if name.startswith("buzzega-mnist-")
    ]
    row = next(line for line in table if line.startswith("buzzega-mnist-er-500 "))
    assert row.split(maxsplit=1)[1].startswith("rehearsal, 500 representatives  ")
    assert row.endswith(" 86.12 ± 1.89 %")
    assert any(line.endswith(" top-5 80.55 %") for line in lines)
    assert any(line.endswith(" 38.58 %") for line in lines)  # Published without a deviation.


def test_all_settings_of_one_recipe() -> None:
    recipe = PUBLISHED["buzzega-mnist-er-500"]()
    lines = lines_of([*one_recipe(recipe)])
    assert lines[0] == f"buzzega-mnist-er-500: {recipe.description}"
    assert lines[1].startswith("published: 86.12 ± 1.89 %, Buzzega et al.")
    settings = [line.split(maxsplit=1) for line in lines[lines.index("") + 1 :]]
    fields = [
        n for n in Recipe.__dataclass_fields__ if n not in ("name", "description", "published")
    ]
    assert [setting[0] for setting in settings] == fields
    assert ["capacity", "500"] in settings
    assert not lines_of([*one_recipe(RECIPES["mnist"]())])[1]
