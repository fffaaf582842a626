"""The trainer's side of the rounds: one step after another.

A step takes what the last round has staged, joins it with the mini-batch, copies the candidates and
starts the next round, which the worker runs. All of it runs on the trainer's thread, but for
``prepare``, which ``rehearse`` calls on a thread of its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ritornello.arguments import Arguments
from ritornello.checkpoint import SavedBuffer, Saving, Snapshot, new_save_id
from ritornello.digest import digest
from ritornello.errors import CheckpointError, PeerLostError, RoundError, round_error
from ritornello.manifest import Manifest, Removal, TaskMark
from ritornello.nesting import Batch
from ritornello.outputs import Outputs
from ritornello.random_streams import Purpose, Streams
from ritornello.records import Layout
from ritornello.rounds import Rounds, check_labels
from ritornello.saved_arrays import records_of
from ritornello.staging import Staging
from ritornello.storage import Storage, free_memory_bytes
from ritornello.transports import together
from ritornello.worker import Worker

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How much longer than a peer the trainer waits, so that the error that names the peer is first."""

CALLS = (
    "save",
    "wait_until_saved",
    "load",
    "load_state_dict",
    "state_dict",
    "measure_distances",
)
"""What all ranks do together while no round runs."""

MOST_FIELDS_NAMED = 8

DRAWN_BY = ("num_representatives", "num_draws", "rounds_per_exchange", "sampling")
"""The arguments that say what is drawn, and how much is staged for a step."""


class Steps:
    """One rank's steps.

    Args:
        arguments: of the buffer, checked.
        rounds: what the worker runs.
        worker: that runs them.
        storage: where the shard lies.
        timeout_seconds: how long a round may take.

    Attributes:
        failure: what ended it; raised again by every later step.
        num_draws: per step.
        tasks: marks of where tasks began.
    """

    def __init__(
        self,
        arguments: Arguments,
        rounds: Rounds,
        worker: Worker,
        storage: Storage,
        timeout_seconds: float,
    ) -> None:
        self.rounds, self._worker, self._storage = rounds, worker, storage
        self._transport = rounds.transport
        self._timeout_seconds = timeout_seconds
        self.arguments = arguments.as_text()
        self.capacity = int(arguments.capacity)
        self.num_draws = arguments.num_draws
        self._num_representatives = arguments.num_representatives
        self._num_candidates = arguments.num_candidates
        self._rounds_per_exchange = arguments.rounds_per_exchange
        label = arguments.label
        self._label_path = label if isinstance(label, tuple) else (label,)
        self._candidate_streams = Streams(arguments.seed, Purpose.CANDIDATES, rounds.transport.rank)
        # `rehearse` prepares on a thread of its own while the trainer may ask for stats.
        self._settling = threading.Lock()
        self.layout: Layout | None = None
        self._label: int | None = None
        self._staging: Staging | None = None
        self._outputs = Outputs()
        self._num_offers = 0
        self._is_offered = False  # since the last draw
        self._num_waiting = 0  # candidates that were offered, for the next round
        self._round_runs = False
        self._num_staged = 0
        self.failure: RoundError | None = None
        self._is_restored = False  # and no mini-batch has come since
        self.tasks: tuple[TaskMark, ...] = ()
        self._removals: tuple[Removal, ...] = ()
        self.seconds_waited = self.seconds_joining = self.seconds_offering = 0.0

    def prepare(self, batch: Batch, call: str) -> Batch:
        """``update`` up to the round: joins, and copies the candidates.

        ``rehearse`` calls it on a thread of its own, a step ahead. To the trainer, and to what is
        saved, nothing has happened yet.
        """
        leaves = self.leaves(batch)
        staged = self.take(call)
        augmented = batch
        if staged is not None:
            began = time.perf_counter()
            assert self.layout is not None
            assert self._staging is not None
            joined = self._outputs.join(self.layout, leaves, staged)
            augmented = self.layout.rebuild(joined)
            self._staging.release()
            self.seconds_joining += time.perf_counter() - began
        self.collect(leaves)
        return augmented

    def take(self, call: str) -> Tensor | None:
        """Waits for the round; one step's representatives as records, None if there are none."""
        if not self._is_offered:
            if self._num_offers:
                raise RuntimeError(
                    f"{call}: no mini-batch was offered since the last draw; draw and offer "
                    "alternate: each offer starts a round, each draw takes its result"
                )
            return None
        self.settle()
        num_per_step = self._num_staged // self._rounds_per_exchange
        if num_per_step == 0:
            return None
        assert self._staging is not None
        step = self._num_offers % self._rounds_per_exchange
        return self._staging.take(step * num_per_step, num_per_step)

    def draw(self, call: str) -> list[Batch] | None:
        """Copies of what ``take`` gives, a batch for each draw."""
        staged = self.take(call)
        self._is_offered = False
        if staged is None:
            return None
        began = time.perf_counter()
        assert self.layout is not None
        assert self._staging is not None
        drawn = [
            self.layout.rebuild(
                [
                    past.clone(memory_format=torch.contiguous_format)
                    for past in self.layout.views(records)
                ]
            )
            for records in staged.chunk(self.num_draws)
        ]
        self._staging.release()
        self.seconds_joining += time.perf_counter() - began
        return drawn

    def offer(self, batch: Batch) -> None:
        """Copies the candidates, and starts the round.

        Raises:
            RuntimeError: the last ones have not been drawn.
        """
        if self._is_offered:
            raise RuntimeError(
                "offer: the last offer's representatives have not been drawn yet; draw and "
                "offer alternate"
            )
        self.collect(self.leaves(batch))
        self.start_round()

    def collect(self, leaves: list[Tensor]) -> None:
        """Copies the candidates."""
        assert self._staging is not None
        began = time.perf_counter()
        num_samples = leaves[0].shape[0]
        rows = None
        if self._num_candidates is not None and self._num_candidates < num_samples:
            generator = self._candidate_streams.at(self._num_offers)
            chance = self._num_candidates / num_samples
            rows = (generator.random(num_samples) < chance).nonzero()[0]
        self._staging.collect(leaves, rows)
        self.seconds_offering += time.perf_counter() - began

    def start_round(self) -> None:
        """Starts the round of what was collected, if it is time for one."""
        assert self._staging is not None
        began = time.perf_counter()
        self._num_offers += 1
        self._is_offered = True
        if self._num_offers % self._rounds_per_exchange == 0:
            self._round_runs = True
            self._worker.start(self._staging.candidates())
        self._num_waiting = self._staging.num_collected
        self.seconds_offering += time.perf_counter() - began

    def drop_prepared(self) -> None:
        """Drops what ``prepare`` has copied."""
        if self._staging is not None:
            self._staging.drop_collected(self._num_waiting)

    def settle(self) -> None:
        """Waits for the running round, if any."""
        with self._settling:
            self._settle_alone()

    def _settle_alone(self) -> None:
        if self.failure is not None:
            raise self.failure
        if not self._round_runs:
            return
        began = time.perf_counter()
        try:
            self._num_staged = self._worker.result(self._timeout_seconds + GRACE_SECONDS)
            self._round_runs = False
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failure = self._explain(error)
            raise self.failure from error
        finally:
            self.seconds_waited += time.perf_counter() - began

    def finish(self, wait_seconds: float) -> None:
        """Ends the running round, and a save in the background; no error is raised."""
        with self._settling:
            if self._round_runs and self.failure is None:
                try:
                    self._num_staged = self._worker.result(wait_seconds)
                    self._round_runs = False
                except Exception as error:
                    self.failure = self._explain(error)
                    logger.log(
                        logging.WARNING if wait_seconds else logging.DEBUG,
                        "the last round did not finish: %s",
                        self.failure,
                    )
        saving = self.rounds.saving
        if saving is not None and not saving.has_ended:
            if self._worker.stop(wait_seconds):
                saving.finish(wait_seconds)
            else:  # a round still writes the shard
                saving.give_up()

    def _explain(self, error: BaseException) -> RoundError:
        """What the trainer sees of an error in the worker."""
        where = self.here(f"round {self.rounds.num_rounds} ({self.rounds.stage})")
        return round_error(error, where, self._timeout_seconds)

    @contextmanager
    def with_peers(self, call: str) -> Iterator[None]:
        """Around what involves the other ranks: without one of them nothing goes on."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(self.here(str(error))) from error.__cause__
        except PeerLostError as error:
            self.failure = PeerLostError(self.here(f"{call} failed: {error}"), error.peers)
            raise self.failure from error

    def here(self, message: str) -> str:
        """The message, with the rank where there are several."""
        if self._transport.num_ranks == 1:
            return message
        return f"rank {self._transport.rank}: {message}"

    def snapshot(self) -> Snapshot:
        """What this rank saves, while no round runs.

        Raises:
            TypeError: the selection policy cannot be saved.
        """
        arrays = self.rounds.state()
        if self._staging is not None:
            arrays["staged"] = self._staging.staged(self._num_staged).numpy()
            arrays["waiting"] = self._staging.collected(self._num_waiting).numpy()
        manifest = self._manifest()
        manifest.as_json()  # fails here, if at all
        return Snapshot(manifest, arrays, self.rounds.used_rows(manifest.record_bytes))

    def _manifest(self) -> Manifest:
        """What all ranks know, while no round runs."""
        return Manifest(
            arguments=self.arguments,
            capacity=self.capacity,
            held_per_rank=tuple(self.rounds.contents.sizes.tolist()),
            num_rounds=self.rounds.num_rounds,
            num_offers=self._num_offers,
            is_offered=self._is_offered,
            num_staged=self._num_staged,
            layout=self.layout,
            label=self._label,
            on_gpu=self._staging is not None and self._staging.on_gpu,
            tasks=self.tasks,
            removals=self._removals,
        )

    def begin_saving(self, folder: str | os.PathLike[str], background: bool) -> None:
        """Begins a save, once that before has ended; see ``RehearsalBuffer.save``."""
        self.settle()
        self.check_in_step("save")
        self.end_saving()
        snapshot = together(self._transport, self.snapshot, "save")
        saving = Saving(
            Path(folder),
            snapshot,
            new_save_id(self._transport),
            self.rounds.to_host,
            self._transport,
            background,
        )
        saving.begin()
        self.rounds.saving = saving
        if background:
            self._worker.while_idle(saving.step)

    def check_in_step(self, call: str) -> None:
        """Checks that all ranks are in the same call after as many offers; all call it.

        One number is gathered, as at the beginning of a round, but a negative one: so a rank that
        is in a round instead, and one that finds another there, both notice.

        Raises:
            CheckpointError: they are not.
            PeerLostError: some are in a round.
        """
        own = (self._num_offers * 2 + self._is_offered) * len(CALLS) + CALLS.index(call)
        told = self._transport.all_gather(np.array([-1 - own]))[:, 0]
        in_round = tuple(np.flatnonzero(told >= 0).tolist())
        if in_round:
            raise PeerLostError(
                f"rank(s) {list(in_round)} are in a round: all ranks must call update equally "
                f"often, and {call} after as many",
                in_round,
            )
        if (told != told[0]).any():
            offers, numbers = np.divmod(-1 - told, len(CALLS))
            calls = [CALLS[number] for number in numbers]
            raise CheckpointError(
                f"the ranks have called {calls} after {(offers // 2).tolist()} mini-batches: all "
                "must make the same call after as many"
            )

    def end_saving(self) -> None:
        """Waits for the save under way, if any. All ranks have one, or none has."""
        saving, self.rounds.saving = self.rounds.saving, None
        if saving is not None:
            saving.wait()

    def load(self, open_saved: Callable[[], SavedBuffer], call: str) -> None:
        """Takes over a saved buffer; see ``RehearsalBuffer.load``."""
        self.settle()
        with self.with_peers(call):
            self.check_in_step(call)
            with suppress(CheckpointError):  # it was logged, and is no reason not to load
                self.end_saving()
            saved = together(self._transport, open_saved, call)
            ids = self._transport.all_gather(np.array([digest(saved.manifest.in_common)]))
            if (ids != ids[0]).any():
                raise CheckpointError(f"{call}: the ranks see different saves")
            together(self._transport, lambda: self._check_fits(saved.manifest), call)
            had_begun = self.layout is not None
            try:
                self._take_over(saved, call)
            except CheckpointError:
                if not had_begun:
                    self.layout = self._label = self._staging = None
                    self.rounds.shard = None
                    self._is_restored = False
                if self.rounds.is_torn:
                    self.failure = RoundError(
                        self.here(f"{call} failed when parts of the shard were overwritten")
                    )
                raise

    def _check_fits(self, manifest: Manifest) -> None:
        """Checks that a saved buffer can become this one.

        Raises:
            CheckpointError: names what differs.
        """
        for name in ("selection", "label"):
            saved, own = manifest.arguments.get(name), self.arguments[name]
            if saved != own:
                raise CheckpointError(
                    f"the saved buffer has {name}={str(saved)[:200]}, this one {name}={own}: they "
                    "must be the same"
                )
        if self.layout and manifest.layout and self.layout.digest != manifest.layout.digest:
            raise CheckpointError(
                f"the saved buffer holds other samples: {_fields_text(manifest.layout)}; this one "
                f"holds {_fields_text(self.layout)}"
            )
        if manifest.layout is not None:
            position = manifest.layout.label_position(self._label_path, self.rounds.needs_labels)
            if position != manifest.label:
                raise CheckpointError("the saved buffer has its label elsewhere")

    def _take_over(self, saved: SavedBuffer, call: str) -> None:
        """Becomes a saved buffer that fits."""
        manifest, rank = saved.manifest, self._transport.rank
        own = self._manifest()
        has_same_shards = manifest.num_ranks == own.num_ranks and manifest.capacity == own.capacity
        goes_on = has_same_shards and all(
            manifest.arguments.get(name) == own.arguments[name] for name in DRAWN_BY
        )
        if manifest.layout is None:
            if own.num_rounds or own.num_offers:
                raise CheckpointError(f"{call}: the saved buffer had not begun, but this one has")
            self.tasks, self._removals = manifest.tasks, manifest.removals
            return
        layout = manifest.layout

        def begin() -> None:
            # Some ranks may know the layout from a mini-batch that was refused.
            if self.layout is None:
                self._label = manifest.label
                self._open_saved(layout, manifest.on_gpu)

        together(self._transport, begin, call)
        staged = waiting = torch.zeros((0, manifest.record_bytes), dtype=torch.uint8)

        def understand() -> tuple[Tensor, Tensor]:
            with saved.shard(rank) as shard:
                arrays = shard.arrays()
            staged, waiting = (
                torch.from_numpy(records_of(arrays, name, manifest.record_bytes))
                for name in ("staged", "waiting")
            )
            num_drawn = min(self._num_representatives, manifest.num_held) * self._draws_per_round
            if len(staged) != manifest.num_staged or len(staged) not in (0, num_drawn):
                raise ValueError(
                    f"{len(staged)} staged, but {manifest.num_staged} according to the manifest, "
                    f"and {num_drawn} were to be drawn"
                )
            self.rounds.check_records(waiting)
            return staged, waiting

        if goes_on:
            staged, waiting = together(self._transport, understand, call)
        if has_same_shards:
            same_sampling = manifest.arguments.get("sampling") == own.arguments["sampling"]
            self.rounds.restore(saved, same_sampling and self.rounds.sampling.needs_labels)
        else:
            self.rounds.adopt(saved)
        assert self._staging is not None
        self._staging.put_back(staged, waiting)
        self._num_staged, self._num_waiting = len(staged), len(waiting)
        self.tasks, self._removals = manifest.tasks, manifest.removals
        self._is_offered = manifest.is_offered
        self._num_offers = manifest.num_offers
        if manifest.lacks_draw or not goes_on:
            self._draw_again()

    def _draw_again(self) -> None:
        """Starts a round for the next step, with those candidates alone that waited for one."""
        assert self._staging is not None
        # The next offer starts a round, if the last one does not.
        self._num_offers = (self.rounds.num_rounds + 1) * self._rounds_per_exchange - 1
        if self._is_offered:
            self._num_offers += 1
            self._round_runs = True
            self._worker.start(self._staging.candidates())
            self._num_waiting = 0

    def leaves(self, batch: Batch) -> list[Tensor]:
        """Checks a mini-batch; the first one fixes the layout."""
        try:
            if self.layout is None:
                layout = Layout.of(batch)
                leaves = layout.leaves(batch)
                self._label = layout.label_position(self._label_path, self.rounds.needs_labels)
                self._open(layout, _device_of(leaves))
            else:
                leaves = self.layout.leaves(batch)
                if self._is_restored:
                    self._meet(batch, leaves)
            if self.rounds.needs_labels and self._label is not None:
                labels = leaves[self._label]
                assert self._staging is not None
                # On a GPU, reading the labels would make the trainer wait: the worker does it.
                if not (labels.is_cuda and self._staging.on_gpu):
                    check_labels(labels.cpu().numpy(), self.rounds.selection.num_classes)
        except (TypeError, ValueError) as error:
            raise type(error)(self.here(str(error))) from None
        return leaves

    @property
    def _draws_per_round(self) -> int:
        return self.num_draws * self._rounds_per_exchange

    def _open_saved(self, layout: Layout, on_gpu: bool) -> None:
        """Like ``_open``, before any mini-batch, and with room only for records that fit.

        Raises:
            MemoryError: they do not.
        """
        num_per_round = self._num_representatives * self._draws_per_round
        needed = 2 * num_per_round * layout.record_bytes
        free = free_memory_bytes()
        if free is not None and needed > free:
            raise MemoryError(
                f"{num_per_round} representatives of {layout.record_bytes} bytes do not fit"
            )
        device = torch.device("cpu")
        if on_gpu and torch.cuda.is_available():  # the first draw may come before any mini-batch
            device = torch.device("cuda", torch.cuda.current_device())
        self._open(layout, device)
        self._is_restored = True

    def _open(self, layout: Layout, device: torch.device) -> None:
        """Makes what depends on the layout, and on where mini-batches are."""
        num_per_round = self._num_representatives * self._draws_per_round
        reorders = self._draws_per_round > 1
        self._staging = Staging(layout, device, self._storage.device, num_per_round, reorders)
        self.rounds.open(layout, self._label, self._staging)
        self.layout = layout

    def _meet(self, batch: Batch, leaves: list[Tensor]) -> None:
        """Learns from the first mini-batch after a load what is not saved."""
        self._is_restored = False
        assert self.layout is not None
        layout = self.layout.nested_as(batch)
        device = _device_of(leaves)
        assert self._staging is not None
        if device == self._staging.trainer_device:
            self.layout = layout
            return
        self.settle()
        staged = self._staging.staged(self._num_staged)
        waiting = self._staging.collected(self._num_waiting)
        self._open(layout, device)
        self._staging.put_back(staged, waiting)


def _fields_text(layout: Layout) -> str:
    text = "; ".join(map(str, layout.fields[:MOST_FIELDS_NAMED]))
    return text + "; ..." * (len(layout.fields) > MOST_FIELDS_NAMED)


def _device_of(leaves: list[Tensor]) -> torch.device:
    """Where mini-batches are: on the GPU, if a leaf is."""
    return next((leaf.device for leaf in leaves if leaf.is_cuda), torch.device("cpu"))
