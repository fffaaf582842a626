"""Rounds: one step's work on the buffer. Admit, plan, exchange, stage.

Round ``k`` admits the candidates of the k-th mini-batch to this rank's shard, then draws the
representatives for the next one out of all shards. Everything random in it comes from streams keyed
by ``k``, so its result does not depend on when it runs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ritornello.arrays import Bytes, Ints
from ritornello.policies.contents import Contents
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.policies.protection import Protected, protectable
from ritornello.policies.sampling import SamplingPolicy, UniformSampling
from ritornello.policies.selection import (
    Assignment,
    Journal,
    SelectionPolicy,
    check_labels,
    size_after,
)
from ritornello.policies.within_bytes import Turnover, WithinBytes, within_bytes
from ritornello.records.identities import Identities
from ritornello.records.layout import Layout
from ritornello.records.paged import PagedShard
from ritornello.records.pages import TABLE_BYTES, Pages, Paging
from ritornello.records.paging import Records
from ritornello.records.shard import Shard, rows_per_rank
from ritornello.records.storage import Storage
from ritornello.rounds.first_round import OpenBuffer, compare_layouts
from ritornello.rounds.planner import Planner
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.rounds.staging import Staging
from ritornello.transports.agreement import check_same, gather_counts, gather_padded
from ritornello.transports.base import Transport
from ritornello.transports.local import LocalTransport
from ritornello.transports.pages import exchange_pages
from ritornello.transports.plan import Plan

STAGES = ("admit", "plan", "exchange", "stage")


class Rounds:
    """One rank's side of all rounds. The worker runs them; all else is for between two rounds.

    Args:
        transport: to the other ranks.
        selection: this rank's policy; is bound to the shard.
        sampling: the policy of the draws; a copy of it is bound to the buffer.
        capacity: of the whole buffer.
        num_representatives: ``r``.
        seed: of all streams.
        storage: where the shard lies.
        num_draws: draws of ``r``, each on its own, that a round makes for each rank.
        rate_may_change: whether ``rate`` may be set between two rounds.
        capacity_bytes: of the whole buffer, if bytes are bounded, too.
        draws: out of all shards, "global", or out of this rank's own, "local".

    Attributes:
        rate: ``r`` of the next round.
        most_drawn: by a rank in the last round; with local draws others may have drawn fewer.
        among_others: this buffer among those of the rank, to compare with other ranks; or None.
        is_measured: whether the sampling policy may know distances.
        paged_as: the pages of all shards, if samples differ in length.
        paged: the shard with its pages, then.
        staging: to and from the trainer.
        before_write: told the slots that are about to be overwritten, if anybody wants to know.
    """

    def __init__(
        self,
        transport: Transport,
        selection: SelectionPolicy,
        sampling: SamplingPolicy,
        *,
        capacity: int,
        num_representatives: float,
        seed: int,
        storage: Storage,
        num_draws: int = 1,
        rate_may_change: bool = False,
        capacity_bytes: int | None = None,
        draws: str = "global",
    ) -> None:
        self.transport = transport
        self.num_rounds = self.most_drawn = 0
        self.stage = STAGES[0]
        self._stage_began: float | None = None
        self.seconds_per_stage = dict.fromkeys(STAGES, 0.0)
        self.bytes_sent = self.bytes_received = 0
        self.shard: Shard | None = None
        self.paged: PagedShard | None = None
        self.among_others: OpenBuffer | None = None
        self.before_write: Callable[[Ints], None] | None = None
        self.num_overwritten = 0  # loads and rewrites
        self.is_torn = False  # whether a load has failed when it had begun to overwrite
        self.is_measured = False
        self._full = False
        self.capacity = self._most_held = capacity
        self._capacity_bytes = capacity_bytes
        self.paged_as: Paging | None = None
        self.limits = rows_per_rank(capacity, transport.num_ranks)
        selection.buffer_seed = seed
        self._unused_selection, self._unused_sampling = copy.deepcopy((selection, sampling))
        self.selection, self.sampling = selection, self.new_sampling()
        self.needs_labels = selection.needs_labels or sampling.needs_labels
        self._is_builtin = type(selection) in SELECTION_POLICIES.values()
        self._draws_uniformly = type(sampling) is UniformSampling
        self._journal: Journal | None = None
        self._is_broken_off = False
        self._selection_streams = Streams(seed, Purpose.SELECTION, transport.rank)
        self._protection_streams = Streams(seed, Purpose.PROTECTION, transport.rank)
        self.adoption_streams = Streams(seed, Purpose.ADOPTION)
        self.rate, self._rate_may_change = num_representatives, rate_may_change
        # Draws out of a rank's own shard need nobody else.
        alone = draws == "local" and transport.num_ranks > 1
        self._drawn_over = LocalTransport() if alone else transport
        self._planner = Planner(transport.rank, self.rate, self.sampling, seed, num_draws, alone)
        self._storage = storage
        self.contents = self.no_contents()
        self._identity: int | None = None
        self._identities: Identities | None = None
        self.admitted_in = np.zeros(0, dtype=np.int64)  # slot -> round, made with the shard
        selection.bind(self.num_rows, transport.rank, transport.num_ranks)

    @property
    def num_rows(self) -> int:
        """This rank's part of the capacity."""
        return int(self.limits[self.transport.rank])

    @property
    def num_held(self) -> int:
        """Representatives in this rank's shard."""
        return int(self.contents.sizes[self.transport.rank])

    def open(
        self, layout: Layout, label: int | None, identity: int | None, staging: Staging
    ) -> None:
        """Says what the samples look like; the shard is made in the first round.

        Args:
            layout: of the records.
            label: the position of the label among the fields.
            identity: that of what tells samples apart, if none shall be held twice.
            staging: to and from the trainer.
        """
        self._layout, self._label, self.staging = layout, label, staging
        self._identity = identity
        capacity = self._most_held
        if self._capacity_bytes is not None and layout.paging is None:
            capacity = min(capacity, self._capacity_bytes // layout.record_bytes)
        if (capacity, layout.paging) != (self.capacity, self.paged_as):
            self.capacity, self.paged_as = capacity, layout.paging
            self.limits = rows_per_rank(capacity, self.transport.num_ranks)
            self.selection, self.sampling = self.new_selection(), self.new_sampling()
            self.contents = self.no_contents()
            self._planner.go_on(self.sampling)
            self._is_builtin, self._identities = self.paged_as is None and self._is_builtin, None
        if identity is not None and self._identities is None:
            self._identities = Identities(self.num_rows)

    @property
    def can_be_repeated(self) -> bool:
        """Whether a round may break off at any moment, and ``run_once`` does it again.

        So it is where only the policy learns something in it: with a single, full shard.
        """
        return (
            self._full
            and self._is_builtin
            and type(self.selection) is type(self._unused_selection)  # none is protected
            and self._draws_uniformly
            and self._identity is None
            and self.before_write is None
            and self.transport.num_ranks == 1
        )

    def run_once(self, number: int, candidates: Records) -> int:
        """Runs a round where ``can_be_repeated``, also if it was broken off before.

        Args:
            number: of the round.
            candidates: see ``run``.
        """
        if self.num_rounds == number:
            journal = self._journal
            if self._is_broken_off and journal is not None:
                stream = self._selection_streams.at
                self.selection = journal.policy_before(number, self.new_selection(), stream)
            elif journal is None or journal.policy is not self.selection or journal.is_long:
                self._journal = Journal(self.selection, self.num_held)
            self._is_broken_off = True
            self._run(candidates)
        self._is_broken_off = False
        return self.most_drawn

    def run(self, candidates: Records) -> int:
        """Runs one round.

        Returns:
            How many representatives are staged for the next mini-batch.

        Raises:
            ValueError: a label out of range, samples of another layout or another rate on another
                rank, or an assignment that breaks the policy's contract.
            MemoryError: the shard does not fit.
            PeerLostError: see ``Transport``.
        """
        if self._journal is not None and self._journal.is_long:
            self._journal = None
        return self._run(candidates)

    def _run(self, candidates: Records) -> int:
        self._stage_began = None  # one before may have been broken off
        with self.staging.worker_stream():
            self._enter("admit")
            shard = self.make_shard()
            size, changes = self._admit(candidates, shard)
            self._enter("plan")
            self._learn_sizes(size)
            if changes is not None:
                self._learn_changes(changes)
            if self._rate_may_change:
                # A rank that drew another number would take what is not its own.
                check_same(self.transport, "num_representatives", self.rate)
                self._planner.change_rate(self.rate)
            may_last = self._full or self.paged is not None
            plan = self._planner.plan(self.num_rounds, self.contents, may_last)
            if plan.num_drawn:
                self._enter("exchange")
                received = self.staging.receive(plan.num_drawn)
                self._drawn_over.exchange(shard, plan, received)
                if self.paged is not None:
                    room = self.staging.receive_pages
                    of_pages = exchange_pages(self._drawn_over, self.paged, plan, received, room)
                    self._count_bytes(of_pages, self.paged.page_bytes)
                self._enter("stage")
                self.staging.deliver(plan.num_drawn, plan.order)
        self._enter(None)
        self._count_bytes(plan, self._layout.record_bytes)
        self.most_drawn = self._planner.most_drawn(self.num_rounds, plan, self.contents)
        self.num_rounds += 1
        return plan.num_drawn

    def labels(self) -> Ints:
        """The labels (int64) of the representatives in this rank's shard."""
        if self.shard is None or self._label is None:
            return np.zeros(0, dtype=np.int64)
        with self.staging.worker_stream():  # after the last round's writes
            return self._labels_of(self.shard.rows[: self.num_held])

    def num_distinct(self, compare: bool) -> int | None:
        """How many of this rank's representatives are distinct samples.

        Args:
            compare: whether to compare their bytes, where they have no identity.

        Returns:
            None if neither is known.
        """
        if self._identities is not None:
            return self._identities.num_distinct
        if not compare or self.shard is None:
            return 0 if compare else None
        if self.paged is not None:
            return self.paged.num_distinct(self.num_held)
        return self._layout.num_distinct(self.to_host(self.shard.rows[: self.num_held]))

    def representatives(self, layout: Layout, first: int, num_rows: int) -> list[Any]:
        """Copies of this rank's representatives from a slot on, field by field, for a layout."""
        assert self.shard is not None
        if self.paged is not None:
            return self.paged.leaves(layout, first, num_rows)
        rows = self.staging.copy_for_trainer(self.shard.rows[first : first + num_rows])
        return layout.views(rows)

    def placed(self, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The trainer's values for ``rewrite``; on the trainer's thread."""
        return {position: self.staging.placed(each) for position, each in values.items()}

    def rewrite(self, first: int, num_rows: int, values: Mapping[int, torch.Tensor]) -> None:
        """Replaces fields of this rank's representatives from a slot on.

        Args:
            first: slot.
            num_rows: how many.
            values: ``[num_rows, *shape]`` by the position of the field, from ``placed``.

        Raises:
            PeerLostError: another rank of this host does not end its round.
        """
        assert self.shard is not None
        slots = np.arange(first, first + num_rows)
        self.transport.await_readers()
        self.num_overwritten += 1
        if self.before_write is not None:
            self.before_write(slots)
        with self.staging.worker_stream():
            records = self.shard.rows[first : first + num_rows].clone()
            for position, each in values.items():
                self._layout.view(records, position).copy_(each)
            self.shard.write(slots, records, np.arange(num_rows))
        self.staging.finish_writes()

    # For who saves and restores it, between two rounds.

    def to_host(self, rows: torch.Tensor) -> Bytes:
        """Rows of the shard in CPU memory, as they are after the last round.

        Where they have pages, copies that do not say where these are: it may change meanwhile.
        """
        if self.paged is not None:
            return self.paged.without_starts(rows).numpy()
        if rows.device.type == "cpu":
            return rows.numpy()
        with self.staging.worker_stream():
            return rows.cpu().numpy()

    def used_rows(self, record_bytes: int) -> torch.Tensor:
        """The rows in use, uint8 ``[num_held, record_bytes]``: the shard itself."""
        if self.shard is None:
            return torch.zeros((0, record_bytes), dtype=torch.uint8)
        return self.shard.rows[: self.num_held]

    def check_records(self, records: torch.Tensor) -> None:
        """Checks the labels of saved records.

        Raises:
            ValueError: one is out of range.
        """
        if self.needs_labels:
            check_labels(self._labels_of(records), self.selection.num_classes)

    def go_on(
        self,
        num_rounds: int,
        selection: SelectionPolicy,
        sampling: SamplingPolicy,
        contents: Contents,
        admitted_in: Ints,
    ) -> None:
        """Goes on from where another buffer was after as many rounds."""
        self.num_rounds = num_rounds
        self.is_measured = True
        self.selection, self.sampling, self.contents = selection, sampling, contents
        self.admitted_in[: len(admitted_in)] = admitted_in
        if self._identity is not None and self._identities is not None and self.shard is not None:
            rows = torch.from_numpy(self.to_host(self.shard.rows[: self.num_held]))
            self._identities.restart(self._layout.integers(rows, self._identity))
        self._full = self.paged is None and np.array_equal(contents.sizes, self.limits)
        self._planner.go_on(sampling)

    def tell_contents(self) -> None:
        """Tells all ranks where this one holds something, and of which labels."""
        labels = self.labels() if self.needs_labels else np.zeros(self.num_held, dtype=np.int64)
        self._learn_contents(np.stack([np.arange(len(labels)), labels], axis=1))

    def no_contents(self) -> Contents:
        """The contents of an empty buffer."""
        nothing = np.zeros(self.transport.num_ranks, dtype=np.int64)
        rows_per_rank = self.limits if self.sampling.knows_places else None
        return Contents(nothing, rows_per_rank, with_labels=self.needs_labels)

    def protect(self, share: float) -> int:
        """Protects what this rank holds; see ``RehearsalBuffer.protect``.

        Blocks until all ranks have called it.

        Args:
            share: of the capacity.

        Returns:
            How many representatives of all ranks are protected now.

        Raises:
            ValueError: on every rank, if the shares differ.
        """
        check_same(self.transport, "protect: the share", share)
        rank, num_ranks = self.transport.rank, self.transport.num_ranks
        generator = self._protection_streams.at(self.num_rounds)
        num_slots = protectable(self.capacity, share, rank, num_ranks)
        if isinstance(self.selection, WithinBytes):
            assert self.paged_as is not None
            num_pages = protectable(self.paged_as.num_pages, share, rank, num_ranks)
            num_protected = self.selection.protect(num_slots, num_pages, generator)
        else:
            selection = self.new_selection(protects=True)
            assert isinstance(selection, Protected)
            labels = np.zeros(self.num_held, dtype=np.int64)
            labels = self.labels() if selection.needs_labels else labels
            num_protected = selection.protect(self.selection, labels, num_slots, generator)
            self.selection = selection
        return int(gather_counts(self.transport, num_protected).sum())

    def new_selection(self, protects: bool = False) -> SelectionPolicy:
        """This rank's policy as it was before the first candidate.

        Args:
            protects: whether for the slots alone that are not protected.
        """
        policy = copy.deepcopy(self._unused_selection)
        if self.paged_as is not None:
            num_pages = self.paged_as.pages_per_rank.tolist()
            policy = within_bytes(policy, num_pages[self.transport.rank], num_pages)
            policy.buffer_seed = self._unused_selection.buffer_seed
        elif protects:
            policy = Protected(policy)
        policy.bind(self.num_rows, self.transport.rank, self.transport.num_ranks)
        return policy

    def new_sampling(self) -> SamplingPolicy:
        """The policy of the draws as it was before the first one."""
        policy = copy.deepcopy(self._unused_sampling)
        policy.bind(self.capacity)
        return policy

    # In a round.

    def _admit(self, candidates: Records, shard: Shard) -> tuple[int, Ints | None]:
        """Lets the policy decide, writes the shard.

        Returns:
            The shard's new size; and, if the sampling policy is to know, slot and label of what was
            admitted, int64 ``[n, 2]``, or, where bytes are bounded, what ``_turn_over`` says.
        """
        records = self.staging.arrive(candidates)
        if self.needs_labels:
            labels = self._labels_of(records)
            if self.staging.on_gpu:  # else the trainer's thread has checked them
                check_labels(labels, self.selection.num_classes)
        else:
            labels = np.zeros(len(records), dtype=np.int64)
        if self.paged is not None:
            return self._turn_over(self.paged, candidates, labels)
        assignment = self._assign(records, labels)
        size = self.num_held
        if self._is_builtin and size == self.num_rows:
            new_size = size
        else:
            new_size = size_after(assignment, size, self.num_rows, len(records))
        self.transport.await_readers()
        if self.before_write is not None:
            self.before_write(assignment.slots)
        self.admitted_in[assignment.slots] = self.num_rounds
        shard.write(assignment.slots, records, assignment.rows)
        if not self.sampling.knows_places:
            return new_size, None
        return new_size, np.stack([assignment.slots, labels[assignment.rows]], axis=1)

    def _turn_over(
        self, paged: PagedShard, candidates: Records, labels: Ints
    ) -> tuple[int, Ints | None]:
        """Where bytes are bounded: lets the policy decide, writes the shard.

        Returns:
            The shard's new size; and ``Turnover.changes``, if the sampling policy is to know.
        """
        records = candidates.rows
        assert candidates.counts is not None
        turnover = self._decide(records, labels, candidates.counts)
        moved_from, moved_to, slots = turnover.moved_from, turnover.moved_to, turnover.slots
        self.transport.await_readers()
        changes = turnover.changes(labels) if self.sampling.knows_places else None
        if not len(turnover.removed) and not len(slots):
            return turnover.size, changes
        if self.before_write is not None:
            self.before_write(np.concatenate([moved_to, slots]))
        paged.make_room(turnover.removed, moved_from, moved_to)
        came = Records(records[torch.from_numpy(turnover.rows)], candidates.pages)
        paged.write(slots, came, turnover.size)
        self.admitted_in[moved_to] = self.admitted_in[moved_from]
        self.admitted_in[slots] = self.num_rounds
        return turnover.size, changes

    def _decide(self, records: torch.Tensor, labels: Ints, num_pages: Ints) -> Turnover:
        """What the policy says, where bytes are bounded, of candidates not held already."""
        assert isinstance(self.selection, WithinBytes)
        generator = self._selection_streams.at(self.num_rounds)
        held = self._identities
        if self._identity is None or held is None:
            return self.selection.turn_over(labels, num_pages, generator)
        identities = self._layout.integers(records, self._identity)
        new = held.new_rows(identities)
        turnover = self.selection.turn_over(labels[new], num_pages[new], generator)
        held.move(turnover.moved_from, turnover.moved_to, turnover.removed)
        held.put(turnover.slots, identities[new[turnover.rows]])
        return replace(turnover, rows=new[turnover.rows])

    def _count_bytes(self, plan: Plan, num_bytes: int) -> None:
        if self._drawn_over.num_ranks == 1:
            return
        kept = int(plan.send_counts[self._drawn_over.rank])
        self.bytes_sent += (int(plan.send_counts.sum()) - kept) * num_bytes
        self.bytes_received += (plan.num_drawn - kept) * num_bytes

    def _assign(self, records: torch.Tensor, labels: Ints) -> Assignment:
        """What the policy says of the candidates that are not held already."""
        generator = self._selection_streams.at(self.num_rounds)
        if self._journal is not None:
            self._journal.note(self.num_rounds, labels)
        if self._identity is None or self._identities is None:
            return self.selection.admit(labels, generator)
        identities = self._layout.integers(records, self._identity)
        new = self._identities.new_rows(identities)
        assignment = self.selection.admit(labels[new], generator)
        assignment = Assignment(new[assignment.rows], assignment.slots)
        self._identities.put(assignment.slots, identities[assignment.rows])
        return assignment

    def _labels_of(self, records: torch.Tensor) -> Ints:
        assert self._label is not None
        return self._layout.integers(records, self._label)

    def make_shard(self) -> Shard:
        """The shard, made once all ranks have seen that their samples are of one kind.

        Raises:
            ValueError: samples of another layout on another rank.
            MemoryError: it does not fit.
        """
        if self.shard is not None:
            return self.shard
        compare_layouts(self._layout, self.transport)
        if self.among_others is not None:
            self.among_others.compare()
        shard = self._in_memory(self.limits, self._layout.record_bytes)
        paged = None
        if self.paged_as is not None:
            num_pages = self.paged_as.pages_per_rank
            pages = self._in_memory(num_pages, self.paged_as.page_bytes)
            table = self._in_memory(num_pages, TABLE_BYTES)
            paged = PagedShard(self._layout, shard, Pages(pages, table, self.num_rows))
        self.admitted_in = np.zeros(self.num_rows, dtype=np.int64)
        self.paged, self.shard = paged, shard  # last: where something did not fit, there is none
        return shard

    def _in_memory(self, num_rows: Ints, row_bytes: int) -> Shard:
        return self.transport.make_shard(num_rows, row_bytes, self._storage)

    def _learn_sizes(self, size: int) -> None:
        """All-gathers the shards' sizes, as long as some shard is still filling."""
        if not self._full:
            sizes = gather_counts(self.transport, size)
            if (sizes != self.contents.sizes).any():
                if self.paged is not None:
                    self._planner.drop()
                self.contents.resize(sizes)
            # Where bytes are bounded, a full shard may hold fewer in the next round.
            self._full = self.paged is None and np.array_equal(self.contents.sizes, self.limits)

    def _learn_changes(self, changes: Ints) -> None:
        """Tells all ranks, and the sampling policy, of a round's changes to this rank's shard."""
        if self.paged is None:
            self.sampling.overwritten(self._learn_contents(changes))
            return
        for rank, of_rank in enumerate(gather_padded(changes, self.transport)):
            left, before, after, taken = self.contents.change(rank, of_rank)
            self.sampling.overwritten(left)
            self.sampling.moved(before, after)
            self.sampling.overwritten(taken)

    def _learn_contents(self, admitted: Ints) -> Ints:
        """All-gathers what was admitted where, for sampling policies that want to know.

        Returns:
            The places that hold others now.
        """
        places = [
            self.contents.admit(rank, of_rank[:, 0], of_rank[:, 1])
            for rank, of_rank in enumerate(gather_padded(admitted, self.transport))
        ]
        return np.concatenate(places)

    def _enter(self, stage: str | None) -> None:
        """Notes the time at which a stage begins, and so the one before ends."""
        now = time.perf_counter()
        if self._stage_began is not None:
            self.seconds_per_stage[self.stage] += now - self._stage_began
        self._stage_began = None if stage is None else now
        self.stage = stage or self.stage
