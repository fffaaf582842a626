"""What the tests of Lightning and Fabric run under torchrun, on two ranks, in one go.

python -m torch.distributed.run --nproc-per-node 2 lightning_ranks.py FOLDER

Importing Lightning takes seconds, so both examples run here, too. ``FOLDER`` gets the checkpoints,
for the test to go on with on one rank.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ritornello import RehearsalBuffer
from ritornello.integrations.lightning import Rehearsal

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(LightningModule):
    """Remembers the mini-batches that it has trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen: list[tuple[int, Tensor]] = []

    def configure_model(self) -> None:
        """Nothing to cut for tensor parallelism."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, images.clone()))
        return nn.functional.cross_entropy(self.layer(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbered() -> TensorDataset:
    """64 samples of which each is known by its first number."""
    images = torch.arange(64.0).repeat(4, 1).T.contiguous()
    return TensorDataset(images, torch.arange(64) % 3)


def trained(classifier: Classifier, rehearsal: Rehearsal, **arguments: object) -> Trainer:
    loader = DataLoader(numbered(), batch_size=4, shuffle=True)
    path = arguments.pop("ckpt_path", None)
    callbacks = [rehearsal, *arguments.pop("others", [])]
    settings = {"strategy": "ddp", "enable_checkpointing": False, **QUIET, **arguments}
    trainer = Trainer(accelerator="cpu", devices=2, callbacks=callbacks, **settings)
    trainer.fit(classifier, loader, ckpt_path=path, weights_only=True)
    return trainer


def goes_on_from_a_checkpoint(folder: Path) -> None:
    """Two epochs at once, or the second one from a checkpoint: the same mini-batches."""
    torch.manual_seed(0)
    classifier, rehearsal = Classifier(), Rehearsal(24, num_representatives=3, num_candidates=2)
    rehearsal.begin_task("first")
    trained(classifier, rehearsal, max_epochs=2)
    assert rehearsal.buffer.stats().held_per_rank == [12, 12]
    rehearsal.close()

    torch.manual_seed(0)
    halves, rehearsal = Classifier(), Rehearsal(24, num_representatives=3, num_candidates=2)
    rehearsal.begin_task("first")
    saving = trained(halves, rehearsal, max_epochs=1)
    saving.save_checkpoint(folder / "lightning.ckpt")
    rehearsal.close()

    halves, rehearsal = Classifier(), Rehearsal(24, num_representatives=3, num_candidates=2)
    rehearsal.begin_task("first")
    trained(halves, rehearsal, max_epochs=2, ckpt_path=folder / "lightning.ckpt")
    rehearsal.close()
    second = [images for epoch, images in classifier.seen if epoch == 1]
    assert [len(images) for images in second] == [7] * 8
    assert len(halves.seen) == len(second)
    for (epoch, images), expected in zip(halves.seen, second, strict=True):
        assert epoch == 1
        assert torch.equal(images, expected)
    assert torch.equal(halves.layer.weight, classifier.layer.weight)


def saves_when_all_are_told_to_end(folder: Path) -> None:
    """Lightning lets all ranks raise that after SIGTERM; checkpoints may then be saved."""

    class Told(Classifier):
        def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
            if batch_idx == 2:
                raise SIGTERMException

    class Saving(Callback):
        def on_exception(self, trainer: Trainer, *_: object) -> None:
            trainer.save_checkpoint(folder / "told.ckpt")

    rehearsal = Rehearsal(24, num_representatives=3)
    try:
        trained(Told(), rehearsal, max_epochs=1, others=[Saving()])
    except SIGTERMException:
        state = torch.load(folder / "told.ckpt", weights_only=True)["callbacks"]["Rehearsal"]
        assert sorted(state) == ["rank_0", "rank_1"]
    else:
        raise AssertionError("it did not end")
    rehearsal.close()


def shares_no_buffer_with_tensor_parallel_ranks() -> None:
    """Ranks of one tensor-parallel group train on the same mini-batches."""
    torch.manual_seed(0)
    classifier, rehearsal = Classifier(), Rehearsal(24, num_representatives=3)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    trained(classifier, rehearsal, strategy=strategy, max_epochs=1)
    assert len(rehearsal.buffer.stats().held_per_rank) == 1
    rehearsal.close()
    images = torch.cat([images for _, images in classifier.seen])
    everyone = [torch.zeros_like(images) for _ in range(2)]
    dist.all_gather(everyone, images)
    assert torch.equal(*everyone)


def fabric_saves_all_ranks(folder: Path) -> None:
    """One file, written by rank 0, holds the whole buffer."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(numbered(), batch_size=4))
    buffer = RehearsalBuffer(24, num_representatives=3)
    for images, labels in loader:
        buffer.update((images, labels))
    fabric.save(folder / "fabric.ckpt", {"epoch": 1, "buffer": buffer.whole})
    expected = buffer.draw()
    buffer.close()

    buffer = RehearsalBuffer(24, num_representatives=3)
    fabric.load(folder / "fabric.ckpt", {"epoch": 0, "buffer": buffer.whole})
    assert torch.equal(buffer.draw()[0], expected[0])
    buffer.close()


def main(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "train_lightning_rehearsal.py"), run_name="__main__")
    runpy.run_path(str(EXAMPLES / "train_fabric_rehearsal.py"), run_name="__main__")
    goes_on_from_a_checkpoint(folder)
    saves_when_all_are_told_to_end(folder)
    shares_no_buffer_with_tensor_parallel_ranks()
    fabric_saves_all_ranks(folder)
    print("all is well on rank", dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
