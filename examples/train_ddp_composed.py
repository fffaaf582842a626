"""Data-parallel training whose steps are composed of new and past samples.

    torchrun --nproc-per-node 2 examples/train_ddp_composed.py

As many steps as in train_ddp.py, with as many samples each: in the last task most of them are past.
Read it beside train_ddp_rehearsal.py, which adds past samples to as many new ones in each task:
`diff examples/train_ddp_rehearsal.py examples/train_ddp_composed.py`.
"""

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ritornello import ComposedSteps, RehearsalBuffer


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    tasks = [digits_task(classes) for classes in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))]
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = RehearsalBuffer(
        200, num_representatives=0, most_representatives=8, sampling="earlier-tasks"
    )
    num_before = 0
    for number, (train, _) in enumerate(tasks):
        buffer.begin_task(f"task {number}")
        steps = ComposedSteps(
            len(train), num_before, samples_per_step=8, num_epochs=10, first_share=0.6
        )
        loader = DataLoader(train, batch_sampler=steps)
        for epoch in range(10):
            buffer.num_candidates = None if epoch == 9 else 0  # until then the past stays whole
            for step, (images, labels) in enumerate(loader):
                buffer.num_representatives = steps.num_past(step + 1)
                images, labels = buffer.update((images, labels))
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        num_before += len(train)
    buffer.close()
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
