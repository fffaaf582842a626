"""Ranks of a ``torch.distributed`` group: gloo for records in CPU memory, NCCL or the like."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from ritornello.arrays import Ints
from ritornello.errors import PeerLostError
from ritornello.records.digest import digest
from ritornello.records.shard import Shard
from ritornello.transports.base import Transport
from ritornello.transports.board import StoreBoard
from ritornello.transports.plan import Plan

RECORDS_TAG, SIZES_TAG, NO_TAG = range(3)
"""What a message is; none has the last."""

GATHERING, EXCHANGING = "gathering sizes", "exchanging records"
MAKING = "making the buffer's private process group"

GRACE_SECONDS = 1.0
"""How much later than this rank others may find out that one has died."""

WARN_SECONDS = 10.0
"""After which a rank that makes its buffer says for whom it waits."""

logger = logging.getLogger(__name__)


class CollectiveTransport(Transport):
    """Sends each peer at most one message a round, and only if there are records for it.

    Records in CPU memory go by gloo's send and receive, those on an accelerator by one all-to-all
    of its own backend, such as NCCL, that skips empty pairs. Sizes go from everybody to everybody
    at once: gloo's ring would take the network's latency once for each rank, and not tell who is
    silent.

    Args:
        group: a process group that nobody else uses (collectives of two threads on one group
            silently mix), with a gloo backend, and the accelerator's if shards lie on one.
        rank: this rank in the group.
        num_ranks: its size.
        timeout_seconds: the group's timeout.
        on_close: called once by ``close``, to give the group back.
        store: of all ranks, for the board of this buffer alone.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        num_ranks: int,
        timeout_seconds: float,
        on_close: Callable[[], None] | None = None,
        store: Store | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout_seconds = timeout_seconds
        self._group = group
        self._on_close = on_close
        self.board = None if store is None else StoreBoard(store)

    @classmethod
    def beside(
        cls, group: dist.ProcessGroup | None, timeout_seconds: float, device: torch.device
    ) -> CollectiveTransport:
        """A transport with a private group of the ranks of ``group``.

        Blocks until all of them have called it.

        Args:
            group: None for the default group.
            timeout_seconds: of the private group.
            device: where the shards lie.

        Raises:
            PeerLostError: not all ranks came within the timeout.
        """
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        rank = dist.get_rank(group)
        timeout = timedelta(seconds=timeout_seconds)
        if device.type == "cpu":
            store = _meet(ranks, rank, timeout_seconds)
            private: Any = _connect(store, rank, len(ranks), timeout_seconds)
            return cls(private, rank, len(ranks), timeout_seconds, store=store)
        with _lost_peers(MAKING, timeout_seconds):
            # NCCL's communicators need the rest that PyTorch keeps of its groups.
            private = dist.new_group(
                ranks,
                timeout=timeout,
                backend=backends_for(device),
                use_local_synchronization=len(ranks) < dist.get_world_size(),
            )

        def give_back() -> None:
            if dist.is_initialized():
                dist.destroy_process_group(private)

        store = PrefixStore(
            f"ritornello/{private.group_name}", dist.distributed_c10d._get_default_store()
        )
        return cls(private, dist.get_rank(private), len(ranks), timeout_seconds, give_back, store)

    def all_gather(self, values: Ints) -> Ints:
        """See ``Transport.all_gather``."""
        mine = torch.from_numpy(np.array(values, dtype=np.int64))
        everyone = mine.repeat(self.num_ranks, 1)
        works = []
        for peer in self._peers():
            with _lost_peers(GATHERING, self.timeout_seconds, (peer,)):
                works.append((peer, self._group.recv([everyone[peer]], peer, SIZES_TAG)))
                works.append((peer, self._group.send([mine], peer, SIZES_TAG)))
        self._await(works, GATHERING)
        return everyone.numpy()

    def exchange(
        self, shard: Shard, plan: Plan, out: Tensor, peers: Sequence[int] | None = None
    ) -> None:
        """See ``Transport.exchange``."""
        send_slots, counts_to_send = plan.send_slots, plan.send_counts
        if peers is not None:
            chosen = np.isin(np.arange(self.num_ranks), peers)
            send_slots = send_slots[chosen.repeat(counts_to_send)]
            counts_to_send = np.where(chosen, counts_to_send, 0)
        outgoing = torch.empty(
            (len(send_slots), out.shape[1]), dtype=torch.uint8, device=out.device
        )
        shard.gather(send_slots, outgoing)
        send_counts, receive_counts = counts_to_send.tolist(), plan.receive_counts.tolist()
        if out.device.type != "cpu":
            assert peers is None
            with _lost_peers(EXCHANGING, self.timeout_seconds):
                self._group.alltoall_base(out, outgoing, receive_counts, send_counts).wait()
            return
        blocks = outgoing.split(send_counts)
        places = out.split(receive_counts)
        if peers is None or self.rank in peers:
            places[self.rank].copy_(blocks[self.rank])
        works = []
        for peer in self._peers():
            if peers is not None and peer not in peers:
                continue
            with _lost_peers(EXCHANGING, self.timeout_seconds, (peer,)):
                if receive_counts[peer]:
                    works.append((peer, self._group.recv([places[peer]], peer, RECORDS_TAG)))
                if send_counts[peer]:
                    works.append((peer, self._group.send([blocks[peer]], peer, RECORDS_TAG)))
        self._await(works, EXCHANGING)

    def interrupt(self) -> None:
        """See ``Transport.interrupt``."""
        if self._group is None or self.num_ranks == 1:
            return
        # A receive that times out closes all connections of its gloo group.
        with suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
            self._group.recv([nothing], self._peers()[0], NO_TAG).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """See ``Transport.close``."""
        on_close, self._on_close, self._group = self._on_close, None, None
        if on_close is not None:
            on_close()

    def _peers(self) -> list[int]:
        """The other ranks; every rank begins with its neighbour: none is everybody's first."""
        return [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]

    def _await(self, works: list[tuple[int, Any]], doing: str) -> None:
        """Waits for all, no longer than the timeout together."""
        deadline = time.monotonic() + self.timeout_seconds
        for peer, work in works:
            with _lost_peers(doing, self.timeout_seconds, (peer,)):
                # Gloo takes 0 for "no limit of its own".
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))


def backends_for(device: torch.device) -> str:
    """A group's backends for tensors on an accelerator, and for those in CPU memory.

    Raises:
        ValueError: PyTorch has none for the device.
    """
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def _meet(ranks: list[int], rank: int, timeout_seconds: float) -> PrefixStore:
    """Waits until all have come; gives them a store of their own.

    PyTorch names groups by a number that it counts up with each of them, on every rank for
    itself. If some ranks had a buffer and others none, the numbers would differ from then on, and
    the next group that all ranks make would wait in vain. So this counts for itself.

    Raises:
        PeerLostError: not all came within the timeout; names those.
    """
    store = dist.distributed_c10d._get_default_store()
    # An elastic launcher's store outlives the ranks that it starts again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"ritornello/{attempt}/{digest('-'.join(map(str, ranks)))}"
    with _lost_peers(MAKING, timeout_seconds):
        # None of them makes its next one before all have come to this one.
        count = store.add(name, 1)
        own = PrefixStore(f"{name}/{(count - 1) // len(ranks)}", store)
        own.set(f"here/{rank}", "")
        if count % len(ranks) == 0:
            own.set("all", "here")

    def missing() -> tuple[int, ...]:
        return tuple(each for each in range(len(ranks)) if not own.check([f"here/{each}"]))

    began = time.monotonic()
    for seconds in (min(WARN_SECONDS, timeout_seconds), timeout_seconds):
        try:
            own.wait(["all"], timedelta(seconds=max(0.001, seconds + began - time.monotonic())))
            return own
        except RuntimeError:
            if seconds < timeout_seconds:
                logger.warning(
                    "rank %d has waited %g s for rank(s) %s to make their RehearsalBuffer: all "
                    "ranks must make it",
                    rank,
                    seconds,
                    list(missing()),
                )
    with _lost_peers(MAKING, timeout_seconds):
        store.add(name, -1)  # so that they can try again
        late = missing()
    raise PeerLostError(
        f"rank(s) {list(late)} did not come within {timeout_seconds:g} s (timeout_seconds), while "
        f"{MAKING}: all ranks must make a RehearsalBuffer",
        late,
    )


def _connect(
    store: PrefixStore, rank: int, num_ranks: int, timeout_seconds: float
) -> dist.ProcessGroupGloo:
    """A group of ranks that have met.

    Gloo tries five times, each for the whole timeout: so a thread of its own waits for it.

    Raises:
        PeerLostError: a rank has died meanwhile; within the timeout.
    """
    made = queue.SimpleQueue[dist.ProcessGroupGloo | RuntimeError]()

    def make() -> None:
        try:
            timeout = timedelta(seconds=timeout_seconds)
            made.put(dist.ProcessGroupGloo(store, rank, num_ranks, timeout))
        except RuntimeError as error:
            made.put(error)

    threading.Thread(target=make, name="ritornello-connects", daemon=True).start()
    began = time.monotonic()
    try:
        found = made.get(timeout=timeout_seconds)
    except queue.Empty:
        found = RuntimeError("no answer")
    with suppress(RuntimeError):
        store.set(f"lives/{rank}", "")
    if not isinstance(found, RuntimeError):
        return found
    lost = _without_life(store, num_ranks)
    raise PeerLostError(
        f"{f'rank(s) {list(lost)}' if lost else 'a peer'} did not connect within "
        f"{time.monotonic() - began:.3g} s, while {MAKING}: {str(found).splitlines()[0]}",
        lost,
    ) from found


def _without_life(store: PrefixStore, num_ranks: int) -> tuple[int, ...]:
    """Who has neither connected nor waited in vain; nobody, where the store cannot be asked."""
    lost = set(range(num_ranks))
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(RuntimeError):
        while lost and time.monotonic() < deadline:
            lost = {each for each in lost if not store.check([f"lives/{each}"])}
            time.sleep(0.01)
        return tuple(sorted(lost))
    return ()


@contextmanager
def _lost_peers(doing: str, timeout_seconds: float, peers: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns an error of torch.distributed into a PeerLostError that says what was awaited."""
    try:
        yield
    except RuntimeError as error:
        who = f"rank {peers[0]}" if peers else "a peer"
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            fault = f"sent nothing for {timeout_seconds:g} s (timeout_seconds)"
        else:
            fault = "has ended, was killed or gave up (its connection is closed)"
        raise PeerLostError(f"{who} {fault}, while {doing}", peers) from error
