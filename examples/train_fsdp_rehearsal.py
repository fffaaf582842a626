"""Training on tasks that arrive one after another, with rehearsal beside FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp_rehearsal.py

Read it beside train_fsdp.py: `diff examples/train_fsdp.py examples/train_fsdp_rehearsal.py`.
"""

import torch
import torch.distributed as dist
from digits import digits_model, digits_tasks, print_accuracies
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from ritornello import RehearsalBuffer


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    tasks, model = digits_tasks(), digits_model()
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = RehearsalBuffer(200, num_representatives=8, process_group=mesh)
    for train, _ in tasks:
        sampler = DistributedSampler(train, drop_last=True)
        loader = DataLoader(train, batch_size=8, sampler=sampler, drop_last=True)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                images, labels = buffer.update((images, labels))
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    buffer.close()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters = get_model_state_dict(model, options=whole)  # on rank 0
    if dist.get_rank() == 0:
        trained = digits_model()
        trained.load_state_dict(parameters)
        print_accuracies(trained, tasks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
