from __future__ import annotations

import numpy as np
import pytest
import torch

from ritornello.experiments.results import metrics

MATRIX = np.array([[0.9, 0.2, 0.0], [0.5, 0.8, 0.1], [0.6, 0.3, 0.7]])


def test_by_hand() -> None:
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.6 + 0.3 + 0.7) / 3)
    assert metrics.average_after_each_task(MATRIX) == pytest.approx([0.9, 0.65, 1.6 / 3])
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.3)) / 2)
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.3 - 0.8)) / 2)
    at_start = np.array([0.5, 0.15, 0.05])
    assert metrics.forward_transfer(MATRIX, at_start) == pytest.approx((0.05 + 0.05) / 2)


def test_forgetting_counts_from_the_best_accuracy() -> None:
    matrix = np.array([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.4, 0.5, 0.5]])
    assert metrics.forgetting(matrix) == pytest.approx((0.5 + 0.0) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx((-0.1 + 0.0) / 2)


def test_forgetting_in_loss_counts_from_the_lowest_loss() -> None:
    loss = np.array([[0.5, 3.0, 4.0], [0.4, 0.2, 5.0], [0.9, 0.1, 0.3]])
    assert metrics.forgetting(-loss) == pytest.approx(((0.9 - 0.4) + (0.1 - 0.2)) / 2)


def test_a_single_task() -> None:
    single = np.array([[0.7]])
    assert metrics.average_accuracy(single) == 0.7
    assert metrics.forgetting(single) == metrics.backward_transfer(single) == 0.0
    assert metrics.forward_transfer(single, np.array([0.1])) == 0.0


def test_top_k() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    labels = torch.tensor([1, 2, 2])
    assert metrics.top_k_correct(logits, labels, (1, 2)).tolist() == [1, 2]
    assert metrics.top_k_correct(logits, labels, (1, 5)).tolist() == [1, 3]


def test_what_was_not_measured_is_left_out() -> None:
    matrix = metrics.matrix_of(
        [
            [0.9, None, None, None],
            [0.8, 0.7, 0.1, None],
            [None, 0.5, 0.9, 0.2],
            [None, 0.6, 0.7, 0.8],
        ]
    )
    assert metrics.average_accuracy(matrix) == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert metrics.average_after_each_task(matrix) == pytest.approx([0.9, 0.75, 0.7, 0.7])
    assert metrics.forgetting(matrix) == pytest.approx(((0.7 - 0.6) + (0.9 - 0.7)) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(((0.6 - 0.7) + (0.7 - 0.9)) / 2)
    at_start = np.array([0.1, 0.1, 0.05, np.nan])
    assert metrics.forward_transfer(matrix, at_start) == pytest.approx(0.1 - 0.05)


def test_nothing_to_compare_with() -> None:
    matrix = metrics.matrix_of([[0.9, None], [None, 0.8]])
    assert metrics.forgetting(matrix) == metrics.backward_transfer(matrix) == 0.0
    assert metrics.forward_transfer(matrix, np.array([0.1, np.nan])) == 0.0
