"""Rehearsal in the Trainer of Hugging Face: a mixin for it, and for those that are made of it.

::

    class RehearsalTrainer(Rehearsal, Trainer): ...   # or SFTTrainer, Seq2SeqTrainer, ...

    the Trainer's own              the mixin
    -----------------              ---------
    take one optimiser step's
    mini-batches out of the loader
                                   update: each mini-batch + representatives
    count their tokens
    training_step for each         says which samples are past
    save a checkpoint              saves the buffer in its folder
    resume from it                 loads it

The Trainer counts a step's tokens when it takes its mini-batches, and divides losses by them. So
representatives must be there by then: in ``training_step`` they would be counted in the loss, and
not in what it is divided by. Nothing here imports the framework: a mixin needs no more of it than
the methods whose names it shares.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ritornello.buffer import RehearsalBuffer
from ritornello.records.nesting import Batch
from ritornello.transports.agreement import gather_counts

logger = logging.getLogger(__name__)

FOLDER = "buffer"
"""Where the buffer is in a checkpoint's folder."""

HOOKS = (
    *("get_batch_samples", "training_step"),
    *("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"),
)
"""What the trainer calls, and the mixin is called by."""

OF_PAIRS = (
    *("BCOTrainer", "CPOTrainer", "DPOTrainer", "KTOTrainer"),
    *("ORPOTrainer", "PRMTrainer", "RewardTrainer"),
)
"""Trainers of TRL whose mini-batches are more than one sample after another, such as all chosen
texts and then all rejected ones: samples behind them would shift the pairs."""


class Rehearsal:
    """Adds representatives to every mini-batch that a Hugging Face ``Trainer`` trains on.

    To be named in front of the trainer::

        class RehearsalTrainer(Rehearsal, Trainer):
            pass

        arguments = TrainingArguments(...)  # first: it begins the process group
        with RehearsalBuffer(
            50_000, num_representatives=2, selection="reservoir", label=None
        ) as buffer:
            RehearsalTrainer(model, arguments, train_dataset=data, buffer=buffer, ...).train()

    Each mini-batch of an accumulated step is an ``update`` of its own, with ``r`` representatives.
    They count in the loss, and in the gradient, as new samples do: by token in models that are told
    the number of tokens, else by mini-batch. Evaluation and prediction are left alone. All samples
    must have one shape, as where a collator pads to one length.

    The buffer is yours: made with the same arguments in every process, after the
    ``TrainingArguments``; it lives on from one trainer to the next, and is closed by you.

    The trainer's checkpoints hold the buffer, each process's part written by that process, and
    ``train(resume_from_checkpoint=...)`` brings it back, on any number of processes. Those with
    ``save_only_model=True`` hold none.

    Args:
        arguments: of the trainer.
        buffer: the rehearsal buffer.
        in_checkpoints: whether the trainer's checkpoints hold the buffer, and resuming loads it.
        keywords: of the trainer.

    Raises:
        TypeError: there is no ``buffer``; or the trainer trains on pairs, or is another one than
            that of Hugging Face.
    """

    def __init__(
        self,
        *arguments: Any,
        buffer: RehearsalBuffer,
        in_checkpoints: bool = True,
        **keywords: Any,
    ) -> None:
        if not isinstance(buffer, RehearsalBuffer):
            raise TypeError(f"buffer={buffer!r}: give a RehearsalBuffer")
        for each in type(self).__mro__:
            if each.__name__ in OF_PAIRS:
                raise TypeError(
                    f"Rehearsal: a mini-batch of {each.__name__} holds pairs, such as all chosen "
                    "texts and then all rejected ones, and past samples behind them would shift "
                    "the pairs: call buffer.draw and buffer.offer in a loop of your own"
                )
        trainer = super()
        if lacking := [name for name in HOOKS if not hasattr(trainer, name)]:
            raise TypeError(
                f"Rehearsal: {type(self).__name__} has no {', '.join(lacking)} behind it: name the "
                "mixin in front of a Trainer of transformers 5"
            )
        self.buffer, self._in_checkpoints = buffer, in_checkpoints
        self._masks: list[Tensor] = []  # of mini-batches that were taken and not trained on yet
        self._past_mask: Tensor | None = None
        super().__init__(*arguments, **keywords)

    @property
    def past_mask(self) -> Tensor:
        """Which samples of the mini-batch that is trained on are past; bool ``[b + r]``.

        For ``compute_loss``, and for all else that ``training_step`` calls; ``buffer.past_mask`` is
        of the last mini-batch of the optimiser's step.

        Raises:
            RuntimeError: none is trained on, as in evaluation, where nothing is past.
        """
        if self._past_mask is None:
            raise RuntimeError(
                "past_mask: no mini-batch is trained on. In evaluation, which calls compute_loss, "
                "too, nothing is past: ask for it where model.training alone"
            )
        return self._past_mask

    # What the trainer calls.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], *arguments: Any, **keywords: Any
    ) -> Any:
        """One optimiser step's mini-batches, augmented, and how many tokens are in them."""
        self._masks.clear()  # of a step that was left early
        augmented = map(self._augmented, epoch_iterator)
        return super().get_batch_samples(augmented, *arguments, **keywords)  # type: ignore[misc]

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        """The trainer's own, with the mask of its mini-batch.

        Raises:
            RuntimeError: it has not been augmented.
        """
        if not self._masks:
            raise RuntimeError(
                "Rehearsal: the mini-batch has not passed get_batch_samples, so that it holds no "
                "representatives. In a trainer that fetches its mini-batches otherwise, call "
                "buffer.update(batch) there, before their tokens are counted"
            )
        self._past_mask = self._masks.pop(0)
        try:
            return super().training_step(*arguments, **keywords)  # type: ignore[misc]
        finally:
            self._past_mask = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._in_checkpoints:
            self.buffer.save(Path(output_dir) / FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or not self._in_checkpoints:
            return
        folder = Path(checkpoint) / FOLDER
        if self._is_there(folder):
            self.buffer.load(folder)
        else:
            logger.warning("Rehearsal: %s holds no buffer; it stays as it is", checkpoint)

    def _is_there(self, folder: Path) -> bool:
        """Whether rank 0 finds a folder: on a shared file system others may find it late."""
        steps = self.buffer._steps

        def as_first() -> bool:
            return bool(gather_counts(steps.rounds.transport, int(folder.is_dir()))[0])

        return steps.with_peers("load", as_first)

    def _augmented(self, batch: Batch) -> Batch:
        augmented = self.buffer.update(batch)
        self._masks.append(self.buffer.past_mask)
        return augmented
