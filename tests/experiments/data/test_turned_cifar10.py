"""``benchmarks/turned_cifar10.py`` on a few images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from ritornello.experiments.data.load import load

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "turned_cifar10.py"


def test_each_image_is_turned_once(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 40)):
        arrays[f"{part}_images"] = dice.integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "ten.npz", **arrays, class_names=np.array(list("abcdefghij")))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "ten.npz"), str(tmp_path / "forty.npz")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "40 classes, 80 training and 40 test images" in done.stdout
    data = load("npz", str(tmp_path / "forty.npz"))
    assert data.class_names[:5] == (
        "a",
        "a turned by 90",
        "a turned by 180",
        "a turned by 270",
        "b",
    )
    for part, images in ((data.train, arrays["train_images"]), (data.test, arrays["test_images"])):
        made, labels = part.__getitems__(range(len(part)))
        assert np.bincount(labels.numpy()).tolist() == [len(images) // 40] * 40
        for number, (image, label) in enumerate(zip(made, labels.tolist(), strict=True)):
            assert label // 4 == number % 10
            expected = np.rot90(images[number], label % 4)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
