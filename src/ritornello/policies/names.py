"""The names of the policies: ``selection=`` and ``sampling=`` of a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ritornello.policies.class_shares import (
    ClassBalanced,
    FirstOffered,
    GreedyBalanced,
    PerClassRandom,
)
from ritornello.policies.earlier_tasks import EarlierTasks
from ritornello.policies.grasp import GraspSampling
from ritornello.policies.largest_class import ClassBalancedReservoir, GraspEviction
from ritornello.policies.reservoir import Fifo, Reservoir
from ritornello.policies.sampling import (
    ClassBalancedSampling,
    SamplingPolicy,
    UniformSampling,
)
from ritornello.policies.selection import SelectionPolicy

Policy = TypeVar("Policy", SelectionPolicy, SamplingPolicy)

SELECTION_POLICIES: dict[str, type[SelectionPolicy]] = {
    "class-balanced": ClassBalanced,
    "per-class-random": PerClassRandom,
    "class-balanced-reservoir": ClassBalancedReservoir,
    "grasp": GraspEviction,
    "greedy-balanced": GreedyBalanced,
    "first-offered": FirstOffered,
    "reservoir": Reservoir,
    "fifo": Fifo,
}

SAMPLING_POLICIES: dict[str, type[SamplingPolicy]] = {
    "uniform": UniformSampling,
    "class-balanced": ClassBalancedSampling,
    "grasp": GraspSampling,
    "earlier-tasks": EarlierTasks,
}


def selection_policy(selection: str | SelectionPolicy) -> SelectionPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
        TypeError: neither a name nor a policy.
    """
    return _policy("selection", selection, SelectionPolicy, SELECTION_POLICIES)  # type: ignore[type-abstract]


def sampling_policy(sampling: str | SamplingPolicy) -> SamplingPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
        TypeError: neither a name nor a policy.
    """
    return _policy("sampling", sampling, SamplingPolicy, SAMPLING_POLICIES)  # type: ignore[type-abstract]


def _policy(
    argument: str, given: str | Policy, kind: type[Policy], named: Mapping[str, type[Policy]]
) -> Policy:
    if isinstance(given, kind):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"{argument}={given!r}: give a name ({', '.join(named)}) or a {kind.__name__}"
        )
    if given not in named:
        raise ValueError(f"{argument}={given!r}: there are {', '.join(map(repr, named))}")
    return named[given]()
