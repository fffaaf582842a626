"""What the buffer takes of the trainer's thread, part by part, hot and beside training steps.

Three ways take turns, of some steps each: training with plain copies in place of a buffer, with
``update``, and with ``rehearse``. So a busy moment of the machine hits all of them, and no turn
without the buffer is long enough to look like a training that has lost it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import numpy as np

from ritornello.arrays import Floats
from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.speed.training_step import seconds_of, training_step
from ritornello.experiments.speed.workloads import (
    PlainUpdate,
    Workload,
    barrier,
    everybodys,
    filled_buffer,
    num_ranks,
)
from ritornello.loaders.prefetch import rehearse
from ritornello.records.nesting import Batch
from ritornello.rounds.watching import MANY_STEPS

NUM_TURNS = 16
FEWEST_STEPS, MOST_STEPS = 5, MANY_STEPS // 2
"""In a turn."""

PARTS = ("joining", "copying", "waiting", "round", "handing_over")

COPIES = PARTS[:2]
"""Parts that are copies, and so have a floor."""

Quartiles = tuple[float, float, float]
"""The lower quartile, the median and the upper quartile."""

Turns = dict[str, list[float]]
"""By what was measured: for each turn the mean of its steps."""


def quartiles(values: Sequence[float] | Floats) -> Quartiles:
    """Those of some values."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


@dataclass
class UpdateTimes:
    """What ``update`` takes of the trainer's thread, with no training between.

    Seconds per step, on the slowest rank: quartiles over turns of the means in each turn. At a
    turn's end the last round is waited for, too.
    """

    workload: str
    transport: str
    num_ranks: int
    num_turns: int
    num_steps: int
    """In each turn."""
    update_seconds: Quartiles
    part_seconds: dict[str, Quartiles]
    """``update_seconds`` in parts: joining, copying (the candidates), waiting (for the round),
    round (where the trainer runs it itself), handing_over (all that is left)."""
    floor_seconds: dict[str, Quartiles]
    """Plain copies of the same bytes, at the same place in turns of their own: joining, copying."""


@dataclass
class Beside(UpdateTimes):
    """The same beside a training step, and what the step pays."""

    wished_seconds: float
    """That the step was to last."""
    alone_seconds: Quartiles
    """The training step where plain copies take the place of the buffer, without these."""
    step_seconds: Quartiles
    """The same step beside rounds, without ``update``."""
    rehearse_seconds: Quartiles
    """What ``rehearse`` keeps the trainer's thread, joining included."""
    exposed_share: Quartiles
    """``update`` without its joining, as a part of the step alone."""
    hidden_seconds: Quartiles
    """The part of the round during which the step runs."""
    slower: Quartiles
    """``step_seconds`` / ``alone_seconds`` - 1."""
    slower_with_update: Quartiles
    """Step and ``update`` together, against step alone and plain join together; less 1."""
    slower_with_rehearse: Quartiles
    """Step and ``rehearse`` together, likewise."""


Times = TypeVar("Times", bound=UpdateTimes)


def measure_update(workload: Workload, transport: str, num_rounds: int) -> UpdateTimes:
    """Times ``update`` with no training between, part by part.

    Args:
        workload: sizes.
        transport: by its name.
        num_rounds: in all, about.
    """
    batch, num_steps = workload.batch(), _num_steps(num_rounds)
    plain, turns = PlainUpdate(workload), Turns()
    with filled_buffer(workload, transport) as buffer:
        for _ in range(NUM_TURNS):
            _note(turns, _plain_turn(plain, num_steps, lambda: None))
            _note(turns, _update_turn(buffer, batch, num_steps, lambda: None))
    return _slowest(UpdateTimes(**_about(workload, transport, num_steps, turns)))


def measure_beside(
    workload: Workload, transport: str, step_milliseconds: float, seconds: float
) -> Beside:
    """Times a real training step with and without the buffer.

    Args:
        workload: sizes.
        transport: by its name.
        step_milliseconds: how long the step shall take, alone.
        seconds: how long to measure, about, for each of the three ways.
    """
    batch, num_steps = workload.batch(), _num_steps(1e3 * seconds / step_milliseconds)
    train = training_step(step_milliseconds / 1e3)
    plain, turns = PlainUpdate(workload), Turns()
    with filled_buffer(workload, transport) as buffer:
        for _ in range(NUM_TURNS):
            _note(turns, _plain_turn(plain, num_steps, train))
            _note(turns, _update_turn(buffer, batch, num_steps, train))
            _note(turns, _rehearse_turn(buffer, batch, num_steps, train))
    of = {name: np.array(values) for name, values in turns.items()}
    without = of["alone"] + of["plain joining"]
    mine = Beside(
        **_about(workload, transport, num_steps, turns),
        wished_seconds=step_milliseconds / 1e3,
        alone_seconds=quartiles(turns["alone"]),
        step_seconds=quartiles(turns["step"]),
        rehearse_seconds=quartiles(turns["rehearse"]),
        exposed_share=quartiles((of["update"] - of["joining"]) / of["alone"]),
        hidden_seconds=quartiles(turns["hidden"]),
        slower=quartiles(of["step"] / of["alone"] - 1),
        slower_with_update=quartiles((of["step"] + of["update"]) / without - 1),
        slower_with_rehearse=quartiles((of["step with rehearse"] + of["rehearse"]) / without - 1),
    )
    return _slowest(mine)


def _num_steps(num_in_all: float) -> int:
    return min(MOST_STEPS, max(FEWEST_STEPS, int(num_in_all / NUM_TURNS)))


def _plain_turn(plain: PlainUpdate, num_steps: int, train: Callable[[], None]) -> dict[str, float]:
    """Plain copies where the buffer's would be."""
    barrier()
    seconds = [
        (seconds_of(plain.join), seconds_of(plain.copy), seconds_of(train))
        for _ in range(num_steps)
    ]
    joining, copying, alone = np.mean(seconds, axis=0).tolist()
    return {"plain joining": joining, "plain copying": copying, "alone": alone}


def _update_turn(
    buffer: RehearsalBuffer, batch: Batch, num_steps: int, train: Callable[[], None]
) -> dict[str, float]:
    barrier()
    before = buffer.stats(per_class=False)
    updates = steps = 0.0
    for _ in range(num_steps):
        began = time.perf_counter()
        joined = buffer.update(batch)
        updates += time.perf_counter() - began
        steps += seconds_of(train)
        del joined  # freeing it is no part of the buffer's work
    updates += seconds_of(buffer.__len__)  # waits for the last round, as the next step would
    spent = buffer.stats(per_class=False).since(before)
    parts = {
        "joining": spent.seconds_joining,
        "copying": spent.seconds_copying,
        "waiting": spent.seconds_waited,
        "round": spent.seconds_here,
    }
    parts["handing_over"] = updates - sum(parts.values())
    rounds = sum(spent.seconds_per_stage.values())
    hidden = max(0.0, rounds - spent.seconds_waited - spent.seconds_here)
    totals = parts | {"update": updates, "step": steps, "hidden": hidden}
    return {name: total / num_steps for name, total in totals.items()}


def _rehearse_turn(
    buffer: RehearsalBuffer, batch: Batch, num_steps: int, train: Callable[[], None]
) -> dict[str, float]:
    barrier()
    loop = rehearse(repeat(batch, num_steps + 1), buffer)
    next(loop)  # nobody has prepared the first one
    train()
    kept = steps = 0.0
    for _ in range(num_steps):
        began = time.perf_counter()
        joined = next(loop)
        kept += time.perf_counter() - began
        steps += seconds_of(train)
        del joined
    loop.close()
    return {"rehearse": kept / num_steps, "step with rehearse": steps / num_steps}


def _note(turns: Turns, turn: dict[str, float]) -> None:
    for name, value in turn.items():
        turns.setdefault(name, []).append(value)


def _about(workload: Workload, transport: str, num_steps: int, turns: Turns) -> dict[str, Any]:
    """The fields of ``UpdateTimes``."""
    return {
        "workload": workload.name,
        "transport": transport,
        "num_ranks": num_ranks(),
        "num_turns": NUM_TURNS,
        "num_steps": num_steps,
        "update_seconds": quartiles(turns["update"]),
        "part_seconds": {part: quartiles(turns[part]) for part in PARTS},
        "floor_seconds": {part: quartiles(turns[f"plain {part}"]) for part in COPIES},
    }


def _slowest(mine: Times) -> Times:
    """What the rank has measured whose ``update`` takes longest."""
    slowest: Times = max(everybodys(mine), key=lambda each: each.update_seconds[1])
    return slowest
