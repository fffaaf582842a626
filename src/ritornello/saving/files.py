"""Files that are there as a whole or not at all, whatever happens; and locks on folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ritornello.errors import CheckpointError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""How the names end of what is not yet whole."""

LOCK = ".lock"
"""The file in a folder that is locked; it stays there."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def folder_at(given: Any) -> Path:
    """A folder's path as it is now, wherever the process goes later.

    Args:
        given: text, bytes or a path.

    Raises:
        TypeError, ValueError: it can be no folder's path.
    """
    if not isinstance(given, (str, bytes, os.PathLike)):
        raise TypeError(f"folder={given!r}: it must be the path of a folder")
    path = os.fsdecode(given)
    if not path or "\0" in path:
        raise ValueError(f"folder={given!r}: a folder's path has a character, and none that is NUL")
    return Path(path).absolute()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of the one before when it is whole.

    It is on disk then; its name is, too, after ``sync_folder``. Nothing is left of it if the block
    raises.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # of a crash, or a link to somewhere else
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a ``new_file``; it is on disk then, with its name."""
    with new_file(path) as file:
        file.write(text.encode())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until what was renamed or removed in a folder is so on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_read(path: Path) -> int:
    """Opens an ordinary file of a saved buffer; its descriptor.

    Raises:
        CheckpointError: it is not there, or none.
    """
    try:
        return _open_ordinary(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _open_ordinary(path: Path, flags: int) -> int:
    """Opens a file that is no link, which may lead out of the folder, and no pipe or device.

    Raises:
        CheckpointError: it is one.
        OSError: it cannot be opened.
    """
    try:
        # A pipe must not block.
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise CheckpointError(f"{path} is no ordinary file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no ordinary file")
    return descriptor


class FolderInUseError(Exception):
    """Another job has locked a folder."""


_locks: set[int] = set()
"""The descriptors of all folders that this process has locked."""

_forking = threading.RLock()
"""Held while ``_locks`` changes, and while a process forks."""


def _let_go() -> None:
    """Closes what a forked process has inherited: it must not keep a folder when its job has ended.

    A lock goes with the last descriptor of the open file, whoever has that.
    """
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()
    _forking.release()


os.register_at_fork(
    before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_let_go
)


def lock(folder: Path) -> int:
    """Keeps others out of a folder until ``unlock``, or the end of this process, however it ends.

    Also keeps out other threads of this process; processes that are forked from it do not inherit
    it. Where the file system has no locks, nothing is locked, and a warning says so.

    Args:
        folder: to lock.

    Returns:
        The descriptor of the file ``LOCK``, open for writing.

    Raises:
        FolderInUseError: another one is in it.
        CheckpointError: the file is a link, or no file at all.
        OSError: it cannot be written.
    """
    with _forking:
        descriptor = _open_ordinary(folder / LOCK, os.O_RDWR | os.O_CREAT)
        _locks.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            _close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise FolderInUseError from None
            raise
        logger.warning("%s: its file system has no locks; no other job may save there", folder)
    return descriptor


def unlock(descriptor: int) -> None:
    """Lets others in. Does nothing in a forked process, which does not have the lock."""
    if descriptor not in _locks:
        return
    with contextlib.suppress(OSError):
        # Closing alone would not do for processes that were forked without Python's knowledge.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    _close(descriptor)


def _close(descriptor: int) -> None:
    with _forking:
        _locks.discard(descriptor)
        os.close(descriptor)
