"""Files are whole or not there; a locked folder belongs to one job."""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_streams import batch_of, make, saved_after

from ritornello import CheckpointError, forget
from ritornello.experiments.results.run_folder import locked
from ritornello.saving.files import FolderInUseError, lock, new_file, unlock, write_text
from ritornello.transports import LocalTransport


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with new_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    write_text(path, "later")
    assert path.read_text() == "later"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_error_leaves_the_one_before(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(type(error)), new_file(path) as file:
        file.write(b"af")
        raise error
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_a_crash_left_is_written_anew(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "file.partial").symlink_to(victim)
    write_text(tmp_path / "file", "new")
    assert victim.read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "victim"]


def test_one_job_at_a_time(tmp_path: Path) -> None:
    def lock_elsewhere() -> None:
        process = multiprocessing.get_context("spawn").Process(target=_lock_once, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode in (0, 1)
        if process.exitcode:
            raise FolderInUseError

    mine = lock(tmp_path)
    for lock_again in (lock_elsewhere, lambda: lock(tmp_path)):
        with pytest.raises(FolderInUseError):
            lock_again()
    unlock(mine)
    lock_elsewhere()
    unlock(lock(tmp_path))


def _lock_once(folder: Path) -> None:
    try:
        unlock(lock(folder))
    except FolderInUseError:
        os._exit(1)


FORKING = """
import os, sys, threading, time
from pathlib import Path
from ritornello.saving.files import lock, unlock

folder = Path(sys.argv[1])
held = [lock(folder / "a"), lock(folder / "b")]
unlock(held[0])
if os.fork() == 0:
    unlock(held[1])  # has no effect here
    print(os.getpid(), flush=True)
    time.sleep(100)
os.kill(os.getpid(), 9)
"""


def test_a_lock_ends_with_its_job_whatever_that_has_forked(tmp_path: Path) -> None:
    """Such as a DataLoader's worker that outlives a job that was killed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        child = int(job.stdout.readline())
        job.wait()
        try:
            unlock(lock(tmp_path / "b"))
            os.kill(child, 0)  # it still runs
        finally:
            os.kill(child, signal.SIGKILL)


def test_processes_that_are_forked_meanwhile_get_no_lock(tmp_path: Path) -> None:
    """In another thread, at any moment."""
    stop = threading.Event()

    def lock_again_and_again() -> None:
        while not stop.is_set():
            unlock(lock(tmp_path))

    locking = threading.Thread(target=lock_again_and_again)
    locking.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                targets = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
                os._exit(any(each.endswith(".lock") for each in targets))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        locking.join()


NO_FILES: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to(path.with_name("victim")),
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "named pipe": lambda path: os.mkfifo(path),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "folder": lambda path: path.mkdir(),
    "socket": lambda path: _make_socket(path),
}


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_locked_is_an_ordinary_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    victim = tmp_path / "victim"
    victim.write_text("mine")
    try:
        NO_FILES[kind](Path(".lock"))
    except PermissionError:
        pytest.skip("needs root, to make a device")
    descriptors = len(os.listdir("/proc/self/fd"))
    message = rf"{tmp_path}/\.lock is no ordinary file"
    with make(LocalTransport()) as buffer:
        buffer.update(batch_of(0, 0))
        with pytest.raises(CheckpointError, match=message):
            buffer.save(tmp_path)
        with pytest.raises(CheckpointError, match=message), locked(tmp_path):
            pass
        saved_after(tmp_path / "saved", 1, 3)
        Path("saved/.lock").unlink()
        NO_FILES[kind](Path("saved/.lock"))
        with pytest.raises(CheckpointError, match=r"saved/\.lock is no ordinary file"):
            forget(tmp_path / "saved", {"label": 0})
        Path(".lock").rmdir() if kind == "folder" else Path(".lock").unlink()
        buffer.save(tmp_path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    unlock(lock(tmp_path))
    assert f"{tmp_path}: its file system has no locks; no other job may save there" in caplog.text
