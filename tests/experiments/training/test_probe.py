"""Probes of the test samples, and the running average of the weights, beside a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.experiments.data.data_set import InMemoryImages
from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import scenario_of
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import Results
from ritornello.experiments.training import probe
from ritornello.experiments.training import run as train
from ritornello.experiments.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("forked_ranks")

AS_BEFORE = ("weights_sha256", "top1", "top5", "average_top1", "forgetting", "plasticity")


def quick(**changes: Any) -> Recipe:
    return recipe_named("digits", **{"epochs": 1, "num_tasks": 3, **changes})


def without_and_with(recipe: Recipe, changes: dict[str, Any]) -> list[Results]:
    return [train.run(each) for each in (recipe, replace(recipe, **changes))]


def test_few_samples_have_the_proportions_of_many() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    few = probe.few_of(np.arange(100), labels, 20)
    assert Counter(labels[few].tolist()) == {0: 12, 1: 6, 2: 2}
    assert len(set(few.tolist())) == 20
    assert probe.few_of(np.arange(100), labels, 20).tolist() == few.tolist()
    assert probe.few_of(np.arange(7), labels, 20).tolist() == list(range(7))


def test_images_are_read_once() -> None:
    class Counted(InMemoryImages):
        asked: Sequence[int] = ()

        def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
            self.asked = [*self.asked, *indices]
            return super().__getitems__(indices)

    images = Counted(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5))
    kept = probe.Kept(images)
    for indices in ([3, 1], [1, 4, 3], [4]):
        found, labels = kept.__getitems__(indices)
        assert found.flatten().tolist() == labels.tolist() == indices
    assert images.asked == [3, 1, 4]


def test_a_probe_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = load("digits"), quick(probe_every=5)
    tasks = scenario_of(data, recipe)
    place = Place(0, 1, torch.device("cpu"))
    monkeypatch.setattr(probe, "MOST", 30)
    evaluation = probe.probe_of(recipe, data, tasks, place)
    assert evaluation is not None
    with Trainer(recipe, data, place) as trainer:
        accuracies = evaluation.accuracies(trainer.network, num_tasks=2).top1
    assert len(accuracies) == 2
    assert all(each is not None and (10 * each).is_integer() for each in accuracies)


def test_a_run_is_as_it_was_without_probes() -> None:
    before, probed = without_and_with(quick(), {"probe_every": 5, "averaged": 0.9})
    for name in AS_BEFORE:
        assert before[name] == probed[name], name
    assert not {"probes", "stability_gap", "averaged_top1"} & set(before)
    ends = np.cumsum(probed["steps_per_task"]).tolist()
    begins = [0, *ends[:-1]]
    assert [(each["task"], each["step"]) for each in probed["probes"]] == [
        (task, step)
        for task, (begin, end) in enumerate(zip(begins, ends, strict=True))
        for step in range(begin + 1, end + 1)
        if (step - begin) % 5 == 0 or step == end
    ]
    # A probe of all test samples, at a task's end.
    at_end = [each for each in probed["probes"] if each["step"] in ends]
    for row, each in zip(probed["top1"], at_end, strict=True):
        assert row[: len(each["top1"])] == each["top1"]
    assert 0 < probed["worst_case_accuracy"] <= probed["average_top1"]
    assert probed["stability_gap"] >= 0
    assert probed["seconds_probing"] > 0


def test_a_model_that_is_trained_anew_is_probed_when_it_is_ready() -> None:
    results = train.run(quick(strategy="from-scratch", probe_every=5))
    assert [each["task"] for each in results["probes"]] == [0, 1, 2]
    results = train.run(quick(strategy="joint", probe_every=10))
    assert {each["task"] for each in results["probes"]} == {2}
    assert "stability_gap" not in results
    assert results["plasticity"] is None


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_agree(num_ranks: int) -> None:
    recipe, changes = quick(num_tasks=2, iterations=16), {"averaged": 0.9, "probe_every": 6}
    before, probed = launch(num_ranks, without_and_with, recipe, changes)
    for name in AS_BEFORE:
        assert before[name] == probed[name], name
    assert [each["step"] for each in probed["probes"]] == [6, 12, 16, 22, 28, 32]


def averages_on_all_ranks(recipe: Recipe) -> list[str]:
    """The digests of the averaged models on all ranks."""
    digest = train.run(recipe)["averaged_sha256"]
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, digest)
    return everyone


def test_running_statistics_are_averaged_on_two_ranks() -> None:
    recipe = quick(
        model="resnet10t", num_tasks=1, iterations=4, strategy="incremental",
        averaged=0.5, probe_every=4,
    )  # fmt: skip
    first, second = launch(2, averages_on_all_ranks, recipe)
    assert first == second


def test_averaged_weights_are_written(tmp_path: Path) -> None:
    train.run(quick(num_tasks=1, averaged=0.9), str(tmp_path))
    raw, averaged = (
        torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "averaged.pt")
    )
    assert raw.keys() == averaged.keys()
    assert not torch.equal(raw["1.weight"], averaged["1.weight"])
    train.run(quick(num_tasks=1), str(tmp_path / "without"))
    assert not (tmp_path / "without" / "averaged.pt").exists()


def test_a_holdout_stands_in_for_the_test_samples() -> None:
    recipe = quick(holdout=0.2, strategy="incremental")
    results = train.run(recipe)
    sizes = [(task["train_samples"], task["test_samples"]) for task in results["tasks"]]
    whole = [len(task.train_indices) for task in scenario_of(load("digits"), recipe)]
    assert [sum(each) for each in sizes] == whole
    assert results["train_samples"] == sum(train_size for train_size, _ in sizes)
