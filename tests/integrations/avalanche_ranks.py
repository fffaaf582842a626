"""What the tests of Avalanche run under torchrun, on two ranks, in one go.

python -m torch.distributed.run --nproc-per-node 2 avalanche_ranks.py FOLDER

Importing Avalanche takes seconds, so the example runs here, too. ``FOLDER`` gets a checkpoint and
the buffer, for the test to go on with on one rank.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import dill
import torch
import torch.distributed as dist
from avalanche.benchmarks import tensors_benchmark
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.supervised import Naive
from torch import nn

from ritornello import CheckpointError
from ritornello.integrations.avalanche import RehearsalPlugin

EXAMPLES = Path(__file__).parents[2] / "examples"


def strategy_with(plugin: RehearsalPlugin) -> Naive:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    return Naive(
        model=model, optimizer=optimiser, train_mb_size=4, plugins=[plugin], evaluator=None
    )


def main(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    destroy_process_group = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # the example's is used on
    runpy.run_path(str(EXAMPLES / "train_avalanche_rehearsal.py"), run_name="__main__")

    # Else dill writes torch's optimisers by value, and fails.
    dill.settings["byref"] = True
    samples = torch.arange(64.0).repeat(4, 1).T.contiguous(), torch.arange(64) % 3
    benchmark = tensors_benchmark([samples] * 2, [samples] * 2, task_labels=[0, 0])
    strategy = strategy_with(RehearsalPlugin(20, num_representatives=2))
    strategy.train(benchmark.train_stream[0])
    try:
        save_checkpoint(strategy, folder / "never.pkl")
    except CheckpointError as error:
        print(f"refused: {error}")
    RehearsalPlugin.of(strategy).save(folder / "buffer")
    if dist.get_rank() == 0:
        save_checkpoint(strategy, folder / "strategy.pkl")
    dist.barrier()
    other = strategy_with(RehearsalPlugin(20, num_representatives=2))
    other, num_trained = maybe_load_checkpoint(other, folder / "strategy.pkl")
    plugin = RehearsalPlugin.of(other)
    print(f"restored: {num_trained} {len(plugin.buffer)}")
    other.train(benchmark.train_stream[1])
    plugin.close()
    RehearsalPlugin.of(strategy).close()
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
