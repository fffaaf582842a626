from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from ritornello.errors import PeerLostError
from ritornello.records.storage import Storage
from ritornello.testing import (
    TransportConformance,
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import CollectiveTransport, LocalTransport, Transport, open_transport
from ritornello.transports.agreement import check_agreement

AUTO = Storage.of("auto")


class TestLocal(TransportConformance):
    def connect(self, num_ranks: int, timeout_seconds: float) -> Sequence[Transport]:
        return LocalTransport.connect(num_ranks, timeout_seconds)


class TestCollective(TransportConformance):
    def connect(self, num_ranks: int, timeout_seconds: float) -> Sequence[Transport]:
        return connect_collective(num_ranks, timeout_seconds)


class TestSharedMemory(TransportConformance):
    def connect(self, num_ranks: int, timeout_seconds: float) -> Sequence[Transport]:
        return connect_shared_memory(num_ranks, timeout_seconds)


class TestSeveralHosts(TransportConformance):
    """Ranks of one host are not next to each other."""

    def connect(self, num_ranks: int, timeout_seconds: float) -> Sequence[Transport]:
        return connect_shared_memory(num_ranks, timeout_seconds, hosts=[0, 1, 0, 1][:num_ranks])


def test_collective_sends_one_message_per_pair_that_has_records() -> None:
    class CountingGroup:
        def __init__(self, group: object) -> None:
            self.group, self.messages = group, 0

        def send(self, *arguments: object) -> object:
            self.messages += 1
            return self.group.send(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(self.group, name)

    def rank_main(transport: Transport) -> int:
        assert isinstance(transport, CollectiveTransport)
        transport._group = counting = CountingGroup(transport._group)
        # Only rank 2 holds anything, so only it has something to send.
        TransportConformance._exchange_rounds(transport, [0, 0, 9], num_rounds=10)
        return counting.messages

    transports = connect_collective(3)
    assert run_ranks(transports, rank_main) == [0, 0, 20]


def test_a_peer_that_closes_is_reported_at_once() -> None:
    def rank_main(transport: Transport) -> float:
        if transport.rank == 1:
            transport.close()
            return 0.0
        began = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1 has closed its buffer"):
            transport.all_gather(np.zeros(1))
        return time.monotonic() - began

    assert max(run_ranks(LocalTransport.connect(2), rank_main)) < 5.0


@pytest.mark.parametrize("connect", [LocalTransport.connect, connect_collective])
def test_different_arguments_are_named_on_every_rank(connect: object) -> None:
    def rank_main(transport: Transport) -> str:
        with pytest.raises(ValueError, match="different arguments") as caught:
            check_agreement(transport, {"capacity": 10 + transport.rank // 2, "seed": 0})
        return str(caught.value)

    messages = run_ranks(connect(3), rank_main)
    for rank, message in enumerate(messages):
        assert f"rank {rank}: " in message
        assert "capacity is 10 on rank 0, 10 on rank 1, 11 on rank 2" in message
        assert "seed" not in message


def test_opening_by_name() -> None:
    assert isinstance(open_transport("auto", None, 1.0, AUTO), LocalTransport)
    with pytest.raises(ValueError, match="transport='pigeon': there are 'auto'"):
        open_transport("pigeon", None, 1.0, AUTO)
    with pytest.raises(ValueError, match="needs torch.distributed: call"):
        open_transport("collective", None, 1.0, AUTO)
    with pytest.raises(TypeError, match="transport=3"):
        open_transport(3, None, 1.0, AUTO)  # type: ignore[arg-type]
