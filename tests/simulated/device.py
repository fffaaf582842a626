"""Loads the simulated accelerator: ``torch.sim``, and what tests want to know of it."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from simulated.building import library

is_plugged_in = False
"""Whether PyTorch finds the device. Other tests of the process shall see a machine without one."""

TESTS = Path(__file__).parents[1]
NUM_FRAMES = 3
PATHS = ("/ritornello/", str(TESTS))
NOT_OF_INTEREST = ("/simulated/device.py", "/simulated/__init__.py", "/records/accelerators.py")

torch.utils.rename_privateuse1_backend("sim")
_library = ctypes.CDLL(str(library()))
_library.simulated_races.restype = ctypes.c_char_p
for _name in ("num_operations", "num_waiting", "num_reused"):
    getattr(_library, f"simulated_{_name}").restype = ctypes.c_uint64


def begin(schedule: str, seed: int = 0, late_pageable_copies: bool = False) -> None:
    """Ends all work and forgets races; what comes later runs at once, late, or at random."""
    number = ("eager", "lazy", "random").index(schedule)
    _library.simulated_begin(number, ctypes.c_uint64(seed), int(late_pageable_copies))


def races() -> list[str]:
    """Accesses that nothing orders, each with both places in the sources."""
    found = []
    for line in _library.simulated_races().decode().splitlines():
        what, one, first, place, other, second, other_place, count = line.split("|")
        found.append(
            f"{what}, {count} times: {first} on stream {one} [{_places[int(place)]}] and "
            f"{second} on stream {other} [{_places[int(other_place)]}]"
        )
    return found


def num_operations() -> int:
    """Put on streams since ``begin``."""
    return int(_library.simulated_num_operations())


def num_waiting() -> int:
    """On streams, and not yet run."""
    return int(_library.simulated_num_waiting())


def num_reused() -> int:
    """Pieces of memory that were given away again since ``begin``."""
    return int(_library.simulated_num_reused())


# Where something happens.

_places = ["?"]
_numbers: dict[tuple[tuple[str, int], ...], int] = {}


def _place() -> int:
    """The number of the place in the library or the tests that called PyTorch."""
    frame = sys._getframe().f_back  # none in a thread of PyTorch's own
    found: list[tuple[types.CodeType, int]] = []
    while frame is not None and len(found) < NUM_FRAMES:
        code = frame.f_code
        if code not in _is_of_interest:
            name = code.co_filename
            _is_of_interest[code] = any(path in name for path in PATHS) and not any(
                path in name for path in NOT_OF_INTEREST
            )
        if _is_of_interest[code]:
            found.append((code, frame.f_lineno))
        frame = frame.f_back
    key = tuple((code.co_filename, line) for code, line in found)
    if key not in _numbers:
        _places.append(
            " < ".join(f"{Path(c.co_filename).name}:{n} {c.co_name}" for c, n in found) or "?"
        )
        _numbers[key] = len(_places) - 1
    return _numbers[key]


_is_of_interest: dict[types.CodeType, bool] = {}
_callback = ctypes.CFUNCTYPE(ctypes.c_int)(_place)
_library.simulated_locate(_callback)


# The module, as other makers' devices have one.


class _Module(types.ModuleType):
    """``torch.sim``."""

    Stream = torch.Stream
    Event = torch.Event

    def is_available(self) -> bool:
        return is_plugged_in

    is_initialized = is_available

    def device_count(self) -> int:
        return 2 if is_plugged_in else 0

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def set_device(self, device: int | str | torch.device) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        if index is not None:
            torch.accelerator.set_device_index(index)

    def current_stream(self, device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(device)

    @contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[None]:
        """As ``torch.cuda.stream``: also makes its device the current one, till the end."""
        if stream is None:
            yield
            return
        device = self.current_device()
        before = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        self.set_device(stream.device)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
            self.set_device(device)

    def synchronize(self, device: Any = None) -> None:
        torch.accelerator.synchronize(device)

    def get_device_name(self, device: Any = None) -> str:
        return "simulated accelerator"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    # Random numbers are the CPU's.

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def _lazy_init(self) -> None:
        """PyTorch 2.6 does not wait for a device that has none."""

    def _is_in_bad_fork(self) -> bool:
        return False


torch._register_device_module("sim", _Module("torch.sim"))
torch.utils.generate_methods_for_privateuse1_backend()
begin("eager")
