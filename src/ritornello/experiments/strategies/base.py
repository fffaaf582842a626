"""What all strategies have in common, and what the training loop asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.records import accelerators
from ritornello.records.shard import rows_of_rank

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[n, num_classes]`` and labels ``[n]`` to one loss per sample, ``[n]``.

Where targets are tensors these stand for the labels, and what the model says of them for logits.
"""

Backward = Callable[[Tensor], None]

Task = TypeVar("Task")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each sample."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class GlobalSizes:
    """The sizes of the global mini-batch, split over the ranks as evenly as possible.

    ``DistributedDataParallel`` averages the ranks' gradients. That is the gradient of the global
    mini-batch if all ranks have equally many samples, as in most users' loops; with these sizes
    it is also where they have not, such as 10 samples on 4 ranks.
    """

    rank: int
    num_ranks: int
    num_new: int
    """``N * b``."""
    num_past: int
    """``N * r``; each rank draws as many as the first one, and leaves out what is too much."""
    seed: int = 0
    """The seed by which it is chosen what is left out."""

    def __post_init__(self) -> None:
        if self.num_past < self.num_ranks:
            raise ValueError(
                f"num_past={self.num_past}: it must be at least num_ranks={self.num_ranks}, so "
                "that every rank has a representative"
            )

    def of_one_rank(self) -> GlobalSizes:
        """This rank's part alone, where each trains by itself and keeps all that it draws."""
        num_new = rows_of_rank(self.num_new, self.rank, self.num_ranks)
        return GlobalSizes(0, 1, num_new, -(-self.num_past // self.num_ranks), self.seed)

    def own_past(self, num_drawn: int) -> int:
        """How many of ``num_drawn`` representatives this rank keeps."""
        return min(num_drawn, rows_of_rank(self.num_past, self.rank, self.num_ranks))

    def global_past(self, num_drawn: int) -> int:
        """How many all ranks together keep, if each has drawn ``num_drawn``."""
        smaller, num_larger = divmod(self.num_past, self.num_ranks)
        return self.num_ranks * min(num_drawn, smaller) + num_larger * (num_drawn > smaller)


class Past(NamedTuple):
    """Representatives, as a strategy gets them."""

    images: Tensor
    labels: Tensor
    logits: Tensor | None = None


class Strategy:
    """How the model learns from a stream of tasks.

    In any loop, under ``DistributedDataParallel`` or on one process::

        for images, labels in loader:
            optimiser.zero_grad()
            loss = strategy.backward(model, images, labels)  # the gradients are there
            optimiser.step()

    Loss and gradients are those of the global mini-batch. What is stored are the images as they
    come: let ``model`` normalise and augment them.

    Args:
        criterion: the loss of each sample.
        sizes: of the global mini-batch; None: all ranks have equally many samples.
    """

    restarts: ClassVar[bool] = False
    """Whether the model is re-initialised at each task."""
    rehearses: ClassVar[bool] = False
    """Whether there is a rehearsal buffer."""
    observes: ClassVar[bool] = False
    """Whether a task's samples only pass by, before it trains on the buffer alone: ``observe``."""
    solves: ClassVar[bool] = False
    """Whether it makes no steps: a task's samples pass by once, each of them, and then ``end_task``
    sets the last layer."""
    stores_logits: ClassVar[bool] = False
    """Whether what is stored has the model's logits with it."""
    num_draws: ClassVar[int] = 0
    """How often a step draws past samples, stored or generated."""
    remembers_in_itself: ClassVar[bool] = False
    """Whether what it needs of earlier tasks is neither in weights nor in the buffer."""
    num_reviews: int = 0
    """Mini-batches of a task that it sees once more at the task's end: ``review``."""
    loss_weights: str = "by-sample"
    """How ``weighed`` weighs new and past samples."""
    takes_tensors: ClassVar[bool] = False
    """Whether targets may be tensors, with a criterion of theirs; else they are classes."""

    buffer: RehearsalBuffer | None = None
    """The rehearsal buffer; None if there is none."""
    goes_by_distances: bool = False
    """Whether the buffer's distances are to be measured before each epoch."""
    encoded: tuple[Any, ...] | None = None
    """What the buffer stores in place of the next mini-batch's images and labels, such as the files
    that they were decoded from; set before ``observe`` and ``backward``. None: these."""

    def __init__(
        self, *, criterion: Criterion = cross_entropy, sizes: GlobalSizes | None = None
    ) -> None:
        self.criterion, self.sizes = criterion, sizes
        self.task_number = 0
        self._has_begun = False
        self._num_past: int | None = None  # that all ranks have just drawn

    def training_tasks(self, tasks: Sequence[Task], number: int) -> Sequence[Task]:
        """The tasks, of all, whose samples are trained on when task ``number`` has come."""
        return tasks[number : number + 1]

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """The strategy of a recipe, with a buffer if it rehearses.

        Args:
            recipe: what to take the strategy's own settings from.
            new_buffer: makes the buffer, given ``num_draws``; all ranks take part.
            common: the arguments that all strategies have.
        """
        return cls(**common)

    def begin_task(self, number: int, classes: Sequence[int] = ()) -> None:
        """Says that task ``number`` (from 0) begins, and which classes it brings, if known."""
        self.task_number, self._has_begun = number, True

    def end_step(self, model: nn.Module) -> None:
        """Says that the optimiser has made its step; the step's gradients are still there."""

    def review(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Sees a mini-batch of the task once more before ``end_task``, if it has ``num_reviews``.

        It may change weights meanwhile, which ``end_task`` gives back.
        """

    def end_task(self, model: nn.Module) -> None:
        """Says that the running task has been learnt; all ranks call it, with the same weights."""

    def observe(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Sees a mini-batch without a step, where the strategy ``observes`` or ``solves``."""

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        backward: Backward = Tensor.backward,
    ) -> Tensor:
        """Computes the gradients of one step.

        Args:
            model: maps images to logits.
            images: ``[b, ...]``.
            labels: int64 ``[b]``, or targets ``[b, ...]`` where the strategy ``takes_tensors``.
            backward: what is done with a loss to get gradients, such as scaling it before.

        Returns:
            The loss (of this rank), without gradient.
        """
        loss = self.loss(model, images, labels)
        backward(loss)
        return loss.detach()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one step; by default that of the new samples alone."""
        return self.mean_new(self.criterion(model(images), labels))

    def mean_new(self, losses: Tensor) -> Tensor:
        """The mean over the new samples of all ranks, where DDP averages over the ranks."""
        return self._mean(losses, self.sizes.num_new if self.sizes else None)

    def mean_past(self, losses: Tensor) -> Tensor:
        """The mean over the past samples that all ranks have just drawn."""
        return self._mean(losses, self._num_past)

    def mean_all(self, losses: Tensor) -> Tensor:
        """The mean over the augmented mini-batches of all ranks."""
        if self.sizes is None or self._num_past is None:
            return losses.mean()
        return self._mean(losses, self.sizes.num_new + self._num_past)

    def weighed(self, losses: Tensor, num_new: int) -> Tensor:
        """The mean of the losses of an augmented mini-batch, new samples first."""
        if self.loss_weights == "by-sample" or len(losses) == num_new:
            return self.mean_all(losses)
        weight = 1 / (self.task_number + 1)
        new, past = losses.split([num_new, len(losses) - num_new])
        return weight * self.mean_new(new) + (1 - weight) * self.mean_past(past)

    def widening(self, num_classes: int) -> Callable[[Any], Any] | None:
        """What makes representatives of fewer classes fit a model of more; None: they do."""
        return None

    def stats(self) -> dict[str, Any] | None:
        """What the results say about the buffer, if there is one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on, besides the buffer and ``begin_task`` of every task.

        Numbers, strings, tensors and None in any nesting of dicts and lists.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""

    def adopt(self, states: list[dict[str, Any]]) -> None:
        """Goes on from what another number of ranks gave, as far as that can be."""

    def shared_state_dict(self) -> dict[str, Any]:
        """What the strategy needs to go on that all ranks have alike; see ``state_dict``.

        That of one rank is enough, for any number of ranks.
        """
        return {}

    def load_shared_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``shared_state_dict`` gave, perhaps with fewer classes than now."""

    def left(self, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """What a finished run leaves for one that goes on with it; all ranks call this.

        Args:
            gather: gives every rank's content to every rank.
        """
        return self.shared_state_dict()

    def follow(self, left: dict[str, Any], rank: int, num_ranks: int) -> None:
        """Goes on from what a run has ``left``, on any number of ranks."""
        self.load_shared_state_dict(left)

    @property
    def held_bytes(self) -> int:
        """What this rank keeps from step to step beside the model, its optimiser and the data.

        That is what is stored, with whatever goes with it, and all else that is remembered.
        """
        return 0

    def sent_bytes_per_step(self, model: nn.Module) -> float:
        """What this rank has sent to others for the strategy, in a step on average.

        That is beside the gradients that training needs without it. What goes into an all-reduce
        counts once.
        """
        return 0.0

    def costs(self, model: nn.Module) -> dict[str, int | float]:
        """Memory and traffic of this rank, for the results."""
        sent = self.sent_bytes_per_step(model)
        return {"held_bytes": self.held_bytes, "sent_bytes_per_step": sent}

    def outcome(self) -> dict[str, Any]:
        """What the results say of the strategy besides, at the end, in terms of JSON."""
        return {}

    def close(self) -> None:
        """Gives back what the strategy holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_begun(self) -> None:
        """For strategies that look at tasks.

        Raises:
            RuntimeError: none has begun.
        """
        if not self._has_begun:
            raise RuntimeError(
                f"{type(self).__name__}: no task has begun, and its loss looks at tasks: call "
                "strategy.begin_task(number, classes) before the first step of each task, from "
                "task 0 on"
            )

    def _mean(self, losses: Tensor, num_global: int | None) -> Tensor:
        if self.sizes is None or num_global is None:
            return losses.mean() if len(losses) else losses.sum()
        return losses.sum() * (self.sizes.num_ranks / max(1, num_global))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory of some tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


class RehearsalStrategy(Strategy):
    """A strategy with a rehearsal buffer; each step draws once and offers once.

    A step that fails, such as without memory or for a wrong label, counts as one that has nothing
    to offer, if it did not come to that. So a rank on which a step failed alone, and which goes on
    with the next one, is still in step with the others.

    Args:
        buffer: made with the class's ``num_draws``; its samples are (images, labels), or
            (images, labels, logits) where ``stores_logits``. Closed by ``close``.
        criterion: the loss of each sample.
        sizes: see ``Strategy``.
        offers_stream: whether candidates come from the mini-batches; else the buffer is filled
            by others, such as with exemplars at a task's end.
        goes_by_distances: whether the buffer's sampling policy does ("grasp"), so that the
            training loop measures them before each epoch.

    Raises:
        ValueError: the buffer makes another number of draws.
    """

    rehearses: ClassVar[bool] = True
    num_draws: ClassVar[int] = 1

    buffer: RehearsalBuffer

    def __init__(
        self,
        buffer: RehearsalBuffer,
        *,
        criterion: Criterion = cross_entropy,
        sizes: GlobalSizes | None = None,
        offers_stream: bool = True,
        goes_by_distances: bool = False,
    ) -> None:
        super().__init__(criterion=criterion, sizes=sizes)
        if buffer.num_draws != self.num_draws:
            raise ValueError(
                f"{type(self).__name__} needs a buffer with num_draws={self.num_draws}, not "
                f"{buffer.num_draws}"
            )
        self.buffer, self.offers_stream = buffer, offers_stream
        self.goes_by_distances = goes_by_distances
        self._dice = np.random.default_rng([sizes.seed, sizes.rank] if sizes else 0)

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``."""
        return cls(
            new_buffer(num_draws=cls.num_draws),
            offers_stream=recipe.offers_stream,
            goes_by_distances=recipe.sampling == "grasp",
            **common,
            **cls.options(recipe),
        )

    @classmethod
    def options(cls, recipe: Recipe) -> dict[str, Any]:
        """The further arguments that a recipe gives."""
        return {}

    def draw(self) -> list[Past]:
        """``num_draws`` times ``r`` representatives; an empty list while the buffer is empty."""
        drawn = self.buffer.draw()
        if drawn is None:
            return []
        return [self._kept(Past(*each)) for each in (drawn if self.num_draws > 1 else [drawn])]

    def offer(self, *leaves: Tensor) -> None:
        """Offers a mini-batch, and so starts the round that draws for the next step."""
        if self.encoded is not None:
            leaves = (*self.encoded, *(leaf.cpu() for leaf in leaves[2:]))
        self.buffer.offer(leaves if self.offers_stream else tuple(leaf[:0] for leaf in leaves))

    def augment(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The augmented mini-batch: ``draw``, join, ``offer``.

        Args:
            leaves: a mini-batch as the buffer stores it, images and labels first.

        Raises:
            TypeError, ValueError: the buffer refuses it.
        """
        if self.offers_stream and not self._leaves_out and self.encoded is None:
            try:
                joined = self.buffer.update(leaves)
            except (TypeError, ValueError):
                self.buffer.draw()  # the step counts, as one that has nothing to offer
                raise
            self._num_past = None
            if self.sizes is not None:
                self._num_past = self.sizes.global_past(len(joined[1]) - len(leaves[1]))
            return tuple(joined)
        past = self.draw()
        self.offer(*leaves)
        if not past:
            self._num_past = 0
            return leaves
        pairs = zip(leaves, past[0], strict=False)  # behind them past logits that are None
        return tuple(torch.cat((new, old)) for new, old in pairs if old is not None)

    def stats(self) -> dict[str, Any]:
        """The buffer's own."""
        return vars(self.buffer.stats())

    @property
    def held_bytes(self) -> int:
        """See ``Strategy.held_bytes``: this rank's shard."""
        return super().held_bytes + self.buffer.stats(per_class=False).shard_bytes

    def sent_bytes_per_step(self, model: nn.Module) -> float:
        """See ``Strategy.sent_bytes_per_step``: records."""
        stats = self.buffer.stats(per_class=False)
        return super().sent_bytes_per_step(model) + stats.bytes_sent / max(1, stats.num_rounds)

    def state_dict(self) -> dict[str, Any]:
        """See ``Strategy.state_dict``."""
        return {"dice": self._dice.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_state_dict``."""
        self._dice.bit_generator.state = state["dice"]

    def close(self) -> None:
        """Closes the buffer."""
        self.buffer.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.buffer.__exit__(kind, error, traceback)

    @property
    def _leaves_out(self) -> bool:
        return self.sizes is not None and self.sizes.num_past % self.sizes.num_ranks != 0

    def _kept(self, past: Past) -> Past:
        """Without what this rank has drawn too much; at random, as draws come sorted."""
        if self.sizes is None:
            return past
        num_drawn = len(past.labels)
        self._num_past = self.sizes.global_past(num_drawn)
        num_kept = self.sizes.own_past(num_drawn)
        if num_kept == num_drawn:
            return past
        chosen = torch.from_numpy(self._dice.permutation(num_drawn)[:num_kept])
        kept = accelerators.copied_to(past.labels.device, chosen)
        return Past(*(None if leaf is None else leaf[kept] for leaf in past))  # type: ignore[arg-type]
