"""What the trainer waits for: its rounds, and what is done between two of them.

An exception out of a signal handler may come at any moment on the trainer's thread, and passes
through: it ends the waiting alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from ritornello.errors import CheckpointError, PeerLostError, RoundError, round_error
from ritornello.records import accelerators
from ritornello.records.coding import Drawn
from ritornello.rounds.round import Rounds
from ritornello.rounds.worker import Errand, Worker
from ritornello.transports.watch import Watch, meet

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How much longer than a peer the trainer waits, so that the error that names the peer is first."""

Result = TypeVar("Result")


class Place(NamedTuple):
    """Where a rank's steps are."""

    num_offers: int
    is_offered: bool
    num_new: int
    num_past: int
    last_round: Errand[int]
    """What the next step gets: how many representatives are staged for it."""
    drawn: Drawn
    """These as they are trained on."""


class Waiting:
    """The trainer's side of the worker.

    Args:
        rounds: what the worker runs.
        worker: that runs them.
        timeout_seconds: how long a round may take.
        watch: over what ranks do together; None for a single one.

    Attributes:
        rounds: what it gets.
        failure: what ended it; raised again by every later step.
        seconds_waited: for rounds.
    """

    def __init__(
        self, rounds: Rounds, worker: Worker, timeout_seconds: float, watch: Watch | None
    ) -> None:
        self.rounds, self._worker, self._watch = rounds, worker, watch
        self._transport, self._timeout_seconds = rounds.transport, timeout_seconds
        self._place = Place(0, False, 0, 0, Errand.ended(0), Drawn())
        self._call: Errand[Any] | None = None  # between two rounds, if it has not ended
        self.failure: RoundError | None = None
        self.seconds_waited = 0.0

    @property
    def num_offers(self) -> int:
        """Mini-batches offered so far."""
        return self._place.num_offers

    @property
    def is_offered(self) -> bool:
        """Whether one was offered since the last draw."""
        return self._place.is_offered

    def settle(self) -> None:
        """Waits for the running round, if any."""
        if self._call is not None:
            self._end_call(self._call)
        if self.failure is not None:
            raise self.failure
        last_round = self._place.last_round
        if not last_round.has_ended:
            if self._worker.is_calling:
                raise RuntimeError(self.here("decode has used the buffer, which waits for it"))
            began = time.perf_counter()
            try:
                in_time = self._worker.finish(last_round, self._timeout_seconds + GRACE_SECONDS)
            finally:
                self.seconds_waited += time.perf_counter() - began
            if not in_time:
                self.failure = self._explain(TimeoutError())
                raise self.failure
        if last_round.error is not None:
            self.failure = self._explain(last_round.error)
            raise self.failure from last_round.error

    def finish(self, wait_seconds: float) -> None:
        """Ends the running round; no error is raised."""
        if self.rounds.among_others is not None:
            self.rounds.among_others.close()
        if self._call is not None and self._worker.finish(self._call, wait_seconds):
            self._call = None
        last_round = self._place.last_round
        if self.failure is not None or (last_round.has_ended and last_round.error is None):
            return
        in_time = self._worker.finish(last_round, wait_seconds)
        error = last_round.error if in_time else TimeoutError()
        if error is not None:
            self.failure = self._explain(error)
            logger.log(
                logging.WARNING if wait_seconds else logging.DEBUG,
                "the last round did not finish: %s",
                self.failure,
            )

    def _explain(self, error: BaseException) -> RoundError:
        """What the trainer sees of an error in the worker."""
        where = self.here(f"round {self.rounds.num_rounds} ({self.rounds.stage})")
        return round_error(error, where, self._timeout_seconds)

    # Between two rounds.

    def between_rounds(self, act: Callable[[], Result]) -> Result:
        """Has the worker do something while no round runs; blocks until it has.

        It is done as a whole: an interrupt ends the waiting alone, and the next step waits for it.
        """
        self.settle()
        device = accelerators.current_device() if accelerators.is_in_use() else None

        @torch.no_grad()
        def as_the_trainer() -> Result:
            if device is not None:
                accelerators.use(device)
            return act()

        self._call = call = Errand(as_the_trainer)
        self._worker.finish(call)
        self._call = None
        return call.result

    def _end_call(self, call: Errand[Any]) -> None:
        """Waits for one that was interrupted."""
        if not self._worker.finish(call):  # it asks itself, as `convert` may
            return
        self._call = None
        if call.error is not None:
            logger.warning("%s", self.here(f"a call failed after an interrupt: {call.error}"))

    def with_peers(self, call: str, act: Callable[[], Result]) -> Result:
        """Has the worker do what all ranks do together, after as many offers; see above.

        Without one of them nothing goes on.
        """

        def act_in_step() -> Result:
            with self.explaining(call):
                meet(self._transport, self._watch, call, self.num_offers, self.is_offered)
                return act()

        return self.between_rounds(act_in_step)

    @contextmanager
    def explaining(self, call: str) -> Iterator[None]:
        """Around what needs other ranks between two rounds."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(self.here(str(error))) from error.__cause__
        except PeerLostError as error:
            self.failure = PeerLostError(self.here(f"{call} failed: {error}"), error.peers)
            raise self.failure from error

    def here(self, message: str) -> str:
        """The message, with the rank where there are several."""
        if self._transport.num_ranks == 1:
            return message
        return f"rank {self._transport.rank}: {message}"

    def with_rank(self, error: Exception, advice: str = "") -> Exception:
        """The error, with advice and, of several ranks, this one; of another type as it is."""
        if type(error) not in (TypeError, ValueError):
            return error
        return type(error)(self.here(str(error) + advice))
