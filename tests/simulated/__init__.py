"""The accelerator that tests run on: a real one if there is one, else a simulated one.

The simulated accelerator is PyTorch's device ``sim``, of which there are two: tensors in ordinary
memory, streams whose work runs late, an allocator that poisons what it gives away again, pinned
memory, and a detector of accesses to one place that nothing orders. It is built with the machine's
C++ compiler, once for each version of PyTorch::

    with simulated.accelerator("lazy") as name:    # in a test: the fixture `accelerator`
        ...  # tensors on torch.device(name)

It says nothing about speed, and has no graphs, no compiled kernels and no limit of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simulated.building import BuildError

REAL = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

SCHEDULES = ("eager", "lazy", "random-1", "random-2", "random-3")
"""When the work of the simulated streams runs: at once, when somebody waits for it, at random."""


def missing() -> str | None:
    """Why there is no accelerator, real or simulated; None: there is one.

    The simulated one must be there before the first backward pass of a process.
    """
    if REAL is None:
        try:
            from simulated import device  # noqa: F401  (builds and loads it)
        except BuildError as error:
            return f"needs an accelerator, or what builds the simulated one: {error}"
    return None


@contextmanager
def accelerator(schedule: str, late_pageable_copies: bool = False) -> Iterator[str]:
    """Around a test: PyTorch has an accelerator, whose name this gives.

    Args:
        schedule: of ``SCHEDULES``; no matter on a real device.
        late_pageable_copies: whether copies of ordinary memory that nobody waits for read it late,
            as on MPS.

    Raises:
        AssertionError: two streams, or a stream and the host, used one place in no order.
    """
    if REAL is not None:
        yield REAL.type
        return
    from simulated import device

    kind, _, seed = schedule.partition("-")
    device.begin(kind, int(seed or 0), late_pageable_copies)
    device.is_plugged_in = True
    try:
        yield "sim"
        races = device.races()
        assert not races, "nothing orders these:\n" + "\n".join(races)
    finally:
        device.begin("eager")
        device.is_plugged_in = False
        torch.accelerator.set_device_index(0)


def lag(name: str, num_cycles: int = 1_000_000) -> None:
    """Has a real device's current stream lag behind; the simulated one lags by itself."""
    if name == "cuda":
        torch.cuda._sleep(num_cycles)
