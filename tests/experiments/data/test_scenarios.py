from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ritornello.experiments.data import scenarios
from ritornello.experiments.data.data_set import Arrival, DataSet, InMemoryImages
from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import SCENARIOS, Task, class_incremental, scenario_of
from ritornello.experiments.recipes.recipe import Recipe


@cache
def digits() -> DataSet:
    return load("digits")


def recipe(scenario: str, **changes: Any) -> Recipe:
    return Recipe("test", "", "digits", scenario=scenario, **changes)


def with_labels(train: list[int], test: list[int], num_classes: int) -> DataSet:
    parts = [
        InMemoryImages(np.zeros((len(each), 1, 2, 2), dtype=np.uint8), np.array(each))
        for each in (train, test)
    ]
    names = tuple("abcdefghij"[:num_classes])
    return DataSet("letters", parts[0], parts[1], names, (0.5,), (0.5,))


def in_tasks(tasks: list[Task]) -> list[int]:
    return sorted(np.concatenate([task.train_indices for task in tasks]).tolist())


# Data with at least one sample per class; the number of classes is that of the list.
class_sizes = st.lists(st.integers(1, 40), min_size=2, max_size=8)


def of_sizes(sizes: list[int], seed: int = 0) -> DataSet:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    return with_labels(labels.tolist(), labels.tolist(), len(sizes))


def test_tasks_split_the_classes_and_all_samples() -> None:
    tasks = class_incremental(digits(), 5)
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert tasks[1].name == "2, 3"
    for task in tasks:
        assert set(digits().train.labels[task.train_indices]) == set(task.classes)
        assert set(digits().test.labels[task.test_indices]) == set(task.classes)
    assert in_tasks(tasks) == list(range(len(digits().train)))


def test_an_order_of_the_classes_and_a_remainder() -> None:
    tasks = class_incremental(digits(), 3, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert [task.classes for task in tasks] == [(9, 8, 7, 6), (5, 4, 3), (2, 1, 0)]
    assert tasks[0].name == "9 to 6 (4 classes)"


def test_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"num_tasks=11: .*classes of digits \(10\)"):
        class_incremental(digits(), 11)
    with pytest.raises(ValueError, match="must hold each class from 0 to 9 once"):
        class_incremental(digits(), 2, class_order=[0, 0, 1])


def test_the_order_of_a_recipe() -> None:
    def order(seed: int = 0, **changes: Any) -> list[int]:
        tasks = scenario_of(digits(), recipe("class-incremental", seed=seed, **changes))
        return [label for task in tasks for label in task.classes]

    assert order() == list(range(10))
    assert order(class_order=tuple(range(9, -1, -1))) == list(range(9, -1, -1))
    by_seed = [order(seed, class_order="by-seed") for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert sorted(by_seed[0]) == list(range(10))
    with pytest.raises(ValueError, match="class_order='random': it must be 'by-seed'"):
        order(class_order="random")


def test_a_scenario_by_name() -> None:
    with pytest.raises(ValueError, match="scenario='online': there are class-incremental, task-"):
        scenario_of(digits(), recipe("online"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_tasks_repeat_and_travel_to_loader_processes(name: str) -> None:
    data = digits()
    if name == "arrivals":
        data = DataSet(**{**vars(data), "arrivals": (Arrival("a", np.arange(9), np.arange(3)),)})
    first, second = (scenario_of(data, recipe(name, seed=3)) for _ in range(2))
    second = pickle.loads(pickle.dumps(second))
    images = data.train.__getitems__(range(5))[0]
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.classes) == (other.name, other.classes)
        assert np.array_equal(one.train_indices, other.train_indices)
        assert np.array_equal(one.test_indices, other.test_indices)
        if one.view is None:
            assert other.view is None
        else:
            assert other.view is not None
            assert torch.equal(one.view(images), other.view(images))


def test_outputs_compete_within_a_task() -> None:
    tasks = class_incremental(digits(), 3, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    mask = scenarios.task_mask(tasks, 10)
    assert mask.dtype == torch.bool
    for task in tasks:
        for label in task.classes:
            assert set(mask[label].nonzero().flatten().tolist()) == set(task.classes)
    assert scenarios.task_mask(scenarios.rotated(digits(), 2), 10).all()


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_a_permutation_loses_no_pixel(seed: int, channels: int, height: int, width: int) -> None:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(height * width))
    images = torch.arange(2 * channels * height * width).view(2, channels, height, width)
    seen = scenarios.permute_pixels(images, order)
    assert seen.shape == images.shape
    assert torch.equal(scenarios.permute_pixels(seen, order.argsort()), images)
    # The same in all samples and channels.
    assert (seen - images[:, :, :1, :1] == order.view(height, width)).all()


def test_each_task_has_its_own_permutation() -> None:
    tasks = scenarios.permuted(digits(), 3, seed=0)
    images = digits().train.__getitems__(range(4))[0]
    assert [task.name for task in tasks] == ["as they are", "permutation 1", "permutation 2"]
    assert tasks[0].view is None
    views = [task.view for task in [*tasks[1:], scenarios.permuted(digits(), 2, seed=1)[1]]]
    seen = [images, *(view(images) for view in views if view is not None)]
    assert all(each.dtype == torch.uint8 for each in seen)
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))
    for task in tasks:
        assert task.classes == tuple(range(10))
        assert np.array_equal(task.train_indices, np.arange(len(digits().train)))
        assert np.array_equal(task.test_indices, np.arange(len(digits().test)))


def test_each_task_rotates_further() -> None:
    tasks = scenarios.rotated(digits(), 4)
    assert [task.name for task in tasks] == [
        "as they are",
        "by 45 degrees",
        "by 90 degrees",
        "by 135 degrees",
    ]
    images = digits().train.__getitems__(range(4))[0]
    assert tasks[0].view is None
    assert tasks[2].view is not None
    assert torch.equal(tasks[2].view(images), torch.rot90(images, dims=(2, 3)))
    # Bilinear: a rotated smooth image is smooth, and rotated back it is nearly the same inside.
    smooth = torch.linspace(0, 255, 64).round().byte().expand(1, 3, 64, 64)
    there_and_back = scenarios.rotate(scenarios.rotate(smooth, 45), -45)
    assert there_and_back.dtype == torch.uint8
    difference = functional.pad(there_and_back.int() - smooth.int(), [-20] * 4)
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("name", ["domain-incremental-permuted", "domain-incremental-rotated"])
def test_domains_need_a_task(name: str) -> None:
    with pytest.raises(ValueError, match="num_tasks=0: it must be at least 1"):
        scenario_of(digits(), recipe(name, num_tasks=0))


@given(class_sizes, st.integers(1, 9), st.integers(0, 99))
def test_instances_are_split_evenly_within_each_class(
    sizes: list[int], num_tasks: int, seed: int
) -> None:
    data = of_sizes(sizes)
    num_tasks = min(num_tasks, sum(sizes))
    tasks = scenarios.instance_incremental(data, num_tasks, seed)
    assert in_tasks(tasks) == list(range(sum(sizes)))
    tested = np.concatenate([task.test_indices for task in tasks])
    assert sorted(tested) == list(range(sum(sizes)))
    counts = np.array(
        [np.bincount(data.train.labels[task.train_indices], minlength=len(sizes)) for task in tasks]
    )
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert all(task.classes == tuple(range(len(sizes))) for task in tasks)


def test_instances_are_split_by_seed() -> None:
    tasks = [scenarios.instance_incremental(digits(), 2, seed)[0] for seed in (0, 1)]
    assert not np.array_equal(tasks[0].train_indices, tasks[1].train_indices)
    data = with_labels([0, 1, 0, 1], [0, 1], 2)
    with pytest.raises(ValueError, match=r"num_tasks=3: .*samples of letters's smaller part \(2\)"):
        scenarios.instance_incremental(data, 3, 0)


@given(
    class_sizes,
    st.integers(2, 8),
    st.floats(0, 0.99),
    st.integers(0, 99),
)
def test_the_share_of_each_class_that_other_tasks_get(
    sizes: list[int], num_tasks: int, blur: float, seed: int
) -> None:
    data = of_sizes(sizes)
    num_tasks = min(num_tasks, len(sizes))
    tasks = scenarios.blurry(data, num_tasks, None, blur, seed)
    assert in_tasks(tasks) == list(range(sum(sizes)))
    counts = np.array(
        [np.bincount(data.train.labels[task.train_indices], minlength=len(sizes)) for task in tasks]
    )
    for number, task in enumerate(tasks):
        others = np.delete(counts, number, axis=0)
        for label in task.classes:
            assert abs(others[:, label].sum() - blur * sizes[label]) <= 1
            assert np.ptp(others[:, label]) <= 1
        of_task = others[:, list(task.classes)].sum(axis=1)
        assert np.ptp(of_task) <= 1
        assert set(data.test.labels[task.test_indices]) == set(task.classes)
        assert task.classes == class_incremental(data, num_tasks)[number].classes


def test_the_share_of_a_task_that_is_of_other_tasks() -> None:
    data = of_sizes([100] * 10)
    for task in scenarios.blurry(data, 5, None, 0.3, seed=0):
        labels = data.train.labels[task.train_indices]
        assert len(labels) == 200
        assert np.isin(labels, task.classes, invert=True).sum() == 60


def test_blurry_tasks_of_a_recipe() -> None:
    reverse = tuple(range(9, -1, -1))
    tasks = scenario_of(digits(), recipe("blurry", blur=0.0, class_order=reverse))
    assert tasks[0].classes == (9, 8)
    assert set(digits().train.labels[tasks[0].train_indices]) == {8, 9}
    seeds = [scenario_of(digits(), recipe("blurry", seed=seed))[0] for seed in (0, 1)]
    assert not np.array_equal(seeds[0].train_indices, seeds[1].train_indices)
    with pytest.raises(ValueError, match="num_tasks=1: scenario='blurry' must have at least 2"):
        scenario_of(digits(), recipe("blurry", num_tasks=1))


def test_one_task_per_arrival() -> None:
    plain = with_labels([0, 1, 0, 2, 2], [0, 2], 3)
    arrivals = (
        Arrival("monday", np.array([0, 1, 2]), np.array([0])),
        Arrival("tuesday", np.array([3, 4]), np.array([1])),
    )
    data = DataSet(**{**vars(plain), "arrivals": arrivals})
    tasks = scenario_of(data, recipe("arrivals", num_tasks=17))
    assert [(task.name, task.classes) for task in tasks] == [("monday", (0, 1)), ("tuesday", (2,))]
    assert [task.train_indices.tolist() for task in tasks] == [[0, 1, 2], [3, 4]]
    assert [task.test_indices.tolist() for task in tasks] == [[0], [1]]
    with pytest.raises(ValueError, match="letters does not: take data='arrivals'"):
        scenario_of(plain, recipe("arrivals"))
