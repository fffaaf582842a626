"""Files are whole or not there; a locked folder belongs to one job."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from ritornello.saving.files import FolderInUseError, lock, new_file, unlock, write_text


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


@pytest.mark.parametrize("is_inherited", [True, False])
def test_one_job_at_a_time(is_inherited: bool, tmp_path: Path) -> None:
    def lock_elsewhere() -> None:
        process = multiprocessing.get_context("spawn").Process(target=_lock_once, args=arguments)
        process.start()
        process.join()
        assert process.exitcode in (0, 1)
        if process.exitcode:
            raise FolderInUseError

    arguments = (tmp_path, is_inherited)
    mine = lock(tmp_path, is_inherited=is_inherited)
    with pytest.raises(FolderInUseError):
        lock_elsewhere()
    unlock(mine)
    lock_elsewhere()


def _lock_once(folder: Path, is_inherited: bool) -> None:
    try:
        unlock(lock(folder, is_inherited=is_inherited))
    except FolderInUseError:
        os._exit(1)


def test_a_lock_that_is_inherited_keeps_out_this_process_too(tmp_path: Path) -> None:
    mine = lock(tmp_path)
    with pytest.raises(FolderInUseError):
        lock(tmp_path)
    unlock(mine)
    unlock(lock(tmp_path))


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_file_system_without_locks(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, call, unsupported)
    unlock(lock(tmp_path, is_inherited=call == "flock"))
    assert f"{tmp_path}: its file system has no locks; no other job may save there" in caplog.text
