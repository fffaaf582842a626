"""How far representatives are from their class's mean, over the shards of all ranks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.arrays import Floats, Ints
from ritornello.rounds.round import Rounds
from ritornello.transports.agreement import gather_padded
from ritornello.transports.base import Transport

NUMBERS_AT_ONCE = 2**22
"""How many numbers of all ranks together are gathered at once."""


def measure_distances(rounds: Rounds, features: Tensor) -> None:
    """Tells all ranks how far each representative is from its class's mean.

    Blocks until all ranks have called it.

    Args:
        rounds: of the buffer.
        features: ``[num_held, d]`` of this rank's representatives, in the order of slots.

    Raises:
        ValueError: on every rank, if some rank's features cannot be used.
    """
    distances = cosine_distances(features, rounds.labels(), rounds.transport)
    everyone = gather_padded(distances, rounds.transport)
    places = [
        rounds.contents.places_of_slots(rank, np.arange(len(of_rank)))
        for rank, of_rank in enumerate(everyone)
    ]
    rounds.sampling.measured(np.concatenate(places), np.concatenate(everyone))
    rounds.is_measured = True


def cosine_distances(features: Tensor, labels: Ints, transport: Transport) -> Floats:
    """The cosine distance of each of this rank's samples to the mean of its class on all ranks.

    Blocks until all ranks have called it. All ranks compute the same means, bit for bit.

    Args:
        features: ``[n, d]``, any floating-point dtype and device.
        labels: int64 ``[n]``.
        transport: to the other ranks.

    Returns:
        float64 ``[n]``, from 0 to 2.

    Raises:
        ValueError: on every rank, if some rank's features have another width or are not finite.
    """
    own = features.detach().to("cpu", torch.float64).numpy()
    usable = own.ndim == 2 and len(own) == len(labels) and bool(np.isfinite(own).all())
    width = own.shape[1] if own.ndim == 2 and len(own) else -1
    told = transport.all_gather(np.array([usable or not len(labels), width]))
    widths = told[told[:, 1] >= 0, 1]
    if not told[:, 0].all() or len(np.unique(widths)) > 1:
        raise ValueError(
            f"the features of rank(s) {np.flatnonzero(told[:, 0] == 0).tolist()} cannot be used "
            f"(widths {told[:, 1].tolist()}): they must be finite, [n, d] for n samples, with the "
            "same d on every rank"
        )
    if not len(widths):
        return np.zeros(0)
    classes = np.unique(np.concatenate(gather_padded(np.unique(labels), transport)))
    class_of_row = classes.searchsorted(labels)
    sums = np.zeros((len(classes), int(widths[0])))
    if len(own):
        np.add.at(sums, class_of_row, own)
    means = _sum_over_ranks(sums, transport)  # their lengths do not matter
    if not len(own):
        return np.zeros(0)
    cosines: Floats = (_unit(own) * _unit(means)[class_of_row]).sum(axis=1)
    return np.clip(1.0 - cosines, 0.0, 2.0)


def _sum_over_ranks(values: NDArray[np.float64], transport: Transport) -> NDArray[np.float64]:
    """The sum of all ranks' arrays, added in the order of the ranks; a part at a time."""
    flat = values.reshape(-1)
    step = max(1, NUMBERS_AT_ONCE // transport.num_ranks)
    parts = [
        transport.all_gather(flat[first : first + step].view(np.int64)).view(np.float64).sum(axis=0)
        for first in range(0, len(flat), step)
    ]
    return np.concatenate(parts).reshape(values.shape)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
