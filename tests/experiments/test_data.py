from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ritornello.experiments import data


def save_npz(path: Path, **changes: np.ndarray | None) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {
        "train_images": generator.integers(256, size=(20, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(20, dtype=np.uint8) % 4,
        "test_images": generator.integers(256, size=(8, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(8, dtype=np.uint8) % 4,
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_digits_are_embedded() -> None:
    digits = data.load("digits")
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.labels.dtype == np.int64
    shares = np.bincount(digits.test.labels) / np.bincount(
        np.concatenate([digits.train.labels, digits.test.labels])
    )
    assert np.all(np.abs(shares - 0.25) < 0.01)


def test_whole_mini_batches_through_a_loader() -> None:
    digits = data.load("digits")
    loader = DataLoader(digits.train, batch_sampler=[[3, 1], [5]], collate_fn=lambda batch: batch)
    (images, labels), _ = loader
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.tolist() == digits.train.labels[[3, 1]].tolist()
    image, label = digits.train[3]
    assert torch.equal(image, images[0])
    assert label == labels[0]


def test_npz_with_colour_images(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "mine.npz", class_names=np.array(["a", "b", "c", "d"]))
    mine = data.load("npz", str(path))
    assert mine.name == "mine"
    assert mine.image_shape == (3, 6, 5)
    assert mine.class_names == ("a", "b", "c", "d")
    with np.load(path) as archive:
        pixels = archive["train_images"]
    assert np.allclose(mine.mean, pixels.mean(axis=(0, 1, 2)) / 255)
    assert np.allclose(mine.std, pixels.std(axis=(0, 1, 2)) / 255)
    assert np.array_equal(mine.train[7][0].numpy(), np.moveaxis(pixels[7], 2, 0))


def test_npz_with_jpeg_streams(tmp_path: Path) -> None:
    def stream(colours: list[int]) -> dict[str, np.ndarray]:
        files = []
        for colour in colours:
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (colour, 10, 200)).save(file, "JPEG", quality=95)
            files.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
        return {"jpeg": np.concatenate(files), "offsets": np.cumsum([0, *map(len, files)])}

    train, test = stream([0, 80, 160]), stream([240])
    path = save_npz(
        tmp_path / "jpeg.npz",
        train_images=None,
        test_images=None,
        train_labels=np.array([0, 1, 2]),
        test_labels=np.array([2]),
        **{f"train_{key}": value for key, value in train.items()},
        **{f"test_{key}": value for key, value in test.items()},
    )
    images = data.load("npz", str(path)).train.images  # type: ignore[attr-defined]
    assert images.shape == (3, 3, 8, 8)
    assert np.allclose(images[:, 0].float().mean(dim=(1, 2)), [0, 80, 160], atol=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "has no test_labels"),
        ({"train_images": None}, "has no train_jpeg, train_offsets"),
        ({"train_labels": np.zeros(20)}, r"train_labels is float64 \[20\]"),
        ({"train_labels": np.zeros(3, dtype=int)}, "has 20 train_images but 3 train_labels"),
        ({"train_images": np.zeros((20, 4, 4))}, r"train_images is float64 .* must be uint8"),
        ({"class_names": np.array(["a"])}, "has 1 class_names, but labels up to 3"),
    ],
)
def test_npz_files_that_do_not_fit(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    path = save_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        data.load("npz", str(path))


def save_folder(folder: Path, classes: tuple[str, ...], parts: tuple[str, ...]) -> None:
    for part in parts:
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for copy in range(3):
                image = Image.new("RGB", (20, 12), (number * 100, copy * 50, 0))
                image.save(folder / part / name / f"{copy}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    save_folder(tmp_path, ("cat", "dog"), ("train", "val"))
    folder = data.load("folder", str(tmp_path), image_size=8)
    assert folder.class_names == ("cat", "dog")
    assert folder.image_shape == (3, 8, 8)
    images, labels = folder.train.__getitems__([0, 5])
    assert images.dtype == torch.uint8
    assert images[:, 0, 4, 4].tolist() == [0, 100]
    assert labels.tolist() == [0, 1]


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold a folder 'train' and a folder 'val'"):
        data.load("folder", str(tmp_path))
    save_folder(tmp_path, ("cat", "dog"), ("train",))
    save_folder(tmp_path, ("cat",), ("test",))
    with pytest.raises(ValueError, match=r"differ in classes: \['dog'\]"):
        data.load("folder", str(tmp_path))


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="data='svhn': there are 'digits'"):
        data.load("svhn")
    with pytest.raises(ValueError, match="data='npz' needs a path: --data"):
        data.load("npz")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        data.load("mnist", "nowhere.npz")


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(datasets, "MNIST", offline)
    with pytest.raises(ConnectionError, match="give an npz file .*--data FILE.npz"):
        data.load("mnist", str(tmp_path))


def test_real_mnist(shared_data: Path) -> None:
    mnist = data.load("mnist", str(shared_data / "mnist.npz"))
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert np.allclose([*mnist.mean, *mnist.std], [0.1307, 0.3081], atol=1e-4)
