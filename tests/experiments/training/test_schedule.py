"""The steps of runs that are composed in proportion: which samples, how many, on which rank."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import scenario_of
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies import GDumb, Incremental, Rehearsal, Strategy
from ritornello.experiments.training.schedule import Schedule

DIGITS = load("digits")


class NoBuffer:
    """As little of a buffer as a schedule asks for."""

    num_draws = 1


def proportional(**changes: Any) -> Recipe:
    return recipe_named("digits", composition="proportional", epochs=3, **changes)


def schedule_of(
    recipe: Recipe, kind: type[Strategy] = Rehearsal, rank: int = 0, num_ranks: int = 1
) -> Schedule:
    strategy: Any = kind(NoBuffer()) if kind.rehearses else kind()  # type: ignore[arg-type]
    place = Place(rank, num_ranks, torch.device("cpu"))
    return Schedule(recipe, DIGITS, scenario_of(DIGITS, recipe), strategy, place)


def sizes(schedule: Schedule, number: int, first: int = 0) -> list[int]:
    return [len(labels) for _, labels, _ in schedule.batches(number, first)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_new_and_past_samples_make_up_the_step(num_ranks: int) -> None:
    recipe = proportional(global_num_representatives=8, first_share=0.9)
    tasks = scenario_of(DIGITS, recipe)
    incremental = schedule_of(recipe, Incremental)
    schedules = [schedule_of(recipe, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for number in (0, 3):
        of_ranks = [sizes(each, number) for each in schedules]
        assert all(each == of_ranks[0] for each in of_ranks)
        assert len(of_ranks[0]) == incremental.num_steps(number)
        own = 24 // num_ranks
        past = [schedules[0].num_past(number, step) for step in range(len(of_ranks[0]) + 1)]
        assert [new + old for new, old in zip(of_ranks[0], past, strict=False)] == [own] * len(
            of_ranks[0]
        )
        assert past[-1] == past[-2]
        num_new, num_before = tasks[number].num_train, sum(t.num_train for t in tasks[:number])
        share = num_new / (num_new + num_before)
        first = max(0.9, share)
        mean = sum(of_ranks[0]) / len(of_ranks[0])
        assert mean == pytest.approx(own * (first + share) / 2, abs=0.1)
    assert [each.samples_per_step for each in schedules] == [24] * num_ranks
    assert schedules[0].num_past(0, 0) == 0


def test_a_task_goes_on_in_the_middle_with_the_same_samples() -> None:
    def labels(first: int) -> list[NDArray[np.int64]]:
        return [each.numpy() for _, each, _ in schedule_of(proportional()).batches(2, first)]

    whole = labels(0)
    for first in (1, len(whole) // 3, len(whole) - 1, len(whole)):
        rest = labels(first)
        assert len(rest) == len(whole) - first
        assert all(map(np.array_equal, rest, whole[first:]))


def test_iterations_take_the_place_of_epochs() -> None:
    schedule = schedule_of(proportional(iterations=50))
    assert schedule.num_steps(1) == 50
    assert len(sizes(schedule, 1)) >= 50


def test_a_day_of_few_samples_has_one_step_per_epoch() -> None:
    recipe = proportional(global_batch_size=4096, samples_per_step=32)
    assert schedule_of(recipe).num_steps(1) == 3


def test_samples_per_step() -> None:
    recipe = recipe_named("digits")
    assert schedule_of(recipe).samples_per_step == 32
    assert schedule_of(recipe, Incremental).samples_per_step == 16
    assert schedule_of(recipe, GDumb).samples_per_step == 16
    assert schedule_of(recipe).num_past(1, 1) is None
    own_price = proportional(global_num_representatives=0)
    assert schedule_of(own_price).samples_per_step == 16
    assert schedule_of(own_price, Incremental).num_past(1, 1) is None
    assert schedule_of(proportional(samples_per_step=20)).samples_per_step == 20


def test_every_new_sample_is_visited_equally_often() -> None:
    schedule = schedule_of(proportional(global_num_representatives=0))
    seen = Counter[bytes]()
    for images, _, _ in schedule.batches(1, 0):
        seen.update(image.numpy().tobytes() for image in images)
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("composition", ["append", "proportional"])
def test_what_a_last_epoch_offers_is_what_it_holds(composition: str) -> None:
    all_samples = {"composition": composition, "epochs": 3, "global_num_candidates": None}
    schedule = schedule_of(recipe_named("digits", **all_samples))
    for number in (0, 4):
        first = schedule.num_steps(number) - schedule.steps_per_epoch(number)
        assert schedule.num_offered_last(number) == sum(sizes(schedule, number, first)) > 0
    every_4th = recipe_named("digits", composition=composition, global_num_candidates=4)
    assert schedule_of(every_4th).num_offered_last(0) == 4 * schedule.steps_per_epoch(0)


@pytest.mark.parametrize(
    ("changes", "kind", "warns"),
    [
        ({"capacity": 0.5, "remembers": "last-epoch"}, Rehearsal, True),
        ({"capacity": 300, "global_num_candidates": 1, "remembers": "last-epoch"}, Rehearsal, True),
        ({"capacity": 0.2, "remembers": "last-epoch"}, Rehearsal, False),
        ({"capacity": 0.5, "remembers": "stream"}, Rehearsal, False),
        ({"capacity": 0.5, "remembers": "last-epoch"}, Incremental, False),
    ],
)
def test_a_buffer_that_last_epochs_do_not_fill(
    changes: dict[str, Any], kind: type[Strategy], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        schedule_of(proportional(**changes), kind).warn_of_room()
    assert ("remembers='last-epoch': all tasks together offer about" in caplog.text) == warns
    assert ("remembers='stream' fills it" in caplog.text) == warns
