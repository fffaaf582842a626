"""The distributed rehearsal buffer. Read this first.

::

    trainer's thread              worker (one per rank)              other ranks
    ----------------              ---------------------              -----------
    update(batch t)
      take R[t] of round t-1
      join: batch t + R[t]
      copy candidates t, start -> round t: admit candidates
    train on b + r samples                 plan the global draw
                                           exchange records     <->  their workers
    update(batch t+1) takes  <-            stage R[t+1]
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from ritornello.arguments import Arguments
from ritornello.errors import BufferClosedError, PeerLostError, RoundError, round_error
from ritornello.outputs import Outputs
from ritornello.random_streams import Purpose, Streams
from ritornello.records import Batch, Layout, Path
from ritornello.rounds import Rounds, check_labels
from ritornello.sampling import SamplingPolicy, sampling_policy
from ritornello.selection import SelectionPolicy, selection_policy
from ritornello.staging import Staging
from ritornello.stats import BufferStats
from ritornello.storage import Storage
from ritornello.transports import Transport, check_agreement, open_transport
from ritornello.worker import InlineWorker, ThreadWorker, Worker

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How much longer than a peer the trainer waits, so that the error that names the peer is first."""

EXIT_SECONDS = 5.0
"""How long a buffer that was never closed waits for its round when it is collected."""


class RehearsalBuffer:
    """A rehearsal buffer over all ranks of a process group.

    Holds past samples ("representatives") in shards, one in each rank's memory, and adds
    ``num_representatives`` of them, drawn without bias from all shards, to every mini-batch.
    Admitting candidates and drawing run in the background while the model trains::

        buffer = RehearsalBuffer(capacity=50_000, num_representatives=7, num_candidates=14)
        for images, labels in loader:
            images, labels = buffer.update((images, labels))  # b + r samples
            ...  # forward, backward, step

    Every rank makes one with the same arguments, and calls ``update`` equally often. With no
    process group it works the same on one process. The result depends on the seed, the number
    of ranks and the data alone, never on timing. Not thread-safe: one trainer thread uses it.

    Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
    Distributed Rehearsal Buffers" (CCGrid 2024).

    Args:
        capacity: representatives in the whole buffer, over all ranks; split over them to the
            last one.
        num_representatives: ``r``, drawn per rank and step. While the buffer holds fewer, a
            rank gets all there are.
        num_candidates: ``c``, expected per rank and step: each sample of a mini-batch of ``b``
            is a candidate with probability ``min(1, c / b)``. None: every sample is.
        selection: who is admitted and replaced: "class-balanced", "per-class-random",
            "class-balanced-reservoir", "grasp", "greedy-balanced", "first-offered",
            "reservoir", "fifo", or a ``SelectionPolicy``.
        label: which leaf of a sample is the class label: an index or key, or a tuple of them
            for a nested leaf; None for policies that need none. One integer per sample.
        process_group: whose ranks share the buffer. None: the default group's, or a single
            process if there is none.
        seed: of everything random, from 0 to 2**64 - 1.
        sampling: what is drawn: "uniform" (every representative equally likely),
            "class-balanced" (every class), "grasp" (from prototypical to atypical; see
            ``measure_distances``), or a ``SamplingPolicy``.
        num_draws: draws of ``r`` per step, independent of each other, as DER++ takes two.
        transport: "auto" (shared memory inside each host, "collective" between hosts),
            "shared_memory", "collective" (torch.distributed), "mpi", "local" (one process), or
            a ``Transport``, which the buffer then owns.
        storage: where the shards lie: "auto" (shared memory where ranks share a host, else
            ordinary memory), "cpu", "pinned", "shared", a CUDA device such as "cuda", or
            "file:DIR" (a file in a folder, for shards larger than memory).
        rounds_per_exchange: ``k``: one round in ``k`` steps, which draws ``r`` representatives
            for each of the next ``k``. For steps of a millisecond, which a round a step would
            disturb. Candidates can then be drawn 1 to ``k`` steps later.
        timeout_seconds: how long a peer may be silent before a ``PeerLostError``. It must be
            longer than any pause that some ranks make and others do not, such as an evaluation
            on one rank.
        asynchronous: False runs the same rounds inside ``offer``, with the same results.

    Blocks until all ranks have made theirs.

    Raises:
        ValueError: an argument breaks its rule, or differs between ranks.
        TypeError: an argument of another type.
        PeerLostError: not all ranks came within the timeout.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_representatives: int,
        num_candidates: int | None = None,
        selection: str | SelectionPolicy = "class-balanced",
        label: int | str | Path | None = 1,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        sampling: str | SamplingPolicy = "uniform",
        num_draws: int = 1,
        transport: str | Transport = "auto",
        storage: str | torch.device = "auto",
        rounds_per_exchange: int = 1,
        timeout_seconds: float = 300.0,
        asynchronous: bool = True,
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds={timeout_seconds}: it must be above 0")
        place = Storage.of(storage)
        channel = open_transport(transport, process_group, timeout_seconds, place)
        try:
            arguments = Arguments(
                capacity=capacity,
                num_representatives=num_representatives,
                num_candidates=num_candidates,
                selection=selection,
                label=label,
                seed=seed,
                sampling=sampling,
                storage=place.kind,
                num_draws=num_draws,
                rounds_per_exchange=rounds_per_exchange,
            )
            # Before any check that only one rank might fail: so all ranks fail together.
            check_agreement(channel, arguments.as_text())
            arguments.check(channel.num_ranks)
            policy = selection_policy(selection)
            rounds = Rounds(
                channel,
                policy,
                sampling_policy(sampling),
                capacity=capacity,
                num_representatives=num_representatives,
                seed=seed,
                storage=place,
                draws_per_round=num_draws * rounds_per_exchange,
            )
            policy.bind(rounds.num_rows, channel.rank, channel.num_ranks)
        except BaseException:
            channel.close()
            raise
        self._capacity = int(capacity)
        self._num_representatives = num_representatives
        self._num_candidates = num_candidates
        self._policy = policy
        self._label_path = label if isinstance(label, tuple) else (label,)
        self._candidate_streams = Streams(seed, Purpose.CANDIDATES, channel.rank)
        self._num_draws = num_draws
        self._rounds_per_exchange = rounds_per_exchange
        self._storage = place
        self._timeout_seconds = timeout_seconds
        self._transport = channel
        self._rounds = rounds
        self._worker: Worker = (
            ThreadWorker(rounds.run, name=f"ritornello-rank-{channel.rank}")
            if asynchronous
            else InlineWorker(rounds.run)
        )
        # One path for close(), garbage collection and the interpreter's exit.
        self._process = os.getpid()
        self._finalizer = weakref.finalize(
            self, _shut_down, self._worker, channel, EXIT_SECONDS, self._process
        )
        # `rehearse` calls update on a thread of its own while the trainer may ask for stats.
        self._settling = threading.Lock()
        self._layout: Layout | None = None
        self._label: int | None = None
        self._staging: Staging | None = None
        self._outputs = Outputs()
        self._num_offers = 0
        self._offered = False  # since the last draw
        self._round_runs = False
        self._num_staged = 0
        self._failure: RoundError | None = None
        self._seconds_waited = self._seconds_joining = self._seconds_offering = 0.0

    @property
    def num_draws(self) -> int:
        """Draws per step."""
        return self._num_draws

    def update(self, batch: Batch) -> Batch:
        """Adds representatives to a mini-batch, and offers the mini-batch to the buffer.

        The same as ``draw``, join, ``offer``. Waits only if the last round is still running.

        Args:
            batch: tensors ``[b, ...]`` in any nesting of tuples, lists and dicts. ``b`` may
                vary, and be 0. What happens to it afterwards never changes what is stored.

        Returns:
            The augmented mini-batch: nested alike, ``b + r`` samples, representatives last (with
            several draws, all of them), on the devices of the mini-batch. The mini-batch itself
            while the buffer is empty.

        Raises:
            TypeError, ValueError: the mini-batch is not like the first one, or a label is out
                of range; names the leaf. The buffer is unchanged and goes on.
            PeerLostError: another rank is gone; raised again by every later call.
            RoundError: the last round failed.
            BufferClosedError: after ``close()``.
        """
        self._check_open("update")
        leaves = self._leaves(batch)
        staged = self._take("update")
        augmented = batch
        if staged is not None:
            began = time.perf_counter()
            assert self._layout is not None
            joined = self._outputs.join(self._layout, leaves, staged)
            augmented = self._layout.rebuild(joined)
            self._release()
            self._seconds_joining += time.perf_counter() - began
        self._offer(leaves)
        return augmented

    def draw(self) -> Batch | None:
        """Takes the representatives that were drawn after the last offer.

        Waits only if that round is still running. ``draw`` and ``offer`` alternate: each offer
        starts a round, and each draw takes its result (with ``rounds_per_exchange=k``: every
        k-th offer, and k draws share its result). The first draw may come before any offer.

        Returns:
            ``r`` samples nested like a mini-batch, the caller's own; with ``num_draws`` of 2 or
            more, a list of as many such batches. None while the buffer is empty. While it holds
            fewer than ``r``, all that it holds.

        Raises:
            RuntimeError: no offer since the last draw.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("draw")
        staged = self._take("draw")
        if staged is None:
            return None
        began = time.perf_counter()
        assert self._layout is not None
        drawn = [
            self._layout.rebuild(
                [
                    past.clone(memory_format=torch.contiguous_format)
                    for past in self._layout.views(records)
                ]
            )
            for records in staged.chunk(self._num_draws)
        ]
        self._release()
        self._seconds_joining += time.perf_counter() - began
        return drawn if self._num_draws > 1 else drawn[0]

    def offer(self, batch: Batch) -> None:
        """Offers a mini-batch: its candidates are copied, and a round starts.

        They can be drawn from the next ``draw`` on (see ``rounds_per_exchange``).

        Args:
            batch: as for ``update``.

        Raises:
            RuntimeError: no draw since the last offer.
            TypeError, ValueError, BufferClosedError: see ``update``.
        """
        self._check_open("offer")
        if self._offered:
            raise RuntimeError(
                "offer: the last offer's representatives have not been drawn yet; draw and "
                "offer alternate"
            )
        self._offer(self._leaves(batch))

    def representatives(self, batch_size: int = 256) -> Iterator[Batch]:
        """This rank's representatives, shard order, as batches of copies.

        Waits for the running round. Involves no other rank, but must be at its end before the
        next ``update``, ``draw`` or ``offer``.

        Args:
            batch_size: samples at a time; the last batch may be smaller.

        Raises:
            ValueError: ``batch_size`` is below 1.
            RuntimeError: the buffer went on meanwhile.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("representatives")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        self._settle()
        return self._read(batch_size)

    def _read(self, batch_size: int) -> Iterator[Batch]:
        num_rounds = self._rounds.num_rounds
        for first in range(0, self._rounds.num_held, batch_size):
            if self._rounds.num_rounds != num_rounds:
                raise RuntimeError(
                    "representatives: the buffer has changed meanwhile; finish the iteration "
                    "before the next update, draw or offer"
                )
            num_rows = min(batch_size, self._rounds.num_held - first)
            assert self._layout is not None
            yield self._layout.rebuild(self._rounds.representatives(first, num_rows))

    def measure_distances(self, embed: Callable[[Batch], Tensor], batch_size: int = 256) -> None:
        """Measures how far every representative is from the mean of its class, for "grasp".

        The cosine distance, to the mean over the shards of all ranks. To be called before each
        period of rehearsal, such as a task or an epoch: it costs a forward pass over the shard,
        and gathers one feature vector per class and rank. All ranks call it, after as many
        updates; blocks until they have.

        Args:
            embed: gives the features ``[n, d]`` of a batch of ``n`` representatives, such as
                the model's penultimate ones, without gradient.
            batch_size: representatives at a time.

        Raises:
            ValueError: the sampling policy does not look at distances; or, on every rank, some
                rank's features are not finite or not ``[n, d]``.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("measure_distances")
        if not self._rounds.sampling.needs_labels:
            raise ValueError(
                self._here(
                    "measure_distances: sampling='uniform' and other policies without labels do "
                    "not look at distances; use sampling='grasp'"
                )
            )
        features = [embed(batch) for batch in self.representatives(batch_size)]
        try:
            self._rounds.measure_distances(torch.cat(features) if features else torch.zeros(0, 0))
        except PeerLostError as error:
            self._failure = PeerLostError(
                self._here(f"measure_distances failed: {error}"), error.peers
            )
            raise self._failure from error

    def __len__(self) -> int:
        """Representatives in the whole buffer. Waits for the running round."""
        self._settle()
        return self._rounds.contents.num_held

    def __bool__(self) -> bool:
        """True, also while empty: ``if buffer`` asks whether there is one."""
        return True

    def stats(self, per_class: bool = True) -> BufferStats:
        """What the buffer holds and has cost so far. Waits for the running round.

        Involves no other rank. May be called after ``close()``.

        Args:
            per_class: whether to count classes, which reads the label of every representative.
        """
        self._settle()
        rounds = self._rounds
        labels = rounds.labels() if per_class else np.zeros(0, dtype=np.int64)
        labels, counts = np.unique(labels, return_counts=True)
        return BufferStats(
            capacity=self._capacity,
            num_held=rounds.contents.num_held,
            held_per_rank=rounds.contents.sizes.tolist(),
            held_per_class=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
            record_bytes=self._layout.record_bytes if self._layout else 0,
            shard_bytes=rounds.shard.num_bytes if rounds.shard else 0,
            num_rounds=rounds.num_rounds,
            bytes_sent=rounds.bytes_sent,
            bytes_received=rounds.bytes_received,
            seconds_waited=self._seconds_waited,
            seconds_joining=self._seconds_joining,
            seconds_offering=self._seconds_offering,
            seconds_per_stage=dict(rounds.seconds_per_stage),
        )

    def close(self) -> None:
        """Finishes the running round and ends the worker. May be called twice.

        Candidates for which no round has started yet (``rounds_per_exchange``) are dropped.
        Other ranks may still need this rank's records for their last round, so this waits for
        it, at most ``timeout_seconds``. Never raises for a peer that is gone.
        """
        self._close(self._timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error the peers may never come to this round.
        self._close(self._timeout_seconds if error is None else 0.0)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RehearsalBuffer cannot be pickled or copied: it owns a thread and connections. "
            "Keep it out of the data set and of what a DataLoader's workers use; make it in "
            "each rank's own process"
        )

    def _leaves(self, batch: Batch) -> list[Tensor]:
        """Checks a mini-batch; the first one fixes the layout."""
        try:
            if self._layout is None:
                layout = Layout.of(batch)
                leaves = layout.leaves(batch)
                self._label = layout.label_position(self._label_path, self._rounds.needs_labels)
                self._open(layout, leaves)
            else:
                leaves = self._layout.leaves(batch)
            if self._rounds.needs_labels and self._label is not None:
                labels = leaves[self._label]
                assert self._staging is not None
                # On a GPU, reading the labels would make the trainer wait: the worker does it.
                if not (labels.is_cuda and self._staging.on_gpu):
                    check_labels(labels.cpu().numpy(), self._policy.num_classes)
        except (TypeError, ValueError) as error:
            raise type(error)(self._here(str(error))) from None
        return leaves

    def _open(self, layout: Layout, leaves: list[Tensor]) -> None:
        """Makes what depends on the layout."""
        device = next((leaf.device for leaf in leaves if leaf.is_cuda), torch.device("cpu"))
        draws_per_round = self._num_draws * self._rounds_per_exchange
        num_per_round = self._num_representatives * draws_per_round
        reorders = draws_per_round > 1
        self._staging = Staging(layout, device, self._storage.device, num_per_round, reorders)
        self._rounds.open(layout, self._label, self._staging)
        self._layout = layout

    def _take(self, call: str) -> Tensor | None:
        """Waits for the round; one step's representatives as records, None if there are none."""
        if not self._offered:
            if self._num_offers:
                raise RuntimeError(
                    f"{call}: no mini-batch was offered since the last draw; draw and offer "
                    "alternate: each offer starts a round, each draw takes its result"
                )
            return None
        self._settle()
        self._offered = False
        num_per_step = self._num_staged // self._rounds_per_exchange
        if num_per_step == 0:
            return None
        assert self._staging is not None
        step = self._num_offers % self._rounds_per_exchange
        return self._staging.take(step * num_per_step, num_per_step)

    def _release(self) -> None:
        assert self._staging is not None
        self._staging.release()

    def _offer(self, leaves: list[Tensor]) -> None:
        """Copies the candidates and starts the round."""
        assert self._staging is not None
        began = time.perf_counter()
        num_samples = leaves[0].shape[0]
        rows = None
        if self._num_candidates is not None and self._num_candidates < num_samples:
            generator = self._candidate_streams.at(self._num_offers)
            chance = self._num_candidates / num_samples
            rows = (generator.random(num_samples) < chance).nonzero()[0]
        self._staging.collect(leaves, rows)
        self._num_offers += 1
        self._offered = True
        if self._num_offers % self._rounds_per_exchange == 0:
            self._round_runs = True
            self._worker.start(self._staging.candidates())
        self._seconds_offering += time.perf_counter() - began

    def _settle(self) -> None:
        """Waits for the running round, if any."""
        with self._settling:
            self._settle_alone()

    def _settle_alone(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._round_runs:
            return
        began = time.perf_counter()
        try:
            self._num_staged = self._worker.result(self._timeout_seconds + GRACE_SECONDS)
            self._round_runs = False
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._failure = self._explain(error)
            raise self._failure from error
        finally:
            self._seconds_waited += time.perf_counter() - began

    def _explain(self, error: BaseException) -> RoundError:
        """What the trainer sees of an error in the worker."""
        where = self._here(f"round {self._rounds.num_rounds} ({self._rounds.stage})")
        return round_error(error, where, self._timeout_seconds)

    def _check_open(self, call: str) -> None:
        if not self._finalizer.alive:
            raise BufferClosedError(self._here(f"{call} after close(): the buffer is closed"))
        if self._process != os.getpid():
            raise RuntimeError(
                f"{call} in a forked process (a DataLoader's worker?): the buffer belongs to "
                "the process that made it"
            )
        if self._failure is not None:
            raise self._failure

    def _close(self, wait_seconds: float) -> None:
        if self._process != os.getpid() or self._finalizer.detach() is None:
            return
        with self._settling:
            self._finish_round(wait_seconds)
        _shut_down(self._worker, self._transport, min(wait_seconds, EXIT_SECONDS), self._process)

    def _finish_round(self, wait_seconds: float) -> None:
        if self._round_runs and self._failure is None:
            try:
                self._num_staged = self._worker.result(wait_seconds)
                self._round_runs = False
            except Exception as error:
                self._failure = self._explain(error)
                logger.log(
                    logging.WARNING if wait_seconds else logging.DEBUG,
                    "the last round did not finish: %s",
                    self._failure,
                )

    def _here(self, message: str) -> str:
        """The message, with the rank where there are several."""
        if self._transport.num_ranks == 1:
            return message
        return f"rank {self._transport.rank}: {message}"


def _shut_down(worker: Worker, transport: Transport, wait_seconds: float, process: int) -> None:
    if process != os.getpid():
        return  # in a forked child: worker and transport are the parent's
    if worker.stop(wait_seconds):
        transport.close()
    else:  # it still uses the transport
        worker.call_at_end(transport.close)
