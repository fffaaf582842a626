"""What test_mpi.py starts on every rank: ``mpiexec -n N python -m mpi4py mpi_ranks.py NAME``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

from ritornello import PeerLostError, RehearsalBuffer
from ritornello.errors import BufferClosedError
from ritornello.testing import TransportConformance
from ritornello.transports.mpi import MpiTransport

sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a script
import test_ragged
from test_distributed_buffer import augmented_batches

WORLD = MPI.COMM_WORLD


class MpiConformance(TransportConformance):
    """The suite, with ranks that are processes: each plays only its own."""

    def _play(
        self, num_ranks: int, rank_main: Callable[[Any], Any], timeout_seconds: float = 30.0
    ) -> list[Any]:
        assert num_ranks <= WORLD.size
        ranks = WORLD.Split(0 if WORLD.rank < num_ranks else MPI.UNDEFINED)
        if ranks == MPI.COMM_NULL:
            return []
        transport = MpiTransport(ranks, timeout_seconds)
        try:
            return [rank_main(transport)]
        finally:
            transport.close()
            ranks.Free()


def conformance() -> None:
    for name in sorted(dir(MpiConformance)):
        if name.startswith("test_"):
            getattr(MpiConformance(), name)()


def buffer(folder: str) -> None:
    for asynchronous in (True, False):
        transport = MpiTransport(WORLD, 30.0)
        batches = augmented_batches(transport, asynchronous=asynchronous)
        torch.save(batches, Path(folder) / f"{WORLD.rank}-{asynchronous}.pt")
    seen = test_ragged.play(MpiTransport(WORLD, 30.0), True)
    torch.save(seen, Path(folder) / f"{WORLD.rank}-ragged.pt")


def silence() -> None:
    """Rank 1 comes to nothing; the job ends nonetheless."""
    WORLD.Barrier()  # one may have imported everything half a second before the other
    transport = MpiTransport(WORLD, 0.5)
    if WORLD.rank == 1:
        time.sleep(2.0)
        return
    busy = time.process_time()
    with pytest.raises(PeerLostError, match=r"rank 1 took nothing for 0.5 s \(timeout_seconds\)"):
        # Too large to be under way before the peer asks for it.
        TransportConformance._exchange_rounds(transport, [9, 0], 2**22, num_rounds=1)
    with pytest.raises(PeerLostError, match="an earlier call failed: rank 1 took") as caught:
        transport.all_gather(np.zeros(1))
    assert caught.value.peers == (1,)
    transport.close()
    with pytest.raises(PeerLostError, match="a peer sent nothing .* private communicator"):
        MpiTransport(WORLD, 0.5)
    assert time.process_time() - busy < 0.5, "waiting kept the core busy"


def parted(folder: str) -> None:
    """Rank 0 saves, alone."""
    sizes = {"capacity": 8, "num_representatives": 2, "num_candidates": 4}
    with RehearsalBuffer(**sizes, transport="mpi", timeout_seconds=60.0) as buffer:
        for _ in range(5):
            buffer.update((torch.arange(8), torch.arange(8)))
        with pytest.raises(PeerLostError, match="in a round: all ranks must call .*save"):
            if WORLD.rank == 0:
                buffer.save(folder)
            for _ in range(100):
                buffer.update((torch.arange(8), torch.arange(8)))


def refusals() -> None:
    with pytest.raises(ValueError, match="records in CPU memory only, but they lie on cuda"):
        MpiTransport.beside(None, 5.0, torch.device("cuda"))
    transport = MpiTransport.beside(None, 5.0)
    with pytest.raises(ValueError, match="records in CPU memory only, but they lie on meta"):
        transport.exchange(None, None, torch.empty(0, device="meta"))  # type: ignore[arg-type]
    transport.close()
    with pytest.raises(BufferClosedError, match="the transport is closed"):
        transport.all_gather(np.zeros(1))

    halves = WORLD.Split(WORLD.rank)
    between = halves.Create_intercomm(0, WORLD, 1 - WORLD.rank)
    with pytest.raises(ValueError, match="intercommunicator"):
        MpiTransport(between, 5.0)  # type: ignore[arg-type]


def groups(folder: str) -> None:
    for name, rank, num_ranks, message in [
        ("alone", 0, 1, r"has 1 rank\(s\), but the MPI job has 2: .* 'mpiexec -n 1'"),
        ("other", 1 - WORLD.rank, 2, r"have the ranks \[1, 0\] in the process group"),
        ("same", WORLD.rank, 2, None),
    ]:
        path = f"{folder}/{name}-{WORLD.rank if num_ranks == 1 else 'all'}"
        dist.init_process_group(
            "gloo", store=dist.FileStore(path, num_ranks), rank=rank, world_size=num_ranks
        )
        if message is None:
            MpiTransport.beside(None, 10.0).close()
        else:
            with pytest.raises(ValueError, match=message):
                MpiTransport.beside(None, 10.0)
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenes = (conformance, buffer, silence, parted, refusals, groups)
    {each.__name__: each for each in scenes}[sys.argv[1]](*sys.argv[2:])
