"""Does a run that is extended end like one that knew all tasks from the beginning?

    python benchmarks/extending.py mnist.npz --strategies rehearsal der++ --seeds 0 1 2

The first six classes are a run of three tasks; then come two extensions with two classes each. The
other run has five tasks of two classes. Both take the recipe "mnist"; the average is over all ten
classes at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import extension
from ritornello.experiments.training import run as train

PARTS = ((0, 6), (6, 8), (8, 10))
"""Classes that come together: from, to below."""


def main() -> None:
    """Runs all, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="MNIST as an npz file")
    parser.add_argument("--strategies", nargs="+", default=["incremental", "rehearsal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    print("average top-1 in percent, one figure per seed, and their mean")
    with tempfile.TemporaryDirectory() as temporary:
        paths = split(arguments.data, Path(temporary))
        for strategy in arguments.strategies:
            known, extended = [], []
            for seed in arguments.seeds:
                changes = {"strategy": strategy, "seed": seed, "device": "cpu"}
                known.append(run_that_knows_all(arguments.data, changes))
                folder = Path(temporary) / f"{strategy}-{seed}"
                extended.append(run_that_is_extended(paths, folder, changes))
            for what, values in (("all tasks known", known), ("extended twice", extended)):
                figures = ", ".join(f"{value:.1f}" for value in values)
                print(f"{strategy:<12} {what:<16} {figures}; {statistics.fmean(values):.1f}")


def split(data: Path, folder: Path) -> list[Path]:
    """A file for each part."""
    paths = []
    with np.load(data) as archive:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        arrays = {name: archive[name] for name in names}
    for first, end in PARTS:
        part = {}
        for name in ("train", "test"):
            labels = arrays[f"{name}_labels"]
            wanted = (labels >= first) & (labels < end)
            part[f"{name}_images"] = arrays[f"{name}_images"][wanted]
            part[f"{name}_labels"] = labels[wanted]
        paths.append(folder / f"from-{first}.npz")
        np.savez(paths[-1], **part)
    return paths


def run_that_knows_all(data: Path, changes: dict[str, Any]) -> float:
    """Five tasks; the average accuracy in percent."""
    results = train.run(recipe_named("mnist", data_path=str(data), **changes))
    return 100 * float(results["average_top1"])


def run_that_is_extended(paths: list[Path], folder: Path, changes: dict[str, Any]) -> float:
    """Three tasks, then two extensions; the average accuracy in percent."""
    recipe = recipe_named("mnist", data_path=str(paths[0]), num_tasks=3, **changes)
    train.run(recipe, str(folder))
    results = [extension.extend(folder, path) for path in paths[1:]][-1]
    return 100 * float(results["average_top1"])


if __name__ == "__main__":
    main()
