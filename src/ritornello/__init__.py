"""Asynchronous distributed rehearsal buffers for data-parallel continual learning.

Start with ``RehearsalBuffer``.
"""

from ritornello.buffer import RehearsalBuffer
from ritornello.errors import BufferClosedError, PeerLostError, RoundError
from ritornello.loading import rehearse
from ritornello.sampling import SamplingPolicy, UniformSampling
from ritornello.selection import (
    Assignment,
    ClassBalanced,
    Fifo,
    PerClassRandom,
    Reservoir,
    SelectionPolicy,
)
from ritornello.stats import BufferStats
from ritornello.transports import Transport
from ritornello.version import __version__

__all__ = [
    "Assignment",
    "BufferClosedError",
    "BufferStats",
    "ClassBalanced",
    "Fifo",
    "PeerLostError",
    "PerClassRandom",
    "RehearsalBuffer",
    "Reservoir",
    "RoundError",
    "SamplingPolicy",
    "SelectionPolicy",
    "Transport",
    "UniformSampling",
    "__version__",
    "rehearse",
]
