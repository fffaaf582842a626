"""Interrupts: an exception at any moment on the trainer's thread comes through, and all goes on.

An exception out of a signal handler may come before any bytecode of the trainer's thread. So one is
raised before each of them in turn: the tests are exhaustive. ``benchmarks/interrupts.py`` sends real
signals at random moments.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ritornello
from ritornello import RehearsalBuffer
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.rounds.round import Rounds
from ritornello.rounds.steps import Steps
from ritornello.testing import check_consistent, spawn_ranks
from ritornello.transports.base import Transport
from ritornello.transports.local import LocalTransport

LIBRARY = str(Path(ritornello.__file__).parent)


class Preempted(Exception):  # noqa: N818
    """What a user's signal handler may raise; its constructor is its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)


class Late(TimeoutError):  # noqa: N818
    """What an alarm may raise."""


def interrupted(
    call: Callable[[], object], number: int, error: BaseException, each: str = "line"
) -> bool:
    """Calls it, and raises the error at a moment in the library's code on this thread.

    Args:
        call: what is interrupted.
        number: of the moment, from 1 on.
        error: must come through as it is.
        each: "line" or "opcode", which is a moment.

    Returns:
        False if ``call`` ends before.
    """
    passed, where = 0, ""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed, where
        if event == "call":
            if not frame.f_code.co_filename.startswith(LIBRARY):
                return None
            frame.f_trace_opcodes = each == "opcode"
        elif event == each:
            passed += 1
            if passed == number:
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise error  # which also ends the tracing
        return trace

    tracing = sys.gettrace()
    gc.disable()  # Python itself swallows what comes while it collects
    sys.settrace(trace)
    try:
        call()
    except BaseException as raised:
        if raised is not error:
            raise
        return True
    finally:
        sys.settrace(tracing)
        gc.enable()
    assert passed < number, f"the interrupt was swallowed, at {where}"
    return False


def batch_of(step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    values = torch.arange(step * size, (step + 1) * size)
    return values.float(), values % 5


class Slow(LocalTransport):
    def exchange(self, *arguments: Any) -> None:
        time.sleep(0.001)
        super().exchange(*arguments)


def make(transport: str | Transport = "auto", **arguments: Any) -> RehearsalBuffer:
    settings = {"capacity": 12, "num_candidates": 4, "sampling": "class-balanced"} | arguments
    return RehearsalBuffer(
        **settings, num_representatives=2, seed=3, transport=transport, timeout_seconds=20.0
    )


def filled(steps: int = 5, **arguments: Any) -> RehearsalBuffer:
    buffer = make(sampling="earlier-tasks", **arguments)
    buffer.begin_task("first")
    for step in range(steps):
        buffer.update(batch_of(step))
        if step == 2:
            buffer.begin_task("second")
    return buffer


def state_of(buffer: RehearsalBuffer) -> list[Any]:
    """All that is saved, to be compared."""
    (entry,) = buffer.state_dict().values()
    manifest, tensors = entry
    known = json.loads(manifest)
    del known["checksum"]
    for task in known["tasks"]:
        del task["began_at"]
    return [known, *((name, each.tolist()) for name, each in sorted(tensors.items()))]


@pytest.mark.parametrize(("asynchronous", "transport"), [(True, Slow), (False, LocalTransport)])
def test_an_interrupted_update_has_happened_or_not(
    asynchronous: bool, transport: type[Transport]
) -> None:
    """The same rounds follow as in a buffer that was never interrupted."""
    with make(transport(), asynchronous=asynchronous) as buffer, make() as other:
        for number in count(1):
            batch = batch_of(number)
            if transport is Slow:  # then the last round still runs
                buffer.update(batch)
                other.update(batch)
            offered = buffer._steps.num_offers
            error = (Preempted(number), Late())[number % 2]
            if not interrupted(partial(buffer.update, batch), number, error, "opcode"):
                break
            for _ in range(buffer._steps.num_offers - offered):
                other.update(batch)
            check_consistent(buffer)
            if number % 20 == 0:
                assert state_of(buffer) == state_of(other)
        assert number > 300


@pytest.mark.parametrize(
    ("selection", "each"),
    [(name, "line") for name in SELECTION_POLICIES] + [("class-balanced", "opcode")],
)
def test_a_round_on_the_trainers_own_thread_is_done_again(
    selection: str, each: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks it off leaves nothing behind: the same rounds follow as without."""
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    settings: dict[str, Any] = {"selection": selection, "sampling": "uniform", "capacity": 9}
    settings["most_representatives"] = 3
    with (
        make(asynchronous="auto", **settings) as buffer,
        make(asynchronous=False, **settings) as other,
    ):

        def update(number: int) -> None:
            buffer.update(batch_of(number))
            other.update(batch_of(number))

        for number in range(20):
            update(number)
        is_interrupted = True
        for number in count(20):
            if not is_interrupted:
                break
            for each_buffer in (buffer, other):
                each_buffer.num_representatives = 2 + number % 2
            call, offered = partial(buffer.update, batch_of(number)), buffer._steps.num_offers
            is_interrupted = interrupted(
                call, number - 19, (Preempted(0), Late())[number % 2], each
            )
            if buffer._steps.num_offers > offered:
                other.update(batch_of(number))
            if number % 3:  # a step more, on the way there
                update(number)
            check_consistent(buffer)
            if number % 20 == 0:
                assert state_of(buffer) == state_of(other)
        assert number > 150
        stats = buffer.stats()
        assert stats.num_rounds_here > stats.num_rounds / 2
        assert state_of(buffer) == state_of(other)


def test_a_handler_that_uses_the_buffer_in_the_midst_of_a_round_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs on the trainer's thread, which cannot go on before it returns."""
    monkeypatch.setattr("ritornello.rounds.worker.ROUNDS_IN_BRIEF_STEP", 10**9)
    admit, calls = Rounds._admit, count()

    def handle(rounds: Rounds, *arguments: Any) -> Any:
        found = admit(rounds, *arguments)
        if threading.current_thread() is threading.main_thread() and next(calls) % 3 == 0:
            len(buffer)
        return found

    with (
        make(asynchronous="auto", sampling="uniform") as buffer,
        make(sampling="uniform") as other,
    ):
        monkeypatch.setattr(Rounds, "_admit", handle)
        num_told = 0
        for number in range(60):
            other.update(batch_of(number))
            try:
                buffer.update(batch_of(number))
            except RuntimeError as error:
                told, num_told = error, num_told + 1
        assert "a signal's handler has used the buffer in the midst of a round" in str(told)
        assert num_told > 10
        check_consistent(buffer)
        assert state_of(buffer) == state_of(other)


def test_the_first_update_can_be_interrupted() -> None:
    for number in count(1):
        with make(num_candidates=None) as buffer:
            if not interrupted(partial(buffer.update, batch_of(0)), number, Preempted(number)):
                break
            check_consistent(buffer)
            buffer.update(batch_of(1))
            assert len(buffer.update(batch_of(2))[0]) == 8
    assert number > 100


def in_lists(step: int) -> tuple[list[Tensor], Tensor]:
    values, labels = batch_of(step)
    return [each.repeat(1 + number) for number, each in enumerate(values)], labels


@pytest.mark.parametrize(
    ("batches", "arguments"),
    [
        (batch_of, {"capacity": 1000, "capacity_bytes": 12 * 16}),
        (in_lists, {"sampling": "uniform", "capacity_bytes": 4000}),
    ],
    ids=["of one size", "of unequal length"],
)
def test_bytes_are_bounded_as_a_whole(
    batches: Callable[[int], Any], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, number = Steps._begin, 0

    def interrupted_begin(*given: Any) -> None:
        if interrupted(partial(begin, *given), number, Preempted(number)):
            raise Preempted(number)
        raise EOFError

    is_whole = False
    while not is_whole:
        number += 1
        with make(num_candidates=None, **arguments) as buffer:
            monkeypatch.setattr(Steps, "_begin", interrupted_begin)
            with pytest.raises((Preempted, EOFError)) as raised:
                buffer.update(batches(0))
            monkeypatch.undo()
            buffer.wait_until_saved()  # what was begun has ended
            check_consistent(buffer)
            for step in range(1, 4):
                augmented = buffer.update(batches(step))
            assert len(augmented[1]) == 8
            check_consistent(buffer)
            assert buffer.stats().capacity == len(buffer) == 12
            is_whole = raised.type is EOFError
    assert number > 30


def test_an_interrupted_draw_or_offer_has_happened_or_not() -> None:
    with make() as buffer, make() as other:
        other.offer(batch_of(0))
        buffer.offer(batch_of(0))
        for number in count(1):
            draws = interrupted(buffer.draw, number, Preempted(number))
            if buffer._steps.is_offered:
                buffer.draw()
            other.draw()
            offers = interrupted(partial(buffer.offer, batch_of(number)), number, Late())
            if not buffer._steps.is_offered:
                buffer.offer(batch_of(number))
            other.offer(batch_of(number))
            check_consistent(buffer)
            if not draws and not offers:
                break
        assert number > 40
        assert state_of(buffer) == state_of(other)


def halved(batch: Any) -> Tensor:
    return batch[0] / 2


CALLS: dict[str, Callable[[RehearsalBuffer, Path], object]] = {
    "save": lambda buffer, folder: buffer.save(folder / "new"),
    "save in the background": lambda buffer, folder: buffer.save(folder / "new", background=True),
    "wait_until_saved": lambda buffer, folder: buffer.wait_until_saved(),
    "load": lambda buffer, folder: buffer.load(folder / "alike"),
    "load from another capacity": lambda buffer, folder: buffer.load(folder / "larger"),
    "state_dict": lambda buffer, folder: buffer.state_dict(whole=True),
    "begin_task": lambda buffer, folder: buffer.begin_task("third"),
    "protect": lambda buffer, folder: buffer.protect(0.5),
    "rewrite": lambda buffer, folder: buffer.rewrite(halved, fields=0),
    "close": lambda buffer, folder: buffer.close(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that others than the interrupted buffer have saved."""
    folder = tmp_path_factory.mktemp("saved")
    for name, capacity in {"alike": 12, "larger": 19}.items():
        with filled(steps=9, capacity=capacity) as buffer:
            buffer.save(folder / name)
    return folder


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_has_happened_or_not(
    name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is as before the call, or as behind it; it can be saved, and goes on."""
    call = CALLS[name]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which is most of the time
    for each in ("alike", "larger"):
        (tmp_path / each).symlink_to(saved / each)

    def begun() -> RehearsalBuffer:
        buffer = filled()
        if name == "wait_until_saved":
            buffer.save(tmp_path / "new", background=True)
        return buffer

    def state_after(run: Callable[[RehearsalBuffer], object]) -> list[Any]:
        with begun() as buffer:
            run(buffer)
            buffer.update(batch_of(6))
            return state_of(buffer)

    before = state_after(lambda buffer: None)
    after = before if name == "close" else state_after(lambda buffer: call(buffer, tmp_path))
    for number in count(1):
        buffer = begun()
        try:
            if not interrupted(partial(call, buffer, tmp_path), number, Late()):
                break
            if name == "close" and not buffer._is_open:
                continue
            check_consistent(buffer)
            buffer.update(batch_of(6))
            assert state_of(buffer) in (before, after)
        finally:
            buffer.close()
        assert not buffer._finalizer.alive
        assert buffer._worker._state.life.has_ended
    assert number > 10


def test_an_interrupted_fill_has_offered_whole_mini_batches() -> None:
    old = [batch_of(step) for step in range(10, 13)]

    def state_after(num_batches: int) -> list[Any]:
        with make() as buffer:
            buffer.update(batch_of(0))
            buffer.fill(old[:num_batches])
            buffer.update(batch_of(6))
            return state_of(buffer)

    possible = [state_after(num_batches) for num_batches in range(4)]
    for number in count(1):
        with make() as buffer:
            buffer.update(batch_of(0))
            if not interrupted(partial(buffer.fill, old), number, Preempted(number)):
                break
            check_consistent(buffer)
            buffer.update(batch_of(6))
            assert state_of(buffer) in possible
    assert number > 100


def test_what_fails_after_an_interrupt_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The buffer goes on, and the next save is made."""
    began, go_on = threading.Event(), threading.Event()

    def full(*_: object) -> None:
        began.set()
        go_on.wait(20.0)
        raise OSError("No space left on device")

    with filled() as buffer:
        len(buffer)
        with monkeypatch.context() as patch:
            patch.setattr("ritornello.saving.writing.SaveUnderWay._write", full)
            patch.setattr("ritornello.rounds.worker.Errand.wait", lambda *_: preempt())
            with pytest.raises(Preempted):
                buffer.save(tmp_path)
            assert began.wait(20.0)
        go_on.set()
        buffer.update(batch_of(5))
        assert "a call failed after an interrupt: " in caplog.text
        assert "No space left on device" in caplog.text
        buffer.save(tmp_path)
        check_consistent(buffer)


def preempt() -> None:
    raise Preempted(0)


def test_convert_may_ask_the_buffer(saved: Path) -> None:
    """It is called by the worker, for which nobody else would answer."""
    lengths = []

    def convert(batch: Any) -> Any:
        lengths.append(len(buffer))
        return batch

    with filled(steps=2) as buffer:
        before = len(buffer)
        buffer.load(saved / "alike", convert=convert)
        assert set(lengths) == {before}
        assert len(buffer) == 12


def test_a_load_that_is_interrupted_while_it_waits_goes_on(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    with filled() as buffer, filled() as other:
        len(buffer)
        monkeypatch.setattr("ritornello.rounds.worker.Errand.wait", lambda *_: preempt())
        with pytest.raises(Preempted):
            buffer.load(saved / "alike")
        monkeypatch.undo()
        other.load(saved / "alike")
        assert state_of(buffer) == state_of(other)


def spoil_policy(buffer: RehearsalBuffer) -> None:
    buffer._steps.rounds.selection.admit(np.full(50, 77), np.random.default_rng(0))


def spoil_shard(buffer: RehearsalBuffer) -> None:
    rows = buffer._steps.rounds.shard.rows  # type: ignore[union-attr]
    rows[0] = rows[1]
    rows[1] = rows[2]


def spoil_contents(buffer: RehearsalBuffer) -> None:
    contents = buffer._steps.rounds.contents
    contents._labels[[0, 1, 2]] = contents._labels[[1, 2, 0]]


def spoil_classes(buffer: RehearsalBuffer) -> None:
    contents = buffer._steps.rounds.contents
    contents._members[0].pop()


def spoil_memory(buffer: RehearsalBuffer) -> None:
    buffer._steps.rounds.sampling._earlier.append(10**6)  # type: ignore[attr-defined]


def spoil_rounds(buffer: RehearsalBuffer) -> None:
    buffer._steps.rounds.num_rounds += 1


def spoil_sizes(buffer: RehearsalBuffer) -> None:
    buffer._steps.rounds.contents.sizes[0] = 13


def spoil_admissions(buffer: RehearsalBuffer) -> None:
    buffer._steps.rounds.admitted_in[0] = 99


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (spoil_policy, "the selection policy"),
        (spoil_shard, "according to the selection policy"),
        (spoil_contents, "according to the contents"),
        (spoil_classes, "the contents contradicts"),
        (spoil_memory, "the sampling policy contradicts"),
        (spoil_rounds, "there were 6 rounds"),
        (spoil_sizes, r"the shards hold \[13\]"),
        (spoil_admissions, "some were admitted"),
    ],
)
def test_the_check_finds_what_disagrees(
    spoil: Callable[[RehearsalBuffer], None], found: str
) -> None:
    with filled() as buffer:
        check_consistent(buffer)
        spoil(buffer)
        with pytest.raises(AssertionError, match=found):
            check_consistent(buffer)


def test_the_check_knows_every_policy() -> None:
    for selection in SELECTION_POLICIES:
        for sampling in ("uniform", "class-balanced", "grasp"):
            with make(selection=selection, sampling=sampling) as buffer:
                check_consistent(buffer)
                for step in range(12):
                    buffer.update(batch_of(step))
                check_consistent(buffer)


# Real signals, at random moments.

SIGNALS: dict[int, Callable[[], BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: partial(SystemExit, 143),
    signal.SIGALRM: Late,
    signal.SIGUSR1: partial(Preempted, 1),
}
"""What comes, and what its handler raises."""


@dataclass
class Outcome:
    """What has become of interrupts."""

    interrupts: int = 0
    inside_calls: int = 0
    came_through: int = 0
    inconsistent: int = 0
    lost: int = 0


def interrupt_again_and_again(
    rank: int, num_ranks: int, num_interrupts: int, folder: str
) -> dict[bool, Outcome]:
    """Interrupts a rank's calls at random moments; what has become of it, by ``asynchronous``."""
    return {
        asynchronous: interrupt_one_mode(
            rank, num_ranks, num_interrupts, asynchronous, Path(folder) / str(asynchronous)
        )
        for asynchronous in (True, False)
    }


def interrupt_one_mode(
    rank: int, num_ranks: int, num_interrupts: int, asynchronous: bool, folder: Path
) -> Outcome:
    """Interrupts, and looks after each whether all is as it should be.

    What a buffer holds depends on the number of updates alone, as each has a mini-batch of its own.
    With several ranks only updates are interrupted, which each rank repeats if it has not happened.
    """
    outcome, chance = Outcome(), random.Random(rank)
    raised: list[BaseException] = []

    def raise_what_belongs_to(number: int, _: object) -> None:
        raised.append(SIGNALS[number]())
        raise raised[-1]

    for number in SIGNALS:
        signal.signal(number, raise_what_belongs_to)

    def batch() -> tuple[Tensor, Tensor]:
        return batch_of(buffer._steps.num_offers * num_ranks + rank)

    saved_first = folder / "first"
    calls = [lambda: buffer.update(batch())]
    if num_ranks == 1:
        calls += [lambda: buffer.save(folder / "new"), lambda: buffer.load(saved_first)]
    with make(asynchronous=asynchronous) as buffer:
        buffer.update(batch())
        buffer.save(saved_first)
        for turn in range(num_interrupts):
            raised.clear()
            wanted = buffer._steps.num_offers + 1
            call = calls[turn % len(calls)]
            number = list(SIGNALS)[turn // len(calls) % len(SIGNALS)]
            timer = threading.Timer(chance.random() * 0.001, os.kill, (os.getpid(), number))
            came: BaseException | None = None
            try:
                timer.start()
                while not raised:
                    if num_ranks == 1 or buffer._steps.num_offers < wanted:
                        call()
            except BaseException as error:
                came = error
            outcome.interrupts += 1
            outcome.came_through += came is raised[0]
            frames = traceback.extract_tb(came.__traceback__) if came else []
            outcome.inside_calls += any(each.filename.startswith(LIBRARY) for each in frames)
            try:
                while buffer._steps.num_offers < wanted and num_ranks > 1:
                    buffer.update(batch())
                check_consistent(buffer)
            except AssertionError:
                outcome.inconsistent += 1
            except RuntimeError:
                outcome.lost += 1
                break
        buffer.save(folder / "last")
        num_offers, state = buffer._steps.num_offers, state_of(buffer)
    with make() as other:
        for step in range(num_offers):
            other.update(batch_of(step * num_ranks + rank))
        outcome.inconsistent += state_of(other) != state
    return outcome


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_signals_at_random_moments_come_through_and_lose_nothing(
    num_ranks: int, tmp_path: Path
) -> None:
    for outcomes in spawn_ranks(num_ranks, interrupt_again_and_again, num_ranks, 36, str(tmp_path)):
        assert isinstance(outcomes, dict), outcomes
        for outcome in outcomes.values():
            assert outcome.interrupts == outcome.came_through == 36
            assert outcome.inside_calls > 0
            assert outcome.inconsistent == outcome.lost == 0
