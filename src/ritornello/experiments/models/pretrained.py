"""Settings of models that begin with weights, have a frozen backbone, or store its features."""

from __future__ import annotations

from pathlib import Path

from ritornello.experiments.models.build import OWN
from ritornello.experiments.models.weights import DOWNLOAD, check_file
from ritornello.experiments.ranks.progress import say
from ritornello.experiments.recipes.recipe import CHANGED_IMAGES, Recipe


def warn_of_untrained(recipe: Recipe, makes_steps: bool) -> None:
    """Says so where layers stay as they are that nobody has trained."""
    if (recipe.freezes_trunk or not makes_steps) and recipe.weights is None:
        say(
            f"the {'frozen ' * recipe.freezes_trunk}layers of {recipe.model} are untrained, and "
            "stay so; --weights says what they begin with",
            style="yellow",
        )


def check_weights(recipe: Recipe) -> None:
    """Checks that the file is there that the model begins with.

    Raises:
        FileNotFoundError, ValueError: it is not, or is of another kind.
    """
    if recipe.weights is not None and recipe.weights != DOWNLOAD:
        check_file(Path(recipe.weights))


def check_pretrained(recipe: Recipe, makes_steps: bool) -> None:
    """Checks them before anything is loaded.

    Args:
        recipe: any.
        makes_steps: whether its strategy does.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    if recipe.weights is not None and recipe.model in OWN:
        raise ValueError(
            f"weights={recipe.weights!r} with model={recipe.model!r}: only models of timm begin "
            "with weights; take one of them, such as model='resnet18'"
        )
    if not 0 <= recipe.backbone_rate <= 1:
        raise ValueError(
            f"backbone_rate={recipe.backbone_rate}: it must be from 0 (frozen) to 1 (as the last "
            "layer)"
        )
    if recipe.tuned_stages < 0:
        raise ValueError(f"tuned_stages={recipe.tuned_stages}: it must be 0 (none) or more")
    if recipe.tuned_stages and not recipe.freezes_trunk:
        raise ValueError(
            f"tuned_stages={recipe.tuned_stages} with backbone_rate={recipe.backbone_rate}: all "
            "stages learn; use backbone_rate=0, which freezes the others, or tuned_stages=0"
        )
    if recipe.averaged and not makes_steps:
        raise ValueError(
            f"averaged={recipe.averaged} with strategy={recipe.strategy!r}: it makes no steps "
            "whose weights could be averaged; use averaged=0"
        )
    if recipe.probe_every and not makes_steps:
        raise ValueError(
            f"probe_every={recipe.probe_every} with strategy={recipe.strategy!r}: it makes no "
            "steps between which it could be probed; use probe_every=0"
        )
    if recipe.stores != "features":
        return
    for is_wrong, setting, use in (
        (
            not recipe.freezes_trunk,
            f"backbone_rate={recipe.backbone_rate}, so that features change as it learns",
            "backbone_rate=0",
        ),
        (
            recipe.augmentation != "none",
            f"augmentation={recipe.augmentation!r}, and each image is embedded once",
            "augmentation='none'",
        ),
        (
            recipe.scenario in CHANGED_IMAGES,
            f"scenario={recipe.scenario!r}, whose tasks change the images",
            "another scenario",
        ),
        (
            recipe.strategy == "generative" or recipe.generated_share > 0,
            f"strategy={recipe.strategy!r}, whose generator makes images",
            "a strategy that stores samples",
        ),
    ):
        if is_wrong:
            raise ValueError(f"stores='features' with {setting}: use {use}, or stores='pixels'")
