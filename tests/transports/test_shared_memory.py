"""What only ranks that share memory can get wrong; the rest is in test_transports.py."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ritornello import PeerLostError, RehearsalBuffer, RoundError
from ritornello.records.shard import Shard
from ritornello.records.storage import Storage
from ritornello.rounds.worker import shut_down
from ritornello.testing import connect_shared_memory, run_ranks, spawn_ranks
from ritornello.transports import SharedMemoryTransport, Transport, open_transport
from ritornello.transports.shared_memory import GATHERED


def records(numbers: np.ndarray, num_words: int = 64) -> np.ndarray:
    """int64 ``[n, num_words + 1]``: a number, multiples of it, and their sum."""
    words = numbers[:, None] * np.arange(1, num_words + 1)
    return np.concatenate([words, words.sum(axis=1, keepdims=True)], axis=1)


def num_torn_records(num_rounds: int, num_words: int = 64) -> int:
    """Rounds on 3 ranks in which some writes pause with half of each record missing."""
    dice = np.random.default_rng(0)

    def rank_main(end: Transport) -> int:
        num_torn = 0
        with RehearsalBuffer(
            30, num_representatives=4, selection="fifo", label=None, transport=end
        ) as buffer:
            for step in range(num_rounds):
                mine = records((3 * step + end.rank) * 10 + np.arange(5), num_words)
                drawn = buffer.update(torch.from_numpy(mine)).numpy()[5:]
                num_torn += int((drawn != records(drawn[:, 0], num_words)).any(axis=1).sum())
                if dice.random() < 0.1:
                    time.sleep(dice.random() * 0.002)
        return num_torn

    write = Shard.write

    def slow_write(self: Shard, slots: Any, rows: torch.Tensor, index: Any) -> None:
        if dice.random() < 0.2:
            half = rows.clone()
            half[:, rows.shape[1] // 2 :] = 0
            write(self, slots, half, index)
            time.sleep(dice.random() * 0.002)
        write(self, slots, rows, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "write", slow_write)
        return sum(run_ranks(connect_shared_memory(3), rank_main))


@pytest.mark.parametrize("num_words", [64, 2200], ids=["small", "large"])
def test_no_record_is_read_while_it_is_written(num_words: int) -> None:
    assert num_torn_records(400, num_words) == 0


@pytest.mark.parametrize("num_words", [64, 2200], ids=["small", "large"])
def test_without_the_waiting_that_would_be_noticed(
    num_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = SharedMemoryTransport._wait
    monkeypatch.setattr(
        SharedMemoryTransport,
        "_wait",
        lambda self, kind, *rest: wait(self, kind, *rest) if kind == GATHERED else None,
    )
    assert num_torn_records(200, num_words) > 0


def test_gathering_never_mixes_turns() -> None:
    dice = np.random.default_rng(1)

    def rank_main(end: Transport) -> bool:
        for turn in range(500):
            values = end.all_gather(np.array([turn, end.rank]))
            assert values.tolist() == [[turn, rank] for rank in range(4)]
            if dice.random() < 0.05:
                time.sleep(dice.random() * 0.001)
        return True

    assert all(run_ranks(connect_shared_memory(4), rank_main))


def test_after_an_interrupt_the_other_readers_are_still_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (end,) = connect_shared_memory(1)
    assert isinstance(end, SharedMemoryTransport)
    end._readers, awaited = [1, 2, 3], list[int]()

    def wait(kind: int, senders: list[int], doing: str) -> None:
        if not awaited:
            awaited.append(0)
            return
        awaited.extend(senders)
        if len(awaited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(end, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        end.await_readers()
    end.await_readers()
    assert awaited == [0, 2, 2, 1]  # the first one, 3, was there
    end.await_readers()
    assert awaited == [0, 2, 2, 1]
    end.close()


def test_a_neighbour_that_closes_is_reported_at_once() -> None:
    def rank_main(end: Transport) -> float:
        if end.rank == 1:
            end.close()
            return 0.0
        began = time.monotonic()
        with pytest.raises(PeerLostError, match=r"rank 1 has closed its buffer, while gathering"):
            end.all_gather(np.zeros(1, dtype=np.int64))
        return time.monotonic() - began

    assert max(run_ranks(connect_shared_memory(2), rank_main)) < 5.0


def _killed_in_the_middle(rank: int) -> Any:
    buffer = RehearsalBuffer(40, num_representatives=6, timeout_seconds=30.0)
    assert isinstance(buffer._transport, SharedMemoryTransport)
    for step in range(200):
        if rank == 1 and step == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            buffer.update((torch.zeros(4), torch.arange(4)))
        except PeerLostError as error:
            return error.peers, time.monotonic() - began
    return "went on"


def names_in_shared_memory() -> set[str]:
    """Without what pools and MPI of other processes may have at the time."""
    others = ("sem.mp-", "mpich_")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(others)}


def test_a_killed_neighbour_is_named_and_leaves_nothing_behind() -> None:
    before = names_in_shared_memory()
    first, killed = spawn_ranks(2, _killed_in_the_middle)
    assert killed == -signal.SIGKILL
    peers, seconds = first
    assert peers == (1,)
    assert seconds < 5.0
    assert names_in_shared_memory() == before


def test_a_neighbour_is_watched_also_with_many_open_files() -> None:
    """select() refuses descriptors from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    child = subprocess.Popen(["sleep", "60"])
    try:

        def rank_main(end: SharedMemoryTransport) -> str:
            if end.rank == 1:
                return ""
            end._lives[1] = os.pidfd_open(child.pid)
            assert end._lives[1] >= 1024
            assert end._fault_of(1) is None
            child.kill()
            child.wait()
            return str(end._fault_of(1))

        ends = connect_shared_memory(2)
        assert run_ranks(ends, rank_main)[0] == "has ended or was killed"
        for end in ends:
            end.close()
    finally:
        child.kill()
        child.wait()
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_forked_child_that_ends_closes_nothing() -> None:
    def rank_main(end: SharedMemoryTransport) -> list[int]:
        buffer = RehearsalBuffer(9, num_representatives=2, transport=end)
        with buffer:
            for step in range(6):
                if step == 3 and end.rank == 0:
                    process = buffer._process
                    buffer._process = -1  # as a forked child would find it
                    buffer.close()
                    shut_down(buffer._worker, end, buffer._checkpointing, -1, 0.0, 0.0)
                    buffer._process = process
                buffer.update((torch.zeros(4), torch.arange(4)))
            return end._ended.tolist()

    assert run_ranks(connect_shared_memory(2), rank_main)[0] in ([0, 0], [0, 1])


def test_storage_that_cannot_be_shared_is_refused_by_a_given_transport() -> None:
    def rank_main(end: Transport) -> None:
        with RehearsalBuffer(9, num_representatives=2, transport=end, storage="cpu") as buffer:
            buffer.update((torch.zeros(4), torch.arange(4)))
            with pytest.raises(RoundError, match="cannot keep their shards in storage='cpu'"):
                buffer.update((torch.zeros(4), torch.arange(4)))

    run_ranks(connect_shared_memory(2), rank_main)


def _names_of_transports(rank: int) -> list[str]:
    names = []
    auto = Storage.of("auto")
    for supported in (True, False):
        if not supported:
            SharedMemoryTransport.is_supported = staticmethod(lambda: False)  # type: ignore[method-assign]
        transport = open_transport("auto", None, 20.0, auto)
        names.append(type(transport).__name__)
        transport.close()
    for name, storage, expected in (
        ("shared_memory", auto, "needs Linux"),
        ("shared_memory", Storage.of("cpu"), "cannot read shards in storage='cpu'"),
    ):
        with pytest.raises(ValueError, match=expected):
            open_transport(name, None, 20.0, storage)
    assert dist.is_initialized()
    return names


def test_auto_takes_shared_memory_where_there_is_any() -> None:
    expected = ["SharedMemoryTransport", "CollectiveTransport"]
    assert spawn_ranks(2, _names_of_transports) == [expected] * 2


def test_shared_memory_is_refused_across_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ritornello.transports.opening import _share_memory

    class Apart(SharedMemoryTransport):
        def __init__(self, inner: Transport) -> None:
            super().__init__(inner, hosts=[0, 1])

    def rank_main(end: SharedMemoryTransport) -> str:
        with pytest.raises(ValueError, match="serves one host, but the ranks are on 2") as caught:
            _share_memory(end._inner, required=True)  # type: ignore[arg-type]
        return str(caught.value)

    ends = connect_shared_memory(2)
    monkeypatch.setattr("ritornello.transports.opening.SharedMemoryTransport", Apart)
    assert all("use 'auto'" in message for message in run_ranks(ends, rank_main))


RANK_SCRIPT = """
import sys
import torch
import torch.distributed as dist
from ritornello import RehearsalBuffer

rank, num_ranks = map(int, sys.argv[1:3])
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=num_ranks)
with RehearsalBuffer(20, num_representatives=3, timeout_seconds=30) as buffer:
    drawn = []
    for step in range(30):
        numbers = 1000 * rank + 10 * step + torch.arange(4)
        drawn += buffer.update((numbers, torch.arange(4)))[0][4:].tolist()
    neighbours = getattr(buffer._transport, "neighbours", None)
    print("neighbours", [] if neighbours is None else neighbours.tolist(), "drawn", drawn)
dist.destroy_process_group()
"""


def play_scripts(folder: Path, prefixes: list[list[str]]) -> list[list[str]]:
    """Runs ranks as scripts, each behind its own command; what each printed of both."""
    store = f"file://{folder / 'store'}"
    script = folder / "rank.py"
    script.write_text(RANK_SCRIPT)
    processes = [
        subprocess.Popen(
            [*prefix, sys.executable, str(script), str(rank), str(len(prefixes)), store],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    try:
        printed = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (folder / "store").unlink(missing_ok=True)
    return [each.removeprefix("neighbours ").strip().split(" drawn ") for each in printed]


def test_a_rank_in_a_container_of_its_own_uses_the_network(tmp_path: Path) -> None:
    """A process namespace, as containers have: its memory cannot be opened from outside."""
    contained = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        subprocess.run([*contained, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make a process namespace (root can): {error}")
    together = play_scripts(tmp_path, [[], [], []])
    apart = play_scripts(tmp_path, [[], [], contained])
    assert [neighbours for neighbours, _ in together] == ["[0, 1, 2]"] * 3
    assert [neighbours for neighbours, _ in apart] == ["[0, 1]", "[0, 1]", "[2]"]
    assert [drawn for _, drawn in together] == [drawn for _, drawn in apart]
