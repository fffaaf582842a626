"""Files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ritornello.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK = ".lock"


NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def write_text(path: Path, text: str) -> None:
    """Writes a file beside the old one, and renames it; it is on disk then."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a crash, or a link to somewhere else
    try:
        with open(partial, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until what was renamed or removed in a folder is so on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> int:
    """Keeps other jobs out of a folder until ``unlock``, or the end of this process.

    Raises:
        CheckpointError: another one is in it.
        OSError: it cannot be written.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{folder}: another job is saving a buffer there; give each job a folder of its own"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning("%s: its file system has no locks; no other job may save there", folder)
    return descriptor


def unlock(descriptor: int) -> None:
    """Lets others in."""
    with contextlib.suppress(OSError):
        # Closing alone would not do: a forked process, such as a DataLoader's, has it open, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Between ``lock`` and ``unlock``."""
    descriptor = lock(folder)
    try:
        yield
    finally:
        unlock(descriptor)


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


def checked_count(value: Any, most: int = 2**62) -> int:
    """A non-negative integer out of JSON.

    Raises:
        ValueError: it is none, or not below ``most``.
    """
    if type(value) is not int or not 0 <= value < most:
        raise ValueError(f"{reprlib.repr(value)} must be a non-negative integer")
    return value
