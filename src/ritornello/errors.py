"""What can go wrong in a round. Bad arguments are plain ``ValueError`` and ``TypeError``."""

from __future__ import annotations


class RoundError(RuntimeError):
    """A round on the rehearsal buffer failed; the buffer cannot go on.

    Its ``__cause__`` is the error that the worker met.
    """


class PeerLostError(RoundError):
    """Another rank died, stopped, or took part in fewer rounds.

    Attributes:
        peers: the ranks (in the buffer's group) known to be lost; empty where the engine
            below does not tell.
    """

    def __init__(self, message: str, peers: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.peers = peers


class BufferClosedError(RuntimeError):
    """The buffer was used after ``close()``."""
