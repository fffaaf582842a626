"""Runs whose ranks have unlike data, draw from their own shards, or make steps of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import scenario_of
from ritornello.experiments.models.local_steps import average_over_ranks, mean_of
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import GDumb, Incremental
from ritornello.experiments.training import run as train
from ritornello.experiments.training.schedule import Schedule

DIGITS = load("digits")


def quick(**changes: Any) -> Recipe:
    usual = {"epochs": 1, "num_tasks": 2, "momentum": 0.0, "global_num_candidates": None}
    return recipe_named("digits", **usual | changes)


def schedule_of(recipe: Recipe, rank: int, observes: bool = False) -> Schedule:
    strategy: Any = GDumb.__new__(GDumb) if observes else Incremental()
    place = Place(rank, 3, torch.device("cpu"))
    return Schedule(recipe, DIGITS, scenario_of(DIGITS, recipe), strategy, place)


def images_of(batches: Any) -> list[list[bytes]]:
    return [[image.numpy().tobytes() for image in images] for images, _, _ in batches]


@pytest.mark.parametrize("alpha", [0.02, 1.0])
def test_ranks_take_equally_many_steps_through_their_own_samples(alpha: float) -> None:
    recipe = quick(ranks_differ=alpha, num_tasks=5, epochs=2, global_batch_size=16)
    schedules = [schedule_of(recipe, rank) for rank in range(3)]
    [counts] = schedules[0].of_unlike_ranks().values()
    tasks = scenario_of(DIGITS, recipe)
    assert [sum(each) for each in counts] == [len(task.train_indices) for task in tasks]
    assert min(map(min, counts)) == 0 or alpha == 1.0
    for number, task in enumerate(tasks):
        num_steps = 2 * (len(task.train_indices) // 16)
        of_ranks = [images_of(each.batches(number, 0)) for each in schedules]
        own = [set().union(*each) for each in of_ranks]
        for rank, steps in enumerate(of_ranks):
            size = (6, 5, 5)[rank] if counts[number][rank] else 0
            assert [len(each) for each in steps] == [size] * num_steps
            assert schedules[rank].num_own(number) == counts[number]
            assert images_of(schedules[rank].batches(number, 7)) == steps[7:]
            # Of few samples all come, and none of another rank.
            assert len(own[rank]) == min(counts[number][rank], size * num_steps)
            others = own[(rank + 1) % 3] | own[(rank + 2) % 3]
            assert not own[rank] & others
        num_new = sum(size for size, count in zip((6, 5, 5), counts[number], strict=True) if count)
        assert schedules[0].num_new(number) == num_new


def test_what_passes_by_is_of_ones_own_too() -> None:
    recipe = quick(ranks_differ=0.02, num_tasks=5)
    for rank in range(3):
        schedule = schedule_of(recipe, rank, observes=True)
        observed = [labels for _, labels, _ in schedule.observed(0, 0)]
        assert len(observed) == len(scenario_of(DIGITS, recipe)[0].train_indices) // 16
        assert bool(len(torch.cat(observed))) == bool(schedule.num_own(0)[rank])


UNLIKE = {"ranks_differ": 0.05}

RUNS: dict[str, Recipe] = {
    "averaged gradients": quick(strategy="incremental", **UNLIKE),
    "one local step": quick(strategy="incremental", local_steps=1, **UNLIKE),
    "one task each": quick(strategy="incremental", local_steps=10_000, momentum=0.9, **UNLIKE),
    "global": quick(local_steps=48, num_tasks=5, epochs=3, **UNLIKE),
    "local": quick(local_steps=48, num_tasks=5, epochs=3, draws="local", **UNLIKE),
    "not probed": quick(local_steps=8, averaged=0.9, sampling="grasp", epochs=2),
    "probed": quick(local_steps=8, averaged=0.9, sampling="grasp", epochs=2, probe_every=11),
}


def on_every_rank() -> tuple[dict[str, tuple[Results, list[str]]], list[tuple[float, float]]]:
    """Of each run the results and the models' digests on all ranks; and ``means_of_ranks``."""
    runs = {}
    for name, recipe in RUNS.items():
        results = train.run(recipe)
        digests: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(digests, results["weights_sha256"])
        runs[name] = results, digests
    return runs, means_of_ranks()


def means_of_ranks() -> list[tuple[float, float]]:
    """Of a weight and a statistic that say their rank: trained on as many samples, and on none."""
    rank, found = dist.get_rank(), []
    for num_samples in (rank, 0):
        model = nn.BatchNorm1d(2)
        model.weight.data.fill_(rank)
        assert model.running_mean is not None
        model.running_mean.fill_(10 * rank)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, model.state_dict())
        average_over_ranks([model], num_samples)
        counts = [0, 1, 2] if found == [] else [0, 0, 0]
        torch.testing.assert_close(dict(model.state_dict()), mean_of(states, counts))
        found.append((model.weight[0].item(), model.running_mean[1].item()))
    return found


def test_runs_on_three_ranks() -> None:
    runs, means = launch(3, on_every_rank)
    assert means == [pytest.approx((5 / 3, 50 / 3)), pytest.approx((1.0, 10.0))]
    results = {name: result for name, (result, _) in runs.items()}
    for name, (_, digests) in runs.items():
        assert len(set(digests)) == 1, name
    for name in ("top1", "loss"):  # one local step is a step with averaged gradients
        one, other = (results[each][name] for each in ("averaged gradients", "one local step"))
        np.testing.assert_allclose(one, other, atol=0.002)
    assert results["one task each"]["top1"] != results["averaged gradients"]["top1"]
    held = results["local"]["train_samples_per_rank"]
    assert held == results["global"]["train_samples_per_rank"]
    assert len(held) == 5
    assert "train_samples_per_rank" not in results["probed"]
    assert results["local"]["config"]["draws"] == "local"
    assert results["local"]["buffer"]["bytes_sent"] == 0
    # What a rank never saw comes to it out of the other shards: 0.88 against 0.65.
    assert results["global"]["average_top1"] > results["local"]["average_top1"] + 0.1
    for name in ("weights_sha256", "averaged_sha256"):  # a probe changes nothing
        assert results["probed"][name] == results["not probed"][name]
    assert results["probed"]["probes"][-1]["top1"] == results["probed"]["top1"][-1]
