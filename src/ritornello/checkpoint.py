"""Saving and restoring a buffer: a folder with a manifest, and a file for each shard.

Files of a save have names of their own, and the manifest, renamed into place when all of them
are on disk, names those that count: so a crash at any moment leaves the last save as it was.
What a save no longer needs is removed after it, and what a crash left behind before the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from ritornello.arrays import Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.manifest import MOST_BYTES, Manifest, SavedFile
from ritornello.saved_arrays import Arrays
from ritornello.saved_representatives import SavedRepresentatives, read
from ritornello.shard_file import PIECE_BYTES, NewShardFile, ShardFile, open_to_read
from ritornello.transports import Transport, together

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK = ".lock"

OURS = re.compile(
    r"shard-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{16}\.(begun|(safetensors|json)(\.partial)?)"
)
"""Files that a save makes beside the manifest."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

TIDY_SECONDS = 1.0
"""How long a save that is given up waits for its running step, to end it and remove its files."""

POLL_SECONDS = 0.02
"""How often rank 0 looks whether the other ranks' files are there."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank saves: the buffer between two steps.

    Attributes:
        manifest: the same on every rank; without files.
        arrays: small, copies.
        rows: uint8 ``[num_held, record_bytes]``, the shard itself; not copied.
    """

    manifest: Manifest
    arrays: Arrays
    rows: Tensor


class SavedShard(Protocol):
    """A shard that can be read again: a file, or a part of a ``state_dict``."""

    def arrays(self) -> Arrays:
        """What was saved beside the representatives."""

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """Some representatives, a piece at a time; see ``ShardFile.rows``."""


class SavedBuffer(Protocol):
    """A whole buffer that can be read again.

    Attributes:
        manifest: what all ranks know of it.
    """

    manifest: Manifest

    def shard(self, rank: int) -> AbstractContextManager[SavedShard]:
        """The shard of a rank, open.

        Raises:
            CheckpointError: it is not there, or not as the manifest says.
        """

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """All representatives of a shard, a piece at a time, checked at the end.

        Raises:
            CheckpointError: at the end: it is damaged.
        """


# Writing.


class Saving:
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
        self._to_host, self._transport, self._in_background = to_host, transport, in_background
        self._rank, self._num_ranks = transport.rank, transport.num_ranks
        self._first_kept = 0  # rows before it are written
        self._kept: dict[int, Bytes] = {}
        self._steps = self._run()
        self._lock: int | None = None
        self._error: Exception | None = None
        self._stepping = threading.Lock()
        self._written = threading.Event()
        self._ended = threading.Event()
        self._files_due = math.inf  # when rank 0 must have seen the files of all
        self._given_up = False

    def begin(self) -> None:
        """Takes the folder. All ranks call it.

        Raises:
            CheckpointError: on every rank: another save is under way there, it does not fit, or
                the folder cannot be made or is not the same for all.
            PeerLostError: another rank is gone.
        """
        try:
            together(self._transport, self._take_folder, "save")
            together(self._transport, self._check_folder, "save")
        except BaseException:
            self.give_up()
            raise

    def _take_folder(self) -> None:
        """Rank 0 keeps other jobs out, removes what crashes left, and leaves a mark."""
        if self._rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._folder)
            remove_leftovers(self._folder)
            self._mark.touch()

    def _check_folder(self) -> None:
        if not self._mark.exists():
            raise CheckpointError(
                f"{self._folder}: rank {self._rank} does not see what rank 0 has made there; all "
                "ranks must save in one folder, on a file system that they share"
            )
        manifest = self._snapshot.manifest
        needed = manifest.num_held * manifest.record_bytes
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
        for slot in slots.tolist():
            if self._first_kept <= slot < len(self._snapshot.rows) and slot not in self._kept:
                self._kept[slot] = self._to_host(self._snapshot.rows[slot : slot + 1])[0].copy()

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

    def finish(self, wait_seconds: float) -> None:
        """Does what is left, while nobody else calls ``step``; gives up after ``wait_seconds``."""
        deadline = time.monotonic() + wait_seconds
        while (pause := self.step()) is not None:
            if time.monotonic() > deadline:
                logger.warning("rank %d: %s was not saved: given up", self._rank, self._folder)
                self.give_up()
            time.sleep(pause)

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
                with contextlib.suppress(CheckpointError, OSError), locked(self._folder):
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
        rows = self._snapshot.rows
        with NewShardFile(path, self._snapshot.arrays, *rows.shape) as file:
            yield 0.0
            num_at_once = max(1, PIECE_BYTES // max(1, rows.shape[1]))
            for first in range(0, len(rows), num_at_once):
                file.write(self._piece(first, min(first + num_at_once, len(rows))).reshape(-1))
                if self._in_background:
                    file.sync()
                yield 0.0
            about = SavedFile(path.name, file.num_bytes, file.finish())
        _write_text(self._folder / self._name(self._rank, "json"), json.dumps(asdict(about)))

    def _piece(self, first: int, end: int) -> Bytes:
        """Rows as they were when the save began."""
        piece = self._to_host(self._snapshot.rows[first:end])
        kept = [slot for slot in range(first, end) if slot in self._kept] if self._kept else []
        if kept:
            piece = piece.copy()
            for slot in kept:
                piece[slot - first] = self._kept.pop(slot)
        self._first_kept = end
        return piece

    def _find_files(self) -> Iterator[float]:
        """Waits until the files of all ranks are there."""
        began, missing = time.monotonic(), list(range(self._num_ranks))
        timeout_seconds = self._transport.timeout_seconds
        while missing := [
            rank for rank in missing if not (self._folder / self._name(rank, "json")).exists()
        ]:
            if time.monotonic() > min(began + timeout_seconds, self._files_due):
                raise CheckpointError(
                    f"{self._folder}: the files of rank(s) {missing} are not there; all ranks must "
                    "save in one folder, on a file system that they share, and write at most "
                    f"{timeout_seconds:g} s longer than others (timeout_seconds)"
                )
            yield POLL_SECONDS

    def _commit(self) -> None:
        """Makes this save the one that counts."""
        files = []
        for rank in range(self._num_ranks):
            about = json.loads((self._folder / self._name(rank, "json")).read_text())
            files.append(SavedFile(**about))
        sync_folder(self._folder)
        replace_manifest(
            self._folder,
            self._snapshot.manifest.with_files(tuple(files), self._save_id, now()),
        )
        with contextlib.suppress(OSError):  # it is saved all the same
            remove_leftovers(self._folder)

    def _end(self) -> None:
        self._steps = iter(())
        self._first_kept = len(self._snapshot.rows)
        self._kept.clear()
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None
        self._written.set()
        self._ended.set()

    def _name(self, rank: int, ending: str) -> str:
        return f"{shard_name(rank, self._num_ranks, self._save_id)}.{ending}"


def shard_name(rank: int, num_ranks: int, save_id: str) -> str:
    """The name of a shard's files, without their endings."""
    return f"shard-{rank:05d}-of-{num_ranks:05d}-{save_id}"


def new_save_id(transport: Transport) -> str:
    """A name for a save that was never used, the same on every rank."""
    return f"{int(transport.all_gather(np.array([random_id()]))[0, 0]):016x}"


def random_id() -> int:
    """A number that fits into 64 bits and was never used."""
    return int.from_bytes(secrets.token_bytes(7), "little")


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a folder's manifest beside the old one, and renames it."""
    _write_text(folder / MANIFEST, manifest.as_json())


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_text(path: Path, text: str) -> None:
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


def remove_leftovers(folder: Path) -> None:
    """Removes what no manifest names, of older saves and of those that a crash interrupted.

    Nothing if the manifest cannot be understood: what it names may be worth keeping.
    """
    for path in leftovers(folder):
        path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What ``remove_leftovers`` would remove."""
    wanted = set[str]()
    if os.path.lexists(folder / MANIFEST):
        try:
            wanted = {file.name for file in _read_manifest(folder).files}
        except CheckpointError:
            return []
    return [
        path for path in folder.iterdir() if OURS.fullmatch(path.name) and path.name not in wanted
    ]


# Reading.


class SavedFolder(SavedBuffer):
    """A saved buffer on disk.

    Args:
        folder: from ``RehearsalBuffer.save``.

    Attributes:
        manifest: what it says.

    Raises:
        CheckpointError: there is none, it is damaged, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not os.path.lexists(self.folder / MANIFEST):
            raise CheckpointError(f"{folder} holds no saved buffer: it has no {MANIFEST}")
        self.manifest = _read_manifest(self.folder)
        if not self.manifest.files:
            raise CheckpointError(f"{self.folder / MANIFEST} names no files")

    def shard(self, rank: int) -> ShardFile:
        """The shard of a rank, open for reading.

        Raises:
            CheckpointError: it is not as the manifest says.
        """
        manifest, about = self.manifest, self.manifest.files[rank]
        path = self.folder / about.name
        file = ShardFile(path)
        try:
            for what, found, expected in (
                ("bytes", file.num_bytes, about.num_bytes),
                ("representatives", file.num_rows, manifest.held_per_rank[rank]),
                ("bytes per record", file.record_bytes, manifest.record_bytes),
            ):
                if found != expected:
                    raise CheckpointError(
                        f"{path} is damaged: it has {found} {what}, but the manifest says "
                        f"{expected}"
                    )
        except BaseException:
            file.close()
            raise
        return file

    def check(self, rank: int) -> None:
        """Reads a whole shard.

        Raises:
            CheckpointError: it is damaged.
        """
        with self.shard(rank) as file:
            file.check(self.manifest.files[rank].sha256)

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedBuffer.checked_rows``."""
        with self.shard(rank) as file:
            yield from file.checked_rows(self.manifest.files[rank].sha256)

    def representatives(
        self, rank: int, slots: Ints | None = None
    ) -> Iterator[SavedRepresentatives]:
        """Reads a shard, a few megabytes at a time.

        Args:
            rank: whose shard.
            slots: int64 ``[n]``, which of its representatives, in any order; None: all of them,
                and then the checksum of the file is compared.

        Raises:
            CheckpointError: the file is damaged; where only the checksum tells, at the end.
            IndexError: there is no such slot.
        """
        yield from read(self, rank, slots)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    with open(open_to_read(path), "rb") as file:
        # `read` takes as much memory as it may give, so the file's size first.
        content = file.read(min(os.fstat(file.fileno()).st_size, MOST_BYTES) + 1)
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{path} is no manifest: it has more than {MOST_BYTES} bytes")
    return Manifest.from_json(content, str(path))
