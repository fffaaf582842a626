"""What a sampling policy is, and those that remember nothing: uniform and class-balanced.

Every rank knows the sizes of all shards and shares a random stream keyed by (seed, step), so
every rank computes the same draw. What follows from it, whom to send what and what to expect
from whom, needs no request (see ``transports.plan``): only records cross the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ritornello.arrays import Arrays, Floats, Ints
from ritornello.policies.classes.members import distinct_positions
from ritornello.policies.contents import Contents


class SamplingPolicy(ABC):
    """Which representatives the ranks draw in one step, as global indices.

    A global index counts the representatives of all shards, shard after shard. ``draw`` is all
    that a policy needs; the other methods, which do nothing, are for one that remembers something
    from draw to draw. Such a policy must set ``needs_places``: others are asked for many rounds
    ahead. Every buffer has a copy of the policy that it was given, and every rank must remember
    the same. What is remembered of a representative is best kept by its place, see ``Contents``.

    Attributes:
        needs_labels: whether ``draw`` looks at labels. It has all that ``needs_places`` gives, too.
        needs_places: whether it wants to know what is admitted where, or remembers anything. Rounds
            then tell every rank what was admitted on all. Samples need no label for it.
        needs_distances: whether it wants to be told what ``RehearsalBuffer.measure_distances``
            finds. Goes with ``needs_labels``.
        needs_tasks: whether it wants to be told when ``RehearsalBuffer.begin_task`` is called. Goes
            with ``needs_places``. While it draws nothing and no task has begun, ``update`` raises.
    """

    needs_labels = False
    needs_places = False
    needs_distances = False
    needs_tasks = False

    @property
    def knows_places(self) -> bool:
        """Whether rounds tell every rank what was admitted where on all."""
        return self.needs_labels or self.needs_places

    def bind(self, capacity: int) -> None:
        """Ties the policy to one buffer, which is empty.

        Args:
            capacity: of the buffer; places are from 0 to ``capacity - 1``.
        """

    @abstractmethod
    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """Draws for all ranks at once. Every rank computes it, and must get the same.

        Args:
            contents: the whole buffer; ``num_drawable`` was at least ``num_drawn``.
            num_ranks: the ranks that draw.
            num_drawn: what each rank gets.
            generator: the same stream on every rank.

        Returns:
            int64 ``[num_ranks, num_drawn]``, each below ``contents.num_held``.
        """

    def num_drawable(self, contents: Contents) -> int:
        """How many of the representatives may be drawn now. Every rank must get the same.

        While there are fewer than ``r``, each rank gets as many.
        """
        return contents.num_held

    def begin_task(self, contents: Contents) -> None:
        """Says that what is admitted from now on is of another task; see ``needs_tasks``.

        Args:
            contents: the whole buffer, after the last round.
        """

    def overwritten(self, places: Ints) -> None:
        """Says where other representatives lie now, or none, before the round's ``draw``.

        Args:
            places: int64 ``[n]``; may be empty, and a place may come twice.
        """

    def moved(self, before: Ints, after: Ints) -> None:
        """Says which representatives have moved, where bytes are bounded, before ``draw``.

        Where it is not defined, they count as others that have come.

        Args:
            before: int64 ``[n]``, the places where they were, and nothing is now.
            after: int64 ``[n]``, the places where they are.
        """
        self.overwritten(np.concatenate([before, after]))

    def measured(self, places: Ints, distances: Floats) -> None:
        """Says how far representatives are from their class's mean; see ``needs_distances``.

        Args:
            places: int64 ``[n]``, all that are in use.
            distances: float64 ``[n]``, from 0 to 2.
        """

    def state(self) -> Arrays:
        """What it remembers, to be saved: copies, int64 or float64, each ``[n]``.

        Their names must not be those of ``Contents.SAVED``, beside which they are saved.
        """
        return {}

    def restore(self, state: Arrays) -> None:
        """Goes on from ``state``, exactly as the policy that gave it.

        Called on a policy that was bound and not used, and only if something was saved.

        Args:
            state: from a policy with the same settings, of a buffer with the same shards.

        Raises:
            ValueError, KeyError: no policy of this type can have given it.
        """

    def adopt(self, state: Arrays, before: Ints, after: Ints) -> None:
        """Takes over what still holds of a buffer with another number of ranks or capacity.

        Called as ``restore`` is.

        Args:
            state: perhaps from a policy of another type.
            before: int64 ``[n]``, the places, there, of all representatives that were taken over.
            after: int64 ``[n]``, their places in this buffer.

        Raises:
            ValueError, KeyError: see ``restore``.
        """

    def forget(self, state: Arrays, before: Ints, after: Ints) -> Arrays:
        """What ``state`` becomes when representatives are removed from a saved buffer.

        Called on a policy that was not bound, and only on Ritornello's own: one's own begin anew.
        Nothing of what was removed may be left in it.

        Args:
            state: from a policy of this type.
            before: int64 ``[n]``, the places of those that stay.
            after: int64 ``[n]``, where they are now.

        Returns:
            The new state; nothing: the policy then begins anew.

        Raises:
            ValueError, KeyError: see ``restore``.
        """
        return {}


class UniformSampling(SamplingPolicy):
    """Every representative of the buffer equally likely, wherever it is stored.

    As long as the buffer holds at least ``num_ranks * num_drawn``, no representative comes
    twice in the joint draw. While it holds less, as many ranks as possible share one draw
    without replacement, and no rank gets a representative twice.
    """

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        return uniform_draw(contents.num_held, num_ranks, num_drawn, generator)


def uniform_draw(
    num_drawable: int, num_ranks: int, num_drawn: int, generator: np.random.Generator
) -> Ints:
    """Draws for all ranks out of so many, each equally likely; see ``UniformSampling``.

    Returns:
        int64 ``[num_ranks, num_drawn]``, each below ``num_drawable``.
    """
    if num_drawable >= num_ranks * num_drawn:
        everyone = generator.choice(num_drawable, num_ranks * num_drawn, replace=False)
        return everyone.reshape(num_ranks, num_drawn)
    ranks_per_draw = num_drawable // num_drawn
    parts = [
        generator.choice(
            num_drawable, min(ranks_per_draw, num_ranks - first) * num_drawn, replace=False
        )
        for first in range(0, num_ranks, ranks_per_draw)
    ]
    return np.concatenate(parts).reshape(num_ranks, num_drawn)


class ClassBalancedSampling(SamplingPolicy):
    """Every class equally often, whatever it holds; inside a class every representative alike.

    The joint draw of all ranks takes from each class equally many, up to one: which classes give
    one more is random. Inside a class nothing comes twice as long as it holds that many; a
    class that holds fewer gives all that it has as often as it takes, and the rest at random.
    The draw is then dealt to the ranks in random order.
    """

    needs_labels = True

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``."""
        num_all = num_ranks * num_drawn
        labels = generator.permutation(contents.class_labels)[:num_all].tolist()
        counts = contents.counts(labels)
        wanted = np.full(len(labels), num_all // len(labels))
        wanted[: num_all % len(labels)] += 1
        num_passes, num_left = np.divmod(wanted, counts)
        owners, positions = distinct_positions(counts, num_left, generator)
        parts = [contents.places_at([labels[owner] for owner in owners.tolist()], positions)]
        for owner in np.flatnonzero(num_passes).tolist():
            parts += [contents.places(labels[owner])] * int(num_passes[owner])
        everyone = generator.permutation(np.concatenate(parts))
        return contents.indices(everyone).reshape(num_ranks, num_drawn)
