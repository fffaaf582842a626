"""Training on tasks that arrive one after another, with rehearsal, in Hugging Face Accelerate.

    torchrun --nproc-per-node 2 examples/train_accelerate_rehearsal.py

Rehearsal makes this difference:
`diff examples/train_accelerate.py examples/train_accelerate_rehearsal.py`.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import digits_model, digits_tasks, print_accuracies
from torch import nn
from torch.utils.data import DataLoader

from ritornello import RehearsalBuffer


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    tasks, model = digits_tasks(), digits_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimiser = accelerator.prepare(model, optimiser)
    buffer = RehearsalBuffer(200, num_representatives=8)
    for train, _ in tasks:
        loader = DataLoader(train, batch_size=8, shuffle=True, drop_last=True)
        loader = accelerator.prepare(loader)
        for _ in range(10):
            for images, labels in loader:
                images, labels = buffer.update((images, labels))
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                accelerator.backward(loss)
                optimiser.step()
    buffer.close()
    if accelerator.is_main_process:
        print_accuracies(accelerator.unwrap_model(model), tasks)
    accelerator.end_training()


if __name__ == "__main__":
    main()
