"""A save under way: one rank's shard is written piece by piece, while the rounds go on."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.saving.files import PARTIAL, open_to_read, sync_folder, unlock, write_text
from ritornello.saving.folder import (
    lock_to_save,
    locked_to_save,
    now,
    random_id,
    remove_leftovers,
    replace_manifest,
    shard_name,
)
from ritornello.saving.manifest import Manifest, SavedFile
from ritornello.saving.shard_file import PIECE_BYTES, new_shard_file
from ritornello.transports.agreement import gather_counts, together
from ritornello.transports.base import Transport

logger = logging.getLogger(__name__)

TIDY_SECONDS = 1.0
"""How long a save that is given up waits for its running step, to end it and remove its files."""

FILES_SECONDS = 15.0
"""How long rank 0 waits, where nobody waits for the save any more, for files that do not grow."""

POLL_SECONDS = 0.02
"""How often rank 0 looks whether the other ranks' files are there."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank saves: the buffer between two steps.

    Attributes:
        manifest: the same on every rank; without files.
        arrays: small, copies.
        rows: uint8 ``[num_held, record_bytes]``, the shard itself; not copied.
        pages: its pages, all of them, if samples differ in length; not copied.
        page_numbers: int64, which of them are saved, in that order.
    """

    manifest: Manifest
    arrays: Arrays
    rows: Tensor
    pages: Tensor | None = None
    page_numbers: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Of what is saved of rows and pages."""
        num_rows, record_bytes = self.rows.shape
        if self.pages is None:
            return (num_rows, record_bytes), None
        return (num_rows, record_bytes), (len(self.page_numbers), self.pages.shape[1])


class _Part:
    """Rows of which a copy is being written, while they may be overwritten.

    Args:
        rows: uint8 ``[n, row_bytes]``.
        numbers: int64 ``[m]``, which of them, in that order; None: all.
        to_host: gives some of them in CPU memory.
    """

    def __init__(
        self, rows: Tensor, numbers: Ints | None, to_host: Callable[[Tensor], Bytes]
    ) -> None:
        self._rows, self._numbers, self._to_host = rows, numbers, to_host
        self._places: Ints | None = None
        if numbers is not None:
            self._places = np.full(len(rows), -1)
            self._places[numbers] = np.arange(len(numbers))
        self.num_rows = len(rows) if numbers is None else len(numbers)
        self._first_kept = 0  # what is before it is written
        self._kept: dict[int, Bytes] = {}

    def keep(self, numbers: Ints) -> None:
        """Sets aside some rows, before others are written there."""
        places = numbers if self._places is None else self._places[numbers]
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if self._first_kept <= place < self.num_rows and place not in self._kept:
                self._kept[place] = self._to_host(self._rows[number : number + 1])[0].copy()

    def pieces(self) -> Iterator[Bytes]:
        """All of them as they were, a piece at a time."""
        num_at_once = max(1, PIECE_BYTES // max(1, self._rows.shape[1]))
        for first in range(0, self.num_rows, num_at_once):
            yield self._piece(first, min(first + num_at_once, self.num_rows))

    def _piece(self, first: int, end: int) -> Bytes:
        if self._numbers is None:
            piece = self._to_host(self._rows[first:end])
        else:
            piece = self._to_host(self._rows[torch.from_numpy(self._numbers[first:end])])
        kept = [place for place in range(first, end) if place in self._kept] if self._kept else []
        if kept:
            piece = piece.copy()
            for place in kept:
                piece[place - first] = self._kept.pop(place)
        self._first_kept = end
        return piece

    def end(self) -> None:
        """Nothing more needs to be kept."""
        self._first_kept = self.num_rows
        self._kept.clear()


class SaveUnderWay:
    """A save under way.

    The shard is written a piece at a time. In between rounds may go on: what is about to be
    overwritten and is not yet on disk is set aside.

    Args:
        folder: on a file system that all ranks share.
        snapshot: of this rank.
        save_id: the same on every rank.
        to_host: gives rows of the shard in CPU memory.
        transport: to the other ranks.
        in_background: whether the worker calls ``step`` between rounds; each piece is then brought
            to the disk at once, so that no step takes long. Else ``wait`` does all the work.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Snapshot,
        save_id: str,
        to_host: Callable[[Tensor], Bytes],
        transport: Transport,
        in_background: bool,
    ) -> None:
        self._folder, self._snapshot, self._save_id = folder, snapshot, save_id
        self._transport, self._in_background = transport, in_background
        self._rows = _Part(snapshot.rows, None, to_host)
        self._pages: _Part | None = None
        if snapshot.pages is not None:
            self._pages = _Part(snapshot.pages, snapshot.page_numbers, Tensor.numpy)
        self._rank, self._num_ranks = transport.rank, transport.num_ranks
        self._steps = self._run()
        self._lock: int | None = None
        self._error: Exception | None = None
        self._stepping = threading.Lock()
        self._written = threading.Event()
        self._ended = threading.Event()
        self._files_due = math.inf  # when rank 0 must have seen the files of all
        self._patience_seconds = transport.timeout_seconds  # for files that do not grow
        self._given_up = False

    def begin(self) -> None:
        """Takes the folder. All ranks call it.

        Raises:
            CheckpointError: on every rank: another save is under way there, it does not fit, or
                the folder cannot be made or is not the same for all.
            PeerLostError: another rank is gone.
        """
        try:
            _, pages = self._snapshot.shapes
            in_pages = int(gather_counts(self._transport, math.prod(pages or (0,))).sum())
            together(self._transport, self._take_folder, "save")
            together(self._transport, lambda: self._check_folder(in_pages), "save")
        except BaseException:
            self.give_up()
            raise

    def _take_folder(self) -> None:
        """Rank 0 keeps other jobs out, removes what crashes left, and leaves a mark."""
        if self._rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise CheckpointError(
                    f"{self._folder} cannot be made: it, or a part of its path, is there and is no "
                    "folder"
                ) from error
            self._lock = lock_to_save(self._folder)
            remove_leftovers(self._folder)
            self._mark.touch()

    def _check_folder(self, num_bytes_in_pages: int) -> None:
        if not self._mark.exists():
            raise CheckpointError(
                f"{self._folder}: rank {self._rank} does not see what rank 0 has made there; all "
                "ranks must save in one folder, on a file system that they share"
            )
        manifest = self._snapshot.manifest
        needed = manifest.num_held * manifest.record_bytes + num_bytes_in_pages
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise CheckpointError(
                f"{self._folder} has {free / 1e9:.3g} GB free, but the buffer needs "
                f"{needed / 1e9:.3g} GB (beside the save before, until it is replaced)"
            )

    @property
    def _mark(self) -> Path:
        return self._folder / self._name(0, "begun")

    def keep(self, slots: Ints) -> None:
        """Sets aside the records at some slots, before others are written there."""
        with self._stepping:  # the trainer's thread may call it, too, while the worker writes
            self._rows.keep(slots)

    def keep_pages(self, numbers: Ints) -> None:
        """Sets aside some pages, before others are written there."""
        assert self._pages is not None
        with self._stepping:
            self._pages.keep(numbers)

    def step(self) -> float | None:
        """Does a part of the work; the worker and who waits for it may both call it.

        Returns:
            After how many seconds it wants to be called again; None: it has ended.
        """
        with self._stepping:
            try:
                pause = next(self._steps)
                if not self._given_up:
                    return pause
            except StopIteration:
                pass
            except Exception as error:
                self._error = error
                if isinstance(error, OSError):
                    self._error = CheckpointError(f"{self._folder} could not be written: {error}")
                logger.warning("rank %d: %s was not saved: %s", self._rank, self._folder, error)
            except BaseException:  # an interrupt where no worker is left to do it
                self._error = CheckpointError(f"{self._folder}: the save was interrupted")
                self._end()
                raise
            self._end()
        return None

    def wait(self) -> None:
        """Waits until the save is on disk. All ranks call it, after as many updates.

        Raises:
            CheckpointError: on every rank, if some rank could not save. The save before is intact.
            PeerLostError: another rank is gone.
        """
        try:
            together(self._transport, lambda: self._await(self._written), "save")
            # Now rank 0 finds all the files, and says so before the others lose patience.
            self._files_due = time.monotonic() + self._transport.timeout_seconds / 2
            together(self._transport, lambda: self._await(self._ended), "save")
        except BaseException:
            self.give_up()
            raise

    def write(self) -> None:
        """Writes what is left of this rank's file; raises nothing."""
        while not self._written.is_set() and self.step() is not None:
            pass

    def finish(self, patience_seconds: float) -> None:
        """Does what is left, on each rank alone; a warning says what went wrong.

        Args:
            patience_seconds: how long rank 0 waits for other ranks' files that do not grow.
        """
        self._patience_seconds = min(patience_seconds, self._patience_seconds)
        while (pause := self.step()) is not None:
            time.sleep(pause)
        if self._error is not None:
            self.give_up()

    def give_up(self) -> None:
        """Ends it; the save before stays the one that counts.

        Only rank 0 removes what was written: it alone knows whether the manifest counts it.
        """
        self._given_up = True
        if not self._stepping.acquire(timeout=TIDY_SECONDS):
            return  # the step that runs will end it
        try:
            self._end()
            if self._rank == 0:
                with contextlib.suppress(CheckpointError, OSError), locked_to_save(self._folder):
                    remove_leftovers(self._folder)
        finally:
            self._stepping.release()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do on this rank."""
        return self._ended.is_set()

    def _await(self, event: threading.Event) -> None:
        """Brings it to where it says so on this rank; raises what went wrong."""
        while not event.is_set() and (pause := self.step()) is not None:
            time.sleep(pause)
        if self._error is not None:
            raise self._error
        if self._given_up:
            raise CheckpointError(f"{self._folder}: the save was given up")

    def _run(self) -> Iterator[float]:
        yield from self._write()
        self._written.set()
        if self._rank == 0:
            yield from self._find_files()
            if not self._given_up:
                self._commit()

    def _write(self) -> Iterator[float]:
        """Writes this rank's file."""
        path = self._folder / self._name(self._rank, "safetensors")
        with new_shard_file(path, self._snapshot.arrays, *self._snapshot.shapes) as file:
            yield 0.0
            for part in (self._pages, self._rows):
                for piece in part.pieces() if part is not None else ():
                    file.write(piece.reshape(-1))
                    if self._in_background:
                        file.sync()
                    yield 0.0
        about = SavedFile(path.name, file.num_bytes, file.sha256)
        write_text(self._folder / self._name(self._rank, "json"), json.dumps(asdict(about)))

    def _find_files(self) -> Iterator[float]:
        """Waits until the files of all ranks are there."""
        grew, missing = time.monotonic(), list(range(self._num_ranks))
        sizes = self._num_bytes_of(missing)
        while missing := [
            rank for rank in missing if not (self._folder / self._name(rank, "json")).exists()
        ]:
            patience_seconds = self._patience_seconds
            if time.monotonic() > min(grew + patience_seconds, self._files_due):
                before, sizes = sizes, self._num_bytes_of(missing)
                if sizes.items() <= before.items() or time.monotonic() > self._files_due:
                    raise CheckpointError(
                        f"{self._folder}: the files of rank(s) {missing} are not there; all ranks "
                        "must save in one folder, on a file system that they share, and write at "
                        f"most {patience_seconds:g} s longer than others (timeout_seconds)"
                    )
                grew = time.monotonic()
            yield POLL_SECONDS

    def _num_bytes_of(self, ranks: list[int]) -> dict[int, int]:
        """How much of their files some ranks have written so far."""
        found = {}
        for rank in ranks:
            path = self._folder / self._name(rank, "safetensors")
            for each in (path, path.with_name(path.name + PARTIAL)):
                with contextlib.suppress(OSError):
                    found[rank] = each.stat().st_size
        return found

    def _commit(self) -> None:
        """Makes this save the one that counts."""
        files = []
        for rank in range(self._num_ranks):
            with open(open_to_read(self._folder / self._name(rank, "json")), "rb") as file:
                files.append(SavedFile(**json.load(file)))
        sync_folder(self._folder)
        replace_manifest(
            self._folder,
            self._snapshot.manifest.with_files(tuple(files), self._save_id, now()),
        )
        with contextlib.suppress(OSError):  # it is saved all the same
            remove_leftovers(self._folder)

    def _end(self) -> None:
        self._steps = iter(())
        for part in (self._rows, self._pages):
            if part is not None:
                part.end()
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None
        self._written.set()
        self._ended.set()

    def _name(self, rank: int, ending: str) -> str:
        return f"{shard_name(rank, self._num_ranks, self._save_id)}.{ending}"


def new_save_id(transport: Transport) -> str:
    """A name for a save that was never used, the same on every rank."""
    return f"{int(transport.all_gather(np.array([random_id()]))[0, 0]):016x}"
