"""What the tests of Hugging Face's Trainer run under torchrun, on two ranks, in one go.

python -m torch.distributed.run --nproc-per-node 2 transformers_ranks.py FOLDER

``FOLDER`` gets the checkpoints, for the test to go on with on one rank.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from language_model import (
    Gradients,
    Recorder,
    arguments,
    by_hand,
    make_buffer,
    sequences,
    tiny_model,
)
from transformers import Trainer

from ritornello.integrations.transformers import Rehearsal

EXAMPLES = Path(__file__).parents[2] / "examples"


class RehearsalTrainer(Recorder, Rehearsal, Trainer):
    pass


def trained(folder: Path, step: int | None = None) -> tuple[Any, Gradients]:
    """A training, from its beginning or from a checkpoint."""
    gradients = Gradients()
    given = arguments(folder, lr_scheduler_type="constant", save_strategy="steps", save_steps=1)
    with make_buffer() as buffer:
        training = RehearsalTrainer(
            tiny_model(), given, train_dataset=sequences(), buffer=buffer, callbacks=[gradients]
        )
        path = None if step is None else str(folder / f"checkpoint-{step}")
        training.train(resume_from_checkpoint=path)
    return training, gradients


def has_the_gradient_of_all_ranks(training: Any, gradients: Gradients) -> None:
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, training.trained)
    steps = [first + second for first, second in zip(*everyone, strict=True)]
    sizes = [[len(batch["labels"]) for batch in step] for step in steps]
    assert sizes[:2] == [[4, 8, 4, 8], [8, 8, 8, 8]]
    _, expected = by_hand(steps, 0.1)
    for ours, theirs in zip(gradients.found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def goes_on_bit_for_bit(whole: Any, folder: Path) -> None:
    rest, _ = trained(folder, step=2)
    assert len(rest.trained) == len(whole.trained) - 2 > 2
    for ours, theirs in zip(rest.trained, whole.trained[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)
    pairs = zip(rest.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def main(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "train_transformers_rehearsal.py"), run_name="__main__")
    whole, gradients = trained(folder)
    has_the_gradient_of_all_ranks(whole, gradients)
    goes_on_bit_for_bit(whole, folder)
    print("all is well on rank", dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
