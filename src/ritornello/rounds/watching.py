"""Notices where a training goes on, and its buffer does not come to it."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

logger = logging.getLogger(__name__)

MANY_STEPS = 100
"""So many without the past are no mere pause."""

NOT_USED = (
    f"{MANY_STEPS} steps of an optimiser since the training last got something from the rehearsal "
    "buffer: its mini-batches do not come through update, draw or rehearse, so that it trains on "
    "new samples alone. Has a trainer made its loader anew, as some do to resume? Does it call "
    "what should augment? close() the buffer where this is meant (said once)"
)

NEVER_SET = (
    f"{MANY_STEPS} mini-batches without a past sample: num_representatives is 0 and was never set, "
    "although most_representatives lets it be; with ComposedSteps set it in each step, as rehearse "
    "and Lightning's callback do (said once)"
)

NEVER_MEASURED = (
    f"{MANY_STEPS} mini-batches, and no distances to go by: the sampling policy takes all samples "
    "of a class for equally typical until buffer.measure_distances is called, before each epoch "
    "(said once)"
)


def nothing_drawn(policy: str) -> str:
    """What is said of a sampling policy that never draws."""
    return (
        f"{MANY_STEPS} mini-batches without a past sample, although the buffer holds some: "
        f"{policy} draws none (said once)"
    )


class TrainingWatch:
    """Counts the steps that the optimisers of this thread make without the buffer.

    Args:
        message: to be logged once there are ``MANY_STEPS``.

    Attributes:
        num_steps: so far; set to 0 whenever the training gets something from the buffer.
    """

    def __init__(self, message: str) -> None:
        self.num_steps = 0
        self._message: str | None = message
        _of_this_thread.watches = [each for each in _of_this_thread.watches if each() is not None]
        _of_this_thread.watches.append(weakref.ref(self))
        _count_from_now_on()

    def close(self) -> None:
        """Says nothing any more."""
        self._message = None

    def count(self) -> None:
        """Counts one more."""
        self.num_steps += 1
        if self.num_steps >= MANY_STEPS and self._message is not None:
            logger.warning(self._message)
            self._message = None


class _Watches(threading.local):
    """Those of one thread: ranks may be threads of one process."""

    def __init__(self) -> None:
        self.watches: list[weakref.ref[TrainingWatch]] = []


_of_this_thread = _Watches()
_counting = threading.Lock()  # held from the first watch on


def _count_from_now_on() -> None:
    # One hook for all, which stays: optimisers may be about to call it when a buffer is collected.
    if _counting.acquire(blocking=False):
        register_optimizer_step_post_hook(_count)


def _count(*_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for each in _of_this_thread.watches:
        watch = each()
        if watch is not None:
            watch.count()
