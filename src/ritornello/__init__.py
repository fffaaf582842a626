"""Asynchronous distributed rehearsal buffers for data-parallel continual learning.

Start with ``RehearsalBuffer``.
"""

from ritornello.buffer import RehearsalBuffer
from ritornello.checkpoint import SavedFolder
from ritornello.contents import Contents
from ritornello.errors import BufferClosedError, CheckpointError, PeerLostError, RoundError
from ritornello.exemplars import at_random, closest_to_mean, herding
from ritornello.forgetting import Forgotten, forget
from ritornello.loading import rehearse
from ritornello.sampling import (
    ClassBalancedSampling,
    GraspSampling,
    SamplingPolicy,
    UniformSampling,
)
from ritornello.saved_representatives import SavedRepresentatives
from ritornello.selection import (
    Assignment,
    ClassBalanced,
    ClassBalancedReservoir,
    Fifo,
    FirstOffered,
    GraspEviction,
    GreedyBalanced,
    PerClassRandom,
    Reservoir,
    SavedShards,
    SelectionPolicy,
    rank_of_exemplar,
)
from ritornello.stats import BufferStats
from ritornello.transports import Transport
from ritornello.version import __version__

__all__ = [
    "Assignment",
    "BufferClosedError",
    "BufferStats",
    "CheckpointError",
    "ClassBalanced",
    "ClassBalancedReservoir",
    "ClassBalancedSampling",
    "Contents",
    "Fifo",
    "FirstOffered",
    "Forgotten",
    "GraspEviction",
    "GraspSampling",
    "GreedyBalanced",
    "PeerLostError",
    "PerClassRandom",
    "RehearsalBuffer",
    "Reservoir",
    "RoundError",
    "SamplingPolicy",
    "SavedFolder",
    "SavedRepresentatives",
    "SavedShards",
    "SelectionPolicy",
    "Transport",
    "UniformSampling",
    "__version__",
    "at_random",
    "closest_to_mean",
    "forget",
    "herding",
    "rank_of_exemplar",
    "rehearse",
]
