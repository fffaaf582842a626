"""Ranks with unlike data: which rank holds which training sample, and what it takes of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_SHARES, _PASSES = 1_000_006, 1_000_007
"""What random streams are for; with the seed, their keys. See ``scenarios``."""


def rank_of_samples(
    labels: NDArray[np.int64], num_ranks: int, alpha: float, seed: int
) -> NDArray[np.int64]:
    """Which rank holds each training sample, throughout the run.

    Each class is cut into the ranks' shares of it, which are drawn from the symmetric Dirichlet
    distribution: with a small ``alpha`` one rank has nearly all of a class, with a large one all
    have as many. Its samples are dealt out at random. The shares of a class depend on the seed, the
    class and the number of ranks alone, whatever other classes there are.

    Args:
        labels: of the training samples.
        num_ranks: at least 1.
        alpha: above 0.
        seed: of shares and dealing.

    Returns:
        int64, as many as there are labels; each sample has exactly one rank.
    """
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels).tolist():
        generator = np.random.default_rng([seed, _SHARES, label])
        shares = generator.dirichlet(np.full(num_ranks, alpha))
        own = generator.permutation(np.flatnonzero(labels == label))
        ends = np.floor(shares.cumsum()[:-1] * len(own) + 0.5).astype(np.int64)
        for rank, part in enumerate(np.split(own, ends)):
            ranks[part] = rank
    return ranks


def batches_of_own(
    own: NDArray[np.int64],
    batch_size: int,
    key: Sequence[int],
    *,
    num_batches: int,
    first: int = 0,
) -> Iterator[NDArray[np.int64]]:
    """A rank's mini-batches of its own samples: pass after pass, each in another random order.

    A mini-batch may be the end of one pass and the beginning of the next one, or even several.

    Args:
        own: int64 ``[n]``, at least one, in ascending order.
        batch_size: of the rank.
        key: of the shuffling: seed, task, rank.
        num_batches: in all, with those that are skipped.
        first: so many are left out; they cost nothing.
    """
    number, order = -1, own
    for start in range(first * batch_size, num_batches * batch_size, batch_size):
        batch = np.empty(batch_size, dtype=np.int64)
        num_taken = 0
        while num_taken < batch_size:
            passed, within = divmod(start + num_taken, len(own))
            if passed != number:
                number = passed
                order = np.random.default_rng([*key, _PASSES, number]).permutation(own)
            part = order[within : within + batch_size - num_taken]
            batch[num_taken : num_taken + len(part)] = part
            num_taken += len(part)
        yield batch
