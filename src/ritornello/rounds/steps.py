"""The trainer's side of the rounds: one step after another.

A step takes what the last round has staged, joins it with the mini-batch, copies the candidates and
starts the next round, which the worker runs. All of it runs on the trainer's thread, but for
``prepare``, which ``rehearse`` calls on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello.errors import CheckpointError, PeerLostError, RoundError, round_error
from ritornello.policies.selection import check_labels
from ritornello.records import accelerators
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch, path_text
from ritornello.records.storage import Storage
from ritornello.rounds.arguments import Arguments, plain
from ritornello.rounds.first_batch import Begun, check_room, device_of
from ritornello.rounds.joining import Joiner
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.rounds.rewriting import FieldsMadeAnew
from ritornello.rounds.round import Rounds
from ritornello.rounds.staging import Staging, WorkerStreams
from ritornello.rounds.stats import BufferStats
from ritornello.rounds.worker import Worker
from ritornello.transports.agreement import check_in_step

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How much longer than a peer the trainer waits, so that the error that names the peer is first."""


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
        begun: what the first mini-batch has fixed; None before it.
        num_offers: mini-batches offered so far.
        is_offered: whether one was offered since the last draw.
        num_past: representatives in what the trainer got last; see ``RehearsalBuffer.num_past``.
        rate: ``r`` of the rounds to come.
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
        self._arguments = arguments
        self._transport = rounds.transport
        self._timeout_seconds = timeout_seconds
        self._candidate_streams = Streams(arguments.seed, Purpose.CANDIDATES, rounds.transport.rank)
        # `rehearse` prepares on a thread of its own while the trainer may ask for stats.
        self._settling = threading.Lock()
        self._worker_streams: WorkerStreams = {}
        self.begun: Begun | None = None
        self._joiner = Joiner()
        self.num_offers = 0
        self.is_offered = False
        self._round_runs = False
        self.num_staged = 0
        self._num_joined = self.num_past = 0
        self.rate: float = plain(arguments.num_representatives)
        self.failure: RoundError | None = None
        self._has_warned_of_labels = False
        self._is_restored = False  # and no mini-batch has come since
        self.seconds_waited = self.seconds_joining = self.seconds_offering = 0.0

    # In a step.

    def prepare(self, batch: Batch, call: str) -> Batch:
        """``update`` up to the round: joins, and copies the candidates.

        ``rehearse`` calls it on a thread of its own, a step ahead. To the trainer, and to what is
        saved, nothing has happened yet.
        """
        begun, leaves = self._checked(batch)
        staged = self._staged(call)
        augmented = batch
        if staged is not None:
            began = time.perf_counter()
            augmented = begun.layout.rebuild(self._joiner.join(begun.layout, leaves, staged))
            self.seconds_joining += time.perf_counter() - began
        self._copy_candidates(begun.staging, leaves)
        return augmented

    def draw(self, call: str) -> list[Batch] | None:
        """Copies of one step's representatives, a batch for each draw; None if there are none."""
        staged = self._staged(call)
        self.is_offered = False
        self.num_past = self._num_joined
        if staged is None:
            return None
        began = time.perf_counter()
        begun = self._known
        drawn = [
            begun.layout.rebuild(
                [
                    past.clone(memory_format=torch.contiguous_format)
                    for past in begun.layout.views(records)
                ]
            )
            for records in staged.chunk(self._arguments.num_draws)
        ]
        begun.staging.release()
        self.seconds_joining += time.perf_counter() - began
        return drawn

    def offer(self, batch: Batch) -> None:
        """Copies the candidates, and starts the round.

        Raises:
            RuntimeError: the last ones have not been drawn.
        """
        if self.is_offered:
            raise RuntimeError(
                "offer: the last offer's representatives have not been drawn yet; draw and "
                "offer alternate"
            )
        begun, leaves = self._checked(batch)
        self._copy_candidates(begun.staging, leaves)
        self.start_round()

    def start_round(self) -> None:
        """Starts the round of the candidates that were copied."""
        began = time.perf_counter()
        self.num_offers += 1
        self.is_offered = True
        self.num_past = self._num_joined  # of a step that `rehearse` has prepared, only now
        self.rounds.rate = self.rate
        self._round_runs = True
        self._worker.start(self._known.staging.candidates())
        self.seconds_offering += time.perf_counter() - began

    def drop_prepared(self) -> None:
        """Drops what ``prepare`` has copied."""
        if self.begun is not None:
            self.begun.staging.drop_collected()

    def _staged(self, call: str) -> Tensor | None:
        """Waits for the round; one step's representatives as records, None if there are none."""
        if not self.is_offered:
            if self.num_offers:
                raise RuntimeError(
                    f"{call}: no mini-batch was offered since the last draw; draw and offer "
                    "alternate: each offer starts a round, each draw takes its result"
                )
            return None
        self.settle()
        self._num_joined = self.num_staged
        return self._known.staging.take(self.num_staged) if self.num_staged else None

    def _copy_candidates(self, staging: Staging, leaves: list[Tensor]) -> None:
        began = time.perf_counter()
        num_samples = leaves[0].shape[0]
        num_candidates = self._arguments.num_candidates
        rows = None
        if num_candidates is not None and num_candidates < num_samples:
            generator = self._candidate_streams.at(self.num_offers)
            chance = num_candidates / num_samples
            rows = (generator.random(num_samples) < chance).nonzero()[0]
        staging.collect(leaves, rows)
        self.seconds_offering += time.perf_counter() - began

    def _checked(self, batch: Batch) -> tuple[Begun, list[Tensor]]:
        """A mini-batch's leaves; the first one fixes what ``Begun`` says."""
        try:
            begun = self.begun
            if begun is None:
                layout = Layout.of(batch)
                leaves = layout.leaves(batch)
                label = layout.label_position(self._arguments.label_path, self.rounds.needs_labels)
                begun = self._begin(device_of(leaves), layout, label)
            else:
                leaves = begun.layout.leaves(batch)
                if self._is_restored:
                    begun = self._meet(batch, begun, leaves)
            if self.rounds.needs_labels and begun.label is not None:
                labels = leaves[begun.label]
                # On a device, reading the labels would make the trainer wait: the worker does it.
                if labels.device.type == "cpu" or not begun.staging.on_gpu:
                    check_labels(labels.cpu().numpy(), self.rounds.selection.num_classes)
        except (TypeError, ValueError) as error:
            raise type(error)(self.here(str(error))) from None
        return begun, leaves

    @property
    def trainer_device(self) -> torch.device:
        """Where mini-batches are; the CPU before the first one."""
        return torch.device("cpu") if self.begun is None else self.begun.staging.trainer_device

    @property
    def _known(self) -> Begun:
        assert self.begun is not None
        return self.begun

    def _begin(self, device: torch.device, layout: Layout, label: int | None) -> Begun:
        begun = Begun.on(
            device, layout, label, self._arguments, self._storage, self._worker_streams
        )
        self.rounds.open(layout, label, begun.identity, begun.staging)
        self.begun = begun
        return begun

    def _meet(self, batch: Batch, begun: Begun, leaves: list[Tensor]) -> Begun:
        """Learns from the first mini-batch after a load what is not saved."""
        self._is_restored = False
        layout, device = begun.layout.nested_as(batch), device_of(leaves)
        if device == begun.staging.trainer_device:
            begun.layout = layout
            return begun
        self.settle()
        staged = self.staged_records()
        begun = self._begin(device, layout, begun.label)
        begun.staging.put_back(staged)
        return begun

    # Waiting for the worker.

    def settle(self) -> None:
        """Waits for the running round, if any."""
        with self._settling:
            if self.failure is not None:
                raise self.failure
            if not self._round_runs:
                return
            began = time.perf_counter()
            try:
                self.num_staged = self._worker.result(self._timeout_seconds + GRACE_SECONDS)
                self._round_runs = False
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.failure = self._explain(error)
                raise self.failure from error
            finally:
                self.seconds_waited += time.perf_counter() - began
            if self.rounds.selection.excess_labels and not self._has_warned_of_labels:
                self._warn_of_labels()

    def finish(self, wait_seconds: float) -> None:
        """Ends the running round; no error is raised."""
        with self._settling:
            if self._round_runs and self.failure is None:
                try:
                    self.num_staged = self._worker.result(wait_seconds)
                    self._round_runs = False
                except Exception as error:
                    self.failure = self._explain(error)
                    logger.log(
                        logging.WARNING if wait_seconds else logging.DEBUG,
                        "the last round did not finish: %s",
                        self.failure,
                    )

    def _explain(self, error: BaseException) -> RoundError:
        """What the trainer sees of an error in the worker."""
        where = self.here(f"round {self.rounds.num_rounds} ({self.rounds.stage})")
        return round_error(error, where, self._timeout_seconds)

    def _warn_of_labels(self) -> None:
        """Says, once, that most classes hold nothing."""
        self._has_warned_of_labels = True
        assert self._known.label is not None
        path = self._known.layout.fields[self._known.label].path
        about = "about " if self._transport.num_ranks > 1 else ""
        warnings.warn(
            self.here(
                f"label={self._arguments.label!r}, which is {path_text(path)}, has {about}"
                f"{self.rounds.selection.excess_labels} distinct values so far, but the buffer has "
                f"{self.rounds.capacity} slots: it holds one sample of each of some random "
                "classes, and nothing of the others. Often label= names the wrong leaf, such as an "
                "index, an id or a timestamp. If these are classes, raise the capacity; if there "
                "are none, take selection='reservoir'"
            ),
            stacklevel=2,
        )

    # Between two rounds.

    def change_rate(self, rate: float) -> None:
        """Says how many are drawn from the next round on.

        Raises:
            ValueError, TypeError: they cannot be.
        """
        try:
            self.rate = self._arguments.changed_rate(rate)
        except (TypeError, ValueError) as error:
            raise type(error)(self.here(str(error))) from None

    @contextmanager
    def with_peers(self, call: str) -> Iterator[None]:
        """Around what all ranks do together, after as many offers; waits for the running round.

        Without one of them nothing goes on.
        """
        self.settle()
        with self._explaining(call):
            check_in_step(self._transport, call, self.num_offers, self.is_offered)
            yield

    @contextmanager
    def _explaining(self, call: str) -> Iterator[None]:
        """Around what needs other ranks between two rounds."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(self.here(str(error))) from error.__cause__
        except PeerLostError as error:
            self.failure = PeerLostError(self.here(f"{call} failed: {error}"), error.peers)
            raise self.failure from error

    def begin_task(self) -> None:
        """Tells the sampling policy that a task begins; waits for the running round."""
        sampling = self.rounds.sampling
        if not sampling.needs_tasks:
            self.settle()
            return
        with self.with_peers("begin_task"):  # else ranks would draw differently, unnoticed
            sampling.begin_task(self.rounds.contents)

    def here(self, message: str) -> str:
        """The message, with the rank where there are several."""
        if self._transport.num_ranks == 1:
            return message
        return f"rank {self._transport.rank}: {message}"

    def read(self, batch_size: int) -> Iterator[Batch]:
        """This rank's representatives; see ``RehearsalBuffer.representatives``."""
        rounds, num_rounds = self.rounds, self.rounds.num_rounds
        for first in range(0, rounds.num_held, batch_size):
            if rounds.num_rounds != num_rounds:
                raise RuntimeError(
                    "representatives: the buffer has changed meanwhile; finish the iteration "
                    "before the next update, draw or offer"
                )
            num_rows = min(batch_size, rounds.num_held - first)
            yield self._known.layout.rebuild(rounds.representatives(first, num_rows))

    def rewrite(self, function: Callable[[Batch], Any], fields: Any, batch_size: int) -> None:
        """See ``RehearsalBuffer.rewrite``."""
        self.settle()
        if self.begun is None:
            return
        rounds, layout, num_offers = self.rounds, self._known.layout, self.num_offers
        try:
            anew = FieldsMadeAnew(layout, self._known.label, self._known.identity, fields)
        except ValueError as error:
            raise ValueError(self.here(str(error))) from None
        for first in range(0, rounds.num_held, batch_size):
            num_rows = min(batch_size, rounds.num_held - first)
            result = function(layout.rebuild(rounds.representatives(first, num_rows)))
            if self.num_offers != num_offers:
                raise RuntimeError(
                    "rewrite: the function has called update, draw or offer: the buffer goes on "
                    "when rewrite has returned"
                )
            try:
                values = anew.values(result, num_rows)
            except (TypeError, ValueError) as error:
                raise type(error)(self.here(str(error))) from None
            with self._explaining("rewrite"):
                rounds.rewrite(first, num_rows, values)

    def stats(self, per_class: bool, distinct: bool) -> BufferStats:
        """See ``RehearsalBuffer.stats``."""
        self.settle()
        rounds = self.rounds
        labels = rounds.labels() if per_class else np.zeros(0, dtype=np.int64)
        labels, counts = np.unique(labels, return_counts=True)
        return BufferStats(
            capacity=rounds.capacity,
            num_held=rounds.contents.num_held,
            held_per_rank=rounds.contents.sizes.tolist(),
            held_per_class=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
            record_bytes=self.begun.layout.record_bytes if self.begun else 0,
            shard_bytes=rounds.shard.num_bytes if rounds.shard else 0,
            num_rounds=rounds.num_rounds,
            bytes_sent=rounds.bytes_sent,
            bytes_received=rounds.bytes_received,
            seconds_waited=self.seconds_waited,
            seconds_joining=self.seconds_joining,
            seconds_offering=self.seconds_offering,
            seconds_per_stage=dict(rounds.seconds_per_stage),
            num_distinct=rounds.num_distinct(distinct),
        )

    # For who saves and restores it.

    def staged_records(self) -> Tensor:
        """A copy of what is staged for the next step, in CPU memory."""
        return self._known.staging.staged(self.num_staged)

    def begin_restored(self, layout: Layout, label: int | None, on_gpu: bool) -> None:
        """Begins with a saved buffer's layout, before any mini-batch.

        Raises:
            MemoryError: its records do not fit.
        """
        if self.begun is not None:  # some ranks may know it from a mini-batch that was refused
            return
        check_room(layout, self._arguments)
        device = torch.device("cpu")
        if on_gpu and accelerators.is_available():  # the first draw may come before any mini-batch
            device = accelerators.current_device()
        self._begin(device, layout, label)
        self._is_restored = True

    def forget_restored(self) -> None:
        """As before ``begin_restored``."""
        self.begun, self.rounds.shard, self._is_restored = None, None, False

    def go_on(self, num_rounds: int, is_offered: bool, staged: Tensor, rate: float) -> None:
        """Takes the place of a buffer after some rounds, with what it had staged, and its rate."""
        self.rate = rate
        self._known.staging.put_back(staged)
        self.num_staged = len(staged)
        self.num_offers, self.is_offered = num_rounds, is_offered

    def draw_again(self, rate: float) -> None:
        """Runs a round without candidates, for what the next step draws.

        Args:
            rate: of this round alone, where it may change.
        """
        if self.is_offered:
            self.rounds.rate = rate
            self.num_offers += 1
            self._round_runs = True
            self._worker.start(self._known.staging.candidates())
