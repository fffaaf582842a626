"""The contract of a transport: what moves records between ranks.

Three methods make a transport, and four more serve those whose ranks read each other's shards.
The worker calls them, and between rounds the trainer's thread, never both at once; in the same
order on every rank.
``ritornello.testing.TransportConformance`` is the suite that every transport passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records.pages import Pages
from ritornello.records.shard import Shard
from ritornello.records.storage import Storage
from ritornello.transports.board import Board
from ritornello.transports.plan import Plan


class Transport(ABC):
    """Moves records between the ranks of one rehearsal buffer.

    Every method ends within ``timeout_seconds``: with its result, or with a
    ``PeerLostError`` that names the peer where it can be known.

    Attributes:
        rank: this rank.
        num_ranks: the ranks that share the buffer.
        timeout_seconds: how long a peer may be silent.
        board: for notes to the other ranks, by which they notice that one of them is in another
            call; None: they notice it at the timeout.
    """

    rank: int
    num_ranks: int
    timeout_seconds: float
    board: Board | None = None

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

    def exchange_pages(self, shard: Shard, plan: Plan, out: Tensor) -> None:
        """As ``exchange``, of the pages of records that were exchanged just before.

        They come from owners of these records, and so from none that is still admitting.
        """
        self.exchange(shard, plan, out)

    def look_up(self, pages: Pages, places: Ints, counts: Ints) -> Ints:
        """The pages at some places of the tables of their owners, for ``exchange``.

        Args:
            pages: of this rank's shard.
            places: int64 ``[n]``, by owner.
            counts: int64 ``[num_ranks]``, how many are in each rank's table.

        Returns:
            int64 ``[n]``. Those of ranks whose shards cannot be read from here stay as they are:
            their owners look them up.
        """
        end = int(counts[: self.rank + 1].sum())
        own = slice(end - int(counts[self.rank]), end)
        found = places.copy()
        found[own] = pages.at(places[own])
        return found

    def interrupt(self) -> None:  # noqa: B027  (nothing to do where no call waits for long)
        """Makes a call that another thread is in fail at once; then only ``close`` may follow."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the transport holds. May be called twice; never blocks for long."""
