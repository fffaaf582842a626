"""What the tests of Accelerate run under torchrun, on two ranks, in one go.

python -m torch.distributed.run --nproc-per-node 2 accelerate_ranks.py FOLDER

``FOLDER`` gets the checkpoints, for the test to go on with on one rank.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ritornello import RehearsalBuffer

EXAMPLES = Path(__file__).parents[2] / "examples"


def numbered() -> TensorDataset:
    """60 samples of which each is known by its first number; not as many for each rank and step."""
    images = torch.arange(60.0).repeat(4, 1).T.contiguous()
    return TensorDataset(images, torch.arange(60) % 3)


def buffer_of_two() -> RehearsalBuffer:
    return RehearsalBuffer(24, num_representatives=3, num_candidates=2)


def images_of(accelerator: Accelerator, buffer: RehearsalBuffer, num_skipped: int) -> list[Tensor]:
    """The mini-batches of an epoch, after the first ones."""
    torch.manual_seed(0)
    loader = accelerator.prepare(DataLoader(numbered(), batch_size=4, shuffle=True))
    images = []
    for batch in accelerator.skip_first_batches(loader, num_skipped):
        augmented, _ = buffer.update(batch)
        images.append(augmented.clone())
        if num_skipped == 0 and len(images) == 3:
            accelerator.save_state(str(accelerator.project_dir))
    return images


def goes_on_within_an_epoch(folder: Path) -> None:
    """Saved with the other states or beside them: the rest of the epoch is the same."""
    for name, beside in (("inside", False), ("beside", True)):
        accelerator = Accelerator(cpu=True, project_dir=folder / name)
        accelerator.prepare(nn.Linear(4, 3))
        buffer = buffer_of_two()
        _register(accelerator, buffer, beside)
        expected = images_of(accelerator, buffer, 0)
        assert [len(images) for images in expected] == [4] + [7] * 7
        buffer.close()

        accelerator = Accelerator(cpu=True, project_dir=folder / name)
        accelerator.prepare(nn.Linear(4, 3))
        buffer = buffer_of_two()
        _register(accelerator, buffer, beside)
        accelerator.load_state(str(folder / name))
        found = images_of(accelerator, buffer, 3)
        buffer.close()
        assert len(found) == 5
        for ours, theirs in zip(found, expected[3:], strict=True):
            assert torch.equal(ours, theirs)


def _register(accelerator: Accelerator, buffer: RehearsalBuffer, beside: bool) -> None:
    if not beside:
        accelerator.register_for_checkpointing(buffer.whole)
        return
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: buffer.save(f"{folder}/buffer")
    )
    accelerator.register_load_state_pre_hook(lambda models, folder: buffer.load(f"{folder}/buffer"))


def dispatched_batches_are_augmented() -> None:
    """The first rank reads for all; splits or sends whole mini-batches."""
    for split_batches in (False, True):
        settings = DataLoaderConfiguration(dispatch_batches=True, split_batches=split_batches)
        accelerator = Accelerator(cpu=True, dataloader_config=settings)
        loader = accelerator.prepare(DataLoader(numbered(), batch_size=4))
        with RehearsalBuffer(24, num_representatives=3) as buffer:
            sizes = [len(buffer.update(batch)[0]) for batch in loader]
        assert sizes == ([2] + [5] * 14 if split_batches else [4] + [7] * 6 + [5])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    goes_on_within_an_epoch(folder)
    dispatched_batches_are_augmented()
    print("all is well on rank", dist.get_rank())
    sys.path.insert(0, str(EXAMPLES))
    # Ends the process group, too.
    runpy.run_path(str(EXAMPLES / "train_accelerate_rehearsal.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
