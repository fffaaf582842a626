"""Calls that only some ranks make, and ranks that make different buffers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello import PeerLostError, RehearsalBuffer
from ritornello.testing import (
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, Transport

NUM_STEPS = 12
"""Of 8 samples on each rank: all shards are full, and no sizes are gathered any more."""


def mini_batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (10 * step + rank) * 100 + torch.arange(8)
    return numbers, torch.arange(8) % 3


def connect_two_hosts(num_ranks: int) -> list[Any]:
    return connect_shared_memory(num_ranks, hosts=[0, 1, 0, 1][:num_ranks])


CONNECTIONS = [LocalTransport.connect, connect_collective, connect_shared_memory, connect_two_hosts]

CALLS: dict[str, Callable[[RehearsalBuffer, str], Any]] = {
    "save": lambda buffer, folder: buffer.save(folder),
    "wait_until_saved": lambda buffer, _: buffer.wait_until_saved(),
    "load": lambda buffer, folder: buffer.load(folder),
    "load_state_dict": lambda buffer, _: buffer.load_state_dict({}),
    "state_dict": lambda buffer, _: buffer.state_dict(whole=True),
    "measure_distances": lambda buffer, _: buffer.measure_distances(lambda batch: batch[0][:, None].float()),
    "begin_task": lambda buffer, _: buffer.begin_task("new"),
}


@pytest.mark.parametrize("connect", CONNECTIONS)
@pytest.mark.parametrize("num_steps", [1, NUM_STEPS])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_call_on_one_rank_while_the_others_train(connect, num_steps, asynchronous, tmp_path) -> None:
    messages = _part(connect, "save", num_steps, asynchronous, str(tmp_path / "save"))
    assert all("must call save, after as many updates" in m for m in messages), messages

@pytest.mark.parametrize("call", CALLS)
def test_every_call(call, tmp_path) -> None:
    messages = _part(connect_shared_memory, call, NUM_STEPS, True, str(tmp_path / "save"))
    assert all(f"must call {call}, after as many updates" in m for m in messages), messages

def _part(connect, call, num_steps, asynchronous, folder):
    def rank_main(transport: Transport) -> str:
        sampling = "grasp" if call == "measure_distances" else "uniform"
        with RehearsalBuffer(
            24, num_representatives=4, transport=transport, timeout_seconds=60.0, sampling=sampling, asynchronous=asynchronous
        ) as buffer:
            for step in range(num_steps):
                buffer.update(mini_batch(transport.rank, step))
            len(buffer)
            began = time.monotonic()
            with pytest.raises(PeerLostError) as caught:
                if transport.rank == 0:
                    CALLS[call](buffer, folder)
                for step in range(num_steps, num_steps + 100):
                    buffer.update(mini_batch(transport.rank, step))
            assert time.monotonic() - began < 20.0
            return str(caught.value)
    r = run_ranks(connect(3), rank_main)
    print("\n".join(r))
    return r
