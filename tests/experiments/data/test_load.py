from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ritornello.experiments.data import load as data
from ritornello.experiments.data.data_set import InMemoryImages, Joined, Relabelled


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
        ({"train_images": None}, "has no train_images: it must hold train_images"),
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
    with pytest.raises(ValueError, match="image_size=0: it must be at least 1"):
        data.load("folder", str(tmp_path), image_size=0)
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"test: Found no valid file for the classes dog"):
        data.load("folder", str(tmp_path))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(ValueError, match=r"train: Couldn't find any class folder"):
        data.load("folder", str(tmp_path / "empty"))


@pytest.mark.parametrize("content", [b"no image", None], ids=["text", "cut off"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    save_folder(tmp_path, ("cat",), ("train", "val"))
    broken = tmp_path / "train" / "cat" / "1.png"
    broken.write_bytes(content or broken.read_bytes()[:60])
    folder = data.load("folder", str(tmp_path), image_size=8)
    folder.train.__getitems__([0, 2])
    with pytest.raises(ValueError, match=r"data: .*train/cat/1.png cannot be read as an image: "):
        folder.train.__getitems__([0, 1])


def test_imagenet_is_a_folder_stored_larger(tmp_path: Path) -> None:
    save_folder(tmp_path, ("n01440764", "n01443537"), ("train", "val"))
    assert data.load("imagenet", str(tmp_path)).image_shape == (3, 256, 256)
    assert data.load("folder", str(tmp_path)).image_shape == (3, 224, 224)
    small = data.load("imagenet", str(tmp_path), image_size=32)
    assert small.image_shape == (3, 32, 32)
    assert small.num_classes == 2
    assert small.arrivals is None


def save_images(folder: Path, *files: str, red: int = 0) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (red, 0, 0)).save(folder / file, "PNG")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet, tinier: two classes, whose order is not that of their names."""
    for name, red in (("n01", 100), ("n02", 200)):
        save_images(tmp_path / "train" / name / "images", *(f"{i}.JPEG" for i in "012"), red=red)
    (tmp_path / "train" / "n01" / "n01_boxes.txt").write_text("0.JPEG\t0\t0\t62\t62\n")
    save_images(tmp_path / "val" / "images", "val_0.JPEG", "val_1.JPEG", red=200)
    save_images(tmp_path / "val" / "images", "val_2.JPEG", red=100)
    lines = "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn02\nval_2.JPEG\tn01\t0\t0\t1\t1\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    return tmp_path


def test_tiny_imagenet_as_published(tiny: Path) -> None:
    for image_size, shape in ((None, (3, 64, 64)), (8, (3, 8, 8))):
        loaded = data.load("tiny-imagenet", str(tiny), image_size)
        assert loaded.image_shape == shape
    assert loaded.class_names == ("n02", "n01")
    for part, expected in ((loaded.train, [0] * 3 + [1] * 3), (loaded.test, [0, 0, 1])):
        assert part.labels.tolist() == expected
        images, labels = part.__getitems__(range(len(part)))
        assert images[:, 0, 4, 4].tolist() == [(200, 100)[label] for label in labels]
    (tiny / "wnids.txt").unlink()
    by_name = data.load("tiny-imagenet", str(tiny))
    assert by_name.class_names == ("n01", "n02")
    assert by_name.test.labels.tolist() == [1, 1, 0]


def test_tiny_imagenet_that_does_not_fit(tiny: Path) -> None:
    def load() -> None:
        data.load("tiny-imagenet", str(tiny))

    annotations = tiny / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines.partition("\n")[2])
    with pytest.raises(ValueError, match=r"one line for each image .* one of them has val_0.JPEG"):
        load()
    annotations.write_text(lines + "val_3.JPEG\tn01\n")
    with pytest.raises(ValueError, match=r"one line for each image .* one of them has val_3.JPEG"):
        load()
    for line in ("val_3.JPEG n01", "val_3.JPEG\tn03\t0", ""):
        annotations.write_text(f"{lines}{line}\n")
        with pytest.raises(ValueError, match="txt: line 4 is .*: it must be a file, a tab, and "):
            load()
    annotations.write_text("")
    for image in (tiny / "val" / "images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="one line for each image of .*; both are empty"):
        load()
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*val_annotations.txt.*data='folder'"):
        load()
    for image in (tiny / "train" / "n01" / "images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="train has no image to train on of n01"):
        load()
    (tiny / "wnids.txt").write_text("n02\nn03\n")
    with pytest.raises(ValueError, match=r"wnids.txt and .* differ in classes: \['n01', 'n03'\]"):
        load()
    with pytest.raises(FileNotFoundError, match="must hold a folder 'train' with CLASS/images"):
        data.load("tiny-imagenet", str(tiny / "val"))
    (tiny / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train has no class folders"):
        data.load("tiny-imagenet", str(tiny / "empty"))


def test_folders_that_arrived_over_time(tmp_path: Path) -> None:
    # With a split of its own; classes that are seen for the first time; a hidden folder.
    save_images(tmp_path / "2024-02", "train/dog/0.png", "train/dog/1.png", "val/dog/2.png")
    save_images(tmp_path / "2024-10", *(f"cat/{i:02}.png" for i in range(25)), "dog/0.png")
    save_images(tmp_path / "2024-09", "emu/0.png", "emu/1.png", "train/0.png", "train/1.png")
    save_images(tmp_path / ".trash", "dog/0.png")
    (tmp_path / "readme.txt").write_text("not an arrival")
    loaded = data.load("arrivals", str(tmp_path), image_size=8)
    assert loaded.class_names == ("cat", "dog", "emu", "train")
    assert loaded.image_shape == (3, 8, 8)
    assert loaded.arrivals is not None
    names, trained, tested = [], [], []
    for arrival in loaded.arrivals:
        names.append(arrival.name)
        trained.append(loaded.train.labels[arrival.train_indices].tolist())
        tested.append(loaded.test.labels[arrival.test_indices].tolist())
    assert names == ["2024-02", "2024-09", "2024-10"]
    assert trained == [[1, 1], [2, 3], [0] * 23 + [1]]
    assert tested == [[1], [2, 3], [0, 0]]
    for part, indices in ((loaded.train, "train_indices"), (loaded.test, "test_indices")):
        each_once = np.concatenate([getattr(arrival, indices) for arrival in loaded.arrivals])
        assert each_once.tolist() == list(range(len(part)))
    assert [Path(file).name for file in loaded.test.files] == [  # type: ignore[attr-defined]
        "2.png",
        "1.png",
        "1.png",
        "09.png",
        "19.png",
    ]


def test_arrivals_that_do_not_fit(tmp_path: Path) -> None:
    def load() -> None:
        data.load("arrivals", str(tmp_path))

    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        data.load("arrivals", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="must hold one folder per arrival"):
        load()
    day = tmp_path / "monday"
    day.mkdir()
    with pytest.raises(ValueError, match="monday has no images to train on"):
        load()
    save_images(day, "cat/0.png", "dog/0.png")
    with pytest.raises(ValueError, match="monday has no image to test with: a class must have two"):
        load()
    save_images(day, "cat/1.png")
    load()
    (day / "emu").mkdir()
    with pytest.raises(ValueError, match="has no image to train on of emu"):
        load()
    (day / "emu").rmdir()
    save_images(tmp_path / "tuesday", "train/cat/0.png")
    with pytest.raises(ValueError, match="tuesday has a folder 'train', but neither 'val' nor"):
        load()
    save_images(tmp_path / "tuesday", "val/dog/0.png")
    load()


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="data='svhn': there are 'digits', .*'arrivals'"):
        data.load("svhn")
    for name in ("npz", *data.FOLDERS):
        with pytest.raises(ValueError, match=f"data='{name}' needs a path: --data"):
            data.load(name)
    with pytest.raises(ValueError, match=r"data='npz': mine.zip does not end with .npz"):
        data.load("npz", "mine.zip")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        data.load("mnist", "nowhere.npz")


def test_an_npz_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    np.savez(path, train_images=np.zeros((9, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.npz is damaged, or no npz file"):
        data.load("npz", str(path))


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


def test_one_arrival(tmp_path: Path) -> None:
    save_images(tmp_path / "day" / "dog", *(f"{number}.png" for number in range(3)))
    save_images(tmp_path / "day" / "cat", *(f"{number:02}.png" for number in range(12)))
    arrival = data.load_arrival(tmp_path / "day", (1, 8, 8))
    assert (arrival.name, arrival.class_names) == ("day", ("cat", "dog"))
    assert arrival.image_shape == (1, 8, 8)
    assert arrival.train.labels.tolist() == [0] * 11 + [1] * 2
    assert arrival.test.labels.tolist() == [0, 1]
    assert data.load_arrival(tmp_path / "day", (3, 8, 8)).image_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="of files are square and have 1 or 3 channels, but those"):
        data.load_arrival(tmp_path / "day", (4, 8, 8))
    with pytest.raises(FileNotFoundError, match="there is no folder .*night"):
        data.load_arrival(tmp_path / "night", (3, 8, 8))


def test_several_data_sets_as_one() -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    first = InMemoryImages(images[:2], np.array([0, 1]))
    second = Relabelled(InMemoryImages(images[2:], np.array([0, 1, 1, 0])), np.array([5, 0]))
    joined = Joined([first, InMemoryImages(images[:0], np.zeros(0, np.int64)), second])
    assert joined.labels.tolist() == [0, 1, 5, 0, 0, 5]
    assert len(joined) == 6
    drawn, labels = joined.__getitems__([5, 0, 2, 5, 1])
    assert drawn.flatten().tolist() == [5, 0, 2, 5, 1]
    assert labels.tolist() == [5, 0, 5, 5, 1]
    assert joined[3][1] == 0
