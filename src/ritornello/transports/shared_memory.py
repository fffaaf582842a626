"""Ranks of one host read each other's shards in shared memory; other hosts by another transport.

A host's shards lie side by side in one mapping, so that drawing is one gather, with no message.
Two kinds of semaphore keep a round from reading a half-written record: an owner posts
``ADMITTED`` to each neighbour that the plan lets read its shard in this round, and that reader
waits for it; the reader posts ``READ`` when it is done, and the owner waits for it before it
writes again. So neighbours are never more than one round apart, and nobody waits for a
neighbour with which the plan has no business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.errors import BufferClosedError, PeerLostError
from ritornello.records.digest import digest
from ritornello.records.pages import PLACES_PER_ROW, Pages
from ritornello.records.shard import LARGE_RECORD_BYTES, Shard
from ritornello.records.storage import MappedMemory, Storage
from ritornello.transports.base import Transport
from ritornello.transports.plan import Plan
from ritornello.transports.semaphores import SEMAPHORE_BYTES, Semaphores

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
"""How often one who waits looks whether the other is still alive."""

ADMITTED, READ, GATHERED = range(3)
"""What a semaphore between two neighbours says."""

NUM_KINDS = 3

DOING_ADMISSION = "admitting its candidates"

GATHER_WIDTH = 64
"""The most values per rank that are gathered in shared memory."""

TOKEN_BYTES = 16

SHARED = Storage("shared", torch.device("cpu"))


class _HostShard(Shard):
    """A rank's shard in the array of those of its host.

    Args:
        host: uint8 ``[num_rows, record_bytes]``, all of them.
        firsts: int64 ``[num_ranks]``, where each rank's begins.
        rank: whose shard it is.
        num_rows: of it.
    """

    def __init__(self, host: Tensor, firsts: Ints, rank: int, num_rows: int) -> None:
        first = int(firsts[rank])
        super().__init__(host[first : first + num_rows])
        self.all_shards, self.firsts = Shard(host), firsts


class SharedMemoryTransport(Transport):
    """Shared memory inside a host, another transport between hosts.

    Blocks until all ranks have made theirs.

    Args:
        inner: connects all ranks; owned by this transport.
        hosts: for each rank a number that ranks of one host share. None: finds out, by proving
            that memory of the one can be opened by the other (two containers on a machine may
            not).

    Attributes:
        neighbours: int64, the ranks on this rank's host, itself included, ascending.
        num_hosts: groups of ranks that share memory.

    Raises:
        OSError: this system cannot share memory that way.
    """

    def __init__(self, inner: Transport, hosts: Sequence[int] | None = None) -> None:
        self.rank = inner.rank
        self.num_ranks = inner.num_ranks
        self.timeout_seconds = inner.timeout_seconds
        self.board = inner.board
        self._inner = inner
        self._readers: list[int] = []
        self._closed = self._interrupted = False
        # Everybody's first memory is a few bytes that prove who can be reached. The one of the
        # first rank on a host then becomes what that host's ranks coordinate by.
        token = np.frombuffer(secrets.token_bytes(TOKEN_BYTES), dtype=np.int64)
        with SHARED.create(TOKEN_BYTES) as memory:
            memory.map().view(torch.int64).copy_(torch.from_numpy(token.copy()))
            here = _machine_and_process_namespace()
            mine = np.array([here, os.getpid(), memory.descriptor, *token])
            everyone = inner.all_gather(mine)
            self._processes = everyone[:, 1]
            leaders = np.asarray(hosts) if hosts is not None else self._find_leaders(everyone)
            self.neighbours = np.flatnonzero(leaders == leaders[self.rank])
            self.num_hosts = len(np.unique(leaders))
            self._leader = int(self.neighbours[0])
            self._is_neighbour = np.isin(np.arange(self.num_ranks), self.neighbours)
            self._place = {rank: i for i, rank in enumerate(self.neighbours.tolist())}
            self._others = [rank for rank in self._place if rank != self.rank]
            if self._leader == self.rank:
                memory.resize(self._num_control_bytes)
                self._open_control(memory.descriptor)
            inner.all_gather(np.zeros(1, dtype=np.int64))  # it is ready
            if self._leader != self.rank:
                self._open_control(int(everyone[self._leader, 2]))
            inner.all_gather(np.zeros(1, dtype=np.int64))  # everybody has it open
        self._lives = self._watch_neighbours()

    @staticmethod
    def is_supported() -> bool:
        """Whether this system can share memory that way, found by trying: Linux can."""
        try:
            with SHARED.create(SEMAPHORE_BYTES) as memory:
                with MappedMemory.open(
                    os.getpid(), memory.descriptor, SEMAPHORE_BYTES, SHARED
                ) as again:
                    Semaphores(again.map(), initialise=True)
                os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError, ValueError, MemoryError):
            logger.debug("memory cannot be shared here", exc_info=True)
            return False
        return True

    @property
    def peers_elsewhere(self) -> bool:
        """Whether there are ranks on other hosts."""
        return len(self.neighbours) < self.num_ranks

    # Setting up.

    def _find_leaders(self, everyone: Ints) -> Ints:
        """For each rank the first one on its host."""
        first = self.rank
        for rank in np.flatnonzero(everyone[:, 0] == everyone[self.rank, 0]).tolist():
            if rank >= self.rank:
                break
            _, process, descriptor, *token = everyone[rank].tolist()
            with (
                contextlib.suppress(OSError, ValueError),
                MappedMemory.open(process, descriptor, TOKEN_BYTES, SHARED) as memory,
            ):
                if memory.map().view(torch.int64).tolist() == token:
                    first = rank
                    break
        leaders = self._inner.all_gather(np.array([first]))[:, 0]
        # One that joined a rank which itself joined another one that is out of reach is alone.
        joined_a_leader = leaders[leaders] == leaders
        return np.where(joined_a_leader, leaders, np.arange(len(leaders)))

    @property
    def _num_control_bytes(self) -> int:
        num = len(self.neighbours)
        num_words = num + 2 * num * GATHER_WIDTH
        return -(-num_words * 8 // SEMAPHORE_BYTES) * SEMAPHORE_BYTES + (
            NUM_KINDS * num * num * SEMAPHORE_BYTES
        )

    def _open_control(self, descriptor: int) -> None:
        """Maps flags, room for gathering, and semaphores."""
        num = len(self.neighbours)
        leads = self._leader == self.rank
        with self._memory_of_leader(descriptor, self._num_control_bytes, SHARED) as memory:
            control = memory.map()
        num_semaphore_bytes = NUM_KINDS * num * num * SEMAPHORE_BYTES
        words = control[:-num_semaphore_bytes].view(torch.int64).numpy()
        if leads:
            words[:] = 0
        self._ended: Ints = words[:num]
        self._gathering: Ints = words[num : num + 2 * num * GATHER_WIDTH].reshape(2, num, -1)
        self._turn = 0
        self._semaphores = Semaphores(control[-num_semaphore_bytes:], initialise=leads)

    def _memory_of_leader(self, descriptor: int, num_bytes: int, storage: Storage) -> MappedMemory:
        process = int(self._processes[self._leader])
        try:
            return MappedMemory.open(process, descriptor, num_bytes, storage)
        except (FileNotFoundError, ProcessLookupError) as error:  # it was within reach before
            raise PeerLostError(
                f"rank {self._leader} has ended or was killed, while sharing its memory",
                (self._leader,),
            ) from error

    def _watch_neighbours(self) -> dict[int, int]:
        """For each neighbour in another process a descriptor that tells when it has ended."""
        lives = {}
        for rank in self.neighbours.tolist():
            if self._processes[rank] != os.getpid():
                with contextlib.suppress(OSError):
                    lives[rank] = os.pidfd_open(int(self._processes[rank]))
        return lives

    def make_shard(self, rows_per_rank: Ints, record_bytes: int, storage: Storage) -> Shard:
        """See ``Transport.make_shard``. The host's shards are one array.

        Raises:
            ValueError: ``storage`` is memory that other ranks cannot read.
        """
        if not storage.can_be_shared:
            raise ValueError(
                f"ranks that share memory cannot keep their shards in storage={str(storage)!r}: "
                "use 'shared' or 'file:DIR'"
            )
        if storage.kind == "auto":
            storage = SHARED
        rows = np.where(self._is_neighbour, rows_per_rank, 0)
        firsts = np.cumsum(rows) - rows
        num_rows = int(rows.sum())
        num_bytes = num_rows * record_bytes
        memory: MappedMemory | None = None
        host: Tensor | None = None

        def create() -> int:
            nonlocal memory
            memory = storage.create(num_bytes)
            return memory.descriptor

        def reserve() -> int:
            nonlocal memory, host
            if memory is None:
                descriptor = int(descriptors[self._leader])
                memory = self._memory_of_leader(descriptor, num_bytes, storage)
            first = int(firsts[self.rank]) * record_bytes
            memory.reserve(first, int(rows[self.rank]) * record_bytes)
            host = memory.map().view(num_rows, record_bytes)
            return 0

        try:
            descriptors = self._together(create if self._leader == self.rank else lambda: 0)
            self._together(reserve)
        finally:
            if memory is not None:
                memory.close()
        assert host is not None
        return _HostShard(host, firsts, self.rank, int(rows[self.rank]))

    def _together(self, act: Callable[[], int]) -> Ints:
        """Does something that may fail on every rank; if it fails on one, it fails on all.

        Returns:
            What it returned on each rank.
        """
        failure: Exception | None = None
        try:
            result = act()
        except (OSError, MemoryError) as error:
            failure, result = error, -1
        results = self._inner.all_gather(np.array([result]))[:, 0]
        if failure is not None:
            raise failure
        failed = np.flatnonzero(results < 0).tolist()
        if failed:
            raise MemoryError(f"the shard of rank(s) {failed} could not be made: see there")
        return results

    # Rounds.

    def all_gather(self, values: Ints) -> Ints:
        """See ``Transport.all_gather``."""
        if self.peers_elsewhere or len(values) > GATHER_WIDTH:
            return self._inner.all_gather(values)
        # Two turns' room: one who writes the next turn's values has seen everybody come to
        # this turn, so nobody reads those of the turn before any more.
        room = self._gathering[self._turn, :, : len(values)]
        self._turn = 1 - self._turn
        room[self._place[self.rank]] = values
        self._post(GATHERED, self._others)
        self._wait(GATHERED, self._others, "gathering sizes")
        return room.copy()

    def await_readers(self) -> None:
        """See ``Transport.await_readers``."""
        while self._readers:  # one by one: after an interrupt the others are still to be awaited
            self._wait(READ, self._readers[-1:], "reading this rank's shard")
            self._readers.pop()

    def exchange(
        self, shard: Shard, plan: Plan, out: Tensor, peers: Sequence[int] | None = None
    ) -> None:
        """See ``Transport.exchange``."""
        assert peers is None
        readers = self._peers_of(plan.send_counts.tolist())
        self._post(ADMITTED, readers)
        owners = self._peers_of(plan.receive_counts.tolist())
        self._fetch(shard, plan, out, readers, admitting=owners)

    def exchange_pages(self, shard: Shard, plan: Plan, out: Tensor) -> None:
        """See ``Transport.exchange_pages``: a message to other hosts, none to neighbours."""
        readers = self._peers_of(plan.send_counts.tolist())
        self._fetch(shard, plan, out, readers, admitting=[])

    def _fetch(
        self, shard: Shard, plan: Plan, out: Tensor, readers: list[int], admitting: list[int]
    ) -> None:
        """As ``exchange``.

        Args:
            shard: this rank's.
            plan: of the round.
            out: see there.
            readers: the neighbours that read this rank's shard.
            admitting: those that may still write what is read here.
        """
        assert isinstance(shard, _HostShard)
        self._readers += readers
        if self.peers_elsewhere:
            self._inner.exchange(shard, plan, out, np.flatnonzero(~self._is_neighbour).tolist())
        counts = plan.receive_counts.tolist()
        rows = plan.receive_slots + shard.firsts.repeat(plan.receive_counts)
        if out.shape[1] >= LARGE_RECORD_BYTES:
            self._gather_one_by_one(shard.all_shards, counts, rows, out, admitting)
            return
        self._wait(ADMITTED, admitting, DOING_ADMISSION)
        if not self.peers_elsewhere:
            shard.all_shards.gather(rows, out)
        else:
            here = np.flatnonzero(self._is_neighbour.repeat(plan.receive_counts))
            records = torch.empty((len(here), out.shape[1]), dtype=torch.uint8)
            shard.all_shards.gather(rows[here], records)
            Shard(out).write(here, records, np.arange(len(here)))
        self._post(READ, self._peers_of(counts))

    def _gather_one_by_one(
        self, all_shards: Shard, counts: list[int], rows: Ints, out: Tensor, admitting: list[int]
    ) -> None:
        """Gathers large records owner by owner, this rank's first: copying hides the waiting."""
        ends = np.cumsum(counts).tolist()
        after = [rank for rank in self._others if rank > self.rank]
        before = [rank for rank in self._others if rank < self.rank]
        for owner in (self.rank, *after, *before):
            if not counts[owner]:
                continue
            part = slice(ends[owner] - counts[owner], ends[owner])
            if owner in admitting:
                self._wait(ADMITTED, (owner,), DOING_ADMISSION)
            all_shards.gather(rows[part], out[part])
            if owner != self.rank:
                self._post(READ, (owner,))

    def look_up(self, pages: Pages, places: Ints, counts: Ints) -> Ints:
        """See ``Transport.look_up``. What neighbours admit next waits for ``exchange_pages``."""
        table = pages.table
        assert isinstance(table, _HostShard)
        tables = table.all_shards.words
        places_of_all = places + (PLACES_PER_ROW * table.firsts).repeat(counts)
        here: slice | Ints = slice(None)
        if self.peers_elsewhere:
            here = np.flatnonzero(self._is_neighbour.repeat(counts))
        found = places.copy()
        found[here] = tables[places_of_all[here]]
        return found

    def interrupt(self) -> None:
        """See ``Transport.interrupt``."""
        self._interrupted = True
        self._inner.interrupt()

    def close(self) -> None:
        """See ``Transport.close``."""
        if self._closed:
            return
        self._closed = True
        self._ended[self._place[self.rank]] = 1
        for descriptor in self._lives.values():
            os.close(descriptor)
        self._inner.close()

    def _peers_of(self, counts: list[int]) -> list[int]:
        """The neighbours, without this rank, whose count is not zero."""
        return [rank for rank in self._others if counts[rank]]

    def _number(self, kind: int, sender: int, receiver: int) -> int:
        num = len(self.neighbours)
        return (kind * num + self._place[sender]) * num + self._place[receiver]

    def _post(self, kind: int, receivers: Iterable[int]) -> None:
        for receiver in receivers:
            self._semaphores.post(self._number(kind, self.rank, receiver))

    def _wait(self, kind: int, senders: Iterable[int], doing: str) -> None:
        """Waits for each sender's post.

        Raises:
            PeerLostError: one has ended, or does not come within the timeout.
            BufferClosedError: interrupted.
        """
        deadline = time.monotonic() + self.timeout_seconds
        for sender in senders:
            number = self._number(kind, sender, self.rank)
            if self._semaphores.wait(number, min(POLL_SECONDS, self.timeout_seconds)):
                continue
            while True:
                if self._interrupted:
                    raise BufferClosedError(f"the transport was closed while {doing}")
                fault = self._fault_of(sender)
                # What it posted before it ended still counts.
                if self._semaphores.wait(number, 0.0 if fault else POLL_SECONDS):
                    break
                if fault is None and time.monotonic() > deadline:
                    fault = f"sent nothing for {self.timeout_seconds:g} s (timeout_seconds)"
                if fault:
                    raise PeerLostError(f"rank {sender} {fault}, while {doing}", (sender,))

    def _fault_of(self, rank: int) -> str | None:
        if self._ended[self._place[rank]]:
            return "has closed its buffer"
        if rank in self._lives:
            life = select.poll()
            life.register(self._lives[rank], select.POLLIN)
            if life.poll(0):
                return "has ended or was killed"
        return None


def _machine_and_process_namespace() -> int:
    """A number that differs between machines, and between containers that hide processes."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    return digest(machine + os.readlink("/proc/self/ns/pid"))
