"""What is protected stays stored, is drawn as ever, and is saved; what comes later shares the rest."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ritornello import CheckpointError, RehearsalBuffer, SelectionPolicy, forget
from ritornello.policies.selection import Assignment
from ritornello.testing import (
    check_consistent,
    chi_square_p_value,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, Transport

Numbers = tuple[list[int], list[int]]

POLICIES = ["class-balanced", "reservoir", "class-balanced-reservoir", "fifo", "first-offered"]
NEW = 10_000
"""Numbers of new samples are from here on; their labels are others, too."""


def old(rank: int, num_steps: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [batch_of(rank * 1000 + step * 5) for step in range(num_steps)]


def new(rank: int, num_steps: int = 30, first: int = NEW) -> list[tuple[Tensor, Tensor]]:
    return [batch_of(first + rank * 1000 + step * 5, 3) for step in range(num_steps)]


def batch_of(first: int, label: int = 0) -> tuple[Tensor, Tensor]:
    numbers = first + torch.arange(5)
    return numbers, numbers % 3 + label


def make(end: Transport | str = "auto", **arguments: Any) -> RehearsalBuffer:
    given = {"capacity": 40, "num_representatives": 3, "seed": 5}
    return RehearsalBuffer(transport=end, **(given | arguments))


def held(buffer: RehearsalBuffer) -> list[int]:
    return [int(number) for numbers, _ in buffer.representatives() for number in numbers]


def on_ranks(num_ranks: int, rank_main: Any) -> list[Any]:
    return run_ranks(LocalTransport.connect(num_ranks, 20.0), rank_main)


def trained(buffer: RehearsalBuffer, rank: int, num_steps: int = 30) -> list[int]:
    """The numbers of all past samples that it got."""
    drawn = []
    for batch in new(rank, num_steps):
        numbers, _ = buffer.update(batch)
        drawn += numbers[5:].tolist()
    return drawn


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("selection", POLICIES)
def test_what_is_there_stays_and_what_comes_shares_the_rest(selection: str, num_ranks: int) -> None:
    def rank_main(end: Transport) -> list[int]:
        with make(end, selection=selection) as buffer:
            buffer.fill(old(end.rank))
            assert buffer.protect(0.5) == 20
            before = set(held(buffer))
            trained(buffer, end.rank)
            check_consistent(buffer)
            assert len(buffer) == 40
            found = held(buffer)
            assert {number for number in found if number < NEW} <= before
            return found

    found = [number for of_rank in on_ranks(num_ranks, rank_main) for number in of_rank]
    assert len([number for number in found if number < NEW]) == 20
    if selection == "class-balanced":
        assert sorted(Counter(n % 3 for n in found if n < NEW).values()) == [6, 7, 7]
        assert sorted(Counter(n % 3 for n in found if n >= NEW).values()) == [6, 7, 7]


def test_a_buffer_with_room_keeps_all_and_new_ones_fill_the_room() -> None:
    with make() as buffer:
        buffer.fill(old(0, 3))
        before = held(buffer)
        assert buffer.protect(1) == 15
        trained(buffer, 0)
        found = held(buffer)
        assert found[:15] == before
        assert len(found) == 40
        assert min(found[15:]) >= NEW


def test_a_full_buffer_that_is_protected_as_a_whole_admits_nothing() -> None:
    with make() as buffer:
        buffer.fill(old(0))
        before = held(buffer)
        assert buffer.protect(1.0) == 40
        assert max(trained(buffer, 0)) < NEW
        assert held(buffer) == before


def test_called_again_it_protects_more_and_nothing_loses_its_protection() -> None:
    with make() as buffer:
        assert buffer.protect(0.5) == 0  # there is nothing yet
        buffer.fill(old(0))
        assert buffer.protect(0.25) == 10
        trained(buffer, 0)
        first = [number for number in held(buffer) if number < NEW]
        assert len(first) == 10
        assert buffer.protect(0.1) == 10
        assert buffer.protect(0.75) == 30
        second = set(held(buffer))
        for batch in new(0, 30, 2 * NEW):
            buffer.update(batch)
        found = held(buffer)
        assert set(first) < set(found)
        assert len(set(found) & second) == 30
        assert len([number for number in found if number >= 2 * NEW]) == 10


def test_draws_are_of_both_parts_alike() -> None:
    """With a false alarm in 1,000 seeds."""
    with make() as buffer:
        buffer.fill(old(0))
        buffer.protect(0.5)
        trained(buffer, 0)
        counts = Counter[int]()
        for _ in range(1200):
            counts.update(buffer.update((torch.arange(0), torch.arange(0)))[0].tolist())
        found = held(buffer)
        assert counts.keys() <= set(found)
        assert chi_square_p_value(np.array([counts[n] for n in found]), 1200 * 3 / 40) > 0.001


def test_a_sample_that_is_protected_is_not_admitted_again() -> None:
    with make(identity=0) as buffer:
        buffer.fill(old(0))
        buffer.protect(0.5)
        for _ in range(5):
            buffer.fill(old(0))
        assert len(held(buffer)) == len(set(held(buffer))) == 40
        assert buffer.stats().num_distinct == 40


@pytest.mark.parametrize("selection", ["class-balanced", "reservoir", "grasp", "fifo"])
def test_it_is_saved_and_goes_on_bit_for_bit(selection: str, tmp_path: Path) -> None:
    def begin(end: Transport) -> tuple[list[int], list[int]]:
        with make(end, selection=selection) as buffer:
            buffer.fill(old(end.rank))
            buffer.protect(0.5)
            trained(buffer, end.rank, 2)  # some of what is not protected is still there
            buffer.save(tmp_path)
            return trained(buffer, end.rank), held(buffer)

    def go_on(end: Transport) -> tuple[list[int], list[int]]:
        with make(end, selection=selection) as buffer:
            buffer.load(tmp_path)
            check_consistent(buffer)
            return trained(buffer, end.rank), held(buffer)

    assert on_ranks(2, begin) == on_ranks(2, go_on)


def joined(parts: list[Numbers]) -> Numbers:
    """Of all ranks, in order."""
    first, second = (sorted(chain.from_iterable(each)) for each in zip(*parts, strict=True))
    return first, second


@pytest.mark.parametrize("selection", ["class-balanced", "reservoir", "grasp", "fifo"])
def test_on_other_ranks_nothing_is_lost_and_it_stays_protected(
    selection: str, tmp_path: Path
) -> None:
    def begin(end: Transport) -> Numbers:
        with make(end, selection=selection) as buffer:
            buffer.fill(old(end.rank))
            before = held(buffer)
            buffer.protect(0.5)
            trained(buffer, end.rank, 2)
            buffer.save(tmp_path / "on 3")
            slots = buffer._steps.rounds.selection.protected.tolist()
            return held(buffer), [before[slot] for slot in slots]

    def go_on(end: Transport, folder: Path, capacity: int) -> Numbers:
        with make(end, selection=selection, capacity=capacity) as buffer:
            buffer.load(folder)
            found = held(buffer)
            check_consistent(buffer)
            buffer.save(tmp_path / f"on {end.num_ranks}")
            trained(buffer, end.rank)
            assert len(buffer) == capacity
            return found, [number for number in held(buffer) if number < NEW]

    everything, protected = joined(on_ranks(3, begin))
    folder = tmp_path / "on 3"
    for num_ranks, capacity in [(2, 40), (1, 57), (4, 40), (3, 30)]:
        again = partial(go_on, folder=folder, capacity=capacity)
        found, kept = joined(on_ranks(num_ranks, again))
        assert kept == protected
        assert capacity < 40 or found == everything
        folder = tmp_path / f"on {num_ranks}"
    forget(tmp_path / "on 2", {"label": [0, 3]})
    with make(selection=selection) as buffer:
        buffer.load(tmp_path / "on 2")
        left = [number for number in protected if number % 3]
        assert set(left) <= set(held(buffer))
        trained(buffer, 0)
        assert sorted(number for number in held(buffer) if number < NEW) == left
        assert len(buffer) == 40


@pytest.mark.parametrize("is_paged", [False, True])
def test_how_many_are_protected_is_known_after_a_load(is_paged: bool, tmp_path: Path) -> None:
    arguments = {"capacity_bytes": 9_000} if is_paged else {}

    def samples() -> Any:
        numbers, labels = torch.arange(60), torch.arange(60) % 3
        return (numbers, labels, [numbers[:1]] * 60) if is_paged else (numbers, labels)

    with make(**arguments) as buffer:
        assert buffer.stats().num_protected == 0
        buffer.fill([samples()])
        assert buffer.protect(0.5) == buffer.stats().num_protected == 20
        buffer.save(tmp_path)
    with make(**arguments) as buffer:
        buffer.load(tmp_path)
        assert buffer.stats().num_protected == 20


def test_a_load_takes_its_place(tmp_path: Path) -> None:
    with make() as buffer:
        buffer.fill(old(0))
        buffer.save(tmp_path)
        buffer.protect(1.0)
        buffer.load(tmp_path)
        trained(buffer, 0)
        assert max(held(buffer)) >= NEW


def test_ranks_that_give_different_shares_are_told() -> None:
    def rank_main(end: Transport) -> str:
        with make(end) as buffer:
            buffer.fill(old(end.rank))
            with pytest.raises(ValueError, match="protect: the share") as raised:
                buffer.protect(0.5 + end.rank / 4)
            trained(buffer, end.rank)
            return str(raised.value)

    for message in on_ranks(2, rank_main):
        assert "is 0.5 on rank(s) [0], 0.75 on rank(s) [1]: all ranks must set the same" in message


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    with make() as buffer, pytest.raises(ValueError, match="share=.*above 0, and at most 1"):
        buffer.protect(share)


@pytest.mark.parametrize("share", [True, "0.5", None])
def test_what_is_no_share(share: Any) -> None:
    with make() as buffer, pytest.raises(TypeError, match="share=.* must be a number"):
        buffer.protect(share)


class Latest(SelectionPolicy):
    """A policy of a user's own, that cannot be saved."""

    _size = 0

    def admit(self, labels: np.ndarray, generator: np.random.Generator) -> Assignment:
        slots = (self._size + np.arange(len(labels))) % self.num_slots
        self._size += len(labels)
        return Assignment(np.arange(len(labels)), slots)


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    with make(selection=Latest()) as buffer:
        buffer.fill(old(0))
        buffer.protect(0.5)
        trained(buffer, 0)
        found = held(buffer)
        assert len([number for number in found if number < NEW]) == 20
        assert sorted(number for number in found if number >= NEW) == [*range(NEW + 130, NEW + 150)]
        with pytest.raises(CheckpointError, match="the selection policy Latest cannot be saved"):
            buffer.save(tmp_path)


def test_all_ranks_protect_together() -> None:
    def rank_main(end: Transport) -> str:
        with pytest.raises(Exception, match="protect") as raised, make(end) as buffer:
            buffer.update(batch_of(end.rank * 1000))
            if end.rank == 0:
                buffer.protect(0.5)
            else:
                buffer.begin_task("another call")
        return str(raised.value)

    for message in run_ranks(connect_shared_memory(2, 20.0), rank_main):
        assert "have called ['protect', 'begin_task'] after [1, 1] mini-batches" in message
