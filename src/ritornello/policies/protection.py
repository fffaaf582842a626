"""What is stored at a moment stays, and what comes later shares the rest.

A shard is then two: slots that are protected, whose representatives never leave, and all others,
which a policy has for itself, as if it had begun with a smaller shard at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ritornello.arrays import Bools, Ints
from ritornello.policies.classes.scores import HASH_BITS, highest_scores, lowest, precedence
from ritornello.policies.selection import Assignment, SavedShards, SelectionPolicy, State

REST = "rest."
"""What the names begin with that the other slots' policy gives its state."""


def protectable(capacity: int, share: float, rank: int, num_ranks: int) -> int:
    """How many slots of a rank's shard may be protected: of all ranks' the share, rounded down."""
    rest = capacity - int(round(share * capacity, 6))  # 0.29 * 100 is a little below 29
    return _part(capacity, rank, num_ranks) - _part(rest, rank, num_ranks)


def staying(
    labels: Ints,
    num_staying: int,
    key: int,
    rank: int,
    num_ranks: int,
    generator: np.random.Generator,
) -> Bools:
    """Which of some representatives stay, where not all can.

    Of each class equally many, as far as it has them, and in each class random ones: the largest
    classes give way, as in ``policies.class_shares``. If there are more classes than may stay,
    one of each of those that are first in their precedence.

    Args:
        labels: int64 ``[n]``; all alike where classes do not count.
        num_staying: at most so many.
        key: of the precedence.
        rank: whose shard it is.
        num_ranks: how many there are.
        generator: chooses.

    Returns:
        bool ``[n]``.
    """
    if len(labels) <= num_staying:
        return np.ones(len(labels), dtype=np.bool_)
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = precedence(classes, key, rank, num_ranks)
    if len(classes) > num_staying:
        shares = lowest(order, num_staying).astype(np.int64)
    else:
        excess = len(labels) - num_staying
        shares = counts - highest_scores(counts, excess, order >> HASH_BITS, num_ranks)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[numbers[shuffled].argsort(kind="stable")]
    places = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    stays = np.empty(len(labels), dtype=np.bool_)
    stays[by_class] = places < np.repeat(shares, counts)
    return stays


def is_protected(state: State) -> bool:
    """Whether a policy's state is that of a ``Protected``."""
    return "protected" in state


@dataclass(frozen=True)
class _Parts:
    """A shard's slots in use, as a ``Protected`` has saved them."""

    protected: Ints
    labels: Ints
    """Of what is protected; zeros where classes do not count."""
    others: Ints
    """The other slots in use, in the order in which the policy knows them."""
    num_used: int
    """How many of those are the policy's; who is behind them is still there from before."""
    rest: State
    """The policy's own state."""

    @classmethod
    def of(cls, state: State, size: int) -> _Parts:
        """The parts of a shard of that size.

        Raises:
            ValueError, KeyError: they contradict each other, or the size.
        """
        protected, labels, others = (
            state[name] for name in ("protected", "protected_labels", "others")
        )
        (num_used,) = state["num_used"].tolist()
        if not np.array_equal(np.sort(np.concatenate([protected, others])), np.arange(size)):
            raise ValueError(f"protected and others must be the slots from 0 to {size - 1}")
        if len(labels) != len(protected) or not 0 <= num_used <= len(others):
            raise ValueError("protected_labels and num_used must fit protected and others")
        rest = {
            name.removeprefix(REST): each for name, each in state.items() if name.startswith(REST)
        }
        return cls(protected, labels, others, num_used, rest)

    @property
    def used(self) -> Ints:
        """The slots that are the policy's."""
        return self.others[: self.num_used]

    @property
    def left(self) -> Ints:
        """The slots that hold what is neither protected nor known to the policy."""
        return self.others[self.num_used :]


class Protected(SelectionPolicy):
    """Keeps what some slots hold, and lets another policy decide about all others.

    What those hold at the beginning gives way in a random order, to the first candidates that the
    policy admits.

    Args:
        policy: for the others; not bound to a shard.
    """

    def __init__(self, policy: SelectionPolicy) -> None:
        self._policy = policy
        self.needs_labels, self.num_classes = policy.needs_labels, policy.num_classes
        self.buffer_seed = policy.buffer_seed
        self._num_used = self._num_before = 0  # of the slots that are the policy's
        self._protected = np.zeros(0, dtype=np.int64)

    @property
    def excess_labels(self) -> int:  # type: ignore[override]
        """See ``SelectionPolicy``."""
        return self._policy.excess_labels

    @property
    def num_protected(self) -> int:  # type: ignore[override]
        """See ``SelectionPolicy``."""
        return len(self._protected)

    @property
    def protected(self) -> Ints:
        """The slots whose representatives stay."""
        return self._protected

    def begin(self, protected: Ints, labels: Ints, others: Ints) -> None:
        """Says what is protected.

        Args:
            protected: int64 ``[n]``, slots.
            labels: int64 ``[n]``, of what they hold.
            others: int64 ``[m]``, all others in use; the first ones give way first.
        """
        self._lay_out(protected, labels, others, 0)

    def protect(
        self, before: SelectionPolicy, labels: Ints, most: int, generator: np.random.Generator
    ) -> int:
        """Begins with what another policy holds.

        Args:
            before: that policy; what it protects stays protected.
            labels: int64 ``[n]``, of what is held, slot by slot.
            most: how many may be protected altogether.
            generator: chooses.

        Returns:
            How many are protected now.
        """
        protected = before.protected if isinstance(before, Protected) else labels[:0]
        others = np.setdiff1d(np.arange(len(labels)), protected)
        room, key = max(0, most - len(protected)), self.buffer_seed
        stay = staying(labels[others], room, key, self.rank, self.num_ranks, generator)
        protected = np.concatenate([protected, others[stay]])
        self.begin(protected, labels[protected], generator.permutation(others[~stay]))
        return len(protected)

    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """See ``SelectionPolicy.admit``."""
        if len(self._slots) == 0:
            return Assignment(*np.zeros((2, 0), dtype=np.int64))
        inside = self._policy.admit(labels, generator)
        self._num_used = max(self._num_used, int(inside.slots.max(initial=-1)) + 1)
        return Assignment(inside.rows, self._slots[inside.slots])

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        rest = {REST + name: each for name, each in self._policy.state().items()}
        return {
            "protected": self._protected.copy(),
            "protected_labels": self._labels.copy(),
            "others": self._slots[: max(self._num_before, self._num_used)].copy(),
            "num_used": np.array([self._num_used]),
            **rest,
        }

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        parts = _Parts.of(state, size)
        self._lay_out(parts.protected, parts.labels, parts.others, parts.num_used)
        self._policy.restore(parts.rest, parts.num_used)

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``.

        What is protected comes first, what the policy has second, and the others have what room is
        left; of each as many as fit, on all ranks equally many, up to one.
        """
        sizes = saved.sizes.tolist()
        parts = [_Parts.of(each, size) for each, size in zip(saved.states, sizes, strict=True)]

        labels = np.concatenate([each.labels for each in parts])
        stay = np.flatnonzero(staying(labels, capacity, self.buffer_seed, 0, 1, generator))
        stay = stay[labels[stay].argsort(kind="stable")]
        room = capacity - len(stay)
        rooms = self._parts(room)
        own = stay[self._dealt(self._parts(capacity) - rooms) == self.rank]
        owners, slots = _places([each.protected for each in parts])
        protected = owners[own], slots[own]
        self._lay_out(np.arange(len(own)), labels[own], np.zeros(0, dtype=np.int64), 0)

        used = self._adopt_used(saved, parts, room, generator) if room else _places([])
        self._num_used = len(used[0])

        room_left = room - min(room, sum(each.num_used for each in parts))
        owners, slots = _places([each.left for each in parts])
        stay = np.sort(generator.permutation(len(owners))[:room_left])
        turns = self._dealt(rooms - self._parts(room - room_left))[: len(stay)]
        own = stay[turns == self.rank][: len(self._slots) - self._num_used]
        left = owners[own], slots[own]
        self._num_before = self._num_used + len(own)
        owners, slots = (np.concatenate(each) for each in zip(protected, used, left, strict=True))
        return owners, slots

    def _adopt_used(
        self,
        saved: SavedShards,
        parts: Sequence[_Parts],
        room: int,
        generator: np.random.Generator,
    ) -> tuple[Ints, Ints]:
        """Lets the policy take over what it had; owners and slots of this rank's part."""
        slots_per_rank = [
            saved.num_slots(rank) - len(each.protected) for rank, each in enumerate(parts)
        ]
        of_policy = SavedShards(
            [each.rest for each in parts],
            np.array([each.num_used for each in parts]),
            sum(slots_per_rank),
            slots_per_rank,
        )
        owners, places = self._policy.adopt(of_policy, room, generator)
        slots = np.zeros_like(places)
        for owner, each in enumerate(parts):
            slots[owners == owner] = each.used[places[owners == owner]]
        return owners, slots

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. The room of what was protected goes to the others."""
        parts = _Parts.of(state, size)
        stays = ~np.isin(parts.protected, removed)
        gone = np.flatnonzero(np.isin(parts.used, removed))
        rest, places = parts.rest, np.arange(parts.num_used)
        if parts.num_used and (len(gone) or not stays.all()):
            rest, places = self._policy.forget(rest, parts.num_used, gone)
        protected, used = parts.protected[stays], parts.used[places]
        left = parts.left[~np.isin(parts.left, removed)]
        kept = np.concatenate([protected, used, left])
        forgotten = {
            "protected": np.arange(len(protected)),
            "protected_labels": parts.labels[stays],
            "others": np.arange(len(protected), len(kept)),
            "num_used": np.array([len(used)]),
        }
        return forgotten | {REST + name: each for name, each in rest.items()}, kept

    def _lay_out(self, protected: Ints, labels: Ints, others: Ints, num_used: int) -> None:
        """Gives the policy all slots that are not protected, those in use first."""
        self._protected, self._labels = protected, labels
        unused = np.arange(len(protected) + len(others), self.num_slots)
        self._slots = np.concatenate([others, unused])  # those of the policy, by its own numbers
        self._num_used, self._num_before = num_used, len(others)
        self._policy.bind(len(self._slots), self.rank, self.num_ranks)

    def _parts(self, whole: int) -> Ints:
        """What each rank has of a number that is divided among all."""
        return np.array([_part(whole, rank, self.num_ranks) for rank in range(self.num_ranks)])

    def _dealt(self, quotas: Ints) -> Ints:
        """The ranks, turn by turn, each as often as its quota says."""
        ranks = np.repeat(np.arange(self.num_ranks), quotas)
        turns = np.arange(len(ranks)) - np.repeat(quotas.cumsum() - quotas, quotas)
        return ranks[turns.argsort(kind="stable")]


def _places(slots: list[Ints]) -> tuple[Ints, Ints]:
    """Owners and slots of what lies in some slots of each shard."""
    owners = np.repeat(np.arange(len(slots)), [len(each) for each in slots])
    return owners, np.concatenate([np.zeros(0, dtype=np.int64), *slots])


def _part(whole: int, rank: int, num_ranks: int) -> int:
    return whole // num_ranks + (rank < whole % num_ranks)
