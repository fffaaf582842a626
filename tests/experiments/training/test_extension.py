"""A run that has finished goes on with data that nobody knew of when it began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ritornello import RehearsalBuffer, SavedFolder
from ritornello.errors import CheckpointError
from ritornello.experiments import cli
from ritornello.experiments.cli.flags import RehearsalChanges, TaskChanges
from ritornello.experiments.data.load import load
from ritornello.experiments.inspection.inspection import find_buffers
from ritornello.experiments.models import build as models
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.reporting import report
from ritornello.experiments.results import reading as saved_results
from ritornello.experiments.results import run_folder as living_folder
from ritornello.experiments.results.groups import groups_of
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies.der import with_further_logits
from ritornello.experiments.training import extension_plan
from ritornello.experiments.training import run as train
from ritornello.experiments.training.extension import extend
from ritornello.experiments.training.saver import CheckpointSettings, Saver
from ritornello.experiments.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("forked_ranks")

RESUME = CheckpointSettings(save_every=5, resume=True)

LIVING = {"buffer", "model.pt", "results.json"}


class CrashError(RuntimeError):
    """Stands for the end of a process."""


def crash(*_: Any, **__: Any) -> None:
    raise CrashError


@pytest.fixture(scope="module")
def arrived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits in files and folders, as they may arrive."""
    folder = tmp_path_factory.mktemp("arrived")
    digits = load("digits")
    images = [part.images.numpy()[:, 0] for part in (digits.train, digits.test)]  # type: ignore[attr-defined]
    labels = [digits.train.labels, digits.test.labels]

    def npz(name: str, classes: Sequence[int], **further: Any) -> None:
        wanted = [np.isin(each, classes) for each in labels]
        np.savez(
            folder / name,
            train_images=images[0][wanted[0]],
            train_labels=labels[0][wanted[0]],
            test_images=images[1][wanted[1]],
            test_labels=labels[1][wanted[1]],
            **further,
        )

    def pictures(name: str, classes: Sequence[int]) -> None:
        for label in classes:
            for number in np.flatnonzero(labels[0] == label)[:60].tolist():
                file = folder / name / str(label) / f"{number:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[0][number]).save(file)

    npz("first.npz", range(6))
    npz("second.npz", [6, 7])
    npz("wide.npz", [6], class_names=[str(each) for each in range(7)])
    with np.load(folder / "wide.npz") as archive:
        wide = {name: archive[name] for name in archive.files}
    for part in ("train", "test"):
        wide[f"{part}_images"] = np.pad(wide[f"{part}_images"], ((0, 0), (0, 0), (0, 4)))
    np.savez(folder / "wide.npz", **wide)
    pictures("day-3", [8, 9])
    pictures("more", [0, 1, 2])
    pictures("history/1", [1, 2])
    pictures("history/2", [2, 3])
    pictures("history/3", [0, 2])
    (folder / "empty").mkdir()
    (folder / "one-image").mkdir()
    (folder / "one-image" / "5").mkdir()
    shutil.copy(next((folder / "more" / "0").iterdir()), folder / "one-image" / "5")
    return folder


def recipe_of(arrived: Path, **changes: Any) -> Recipe:
    return recipe_named(
        "digits",
        **{
            "data": "npz", "data_path": str(arrived / "first.npz"), "num_tasks": 3, "epochs": 5,
            **changes,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(arrived: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.run(recipe_of(arrived), str(folder))
    return folder


@pytest.fixture
def living(finished: Path, tmp_path: Path) -> Path:
    """A finished run of the digits 0 to 5, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "living"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def names_in(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()} - {".lock"}


def matrix_of(results: Results) -> Any:
    return np.array(results["top1"], dtype=np.float64)


def held_in(folder: Path) -> dict[int, int]:
    """Representatives of each class."""
    with RehearsalBuffer(200, num_representatives=16) as buffer:
        buffer.load(folder / "buffer")
        return buffer.stats().held_per_class


def test_day_after_day(living: Path, arrived: Path, tmp_path: Path) -> None:
    before = json.loads((living / "results.json").read_text())
    extend(living, arrived / "second.npz", command="first")
    extend(living, arrived / "day-3", name="today", command="second")
    results = extend(living, str(arrived / "more"), command="third")
    assert results == json.loads((living / "results.json").read_text())
    assert names_in(living) == LIVING
    matrix = matrix_of(results)
    assert matrix.shape == (6, 6)
    assert matrix[:3, :3].tolist() == before["top1"]
    # A task is tested from just before it is learnt.
    assert np.isnan(matrix).sum(axis=0).tolist() == [0, 0, 0, 2, 3, 4]
    assert matrix[2, 3] == matrix[3, 4] == 0.0
    assert matrix[4, 5] > 0.8
    assert results["average_top1"] == pytest.approx(matrix[-1].mean())
    assert results["average_top1"] > 0.85
    loss = np.array(results["loss"], dtype=np.float64)
    assert np.array_equal(np.isnan(loss), np.isnan(matrix))
    assert loss[:3, :3].tolist() == before["loss"]
    assert results["class_names"] == [str(label) for label in range(10)]
    assert [each["name"] for each in results["tasks"][3:]] == ["second", "today", "more"]
    assert [each["classes"] for each in results["tasks"][3:]] == [[6, 7], [8, 9], [0, 1, 2]]
    assert [each["command"] for each in results["tasks"][3:]] == ["first", "second", "third"]
    assert results["train_samples"] == sum(each["train_samples"] for each in results["tasks"])
    assert results["data"] == before["data"]
    assert results["top1_at_start"][:3] == before["top1_at_start"]
    assert results["top1_at_start"][3:] == [None] * 3
    assert set(held_in(living).values()) == {20}
    manifest = SavedFolder(living / "buffer").manifest
    assert [task.name for task in manifest.tasks][3:] == ["second", "today", "more"]
    weights = torch.load(living / "model.pt", weights_only=True)
    assert len(weights["5.bias"]) == 10
    # What reads results can read these.
    report.write_report(groups_of([results]), tmp_path / "report.html")
    saved_results.archive([results], tmp_path / "archive.json")
    [archived] = saved_results.find_results([tmp_path / "archive.json"])
    assert archived["top1"][0][5] is None


def test_rehearsal_keeps_what_incremental_training_forgets(
    living: Path, arrived: Path, tmp_path: Path
) -> None:
    train.run(recipe_of(arrived, strategy="incremental"), str(tmp_path / "incremental"))
    forgotten = extend(tmp_path / "incremental", arrived / "second.npz")
    kept = extend(living, arrived / "second.npz")
    assert names_in(tmp_path / "incremental") == LIVING - {"buffer"}
    assert matrix_of(forgotten)[-1, 3] > 0.9
    assert matrix_of(kept)[-1, 3] > 0.9
    assert np.mean(matrix_of(forgotten)[-1, :3]) < 0.2
    assert np.mean(matrix_of(kept)[-1, :3]) > 0.8


def test_an_extended_run_ends_as_one_that_knew_all(living: Path, arrived: Path) -> None:
    known = train.run(recipe_of(arrived, data="digits", data_path=None, num_tasks=5))
    extend(living, arrived / "second.npz")
    extended = extend(living, arrived / "day-3", changes={"epochs": 10})
    assert abs(known["average_top1"] - extended["average_top1"]) < 0.1


def test_old_outputs_are_as_they_were(
    living: Path, arrived: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = torch.load(living / "model.pt", weights_only=True)
    seen: list[dict[str, torch.Tensor]] = []

    def look(trainer: Trainer, saver: Saver | None = None, figures: Any = None) -> None:
        seen.append({k: v.clone() for k, v in trainer.network.model.state_dict().items()})
        crash()

    monkeypatch.setattr(Trainer, "train", look)
    for _ in range(2):
        with pytest.raises(CrashError):
            extend(living, arrived / "second.npz")
    for name, weights in old.items():
        assert torch.equal(seen[0][name][: len(weights)], weights), name
        assert torch.equal(seen[0][name], seen[1][name]), name
    assert seen[0]["5.weight"].shape == (8, 100)
    assert seen[0]["5.weight"][6:].abs().max() > 0


def test_other_numbers_of_ranks(living: Path, arrived: Path) -> None:
    first = launch(2, extend, str(living), str(arrived / "second.npz"))
    assert first["world_size"] == 2
    assert [file.name[:13] for file in SavedFolder(living / "buffer").manifest.files] == [
        "shard-00000-o", "shard-00001-o",
    ]  # fmt: skip
    second = extend(living, arrived / "day-3")
    assert [each.get("world_size") for each in second["tasks"]] == [None] * 3 + [2, 1]
    assert set(held_in(living).values()) == {20}
    assert second["average_top1"] > 0.8


@pytest.mark.parametrize(
    ("changes", "above"),
    [
        ({"strategy": "er-ace"}, 0.65),
        ({"strategy": "der", "num_workers": 1}, 0.75),
        ({"strategy": "der++", "logits_dtype": "float16"}, 0.8),
        ({"strategy": "a-gem"}, 0.15),
        ({"strategy": "gdumb"}, 0.75),
        ({"scenario": "task-incremental"}, 0.9),
        ({"scenario": "domain-incremental-rotated", "num_tasks": 2}, 0.6),
        ({"sampling": "grasp", "selection": "grasp"}, 0.75),
        ({"selection": "reservoir"}, 0.75),
        ({"remembers": "herding", "selection": "first-offered"}, 0.75),
        ({"optimiser": "adam", "keeps_optimiser": True, "learning_rate": 0.005}, 0.8),
        ({"capacity": 0.2, "loss_weights": "by-task", "iterations": 80}, 0.75),
        ({"composition": "proportional", "first_share": 0.6}, 0.8),
        ({"composition": "proportional", "soft_targets": 1.0}, 0.8),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings(
    changes: dict[str, Any],
    above: float,
    arrived: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = train.run(recipe_of(arrived, **changes), str(tmp_path))
    extend(tmp_path, arrived / "second.npz")
    results = extend(tmp_path, arrived / "day-3")
    assert results["average_top1"] > above
    said = capsys.readouterr().err
    assert "second: 270 training and 90 test images of 2 classes, new: 6, 7\n" in said
    assert ("the optimiser begins anew" in said) == bool(changes.get("keeps_optimiser"))
    if "capacity" in changes:
        assert results["config"]["capacity"] == first["buffer"]["capacity"] == round(0.2 * 812)
    if str(changes.get("strategy")).startswith("der"):
        logits_bytes = 2 if "logits_dtype" in changes else 4
        assert results["buffer"]["record_bytes"] == -(-(64 + 8 + 10 * logits_bytes) // 16) * 16


def test_settings_that_change_are_kept(living: Path, arrived: Path) -> None:
    changes = {"capacity": 300, "epochs": 2, "learning_rate": 0.04}
    first = extend(living, arrived / "second.npz", changes=changes)
    assert first["buffer"]["num_held"] == 300
    second = extend(living, arrived / "day-3")
    assert second["steps_per_task"][3:] == [2 * (270 // 16), 2 * (108 // 16)]
    assert second["config"]["learning_rate"] == 0.04
    third = extend(living, arrived / "more", changes={"capacity": 100, "iterations": 20})
    assert third["buffer"]["capacity"] == third["buffer"]["num_held"] == 100
    assert third["steps_per_task"][5] == 20


def test_averaged_weights_and_probes_go_on(arrived: Path, tmp_path: Path) -> None:
    train.run(recipe_of(arrived, averaged=0.9, probe_every=20), str(tmp_path))
    before = torch.load(tmp_path / "averaged.pt", weights_only=True)
    first = extend(tmp_path, arrived / "second.npz")
    after = torch.load(tmp_path / "averaged.pt", weights_only=True)
    assert [len(each["5.bias"]) for each in (before, after)] == [6, 8]
    assert [len(row) for row in first["averaged_top1"]] == [4] * 4
    assert None not in first["averaged_top1"][-1]
    assert {each["task"] for each in first["probes"]} == {0, 1, 2, 3}
    steps = [each["step"] for each in first["probes"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == sum(first["steps_per_task"])
    # What is not wanted any more leaves with its file.
    second = extend(tmp_path, arrived / "day-3", changes={"averaged": 0.0, "probe_every": 0})
    assert "averaged_top1" not in second
    assert names_in(tmp_path) == LIVING
    assert second["probes"] == first["probes"]
    assert "stability_gap" in first
    assert "stability_gap" not in second  # as nobody has looked at the last task


def test_a_run_that_did_not_average_may_begin(living: Path, arrived: Path) -> None:
    before = json.loads((living / "results.json").read_text())
    del before["loss"]  # as in results of an earlier release
    (living / "results.json").write_text(json.dumps(before))
    first = extend(living, arrived / "second.npz", changes={"averaged": 0.9, "probe_every": 9})
    # The average begins with the weights themselves; what it could do before is not known.
    assert first["averaged_top1"][:2] == [[None] * 4] * 2
    assert first["averaged_top1"][2] == first["top1"][2]
    assert first["loss"][:2] == [[None] * 4] * 2
    assert None not in first["loss"][2] + first["loss"][3]
    assert {each["task"] for each in first["probes"]} == {3}
    assert names_in(living) == LIVING | {"averaged.pt"}
    (living / "averaged.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*averaged\.pt"):
        extend(living, arrived / "day-3")


def test_a_run_with_a_holdout_goes_on_with_one(arrived: Path, tmp_path: Path) -> None:
    train.run(recipe_of(arrived, holdout=0.2), str(tmp_path))
    first = extend(tmp_path, arrived / "second.npz")
    assert first["tasks"][-1]["train_samples"] + first["tasks"][-1]["test_samples"] == 270
    second = extend(tmp_path, arrived / "day-3")
    assert None not in second["top1"][-1]


def test_a_run_goes_on_composed_in_proportion(living: Path, arrived: Path) -> None:
    """On another number of ranks, of days of unequal size, with soft targets from one day on."""
    changes = {"composition": "proportional", "soft_targets": 1.0, "first_share": 0.6}
    extend_so = partial(extend, changes=changes)
    first = launch(2, extend_so, str(living), str(arrived / "second.npz"))
    assert first["samples_per_step"] == 32
    assert (first["config"]["sampling"], first["steps_per_task"][3]) == ("earlier-tasks", 5 * 16)
    assert first["buffer"]["record_bytes"] == 112  # 64 pixels, a label, 8 logits
    changes = {"composition": "append", "loss_weights": "by-sample"}
    with pytest.raises(ValueError, match="soft_targets=0: the run's buffer stores soft targets"):
        extend(living, arrived / "day-3", changes={"soft_targets": 0.0})
    second = extend(living, arrived / "day-3", changes=changes)
    assert second["config"]["sampling"] == "uniform"
    assert second["average_top1"] > 0.7


def test_a_day_of_a_folder_of_days(arrived: Path, tmp_path: Path) -> None:
    """The class that comes with the last day is the first by its name: earlier labels stay."""
    days = tmp_path / "days"
    for day in ("1", "2"):
        shutil.copytree(arrived / "history" / day, days / day)
    recipe = recipe_named(
        "arrivals", model="mlp", data_path=str(days), image_size=8, augmentation="none",
        crop_size=None, epochs=12, warmup_epochs=1.0, milestones=(), global_batch_size=16,
        learning_rate=0.02, num_workers=0, capacity=60, global_num_representatives=16,
    )  # fmt: skip
    before = train.run(recipe, str(tmp_path / "out"))
    shutil.copytree(arrived / "history" / "3", days / "3")
    results = extend(tmp_path / "out", days / "3")
    assert results["class_names"] == ["1", "2", "3", "0"]
    assert [each["classes"] for each in results["tasks"]] == [[0, 1], [1, 2], [1, 3]]
    matrix = matrix_of(results)
    assert matrix[:2, :2].tolist() == before["top1"]
    assert matrix[-1].min() > 0.7
    shutil.move(days / "1", tmp_path / "1")
    shutil.rmtree(days / "2")
    shutil.copytree(arrived / "more", days / "4")
    last = extend(tmp_path / "out", days / "4", tests=[tmp_path])["top1"][-1]
    assert [each is None for each in last] == [False, True, False, False]


def test_data_that_are_gone_and_data_that_were_moved(
    living: Path, arrived: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((living / "results.json").read_text())
    results["data"]["path"] = str(tmp_path / "gone" / "first.npz")
    (living / "results.json").write_text(json.dumps(results))
    gone = extend(living, arrived / "second.npz")
    assert gone["top1"][-1][:3] == [None] * 3
    assert gone["average_top1"] == gone["top1"][-1][3] > 0.9
    assert gone["forgetting"] == 0.0
    said = capsys.readouterr().err
    assert (
        "3 earlier tasks cannot be tested (--test says where data lie now); 0, 1: there is" in said
    )
    found = extend(living, arrived / "day-3", tests=[arrived / "first.npz"])
    # What was not known is measured before the new task is learnt.
    assert None not in found["top1"][-2] + found["top1"][-1]
    with pytest.raises(
        ValueError, match=r"--test .*nowhere: no data of an earlier task .*first.npz"
    ):
        extend(living, arrived / "more", tests=[tmp_path / "nowhere"])
    shutil.copy(arrived / "second.npz", tmp_path / "first.npz")
    others = extend(living, arrived / "more", tests=[tmp_path / "first.npz"])
    assert others["top1"][-1][:3] == [None] * 3
    # Its figures can still be shown.
    report.write_report(groups_of([others]), tmp_path / "report.html")


def test_a_path_that_is_used_again_holds_no_earlier_data(
    living: Path, arrived: Path, tmp_path: Path
) -> None:
    today = tmp_path / "today.npz"
    for name, source in (("monday", "second.npz"), ("tuesday", "first.npz")):
        shutil.copy(arrived / source, today)
        results = extend(str(living), str(today), name=name, changes={"epochs": 1})
    assert results["top1"][-1][3] is None  # monday's are gone
    assert results["top1"][-1][4] is not None


def test_a_damaged_model_is_named(living: Path, arrived: Path) -> None:
    (living / "model.pt").write_bytes((living / "model.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.pt"):
        extend(str(living), str(arrived / "second.npz"))


def test_another_folder(living: Path, arrived: Path, tmp_path: Path) -> None:
    before = contents(living)
    other = tmp_path / "other"
    results = extend(living, arrived / "second.npz", output=other, saving=RESUME)
    assert contents(living) == before
    assert names_in(other) == LIVING
    assert json.loads((other / "results.json").read_text()) == results
    assert extend(living, arrived / "second.npz", output=other, saving=RESUME) == results
    with pytest.raises(FileExistsError, match="it exists and is not empty; give another folder"):
        extend(living, arrived / "second.npz", output=other)
    assert len(extend(other, arrived / "day-3")["tasks"]) == 5
    assert contents(living) == before


def test_a_class_may_come_with_shares_that_are_fixed_if_it_is_an_old_one(
    arrived: Path, tmp_path: Path
) -> None:
    train.run(recipe_of(arrived, fixed_shares=True, epochs=1), str(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"new classes \(6, 7\), but the run was made with --fixed"
    ):
        extend(tmp_path, arrived / "second.npz")
    assert contents(tmp_path) == before
    assert len(extend(tmp_path, arrived / "more")["tasks"]) == 4


def test_a_task_that_is_told_brings_new_classes(arrived: Path, tmp_path: Path) -> None:
    train.run(recipe_of(arrived, scenario="task-incremental", epochs=1), str(tmp_path))
    with pytest.raises(ValueError, match="the new task has classes of earlier ones"):
        extend(tmp_path, arrived / "more")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": "nowhere"}, FileNotFoundError, "nowhere: there is no such file or folder"),
        ({"data": "empty"}, ValueError, "empty has no images to train on"),
        ({"data": "one-image"}, ValueError, "has no image to test with"),
        ({"data": "wide.npz"}, ValueError, "8 x 12 with 1 channel, but those before are of 8 x 8"),
        ({"data": "second.npz", "name": "2, 3"}, ValueError, "has learnt '2, 3' already; if these"),
        ({"changes": {"model": "mlp-400"}}, ValueError, "model: a run goes on with its own; what may"),
        ({"changes": {"capacity": 0.5}}, ValueError, "capacity=0.5: say how many"),
        ({"changes": {"learning_rate": 0.0}}, ValueError, "learning_rate=0.0: it must be above 0"),
        ({"changes": {"global_batch_size": 500}}, ValueError, "fewer than global_batch_size=500"),
        ({"saving": CheckpointSettings(keep_buffer="off")}, ValueError, "--keep-buffer off: without its buffer"),
    ],
)  # fmt: skip
def test_what_cannot_be_changes_nothing(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    living: Path,
    arrived: Path,
) -> None:
    before = contents(living)
    data = arrived / arguments.pop("data", "second.npz")
    with pytest.raises(error, match=message):
        extend(living, data, **arguments)
    assert contents(living) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "generative", "distillation": 0.1},
        {"strategy": "generative", "conditional": False, "distillation": 0.1, "distance": "js"},
        {"generated_share": 0.5},
    ],
    ids=["conditional", "unconditional", "partly"],
)
def test_a_generator_goes_on_with_further_classes(
    changes: dict[str, Any], arrived: Path, tmp_path: Path
) -> None:
    small = {"generator_units": 64, "latents": 8, "generator_learning_rate": 0.005}
    train.run(recipe_of(arrived, num_tasks=1, **small, **changes), str(tmp_path))
    left = torch.load(tmp_path / "strategy.pt", weights_only=True)
    results = extend(tmp_path, arrived / "second.npz")
    state = torch.load(tmp_path / "strategy.pt", weights_only=True)
    assert (left["num_classes"], state["num_classes"]) == (6, 8)
    assert state["classes"] == list(range(8))
    assert state["step"] == left["step"] + results["steps_per_task"][-1]
    assert results["average_top1"] > 0.65  # the newest task alone would make a half
    if changes.get("conditional", True):
        assert state["frozen"]["classes.0.weight"].shape == (8, 64)


@pytest.mark.parametrize("strategy", ["si", "si-rehearsal"])
def test_importances_go_on_with_further_classes(
    strategy: str, arrived: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train.run(recipe_of(arrived, strategy=strategy, num_tasks=2, epochs=1), str(folder))
    left = torch.load(folder / "strategy.pt", weights_only=True)["importances"]
    weights = torch.load(folder / "model.pt", weights_only=True)
    moved = []
    for strength in (0.0, 1.0):
        output = tmp_path / str(strength)
        extend(folder, arrived / "second.npz", output=output, changes={"si_strength": strength})
        state = torch.load(output / "strategy.pt", weights_only=True)["importances"]
        now = torch.load(output / "model.pt", weights_only=True)
        assert all(map(torch.equal, state["anchor"], now.values()))
        assert [len(each) for each in state["importance"]] == [100, 100, 100, 100, 8, 8]
        ways = zip(left["importance"], weights.values(), now.values(), strict=True)
        moved.append(sum((w * (a - b[: len(a)]) ** 2).sum().item() for w, a, b in ways))
    assert 0 < moved[1] < 0.8 * moved[0]


def extended_on_unlike_ranks(arrived: str, folder: str) -> None:
    for strategy in ("si", "fedssi"):
        recipe = recipe_of(
            Path(arrived), strategy=strategy, num_tasks=2, epochs=1, local_steps=3,
            surrogate_steps=2, ranks_differ=1.0,
        )  # fmt: skip
        train.run(recipe, f"{folder}/{strategy}")
        extend(f"{folder}/{strategy}", f"{arrived}/second.npz")


def test_unlike_ranks_go_on(arrived: Path, tmp_path: Path) -> None:
    launch(2, extended_on_unlike_ranks, str(arrived), str(tmp_path))
    for strategy in ("si", "fedssi"):
        left = torch.load(tmp_path / strategy / "strategy.pt", weights_only=True)
        one, other = (each["importance"] for each in left["of_ranks"])
        assert one[-1].shape == other[-1].shape == (8,)
        assert not torch.equal(one[-1], other[-1])
    one_rank = {"local_steps": 0, "si_strength": 0.01}
    results = extend(tmp_path / "si", arrived / "day-3", changes=one_rank)
    left = torch.load(tmp_path / "si" / "strategy.pt", weights_only=True)
    assert [len(each) for each in left["importances"]["importance"]][-1] == 10
    assert results["config"]["ranks_differ"] == 1.0  # of ranks to come, too
    held = results["train_samples_per_rank"]
    assert [len(each) for each in held] == [2, 2, 2, 1]
    assert [sum(each) for each in held] == [each["train_samples"] for each in results["tasks"]]
    saved_results.archive([results], tmp_path / "archive.json")
    [archived] = saved_results.find_results([tmp_path / "archive.json"])
    assert archived["train_samples_per_rank"] == held


def test_runs_that_cannot_go_on(
    finished: Path, living: Path, arrived: Path, tmp_path: Path
) -> None:
    new = arrived / "second.npz"
    for strategy in ("from-scratch", "joint"):
        folder = tmp_path / strategy
        train.run(recipe_of(arrived, strategy=strategy, epochs=1), str(folder))
        with pytest.raises(
            ValueError, match=f"the strategy '{strategy}' trains on the data of all"
        ):
            extend(folder, new)
    for strategy, what in (
        ("generative", "its generator"),
        ("si", "the importances of its weights"),
    ):
        folder = tmp_path / strategy
        train.run(recipe_of(arrived, epochs=1, strategy=strategy), str(folder))
        (folder / "strategy.pt").unlink()
        with pytest.raises(FileNotFoundError, match=f"has no strategy.pt: without {what} this run"):
            extend(folder, new)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished run: give the output folder of"):
        extend(tmp_path / "none", new)
    assert not names_in(tmp_path / "none")
    (tmp_path / "none" / "checkpoints").mkdir()
    with pytest.raises(
        FileNotFoundError, match="its run was interrupted, and goes on with --resume"
    ):
        extend(tmp_path / "none", new)
    (tmp_path / "none" / "comparison.json").touch()
    with pytest.raises(FileNotFoundError, match="give one of the folders in it"):
        extend(tmp_path / "none", new)
    shutil.rmtree(living / "buffer")
    with pytest.raises(
        FileNotFoundError, match="has no buffer, and the strategy 'rehearsal' cannot"
    ):
        extend(living, new)
    shutil.copytree(finished / "buffer", living / "buffer")
    (living / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.pt"):
        extend(living, new)
    results = json.loads((living / "results.json").read_text())
    results["config"]["colour"] = "red"
    (living / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="settings of another version of Ritornello: colour"):
        extend(living, new)
    del results["data"]
    (living / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="does not say how pixels were normalised"):
        extend(living, new)


def test_square_images_alone_can_be_files(living: Path, arrived: Path) -> None:
    results = json.loads((living / "results.json").read_text())
    results["data"]["image_shape"] = [1, 8, 9]
    (living / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="images of files are square .* give an npz file"):
        extend(living, arrived / "day-3")


def test_a_class_that_is_only_tested(living: Path, arrived: Path, tmp_path: Path) -> None:
    shutil.copytree(arrived / "more", tmp_path / "day" / "train")
    shutil.copytree(arrived / "day-3", tmp_path / "day" / "test")
    with pytest.raises(ValueError, match="has no image to train on of 8, 9"):
        extend(living, tmp_path / "day")


def test_adapters_go_on_with_one_block_more_and_the_old_outputs_stay(
    arrived: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    recipe = recipe_of(
        arrived, strategy="adapter", model="test_efficientnet", epochs=1, num_tasks=2,
        global_batch_size=64, adapter_width=4, weight_decay=0.1, momentum=0.9, averaged=0.5,
    )  # fmt: skip
    train.run(recipe, str(folder))
    old = torch.load(folder / "model.pt", weights_only=True)
    results = extend(folder, arrived / "second.npz", changes={"orthogonality": 0.5})
    assert results["config"]["orthogonality"] == 0.5
    new = torch.load(folder / "model.pt", weights_only=True)
    averaged = torch.load(folder / "averaged.pt", weights_only=True)
    assert new.keys() == averaged.keys()
    further = {name.rpartition("adapter.")[2] for name in new.keys() - old.keys()}
    assert further == {"down.2", "up.2"}
    assert new["classifier.weight"].shape[0] == 8
    for name, value in old.items():
        assert torch.equal(new[name][: len(value)] if value.ndim else new[name], value), name
    assert all(value.any() for name, value in new.items() if name.endswith("up.2"))


@pytest.mark.parametrize("moment", ["training", "writing", "renaming"])
def test_a_crash_before_the_end_leaves_all_as_it_was(
    moment: str, living: Path, arrived: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(living)
    owner, name = {
        "training": (Saver, "between_steps"),
        "writing": (train, "write_json"),
        "renaming": (living_folder, "sync_folder"),
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, crash)
        with pytest.raises((CrashError, CheckpointError)):
            extend(living, arrived / "second.npz", saving=CheckpointSettings(save_every=100_000))
    assert contents(living) == before
    assert len(extend(living, arrived / "second.npz")["tasks"]) == 4


@pytest.mark.parametrize("num_renames", range(1, 6))
def test_a_crash_between_the_renames(
    num_renames: int, living: Path, arrived: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first rename on, the extension is what counts."""
    rename, done = Path.rename, []

    def crashing(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if living in path.parents and not path.name.endswith((".partial", ".tmp")):
            done.append(path)
            if len(done) == num_renames:
                raise CrashError
        return renamed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crashing)
        with pytest.raises(CheckpointError, match="cannot write into"):
            extend(living, arrived / "second.npz")
    assert len(saved_results.find_results([living])) == 1
    parts = {name: living_folder.part_of(living, name) for name in living_folder.PARTS}
    assert len(json.loads(parts["results.json"].read_text())["tasks"]) == 4
    assert len(torch.load(parts["model.pt"], weights_only=True)["5.bias"]) == 8
    assert len(SavedFolder(parts["buffer"]).manifest.tasks) == 4
    assert find_buffers(living)[0] == parts["buffer"]
    with pytest.raises(ValueError, match="has learnt 'second' already"):
        extend(living, arrived / "second.npz")
    assert names_in(living) == LIVING
    assert len(extend(living, arrived / "day-3")["tasks"]) == 5


def test_an_interrupted_extension_goes_on_bit_by_bit(
    living: Path, arrived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = extend(living, arrived / "second.npz", output=tmp_path / "undisturbed")
    before = contents(living)
    between_steps = Saver.between_steps

    def crashing(saver: Saver, count: int, *rest: Any) -> None:
        if count == 30:
            raise CrashError
        between_steps(saver, count, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "between_steps", crashing)
        with pytest.raises(CrashError):
            extend(living, arrived / "second.npz", saving=RESUME)
    assert {
        name: each for name, each in contents(living).items() if "extension" not in name
    } == before
    with pytest.raises(FileExistsError, match=r"an extension that was interrupted: .*\(--resume\)"):
        extend(living, arrived / "second.npz")
    with pytest.raises(
        ValueError, match=r"its tasks were .*'second'\], now .*; go on first with .*extension"
    ):
        extend(living, arrived / "day-3", saving=RESUME)
    assert find_buffers(living)[1].parent.parent.parent == living / "extension"
    results = extend(living, arrived / "second.npz", saving=RESUME)
    assert results["resumed"] == 1
    for name in ("weights_sha256", "top1", "steps_per_task"):
        assert results[name] == undisturbed[name]
    assert names_in(living) == LIVING
    # Once more: there is nothing to do.
    assert extend(living, arrived / "second.npz", saving=RESUME) == results


def test_one_job_at_a_time(living: Path, arrived: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ritornello.experiments.training.extension.locked", crash)
    with pytest.raises(CheckpointError, match="cannot begin: CrashError"):
        extend(living, arrived / "second.npz")


def test_the_command(
    living: Path,
    arrived: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    results = json.loads((living / "results.json").read_text())
    results["tasks"][1]["test_samples"] += 1  # so it is another file, and not used
    (living / "results.json").write_text(json.dumps(results))
    monkeypatch.chdir(living.parent)  # a short path, so that no line is broken
    arguments = ["extend", "living", "--data", str(arrived / "second.npz"), "--epochs", "2",
                 "--name", "new [days]", "--capacity", "210"]  # fmt: skip
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert "3 tasks so far, 6 classes; now: new [days]" in printed
    assert "rehearsal on 1 rank, seed 0, 210 representatives" in printed
    rows = [line.split() for line in printed.splitlines()[3:8]]
    assert rows[0] == ["task", "test", "images", "before", "after"]
    assert rows[2][-1] == "-"
    assert rows[4][:5] == ["new", "[days]", "90", "0.0", "%"]
    assert "With rehearsal from 210 representatives" in printed
    assert (living / "report.html").exists()
    written = json.loads((living / "results.json").read_text())
    assert written["command"].startswith("ritornello extend ")
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "has learnt 'new [days]' already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["extend", "nowhere", "--data", str(arrived / "second.npz")])
    assert "error: nowhere holds no finished run: give" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--weights", "other.pth"])
    assert ended.value.code == 2
    assert "error: extend --weights: a finished run goes on with its own" in capsys.readouterr().err
    cli.main([*arguments, "--resume"])
    assert "has been learnt before; nothing is run" in capsys.readouterr().err


def test_logits_of_classes_that_came_later() -> None:
    batch = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([[3.0, -1.0], [2.0, 4.0]])
    images, labels, logits = with_further_logits(batch, 4)
    assert logits.tolist() == [[3.0, -1.0, -1.0, -1.0], [2.0, 4.0, 2.0, 2.0]]
    assert images is batch[0]
    assert labels is batch[1]
    assert torch.equal(with_further_logits(batch, 2)[2], batch[2])


def test_widened_weights() -> None:
    torch.manual_seed(0)
    for name in (*models.SEQUENTIAL, "cifar-resnet18", "vit_tiny_patch16_224"):
        shape = (3, 224, 224) if name.startswith("vit") else (3, 16, 16)
        old, fresh = (models.build(name, num_classes, shape) for num_classes in (3, 5))
        images = torch.randn(2, *shape)
        old.eval()
        expected = old(images)
        fresh_head = list(fresh.state_dict().values())[-1][3:].clone()
        fresh.load_state_dict(models.widened(old.state_dict(), fresh.state_dict()))
        fresh.eval()
        torch.testing.assert_close(fresh(images)[:, :3], expected)
        assert torch.equal(list(fresh.state_dict().values())[-1][3:], fresh_head)
    with pytest.raises(ValueError, match="the weights are those of another model: see 1.weight"):
        models.widened(models.build("mlp", 2, (1, 8, 8)).state_dict(),
                       models.build("mlp", 2, (1, 9, 9)).state_dict())  # fmt: skip


def test_what_extend_offers_may_change() -> None:
    renamed = {
        "batch_size": "global_batch_size",
        "workers": "num_workers",
        "representatives": "global_num_representatives",
        "candidates": "global_num_candidates",
    }
    offered = [*fields(TaskChanges), *fields(RehearsalChanges)]
    assert {renamed.get(each.name, each.name) for each in offered} <= set(extension_plan.MAY_CHANGE)
