"""The data of the examples: scikit-learn's digits, as five tasks of two digits each."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def digits_tasks() -> list[tuple[TensorDataset, TensorDataset]]:
    """The training and test samples of each task."""
    digits = load_digits()
    tasks = []
    for classes in TASKS:
        chosen = np.flatnonzero(np.isin(digits.target, classes))
        images = torch.tensor(digits.data[chosen], dtype=torch.float32) / 16
        labels = torch.tensor(digits.target[chosen])
        is_test = torch.arange(len(chosen)) % 4 == 0
        train = TensorDataset(images[~is_test], labels[~is_test])
        tasks.append((train, TensorDataset(images[is_test], labels[is_test])))
    return tasks


def digits_model() -> nn.Module:
    """A network of one hidden layer for them."""
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


@torch.no_grad()
def print_accuracies(model: nn.Module, tasks: list[tuple[TensorDataset, TensorDataset]]) -> None:
    """Prints the share of test samples that the model classifies correctly, task by task."""
    accuracies = []
    for _, test in tasks:
        images, labels = test.tensors
        accuracies.append((model(images).argmax(dim=1) == labels).double().mean().item())
    print("accuracy per task:", " ".join(f"{100 * each:.1f} %" for each in accuracies))
    print(f"average: {100 * np.mean(accuracies):.1f} %")
