"""What recipes can do where targets are tensors, and not classes."""

from __future__ import annotations

from ritornello.experiments.recipes.recipe import CHANGED_IMAGES, Recipe

WITHOUT_CLASSES = {
    "scenario": ("group-incremental", "instance-incremental", *CHANGED_IMAGES),
    "augmentation": ("none",),
    "soft_targets": (0.0,),
    "generated_share": (0.0,),
    "distance": ("mse",),
}
"""Settings that have a meaning without classes, and their values that have one."""

BUFFERS_WITHOUT_CLASSES = {
    "selection": ("reservoir", "fifo"),
    "sampling": ("uniform", "earlier-tasks"),
    "remembers": ("stream", "last-epoch"),
}
"""The same of what only strategies with a buffer have."""


def check_targets(recipe: Recipe, takes_tensors: bool, rehearses: bool) -> None:
    """Checks that a recipe's settings fit the kind of its targets.

    Args:
        recipe: any.
        takes_tensors: whether its strategy does.
        rehearses: whether its strategy has a buffer.

    Raises:
        ValueError: one of them needs the other kind; names it and what to take.
    """
    if not recipe.predicts_tensors:
        if recipe.scenario == "group-incremental":
            raise ValueError(
                f"scenario='group-incremental' with loss={recipe.loss!r}: its groups are of "
                "samples whose targets are tensors; of classes take 'class-incremental'"
            )
        return
    if not takes_tensors:
        raise ValueError(
            f"strategy={recipe.strategy!r} with loss={recipe.loss!r}: it is for classes, and here "
            "targets are tensors; take incremental, rehearsal, der, der++, from-scratch or joint"
        )
    for name, allowed in (WITHOUT_CLASSES | (BUFFERS_WITHOUT_CLASSES if rehearses else {})).items():
        value = getattr(recipe, name)
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} with loss={recipe.loss!r}: targets are tensors, which have no "
                f"classes; take {' or '.join(map(str, allowed))}"
            )
