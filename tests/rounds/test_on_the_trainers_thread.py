"""Rounds that the trainer runs itself, where steps are brief: ``asynchronous="auto"``."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello import RehearsalBuffer, RoundError

ROUNDS_IN_BRIEF_STEP = "ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP"


@pytest.fixture(autouse=True)
def steps_are_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ROUNDS_IN_BRIEF_STEP, 10**9)


def make(**options: Any) -> RehearsalBuffer:
    return RehearsalBuffer(8, num_representatives=2, **options)


def given(buffer: RehearsalBuffer, first: int, num_steps: int) -> list[list[int]]:
    """What the trainer gets in some steps that do nothing else."""
    batches = (torch.arange(4 * step, 4 * step + 4) for step in range(first, first + num_steps))
    return [buffer.update((values, values % 3))[0].tolist() for values in batches]


def test_a_loop_of_brief_steps_runs_rounds_itself_with_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 700) == given(other, 0, 700)  # its policy is noted more than once
        stats, there = buffer.stats(), other.stats()
        assert stats.num_rounds_here > 600
        assert there.num_rounds_here == there.seconds_here == 0
        assert stats.num_rounds == there.num_rounds == 700
        assert 0 < stats.seconds_here < stats.seconds_offering - stats.seconds_copying
        assert stats.seconds_copying > 0
        assert stats.since(stats).seconds_copying == 0
        with monkeypatch.context() as patch:
            patch.setattr(ROUNDS_IN_BRIEF_STEP, 0)
            assert given(buffer, 700, 20) == given(other, 700, 20)
        assert buffer.stats().since(stats).num_rounds_here == 0
        assert given(buffer, 720, 20) == given(other, 720, 20)
        assert buffer.stats().since(stats).num_rounds_here > 0


@pytest.mark.parametrize(
    "options",
    [
        {"identity": 0},
        {"sampling": "class-balanced"},
        {"asynchronous": False},
        {"asynchronous": True},
        {"capacity_bytes": 10**6, "storage": "cpu", "label": None, "selection": "reservoir"},
    ],
)
def test_rounds_that_could_not_be_done_again_stay_the_workers(options: dict[str, Any]) -> None:
    with make(**({"asynchronous": "auto"} | options)) as buffer:
        for step in range(30):
            values = torch.arange(4 * step, 4 * step + 4)
            lengths = [values[:1], values[:2], values[:3], values]
            buffer.update(
                (lengths, values % 3) if "capacity_bytes" in options else (values, values % 3)
            )
        assert buffer.stats().num_rounds_here == 0


def test_a_save_in_the_background_keeps_rounds_with_the_worker(tmp_path: Path) -> None:
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 30) == given(other, 0, 30)
        buffer.save(tmp_path / "one", background=True)
        assert given(buffer, 30, 30) == given(other, 30, 30)
        buffer.wait_until_saved()
        before = buffer.stats()
        assert given(buffer, 60, 30) == given(other, 60, 30)
        assert buffer.stats().since(before).num_rounds_here > 20
        buffer.load(tmp_path / "one")
        other.save(tmp_path / "two")
        with make(asynchronous="auto") as again:
            again.load(tmp_path / "one")
            assert given(again, 30, 30) == given(buffer, 30, 30)


def test_once_it_is_on_disk_the_trainer_runs_rounds_again(tmp_path: Path) -> None:
    """Though nobody has asked yet whether it is."""
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 30) == given(other, 0, 30)
        buffer.save(tmp_path / "one", background=True)
        deadline = time.monotonic() + 60
        while buffer._steps.rounds.before_write is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        before = buffer.stats()
        expected = given(other, 30, 30)
        assert given(buffer, 30, 30) == expected
        assert buffer.stats().since(before).num_rounds_here == 30
        buffer.save(tmp_path / "two", background=True)  # takes the place of one that has ended
        buffer.wait_until_saved()
        buffer.load(tmp_path / "one")
        assert given(buffer, 30, 30) == expected


def test_what_a_buffer_has_done_is_counted_on_over_a_load(tmp_path: Path) -> None:
    with make(asynchronous="auto") as buffer, make(asynchronous="auto") as again:
        given(buffer, 0, 30)
        buffer.save(tmp_path)
        given(buffer, 30, 30)
        before = buffer.stats()
        buffer.load(tmp_path)
        after = buffer.stats()
        assert (before.num_rounds, after.num_rounds) == (60, 30)
        done = ("num_given", "num_rounds_here", "seconds_here", "seconds_copying")
        for name in (*done, "seconds_joining", "seconds_offering"):
            assert getattr(after, name) == getattr(before, name) > 0
        again.load(tmp_path)
        assert again.stats().num_rounds == 30
        assert [getattr(again.stats(), name) for name in done] == [0, 0, 0, 0]


@pytest.mark.parametrize("error", [ValueError("of a bug"), MemoryError("too much")])
def test_a_round_that_fails_says_where_whoever_runs_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise error

    told = []
    for asynchronous in ("auto", True):
        with make(asynchronous=asynchronous) as buffer:
            given(buffer, 0, 30)
            buffer.stats()  # so that its last round has ended
            with monkeypatch.context() as patch:
                patch.setattr(type(buffer._steps.rounds.selection), "admit", fail)
                with pytest.raises(RoundError, match=r"^round 30 \(admit\) failed: ") as raised:
                    given(buffer, 30, 2)
                assert raised.value.__cause__ is error
                with pytest.raises(RoundError) as again:
                    given(buffer, 32, 1)
            told += [str(raised.value), str(again.value)]
    assert len(set(told)) == 1


def test_an_error_that_the_worker_does_not_meet_passes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one out of a signal's handler: the round is done all the same."""
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 30) == given(other, 0, 30)
        kind, error = type(buffer._steps.rounds.selection), RuntimeError("the time is up")
        admit = kind.admit

        def handle(*arguments: Any) -> Any:
            found = admit(*arguments)
            if threading.current_thread() is threading.main_thread():
                raise error
            return found

        monkeypatch.setattr(kind, "admit", handle)
        for first in (30, 31, 32):
            with pytest.raises(RuntimeError, match="^the time is up$"):
                given(buffer, first, 1)
            assert buffer.stats().num_rounds == first + 1
        monkeypatch.setattr(kind, "admit", admit)
        given(other, 30, 3)
        assert given(buffer, 33, 30) == given(other, 33, 30)


def test_what_changes_the_policy_between_rounds_counts() -> None:
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 30) == given(other, 0, 30)
        assert buffer.protect(0.5) == other.protect(0.5)
        before = buffer.stats()
        assert given(buffer, 30, 30) == given(other, 30, 30)
        assert buffer.stats().since(before).num_rounds_here == 0


def test_another_thread_may_ask_while_the_trainer_runs_a_round() -> None:
    interval, failures = sys.getswitchinterval(), list[Exception]()
    with make(asynchronous="auto") as buffer, make() as other:
        has_ended = threading.Event()

        def ask() -> None:
            while not has_ended.is_set():
                try:
                    assert len(buffer) <= 8
                except Exception as error:
                    failures.append(error)
                    return

        asking = threading.Thread(target=ask)
        sys.setswitchinterval(1e-5)
        asking.start()
        try:
            found = given(buffer, 0, 800)
        finally:
            has_ended.set()
            asking.join()
            sys.setswitchinterval(interval)
        assert not failures
        assert found == given(other, 0, 800)
        assert buffer.stats().num_rounds_here > 200


def test_what_a_step_takes_is_counted_once() -> None:
    """Also where a step before it has offered nothing, whose round comes first."""
    with make(asynchronous=False) as buffer:
        given(buffer, 0, 20)
        before, began = buffer.stats(), time.perf_counter()
        for step in range(20, 120):
            buffer.draw()
            given(buffer, step, 1)
        took = time.perf_counter() - began
        spent = buffer.stats().since(before)
        assert 0 < spent.seconds_exposed < took
