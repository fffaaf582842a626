"""A buffer for one process where there are several: made too early, or on purpose."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ritornello import RehearsalBuffer, RoundError
from ritornello.transports.launched import RANKS_AND_SIZES

BATCH = torch.arange(4), torch.arange(4)


def make(**options: Any) -> RehearsalBuffer:
    return RehearsalBuffer(8, num_representatives=2, **options)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in RANKS_AND_SIZES:
        for name in variables:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("rank", "size"), RANKS_AND_SIZES)
def test_several_ranks_without_a_group(
    rank: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank, "1")
    monkeypatch.setenv(size, "4")
    message = (
        f"^rank 1: {size}=4 in the environment says that there are 4 ranks, .* Make the buffer after "
        "torch.distributed.init_process_group .* say so: transport='local'"
    )
    with pytest.raises(ValueError, match=message):
        make()
    with make(transport="local") as buffer:  # as the message says
        buffer.update(BATCH)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},  # of somebody else
        {"RANK": "0", "WORLD_SIZE": "several"},
        # An sbatch script that starts one process; and srun, torchrun of one process inside a step.
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_a_single_process_is_no_false_alarm(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with make() as buffer:
        buffer.update(BATCH)


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    timeout = timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_a_group_says_how_many_ranks_there_are() -> None:
    with make() as buffer:
        buffer.update(BATCH)


def test_a_group_that_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    early, used, private = make(), make(), make(transport="local")
    used.update(BATCH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for buffer in (early, used, private):
            buffer.update(BATCH)  # it is one of one rank
    finally:
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    try:
        for buffer in (early, used):
            for call in (lambda b=buffer: b.update(BATCH), lambda b=buffer: b.save("nowhere")):
                with pytest.raises(
                    RuntimeError,
                    match=r"(update|save): the buffer was made for 1 rank, but .* of 4 ranks",
                ):
                    call()
        private.update(BATCH)
    finally:
        dist.destroy_process_group()
        for buffer in (early, used, private):
            buffer.close()


# Rounds on the trainer's own thread.


def given(buffer: RehearsalBuffer, first: int, num_steps: int) -> list[list[int]]:
    """What the trainer gets in some steps that do nothing else."""
    batches = (torch.arange(4 * step, 4 * step + 4) for step in range(first, first + num_steps))
    return [buffer.update((values, values % 3))[0].tolist() for values in batches]


def test_a_loop_of_brief_steps_runs_rounds_itself_with_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 700) == given(other, 0, 700)  # its policy is noted more than once
        stats, there = buffer.stats(), other.stats()
        assert stats.num_rounds_here > 600
        assert there.num_rounds_here == there.seconds_here == 0
        assert stats.num_rounds == there.num_rounds == 700
        assert 0 < stats.seconds_here < stats.seconds_offering - stats.seconds_copying
        assert stats.seconds_copying > 0
        assert stats.since(stats).seconds_copying == 0
        monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 0)
        assert given(buffer, 700, 20) == given(other, 700, 20)
        assert buffer.stats().since(stats).num_rounds_here == 0
        monkeypatch.undo()
        monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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
def test_rounds_that_could_not_be_done_again_stay_the_workers(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    with make(**({"asynchronous": "auto"} | options)) as buffer:
        for step in range(30):
            values = torch.arange(4 * step, 4 * step + 4)
            lengths = [values[:1], values[:2], values[:3], values]
            buffer.update(
                (lengths, values % 3) if "capacity_bytes" in options else (values, values % 3)
            )
        assert buffer.stats().num_rounds_here == 0


def test_a_save_in_the_background_keeps_rounds_with_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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


def test_once_it_is_on_disk_the_trainer_runs_rounds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody has asked yet whether it is."""
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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


def test_what_a_buffer_has_done_is_counted_on_over_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)

    def fail(*_: Any) -> None:
        raise error

    told = []
    for asynchronous in ("auto", True):
        with make(asynchronous=asynchronous) as buffer:
            given(buffer, 0, 30)
            buffer.stats()  # so that its last round has ended
            monkeypatch.setattr(type(buffer._steps.rounds.selection), "admit", fail)
            with pytest.raises(RoundError, match=r"^round 30 \(admit\) failed: ") as raised:
                given(buffer, 30, 2)
            assert raised.value.__cause__ is error
            with pytest.raises(RoundError) as again:
                buffer.update(BATCH)
            told += [str(raised.value), str(again.value)]
            monkeypatch.undo()
            monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    assert len(set(told)) == 1


def test_an_error_that_the_worker_does_not_meet_passes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one out of a signal's handler: the round is done all the same."""
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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


def test_what_changes_the_policy_between_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    with make(asynchronous="auto") as buffer, make() as other:
        assert given(buffer, 0, 30) == given(other, 0, 30)
        assert buffer.protect(0.5) == other.protect(0.5)
        before = buffer.stats()
        assert given(buffer, 30, 30) == given(other, 30, 30)
        assert buffer.stats().since(before).num_rounds_here == 0


def test_another_thread_may_ask_while_the_trainer_runs_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
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
