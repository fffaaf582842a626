"""The worker: a thread beside the trainer's that runs rounds in order, and all else that is whole.

Signals reach the trainer's thread alone, and any exception may come out of their handlers, at any
moment. So whatever must happen as a whole or not at all is an errand of the worker's: the trainer
only hands it over and waits, and both can be done again after an interrupt. A round that can be
done again itself, as if it had not begun, may be attempted by the trainer first.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from ritornello.transports.base import Transport

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
IdleWork = Callable[[], float | None]
"""Does a little; says after how many seconds it wants to be called again, or None: it has ended."""

POLL_SECONDS = 1.0
"""How often an idle worker looks whether it should end, and who waits for it whether it has."""

LONGEST_PAUSE_SECONDS = 0.05
"""Of a round that waits for the middle of a step: where steps are longer, nobody would notice."""

ROUNDS_IN_BRIEF_STEP = 10
"""A step of fewer rounds is too short to hide one."""

ATTEMPT_POLL_SECONDS = 0.0002
"""How often another thread looks whether the trainer has run its round."""

EXIT_SECONDS = 5.0
"""How long a buffer that was never closed waits for its round when it is collected."""


class Errand(Generic[Result]):
    """What the worker does for the trainer: a round, or what comes between two rounds.

    What came of it stays here, so that nothing is lost if the trainer is interrupted while it waits
    for it or takes it.

    Args:
        act: is called once, unless an attempt was broken off.
        pause: how many seconds the worker waits before it, unless something else comes, such as
            the same errand again.
        attempted_in: the frame of the call that is going to ``attempt`` it, on this thread.

    Attributes:
        error: what it raised.
        has_begun: whether the worker is at it, or was.
        has_ended: whether nothing is left to do.
        seconds: that it took.
    """

    _result: Result

    def __init__(
        self, act: Callable[[], Result], pause: float = 0.0, attempted_in: FrameType | None = None
    ) -> None:
        self._act: Callable[[], Result] | None = act
        self._attempted_in, self._owner = attempted_in, threading.get_ident()
        self.pause = pause
        self.error: BaseException | None = None
        self.has_begun = self.has_ended = False
        self.seconds = 0.0
        self._running = threading.Lock()
        self._running.acquire()

    @classmethod
    def ended(cls, result: Result) -> Errand[Result]:
        """One that has been done."""
        errand = cls(lambda: result)
        errand.run()
        return errand

    def run(self) -> None:
        """Does it; on the worker's thread."""
        act, self._act = self._act, None  # nothing of a mini-batch may stay alive
        self._attempted_in = None
        if act is None:
            return
        self.has_begun = True
        began = time.perf_counter()
        try:
            self._result = act()
        except BaseException as error:
            logger.debug("an errand failed", exc_info=True)
            self.error = error
        self.seconds = time.perf_counter() - began
        self.has_ended = True
        self._running.release()

    def attempt(self) -> None:
        """Does it at once, on the caller's thread.

        If anything breaks it off, it has not begun: whoever wants it next has the worker do it, so
        ``act`` must bear to be called again.

        Raises:
            BaseException: out of ``act``, or out of a signal's handler.
        """
        assert self._act is not None
        began = time.perf_counter()
        self._result = self._act()
        self.seconds = time.perf_counter() - began
        self.has_ended = True
        self.has_begun = True
        self._act = self._attempted_in = None

    def give_up_attempt(self) -> None:
        """Says that ``attempt`` was broken off, while the call in which it was goes on."""
        self._attempted_in = None

    def await_attempt(self) -> None:
        """Waits until nobody is at it by ``attempt`` any more.

        Raises:
            RuntimeError: it is the caller itself, in whose midst a signal's handler runs.
        """
        while self._is_attempted and not self.has_ended:
            if self._owner == threading.get_ident():
                raise RuntimeError(
                    "a signal's handler has used the buffer in the midst of a round that the "
                    "trainer runs itself; let the handler only note the signal, and look at that "
                    "between two steps, or make the buffer with asynchronous=True"
                )
            time.sleep(ATTEMPT_POLL_SECONDS)

    @property
    def _is_attempted(self) -> bool:
        """Whether the call in which it is attempted has not been left.

        No flag could say so: an interrupt might come before it is cleared.
        """
        wanted = self._attempted_in
        frame = None if wanted is None else sys._current_frames().get(self._owner)
        while frame is not None and frame is not wanted:
            frame = frame.f_back
        return frame is not None

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within ``seconds``. May be interrupted, and called again."""
        deadline = time.monotonic() + seconds
        while not self.has_ended:
            left = deadline - time.monotonic()
            if left <= 0.0:
                return False
            # The lock only wakes: one that an interrupt leaves locked is not waited for again.
            if self._running.acquire(timeout=min(left, POLL_SECONDS)):
                self._running.release()
        return True

    @property
    def result(self) -> Result:
        """What came of it, once it has ended.

        Raises:
            BaseException: ``error``.
        """
        if self.error is not None:
            raise self.error
        return self._result


class Pace:
    """When a round begins: in the middle of the trainer's step, where it is short beside the step.

    What a round does is mostly the interpreter's work, and the trainer's next operation waits for
    the interpreter meanwhile. A forward pass issues one operation after another; a backward pass,
    in the second half of a step, needs the interpreter hardly at all. A trainer that wants the
    round earlier does not wait: see ``Worker.finish``.

    Where steps are hardly longer than rounds, as in a loop that only fills or reads a buffer, there
    is nothing to hide a round behind: handing it over takes longer than it can save.

    Args:
        asynchronous: whether the trainer goes on meanwhile; else no round waits.
    """

    def __init__(self, asynchronous: bool = True) -> None:
        self._asynchronous = asynchronous
        self._began = -math.inf
        self._steps: deque[float] = deque(maxlen=8)
        self._rounds: deque[float] = deque(maxlen=8)

    def pause(self, now: float, last_round: float) -> float:
        """How long the next round waits.

        The shortest of the last steps counts, as between some the model is evaluated, and the
        longest of the last rounds: it shall end in the third quarter of the step.

        Args:
            now: when the trainer hands it over, in seconds.
            last_round: how long the one before took, in seconds.

        Returns:
            Seconds; 0 in the first steps.
        """
        self._steps.append(now - self._began)
        self._rounds.append(last_round)
        self._began = now
        if not self._asynchronous or not self._is_known:
            return 0.0
        step = min(self._steps)
        pause = min(step / 2, step * 3 / 4 - 2 * max(self._rounds), LONGEST_PAUSE_SECONDS)
        return max(0.0, pause)

    @property
    def is_brief(self) -> bool:
        """Whether there is hardly anything to hide a round behind."""
        return self._is_known and min(self._steps) < ROUNDS_IN_BRIEF_STEP * min(self._rounds)

    @property
    def _is_known(self) -> bool:
        return len(self._steps) == 8


@dataclass
class _State:
    """What the thread holds: never the buffer, so that the buffer can be collected."""

    starts: queue.SimpleQueue[Errand[Any] | IdleWork | None] = field(
        default_factory=queue.SimpleQueue
    )
    life: Errand[None] = field(default_factory=lambda: Errand(lambda: None))
    is_stopping: bool = False
    at_end: Callable[[], None] | None = None


class Worker:
    """A daemon thread that runs one errand after another, and in between what may be left."""

    def __init__(self, name: str) -> None:
        self._state = _State()
        self._thread = threading.Thread(target=_serve, args=(self._state,), name=name, daemon=True)
        self._thread.start()

    def start(self, errand: Errand[Result]) -> None:
        """Has it run, once; may be called again for the same one, as after an interrupt."""
        self._state.starts.put(errand)

    def finish(self, errand: Errand[Result], seconds: float = math.inf) -> bool:
        """Starts it, unless it runs already, and waits; whether it has ended within ``seconds``."""
        if self.is_calling or self._state.life.has_ended:  # then it never will
            return errand.has_ended
        if not errand.has_begun:
            errand.await_attempt()
            self.start(errand)
        return errand.wait(seconds)

    def while_idle(self, work: IdleWork) -> None:
        """Calls ``work`` between errands, again and again until it has ended; one at a time."""
        self._state.starts.put(work)

    def stop(self, wait_seconds: float) -> bool:
        """Ends the worker; whether it has ended within ``wait_seconds``."""
        self._state.is_stopping = True
        self._state.starts.put(None)
        # Not `join`: Python takes a thread for ended when that is interrupted.
        return not self.is_calling and self._state.life.wait(wait_seconds)

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Has a worker that did not stop in time call this when it ends."""
        self._state.at_end = call

    @property
    def is_calling(self) -> bool:
        """Whether the caller is on the worker's own thread, as where that collects the buffer."""
        return self._thread is threading.current_thread()


def _serve(state: _State) -> None:
    """The thread's whole life."""
    idle_work: IdleWork | None = None
    pause: float | None = POLL_SECONDS
    following: Errand[Any] | IdleWork | None = None
    while not state.is_stopping:
        started, following = following or _next(state, pause), None
        if isinstance(started, Errand):
            if started.pause and not idle_work:
                following = _next(state, started.pause)
            started.run()
            pause = 0.0 if idle_work else POLL_SECONDS
        else:
            idle_work = started or idle_work
            pause = idle_work() if idle_work else POLL_SECONDS
            if pause is None:
                idle_work, pause = None, POLL_SECONDS
        # What came of it belongs to the trainer.
        del started
    state.life.run()
    if state.at_end is not None:
        state.at_end()


def _next(state: _State, seconds: float | None) -> Errand[Any] | IdleWork | None:
    """What is to be started; None: nothing within so many seconds, or no more at all."""
    try:
        return state.starts.get(timeout=seconds)
    except queue.Empty:
        return None


class Saving(Protocol):
    """A save in the background, as the end of its buffer sees it. Nothing here raises."""

    def write(self) -> None:
        """Writes what is left of this rank's file."""

    def finish(self, patience_seconds: float) -> None:
        """Makes the save count, as soon as all ranks have written."""


def shut_down(
    worker: Worker,
    transport: Transport,
    saving: Saving,
    process: int,
    wait_seconds: float,
    patience_seconds: float,
    *,
    stop_watch: Callable[[], None] | None = None,
) -> None:
    """Ends a buffer: its worker, its watch, its transport, and a save in the background.

    Args:
        worker: of the buffer.
        transport: of the buffer.
        saving: what is saved meanwhile, if anything.
        process: that made the buffer.
        wait_seconds: for the save, and again for the worker.
        patience_seconds: for other ranks, which may still write their files.
        stop_watch: ends the watch over the other ranks, where there are several.
    """
    if process != os.getpid():
        return  # in a forked child: worker and transport are the parent's
    # What an interrupt shall not break off; a worker that waits for other ranks cannot do it.
    worker.finish(Errand(saving.write), wait_seconds)
    has_stopped = worker.stop(wait_seconds)
    end = partial(_end, worker, transport, saving, stop_watch, patience_seconds)
    if worker.is_calling:  # collected while its own thread runs, maybe in the midst of a save
        transport.interrupt()
        worker.call_at_end(partial(end, True))
    else:
        end(has_stopped)


def _end(
    worker: Worker,
    transport: Transport,
    saving: Saving,
    stop_watch: Callable[[], None] | None,
    patience_seconds: float,
    has_stopped: bool,
) -> None:
    """See ``shut_down``; the worker shall stop, or has."""
    try:
        saving.write()
    finally:
        # Now, as other ranks may wait for this one in a round, and cannot write meanwhile.
        if not has_stopped:
            # Python must not end while a thread is inside torch: that would abort the process.
            transport.interrupt()
            has_stopped = worker.stop(EXIT_SECONDS)
        if stop_watch is not None:
            stop_watch()
        if has_stopped:
            transport.close()
        else:  # it still uses the transport
            worker.call_at_end(transport.close)
    saving.finish(patience_seconds)
