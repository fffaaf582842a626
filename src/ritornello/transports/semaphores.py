"""POSIX semaphores in memory that several processes share (sem_overview(7)).

A waiter yields for a moment, then blocks in the kernel. And POSIX promises that they order
memory: what was written before a post is seen after the wait that it ends, on every processor.
"""

from __future__ import annotations

import ctypes
import os
import time
from ctypes import CDLL, c_int, c_long, c_uint, c_void_p

from torch import Tensor

SEMAPHORE_BYTES = 64
"""Room for one: a cache line of its own. glibc's take 32 bytes."""

YIELD_SECONDS = 40e-6
"""How long a waiter lets others run before it sleeps: a sleeper takes about as long to wake."""


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", c_long), ("nanoseconds", c_long))


class Semaphores:
    """An array of semaphores, all zero at first.

    Args:
        memory: uint8 ``[num * SEMAPHORE_BYTES]`` in shared memory, kept alive by this object.
        initialise: whether to make them; one process does, before any other uses them.

    Raises:
        OSError: this system has no semaphores of that kind.
    """

    def __init__(self, memory: Tensor, initialise: bool) -> None:
        self._memory = memory
        self._first = memory.data_ptr()
        library = CDLL(None, use_errno=True)
        try:
            self._post, self._try = library.sem_post, library.sem_trywait
            self._post.argtypes = self._try.argtypes = (c_void_p,)
            if hasattr(library, "sem_clockwait"):
                self._clock, self._wait = time.CLOCK_MONOTONIC, library.sem_clockwait
                self._wait.argtypes = (c_void_p, c_int, c_void_p)
            else:  # before glibc 2.30
                self._clock, self._wait = time.CLOCK_REALTIME, library.sem_timedwait
                self._wait.argtypes = (c_void_p, c_void_p)
            make = library.sem_init
        except AttributeError as error:
            raise OSError(f"this system's C library has no {error}") from error
        make.argtypes = (c_void_p, c_int, c_uint)
        if initialise:
            for number in range(len(memory) // SEMAPHORE_BYTES):
                if make(self._address(number), 1, 0) != 0:
                    raise OSError(ctypes.get_errno(), "no process-shared semaphores here")

    def post(self, number: int) -> None:
        """Adds one, and wakes a waiter."""
        self._post(self._address(number))

    def wait(self, number: int, seconds: float) -> bool:
        """Takes one; whether there was one within ``seconds``. May return early without."""
        address = self._address(number)
        if self._try(address) == 0:
            return True
        sleep_at = time.perf_counter() + min(seconds, YIELD_SECONDS)
        while time.perf_counter() < sleep_at:
            os.sched_yield()
            if self._try(address) == 0:
                return True
        end = time.clock_gettime_ns(self._clock) + int(seconds * 1e9)
        until = ctypes.byref(_TimeSpec(end // 10**9, end % 10**9))
        if self._clock == time.CLOCK_MONOTONIC:
            return bool(self._wait(address, self._clock, until) == 0)
        return bool(self._wait(address, until) == 0)

    def _address(self, number: int) -> int:
        return self._first + number * SEMAPHORE_BYTES
