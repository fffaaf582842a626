"""What a selection policy is: it sees labels and a random stream, and gives an assignment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Ints

State = dict[str, Ints]
"""What a policy knows of its shard, as lists of integers."""


@dataclass(frozen=True)
class Assignment:
    """Candidates to store, and where.

    Attributes:
        rows: int64 ``[n]``, positions among the candidates.
        slots: int64 ``[n]``, of the shard. Where one comes twice, the later candidate stays.
    """

    rows: Ints
    slots: Ints


@dataclass(frozen=True)
class SavedShards:
    """What a policy is told of all shards of a buffer that was saved.

    Attributes:
        states: of each shard's policy.
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        capacity: of that buffer.
        slots_per_rank: of each shard; None: the capacity was divided among them to the last one.
    """

    states: Sequence[State]
    sizes: Ints
    capacity: int
    slots_per_rank: Sequence[int] | None = None

    def num_slots(self, rank: int) -> int:
        """Of the shard of a rank."""
        if self.slots_per_rank is not None:
            return self.slots_per_rank[rank]
        return self.capacity // len(self.states) + (rank < self.capacity % len(self.states))


class SelectionPolicy(ABC):
    """Decides about the candidates of one rank's shard.

    Attributes:
        needs_labels: whether ``admit`` looks at the labels.
        num_classes: labels must be below it; None: any non-negative label.
        num_slots: the shard's rows, known once the buffer has called ``bind``.
        rank: whose shard it is, known from then on, too.
        num_ranks: how many shards there are.
        buffer_seed: of the buffer, known before ``bind`` is called.
        excess_labels: about how many distinct labels were offered, once there are so many that the
            whole buffer has no slot for each; 0 before.
        num_protected: how many of the shard's representatives are protected.
    """

    SET_BY_THE_BUFFER = (
        *("num_slots", "rank", "num_ranks", "buffer_seed"),
        *("excess_labels", "num_protected"),
    )
    """Attributes that are no settings."""

    needs_labels = False
    num_classes: int | None = None
    num_slots = 0
    rank = 0
    num_ranks = 1
    buffer_seed = 0
    excess_labels = 0
    num_protected = 0

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """Ties the policy to one shard; called once, by the buffer.

        Raises:
            ValueError: it belongs to another buffer already.
        """
        if self.num_slots:
            raise ValueError(
                f"this {type(self).__name__} already belongs to a buffer: its counts are those "
                "of one shard. Make a new one for each buffer"
            )
        self.num_slots, self.rank, self.num_ranks = num_slots, rank, num_ranks

    @abstractmethod
    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """Decides about the candidates of one round, in their order.

        Slots must fill without gaps: a slot that was never used may be given only together
        with all those below it.

        Args:
            labels: int64 ``[m]``; zeros where the policy needs none.
            generator: this rank's stream for this round.
        """

    def state(self) -> State:
        """What it knows of its shard, to be saved: copies.

        Raises:
            TypeError: the policy does not say; ``save`` then refuses.
        """
        raise TypeError(self._lacks("state"))

    def restore(self, state: State, size: int) -> None:
        """Goes on from ``state``, exactly as the policy that gave it.

        Args:
            state: of a shard with as many rows on the same rank of as many.
            size: representatives in the shard.

        Raises:
            ValueError, KeyError: no policy of this type can have given it.
        """
        raise TypeError(self._lacks("restore"))

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Takes over this rank's part of a buffer with another number of ranks or capacity.

        Every rank calls it with the same arguments, on a policy that was bound and not used.
        Together they must take every representative once as long as the capacity allows.

        Args:
            saved: the shards as they were.
            capacity: of all ranks' shards now.
            generator: the same stream on every rank.

        Returns:
            int64 ``[m]``, owners and slots, then, of the representatives that go to this rank's
            slots from 0 to ``m - 1``.

        Raises:
            ValueError, KeyError: see ``restore``.
        """
        raise TypeError(self._lacks("adopt"))

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """What ``state`` becomes when representatives are removed from the shard.

        Called on a policy that was not bound. What was removed counts as never offered. The shard
        then has room, which the next candidates fill.

        Args:
            state: of a shard's policy.
            size: representatives in the shard.
            removed: int64 ``[n]``, their slots, ascending; at least one.

        Returns:
            The new state, and int64 ``[size - n]``: which slots go to the slots from 0 on.

        Raises:
            ValueError, KeyError: see ``restore``.
        """
        raise TypeError(self._lacks("forget"))

    def _lacks(self, method: str) -> str:
        what = "cannot forget" if method == "forget" else "cannot be saved and restored"
        return (
            f"the selection policy {type(self).__name__} {what}: it has no method {method}(); see "
            "ritornello.SelectionPolicy"
        )


MANY_TOLD = 8192
"""Candidates that a journal may hold of a small shard; of a large one as many as it has slots."""


class Journal:
    """What a policy has decided about since its state was noted: so it can be had again as it was.

    Its state is all of its shard, and takes long to note; what it was told since takes nothing.

    Args:
        policy: one of those whose ``restore`` is exact.
        size: representatives in its shard.

    Attributes:
        policy: what it gets.
    """

    def __init__(self, policy: SelectionPolicy, size: int) -> None:
        self.policy = policy
        self._state, self._size = policy.state(), size
        self._told: dict[int, Ints] = {}
        self._num_told = 0

    @property
    def is_long(self) -> bool:
        """Whether to begin anew costs less by now than to go on."""
        return self._num_told >= max(MANY_TOLD, self.policy.num_slots)

    def note(self, number: int, labels: Ints) -> None:
        """Notes of which candidates a round is about to decide; again if it is done again."""
        if number not in self._told:
            self._told[number] = labels
            self._num_told += len(labels)

    def policy_before(
        self, number: int, unused: SelectionPolicy, stream: Callable[[int], np.random.Generator]
    ) -> SelectionPolicy:
        """The policy as it was before a round.

        Args:
            number: of the round.
            unused: such a policy, bound, and not used.
            stream: gives that of a round.
        """
        unused.restore(self._state, self._size)
        unused.excess_labels = self.policy.excess_labels
        for earlier, labels in self._told.items():
            if earlier < number:
                unused.admit(labels, stream(earlier))
        self.policy = unused
        return unused


def part_of_rank(rank: int, num_ranks: int) -> slice:
    """Which of all representatives in a row go to a rank: turn by turn.

    So every shard gets equally many, up to one, and of each class that stands together, too.
    """
    return slice(rank, None, num_ranks)


def checked_num_classes(num_classes: int | None) -> int | None:
    """The number of classes as given to a policy.

    Raises:
        ValueError: it is below 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: it must be at least 1, or None")
    return num_classes


MOST_LABELS = 2**63
"""Labels are below it: they are kept as signed integers."""


def check_labels(labels: NDArray[np.integer[Any]], num_classes: int | None) -> None:
    """Checks that labels are class labels.

    Args:
        labels: ``[n]``, of any integer type.
        num_classes: they must be below it; None: any.

    Raises:
        ValueError: names the first one out of range.
    """
    if len(labels) == 0:
        return
    end = num_classes or MOST_LABELS
    # Seen as unsigned, what is negative lies in the upper half: one pass over them finds both.
    dtype = labels.dtype
    is_signed = dtype.kind == "i"
    unsigned = labels.view(f"u{dtype.itemsize}") if is_signed else labels
    if int(unsigned.max()) >= min(end, 1 << (8 * dtype.itemsize - is_signed)):
        wrong = (labels < 0) | (labels >= end)
        rule = f"from 0 to {end - 1}" if num_classes or labels.min() >= 0 else "at least 0"
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
