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

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.errors import BufferClosedError
from ritornello.policies.names import sampling_policy, selection_policy
from ritornello.policies.sampling import SamplingPolicy
from ritornello.policies.selection import SelectionPolicy
from ritornello.records.coding import Coding
from ritornello.records.modes import outside_modes
from ritornello.records.nesting import Batch
from ritornello.records.storage import Storage
from ritornello.rounds.arguments import Arguments, check_count, check_seconds, check_share
from ritornello.rounds.between.distances import measure_distances
from ritornello.rounds.between.rewriting import representatives, rewrite
from ritornello.rounds.between.uneven import fill
from ritornello.rounds.first_round import OpenBuffer
from ritornello.rounds.round import Rounds
from ritornello.rounds.stats import BufferStats
from ritornello.rounds.steps import Steps
from ritornello.rounds.worker import EXIT_SECONDS, Worker, shut_down
from ritornello.saving.checkpointing import Checkpointing
from ritornello.saving.converted import Converted
from ritornello.saving.folder import SavedFolder
from ritornello.saving.saved_buffer import SavedBuffer
from ritornello.saving.state_dict import SavedState, WholeState
from ritornello.saving.writing import FILES_SECONDS
from ritornello.transports.agreement import check_agreement
from ritornello.transports.base import Transport
from ritornello.transports.opening import open_transport
from ritornello.transports.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FieldName = int | str | tuple[int | str, ...]
Fields = FieldName | list[FieldName]


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
    An interrupt, or whatever a signal handler raises, passes through every call; behind it the
    buffer is whole, can be saved, and goes on.

    Source: Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
    Distributed Rehearsal Buffers" (CCGrid 2024).

    Args:
        capacity: representatives in the whole buffer, over all ranks; split over them to the
            last one.
        capacity_bytes: memory of the whole buffer, over all ranks: what it holds is bounded by
            this and by ``capacity``, whichever comes first. Needed where samples differ in length;
            what is kept then, see there. None: ``capacity`` alone counts.
        num_representatives: ``r``, drawn per rank and step: any number from 0 on. Of a fraction
            each step draws the number below or above, the same on all ranks, and ``r`` in
            expectation. While the buffer holds fewer, a rank gets all there are.
        most_representatives: None: ``r`` is fixed. A number: ``num_representatives`` may be set
            between two steps, up to this; there is memory for as many.
        num_candidates: ``c``, expected per rank and step: each sample of a mini-batch of ``b``
            is a candidate with probability ``min(1, c / b)``. None: every sample is.
        selection: who is admitted and replaced: "class-balanced", "per-class-random",
            "class-balanced-reservoir", "grasp", "greedy-balanced", "first-offered",
            "reservoir", "fifo", or a ``SelectionPolicy``.
        label: which leaf of a sample is the class label: an index, key or attribute, or a tuple
            (or list) of them for a nested leaf; None for policies that need none. One integer per
            sample.
        identity: which leaf says which sample it is, named as by ``label``: one integer, the same
            whenever the same sample comes, as an index in the data set. A sample that is held is
            then not admitted to the same shard again, as in a second epoch. None: it may be.
        process_group: whose ranks share the buffer, or a device mesh of one dimension, such as
            ``mesh["data_parallel"]``. None: the default group's, or a single process if there is
            none.
        seed: of everything random, from 0 to 2**64 - 1.
        sampling: what is drawn: "uniform" (every representative equally likely),
            "class-balanced" (every class), "grasp" (from prototypical to atypical; see
            ``measure_distances``), "earlier-tasks" (those of before the running task; see
            ``begin_task``), or a ``SamplingPolicy``.
        num_draws: draws of ``r`` per step, independent of each other, as DER++ takes two.
        draws: where from: "global" (all shards), or "local" (each rank its own shard alone, with
            ``sampling="uniform"``). Local draws show what global ones are for: a rank never gets
            what it has not seen itself. All that is said of draws holds, shard by shard: while a
            shard holds fewer than ``r``, its rank gets all there are.
        transport: "auto" (shared memory inside each host, "collective" between hosts),
            "shared_memory", "collective" (torch.distributed), "mpi", "local" (this process alone,
            also where a launcher has started several), or a ``Transport``, which the buffer then
            owns.
        storage: where the shards lie: "auto" (shared memory where ranks share a host, else
            ordinary memory), "cpu", "pinned", "shared", an accelerator such as "cuda", or
            "file:DIR" (a file in a folder, for shards larger than memory).
        timeout_seconds: how long a peer may be silent before a ``PeerLostError``. It must be
            longer than any pause that some ranks make and others do not, such as an evaluation
            on one rank. None: the process group's own, as a rule half an hour.
        asynchronous: whether ``update`` and ``offer`` go on while their round runs, on a thread of
            the buffer's own; False: they wait for it. "auto": they go on, but where steps are so
            short that nothing would hide a round, as in a loop that does nothing else, the trainer
            may run it itself: on a single rank whose buffer is full, with mini-batches and shard in
            CPU memory, a policy of Ritornello's and uniform draws. A signal's handler must not use
            the buffer then, but may raise. The results are the same.
        encode: where another form of a sample is stored than is trained on, such as the file that
            an image was decoded from: gives what is stored of a mini-batch, as many samples. All
            other arguments are about what is stored. None: the mini-batch.
        decode: gives what is trained on of representatives, for ``update`` nested like a
            mini-batch. It is called in the background, on a thread of the buffer's own and without
            gradients, as soon as they are drawn; an error in it comes with the ``update`` or
            ``draw`` that would have given them. None: what is stored.

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
        num_representatives: float,
        capacity_bytes: int | None = None,
        most_representatives: int | None = None,
        num_candidates: int | None = None,
        selection: str | SelectionPolicy = "class-balanced",
        label: int | str | Sequence[int | str] | None = 1,
        identity: int | str | Sequence[int | str] | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        seed: int = 0,
        sampling: str | SamplingPolicy = "uniform",
        num_draws: int = 1,
        draws: str = "global",
        transport: str | Transport = "auto",
        storage: str | torch.device = "auto",
        timeout_seconds: float | None = None,
        asynchronous: bool | str = True,
        encode: Callable[[Batch], Batch] | None = None,
        decode: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if timeout_seconds is not None:
            check_seconds("timeout_seconds", timeout_seconds)
            timeout_seconds = float(timeout_seconds)
        if not isinstance(asynchronous, bool) and asynchronous != "auto":
            raise TypeError(f"asynchronous={asynchronous!r}: it must be True, False or 'auto'")
        place = Storage.of(storage)
        channel = open_transport(transport, process_group, timeout_seconds, place)
        if timeout_seconds is None:
            timeout_seconds = channel.timeout_seconds
        try:
            arguments = Arguments(
                capacity=capacity,
                num_representatives=num_representatives,
                most_representatives=most_representatives,
                num_candidates=num_candidates,
                selection=selection,
                label=label,
                seed=seed,
                sampling=sampling,
                storage=place.kind,
                num_draws=num_draws,
                identity=identity,
                capacity_bytes=capacity_bytes,
                draws=draws,
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
                num_draws=num_draws,
                rate_may_change=arguments.rate_may_change,
                capacity_bytes=capacity_bytes,
                draws=draws,
            )
            if channel.num_ranks > 1:
                rounds.among_others = OpenBuffer(channel)
            coding = Coding(encode, decode)
        except BaseException:
            channel.close()
            raise
        self._transport = channel
        watch = Watch(channel, rounds.run) if channel.num_ranks > 1 else None
        self._worker = Worker(name=f"ritornello-rank-{channel.rank}")
        self._steps = Steps(
            arguments, rounds, self._worker, place, timeout_seconds, watch, asynchronous, coding
        )
        self._checkpointing = Checkpointing(arguments, self._steps, self._worker)
        self._num_draws, self._draws = num_draws, draws
        self._timeout_seconds = timeout_seconds
        self._process, self._is_open = os.getpid(), True
        # A group that is made later may have more ranks than the buffer.
        self._has_its_ranks = transport != "auto" or process_group is not None
        self._has_its_ranks |= channel.num_ranks > 1 or not dist.is_available()
        self._world = None if self._has_its_ranks else dist.group.WORLD
        self._user: int | None = None  # the thread that is in a call
        # One path for close(), garbage collection and the interpreter's exit.
        self._end = partial(
            shut_down,
            self._worker,
            channel,
            self._checkpointing,
            self._process,
            stop_watch=None if watch is None else watch.stop,
        )
        self._finalizer = weakref.finalize(self, self._end, EXIT_SECONDS, FILES_SECONDS)

    @property
    def num_draws(self) -> int:
        """Draws per step."""
        return self._num_draws

    @property
    def draws(self) -> str:
        """Where representatives are drawn from: "global", all shards, or "local", this one."""
        return self._draws

    @property
    def num_representatives(self) -> float:
        """``r``, drawn per rank and step.

        With ``most_representatives`` it may be set between two steps, by all ranks alike. The next
        ``update`` or ``offer`` starts a round that draws as many, for the step after it::

            buffer.num_representatives = 16
            buffer.update(batch)  # with what was drawn before
            buffer.update(batch)  # with 16

        If ranks set different numbers, that round fails on all of them, and names them.

        Raises:
            ValueError: set to less than 0 or more than ``most_representatives``, or there is none.
            TypeError: set to what is no number.
        """
        return self._steps.rate

    @num_representatives.setter
    def num_representatives(self, rate: float) -> None:
        self._check_open("num_representatives")
        self._steps.change_rate(rate)

    @property
    def num_candidates(self) -> int | None:
        """``c``, the candidates of a mini-batch on this rank, expected; None: all its samples.

        It may be set between two steps, on each rank by itself, for the mini-batches that follow.
        0: nothing of them is offered. Where a task is seen for several epochs, offered in the last
        one alone, what came before it stays whole for as long::

            for epoch in range(num_epochs):
                buffer.num_candidates = None if epoch == num_epochs - 1 else 0

        A loop of ``rehearse`` is a mini-batch ahead: set it before ``rehearse`` is called. It is
        not saved.

        Raises:
            ValueError: set to less than 0.
            TypeError: set to what is no integer.
        """
        return self._steps.num_candidates

    @num_candidates.setter
    def num_candidates(self, number: int | None) -> None:
        self._check_open("num_candidates")
        if number is not None:
            check_count("num_candidates", number, minimum=0)
        self._steps.num_candidates = number

    @property
    def num_past(self) -> int:
        """How many samples of the last augmented mini-batch are past: its last ones.

        Of all draws together; 0 before the first. After ``draw`` what it gave, and inside a loop of
        ``rehearse`` of the mini-batch that the loop has. Where others take mini-batches from that
        loop ahead of time, see ``rehearse(..., with_mask=True)``.
        """
        return self._steps.num_past

    @property
    def past_mask(self) -> Tensor:
        """Which samples of the last augmented mini-batch are past, where mini-batches are.

        bool ``[b + r]``: False for the new ones, which come first, True for the ``num_past`` behind
        them. All False where nothing was drawn, as in the first step; all True after ``draw``.
        """
        return self._steps.past_mask()

    @outside_modes
    def update(self, batch: Batch) -> Batch:
        """Adds representatives to a mini-batch, and offers the mini-batch to the buffer.

        The same as ``draw``, join, ``offer``. Waits only if the last round is still running.

        Args:
            batch: tensors ``[b, ...]`` in any nesting of tuples, lists, dicts and containers that
                are registered with PyTorch's pytree, as ``TensorDict`` is. ``b`` may vary, and be
                0. A leaf whose samples differ in length is a list or tuple with a tensor (of one
                dtype, shapes that differ in the first dimension alone) or bytes for each (of one
                sample at least in the first mini-batch), or a jagged nested tensor. What happens to
                it afterwards never changes what is stored.

        Returns:
            The augmented mini-batch: nested alike, ``b + r`` samples, representatives last (with
            several draws, all of them), on the devices of the mini-batch; ``num_past`` says how
            many are past. The mini-batch itself where none are, as while the buffer is empty.
            Subclasses of tensors are always given as plain tensors.

        Raises:
            TypeError, ValueError: the mini-batch is not like the first one, or a label is out
                of range; names the leaf. The buffer is unchanged and goes on.
            RuntimeError: with "earlier-tasks": no task has begun, so that nothing would be drawn.
            PeerLostError: another rank is gone; raised again by every later call.
            RoundError: the last round failed.
            BufferClosedError: after ``close()``.
        """
        self._check_open("update")
        self._user = threading.get_ident()
        try:
            augmented = self._steps.prepare(batch, "update")
            self._steps.start_round(may_run_here=True)
        finally:
            self._user = None
        return augmented

    @outside_modes
    def draw(self) -> Batch | None:
        """Takes the representatives that were drawn after the last offer.

        Waits only if that round is still running. ``draw`` and ``offer`` alternate: each offer
        starts a round, and each draw takes its result. The first draw may come before any offer.
        A step that draws and does not come to offer, as where it fails, counts as one that had
        nothing to offer: the next ``draw`` or ``update`` runs its round first.

        Returns:
            ``r`` samples nested like a mini-batch, the caller's own; with ``num_draws`` of 2 or
            more, a list of as many such batches. While the buffer holds fewer than ``r``, all that
            it holds. None where nothing was drawn, as while it is empty.

        Raises:
            RuntimeError, PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("draw")
        self._user = threading.get_ident()
        try:
            drawn = self._steps.draw("draw")
        finally:
            self._user = None
        return drawn if drawn is None or self.num_draws > 1 else drawn[0]

    @outside_modes
    def offer(self, batch: Batch) -> None:
        """Offers a mini-batch: its candidates are copied, and a round starts.

        They can be drawn from the next ``draw`` on.

        Args:
            batch: as for ``update``.

        Raises:
            RuntimeError: no draw since the last offer.
            TypeError, ValueError, BufferClosedError: see ``update``.
        """
        self._check_open("offer")
        self._user = threading.get_ident()
        try:
            self._steps.offer(batch)
        finally:
            self._user = None

    @outside_modes
    def fill(
        self, loader: Iterable[Batch], *, progress: Callable[[int], None] | None = None
    ) -> int:
        """Offers all samples of a loader, such as the old data of a model that is there already.

        A round for each mini-batch, in which every sample is a candidate, whatever
        ``num_candidates`` says, and nothing of what is drawn is given. What the next step gets is
        drawn when all is offered: so training begins with a full buffer::

            buffer.fill(old_loader)
            for batch in loader:
                batch = buffer.update(batch)  # b + r samples from the first step on

        All ranks call it, each with a loader of its own part, after as many updates; blocks until
        the longest loader has ended.

        Args:
            loader: any iterable of mini-batches, as for ``update``. Ranks may have unequally many,
                or none at all.
            progress: called behind each mini-batch, with how many samples all ranks have offered.

        Returns:
            How many samples all ranks have offered.

        Raises:
            Exception: what this rank's loader or ``progress`` raises, or ``update`` would; on the
                other ranks a RuntimeError that names this one. What was offered before is stored,
                and the buffer goes on.
            CheckpointError: on every rank, if they are not in step.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("fill")
        return fill(self._steps, loader, progress)

    def representatives(self, batch_size: int = 256) -> Iterator[Batch]:
        """This rank's representatives, shard order, as batches of copies.

        Waits for the running round. Involves no other rank, but must be at its end before the
        next ``update``, ``offer``, ``load`` or ``rewrite``.

        Args:
            batch_size: samples at a time; the last batch may be smaller.

        Raises:
            ValueError: ``batch_size`` is below 1.
            RuntimeError: the buffer went on meanwhile.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("representatives")
        check_count("batch_size", batch_size, minimum=1)
        return representatives(self._steps, batch_size)

    def rewrite(
        self, function: Callable[[Batch], Any], fields: Fields, batch_size: int = 256
    ) -> None:
        """Makes fields of this rank's representatives anew, in place.

        Such as targets from the model as it is at a task's end::

            @torch.no_grad()
            def soft_targets(batch):
                images, labels, _ = batch
                return model(images)  # for field 2

            buffer.rewrite(soft_targets, fields=2)

        Waits for the running round, and for ranks of this host that still read this shard.
        Involves no other rank: each one rewrites its own shard, at most ``timeout_seconds`` longer
        than the others; for the same results in each run all call it after as many updates. What
        was drawn for the next step stays as it was drawn. A save in the background writes
        what was there before; what it has not yet written is set aside in memory.

        Args:
            function: gives the new values of a batch of copies, nested as samples were offered: for
                one field a tensor ``[n, *shape]``, for a list of them a tuple in its order, or a
                dict with its names; on any device. It does not use the buffer. If it raises,
                batches before are rewritten, and all others are as they were. An interrupt, too,
                leaves each batch as it was or as it shall be.
            fields: which leaf of a sample, named as by ``label``, or a list of such. The class
                label and the identity cannot be rewritten.
            batch_size: representatives at a time.

        Raises:
            ValueError, TypeError: ``fields`` names no leaf, or the label; or values have another
                dtype or shape than the field (nothing is converted); names it. Or ``batch_size``
                is below 1.
            RuntimeError: the function has used the buffer.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("rewrite")
        check_count("batch_size", batch_size, minimum=1)
        rewrite(self._steps, function, fields, batch_size)

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
        sampling = self._steps.rounds.sampling
        if not sampling.needs_distances:
            raise ValueError(
                self._steps.here(
                    f"measure_distances: {type(sampling).__name__} does not look at distances; use "
                    "sampling='grasp', or a policy of your own with needs_distances = True"
                )
            )
        features = [embed(batch) for batch in self.representatives(batch_size)]
        joined = torch.cat(features).cpu() if features else torch.zeros((0, 0), device="cpu")
        self._steps.with_peers(
            "measure_distances", partial(measure_distances, self._steps.rounds, joined)
        )

    def begin_task(self, name: str) -> None:
        """Says that a task begins: what is offered from now on is of it.

        What is saved then tells of every representative which task it is of, and how old it is.
        With ``sampling="earlier-tasks"`` all that is stored can be drawn from the next round on;
        it must be called for the first task, too.
        Waits for the running round. All ranks call it alike, after as many updates; blocks until
        they have.

        Args:
            name: such as a date, or what is new.

        Raises:
            ValueError: the name has more than 10,000 characters.
            CheckpointError: on every rank, if they are not in step.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("begin_task")
        self._checkpointing.begin_task(name)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that have begun, in their order; see ``begin_task``."""
        return tuple(task.name for task in self._checkpointing.tasks)

    def protect(self, share: float) -> int:
        """Lets what is stored now stay for good; what is offered from now on shares the rest.

        Such as the old data of a model that is there already::

            buffer.fill(old_loader)
            buffer.protect(0.5)  # half of the capacity is theirs

        What is protected never leaves, and is drawn as ever. The other slots are the selection
        policy's, which begins anew on them, as in a buffer of that capacity that is empty: what is
        offered from now on takes them, and what is stored there from before leaves in random order,
        one for each that comes. Where more is stored than may stay, random ones do: of each class
        equally many, as far as there are, if the policy looks at labels. Called again, it protects
        more; nothing loses its protection.

        All ranks call it alike, after as many updates; blocks until they have.

        Args:
            share: of the capacity, that may be protected altogether; above 0, and up to 1. Each
                rank protects the same part of its shard, to the last one, if it holds as many.
                With 1 all of what is stored stays, and a full buffer admits nothing more.

        Returns:
            How many representatives of the whole buffer are protected now.

        Raises:
            ValueError, TypeError: the share is out of range, or not the same on all ranks.
            CheckpointError: on every rank, if they are not in step.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("protect")
        share = check_share("protect: share", share)
        return self._steps.with_peers("protect", partial(self._steps.rounds.protect, share))

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
                ``load`` wait for it; ``close``, an error inside ``with buffer:`` and the end of the
                process write what is left.

        Raises:
            TypeError, ValueError: ``folder`` can be no folder's path.
            CheckpointError: on every rank, if some rank could not save, as where the disk is full
                or another job is saving there; or what is saved could not be loaded, as the state
                of a policy of one's own. The buffer goes on, and the save before is intact.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("save")
        self._checkpointing.save(folder, background)

    def wait_until_saved(self) -> None:
        """Waits until the last save in the background is on disk. All ranks call it.

        Raises:
            CheckpointError: on every rank, if some rank could not save.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("wait_until_saved")
        self._checkpointing.wait()

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        convert: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Takes over a saved buffer, in place of what this one holds.

        With as many ranks and the same arguments everything goes on as if it had never stopped,
        bit for bit. With another number of ranks or another capacity, the representatives are
        dealt out anew, every class evenly over the ranks; none is lost as long as the capacity
        allows, and of a smaller one the policy says who stays. What was drawn for the next step
        is then drawn again. Other arguments may differ, too, but for ``selection`` and ``label``.
        ``num_representatives`` becomes what it was, up to ``most_representatives``, if both
        buffers have that.

        All ranks call it; blocks until all have loaded. Nothing in the folder is executed, and no
        memory is taken for what is not there. If another job saves there meanwhile, it looks again.

        Args:
            folder: from ``save``.
            convert: gives samples another form as they are read, such as a wider field or one more:
                from a batch of ``n`` representatives to one of as many, with the same labels at the
                same place. Called more than once, for a few megabytes at a time, on the worker's
                thread. What was drawn for the next step is then drawn again.

        Raises:
            CheckpointError: on every rank, if there is no saved buffer, it is damaged or of another
                version of the format, or it does not fit: other samples, another policy, too
                little memory. The buffer is as it was.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("load")

        def saved() -> SavedBuffer:
            found = SavedFolder(folder)
            return found if convert is None else Converted(found, convert)

        self._checkpointing.load(saved, "load")

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """The buffer's state in memory, as ``save`` would write it: copies, shard included.

        A rank's state is the entry ``rank_I``, of texts and tensors in CPU memory: for
        ``torch.distributed.checkpoint`` (whose ``load`` wants as many ranks), or ``torch.save`` on
        every rank. One rank's entry alone is not the buffer: for those who save on one rank only,
        let all ranks ask for the whole state, or give them ``whole``. Else ``load_state_dict`` says
        which shards are missing.

        Args:
            whole: on rank 0 with the entries of all ranks; blocks until all ranks have called it.
                Rank 0 needs memory for it. It can be loaded on any number of ranks.

        Raises:
            CheckpointError: the selection policy or the samples cannot be saved.
            PeerLostError, RoundError, BufferClosedError: see ``update``.
        """
        self._check_open("state_dict")
        return self._checkpointing.state_dict(whole)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict``; as ``load``.

        Args:
            state: this rank's entry where ranks and capacity are those of then; else all ranks'.

        Raises:
            See ``load``.
        """
        self._check_open("load_state_dict")
        self._checkpointing.load(lambda: SavedState(state), "load_state_dict")

    @property
    def whole(self) -> WholeState:
        """The buffer for checkpoints that rank 0 writes, such as those of Accelerate and Fabric.

        An object with the methods that they look for: ``state_dict``, which all ranks call and
        which is ``state_dict(whole=True)``, and ``load_state_dict``, on any number of ranks::

            accelerator.register_for_checkpointing(buffer.whole)
            fabric.save("last.ckpt", {"model": model, "buffer": buffer.whole})
        """
        return WholeState(partial(self.state_dict, whole=True), self.load_state_dict)

    def __len__(self) -> int:
        """Representatives in the whole buffer. Waits for the running round."""
        self._check_process("len")
        self._steps.settle()
        return self._steps.rounds.contents.num_held

    def __bool__(self) -> bool:
        """True, also while empty: ``if buffer`` asks whether there is one."""
        return True

    def stats(self, per_class: bool = True, *, distinct: bool = False) -> BufferStats:
        """What the buffer holds and has cost so far. Waits for the running round.

        Involves no other rank. May be called after ``close()``.

        Args:
            per_class: whether to count classes, which reads the label of every representative.
            distinct: whether to count distinct samples in this rank's shard without ``identity``,
                too: those whose bytes differ, all of which are read. Where samples were augmented
                before they were offered, copies of one differ.
        """
        self._check_process("stats")
        return BufferStats.of(self._steps, per_class=per_class, distinct=distinct)

    def close(self) -> None:
        """Finishes the running round and ends the worker. May be called twice.

        What a save in the background has not yet written is written. Other ranks may still need
        this rank's records for their last round, so this waits for it, at most
        ``timeout_seconds``. Never raises for a peer that is gone.
        """
        self._close(self._timeout_seconds, self._timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # the peers may never come to this round
            self._close(0.0, FILES_SECONDS)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RehearsalBuffer cannot be pickled or copied: it owns a thread and connections. "
            "Keep it out of the data set and of what a DataLoader's workers use; make it in "
            "each rank's own process"
        )

    def _check_open(self, call: str) -> None:
        if not self._is_open:
            raise BufferClosedError(self._steps.here(f"{call} after close(): the buffer is closed"))
        self._check_process(call)
        if self._user is not None and self._user != threading.get_ident():
            raise RuntimeError(
                self._steps.here(
                    f"{call}: another thread is using the buffer; a buffer serves one thread (of "
                    "rehearse, the one that runs the loop): wait until the other has left its call"
                )
            )
        if not self._has_its_ranks and dist.group.WORLD is not self._world:
            self._check_alone(call)
        if self._steps.failure is not None:
            raise self._steps.failure

    def _check_alone(self, call: str) -> None:
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks > 1:
            raise RuntimeError(
                f"{call}: the buffer was made for 1 rank, but there is a process group of "
                f"{num_ranks} ranks by now: each has a buffer of its own, of the full capacity. "
                "Make the buffer after torch.distributed.init_process_group (or Accelerator(), "
                "Fabric.launch(), ...); or say transport='local' if each rank shall have its own"
            )
        self._world = dist.group.WORLD

    def _check_process(self, call: str) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                f"{call} in a forked process (a DataLoader's worker?): the buffer belongs to "
                "the process that made it"
            )

    def _close(self, wait_seconds: float, patience_seconds: float) -> None:
        if self._process != os.getpid() or not self._finalizer.alive:
            return
        self._is_open = False
        try:
            self._steps.finish(wait_seconds)
        finally:  # also after Ctrl-C
            self._end(min(wait_seconds, EXIT_SECONDS), patience_seconds)
        self._finalizer.detach()  # what an interrupt has left undone is for the next close
