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


class PartedError(PeerLostError):
    """A rank is in a call that all ranks must make, and another one has gone on without it.

    The trainer sees a ``PeerLostError`` with this one as its cause.
    """


class CheckpointError(RuntimeError):
    """A saved buffer cannot be read, is damaged, or does not fit; or one could not be written.

    What was saved before, and the buffer, are as they were.
    """


class BufferClosedError(RuntimeError):
    """The buffer was used after ``close()``."""


def round_error(error: BaseException, where: str, timeout_seconds: float) -> RoundError:
    """What the trainer sees of an error that the worker met.

    Args:
        error: ``TimeoutError`` if the round did not end in time.
        where: which round, and how far it had come.
        timeout_seconds: how long was waited.
    """
    if isinstance(error, TimeoutError):
        return PeerLostError(
            f"{where} has not finished within {timeout_seconds:g} s (timeout_seconds): some rank "
            "is too slow, or takes part in fewer rounds. All ranks must call update equally often"
        )
    if isinstance(error, PartedError):
        return PeerLostError(f"{where} failed: {error}", error.peers)
    if isinstance(error, PeerLostError):
        return PeerLostError(
            f"{where} failed: {error}. It died, is out of reach, waits for another rank itself, or "
            "called update less often than this rank: all ranks must call it equally often",
            error.peers,
        )
    return RoundError(f"{where} failed: {error}")
