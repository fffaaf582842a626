"""Writes the 8x8 digits of scikit-learn as image files, as if they had arrived day by day.

    python examples/make_days.py history incoming

Two days go into the first folder, three into the second: DAY/CLASS/NUMBER.png.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HISTORY = {"2024-05-01": (0, 1, 2), "2024-05-02": (1, 3, 4)}
INCOMING = {"2024-05-03": (0, 5, 6), "2024-05-04": (7, 8), "2024-05-05": (3, 5, 9)}
"""Which digits arrive on a day; some come again."""


def write_days(history: Path, incoming: Path) -> None:
    """Writes all images; of a digit that comes on two days, half on each."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    days = {history / day: classes for day, classes in HISTORY.items()}
    days |= {incoming / day: classes for day, classes in INCOMING.items()}
    for label in range(10):
        folders = [day / str(label) for day, classes in days.items() if label in classes]
        for turn, number in enumerate(np.flatnonzero(digits.target == label)):
            folder = folders[turn % len(folders)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(folder / f"{number:04}.png")


if __name__ == "__main__":
    write_days(*map(Path, sys.argv[1:]))
