from __future__ import annotations

import numpy as np
import pytest

from ritornello.experiments.results.anytime import Probe, curves_of, figures_of

PROBES: list[Probe] = [
    {"step": 1, "task": 0, "top1": [0.5]},
    {"step": 2, "task": 0, "top1": [0.9]},
    {"step": 3, "task": 1, "top1": [0.3, 0.4]},
    {"step": 4, "task": 1, "top1": [0.7, 0.9]},
    {"step": 5, "task": 2, "top1": [0.6, 0.2, 0.3]},
    {"step": 6, "task": 2, "top1": [0.7, 0.9, 0.8]},
]


def test_curves() -> None:
    curves = curves_of(PROBES)
    assert curves.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert curves.tasks.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(curves.average, [0.5, 0.9, 0.35, 0.8, 1.1 / 3, 0.8])
    np.testing.assert_allclose(curves.lowest_old, [np.nan, np.nan, 0.3, 0.7, 0.2, 0.7])
    np.testing.assert_allclose(curves.old, [np.nan, np.nan, 0.3, 0.7, 0.4, 0.8])
    np.testing.assert_allclose(curves.newest, [0.5, 0.9, 0.4, 0.9, 0.3, 0.8])


def test_figures() -> None:
    assert figures_of(PROBES) == pytest.approx(
        {
            "average_anytime_top1": (0.5 + 0.9 + 0.35 + 0.8 + 1.1 / 3 + 0.8) / 6,
            # Task 1: from 0.9 to 0.3 and back to 0.7. Task 2: from 0.8 to 0.4 and back to 0.8.
            "stability_gap": (0.4 + 0.4) / 2,
            "min_accuracy": (0.3 + 0.2) / 2,
            "worst_case_accuracy": 0.8 / 3 + 2 / 3 * 0.25,
        }
    )


def test_what_is_forgotten_for_good_is_no_gap() -> None:
    forgotten: list[Probe] = [
        {"step": 1, "task": 0, "top1": [1.0]},
        {"step": 2, "task": 1, "top1": [0.5, 0.5]},
        {"step": 3, "task": 1, "top1": [0.0, 1.0]},
    ]
    assert figures_of(forgotten)["stability_gap"] == 0.0
    assert figures_of(forgotten)["min_accuracy"] == 0.0


def test_what_was_not_measured_is_left_out() -> None:
    figures = figures_of([{"step": 1, "task": 0, "top1": [0.8]}])
    assert figures == {
        "average_anytime_top1": 0.8,
        "stability_gap": None,
        "min_accuracy": None,
        "worst_case_accuracy": 0.8,
    }
    gone: list[Probe] = [
        {"step": 1, "task": 0, "top1": [None]},
        {"step": 2, "task": 1, "top1": [None, 0.4]},
        {"step": 3, "task": 1, "top1": [None, None]},
    ]
    figures = figures_of(gone)
    assert figures["average_anytime_top1"] == 0.4
    assert [figures[name] for name in ("stability_gap", "min_accuracy", "worst_case_accuracy")] == [
        None, None, None,
    ]  # fmt: skip
