"""What the test of Ray Train runs: Ray is the process's own.

python ray_ranks.py FOLDER

``FOLDER`` is the home folder of the example's run, and gets the other runs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import train_ray_rehearsal as example
from digits import digits_tasks
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ritornello import RehearsalBuffer

KILLED_IN = 400
"""This step is in the midst of the third task."""


class KilledBuffer(RehearsalBuffer):
    """One whose worker dies without a word."""

    num_updates = 0

    def update(self, batch: Any) -> Any:
        self.num_updates += 1
        if self.num_updates == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update(batch)


class WholeBuffer(RehearsalBuffer):
    """One that is full as soon as it is loaded."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        assert self.stats().held_per_class == dict.fromkeys(range(10), 20)


def is_killed_once(config: dict[str, Any]) -> None:
    rank, is_first = ray.train.get_context().get_world_rank(), not ray.train.get_checkpoint()
    Path(config["folder"], f"{rank}-{'begins' if is_first else 'goes-on'}").touch()
    if is_first and rank == 1:
        example.RehearsalBuffer = KilledBuffer
    example.train_tasks(config)


def trains_on_one_task_more(config: dict[str, Any]) -> None:
    tasks = digits_tasks()
    example.digits_tasks = lambda: [*tasks, tasks[0]]
    example.RehearsalBuffer = WholeBuffer
    example.train_tasks(config)


def run(folder: Path, work: Any, num_workers: int) -> dict[str, Any]:
    """Of one name, so that each goes on where the one before ended; the last checkpoint's state."""
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(
            name="run", storage_path=str(folder), failure_config=FailureConfig(max_failures=1)
        ),
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint
    with checkpoint.as_directory() as place:
        return torch.load(Path(place, "model.pt"))


def main(folder: Path) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
    example.main()
    [*_, last] = sorted(folder.glob("ray_results/*/checkpoint_*/model.pt"))
    expected = torch.load(last)

    found = run(folder, is_killed_once, num_workers=2)
    names = {path.name for path in folder.glob("?-*")}
    assert names == {"0-begins", "1-begins", "0-goes-on", "1-goes-on"}
    assert found["num_done"] == expected["num_done"] == 5
    assert found["model"].keys() == expected["model"].keys()
    for name, weights in expected["model"].items():
        assert torch.equal(found["model"][name], weights)

    found = run(folder, trains_on_one_task_more, num_workers=1)
    assert found["num_done"] == 6
    print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
