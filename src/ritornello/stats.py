"""What a buffer reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BufferStats:
    """What a buffer holds and what it has cost so far. Seconds are wall-clock, of this rank."""

    capacity: int
    """Representatives that the whole buffer can hold."""
    num_held: int
    """Representatives that it holds, over all ranks."""
    held_per_rank: list[int]
    held_per_class: dict[int, int]
    """Label to representatives, in this rank's shard; empty without labels, or if not asked."""
    record_bytes: int
    """Of one representative; 0 before the first mini-batch."""
    shard_bytes: int
    """Memory of this rank's shard."""
    num_rounds: int
    bytes_sent: int
    """Records that other ranks got from this one's shard, sent or read in shared memory."""
    bytes_received: int
    seconds_waited: float
    """What the trainer has waited for rounds."""
    seconds_joining: float
    """What joining mini-batches and representatives has taken on the trainer's thread."""
    seconds_offering: float
    """What copying candidates (and with ``asynchronous=False`` the rounds) has taken there."""
    seconds_per_stage: dict[str, float]
    """Of the worker: admit, plan, exchange, stage."""
