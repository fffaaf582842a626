"""What all ranks do alike: gather numbers, fail together, and notice when they are not in step."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from ritornello.arrays import Floats, Ints
from ritornello.errors import CheckpointError, PartedError
from ritornello.transports.base import Transport

CALLS = (
    "save",
    "wait_until_saved",
    "load",
    "load_state_dict",
    "state_dict",
    "measure_distances",
    "begin_task",
    "fill",
    "evenly",
    "protect",
)
"""What all ranks do together while no round runs."""

Numbers = TypeVar("Numbers", Ints, Floats)
Result = TypeVar("Result")


def gather_counts(transport: Transport, count: int) -> Ints:
    """Gives every rank the count of all, int64 ``[num_ranks]``, none of which is negative.

    Raises:
        PartedError: a rank is somewhere else, in a call between rounds.
    """
    counts = transport.all_gather(np.array([count]))[:, 0].copy()
    if (counts < 0).any():
        elsewhere = tuple(np.flatnonzero(counts < 0).tolist())
        call = CALLS[(-1 - int(counts[elsewhere[0]])) % len(CALLS)]
        raise PartedError(
            f"rank(s) {list(elsewhere)} are in {call}, and this one in a round: all ranks must "
            f"call {call}, after as many updates",
            elsewhere,
        )
    return counts


def random_number(transport: Transport) -> int:
    """A number of 62 bits that was never used, the same on every rank."""
    return int(transport.all_gather(np.array([secrets.randbits(62)]))[0, 0])


def gather_padded(values: Numbers, transport: Transport) -> list[Numbers]:
    """Gives every rank the arrays of all ranks, whose first dimensions may differ.

    Args:
        values: int64 or float64 ``[n, ...]``.
        transport: to the other ranks.
    """
    lengths = gather_counts(transport, len(values))
    longest = int(lengths.max())
    if longest == 0:
        return [values for _ in lengths]
    padded = np.zeros((longest, *values.shape[1:]), dtype=values.dtype)
    padded[: len(values)] = values
    everyone = transport.all_gather(padded.reshape(-1).view(np.int64)).view(values.dtype)
    shaped = everyone.reshape(len(lengths), *padded.shape)
    return [each[:length] for each, length in zip(shaped, lengths.tolist(), strict=True)]


def together(transport: Transport, act: Callable[[], Result], doing: str) -> Result:
    """Does something that may fail on some ranks; if it fails on one, it fails on all.

    Blocks until every rank has called it.

    Args:
        transport: to the other ranks.
        act: what each rank does; involves no other rank.
        doing: what it is, for the other ranks' errors.

    Returns:
        What it returned on this rank.

    Raises:
        CheckpointError: it failed here, or on the ranks that the error names.
    """
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    failed = transport.all_gather(np.array([failure is not None]))[:, 0]
    if failure is not None:
        if isinstance(failure, CheckpointError):
            raise failure
        raise CheckpointError(f"{doing} failed: {failure or type(failure).__name__}") from failure
    if failed.any():
        raise CheckpointError(
            f"{doing} failed on rank(s) {np.flatnonzero(failed).tolist()}: see the error there"
        )
    return result


def check_agreement(transport: Transport, arguments: Mapping[str, str]) -> None:
    """Checks that all ranks were given the same arguments.

    Blocks until every rank has called it.

    Raises:
        ValueError: on every rank, naming the arguments that differ, their values and ranks.
    """
    text = json.dumps(dict(arguments)).encode()
    length = int(transport.all_gather(np.array([len(text)])).max())
    padded = np.frombuffer(text.ljust(length), dtype=np.uint8).astype(np.int64)
    everyone = [json.loads(bytes(row.astype(np.uint8))) for row in transport.all_gather(padded)]
    mine = everyone[transport.rank]
    differences = [
        f"{name} is "
        + ", ".join(f"{each.get(name)} on rank {i}" for i, each in enumerate(everyone))
        for name in mine
        if any(each.get(name) != mine[name] for each in everyone)
    ]
    if differences:
        raise ValueError(
            f"rank {transport.rank}: RehearsalBuffer was given different arguments on different "
            f"ranks: {'; '.join(differences)}. All ranks must pass the same"
        )


def check_same(transport: Transport, name: str, number: float) -> None:
    """Checks that all ranks have set the same number, from 0 on; all call it.

    Raises:
        ValueError: on every rank, if they differ.
    """
    # The bits of a number from 0 on are those of an integer from 0 on: what is gathered in a
    # round must not be negative.
    bits = int(np.float64(number).view(np.int64))
    given = gather_counts(transport, bits).view(np.float64)
    if (given != number).any():
        found = [
            f"{int(each) if each.is_integer() else each} on rank(s) "
            f"{np.flatnonzero(given == each).tolist()}"
            for each in np.unique(given)
        ]
        raise ValueError(
            f"{name} is {', '.join(found)}: all ranks must set the same, between the same two steps"
        )


def check_in_step(transport: Transport, call: str, num_offers: int, is_offered: bool) -> None:
    """Checks that all ranks are in the same call after as many offers; all call it.

    One number is gathered, as at the beginning of a round, but a negative one: so a rank that
    is in a round instead, and one that finds another there, both notice.

    Raises:
        CheckpointError: they are not.
        PartedError: some are in a round.
    """
    own = (num_offers * 2 + is_offered) * len(CALLS) + CALLS.index(call)
    told = transport.all_gather(np.array([-1 - own]))[:, 0]
    in_round = tuple(np.flatnonzero(told >= 0).tolist())
    if in_round:
        raise PartedError(
            f"rank(s) {list(in_round)} are in a round: all ranks must call update equally "
            f"often, and {call} after as many",
            in_round,
        )
    if (told != told[0]).any():
        offers, numbers = np.divmod(-1 - told, len(CALLS))
        calls = [CALLS[number] for number in numbers]
        raise CheckpointError(
            f"the ranks have called {calls} after {(offers // 2).tolist()} mini-batches: all "
            "must make the same call after as many"
        )
