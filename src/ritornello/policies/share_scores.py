"""The scores by which classes share a capacity, without the ranks talking about it.

The representatives that a class may have on a rank are numbered, and each number has a fixed
score: number ``q`` of class ``label`` on rank ``i`` of ``N`` has the score
``q * N + (i - label * stride) % N``. A shard keeps the lowest scores that its classes can fill.
"""

from __future__ import annotations

import math

import numpy as np

from ritornello.arrays import Ints


def rank_of_exemplar(label: int | Ints, place: int | Ints, num_ranks: int) -> Ints:
    """The rank to offer an exemplar to, so that all ranks together keep a class's first ones.

    Exemplars go round the ranks in the order in which shares grow. Where every class offers at
    least its share, classes appear in the same order on all ranks, and the ranks divide the
    capacity evenly, ``FirstOffered`` stores exactly the first ones. Otherwise ranks may differ by
    one exemplar more or less at the end of what is stored of a class.

    Args:
        label: of the class; an integer or int64 ``[n]``.
        place: in the class's order of importance, from 0; an integer or int64 ``[n]``.
        num_ranks: how many.

    Returns:
        int64, of the shape of ``label`` and ``place`` together.
    """
    return (rank_of_lowest_score(np.asarray(label), num_ranks) + place) % num_ranks


def rank_of_lowest_score(labels: Ints, num_ranks: int) -> Ints:
    """Where the first representative of each class belongs."""
    return labels % num_ranks * spreading_stride(num_ranks) % num_ranks


def spreading_stride(num_ranks: int) -> int:
    """A step that visits all ranks, and spreads any few of its first stops evenly over them.

    The golden section of ``num_ranks``, lowered until the two have no common divisor.
    """
    stride = max(1, int(num_ranks * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, num_ranks) > 1:
        stride -= 1
    return stride


def highest_scores(shares: Ints, excess: int, offsets: Ints, num_ranks: int) -> Ints:
    """How many of each class's representatives are among the ``excess`` highest scores.

    On one rank, where all offsets are 0, classes of 5, 3 and 1 have the scores 0 to 4, 0 to 2, and
    0. The 2 highest are 4 and 3, both of the first class: ``[2, 0, 0]``. The third highest, 2, two
    classes have; the later one gives way: ``[2, 1, 0]``.

    Args:
        shares: int64 ``[num_classes]``, representatives of each class, in the order in which the
            classes appeared.
        excess: at most their sum.
        offsets: int64 ``[num_classes]``, the lowest score of each class on this rank.
        num_ranks: the distance between scores of a class.
    """
    # A class's scores are its offset and from there every `num_ranks`-th number, up to its top. So
    # how many lie above a level takes no list of them, and the level is found by bisection, at a
    # cost that hardly depends on how many representatives there are.
    tops = (shares - 1) * num_ranks + offsets
    # The lowest level that no more than `excess` scores lie above. The class with the highest top
    # alone has more than `excess` above the level from which the search begins.
    high = int(tops.max())
    low = max(-1, high - excess * num_ranks - 1)
    while low < high:
        level = (low + high) // 2
        if _num_above(tops, shares, level, num_ranks).sum() <= excess:
            high = level
        else:
            low = level + 1
    above = _num_above(tops, shares, low, num_ranks)
    # Those exactly at the level are of different classes: the later a class appeared, the
    # sooner it gives way, on even levels; the other way round on odd ones.
    at_level = np.flatnonzero(_num_above(tops, shares, low - 1, num_ranks) > above)
    if (low // num_ranks) % 2 == 0:
        at_level = at_level[::-1]
    above[at_level[: excess - int(above.sum())]] += 1
    return above


def fixed_shares(num_slots: int, offsets: Ints, num_ranks: int) -> Ints:
    """What each class has of a shard's slots once all have offered enough; int64.

    Args:
        num_slots: of the shard.
        offsets: int64 ``[num_classes]``, the lowest score of each class on this rank.
        num_ranks: the distance between scores of a class.
    """
    wanted = np.full_like(offsets, num_slots)
    excess = int(wanted.sum()) - num_slots
    return wanted - highest_scores(wanted, excess, offsets, num_ranks)


def _num_above(tops: Ints, shares: Ints, level: int, num_ranks: int) -> Ints:
    return np.clip(-((level - tops) // num_ranks), 0, shares)
