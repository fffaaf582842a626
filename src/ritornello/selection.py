"""Selection policies: who is admitted to a shard, and who is replaced.

A policy sees labels and a random stream, never a sample, and answers with an *assignment*
(candidate -> slot). Each rank has a policy object of its own for its own shard. What a policy
must do stands in ``assignment``; the policies, by kind, in ``classless``, ``class_shares`` and
``largest_class``. Here they have their names.
"""

from __future__ import annotations

from ritornello.assignment import Assignment, SavedShards, SelectionPolicy
from ritornello.class_shares import (
    ClassBalanced,
    FirstOffered,
    GreedyBalanced,
    PerClassRandom,
)
from ritornello.classless import Fifo, Reservoir
from ritornello.largest_class import ClassBalancedReservoir, GraspEviction
from ritornello.scores import rank_of_exemplar

__all__ = [
    "POLICIES",
    "Assignment",
    "ClassBalanced",
    "ClassBalancedReservoir",
    "Fifo",
    "FirstOffered",
    "GraspEviction",
    "GreedyBalanced",
    "PerClassRandom",
    "Reservoir",
    "SavedShards",
    "SelectionPolicy",
    "rank_of_exemplar",
    "selection_policy",
]

POLICIES: dict[str, type[SelectionPolicy]] = {
    "class-balanced": ClassBalanced,
    "per-class-random": PerClassRandom,
    "class-balanced-reservoir": ClassBalancedReservoir,
    "grasp": GraspEviction,
    "greedy-balanced": GreedyBalanced,
    "first-offered": FirstOffered,
    "reservoir": Reservoir,
    "fifo": Fifo,
}


def selection_policy(selection: str | SelectionPolicy) -> SelectionPolicy:
    """A policy by its name, or the given one.

    Raises:
        ValueError: no policy has that name.
        TypeError: neither a name nor a policy.
    """
    if isinstance(selection, SelectionPolicy):
        return selection
    if not isinstance(selection, str):
        raise TypeError(
            f"selection={selection!r}: give a name ({', '.join(POLICIES)}) or a SelectionPolicy"
        )
    if selection not in POLICIES:
        raise ValueError(f"selection={selection!r}: there are {', '.join(map(repr, POLICIES))}")
    return POLICIES[selection]()
