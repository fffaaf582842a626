"""Files that are there as a whole or not at all, whatever happens; and locks on folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ritornello.errors import CheckpointError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""How the names end of what is not yet whole."""

LOCK = ".lock"
"""The file in a folder that is locked; it stays there."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


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
        # No link, which may lead out of the folder; and no pipe, which would block.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no ordinary file")
    return descriptor


class FolderInUseError(Exception):
    """Another job has locked a folder."""


def lock(folder: Path, *, is_inherited: bool = True) -> int:
    """Keeps other jobs out of a folder until ``unlock``, or the end of this process.

    Where the file system has no locks, nothing is locked, and a warning says so.

    Args:
        folder: to lock.
        is_inherited: whether the lock also keeps out this process itself, but is shared by those
            that are forked from it, until the last of them has ended. Else it is the other way
            round.

    Returns:
        The descriptor of the file ``LOCK``, open for writing.

    Raises:
        FolderInUseError: another one is in it.
        OSError: it cannot be written.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    take = fcntl.flock if is_inherited else fcntl.lockf
    try:
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise FolderInUseError from None
            raise
        logger.warning("%s: its file system has no locks; no other job may save there", folder)
    return descriptor


def unlock(descriptor: int) -> None:
    """Lets others in."""
    with contextlib.suppress(OSError):
        # Closing alone would not do: a forked process, such as a DataLoader's, has it open, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
