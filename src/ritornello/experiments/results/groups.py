"""Groups of runs that differ in nothing but the seed, or the class order that a number draws."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ritornello.experiments.recipes.published import family_of
from ritornello.experiments.recipes.recipe import Published
from ritornello.experiments.results.labels import WITHOUT_BUFFER, labels_of, settings_of
from ritornello.experiments.results.measures import Measure, measure_of, number_text
from ritornello.experiments.results.metrics import Matrix, matrix_of
from ritornello.experiments.results.writing import Results


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

    def as_number(self, sign: str = "") -> str:
        """Such as "0.0853 ± 0.0009", of any size."""
        return number_text(self.mean, self.std, sign)

    def in_nats(self) -> str:
        """Such as "0.853 ± 0.009"."""
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed and the order of classes that a number draws."""

    label: str
    """Without the seed and the order."""
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
    def in_common(self) -> Results:
        """The first run, for labels: nothing in it tells it from the others but the seed."""
        return _of_any_order(self.first)

    @property
    def recipe(self) -> str:
        """The name of the recipe that all of them ran."""
        return str(self.first["recipe"])

    @property
    def strategy(self) -> str:
        """The strategy of all of them."""
        return str(self.first["strategy"])

    @property
    def measure(self) -> Measure:
        """What the models were measured by."""
        return measure_of(self.first)

    @property
    def matrices(self) -> list[Matrix]:
        """The accuracies or errors of each run."""
        return [matrix_of(run[self.measure.name]) for run in self.runs]

    @property
    def parts(self) -> list[str]:
        """The parts of targets that are tensors, where each has an error of its own."""
        return list(self.first.get("average_error_of_parts", {}))

    @property
    def num_tasks(self) -> int:
        """How many there have been so far."""
        return len(self.first[self.measure.name])

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
    def class_orders(self) -> list[int]:
        """The numbers that have drawn orders of classes, in ascending order, each once."""
        orders = {run["config"].get("class_order") for run in self.runs}
        return sorted(each for each in orders if isinstance(each, int))

    @property
    def worst(self) -> Statistic | None:
        """``average`` with the order of classes that it is worst with, mean over the seeds.

        None without several orders.
        """
        if len(self.class_orders) < 2:
            return None
        of_orders: dict[int, list[float]] = {}
        for run in self.runs:
            average = float(run[self.measure.average])
            of_orders.setdefault(run["config"]["class_order"], []).append(average)
        worst = max if self.measure.lower_is_better else min
        return _statistic(worst(of_orders.values(), key=statistics.fmean))

    @property
    def holdout(self) -> float:
        """The share of the training samples that all figures are of; 0: of the test samples."""
        return float(self.first["config"].get("holdout", 0.0))

    @property
    def average(self) -> Statistic:
        """The accuracy, from 0 to 1, or the error: over all tasks at the end."""
        return self._over_runs(self.measure.average)

    @property
    def goodness(self) -> float:
        """The higher, the better ``average`` is."""
        return -self.average.mean if self.measure.lower_is_better else self.average.mean

    def average_of_part(self, part: str) -> Statistic | None:
        """The error of one of the ``parts``; None where a run has none of that name."""
        found = [run.get("average_error_of_parts", {}).get(part) for run in self.runs]
        if any(error is None for error in found):
            return None
        return _statistic([float(error) for error in found])

    def text(self, figure: Statistic | None, sign: str = "", nothing: str = "-") -> str:
        """A figure of accuracies in percent, or of errors as it is."""
        if figure is None:
            return nothing
        return figure.as_number(sign) if self.measure.lower_is_better else figure.in_percent(sign)

    def figure(self, name: str) -> Statistic | None:
        """A figure by its name in ``results.json``; None where a run has none."""
        if any(run.get(name) is None for run in self.runs):
            return None
        return self._over_runs(name)

    @property
    def average_top1(self) -> Statistic:
        """Over all tasks at the end, from 0 to 1; where targets are classes."""
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
        """The time that training took, evaluations left out."""
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
        return _statistic([float(run[name]) for run in self.runs])


def parts_of(groups: Iterable[Group]) -> list[str]:
    """The parts of targets of some groups, each once."""
    return list(dict.fromkeys(part for group in groups for part in group.parts))


def groups_of(runs: Iterable[Results]) -> list[Group]:
    """Groups runs that differ in nothing but seed and class order, in order of first appearance.

    An order counts as such a difference where a number draws it (``class_order``).

    Returns:
        The groups, each with a label of its own.
    """
    grouped: dict[str, list[Results]] = {}
    for run in runs:
        settings = settings_of(_of_any_order(run)) | {"seed": None}
        grouped.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    firsts = [_of_any_order(alike[0]) for alike in grouped.values()]
    labels = labels_of(firsts, ignored=["seed"])
    # Settings that only newer versions write down make groups that no label tells apart.
    seen: Counter[str] = Counter()
    groups = []
    for label, alike in zip(labels, grouped.values(), strict=True):
        seen[label] += 1
        number = f" ({seen[label]})" if seen[label] > 1 else ""
        groups.append(Group(label + number, tuple(alike)))
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


def _statistic(values: Sequence[float]) -> Statistic:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std)


def _of_any_order(run: Results) -> Results:
    """A run as it is with any order of classes that a number draws."""
    if not isinstance(run["config"].get("class_order"), int):
        return run
    return {**run, "config": {**run["config"], "class_order": "drawn"}}


def num_train_samples(run: Results) -> int:
    """The training samples of the whole data set; older results only tell those of each task."""
    total = run.get("train_samples")
    return int(total or sum(task["train_samples"] for task in run["tasks"]))
