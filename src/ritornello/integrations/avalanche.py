"""Rehearsal from a distributed buffer for the strategies of Avalanche, as one plugin.

Avalanche's own ``ReplayPlugin`` draws from a data set of past samples, which each rank holds for
itself, and fills it at an experience's end. This one augments mini-batches as they come, from the
memory of all ranks::

    strategy._unpack_minibatch()        mini-batch [x, y, task label] on the device
    before_training_iteration           -> [x, y, task label] with r representatives each
    forward, criterion, backward, ...   all other plugins see the augmented mini-batch
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ritornello.buffer import RehearsalBuffer
from ritornello.errors import CheckpointError
from ritornello.integrations import missing

try:
    from avalanche.benchmarks import OnlineCLExperience
    from avalanche.core import SupervisedPlugin
except ImportError as error:
    raise missing("avalanche", "Avalanche") from error

if TYPE_CHECKING:
    import os

    from avalanche.training.templates import SupervisedTemplate

logger = logging.getLogger(__name__)


class RehearsalPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Adds representatives to every mini-batch that a strategy trains on, and offers it.

    ::

        plugin = RehearsalPlugin(capacity=2_000, num_representatives=8)
        strategy = Naive(model=model, optimizer=optimizer, train_mb_size=8, plugins=[plugin])
        for experience in benchmark.train_stream:
            strategy.train(experience)
        plugin.close()

    What is stored and comes back is the whole mini-batch as the strategy has it: transformed
    inputs, targets, task labels. Plugins, losses and metrics see representatives and new samples
    alike, so training accuracy and loss are those of the augmented mini-batch. Evaluation is
    left alone. The buffer lives on over experiences; each begins a task in it.

    On several ranks each makes one, after ``DistributedHelper.init_distributed``, and ``capacity``
    counts the whole buffer, over all of them.

    Args:
        capacity: representatives in the whole buffer, over all ranks.
        arguments: further ones of the ``RehearsalBuffer``; targets are its ``label=1``.

    Attributes:
        buffer: the ``RehearsalBuffer``.

    Raises:
        ValueError, TypeError, PeerLostError: see ``RehearsalBuffer``.
    """

    def __init__(self, capacity: int, **arguments: Any) -> None:
        super().__init__()
        self._arguments = {"capacity": capacity, **arguments}
        self.buffer = RehearsalBuffer(**self._arguments)
        self._num_steps = 0
        self._num_before = 0  # the running experience
        self._has_warned = False
        self._saved: tuple[int, Path] | None = None

    @classmethod
    def of(cls, strategy: SupervisedTemplate) -> Self:
        """The plugin of a strategy; a new one after ``maybe_load_checkpoint``.

        Raises:
            ValueError: it has none.
        """
        for plugin in strategy.plugins:
            if isinstance(plugin, cls):
                return plugin
        raise ValueError(f"{type(strategy).__name__} has no {cls.__name__} among its plugins")

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs: Any) -> None:
        """Says that a task begins: "experience-3".

        Parts of an online stream begin one if they tell that they are an experience's first part.
        """
        self._num_before = self._num_steps
        experience = strategy.experience.logging()  # which hides nothing
        if isinstance(experience, OnlineCLExperience):
            if not (experience.access_task_boundaries and experience.is_first_subexp):
                return
            experience = experience.origin_experience
        self.buffer.begin_task(f"experience-{experience.current_experience}")
        self._saved = None  # what was saved does not know of it

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs: Any) -> None:
        """Augments the mini-batch."""
        strategy.mbatch = self.buffer.update(strategy.mbatch)
        self._num_steps += 1

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs: Any) -> None:
        """Says so if no mini-batch was augmented, once."""
        if self._num_steps == self._num_before and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "RehearsalPlugin: %s has trained on an experience and augmented no mini-batch: it "
                "does not call before_training_iteration, as the loops of Avalanche's templates "
                "do; call buffer.update(mbatch) where it unpacks them (said once)",
                type(strategy).__name__,
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves the buffer in a folder, where the next ``save_checkpoint`` says it is.

        All ranks call it; see ``RehearsalBuffer.save``. Without it, a checkpoint of a single
        process has the representatives in it.
        """
        path = Path(folder).absolute()
        self.buffer.save(path)
        self._saved = (self._num_steps, path)

    def close(self) -> None:
        """Closes the buffer; see ``RehearsalBuffer.close``. All ranks call it."""
        self.buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.buffer.__exit__(kind, error, traceback)

    def __reduce__(self) -> tuple[Any, ...]:
        """What ``save_checkpoint`` pickles: the arguments, and the representatives or their folder.

        Raises:
            CheckpointError: the shards of several ranks are not in a folder yet.
        """
        saved: dict[str, Any] | Path
        if self._saved is not None and self._saved[0] == self._num_steps:
            saved = self._saved[1]
        elif len(self.buffer.stats(per_class=False).held_per_rank) == 1:
            saved = self.buffer.state_dict()
        else:
            raise CheckpointError(
                "a checkpoint of one rank cannot hold the shards of all: let all ranks call "
                "RehearsalPlugin.save(folder) before save_checkpoint; the checkpoint then names "
                "the folder, and is loaded with it, on any number of ranks"
            )
        return _restored, (type(self), self._arguments, self._num_steps, saved)


def _restored(
    kind: type[RehearsalPlugin],
    arguments: dict[str, Any],
    num_steps: int,
    saved: dict[str, Any] | Path,
) -> RehearsalPlugin:
    """A new plugin with what another had saved; all ranks make theirs."""
    plugin = kind(**arguments)
    try:
        if isinstance(saved, Path):
            plugin.buffer.load(saved)
            plugin._saved = (num_steps, saved)
        else:
            plugin.buffer.load_state_dict(saved)
    except BaseException:
        plugin.close()
        raise
    plugin._num_steps = num_steps
    return plugin
