from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.experiments import train
from ritornello.experiments.config import Recipe
from ritornello.experiments.data import load
from ritornello.experiments.launch import launch
from ritornello.experiments.recipes import recipe_named
from ritornello.experiments.train import Trainer


def quick(**changes: Any) -> Recipe:
    return recipe_named("digits", **{"epochs": 3, **changes})


def test_results_of_a_run(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    results = train.run(quick(), str(tmp_path / "out"))
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert np.array(results["top1"]).shape == np.array(results["top5"]).shape == (5, 5)
    assert results["world_size"] == 1
    assert results["average_top1"] == pytest.approx(np.mean(results["top1"][-1]))
    assert results["buffer"]["num_held"] == 200
    assert results["buffer"]["shard_bytes"] == 200 * results["buffer"]["record_bytes"]
    assert results["steps_per_task"] == [
        3 * (task["train_samples"] // 16) for task in results["tasks"]
    ]
    assert results["step_seconds"]["wait"] > 0.0
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert set(weights) == {"1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"}


def test_rehearsal_undoes_forgetting(tmp_path: Path) -> None:
    strategies = ("incremental", "rehearsal", "from-scratch")
    comparison = train.compare(recipe_named("digits", epochs=8), strategies, str(tmp_path))
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison
    top1 = {strategy: results["average_top1"] for strategy, results in comparison.items()}
    assert top1["incremental"] < 0.3
    assert top1["rehearsal"] > 0.8
    assert top1["from-scratch"] > top1["rehearsal"]
    assert (
        comparison["from-scratch"]["steps_per_task"][4]
        > 4 * comparison["incremental"]["steps_per_task"][4]
    )


def test_equal_seeds_give_bit_identical_weights_on_two_ranks() -> None:
    first, second = (launch(2, train.run, quick(epochs=2)) for _ in range(2))
    other = launch(2, train.run, quick(epochs=2, seed=1))
    assert first["world_size"] == 2
    assert first["weights_sha256"] == second["weights_sha256"] != other["weights_sha256"]
    assert first["top1"] == second["top1"]
    assert sum(first["buffer"]["held_per_rank"]) == 200


def test_the_global_mini_batches_do_not_depend_on_the_ranks() -> None:
    digits = load("digits")
    trainers = []
    for rank in range(2):
        trainer = Trainer(quick(strategy="incremental"), digits, torch.device("cpu"))
        trainer.rank, trainer.num_ranks = rank, 2
        trainers.append(trainer)
    alone = Trainer(quick(strategy="incremental"), digits, torch.device("cpu"))
    indices = alone.training_indices(0)
    for whole, *parts in zip(
        alone.batches(indices, 0, 0),
        *(each.batches(indices, 0, 0) for each in trainers),
        strict=True,
    ):
        assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(amp: str) -> None:
    results = train.run(quick(amp=amp, epochs=8))
    assert results["average_top1"] > 0.75


def test_loader_workers() -> None:
    with_workers = train.run(quick(epochs=1, num_tasks=2, num_workers=1))
    without = train.run(quick(epochs=1, num_tasks=2))
    assert with_workers["weights_sha256"] == without["weights_sha256"]


def test_a_task_smaller_than_a_mini_batch() -> None:
    with pytest.raises(ValueError, match="fewer than global_batch_size=1600: take a smaller one"):
        train.run(quick(global_batch_size=1600))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device='cuda': this machine has no CUDA device"):
        train.run(quick(device="cuda"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_split_mnist_on_two_ranks(shared_data: Path) -> None:
    """The accuracy itself is under test: a refactoring that costs points must not go unnoticed."""
    recipe = recipe_named("mnist", data_path=str(shared_data / "mnist.npz"))
    comparison = launch(2, train.compare, recipe, ("incremental", "rehearsal"), None)
    assert comparison["incremental"]["average_top1"] < 0.25
    # 0.853 where it was written; other processors round differently.
    assert comparison["rehearsal"]["average_top1"] > 0.82
