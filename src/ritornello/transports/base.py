"""The contract of a transport: what moves records between ranks.

Three methods make a transport, and two more serve those whose ranks read each other's shards.
The worker calls them, and between rounds the trainer's thread, never both at once; in the same
order on every rank.
``ritornello.testing.TransportConformance`` is the suite that every transport passes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.errors import CheckpointError, PeerLostError
from ritornello.sampling import Plan
from ritornello.shard import Shard
from ritornello.storage import Storage

Result = TypeVar("Result")


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

    def make_shard(self, rows_per_rank: Ints, record_bytes: int, storage: Storage) -> Shard:
        """Makes this rank's shard where the transport can reach it.

        Args:
            rows_per_rank: int64 ``[num_ranks]``.
            record_bytes: of each row.
            storage: where it shall lie.

        Raises:
            MemoryError: it does not fit; says how much is needed.
        """
        return Shard(storage.allocate(int(rows_per_rank[self.rank]), record_bytes))

    def await_readers(self) -> None:  # noqa: B027  (nothing to do where nobody reads it)
        """Blocks until no other rank reads this rank's shard; called before it is written."""

    @abstractmethod
    def exchange(
        self, shard: Shard, plan: Plan, out: Tensor, peers: Sequence[int] | None = None
    ) -> None:
        """Fetches the records that the plan gives to this rank, and serves those it owes.

        Args:
            shard: this rank's, from ``make_shard``; not written before ``await_readers``.
            plan: this rank's part of the round's plan.
            out: uint8 ``[plan.num_drawn, record_bytes]``, contiguous, on the shard's device;
                filled in the plan's order: by owner, then by slot.
            peers: the ranks to exchange with; records of others are left as they are. None:
                all, this rank included.
        """

    def interrupt(self) -> None:  # noqa: B027  (nothing to do where no call waits for long)
        """Makes a call that another thread is in fail at once; then only ``close`` may follow."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the transport holds. May be called twice; never blocks for long."""


def gather_counts(transport: Transport, count: int) -> Ints:
    """Gives every rank the count of all, int64 ``[num_ranks]``, none of which is negative.

    Raises:
        PeerLostError: a rank is somewhere else, in a call between rounds.
    """
    counts = transport.all_gather(np.array([count]))[:, 0].copy()
    elsewhere = tuple(np.flatnonzero(counts < 0).tolist())
    if elsewhere:
        raise PeerLostError(
            f"rank(s) {list(elsewhere)} have called something like save, after fewer updates",
            elsewhere,
        )
    return counts


def together(transport: Transport, act: Callable[[], Result], doing: str) -> Result:
    """Does something that may fail on some ranks; if it fails on one, it fails on all.

    Blocks until every rank has called it.

    Args:
        transport: to the other ranks.
        act: what each rank does; involves no other rank.
        doing: what it is, for the other ranks' errors.

    Returns:
        What it returned on this rank.

    Raises:
        CheckpointError: it failed here, or on the ranks that the error names.
    """
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    failed = transport.all_gather(np.array([failure is not None]))[:, 0]
    if failure is not None:
        if isinstance(failure, CheckpointError):
            raise failure
        raise CheckpointError(f"{doing} failed: {failure or type(failure).__name__}") from failure
    if failed.any():
        raise CheckpointError(
            f"{doing} failed on rank(s) {np.flatnonzero(failed).tolist()}: see the error there"
        )
    return result


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
