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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ritornello.arrays import Bools, Ints
from ritornello.checkpoint import (
    Arrays,
    SavedFolder,
    lock,
    now,
    random_id,
    remove_leftovers,
    replace_manifest,
    shard_name,
    sync_folder,
)
from ritornello.contents import Contents
from ritornello.errors import CheckpointError
from ritornello.manifest import Manifest, Removal, SavedFile
from ritornello.rounds import rows_of_rank
from ritornello.saved_arrays import CONTENTS, POLICY, part_of, records_of
from ritornello.saved_representatives import admission_rounds
from ritornello.selection import POLICIES, SelectionPolicy
from ritornello.shard_file import PIECE_BYTES, NewShardFile
from ritornello.where import Values, Where


@dataclass(frozen=True)
class Forgotten:
    """What ``forget`` has removed, or would.

    Attributes:
        num_removed: samples: representatives, and candidates that waited for their round.
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
    path = Path(folder)
    saved = SavedFolder(path)  # before anything is made there
    if dry_run:
        return _Search(saved, where).outcome()
    descriptor = lock(path)
    try:
        remove_leftovers(path)
        sync_folder(path)
        saved = SavedFolder(path)
        search = _Search(saved, where)
        if search.outcome().num_removed == 0:
            return search.outcome()
        return _rewrite(saved, search, selection)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        os.close(descriptor)


class _Search:
    """Looks for what is meant; reads every file, and checks it."""

    def __init__(self, saved: SavedFolder, where: Mapping[str, Values]) -> None:
        self.where = Where(where, saved.manifest)
        self._manifest = manifest = saved.manifest
        self.removed: list[Ints] = []
        self.waits: list[Bools] = []
        self._labels, self._tasks = Counter[int](), Counter[str]()
        for rank in range(manifest.num_ranks):
            self.removed.append(self._slots(saved, rank))
            with saved.shard(rank) as shard:
                arrays = shard.arrays()
            if manifest.layout is None:
                self.waits.append(np.zeros(0, np.bool_))
                continue
            with _understanding(saved.folder):
                waiting = records_of(arrays, "waiting", manifest.record_bytes)
            # They would be admitted in the next round.
            rounds = np.full(len(waiting), manifest.num_rounds)
            self.waits.append(self.where.matches(waiting, rounds))

    def _slots(self, saved: SavedFolder, rank: int) -> Ints:
        """The slots of a shard's representatives that are meant, ascending."""
        manifest = self._manifest
        admitted_in = admission_rounds(saved, rank)
        found = [np.zeros(0, dtype=np.int64)]
        for slots, records in saved.checked_rows(rank):
            meant = self.where.matches(records, admitted_in[slots])
            found.append(slots[meant])
