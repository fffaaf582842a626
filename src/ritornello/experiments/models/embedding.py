"""A data set of features: what the frozen layers make of all images, once for the whole run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from ritornello.experiments.data.data_set import DataSet, InMemoryImages, LabelledImages
from ritornello.experiments.data.stream import load_batches
from ritornello.experiments.models.network import Network
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.ranks.progress import ProgressBar
from ritornello.experiments.recipes.recipe import Recipe

BATCH_SIZE = 64
"""Images that are embedded together, on one rank. How large a mini-batch is decides the last bits
of what a convolution makes of each of its images: so it is the same on any number of ranks."""

PART = 64
"""How many such mini-batches are sent at a time."""


@dataclass(frozen=True)
class Embedded:
    """A data set of features, and the seconds that it took to make it."""

    data: DataSet
    seconds: float


class Embeddings:
    """Makes features of data sets; those of the last one are there for the next run."""

    def __init__(self) -> None:
        self._key: object = None
        self._last: Embedded | None = None

    def of(self, recipe: Recipe, data: DataSet, network: Network, place: Place) -> Embedded:
        """The features of all training and test images, the same bit by bit on every rank.

        Ranks share the work. Blocks until all ranks have called it.

        Args:
            recipe: of the run.
            data: its images.
            network: whose trunk embeds them.
            place: of this rank.

        Raises:
            ValueError: on every rank; a feature has no finite value of the recipe's type.
        """
        key = _key(recipe)
        if self._last is None or key != self._key:
            self._last = None  # two at a time might not fit
            began = time.perf_counter()
            num_batches = -(-(len(data.train) + len(data.test)) // (BATCH_SIZE * place.num_ranks))
            with ProgressBar("embedding", num_batches, place.rank == 0) as bar:
                train, test = (
                    _embedded(part, recipe, network, place, bar) for part in (data.train, data.test)
                )
            embedded = replace(data, train=train, test=test, embedded_from=data.image_shape)
            self._key, self._last = key, Embedded(embedded, time.perf_counter() - began)
        return self._last


def _key(recipe: Recipe) -> tuple[object, ...]:
    """What decides the features of a run."""
    return (
        *(recipe.data, recipe.data_path, recipe.image_size, recipe.holdout, recipe.crop_size),
        *(recipe.pixels, recipe.model, recipe.weights, recipe.amp, recipe.channels_last),
        *(recipe.device, recipe.features_dtype, recipe.weights is not None or recipe.seed),
        recipe.num_last_stages,
    )


def _embedded(
    images: LabelledImages, recipe: Recipe, network: Network, place: Place, bar: ProgressBar
) -> InMemoryImages:
    """The features of some images; this rank makes a part of them, and gets the others'."""
    num_batches = -(-len(images) // BATCH_SIZE)
    batches = np.array_split(np.arange(len(images)), np.arange(1, num_batches) * BATCH_SIZE)
    ends = np.linspace(0, num_batches, place.num_ranks + 1).round().astype(int).tolist()
    first, end = ends[place.rank : place.rank + 2]
    some, targets, *_ = images.__getitems__([0])
    dtype = getattr(torch, recipe.features_dtype)
    shape = network.embed(some.to(place.device)).shape[1:]
    features = torch.empty((len(images), *shape), dtype=dtype)
    wanted = torch.empty((len(images), *targets.shape[1:]), dtype=targets.dtype)
    own = batches[first:end]
    loaded = load_batches(images, own, recipe.num_workers, place.device)
    for positions, (pixels, targets, _) in zip(own, loaded, strict=True):
        at = slice(positions[0], positions[-1] + 1)
        features[at], wanted[at] = network.embed(pixels).to(dtype).cpu(), targets.cpu()
        bar.advance()
    if place.num_ranks > 1:
        for owner in range(place.num_ranks):
            for start in range(ends[owner], ends[owner + 1], PART):
                to = min(start + PART, ends[owner + 1]) * BATCH_SIZE
                for whole in (features, wanted):
                    part = whole[start * BATCH_SIZE : to]
                    sent = part.to(place.device)
                    dist.broadcast(sent, src=owner)
                    part.copy_(sent)
    if not all(bool(part.isfinite().all()) for part in features.split(BATCH_SIZE * PART)):
        raise ValueError(
            f"features_dtype={recipe.features_dtype!r} with model={recipe.model!r}: some features "
            "are not finite; take features_dtype='float32', or amp='off', or other weights"
        )
    return InMemoryImages(features.numpy(), images.labels, wanted.numpy())
