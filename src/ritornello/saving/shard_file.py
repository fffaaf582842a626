"""Files of one shard, in the safetensors format: written and read a piece at a time.

A shard may be as large as memory, so nothing here holds a second copy of it. The format is eight
bytes with the length of a header, the header (JSON: for each array its dtype, shape and place),
and the arrays' bytes; the library ``safetensors`` reads the same files. Of a file that is read
nothing is believed: every size is checked against that of the file before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.records.storage import free_memory_bytes
from ritornello.saving.checked_json import checked_count
from ritornello.saving.files import new_file, open_to_read

MOST_HEADER_BYTES = 2**20
"""A header has a line for each of a few arrays; a longer one is none of ours."""

PIECE_BYTES = 2**22
"""What is written or read at a time: it fits into the processor's cache."""

LARGE_BYTES = 2**24
"""Arrays that are larger together are not believed where the file takes less room than it says."""

MOST_DIMENSIONS = 2
"""An array's."""

AHEAD_BYTES = 4 * PIECE_BYTES
"""What the system is asked to read ahead, where pieces are read one after another."""

READ_THROUGH_BYTES = 2**16
"""Records that are no farther apart are read together with what lies between them."""

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
"""Those that occur, by the format's names."""

_Entry = tuple[np.dtype[Any], tuple[int, ...], int, int]
"""Of an array in a file: dtype, shape, where its bytes begin, how many there are."""

ROWS = "rows"
"""The array of the records, uint8 ``[num_rows, record_bytes]``; it comes last."""

PAGES = "pages"
"""What of the records differs in length, uint8 ``[num_pages, page_bytes]``, record after record; it
comes before the rows, where there is any."""

_LARGE = (ROWS, PAGES)

Shape = tuple[int, int]


def header_of(arrays: Arrays, rows: Shape, pages: Shape | None = None) -> bytes:
    """The beginning of a file with some arrays, a shard's pages, if it has any, and its rows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "ritornello shard"}}
    end = 0
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if pages is not None:
        shapes[PAGES] = (np.dtype(np.uint8), pages)
    shapes[ROWS] = (np.dtype(np.uint8), rows)
    for name, (dtype, shape) in shapes.items():
        first, end = end, end + dtype.itemsize * math.prod(shape)
        dtype_name = next((key for key, each in DTYPES.items() if each == dtype), None)
        entries[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_header(header: bytes, arrays: Arrays, rows: Shape, pages: Shape | None = None) -> None:
    """Checks that a file with that beginning could be read again.

    Raises:
        ValueError: it could not.
    """
    num_bytes = sum(array.nbytes for array in arrays.values()) + math.prod(rows)
    num_bytes += math.prod(pages or (0,))
    _entries_in(header[8:], len(header) + num_bytes)


def _entries_in(text: bytes, file_bytes: int) -> dict[str, _Entry]:
    """The arrays that a header names, in the file's order.

    Args:
        text: of the header.
        file_bytes: of the whole file.

    Raises:
        ValueError: there cannot be such a file.
    """
    if not 2 <= len(text) <= min(MOST_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"it has {file_bytes} bytes, its header {len(text)}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = dict(
            sorted(
                ((name, _entry(each)) for name, each in header.items()),
                key=lambda each: each[1][2],
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kind, reason = type(error).__name__, str(error)[:200]
        raise ValueError(f"its header cannot be understood ({kind}: {reason})") from error
    end = 0
    for name, (dtype, shape, first, num_bytes) in entries.items():
        if first != end or num_bytes != dtype.itemsize * math.prod(shape):
            raise ValueError(
                f"the array {reprlib.repr(name)} is not where and as long as it should be"
            )
        end += num_bytes
    if 8 + len(text) + end != file_bytes:
        raise ValueError(f"it has {file_bytes} bytes instead of {8 + len(text) + end}")
    rows, pages = entries.get(ROWS), entries.get(PAGES)
    if rows is None or rows[0] != np.uint8 or len(rows[1]) != 2:
        raise ValueError("it has no rows of bytes")
    if pages is not None and (pages[0] != np.uint8 or len(pages[1]) != 2):
        raise ValueError("it has pages that are no rows of bytes")
    return entries


def _entry(entry: Any) -> _Entry:
    first, end = map(checked_count, entry["data_offsets"])
    shape = tuple(map(checked_count, entry["shape"]))
    if len(shape) > MOST_DIMENSIONS or math.prod(max(1, size) for size in shape) >= 2**59:
        raise ValueError(f"an array of the shape {reprlib.repr(shape)}")
    return DTYPES[entry["dtype"]], shape, first, end - first


def bytes_of_array(array: NDArray[Any]) -> Bytes:
    """An array's bytes, uint8 ``[num_bytes]``."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Checksum:
    """A SHA-256 that a thread of its own computes, while the same bytes are written or used."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ritornello-checksum")
        self._running: Future[None] | None = None

    def update(self, data: Bytes) -> None:
        """Begins to add contiguous bytes, which must stay as they are until the next call."""
        self.wait()
        try:
            self._running = self._thread.submit(self._digest.update, data.data)
        except RuntimeError:  # no thread begins any more while Python ends
            self._digest.update(data.data)

    def wait(self) -> None:
        """Waits until all bytes are added."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def hex(self) -> str:
        """The checksum of all bytes."""
        self.wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def __enter__(self) -> Checksum:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NewShardFile:
    """A file of a shard that is being written; see ``new_shard_file``.

    Attributes:
        num_bytes: so far.
    """

    def __init__(self, file: BinaryIO, checksum: Checksum) -> None:
        self._file, self._checksum = file, checksum
        self.num_bytes = 0

    def write(self, data: Bytes) -> None:
        """Writes bytes, uint8 ``[num_bytes]``; all records together come last."""
        self._checksum.update(data)
        self.num_bytes += self._file.write(data.data)
        self._checksum.wait()  # a round may overwrite it

    def sync(self) -> None:
        """Waits until all so far is on disk."""
        self._file.flush()
        os.fdatasync(self._file.fileno())

    @property
    def sha256(self) -> str:
        """The checksum of all so far."""
        return self._checksum.hex()


@contextlib.contextmanager
def new_shard_file(
    path: Path, arrays: Arrays, rows: Shape, pages: Shape | None = None
) -> Iterator[NewShardFile]:
    """A file of a shard, to be written; see ``new_file``.

    Args:
        path: of the file.
        arrays: all but the rows and pages; written at once.
        rows: how many records will come, and how large each is.
        pages: of the pages that will come before them, if there are any.

    Raises:
        CheckpointError: it cannot be written, or could not be read again.
    """
    num_bytes = 0
    header = header_of(arrays, rows, pages)
    try:
        check_header(header, arrays, rows, pages)
    except ValueError as error:
        raise CheckpointError(f"{path} could not be read again: {error}") from error
    try:
        with new_file(path) as file, Checksum() as checksum:
            new = NewShardFile(file, checksum)
            try:
                new.write(np.frombuffer(header, np.uint8))
                for array in arrays.values():
                    new.write(bytes_of_array(array))
                yield new
            finally:
                num_bytes = new.num_bytes
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror} (after {num_bytes / 1e9:.3g} of "
            f"{(math.prod(rows) + math.prod(pages or (0,))) / 1e9:.3g} GB)"
        ) from error


class ShardFile:
    """A file of a shard, open for reading.

    Args:
        path: of the file.
        sha256: its checksum, by what the manifest says.

    Raises:
        CheckpointError: it is not there, or no whole file of a shard.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        self._path, self._sha256 = path, sha256
        self._pieces = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._file = open_to_read(path)
        try:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def num_rows(self) -> int:
        """Records in the file."""
        return int(self._entries[ROWS][1][0])

    @property
    def record_bytes(self) -> int:
        """The size of each record."""
        return int(self._entries[ROWS][1][1])

    def arrays(self) -> Arrays:
        """All arrays but the rows and pages.

        Raises:
            CheckpointError: they do not fit into memory; or they are large, the file has holes, and
                its checksum is another one.
        """
        needed = sum(entry[3] for name, entry in self._entries.items() if name not in _LARGE)
        free = free_memory_bytes()
        if free is not None and needed > free:
            raise self._damaged(
                f"it has {needed / 1e9:.2f} GB beside the rows: too much for memory"
            )
        if needed > LARGE_BYTES and self._has_holes:
            for _ in self.checked_rows():  # anybody can claim as much for nothing
                pass
        found = {}
        for name, (dtype, shape, first, num_bytes) in self._entries.items():
            if name not in _LARGE:
                bytes_ = np.empty(num_bytes, np.uint8)
                self._read(bytes_, first)
                found[name] = bytes_.view(dtype).reshape(shape)
        return found

    @property
    def num_bytes(self) -> int:
        """The size of the whole file."""
        return os.fstat(self._file).st_size

    @property
    def _has_holes(self) -> bool:
        """Whether the file takes less room on the disk than it says, also as it is compressed."""
        about = os.fstat(self._file)
        return about.st_blocks * 512 < about.st_size

    def checked_rows(self) -> Iterator[tuple[Ints, Bytes]]:
        """Reads all records in order, and compares the checksum of the whole file in passing.

        Yields:
            As ``rows`` does.

        Raises:
            CheckpointError: at the end, if it is another one.
        """
        with Checksum() as checksum:
            end = self._entries[ROWS][2]
            for first in range(0, end, PIECE_BYTES):
                piece = self._next_piece(min(PIECE_BYTES, end - first))
                self._read(piece, first)
                checksum.update(piece)
            num_at_once = max(1, PIECE_BYTES // max(1, self.record_bytes))
            for first in range(0, self.num_rows, num_at_once):
                slots = np.arange(first, min(first + num_at_once, self.num_rows))
                for positions, records in self.rows(slots):
                    checksum.update(records.reshape(-1))
                    yield slots[positions], records
            self._compare(checksum.hex())

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """Reads records, as many at a time as fit into a piece.

        Args:
            slots: int64 ``[n]``, which of the rows.

        Yields:
            Positions in ``slots`` (int64 ``[m]``) and the records there, uint8
            ``[m, record_bytes]``, valid until the next ones.
        """
        size = self.record_bytes
        order = slots.argsort(kind="stable")
        ascending = slots[order]
        most = max(1, PIECE_BYTES // max(1, size))
        gap = max(1, READ_THROUGH_BYTES // max(1, size))
        first = 0
        while first < len(order):
            # As far as it fits, and no farther than a gap that is cheaper to skip.
            end = first + int(ascending[first:].searchsorted(ascending[first] + most))
            far = np.flatnonzero(np.diff(ascending[first:end]) > gap)
            if len(far):
                end = first + int(far[0]) + 1
            start, num = int(ascending[first]), int(ascending[end - 1] - ascending[first]) + 1
            piece = self._next_piece(num * size)
            self._read(piece, self._entries[ROWS][2] + start * size)
            records = piece.reshape(num, size)
            wanted = ascending[first:end] - start
            yield order[first:end], records if (np.diff(wanted) == 1).all() else records[wanted]
            first = end

    def pages(self, first: int, num_pages: int) -> Bytes:
        """Some pages, from one on, uint8 ``[num_pages, page_bytes]``.

        Raises:
            ValueError: there are not as many.
        """
        _, (num, page_bytes), begin, _ = self._entries.get(PAGES, (None, (0, 0), 0, 0))
        if not 0 <= first <= first + num_pages <= num:
            raise ValueError(f"there are {num} pages")
        found = np.empty((num_pages, page_bytes), np.uint8)
        self._read(found.reshape(-1), begin + first * page_bytes)
        return found

    def _next_piece(self, num_bytes: int) -> Bytes:
        """Room for bytes; that of the call before stays as it is, as it may still be in use."""
        self._pieces.reverse()
        if num_bytes > len(self._pieces[0]):
            self._pieces[0] = np.empty(num_bytes, np.uint8)
        return self._pieces[0][:num_bytes]

    def _read(self, out: Bytes, first: int) -> None:
        """Fills ``out`` with the bytes from ``first`` on."""
        if len(out) >= PIECE_BYTES // 2:  # one of many in a row: the disk goes on meanwhile
            end = first + len(out)
            os.posix_fadvise(self._file, end, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < len(out):
            try:
                num_bytes = os.preadv(self._file, [out[done:].data], first + done)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from error
            if not num_bytes:
                raise CheckpointError(f"{self._path} has become shorter while it was read")
            done += num_bytes

    def _compare(self, found: str) -> None:
        if found != self._sha256:
            raise CheckpointError(
                f"{self._path} is damaged: its SHA-256 is {found}, but the manifest says "
                f"{reprlib.repr(self._sha256)}"
            )

    def _read_header(self) -> None:
        file_bytes = self.num_bytes
        header_bytes = int.from_bytes(os.pread(self._file, 8, 0), "little")
        # Before there is memory for it.
        if header_bytes > min(MOST_HEADER_BYTES, file_bytes - 8):
            raise self._damaged(f"it has {file_bytes} bytes, its header {header_bytes}")
        text = np.empty(header_bytes, np.uint8)
        self._read(text, 8)
        try:
            entries = _entries_in(text.tobytes(), file_bytes)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._entries = {
            name: (dtype, shape, 8 + header_bytes + first, num_bytes)
            for name, (dtype, shape, first, num_bytes) in entries.items()
        }

    def _damaged(self, how: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged, or no file of a shard: {how}")
