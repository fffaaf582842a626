"""The recipes, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from ritornello.experiments.recipes.published import PUBLISHED, family_of
from ritornello.experiments.recipes.recipe import Published, Recipe


def all_recipes(recipes: Sequence[Recipe]) -> list[RenderableType]:
    """A table of those to start from, and one for each table of others that is reproduced."""
    parts: list[RenderableType] = []
    own = [each for each in recipes if each.name not in PUBLISHED]
    if own:
        parts += ["[bold]To start from[/bold]", _table([(e.name, e.description, "") for e in own])]
    families: dict[str, list[Recipe]] = {}
    for each in recipes:
        if each.name in PUBLISHED:
            families.setdefault(family_of(each.name), []).append(each)
    width = max((len(each.name) for each in recipes), default=0)
    for family, members in families.items():
        what, _, _ = members[0].description.partition(": ")
        several = len(members) > 1
        rows = [
            (
                each.name,
                each.description.removeprefix(f"{what}: ") if several else each.description,
                _figure(each.published) if each.published else "",
            )
            for each in members
        ]
        title = [f"[bold]{family}[/bold]: {escape(what)}"] if several else []
        sources = {each.published.source for each in members if each.published}
        parts += ["", *title, *(f"[dim]{escape(source)}[/dim]" for source in sorted(sources))]
        parts.append(_table(rows, width))
    return parts


def one_recipe(recipe: Recipe) -> list[RenderableType]:
    """All settings of a recipe, under the names that the configuration in the results has."""
    parts: list[RenderableType] = [f"[bold]{recipe.name}[/bold]: {escape(recipe.description)}"]
    if recipe.published:
        text = f"{_figure(recipe.published)}, {recipe.published.source}"
        parts.append(f"published: {escape(text)}")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in vars(recipe).items():
        if name not in ("name", "description", "published"):
            table.add_row(name, escape(str(value)))
    return [*parts, "", table]


def _table(rows: Sequence[tuple[str, str, str]], width: int = 0) -> Table:
    """Names, what they are, and published figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, min_width=width)
    table.add_column(min_width=18)
    if any(figure for _, _, figure in rows):
        table.add_column(justify="right", no_wrap=True)
    for name, what, figure in rows:
        table.add_row(name, escape(what), figure)
    return table


def _figure(published: Published) -> str:
    if published.top1 is None:
        return f"top-5 {published.top5:.2f} %"
    spread = "" if published.spread is None else f" ± {published.spread:.2f}"
    return f"{published.top1:.2f}{spread} %"
