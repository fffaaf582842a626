"""Notices that ranks have parted: one is in a call for all of them, and another went on without it.

Both would wait for each other, until the timeout. So who comes to such a call leaves a note of it,
and who has waited for a while looks whether there is one that it has passed by.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from ritornello.errors import PartedError, PeerLostError
from ritornello.transports.agreement import check_in_step
from ritornello.transports.base import Transport

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often one who waits looks for notes."""

IDLE_LOOKS = 10
"""Who does not wait, or for long, looks so many times less often. (Its trainer may wait.)"""

PATIENCE_SECONDS = 0.3
"""How long others wait for the watch to leave a note, or to look whether one explains an error;
it is less than the trainer waits longer than its worker."""

WARN_SECONDS = 10.0
"""After which a call that still waits for other ranks says so."""

CALL, PARTED = "call", "parted"
"""What notes are about: the last call that some rank came to; and that ranks have parted."""


class Watch:
    """Watches over what this rank does together with the others; for several ranks.

    Rounds run in it, and ``meeting`` is around each call, on the thread that waits there. A thread
    of its own looks for notes meanwhile, and interrupts the transport if ranks have parted.

    Args:
        transport: to the other ranks.
        run: a round.
    """

    def __init__(self, transport: Transport, run: Callable[[Any], int]) -> None:
        self._transport, self._run = transport, run
        self._num_calls = self._num_rounds = 0
        self._waits_in: str | None = None  # a call, or "" for a round
        self._waits_since = 0.0
        self._has_warned = False
        self._parted: PartedError | None = None
        # Only this thread uses the board: where the network is cut, it may wait there for long.
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_look_on,
            args=(self, self._asked),
            name=f"ritornello-watch-rank-{transport.rank}",
            daemon=True,
        )
        self._thread.start()

    def run(self, candidates: Any) -> int:
        """A round, watched over."""
        self._num_rounds += 1
        with self._waiting(""):
            return self._run(candidates)

    @contextmanager
    def meeting(self, call: str) -> Iterator[None]:
        """Around the wait for all ranks to come to a call; tells them that this one has.

        Raises:
            PartedError: ranks have parted.
        """
        self._num_calls += 1
        board = self._transport.board
        if board is not None:
            note = json.dumps([self._transport.rank, call, self._num_calls, self._num_rounds])
            self._ask(partial(board.post, CALL, note))
        with self._waiting(call):
            yield

    @contextmanager
    def _waiting(self, call: str) -> Iterator[None]:
        if self._parted is not None:
            raise self._parted
        self._waits_since, self._has_warned = time.monotonic(), False
        self._waits_in = call
        try:
            yield
        except PartedError:  # which their messages have told
            raise
        except Exception as error:
            self._ask(self._look)
            if self._parted is not None:
                raise self._parted from error
            raise
        finally:
            self._waits_in = None

    def _ask(self, do: Callable[[], None]) -> None:
        """Has something done on the watch's thread; does not wait for it for long."""
        done = threading.Event()
        self._asked.put(do)
        self._asked.put(done.set)
        done.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """Ends the watch."""
        self._asked.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_SECONDS)

    def look(self, is_due: bool) -> None:
        """Looks for notes, unless this rank does not wait, or for so long that it can be patient.

        Args:
            is_due: look in any case.
        """
        call = self._waits_in
        if not is_due and (call is None or self._waited > WARN_SECONDS):
            return
        self._look()
        if call is None or self._waits_in != call:
            return
        if self._parted is not None:
            self._transport.interrupt()
        elif call and not self._has_warned and self._waited > WARN_SECONDS:
            self._has_warned = True
            logger.warning(
                "rank %d: %s has waited %.0f s for the other ranks: all ranks must call it",
                self._transport.rank,
                call,
                self._waited,
            )

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._waits_since

    def _look(self) -> None:
        board = self._transport.board
        if board is None or self._parted is not None:
            return
        parted = board.read(PARTED)
        if parted is None and (note := board.read(CALL)) is not None:
            caller, call, num_calls, num_rounds = json.loads(note)
            # Else this rank was in that call, too, or may yet come to it.
            if num_calls > self._num_calls and num_rounds < self._num_rounds:
                parted = json.dumps([caller, call, self._transport.rank])
                board.post(PARTED, parted)
        if parted is not None:
            caller, call, other = json.loads(parted)
            self._parted = PartedError(
                f"rank(s) [{caller}] are in {call}, and rank(s) [{other}] are in a round: all "
                f"ranks must call {call}, after as many updates",
                tuple(rank for rank in (caller, other) if rank != self._transport.rank),
            )


def meet(
    transport: Transport, watch: Watch | None, call: str, num_offers: int, is_offered: bool
) -> None:
    """Waits until all ranks have come to a call.

    Args:
        transport: to the other ranks.
        watch: over them; None for a single rank.
        call: of all ranks.
        num_offers: of this rank so far.
        is_offered: whether one has not been drawn.

    Raises:
        CheckpointError: on every rank: they are not in step.
        PeerLostError: not all came; says that all must.
    """
    with nullcontext() if watch is None else watch.meeting(call):
        try:
            check_in_step(transport, call, num_offers, is_offered)
        except PartedError:
            raise
        except PeerLostError as error:
            raise PeerLostError(
                f"{error}. All ranks must call {call}, after as many updates", error.peers
            ) from error


def _look_on(watch: Watch, asked: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """The thread's whole life."""
    num_looks = 0
    while True:
        try:
            do = asked.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            num_looks += 1
            watch.look(is_due=num_looks % IDLE_LOOKS == 0)
            continue
        if do is None:
            return
        do()
