"""What of drawn records lies in pages: the second half of an exchange, where there is any."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ritornello.arrays import Ints
from ritornello.records.paged import PagedShard
from ritornello.records.pages import Pages, expanded
from ritornello.transports.base import Transport
from ritornello.transports.plan import Plan


def exchange_pages(
    transport: Transport,
    paged: PagedShard,
    plan: Plan,
    received: Tensor,
    room: Callable[[int], Tensor],
) -> Plan:
    """Fetches what of received records lies in pages, and serves what this rank owes.

    Args:
        transport: to the other ranks.
        paged: this rank's shard.
        plan: of the records.
        received: their rows; now they say where in the room their pages begin.
        room: gives the memory for some pages.

    Returns:
        The plan of the pages.
    """
    starts, counts = paged.starts_of(received), paged.pages_of(received)
    of_pages = plan_of_pages(transport, paged.pages, plan, starts, counts)
    starts[:] = counts.cumsum() - counts
    transport.exchange_pages(paged.pages.shard, of_pages, room(of_pages.num_drawn))
    return of_pages


def plan_of_pages(
    transport: Transport, pages: Pages, plan: Plan, starts: Ints, counts: Ints
) -> Plan:
    """The plan of the pages that belong to the records of a plan.

    The rows that have come say how many pages there are for each, and the slots of this rank's
    shard how many it owes: so of these, too, each pair of ranks exchanges one block.

    Args:
        transport: to the other ranks.
        pages: of this rank.
        plan: of the records.
        starts: int64 ``[plan.num_drawn]``, where in their owners' tables the pages of what has come
            begin.
        counts: int64 ``[plan.num_drawn]``, how many they are.
    """
    places = expanded(starts, counts)
    if transport.num_ranks == 1:
        found, num_places = pages.at(places), np.array([len(places)])
        return Plan(found, num_places, num_places, lambda: found)
    receive_counts = _sums(counts, plan.receive_counts)
    return Plan(
        receive_slots=transport.look_up(pages, places, receive_counts),
        receive_counts=receive_counts,
        send_counts=_sums(pages.counts[plan.send_slots], plan.send_counts),
        find_send_slots=lambda: pages.of_slots(plan.send_slots),
    )


def _sums(values: Ints, counts: Ints) -> Ints:
    """The sums of as many values in a row as each count says; int64, of the length of counts."""
    before = np.concatenate([[0], values.cumsum()])
    ends = counts.cumsum()
    sums: Ints = before[ends] - before[ends - counts]
    return sums
