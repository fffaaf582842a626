"""The composition of a step: how many of its samples are new, and how many are past.

At a fixed number of samples per step, new and past ones in the proportion in which training from
scratch would see them: a task of a quarter of all samples so far gets a quarter of each step. What
is below is pure: every rank computes the same, from counts and a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ritornello.arrays import Ints
from ritornello.rounds.random_streams import Purpose, Streams
from ritornello.transports.opening import default_ranks


def share_of_new(
    num_new: int,
    num_before: int,
    progress: float,
    first_share: float | None = None,
    floor: float = 0.0,
) -> float:
    """The share of the new samples in a step.

    It ends at ``num_new / (num_new + num_before)``, the proportion of training from scratch, and
    may begin higher, so that the newest task is learnt first and then held.

    Args:
        num_new: samples of the running task.
        num_before: samples of all tasks before it. If 0, all samples of a step are new.
        progress: of the running task's training, from 0 (first step) to 1 (last step).
        first_share: at progress 0, from where the share falls linearly. None, or one below that at
            the end: the share is the same throughout.
        floor: the least share at the end; a long stream leaves its newest part hardly any else.

    Raises:
        ValueError: a number out of its range.
        TypeError: a count that is no integer.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress}: it must be from 0 to 1")
    first, last = _first_and_last_share(num_new, num_before, first_share, floor)
    return first + (last - first) * progress


class ComposedSteps:
    """The new samples of each step, as a batch sampler, and how many past ones join them.

    Each step takes ``samples_per_step`` samples on each rank: so many new ones as ``share_of_new``
    says, rounded such that the running share is exact to within one sample, and at least one; the
    others are past. For a ``DataLoader``, without ``DistributedSampler``::

        buffer = RehearsalBuffer(
            capacity, num_representatives=0, most_representatives=64, sampling="earlier-tasks"
        )
        ...
        steps = ComposedSteps(len(task), num_before, samples_per_step=64, num_epochs=20)
        loader = DataLoader(task, batch_sampler=steps)
        for epoch in range(20):
            for step, batch in enumerate(loader):
                buffer.num_representatives = steps.num_past(step + 1)
                images, labels = buffer.update(batch)

    ``rehearse`` and Lightning's ``Rehearsal`` set ``num_representatives`` themselves.

    An epoch has as many steps as incremental training with mini-batches of ``batch_size`` would
    have: ``num_new // (num_ranks * batch_size)``, and at least one. New samples come in random
    order, every one equally often, up to once, over all epochs and ranks; no one twice in a step
    of all ranks, unless that step takes more than there are. Each iteration is the next epoch.

    Args:
        num_new: samples of the running task, the length of the data set.
        num_before: samples of all tasks before it.
        samples_per_step: new and past ones together, per rank and step.
        batch_size: of the incremental training whose number of steps is made. None:
            ``samples_per_step``, so that no sample more than by incremental training is trained on.
        num_epochs: of the task.
        first_share: of the new samples, in the task's first step; see ``share_of_new``.
        floor: the least share of the new samples at the task's end.
        rank: this rank. None: that in the default process group; 0 without one.
        num_ranks: the ranks that share the new samples. None: those of the default process group.
        seed: of the order, the same on all ranks.

    Raises:
        ValueError: a number out of its range; more ranks than new samples.
        TypeError: a count that is no integer.
    """

    def __init__(
        self,
        num_new: int,
        num_before: int,
        *,
        samples_per_step: int,
        batch_size: int | None = None,
        num_epochs: int = 1,
        first_share: float | None = None,
        floor: float = 0.0,
        rank: int | None = None,
        num_ranks: int | None = None,
        seed: int = 0,
    ) -> None:
        own_rank, all_ranks = default_ranks()
        rank = own_rank if rank is None else rank
        num_ranks = all_ranks if num_ranks is None else num_ranks
        batch_size = samples_per_step if batch_size is None else batch_size
        first, last = _first_and_last_share(num_new, num_before, first_share, floor)
        _check_count("samples_per_step", samples_per_step, least=1)
        _check_count("batch_size", batch_size, least=1)
        _check_count("num_epochs", num_epochs, least=1)
        _check_count("num_ranks", num_ranks, least=1)
        _check_count("rank", rank, least=0, most=num_ranks - 1)
        _check_count("seed", seed, least=0, most=2**64 - 1)
        if num_new < num_ranks:
            raise ValueError(
                f"num_new={num_new}: it must be at least the number of ranks ({num_ranks}), as "
                "each takes at least one new sample in a step"
            )
        self.samples_per_step, self.num_epochs = samples_per_step, num_epochs
        self._num_new, self._rank, self._num_ranks = num_new, rank, num_ranks
        self._num_steps = max(1, num_new // (num_ranks * batch_size))
        shares = np.linspace(first, last, self._num_steps * num_epochs)
        wanted = np.maximum(1.0, samples_per_step * shares).cumsum()
        self._num_new_in = np.diff(np.floor(wanted + 0.5).astype(np.int64), prepend=0)
        self._ends = num_ranks * self._num_new_in.cumsum()  # in the sequence of all ranks
        # Not the same order in every task: what came before stands in the place of a rank.
        self._streams = Streams(seed, Purpose.COMPOSITION, num_before)
        self._latest: tuple[int, Ints] | None = None  # permutation, and its number
        self._epoch = self._next_epoch = 0

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        """The next epoch's steps: for each the positions of its new samples on this rank.

        An epoch is begun by its first step: a ``DataLoader`` with workers calls ``iter`` twice.

        Raises:
            ValueError: all epochs were given; ``set_epoch`` goes back.
        """
        steps = self.positions(self._next_epoch)
        self._epoch = self._next_epoch
        self._next_epoch += 1
        yield from steps

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next ``iter`` gives, such as where a training goes on.

        Args:
            epoch: from 0 to ``num_epochs - 1``.

        Raises:
            ValueError: there is no such epoch.
        """
        self._check_epoch(epoch)
        self._epoch = self._next_epoch = epoch

    @property
    def sampler(self) -> ComposedSteps:
        """Itself: of a batch sampler, frameworks tell its sampler which epoch begins."""
        return self

    def num_past(self, step: int) -> int:
        """How many past samples join a step of the running epoch, on each rank.

        Args:
            step: from 0 to ``len(steps)``, which is the first one of the next epoch; after the
                last epoch, its last one again.

        Raises:
            ValueError: there is no such step.
        """
        self._check_step(step, most=self._num_steps)
        number = min(self._epoch * self._num_steps + step, len(self._num_new_in) - 1)
        return self.samples_per_step - int(self._num_new_in[number])

    def positions(self, epoch: int, first_step: int = 0) -> Iterator[list[int]]:
        """The steps of an epoch, or from one of them on; which epoch runs stays as it is.

        Args:
            epoch: from 0 to ``num_epochs - 1``.
            first_step: from 0 to ``len(steps)``.

        Raises:
            ValueError: there is no such epoch or step.
        """
        self._check_epoch(epoch)
        self._check_step(first_step, most=self._num_steps)
        first = epoch * self._num_steps
        numbers = range(first + first_step, first + self._num_steps)
        return (self._positions_in(number) for number in numbers)

    def _positions_in(self, number: int) -> list[int]:
        """Positions of this rank's new samples in a step, counted from the task's first."""
        num_own = int(self._num_new_in[number])
        end = int(self._ends[number])
        begin = end - self._num_ranks * num_own
        first, last = begin // self._num_new, (end - 1) // self._num_new
        parts = [self._permutation(each) for each in range(first, last + 1)]
        sequence = parts[0] if len(parts) == 1 else np.concatenate(parts)
        own = begin - first * self._num_new + self._rank * num_own
        positions: list[int] = sequence[own : own + num_own].tolist()
        return positions

    # All epochs and ranks take from one sequence: random permutations of all new samples.

    def _permutation(self, number: int) -> Ints:
        """One of the permutations; each depends on the one before."""
        latest = self._latest
        if latest is None or latest[0] > number:
            latest = (0, self._streams.at(0).permutation(self._num_new))
        while latest[0] < number:
            latest = (latest[0] + 1, self._permutation_after(*latest))
        self._latest = latest
        return latest[1]

    def _permutation_after(self, number: int, before: Ints) -> Ints:
        """The next permutation.

        A step may take the end of one and the beginning of the next. Samples that it has from the
        one are then not first in the other.
        """
        found = self._streams.at(number + 1).permutation(self._num_new)
        border = (number + 1) * self._num_new
        step = int(self._ends.searchsorted(border, side="right"))
        num_first = int(self._ends[step]) - border
        num_last = self._num_ranks * int(self._num_new_in[step]) - num_first
        if num_last <= 0:
            return found
        others = np.flatnonzero(~np.isin(found, before[-num_last:]))[:num_first]
        return np.concatenate([found[others], np.delete(found, others)])

    def _check_epoch(self, epoch: int) -> None:
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(
                f"epoch {epoch}: there are {self.num_epochs} (num_epochs), counted from 0; "
                "set_epoch says which one is next"
            )

    def _check_step(self, step: int, most: int) -> None:
        if not 0 <= step <= most:
            raise ValueError(f"step {step}: it must be from 0 to {most}")


def composed_steps_of(loader: object) -> ComposedSteps | None:
    """The batch sampler of a loader, if it is one that composes steps.

    Raises:
        ValueError: it is inside another one, so that nobody knows which step comes.
    """
    outermost = inner = getattr(loader, "batch_sampler", None)
    while inner is not None and not isinstance(inner, ComposedSteps):
        inner = getattr(inner, "batch_sampler", None)
    if inner is not None and inner is not outermost:
        raise ValueError(
            f"the loader's batch sampler is a {type(outermost).__name__} around ComposedSteps, "
            "which deals out to the ranks, and begins where it is told to, by itself: give the "
            "loader as it was made, not what a framework has made of it; to go on in the middle "
            "of an epoch, see ComposedSteps.positions"
        )
    return inner


def _first_and_last_share(
    num_new: int, num_before: int, first_share: float | None, floor: float
) -> tuple[float, float]:
    _check_count("num_new", num_new, least=1)
    _check_count("num_before", num_before, least=0)
    if first_share is not None and not 0.0 < first_share <= 1.0:
        raise ValueError(f"first_share={first_share}: it must be above 0 and at most 1")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor={floor}: it must be from 0 to 1")
    last = max(floor, num_new / (num_new + num_before))
    return max(first_share or 0.0, last), last


def _check_count(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: it must be an integer")
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value}: it must be {limits}")
