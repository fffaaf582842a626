"""Ranks inside one process: a single one, or, for tests, several threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.errors import PeerLostError
from ritornello.records import accelerators
from ritornello.records.shard import Shard
from ritornello.transports.base import Transport
from ritornello.transports.board import RoomBoard
from ritornello.transports.plan import Plan

_Payload = tuple[Tensor, torch.Event | None]
"""A tensor, and on an accelerator when it is complete on the sender's stream."""


class _Room:
    """What the ranks of one process share: a board, and a mailbox for each ordered pair of them."""

    def __init__(self, num_ranks: int) -> None:
        self.mailboxes: dict[tuple[int, int], queue.SimpleQueue[_Payload | None]] = {
            (sender, receiver): queue.SimpleQueue()
            for sender in range(num_ranks)
            for receiver in range(num_ranks)
        }
        self.board = RoomBoard()
        self.closed = [threading.Event() for _ in range(num_ranks)]


class LocalTransport(Transport):
    """One process, no network.

    Alone, its exchange is one gather. ``LocalTransport.connect(n)`` makes ``n`` connected
    ones, each for a thread of its own that plays a rank.
    """

    def __init__(
        self, rank: int = 0, room: _Room | None = None, num_ranks: int = 1, timeout: float = 300.0
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout_seconds = timeout
        self._room = room or _Room(num_ranks)
        self.board = self._room.board

    @classmethod
    def connect(cls, num_ranks: int, timeout_seconds: float = 300.0) -> list[LocalTransport]:
        """Connected transports, one for each of ``num_ranks`` threads."""
        room = _Room(num_ranks)
        return [cls(rank, room, num_ranks, timeout_seconds) for rank in range(num_ranks)]

    def all_gather(self, values: Ints) -> Ints:
        """See ``Transport.all_gather``."""
        if self.num_ranks == 1:
            return np.array(values, dtype=np.int64)[None]
        mine = torch.from_numpy(np.array(values, dtype=np.int64))
        for peer in range(self.num_ranks):
            self._send(peer, mine)
        return np.stack([self._receive(peer, mine).numpy() for peer in range(self.num_ranks)])

    def exchange(
        self, shard: Shard, plan: Plan, out: Tensor, peers: Sequence[int] | None = None
    ) -> None:
        """See ``Transport.exchange``."""
        if self.num_ranks == 1:
            shard.gather(plan.receive_slots, out)
            return
        outgoing = torch.empty(
            (len(plan.send_slots), out.shape[1]), dtype=torch.uint8, device=out.device
        )
        shard.gather(plan.send_slots, outgoing)
        blocks = outgoing.split(plan.send_counts.tolist())
        places = out.split(plan.receive_counts.tolist())
        peers = range(self.num_ranks) if peers is None else peers
        ready = accelerators.mark(out.device)
        for peer in peers:
            if len(blocks[peer]):
                self._send(peer, blocks[peer], ready)
        for peer in peers:
            if len(places[peer]):
                places[peer].copy_(self._receive(peer, places[peer]))

    def interrupt(self) -> None:
        """See ``Transport.interrupt``. What waits takes its peer for closed."""
        for peer in range(self.num_ranks):
            self._room.mailboxes[peer, self.rank].put(None)

    def close(self) -> None:
        """See ``Transport.close``."""
        if not self._room.closed[self.rank].is_set():
            self._room.closed[self.rank].set()
            for peer in range(self.num_ranks):
                self._room.mailboxes[self.rank, peer].put(None)

    def _send(self, peer: int, payload: Tensor, ready: torch.Event | None = None) -> None:
        self._room.mailboxes[self.rank, peer].put((payload, ready))

    def _receive(self, peer: int, like: Tensor) -> Tensor:
        try:
            sent = self._room.mailboxes[peer, self.rank].get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise PeerLostError(
                f"rank {peer} sent nothing for {self.timeout_seconds:g} s (timeout_seconds)",
                (peer,),
            ) from None
        if sent is None:
            raise PeerLostError(f"rank {peer} has closed its buffer", (peer,))
        payload, ready = sent
        if payload.dtype != like.dtype or payload.shape != like.shape:
            raise PeerLostError(f"rank {peer} is in another call: it sent something else", (peer,))
        if ready is not None:
            stream = accelerators.current_stream(payload.device)
            stream.wait_event(ready)
            payload.record_stream(stream)  # the sender may let it go before it was read
        return payload
