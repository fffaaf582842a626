"""Which samples a shard holds, by a field that is the same for the same sample: none twice."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ritornello.arrays import Ints


class Identities:
    """The identities of what is in the slots of a shard.

    Args:
        num_rows: of the shard.
    """

    def __init__(self, num_rows: int) -> None:
        self._of_slot = np.zeros(num_rows, dtype=np.int64)
        self._is_used = np.zeros(num_rows, dtype=np.bool_)
        self._times_held = Counter[int]()  # a load may bring one twice

    def new_rows(self, identities: Ints) -> Ints:
        """Which candidates are not held: their rows, ascending; of equal ones the first.

        Args:
            identities: int64 ``[m]``, of the candidates.
        """
        rows = {
            identity: row
            for row, identity in reversed(list(enumerate(identities.tolist())))
            if identity not in self._times_held
        }
        return np.array(sorted(rows.values()), dtype=np.int64)

    def put(self, slots: Ints, identities: Ints) -> None:
        """Says what comes to some slots, in that order; both int64 ``[n]``."""
        for slot, identity in zip(slots.tolist(), identities.tolist(), strict=True):
            if self._is_used[slot]:
                self._take_out(int(self._of_slot[slot]))
            self._of_slot[slot], self._is_used[slot] = identity, True
            self._times_held[identity] += 1

    def move(self, slots: Ints, to: Ints, removed: Ints) -> None:
        """Says that what is in some slots leaves, then what is in others moves; all int64.

        Those beyond what is moved are unused then, or used again at once.
        """
        for slot in removed.tolist():
            self._take_out(int(self._of_slot[slot]))
        self._of_slot[to] = self._of_slot[slots]
        self._is_used[removed] = self._is_used[slots] = False
        self._is_used[to] = True

    def restart(self, identities: Ints) -> None:
        """Says what the slots from 0 on hold, in place of all before."""
        self._of_slot[: len(identities)] = identities
        self._is_used[:] = np.arange(len(self._is_used)) < len(identities)
        self._times_held = Counter(identities.tolist())

    @property
    def num_distinct(self) -> int:
        """How many are held."""
        return len(self._times_held)

    def _take_out(self, identity: int) -> None:
        self._times_held[identity] -= 1
        if not self._times_held[identity]:
            del self._times_held[identity]
