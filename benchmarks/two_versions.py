"""Does a round cost what it cost before? Two checkouts take turns.

    git worktree add ../before v1.0
    python benchmarks/two_versions.py ../before/src src

Each has a process of its own; a turn is some hundred steps of ``update`` on a full buffer, all
samples candidates, while the other one waits. Shown are microseconds per step (medians over the
turns), and the second checkout's time as a multiple of the first one's, with the middle half of
the turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORKLOADS = {
    "MNIST-like uint8": ((28, 28), "uint8", 128, 32),
    "CIFAR-like float32": ((3, 32, 32), "float32", 128, 16),
    "ImageNet-like uint8": ((3, 224, 224), "uint8", 56, 7),
}
"""Shape and dtype of an image, ``b`` and ``r``."""


def serve() -> None:
    """In a checkout's process: one turn of a workload for each line that comes, named by it."""
    import torch

    from ritornello import RehearsalBuffer

    buffers = {}
    for line in sys.stdin:
        name, asynchronous, num_steps = line.rstrip().split("|")
        shape, dtype, num_new, num_past = WORKLOADS[name]
        key = name, asynchronous
        if key not in buffers:
            images = torch.zeros(num_new, *shape, dtype=getattr(torch, dtype))
            batch = images, torch.arange(num_new) % 10
            buffer = RehearsalBuffer(
                1_000, num_representatives=num_past, asynchronous=asynchronous == "thread"
            )
            for _ in range(100):
                buffer.update(batch)
            buffers[key] = buffer, batch
        buffer, batch = buffers[key]
        began = time.perf_counter()
        for _ in range(int(num_steps)):
            buffer.update(batch)
        print((time.perf_counter() - began) / int(num_steps), flush=True)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a folder that holds the package")
    parser.add_argument("after", type=Path)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200, help="of one turn")
    arguments = parser.parse_args()
    servers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": str(folder.absolute())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in (arguments.before, arguments.after)
    ]
    try:
        for name in WORKLOADS:
            for how in ("waiting", "thread"):
                seconds = np.array(
                    [
                        [turn(server, f"{name}|{how}|{arguments.steps}") for server in servers]
                        for _ in range(arguments.turns + 1)
                    ][1:]
                )
                low, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.75))
                before, after = 1e6 * np.median(seconds, axis=0)
                print(
                    f"{name:<20} {how:<8} {before:8.1f} {after:8.1f}   {after / before:.3f} "
                    f"({low:.3f} to {high:.3f})"
                )
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def turn(server: subprocess.Popen[str], request: str) -> float:
    """Seconds per step of one turn."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{request}\n")
    server.stdin.flush()
    return float(server.stdout.readline())


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
