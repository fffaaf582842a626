"""What test_hosts.py starts on every rank: ``torchrun ... host_ranks.py FOLDER --num-steps N``.

Trains a tiny model with DDP and rehearsal, and leaves in FOLDER what the rank has seen.
"""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritornello import RehearsalBuffer
from ritornello.records.storage import Storage
from ritornello.transports import Transport, open_transport


def mini_batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Depends on rank and step only; classes appear over time."""
    dice = np.random.default_rng([rank, step])
    labels = dice.integers(min(10, 2 + step // 5), size=8)
    images = dice.normal(size=(8, 16)) + labels[:, None]
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


def make_buffer(transport: Transport, sampling: str = "uniform") -> RehearsalBuffer:
    return RehearsalBuffer(
        100, num_representatives=5, num_candidates=6, transport=transport, sampling=sampling
    )


def train(buffer: RehearsalBuffer, options: argparse.Namespace, seen: dict[str, Any]) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(16, 10)
    first = 0
    if options.resume:
        buffer.load(options.folder / "buffer")
        first = buffer.stats().num_rounds
        model.load_state_dict(torch.load(options.folder / f"model-{first}.pt"))
    forward = model if options.without_ddp else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen |= {"first": first, "batches": []}
    for step in range(first, options.num_steps):
        if rank == 0:
            (options.folder / "step").write_text(str(step))
        images, labels = buffer.update(mini_batch(rank, step))
        seen["batches"].append((images, labels))
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        time.sleep(options.pause_seconds)
        if options.save_every and (step + 1) % options.save_every == 0:
            if rank == 0:
                torch.save(model.state_dict(), options.folder / f"model-{step + 1}.pt")
            buffer.save(options.folder / "buffer")
    seen |= {"bytes_received": buffer.stats().bytes_received, "weight": model.weight.detach()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--sampling", default="uniform")
    parser.add_argument("--timeout-seconds", type=float, default=60.0)
    parser.add_argument("--pause-seconds", type=float, default=0.0)
    parser.add_argument("--without-ddp", action="store_true")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout_seconds))
    transport = open_transport("auto", None, options.timeout_seconds, Storage.of("auto"))
    seen: dict[str, Any] = {"num_hosts": getattr(transport, "num_hosts", transport.num_ranks)}
    try:
        with make_buffer(transport, options.sampling) as buffer:
            train(buffer, options, seen)
    except RuntimeError as error:
        seen |= {"failed_at": time.monotonic(), "error": f"{type(error).__name__}: {error}"}
        seen["peers"] = getattr(error, "peers", None)
        raise
    finally:
        torch.save(seen, options.folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
