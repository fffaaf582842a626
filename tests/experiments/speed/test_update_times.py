from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ritornello.experiments.speed import update_times
from ritornello.experiments.speed.update_times import (
    COPIES,
    MOST_STEPS,
    measure_beside,
    measure_update,
)
from ritornello.experiments.speed.workloads import WORKLOADS
from ritornello.loaders.prefetch import Rehearsed
from ritornello.rounds.joining import Joiner
from ritornello.rounds.round import Rounds
from ritornello.rounds.staging import Staging
from ritornello.rounds.watching import Training

SMALL = replace(WORKLOADS["mnist"], rows_per_rank=100)
LATER_SECONDS = 0.01


def delay(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Has a method take longer than all that is measured otherwise."""
    call: Callable[..., Any] = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        time.sleep(LATER_SECONDS)
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name", "parts"),
    [
        (Joiner, "join", {"joining"}),
        (Staging, "collect", {"copying"}),
        (Rounds, "run", {"waiting", "round"}),
        (Training, "got", {"handing_over"}),
    ],
)
def test_each_part_of_update_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, parts: set[str]
) -> None:
    delay(monkeypatch, owner, name)
    monkeypatch.setattr(update_times, "NUM_TURNS", 1)
    measured = measure_update(SMALL, "local", num_rounds=1)
    found = {part: median for part, (_, median, _) in measured.part_seconds.items()}
    assert max(found, key=found.__getitem__) in parts
    assert min(found.values()) >= 0
    assert math.isclose(sum(found.values()), measured.update_seconds[1])
    assert set(measured.floor_seconds) == set(COPIES)
    assert all(0 < median < LATER_SECONDS for _, median, _ in measured.floor_seconds.values())


def test_what_a_step_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_times, "NUM_TURNS", 1)
    delay(monkeypatch, Training, "got")
    delay(monkeypatch, Rehearsed, "__next__")
    measured = measure_beside(SMALL, "local", 0.5, seconds=0.01)
    update, rehearsed, step, alone, join = (
        quartiles[1]
        for quartiles in (
            measured.update_seconds, measured.rehearse_seconds, measured.step_seconds,
            measured.alone_seconds, measured.floor_seconds["joining"],
        )
    )  # fmt: skip
    joining = measured.part_seconds["joining"][1]
    assert measured.exposed_share[1] == pytest.approx((update - joining) / alone)
    assert measured.slower[1] == pytest.approx(step / alone - 1)
    assert measured.slower_with_update[1] == pytest.approx((update + step) / (alone + join) - 1)
    assert rehearsed > 2 * LATER_SECONDS  # Training.got is on the trainer's thread here, too
    assert measured.slower_with_rehearse[1] > rehearsed / (alone + join) - 1


def test_a_step_that_shall_take_longer_does_and_no_turn_looks_like_a_training_without_buffer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(update_times, "NUM_TURNS", 3)
    short, long = (
        measure_beside(SMALL, "local", milliseconds, seconds=seconds)
        for milliseconds, seconds in ((0.5, 10.0), (20.0, 0.01))
    )
    assert short.num_steps == MOST_STEPS
    assert 0 < 2 * short.alone_seconds[1] < long.alone_seconds[1]
    assert not caplog.records
