"""Training on tasks that arrive one after another, with rehearsal, in DeepSpeed.

    torchrun --nproc-per-node 2 examples/train_deepspeed_rehearsal.py

Rehearsal makes this difference:
`diff examples/train_deepspeed.py examples/train_deepspeed_rehearsal.py`.
"""

import deepspeed
import torch
from digits import digits_model, digits_tasks, print_accuracies
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from ritornello import RehearsalBuffer

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # SGD, as in the other examples
}


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    deepspeed.init_distributed()
    torch.manual_seed(0)
    tasks, model = digits_tasks(), digits_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=CONFIG)
    buffer = RehearsalBuffer(200, num_representatives=8)
    for train, _ in tasks:
        sampler = DistributedSampler(train, drop_last=True)
        loader = DataLoader(train, batch_size=8, sampler=sampler, drop_last=True)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                images, labels = buffer.update((images, labels))
                loss = nn.functional.cross_entropy(engine(images), labels)
                engine.backward(loss)
                engine.step()
    buffer.close()
    if torch.distributed.get_rank() == 0:
        print_accuracies(engine.module, tasks)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
