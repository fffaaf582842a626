"""``state_dict`` in torch's distributed checkpoints, with real processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from saved_streams import assert_same, held, joined, run_on
from torch import nn

from ritornello import CheckpointError, RehearsalBuffer
from ritornello.testing import spawn_ranks

NUM_STEPS, NUM_LATER = 30, 6


def make(capacity: int = 97) -> RehearsalBuffer:
    return RehearsalBuffer(capacity, num_representatives=5, num_candidates=4, seed=3)


def save_and_load(rank: int, folder: str) -> Any:
    # torch's own: of its storage, and of the group that it gathers with.
    warnings.filterwarnings("ignore")
    model = nn.Linear(2, 2)
    with make() as buffer:
        run_on(buffer, rank, range(NUM_STEPS))
        state = {"model": model.state_dict(), "buffer": buffer}
        dcp.save(state, checkpoint_id=f"{folder}/blocking")
        saving = dcp.async_save(state, checkpoint_id=f"{folder}/async")
        own = held(buffer)
        wanted = run_on(buffer, rank, range(NUM_STEPS, NUM_STEPS + NUM_LATER))
        getattr(saving, "result", lambda: None)()
    for name in ("blocking", "async"):
        with make() as buffer:
            dcp.load(
                {"model": model.state_dict(), "buffer": buffer}, checkpoint_id=f"{folder}/{name}"
            )
            assert held(buffer) == own
            assert_same(run_on(buffer, rank, range(NUM_STEPS, NUM_STEPS + NUM_LATER)), wanted)
    return own


def load_on_other_ranks(rank: int, folder: str, num_ranks_then: int) -> Any:
    warnings.filterwarnings("ignore")
    template: dict[str, Any] = {"buffer": {f"rank_{i}": () for i in range(num_ranks_then)}}
    dcp.load(template, checkpoint_id=f"{folder}/blocking")
    with make() as buffer:
        buffer.load_state_dict(template["buffer"])
        return held(buffer)


def refuse(rank: int, folder: str) -> str:
    warnings.filterwarnings("ignore")
    with make() as buffer:
        try:
            dcp.load({"buffer": buffer}, checkpoint_id=f"{folder}/blocking")
        except CheckpointError as error:
            return str(error)
    return "loaded"


def test_distributed_checkpoints_save_and_load_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    saved = spawn_ranks(2, save_and_load, folder)
    assert all(isinstance(part, list) for part in saved), saved
    everything = sorted(joined(saved))  # type: ignore[arg-type]
    assert len(everything) == 97
    for num_ranks in (1, 3):
        parts = spawn_ranks(num_ranks, load_on_other_ranks, folder, 2)
        assert all(isinstance(part, list) for part in parts), parts
        assert sorted(joined(parts)) == everything  # type: ignore[arg-type]
    (message,) = spawn_ranks(1, refuse, folder)
    assert "holds only the rank(s) [0] of 2" in str(message)
