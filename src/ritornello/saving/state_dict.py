"""``state_dict``: the same state as in a saved folder, as tensors in memory.

Each rank has an entry of its own, ``rank_I``, so that distributed checkpoints keep them apart. It
is a tuple, which such checkpoints take as one value, whatever the sizes of the tensors in it; all
inside it are texts and tensors, which ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello.arrays import Arrays, Bytes, Ints
from ritornello.errors import CheckpointError
from ritornello.saving.manifest import Manifest
from ritornello.saving.saved_buffer import SavedBuffer, SavedShard
from ritornello.saving.shard_file import PAGES, PIECE_BYTES, ROWS, bytes_of_array
from ritornello.saving.writing import Snapshot
from ritornello.transports.agreement import gather_counts
from ritornello.transports.base import Transport

PREFIX = "rank_"

RANK_KEY = re.compile(PREFIX + "([0-9]{1,9})")

Entry = tuple[str, dict[str, Tensor]]
"""A manifest, and tensors."""


def entry_of(snapshot: Snapshot, to_host: Callable[[Tensor], Bytes]) -> Entry:
    """A rank's entry: copies, in CPU memory.

    Args:
        snapshot: of this rank.
        to_host: gives rows of the shard in CPU memory.
    """
    tensors = {name: torch.from_numpy(array) for name, array in snapshot.arrays.items()}
    if snapshot.pages is not None:
        tensors[PAGES] = snapshot.pages[torch.from_numpy(snapshot.page_numbers)]
    rows = torch.from_numpy(to_host(snapshot.rows).copy())
    return snapshot.manifest.as_json(), {**tensors, ROWS: rows}


def gathered(entry: Entry, transport: Transport) -> dict[str, Entry]:
    """All ranks' entries, on rank 0; on other ranks their own.

    Blocks until all ranks have called it.
    """
    text, tensors = entry
    about = {
        "manifest": text,
        "tensors": {name: [t.numpy().dtype.name, list(t.shape)] for name, t in tensors.items()},
    }
    texts = _gather(np.frombuffer(json.dumps(about).encode(), np.uint8), transport)
    own = [bytes_of_array(each.numpy()) for each in tensors.values()]
    # In turn, whatever they are called: ranks need not have the same ones, nor as many.
    most = int(gather_counts(transport, len(own)).max())
    own += [np.zeros(0, np.uint8)] * (most - len(own))
    contents = [_gather(each, transport) for each in own]
    if transport.rank != 0:
        return {f"{PREFIX}{transport.rank}": entry}
    entries = {}
    for rank, each in enumerate(texts):
        about = json.loads(each.tobytes())
        entries[f"{PREFIX}{rank}"] = (
            about["manifest"],
            {
                name: torch.from_numpy(content[rank].view(dtype).reshape(shape))
                for content, (name, (dtype, shape)) in zip(
                    contents, about["tensors"].items(), strict=False
                )
            },
        )
    return entries


def _gather(data: Bytes, transport: Transport) -> list[Bytes]:
    """The bytes of all ranks, on rank 0; elsewhere nothing. A piece at a time."""
    lengths = transport.all_gather(np.array([len(data)]))[:, 0].tolist()
    parts: list[list[Bytes]] = [[] for _ in lengths]
    for first in range(0, max(lengths), PIECE_BYTES):
        num_bytes = min(PIECE_BYTES, max(lengths) - first)
        piece = np.zeros(-(-num_bytes // 8) * 8, np.uint8)
        own = data[first : first + num_bytes]
        piece[: len(own)] = own
        everyone = transport.all_gather(piece.view(np.int64))
        if transport.rank == 0:
            for rank, length in enumerate(lengths):
                part = everyone[rank].view(np.uint8)[: max(0, min(num_bytes, length - first))]
                parts[rank].append(part.copy())
    return [np.concatenate([np.zeros(0, np.uint8), *each]) for each in parts]


class WholeState:
    """A buffer for checkpoints that one rank writes and all ranks read: ``RehearsalBuffer.whole``.

    Args:
        state_dict: gives the state of all ranks, on rank 0.
        load_state_dict: takes it over.
    """

    def __init__(
        self,
        state_dict: Callable[[], dict[str, Any]],
        load_state_dict: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._state_dict, self._load_state_dict = state_dict, load_state_dict

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, on rank 0; see ``RehearsalBuffer.state_dict``. All call it."""
        return self._state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it over, on any number of ranks; see ``RehearsalBuffer.load_state_dict``."""
        self._load_state_dict(state)


class SavedState(SavedBuffer):
    """The buffer in a ``state_dict``.

    Args:
        state: entries of some ranks.

    Raises:
        CheckpointError: it is none of a buffer.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise CheckpointError("the state is no dict")
        self._shards, texts = {}, set[str]()
        for key, entry in state.items():
            known = RANK_KEY.fullmatch(str(key))
            if not known or not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise CheckpointError(
                    f"the state has {reprlib.repr(key)}: it is none of a rehearsal buffer"
                )
            text, tensors = entry
            if not isinstance(text, str):
                raise CheckpointError(f"the state's {key} has no manifest")
            self.manifest = Manifest.from_json(text, f"the state's {key}")
            texts.add(self.manifest.in_common)
            self._shards[int(known[1])] = _ShardInMemory(tensors, int(known[1]), self.manifest)
        if not texts:
            raise CheckpointError("the state is empty")
        if len(texts) > 1:
            raise CheckpointError("the state has entries of different states")

    def shard(self, rank: int) -> AbstractContextManager[SavedShard]:
        """See ``SavedBuffer.shard``."""
        if rank not in self._shards:
            raise CheckpointError(
                f"the state holds only the rank(s) {sorted(self._shards)} of "
                f"{self.manifest.num_ranks}, and rank {rank} is needed: state_dict() gives a "
                "rank's own shard. Let all ranks call state_dict(whole=True) and rank 0 save what "
                "it gets; let each rank save its own, for as many ranks with the same capacity; or "
                "use save and load"
            )
        return nullcontext(self._shards[rank])

    def checked_rows(self, rank: int) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedBuffer.checked_rows``."""
        with self.shard(rank) as shard:
            yield from shard.rows(np.arange(self.manifest.held_per_rank[rank]))


class _ShardInMemory(SavedShard):
    """An entry's tensors, checked."""

    def __init__(self, tensors: Any, rank: int, manifest: Manifest) -> None:
        if not isinstance(tensors, dict) or not all(map(_is_ours, tensors, tensors.values())):
            raise CheckpointError(f"the state's entry of rank {rank} is no dict of its tensors")
        expected = None
        if rank < manifest.num_ranks:
            expected = (manifest.held_per_rank[rank], manifest.record_bytes)
        rows = tensors.get(ROWS)
        if rows is None or tuple(rows.shape) != expected or rows.dtype != torch.uint8:
            raise CheckpointError(
                f"the state's rows of rank {rank} do not have the shape {expected} of its manifest"
            )
        self._arrays = {n: each.detach().cpu().numpy() for n, each in tensors.items()}

    def arrays(self) -> Arrays:
        """See ``SavedShard.arrays``."""
        return {name: array for name, array in self._arrays.items() if name not in (ROWS, PAGES)}

    def pages(self, first: int, num_pages: int) -> Bytes:
        """See ``SavedShard.pages``."""
        pages: Bytes | None = self._arrays.get(PAGES)
        if pages is None or pages.ndim != 2 or not 0 <= first <= first + num_pages <= len(pages):
            raise ValueError("there are not as many pages")
        return pages[first : first + num_pages]

    def rows(self, slots: Ints) -> Iterator[tuple[Ints, Bytes]]:
        """See ``SavedShard.rows``."""
        rows = self._arrays[ROWS]
        num_at_once = max(1, PIECE_BYTES // max(1, rows.shape[1]))
        for first in range(0, len(slots), num_at_once):
            positions = np.arange(first, min(first + num_at_once, len(slots)))
            yield positions, rows[slots[positions]]


def _is_ours(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and value.dtype in (torch.uint8, torch.int64, torch.float64)
    )
