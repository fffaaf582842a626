"""Asynchronous distributed rehearsal buffers for data-parallel continual learning.

Start with ``RehearsalBuffer``.
"""

from ritornello.buffer import RehearsalBuffer
from ritornello.errors import BufferClosedError, CheckpointError, PeerLostError, RoundError
from ritornello.loaders.composition import ComposedSteps, share_of_new
from ritornello.loaders.evenly import evenly
from ritornello.loaders.prefetch import rehearse
from ritornello.policies.class_shares import (
    ClassBalanced,
    FirstOffered,
    GreedyBalanced,
    PerClassRandom,
)
from ritornello.policies.classes.scores import rank_of_exemplar
from ritornello.policies.contents import Contents
from ritornello.policies.earlier_tasks import EarlierTasks
from ritornello.policies.exemplars import at_random, closest_to_mean, herding
from ritornello.policies.grasp import GraspSampling
from ritornello.policies.largest_class import ClassBalancedReservoir, GraspEviction
from ritornello.policies.reservoir import Fifo, Reservoir
from ritornello.policies.sampling import (
    ClassBalancedSampling,
    SamplingPolicy,
    UniformSampling,
)
from ritornello.policies.selection import Assignment, SavedShards, SelectionPolicy
from ritornello.rounds.stats import BufferStats
from ritornello.saving.folder import SavedFolder
from ritornello.saving.forgetting import Forgotten, forget
from ritornello.saving.saved_buffer import SavedRepresentatives
from ritornello.transports.base import Transport
from ritornello.version import __version__

__all__ = [
    "Assignment",
    "BufferClosedError",
    "BufferStats",
    "CheckpointError",
    "ClassBalanced",
    "ClassBalancedReservoir",
    "ClassBalancedSampling",
    "ComposedSteps",
    "Contents",
    "EarlierTasks",
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
    "evenly",
    "forget",
    "herding",
    "rank_of_exemplar",
    "rehearse",
    "share_of_new",
]
