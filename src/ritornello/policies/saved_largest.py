"""What the policies of ``largest_class`` know of their shard, and how that is saved."""

from __future__ import annotations

from array import array

import numpy as np

from ritornello.arrays import Ints
from ritornello.policies.saved_classes import SavedClasses, at_random, check_classes, forget_slots
from ritornello.policies.selection import SavedShards, SelectionPolicy, State, checked_num_classes


class KeepsLargest(SelectionPolicy):
    """A policy that knows the classes of its shard, which are the largest, and can be saved."""

    needs_labels = True

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = checked_num_classes(num_classes)

    def bind(self, num_slots: int, rank: int, num_ranks: int) -> None:
        """See ``SelectionPolicy.bind``."""
        super().bind(num_slots, rank, num_ranks)
        self._numbers: dict[int, int] = {}  # label -> class number, as they appeared
        self._members: list[array[int]] = []  # class number -> its slots
        self._sizes = np.zeros(0, dtype=np.int64)
        self._offered: list[int] = []
        self._num_used = 0
        # The following say something once the shard is full.
        self._largest: list[int] = []
        self._largest_size = 0
        self._has_been_largest: list[bool] = []

    def _add_class(self, label: int) -> int:
        number = self._numbers[label] = len(self._members)
        self._members.append(array("q"))
        self._sizes = np.append(self._sizes, 0)
        self._offered.append(0)
        self._has_been_largest.append(False)
        return number

    def state(self) -> State:
        """See ``SelectionPolicy.state``."""
        return {
            "labels": np.array(list(self._numbers), dtype=np.int64),
            "offered": np.array(self._offered, dtype=np.int64),
            "counts": self._sizes.copy(),
            "slots": np.array([slot for of_class in self._members for slot in of_class], np.int64),
            "largest": np.array(self._largest, dtype=np.int64),
            "has_been_largest": np.array(self._has_been_largest, dtype=np.int64),
        }

    def restore(self, state: State, size: int) -> None:
        """See ``SelectionPolicy.restore``."""
        check_classes(state, size)
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
        self._numbers = {label: i for i, label in enumerate(state["labels"].tolist())}
        ends = sizes.cumsum()
        self._members = [
            array("q", state["slots"][end - count : end].tolist())
            for end, count in zip(ends.tolist(), sizes.tolist(), strict=True)
        ]
        self._sizes, self._offered = sizes.copy(), state["offered"].tolist()
        self._num_used = size
        self._largest, self._largest_size = largest.tolist(), int(sizes.max(initial=0))
        self._has_been_largest = (flags != 0).tolist()

    def adopt(
        self, saved: SavedShards, capacity: int, generator: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """See ``SelectionPolicy.adopt``. Of the largest classes random ones leave."""
        whole = SavedClasses.merged(saved)
        whole = whole.cut(whole.shares(capacity), at_random(generator))
        were_largest = np.concatenate(
            [state["labels"][state["has_been_largest"] != 0] for state in saved.states]
        )
        own = whole.of_rank(self.rank, self.num_ranks)
        full = own.lost | np.isin(own.labels, were_largest)
        self.restore(
            own.state()
            | {
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
        forgotten["has_been_largest"] = state["has_been_largest"]
        return forgotten, kept
