"""Where a part of a run is done: on which rank, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """A rank's place among all ranks, and its device."""

    rank: int
    """This rank."""
    num_ranks: int
    """How many there are."""
    device: torch.device


def device_named(name: str) -> torch.device:
    """This rank's device.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}: this machine has no CUDA device; use 'cpu'")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)
