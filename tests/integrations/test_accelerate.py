from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

import ritornello  # noqa: E402
from ritornello import CheckpointError, ComposedSteps, RehearsalBuffer  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """One process. Accelerate's state is the process's own, and ends with the test."""
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState._shared_state


@pytest.fixture
def buffer() -> Iterator[RehearsalBuffer]:
    with RehearsalBuffer(24, num_representatives=3) as buffer:
        yield buffer


def numbered() -> TensorDataset:
    images = torch.arange(60.0).repeat(4, 1).T.contiguous()
    return TensorDataset(images, torch.arange(60) % 3)


def test_every_part_of_an_accumulated_mini_batch_is_augmented(
    accelerator: Any, buffer: RehearsalBuffer
) -> None:
    model = torch.nn.Linear(4, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimiser, loader = accelerator.prepare(
        model, optimiser, DataLoader(numbered(), batch_size=4)
    )
    sizes, num_steps = [], 0
    for batch in loader:
        images, labels = buffer.update(batch)
        sizes.append(len(images))
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimiser.step()
            num_steps += accelerator.sync_gradients
            optimiser.zero_grad()
    assert sizes == [4] + [7] * 14
    assert num_steps == 8


@pytest.mark.parametrize("one_ahead", [False, True])
def test_the_mask_belongs_to_the_mini_batch_of_the_step(
    accelerator: Any, buffer: RehearsalBuffer, one_ahead: bool
) -> None:
    loader = accelerator.prepare(DataLoader(numbered(), batch_size=16))
    steps = ritornello.rehearse(loader, buffer) if one_ahead else map(buffer.update, loader)
    found = []
    for images, _ in steps:
        assert len(images) == len(buffer.past_mask)
        found.append((int((~buffer.past_mask).sum()), buffer.num_past))
    assert found == [(16, 0), (16, 3), (16, 3), (12, 3)]


def test_a_composition_that_is_wrapped_is_refused(accelerator: Any) -> None:
    steps = ComposedSteps(60, 180, samples_per_step=6)
    loader = accelerator.prepare(DataLoader(numbered(), batch_sampler=steps))
    rest = accelerator.skip_first_batches(loader, 2)
    with RehearsalBuffer(24, num_representatives=0, most_representatives=6) as buffer:
        assert len(next(ritornello.rehearse(loader, buffer))[0]) <= 6  # on one process as it was
        with pytest.raises(ValueError, match="SkipBatchSampler around ComposedSteps"):
            next(ritornello.rehearse(rest, buffer))


def test_a_checkpoint_holds_the_buffer(
    accelerator: Any, buffer: RehearsalBuffer, tmp_path: Path
) -> None:
    accelerator.register_for_checkpointing(buffer.whole)
    for batch in accelerator.prepare(DataLoader(numbered(), batch_size=4)):
        buffer.update(batch)
    accelerator.save_state(str(tmp_path))
    expected = buffer.draw()
    accelerator.load_state(str(tmp_path))
    found = buffer.draw()
    assert expected is not None
    assert torch.equal(found[0], expected[0])
    torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_and_on_one(accelerator: Any, buffer: RehearsalBuffer, tmp_path: Path) -> None:
    """The example, and states that two ranks have saved, loaded on two and on one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("accelerate_ranks.py")
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    [average] = re.findall(r"average: ([\d.]+) %", ran.stdout)
    assert float(average) > 80.0
    assert ran.stdout.count("all is well on rank") == 2

    accelerator.register_for_checkpointing(buffer.whole)
    accelerator.load_state(str(tmp_path / "inside"))
    num_held = len(buffer)
    assert num_held > 0
    buffer.load(tmp_path / "beside" / "buffer")
    assert len(buffer) == num_held
    # What registering the buffer itself would have kept: rank 0's part.
    state = torch.load(tmp_path / "inside" / "custom_checkpoint_0.pkl", weights_only=True)
    with pytest.raises(CheckpointError, match=r"Let all ranks call state_dict\(whole=True\)"):
        buffer.load_state_dict({"rank_0": state["rank_0"]})
