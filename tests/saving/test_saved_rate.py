"""Saves of buffers whose rate is a fraction, or changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_streams import assert_same, batch_of, held, joined, make, on_ranks

from ritornello import CheckpointError, RehearsalBuffer, SavedFolder, forget
from ritornello.saving.manifest import with_checksum
from ritornello.transports import Transport

RATES = (0, 0.5, 3, 1.25, 2, 2, 0.75, 4)
"""Of one step after another, again and again."""

NUM_STEPS = 24


def changing(end: Transport, capacity: int = 31, **arguments: Any) -> RehearsalBuffer:
    given = {"num_representatives": 1, "most_representatives": 4, **arguments}
    return make(end, capacity, **given)


def run_on(buffer: RehearsalBuffer, rank: int, steps: range, is_set: bool = True) -> list[Any]:
    out = []
    for step in steps:
        if is_set:
            buffer.num_representatives = RATES[step % len(RATES)]
        out.append(buffer.update(batch_of(step, rank, 5)))
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_draws": 2},
        {"sampling": "grasp", "selection": "grasp"},
        {"num_representatives": 0.5, "most_representatives": None},
    ],
    ids=["changing", "two draws", "grasp", "a fraction"],
)
def test_it_goes_on_bit_for_bit_from_any_step(arguments: dict[str, Any]) -> None:
    is_set = arguments.get("most_representatives", 4) is not None

    def whole(end: Transport) -> tuple[list[Any], list[Any]]:
        states, found = [], []
        with changing(end, **arguments) as buffer:
            for step in range(NUM_STEPS):
                states.append(buffer.state_dict())
                found += run_on(buffer, end.rank, range(step, step + 1), is_set)
        return states, found

    everyone = on_ranks(2, whole)
    for step in range(NUM_STEPS):
        steps = range(step, min(step + 3, NUM_STEPS))

        def part(end: Transport, steps: range = steps) -> None:
            states, found = everyone[end.rank]
            with changing(end, **arguments) as buffer:
                buffer.load_state_dict(states[steps.start])
                ours = run_on(buffer, end.rank, steps, is_set)
            assert_same(ours, found[steps.start : steps.stop])

        on_ranks(2, part)


def test_the_rate_is_saved_with_what_was_drawn_by_the_one_before(tmp_path: Path) -> None:
    """It is set, an update starts its round, it is set again, and all is saved."""

    def rank_main(end: Transport) -> list[Any]:
        with changing(end) as buffer:
            run_on(buffer, end.rank, range(8))
            buffer.num_representatives = 3
            run_on(buffer, end.rank, range(8, 9), is_set=False)
            buffer.num_representatives = 1
            buffer.save(tmp_path)
            return run_on(buffer, end.rank, range(9, 15), is_set=False)

    everyone = on_ranks(2, rank_main)

    def again(end: Transport) -> list[Any]:
        with changing(end, num_representatives=2) as buffer:
            buffer.load(tmp_path)
            assert buffer.num_representatives == 1
            return run_on(buffer, end.rank, range(9, 15), is_set=False)

    for ours, theirs in zip(everyone, on_ranks(2, again), strict=True):
        assert_same(ours, theirs)
    assert SavedFolder(tmp_path).manifest.rate == 1

    def elsewhere(end: Transport) -> list[int]:
        with changing(end, num_representatives=2) as buffer:
            buffer.load(tmp_path)
            found = []
            for step in range(9, 12):
                buffer.update(batch_of(step, end.rank, 5))
                found.append(buffer.num_past)
            return found

    for num_ranks in (1, 3):
        assert on_ranks(num_ranks, elsewhere) == [[3, 1, 1]] * num_ranks


@pytest.mark.parametrize("num_steps", [3, 8, 9])
@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_nothing_is_lost_on_other_ranks(tmp_path: Path, num_steps: int, num_ranks: int) -> None:
    def save(end: Transport) -> tuple[list[Any], int]:
        with changing(end) as buffer:
            run_on(buffer, end.rank, range(num_steps))
            buffer.save(tmp_path)
            found = held(buffer)
            run_on(buffer, end.rank, range(num_steps, num_steps + 1))
            return found, buffer.num_past

    def load(end: Transport) -> tuple[list[Any], int]:
        with changing(end) as buffer:
            buffer.load(tmp_path)
            assert buffer.num_representatives == RATES[(num_steps - 1) % len(RATES)]
            found = held(buffer)
            run_on(buffer, end.rank, range(num_steps, num_steps + 1))
            return found, buffer.num_past

    before, after = on_ranks(2, save), on_ranks(num_ranks, load)
    stored = [joined([found for found, _ in everyone]) for everyone in (before, after)]
    assert sorted(stored[0]) == sorted(stored[1])
    assert {num_past for _, num_past in before} == {num_past for _, num_past in after}


def test_into_a_buffer_of_another_kind(tmp_path: Path) -> None:
    """A rate that was set is taken over as far as it may change, and as far as there is memory."""
    with RehearsalBuffer(30, num_representatives=1, most_representatives=8) as buffer:
        buffer.update(batch_of(0, 0))
        buffer.num_representatives = 7
        buffer.update(batch_of(1, 0))
        buffer.num_representatives = 6
        buffer.save(tmp_path / "changing")
    with RehearsalBuffer(30, num_representatives=5) as buffer:
        for step in range(2):
            buffer.update(batch_of(step, 0))
        buffer.save(tmp_path / "fixed")

    def past_after(folder: str, rate: float, most: int | None, **others: Any) -> list[float]:
        with RehearsalBuffer(
            30, num_representatives=rate, most_representatives=most, **others
        ) as buffer:
            buffer.load(tmp_path / folder)
            found = [buffer.num_representatives]
            for step in (2, 3):
                buffer.update(batch_of(step, 0))
                found.append(buffer.num_past)
            return found

    assert past_after("changing", 1, 8) == [6, 7, 6]
    assert past_after("changing", 1, 8, num_draws=2) == [6, 12, 12]
    assert past_after("changing", 1, 3) == [3, 3, 3]
    assert past_after("changing", 2, None) == [2, 2, 2]
    assert past_after("fixed", 1, 8) == [1, 1, 1]
    assert past_after("fixed", 5, 8) == [5, 5, 5]
    assert past_after("fixed", 0, None) == [0, 0, 0]


@pytest.mark.parametrize(("rate", "num_past"), [(0, 0), (3, 3)])
def test_what_was_forgotten_is_drawn_again_in_its_number(
    tmp_path: Path, rate: float, num_past: int
) -> None:
    with changing_alone(2) as buffer:
        run_on(buffer, 0, range(8))
        buffer.num_representatives = rate
        run_on(buffer, 0, range(8, 9), is_set=False)
        buffer.num_representatives = 1
        buffer.save(tmp_path)
        numbers = [number for number, _ in held(buffer)]
    assert SavedFolder(tmp_path).manifest.num_drawn == num_past
    forget(tmp_path, {"0": numbers[:4]})
    assert SavedFolder(tmp_path).manifest.lacks_draw == (num_past > 0)
    with changing_alone(2) as buffer:
        buffer.load(tmp_path)
        run_on(buffer, 0, range(9, 10), is_set=False)
        assert buffer.num_past == num_past
        run_on(buffer, 0, range(10, 11), is_set=False)
        assert buffer.num_past == 1


def changing_alone(rate: float) -> RehearsalBuffer:
    return RehearsalBuffer(31, num_representatives=rate, most_representatives=4)


def test_a_save_before_the_first_mini_batch(tmp_path: Path) -> None:
    with changing_alone(2) as buffer:
        buffer.num_representatives = 0.5
        buffer.save(tmp_path)
    with changing_alone(2) as buffer:
        buffer.load(tmp_path)
        assert buffer.num_representatives == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": -1}, "-1 must be a non-negative number"),
        ({"rate": "3"}, "'3' must be a non-negative number"),
        ({"rate": True}, "True must be a non-negative number"),
        ({"rate": 2**60}, "must be a non-negative number"),
        ({"num_drawn": 1.5}, "1.5 must be a non-negative integer"),
        ({"num_drawn": 0}, "2 staged of 0 drawn"),
    ],
)
def test_impossible_rates(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with changing_alone(2) as buffer:
        run_on(buffer, 0, range(3), is_set=False)
        buffer.save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | changes)))
    with changing_alone(2) as buffer:
        with pytest.raises(CheckpointError, match=message):
            buffer.load(tmp_path)
        assert buffer.num_representatives == 2


def test_a_buffer_that_only_fills_is_saved_and_loaded(tmp_path: Path) -> None:
    with RehearsalBuffer(10, num_representatives=0) as buffer:
        for step in range(4):
            buffer.update(batch_of(step, 0))
        buffer.save(tmp_path)
        stored = held(buffer)
    with RehearsalBuffer(10, num_representatives=0) as buffer:
        buffer.load(tmp_path)
        assert held(buffer) == stored
        assert buffer.stats().num_rounds == 4  # and no further one, as nothing was to be drawn
        assert torch.equal(buffer.update(batch_of(4, 0))[0], batch_of(4, 0)[0])
