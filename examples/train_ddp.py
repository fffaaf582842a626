"""Data-parallel training on tasks that arrive one after another, in plain PyTorch.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Read it beside train_ddp_rehearsal.py: `diff examples/train_ddp.py examples/train_ddp_rehearsal.py`.
"""

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    tasks = [digits_task(classes) for classes in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))]
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for train, _ in tasks:
        sampler = DistributedSampler(train, drop_last=True)
        loader = DataLoader(train, batch_size=8, sampler=sampler, drop_last=True)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    if dist.get_rank() == 0:
        accuracies = [accuracy(model.module, test) for _, test in tasks]
        print("accuracy per task:", " ".join(f"{100 * each:.1f} %" for each in accuracies))
        print(f"average: {100 * np.mean(accuracies):.1f} %")
    dist.destroy_process_group()


def digits_task(classes: tuple[int, ...]) -> tuple[TensorDataset, TensorDataset]:
    """The training and test samples of some classes of scikit-learn's digits."""
    digits = load_digits()
    chosen = np.flatnonzero(np.isin(digits.target, classes))
    images = torch.tensor(digits.data[chosen], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[chosen])
    is_test = torch.arange(len(chosen)) % 4 == 0
    return (
        TensorDataset(images[~is_test], labels[~is_test]),
        TensorDataset(images[is_test], labels[is_test]),
    )


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of test samples that the model classifies correctly."""
    images, labels = test.tensors
    return (model(images).argmax(dim=1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
