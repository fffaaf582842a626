"""Buffers that earlier code has saved, in ``earlier/``, and what must come of loading them.

They were made by the last commit that had ``rounds_per_exchange``::

    PYTHONPATH=EARLIER/src python tests/saving/earlier_saves.py tests/saving/earlier

What comes of loading them on two or three ranks was recorded once more when shards with more classes
than slots, and what other ranks take over of the past, had got new laws.

Only public names are used here, so that any release can make such saves.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ritornello import RehearsalBuffer
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

CAPACITY = 12
NUM_RANKS = (1, 2, 3)
"""They are loaded on as many."""

NUM_UPDATES = 6


@dataclass(frozen=True)
class Earlier:
    """How a buffer was made and filled before it was saved."""

    num_ranks: int
    arguments: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 9
    is_nested: bool = False
    steps_per_round: int = 1
    """The ``rounds_per_exchange`` of then, with which candidates could wait for their round."""

    def buffer(self, end: Transport, **others: Any) -> RehearsalBuffer:
        arguments = {"num_representatives": 2, "seed": 5, **self.arguments, **others}
        return RehearsalBuffer(CAPACITY, transport=end, **arguments)

    def mini_batch(self, rank: int, step: int) -> Any:
        """Samples that all differ; classes appear over time. No random numbers."""
        numbers = step * 100 + rank * 10 + torch.arange(4)
        values = numbers[:, None] + torch.tensor([0.0, 0.25, 0.5])
        if self.is_nested:
            return {"meta": {"id": numbers}, "values": [values, numbers.to(torch.uint8)]}
        return values, numbers * 7 % min(5, 2 + step // 3)

    def update(self, buffer: RehearsalBuffer, rank: int, first: int, num_steps: int) -> list[Any]:
        """Some steps; the augmented mini-batches."""
        steps = range(first, first + num_steps)
        return [buffer.update(self.mini_batch(rank, step)) for step in steps]


EARLIER = {
    "class-balanced": Earlier(2),
    "per-class-random": Earlier(1, {"selection": "per-class-random", "num_candidates": 2}),
    "reservoirs-of-classes": Earlier(
        3, {"selection": "class-balanced-reservoir", "sampling": "class-balanced"}
    ),
    "grasp": Earlier(2, {"selection": "grasp", "sampling": "grasp"}),
    "fifo": Earlier(1, {"selection": "fifo"}),
    "nested-without-labels": Earlier(2, {"selection": "reservoir", "label": None}, is_nested=True),
    "two-draws": Earlier(3, {"num_draws": 2}),
    "filling": Earlier(3, num_steps=1),
    "candidates-wait": Earlier(2, {"selection": "fifo"}, num_steps=8, steps_per_round=3),
    "no-candidates-wait": Earlier(2, steps_per_round=3),
}


def embed(batch: Any) -> Tensor:
    """Features of samples, for distances."""
    features: Tensor = batch[0] % 7
    return features


def load_and_go_on(
    name: str, folder: Path, num_ranks: int
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Each rank's representatives after a load, and what its next updates give."""
    earlier = EARLIER[name]

    def rank_main(end: Transport) -> tuple[list[Any], list[Any]]:
        with earlier.buffer(end) as buffer:
            buffer.load(folder)
            held = list(buffer.representatives())
            return held, earlier.update(buffer, end.rank, 50, NUM_UPDATES)

    held, updates = zip(*run_ranks(LocalTransport.connect(num_ranks), rank_main), strict=True)
    return list(held), list(updates)


def leaves_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a nested batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for each in batch.values() if isinstance(batch, dict) else batch:
            yield from leaves_of(each)


def digest_of(batches: list[Any]) -> str:
    """Of all bytes."""
    content = b"".join(leaf.numpy().tobytes() for leaf in leaves_of(batches))
    return hashlib.sha256(content).hexdigest()


def digest_of_streams() -> str:
    """Of what NumPy's random streams give, which a later NumPy may change (NEP 19)."""
    generator = np.random.Generator(np.random.Philox(key=5))
    found = [
        generator.random(20),
        generator.integers(np.arange(1, 50)),
        generator.permutation(50),
        generator.choice(100, 12, replace=False),
        generator.choice(100, 80, replace=False),
    ]
    return hashlib.sha256(b"".join(each.tobytes() for each in found)).hexdigest()


def record(name: str, folder: Path) -> dict[str, Any]:
    """Saves a buffer, and says what comes of loading it."""
    earlier = EARLIER[name]
    arguments = {}
    if earlier.steps_per_round > 1:
        arguments["rounds_per_exchange"] = earlier.steps_per_round

    def rank_main(end: Transport) -> None:
        with earlier.buffer(end, **arguments) as buffer:
            buffer.begin_task("first")
            earlier.update(buffer, end.rank, 0, earlier.num_steps)
            if earlier.arguments.get("sampling") == "grasp":
                buffer.measure_distances(embed)
            buffer.begin_task("second")
            buffer.save(folder)

    run_ranks(LocalTransport.connect(earlier.num_ranks), rank_main)
    (folder / ".lock").unlink()
    outcomes = {n: load_and_go_on(name, folder, n) for n in NUM_RANKS}
    (folder / ".lock").unlink(missing_ok=True)
    return {
        "representatives": {n: [*map(digest_of, held)] for n, (held, _) in outcomes.items()},
        "updates": {n: [*map(digest_of, updates)] for n, (_, updates) in outcomes.items()},
    }


def main(target: Path) -> None:
    """Records all."""
    expected = {name: record(name, target / name) for name in EARLIER}
    content = {"numpy_streams": digest_of_streams(), "saves": expected}
    (target / "expected.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
