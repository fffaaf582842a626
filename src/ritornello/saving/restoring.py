"""A saved buffer into the shards of now: as they were, or dealt out anew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ritornello.arrays import Bytes, Floats, Ints
from ritornello.policies.contents import Contents, check_distances
from ritornello.policies.selection import SavedShards, SelectionPolicy
from ritornello.records.shard import rows_per_rank
from ritornello.rounds.round import Rounds
from ritornello.saving.saved_buffer import (
    CONTENTS,
    DISTANCES,
    POLICY,
    SavedBuffer,
    admission_rounds_of,
    part_of,
)
from ritornello.transports.agreement import together


def restore(rounds: Rounds, saved: SavedBuffer, knows_contents: bool) -> None:
    """Goes on exactly from where a buffer with the same ranks and capacity was saved.

    Blocks until all ranks have called it.

    Args:
        rounds: of now.
        saved: that buffer.
        knows_contents: whether its sampling policy is this one's, and looks at labels.

    Raises:
        CheckpointError: on every rank, if what was saved on one cannot be used.
    """
    rank, sizes = rounds.transport.rank, np.array(saved.manifest.held_per_rank)
    reads_twice = rounds.contents.num_held > 0

    def understand() -> tuple[SelectionPolicy, Contents, Ints]:
        _check_sizes(sizes, rounds.limits)
        with saved.shard(rank) as shard:
            arrays = shard.arrays()
        policy = rounds.new_selection()
        policy.restore(part_of(arrays, POLICY), int(sizes[rank]))
        contents = rounds.no_contents()
        contents.resize(sizes)
        if knows_contents:
            contents.restore(part_of(arrays, CONTENTS))
        admitted_in = admission_rounds_of(arrays, saved.manifest, rank)
        if reads_twice:  # what is there must not be overwritten by anything damaged
            for _, found in saved.checked_rows(rank):
                rounds.check_records(torch.from_numpy(found))
        return policy, contents, admitted_in

    policy, contents, admitted_in = together(rounds.transport, understand, "load")
    rounds.overwrite(lambda: saved.checked_rows(rank))
    rounds.go_on(saved.manifest.num_rounds, policy, contents, admitted_in)
    if contents.knows_labels and not knows_contents:
        rounds.tell_contents(None)


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

    def understand() -> tuple[SelectionPolicy, Ints, Ints, Ints, Floats | None]:
        _check_sizes(sizes, rooms)
        for rank in range(rounds.transport.rank, num_ranks, rounds.transport.num_ranks):
            for _, found in saved.checked_rows(rank):
                rounds.check_records(torch.from_numpy(found))
        arrays = []
        for rank in range(num_ranks):
            with saved.shard(rank) as shard:
                arrays.append(shard.arrays())
        policy = rounds.new_selection()
        owners, slots = policy.adopt(
            SavedShards([part_of(each, POLICY) for each in arrays], sizes, manifest.capacity),
            rounds.capacity,
            rounds.adoption_streams.at(manifest.num_rounds),
        )
        admitted = [admission_rounds_of(each, manifest, rank) for rank, each in enumerate(arrays)]
        admitted_in = np.concatenate(admitted)[(sizes.cumsum() - sizes)[owners] + slots]
        distances = part_of(arrays[0], CONTENTS).get(DISTANCES)
        if distances is not None:
            check_distances(distances)
            distances = distances[(rooms.cumsum() - rooms)[owners] + slots]
        return policy, owners, slots, admitted_in, distances

    policy, owners, slots, admitted_in, distances = together(rounds.transport, understand, "load")

    def records() -> Iterator[tuple[Ints, Bytes]]:
        for owner in np.unique(owners).tolist():
            own = np.flatnonzero(owners == owner)
            with saved.shard(owner) as shard:
                for positions, found in shard.rows(slots[own]):
                    yield own[positions], found

    rounds.overwrite(records)
    contents = rounds.no_contents()
    contents.resize(rounds.transport.all_gather(np.array([len(owners)]))[:, 0].copy())
    rounds.go_on(manifest.num_rounds, policy, contents, admitted_in)
    if contents.knows_labels:
        rounds.tell_contents(distances)


def _check_sizes(sizes: Ints, rooms: Ints) -> None:
    if np.any(sizes > rooms):
        raise ValueError(f"there is no room for {sizes.max()} representatives in a shard")
