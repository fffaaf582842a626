from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ritornello.experiments.data.load import load


def save(path: Path, **changes: np.ndarray | None) -> str:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for part, num in (("train", 20), ("test", 8)):
        arrays[f"{part}_images"] = generator.integers(256, size=(num, 6, 5, 3), dtype=np.uint8)
        arrays[f"{part}_targets"] = generator.normal(size=(num, 2))
        arrays[f"{part}_groups"] = np.arange(num, dtype=np.uint8) % 4
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_targets_that_are_numbers(tmp_path: Path) -> None:
    path = save(
        tmp_path / "mine.npz",
        group_names=np.array([*"abcd"]),
        target_names=np.array(["speed", "height"]),
    )
    data = load("npz", path)
    assert data.name == "mine"
    assert data.class_names == ("a", "b", "c", "d")
    assert data.targets is not None
    assert (data.targets.shape, data.targets.parts) == ((2,), ("speed", "height"))
    images, targets = data.train.__getitems__([3, 7])
    assert images.shape == (2, 3, 6, 5)
    assert images.dtype == torch.uint8
    assert targets.dtype == torch.float32
    with np.load(path) as archive:
        assert np.allclose(targets.numpy(), archive["train_targets"][[3, 7]])
    assert data.train.labels[[3, 7]].tolist() == [3, 3]


def test_features_in_place_of_images(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(3, 2, size=(20, 4))
    features[:, 1] = 7  # the same in all samples
    path = save(
        tmp_path / "table.npz",
        train_images=features, train_targets=np.arange(20.0), train_groups=None,
        test_images=features[:8], test_targets=np.arange(8.0), test_groups=None,
    )  # fmt: skip
    data = load("npz", path)
    assert data.image_shape == (4, 1, 1)
    assert data.class_names == ("0",)
    assert data.targets is not None
    assert data.targets.shape == (1,)
    images, targets = data.train.__getitems__([5])
    assert images.dtype == torch.float32
    assert targets.tolist() == [[5.0]]
    pixels = data.train.images.numpy()[..., 0, 0] / 255  # type: ignore[attr-defined]
    normal = (pixels - np.array(data.mean)) / np.array(data.std)
    assert np.allclose(normal.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(normal.std(axis=0), [1, 0, 1, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_targets": None}, "has no test_targets: it must hold test_images"),
        (
            {"train_targets": np.zeros(20, dtype=int)},
            r"train_targets is int64 \[20\]: it must be flo",
        ),
        (
            {"train_targets": np.zeros((20, 3))},
            r"train_targets are \[3\] each, but test_targets \[2\]",
        ),
        ({"train_targets": np.zeros((3, 2))}, "has 20 train_images but 3 train_targets"),
        (
            {"train_targets": np.full((20, 2), np.nan)},
            "train_targets holds values that are not fin",
        ),
        ({"train_groups": np.zeros(20)}, "train_groups is float64 .* non-negative integers"),
        ({"train_groups": np.zeros(5, dtype=int)}, "has 20 train_images but 5 train_groups"),
        (
            {"train_images": np.zeros((20, 4), dtype=int)},
            r"train_images is int64 .* \[n, features\]",
        ),
        ({"group_names": np.array(["a"])}, "has 1 group_names, but groups up to 3"),
        ({"target_names": np.array(["a"])}, r"has 1 target_names, but targets of \[2\]"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load("npz", path)


def test_numbers_in_the_place_of_classes_are_told_where_they_belong(tmp_path: Path) -> None:
    path = save(tmp_path / "floats.npz", train_targets=None, train_labels=np.zeros(20))
    with pytest.raises(ValueError, match="numbers to predict are train_targets"):
        load("npz", path)
