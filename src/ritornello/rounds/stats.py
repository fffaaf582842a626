"""What a buffer reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from ritornello.rounds.round import Rounds
from ritornello.rounds.steps import Steps

MILLI, MEGA = 1e3, 1e-6


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
    """Bytes of one representative, without what is in pages; 0 before the first mini-batch."""
    shard_bytes: int
    """Memory of this rank's shard, all its pages included."""
    num_rounds: int
    num_given: int
    """Representatives that this rank's trainer has got."""
    num_steps_without: int
    """Steps of optimisers since it last got something from the buffer. In a training whose
    mini-batches come through the buffer there are none, or as many as optimisers in a step."""
    bytes_sent: int
    """Records that other ranks got from this one's shard, sent or read in shared memory."""
    bytes_received: int
    seconds_waited: float
    """What the trainer has waited for rounds."""
    seconds_joining: float
    """What joining mini-batches and representatives has taken on the trainer's thread."""
    seconds_offering: float
    """What all else has taken there: checking mini-batches, copying candidates, starting rounds.
    With ``asynchronous=False``, and where the trainer runs a round itself, the rounds, too."""
    seconds_per_stage: dict[str, float]
    """Seconds of the rounds: admit, plan, exchange, stage."""
    used_bytes: int = 0
    """How much of ``shard_bytes`` is in use: rows, and pages with their places in the table."""
    num_protected: int = 0
    """Protected representatives in this rank's shard; see ``RehearsalBuffer.protect``."""
    num_distinct: int | None = None
    """Distinct samples in this rank's shard, by ``identity=``; without it those whose bytes differ,
    if asked, else None."""
    num_rounds_here: int = 0
    """Rounds that the trainer ran itself: where steps are too short to hide one."""
    seconds_here: float = 0.0
    """That these took, which are a part of ``seconds_offering``."""
    seconds_copying: float = 0.0
    """What choosing and copying candidates took, which is a part of ``seconds_offering``."""

    @classmethod
    def of(cls, steps: Steps, *, per_class: bool, distinct: bool) -> Self:
        """Those of a buffer. Waits for the running round.

        Args:
            steps: of the buffer.
            per_class: whether to count classes.
            distinct: whether to count distinct samples where nothing identifies them.
        """
        steps.settle()
        rounds, begun = steps.rounds, steps.begun
        record_bytes = begun.layout.record_bytes if begun else 0
        labels = rounds.labels() if per_class else np.zeros(0, dtype=np.int64)
        labels, counts = np.unique(labels, return_counts=True)
        shard_bytes, used_bytes = _bytes_of(rounds, record_bytes)
        return cls(
            capacity=rounds.capacity,
            num_held=rounds.contents.num_held,
            held_per_rank=rounds.contents.sizes.tolist(),
            held_per_class=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
            record_bytes=record_bytes,
            shard_bytes=shard_bytes,
            used_bytes=used_bytes,
            num_rounds=rounds.num_rounds,
            num_given=steps.training.num_given,
            num_steps_without=steps.training.optimisers.num_steps,
            bytes_sent=rounds.bytes_sent,
            bytes_received=rounds.bytes_received,
            seconds_waited=steps.seconds_waited,
            seconds_joining=steps.outputs.seconds,
            seconds_offering=steps.seconds_offering,
            seconds_per_stage=dict(rounds.seconds_per_stage),
            num_protected=rounds.selection.num_protected,
            num_distinct=rounds.num_distinct(distinct),
            num_rounds_here=steps.num_rounds_here,
            seconds_here=steps.seconds_here,
            seconds_copying=steps.seconds_copying,
        )

    @property
    def seconds_exposed(self) -> float:
        """What the buffer has taken of the trainer's thread: waiting, joining, offering."""
        return self.seconds_waited + self.seconds_joining + self.seconds_offering

    def since(self, earlier: BufferStats) -> Self:
        """What it holds now, and what it has cost since ``earlier``.

        Args:
            earlier: of the same buffer. After a ``load`` take new ones: ``num_rounds`` is then that
                of the saved buffer, while representatives given, rounds here, seconds and bytes go
                on from what this one has done.

        Raises:
            ValueError: it has more rounds than these: another buffer's, or from before a ``load``.
        """
        if earlier.num_rounds > self.num_rounds:
            raise ValueError(
                f"since: the earlier stats have {earlier.num_rounds} rounds, these "
                f"{self.num_rounds}; give earlier ones of the same buffer, taken after its last "
                "load"
            )
        return replace(
            self,
            num_rounds=self.num_rounds - earlier.num_rounds,
            num_given=self.num_given - earlier.num_given,
            bytes_sent=self.bytes_sent - earlier.bytes_sent,
            bytes_received=self.bytes_received - earlier.bytes_received,
            seconds_waited=self.seconds_waited - earlier.seconds_waited,
            seconds_joining=self.seconds_joining - earlier.seconds_joining,
            seconds_offering=self.seconds_offering - earlier.seconds_offering,
            seconds_per_stage={
                stage: seconds - earlier.seconds_per_stage.get(stage, 0.0)
                for stage, seconds in self.seconds_per_stage.items()
            },
            num_rounds_here=self.num_rounds_here - earlier.num_rounds_here,
            seconds_here=self.seconds_here - earlier.seconds_here,
            seconds_copying=self.seconds_copying - earlier.seconds_copying,
        )

    def figures(self, prefix: str = "buffer") -> dict[str, float]:
        """Flat names and plain numbers, for any tracker: ``log_dict(buffer.stats().figures())``.

        What the buffer holds now, and the means of one round, so of one step, over the time that
        these stats cover. For curves, and after a ``load``, that is the time since the last ones:
        ``stats.since(last).figures()``. ``buffer.stats()`` waits for the running round, so ask
        every fifty steps or so.

        Args:
            prefix: of all names, with a slash behind it.

        Returns:
            ``held``, ``held_percent`` of the capacity, ``held/class_LABEL`` in this rank's shard,
            ``distinct`` there, where it is known, ``shard_mb``; once there were rounds, or steps
            without, ``steps_without``. Where there were rounds, per round: ``past``, the
            representatives that the trainer got;
            ``exposed_ms`` on the trainer's thread, which is ``waiting_ms`` + ``joining_ms`` +
            ``offering_ms``; ``worker_ms``, what the round took, which is ``admit_ms`` + ``plan_ms``
            + ``exchange_ms`` + ``stage_ms``; ``hidden_ms``, the part of it for which the trainer
            did not wait, and which it did not run itself (with
            ``asynchronous=False``, where ``offering_ms`` includes the rounds: what could be
            hidden); ``sent_mb`` and ``received_mb``.
        """
        found: dict[str, float] = {
            "held": self.num_held,
            "held_percent": 100 * self.num_held / self.capacity,
            "shard_mb": self.shard_bytes * MEGA,
        }
        if self.num_rounds or self.num_steps_without:
            found["steps_without"] = self.num_steps_without
        for label, num_held in self.held_per_class.items():
            found[f"held/class_{label}"] = num_held
        if self.num_distinct is not None:
            found["distinct"] = self.num_distinct
        in_rounds = sum(self.seconds_per_stage.values())
        totals = {
            "past": self.num_given,
            "exposed_ms": self.seconds_exposed * MILLI,
            "hidden_ms": max(0.0, in_rounds - self.seconds_here - self.seconds_waited) * MILLI,
            "waiting_ms": self.seconds_waited * MILLI,
            "joining_ms": self.seconds_joining * MILLI,
            "offering_ms": self.seconds_offering * MILLI,
            "worker_ms": in_rounds * MILLI,
            **{f"{stage}_ms": seconds * MILLI for stage, seconds in self.seconds_per_stage.items()},
            "sent_mb": self.bytes_sent * MEGA,
            "received_mb": self.bytes_received * MEGA,
        }
        if self.num_rounds:
            found |= {name: total / self.num_rounds for name, total in totals.items()}
        return {f"{prefix}/{name}": float(figure) for name, figure in found.items()}


def _bytes_of(rounds: Rounds, record_bytes: int) -> tuple[int, int]:
    """Bytes of a rank's shard, with all its pages, and how many of them are in use."""
    if rounds.shard is None:
        return 0, 0
    whole, used = rounds.shard.num_bytes, rounds.num_held * record_bytes
    if rounds.paged is not None:
        whole += rounds.paged.pages.num_bytes
        used += rounds.paged.num_used_bytes
    return whole, used
