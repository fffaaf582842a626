"""Rehearsal in PyTorch Lightning: a callback for its ``Trainer``.

::

    Trainer(callbacks=[Rehearsal(capacity=50_000, num_representatives=7)])

    the loop's own             the callback
    --------------             ------------
    setup                      makes the buffer, over the strategy's data-parallel ranks
    restore the checkpoint     loads it
    transfer the batch
                               update: mini-batch + representatives
    on_after_batch_transfer
    training_step
    save the checkpoint        all ranks' state, for rank 0 to write
    teardown                   waits for the last round; the buffer stays for the next fit

With Fabric the loop is the user's own, and calls ``RehearsalBuffer.update`` itself.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ritornello.buffer import RehearsalBuffer
from ritornello.integrations import missing
from ritornello.loaders.composition import composed_steps_of
from ritornello.records.nesting import Batch
from ritornello.rounds.stats import BufferStats

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise missing("lightning", "lightning or pytorch_lightning") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

logger = logging.getLogger(__name__)

HOOK = "on_after_batch_transfer"

Hook = Callable[[Batch, int], Batch]


class Rehearsal(Callback):
    """Adds representatives to every mini-batch that a Lightning ``Trainer`` trains on.

    The mini-batch is augmented when it is on the device, before ``on_after_batch_transfer`` of the
    ``LightningModule`` or ``LightningDataModule``: what that hook does, such as augmentation and
    normalisation, is done to new samples and representatives alike, anew each time. Validation,
    testing and prediction are left alone::

        rehearsal = Rehearsal(capacity=50_000, num_representatives=7, num_candidates=14)
        for task in tasks:
            rehearsal.begin_task(task.name)
            Trainer(max_epochs=5, callbacks=[rehearsal]).fit(model, task.loader)

    Where the ``batch_sampler`` of the training's loader is a ``ComposedSteps``, the buffer's
    ``num_representatives`` follows it. On several ranks such a loader needs
    ``Trainer(use_distributed_sampler=False)``.

    The buffer is made when the first ``fit`` starts, over the data-parallel ranks of the trainer's
    strategy, and lives on from one ``fit`` to the next, with the same trainer or others. It ends
    with ``close``, with this object, or with the process. After an exception in the ``fit`` of one
    of several ranks it is closed: the others learn of it at once.

    The trainer's checkpoints hold the whole buffer, and ``fit(ckpt_path=...)`` brings it back, on
    any number of ranks. A checkpoint's file is written from memory of rank 0, so that large buffers
    are better saved beside: ``in_checkpoints=False`` and ``rehearsal.buffer.save(folder)``.

    Args:
        capacity: of the ``RehearsalBuffer``.
        in_checkpoints: whether the trainer's checkpoints hold the buffer.
        log_every_n_steps: after how many steps the buffer's figures go to the trainer's loggers,
            rank 0's; it waits for the running round. None: never.
        arguments: further ones of the ``RehearsalBuffer``. ``process_group`` is the strategy's
            data-parallel group, if it is not given.

    Raises:
        TypeError: no such argument.
        ValueError: ``log_every_n_steps`` is below 1. What the ``RehearsalBuffer`` refuses, it
            refuses when ``fit`` starts.
    """

    def __init__(
        self,
        capacity: int,
        *,
        in_checkpoints: bool = True,
        log_every_n_steps: int | None = None,
        **arguments: Any,
    ) -> None:
        inspect.signature(RehearsalBuffer).bind(capacity, **arguments)
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps={log_every_n_steps}: it must be at least 1")
        self._arguments = {"capacity": capacity, **arguments}
        self._in_checkpoints = in_checkpoints
        self._log_every_n_steps = log_every_n_steps
        self._buffer: RehearsalBuffer | None = None
        self._num_ranks = 0  # of the trainer that it was made for
        self._is_closed = False
        self._folder: Path | None = None
        self._task: str | None = None
        self._last_stats: BufferStats | None = None  # where figures are logged
        self._hooked: list[tuple[LightningModule | LightningDataModule, Hook | None]] = []
        self._is_augmented = False  # this step's mini-batch
        self._num_steps = 0  # of this epoch, augmented so far

    @property
    def buffer(self) -> RehearsalBuffer:
        """The buffer of this rank, from the start of the first ``fit`` on.

        Raises:
            RuntimeError: there is none yet, in this process.
        """
        if self._buffer is None:
            raise RuntimeError(
                "Rehearsal: there is no buffer yet: the first fit makes it, in the processes that "
                "train (strategies such as 'ddp_spawn' and 'ddp_notebook' end these with the fit)"
            )
        return self._buffer

    def begin_task(self, name: str) -> None:
        """Says that a task begins: what is offered from now on is of it.

        A name that the last task has begins nothing. Between two fits it counts for the next one.
        If that one goes on from a checkpoint of the task, it has begun already. All ranks call it
        alike.

        Args:
            name: such as a date, or what is new; see ``RehearsalBuffer.begin_task``.
        """
        self._task = str(name)
        if self._hooked:
            self._mark_task()

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Takes over a saved buffer: at once, or when the first ``fit`` makes the buffer.

        A checkpoint that ``fit`` goes on from counts more. All ranks call it alike.

        Args:
            folder: from ``RehearsalBuffer.save``.

        Raises:
            CheckpointError: see ``RehearsalBuffer.load``; where there is no buffer yet, ``fit``
                raises it.
        """
        if self._buffer is None:
            self._folder = Path(folder).absolute()
            return
        self._buffer.load(folder)
        if self._last_stats is not None:  # what it has cost is counted anew
            self._last_stats = self._buffer.stats()

    def close(self) -> None:
        """Ends the buffer; see ``RehearsalBuffer.close``. May be called twice, and on no buffer."""
        self._is_closed = True
        if self._buffer is not None:
            self._buffer.close()

    # What follows the trainer calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the buffer, when the first ``fit`` starts."""
        if stage != "fit":
            return
        if self._is_closed:
            raise RuntimeError(
                "Rehearsal: its buffer is closed, after close() or an exception in an earlier fit: "
                "make another Rehearsal, and let fit(ckpt_path=...) or load(folder) fill it"
            )
        if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
            _warn(
                trainer,
                "this strategy's processes, and the buffer in them, end with this fit: for several "
                "fits use strategy='ddp' or torchrun, or go on with fit(ckpt_path=...)",
            )
        group = _data_parallel_group(trainer)
        num_ranks = (
            dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        )
        if self._buffer is None:
            self._buffer = RehearsalBuffer(**{"process_group": group, **self._arguments})
            self._num_ranks = num_ranks
        elif num_ranks != self._num_ranks:
            raise ValueError(
                f"Rehearsal: its buffer was made for {self._num_ranks} rank(s), but this trainer "
                f"has {num_ranks}: make another Rehearsal for it, and let fit(ckpt_path=...) or "
                "load(folder) fill it"
            )
        if self._folder is not None:  # also after a fit in which it could not be loaded
            self._buffer.load(self._folder)
            self._folder = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the buffer between the transfer and the hooks that follow it."""
        self._restore_hooks()  # of a fit that ended without telling
        for owner in (pl_module, getattr(trainer, "datamodule", None)):
            if owner is not None:
                own = vars(owner).get(HOOK)
                setattr(owner, HOOK, self._augmenting(trainer, owner, own))
                self._hooked.append((owner, own))
        self._is_augmented = False
        self._mark_task()
        is_logged = self._log_every_n_steps is not None and trainer.is_global_zero
        self._last_stats = self.buffer.stats() if is_logged else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets a mini-batch that was skipped (``on_train_batch_start`` may return -1)."""
        self._is_augmented = False
        self._num_steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuses to train without representatives."""
        if not self._is_augmented:
            raise RuntimeError(
                f"Rehearsal: the mini-batch has not passed {HOOK}, so that it holds no "
                "representatives. training_step(dataloader_iter) fetches mini-batches itself: call "
                "buffer.update(batch) there, with a RehearsalBuffer of your own; a strategy or "
                "module that replaces batch_to_device must call the hook"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the buffer holds, and what it has cost since the last time."""
        self._is_augmented = False
        num_steps = trainer.fit_loop.total_batch_idx + 1
        if self._last_stats is None or num_steps % (self._log_every_n_steps or 1):
            return
        stats = self.buffer.stats()
        figures, self._last_stats = stats.since(self._last_stats).figures(), stats
        for each in trainer.loggers:
            each.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the buffer out of the hooks."""
        self._restore_hooks()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets other ranks know."""
        self._restore_hooks()
        if self._buffer is None or trainer.world_size == 1 or trainer.state.fn != "fit":
            return
        # Lightning raises this one on all ranks between two steps, to save and to end.
        if type(exception).__name__ != "SIGTERMException":
            self._is_closed = True
            # Without waiting for peers, which may never come to this round.
            self._buffer.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits for the last round: other ranks may still need this one's representatives."""
        if stage == "fit":
            self._restore_hooks()
            if self._buffer is not None and not self._is_closed:
                len(self._buffer)

    def state_dict(self) -> dict[str, Any]:
        """The whole buffer's state, on rank 0; all ranks call it."""
        if not self._in_checkpoints or self._buffer is None:
            return {}
        if self._is_closed:
            logger.warning("Rehearsal: a checkpoint without the buffer, which is closed")
            return {}
        return self._buffer.state_dict(whole=True)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads what ``state_dict`` has saved, if it is to train on."""
        # Else the trainer would give `load_state_dict` a second copy of it.
        state = checkpoint["callbacks"].pop(self.state_key, None)
        if not self._in_checkpoints or self._buffer is None or trainer.state.fn != "fit":
            return
        if state:
            self._buffer.load_state_dict(state)
        else:
            _warn(trainer, "the checkpoint holds no buffer; it stays as it is")

    def _mark_task(self) -> None:
        """Marks the beginning of the task that was named, unless it has begun."""
        name, self._task = self._task, None
        tasks = self.buffer.tasks
        if name is not None and (not tasks or tasks[-1] != name):
            self.buffer.begin_task(name)

    def _augmenting(self, trainer: Trainer, owner: Any, own: Hook | None) -> Hook:
        # A method: that of a copy, made while it trains, goes on to the copy's own hook.
        @functools.wraps(getattr(owner, HOOK))
        def augment(owner: Any, batch: Batch, dataloader_idx: int) -> Batch:
            # Once a step: hooks may call each other, and a step may transfer other things.
            if trainer.training and not self._is_augmented:
                self._num_steps += 1
                composed = composed_steps_of(trainer.train_dataloader)
                if composed is not None:
                    self.buffer.num_representatives = composed.num_past(self._num_steps)
                batch = self.buffer.update(batch)
                self._is_augmented = True
            if own is not None:
                return own(batch, dataloader_idx)
            return getattr(type(owner), HOOK)(owner, batch, dataloader_idx)

        return types.MethodType(augment, owner)

    def _restore_hooks(self) -> None:
        for owner, own in self._hooked:
            delattr(owner, HOOK)
            if own is not None:
                setattr(owner, HOOK, own)
        self._hooked.clear()


def _data_parallel_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """Whose ranks see different mini-batches; None: all ranks."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if isinstance(mesh, DeviceMesh) and "data_parallel" in (mesh.mesh_dim_names or ()):
        return mesh["data_parallel"].get_group()
    return None


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        logger.warning("Rehearsal: %s", message)
