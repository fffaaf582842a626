"""Notes that ranks leave for each other, beside the messages of a transport.

Messages serve ranks that do the same. Where one waits in ``save`` and another in a round, each for
a message that the other will never send, a note tells: it is there for whoever looks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from datetime import timedelta
from typing import Any

STORE_SECONDS = 5.0
"""How long a store may take to answer. It is as near as the launcher, or it is gone."""


class Board(ABC):
    """Where all ranks of a buffer leave notes, and read those of others. Never waits for long."""

    @abstractmethod
    def post(self, subject: str, note: str) -> None:
        """Leaves a note, in place of the last one on that subject, whoever's it was."""

    @abstractmethod
    def read(self, subject: str) -> str | None:
        """The last note on a subject; None if there is none, or the board is out of reach."""


class RoomBoard(Board):
    """For ranks that are threads of one process."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def post(self, subject: str, note: str) -> None:
        """See ``Board.post``."""
        self._notes[subject] = note

    def read(self, subject: str) -> str | None:
        """See ``Board.read``."""
        return self._notes.get(subject)


class StoreBoard(Board):
    """In a store of ``torch.distributed``.

    Args:
        store: that all ranks have, for this buffer alone. A connection of its own is made to it, as
            who waits in a store lets nobody else use the connection meanwhile.
    """

    def __init__(self, store: Any) -> None:
        if hasattr(store, "clone"):  # newer PyTorch
            store = store.clone()
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._store = store

    def post(self, subject: str, note: str) -> None:
        """See ``Board.post``."""
        with suppress(RuntimeError):  # who holds the store may have ended
            self._store.set(subject, note)

    def read(self, subject: str) -> str | None:
        """See ``Board.read``."""
        with suppress(RuntimeError):
            if self._store.check([subject]):
                note: bytes = self._store.get(subject)
                return note.decode()
        return None
