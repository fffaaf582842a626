"""When the worker begins what it is handed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest

from ritornello.rounds.worker import LONGEST_PAUSE_SECONDS, Errand, Pace, Worker

LONG = 3600.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    assert worker.stop(10.0)


def test_an_errand_that_pauses_begins_as_soon_as_it_is_waited_for(worker: Worker) -> None:
    errand = Errand(lambda: 7, pause=LONG)
    worker.start(errand)
    assert not errand.has_begun
    assert worker.finish(errand, 10.0)
    assert errand.result == 7


def test_an_errand_that_pauses_begins_before_what_comes_behind_it(worker: Worker) -> None:
    order: list[int] = []
    worker.start(Errand(lambda: order.append(1), pause=LONG))
    assert worker.finish(Errand(lambda: order.append(2)), 10.0)
    assert order == [1, 2]


def test_an_errand_that_pauses_begins_by_itself(worker: Worker) -> None:
    ran = threading.Event()
    worker.start(Errand(ran.set, pause=0.001))
    assert ran.wait(10.0)


def test_work_in_between_is_not_kept_waiting_by_a_pause(worker: Worker) -> None:
    called = threading.Event()

    def work() -> None:
        called.set()

    errand = Errand(lambda: 7, pause=LONG)
    worker.start(errand)
    worker.while_idle(work)
    assert errand.wait(10.0)
    assert called.wait(10.0)


def test_a_worker_that_stops_does_not_sit_out_a_pause() -> None:
    worker = Worker("test")
    worker.start(Errand(lambda: 7, pause=LONG))
    assert worker.stop(10.0)


def pauses(steps: list[float], last_round: float) -> list[float]:
    pace, now, found = Pace(), 0.0, []
    for step in steps:
        now += step
        found.append(pace.pause(now, last_round))
    return found


def test_short_rounds_begin_in_the_middle_of_the_step() -> None:
    found = pauses([0.02] * 20, last_round=0.001)
    assert found[:7] == [0.0] * 7
    assert all(math.isclose(pause, 0.01) for pause in found[8:])


def test_the_shortest_of_the_last_steps_counts() -> None:
    """A pause for an evaluation makes no step longer; and steps may become shorter."""
    found = pauses([0.02] * 10 + [60.0] + [0.02] * 5 + [0.01], last_round=0.001)
    assert max(found) < 0.0101
    assert math.isclose(found[-1], 0.005)


def test_longer_rounds_begin_earlier_and_long_ones_at_once() -> None:
    pause = pauses([0.02] * 9, last_round=0.005)[-1]
    assert pause + 2 * 0.005 <= 0.75 * 0.02 + 1e-9
    assert pauses([0.02] * 9, last_round=0.008)[-1] == 0.0


def test_nobody_waits_for_long_in_the_middle_of_long_steps() -> None:
    assert pauses([10.0] * 9, last_round=0.001)[-1] == LONGEST_PAUSE_SECONDS


def is_brief(steps: list[float], last_round: float) -> bool:
    pace, now = Pace(), 0.0
    for step in steps:
        now += step
        pace.pause(now, last_round)
    return pace.is_brief


def test_steps_of_a_few_rounds_are_brief() -> None:
    assert is_brief([0.002] * 9, last_round=0.001)
    assert is_brief([0.002] * 5 + [60.0] * 3, last_round=0.001)  # with evaluations in between
    assert not is_brief([0.02] * 9, last_round=0.001)
    assert not is_brief([0.002] * 7, last_round=0.001)  # not yet known


def test_what_is_broken_off_on_the_callers_thread_is_the_workers() -> None:
    calls = []

    def act() -> int:
        calls.append(threading.get_ident())
        if len(calls) == 1:
            raise KeyboardInterrupt
        return 7

    errand, worker = Errand(act), Worker("test")
    with pytest.raises(KeyboardInterrupt):
        errand.attempt()
    assert not errand.has_begun
    assert not errand.has_ended
    assert worker.finish(errand, 10.0)
    assert errand.result == 7
    assert calls[0] == threading.get_ident() != calls[1]
    assert worker.stop(10.0)


def test_what_was_done_on_the_callers_thread_is_not_done_again() -> None:
    calls: list[int] = []
    errand, worker = Errand(lambda: calls.append(1)), Worker("test")
    errand.attempt()
    worker.start(errand)
    assert worker.finish(errand, 10.0)
    assert worker.stop(10.0)
    assert calls == [1]
