"""Where the figures of a training go: TensorBoard, Weights & Biases, or a sink of one's own.

On the first rank, in any training loop::

    tracker = TensorBoard("runs/mine/tensorboard")
    last = buffer.stats()
    for step, (images, labels) in enumerate(loader):
        images, labels = buffer.update((images, labels))
        ...
        if step % 50 == 49:
            stats = buffer.stats()
            tracker.log({"train/loss": float(loss), **stats.since(last).figures()}, step)
            last = stats
    tracker.close()

All ranks may run these lines: on the others the trackers here do nothing.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch.distributed as dist

from ritornello.integrations import missing

RUN_ID = "ritornello-run-id"
"""The file, beside what W&B writes, that says which run goes on there."""


class Tracker(Protocol):
    """Where figures go, with the step at which they were taken."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Notes some figures.

        Args:
            figures: name to number; what comes before a slash groups them.
            step: must not fall.
        """

    def close(self) -> None:
        """Writes what is left. May be called twice."""


class _FirstRankOnly(ABC):
    """A context that ends with ``close``, and knows the first rank."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Writes what is left. May be called twice."""

    @staticmethod
    def _is_first_rank() -> bool:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class TensorBoard(_FirstRankOnly):
    """A ``Tracker`` that writes event files: ``tensorboard --logdir FOLDER``.

    Args:
        folder: for the files; made if it is not there. A training that goes on gives the same.
        first_step: of a training that goes on: what was noted at this step and later ones, before
            it was stopped, is not shown any more. None: nothing was noted before.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int | None = None) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing("trackers", "TensorBoard") from error
        if self._is_first_rank():
            self._writer = SummaryWriter(str(Path(folder).absolute()), purge_step=first_step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Notes some figures; see ``Tracker``. What is no number (NaN) is noted as such."""
        if self._writer is not None:
            for name, figure in figures.items():
                self._writer.add_scalar(name, figure, step)

    def close(self) -> None:
        """Writes what is left. May be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(_FirstRankOnly):
    """A ``Tracker`` that makes a run of Weights & Biases.

    Where there is no network set ``WANDB_MODE=offline``, and ``wandb sync`` the run later.

    Args:
        folder: files go into ``FOLDER/wandb``, with the run's id, so that a training that goes on
            in the same folder goes on with the same run. W&B takes no step twice: what is noted
            again, after going on from an earlier step, is dropped with a warning.
        settings: further arguments of ``wandb.init`` but ``dir``, such as ``project``, ``name``,
            ``config``.

    Raises:
        ImportError: Weights & Biases is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], **settings: Any) -> None:
        self._run: Any = None
        try:
            import wandb
        except ImportError as error:
            raise missing("trackers", "Weights & Biases") from error
        if not hasattr(wandb, "init"):  # a folder of that name
            raise missing("trackers", "Weights & Biases")
        if not self._is_first_rank():
            return
        folder = Path(folder).absolute()
        place = folder / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        noted = place / RUN_ID
        if noted.exists():
            settings = {"id": noted.read_text().strip(), "resume": "allow"} | settings
        self._run = wandb.init(dir=str(folder), **settings)
        noted.write_text(f"{self._run.id}\n")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Notes some figures; see ``Tracker``."""
        if self._run is not None:
            self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Waits until all is written, or uploaded. May be called twice."""
        self._finish(exit_code=0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # W&B shows a run that has failed as such.
        self._finish(exit_code=0 if error is None else 1)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
"""By the names that ``ritornello run --track`` knows; each is the name of a package, too."""


def check(name: str) -> None:
    """Checks that there is a tracker of that name, without loading it.

    Raises:
        ValueError: there is none.
        ImportError: it is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"there are {', '.join(TRACKERS)}")
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of that name is no package
        raise missing("trackers", TRACKERS[name])
