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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from ritornello.arguments import Arguments
from ritornello.checkpoint import SavedBuffer, SavedFolder, Saving, Snapshot, new_save_id
from ritornello.digest import digest
from ritornello.errors import (
    BufferClosedError,
    CheckpointError,
    PeerLostError,
    RoundError,
    round_error,
)
from ritornello.manifest import Manifest, Removal, TaskMark
from ritornello.outputs import Outputs
from ritornello.random_streams import Purpose, Streams
from ritornello.records import Batch, Layout
from ritornello.rounds import Rounds, check_labels
from ritornello.sampling import SamplingPolicy, sampling_policy
from ritornello.selection import SelectionPolicy, selection_policy
from ritornello.staging import Staging
from ritornello.state_dicts import PREFIX, SavedState, entry_of, gathered
from ritornello.stats import BufferStats
from ritornello.storage import Storage
from ritornello.transports import Transport, check_agreement, open_transport, together
from ritornello.worker import InlineWorker, ThreadWorker, Worker

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How much longer than a peer the trainer waits, so that the error that names the peer is first."""

DRAWN_BY = ("num_representatives", "num_draws", "rounds_per_exchange", "sampling")
"""The arguments that say what is drawn, and how much is staged for a step."""

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
        label: int | str | tuple[int | str, ...] | None = 1,
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
            rounds = Rounds(
                channel,
                selection_policy(selection),
                sampling_policy(sampling),
                capacity=capacity,
                num_representatives=num_representatives,
                seed=seed,
                storage=place,
                draws_per_round=num_draws * rounds_per_exchange,
            )
        except BaseException:
            channel.close()
            raise
        self._capacity = int(capacity)
        self._num_representatives = num_representatives
        self._num_candidates = num_candidates
        self._arguments = arguments.as_text()
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
        self._is_offered = False  # since the last draw
        self._num_waiting = 0  # candidates that were offered, for the next round
        self._round_runs = False
        self._num_staged = 0
        self._failure: RoundError | None = None
        self._is_restored = False  # and no mini-batch has come since
        self._tasks: tuple[TaskMark, ...] = ()
        self._removals: tuple[Removal, ...] = ()
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
        augmented = self._prepare(batch, "update")
        self._start_round()
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
        self._is_offered = False
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
        if self._is_offered:
            raise RuntimeError(
                "offer: the last offer's representatives have not been drawn yet; draw and "
                "offer alternate"
            )
        self._collect(self._leaves(batch))
        self._start_round()

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
        with self._with_peers("measure_distances"):
            self._rounds.measure_distances(torch.cat(features) if features else torch.zeros(0, 0))

    def begin_task(self, name: str) -> None:
        """Says that a task begins: what is offered from now on is of it.

        What is saved then tells of every representative which task it is of, and how old it is.
        Waits for the running round. All ranks call it alike.

        Args:
            name: such as a date, or what is new.

        Raises:
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("begin_task")
        self._settle()
        self._tasks = (*self._tasks, TaskMark(str(name), self._rounds.num_rounds, time.time()))

    def save(self, folder: str | os.PathLike[str], *, background: bool = False) -> None:
        """Saves the buffer in a folder: a file for each shard, and a manifest.

        What is saved is the buffer after the last mini-batch that the trainer got, with the
        representatives that were drawn for the next one. Shards are written from where they
        lie, without a second copy. Names of files are new each time, and the manifest is renamed
        into place when all is on disk: whatever happens meanwhile, the folder holds a whole save,
        this one or the one before. Then the files of the one before are removed.

        All ranks call it, after as many updates; blocks until all have saved. Ranks may need
        unequally long, but not by more than ``timeout_seconds``.

        Args:
            folder: on a file system that all ranks share; made if it is not there.
            background: returns at once, and the worker writes the shard between rounds, a few
                megabytes at a time (a round may have to wait for one piece). The save counts as
                soon as all ranks have written. ``wait_until_saved``, the next ``save`` and
                ``load`` wait for it; ``close`` writes what is left.

        Raises:
            CheckpointError: on every rank, if some rank could not save, as where the disk is full
                or another job is saving there; or the selection policy or the samples cannot be
                saved. The buffer goes on.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        with self._with_peers("save"):
            self._begin_saving(folder, background)
            if not background:
                self._end_saving()

    def wait_until_saved(self) -> None:
        """Waits until the last save in the background is on disk. All ranks call it.

        Raises:
            CheckpointError: on every rank, if some rank could not save.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("wait_until_saved")
        self._settle()
        with self._with_peers("wait_until_saved"):
            self._end_saving()

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Takes over a saved buffer, in place of what this one holds.

        With as many ranks and the same arguments everything goes on as if it had never stopped,
        bit for bit. With another number of ranks or another capacity, the representatives are
        dealt out anew, every class evenly over the ranks; none is lost as long as the capacity
        allows, and of a smaller one the policy says who stays. What was drawn for the next step
        is then drawn again. Other arguments may differ, too, but for ``selection`` and ``label``.

        All ranks call it; blocks until all have loaded. Nothing in the folder is executed, and no
        memory is taken for what is not there.

        Args:
            folder: from ``save``.

        Raises:
            CheckpointError: on every rank, if there is no saved buffer, it is damaged or of another
                version of the format, or it does not fit: other samples, another policy. The buffer
                is as it was.
            MemoryError: the shard does not fit.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._load(lambda: SavedFolder(folder), "load")

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """The buffer's state in memory, as ``save`` would write it: copies, shard included.

        A rank's state is the entry ``rank_I``, of texts and tensors in CPU memory: for
        ``torch.distributed.checkpoint`` (whose ``load`` wants as many ranks), or ``torch.save`` on
        every rank. For those who save on one rank only, let all ranks ask for the whole state.

        Args:
            whole: on rank 0 with the entries of all ranks; blocks until all ranks have called it.
                Rank 0 needs memory for it. It can be loaded on any number of ranks.

        Raises:
            CheckpointError: the selection policy or the samples cannot be saved.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("state_dict")
        self._settle()
        try:
            entry = entry_of(self._snapshot())
        except TypeError as error:
            raise CheckpointError(self._here(str(error))) from error
        if not whole:
            return {f"{PREFIX}{self._transport.rank}": entry}
        with self._with_peers("state_dict"):
            return dict(gathered(entry, self._transport))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict``; as ``load``.

        Args:
            state: this rank's entry where ranks and capacity are those of then; else all ranks'.

        Raises:
            See ``load``.
        """
        self._load(lambda: SavedState(state), "load_state_dict")

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

        Candidates for which no round has started yet (``rounds_per_exchange``) are dropped. What a
        save in the background has not yet written is written.
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

    def _snapshot(self) -> Snapshot:
        """What this rank saves, while no round runs.

        Raises:
            TypeError: the selection policy cannot be saved.
        """
        arrays = self._rounds.state()
        if self._staging is not None:
            arrays["staged"] = self._staging.staged(self._num_staged).numpy()
            arrays["waiting"] = self._staging.collected(self._num_waiting).numpy()
        manifest = Manifest(
            arguments=self._arguments,
            capacity=self._capacity,
            held_per_rank=tuple(self._rounds.contents.sizes.tolist()),
            num_rounds=self._rounds.num_rounds,
            num_offers=self._num_offers,
            is_offered=self._is_offered,
            num_staged=self._num_staged,
            layout=self._layout,
            label=self._label,
            tasks=self._tasks,
            removals=self._removals,
        )
        manifest.as_json()  # fails here, if at all
        return Snapshot(manifest, arrays, self._rounds.used_rows(manifest.record_bytes))

    def _begin_saving(self, folder: str | os.PathLike[str], background: bool) -> None:
        self._check_open("save")
        self._settle()
        self._end_saving()
        offers = self._transport.all_gather(np.array([self._num_offers, self._is_offered]))
        if (offers != offers[0]).any():
            raise CheckpointError(
                self._here(f"save: the ranks have offered {offers[:, 0].tolist()} mini-batches: ")
                + "all must call it after as many"
            )
        snapshot = together(self._transport, self._snapshot, "save")
        saving = Saving(
            Path(folder),
            snapshot,
            new_save_id(self._transport),
            self._rounds.to_host,
            self._transport,
            background,
        )
        try:
            together(self._transport, saving.begin, "save")
        except BaseException:
            saving.give_up()
            raise
        self._rounds.saving = saving
        if background:
            self._worker.while_idle(saving.step)

    def _end_saving(self) -> None:
        """Waits for the save under way, if any. All ranks have one, or none has."""
        saving, self._rounds.saving = self._rounds.saving, None
        if saving is not None:
            saving.wait()

    def _load(self, open_saved: Callable[[], SavedBuffer], call: str) -> None:
        self._check_open(call)
        self._settle()
        with self._with_peers(call):
            self._end_saving()
            saved = together(self._transport, open_saved, call)
            ids = self._transport.all_gather(np.array([digest(saved.manifest.as_json())]))
            if isinstance(saved, SavedFolder) and (ids != ids[0]).any():
                raise CheckpointError(self._here(f"{call}: the ranks see different saves there"))
            together(self._transport, lambda: self._check_fits(saved.manifest), call)
            try:
                self._take_over(saved, call)
            except CheckpointError:
                if self._rounds.is_torn:
                    self._failure = RoundError(
                        self._here(f"{call} failed when parts of the shard were overwritten")
                    )
                raise

    def _check_fits(self, manifest: Manifest) -> None:
        """Checks that a saved buffer can become this one.

        Raises:
            CheckpointError: names what differs.
        """
        for name in ("selection", "label"):
            saved, own = manifest.arguments.get(name), self._arguments[name]
            if saved != own:
                raise CheckpointError(
                    self._here(f"the saved buffer has {name}={saved}, this one {name}={own}: they ")
                    + "must be the same"
                )
        if self._layout and manifest.layout and self._layout.digest != manifest.layout.digest:
            raise CheckpointError(
                self._here("the saved buffer holds other samples: ")
                + f"{'; '.join(map(str, manifest.layout.fields))}; this one holds "
                + "; ".join(map(str, self._layout.fields))
            )
        if manifest.layout is not None:
            position = manifest.layout.label_position(self._label_path, self._rounds.needs_labels)
            if position != manifest.label:
                raise CheckpointError(self._here("the saved buffer has its label elsewhere"))

    def _take_over(self, saved: SavedBuffer, call: str) -> None:
        manifest, rank = saved.manifest, self._transport.rank
        own = self._snapshot().manifest
        has_same_shards = manifest.num_ranks == own.num_ranks and manifest.capacity == own.capacity
        goes_on = has_same_shards and all(
            manifest.arguments.get(name) == own.arguments[name] for name in DRAWN_BY
        )
        if manifest.layout is None:
            if own.num_rounds or own.num_offers:
                raise CheckpointError(
                    self._here(f"{call}: the saved buffer had not begun, but this one has")
                )
            return
        if self._layout is None:
            self._label = manifest.label
            self._open(manifest.layout, torch.device("cpu"))
            self._is_restored = True
        staged = waiting = torch.zeros((0, manifest.record_bytes), dtype=torch.uint8)

        def understand() -> tuple[Tensor, Tensor]:
            with saved.shard(rank) as shard:
                arrays = shard.arrays()
            for name in ("staged", "waiting"):
                if arrays[name].dtype != np.uint8 or arrays[name].shape[1:] != staged.shape[1:]:
                    raise ValueError(f"{name} holds no records")
            if len(arrays["staged"]) != manifest.num_staged:
                raise ValueError(f"{len(arrays['staged'])} staged, not {manifest.num_staged}")
            return torch.from_numpy(arrays["staged"]), torch.from_numpy(arrays["waiting"])

        if goes_on:
            staged, waiting = together(self._transport, understand, call)
        if has_same_shards:
            same_sampling = manifest.arguments.get("sampling") == own.arguments["sampling"]
            self._rounds.restore(saved, same_sampling and self._rounds.sampling.needs_labels)
        else:
            self._rounds.adopt(saved)
        assert self._staging is not None
        self._staging.put_back(staged, waiting)
        self._num_staged, self._num_waiting = len(staged), len(waiting)
        self._tasks, self._removals = manifest.tasks, manifest.removals
        self._is_offered = manifest.is_offered
        self._num_offers = manifest.num_offers
        if not goes_on:
            self._draw_again()

    def _draw_again(self) -> None:
        """Starts a round without candidates, for the next step."""
        assert self._staging is not None
        self._num_offers = self._rounds.num_rounds * self._rounds_per_exchange
        if self._is_offered:
            self._num_offers += self._rounds_per_exchange
            self._round_runs = True
            self._worker.start(self._staging.candidates())

    @contextmanager
    def _with_peers(self, call: str) -> Iterator[None]:
        """Around what involves the other ranks: without one of them nothing goes on."""
        try:
            yield
        except PeerLostError as error:
            self._failure = PeerLostError(self._here(f"{call} failed: {error}"), error.peers)
            raise self._failure from error

    def _leaves(self, batch: Batch) -> list[Tensor]:
        """Checks a mini-batch; the first one fixes the layout."""
        try:
            if self._layout is None:
                layout = Layout.of(batch)
                leaves = layout.leaves(batch)
                self._label = layout.label_position(self._label_path, self._rounds.needs_labels)
                self._open(layout, _device_of(leaves))
            else:
                leaves = self._layout.leaves(batch)
                if self._is_restored:
                    self._meet(batch, leaves)
            if self._rounds.needs_labels and self._label is not None:
                labels = leaves[self._label]
                assert self._staging is not None
                # On a GPU, reading the labels would make the trainer wait: the worker does it.
                if not (labels.is_cuda and self._staging.on_gpu):
                    check_labels(labels.cpu().numpy(), self._rounds.selection.num_classes)
        except (TypeError, ValueError) as error:
            raise type(error)(self._here(str(error))) from None
        return leaves

    def _open(self, layout: Layout, device: torch.device) -> None:
        """Makes what depends on the layout, and on where mini-batches are."""
        draws_per_round = self._num_draws * self._rounds_per_exchange
        num_per_round = self._num_representatives * draws_per_round
        reorders = draws_per_round > 1
        self._staging = Staging(layout, device, self._storage.device, num_per_round, reorders)
        self._rounds.open(layout, self._label, self._staging)
        self._layout = layout

    def _meet(self, batch: Batch, leaves: list[Tensor]) -> None:
        """Learns from the first mini-batch after a load what is not saved."""
        self._is_restored = False
        layout = Layout.of(batch)  # the same, with the batch's own types of containers
        device = _device_of(leaves)
        if device.type == "cpu":
            self._layout = layout
            return
        self._settle()
        assert self._staging is not None
        staged = self._staging.staged(self._num_staged)
        waiting = self._staging.collected(self._num_waiting)
        self._open(layout, device)
        self._staging.put_back(staged, waiting)

    def _take(self, call: str) -> Tensor | None:
        """Waits for the round; one step's representatives as records, None if there are none."""
        if not self._is_offered:
            if self._num_offers:
                raise RuntimeError(
                    f"{call}: no mini-batch was offered since the last draw; draw and offer "
                    "alternate: each offer starts a round, each draw takes its result"
                )
            return None
        self._settle()
        num_per_step = self._num_staged // self._rounds_per_exchange
        if num_per_step == 0:
            return None
        assert self._staging is not None
        step = self._num_offers % self._rounds_per_exchange
        return self._staging.take(step * num_per_step, num_per_step)

    def _release(self) -> None:
        assert self._staging is not None
        self._staging.release()

    def _prepare(self, batch: Batch, call: str) -> Batch:
        """``update`` up to the round: joins, and copies the candidates.

        ``rehearse`` calls it on a thread of its own, a step ahead. To the trainer, and to what is
        saved, nothing has happened yet.
        """
        self._check_open(call)
        leaves = self._leaves(batch)
        staged = self._take(call)
        augmented = batch
        if staged is not None:
            began = time.perf_counter()
            assert self._layout is not None
            joined = self._outputs.join(self._layout, leaves, staged)
            augmented = self._layout.rebuild(joined)
            self._release()
            self._seconds_joining += time.perf_counter() - began
        self._collect(leaves)
        return augmented

    def _collect(self, leaves: list[Tensor]) -> None:
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
        self._seconds_offering += time.perf_counter() - began

    def _start_round(self) -> None:
        """Starts the round of what was collected, if it is time for one."""
        assert self._staging is not None
        began = time.perf_counter()
        self._num_offers += 1
        self._is_offered = True
        if self._num_offers % self._rounds_per_exchange == 0:
            self._round_runs = True
            self._worker.start(self._staging.candidates())
        self._num_waiting = self._staging.num_collected
        self._seconds_offering += time.perf_counter() - began

    def _drop_prepared(self) -> None:
        """Drops what ``_prepare`` has copied."""
        if self._staging is not None:
            self._staging.drop_collected(self._num_waiting)

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
        saving = self._rounds.saving
        if saving is not None and not saving.has_ended:
            self._worker.stop(wait_seconds)
            saving.finish(wait_seconds)
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


def _device_of(leaves: list[Tensor]) -> torch.device:
    """Where mini-batches are: on the GPU, if a leaf is."""
    return next((leaf.device for leaf in leaves if leaf.is_cuda), torch.device("cpu"))


def _shut_down(worker: Worker, transport: Transport, wait_seconds: float, process: int) -> None:
    if process != os.getpid():
        return  # in a forked child: worker and transport are the parent's
    if worker.stop(wait_seconds):
        transport.close()
    else:  # it still uses the transport
        worker.call_at_end(transport.close)
