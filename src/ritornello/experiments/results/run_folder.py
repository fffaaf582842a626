"""A run's folder that is replaced as a whole, and goes on living under the same names.

::

    FOLDER/results.json, model.pt, buffer/     the run as it is
    FOLDER/extension/                          what will take its place; of no importance until ...
    FOLDER/extended/                           ... it is renamed to this, when all is on disk

From the rename on, what is in ``extended`` counts; its parts are then moved to their places. If a
crash comes in between, ``part_of`` finds each part where it is, and ``finish`` moves the rest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ritornello.saving.files import sync_folder

IN_WORK, COMPLETE = "extension", "extended"

PARTS = ("model.pt", "buffer", "results.json")


def part_of(folder: Path, name: str) -> Path:
    """Where one of ``PARTS`` is now; it need not exist."""
    waiting = folder / COMPLETE / name
    return waiting if waiting.exists() else folder / name


def replace(folder: Path) -> None:
    """Has what is ``IN_WORK`` take the place of what there was."""
    work = folder / IN_WORK
    for name in ("model.pt", "results.json"):  # the buffer is on disk already
        with (work / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(work)
    work.rename(folder / COMPLETE)
    sync_folder(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Ends a ``replace`` that a crash has interrupted; does nothing if there was none."""
    complete = folder / COMPLETE
    if not complete.exists():
        return
    for name in PARTS:
        new, old = complete / name, folder / name
        if new.exists():
            if old.is_dir():  # which nothing can be renamed to
                old.rename(complete / f"old-{name}")
            new.rename(old)
    sync_folder(folder)
    shutil.rmtree(complete)


PARTIAL = ".partial"


def on_disk(file: IO[Any]) -> None:
    """Has what was written into a file on disk, before anything relies on it."""
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Has the names in a folder on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, content: Any) -> None:
    """Writes beside, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.write(json.dumps(content, indent=1))
        on_disk(file)
    beside.replace(path)
