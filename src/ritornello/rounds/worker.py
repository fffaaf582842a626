"""The worker: runs rounds in order, in a thread beside the trainer's, or inline."""

from __future__ import annotations

import logging
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ritornello.rounds.staging import Candidates
from ritornello.transports.base import Transport

logger = logging.getLogger(__name__)

RunRound = Callable[[Candidates], int]
Outcome = int | BaseException
IdleWork = Callable[[], float | None]
"""Does a little; says after how many seconds it wants to be called again, or None: it has ended."""

POLL_SECONDS = 1.0
"""How often an idle worker looks whether it should end."""

EXIT_SECONDS = 5.0
"""How long a buffer that was never closed waits for its round when it is collected."""


class Worker(ABC):
    """Runs one round at a time: each ``start`` is followed by one ``result``."""

    @abstractmethod
    def start(self, candidates: Candidates) -> None:
        """Starts a round."""

    @abstractmethod
    def result(self, timeout_seconds: float) -> int:
        """Waits for the round's end; what it returned.

        Raises:
            TimeoutError: it is still running.
            BaseException: what the round raised.
        """

    @abstractmethod
    def stop(self, wait_seconds: float) -> bool:
        """Ends the worker; whether it has ended within ``wait_seconds``."""

    @abstractmethod
    def while_idle(self, work: IdleWork) -> bool:
        """Calls ``work`` between rounds, again and again until it has ended; one at a time.

        Returns:
            Whether it does; False: nothing runs between rounds.
        """

    @property
    def is_calling(self) -> bool:
        """Whether the caller is on the worker's own thread."""
        return False

    def call_at_end(self, call: Callable[[], None]) -> None:  # noqa: B027  (ends at once)
        """Has a worker that did not stop in time call this when it ends."""


class InlineWorker(Worker):
    """Runs the round on the caller's thread, inside ``start``."""

    def __init__(self, run: RunRound) -> None:
        self._run = run
        self._outcome: Outcome = 0

    def start(self, candidates: Candidates) -> None:
        """See ``Worker.start``."""
        # An interrupt is the trainer's own and passes through.
        try:
            self._outcome = self._run(candidates)
        except Exception as error:
            self._outcome = error

    def result(self, timeout_seconds: float) -> int:
        """See ``Worker.result``."""
        return _unwrap(self._outcome)

    def while_idle(self, work: IdleWork) -> bool:
        """See ``Worker.while_idle``."""
        return False

    def stop(self, wait_seconds: float) -> bool:
        """See ``Worker.stop``."""
        return True


@dataclass
class _State:
    """What the thread holds: never the buffer, so that the buffer can be collected."""

    run: RunRound
    starts: queue.SimpleQueue[Candidates | IdleWork | None] = field(
        default_factory=queue.SimpleQueue
    )
    outcomes: queue.SimpleQueue[Outcome] = field(default_factory=queue.SimpleQueue)
    stopping: threading.Event = field(default_factory=threading.Event)
    at_end: Callable[[], None] | None = None


class ThreadWorker(Worker):
    """Runs rounds in a daemon thread of its own."""

    def __init__(self, run: RunRound, name: str) -> None:
        self._state = _State(run)
        self._thread = threading.Thread(target=_serve, args=(self._state,), name=name, daemon=True)
        self._thread.start()

    def start(self, candidates: Candidates) -> None:
        """See ``Worker.start``."""
        self._state.starts.put(candidates)

    def result(self, timeout_seconds: float) -> int:
        """See ``Worker.result``."""
        try:
            outcome = self._state.outcomes.get(timeout=timeout_seconds)
        except queue.Empty:
            raise TimeoutError from None
        return _unwrap(outcome)

    def while_idle(self, work: IdleWork) -> bool:
        """See ``Worker.while_idle``."""
        self._state.starts.put(work)
        return True

    @property
    def is_calling(self) -> bool:
        """See ``Worker.is_calling``."""
        return self._thread is threading.current_thread()

    def stop(self, wait_seconds: float) -> bool:
        """See ``Worker.stop``."""
        self._state.stopping.set()
        self._state.starts.put(None)
        if self.is_calling:
            return False
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def call_at_end(self, call: Callable[[], None]) -> None:
        """See ``Worker.call_at_end``."""
        self._state.at_end = call


def _serve(state: _State) -> None:
    """The thread's whole life."""
    idle_work: IdleWork | None = None
    pause: float | None = POLL_SECONDS
    while not state.stopping.is_set():
        try:
            started = state.starts.get(timeout=pause)
        except queue.Empty:
            started = None
        if isinstance(started, Candidates):
            outcome: Outcome
            try:
                outcome = state.run(started)
            except BaseException as error:
                logger.debug("a round failed", exc_info=True)
                outcome = error
            state.outcomes.put(outcome)
            pause = 0.0 if idle_work else POLL_SECONDS
        else:
            idle_work = started or idle_work
            pause = idle_work() if idle_work else POLL_SECONDS
            if pause is None:
                idle_work, pause = None, POLL_SECONDS
        # Nothing of the mini-batch may stay alive between rounds.
        del started
    if state.at_end is not None:
        state.at_end()


def _unwrap(outcome: Outcome) -> int:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


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
) -> None:
    """Ends a buffer: its worker, its transport, and a save in the background.

    Args:
        worker: of the buffer.
        transport: of the buffer.
        saving: what is saved meanwhile, if anything.
        process: that made the buffer.
        wait_seconds: for the worker.
        patience_seconds: for other ranks, which may still write their files.
    """
    if process != os.getpid():
        return  # in a forked child: worker and transport are the parent's
    has_stopped = worker.stop(wait_seconds)
    if worker.is_calling:  # collected while its own thread runs, maybe in the midst of a save
        transport.interrupt()
        worker.call_at_end(partial(_end, worker, transport, saving, True, patience_seconds))
    else:
        _end(worker, transport, saving, has_stopped, patience_seconds)


def _end(
    worker: Worker,
    transport: Transport,
    saving: Saving,
    has_stopped: bool,
    patience_seconds: float,
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
        if has_stopped:
            transport.close()
        else:  # it still uses the transport
            worker.call_at_end(transport.close)
    saving.finish(patience_seconds)
