"""A save in the background counts, however the process that asked for it ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_streams import held, joined, loaded_on, make, on_ranks, run_on

from ritornello import CheckpointError, PeerLostError, RehearsalBuffer, SavedFolder
from ritornello.rounds.worker import Worker
from ritornello.saving import writing
from ritornello.saving.shard_file import NewShardFile
from ritornello.testing import connect_shared_memory, run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

SCRIPT = """
import sys, threading, time
import torch
from ritornello import RehearsalBuffer
from ritornello.saving import writing
from ritornello.saving.shard_file import NewShardFile

writing.PIECE_BYTES = 4096
NewShardFile.sync = lambda self: time.sleep(0.01)  # a slow disk: half a second in all

def saved(name):
    buffer = RehearsalBuffer(64, num_representatives=2)
    for step in range(4):
        buffer.update((torch.full((16, 400), float(step)), torch.arange(16)))
    buffer.save(f"{sys.argv[1]}/{name}", background=True)
    return buffer

for error in (ZeroDivisionError, KeyboardInterrupt):
    try:
        with saved(error.__name__):
            raise error
    except error:
        pass
buffer = saved("collected")
del buffer

def save_late():
    time.sleep(0.5)  # when the main thread has come to its end
    global late
    late = saved("in another thread")

threading.Thread(target=save_late).start()
buffer = saved("at the end")
sys.exit(3)
"""


def test_a_script_that_ends_without_close(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert job.returncode == 3, job.stderr
    assert "not saved" not in job.stderr
    endings = ["ZeroDivisionError", "KeyboardInterrupt", "collected", "in another thread"]
    for name in [*endings, "at the end"]:
        saved = SavedFolder(tmp_path / name)
        assert saved.manifest.num_rounds == 4, name
        assert sum(len(each.slots) for each in saved.representatives(0)) == 64


def _slow_disk(seconds: float) -> None:
    writing.PIECE_BYTES = 48
    NewShardFile.sync = lambda self: time.sleep(seconds)  # type: ignore[method-assign]


_kept: list[RehearsalBuffer] = []


def _end_without_close(rank: int, folder: Path) -> Any:
    """Saves twice; rank 1 needs longer for it."""
    _slow_disk(0.05 * rank)
    error: BaseException | None = None
    with RehearsalBuffer(60, num_representatives=2) as buffer:
        run_on(buffer, rank, range(12))
        buffer.save(folder / "error", background=True)
        try:
            with buffer:
                if rank == 1:
                    raise ZeroDivisionError
                run_on(buffer, rank, range(12, 600))
        except (ZeroDivisionError, PeerLostError) as raised:
            error = raised
    buffer = RehearsalBuffer(60, num_representatives=2)
    _kept.append(buffer)  # until the process ends
    run_on(buffer, rank, range(12))
    buffer.save(folder / "end", background=True)
    return type(error)


def test_ranks_that_end_without_close_or_by_an_error(tmp_path: Path) -> None:
    """The other one loses it in a round, and ends by an error, too; the save counts all the same."""
    ended = spawn_ranks(2, _end_without_close, tmp_path, fresh=True)
    assert ended == [PeerLostError, ZeroDivisionError]
    for name in ("error", "end"):
        assert SavedFolder(tmp_path / name).manifest.num_rounds == 12
        assert len(joined(loaded_on(tmp_path / name, 1, 60, num_candidates=None))) == 60


def test_a_file_that_never_comes_is_waited_for_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given up says so, in time, and the save before stays."""
    stay = threading.Event()

    def rank_main(end: Transport) -> None:
        buffer = make(end, timeout_seconds=60.0)
        run_on(buffer, end.rank, range(3))
        buffer.save(tmp_path)
        run_on(buffer, end.rank, range(3, 6))
        if end.rank == 1:
            monkeypatch.setattr(buffer._worker, "while_idle", lambda work: True)  # never writes
            monkeypatch.setattr(buffer._checkpointing, "write", stay.wait)
        buffer.save(tmp_path, background=True)
        began = time.monotonic()
        buffer._close(0.0, 0.5 * (end.rank == 0))
        if end.rank == 0:
            assert time.monotonic() - began < 30.0
            stay.set()

    with pytest.MonkeyPatch.context() as patch:
        warnings: list[str] = []
        patch.setattr(
            logging.getLogger("ritornello.saving.writing"),
            "warning",
            lambda text, *values: warnings.append(text % values),
        )
        run_ranks(LocalTransport.connect(2, 60.0), rank_main)
    assert len(warnings) == 1
    assert f"rank 0: {tmp_path} was not saved: {tmp_path}: the files of rank(s) [1]" in warnings[0]
    assert SavedFolder(tmp_path).manifest.num_rounds == 3


def test_rank_0_waits_as_long_as_files_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PIECE_BYTES", 48)
    sync = NewShardFile.sync

    def slow(self: NewShardFile) -> None:
        sync(self)
        time.sleep(0.25 * ("ritornello-rank-1" in threading.current_thread().name))

    monkeypatch.setattr(NewShardFile, "sync", slow)

    def rank_main(end: Transport) -> list[tuple[int, int]]:
        buffer = make(end, 60)
        run_on(buffer, end.rank, range(12))
        found = held(buffer)
        buffer.save(tmp_path, background=True)
        if end.rank == 0:
            buffer._close(5.0, 1.0)  # 10 pieces, each in less
        else:
            while buffer._checkpointing._saving.step() is not None:  # type: ignore[union-attr]
                pass
            buffer.close()
        return found

    wanted = joined(on_ranks(2, rank_main))
    assert sorted(joined(loaded_on(tmp_path, 2, 60))) == sorted(wanted)


@pytest.mark.parametrize("connect", [LocalTransport.connect, connect_shared_memory])
def test_a_save_in_the_background_counts_without_a_further_call(
    connect: Any, tmp_path: Path
) -> None:
    def rank_main(end: Transport) -> list[tuple[int, int]]:
        buffer = make(end, asynchronous=False)
        run_on(buffer, end.rank, range(20))
        found = held(buffer)
        buffer.save(tmp_path, background=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / "manifest.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert SavedFolder(tmp_path).manifest.num_rounds == 20
        buffer.close()
        return found

    wanted = joined(run_ranks(connect(3), rank_main))
    assert sorted(joined(loaded_on(tmp_path, 2))) == sorted(wanted)


def test_a_buffer_that_is_collected_on_its_own_thread_ends_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a piece, too: the garbage collector runs wherever it likes."""
    buffers = [make(LocalTransport())]
    run_on(buffers[0], 0, range(10))
    wanted, workers = held(buffers[0]), threading.enumerate()
    (worker,) = [each for each in workers if each.name == "ritornello-rank-0"]
    monkeypatch.setattr(writing, "PIECE_BYTES", 48)
    monkeypatch.setattr(NewShardFile, "sync", lambda self: buffers.clear())
    buffers[0].save(tmp_path, background=True)
    worker.join(20.0)
    assert not worker.is_alive()
    assert buffers == []
    assert loaded_on(tmp_path, 1) == [wanted]
    assert torch.is_tensor(torch.zeros(1))


def test_a_save_that_is_interrupted_where_no_worker_is_left_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[float]:
        yield 0.0
        raise KeyboardInterrupt

    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, range(5))
        monkeypatch.setattr(Worker, "while_idle", lambda self, work: None)
        buffer.save(tmp_path, background=True)
        saving = buffer._checkpointing._saving
        assert saving is not None
        saving._steps = interrupted()
        with pytest.raises(KeyboardInterrupt):
            saving.finish(1.0)
        assert saving.has_ended
        with pytest.raises(CheckpointError, match="the save was interrupted"):
            buffer.wait_until_saved()
        assert not (tmp_path / "manifest.json").exists()
        buffer.save(tmp_path)
    assert SavedFolder(tmp_path).manifest.num_rounds == 5
