"""Makes a set of 40 classes from CIFAR-10: each image turned once, each turn a class of its own.

    python benchmarks/turned_cifar10.py cifar10.npz turned.npz
    ritornello run frontier --data turned.npz

A cat upright, lying on its left, on its head and on its right are four classes: 1,250 training and
250 test images each. They are harder than the ten, and of a kind: what tells them apart is shared.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from numpy.typing import NDArray

from ritornello.experiments.data.data_set import LabelledImages
from ritornello.experiments.data.load import load

TURNS = 4
"""By 0, 90, 180 and 270 degrees, against the clock."""


def turned(
    images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Each image once, in its place, turned at random; of each class as many one way as another.

    Args:
        images: square, ``[n, H, W, C]``.
        labels: of ``n`` images.
        seed: of who is turned how far.

    Returns:
        The images, and their labels: ``TURNS`` times the old one, and by how many quarters.
    """
    dice = np.random.default_rng(seed)
    quarters = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = dice.permutation(np.flatnonzero(labels == label))
        quarters[own] = np.arange(len(own)) % TURNS
    result = images.copy()
    for each in range(1, TURNS):
        result[quarters == each] = np.rot90(images[quarters == each], each, axes=(1, 2))
    return result, TURNS * labels + quarters


def arrays_of(part: LabelledImages) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images ``[n, H, W, C]`` and labels of a part of a data set."""
    images, labels = part.__getitems__(range(len(part)))
    return images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()


def main() -> None:
    """Reads, turns, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="CIFAR-10 as an npz file, or torchvision's folder of it")
    parser.add_argument("output", help="the npz file to write")
    parser.add_argument("--seed", type=int, default=0, help="of who is turned how far")
    arguments = parser.parse_args()
    data = load("cifar10", arguments.data)
    arrays = {}
    for number, (name, part) in enumerate((("train", data.train), ("test", data.test))):
        images, labels = turned(*arrays_of(part), 2 * arguments.seed + number)
        arrays |= {f"{name}_images": images, f"{name}_labels": labels}
    names = [
        f"{each} turned by {90 * turn}" if turn else each
        for each in data.class_names
        for turn in range(TURNS)
    ]
    np.savez(arguments.output, **arrays, class_names=np.array(names))
    print(
        f"{os.path.getsize(arguments.output) / 1e6:.0f} MB: {len(names)} classes, "
        f"{len(data.train):,} training and {len(data.test):,} test images"
    )


if __name__ == "__main__":
    main()
