"""Interrupts: an exception at any moment on the trainer's thread comes through, and all goes on.

An exception out of a signal handler may come before any bytecode of the trainer's thread. So one is
raised before each of them in turn: the tests are exhaustive. ``benchmarks/interrupts.py`` sends real
signals at random moments.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import ritornello
from ritornello import RehearsalBuffer
from ritornello.testing import check_consistent
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


def test_the_first_update_can_be_interrupted() -> None:
    for number in count(1):
        with make(num_candidates=None) as buffer:
            if not interrupted(partial(buffer.update, batch_of(0)), number, Preempted(number)):
                break
            check_consistent(buffer)
            buffer.update(batch_of(1))
            assert len(buffer.update(batch_of(2))[0]) == 8
    assert number > 100


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
