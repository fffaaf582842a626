"""Being asked to stop: signals that are noted, and how the ranks agree on the step to stop at."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from ritornello.experiments.ranks.group import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job."""

PERIOD_SECONDS = 0.5
"""How often the ranks hear of each other, about."""

MAX_STEPS = 1000
"""Between two such times, however fast the steps are."""


class RunInterruptedError(RuntimeError):
    """A run was asked to stop, and can go on later.

    Args:
        number: of the signal.
        what_happened: for the user, after the signal's name.
    """

    def __init__(self, number: int, what_happened: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}: {what_happened}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status: 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number


class NotedSignals:
    """A context in which ``SIGNALS`` do not end the process, but are noted.

    Outside of the main thread, where Python allows no such thing, it does nothing.

    Attributes:
        number: of the first signal that came; 0 while there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, action in self._before.items():
            signal.signal(each, action)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


class Agreement:
    """Notes of single ranks that all ranks hear in the same step.

    A collective in every step would cost as much as a short step. So every so many steps, about
    twice a second, one starts in the background, and its outcome is heard when the next one
    starts: every rank has made as many steps by then, and none has waited. How many steps that
    is, is part of the outcome.

    Args:
        ranks: which agree.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: Callable[[], list[int]] | None = None
        self._num_steps = self._steps_left = 1
        self._began = time.perf_counter()

    def hear(self, signal_number: int, is_due: bool) -> tuple[int, bool]:
        """To be called by every rank in every step.

        Args:
            signal_number: of a signal that this rank got; 0: none.
            is_due: whether it is time for a checkpoint, by this rank's clock.

        Returns:
            The same on every rank: what some rank has said before.
        """
        if self._ranks.num_ranks == 1:
            return signal_number, is_due
        self._steps_left -= 1
        if self._steps_left:
            return 0, False
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        wanted = int(self._num_steps * PERIOD_SECONDS / max(seconds, 1e-6))
        wanted = max(1, min(wanted, 2 * self._num_steps, MAX_STEPS))
        heard = self._outcome()
        self._pending = self._ranks.start_maximum([signal_number, is_due, wanted])
        return heard

    def hear_now(self, signal_number: int) -> int:
        """As ``hear``, but waits for all ranks: the signal that some rank has got by now."""
        before, _ = self._outcome()
        return max(before, self._ranks.start_maximum([signal_number])()[0])

    def _outcome(self) -> tuple[int, bool]:
        number = is_due = 0
        if self._pending is not None:
            number, is_due, self._num_steps = self._pending()
            self._pending = None
        self._steps_left = self._num_steps
        return number, bool(is_due)
