"""A run's folder that is replaced as a whole, and goes on living under the same names.

::

    FOLDER/results.json, model.pt, buffer/     the run as it is
    FOLDER/extension/                          what will take its place; of no importance until ...
    FOLDER/extended/                           ... it is renamed to this, when all is on disk

From the rename on, what is in ``extended`` counts; its parts are then moved to their places. If a
crash comes in between, ``part_of`` finds each part where it is, and ``finish`` moves the rest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ritornello.checkpoint import sync_folder

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
