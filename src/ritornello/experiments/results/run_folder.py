"""A run's folder: one job at a time writes into it, and what is there is whole at any moment.

A run that is extended is replaced as a whole, and goes on living under the same names::

    FOLDER/results.json, model.pt, buffer/     the run as it is (and averaged.pt, strategy.pt)
    FOLDER/extension/                          what will take its place; of no importance until ...
    FOLDER/extended/                           ... it is renamed to this, when all is on disk

From the rename on, what is in ``extended`` counts; its parts are then moved to their places. If a
crash comes in between, ``part_of`` finds each part where it is, and ``finish`` moves the rest.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ritornello.saving.files import (
    LOCK,
    FolderInUseError,
    lock,
    sync_folder,
    unlock,
    write_text,
)

IN_WORK, COMPLETE = "extension", "extended"

PARTS = ("model.pt", "averaged.pt", "strategy.pt", "buffer", "results.json")


def part_of(folder: Path, name: str) -> Path:
    """Where one of ``PARTS`` is now; it need not exist."""
    waiting = folder / COMPLETE / name
    return waiting if waiting.exists() else folder / name


def replace(folder: Path) -> None:
    """Has what is ``IN_WORK`` take the place of what there was."""
    work = folder / IN_WORK
    sync_folder(work)  # the files are on disk already
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


@contextmanager
def locked(folder: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, which is made if need be.

    The system takes the lock away with the process, however it ends; a forked process does not
    inherit it. The file ``LOCK`` says who had it last.

    Args:
        folder: to lock.
        wait_seconds: for another process that is about to end.

    Raises:
        FileExistsError: another process holds the lock.
        CheckpointError: the file ``LOCK`` is a link, or no file at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder, time.monotonic() + wait_seconds)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        unlock(descriptor)


def _lock(folder: Path, deadline: float) -> int:
    while True:
        try:
            return lock(folder)
        except FolderInUseError:
            if time.monotonic() > deadline:
                raise FileExistsError(
                    f"--output {folder}: another job is writing there "
                    f"({(folder / LOCK).read_text()}); wait for its end, or give another folder"
                ) from None
        time.sleep(0.2)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there as a whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1))
