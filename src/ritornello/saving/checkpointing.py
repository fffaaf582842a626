"""What a live buffer saves, and how it becomes a saved one."""

from __future__ import annotations

import logging
import os
import reprlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ritornello.arrays import Arrays
from ritornello.errors import CheckpointError, RoundError
from ritornello.policies.names import SAMPLING_POLICIES, SELECTION_POLICIES
from ritornello.policies.protection import is_protected
from ritornello.policies.within_bytes import WithinBytes
from ritornello.records.digest import digest
from ritornello.records.layout import Layout
from ritornello.records.paging import Records, bytes_of_records, pages_of_records, starts_of
from ritornello.rounds.arguments import Arguments
from ritornello.rounds.first_batch import bounded
from ritornello.rounds.steps import Steps
from ritornello.rounds.worker import Worker
from ritornello.saving.files import folder_at
from ritornello.saving.folder import MOST_LOOKS
from ritornello.saving.manifest import MOST_NAME, Manifest, Removal, TaskMark
from ritornello.saving.restoring import adopt, restore
from ritornello.saving.saved_buffer import (
    BYTES_IN_PAGES,
    STAGED_PAGES,
    SavedBuffer,
    check_lengths,
    contents_arrays,
    records_of,
    sampling_state,
    selection_arrays,
    selection_state,
)
from ritornello.saving.shard_file import check_header, header_of
from ritornello.saving.state_dict import PREFIX, Entry, entry_of, gathered
from ritornello.saving.writing import SaveUnderWay, Snapshot, new_save_id
from ritornello.transports.agreement import together

AFTER_LOAD = ". (The buffer was loaded: load with convert= gives its samples another form)"

DRAWN_BY = ("num_draws", "sampling", "draws")
"""The arguments that, with the rate, say what is drawn, and how much is staged for a step."""

MOST_FIELDS_NAMED = 8
"""In an error that says which samples a buffer holds."""

logger = logging.getLogger(__name__)


class Checkpointing:
    """Saves one rank's buffer, and takes saved ones over; the worker does all of it as a whole.

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
        text = str(name)
        if len(text) > MOST_NAME:
            raise ValueError(
                self._steps.here(
                    f"begin_task: the name {reprlib.repr(text)} has {len(text)} characters: it "
                    f"must have at most {MOST_NAME}"
                )
            )

        rounds = self._rounds

        def begin() -> None:
            if rounds.sampling.needs_tasks:
                rounds.sampling.begin_task(rounds.contents)
            # No clock is right that is before 1970.
            now = max(0.0, time.time())
            self.tasks = (*self.tasks, TaskMark(text, rounds.num_rounds, now))
            self._steps.training.knows_tasks = True

        # Else ranks would count tasks, or draw, differently.
        self._steps.with_peers("begin_task", begin)

    # Saving.

    def save(self, folder: str | os.PathLike[str], background: bool) -> None:
        """See ``RehearsalBuffer.save``."""
        place = folder_at(folder)  # the trainer may go elsewhere meanwhile

        def begin() -> None:
            self._end()
            snapshot = together(self._transport, self._snapshot, "save")
            saving = SaveUnderWay(
                place,
                snapshot,
                new_save_id(self._transport),
                self._rounds.to_host,
                self._transport,
                background,
            )
            saving.begin()
            self._saving = saving
            self._have_kept(saving)
            if background:
                self._worker.while_idle(partial(self._step, saving))
            else:
                self._end()

        self._steps.with_peers("save", begin)

    def wait(self) -> None:
        """See ``RehearsalBuffer.wait_until_saved``."""
        self._steps.with_peers("wait_until_saved", self._end)

    def write(self) -> None:
        """Writes what is left of this rank's file when the buffer ends; raises nothing."""
        if self._saving is not None:
            self._saving.write()

    def finish(self, patience_seconds: float) -> None:
        """Makes a save count when the buffer has ended; raises nothing. See ``SaveUnderWay``."""
        if self._saving is not None:
            self._saving.finish(patience_seconds)

    def state_dict(self, whole: bool) -> dict[str, Any]:
        """See ``RehearsalBuffer.state_dict``."""

        def entry() -> Entry:
            return entry_of(self._snapshot(), self._rounds.to_host)

        def all_entries() -> dict[str, Any]:
            own = together(self._transport, entry, "state_dict")
            return dict(gathered(own, self._transport))

        if whole:
            return self._steps.with_peers("state_dict", all_entries)
        try:
            return {f"{PREFIX}{self._transport.rank}": self._steps.between_rounds(entry)}
        except RoundError:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, CheckpointError) else f"it failed: {error}"
            raise CheckpointError(self._steps.here(f"state_dict: {text}")) from error

    def _end(self) -> None:
        """Waits for the save under way, if any. All ranks have one, or none has."""
        try:
            if self._saving is not None:
                self._saving.wait()
        finally:
            self._saving = None
            self._have_kept(None)

    def _step(self, saving: SaveUnderWay) -> float | None:
        """``SaveUnderWay.step``, between two rounds; what it says of the save is for ``wait``."""
        pause = saving.step()
        if saving.has_ended and saving is self._saving:
            self._have_kept(None)
        return pause

    def _have_kept(self, saving: SaveUnderWay | None) -> None:
        """Has rounds set aside for a save what they overwrite; None: for none any more."""
        rounds = self._rounds
        rounds.before_write = None if saving is None else saving.keep
        if rounds.paged is not None:
            rounds.paged.before_write = None if saving is None else saving.keep_pages

    def _snapshot(self) -> Snapshot:
        """What this rank saves, while no round runs.

        Raises:
            Exception: it could not be loaded again; also what a policy of one's own raises.
        """
        rounds = self._rounds
        arrays: dict[str, Any] = {"admitted_in": rounds.admitted_in[: rounds.num_held].copy()}
        arrays |= selection_arrays(rounds.selection.state())
        if rounds.contents.knows_places:
            arrays |= contents_arrays(rounds.contents.state(), rounds.sampling.state())
        if self._steps.begun is not None:
            staged = self._steps.staged_records()
            arrays["staged"] = staged.rows.numpy()
            if staged.pages is not None:
                arrays[STAGED_PAGES] = staged.pages.numpy()
        manifest = self._manifest()
        manifest.as_readable_json()
        snapshot = Snapshot(manifest, arrays, rounds.used_rows(manifest.record_bytes))
        if manifest.layout is not None and manifest.paging is not None:
            arrays[BYTES_IN_PAGES] = bytes_of_records(manifest.layout, snapshot.rows.numpy())
            pages = torch.zeros((0, manifest.paging.page_bytes), dtype=torch.uint8)
            numbers = np.zeros(0, dtype=np.int64)
            if rounds.paged is not None:
                pages = rounds.paged.pages.shard.rows
                numbers = rounds.paged.pages.of_slots(np.arange(rounds.num_held))
            snapshot = replace(snapshot, pages=pages, page_numbers=numbers)
        check_header(header_of(arrays, *snapshot.shapes), arrays, *snapshot.shapes)
        self._check_restores(arrays)
        return snapshot

    def _check_restores(self, arrays: Arrays) -> None:
        """Has policies of one's own take back what they have given.

        Raises:
            Exception: what they raise.
        """
        rounds = self._rounds
        copies = {name: array.copy() for name, array in arrays.items()}
        if type(rounds.selection) not in (*SELECTION_POLICIES.values(), WithinBytes):
            state = selection_state(copies)
            rounds.new_selection(is_protected(state)).restore(state, rounds.num_held)
        remembered = sampling_state(copies)
        if remembered and type(rounds.sampling) not in SAMPLING_POLICIES.values():
            rounds.new_sampling().restore(remembered)

    def _manifest(self) -> Manifest:
        """What all ranks know, while no round runs."""
        steps, begun = self._steps, self._steps.begun
        return Manifest(
            arguments=self._as_text,
            capacity=int(self._rounds.capacity),
            held_per_rank=tuple(self._rounds.contents.sizes.tolist()),
            num_rounds=self._rounds.num_rounds,
            num_offers=steps.num_offers,
            is_offered=steps.is_offered,
            num_staged=self._rounds.most_drawn,
            layout=begun.layout if begun else None,
            label=begun.label if begun else None,
            on_gpu=begun is not None and begun.staging.on_gpu,
            num_drawn=self._rounds.most_drawn,
            rate=steps.rate if self._arguments.rate_may_change else None,
            tasks=self.tasks,
            removals=self._removals,
        )

    # Taking over.

    def load(self, open_saved: Callable[[], SavedBuffer], call: str) -> None:
        """Takes over a saved buffer; see ``RehearsalBuffer.load``."""

        def take_over() -> None:
            with suppress(CheckpointError):  # it was logged, and is no reason not to load
                self._end()
            had_begun = self._steps.begun is not None
            try:
                for _ in range(MOST_LOOKS):
                    if self._load_once(open_saved, call):
                        return
                    if not had_begun:
                        self._steps.forget_restored()
                raise CheckpointError(
                    f"{call}: other saves took the place of what was read, {MOST_LOOKS} times: "
                    "another job saves there all the time; give each job a folder of its own"
                )
            except BaseException:
                if not had_begun:
                    self._steps.forget_restored()
                if self._rounds.is_torn:
                    self._steps.failure = RoundError(
                        self._steps.here(f"{call} failed when parts of the shard were overwritten")
                    )
                raise

        self._steps.with_peers(call, take_over)

    def _load_once(self, open_saved: Callable[[], SavedBuffer], call: str) -> bool:
        """Whether it could; False: another save has taken the place of what was read.

        Raises:
            CheckpointError: on every rank, for another reason.
        """
        saved = together(self._transport, open_saved, call)
        try:
            ids = self._transport.all_gather(np.array([digest(saved.manifest.in_common)]))
            if (ids != ids[0]).any():
                raise CheckpointError(f"{call}: the ranks see different saves")
            together(self._transport, lambda: self._check_fits(saved.manifest), call)
            self._take_over(saved, call)
        except CheckpointError:
            if self._transport.all_gather(np.array([saved.has_been_replaced()])).any():
                return False
            raise
        return True

    def _check_fits(self, manifest: Manifest) -> None:
        """Checks that a saved buffer can become this one.

        Raises:
            CheckpointError: names what differs.
        """
        for name in ("selection", "label"):
            saved, own = manifest.meant(name), self._as_text[name]
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
        draws_alike = all(manifest.meant(name) == own.meant(name) for name in DRAWN_BY)
        rate, rate_again = self._rates(manifest)
        layout = manifest.layout
        if layout is not None:
            layout = together(self._transport, lambda: self._in_own_pages(manifest.layout), call)
        if layout is None:
            # Nothing to take over; but a buffer that has begun cannot become one that has not.
            if own.num_rounds or own.num_offers:
                raise CheckpointError(f"{call}: the saved buffer had not begun, but this one has")
            self.tasks, self._removals, steps.rate = manifest.tasks, manifest.removals, rate
            steps.training.knows_tasks = bool(self.tasks)
            return
        together(
            self._transport,
            lambda: steps.begin_restored(layout, manifest.label, manifest.on_gpu, AFTER_LOAD),
            call,
        )
        # The capacity may depend on what the samples are.
        has_same_shards = (manifest.num_ranks, manifest.capacity, manifest.paging) == (
            own.num_ranks,
            self._rounds.capacity,
            layout.paging,
        )
        goes_on = (
            has_same_shards
            and draws_alike
            and self._has_same_rate(manifest)
            and manifest.num_offers == manifest.num_rounds  # else see ``Manifest.num_offers``
        )
        # First all that may be refused, while this buffer is as it was: then its shard is written.
        staged = self._nothing_staged(layout)
        if goes_on:
            staged = together(self._transport, lambda: self._staged_in(saved), call)
        if has_same_shards:
            same_sampling = manifest.meant("sampling") == own.meant("sampling")
            # Another policy may have known no places, or may remember something else.
            restore(self._rounds, saved, same_sampling and self._rounds.sampling.knows_places)
        else:
            adopt(self._rounds, saved)
        self.tasks, self._removals = manifest.tasks, manifest.removals
        steps.training.knows_tasks = bool(self.tasks)
        most_drawn = manifest.num_staged if goes_on else 0
        steps.go_on(manifest.num_rounds, manifest.is_offered, staged, rate, most_drawn)
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

    def _in_own_pages(self, layout: Layout | None) -> Layout | None:
        """A saved buffer's layout, as this one would have it."""
        if layout is None:
            return None
        return bounded(layout, self._arguments, self._transport.num_ranks)

    def _nothing_staged(self, layout: Layout) -> Records:
        nothing = torch.zeros((0, layout.record_bytes), dtype=torch.uint8)
        if layout.paging is None:
            return Records(nothing)
        return Records(nothing, torch.zeros((0, layout.paging.page_bytes), dtype=torch.uint8))

    def _staged_in(self, saved: SavedBuffer) -> Records:
        """What this rank had staged for the next step, checked.

        Raises:
            ValueError, KeyError: it cannot be.
        """
        manifest = saved.manifest
        with saved.shard(self._transport.rank) as shard:
            arrays = shard.arrays()
        staged = torch.from_numpy(records_of(arrays, "staged", manifest.record_bytes))
        num_draws, num_held, expected = (
            self._arguments.num_draws,
            manifest.num_held,
            manifest.num_staged,
        )
        if self._arguments.draws == "local":  # of the rank that has drawn most
            num_held = manifest.held_per_rank[self._transport.rank]
            expected = min(expected, num_held * num_draws)
        most = min(self._arguments.most_per_draw, num_held) * num_draws
        if len(staged) != expected or len(staged) > most or len(staged) % num_draws:
            raise ValueError(
                f"{len(staged)} staged, but {expected} according to the manifest, "
                f"and at most {most} can have been drawn"
            )
        if manifest.layout is None or manifest.paging is None:
            return Records(staged)
        page_bytes = manifest.paging.page_bytes
        rows, pages = staged.numpy().copy(), records_of(arrays, STAGED_PAGES, page_bytes)
        check_lengths(manifest.layout, rows, page_bytes, len(pages))
        counts = pages_of_records(manifest.layout, rows, page_bytes)
        starts_of(manifest.layout, rows)[:] = counts.cumsum() - counts
        return Records(torch.from_numpy(rows), torch.from_numpy(pages))


def _fields_text(layout: Layout) -> str:
    text = "; ".join(map(str, layout.fields[:MOST_FIELDS_NAMED]))
    return text + "; ..." * (len(layout.fields) > MOST_FIELDS_NAMED)
