"""Which representatives are of earlier tasks is saved with the buffer, and loaded on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saved_streams import STEPS_PER_TASK, Augmented, assert_same, batch_of, make, on_ranks

from ritornello import RehearsalBuffer, forget
from ritornello.transports import Transport


def run_on(buffer: RehearsalBuffer, rank: int, steps: range) -> Augmented:
    """As ``saved_streams.run_on``, with a task where each begins."""
    found = []
    for step in steps:
        if step % STEPS_PER_TASK == 0:
            buffer.begin_task(f"task {step // STEPS_PER_TASK}")
        found.append(buffer.update(batch_of(step, rank)))
    return found


def tasks_drawn(augmented: Augmented) -> list[int]:
    """Of all past samples, the task in which each was offered."""
    return [
        int(number) // 64 // 64 // STEPS_PER_TASK
        for numbers, _ in augmented
        for number in numbers[8:]
    ]


def save(folder: Path, num_ranks: int, num_steps: int, **arguments: Any) -> None:
    def rank_main(end: Transport) -> None:
        with make(end, **{"sampling": "earlier-tasks", **arguments}) as buffer:
            run_on(buffer, end.rank, range(num_steps))
            buffer.save(folder)

    on_ranks(num_ranks, rank_main)


def loaded_on(
    folder: Path, num_ranks: int, steps: range, **arguments: Any
) -> list[tuple[int, Augmented]]:
    """How many can be drawn after a load, and what comes then."""

    def rank_main(end: Transport) -> tuple[int, Augmented]:
        with make(end, sampling="earlier-tasks", **arguments) as buffer:
            buffer.load(folder)
            rounds = buffer._steps.rounds
            len(buffer)  # what is drawn again
            return rounds.sampling.num_drawable(rounds.contents), run_on(buffer, end.rank, steps)

    return on_ranks(num_ranks, rank_main)


@pytest.mark.parametrize("num_steps", [5, 20, 21, 33, 45])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_it_goes_on_bit_for_bit(num_ranks: int, num_steps: int, tmp_path: Path) -> None:
    def undisturbed(end: Transport) -> Augmented:
        with make(end, sampling="earlier-tasks") as buffer:
            return run_on(buffer, end.rank, range(60))

    save(tmp_path, num_ranks, num_steps)
    found = loaded_on(tmp_path, num_ranks, range(num_steps, 60))
    for wanted, (_, augmented) in zip(on_ranks(num_ranks, undisturbed), found, strict=True):
        assert_same(wanted[num_steps:], augmented)


@pytest.mark.parametrize(("num_ranks", "capacity"), [(3, 97), (1, 97), (2, 80)])
def test_on_other_ranks_earlier_tasks_stay_what_they_are(
    num_ranks: int, capacity: int, tmp_path: Path
) -> None:
    save(tmp_path, 2, 45)
    everyone = loaded_on(tmp_path, num_ranks, range(45, 60), capacity=capacity)
    assert len({num_drawable for num_drawable, _ in everyone}) == 1
    assert 0 < everyone[0][0] < capacity
    drawn = [task for _, augmented in everyone for task in tasks_drawn(augmented)]
    assert len(drawn) == num_ranks * 15 * 5
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_after_removing_samples_those_that_are_left_stay_what_they_are(
    num_ranks: int, tmp_path: Path
) -> None:
    save(tmp_path, 2, 45)
    (before, _), *_ = loaded_on(tmp_path, 2, range(0))
    removed = forget(tmp_path, {"task": "task 0"})
    everyone = loaded_on(tmp_path, num_ranks, range(45, 60))
    assert [num_drawable for num_drawable, _ in everyone] == num_ranks * [
        before - removed.num_removed
    ]
    drawn = [task for _, augmented in everyone for task in tasks_drawn(augmented)]
    assert set(drawn) == {1}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_another_policy_has_saved_is_of_the_running_task(
    num_ranks: int, tmp_path: Path
) -> None:
    save(tmp_path, 2, 45, sampling="uniform")
    for num_drawable, augmented in loaded_on(tmp_path, num_ranks, range(45, 65)):
        assert num_drawable == 0
        assert not tasks_drawn(augmented[:16])
        assert set(tasks_drawn(augmented[16:])) == {0, 1, 2}


def test_samples_without_labels_stay_of_their_tasks(tmp_path: Path) -> None:
    unlabelled: dict[str, Any] = {"selection": "reservoir", "label": None}

    def undisturbed(end: Transport) -> Augmented:
        with make(end, sampling="earlier-tasks", **unlabelled) as buffer:
            return run_on(buffer, end.rank, range(60))

    save(tmp_path, 2, 45, **unlabelled)
    found = loaded_on(tmp_path, 2, range(45, 60), **unlabelled)
    for wanted, (_, augmented) in zip(on_ranks(2, undisturbed), found, strict=True):
        assert_same(wanted[45:], augmented)
    num_earlier = found[0][0]
    assert 0 < num_earlier < 97
    for num_drawable, augmented in loaded_on(tmp_path, 3, range(45, 60), **unlabelled):
        assert num_drawable == num_earlier
        assert set(tasks_drawn(augmented)) == {0, 1}
    num_removed = forget(tmp_path, {"task": "task 0"}).num_removed
    for num_drawable, augmented in loaded_on(tmp_path, 2, range(45, 60), **unlabelled):
        assert num_drawable == num_earlier - num_removed
        assert set(tasks_drawn(augmented)) == {1}
    save(tmp_path / "uniform", 2, 45, sampling="uniform", **unlabelled)
    for num_drawable, augmented in loaded_on(tmp_path / "uniform", 2, range(45, 65), **unlabelled):
        assert num_drawable == 0
        assert set(tasks_drawn(augmented[16:])) == {0, 1, 2}
