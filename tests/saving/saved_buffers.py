"""Buffers that were saved, and what must come of loading what is left of them.

Whatever a folder holds, ``load`` either refuses it with a ``CheckpointError``, and the buffer is as
it was; or takes it, and the buffer works. ``check_load`` raises for anything else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ritornello import CheckpointError, ClassBalanced, RehearsalBuffer
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch
from ritornello.saving.folder import SavedFolder
from ritornello.saving.state_dict import SavedState
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

CAPACITY = 23


@dataclass(frozen=True)
class Setting:
    """How a buffer was made and filled before it was saved."""

    num_ranks: int = 1
    num_steps: int = 9
    selection: Callable[[], Any] = lambda: "class-balanced"
    between: bool = False
    """Whether it was saved between draw and offer."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def buffer(self, end: Transport, capacity: int = CAPACITY, **others: Any) -> RehearsalBuffer:
        arguments = {"num_representatives": 3, "seed": 5, **self.arguments, **others}
        return RehearsalBuffer(capacity, selection=self.selection(), transport=end, **arguments)


SETTINGS = {
    "class-balanced": Setting(),
    "two ranks": Setting(2, arguments={"sampling": "grasp"}),
    "fixed shares": Setting(selection=lambda: ClassBalanced(5, shares="fixed")),
    "reservoirs of classes": Setting(
        2,
        num_steps=14,
        selection=lambda: "class-balanced-reservoir",
        arguments={"sampling": "class-balanced", "num_candidates": 4},
    ),
    "grasp": Setting(selection=lambda: "grasp", between=True, arguments={"num_draws": 2}),
    "first offered": Setting(2, selection=lambda: "first-offered"),
    "fifo": Setting(selection=lambda: "fifo", num_steps=8),
    "filling": Setting(2, num_steps=1, selection=lambda: "reservoir"),
    "filling fifo": Setting(num_steps=2, selection=lambda: "fifo"),
    "without labels": Setting(selection=lambda: "reservoir", arguments={"label": None}),
    "not begun": Setting(num_steps=0),
}


def mini_batch(rank: int, step: int, num_samples: int = 6) -> tuple[Tensor, Tensor]:
    """Depends on rank and step only; classes appear over time."""
    dice = np.random.default_rng([rank, step])
    labels = dice.integers(min(5, 2 + step // 3), size=num_samples)
    images = torch.from_numpy(dice.random((num_samples, 3), dtype=np.float32))
    return images, torch.from_numpy(labels)


def go_on(buffer: RehearsalBuffer, rank: int, first: int, num_steps: int) -> list[Tensor]:
    """Some steps; all that came back."""
    seen: list[Tensor] = []
    for step in range(first, first + num_steps):
        seen += buffer.update(mini_batch(rank, step))
    return seen


def ends(num_ranks: int) -> list[LocalTransport]:
    return LocalTransport.connect(num_ranks, timeout_seconds=20.0)


def save(folder: Path, setting: Setting, num_steps: int | None = None) -> None:
    """Makes a buffer, runs some steps, and saves it."""

    def rank_main(end: Transport) -> None:
        with setting.buffer(end) as buffer:
            buffer.begin_task("first")
            go_on(buffer, end.rank, 0, setting.num_steps if num_steps is None else num_steps)
            if setting.arguments.get("sampling") == "grasp":
                buffer.measure_distances(lambda batch: batch[0])
            if setting.between:
                buffer.draw()
            buffer.begin_task("second")
            buffer.save(folder)

    run_ranks(ends(setting.num_ranks), rank_main)


# What must come of it.


class Target(NamedTuple):
    """The buffer that shall take it over."""

    has_begun: bool = False
    num_ranks: int | None = None
    """None: as many as were saved."""
    arguments: tuple[tuple[str, Any], ...] = ()


TARGETS = {
    "new": Target(),
    "begun": Target(has_begun=True),
    "smaller": Target(arguments=(("capacity", 9),)),
    "begun and larger": Target(has_begun=True, arguments=(("capacity", 40),)),
    "one rank more": Target(num_ranks=2),
    "class-balanced draws": Target(has_begun=True, arguments=(("sampling", "class-balanced"),)),
}


@cache
def undisturbed(name: str, target: Target, num_ranks: int) -> list[list[Tensor]]:
    """What each rank of such a buffer sees if nothing is loaded."""

    def rank_main(end: Transport) -> list[Tensor]:
        with SETTINGS[name].buffer(end, **dict(target.arguments)) as buffer:
            go_on(buffer, end.rank, 0, 4 * target.has_begun)
            return go_on(buffer, end.rank, 50, 4)

    return run_ranks(ends(num_ranks), rank_main)


def check_load(name: str, target: Target, source: Path | list[Any], scratch: Path) -> str:
    """Loads a folder or a state; what came of it: "refused" or "loaded".

    Raises:
        AssertionError, or whatever was raised: neither came of it, or not on all ranks.
    """
    setting = SETTINGS[name]
    num_ranks = max(setting.num_ranks, target.num_ranks or 0)
    expected = undisturbed(name, target, num_ranks)
    again = scratch / "again"

    def rank_main(end: Transport) -> str:
        with setting.buffer(end, **dict(target.arguments)) as buffer:
            go_on(buffer, end.rank, 0, 4 * target.has_begun)
            try:
                if isinstance(source, Path):
                    buffer.load(source)
                else:
                    buffer.load_state_dict(source[end.rank])
            except CheckpointError as error:
                message = str(error)
                assert len(message) < 2000
                seen = go_on(buffer, end.rank, 50, 4)
                assert len(seen) == len(expected[end.rank])
                assert all(map(torch.equal, seen, expected[end.rank])), "the buffer has changed"
                return "refused"
            use(buffer, end.rank, source, again)
        return "loaded"

    def load_again(end: Transport) -> None:
        with setting.buffer(end, **dict(target.arguments)) as buffer:
            buffer.load(again)

    try:
        (outcome,) = set(run_ranks(ends(num_ranks), rank_main, seconds=30.0))
        if outcome == "loaded":
            run_ranks(ends(num_ranks), load_again)
    finally:
        shutil.rmtree(again, ignore_errors=True)
    return outcome


def use(buffer: RehearsalBuffer, rank: int, source: Path | list[Any], folder: Path) -> None:
    """Everything that one does with a buffer."""
    saved = SavedFolder(source) if isinstance(source, Path) else SavedState(source[rank])
    layout = saved.manifest.layout
    buffer.draw()
    for step in range(6):
        batch = mini_batch(rank, 100 + step)
        if layout is not None and layout.digest != Layout.of(batch).digest:
            batch = zeros_like(layout)
        buffer.offer(batch)
        drawn = buffer.draw()
        assert drawn is None or len(drawn) == buffer.num_draws or buffer.num_draws == 1
    buffer.offer(batch)
    assert sum(buffer.stats().held_per_rank) == len(buffer)
    assert sum(1 for _ in buffer.representatives(4)) >= 0
    buffer.save(folder)


def zeros_like(layout: Layout) -> Batch:
    """A mini-batch of another layout than ours."""
    return layout.rebuild(
        [torch.zeros((6, *each.shape), dtype=each.dtype) for each in layout.fields]
    )


@cache
def saved_once(name: str, scratch: Path) -> Path:
    folder = scratch / name
    save(folder, SETTINGS[name])
    return folder


@cache
def another_save(name: str, scratch: Path) -> Path:
    folder = scratch / "another" / name
    save(folder, SETTINGS[name], SETTINGS[name].num_steps + 1)
    return folder


@cache
def states_of(name: str, scratch: Path) -> list[Any]:
    """The ``state_dict`` of each rank; rank 0 has that of all."""

    def rank_main(end: Transport) -> Any:
        with SETTINGS[name].buffer(end) as buffer:
            buffer.load(saved_once(name, scratch))
            return buffer.state_dict(whole=True)

    return run_ranks(ends(SETTINGS[name].num_ranks), rank_main)
