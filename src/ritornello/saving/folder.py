"""The folder of a saved buffer: a manifest, and a file for each shard.

Files of a save have names of their own, and the manifest, renamed into place when all of them
are on disk, names those that count: so a crash at any moment leaves the last save as it was.
What a save no longer needs is removed after it, and what a crash left behind before the next one.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ritornello.arrays import Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.saving.files import (
    FolderInUseError,
    folder_at,
    lock,
    open_to_read,
    unlock,
    write_text,
)
from ritornello.saving.manifest import MOST_BYTES, Manifest
from ritornello.saving.saved_buffer import SavedBuffer, SavedRepresentatives, read
from ritornello.saving.shard_file import ShardFile

MANIFEST = "manifest.json"

MOST_LOOKS = 20
"""How often who reads looks again, if another save has taken the place of what was there."""

OURS = re.compile(
    r"shard-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{16}\.(begun|(safetensors|json)(\.partial)?)"
)
"""Files that a save makes beside the manifest."""


def shard_name(rank: int, num_ranks: int, save_id: str) -> str:
    """The name of a shard's files, without their endings."""
    return f"shard-{rank:05d}-of-{num_ranks:05d}-{save_id}"


def random_id() -> int:
    """A number that fits into 64 bits and was never used."""
    return int.from_bytes(secrets.token_bytes(7), "little")


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a folder's manifest beside the old one, and renames it.

    Raises:
        CheckpointError: it could not be read again.
    """
    write_text(folder / MANIFEST, manifest.as_readable_json())


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def lock_to_save(folder: Path) -> int:
    """Keeps other jobs out of a folder until ``unlock``, or the end of this process.

    Raises:
        CheckpointError: another one is in it.
        OSError: it cannot be written.
    """
    try:
        return lock(folder)
    except FolderInUseError:
        raise CheckpointError(
            f"{folder}: another job is saving a buffer there; give each job a folder of its own"
        ) from None


@contextmanager
def locked_to_save(folder: Path) -> Iterator[None]:
    """Between ``lock_to_save`` and ``unlock``."""
    descriptor = lock_to_save(folder)
    try:
        yield
    finally:
        unlock(descriptor)


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
        self.folder = folder_at(folder)
        if not os.path.lexists(self.folder / MANIFEST):
            if not os.path.exists(self.folder):  # `Path.exists` raises where it may not look
                raise CheckpointError(f"{folder} holds no saved buffer: there is no such folder")
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
        try:
            file = ShardFile(path, about.sha256)
        except CheckpointError as error:
            if self.has_been_replaced():
                raise CheckpointError(
                    f"{self.folder}: another save has taken the place of this one while it was "
                    "read; read it anew"
                ) from error
            raise
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

    def has_been_replaced(self) -> bool:
        """See ``SavedBuffer.has_been_replaced``."""
        try:
            return _read_manifest(self.folder).save_id != self.manifest.save_id
        except CheckpointError:
            return False

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedBuffer.checked_rows``."""
        with self.shard(rank) as file:
            yield from file.checked_rows()

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
    return Manifest.from_json(content, str(path))
