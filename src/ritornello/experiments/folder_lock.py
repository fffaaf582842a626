"""One job per output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"
"""The file in the folder; it stays there, and only says who had it last."""


@contextmanager
def locked(folder: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, which is made if need be.

    The system takes the lock away with the process, however it ends; a forked process does not
    inherit it. Where the file system has no locks, nothing is locked.

    Args:
        folder: to lock.
        wait_seconds: for another process that is about to end.

    Raises:
        FileExistsError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with (folder / NAME).open("a+") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    break
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise FileExistsError(
                        f"--output {folder}: another job is writing there ({file.read()}); wait "
                        "for its end, or give another folder"
                    ) from None
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
