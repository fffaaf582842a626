"""``ritornello inspect`` and ``ritornello forget``: what they show, write and refuse."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from torchvision.datasets import ImageFolder

from ritornello import RehearsalBuffer, SavedFolder
from ritornello.experiments.data.load import load
from ritornello.experiments.inspection import contact_sheet
from ritornello.experiments.inspection import tables as inspection_tables
from ritornello.experiments.inspection.inspection import find_buffers, inspect_buffer
from ritornello.saving.folder import replace_manifest
from ritornello.saving.manifest import Removal, TaskMark
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")


def sample(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image whose first pixel is its number; ten to a class."""
    image = torch.full((3, 8, 6), 10 * (number // 10), dtype=torch.uint8)
    image[:, 0, 0] = number
    return image, torch.tensor(number // 10), torch.tensor(900_000 + number)


def save(folder: Path, num_ranks: int = 2, change: Any = None, num_classes: int = 4) -> None:
    """Saves a buffer with ten samples of each class; each class is a task."""

    def rank_main(end: Transport) -> None:
        with RehearsalBuffer(
            10 * num_classes, num_representatives=2, selection="reservoir", transport=end
        ) as buffer:
            for label in range(num_classes):
                buffer.begin_task(f"day {label}")
                numbers = range(10 * label + end.rank, 10 * (label + 1), num_ranks)
                batch = tuple(torch.stack(each) for each in zip(*map(sample, numbers), strict=True))
                buffer.update(change(batch) if change else batch)
            buffer.save(folder)

    run_ranks(LocalTransport.connect(num_ranks), rank_main)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "7", "\0"])
def test_what_lies_beside_a_buffer_is_not_believed(text: str, tmp_path: Path) -> None:
    save(tmp_path / "buffer", num_ranks=1)
    (tmp_path / "results.json").write_text(text)
    assert inspect_buffer(tmp_path / "buffer").class_names == ()
    with open(tmp_path / "results.json", "ab") as file:
        file.truncate(2**40)  # which takes no room
    assert inspect_buffer(tmp_path / "buffer").class_names == ()


def mark_times(folder: Path, *hours: float) -> None:
    """Lets the tasks have begun some hours before the save."""
    manifest = SavedFolder(folder).manifest
    saved_at = "2024-05-04T12:00:00+00:00"
    tasks = tuple(
        TaskMark(task.name, task.first_round, 1714824000.0 - 3600 * ago)
        for task, ago in zip(manifest.tasks, hours, strict=True)
    )
    replace_manifest(folder, replace(manifest, tasks=tasks, saved_at=saved_at))


def damage(folder: Path, rank: int) -> str:
    name = SavedFolder(folder).manifest.files[rank].name
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    return name


def lines_of(printed: str) -> list[str]:
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_everything_that_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"))
    mark_times(Path("saved"), 96, 72, 48, 24)
    assert run("inspect", "saved") == 0
    lines = lines_of(capsys.readouterr().out)
    for expected in (
        "holds 40 representatives, of a capacity of 40",
        "shards 2, of 20, 20",
        "policies selection reservoir, sampling uniform",
        "per step and rank r = 2, c = all",
        "saved 2024-05-04 12:00:00+00:00",
        "batch[0] uint8 [3, 8, 6] 144",
        "batch[1] int64 [] 8 the class label",
        "0 10 ████████████████████ 4 4 4 4.0 d",
        "day 3 10 ████████████████████ 1 1 1 24 h",
        "all 40 4 2 1 4.0 to 1.0 d",
    ):
        assert expected in lines
    assert sum(line.endswith(" ok") for line in lines) == 2
    assert "Forgotten" not in lines


def test_many_classes_and_tasks_are_summed_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_tables, "MOST_ROWS", 3)
    monkeypatch.setattr(inspection_tables, "FEW_ROWS", 1)
    save(Path("saved"), num_classes=5)
    run("forget", "saved", "--where", "2=900001")
    capsys.readouterr()
    assert run("inspect", "saved") == 0
    lines = lines_of(capsys.readouterr().out)
    assert any(
        line.startswith("5 classes, of 9 to 10 representatives (median 10; 80 % from 9 to 10)")
        for line in lines
    )
    assert "the 2 before 19" in " ".join(lines)


@pytest.mark.parametrize("identity", [2, "index"])
def test_distinct_samples_are_counted(identity: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RehearsalBuffer(
        8, num_representatives=1, selection="reservoir", label=None, identity=identity
    ) as buffer:
        for index in (torch.arange(4), torch.arange(6)):
            batch = (index, index.float(), index)
            buffer.update(batch if identity == 2 else {"x": index.float(), "index": index})
        buffer.save("buffer")
    run("inspect", "buffer")
    assert "distinct           6 samples" in capsys.readouterr().out
    save(Path("without"))
    run("inspect", "without")
    assert "\n  distinct" not in capsys.readouterr().out


def test_a_buffer_that_has_not_begun(capsys: pytest.CaptureFixture[str]) -> None:
    with RehearsalBuffer(5, num_representatives=1) as buffer:
        buffer.save("saved")
    assert run("inspect", "saved") == 0
    assert "holds 0 representatives, of a capacity of 5" in lines_of(capsys.readouterr().out)
    assert run("inspect", "saved", "--picture", "p.png") == 2
    assert "no field of the samples is an image" in capsys.readouterr().err


def test_a_damaged_file_is_named_and_the_rest_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"))
    name = damage(Path("saved"), 1)
    assert run("inspect", "saved", "--export", "left.npz", "--picture", "p.png") == 1
    printed = "".join(capsys.readouterr().out.split())
    assert f"{name}" in printed
    assert printed.count("DAMAGED:") == 1
    assert "itsSHA-256is" in printed
    assert len(np.load("left.npz")["train_labels"]) == 20
    assert run("inspect", "saved", "--check", "off") == 0
    assert capsys.readouterr().out.count("not checked") == 2
    (Path("saved") / name).unlink()
    assert run("inspect", "saved", "--check", "off") == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_a_damaged_manifest_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"), num_ranks=1)
    (Path("saved") / "manifest.json").write_text("{")
    assert run("inspect", "saved") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("ritornello: error: ")
    assert "saved/manifest.json is damaged" in error
    assert "\n" not in error


def test_what_a_crash_has_left_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"), num_ranks=1)
    (Path("saved") / "shard-00000-of-00001-0123456789abcdef.safetensors.partial").touch()
    assert run("inspect", "saved") == 0
    assert "1 file more that a crash has left behind" in capsys.readouterr().out


def test_texts_of_a_manifest_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"), num_ranks=1)
    manifest = SavedFolder("saved").manifest
    tasks = tuple(replace(task, name="\x1b[31m[bold]x") for task in manifest.tasks)
    removals = (Removal({"\x07a": "[red]b"}, 1, 2, "then"),)
    replace_manifest(Path("saved"), replace(manifest, tasks=tasks, removals=removals))
    assert run("inspect", "saved") == 0
    printed = capsys.readouterr().out
    assert "?[31m[bold]x" in printed
    assert "?a=[red]b" in printed
    assert "\x1b" not in printed


def test_the_output_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save(Path(f"out/checkpoints/step-0000000{step}/buffer"), num_ranks=1)
    save(Path("out/checkpoints/step-00000003.partial/buffer"), num_ranks=1)
    newest = Path("out/checkpoints/step-00000002/buffer")
    assert find_buffers(Path("out"))[0] == newest
    assert run("inspect", "out") == 0
    assert f"folder {newest}" in lines_of(capsys.readouterr().out)
    save(Path("out/buffer"), num_ranks=1)
    names = ["cat", "dog", "emu", "fox"]
    Path("out/results.json").write_text(json.dumps({"class_names": names}))
    assert run("inspect", "out", "--export", "images") == 0
    lines = lines_of(capsys.readouterr().out)
    assert "folder out/buffer" in lines
    assert any(line.startswith("emu 10 ") for line in lines)
    assert ImageFolder("images").classes == names
    assert inspect_buffer(newest).class_names == tuple(names)


@pytest.mark.parametrize("content", ["{", "[]", '{"class_names": 3}', '{"class_names": [3]}', "{}"])
def test_results_without_names_of_classes(content: str) -> None:
    save(Path("out/buffer"), num_ranks=1)
    Path("out/results.json").write_text(content)
    assert inspect_buffer(Path("out/buffer")).class_names == ()


def test_the_picture_has_a_row_for_each_class_from_old_to_new() -> None:
    save(Path("saved"))
    assert run("inspect", "saved", "--picture", "new/p.png") == 0
    left, right, above, below = contact_sheet.MARGINS
    cell = (contact_sheet.CELL // 8 * 8, contact_sheet.CELL // 8 * 6)
    gap = contact_sheet.GAP
    with Image.open("new/p.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    width = left + 10 * (cell[1] + gap) + gap + right
    assert pixels.shape[:2] == (above + 4 * (cell[0] + gap) + gap + below, max(640, width))
    for row in range(4):
        tops = above + gap + row * (cell[0] + gap)
        lefts = [left + gap + column * (cell[1] + gap) for column in range(10)]
        firsts = [int(pixels[tops + 1, each + 1, 0]) for each in lefts]
        assert sorted(firsts) == list(range(10 * row, 10 * row + 10))
        middles = {int(pixels[tops + cell[0] // 2, each + cell[1] // 2, 0]) for each in lefts}
        assert middles == {10 * row}


def test_a_picture_of_many_classes_shows_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 2)
    monkeypatch.setattr(contact_sheet, "MOST_COLUMNS", 3)
    save(Path("saved"))
    assert run("inspect", "saved", "--picture", "p.jpg") == 0
    with Image.open("p.jpg") as image:
        assert image.height < 300


def test_a_picture_of_large_float_images_without_labels() -> None:
    with RehearsalBuffer(9, num_representatives=1, selection="fifo", label=None) as buffer:
        buffer.update({"pixels": torch.randn(9, 200, 100), "what": torch.arange(9)})
        buffer.save("saved")
    assert run("inspect", "saved", "--picture", "p.png") == 0
    with Image.open("p.png") as image:
        assert image.height == 64 + 24 + contact_sheet.CELL + 2 * contact_sheet.GAP


def test_a_run_can_read_the_exported_arrays_again() -> None:
    save(Path("saved"))
    assert run("inspect", "saved", "--export", "new/e.npz") == 0
    with np.load("new/e.npz") as archive:
        arrays = dict(archive)
    assert arrays["train_images"].shape == (40, 8, 6, 3)
    assert arrays["train_images"].dtype == np.uint8
    assert arrays["field_2"].tolist() == [
        900_000 + int(n) for n in arrays["train_images"][:, 0, 0, 0]
    ]
    assert [f"day {label}" for label in arrays["train_labels"]] == arrays["task"].tolist()
    assert arrays["admitted_in"].tolist() == arrays["train_labels"].tolist()
    for part in ("images", "labels"):
        arrays[f"test_{part}"] = arrays[f"train_{part}"]
    np.savez("both.npz", **arrays)
    data = load("npz", "both.npz")
    assert (len(data.train), data.image_shape, data.num_classes) == (40, (3, 8, 6), 4)


def test_arrays_of_any_samples() -> None:
    with RehearsalBuffer(9, num_representatives=1, label=("meta", "y")) as buffer:
        batch = {
            "grey": torch.rand(5, 1, 9, 9),
            "meta": {"y": torch.arange(5)},
            "logits": torch.randn(5, 7).bfloat16(),
            "task": torch.zeros(5, 0, dtype=torch.bool),
        }
        buffer.update(batch)
        buffer.save("saved")
    assert run("inspect", "saved", "--export", "e.npz") == 0
    with np.load("e.npz") as arrays:
        assert np.array_equal(arrays["train_images"], batch["grey"][:, 0].numpy())
        assert arrays["train_labels"].tolist() == [0, 1, 2, 3, 4]
        assert np.array_equal(arrays["logits"], batch["logits"].float().numpy())
        assert arrays["task_"].shape == (5, 0)
        assert arrays["task"].tolist() == [""] * 5


def test_exported_images_are_those_that_were_stored() -> None:
    save(Path("saved"), num_classes=11)
    assert run("inspect", "saved", "--export", "images") == 0
    images = ImageFolder("images")
    assert images.classes == [f"{label:02}" for label in range(11)]  # in the order of the labels
    assert len(images) == 110
    for image, label in images:
        pixels = np.asarray(image)
        assert pixels.shape == (8, 6, 3)
        assert pixels[0, 0, 0] // 10 == label
        assert pixels[4, 4, 0] == 10 * label
    assert (Path("images") / "00" / "01.png").exists()


def test_floats_from_0_to_1_can_be_image_files() -> None:
    def change(batch: Any) -> Any:
        return batch[0].float() / 255, *batch[1:]

    save(Path("saved"), 1, change)
    assert run("inspect", "saved", "--export", "images") == 0
    assert sorted(np.asarray(image)[0, 0, 0] for image, _ in ImageFolder("images")) == list(
        range(40)
    )


def save_normalised() -> None:
    save(Path("saved"), 1, lambda batch: (batch[0].float() - 20, *batch[1:]))


def save_vectors() -> None:
    save(Path("saved"), 1, lambda batch: (batch[0].flatten(1), *batch[1:]))


def save_without_labels() -> None:
    with RehearsalBuffer(9, num_representatives=1, selection="fifo", label=None) as buffer:
        buffer.update(torch.zeros(4, 3, 8, 8))
        buffer.save("saved")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (save_normalised, ("--export", "d"), "not from 0 to 1, as after a normalisation"),
        (save_vectors, ("--export", "d"), "no field of the samples is an image (uint8 or"),
        (save_vectors, ("--picture", "p.png"), "there are batch[0]: torch.uint8 [144]; batch[1]"),
        (save_vectors, ("--picture", "p.txt"), "--picture p.txt: the name must end with .png"),
        (save_without_labels, ("--export", "d"), "--export d: the buffer knows no labels"),
        (save_vectors, ("--export", "saved"), "--export saved: it exists; give another name"),
    ],
)
def test_pictures_and_files_that_cannot_be(
    prepare: Any, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    assert run("inspect", "saved", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ritornello: error: ")
    assert message in error
    assert "\n" not in error


def test_forgetting_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("saved"))
    where = ("--where", "label=3", "--where", "2=900030,900032,900012")
    assert run("forget", "saved", *where, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "saved: 2 samples would be forgotten, 38 representatives left",
        "  class: 3 (2)",
        "  task: day 3 (2)",
        "Nothing was changed.",
    ]
    assert run("forget", "saved", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "saved: 2 samples forgotten, 38 representatives left",
        "  class: 3 (2)",
        "  task: day 3 (2)",
    ]
    assert lines[3].startswith("  receipt: ")
    assert run("forget", "saved", *where, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("saved: nothing matches, of 38 representatives\n")
    assert run("inspect", "saved") == 0
    printed = lines_of(capsys.readouterr().out)
    assert any(line.endswith(": 2 removed, 38 left") for line in printed)
    assert "label=3" in printed
    assert sum(line.startswith("2=sha256:") for line in printed) == 3


def test_a_run_is_forgotten_with_its_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [Path("out/buffer"), Path("out/checkpoints/step-00000001/buffer")]
    for folder in folders:
        save(folder, num_ranks=1)
    assert run("forget", "out", "--where", "task=day 1") == 0
    printed = capsys.readouterr().out
    for folder in folders:
        assert f"{folder}: 10 samples forgotten, 30 representatives left" in printed
        assert 1 not in inspect_buffer(folder).tasks


def test_what_a_killed_run_has_left_half_written_goes_too() -> None:
    save(Path("out/buffer"))
    save(Path("out/checkpoints/step-00000009.partial/buffer"))
    assert run("forget", "out", "--where", "label=1") == 0
    assert not list(Path("out/checkpoints").iterdir())


def test_a_run_that_goes_on_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("out/buffer"))
    before = Path("out/buffer/manifest.json").read_bytes()
    program = (
        "from pathlib import Path; from ritornello.experiments.results.run_folder import locked\n"
        "with locked(Path('out')): print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert run("forget", "out", "--where", "label=1") == 2
        other.communicate("\n")
    assert Path("out/buffer/manifest.json").read_bytes() == before
    assert "another job is writing there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere"), "nowhere holds no saved buffer: give a folder from"),
        (("forget", "nowhere", "--where", "label=1"), "nowhere holds no saved buffer"),
        (("forget", "saved"), "forget: say with --where what; without a condition all would go"),
        (("forget", "saved", "--where", "label"), "--where label: it must be NAME=VALUE"),
        (("forget", "saved", "--where", "label="), "--where label=: it must be NAME=VALUE"),
        (
            ("forget", "saved", "--where", "label=1", "--where", "label=2"),
            "several values are one condition: --where label=1,2",
        ),
        (("forget", "saved", "--where", "id=1"), "where id: no field has that name; there are"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Path("saved"), num_ranks=1)
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ritornello: error: ")
    assert message in error
    assert "\n" not in error


def test_samples_of_unequal_length(capsys: pytest.CaptureFixture[str]) -> None:
    with RehearsalBuffer(9, num_representatives=1, capacity_bytes=9000) as buffer:
        for length in (3, 1):
            files = [b"x" * length, b"yy"]
            buffer.update(
                {0: [torch.zeros(length, 8, 8), torch.zeros(5, 8, 8)], 1: torch.arange(2), 2: files}
            )
        buffer.save("saved")
    assert run("inspect", "saved") == 0
    assert "[length, 8, 8]" in capsys.readouterr().out
    assert run("inspect", "saved", "--export", "e.npz") == 2
    assert "differ in length, and no array holds that" in capsys.readouterr().err
    assert run("inspect", "saved", "--export", "images") == 2


def test_pictures_of_telephones_are_exported_with_all_that_is_in_them() -> None:
    files, contents = [], []
    for number in range(4):  # JPEG files with a second picture in them, which Pillow calls MPO
        image, second = (Image.new("RGB", (16, 12), (60 * number, each, 0)) for each in (0, 200))
        further = {"format": "MPO", "save_all": True, "append_images": [second]}
        file = io.BytesIO()
        image.save(file, **(further if number else {"format": "JPEG"}))
        contents.append(file.getvalue())
        files.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    with RehearsalBuffer(9, num_representatives=1, capacity_bytes=10**6) as buffer:
        buffer.update((files, torch.tensor([0, 0, 1, 1])))
        buffer.save("saved")
    assert run("inspect", "saved", "--export", "images", "--picture", "p.png") == 0
    exported = sorted(Path("images").rglob("*.*"))
    assert [each.suffix for each in exported] == [".jpg"] * 4
    assert {each.read_bytes() for each in exported} == set(contents)
    assert len(ImageFolder("images")) == 4
