"""Training on tasks that arrive one after another, in Ray Train.

    python examples/train_ray.py

Rehearsal makes this difference: `diff examples/train_ray.py examples/train_ray_rehearsal.py`.
"""

import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from digits import digits_model, digits_tasks, print_accuracies
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler


def train_tasks(config: dict[str, Any]) -> None:
    """What each worker does: trains on the tasks that the last checkpoint has not seen."""
    torch.manual_seed(0)
    rank = ray.train.get_context().get_world_rank()
    model = digits_model()
    parallel = prepare_model(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    num_done = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "model.pt"))
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        num_done = state["num_done"]
    for train, _ in digits_tasks()[num_done:]:
        sampler = DistributedSampler(train, drop_last=True)
        loader = DataLoader(train, batch_size=8, sampler=sampler, drop_last=True)
        loader = prepare_data_loader(loader)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                loss = nn.functional.cross_entropy(parallel(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        num_done += 1
        with tempfile.TemporaryDirectory() as folder:  # of this worker; Ray puts all together
            states = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            if rank == 0:
                torch.save({**states, "num_done": num_done}, Path(folder, "model.pt"))
            ray.train.report({"num_done": num_done}, Checkpoint.from_directory(folder))


def main() -> None:
    """Trains on five tasks of two digits each; prints the accuracy on each at the end."""
    trainer = TorchTrainer(
        train_tasks,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    with trainer.fit().checkpoint.as_directory() as folder:
        state = torch.load(Path(folder, "model.pt"))
    model = digits_model()
    model.load_state_dict(state["model"])
    print_accuracies(model, digits_tasks())


if __name__ == "__main__":
    main()
