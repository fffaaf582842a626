"""Accuracy of rehearsal in Avalanche: its own ReplayPlugin beside Ritornello's plugin.

    python benchmarks/avalanche_replay.py --seeds 0 1 2

One process, tasks, network and settings of examples/train_avalanche.py: mini-batches of 8, and
8 of 200 past samples in each. Avalanche's own fills its memory at an experience's end, equally for
each experience; "class-balanced" is its ClassBalancedBuffer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive

from ritornello.integrations.avalanche import RehearsalPlugin

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import digits_model, digits_tasks

PLUGINS: dict[str, Callable[[int], SupervisedPlugin | None]] = {
    "none": lambda seed: None,
    "ReplayPlugin": lambda seed: ReplayPlugin(200, batch_size=8, batch_size_mem=8),
    "ReplayPlugin, class-balanced": lambda seed: ReplayPlugin(
        200, batch_size=8, batch_size_mem=8, storage_policy=ClassBalancedBuffer(200)
    ),
    "RehearsalPlugin": lambda seed: RehearsalPlugin(200, num_representatives=8, seed=seed),
}


def average_accuracy(plugin: SupervisedPlugin | None, seed: int) -> tuple[float, float]:
    """Trains on the five tasks; the average accuracy at the end, in percent, and the seconds."""
    torch.manual_seed(seed)
    tasks = digits_tasks()
    benchmark = tensors_benchmark(
        [train.tensors for train, _ in tasks],
        [test.tensors for _, test in tasks],
        task_labels=[0] * 5,
    )
    model = digits_model()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=8,
        train_epochs=10,
        plugins=[plugin] if plugin else [],
        evaluator=None,
    )
    began = time.perf_counter()
    strategy.train(benchmark.train_stream, drop_last=True)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        right = [
            (model(images).argmax(dim=1) == labels).double().mean().item()
            for images, labels in (test.tensors for _, test in tasks)
        ]
    return 100 * statistics.mean(right), seconds


def main() -> None:
    """Prints mean and standard deviation over the seeds for each plugin."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    for name, make in PLUGINS.items():
        found, seconds = [], []
        for seed in seeds:
            plugin = make(seed)
            accuracy, duration = average_accuracy(plugin, seed)
            if isinstance(plugin, RehearsalPlugin):
                plugin.close()
            found.append(accuracy)
            seconds.append(duration)
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(
            f"{name:30} {statistics.mean(found):5.1f} ± {spread:.1f} %"
            f" {statistics.mean(seconds):6.1f} s"
        )


if __name__ == "__main__":
    main()
