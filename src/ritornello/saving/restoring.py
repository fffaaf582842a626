"""A saved buffer into the shards of now: as they were, or dealt out anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ritornello.arrays import Arrays, Ints
from ritornello.errors import CheckpointError
from ritornello.policies.contents import Contents
from ritornello.policies.protection import is_protected
from ritornello.policies.sampling import SamplingPolicy
from ritornello.policies.selection import SavedShards, SelectionPolicy, State
from ritornello.records.paging import Records
from ritornello.records.shard import rows_per_rank
from ritornello.rounds.round import Rounds
from ritornello.saving.saved_buffer import (
    SavedBuffer,
    admission_rounds_of,
    contents_state,
    num_pages_of,
    records_in,
    sampling_state,
    selection_state,
)
from ritornello.transports.agreement import gather_padded, together
from ritornello.transports.base import Transport


def restore(rounds: Rounds, saved: SavedBuffer, knows_contents: bool) -> None:
    """Goes on exactly from where a buffer with the same ranks and capacity was saved.

    Blocks until all ranks have called it.

    Args:
        rounds: of now.
        saved: that buffer.
        knows_contents: whether its sampling policy is this one's, and knows places.

    Raises:
        CheckpointError: on every rank, if what was saved on one cannot be used.
    """
    rank, sizes = rounds.transport.rank, np.array(saved.manifest.held_per_rank)
    # What is there must not be overwritten by anything damaged; pages are not read in order.
    reads_twice = rounds.contents.num_held > 0 or saved.manifest.paging is not None

    def understand() -> tuple[SelectionPolicy, SamplingPolicy, Contents, Ints]:
        _check_sizes(sizes, rounds.limits)
        with saved.shard(rank) as shard:
            arrays = shard.arrays()
        state, sampling = _state_in_pages(rounds, saved, rank, arrays), rounds.new_sampling()
        selection = rounds.new_selection(is_protected(state))
        selection.restore(state, int(sizes[rank]))
        contents = rounds.no_contents()
        contents.resize(sizes)
        if knows_contents:
            contents.restore(contents_state(arrays))
            if remembered := sampling_state(arrays):
                sampling.restore(remembered)
        admitted_in = admission_rounds_of(arrays, saved.manifest, rank)
        if reads_twice:
            for _, found in saved.checked_rows(rank):
                rounds.check_records(torch.from_numpy(found))
            _check_pages(saved, rank)
        return selection, sampling, contents, admitted_in

    own = together(rounds.transport, understand, "load")
    overwrite(rounds, lambda: _all_records(saved, rank))
    rounds.go_on(saved.manifest.num_rounds, *own)
    if rounds.contents.knows_places and not knows_contents:
        rounds.tell_contents()


def adopt(rounds: Rounds, saved: SavedBuffer) -> None:
    """Takes over a buffer that had other ranks or another capacity.

    Blocks until all ranks have called it.

    Args:
        rounds: of now.
        saved: that buffer.

    Raises:
        CheckpointError: on every rank, if what was saved cannot be used on one.
    """
    manifest = saved.manifest
    num_ranks, sizes = manifest.num_ranks, np.array(manifest.held_per_rank)
    rooms = rows_per_rank(manifest.capacity, num_ranks)

    def understand() -> tuple[SelectionPolicy, Arrays, Ints, Ints, Ints]:
        _check_sizes(sizes, rooms)
        for rank in range(rounds.transport.rank, num_ranks, rounds.transport.num_ranks):
            for _, found in saved.checked_rows(rank):
                rounds.check_records(torch.from_numpy(found))
            _check_pages(saved, rank)
        arrays = []
        for rank in range(num_ranks):
            with saved.shard(rank) as shard:
                arrays.append(shard.arrays())
        states = [_state_in_pages(rounds, saved, *each) for each in enumerate(arrays)]
        selection = rounds.new_selection(is_protected(states[0]))
        owners, slots = selection.adopt(
            SavedShards(states, sizes, manifest.capacity),
            rounds.capacity,
            rounds.adoption_streams.at(manifest.num_rounds),
        )
        admitted = [admission_rounds_of(each, manifest, rank) for rank, each in enumerate(arrays)]
        admitted_in = np.concatenate(admitted)[(sizes.cumsum() - sizes)[owners] + slots]
        return selection, sampling_state(arrays[0]), owners, slots, admitted_in

    selection, remembered, owners, slots, admitted_in = together(
        rounds.transport, understand, "load"
    )
    contents, sampling = rounds.no_contents(), rounds.new_sampling()
    contents.resize(rounds.transport.all_gather(np.array([len(owners)]))[:, 0].copy())
    if contents.knows_places and remembered:  # which all ranks have read in the same shard
        places = (rooms.cumsum() - rooms)[owners] + slots
        before, after = _moved(places, contents, rounds.transport)
        together(rounds.transport, lambda: sampling.adopt(remembered, before, after), "load")

    def records() -> Iterator[tuple[Ints, Records]]:
        for owner in np.unique(owners).tolist():
            own = np.flatnonzero(owners == owner)
            for positions, found in records_in(saved, owner, slots[own]):
                yield own[positions], found

    overwrite(rounds, records)
    rounds.go_on(manifest.num_rounds, selection, sampling, contents, admitted_in)
    if contents.knows_places:
        rounds.tell_contents()


def _moved(places: Ints, contents: Contents, transport: Transport) -> tuple[Ints, Ints]:
    """Where all ranks' representatives were in a saved buffer, and where they are in this one.

    Args:
        places: int64 ``[n]``, there, of those that go to this rank's slots from 0 on.
        contents: of this buffer.
        transport: to the other ranks.
    """
    before = gather_padded(places, transport)
    after = [
        contents.places_of_slots(rank, np.arange(len(of_rank)))
        for rank, of_rank in enumerate(before)
    ]
    return np.concatenate(before), np.concatenate(after)


def _all_records(saved: SavedBuffer, rank: int) -> Iterator[tuple[Ints, Records]]:
    """All of a shard's records, checked at the end, or, where they have pages, before."""
    if saved.manifest.paging is not None:
        yield from records_in(saved, rank, np.arange(saved.manifest.held_per_rank[rank]))
        return
    for slots, found in saved.checked_rows(rank):
        yield slots, Records(torch.from_numpy(found))


def _check_pages(saved: SavedBuffer, rank: int) -> None:
    """Checks what of a shard's records is in pages, if samples differ in length.

    Raises:
        CheckpointError, ValueError, KeyError: it cannot be read.
    """
    if saved.manifest.paging is not None:
        for _ in _all_records(saved, rank):
            pass


def _state_in_pages(rounds: Rounds, saved: SavedBuffer, rank: int, arrays: Arrays) -> State:
    """What a shard's selection policy saved; pages counted as those of now."""
    state = selection_state(arrays)
    if rounds.paged_as is None:
        return state
    counts = num_pages_of(arrays, saved.manifest, rank, rounds.paged_as.page_bytes)
    slots = state["slots"]
    if not np.array_equal(np.sort(slots), np.arange(len(counts))):
        raise ValueError("slots must be those of all representatives, once each")
    return {**state, "pages": counts[slots]}


def _check_sizes(sizes: Ints, rooms: Ints) -> None:
    if np.any(sizes > rooms):
        raise ValueError(f"there is no room for {sizes.max()} representatives in a shard")


def overwrite(rounds: Rounds, records: Callable[[], Iterator[tuple[Ints, Records]]]) -> None:
    """Writes records to this rank's shard. Blocks until all ranks have.

    Args:
        rounds: of the buffer.
        records: with their slots.

    Raises:
        CheckpointError: on every rank, if one could not read or place them.
    """
    failure: Exception | None = None
    try:
        with rounds.staging.worker_stream():  # whose rounds write it, once it is zeroed
            shard = rounds.make_shard()
    except (MemoryError, ValueError, OSError) as error:
        failure = error

    def check() -> None:
        if failure is not None:
            raise failure

    try:
        together(rounds.transport, check, "load")
    except CheckpointError:
        rounds.shard = rounds.paged = None  # as where it did not fit: none was there before
        raise
    rounds.transport.await_readers()

    def write() -> None:
        rounds.num_overwritten += 1
        rounds.is_torn = rounds.contents.num_held > 0
        with rounds.staging.worker_stream():
            if rounds.paged is not None:
                rounds.paged.clear()
            for slots, found in records():
                rounds.check_records(found.rows)
                if rounds.paged is None:
                    rows = found.rows.to(shard.rows.device)
                    shard.write(slots, rows, np.arange(len(rows)))
                    continue
                rounds.paged.write(slots, found, num_held=0)

    try:
        together(rounds.transport, write, "load")
    except CheckpointError:
        if rounds.paged is not None:
            rounds.paged.clear()
        raise
    rounds.is_torn = False
