from __future__ import annotations

import numpy as np
import pytest

from ritornello.experiments.results import anytime
from ritornello.experiments.results.measures import ERROR, TOP1, common_measure, number_text


@pytest.mark.parametrize(
    ("number", "std", "text"),
    [
        (0.08532, 0.00091, "0.0853 ± 0.0009"),
        (12.34, None, "12.3"),
        (1234.5, 20.0, "1234 ± 20"),
        (1.2e-7, 1e-8, "1.20e-07 ± 1.00e-08"),
        (3e9, None, "3.00e+09"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (-0.031, None, "-0.0310"),
    ],
)
def test_numbers_of_any_size(number: float, std: float | None, text: str) -> None:
    assert number_text(number, std) == text


def test_changes_have_a_sign() -> None:
    assert number_text(0.25, None, "+") == "+0.250"


def test_accuracies_and_errors_are_not_compared() -> None:
    assert common_measure([{"top1": []}, {"top1": []}]) is TOP1
    assert common_measure([{"error": []}]) is ERROR
    with pytest.raises(ValueError, match="make a report of each kind"):
        common_measure([{"error": []}, {"top1": []}])


def test_errors_of_another_kind_are_not_compared() -> None:
    runs = [{"error": [], "config": {"loss": loss}} for loss in ("mae", "mse")]
    with pytest.raises(ValueError, match=r"errors of different kinds \(mae, mse\)"):
        common_measure(runs)
    assert common_measure(runs[:1] * 2) is ERROR


PROBES: list[anytime.Probe] = [
    {"step": 2, "task": 0, "error": [0.4]},
    {"step": 4, "task": 0, "error": [0.2]},
    {"step": 6, "task": 1, "error": [0.7, 0.9]},
    {"step": 8, "task": 1, "error": [0.3, 0.1]},
]


def test_curves_of_errors() -> None:
    curves = anytime.curves_of(PROBES)
    assert np.allclose(curves.average, [0.4, 0.2, 0.8, 0.2])
    assert np.allclose(curves.newest, [0.4, 0.2, 0.9, 0.1])
    assert np.allclose(curves.lowest_old[2:], [0.7, 0.3])
    assert curves.steps.tolist() == [2, 4, 6, 8]


def test_figures_of_errors_rise_where_accuracies_fall() -> None:
    figures = anytime.figures_of(PROBES)
    assert figures == {
        "average_anytime_error": pytest.approx(0.4),
        "stability_gap": pytest.approx(0.4),  # from the end's 0.3 up to 0.7
        "max_error": pytest.approx(0.7),
        "worst_case_error": pytest.approx(0.1 / 2 + 0.7 / 2),
    }
    accuracies: list[anytime.Probe] = [
        {"step": each["step"], "task": each["task"], "top1": [1 - e for e in each["error"] if e]}
        for each in PROBES
    ]
    mirrored = list(anytime.figures_of(accuracies).values())
    assert mirrored == pytest.approx([1 - 0.4, 0.4, 1 - 0.7, 1 - 0.4])
