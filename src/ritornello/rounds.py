"""Rounds: one step's work on the buffer. Admit, plan, exchange, stage.

Round ``k`` admits the candidates of the k-th mini-batch (with ``rounds_per_exchange`` of several
mini-batches) to this rank's shard, then draws the representatives for the next one out of all
shards. Everything random in it comes from streams keyed by ``k``, so its result does not depend
on when it runs.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from ritornello.arrays import Ints
from ritornello.contents import Contents
from ritornello.distances import cosine_distances, gather_padded
from ritornello.random_streams import Purpose, Streams
from ritornello.records import Layout
from ritornello.sampling import Planner, SamplingPolicy
from ritornello.selection import POLICIES, Assignment, SelectionPolicy
from ritornello.shard import Shard
from ritornello.staging import Candidates, Staging
from ritornello.storage import Storage
from ritornello.transports import Transport

STAGES = ("admit", "plan", "exchange", "stage")


def rows_of_rank(capacity: int, rank: int, num_ranks: int) -> int:
    """A rank's part of the capacity; the parts add up to it exactly."""
    return capacity // num_ranks + (rank < capacity % num_ranks)


class Rounds:
    """One rank's side of all rounds. After ``open``, only the worker calls it.

    Args:
        transport: to the other ranks.
        selection: this rank's policy, bound to the shard.
        sampling: the policy of the draws.
        capacity: of the whole buffer.
        num_representatives: ``r``.
        seed: of all streams.
        storage: where the shard lies.
        draws_per_round: how many draws, each on its own, a round makes for each rank.
    """

    def __init__(
        self,
        transport: Transport,
        selection: SelectionPolicy,
        sampling: SamplingPolicy,
        *,
        capacity: int,
        num_representatives: int,
        seed: int,
        storage: Storage,
        draws_per_round: int = 1,
    ) -> None:
        self.transport = transport
        self.num_rounds = 0
        self.stage = STAGES[0]
        self._stage_began: float | None = None
        self.seconds_per_stage = dict.fromkeys(STAGES, 0.0)
        self.bytes_sent = self.bytes_received = 0
        self.shard: Shard | None = None
        self._full = False
        self._selection, self.sampling = selection, sampling
        self.needs_labels = selection.needs_labels or sampling.needs_labels
        self._is_builtin = type(selection) in POLICIES.values()
        self._selection_streams = Streams(seed, Purpose.SELECTION, transport.rank)
        self._planner = Planner(
            transport.rank,
            num_representatives,
            sampling,
            Streams(seed, Purpose.SAMPLING),
            draws_per_round,
        )
        self._storage = storage
        self._limits = np.array(
            [rows_of_rank(capacity, i, transport.num_ranks) for i in range(transport.num_ranks)]
        )
        self.contents = Contents(
            np.zeros(transport.num_ranks, dtype=np.int64),
            self._limits if sampling.needs_labels else None,
        )

    @property
    def num_rows(self) -> int:
        """This rank's part of the capacity."""
        return int(self._limits[self.transport.rank])

    @property
    def num_held(self) -> int:
        """Representatives in this rank's shard."""
        return int(self.contents.sizes[self.transport.rank])

    def open(self, layout: Layout, label: int | None, staging: Staging) -> None:
        """Says what the samples look like; the shard is made in the first round.

        Args:
            layout: of the records.
            label: the position of the label among the fields.
            staging: to and from the trainer.
        """
        self._layout, self._label, self._staging = layout, label, staging

    def run(self, candidates: Candidates) -> int:
        """Runs one round.

        Returns:
            How many representatives are staged for the next mini-batch.

        Raises:
            ValueError: a label out of range, samples of another layout on another rank, or an
                assignment that breaks the policy's contract.
            MemoryError: the shard does not fit.
            PeerLostError: see ``Transport``.
        """
        with self._staging.worker_stream():
            self._enter("admit")
            if self.shard is None:
                self.shard = self._make_shard()
            size, admitted = self._admit(candidates, self.shard)
            self._enter("plan")
            self._learn_sizes(size)
            if admitted is not None:
                self._learn_labels(admitted)
            plan = self._planner.plan(self.num_rounds, self.contents, self._full)
            if plan.num_drawn:
                self._enter("exchange")
                received = self._staging.receive(plan.num_drawn)
                self.transport.exchange(self.shard, plan, received)
                self._enter("stage")
                self._staging.deliver(plan.num_drawn, plan.order)
        self._enter(None)
        kept = int(plan.send_counts[self.transport.rank])
        self.bytes_sent += (int(plan.send_counts.sum()) - kept) * self._layout.record_bytes
        self.bytes_received += (plan.num_drawn - kept) * self._layout.record_bytes
        self.num_rounds += 1
        return plan.num_drawn

    def labels(self) -> Ints:
        """The labels (int64) of the representatives in this rank's shard."""
        if self.shard is None or self._label is None:
            return np.zeros(0, dtype=np.int64)
        with self._staging.worker_stream():  # after the last round's writes
            return self._labels_of(self.shard.rows[: self.num_held])

    def representatives(self, first: int, num_rows: int) -> list[torch.Tensor]:
        """Copies of this rank's representatives from a slot on, field by field."""
        assert self.shard is not None
        rows = self._staging.copy_for_trainer(self.shard.rows[first : first + num_rows])
        return self._layout.views(rows)

    def measure_distances(self, features: torch.Tensor) -> None:
        """Tells all ranks how far each representative is from its class's mean.

        Blocks until all ranks have called it.

        Args:
            features: ``[num_held, d]`` of this rank's representatives, in the order of slots.

        Raises:
            ValueError: on every rank, if some rank's features cannot be used.
        """
        distances = cosine_distances(features, self.labels(), self.transport)
        for rank, of_rank in enumerate(gather_padded(distances, self.transport)):
            self.contents.set_rank_distances(rank, of_rank)

    def _admit(self, candidates: Candidates, shard: Shard) -> tuple[int, Ints | None]:
        """Lets the policy decide, writes the shard.

        Returns:
            The shard's new size; and int64 ``[n, 2]``, slot and label of what was admitted, if
            the sampling policy looks at labels.
        """
        records = self._staging.arrive(candidates)
        if self.needs_labels:
            labels = self._labels_of(records)
            if self._staging.on_gpu:  # else the trainer's thread has checked them
                check_labels(labels, self._selection.num_classes)
        else:
            labels = np.zeros(len(records), dtype=np.int64)
        assignment = self._selection.admit(labels, self._selection_streams.at(self.num_rounds))
        size = self.num_held
        if self._is_builtin and size == self.num_rows:
            new_size = size
        else:
            new_size = size_after(assignment, size, self.num_rows, len(records))
        self.transport.await_readers()
        shard.write(assignment.slots, records, assignment.rows)
        if not self.sampling.needs_labels:
            return new_size, None
        return new_size, np.stack([assignment.slots, labels[assignment.rows]], axis=1)

    def _labels_of(self, records: torch.Tensor) -> Ints:
        assert self._label is not None
        return self._layout.integers(records, self._label)

    def _make_shard(self) -> Shard:
        """Makes the shard, once all ranks have seen that their samples are of one kind."""
        digests = self.transport.all_gather(np.array([self._layout.digest]))[:, 0]
        others = np.flatnonzero(digests != self._layout.digest).tolist()
        if others:
            raise ValueError(
                f"the samples of rank(s) {others} have another layout than this rank's "
                f"({'; '.join(map(str, self._layout.fields))}): all ranks must give the same "
                "nesting, dtypes and shapes"
            )
        return self.transport.make_shard(self._limits, self._layout.record_bytes, self._storage)

    def _learn_sizes(self, size: int) -> None:
        """All-gathers the shards' sizes, as long as some shard is still filling."""
        if not self._full:
            self.contents.resize(self.transport.all_gather(np.array([size]))[:, 0].copy())
            self._full = np.array_equal(self.contents.sizes, self._limits)

    def _learn_labels(self, admitted: Ints) -> None:
        """All-gathers what was admitted where, for policies that look at labels."""
        for rank, of_rank in enumerate(gather_padded(admitted, self.transport)):
            self.contents.admit(rank, of_rank[:, 0], of_rank[:, 1])

    def _enter(self, stage: str | None) -> None:
        """Notes the time at which a stage begins, and so the one before ends."""
        now = time.perf_counter()
        if self._stage_began is not None:
            self.seconds_per_stage[self.stage] += now - self._stage_began
        self._stage_began = None if stage is None else now
        self.stage = stage or self.stage


def check_labels(labels: Ints, num_classes: int | None) -> None:
    """Checks that labels are class labels.

    Raises:
        ValueError: names the first one out of range.
    """
    if len(labels) == 0:
        return
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        wrong = labels < 0
        if num_classes is not None:
            wrong |= labels >= num_classes
        rule = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        raise ValueError(
            f"the label {int(labels[wrong][0])} is out of range: labels must be {rule} "
            f"({int(wrong.sum())} of {len(labels)} are not)"
        )


def size_after(assignment: Assignment, size: int, num_rows: int, num_candidates: int) -> int:
    """The number of slots in use after an assignment.

    Raises:
        ValueError: the assignment breaks the contract of ``SelectionPolicy.admit``.
    """
    # Lists: for so few numbers Python is faster than arrays.
    rows: list[int] = assignment.rows.tolist()
    slots: list[int] = assignment.slots.tolist()
    if len(rows) != len(slots):
        raise ValueError(f"the selection policy gave {len(rows)} rows but {len(slots)} slots")
    if not slots:
        return size
    new_size = max(size, max(slots) + 1)
    if min(slots) < 0 or new_size > num_rows or min(rows) < 0 or max(rows) >= num_candidates:
        raise ValueError(
            f"the selection policy gave slots {slots} for rows {rows}: slots must be from 0 to "
            f"{num_rows - 1}, rows from 0 to {num_candidates - 1}"
        )
    if len({slot for slot in slots if slot >= size}) < new_size - size:
        raise ValueError(
            f"the selection policy gave slots {slots} of a shard that holds {size}: unused ones "
            "must fill without gaps"
        )
    return new_size
