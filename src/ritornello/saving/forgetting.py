"""Removing samples from a saved buffer for good, as when a person's data must be forgotten.

The folder is written anew without them, in the way of a save: files get new names, the manifest is
renamed into place when all of them are on disk, and the old files are removed. So a crash leaves
either everything or nothing forgotten, and forgetting again ends what it began.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ritornello.arrays import Arrays, Ints
from ritornello.errors import CheckpointError
from ritornello.policies.contents import Contents
from ritornello.policies.names import SAMPLING_POLICIES, SELECTION_POLICIES, Policy
from ritornello.policies.protection import Protected, is_protected
from ritornello.policies.selection import SelectionPolicy, State
from ritornello.policies.within_bytes import within_bytes
from ritornello.records.shard import rows_per_rank
from ritornello.saving.conditions import Values, Where
from ritornello.saving.files import sync_folder
from ritornello.saving.folder import (
    SavedFolder,
    locked_to_save,
    now,
    random_id,
    remove_leftovers,
    replace_manifest,
    shard_name,
)
from ritornello.saving.manifest import Manifest, Removal, SavedFile
from ritornello.saving.saved_buffer import (
    BYTES_IN_PAGES,
    CONTENTS,
    POLICY,
    STAGED_PAGES,
    admission_rounds,
    contents_arrays,
    contents_state,
    num_pages_of,
    records_of,
    sampling_state,
    selection_state,
)
from ritornello.saving.shard_file import PIECE_BYTES, new_shard_file


@dataclass(frozen=True)
class Forgotten:
    """What ``forget`` has removed, or would.

    Attributes:
        num_removed: representatives.
        num_left: representatives that are left.
        removed_per_class: how many of the representatives removed each class had, by label.
        removed_per_task: and each task, by name; "" is before the first.
        receipt: what makes the checksums in the manifest provable; "" if there are none.
    """

    num_removed: int
    num_left: int
    removed_per_class: dict[int, int]
    removed_per_task: dict[str, int]
    receipt: str = ""


def forget(
    folder: str | os.PathLike[str],
    where: Mapping[str, Values],
    *,
    selection: SelectionPolicy | None = None,
    dry_run: bool = False,
) -> Forgotten:
    """Removes samples from a saved buffer, so that nothing of them is left in its folder.

    What was removed counts as never offered. The shards then have room, which the next candidates
    fill after a ``load``. The representatives drawn for the next step are removed, too, and
    ``load`` draws again. The manifest says what was removed, and when; see ``Removal``.

    Blocks until all is on disk. A crash leaves the folder as it was, or as it shall be. Needs room
    for the folder a second time. No other job may save there meanwhile; one that still runs and
    saves later brings back what it holds.

    Args:
        folder: from ``RehearsalBuffer.save``.
        where: conditions, all of which must hold: ``label``, ``task``, or an integer field by its
            key or index (``"id"``, ``"2"``, ``"meta.id"``), to the value or a list of values.
        selection: an unused policy of the buffer's kind; needed only for policies of one's own.
        dry_run: changes nothing, and says what would be removed.

    Raises:
        ValueError: a condition that the samples cannot meet; names it.
        CheckpointError: there is no saved buffer, it is damaged, in use, cannot be written, or the
            policy cannot forget. The folder is as it was.
    """
    saved = SavedFolder(folder)  # first, so that nothing is made where there is none
    path = saved.folder
    if dry_run:
        return _find(saved, Where(where, saved.manifest)).outcome()
    try:
        with locked_to_save(path):
            remove_leftovers(path)  # a crash may have left what was to be forgotten
            sync_folder(path)
            return _forget(SavedFolder(path), where, selection)
    except OSError as error:
        raise CheckpointError(f"{path} could not be rewritten: {error}") from error


def _forget(
    saved: SavedFolder, where: Mapping[str, Values], selection: SelectionPolicy | None
) -> Forgotten:
    """``forget`` while nobody else is in the folder."""
    conditions = Where(where, saved.manifest)
    found = _find(saved, conditions)
    outcome = found.outcome()
    if outcome.num_removed == 0:
        return outcome
    receipt = secrets.token_hex(16) if conditions.is_private else ""
    removal = Removal(conditions.as_proof(receipt), outcome.num_removed, outcome.num_left, now())
    try:
        _rewrite(saved, found, removal, selection)
    finally:
        remove_leftovers(saved.folder)  # the files before, or, if it failed, the new ones
        sync_folder(saved.folder)
    return replace(outcome, receipt=receipt)


@dataclass
class _Found:
    """What is meant in a saved buffer."""

    manifest: Manifest
    slots: list[Ints] = field(default_factory=list)
    """For each shard, where they are, ascending."""
    num_per_class: Counter[int] = field(default_factory=Counter)
    num_per_task: Counter[str] = field(default_factory=Counter)

    def outcome(self) -> Forgotten:
        """In numbers."""
        num_slots = sum(map(len, self.slots))
        return Forgotten(
            num_removed=num_slots,
            num_left=self.manifest.num_held - num_slots,
            removed_per_class=dict(sorted(self.num_per_class.items())),
            removed_per_task=dict(self.num_per_task),
        )


def _find(saved: SavedFolder, where: Where) -> _Found:
    """Reads the whole buffer, and checks it.

    Raises:
        CheckpointError: it is damaged.
    """
    manifest = saved.manifest
    if manifest.num_offers > manifest.num_rounds:
        raise CheckpointError(
            f"{saved.folder} was saved with rounds_per_exchange="
            f"{manifest.arguments.get('rounds_per_exchange')}, and may hold candidates that "
            "waited for their round: load it into a buffer and save that, which leaves them out"
        )
    found = _Found(manifest)
    for rank in range(manifest.num_ranks):
        admitted_in = admission_rounds(saved, rank)
        slots = [np.zeros(0, dtype=np.int64)]
        for at, records in saved.checked_rows(rank):
            meant = where.matches(records, admitted_in[at])
            slots.append(at[meant])
            if manifest.layout is not None and manifest.label is not None:
                rows = torch.from_numpy(records[meant])
                found.num_per_class.update(manifest.layout.integers(rows, manifest.label).tolist())
        found.slots.append(np.sort(np.concatenate(slots)))
        for number in manifest.task_numbers(admitted_in[found.slots[rank]]).tolist():
            found.num_per_task[manifest.tasks[number].name if number >= 0 else ""] += 1
    return found


def _rewrite(
    saved: SavedFolder, found: _Found, removal: Removal, selection: SelectionPolicy | None
) -> None:
    """Writes the shards without what was found, and makes them those that count."""
    folder, manifest = saved.folder, saved.manifest
    with _understanding(folder):
        policy = selection or _policy_of(manifest)
        if manifest.paging is not None:
            policy = within_bytes(policy, manifest.paging.num_pages)
        states, kept = _without(saved, found.slots, policy)
    _check_room(saved)
    before, after = _places(manifest, kept)
    save_id, files = f"{random_id():016x}", []
    for rank, slots in enumerate(kept):
        arrays = dict(_arrays(saved, rank))
        with _understanding(folder):
            arrays |= {POLICY + name: each for name, each in states[rank].items()}
            arrays["admitted_in"] = arrays["admitted_in"][slots]
            arrays["staged"] = records_of(arrays, "staged", manifest.record_bytes)[:0]
            pages = None
            if manifest.paging is not None:
                size = manifest.paging.page_bytes
                counts = num_pages_of(arrays, manifest, rank, size)
                arrays[STAGED_PAGES] = records_of(arrays, STAGED_PAGES, size)[:0]
                arrays[BYTES_IN_PAGES] = arrays[BYTES_IN_PAGES][slots]
                pages = int(counts[slots].sum()), size
            moved = _moved(arrays, manifest, before, after)
        arrays = {
            name: moved.get(name, each)
            for name, each in arrays.items()
            if name in moved or not name.startswith(CONTENTS)
        }
        name = f"{shard_name(rank, manifest.num_ranks, save_id)}.safetensors"
        size = manifest.record_bytes
        with (
            saved.shard(rank) as shard,
            new_shard_file(folder / name, arrays, (len(slots), size), pages) as file,
        ):
            if pages is not None:
                starts = counts.cumsum() - counts
                for slot in slots[counts[slots] > 0].tolist():
                    file.write(shard.pages(int(starts[slot]), int(counts[slot])).reshape(-1))
            num_at_once = max(1, PIECE_BYTES // max(1, size))
            for first in range(0, len(slots), num_at_once):
                wanted = slots[first : first + num_at_once]
                piece = np.empty((len(wanted), size), np.uint8)
                for positions, records in shard.rows(wanted):
                    piece[positions] = records
                file.write(piece.reshape(-1))
        files.append(SavedFile(name, file.num_bytes, file.sha256))
    sync_folder(folder)
    left = replace(
        manifest,
        held_per_rank=tuple(map(len, kept)),
        num_staged=0,
        removals=(*manifest.removals, removal),
    )
    replace_manifest(folder, left.with_files(tuple(files), save_id, manifest.saved_at))


def _without(
    saved: SavedFolder, removed: list[Ints], policy: SelectionPolicy
) -> tuple[list[State], list[Ints]]:
    """What changes in the state of each shard's policy, and the slots whose records stay."""
    states, kept = list[State](), list[Ints]()
    for rank, size in enumerate(saved.manifest.held_per_rank):
        state, slots = State(), np.arange(size)
        if len(removed[rank]):
            before = selection_state(_arrays(saved, rank))
            own = Protected(policy) if is_protected(before) else policy
            state, slots = own.forget(before, size, removed[rank])
        states.append(state)
        kept.append(slots)
    return states, kept


def _places(manifest: Manifest, kept: list[Ints]) -> tuple[Ints, Ints]:
    """Where in the whole buffer, see ``Contents``, the records that stay were, and are now."""
    num_ranks = manifest.num_ranks
    rooms = rows_per_rank(manifest.capacity, num_ranks)
    firsts = np.repeat(rooms.cumsum() - rooms, [len(slots) for slots in kept])
    after = np.concatenate([np.arange(len(slots)) for slots in kept])
    return firsts + np.concatenate(kept), firsts + after


def _moved(arrays: Arrays, manifest: Manifest, before: Ints, after: Ints) -> Arrays:
    """What is to be saved of the contents, and what their sampling policy remembers, now."""
    contents, remembered = contents_state(arrays), sampling_state(arrays)
    if not contents:
        return {}
    policy = _named(manifest.arguments.get("sampling", ""), SAMPLING_POLICIES)
    if policy is None or not remembered:  # of a policy of one's own nothing can be kept
        remembered = {}
    else:
        remembered = policy.forget(remembered, before, after)
    moved = Contents.moved(contents, before, after, manifest.capacity)
    return contents_arrays(moved, remembered)


def _arrays(saved: SavedFolder, rank: int) -> Arrays:
    with saved.shard(rank) as shard:
        return shard.arrays()


def _policy_of(manifest: Manifest) -> SelectionPolicy:
    """An unused policy of the buffer's kind.

    Raises:
        CheckpointError: it is none of ours.
    """
    text = manifest.arguments.get("selection", "")
    policy = _named(text, SELECTION_POLICIES)
    if policy is not None:
        return policy
    raise CheckpointError(
        f"the saved buffer has the selection policy {text}, which is none of Ritornello's: call "
        "ritornello.forget from Python, with selection= one of its kind"
    )


def _named(text: str, policies: Mapping[str, type[Policy]]) -> Policy | None:
    """An unused policy of the kind that an argument's text says; None: it is none of ours."""
    kind = text.partition("(")[0]
    for name, policy in policies.items():
        if kind in (name, policy.__qualname__):
            return policy()
    return None


def _check_room(saved: SavedFolder) -> None:
    needed = sum(file.num_bytes for file in saved.manifest.files)
    free = shutil.disk_usage(saved.folder).free
    if needed > free:
        raise CheckpointError(
            f"{saved.folder} has {free / 1e9:.2f} GB free, but needs {needed / 1e9:.2f} GB: the "
            "files are written anew beside the old ones"
        )


@contextmanager
def _understanding(what: str | Path) -> Iterator[None]:
    """Around what believes nothing that was saved."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError) as error:
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        raise CheckpointError(f"{what} cannot be understood: {kind}{error}") from error
