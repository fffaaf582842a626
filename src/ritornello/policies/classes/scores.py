"""The scores by which classes share a capacity, without the ranks talking about it.

The representatives that a class may have on a rank are numbered, and each number has a fixed
score: number ``q`` of class ``label`` on rank ``i`` of ``N`` has the score
``q * N + (i - label * stride) % N``. A shard keeps the lowest scores that its classes can fill.

Where a shard sees more classes than it has slots, scores alone do not say which of the first ones
stay. Then classes have a fixed precedence, and those of the lowest hold a slot each. Of all classes
that belong on a rank these are a random sample, whenever they came; and nothing need be known of
the others.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Bools, Ints

HASH_BITS = 42
"""Of a precedence; above them is the distance from where a class belongs. So all of it fits into 63
bits with up to two million ranks."""


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


def precedence(
    labels: Ints, key: int, rank: int, num_ranks: int, everywhere_alike: bool = False
) -> Ints:
    """Which classes hold a slot where there are more of them: those of the lowest numbers.

    First come those that belong on this rank, then those that belong on the rank before, and so
    on. Among these the order is that of a hash, which lies on a circle. On every second rank it is
    gone through the other way round, and each two ranks begin elsewhere, far from those before: so
    classes that find no slot on one rank are among the first on another, also where all of them
    belong on the same rank, as labels do that are multiples of the number of ranks.

    Args:
        labels: int64 ``[n]``.
        key: of the order, the same on all ranks; from 0 to 2**64 - 1.
        rank: whose shard it is.
        num_ranks: how many there are.
        everywhere_alike: whether all ranks go through the circle alike: then a class that gives way
            on one has nothing on any that comes later in its turn.

    Returns:
        int64 ``[n]``, from 0 on; below ``2**HASH_BITS`` of classes that belong on this rank.
    """
    salt = mixed(np.array([key], dtype=np.uint64) + np.uint64(1))
    hashes = mixed(labels.astype(np.uint64) + salt) >> np.uint64(64 - HASH_BITS)
    offsets = (rank - rank_of_lowest_score(labels, num_ranks)) % num_ranks
    if everywhere_alike:
        return (offsets << HASH_BITS) + hashes.astype(np.int64)
    hashes = (hashes.astype(np.int64) - _beginnings(num_ranks)[offsets]) % 2**HASH_BITS
    places: Ints = np.where(offsets % 2 == 0, hashes, 2**HASH_BITS - 1 - hashes)
    return (offsets << HASH_BITS) + places


@cache
def _beginnings(num_ranks: int) -> Ints:
    """Where on the circle a rank begins, by its distance from where classes belong.

    Both ranks of a pair at the same place, in different directions: at 0, 1/2, 1/4, 3/4, 1/8, ...
    of it (van der Corput).
    """
    pairs = np.arange(num_ranks) // 2
    bits = range(HASH_BITS)
    return np.array(sum(((pairs >> bit) & 1) << (HASH_BITS - 1 - bit) for bit in bits))


def lowest(numbers: Ints, count: int) -> Bools:
    """Which are the ``count`` lowest; bool, of the length of ``numbers``."""
    chosen = np.ones(len(numbers), dtype=np.bool_)
    if count < len(numbers):
        chosen[numbers.argpartition(count)[count:]] = False
    return chosen


def num_labels_in_excess(
    num_seen: int, last: int, num_slots: int, num_ranks: int, num_held: int | None = None
) -> int:
    """About how many distinct labels there are, if more than the ranks have slots.

    Args:
        num_seen: by this rank, at least; more than it has slots.
        last: the highest precedence of those that hold a slot of this rank.
        num_slots: of this rank.
        num_ranks: how many there are.
        num_held: of those slots, if bytes may not suffice for all.

    Returns:
        0 if the ranks may have a slot for each.
    """
    if num_held is None:
        num_held = num_slots
    if num_ranks == 1 and num_held == num_slots:
        return num_seen
    # Labels are spread evenly over all numbers, and `num_held` of them are up to the last one.
    # That so many are there by chance must be unlikely: a root is one standard deviation.
    estimate = num_held * (num_ranks << HASH_BITS) / max(1, last)
    surely = num_slots * num_ranks * (1 + 6 / math.sqrt(num_held))
    return round(estimate) if estimate > surely else 0


def fixed_shares(num_slots: int, offsets: Ints, order: Ints, num_ranks: int) -> Ints:
    """What each class has of a shard's slots once all have offered enough; int64.

    Args:
        num_slots: of the shard.
        offsets: int64 ``[num_classes]``, the lowest score of each class on this rank.
        order: int64 ``[num_classes]``, their precedence.
        num_ranks: the distance between scores of a class.
    """
    if len(offsets) > num_slots:
        return lowest(order, num_slots).astype(np.int64)
    wanted = np.full_like(offsets, num_slots)
    excess = int(wanted.sum()) - num_slots
    return wanted - highest_scores(wanted, excess, offsets, num_ranks)


def mixed(numbers: Ints | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Other numbers, which have no order; 0 stays 0. The last step of MurmurHash3 (Appleby)."""
    bits = np.asarray(numbers).astype(np.uint64)
    with np.errstate(over="ignore"):  # of a single number NumPy would say so
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(33))


def _num_above(tops: Ints, shares: Ints, level: int, num_ranks: int) -> Ints:
    return np.clip(-((level - tops) // num_ranks), 0, shares)
