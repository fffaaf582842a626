"""Sweeps: many runs of one recipe, what tells them apart, and their means over seeds."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ritornello.experiments import published
from ritornello.experiments.config import Published, Recipe
from ritornello.experiments.strategies import STRATEGIES, strategy_named

Results = Mapping[str, Any]
"""Of one run, as ``results.json`` holds them."""

WITHOUT_BUFFER = tuple(name for name, each in STRATEGIES.items() if not each.rehearses)

REHEARSAL_SETTINGS = (
    "alpha",
    "beta",
    "loss_weights",
    "capacity",
    "global_num_representatives",
    "global_num_candidates",
    "remembers",
    "selection",
    "fixed_shares",
    "sampling",
    "logits_dtype",
)
"""Settings that change nothing where the strategy has no buffer."""

MACHINE_SETTINGS = ("data_path", "device", "num_workers", "channels_last", "compile", "amp")
"""Settings that a published figure should not depend on; nor should it on the seed."""

DESCRIPTIONS = ("name", "description", "published")
"""Fields of a recipe that are not settings."""

SHORT_NAMES = {"global_num_representatives": "r", "global_num_candidates": "c"}

_OWN_PART = re.compile(
    rf"-({'|'.join(map(re.escape, (*STRATEGIES, *published.SHORT_NAMES.values())))})(-\d+)?$"
)
"""Of the names of recipes that reproduce the rows of one table: strategy and capacity."""


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with some settings changed.

    The published figure goes where a change makes the run another one than it was published for.
    """
    changed = replace(recipe, **changes)
    may_differ = {name: getattr(recipe, name) for name in ("seed", *MACHINE_SETTINGS)}
    if replace(changed, **may_differ) != recipe:
        return replace(changed, published=None)
    return changed


def variants(
    recipe: Recipe,
    strategies: Sequence[str],
    *,
    capacities: Sequence[int | float] = (),
    representatives: Sequence[int] = (),
    candidates: Sequence[int] = (),
    samplings: Sequence[str] = (),
    selections: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> dict[str, Recipe]:
    """The product of everything given; what is not given is as in the recipe.

    A strategy without a buffer appears once per seed, not once per setting of the buffer.

    Args:
        recipe: what all of them have in common.
        strategies: see ``strategies``.
        capacities: of the whole buffer.
        representatives: of all ranks together.
        candidates: of all ranks together.
        samplings: sampling policies.
        selections: selection policies.
        seeds: of everything random.

    Returns:
        A label to a recipe, in the order given, seeds last. The label is the strategy where that
        is enough, else it also names what varies: "rehearsal, capacity 200, r 16, seed 1".

    Raises:
        ValueError: there is no such strategy, or none at all was given.
    """
    if not strategies:
        raise ValueError("strategies: give at least one")
    buffer_settings = {
        "capacity": capacities,
        "global_num_representatives": representatives,
        "global_num_candidates": candidates,
        "selection": selections,
        "sampling": samplings,
    }
    varied = {name: values for name, values in buffer_settings.items() if values}
    recipes: dict[Recipe, None] = {}  # An ordered set: what is given twice runs once.
    for strategy in strategies:
        settings = varied if uses_buffer(strategy) else {}
        for values in itertools.product(*settings.values(), seeds or (recipe.seed,)):
            changes = dict(zip((*settings, "seed"), values, strict=True))
            recipes[with_changes(recipe, strategy=strategy, **changes)] = None
    as_results = [
        {
            "recipe": each.name,
            "strategy": each.strategy,
            "seed": each.seed,
            "world_size": 1,
            "config": asdict(each),
        }
        for each in recipes
    ]
    return dict(zip(labels_of(as_results), recipes, strict=True))


def uses_buffer(strategy: str) -> bool:
    """Whether a strategy rehearses from a buffer.

    Raises:
        ValueError: there is no such strategy.
    """
    return strategy_named(strategy).rehearses


def folder_name(label: str) -> str:
    """A label as the name of a folder: "rehearsal-capacity-200-seed-1"."""
    return re.sub(r"[^\w.+]+", "-", label).strip("-.")


def family_of(recipe: str) -> str:
    """What the names of recipes have in common that reproduce the rows of one table.

    They are one experiment; only, each strategy and capacity has settings of its own.
    ``buzzega-mnist-er-500`` and ``buzzega-mnist-der++-200`` are of the family ``buzzega-mnist``.
    """
    return _OWN_PART.sub("", recipe)


def settings_of(run: Results) -> dict[str, Any]:
    """Everything that a run's outcome may depend on, and the number of ranks."""
    left_out = {*DESCRIPTIONS, "strategy", "seed"}
    if run["strategy"] in WITHOUT_BUFFER:
        left_out.update(REHEARSAL_SETTINGS)
    return {
        "recipe": run["recipe"],
        "strategy": run["strategy"],
        "world_size": run["world_size"],
        **{name: value for name, value in run["config"].items() if name not in left_out},
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
    varying = {key: varying_settings(group, ignored) for key, group in groups.items()}
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
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif value is None:
        value = "all" if name == "global_num_candidates" else "none"
    return f"{SHORT_NAMES.get(name, name.replace('_', ' '))} {value}"


def num_train_samples(run: Results) -> int:
    """Of the whole data set; older results only tell those of each task."""
    total = run.get("train_samples")
    return int(total or sum(task["train_samples"] for task in run["tasks"]))


@dataclass(frozen=True)
class Statistic:
    """The mean of a figure over the runs of a group, and how much it varies between them."""

    mean: float
    std: float | None
    """Sample standard deviation (the divisor is the number of runs - 1); None for one run."""

    def in_percent(self, sign: str = "") -> str:
        """Such as "85.3 ± 0.9 %"; without a deviation "85.3 %", with sign="+" "+85.3 %"."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:{sign}.1f}{spread} %"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    """Without the seed."""
    runs: tuple[Results, ...]

    @property
    def num_runs(self) -> int:
        """How many there are."""
        return len(self.runs)

    @property
    def first(self) -> Results:
        """The run to ask for what all of them have in common."""
        return self.runs[0]

    @property
    def recipe(self) -> str:
        """Of all of them, its name."""
        return str(self.first["recipe"])

    @property
    def strategy(self) -> str:
        """Of all of them."""
        return str(self.first["strategy"])

    @property
    def num_tasks(self) -> int:
        """So far."""
        return len(self.first["top1"])

    @property
    def capacity(self) -> int | None:
        """Representatives in the whole buffer; None without one."""
        if self.strategy in WITHOUT_BUFFER:
            return None
        if counted := (self.first.get("buffer") or {}).get("capacity"):
            return int(counted)
        capacity: float = self.first["config"]["capacity"]
        if capacity < 1:
            capacity *= num_train_samples(self.first)
        return max(1, round(capacity))

    @property
    def published(self) -> Published | None:
        """The figure of others that the runs reproduce, if there is one."""
        figure = self.first["config"].get("published")
        return Published(**figure) if figure else None

    @property
    def published_figure(self) -> Statistic | None:
        """Its top-1 accuracy, or top-5 where only that was published; from 0 to 1."""
        if (figure := self.published) is None:
            return None
        if figure.top1 is None:
            return None if figure.top5 is None else Statistic(figure.top5 / 100, None)
        spread = None if figure.spread is None else figure.spread / 100
        return Statistic(figure.top1 / 100, spread)

    @property
    def seeds(self) -> list[int]:
        """In ascending order, each once."""
        return sorted({run["seed"] for run in self.runs})

    @property
    def average_top1(self) -> Statistic:
        """Over all tasks at the end, from 0 to 1."""
        return self._over_runs("average_top1")

    @property
    def average_top5(self) -> Statistic:
        """Over all tasks at the end, from 0 to 1."""
        return self._over_runs("average_top5")

    @property
    def forgetting(self) -> Statistic:
        """See ``metrics.forgetting``."""
        return self._over_runs("forgetting")

    @property
    def backward_transfer(self) -> Statistic:
        """See ``metrics.backward_transfer``."""
        return self._over_runs("backward_transfer")

    @property
    def forward_transfer(self) -> Statistic:
        """See ``metrics.forward_transfer``."""
        return self._over_runs("forward_transfer")

    @property
    def seconds(self) -> Statistic:
        """Of training, evaluations left out."""
        return self._over_runs("seconds")

    @property
    def step_seconds(self) -> dict[str, float]:
        """Means of the parts of a step."""
        parts = self.first["step_seconds"]
        return {
            part: statistics.fmean(run["step_seconds"].get(part, 0.0) for run in self.runs)
            for part in parts
        }

    def _over_runs(self, name: str) -> Statistic:
        values = [float(run[name]) for run in self.runs]
        std = statistics.stdev(values) if len(values) > 1 else None
        return Statistic(statistics.fmean(values), std)


def summarise(results: Mapping[str, Results]) -> list[Group]:
    """Groups runs that differ in nothing but the seed, in order of first appearance.

    Args:
        results: a label, which is not looked at, to the results of a run.

    Returns:
        The groups, each with a label of its own.
    """
    grouped: dict[str, list[Results]] = {}
    for run in results.values():
        settings = settings_of(run) | {"seed": None}
        grouped.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    labels = labels_of([runs[0] for runs in grouped.values()], ignored=["seed"])
    # Settings that only newer versions write down make groups that no label tells apart.
    seen: Counter[str] = Counter()
    groups = []
    for label, runs in zip(labels, grouped.values(), strict=True):
        seen[label] += 1
        number = f" ({seen[label]})" if seen[label] > 1 else ""
        groups.append(Group(label + number, tuple(runs)))
    return groups


def reference_for(group: Group, groups: Sequence[Group], strategy: str) -> Group | None:
    """The group of a strategy to measure another group by, on as many ranks of the same machines.

    It is of the same recipe, else of the same family.
    """

    def circumstances(each: Group) -> tuple[Any, ...]:
        devices = {run["machine"].get("device") for run in each.runs}
        return family_of(each.recipe), each.first["world_size"], devices

    alike = [
        each
        for each in groups
        if each.strategy == strategy and circumstances(each) == circumstances(group)
    ]
    return next((each for each in alike if each.recipe == group.recipe), next(iter(alike), None))
