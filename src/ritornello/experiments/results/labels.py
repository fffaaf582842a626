"""Which settings a run had, and a label that tells it apart from others."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from typing import Any

from ritornello.experiments.recipes import published
from ritornello.experiments.recipes.recipe import (
    COMPOSITIONS,
    DESCRIPTIONS,
    WITH_ADAPTERS,
    Recipe,
)
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import STRATEGIES

WITHOUT_BUFFER = tuple(name for name, each in STRATEGIES.items() if not each.rehearses)
"""Strategies that have none."""

WITHOUT_PAST = tuple(name for name, each in STRATEGIES.items() if not each.num_draws)
"""Strategies whose steps have no past samples."""

PAST_SETTINGS = ("distance", "loss_weights", "global_num_representatives")
"""Settings that change nothing without past samples."""

GENERATOR_SETTINGS = (
    "prior",
    "prior_concentration",
    "latents",
    "generator_units",
    "generator_learning_rate",
    "conditional",
    "distillation",
)
"""Settings that change nothing where no past samples are generated."""

SI_SETTINGS = ("si_strength", "si_damping", "locality", "surrogate_steps")
"""Settings that change nothing where weights have no importances."""

ADAPTER_SETTINGS = ("adapted_stages", "adapter_width", "adapter_scale", "orthogonality")
"""Settings that change nothing without adapters."""

REHEARSAL_SETTINGS = (
    "alpha",
    "beta",
    "composition",
    "samples_per_step",
    "first_share",
    "share_floor",
    "soft_targets",
    "soft_temperature",
    "generated_share",
    "capacity",
    "global_num_candidates",
    "remembers",
    "selection",
    "fixed_shares",
    "sampling",
    "draws",
    "logits_dtype",
    "stores",
    "capacity_bytes",
)
"""Settings that change nothing where the strategy has no buffer."""

PROPORTIONAL_SETTINGS = ("samples_per_step", "first_share", "share_floor")
"""Settings that change nothing where steps are not composed in proportion."""

WITH_IMPORTANCES = tuple(name for name, each in STRATEGIES.items() if each.remembers_in_itself)
"""Strategies that know how important each weight is."""

DEFAULTS = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}
"""What settings are unless given."""

SHORT_NAMES = {"global_num_representatives": "r", "global_num_candidates": "c"}


def settings_of(run: Results) -> dict[str, Any]:
    """Everything that a run's outcome may depend on, and the number of ranks.

    A setting that results do not name did not exist then: what it is unless given, it was.
    """
    config = {**DEFAULTS, **run["config"]}
    left_out = {*DESCRIPTIONS, "strategy", "seed"}
    if run["strategy"] in WITHOUT_BUFFER:
        left_out.update(REHEARSAL_SETTINGS)
    if run["strategy"] in WITHOUT_PAST:
        left_out.update(PAST_SETTINGS)
    if run["strategy"] != "generative" and not run["config"].get("generated_share"):
        left_out.update(GENERATOR_SETTINGS)
    if run["strategy"] not in WITH_IMPORTANCES:
        left_out.update(SI_SETTINGS)
    if run["strategy"] != "ridge":
        left_out.add("ridge_penalty")
    if run["strategy"] not in WITH_ADAPTERS:
        left_out.update(ADAPTER_SETTINGS)
    else:
        left_out.add("tuned_stages")
    if run["config"].get("prior") != "dirichlet":
        left_out.add("prior_concentration")
    if run["config"].get("composition") != "proportional":
        left_out.update(PROPORTIONAL_SETTINGS)
    return {
        "recipe": run["recipe"],
        "strategy": run["strategy"],
        "world_size": run["world_size"],
        **{name: value for name, value in config.items() if name not in left_out},
        "seed": run["seed"],
    }


def varying_settings(runs: Sequence[Results], ignored: Collection[str] = ()) -> set[str]:
    """The settings that are not the same in all runs that have them."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in settings_of(run).items():
            values.setdefault(name, set()).add(json.dumps(value))
    return {name for name, each in values.items() if len(each) > 1} - set(ignored)


def labels_of(runs: Sequence[Results], ignored: Collection[str] = ()) -> list[str]:
    """What tells each run apart from the other ones of its strategy.

    Args:
        runs: of any recipes; a label begins with the recipe's name if there are several.
        ignored: settings that no label names.

    Returns:
        One label per run. Runs that differ in nothing have the same label.
    """
    groups: dict[tuple[str, str], list[Results]] = {}
    for run in runs:
        groups.setdefault((run["recipe"], run["strategy"]), []).append(run)
    varying = {
        key: varying_settings(group, ignored)
        - _settings_of_composition(group)
        - _settings_of_length(group)
        for key, group in groups.items()
    }
    several_recipes = len({recipe for recipe, _ in groups}) > 1
    labels = []
    for run in runs:
        key = (run["recipe"], run["strategy"])
        parts = [
            _in_words(name, value)
            for name, value in settings_of(run).items()
            if name in varying[key]
        ]
        labels.append(", ".join([_name_of(run, several_recipes), *parts]))
    return labels


def _settings_of_length(runs: Sequence[Results]) -> set[str]:
    """Settings in epochs that are the same in every run, if measured by its own length."""
    configs = [run["config"] for run in runs]
    if not all(config.get("stretches_schedule") for config in configs):
        return set()
    schedules = {
        (
            round(config["warmup_epochs"] / config["epochs"], 6),
            *((round(epoch / config["epochs"], 6), rate) for epoch, rate in config["milestones"]),
        )
        for config in configs
    }
    return {"warmup_epochs", "milestones"} if len(schedules) == 1 else set()


def _settings_of_composition(runs: Sequence[Results]) -> set[str]:
    """Settings that every run has as its composition brings them with it."""
    configs = [run["config"] for run in runs]
    if any("composition" not in config for config in configs):
        return set()
    usual = [(config, COMPOSITIONS.get(config["composition"], {})) for config in configs]
    names = set[str]().union(*(settings for _, settings in usual))
    return {
        name
        for name in names
        if all(config.get(name) == settings.get(name) for config, settings in usual)
    }


def _name_of(run: Results, several_recipes: bool) -> str:
    """The strategy, and the recipe if there are several; one is enough if it names both."""
    if not several_recipes:
        return str(run["strategy"])
    recipe = published.PUBLISHED.get(run["recipe"])
    if recipe is not None and recipe().strategy == run["strategy"]:
        return str(run["recipe"])
    return f"{run['recipe']}: {run['strategy']}"


def _in_words(name: str, value: Any) -> str:
    if name == "world_size":
        return f"{value} rank{'s' if value > 1 else ''}"
    if name == "composition":
        return str(value)
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif value is None:
        value = "all" if name == "global_num_candidates" else "none"
    return f"{SHORT_NAMES.get(name, name.replace('_', ' '))} {value}"
