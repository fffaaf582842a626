"""Data-parallel training with Avalanche on tasks that arrive one after another.

    torchrun --nproc-per-node 2 examples/train_avalanche.py

Read it beside train_avalanche_rehearsal.py:
`diff examples/train_avalanche.py examples/train_avalanche_rehearsal.py`.
"""

import torch
import torch.distributed as dist
from avalanche.benchmarks import tensors_benchmark
from avalanche.distributed import DistributedHelper
from avalanche.training.supervised import Naive
from digits import digits_model, digits_tasks, print_accuracies
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    DistributedHelper.init_distributed(random_seed=0, use_cuda=False)
    tasks = digits_tasks()
    benchmark = tensors_benchmark(
        train_tensors=[train.tensors for train, _ in tasks],
        test_tensors=[test.tensors for _, test in tasks],
        task_labels=[0] * len(tasks),  # with them, Avalanche shards the data over the ranks
    )
    model = DistributedDataParallel(digits_model())
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=8,
        train_epochs=10,
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, drop_last=True)
    if dist.get_rank() == 0:
        print_accuracies(model.module, tasks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
