"""Does a round cost what it cost before? Two checkouts take turns.

    git worktree add ../before v1.0
    python benchmarks/two_versions.py ../before/src src

Each has processes of its own, one for each rank; a turn is some steps of ``update`` on a full
buffer, while the other one waits. Shown are microseconds per step of the slowest rank (medians over
the turns), and the second checkout's time as a multiple of the first one's, with the middle half of
the turns. "waiting" is with ``asynchronous=False``.

``--beside 1500`` trains a perceptron of that width in each step, whose time is shown, and does not
count: then it is what ``update`` keeps the trainer's thread, with caches that are full of other
things. ``--ranks 2`` shows what ranks that share memory cost each other.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WORKLOADS = {
    "MNIST-like uint8": ((28, 28), "uint8", 128, 32, 32),
    "CIFAR-like uint8": ((3, 32, 32), "uint8", 128, 16, 16),
    "CIFAR-like float32": ((3, 32, 32), "float32", 128, 16, 16),
    "ImageNet-like uint8": ((3, 224, 224), "uint8", 56, 14, 7),
    "ImageNet-like float32": ((3, 224, 224), "float32", 56, 14, 7),
}
"""Shape and dtype of an image, ``b``, ``c`` and ``r``."""


def serve() -> None:
    """In a checkout's process: one turn of a workload for each line that comes, named by it."""
    import torch
    import torch.distributed as dist

    from ritornello import RehearsalBuffer

    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    buffers: dict[tuple[str, str], Any] = {}
    models: dict[int, Callable[[], float]] = {}
    for line in sys.stdin:
        name, asynchronous, num_steps, width = line.rstrip().split("|")
        shape, dtype, num_new, num_candidates, num_past = WORKLOADS[name]
        key = name, asynchronous
        if key not in buffers:
            images = torch.zeros(num_new, *shape, dtype=getattr(torch, dtype))
            images[:] = int(os.environ["RANK"])  # else the ranks would seem to train on the same
            batch = images, torch.arange(num_new) % 10
            buffer = RehearsalBuffer(
                1_000,
                num_representatives=num_past,
                num_candidates=num_candidates,
                asynchronous=asynchronous == "thread",
            )
            for _ in range(300):
                buffer.update(batch)
            buffers[key] = buffer, batch
        buffer, batch = buffers[key]
        if int(width) not in models:
            models[int(width)] = perceptron(int(width))
        train = models[int(width)]
        if dist.is_initialized():
            dist.barrier()
        seconds_training = 0.0
        began = time.perf_counter()
        for _ in range(int(num_steps)):
            joined = buffer.update(batch)
            seconds_training += train()
            del joined
        seconds = time.perf_counter() - began - seconds_training
        print(seconds / int(num_steps), seconds_training / int(num_steps), flush=True)


def perceptron(width: int) -> Callable[[], float]:
    """A training step of that width, which says how long it took; of width 0 nothing."""
    import torch
    from torch import nn

    if width == 0:
        return lambda: 0.0
    model = nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-9)
    samples = torch.randn(64, 256)

    def train() -> float:
        began = time.perf_counter()
        optimiser.zero_grad()
        model(samples).square().mean().backward()
        optimiser.step()
        return time.perf_counter() - began

    return train


class Checkout:
    """The processes of one checkout, a rank each."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                env={
                    **os.environ,
                    **together,
                    "PYTHONPATH": str(folder.absolute()),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]

    def turn(self, request: str) -> list[float]:
        """Seconds of ``update`` and of training per step of one turn, on the slowest rank."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{request}\n")
            rank.stdin.flush()
        lines = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        return max([float(each) for each in line.split()] for line in lines)

    def stop(self) -> None:
        """Ends all ranks."""
        for rank in self.ranks:
            rank.terminate()
            rank.wait()


def free_port() -> int:
    """A port of this host that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a folder that holds the package")
    parser.add_argument("after", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--how", nargs="+", choices=("waiting", "thread"), default=["waiting", "thread"]
    )
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200, help="of one turn")
    parser.add_argument("--beside", type=int, default=0, help="width of a model that is trained")
    arguments = parser.parse_args()
    checkouts: list[Checkout] = []
    try:
        for folder in (arguments.before, arguments.after):
            checkouts.append(Checkout(folder, arguments.ranks))
        for name in arguments.workloads:
            for how in arguments.how:
                request = f"{name}|{how}|{arguments.steps}|{arguments.beside}"
                turns = [
                    [checkout.turn(request) for checkout in checkouts]
                    for _ in range(arguments.turns + 1)
                ][1:]
                seconds, training = np.moveaxis(np.array(turns), 2, 0)
                low, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.75))
                before, after = 1e6 * np.median(seconds, axis=0)
                print(
                    f"{name:<22} {how:<8} {before:8.1f} {after:8.1f}   {after / before:.3f} "
                    f"({low:.3f} to {high:.3f})"
                    + f"   beside {1e3 * np.median(training):.1f} ms"
                    * bool(arguments.beside),
                    flush=True,
                )
    finally:
        for checkout in checkouts:
            checkout.stop()


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
