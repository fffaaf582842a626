"""Training on tasks that arrive one after another, in Lightning Fabric.

    python examples/train_fabric.py

Fabric starts the second process itself, or joins those of torchrun and srun.
Rehearsal makes this difference:
`diff examples/train_fabric.py examples/train_fabric_rehearsal.py`.
"""

import torch
from digits import digits_model, digits_tasks, print_accuracies
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(0)
    tasks, model = digits_tasks(), digits_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimiser = fabric.setup(model, optimiser)
    for train, _ in tasks:
        loader = DataLoader(train, batch_size=8, shuffle=True, drop_last=True)
        loader = fabric.setup_dataloaders(loader)
        for _ in range(10):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                fabric.backward(loss)
                optimiser.step()
    if fabric.is_global_zero:
        print_accuracies(model.module, tasks)


if __name__ == "__main__":
    main()
