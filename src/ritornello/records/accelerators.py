"""Accelerators: the one module that knows about devices other than the CPU.

CUDA and ROCm, Intel's XPU, Ascend's NPU and others are alike to PyTorch: each has a module, such as
``torch.cuda``, with streams, events and pinned memory. Apple's MPS has one stream, so that nothing
needs to be ordered there, and copies block: those of ordinary memory are not safe otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

WITHOUT_STREAMS = {"cpu", "mps"}
"""Kinds of device whose work is done in the order in which it is asked for."""


def is_available() -> bool:
    """Whether this machine has an accelerator that can be used."""
    # PyTorch 2.6 looks at what was compiled in, and has no answer where that is nothing.
    if not torch.accelerator.is_available():
        return False
    return bool(_module(_kind()).is_available())


def is_in_use() -> bool:
    """Whether this process has used one. To ask for its stream is to use it, and takes memory."""
    return is_available() and bool(_module(_kind()).is_initialized())


def current_device() -> torch.device:
    """The accelerator that this thread uses where no other is named; there must be one."""
    return with_index(torch.device(_kind().type))


def use(device: torch.device) -> None:
    """Makes an accelerator the one that this thread uses where no other is named."""
    if has_streams(device):  # of others there is one
        _module(device).set_device(device)


def named(name: str) -> torch.device | None:
    """The accelerator of that name, such as ``"cuda"`` or ``"xpu:1"``. Does not use it.

    Returns:
        None if no kind of accelerator has that name.

    Raises:
        ValueError: this machine has none of that kind.
    """
    try:
        device = torch.device(name)
        module = _module(device)
    except RuntimeError:
        return None
    if device.type == "cpu" or not hasattr(module, "is_available"):
        return None
    if not module.is_available():
        raise ValueError(f"this machine has no {device.type.upper()} device")
    return device


def with_index(device: torch.device) -> torch.device:
    """The device itself; one without an index is the current one of its kind."""
    if device.type == "cpu" or str(device) != device.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def has_streams(device: torch.device) -> bool:
    """Whether work on the device runs beside the host, on streams that must be ordered."""
    return device.type not in WITHOUT_STREAMS


def new_stream(device: torch.device) -> torch.Stream:
    """A stream of one's own."""
    stream: torch.Stream = _module(device).Stream(device)
    return stream


def current_stream(device: torch.device) -> torch.Stream:
    """The one to which this thread's work on the device goes."""
    stream: torch.Stream = _module(device).current_stream(device)
    return stream


def on_streams(streams: Collection[torch.Stream]) -> AbstractContextManager[object]:
    """A context in which this thread's work goes to the streams, each of another device.

    Not ``with stream:``, which is new in PyTorch 2.7 and keeps on the stream object what is to be
    restored: two threads in one stream would restore each other's.
    """
    return _on_streams(streams) if streams else nullcontext()


@contextmanager
def _on_streams(streams: Iterable[torch.Stream]) -> Iterator[None]:
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(_module(stream.device).stream(stream))
        yield


def mark(device: torch.device) -> torch.Event | None:
    """An event behind what this thread has asked the device for; None where nothing runs late."""
    return current_stream(device).record_event() if has_streams(device) else None


def keep_for_this_thread(leaf: object) -> None:
    """Has a tensor's memory not given away before what this thread asks its device for is done."""
    if isinstance(leaf, Tensor) and has_streams(leaf.device):
        leaf.record_stream(current_stream(leaf.device))


def copied_to(device: torch.device, values: Tensor) -> Tensor:
    """A copy of a small temporary tensor in CPU memory; nobody waits for the device.

    From pinned memory, which is not given away before it was read: of ordinary memory not every
    device says when it has read it.
    """
    if not has_streams(device):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device."""
    if device.type != "cpu":
        _module(device).synchronize(*_where(device))


def name_of(device: torch.device) -> str:
    """What the device is called, for a report."""
    if device.type == "cpu":
        return "CPU"
    names = getattr(_module(device), "get_device_name", None)
    return str(device) if names is None else str(names(device))


def random_state(device: torch.device) -> Tensor:
    """The state of the device's global random numbers."""
    state: Tensor = _module(device).get_rng_state(*_where(device))
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Sets it to what ``random_state`` gave."""
    _module(device).set_rng_state(state, *_where(device))


def forked_random_state(device: torch.device) -> AbstractContextManager[Any]:
    """A context after which the global random numbers of the CPU and the device are as before."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """A context in which the device's global random numbers are those of a seed; then as before."""
    with forked_random_state(device):
        if device.type == "cpu":  # torch.manual_seed would also seed all accelerators
            torch.default_generator.manual_seed(seed)
        else:
            _module(device).manual_seed(seed)
        yield


def use_number(number: int) -> torch.device:
    """Makes one accelerator this thread's: of a rank's number, they take turns."""
    module = _module(_kind())
    module.set_device(number % module.device_count())
    return current_device()


def _where(device: torch.device) -> tuple[torch.device, ...]:
    """The argument of functions that ask which device, if there can be several."""
    return () if device.type == "mps" else (device,)


def _kind() -> torch.device:
    kind: torch.device = torch.accelerator.current_accelerator()  # type: ignore[assignment]
    return kind


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
