"""Checkpoints of a run: each a folder with all that is needed to go on.

::

    OUTPUT/checkpoints/step-00000123/
        run.json      recipe, number of ranks, versions, where the run stands, its log so far
        trainer.pt    model, optimiser, gradient scaler, random states of all ranks
        buffer/       the rehearsal buffer, as ``RehearsalBuffer.save`` writes it
        SHA256SUMS    of the first two; the buffer has its own

A checkpoint is written as ``step-00000123.partial`` and renamed when all ranks are done and all
is on disk. So whatever ends a job, and whenever, each folder without ``.partial`` is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ritornello.errors import CheckpointError
from ritornello.experiments.models.local_steps import mean_of
from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.ranks.progress import say
from ritornello.saving.files import PARTIAL, new_file, sync_folder

FORMAT = 1


@dataclass
class Position:
    """Where a run stands, between two steps."""

    task: int = 0
    """From 0."""
    num_observed: int = 0
    """The task's mini-batches that the buffer has seen before the training (GDumb)."""
    step: int = 0
    """The task's steps that are done."""
    seconds: float = 0.0
    """That the task has taken."""
    count: int = 0
    """Steps, mini-batches observed and tasks ended, in the whole run."""


@dataclass(frozen=True)
class RunSnapshot:
    """What one rank knows of a run between two steps."""

    count: int
    """Moments so far at which the run could be saved; tells checkpoints apart."""
    where: str
    """The same in words."""
    description: dict[str, Any]
    """Goes into ``run.json``; the first rank's counts."""
    tensors: dict[str, Any]
    """Tensors, numbers and None in any nesting of dicts and lists; the first rank's counts."""
    of_rank: dict[str, Any]
    """As ``tensors``, but different on each rank."""
    save_buffer: Callable[[Path], object] | None = None
    """Called on all ranks, with a folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read again."""

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Any]
    of_ranks: list[dict[str, Any]]

    def trained(self, place: Place) -> Mapping[str, Any]:
        """The model, with all that changes it in a step.

        Amid local steps each rank has its own. On another number of ranks all begin with the mean
        of the models, and with the first rank's optimiser.
        """
        own = [each["trained"] for each in self.of_ranks if "trained" in each]
        if not own:
            return self.tensors
        if len(own) == place.num_ranks:
            trained: Mapping[str, Any] = own[place.rank]
            return trained
        counts = [each["alone"][1] for each in own]
        means = {
            name: mean_of([each[name] for each in own], counts)
            for name in ("model", "average")
            if own[0][name] is not None
        }
        return self.tensors | means

    @property
    def buffer_folder(self) -> Path:
        """Where the buffer was saved, if the run had one."""
        return self.path / "buffer"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, visible to all ranks.
        num_kept: how many; older ones are removed when a new one is in place.
        ranks: which call every method together.
    """

    def __init__(self, folder: Path, num_kept: int, ranks: Ranks) -> None:
        self._folder, self._num_kept, self._ranks = folder, num_kept, ranks
        self._damaged: set[Path] = set()

    def write(self, snapshot: RunSnapshot) -> Path:
        """Writes a checkpoint. Blocks until it is on disk.

        Raises:
            CheckpointError: on every rank, if one could not write. What was there still is.
        """
        final = self._folder / f"step-{snapshot.count:08}"
        partial = final.with_name(final.name + PARTIAL)
        is_main = self._ranks.rank == 0
        of_ranks = self._ranks.gather(snapshot.of_rank)
        try:
            with self._ranks.together(f"cannot write {partial}"):
                if is_main:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    for leftover in self._folder.glob(f"*{PARTIAL}"):
                        shutil.rmtree(leftover)
                    partial.mkdir()
                    _write_files(partial, snapshot, of_ranks)
            with self._ranks.together(f"cannot write {partial}"):
                if snapshot.save_buffer is not None:
                    snapshot.save_buffer(partial / "buffer")
        except CheckpointError:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        with self._ranks.together(f"cannot write {final}"):
            if is_main:
                sync_folder(partial)
                if final.exists():  # of a run that went on from an older one
                    shutil.rmtree(final)
                partial.rename(final)
                sync_folder(self._folder)
                self._remove_others(final)
        return final

    def newest(self) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; says which ones are not.

        Returns:
            The same on every rank; None if there is none at all.

        Raises:
            CheckpointError: none is whole.
        """
        path = self._ranks.tell(self._newest_whole() if self._ranks.rank == 0 else None)
        if path is None:
            if self._ranks.tell(self._damaged):
                raise CheckpointError(
                    f"{self._folder}: no checkpoint is whole; remove the folder to begin anew"
                )
            return None
        with self._ranks.together(f"cannot read {path}; all ranks must see it"):
            description = json.loads((path / "run.json").read_text())
            if description.get("format") != FORMAT:
                found = description.get("format")
                raise ValueError(f"it has the format {found}, this release reads {FORMAT}")
            state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        return Checkpoint(path, description, state["trainer"], state["ranks"])

    def reject(self, checkpoint: Checkpoint, error: CheckpointError) -> None:
        """Has ``newest`` give an older one: this one's buffer cannot be read."""
        self._note_damaged(checkpoint.path, error)

    def remove(self) -> None:
        """Removes all: the run has ended."""
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _newest_whole(self) -> Path | None:
        for path in reversed(self._complete()):
            if path not in self._damaged:
                try:
                    _check(path)
                except (OSError, ValueError) as error:
                    self._note_damaged(path, error)
                else:
                    return path
        return None

    def _note_damaged(self, path: Path, error: Exception) -> None:
        self._damaged.add(path)
        if self._ranks.rank == 0:
            say(f"{path} is damaged and not used: {error}", style="yellow")

    def _complete(self) -> list[Path]:
        found = self._folder.glob("step-*")
        return sorted(each for each in found if not each.name.endswith(PARTIAL))

    def _remove_others(self, newest: Path) -> None:
        """Removes what is too old, and what a run has left that went on from an older one."""
        complete = self._complete()
        position = complete.index(newest)
        for each in complete[: max(0, position + 1 - self._num_kept)] + complete[position + 1 :]:
            shutil.rmtree(each)


def _write_files(folder: Path, snapshot: RunSnapshot, of_ranks: list[dict[str, Any]]) -> None:
    state = io.BytesIO()
    torch.save({"trainer": snapshot.tensors, "ranks": of_ranks}, state)
    description = {"format": FORMAT, "where": snapshot.where, **snapshot.description}
    contents = {
        "run.json": json.dumps(description, indent=1).encode(),
        "trainer.pt": state.getvalue(),
    }
    sums = [f"{hashlib.sha256(each).hexdigest()}  {name}\n" for name, each in contents.items()]
    for name, content in {**contents, "SHA256SUMS": "".join(sums).encode()}.items():
        with new_file(folder / name) as file:
            file.write(content)


def _check(folder: Path) -> None:
    """Checks that the files of a checkpoint are as they were written, but for the buffer's.

    Raises:
        OSError: one cannot be read.
        ValueError: one has changed.
    """
    digests = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    if {name for _, name in digests} != {"run.json", "trainer.pt"}:
        raise ValueError("SHA256SUMS is incomplete")
    for digest, name in digests:
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{name} does not have its checksum")
