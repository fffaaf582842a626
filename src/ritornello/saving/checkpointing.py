"""What a live buffer saves, and how it becomes a saved one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.errors import CheckpointError, RoundError
from ritornello.records.digest import digest
from ritornello.records.layout import Layout
from ritornello.rounds.arguments import Arguments
from ritornello.rounds.steps import Steps
from ritornello.rounds.worker import Worker
from ritornello.saving.manifest import Manifest, Removal, TaskMark
from ritornello.saving.restoring import adopt, restore
from ritornello.saving.saved_buffer import POLICY, SavedBuffer, contents_arrays, records_of
from ritornello.saving.state_dict import PREFIX, entry_of, gathered
from ritornello.saving.writing import SaveUnderWay, Snapshot, new_save_id
from ritornello.transports.agreement import together

DRAWN_BY = ("num_draws", "sampling")
"""The arguments that, with the rate, say what is drawn, and how much is staged for a step."""

MOST_FIELDS_NAMED = 8
"""In an error that says which samples a buffer holds."""

logger = logging.getLogger(__name__)


class Checkpointing:
    """Saves one rank's buffer, and takes saved ones over; on the trainer's thread.

    Args:
        arguments: of the buffer.
        steps: of the buffer.
        worker: that writes saves in the background.

    Attributes:
        tasks: marks of where tasks began.
    """

    def __init__(self, arguments: Arguments, steps: Steps, worker: Worker) -> None:
        self._arguments, self._steps, self._worker = arguments, steps, worker
        self._as_text = arguments.as_text()
        self._rounds, self._transport = steps.rounds, steps.rounds.transport
        self.tasks: tuple[TaskMark, ...] = ()
        self._removals: tuple[Removal, ...] = ()
        self._saving: SaveUnderWay | None = None

    def begin_task(self, name: str) -> None:
        """See ``RehearsalBuffer.begin_task``."""
        self._steps.begin_task()
        mark = TaskMark(str(name), self._rounds.num_rounds, time.time())
        self.tasks = (*self.tasks, mark)

    # Saving.

    def save(self, folder: str | os.PathLike[str], background: bool) -> None:
        """See ``RehearsalBuffer.save``."""
        with self._steps.with_peers("save"):
            self._end()
            snapshot = together(self._transport, self._snapshot, "save")
            saving = SaveUnderWay(
                Path(folder),
                snapshot,
                new_save_id(self._transport),
                self._rounds.to_host,
                self._transport,
                background,
            )
            saving.begin()
            self._saving, self._rounds.before_write = saving, saving.keep
            if background:
                self._worker.while_idle(saving.step)
            else:
                self._end()

    def wait(self) -> None:
        """See ``RehearsalBuffer.wait_until_saved``."""
        with self._steps.with_peers("wait_until_saved"):
            self._end()

    def finish(self, wait_seconds: float) -> None:
        """Writes what is left of a save when the buffer ends, or gives it up; never raises.

        Args:
            wait_seconds: for the round that runs, which still writes the shard, and for the save.
        """
        saving = self._saving
        if saving is None or saving.has_ended:
            return
        if self._worker.stop(wait_seconds):
            saving.finish(wait_seconds)
        else:
            logger.warning("a save in the background was given up")
            saving.give_up()

    def state_dict(self, whole: bool) -> dict[str, Any]:
        """See ``RehearsalBuffer.state_dict``."""
        self._steps.settle()
        try:
            entry = entry_of(self._snapshot(), self._rounds.to_host)
        except TypeError as error:
            raise CheckpointError(self._steps.here(str(error))) from error
        if not whole:
            return {f"{PREFIX}{self._transport.rank}": entry}
        with self._steps.with_peers("state_dict"):
            return dict(gathered(entry, self._transport))

    def _end(self) -> None:
        """Waits for the save under way, if any. All ranks have one, or none has."""
        saving, self._saving, self._rounds.before_write = self._saving, None, None
        if saving is not None:
            saving.wait()

    def _snapshot(self) -> Snapshot:
        """What this rank saves, while no round runs.

        Raises:
            TypeError: a policy cannot be saved.
        """
        rounds = self._rounds
        arrays: dict[str, NDArray[Any]] = {
            "admitted_in": rounds.admitted_in[: rounds.num_held].copy()
        }
        arrays |= {POLICY + name: each for name, each in rounds.selection.state().items()}
        if rounds.contents.knows_labels:
            arrays |= contents_arrays(rounds.contents.state(), rounds.sampling.state())
        if self._steps.begun is not None:
            arrays["staged"] = self._steps.staged_records().numpy()
        manifest = self._manifest()
        manifest.as_json()  # fails here, if at all
        return Snapshot(manifest, arrays, rounds.used_rows(manifest.record_bytes))

    def _manifest(self) -> Manifest:
        """What all ranks know, while no round runs."""
        steps, begun = self._steps, self._steps.begun
        return Manifest(
            arguments=self._as_text,
            capacity=int(self._arguments.capacity),
            held_per_rank=tuple(self._rounds.contents.sizes.tolist()),
            num_rounds=self._rounds.num_rounds,
            num_offers=steps.num_offers,
            is_offered=steps.is_offered,
            num_staged=steps.num_staged,
            layout=begun.layout if begun else None,
            label=begun.label if begun else None,
            on_gpu=begun is not None and begun.staging.on_gpu,
            num_drawn=steps.num_staged,
            rate=steps.rate if self._arguments.rate_may_change else None,
            tasks=self.tasks,
            removals=self._removals,
        )

    # Taking over.

    def load(self, open_saved: Callable[[], SavedBuffer], call: str) -> None:
        """Takes over a saved buffer; see ``RehearsalBuffer.load``."""
        with self._steps.with_peers(call):
            with suppress(CheckpointError):  # it was logged, and is no reason not to load
                self._end()
            saved = together(self._transport, open_saved, call)
            ids = self._transport.all_gather(np.array([digest(saved.manifest.in_common)]))
            if (ids != ids[0]).any():
                raise CheckpointError(f"{call}: the ranks see different saves")
            together(self._transport, lambda: self._check_fits(saved.manifest), call)
            had_begun = self._steps.begun is not None
            try:
                self._take_over(saved, call)
            except CheckpointError:
                if not had_begun:
                    self._steps.forget_restored()
                if self._rounds.is_torn:
                    self._steps.failure = RoundError(
                        self._steps.here(f"{call} failed when parts of the shard were overwritten")
                    )
                raise

    def _check_fits(self, manifest: Manifest) -> None:
        """Checks that a saved buffer can become this one.

        Raises:
            CheckpointError: names what differs.
        """
        for name in ("selection", "label"):
            saved, own = manifest.arguments.get(name), self._as_text[name]
            if saved != own:
                raise CheckpointError(
                    f"the saved buffer has {name}={str(saved)[:200]}, this one {name}={own}: they "
                    "must be the same"
                )
        theirs = manifest.layout
        ours = self._steps.begun.layout if self._steps.begun else None
        if ours and theirs and ours.digest != theirs.digest:
            raise CheckpointError(
                f"the saved buffer holds other samples: {_fields_text(theirs)}; this one holds "
                f"{_fields_text(ours)}"
            )
        if theirs is not None:
            needed = self._rounds.needs_labels
            if theirs.label_position(self._arguments.label_path, needed) != manifest.label:
                raise CheckpointError("the saved buffer has its label elsewhere")
            path = self._arguments.identity_path
            if path is not None:
                theirs.identity_position(path)

    def _take_over(self, saved: SavedBuffer, call: str) -> None:
        """Becomes a saved buffer that fits.

        What is the same decides how much goes on as it was. Ranks and capacity: all shards, slot
        for slot; else representatives are dealt out anew. Also the rate, and what ``DRAWN_BY``
        names: what was drawn for the next step; else that is drawn again, in a round without
        candidates.
        """
        manifest, own, steps = saved.manifest, self._manifest(), self._steps
        has_same_shards = manifest.num_ranks == own.num_ranks and manifest.capacity == own.capacity
        draws_alike = all(manifest.arguments.get(name) == own.arguments[name] for name in DRAWN_BY)
        rate, rate_again = self._rates(manifest)
        goes_on = (
            has_same_shards
            and draws_alike
            and self._has_same_rate(manifest)
            and manifest.num_offers == manifest.num_rounds  # else see ``Manifest.num_offers``
        )
        layout = manifest.layout
        if layout is None:
            # Nothing to take over; but a buffer that has begun cannot become one that has not.
            if own.num_rounds or own.num_offers:
                raise CheckpointError(f"{call}: the saved buffer had not begun, but this one has")
            self.tasks, self._removals, steps.rate = manifest.tasks, manifest.removals, rate
            return
        together(
            self._transport,
            lambda: steps.begin_restored(layout, manifest.label, manifest.on_gpu),
            call,
        )
        # First all that may be refused, while this buffer is as it was: then its shard is written.
        staged = torch.zeros((0, manifest.record_bytes), dtype=torch.uint8)
        if goes_on:
            staged = together(self._transport, lambda: self._staged_in(saved), call)
        if has_same_shards:
            same_sampling = manifest.arguments.get("sampling") == own.arguments["sampling"]
            # Another policy may have known no labels, or may remember something else.
            restore(self._rounds, saved, same_sampling and self._rounds.sampling.needs_labels)
        else:
            adopt(self._rounds, saved)
        self.tasks, self._removals = manifest.tasks, manifest.removals
        steps.go_on(manifest.num_rounds, manifest.is_offered, staged, rate)
        # After `forget` there is none either: what was drawn may have been what was to be removed.
        if manifest.lacks_draw or not goes_on:
            steps.draw_again(rate_again)

    def _has_same_rate(self, manifest: Manifest) -> bool:
        """Whether what a saved buffer drew is as much as this one would, or may be."""
        if manifest.rate is not None and self._arguments.rate_may_change:
            return manifest.num_staged <= self._arguments.most_per_draw * self._arguments.num_draws
        name = "num_representatives"
        return manifest.rate is None and manifest.arguments.get(name) == self._as_text[name]

    def _rates(self, manifest: Manifest) -> tuple[float, float]:
        """The rate with which a saved buffer goes on here, and that of what is drawn again.

        The latter is of the saved buffer's last round, as another may have been set since.
        """
        rate = self._steps.rate
        if manifest.rate is None or not self._arguments.rate_may_change:
            return rate, rate
        most, num_draws = self._arguments.most_per_draw, self._arguments.num_draws
        rate = min(manifest.rate, most)
        if manifest.num_drawn is None or manifest.arguments.get("num_draws") != str(num_draws):
            return rate, rate
        return rate, min(manifest.num_drawn // num_draws, most)

    def _staged_in(self, saved: SavedBuffer) -> Tensor:
        """What this rank had staged for the next step, checked.

        Raises:
            ValueError, KeyError: it cannot be.
        """
        manifest = saved.manifest
        with saved.shard(self._transport.rank) as shard:
            arrays = shard.arrays()
        staged = torch.from_numpy(records_of(arrays, "staged", manifest.record_bytes))
        num_draws = self._arguments.num_draws
        most = min(self._arguments.most_per_draw, manifest.num_held) * num_draws
        if len(staged) != manifest.num_staged or len(staged) > most or len(staged) % num_draws:
            raise ValueError(
                f"{len(staged)} staged, but {manifest.num_staged} according to the manifest, "
                f"and at most {most} can have been drawn"
            )
        return staged


def _fields_text(layout: Layout) -> str:
    text = "; ".join(map(str, layout.fields[:MOST_FIELDS_NAMED]))
    return text + "; ..." * (len(layout.fields) > MOST_FIELDS_NAMED)
