"""What a run tells trackers: curves of its steps, and how well it does after each task."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.results import anytime, metrics
from ritornello.rounds.stats import BufferStats

if TYPE_CHECKING:
    from ritornello.experiments.training.trainer import Trainer
    from ritornello.integrations.trackers import Tracker


@dataclass(frozen=True)
class Tracking:
    """Where figures go while a run goes on."""

    track: tuple[str, ...] = ()
    """Trackers that get its figures while it runs: tensorboard, wandb. Their files go into the
    output folder."""
    track_every: int = 50
    """Steps from one point of a curve to the next."""

    def check(self) -> None:
        """Checks the settings, and that the trackers are installed.

        Raises:
            ValueError: names the flag, its value and the rule, or what to install.
        """
        if self.track_every < 1:
            raise ValueError(f"--track-every {self.track_every}: it must be at least 1")
        for name in self.track:
            from ritornello.integrations import trackers

            try:
                trackers.check(name)
            except (ValueError, ImportError) as error:
                raise ValueError(f"--track {name}: {error}") from None


PLACES = ("tensorboard", "wandb")
"""Where trackers have their files, in a run's folder."""


@contextmanager
def telling(
    tracking: Tracking, folder: Path | None, trainer: Trainer, ranks: Ranks
) -> Iterator[RunFigures | None]:
    """A context in which a run tells trackers, if it has any; all ranks enter it.

    Args:
        tracking: which, and how often.
        folder: of the run.
        trainer: that stands where it begins, or goes on.
        ranks: of the run.

    Raises:
        CheckpointError: on every rank; a tracker could not be made, as where W&B knows no key.
    """
    if not tracking.track or folder is None:
        yield None
        return
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        with ranks.together("--track"):
            if ranks.rank == 0:
                trackers = _made(tracking, folder, trainer, stack)
        yield RunFigures(trackers, tracking.track_every, trainer, ranks)


def _made(tracking: Tracking, folder: Path, trainer: Trainer, stack: ExitStack) -> list[Tracker]:
    """The trackers, as contexts of the stack."""
    from ritornello.integrations.trackers import TensorBoard, WandB

    recipe = trainer.recipe
    made: list[Tracker] = []
    if "tensorboard" in tracking.track:
        first_step = trainer.num_steps_done + 1
        # What comes at a task's end has the number of its last step, and is to come again.
        if trainer.position.step and trainer.position.step == trainer.schedule.num_steps(
            trainer.position.task
        ):
            first_step -= 1
        made.append(stack.enter_context(TensorBoard(folder / "tensorboard", first_step=first_step)))
    if "wandb" in tracking.track:
        made.append(
            stack.enter_context(
                WandB(
                    folder,
                    project=os.environ.get("WANDB_PROJECT", "ritornello"),
                    name=f"{recipe.name}-{recipe.strategy}-seed-{recipe.seed}",
                    group=recipe.name,
                    config=asdict(recipe) | {"num_ranks": trainer.place.num_ranks},
                    settings={"console": "off"},
                )
            )
        )
    return made


class RunFigures:
    """What a run tells its trackers. Every rank makes one, and calls its methods alike.

    Args:
        trackers: of the first rank; none on the others.
        every: steps from one point of a curve to the next.
        trainer: of the run.
        ranks: of the run.
    """

    def __init__(
        self, trackers: Sequence[Tracker], every: int, trainer: Trainer, ranks: Ranks
    ) -> None:
        self._trackers, self._every, self._trainer, self._ranks = trackers, every, trainer, ranks
        self._loss: Tensor | float = 0.0
        self._num_steps = 0
        self._seconds = replace(trainer.seconds)
        self._last = self._stats(per_class=False)

    def after_step(self, loss: Tensor) -> None:
        """Notes a step's loss; tells what the last steps were like, if it is time.

        Args:
            loss: of this rank. It may be on a GPU, which is waited for only if it is time.
        """
        if not self._trackers:
            return
        self._loss = self._loss + loss
        self._num_steps += 1
        if self._trainer.num_steps_done % self._every == 0:
            self._tell(self._of_steps())

    def after_task(self) -> None:
        """Tells how well the model does on each task, and what the buffer holds."""
        if not self._trainer.log.steps[-1]:
            return  # nothing has been learnt yet
        figures = self._of_errors() if self._trainer.log.error else self._of_accuracies()
        if self._num_steps:
            figures |= self._of_steps()
        stats = self._stats(per_class=True)
        if stats is not None:
            held = Counter[int]()
            for of_rank in self._ranks.gather(stats.held_per_class):
                held.update(of_rank)
            whole = replace(stats, held_per_class=dict(sorted(held.items())))
            figures |= {
                name: figure for name, figure in whole.figures().items() if "/held/" in name
            }
        self._tell(figures)

    def after_probe(self) -> None:
        """Tells what a probe has found of the tasks so far, in percent, or errors."""
        if not self._trackers:
            return
        newest = self._trainer.log.probes[-1:]
        curves = anytime.curves_of(newest)
        is_error = anytime.has_errors(newest)
        what, scale = ("error", 1) if is_error else ("percent", 100)
        figures = {
            f"probe_{what}/average": curves.average,
            f"probe_{what}/{'highest' if is_error else 'lowest'}_old": curves.lowest_old,
            f"probe_{what}/newest": curves.newest,
        }
        self._tell(
            {name: scale * float(curve[0]) for name, curve in figures.items() if np.isfinite(curve)}
        )

    def _of_steps(self) -> dict[str, float]:
        """The means of the steps since the last time."""
        trainer, now = self._trainer, replace(self._trainer.seconds)
        assert trainer.optimiser is not None
        per_step = 1e3 / self._num_steps
        load, step = now.load - self._seconds.load, now.step - self._seconds.step
        figures = {
            "train/loss": float(self._loss) / self._num_steps,
            "train/learning_rate": float(trainer.optimiser.param_groups[0]["lr"]),
            "train/task": trainer.position.task + 1,
            "train/load_ms": load * per_step,
            "train/step_ms": (load + step) * per_step,
        }
        stats = self._stats(per_class=False)
        if stats is not None and self._last is not None:
            figures |= stats.since(self._last).figures()
        self._loss, self._num_steps = 0.0, 0
        self._seconds, self._last = replace(trainer.seconds), stats
        return figures

    def _of_accuracies(self) -> dict[str, float]:
        """In percent, as far as they were measured."""
        log = self._trainer.log
        num_seen = len(log.top1)
        top1, top5 = (metrics.matrix_of(each)[:, :num_seen] for each in (log.top1, log.top5))
        shares = {
            "top1_percent/average": metrics.average_accuracy(top1),
            "top5_percent/average": metrics.average_accuracy(top5),
        }
        if log.averaged_top1:
            averaged = metrics.matrix_of(log.averaged_top1)[:, :num_seen]
            shares["averaged_top1_percent/average"] = metrics.average_accuracy(averaged)
        if all(log.steps):  # else no task was learnt when it came; see ``outcome_of``
            shares["top1_percent/forgetting"] = metrics.forgetting(top1)
        for number, accuracy in enumerate(top1[-1], start=1):
            if np.isfinite(accuracy):
                shares[f"top1_percent/task_{number}"] = float(accuracy)
        return {name: 100 * share for name, share in shares.items()}

    def _of_errors(self) -> dict[str, float]:
        """As far as they were measured; lower is better, also of forgetting."""
        log = self._trainer.log
        error = metrics.matrix_of(log.error)[:, : len(log.error)]
        figures = {"error/average": metrics.average_accuracy(error)}
        if log.averaged_error:
            averaged = metrics.matrix_of(log.averaged_error)[:, : len(log.error)]
            figures["averaged_error/average"] = metrics.average_accuracy(averaged)
        if all(log.steps):
            figures["error/forgetting"] = metrics.forgetting(-error)
        for number, each in enumerate(error[-1], start=1):
            if np.isfinite(each):
                figures[f"error/task_{number}"] = float(each)
        return figures

    def _stats(self, per_class: bool) -> BufferStats | None:
        """The buffer's; what they wait for its round counts as of a step, as other waits do."""
        buffer = self._trainer.strategy.buffer
        if buffer is None:
            return None
        began = time.perf_counter()
        stats = buffer.stats(per_class)
        self._trainer.seconds.step += time.perf_counter() - began
        return stats

    def _tell(self, figures: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(figures, self._trainer.num_steps_done)
