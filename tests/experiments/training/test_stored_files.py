"""Recipes on folders of images, whose buffer stores the files in place of their pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ritornello import RehearsalBuffer
from ritornello.experiments.data.load import load
from ritornello.experiments.inspection.contact_sheet import draw_contact_sheet
from ritornello.experiments.inspection.export import export
from ritornello.experiments.inspection.inspection import inspect_buffer
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import with_changes
from ritornello.experiments.training import run as train
from ritornello.experiments.training.extension import extend
from ritornello.experiments.training.saver import CheckpointSettings

NUM_CLASSES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days of files of many sizes and three formats; a class is a colour, with noise."""
    folder = tmp_path_factory.mktemp("days")
    dice = np.random.default_rng(0)
    for day, classes in (("1", (0, 1)), ("2", (1, 2, 3)), ("3", (0, 3))):
        for label in classes:
            path = folder / day / f"class-{label}"
            path.mkdir(parents=True)
            colour = np.array([label & 1, label >> 1, 1]) * 140 + 50
            for number in range(14):
                height, width = dice.integers(20, 60, size=2)
                pixels = dice.normal(colour, 40, size=(height, width, 3)).clip(0, 255)
                name = f"{number:02}{('.jpg', '.png', '.webp')[number % 3]}"
                Image.fromarray(pixels.astype(np.uint8)).save(path / name)
    return folder


def recipe(folder: Path, **changes: Any) -> Any:
    small = with_changes(
        recipe_named("arrivals"),
        composition=changes.pop("composition", "proportional"),
        model="mlp",
        epochs=2,
        **{"data_path": str(folder), "augmentation": "none", "capacity": 100},
    )
    settings: dict[str, Any] = {
        "image_size": 12,
        "crop_size": None,
        "global_batch_size": 6,
        "global_num_representatives": 4,
        "num_workers": 0,
        "warmup_epochs": 0,
        "milestones": (),
        "stores": "files",
    }
    return replace(small, **(settings | changes))


@pytest.mark.parametrize(
    ("composition", "remembers"), [("append", "stream"), ("proportional", "last-epoch")]
)
def test_while_there_is_room_it_is_the_same_as_with_pixels(
    folder: Path, composition: str, remembers: str
) -> None:
    settings = {"composition": composition, "remembers": remembers, "selection": "reservoir"}
    files = train.run(recipe(folder, **settings, capacity=400))
    pixels = train.run(recipe(folder, **settings, capacity=400, stores="pixels"))
    assert files["weights_sha256"] == pixels["weights_sha256"]
    assert files["buffer"]["num_held"] == pixels["buffer"]["num_held"] > 50


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "er-ace"},
        {"strategy": "der", "logits_dtype": "float16"},
        {"strategy": "der++"},
        {"strategy": "a-gem"},
        {"strategy": "gdumb"},
        {"soft_targets": 0.5, "composition": "proportional"},
        {"sampling": "grasp", "capacity": 30},
        {"selection": "fifo", "capacity": 20},
        {"capacity": 0.3, "capacity_bytes": 40_000},
    ],
)
def test_every_strategy_and_policy(folder: Path, changes: dict[str, Any]) -> None:
    results = train.run(
        recipe(folder, **({"composition": "append", "remembers": "stream"} | changes))
    )
    assert results["average_top1"] > 0.3
    assert 0 < results["buffer"]["num_held"] <= results["buffer"]["capacity"]


def test_on_two_ranks_and_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    whole = launch(2, train.run, recipe(folder), str(tmp_path / "whole"))
    saving = CheckpointSettings(save_every=7, resume=True)
    settings = recipe(folder, strategy="der", composition="append", remembers="stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings, str(tmp_path / "part"), saving=saving)
    resumed = train.run(settings, str(tmp_path / "part"), saving=saving)
    assert resumed["resumed"] == 1
    assert resumed["weights_sha256"] == train.run(settings)["weights_sha256"]
    assert whole["buffer"]["num_held"] > 50


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_day_more(folder: Path, tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day in ("1", "2"):
        (days / day).symlink_to(folder / day)
    train.run(recipe(days), str(tmp_path / "run"))
    results = extend(tmp_path / "run", folder / "3", changes={"capacity": 120})
    assert [task["name"] for task in results["tasks"]] == ["1", "2", "3"]
    assert results["buffer"]["capacity"] == 120
    assert results["buffer"]["num_held"] > 80
    inspection = inspect_buffer(tmp_path / "run" / "buffer", True)
    assert inspection.is_whole
    draw_contact_sheet(inspection, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = np.asarray(sheet.convert("RGB"))[120:, 200:].reshape(-1, 3)
    assert colours.std() > 30
    num_samples = export(inspection, tmp_path / "files")
    originals = {file.read_bytes() for file in folder.rglob("*.*")}
    exported = [file for file in (tmp_path / "files").rglob("*.*") if file.is_file()]
    assert len(exported) == num_samples == results["buffer"]["num_held"]
    assert {file.suffix for file in exported} == {".jpg", ".png", ".webp"}
    assert {file.read_bytes() for file in exported} <= originals
    with pytest.raises(ValueError, match="differ in length, and no array holds that"):
        export(inspection, tmp_path / "arrays.npz")


def test_a_day_more_where_logits_lie_beside_files(folder: Path, tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "1").symlink_to(folder / "1")
    settings = {"strategy": "der", "composition": "append", "remembers": "stream", "epochs": 1}
    train.run(recipe(days, **settings), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="logits beside files cannot be widened for new classes"):
        extend(tmp_path / "run", folder / "3")


def test_bytes_that_are_no_image_are_not_drawn(tmp_path: Path) -> None:
    with RehearsalBuffer(10, num_representatives=1, capacity_bytes=9000) as buffer:
        buffer.update(([b"RIFF of a sound"] * 3, torch.arange(3)))
        buffer.save(tmp_path)
    inspection = inspect_buffer(tmp_path, True)
    message = "slot 0 holds no image file: it begins with b'RIFF of '"
    with pytest.raises(ValueError, match=message):
        draw_contact_sheet(inspection, tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stores": "jpeg"}, "stores='jpeg': there are pixels, files"),
        ({"capacity_bytes": 0}, "capacity_bytes=0: it must be at least 1"),
        (
            {"selection": "per-class-random"},
            "stores='files': selection: PerClassRandom does not say who gives way .*stores='pixels'",
        ),
        ({"remembers": "random"}, "stores='files' with remembers='random': use remembers='stream'"),
        ({"fixed_shares": True}, "stores='files' with fixed_shares=True: use fixed_shares=False"),
        (
            {"scenario": "domain-incremental-rotated"},
            "stores='files' with scenario='domain-incremental-rotated', whose images are not",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(recipe(folder, **changes))


def test_images_without_files_and_files_without_images(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stores='files' with data='digits': the images have no"):
        train.run(replace(recipe_named("digits"), stores="files"))
    broken = tmp_path / "1" / "class-0"
    broken.mkdir(parents=True)
    for number in range(8):
        (broken / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data: .*\.jpg cannot be read as an image"):
        train.run(recipe(tmp_path))


def test_a_run_without_a_buffer_reads_pixels_alone(folder: Path) -> None:
    settings = {"strategy": "incremental", "composition": "append", "remembers": "stream"}
    files = train.run(recipe(folder, **settings, selection="per-class-random"))
    pixels = train.run(recipe(folder, **settings, stores="pixels"))
    assert files["weights_sha256"] == pixels["weights_sha256"]


def test_what_is_decoded_is_what_a_loader_decodes(folder: Path) -> None:
    from ritornello.experiments.data.decoding import with_files

    data = load("arrivals", str(folder), 12)
    images, labels, files = with_files(data).train.__getitems__([0, 30, 5])
    plain = data.train.__getitems__([0, 30, 5])
    assert torch.equal(images, plain[0])
    assert torch.equal(labels, plain[1])
    assert files[1] == Path(data.train.file_of(30)).read_bytes()
