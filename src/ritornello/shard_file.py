"""Files of one shard, in the safetensors format: written and read a piece at a time.

A shard may be as large as memory, so nothing here holds a second copy of it. The format is eight
bytes with the length of a header, the header (JSON: for each array its dtype, shape and place),
and the arrays' bytes; the library ``safetensors`` reads the same files. Of a file that is read
nothing is believed: every size is checked against that of the file before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Bytes, Ints
from ritornello.errors import CheckpointError

MOST_HEADER_BYTES = 2**20
"""A header has a line for each of a few arrays; a longer one is none of ours."""

PIECE_BYTES = 2**22
"""What is written or read at a time: it fits into the processor's cache."""

READ_THROUGH_BYTES = 2**16
"""Records that are no farther apart are read together with what lies between them."""

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
"""Those that occur, by the format's names."""

ROWS = "rows"
"""The array of the records, uint8 ``[num_rows, record_bytes]``; it comes last."""

Arrays = Mapping[str, NDArray[Any]]


def header_of(arrays: Arrays, num_rows: int, record_bytes: int) -> bytes:
    """The beginning of a file with some arrays and a shard's rows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "ritornello shard"}}
    end = 0
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    shapes[ROWS] = (np.dtype(np.uint8), (num_rows, record_bytes))
    for name, (dtype, shape) in shapes.items():
        first, end = end, end + dtype.itemsize * math.prod(shape)
        dtype_name = next(key for key, each in DTYPES.items() if each == dtype)
        entries[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of_array(array: NDArray[Any]) -> Bytes:
    """An array's bytes, uint8 ``[num_bytes]``."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class ShardFile:
    """A file of a shard, open for reading.

    Args:
        path: of the file.

    Raises:
        CheckpointError: it is not there, or no whole file of a shard.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._piece = np.empty(PIECE_BYTES, np.uint8)
        try:
            # No link, which may lead out of the folder; and no pipe, which would block.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.open(path, flags)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise CheckpointError(f"{path} is no ordinary file")
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
        """Of each record."""
        return int(self._entries[ROWS][1][1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays but the rows."""
        found = {}
        for name, (dtype, shape, first, num_bytes) in self._entries.items():
            if name != ROWS:
                bytes_ = np.empty(num_bytes, np.uint8)
                self._read(bytes_, first)
                found[name] = bytes_.view(dtype).reshape(shape)
        return found

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return os.fstat(self._file).st_size

    def check(self, sha256: str) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            CheckpointError: it is another one.
        """
        digest = hashlib.sha256()
        first, end = 0, self.num_bytes
        while first < end:
            piece = self._piece[: end - first]
            self._read(piece, first)
            digest.update(piece.data)
            first += len(piece)
        self._compare(digest.hexdigest(), sha256)

    def checked_rows(self, sha256: str) -> Iterator[tuple[Ints, Bytes]]:
        """Reads all records in order, and compares the checksum of the whole file in passing.

        Yields:
            As ``rows`` does.

        Raises:
            CheckpointError: at the end, if it is another one.
        """
        digest = hashlib.sha256()
        before = np.empty(self._entries[ROWS][2], np.uint8)
        self._read(before, 0)
        digest.update(before.data)
        for positions, records in self.rows(np.arange(self.num_rows)):
            digest.update(records.data)
            yield positions, records
        self._compare(digest.hexdigest(), sha256)

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
            if num * size > len(self._piece):  # a single record may be larger than a piece
                self._piece = np.empty(num * size, np.uint8)
            piece = self._piece[: num * size]
            self._read(piece, self._entries[ROWS][2] + start * size)
            records = piece.reshape(num, size)
            wanted = ascending[first:end] - start
            yield order[first:end], records if len(wanted) == num else records[wanted]
            first = end

    def _read(self, out: Bytes, first: int) -> None:
        """Fills ``out`` with the bytes from ``first`` on."""
        done = 0
        while done < len(out):
            num_bytes = os.preadv(self._file, [out[done:].data], first + done)
            if not num_bytes:
                raise CheckpointError(f"{self._path} has become shorter while it was read")
            done += num_bytes

    def _compare(self, found: str, sha256: str) -> None:
        if found != sha256:
            raise CheckpointError(
                f"{self._path} is damaged: its SHA-256 is {found}, but the manifest says {sha256}"
            )

    def _read_header(self) -> None:
        file_bytes = self.num_bytes
        header_bytes = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 2 <= header_bytes <= min(MOST_HEADER_BYTES, file_bytes - 8):
            raise self._damaged(f"it has {file_bytes} bytes, its header {header_bytes}")
        try:
            text = np.empty(header_bytes, np.uint8)
            self._read(text, 8)
            header = json.loads(text.tobytes())
            header.pop("__metadata__", None)
            self._entries = dict(
                sorted(
                    ((name, self._entry(entry)) for name, entry in header.items()),
                    key=lambda each: each[1][2],
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header cannot be understood ({error})") from error
        end = 0
        for name, (dtype, shape, first, num_bytes) in self._entries.items():
            if first != end or num_bytes != dtype.itemsize * math.prod(shape):
                raise self._damaged(f"the array {name!r} is not where and as long as it should be")
            end += num_bytes
        if 8 + header_bytes + end != file_bytes:
            raise self._damaged(f"it has {file_bytes} bytes instead of {8 + header_bytes + end}")
        rows = self._entries.get(ROWS)
        if rows is None or rows[0] != np.uint8 or len(rows[1]) != 2:
            raise self._damaged("it has no rows of bytes")
        for name, (dtype, shape, first, num_bytes) in self._entries.items():
            self._entries[name] = (dtype, shape, first + 8 + header_bytes, num_bytes)

    def _entry(self, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
        first, end = map(checked_count, entry["data_offsets"])
        return DTYPES[entry["dtype"]], tuple(map(checked_count, entry["shape"])), first, end - first

    def _damaged(self, how: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged, or no file of a shard: {how}")


def checked_count(value: Any) -> int:
    """A non-negative integer out of JSON.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} must be a non-negative integer")
    return value
