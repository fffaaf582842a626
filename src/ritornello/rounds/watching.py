"""Notices where a training goes on, and its buffer does not come to it."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ritornello.rounds.arguments import Arguments
from ritornello.rounds.round import Rounds

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


class Training:
    """What a rank's training gets from the buffer. Where that is nothing, it is said, once.

    Args:
        arguments: of the buffer.
        rounds: of the buffer.
        here: gives a message with the rank.

    Attributes:
        num_given: representatives so far.
        optimisers: counts steps without the buffer.
        knows_tasks: whether a task has begun.
        is_rate_set: whether the rate was ever set.
    """

    def __init__(self, arguments: Arguments, rounds: Rounds, here: Callable[[str], str]) -> None:
        self._arguments, self._rounds, self._here = arguments, rounds, here
        self.num_given = 0
        self.optimisers = OptimiserSteps(here(NOT_USED))
        self.knows_tasks = self.is_rate_set = False
        self._num_without = 0  # mini-batches since one had past samples
        self._has_left_out_an_offer = self._has_many_labels = False

    def got(self, num_past: int, num_offers: int, rate: float) -> None:
        """Counts a mini-batch.

        Args:
            num_past: representatives in it.
            num_offers: mini-batches so far.
            rate: of the next one.
        """
        self.optimisers.num_steps = 0
        self.num_given += num_past
        self._num_without = 0 if num_past else self._num_without + 1
        if self._num_without == MANY_STEPS:
            self._say_why_nothing_is_past(rate)
        if num_offers == MANY_STEPS:
            self._say_if_never_measured()

    def _say_why_nothing_is_past(self, rate: float) -> None:
        held, sampling = self._rounds.contents.num_held, self._rounds.sampling
        if not rate and self._arguments.rate_may_change and not self.is_rate_set:
            logger.warning(self._here(NEVER_SET))
        # Of a small fraction many steps in a row get none; and in a first task nothing is earlier.
        if held and rate > 0.1 and not sampling.needs_tasks:
            logger.warning(
                self._here(
                    f"{MANY_STEPS} mini-batches without a past sample, although the buffer holds "
                    f"some: {type(sampling).__name__} draws none (said once)"
                )
            )

    def _say_if_never_measured(self) -> None:
        if self._rounds.sampling.needs_distances and not self._rounds.is_measured:
            logger.warning(self._here(NEVER_MEASURED))

    def check_tasks(self, call: str, num_offers: int) -> None:
        """Where nothing was drawn: whether it is because nobody says when a task begins.

        The very first mini-batch may come before that.

        Raises:
            RuntimeError: it is.
        """
        rounds, sampling = self._rounds, self._rounds.sampling
        if not sampling.needs_tasks or self.knows_tasks or num_offers < 2:
            return
        if rounds.rate and rounds.contents.num_held:
            raise RuntimeError(
                self._here(
                    f"{call}: {type(sampling).__name__} draws what was stored before the running "
                    "task began, and no task has begun, so that nothing would ever be drawn: all "
                    "ranks call buffer.begin_task(name) before the first step of each task, the "
                    "first one too"
                )
            )

    def has_left_out_an_offer(self, call: str) -> None:
        """Says that a step has drawn and offered nothing."""
        if not self._has_left_out_an_offer:
            self._has_left_out_an_offer = True
            logger.warning(
                self._here(
                    f"{call}: no mini-batch was offered since the last draw; the step before "
                    "counts as one that had nothing to offer, as if it had failed (said once)"
                )
            )

    def has_many_labels(self, label: str) -> None:
        """Says that most classes hold nothing.

        Args:
            label: the leaf that is it, as text.
        """
        if self._has_many_labels:
            return
        self._has_many_labels = True
        rounds = self._rounds
        is_counted = rounds.paged_as is None or rounds.num_held == rounds.num_rows
        about = "" if is_counted and rounds.transport.num_ranks == 1 else "about "
        warnings.warn(
            self._here(
                f"label={self._arguments.label!r}, which is {label}, has {about}"
                f"{rounds.selection.excess_labels} distinct values so far, but the buffer has "
                f"{rounds.capacity} slots: it holds one sample of each of some random classes, "
                "and nothing of the others. Often label= names the wrong leaf, such as an index, "
                "an id or a timestamp. If these are classes, raise the capacity; if there are "
                "none, take selection='reservoir'"
            ),
            stacklevel=2,
        )


class OptimiserSteps:
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
        self.watches: list[weakref.ref[OptimiserSteps]] = []


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
