"""The contract of a transport: what moves records between ranks.

A transport has three methods. The worker alone calls them, in the same order on every rank.
``ritornello.testing.TransportConformance`` is the suite that every transport passes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.sampling import Plan
from ritornello.shard import Shard


class Transport(ABC):
    """Moves records between the ranks of one rehearsal buffer.

    Every method ends within ``timeout_seconds``: with its result, or with a
    ``PeerLostError`` that names the peer where it can be known.

    Attributes:
        rank: this rank.
        num_ranks: the ranks that share the buffer.
        timeout_seconds: how long a peer may be silent.
    """

    rank: int
    num_ranks: int
    timeout_seconds: float

    @abstractmethod
    def all_gather(self, values: Ints) -> Ints:
        """Gives every rank the values of all.

        Args:
            values: int64 ``[n]``; ``n`` is the same on every rank.

        Returns:
            int64 ``[num_ranks, n]``.
        """

    @abstractmethod
    def exchange(self, shard: Shard, plan: Plan, out: Tensor) -> None:
        """Fetches the records that the plan gives to this rank, and serves those it owes.

        Args:
            shard: this rank's; not written by anybody during the call.
            plan: this rank's part of the round's plan.
            out: uint8 ``[plan.num_drawn, record_bytes]``, contiguous, on the shard's device;
                filled in the plan's order: by owner, then by slot.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back what the transport holds. May be called twice; never blocks for long."""


def check_agreement(transport: Transport, arguments: Mapping[str, str]) -> None:
    """Checks that all ranks were given the same arguments.

    Blocks until every rank has called it.

    Raises:
        ValueError: on every rank, naming the arguments that differ, their values and ranks.
    """
    text = json.dumps(dict(arguments)).encode()
    length = int(transport.all_gather(np.array([len(text)])).max())
    padded = np.frombuffer(text.ljust(length), dtype=np.uint8).astype(np.int64)
    everyone = [json.loads(bytes(row.astype(np.uint8))) for row in transport.all_gather(padded)]
    mine = everyone[transport.rank]
    differences = [
        f"{name} is "
        + ", ".join(f"{each.get(name)} on rank {i}" for i, each in enumerate(everyone))
        for name in mine
        if any(each.get(name) != mine[name] for each in everyone)
    ]
    if differences:
        raise ValueError(
            f"rank {transport.rank}: RehearsalBuffer was given different arguments on different "
            f"ranks: {'; '.join(differences)}. All ranks must pass the same"
        )
