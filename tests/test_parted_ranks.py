"""Calls that only some ranks make, and ranks that make different buffers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ritornello import PeerLostError, RehearsalBuffer, RoundError, evenly
from ritornello.testing import connect_collective, connect_shared_memory, run_ranks
from ritornello.transports import LocalTransport, Transport, agreement, watch
from ritornello.transports.board import Board

NUM_STEPS = 12
"""Of 8 samples on each rank: all shards are full, and no sizes are gathered any more."""


def mini_batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (10 * step + rank) * 100 + torch.arange(8)
    return numbers, torch.arange(8) % 3


Connect = Callable[[int], list[Any]]


def connect_two_hosts(num_ranks: int) -> list[Any]:
    return connect_shared_memory(num_ranks, hosts=[0, 1, 0, 1][:num_ranks])


CONNECTIONS = [LocalTransport.connect, connect_collective, connect_shared_memory, connect_two_hosts]

CALLS: dict[str, Callable[[RehearsalBuffer, Path], Any]] = {
    "save": lambda buffer, folder: buffer.save(folder),
    "wait_until_saved": lambda buffer, _: buffer.wait_until_saved(),
    "load": lambda buffer, folder: buffer.load(folder),
    "load_state_dict": lambda buffer, _: buffer.load_state_dict({}),
    "state_dict": lambda buffer, _: buffer.state_dict(whole=True),
    "measure_distances": lambda buffer, _: buffer.measure_distances(
        lambda batch: batch[0][:, None]
    ),
    "begin_task": lambda buffer, _: buffer.begin_task("new"),
    "fill": lambda buffer, _: buffer.fill([mini_batch(0, 0)]),
    "evenly": lambda buffer, _: next(iter(evenly([mini_batch(0, 0)], buffer))),
    "protect": lambda buffer, _: buffer.protect(0.5),
}


def test_the_table_has_every_call() -> None:
    assert set(CALLS) == set(agreement.CALLS)


def call_on_rank_0(
    ends: list[Any], call: str, folder: Path, num_steps: int = NUM_STEPS, **options: Any
) -> None:
    """All ranks train; then one is in a call, the others go on training, and all notice at once."""
    options = {"num_representatives": 4} | options

    def rank_main(transport: Transport) -> str:
        sampling = "grasp" if call == "measure_distances" else "uniform"
        with RehearsalBuffer(24, transport=transport, sampling=sampling, **options) as buffer:
            for step in range(num_steps):
                buffer.update(mini_batch(transport.rank, step))
            len(buffer)
            with pytest.raises(PeerLostError) as caught:
                if transport.rank == 0:
                    CALLS[call](buffer, folder)
                for step in range(num_steps, 1000):
                    buffer.update(mini_batch(transport.rank, step))
                    time.sleep(0.001)
            assert caught.value.peers
            assert transport.rank not in caught.value.peers
            return str(caught.value)

    began = time.monotonic()
    for rank, message in enumerate(run_ranks(ends, rank_main)):
        assert message.startswith(f"rank {rank}: "), message
        assert re.search(f"[Aa]ll ranks must call .*{call},? after as many", message), message
        assert "It died" not in message, message
    assert time.monotonic() - began < 30.0  # the timeout is 60


@pytest.mark.parametrize("connect", CONNECTIONS)
@pytest.mark.parametrize("num_steps", [1, NUM_STEPS], ids=["while filling", "when full"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_call_on_one_rank_while_the_others_train(
    connect: Connect, num_steps: int, asynchronous: bool, tmp_path: Path
) -> None:
    call_on_rank_0(connect(3), "save", tmp_path, num_steps, asynchronous=asynchronous)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_all_ranks(call: str, tmp_path: Path) -> None:
    call_on_rank_0(connect_shared_memory(2), call, tmp_path)


def test_rounds_that_need_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, so who goes on training waits for nobody."""
    monkeypatch.setattr(watch, "IDLE_LOOKS", 1)
    call_on_rank_0(connect_shared_memory(2), "save", tmp_path, num_representatives=0)


def test_who_is_slow_has_not_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks come to the same calls, at other times; who waits says so, once."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.1)
    warnings = list[str]()
    monkeypatch.setattr(watch.logger, "warning", lambda text, *of: warnings.append(text % of))

    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(24, num_representatives=4, transport=transport) as buffer:
            for step in range(4 * NUM_STEPS):
                buffer.update(mini_batch(transport.rank, step))
                if step % NUM_STEPS == transport.rank:
                    time.sleep(0.05)
                if step % NUM_STEPS == NUM_STEPS - 1:
                    time.sleep(0.5 * transport.rank * (step == NUM_STEPS - 1))
                    buffer.save(tmp_path)
                    buffer.begin_task(str(step))

    run_ranks(connect_shared_memory(2), rank_main)
    (warning,) = warnings
    assert warning.startswith("rank 0: save has waited 0 s for the other ranks: all ranks must")


def test_a_call_that_the_other_ranks_never_come_to(tmp_path: Path) -> None:
    has_failed = threading.Event()

    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(24, num_representatives=4, transport=transport) as buffer:
            for step in range(NUM_STEPS):
                buffer.update(mini_batch(transport.rank, step))
            if transport.rank == 1:
                assert has_failed.wait(30.0)
                return
            message = r"rank 0: save failed: rank 1 sent nothing for 1 s .*All ranks must call save"
            with pytest.raises(PeerLostError, match=message):
                buffer.save(tmp_path)
            has_failed.set()

    run_ranks(connect_shared_memory(2, timeout_seconds=1.0), rank_main)


# What ranks are fed, and in which order.


def warnings_of(batches: list[Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged where each rank gets one mini-batch several times."""

    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(24, num_representatives=4, transport=transport) as buffer:
            for _ in range(3):
                buffer.update(batches[transport.rank])

    run_ranks(LocalTransport.connect(len(batches)), rank_main)
    return [record.getMessage() for record in caplog.records]


def test_ranks_that_are_fed_the_same(caplog: pytest.LogCaptureFixture) -> None:
    same, other = mini_batch(0, 0), mini_batch(2, 0)
    (message,) = warnings_of([same, other, same], caplog)
    assert message.startswith("ranks [0, 2] have given the same first mini-batch: ")


def test_mini_batches_that_do_not_tell(caplog: pytest.LogCaptureFixture) -> None:
    for num_samples in (0, 4):
        alike = torch.zeros(num_samples, 3), torch.zeros(num_samples, dtype=torch.int64)
        assert warnings_of([alike, alike], caplog) == []


@pytest.mark.parametrize("is_swapped", [False, True])
def test_buffers_that_ranks_make_in_different_order(is_swapped: bool) -> None:
    def rank_main(pair: SimpleNamespace) -> str:
        first, second = (
            RehearsalBuffer(24, num_representatives=4, transport=end) for end in pair.ends
        )
        images, texts = (second, first) if is_swapped and pair.rank == 1 else (first, second)
        with images, texts:
            try:
                for step in range(3):
                    images.update(mini_batch(pair.rank, step))
                    texts.update(mini_batch(pair.rank, step + 50))
            except RoundError as error:
                return str(error)
        return ""

    ends = zip(LocalTransport.connect(2), LocalTransport.connect(2), strict=True)
    pairs = [SimpleNamespace(rank=rank, ends=each) for rank, each in enumerate(ends)]
    messages = run_ranks(pairs, rank_main)  # type: ignore[arg-type]
    assert all(("their buffers in the same order" in m) == is_swapped for m in messages), messages


def test_a_board_out_of_reach_holds_up_no_error(tmp_path: Path) -> None:
    """As where the network is cut: a store's socket waits for ever."""
    has_failed = threading.Event()

    class OutOfReach(Board):
        def post(self, subject: str, note: str) -> None:
            assert has_failed.wait(30.0)

        def read(self, subject: str) -> str | None:
            assert has_failed.wait(30.0)
            return None

    def rank_main(transport: Transport) -> None:
        transport.board = OutOfReach()
        with RehearsalBuffer(24, num_representatives=4, transport=transport) as buffer:
            buffer.update(mini_batch(transport.rank, 0))
            len(buffer)
            if transport.rank == 1:
                assert has_failed.wait(30.0)
                return
            with pytest.raises(PeerLostError, match=r"save failed: rank 1 sent nothing for 1 s"):
                buffer.save(tmp_path)
            has_failed.set()

    run_ranks(connect_shared_memory(2, timeout_seconds=1.0), rank_main)
