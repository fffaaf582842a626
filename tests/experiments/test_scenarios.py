from __future__ import annotations

import numpy as np
import pytest

from ritornello.experiments.data import load
from ritornello.experiments.scenarios import class_incremental


def test_tasks_split_the_classes_and_all_samples() -> None:
    digits = load("digits")
    tasks = class_incremental(digits, 5)
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert tasks[1].name == "2, 3"
    for task in tasks:
        assert set(digits.train.labels[task.train_indices]) == set(task.classes)
        assert set(digits.test.labels[task.test_indices]) == set(task.classes)
    everything = np.concatenate([task.train_indices for task in tasks])
    assert sorted(everything) == list(range(len(digits.train)))


def test_an_order_of_the_classes_and_a_remainder() -> None:
    tasks = class_incremental(load("digits"), 3, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert [task.classes for task in tasks] == [(9, 8, 7, 6), (5, 4, 3), (2, 1, 0)]
    assert tasks[0].name == "9 to 6 (4 classes)"


def test_what_cannot_be_split() -> None:
    digits = load("digits")
    with pytest.raises(ValueError, match=r"num_tasks=11: .*classes of digits \(10\)"):
        class_incremental(digits, 11)
    with pytest.raises(ValueError, match="must hold each class from 0 to 9 once"):
        class_incremental(digits, 2, class_order=[0, 0, 1])
