"""Where a shard lies: ordinary, pinned or shared memory, an accelerator, or a file."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ritornello.records import accelerators

KINDS = "'auto', 'cpu', 'pinned', 'shared', 'file:DIR', or an accelerator like 'cuda'"

POPULATE_READ = 22
"""madvise: map all pages now rather than one by one in later rounds (Linux 5.14)."""


@dataclass(frozen=True)
class Storage:
    """A kind of memory for the rows of a shard. Made by ``Storage.of``."""

    kind: str
    """"auto", "cpu", "pinned", "shared", "file", or a kind of accelerator such as "cuda"."""
    device: torch.device
    folder: Path | None = None

    @classmethod
    def of(cls, storage: str | torch.device) -> Storage:
        """Understands the ``storage`` argument of a buffer.

        Raises:
            ValueError: no such kind, or this machine does not have it.
        """
        text = str(storage)
        cpu = torch.device("cpu")
        if text == "shared" and not hasattr(os, "memfd_create"):
            raise ValueError("storage='shared' needs Linux: use 'auto' or 'cpu'")
        if text in ("auto", "cpu", "shared"):
            return cls(text, cpu)
        if text == "pinned":
            if not accelerators.is_available():
                raise ValueError(
                    "storage='pinned': this machine has no accelerator; use 'auto' or 'cpu'"
                )
            return cls(text, cpu)
        if text.startswith("file:"):
            folder = Path(text.removeprefix("file:")).expanduser()
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise ValueError(f"storage={text!r}: {folder} must be a folder that can be written")
            return cls("file", cpu, folder.resolve())
        try:
            device = accelerators.named(text)
        except ValueError as error:
            raise ValueError(f"storage={text!r}: {error}") from None
        if device is None:
            raise ValueError(f"storage={text!r}: it must be {KINDS}")
        return cls(device.type, accelerators.with_index(device))

    @property
    def can_be_shared(self) -> bool:
        """Whether the other ranks of the host can read it."""
        return self.kind in ("auto", "shared", "file")

    def __str__(self) -> str:
        return f"file:{self.folder}" if self.kind == "file" else self.kind

    def allocate(self, num_rows: int, record_bytes: int) -> Tensor:
        """Zeroed rows, uint8 ``[num_rows, record_bytes]``, touched once so that no round is slow.

        Raises:
            MemoryError: it does not fit; says how much is needed.
        """
        num_bytes = num_rows * record_bytes
        if self.kind in ("shared", "file"):
            with self.create(num_bytes) as memory:
                memory.reserve(0, num_bytes)
                return memory.map().view(num_rows, record_bytes)
        if self.device.type == "cpu":
            self._check_free(num_bytes)
        try:
            rows = torch.empty(
                (num_rows, record_bytes),
                dtype=torch.uint8,
                device=self.device,
                pin_memory=self.kind == "pinned",
            )
            return rows.zero_()
        except RuntimeError as error:
            raise MemoryError(
                f"the shard needs {num_bytes / 1e9:.2f} GB on {self.device} ({num_rows} records "
                f"of {record_bytes} bytes): lower the capacity, or use more ranks"
            ) from error

    def create(self, num_bytes: int) -> MappedMemory:
        """Memory for several processes: a file in ``folder``, or shared memory without a name.

        Raises:
            MemoryError: more than is free.
        """
        if self.folder is None:
            self._check_free(num_bytes)
            descriptor = os.memfd_create("ritornello", os.MFD_CLOEXEC)
        else:
            try:
                # Without a name where the file system can do that, else its name is gone at
                # once: nothing is left behind, however the processes end.
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    descriptor = os.dup(file.fileno())
            except OSError as error:
                raise MemoryError(f"storage={str(self)!r}: no file can be made: {error}") from error
        memory = MappedMemory(descriptor, num_bytes, self)
        try:
            memory.resize(num_bytes)
        except BaseException:
            memory.close()
            raise
        return memory

    def _check_free(self, num_bytes: int) -> None:
        free = free_memory_bytes()
        if free is not None and num_bytes > free:
            raise MemoryError(
                f"the rehearsal buffer needs {num_bytes / 1e9:.2f} GB of memory on this host, but "
                f"{free / 1e9:.2f} GB are free: lower the capacity, or place it in a file: "
                "storage='file:DIR'"
            )


class MappedMemory:
    """Memory behind a file descriptor that several processes map.

    It has no name, so it vanishes with the last process that maps it, and nothing of an
    earlier job can be in the way. Others open it by its descriptor while this object is open.
    """

    def __init__(self, descriptor: int, num_bytes: int, storage: Storage) -> None:
        self._descriptor = descriptor
        self._num_bytes = num_bytes
        self._storage = storage

    @classmethod
    def open(cls, process: int, descriptor: int, num_bytes: int, storage: Storage) -> MappedMemory:
        """Memory that another process of this host has open.

        Raises:
            OSError: it cannot be reached, as from another container.
        """
        path = f"/proc/{process}/fd/{descriptor}"
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), num_bytes, storage)

    def resize(self, num_bytes: int) -> None:
        """Changes its size; what is new is zero. Before anybody maps it.

        Raises:
            MemoryError: it does not fit; says how much is needed.
        """
        with self._room_for(num_bytes):
            os.ftruncate(self._descriptor, num_bytes)
        self._num_bytes = num_bytes

    @property
    def descriptor(self) -> int:
        """By which another process opens it."""
        return self._descriptor

    def reserve(self, first_byte: int, num_bytes: int) -> None:
        """Takes the memory of a part now; touching more than there is would kill the process.

        Raises:
            MemoryError: it does not fit; says how much is needed.
        """
        with self._room_for(num_bytes):
            if num_bytes:
                os.posix_fallocate(self._descriptor, first_byte, num_bytes)

    @contextlib.contextmanager
    def _room_for(self, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MemoryError(
                f"{num_bytes / 1e9:.2f} GB for the shard do not fit ({self._storage}: "
                f"{error.strerror}): lower the capacity, or place the shards where there is room: "
                "storage='file:DIR'"
            ) from error

    def map(self) -> Tensor:
        """All of it as uint8 ``[num_bytes]``; the mapping lives as long as the tensor."""
        mapping = mmap.mmap(self._descriptor, self._num_bytes)
        if self._storage.folder is None:
            with contextlib.suppress(OSError):  # an older kernel
                mapping.madvise(POPULATE_READ)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    def close(self) -> None:
        """Closes the descriptor; mappings stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MappedMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def free_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can still be taken here, also inside a container; None if not known."""
    limits = []
    unknown = FileNotFoundError, PermissionError, ValueError  # not OSError: an alarm may raise one
    with contextlib.suppress(*unknown, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(int(available.split()[1]) * 1024)
    with contextlib.suppress(*unknown):
        allowed = int((group / "memory.max").read_text())  # the text "max": no limit
        used = int((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, but make room for whoever needs it.
        cached = int(parts.get("inactive_file", 0)) + int(parts.get("active_file", 0))
        limits.append(allowed - used + cached)
    return min(limits, default=None)
