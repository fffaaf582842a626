"""The plan of one global draw: which records of which shards go to which ranks.

Every rank knows the sizes of all shards and shares a random stream keyed by (seed, step), so
every rank computes the same draw. What follows from it, whom to send what and what to expect
from whom, needs no request: only records cross the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ritornello.arrays import Floats, Ints
from ritornello.policies.class_members import distinct_positions
from ritornello.policies.contents import Contents


class SamplingPolicy(ABC):
    """Which representatives the ranks draw in one step, as global indices.

    A global index counts the representatives of all shards, shard after shard.

    Attributes:
        needs_labels: whether ``draw`` looks at more of the contents than how many there are.
            Rounds then tell every rank the labels of what was admitted on all.
    """

    needs_labels = False

    @abstractmethod
    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """Draws for all ranks at once. Every rank computes it, and must get the same.

        Args:
            contents: the whole buffer; holds at least ``num_drawn`` representatives.
            num_ranks: the ranks that draw.
            num_drawn: what each rank gets.
            generator: the same stream on every rank.

        Returns:
            int64 ``[num_ranks, num_drawn]``, each below ``contents.num_held``.
        """


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
        num_held = contents.num_held
        if num_held >= num_ranks * num_drawn:
            everyone = generator.choice(num_held, num_ranks * num_drawn, replace=False)
            return everyone.reshape(num_ranks, num_drawn)
        ranks_per_draw = num_held // num_drawn
        parts = [
            generator.choice(
                num_held, min(ranks_per_draw, num_ranks - first) * num_drawn, replace=False
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


class GraspSampling(SamplingPolicy):
    """From prototypical representatives to atypical ones, class after class.

    The classes take turns. In its turn a class gives one representative, with a probability
    proportional to ``1 / (d + 1e-7)``, where ``d`` is its cosine distance to the mean of its
    class; its ``d`` then grows by the largest one of the class. The ranks' draws follow one
    another, so that all ranks together draw what one rank with ``N * r`` would.

    The distances come from ``RehearsalBuffer.measure_distances``, which is to be called before
    each period of rehearsal. A representative that was admitted since has the mean distance of
    its class; in a class that was never measured all are equally likely, and then take turns.

    Source: Harun et al., "GRASP: A Rehearsal Policy for Efficient Online Continual Learning"
    (CoLLAs 2024).
    """

    needs_labels = True

    EPSILON = 1e-7

    LARGE = 1e100
    """Distances double each time a class has been gone through. Only their ratios matter: from
    here on they are divided by the largest."""

    def draw(
        self, contents: Contents, num_ranks: int, num_drawn: int, generator: np.random.Generator
    ) -> Ints:
        """See ``SamplingPolicy.draw``. Also raises the distances of what was drawn."""
        labels = contents.class_labels
        turns = (contents.num_turns + np.arange(num_ranks * num_drawn)) % len(labels)
        contents.num_turns = int(turns[-1]) + 1
        drawn = np.empty(len(turns), dtype=np.int64)
        for number in np.unique(turns).tolist():
            own = np.flatnonzero(turns == number)
            drawn[own] = self._draw_of_class(contents, labels[number], generator.random(len(own)))
        return contents.indices(drawn).reshape(num_ranks, num_drawn)

    def _draw_of_class(self, contents: Contents, label: int, u: Floats) -> Ints:
        """The places of what a class gives in ``len(u)`` turns, one random number for each."""
        places = contents.places(label)
        distances = contents.distances_at(places)
        unknown = np.isnan(distances)
        if unknown.any():
            distances[unknown] = 1.0 if unknown.all() else distances[~unknown].mean()
        chosen = np.empty(len(u), dtype=np.int64)
        for turn, number in enumerate(u.tolist()):
            chances = (1.0 / (distances + self.EPSILON)).cumsum()
            position = min(
                int(chances.searchsorted(number * chances[-1], side="right")), len(places) - 1
            )
            distances[position] += distances.max()
            chosen[turn] = position
        largest = distances.max()
        contents.set_distances(places, distances / largest if largest > self.LARGE else distances)
        return places[chosen]
