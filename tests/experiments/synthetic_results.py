"""Results as a run writes them, made up."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from typing import Any

import numpy as np

from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results import anytime, metrics

REMEMBERED = {"incremental": 0.0, "rehearsal": 0.9, "der": 0.85, "from-scratch": 0.95, "joint": 1.0}
RUNTIMES = {"incremental": 10.0, "from-scratch": 35.0, "joint": 11.0}


def results_of(strategy: str, remembered: float | None = None, **changes: Any) -> dict[str, Any]:
    """Of three tasks; each is learnt to 98 %, and what is remembered of it stays to the end."""
    if remembered is None:
        remembered = REMEMBERED[strategy]
    matrix = np.tril(np.full((3, 3), remembered), -1) + np.eye(3) * 0.98
    return {
        "format": 1, "recipe": "digits", "strategy": strategy, "seed": 0, "world_size": 2,
        "config": {"capacity": 100}, "versions": {"torch": "2"}, "machine": {}, "date": "2026-01-02",
        "tasks": [
            {"name": f"<{i}>", "classes": [i], "train_samples": 100, "test_samples": 10}
            for i in range(3)
        ],
        "top1": matrix.tolist(), "top5": np.ones((3, 3)).tolist(),
        "average_top1": metrics.average_accuracy(matrix), "average_top5": 1.0,
        "forgetting": metrics.forgetting(matrix), "backward_transfer": -0.1, "forward_transfer": 0.0,
        "seconds": RUNTIMES.get(strategy, 12.5), "seconds_per_task": [4.0] * 3,
        "steps_per_task": [9] * 3, "step_seconds": {"load": 1e-4, "wait": 2e-4, "train": 2e-3},
        "buffer": None, "weights_sha256": "0", **changes,
    }  # fmt: skip


def results_of_variant(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    """Of a complete recipe; a larger buffer remembers more, and seeds differ a little."""
    dice = np.random.default_rng([recipe.seed, zlib.crc32(recipe.strategy.encode())])
    size = {"incremental": 0.0, "from-scratch": 0.95, "joint": 0.96}.get(
        recipe.strategy, 0.5 + 0.12 * np.log10(recipe.num_stored(300))
    )
    remembered = float(np.clip(size + 0.02 * dice.standard_normal(), 0, 1))
    seconds = RUNTIMES.get(recipe.strategy, 11 + recipe.global_num_representatives / 16)
    return results_of(
        recipe.strategy,
        remembered,
        **{
            "recipe": recipe.name,
            "seed": recipe.seed,
            "config": asdict(recipe),
            "machine": {"processor": "x86_64", "cores": 2, "device": "CPU"},
            "versions": {"ritornello": "0.1.0", "torch": "2.6"},
            "command": f"ritornello compare {recipe.name} --seeds 0 1 2",
            "seconds": float(seconds * (1 + 0.03 * dice.standard_normal())),
            **changes,
        },
    )


def probed(results: dict[str, Any]) -> dict[str, Any]:
    """The same results with probes: what is old falls to a half at the beginning of each task."""
    probes: list[anytime.Probe] = []
    for task, row in enumerate(results["top1"]):
        for number, share in enumerate((0.5, 0.75, 1.0), start=1):
            top1 = [share * accuracy for accuracy in row[: task + 1]]
            probes.append({"step": 9 * task + 3 * number, "task": task, "top1": top1})
    return {
        **results,
        "probes": probes,
        **anytime.figures_of(probes),
        "average_incremental_top1": 0.91,
        "plasticity": 0.98,
    }
