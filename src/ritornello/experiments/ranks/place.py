"""Where a part of a run is done: on which rank, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ritornello.records import accelerators


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
    cpu = torch.device("cpu")
    if name == "auto":
        return accelerators.current_device() if accelerators.is_available() else cpu
    if name == "cpu":
        return cpu
    return accelerators.with_index(accelerator_named(name))


def accelerator_named(name: str) -> torch.device:
    """The accelerator that a setting names, by its kind: which one, the launcher has said.

    Raises:
        ValueError: there is none.
    """
    try:
        device = accelerators.named(name.partition(":")[0])
    except ValueError as error:
        raise ValueError(f"device={name!r}: {error}; use 'cpu'") from None
    if device is None:
        raise ValueError(f"device={name!r}: there are auto, cpu, and accelerators such as cuda")
    return device
