"""What draws mean for one rank: which records it sends in a round, and which it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from ritornello.arrays import Bools, Ints


@dataclass
class Plan:
    """What one rank sends and receives in a round.

    Both sides list records in the same order (by owner, then by slot), so that each pair of
    ranks exchanges one contiguous block.
    """

    receive_slots: Ints
    """int64 ``[num_drawn]``: the slots, in their owners' shards, of what this rank gets."""
    receive_counts: Ints
    """int64 ``[num_ranks]``: how many of them come from each rank."""
    send_counts: Ints
    """int64 ``[num_ranks]``: how many of this rank's records go to each rank (and itself)."""
    find_send_slots: Callable[[], Ints]
    """See ``send_slots``."""
    order: Ints | None = None
    """With several draws, int64 ``[num_drawn]``: the record received as number ``i`` is number
    ``order[i]`` of what was drawn, draw after draw. None: already in that order."""

    @property
    def num_drawn(self) -> int:
        """Records that this rank gets."""
        return len(self.receive_slots)

    @cached_property
    def send_slots(self) -> Ints:
        """int64: the slots of this rank's shard that others (and itself) get, by requester.

        Found when first asked for: ranks that share memory never ask.
        """
        return self.find_send_slots()


def plans_of_draws(draws: Ints, sizes: Ints, rank: int) -> list[Plan]:
    """What draws mean for one rank.

    Computes what this rank sends and receives, no more; all rounds with the same few calls.

    Two shards hold 3 and 2, so the global indices 3 and 4 are slots 0 and 1 of rank 1. Rank 0 draws
    (0, 3), rank 1 draws (4, 1). Then rank 1 gets, by owner, slot 1 of rank 0 and slot 1 of itself;
    and it sends its slot 0 to rank 0, and its slot 1 to itself.

    Args:
        draws: int64 ``[num_rounds, num_draws, num_ranks, num_drawn]``, global indices.
        sizes: int64 ``[num_ranks]``, representatives in each shard.
        rank: whose plans.
    """
    num_rounds, num_draws, num_ranks, num_drawn = draws.shape
    num_received = num_draws * num_drawn
    ends = sizes.cumsum()
    starts = ends - sizes

    # What this rank gets. Global indices ascend by owner, then by slot: the order of exchange. With
    # several draws it is that of all of them together, and `order` tells them apart again.
    received = np.sort(draws[:, :, rank], axis=-1).reshape(num_rounds, num_received)
    order = None
    if num_draws > 1:
        order = received.argsort(axis=-1, kind="stable")
        received = np.sort(received, axis=-1)
    owners = ends.searchsorted(received.ravel(), side="right").reshape(received.shape)
    receive_slots = received - starts[owners]
    # One count over (round, owner) serves all rounds.
    rows = np.arange(num_rounds)[:, None] * num_ranks
    receive_counts = np.bincount((rows + owners).ravel(), minlength=num_rounds * num_ranks)
    receive_counts = receive_counts.reshape(num_rounds, num_ranks)

    # What it sends: all that anybody draws, seen from the beginning of its shard.
    slots = draws - starts[rank]
    if num_draws > 1:
        slots = slots.swapaxes(1, 2)  # by requester, then by draw
    slots = slots.reshape(num_rounds, num_ranks, num_received)
    # Seen as unsigned, what lies below the shard is also beyond its end.
    is_asked = slots.view(np.uint64) < int(sizes[rank])
    send_counts = is_asked.sum(axis=-1)
    return [
        Plan(
            receive_slots[i],
            receive_counts[i],
            send_counts[i],
            partial(_slots_to_send, slots[i], is_asked[i]),
            None if order is None else order[i],
        )
        for i in range(num_rounds)
    ]


def _slots_to_send(drawn_slots: Ints, is_asked: Bools) -> Ints:
    """The slots of one rank's shard that others (and itself) get, by requester.

    Args:
        drawn_slots: int64 ``[num_ranks, num_drawn]``, what each rank draws, counted from the
            beginning of this rank's shard.
        is_asked: bool ``[num_ranks, num_drawn]``, which of them lie in it.
    """
    requesters, places = is_asked.nonzero()
    slots: Ints = drawn_slots[requesters, places]
    stride = int(slots.max(initial=0)) + 1
    return np.sort(requesters * stride + slots) % stride
