"""When a run is saved: every so many steps or minutes, at a task's end, and when asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.ranks.interruption import Agreement, NotedSignals, RunInterruptedError
from ritornello.experiments.training.checkpoints import Checkpoints, RunSnapshot

MINUTES = 10.0
"""Between two checkpoints, where nothing else is said."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run, when, and whether to go on from it.

    There are checkpoints if any of the flags asks for them; see ``is_on``.
    """

    save_every: int | None = None
    """Steps from one checkpoint to the next."""
    save_minutes: float | None = None
    """Minutes from one checkpoint to the next; 10 with --resume or --restarts alone."""
    keep: int = 2
    """Checkpoints that are kept; the older ones are removed."""
    resume: bool = False
    """Go on from the newest checkpoint in --output; begin if there is none yet."""
    restarts: int = 0
    """How often all ranks start again, and go on from the newest checkpoint, when one has died."""
    keep_buffer: Literal["on", "off"] = "on"
    """Whether the buffer is left in --output at the end."""

    @property
    def is_on(self) -> bool:
        """Whether there are checkpoints."""
        by_time = self.save_every is not None or self.save_minutes is not None
        return by_time or self.resume or self.restarts > 0

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: names the flag, its value and the rule.
        """
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"--save-every {self.save_every}: it must be at least 1")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"--save-minutes {self.save_minutes:g}: it must be above 0")
        if self.keep < 1:
            raise ValueError(f"--keep {self.keep}: it must be at least 1")
        if self.restarts < 0:
            raise ValueError(f"--restarts {self.restarts}: it must not be negative")


class Saver:
    """Makes the checkpoints of a run, on all ranks in the same step.

    Args:
        saving: when.
        checkpoints: where.
        ranks: of the run.
        signals: that ask the run to stop.
        flags: with which it goes on then.
    """

    def __init__(
        self,
        saving: CheckpointSettings,
        checkpoints: Checkpoints,
        ranks: Ranks,
        signals: NotedSignals,
        flags: str = "--resume",
    ) -> None:
        minutes = saving.save_minutes
        if minutes is None and saving.save_every is None:
            minutes = MINUTES
        self._every = saving.save_every
        self._seconds = None if minutes is None else 60 * minutes
        self._checkpoints, self._signals, self._flags = checkpoints, signals, flags
        self._agreement = Agreement(ranks)
        self._last = time.monotonic()

    def between_steps(self, count: int, snapshot: Callable[[], RunSnapshot]) -> None:
        """Saves if it is time, or if the run is to stop.

        Args:
            count: of the snapshot.
            snapshot: makes it.

        Raises:
            RunInterruptedError: the run is saved and shall stop.
            CheckpointError: it could not be saved.
        """
        is_due = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        number, is_due = self._agreement.hear(self._signals.number, is_due)
        if number or is_due or (self._every is not None and count % self._every == 0):
            self._save(number, snapshot())

    def at_task_end(self, count: int, snapshot: Callable[[], RunSnapshot]) -> None:
        """Saves. See ``between_steps``."""
        self._save(self._agreement.hear_now(self._signals.number), snapshot())

    def _save(self, number: int, snapshot: RunSnapshot) -> None:
        self._checkpoints.write(snapshot)
        self._last = time.monotonic()
        if number:
            raise RunInterruptedError(
                number, f"saved at {snapshot.where}; goes on with {self._flags}"
            )
