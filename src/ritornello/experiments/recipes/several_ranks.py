"""Settings that make sense on several ranks alone: unlike data, local draws, local steps."""

from __future__ import annotations

from ritornello.experiments.recipes.recipe import Recipe
from ritornello.rounds.arguments import DRAWS

MOST_ALPHA = 1e6
"""There shares hardly differ."""


def check_several_ranks(recipe: Recipe, num_ranks: int, rehearses: bool) -> None:
    """Checks them before anything is loaded.

    Args:
        recipe: that has them.
        num_ranks: it runs on.
        rehearses: whether its strategy has a buffer.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    alpha = recipe.ranks_differ
    if alpha is not None and not (0 < alpha <= MOST_ALPHA):  # which NaN is not either
        raise ValueError(
            f"ranks_differ={alpha}: it must be above 0 (each class on one rank) and at most "
            f"{MOST_ALPHA:g} (all ranks alike)"
        )
    if recipe.draws not in DRAWS:
        raise ValueError(f"draws={recipe.draws!r}: there are {', '.join(DRAWS)}")
    if recipe.local_steps < 0:
        raise ValueError(f"local_steps={recipe.local_steps}: it must be 0 (off) or more steps")
    for name, is_set, why in (
        ("ranks_differ", alpha is not None, "there is no rank to differ from"),
        ("draws", rehearses and recipe.draws == "local", "its shard is the whole buffer"),
        ("local_steps", recipe.local_steps > 0, "there are no other weights to average with"),
    ):
        if is_set and num_ranks == 1:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} on 1 rank: {why}; take several (--ranks), or "
                "leave it out"
            )
    if recipe.strategy == "fedssi":
        _check_fedssi(recipe)
    if rehearses and alpha is not None:
        _check_unlike(recipe)
    if rehearses and recipe.draws == "local" and recipe.sampling != "uniform":
        raise ValueError(
            f"draws='local' with sampling={recipe.sampling!r}: out of its own shard a rank draws "
            "uniformly; use sampling='uniform' (and composition='append'), or draws='global'"
        )
    if recipe.strategy == "gdumb" and recipe.draws == "local" and alpha is not None:
        raise ValueError(
            f"draws='local' with strategy='gdumb' and ranks_differ={alpha}: it trains on the "
            "buffer alone, and a rank may have nothing of a task; use draws='global'"
        )
    if rehearses and recipe.draws == "local" and recipe.is_proportional:
        raise ValueError(
            "draws='local' with composition='proportional': a step's past samples are those of all "
            "ranks; use composition='append', or draws='global'"
        )
    if recipe.strategy == "a-gem" and recipe.draws == "local" and not recipe.local_steps:
        raise ValueError(
            "draws='local' with strategy='a-gem': it averages the gradients of representatives "
            "over the ranks, also where a shard is still empty; use draws='global', or local_steps"
        )


def _check_fedssi(recipe: Recipe) -> None:
    if not recipe.local_steps:
        raise ValueError(
            "local_steps=0 with strategy='fedssi': it is made for ranks that go their own ways; "
            "give local_steps, or use strategy='si'"
        )
    if not 0 < recipe.locality < 1:
        raise ValueError(f"locality={recipe.locality}: it must be above 0 and below 1")
    pull = (1 - recipe.locality) / (2 * recipe.locality)
    if recipe.learning_rate * pull >= 1:
        raise ValueError(
            f"locality={recipe.locality} with learning_rate={recipe.learning_rate}: a step of the "
            f"surrogate model would go {recipe.learning_rate * pull:.3g} times the way to the "
            "averaged weights; take a larger locality, so that it is below 1"
        )
    if recipe.surrogate_steps < 1:
        raise ValueError(f"surrogate_steps={recipe.surrogate_steps}: it must be at least 1")


def _check_unlike(recipe: Recipe) -> None:
    if recipe.is_proportional:
        raise ValueError(
            f"ranks_differ={recipe.ranks_differ} with composition='proportional': its new samples "
            "are dealt evenly over the ranks, so that each is visited equally often; use "
            "composition='append'"
        )
    if not recipe.offers_stream:
        raise ValueError(
            f"ranks_differ={recipe.ranks_differ} with remembers={recipe.remembers!r}: exemplars "
            "are dealt evenly over the ranks; use remembers='stream' or 'last-epoch'"
        )
