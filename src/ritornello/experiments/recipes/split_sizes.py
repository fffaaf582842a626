"""How the sizes of a step are split over the ranks, so that each has what it needs."""

from __future__ import annotations

from ritornello.experiments.recipes.recipe import Recipe


def check_split(recipe: Recipe, num_ranks: int) -> None:
    """Checks it before anything is loaded.

    Args:
        recipe: any.
        num_ranks: it runs on.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    sizes = recipe.on(num_ranks)
    if sizes.global_batch_size < num_ranks:
        raise ValueError(
            f"global_batch_size={sizes.global_batch_size}: it must be at least the number of "
            f"ranks ({num_ranks}), so that every rank has a sample"
        )
    if recipe.is_proportional:
        _check_composed_split(sizes, num_ranks)
    elif sizes.global_num_representatives < num_ranks:
        raise ValueError(
            f"global_num_representatives={sizes.global_num_representatives}: it must be at "
            f"least the number of ranks ({num_ranks}), so that every rank draws one"
        )
    elif sizes.generated_share:
        _check_generated(sizes, num_ranks)
    candidates = sizes.global_num_candidates
    if candidates is not None and candidates % num_ranks:
        below = candidates // num_ranks * num_ranks
        near = [each for each in (below, below + num_ranks) if each > 0]
        raise ValueError(
            f"global_num_candidates={candidates} does not divide evenly over {num_ranks} "
            f"ranks; take {' or '.join(map(str, near))}, or another number of ranks"
        )


def _check_generated(recipe: Recipe, num_ranks: int) -> None:
    """Of a recipe with sizes of all ranks."""
    if recipe.strategy == "generative":
        raise ValueError(
            f"generated_share={recipe.generated_share} with strategy='generative': it generates "
            "all past samples; use 'rehearsal', which draws the others from its buffer, or "
            "generated_share=0"
        )
    num_generated = recipe.global_num_generated
    num_drawn = recipe.global_num_representatives - num_generated
    if min(num_generated, num_drawn) < num_ranks:
        raise ValueError(
            f"generated_share={recipe.generated_share} of global_num_representatives="
            f"{recipe.global_num_representatives}: {num_generated} would be generated and "
            f"{num_drawn} drawn; there must be at least as many of either as ranks "
            f"({num_ranks})"
        )


def _check_composed_split(recipe: Recipe, num_ranks: int) -> None:
    for name, size in (
        ("global_batch_size", recipe.global_batch_size),
        ("samples_per_step", recipe.composed_samples),
    ):
        if size % num_ranks:
            below = size // num_ranks * num_ranks
            near = [each for each in (below, below + num_ranks) if each > 0]
            raise ValueError(
                f"{name}={size} does not divide evenly over {num_ranks} ranks, as "
                f"composition='proportional' needs; take {' or '.join(map(str, near))}, or "
                "another number of ranks"
            )
    if recipe.composed_samples < 2 * num_ranks:
        raise ValueError(
            f"samples_per_step={recipe.composed_samples}: it must be at least two for each of "
            f"{num_ranks} ranks, a new one and a past one"
        )
