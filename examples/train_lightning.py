"""Training on tasks that arrive one after another, in PyTorch Lightning.

    python examples/train_lightning.py

Lightning starts the second process itself, or joins those of torchrun and srun.
Rehearsal makes this difference:
`diff examples/train_lightning.py examples/train_lightning_rehearsal.py`.
"""

import torch
from digits import digits_model, digits_tasks, print_accuracies
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(LightningModule):
    """A network, its loss and its optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.model = digits_model()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a mini-batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in train_ddp.py."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    seed_everything(0)
    tasks, classifier = digits_tasks(), Classifier()
    for train, _ in tasks:
        loader = DataLoader(train, batch_size=8, shuffle=True, drop_last=True)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=10,
            enable_checkpointing=False,
            **QUIET,
        )
        trainer.fit(classifier, loader)
    if trainer.is_global_zero:
        print_accuracies(classifier.model, tasks)


if __name__ == "__main__":
    main()
