"""Ranks of an MPI job: records travel as MPI messages, over the network that MPI uses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.errors import BufferClosedError, PeerLostError
from ritornello.records.shard import Shard
from ritornello.transports.base import Transport
from ritornello.transports.board import Board
from ritornello.transports.plan import Plan

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

NUM_YIELDS = 50
"""How often a waiting worker looks without a pause: a round among awake ranks ends by then."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 20e-6, 1e-3
"""Between later looks. MPI's own waits would keep a whole core busy, one that trains."""

RECORDS_TAG, NOTES_TAG = range(2)
"""What a message is."""

_abandoned: list[Request] = []
"""Requests that MPI may still serve after a fault. Each holds the memory that it concerns."""


_notes_sent: list[Request] = []
"""Requests of notes that nobody waits for. Each holds the memory that it concerns."""


class _Pending(NamedTuple):
    """A request, and what it waits for."""

    request: Request
    peer: int | None
    """None: all of them."""
    receives: bool
    """Whether it is a receive, the one kind that can be cancelled."""


class MpiTransport(Transport):
    """Sends each peer at most one message a round, and only if there are records for it.

    For records in CPU memory. All waits end after ``timeout_seconds``, and none of them keeps
    a core busy. Two things are MPI's own affair. Where a rank is killed, ``mpiexec`` as a rule
    ends all others at once, before any timeout. And a rank that ends with an error waits for
    the others in ``MPI_Finalize``; started as ``python -m mpi4py script.py`` it ends them.

    Blocks until all ranks of the communicator have made theirs.

    Args:
        communicator: an mpi4py intracommunicator, whose ranks share the buffer. It is
            duplicated, so that it may be used for anything else meanwhile.
        timeout_seconds: how long a peer may be silent.

    Raises:
        ImportError: mpi4py is not installed, or finds no MPI library.
        ValueError: an intercommunicator, or MPI does not allow calls from several threads.
        PeerLostError: not all ranks came within the timeout.
    """

    def __init__(self, communicator: Intracomm, timeout_seconds: float) -> None:
        self._mpi = _load_mpi()
        if communicator.Is_inter():
            raise ValueError("communicator: it is an intercommunicator; give an intracommunicator")
        self.rank = communicator.Get_rank()
        self.num_ranks = communicator.Get_size()
        self.timeout_seconds = timeout_seconds
        self._fault: PeerLostError | None = None
        self._closed = False
        with self._until_done("making the buffer's private communicator") as pending:
            self._communicator, request = communicator.Idup()
            pending.append(_Pending(request, None, receives=False))
        # Errors become exceptions, whatever the given communicator does with its own.
        self._communicator.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.board = _MessageBoard(self._communicator)

    @classmethod
    def beside(
        cls,
        group: dist.ProcessGroup | None,
        timeout_seconds: float,
        device: torch.device | None = None,
    ) -> MpiTransport:
        """A transport for all ranks of the MPI job.

        Blocks until all of them have called it.

        Args:
            group: the process group of the buffer; None for the default one. If
                torch.distributed is in use, its ranks must be those of ``MPI.COMM_WORLD``.
            timeout_seconds: how long a peer may be silent.
            device: where the shards lie; None for CPU memory.

        Raises:
            ImportError: mpi4py is not installed, or finds no MPI library.
            ValueError: shards on a GPU, a group of other ranks than MPI's, or MPI does not
                allow calls from several threads.
            PeerLostError: not all ranks came within the timeout.
        """
        if device is not None:
            _check_device(device)
        world = _load_mpi().COMM_WORLD
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size(group) != world.Get_size():
            num_ranks = dist.get_world_size(group)
            raise ValueError(
                f"rank {dist.get_rank(group)}: transport='mpi': the process group has "
                f"{num_ranks} rank(s), but the MPI job has {world.Get_size()}: start all ranks "
                f"with 'mpiexec -n {num_ranks}', or make an MpiTransport of a communicator that "
                "has the group's ranks"
            )
        transport = cls(world, timeout_seconds)
        if distributed:
            try:
                # Every rank sees all of them, so that all fail together.
                ranks = transport.all_gather(np.array([dist.get_rank(group)]))[:, 0].tolist()
                if ranks != list(range(transport.num_ranks)):
                    raise ValueError(
                        f"rank {dist.get_rank(group)}: transport='mpi': MPI's ranks 0, 1, ... "
                        f"have the ranks {ranks} in the process group: give "
                        "init_process_group the rank and size of MPI.COMM_WORLD"
                    )
            except BaseException:
                transport.close()
                raise
        return transport

    def all_gather(self, values: Ints) -> Ints:
        """See ``Transport.all_gather``. MPI does not tell which peer was silent."""
        mine = np.array(values, dtype=np.int64)
        everyone = np.empty((self.num_ranks, len(mine)), dtype=np.int64)
        with self._until_done("gathering sizes") as pending:
            request = self._communicator.Iallgather(mine, everyone)
            pending.append(_Pending(request, None, receives=False))
        return everyone

    def exchange(
        self, shard: Shard, plan: Plan, out: Tensor, peers: Sequence[int] | None = None
    ) -> None:
        """See ``Transport.exchange``.

        Raises:
            ValueError: records that are not in CPU memory.
        """
        _check_device(out.device)
        record_bytes = out.shape[1]
        places = out.split(plan.receive_counts.tolist())
        slots = np.split(plan.send_slots, np.cumsum(plan.send_counts)[:-1])
        # Every rank begins with its neighbour, so that no rank is everybody's first.
        order = [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]
        others = [peer for peer in order if peers is None or peer in peers]
        outgoing = torch.empty(
            (sum(len(slots[peer]) for peer in others), record_bytes), dtype=torch.uint8
        )
        blocks = outgoing.split([len(slots[peer]) for peer in others])
        with self._until_done("exchanging records") as pending, self._record(record_bytes) as unit:
            for peer in others:
                if len(places[peer]):
                    message = [places[peer].numpy(), len(places[peer]), unit]
                    request = self._communicator.Irecv(message, peer, RECORDS_TAG)
                    pending.append(_Pending(request, peer, receives=True))
            for peer, block in zip(others, blocks, strict=True):
                if len(block):
                    shard.gather(slots[peer], block)
                    message = [block.numpy(), len(block), unit]
                    request = self._communicator.Isend(message, peer, RECORDS_TAG)
                    pending.append(_Pending(request, peer, receives=False))
            if peers is None or self.rank in peers:
                shard.gather(slots[self.rank], places[self.rank])

    def interrupt(self) -> None:
        """See ``Transport.interrupt``."""
        self._closed = True

    def close(self) -> None:
        """See ``Transport.close``."""
        if self._closed:
            return
        self._closed = True
        # Freeing is collective: after a fault, not every rank may come to it.
        if self._fault is None and not self._mpi.Is_finalized():
            self._communicator.Free()

    @contextmanager
    def _record(self, record_bytes: int) -> Iterator[object]:
        """A record as a datatype: so a message may be larger than 2 GiB in any MPI."""
        unit = self._mpi.BYTE.Create_contiguous(record_bytes).Commit()
        try:
            yield unit
        finally:
            unit.Free()  # what is under way keeps it

    @contextmanager
    def _until_done(self, doing: str) -> Iterator[list[_Pending]]:
        """Collects requests, and waits for them at the end of the block.

        Raises:
            PeerLostError: they are not done within the timeout, or MPI reports a fault. What
                is under way is cancelled where MPI can do so, else left to MPI.
            BufferClosedError: after ``close``, or closed meanwhile.
        """
        if self._fault is not None:
            raise PeerLostError(f"an earlier call failed: {self._fault}", self._fault.peers)
        if self._closed:
            raise BufferClosedError(f"the transport is closed: no more {doing}")
        pending: list[_Pending] = []
        try:
            try:
                yield pending
                self._poll(pending, doing)
            except self._mpi.Exception as error:
                raise PeerLostError(f"MPI reports, while {doing}: {error}") from error
        except BaseException as error:
            # A copy of the error: its traceback would keep the mini-batch alive.
            self._fault = PeerLostError(str(error), getattr(error, "peers", ()))
            with suppress(self._mpi.Exception):
                _abandon(pending)
            raise

    def _poll(self, pending: list[_Pending], doing: str) -> None:
        requests = [each.request for each in pending]
        deadline = time.monotonic() + self.timeout_seconds
        for pause in _pauses():
            is_late = time.monotonic() > deadline
            if self._mpi.Request.Testall(requests):
                return
            if is_late:
                break
            if self._closed:
                raise BufferClosedError(f"the transport was closed while {doing}")
            time.sleep(pause)
        late = [each for each in pending if not each.request.Test()]
        if late:
            raise PeerLostError(
                f"{_silence(late)} for {self.timeout_seconds:g} s (timeout_seconds), while {doing}",
                tuple(sorted({each.peer for each in late if each.peer is not None})),
            )


class _MessageBoard(Board):
    """Notes as messages to everybody: only calls of all ranks, and faults, have one."""

    def __init__(self, communicator: Intracomm) -> None:
        self._communicator = communicator
        self._notes: dict[str, str] = {}

    def post(self, subject: str, note: str) -> None:
        """See ``Board.post``."""
        self._notes[subject] = note
        for peer in range(self._communicator.Get_size()):
            if peer != self._communicator.Get_rank():
                _notes_sent.append(self._communicator.isend((subject, note), peer, NOTES_TAG))
        _notes_sent[:] = [each for each in _notes_sent if not each.Test()]

    def read(self, subject: str) -> str | None:
        """See ``Board.read``."""
        with suppress(RuntimeError):  # MPI reports a fault
            while (message := self._communicator.improbe(tag=NOTES_TAG)) is not None:
                about, note = message.recv()
                self._notes[about] = note
        return self._notes.get(subject)


def _load_mpi() -> ModuleType:
    """The module ``mpi4py.MPI``; importing it initialises MPI.

    Raises:
        ImportError: see ``MpiTransport``.
        ValueError: MPI does not allow calls from several threads, or was not initialised.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise ImportError(
            f"transport='mpi' needs mpi4py and an MPI library ({error}): "
            "pip install 'ritornello[mpi]'"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ValueError(
            "transport='mpi': MPI is not initialised, or was finalised: call "
            "MPI.Init_thread(MPI.THREAD_MULTIPLE) first, or leave mpi4py.rc.initialize as it is"
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise ValueError(
            "transport='mpi': the buffer calls MPI from a thread of its own, but MPI was "
            "initialised without MPI.THREAD_MULTIPLE: leave mpi4py.rc.threads and "
            "mpi4py.rc.thread_level as they are, or use an MPI library that supports it"
        )
    module: ModuleType = MPI
    return module


def _check_device(device: torch.device) -> None:
    """Raises ValueError for records elsewhere than in CPU memory."""
    if device.type != "cpu":
        raise ValueError(
            f"transport='mpi' moves records in CPU memory only, but they lie on {device}: use "
            "storage='cpu', or transport='collective'"
        )


def _pauses() -> Iterator[float]:
    """How long to sleep between looks, in seconds, without end."""
    for _ in range(NUM_YIELDS):
        yield 0.0
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)


def _silence(late: list[_Pending]) -> str:
    """Who was awaited, and for what."""
    parts = []
    for receives, fault in ((True, "sent nothing"), (False, "took nothing")):
        peers = sorted(
            {each.peer for each in late if each.receives is receives and each.peer is not None}
        )
        if peers:
            names = ", ".join(map(str, peers))
            parts.append(f"rank{'s' if len(peers) > 1 else ''} {names} {fault}")
    return " and ".join(parts) or "a peer sent nothing"


def _abandon(pending: list[_Pending]) -> None:
    """Cancels what can be cancelled; the rest keeps its memory until the process ends."""
    # First of all, lest an error below frees memory that MPI still writes to.
    _abandoned.extend(each.request for each in pending)
    for each in pending:
        if not each.request.Test() and each.receives:
            each.request.Cancel()
            each.request.Test()
