"""Writes the 8x8 digits of scikit-learn as image files, as if they had arrived day by day.

    python examples/make_days.py history incoming

Two days go into the first folder, three into the second: DAY/CLASS/NUMBER.png.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DAYS = {"2024-05-01": "012", "2024-05-02": "134"}, {
    "2024-05-03": "056",
    "2024-05-04": "78",
    "2024-05-05": "359",
}
"""The digits that arrive on a day; some come again."""


def main(folders: list[str]) -> None:
    digits = load_digits()
    for folder, days in zip(folders, DAYS, strict=True):
        for day, classes in days.items():
            for label in map(int, classes):
                numbers = np.flatnonzero(digits.target == label)
                # Of a digit that comes on two days, each has half.
                together = [d for each in DAYS for d, listed in each.items() if str(label) in listed]
                for number in numbers[together.index(day) :: len(together)]:
                    image = Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8))
                    file = Path(folder, day, str(label), f"{number:04}.png")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    image.save(file)


if __name__ == "__main__":
    main(sys.argv[1:])
