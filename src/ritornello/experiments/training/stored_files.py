"""A buffer that stores the files of images in place of their pixels: what it needs for that."""

from __future__ import annotations

from typing import Any

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.decoding import Decoder, Decoding, KeptFiles, with_files
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import CHANGED_IMAGES, Recipe
from ritornello.experiments.strategies import strategy_named
from ritornello.policies.names import selection_policy
from ritornello.policies.within_bytes import within_bytes

ROOM = 1.1
"""How much more than the mean size each file may take."""

ROW_BYTES = 256
"""What a representative takes beside its file: label, length, the table and the end of pages."""


def check_stores(recipe: Recipe) -> None:
    """Checks that a recipe's files can be stored, before anything is loaded.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    if recipe.capacity_bytes is not None and recipe.capacity_bytes < 1:
        raise ValueError(f"capacity_bytes={recipe.capacity_bytes}: it must be at least 1")
    if not _stores_files(recipe):
        return
    try:
        within_bytes(selection_policy(recipe.selection), 1)
    except ValueError as error:
        raise ValueError(f"stores='files': {error}, or stores='pixels'") from None
    for is_wrong, setting, use in (
        (not recipe.offers_stream, f"remembers={recipe.remembers!r}", "remembers='stream'"),
        (recipe.fixed_shares, "fixed_shares=True", "fixed_shares=False"),
        (recipe.ranks_differ is not None, f"ranks_differ={recipe.ranks_differ}", "ranks alike"),
        (
            recipe.scenario in CHANGED_IMAGES,
            f"scenario={recipe.scenario!r}, whose images are not those of the files",
            "another scenario",
        ),
    ):
        if is_wrong:
            raise ValueError(f"stores='files' with {setting}: use {use}, or stores='pixels'")


def data_of(recipe: Recipe, data: DataSet) -> DataSet:
    """The data set; if a recipe stores files, with those of its training samples.

    Raises:
        ValueError: they have none.
    """
    if not _stores_files(recipe):
        return data
    try:
        return with_files(data)
    except ValueError as error:
        raise ValueError(
            f"stores='files' with data={recipe.data!r}: {error}: use stores='pixels'"
        ) from None


def stored_files(recipe: Recipe, data: DataSet, place: Place) -> dict[str, Any]:
    """What ``strategy_of`` needs to know of them.

    Args:
        recipe: of the run.
        data: its data set, from ``data_of``.
        place: of this rank.
    """
    if not isinstance(data.train, KeptFiles):
        return {"capacity_bytes": recipe.capacity_bytes}
    capacity_bytes = recipe.capacity_bytes
    if capacity_bytes is None:
        sizes = data.train.some_sizes()
        row_bytes = ROW_BYTES + 4 * data.num_classes  # perhaps with logits
        of_each = ROOM * float(sizes.mean()) + row_bytes
        capacity_bytes = round(recipe.num_stored(len(data.train)) * of_each)
        # Each rank must have room for the largest one.
        capacity_bytes += 2 * place.num_ranks * int(sizes.max())
    channels, height, _ = data.image_shape
    decoder = Decoder(height, channels)
    decoding = Decoding(decoder, max(1, recipe.num_workers), place.device)
    return {"decode": decoding, "capacity_bytes": capacity_bytes}


def _stores_files(recipe: Recipe) -> bool:
    return recipe.stores == "files" and strategy_named(recipe.strategy).rehearses
