"""What the policies of ``largest_class`` know of their shard, and how that is saved."""

from __future__ import annotations

from array import array

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.classes.saved import (
    SavedClasses,
    at_random,
    check_classes,
    forget_slots,
    key_array,
    key_of,
)
from ritornello.policies.classes.scores import num_labels_in_excess, precedence
from ritornello.policies.selection import SavedShards, SelectionPolicy, State, checked_num_classes


class KeepsLargest(SelectionPolicy):
    """A policy that knows the classes of its shard, which are the largest, and can be saved."""

    needs_labels = True

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = checked_num_classes(num_classes)

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._key = self.buffer_seed
        # Of the classes that hold slots, or, after a load, that other ranks hold.
        self._labels: list[int] = []  # class number -> label
        self._numbers: dict[int, int] = {}  # label -> class number
        self._members: list[array[int]] = []  # class number -> its slots
        self._sizes = np.zeros(0, dtype=np.int64)
        self._offered: list[int] = []
        self._num_used = 0
        # The following say something once the shard is full.
        self._largest: list[int] = []
        self._largest_size = 0
        self._has_been_largest: list[bool] = []
        # Where every slot has a class of its own: the precedence of each class, -1 without a slot,
        # and the number of the highest one.
        self._order: Ints | None = None
        self._last = 0

    def _add_class(self, label: int) -> int:
        number = self._numbers[label] = len(self._members)
        self._labels.append(label)
        self._members.append(array("q"))
        self._sizes = np.append(self._sizes, 0)
        self._offered.append(0)
        self._has_been_largest.append(False)
        return number

    @property
    def _is_crowded(self) -> bool:
        """Whether every slot has a class of its own."""
        return self._largest_size == 1 and self._num_used == self.num_slots

    def _replace_last(self, label: int, order: int | None) -> int | None:
        """In a crowded shard: gives the slot of the class of the highest precedence to a lower one.

        Args:
            label: of a class without a slot.
            order: its precedence, if known.

        Returns:
            The slot; None: the precedence is higher than all, and the class is refused.
        """
        if order is None:
            (order,) = self._precedence(np.array([label])).tolist()
        if self._order is None:
            self._order = self._precedence(np.array(self._labels))
            self._order[self._sizes == 0] = -1
            self._last = int(self._order.argmax())
        number, bound = self._last, int(self._order[self._last])
        if self.excess_labels == 0:
            self.excess_labels = num_labels_in_excess(
                self.num_slots + 1, bound, self.num_slots, self.num_ranks
            )
        if order >= bound:
            return None
        # It takes over the number, too; if it had one, the other class has that now.
        before, other = self._labels[number], self._numbers.get(label)
        del self._numbers[before]
        if other is not None:
            self._labels[other], self._numbers[before] = before, other
            self._has_been_largest[other] = True
        self._labels[number], self._numbers[label] = label, number
        self._offered[number] = 1
        self._order[number] = order
        self._last = int(self._order.argmax())
        return self._members[number][0]

    def _precedence(self, labels: Ints) -> Ints:
        return precedence(labels, self._key, self.rank, self.num_ranks)

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        return {
            "key": key_array(self._key),
            "labels": np.array(self._labels, dtype=np.int64),
            "offered": np.array(self._offered, dtype=np.int64),
            "counts": self._sizes.copy(),
            "slots": np.array([slot for of_class in self._members for slot in of_class], np.int64),
            "largest": np.array(self._largest, dtype=np.int64),
            "has_been_largest": np.array(self._has_been_largest, dtype=np.int64),
        }

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        check_classes(state, size)
        self._key = key_of([state], self._key)
        sizes, largest = state["counts"], state["largest"]
        flags = state["has_been_largest"]
        if len(flags) != len(sizes) or len(np.unique(largest)) < len(largest):
            raise ValueError("has_been_largest must be of the length of labels, largest differ")
        if len(largest) and (
            size < self.num_slots
            or largest.min() < 0
            or largest.max() >= len(sizes)
            or np.any(sizes[largest] != sizes.max())
        ):
            raise ValueError("largest must be numbers of the largest classes of a full shard")
        labels, offered = state["labels"], state["offered"]
        if "key" not in state:  # of an earlier release, which remembered every label for ever
            held = sizes > 0
            largest = (held.cumsum() - 1)[largest]
            labels, offered, sizes, flags = (each[held] for each in (labels, offered, sizes, flags))
        self._labels = labels.tolist()
        self._numbers = {label: i for i, label in enumerate(self._labels)}
        ends = sizes.cumsum()
        self._members = [
            array("q", state["slots"][end - count : end].tolist())
            for end, count in zip(ends.tolist(), sizes.tolist(), strict=True)
        ]
        self._sizes, self._offered = sizes.copy(), offered.tolist()
        self._num_used = size
        self._largest, self._largest_size = largest.tolist(), int(sizes.max(initial=0))
        self._has_been_largest = (flags != 0).tolist()

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``. Of the largest classes random ones leave."""
        whole = SavedClasses.merged(saved)
        key = key_of(saved.states, self._key)
        whole = whole.cut(whole.shares(capacity, key), at_random(generator)).without_empty()
        were_largest = np.concatenate(
            [state["labels"][state["has_been_largest"] != 0] for state in saved.states]
        )
        own = whole.of_rank(self.rank, self.num_ranks)
        full = own.lost | np.isin(own.labels, were_largest)
        self.restore(
            own.state()
            | {
                "key": key_array(key),
                "largest": np.zeros(0, dtype=np.int64),
                "has_been_largest": full.astype(np.int64),
            },
            len(own.slots),
        )
        return own.owners, own.slots

    def forget(self, state: State, size: int, removed: Ints) -> tuple[State, Ints]:
        """See ``SelectionPolicy.forget``. Until the shard is full again, no class gives way."""
        forgotten, kept = forget_slots(state, size, removed)
        forgotten["largest"] = np.zeros(0, dtype=np.int64)
        return forgotten, kept
