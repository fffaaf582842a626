"""What models are measured by: accuracies where targets are classes, errors where they are tensors.

Both fill a matrix ``[i, j]``, on task ``j`` after task ``i``, and have the same figures. Of errors
lower is better. So that figures mean the same, those of changes are taken from negative errors:
forgetting is how far errors have risen, a positive transfer how far they have fallen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Accuracies:
    """Top-1 and top-5 accuracies on every task, and the mean loss; None where there is none."""

    top1: list[float | None] = field(default_factory=list)
    top5: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    """Cross-entropy in nats; None also where it is not finite."""


@dataclass
class Errors:
    """The mean error on every task; None where there are no test samples."""

    error: list[float | None] = field(default_factory=list)
    """Of all parts of the targets together, as the loss is."""
    of_parts: dict[str, list[float | None]] = field(default_factory=dict)
    """Of each part, where they have names."""


Measured = Accuracies | Errors


@dataclass(frozen=True)
class Measure:
    """One of the two, as reports write it."""

    name: str
    """Of the matrix in ``results.json``."""
    noun: str
    """Such as "accuracy"."""
    header: str
    """Of its mean at the end, in a table."""
    axis: str
    """What an axis says of it."""
    scale: float
    """What figures are multiplied by to be shown."""
    lower_is_better: bool

    @property
    def average(self) -> str:
        """The name of its mean over all tasks at the end, in ``results.json``."""
        return f"average_{self.name}"


TOP1 = Measure("top1", "accuracy", "top-1", "top-1 accuracy (%)", 100, False)
ERROR = Measure("error", "error", "error", "error", 1, True)


def measure_of(results: Mapping[str, Any]) -> Measure:
    """What the model of a run was measured by."""
    return ERROR if ERROR.name in results else TOP1


def common_measure(runs: Iterable[Mapping[str, Any]]) -> Measure:
    """What the models of some runs were measured by.

    Raises:
        ValueError: some by accuracies, others by errors, or by errors of another kind.
    """
    runs = list(runs)
    measures = {measure_of(each) for each in runs}
    losses = {str(each.get("config", {}).get("loss")) for each in runs}
    if len(measures) > 1:
        raise ValueError(
            "some of the runs learn classes and have accuracies, others tensors and have errors, "
            "and no table or picture compares the two: make a report of each kind"
        )
    if len(losses) > 1 and TOP1 not in measures:
        raise ValueError(
            f"the runs have errors of different kinds ({', '.join(sorted(losses))}), and no table "
            "or picture compares them: make a report of each kind"
        )
    return measures.pop() if measures else TOP1


SIGNIFICANT_DIGITS = 3


def number_text(number: float, std: float | None = None, sign: str = "") -> str:
    """A number of any size with three significant digits, and as many decimals of its deviation.

    Such as "0.0853 ± 0.0009", "12.3", "1234", "1.20e-07"; with sign="+" "+12.3".
    """
    exponent = math.floor(math.log10(abs(number))) if number else 0
    form = ".2e"
    if -5 < exponent < 6:
        form = f".{max(0, SIGNIFICANT_DIGITS - 1 - exponent)}f"
    return f"{number:{sign}{form}}" + ("" if std is None else f" ± {std:{form}}")
