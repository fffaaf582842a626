"""Strategies: how the model learns from a stream of tasks. One file, one screen each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.data.decoding import Decoding
from ritornello.experiments.models.generator import GeneratorSettings
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.a_gem import AGEM
from ritornello.experiments.strategies.base import (
    Criterion,
    GlobalSizes,
    RehearsalStrategy,
    Strategy,
    cross_entropy,
)
from ritornello.experiments.strategies.der import DER
from ritornello.experiments.strategies.der_plus_plus import DERPlusPlus
from ritornello.experiments.strategies.er_ace import ERACE
from ritornello.experiments.strategies.from_scratch import FromScratch
from ritornello.experiments.strategies.gdumb import GDumb
from ritornello.experiments.strategies.incremental import Incremental
from ritornello.experiments.strategies.joint import Joint
from ritornello.experiments.strategies.rehearsal import Rehearsal
from ritornello.experiments.strategies.soft_targets import SoftTargets
from ritornello.experiments.strategies.without_samples.adapter import Adapter, AdapterRehearsal
from ritornello.experiments.strategies.without_samples.class_means import ClassMeans
from ritornello.experiments.strategies.without_samples.fedssi import FedSSI
from ritornello.experiments.strategies.without_samples.generated import GeneratedPast
from ritornello.experiments.strategies.without_samples.generative import (
    Generative,
    PartlyGenerated,
)
from ritornello.experiments.strategies.without_samples.ridge import Ridge
from ritornello.experiments.strategies.without_samples.solved import Solved
from ritornello.experiments.strategies.without_samples.synaptic_intelligence import SI, SIRehearsal
from ritornello.policies.class_shares import (
    ClassBalanced,
    FirstOffered,
    GreedyBalanced,
    PerClassRandom,
)
from ritornello.policies.selection import SelectionPolicy

STRATEGIES: dict[str, type[Strategy]] = {
    "incremental": Incremental,
    "rehearsal": Rehearsal,
    "er-ace": ERACE,
    "der": DER,
    "der++": DERPlusPlus,
    "a-gem": AGEM,
    "gdumb": GDumb,
    "si": SI,
    "si-rehearsal": SIRehearsal,
    "fedssi": FedSSI,
    "generative": Generative,
    "adapter": Adapter,
    "adapter-rehearsal": AdapterRehearsal,
    "class-means": ClassMeans,
    "ridge": Ridge,
    "from-scratch": FromScratch,
    "joint": Joint,
}

SHARING: dict[str, Callable[..., SelectionPolicy]] = {
    "class-balanced": ClassBalanced,
    "per-class-random": PerClassRandom,
    "greedy-balanced": GreedyBalanced,
    "first-offered": FirstOffered,
}
"""Selection policies whose shares can be fixed."""

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "SI",
    "STRATEGIES",
    "Adapter",
    "AdapterRehearsal",
    "ClassMeans",
    "DERPlusPlus",
    "FedSSI",
    "FromScratch",
    "GDumb",
    "GeneratedPast",
    "Generative",
    "GeneratorSettings",
    "GlobalSizes",
    "Incremental",
    "Joint",
    "PartlyGenerated",
    "Rehearsal",
    "RehearsalStrategy",
    "Ridge",
    "SIRehearsal",
    "SoftTargets",
    "Strategy",
    "strategy_named",
    "strategy_of",
]


def strategy_named(name: str) -> type[Strategy]:
    """A strategy by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r}: there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def strategy_of(
    recipe: Recipe,
    rank: int,
    num_ranks: int,
    *,
    num_train_samples: int,
    num_classes: int,
    criterion: Criterion = cross_entropy,
    decode: Decoding | None = None,
    capacity_bytes: int | None = None,
) -> Strategy:
    """A recipe's strategy on one rank, with its buffer. Blocks until all ranks have theirs.

    Args:
        recipe: with sizes of all ranks (``Recipe.on``).
        rank: this rank.
        num_ranks: how many there are.
        num_train_samples: of the whole data set.
        num_classes: of the whole data set.
        criterion: the loss of each sample.
        decode: what makes images of stored files, if they are to be stored.
        capacity_bytes: of the buffer, if it is bounded.
    """
    kind = strategy_named(recipe.strategy)
    common: dict[str, Any] = {"criterion": criterion}
    rate: dict[str, Any] = {"num_representatives": 0}
    num_drawn = recipe.global_num_representatives - recipe.global_num_generated
    if recipe.is_proportional and kind.rehearses:  # all ranks have equally many samples
        rate["most_representatives"] = recipe.composed_samples // num_ranks - 1
    else:
        sizes = GlobalSizes(
            rank,
            num_ranks,
            recipe.global_batch_size,
            max(num_ranks, num_drawn),  # 0 where a step is composed, or nothing is stored
            recipe.seed,
        )
        common["sizes"] = sizes.of_one_rank() if recipe.local_steps else sizes
        # The largest part; ranks whose part is smaller leave one out.
        rate["num_representatives"] = -(-num_drawn // num_ranks)
    if recipe.generated_share and kind is Rehearsal:
        kind = PartlyGenerated
    if issubclass(kind, Generative | Solved):
        common["num_classes"] = num_classes
    if recipe.soft_targets and kind is Rehearsal:
        kind, common["num_classes"] = SoftTargets, num_classes
    new_buffer = partial(
        RehearsalBuffer,
        recipe.num_stored(num_train_samples),
        **rate,
        num_candidates=recipe.own_candidates(num_ranks),
        selection=_selection_of(recipe, num_classes),
        sampling=recipe.sampling,
        draws=recipe.draws,
        # Tensors are no labels: what is kept is then a sample of the whole stream.
        label=None if recipe.predicts_tensors else 1,
        seed=recipe.seed,
        decode=decode,
        capacity_bytes=capacity_bytes,
    )
    return kind.of(recipe, new_buffer, **common)


def _selection_of(recipe: Recipe, num_classes: int) -> str | SelectionPolicy:
    if recipe.fixed_shares and recipe.selection in SHARING:
        return SHARING[recipe.selection](num_classes, shares="fixed")
    return recipe.selection
