"""Makes a smaller set of a data set: the first images of each class.

python benchmarks/fewer_images.py cifar10 cifar10.npz fifth.npz --train 1000 --test 200
ritornello run cifar10-quick --data fifth.npz
"""

from __future__ import annotations

import argparse

import numpy as np
from turned_cifar10 import arrays_of

from ritornello.experiments.data.load import load


def main() -> None:
    """Reads, chooses, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the data set, as recipes know it: cifar10, mnist")
    parser.add_argument("data", help="an npz file, or torchvision's folder of it")
    parser.add_argument("output", help="the npz file to write")
    parser.add_argument("--train", type=int, default=1000, help="images of each class")
    parser.add_argument("--test", type=int, default=200, help="images of each class")
    arguments = parser.parse_args()
    data = load(arguments.name, arguments.data)
    arrays = {"class_names": np.array(data.class_names)}
    for name, part in (("train", data.train), ("test", data.test)):
        images, labels = arrays_of(part)
        wanted = [
            np.flatnonzero(labels == label)[: getattr(arguments, name)]
            for label in np.unique(labels)
        ]
        kept = np.sort(np.concatenate(wanted))
        arrays |= {f"{name}_images": images[kept], f"{name}_labels": labels[kept]}
    np.savez_compressed(arguments.output, **arrays)


if __name__ == "__main__":
    main()
