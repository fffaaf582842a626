"""What is in a saved buffer: which classes and tasks, how old, and whether its files are whole.

Everything is read once, a few megabytes at a time; of each representative only the label and the
round of its admission stay in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ritornello.arrays import Floats, Ints
from ritornello.errors import CheckpointError
from ritornello.experiments.results.run_folder import COMPLETE, IN_WORK
from ritornello.records.nesting import Batch
from ritornello.saving.folder import MANIFEST, MOST_LOOKS, SavedFolder, leftovers
from ritornello.saving.manifest import Manifest
from ritornello.saving.saved_buffer import admission_rounds

MOST_RESULTS_BYTES = 2**26
"""The results of a run have fewer."""


@dataclass(frozen=True)
class FileState:
    """One shard's file."""

    name: str
    num_bytes: int
    damage: str
    """What is wrong with it; "" if nothing is known to be."""


@dataclass(frozen=True)
class Inspection:
    """A saved buffer, looked at. All arrays are of the representatives in whole files."""

    saved: SavedFolder
    files: tuple[FileState, ...]
    is_checked: bool
    """Whether checksums were compared."""
    ranks: Ints
    """Whose shard each representative is in."""
    slots: Ints
    """Where in it."""
    labels: Ints | None
    """None if the buffer knew none."""
    admitted_in: Ints
    """The round of its admission."""
    tasks: Ints
    """The position in ``manifest.tasks``; -1: before the first."""
    class_names: tuple[str, ...]
    """The name of each label; empty if they are not known."""
    num_leftovers: int
    """Files that a crash has left behind."""
    identities: Ints | None
    """Which sample each is; None if the buffer knew none."""
    stores: str
    """What the run stored of images, such as "features"; "" if that is not known."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the buffer."""
        return self.saved.manifest

    @property
    def is_whole(self) -> bool:
        """Whether no file is known to be damaged."""
        return not any(file.damage for file in self.files)

    @cached_property
    def ages(self) -> Ints:
        """Rounds since the admission of each representative; 1: it was the last round."""
        return self.manifest.num_rounds - self.admitted_in

    def class_name(self, label: int) -> str:
        """A class's name, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    @cached_property
    def seconds(self) -> Floats | None:
        """About how many seconds before the save each representative came; NaN: not known.

        Between the marks of tasks rounds are taken to be equally long. None without marks.
        """
        manifest = self.manifest
        try:
            saved_at = datetime.fromisoformat(manifest.saved_at).timestamp()
        except ValueError:
            return None
        if not manifest.tasks:
            return None
        rounds = [task.first_round for task in manifest.tasks]
        began = [task.began_at for task in manifest.tasks]
        came_at = np.interp(self.admitted_in, [*rounds, manifest.num_rounds], [*began, saved_at])
        return np.where(self.tasks >= 0, saved_at - came_at, np.nan)


def find_buffers(folder: Path) -> list[Path]:
    """The saved buffers in a folder: itself, or those of the run whose output it is.

    Raises:
        FileNotFoundError: there is none.
    """
    if (folder / MANIFEST).exists():
        return [folder]
    # Also those of an extension, and of one that a crash has interrupted: see ``run_folder``.
    places = (folder / COMPLETE, folder, folder / IN_WORK)
    checkpoints = sorted(
        (path for place in places for path in place.glob("checkpoints/step-*/buffer")), reverse=True
    )
    whole = [each for each in checkpoints if not each.parent.name.endswith(".partial")]
    candidates = [*(place / "buffer" for place in places), folder / COMPLETE / "old-buffer", *whole]
    found = [each for each in candidates if (each / MANIFEST).exists()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no saved buffer: give a folder from RehearsalBuffer.save, or the "
            "output folder of a run"
        )
    return found


def inspect_buffer(folder: Path, check: bool = True) -> Inspection:
    """Looks at a saved buffer.

    Args:
        folder: of the buffer.
        check: whether to compare the files' checksums.

    Raises:
        CheckpointError: its manifest is damaged. (Damaged shards are only noted.)
    """
    for _ in range(MOST_LOOKS):
        inspection = _inspect(SavedFolder(folder), check)
        # A job that saves there may have removed the files.
        if inspection.is_whole or not inspection.saved.has_been_replaced():
            break
    return inspection


def _inspect(saved: SavedFolder, check: bool) -> Inspection:
    """See ``inspect_buffer``."""
    manifest = saved.manifest
    identity = manifest.identity
    files = []
    parts: list[tuple[Ints, ...]] = []
    for rank, file in enumerate(manifest.files):
        damage = ""
        found: list[tuple[Ints, ...]] = []
        try:
            slots = None if check else np.arange(len(admission_rounds(saved, rank)))
            for each in saved.representatives(rank, slots):
                labels = np.zeros_like(each.slots) if each.labels is None else each.labels
                ranks = np.full_like(each.slots, rank)
                identities = labels if identity is None else _field(each.batch, manifest, identity)
                found.append((ranks, each.slots, labels, each.admitted_in, each.tasks, identities))
            parts += found
        except CheckpointError as error:
            damage = str(error)
        files.append(FileState(file.name, file.num_bytes, damage))
    of_run = _results_of_run(saved.folder)
    nothing = (np.zeros(0, dtype=np.int64),) * 6
    ranks, slots, labels, admitted_in, tasks, identities = (
        np.concatenate(each) for each in zip(nothing, *parts, strict=True)
    )
    return Inspection(
        saved,
        tuple(files),
        check,
        ranks,
        slots,
        None if manifest.label is None else labels,
        admitted_in,
        tasks,
        _class_names(of_run),
        len(leftovers(saved.folder)),
        None if identity is None else identities,
        _stores(of_run),
    )


def _field(batch: Batch, manifest: Manifest, position: int) -> Ints:
    assert manifest.layout is not None
    return manifest.layout.leaves(batch)[position].numpy().astype(np.int64)


def _results_of_run(folder: Path) -> dict[str, Any]:
    """What the run has written down that the buffer, or the checkpoint it is in, is of."""
    for parent in folder.resolve().parents[:4]:
        path = parent / "results.json"
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MOST_RESULTS_BYTES:
                return {}
            results: Any = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}  # whatever that file is, the buffer is another one
        return results if isinstance(results, dict) else {}
    return {}


def _class_names(results: dict[str, Any]) -> tuple[str, ...]:
    names = results.get("class_names", [])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _stores(results: dict[str, Any]) -> str:
    config = results.get("config")
    return str(config.get("stores", "")) if isinstance(config, dict) else ""
