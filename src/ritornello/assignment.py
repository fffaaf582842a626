"""What a selection policy is: it sees labels and a random stream, and gives an assignment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ritornello.arrays import Ints


@dataclass(frozen=True)
class Assignment:
    """Candidates to store, and where.

    Attributes:
        rows: int64 ``[n]``, positions among the candidates.
        slots: int64 ``[n]``, of the shard. Where one comes twice, the later candidate stays.
    """

    rows: Ints
    slots: Ints


class SelectionPolicy(ABC):
    """Decides about the candidates of one rank's shard.

    Attributes:
        needs_labels: whether ``admit`` looks at the labels.
        num_classes: labels must be below it; None: any non-negative label.
        num_slots: the shard's rows, known once the buffer has called ``bind``.
    """

    needs_labels = False
    num_classes: int | None = None
    num_slots = 0

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
        self.num_slots = num_slots

    @abstractmethod
    def admit(self, labels: Ints, generator: np.random.Generator) -> Assignment:
        """Decides about the candidates of one round, in their order.

        Slots must fill without gaps: a slot that was never used may be given only together
        with all those below it.

        Args:
            labels: int64 ``[m]``; zeros where the policy needs none.
            generator: this rank's stream for this round.
        """


def checked_num_classes(num_classes: int | None) -> int | None:
    """The number of classes as given to a policy.

    Raises:
        ValueError: it is below 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: it must be at least 1, or None")
    return num_classes
