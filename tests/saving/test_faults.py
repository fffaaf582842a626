"""What goes wrong around a buffer and its saves: every rank hears of it, and nothing is lost."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ritornello import CheckpointError, PeerLostError, RehearsalBuffer
from ritornello.saving import writing
from ritornello.saving.files import lock, unlock
from ritornello.saving.folder import SavedFolder
from ritornello.saving.shard_file import NewShardFile
from ritornello.testing import connect_collective, connect_shared_memory, run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

RECORD_BYTES = 2**16


def mini_batch(rank: int, step: int, num_samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of 64 KiB, each with a number of its own."""
    numbers = (step * 64 + rank) * 64 + torch.arange(num_samples)
    images = torch.zeros(num_samples, RECORD_BYTES // 8 - 1, dtype=torch.int64)
    images[:, 0] = numbers
    return images, numbers % 3


def make(end: Transport, capacity: int = 64, **arguments: Any) -> RehearsalBuffer:
    return RehearsalBuffer(capacity, num_representatives=2, transport=end, **arguments)


def run_on(buffer: RehearsalBuffer, rank: int, first: int, num_steps: int) -> list[int]:
    """Some steps; the numbers of all representatives that came back."""
    seen = []
    for step in range(first, first + num_steps):
        images, _ = buffer.update(mini_batch(rank, step))
        seen += images[4:, 0].tolist()
    return seen


def held(buffer: RehearsalBuffer) -> list[int]:
    return [int(number) for images, _ in buffer.representatives() for number in images[:, 0]]


def num_saved_rounds(folder: Path) -> int:
    """The round at which the save in a folder was made; reads and checks all of it."""
    saved = SavedFolder(folder)
    for rank in range(saved.manifest.num_ranks):
        for _ in saved.checked_rows(rank):
            pass
    return saved.manifest.num_rounds


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def error_of(kind: type[BaseException], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.fixture(autouse=True)
def nothing_in_shared_memory() -> Iterator[None]:
    """Fails a test that leaves something with a name in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    yield
    assert not {n for n in set(os.listdir("/dev/shm")) - before if "ritornello" in n}


@contextlib.contextmanager
def _disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 5 MiB: 80 records."""
    with _disk(tmp_path / "disk", "size=5m") as folder:
        yield folder


# Ranks that die, stop or fail.


def _hold_up_write(act: Callable[[], object]) -> None:
    """Does something when the second piece of a file is written."""
    write, num_writes = NewShardFile.write, 0

    def held_up(self: NewShardFile, data: np.ndarray) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 8:
            act()
        write(self, data)

    NewShardFile.write = held_up  # type: ignore[method-assign]


def _lose_a_rank(rank: int, folder: Path, when: str, number: signal.Signals) -> Any:
    """Saves twice; in the second one rank 1 gets a signal, and if it stops, goes on at the end."""
    processes: list[Any] = [None] * 3
    dist.all_gather_object(processes, os.getpid())
    with RehearsalBuffer(64, num_representatives=2, timeout_seconds=4.0) as buffer:
        run_on(buffer, rank, 0, 8)
        buffer.save(folder)
        run_on(buffer, rank, 8, 4)

        def fall() -> None:
            os.kill(os.getpid(), number)

        if rank == 1 and when in ("save", "background"):
            _hold_up_write(fall)
        if rank == 1 and when == "between":
            fall()
        began = time.monotonic()
        try:
            if when == "update":
                run_on(buffer, rank, 12, 2)
                if rank == 1:
                    fall()
                run_on(buffer, rank, 14, 9)
            buffer.save(folder, background=when == "background")
            run_on(buffer, rank, 30, 3)
            buffer.wait_until_saved()
        except PeerLostError as error:
            return str(error), error.peers, time.monotonic() - began
        finally:
            if rank == 0:
                # Rank 2 has a moment to lose its patience, too.
                time.sleep(2.0)
                if number == signal.SIGSTOP:
                    os.kill(processes[1], signal.SIGCONT)
    return "nothing raised"


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGKILL, "between"),
        (signal.SIGKILL, "save"),
        (signal.SIGKILL, "background"),
        (signal.SIGSTOP, "update"),
        (signal.SIGSTOP, "save"),
    ],
)
def test_a_rank_is_lost(number: signal.Signals, when: str, tmp_path: Path) -> None:
    first, lost, third = spawn_ranks(3, _lose_a_rank, tmp_path, when, number)
    for rank, outcome in ((0, first), (2, third)):
        assert isinstance(outcome, tuple), outcome
        message, peers, seconds = outcome
        assert message.startswith(f"rank {rank}: ")
        assert 1 in peers or peers == (2 - rank,), message
        assert seconds < 30.0
    assert 1 in first[1] or 1 in third[1]
    if number == signal.SIGKILL:
        assert lost == -signal.SIGKILL
    else:
        # Its file may be gone before it hears that its peers are.
        assert isinstance(lost, (tuple, CheckpointError)), lost
    assert num_saved_rounds(tmp_path) == 8
    with make(LocalTransport()) as buffer:  # and the folder can be used again
        buffer.load(tmp_path)
        assert len(buffer) == 64
        buffer.save(tmp_path)
    assert len(files_in(tmp_path)) == 3


def _fail_in_training(rank: int) -> str:
    with RehearsalBuffer(64, num_representatives=2, timeout_seconds=20.0) as buffer:
        for step in range(50):
            buffer.update(mini_batch(rank, step))
            if rank == 1 and step == 10:
                raise ZeroDivisionError("in the training code")
    return "nothing raised"


def test_a_rank_raises_in_its_training_code() -> None:
    first, raised, third = spawn_ranks(3, _fail_in_training)
    assert isinstance(raised, ZeroDivisionError)
    for outcome in (first, third):
        assert isinstance(outcome, PeerLostError), outcome
    named = {peer for outcome in (first, third) for peer in outcome.peers}  # type: ignore[union-attr]
    assert 1 in named


@pytest.mark.parametrize("connect", [connect_collective, connect_shared_memory])
@pytest.mark.parametrize("num_steps", [3, 30], ids=["filling", "full"])
def test_a_save_after_unequally_many_updates(
    connect: Callable[..., Any], num_steps: int, tmp_path: Path
) -> None:
    def rank_main(end: Transport) -> str:
        with make(end, timeout_seconds=2.0) as buffer:
            run_on(buffer, end.rank, 0, num_steps + end.rank)
            return error_of(Exception, lambda: buffer.save(tmp_path))

    messages = run_ranks(connect(2, timeout_seconds=2.0), rank_main)
    assert any("equally often" in each or "after as many" in each for each in messages), messages
    assert "manifest.json" not in files_in(tmp_path)


# Disks.


def test_a_disk_that_is_too_small(small_disk: Path) -> None:
    folder = small_disk / "save"

    together = threading.Barrier(2)

    def rank_main(end: Transport) -> str:
        with make(end, 100) as buffer:
            run_on(buffer, end.rank, 0, 4)  # 32 records
            buffer.save(folder)
            together.wait(30.0)
            files = files_in(folder)
            run_on(buffer, end.rank, 4, 12)
            message = error_of(CheckpointError, lambda: buffer.save(folder))
            together.wait(30.0)
            assert files_in(folder) == files
            assert num_saved_rounds(folder) == 4
            together.wait(30.0)
            run_on(buffer, end.rank, 16, 2)
            if end.rank == 0:
                subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
            together.wait(30.0)
            buffer.save(folder)
            return message

    for rank, message in enumerate(run_ranks(LocalTransport.connect(2), rank_main)):
        assert f"rank {rank}: {folder} has 0.00" in message
        assert "GB free, but the buffer needs 0.00655 GB" in message
    assert num_saved_rounds(folder) == 18


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
@pytest.mark.parametrize("when", ["shard", "manifest"])
def test_a_disk_that_becomes_full_meanwhile(
    when: str, background: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = small_disk / "save", small_disk / "other"

    def fill() -> None:
        with open(other, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**12))

    together = threading.Barrier(2)

    def rank_main(end: Transport) -> str:
        with make(end, 32) as buffer:
            run_on(buffer, end.rank, 0, 4)
            buffer.save(folder)
            files = files_in(folder)
            together.wait(30.0)
            if end.rank == 0:
                if when == "shard":
                    monkeypatch.setattr(NewShardFile, "write", NewShardFile.write)
                    _hold_up_write(fill)
                else:
                    commit = writing.SaveUnderWay._commit
                    monkeypatch.setattr(
                        writing.SaveUnderWay, "_commit", lambda self: (fill(), commit(self))
                    )
            together.wait(30.0)
            run_on(buffer, end.rank, 4, 2)

            def save() -> None:
                buffer.save(folder, background=background)
                run_on(buffer, end.rank, 6, 2)
                buffer.wait_until_saved()

            message = error_of(CheckpointError, save)
            run_on(buffer, end.rank, 20, 2)
            together.wait(30.0)
            assert files_in(folder) == files
            assert num_saved_rounds(folder) == 4
            if end.rank == 0:
                other.unlink()
                monkeypatch.undo()
            together.wait(30.0)
            buffer.save(folder)
            return message

    messages = run_ranks(LocalTransport.connect(2), rank_main)
    assert any("No space left on device" in each and str(folder) in each for each in messages)
    assert all("failed on rank" in each or "could not be written" in each for each in messages)
    assert num_saved_rounds(folder) in (8, 10)


def test_a_read_only_disk(small_disk: Path) -> None:
    (small_disk / "save").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 2)
            return error_of(CheckpointError, lambda: buffer.save(small_disk / "save"))

    first, second = run_ranks(LocalTransport.connect(2), rank_main)
    assert "rank 0: save failed: [Errno 30] Read-only file system" in first
    assert second == "rank 1: save failed on rank(s) [0]: see the error there"


# Folders.


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 2)
        for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
            assert "file" in error_of(CheckpointError, lambda f=folder: buffer.save(f))
        run_on(buffer, 0, 2, 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_not_all_ranks_share(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 2)
            folder = tmp_path / f"{end.rank}"
            message = error_of(CheckpointError, lambda: buffer.save(folder))
            buffer.save(tmp_path / "shared")
            return message

    first, second = run_ranks(LocalTransport.connect(2), rank_main)
    assert first == "rank 0: save failed on rank(s) [1]: see the error there"
    assert "rank 1 does not see what rank 0 has made there; all ranks must save in one" in second
    assert num_saved_rounds(tmp_path / "shared") == 2
    assert files_in(tmp_path / "0") == {".lock"}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_a_file_that_never_comes(
    asynchronous: bool, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 neither waits for ever, nor longer than the others wait for it."""
    write_text = writing.write_text

    def lossy(path: Path, text: str) -> None:
        if not path.name.startswith("shard-00001"):
            write_text(path, text)

    monkeypatch.setattr(writing, "write_text", lossy)

    def rank_main(end: Transport) -> str:
        with make(end, asynchronous=asynchronous) as buffer:
            run_on(buffer, end.rank, 0, 2)

            def save() -> None:
                buffer.save(tmp_path, background=background)
                buffer.wait_until_saved()

            message = error_of(CheckpointError, save)
            run_on(buffer, end.rank, 2, 2)
            return message

    first, second = run_ranks(LocalTransport.connect(2, timeout_seconds=3.0), rank_main)
    assert f"rank 0: {tmp_path}: the files of rank(s) [1] are not there; all ranks must" in first
    assert "failed on rank(s) [0]" in second
    assert files_in(tmp_path) == {".lock"}


def test_a_folder_that_vanishes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "save"

    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 4)
            buffer.save(folder, background=True)
            if end.rank == 0:
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(tmp_path / "elsewhere")
            run_on(buffer, end.rank, 4, 2)
            message = ""
            try:
                buffer.wait_until_saved()
            except CheckpointError as error:
                message = str(error)
            run_on(buffer, end.rank, 6, 2)
            buffer.save(folder)
            return message

    messages = run_ranks(LocalTransport.connect(2, timeout_seconds=4.0), rank_main)
    assert (messages[0] == "") == (messages[1] == ""), messages
    assert num_saved_rounds(folder) == 8


# Jobs.


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    other_job = lock(tmp_path)

    together = threading.Barrier(2)

    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 2)
            message = error_of(CheckpointError, lambda: buffer.save(tmp_path))
            together.wait(30.0)
            if end.rank == 0:
                unlock(other_job)
            together.wait(30.0)
            buffer.save(tmp_path)
            return message

    first, second = run_ranks(LocalTransport.connect(2), rank_main)
    assert "another job is saving a buffer there; give each job a folder of its own" in first
    assert "save failed on rank(s) [0]: see the error there" in second
    assert num_saved_rounds(tmp_path) == 2


def test_a_forked_process_does_not_keep_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DataLoader's worker, forked while a save ran, has its descriptors for as long as it lives."""
    inherited = []
    flock = fcntl.flock

    def forked_meanwhile(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if operation & fcntl.LOCK_EX:
            inherited.append(os.dup(descriptor))

    monkeypatch.setattr(fcntl, "flock", forked_meanwhile)
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 2)
        buffer.save(tmp_path)
        run_on(buffer, 0, 2, 1)
        buffer.save(tmp_path)
    for descriptor in inherited:
        os.close(descriptor)
    assert len(inherited) == 2
    assert num_saved_rounds(tmp_path) == 3


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 2)
        buffer.save(tmp_path)
    assert num_saved_rounds(tmp_path) == 2
    assert "its file system has no locks" in caplog.text


@pytest.mark.parametrize(
    "text", ["{", '{"format": "ritornello rehearsal buffer", "format_version": 9}']
)
def test_nothing_is_removed_where_the_manifest_is_not_understood(text: str, tmp_path: Path) -> None:
    """Until a whole save has taken its place: its files may be worth keeping."""
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 2)
        buffer.save(tmp_path)
        files = files_in(tmp_path)
        (tmp_path / "manifest.json").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "replace_manifest", lambda *_: (_ for _ in ()).throw(OSError()))
            error_of(CheckpointError, lambda: buffer.save(tmp_path))
        assert files_in(tmp_path) >= files
        buffer.save(tmp_path)
    assert num_saved_rounds(tmp_path) == 2


def test_a_save_follows_no_links(tmp_path: Path) -> None:
    """Where others may write into the folder, they cannot have other files overwritten."""
    (tmp_path / "folder").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "folder" / "manifest.json.partial").symlink_to(victim)
    (tmp_path / "folder" / "manifest.json").symlink_to(victim)
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 2)
        buffer.save(tmp_path / "folder")
    assert victim.read_text() == "mine"
    assert num_saved_rounds(tmp_path / "folder") == 2


def _save_again_and_again(folder: Path) -> None:
    torch.set_num_threads(1)
    with make(LocalTransport(), 200, seed=3) as buffer:
        if (folder / "manifest.json").exists():
            buffer.load(folder)
        step = SavedFolder(folder).manifest.num_offers if len(buffer) else 0
        while True:
            run_on(buffer, 0, step, 3)
            step += 3
            buffer.save(folder, background=step % 2 == 0)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "save", num_kills=5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ranks_that_are_killed_in_any_stage(tmp_path: Path) -> None:
    assert kills.kill_again_and_again(tmp_path, num_kills=4, seed=2).total() == 4


def kill_again_and_again(folder: Path, num_kills: int) -> int:
    """Kills a process that saves; what it leaves must be a state that was to be saved.

    Returns:
        How many of the kills left half-written files behind.
    """
    processes = multiprocessing.get_context("spawn")
    dice = np.random.default_rng(0)
    num_torn = num_before = 0
    with make(LocalTransport(), 200, seed=3) as reference:
        for _ in range(num_kills):
            process = processes.Process(target=_save_again_and_again, args=(folder,))
            process.start()
            deadline = time.monotonic() + 60.0
            # From its first save on, which says that it has begun.
            while _num_offers(folder) <= num_before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(dice.random() * 0.1)
            process.kill()
            process.join()
            process.close()
            names = files_in(folder)
            num_torn += any("partial" in name or "begun" in name for name in names)
            num_offers = _num_offers(folder)
            assert num_offers > num_before
            num_before = num_offers
            num_saved_rounds(folder)  # nothing is damaged
            run_on(
                reference,
                0,
                reference.stats().num_rounds,
                num_offers - reference.stats().num_rounds,
            )
            with make(LocalTransport(), 200, seed=3) as buffer:
                buffer.load(folder)
                assert held(buffer) == held(reference)
    return num_torn


def _num_offers(folder: Path) -> int:
    try:
        return SavedFolder(folder).manifest.num_offers
    except CheckpointError:
        return 0


# Ends.


def test_a_save_after_bad_input(tmp_path: Path) -> None:
    with make(LocalTransport()) as buffer:
        run_on(buffer, 0, 0, 3)
        with pytest.raises(ValueError, match="label -1 is out of range"):
            buffer.update((mini_batch(0, 3)[0], torch.full((4,), -1)))
        buffer.save(tmp_path)
    assert num_saved_rounds(tmp_path) == 3


def test_a_buffer_is_collected_while_it_saves(tmp_path: Path) -> None:
    """No hang, no file, no lock and no descriptor is left."""
    descriptors = len(os.listdir("/proc/self/fd"))
    buffer = make(LocalTransport(), 64)
    run_on(buffer, 0, 0, 16)
    buffer.save(tmp_path)
    files = files_in(tmp_path)
    run_on(buffer, 0, 16, 2)
    buffer.save(tmp_path, background=True)
    del buffer
    gc.collect()
    assert num_saved_rounds(tmp_path) in (16, 18)
    assert len(files_in(tmp_path)) == len(files)
    with make(LocalTransport()) as again:
        run_on(again, 0, 0, 2)
        again.save(tmp_path)
    del again
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_save_whose_peer_has_ended_is_given_up_at_close(tmp_path: Path) -> None:
    """Within the timeout; the save before stays."""

    def rank_main(end: Transport) -> None:
        with make(end, timeout_seconds=3.0) as buffer:
            run_on(buffer, end.rank, 0, 4)
            buffer.save(tmp_path)
            if end.rank == 1:
                _hold_up_write(
                    lambda: time.sleep(30) if False else (_ for _ in ()).throw(OSError())
                )
            buffer.save(tmp_path, background=True)

    write = NewShardFile.write
    try:
        run_ranks(LocalTransport.connect(2, timeout_seconds=3.0), rank_main)
    finally:
        NewShardFile.write = write  # type: ignore[method-assign]
    assert num_saved_rounds(tmp_path) == 4


def test_a_load_waits_for_the_save(tmp_path: Path) -> None:
    def rank_main(end: Transport) -> None:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 8)
            wanted = held(buffer)
            buffer.save(tmp_path, background=True)
            run_on(buffer, end.rank, 8, 8)
            assert held(buffer) != wanted
            buffer.load(tmp_path)
            assert held(buffer) == wanted
            run_on(buffer, end.rank, 8, 2)

    run_ranks(LocalTransport.connect(2), rank_main)


@pytest.mark.parametrize("has_begun", [False, True], ids=["new", "begun"])
def test_a_shard_without_memory_on_one_rank_fails_on_all(
    has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the buffer, which held nothing, is as new: it takes other samples, if it has met none."""

    def fill(end: Transport) -> None:
        with make(end) as buffer:
            run_on(buffer, end.rank, 0, 4)
            buffer.save(tmp_path)

    run_ranks(LocalTransport.connect(2), fill)
    make_shard = LocalTransport.make_shard

    def without_memory(self: LocalTransport, *arguments: Any) -> Any:
        if self.rank == 1:
            raise MemoryError("4.00 GB for the shard do not fit")
        return make_shard(self, *arguments)

    monkeypatch.setattr(LocalTransport, "make_shard", without_memory)

    together = threading.Barrier(2)

    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            if has_begun:
                with pytest.raises(ValueError, match="at least 0"):
                    buffer.update((mini_batch(0, 0)[0], torch.full((4,), -1)))
            message = error_of(CheckpointError, lambda: buffer.load(tmp_path))
            together.wait(30.0)
            monkeypatch.setattr(LocalTransport, "make_shard", make_shard)
            together.wait(30.0)
            if has_begun:
                run_on(buffer, end.rank, 0, 3)
                return message
            for _ in range(3):
                buffer.update((torch.zeros(4), torch.arange(4)))
            return message

    first, second = run_ranks(LocalTransport.connect(2), rank_main)
    assert first == "rank 0: load failed on rank(s) [1]: see the error there"
    assert second == "rank 1: load failed: 4.00 GB for the shard do not fit"
