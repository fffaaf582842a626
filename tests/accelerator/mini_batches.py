"""A stream of mini-batches, and what a buffer makes of it: for comparing devices bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ritornello
import simulated
from ritornello import RehearsalBuffer

Batch = tuple[Tensor, Tensor]

ARGUMENTS: dict[str, Any] = {"num_representatives": 7, "num_candidates": 5}


def batches(device: str, num_steps: int = 40, first_size: int = 16, growth: int = 0) -> list[Batch]:
    """Images and labels; each mini-batch is larger than the one before by ``growth``."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8).to(device),
            torch.randint(10, (size,), generator=generator).to(device),
        )
        for size in (first_size + step * growth for step in range(num_steps))
    ]


def pinned(stream: list[Batch]) -> list[Batch]:
    """The same in pinned memory."""
    return [(images.pin_memory(), labels.pin_memory()) for images, labels in stream]


def augmented(device: str, num_steps: int = 40, **arguments: Any) -> list[Tensor]:
    """The augmented mini-batches of the plain loop, field by field, in CPU memory."""
    out = []
    with RehearsalBuffer(60, **(ARGUMENTS | arguments)) as buffer:
        for images, labels in batches(device, num_steps):
            joined = buffer.update((images, labels))
            assert all(leaf.device.type == torch.device(device).type for leaf in joined)
            # Clones: while the buffer is empty, it gives the mini-batch itself.
            out += [leaf.clone() for leaf in joined]
            images.zero_()  # must not reach the buffer
            simulated.lag(device)  # the trainer's stream lags behind its thread
    return [leaf.cpu() for leaf in out]


def rehearsed(
    loader: Any, device: str | None, buffer: RehearsalBuffer, num_steps: int | None = None
) -> list[Tensor]:
    """The same by ``rehearse``, on the device; with ``num_steps``, the loop is left then."""
    out = []
    for step, joined in enumerate(ritornello.rehearse(loader, buffer, device)):
        out += [leaf.clone() for leaf in joined]
        joined[0].zero_()  # its memory is the trainer's
        simulated.lag(joined[0].device.type)
        if step + 1 == num_steps:
            break
    return out


def stored(buffer: RehearsalBuffer) -> list[Tensor]:
    """Copies of all that the buffer's state holds, in CPU memory."""
    ((_, tensors),) = buffer.state_dict().values()
    return [tensors[name].clone() for name in sorted(tensors)]


def new_stream(device: str) -> Any:
    """A context in which this thread works on a stream of its own; nothing on the CPU."""
    return torch.get_device_module(device).stream(torch.get_device_module(device).Stream(device))


def same(expected: list[Tensor], got: list[Tensor]) -> bool:
    """Whether both hold the same, bit for bit."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, got, strict=True))
