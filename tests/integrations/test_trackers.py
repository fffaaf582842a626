"""Trackers: read back with TensorBoard's and W&B's own readers, without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ritornello
from ritornello import RehearsalBuffer
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train
from ritornello.experiments.training.extension import extend
from ritornello.experiments.training.saver import CheckpointSettings, Saver
from ritornello.experiments.training.tracking import Tracking
from ritornello.integrations import trackers
from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

pytest.importorskip("tensorboard")

Points = dict[str, list[tuple[int, float]]]
TRACKED = Tracking(("tensorboard",), track_every=10)


def in_tensorboard(folder: Path) -> Points:
    """Name to (step, figure), as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [(point.step, point.value) for point in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """Each step of an offline run, as W&B would upload it."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records_in(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


def records_in(content: bytes, block_bytes: int = 32768) -> Iterator[bytes]:
    """The records of a W&B file, which is a log of LevelDB: pieces in blocks, behind a header."""
    position, whole = 7, b""
    while position + 7 <= len(content):
        if block_bytes - position % block_bytes < 7:  # no room for a piece's header
            position += block_bytes - position % block_bytes
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def a_buffer(num_steps: int, **settings: Any) -> RehearsalBuffer:
    buffer = RehearsalBuffer(12, num_representatives=4, **settings)
    for _ in range(num_steps):
        buffer.update((torch.rand(6, 3), torch.arange(6) % 3))
    return buffer


# What a buffer gives.


def test_figures_of_a_buffer_that_is_empty() -> None:
    with a_buffer(0) as buffer:
        figures = buffer.stats().figures()
    assert figures == {"buffer/held": 0.0, "buffer/held_percent": 0.0, "buffer/shard_mb": 0.0}


def test_figures_of_a_buffer() -> None:
    with a_buffer(10) as buffer:
        stats = buffer.stats()
        figures = stats.figures("memory")
    assert all(type(each) is float for each in figures.values())
    assert figures["memory/held"] == 12
    assert figures["memory/held_percent"] == 100
    assert figures["memory/shard_mb"] == pytest.approx(12 * stats.record_bytes / 1e6)
    assert [figures[f"memory/held/class_{label}"] for label in range(3)] == [4, 4, 4]
    parts = ("waiting", "joining", "offering")
    exposed = sum(figures[f"memory/{each}_ms"] for each in parts)
    assert figures["memory/exposed_ms"] == pytest.approx(exposed)
    assert stats.seconds_exposed == pytest.approx(exposed * 10 / 1e3)
    in_worker = sum(figures[f"memory/{each}_ms"] for each in stats.seconds_per_stage)
    assert figures["memory/worker_ms"] == pytest.approx(in_worker)
    assert figures["memory/worker_ms"] == pytest.approx(
        sum(stats.seconds_per_stage.values()) * 1e3 / 10
    )
    assert figures["memory/hidden_ms"] == pytest.approx(
        max(0.0, in_worker - figures["memory/waiting_ms"])
    )
    assert figures["memory/sent_mb"] == figures["memory/received_mb"] == 0.0


def test_figures_since_the_last_time() -> None:
    with a_buffer(10) as buffer:
        first = buffer.stats()
        for _ in range(4):
            buffer.update((torch.rand(6, 3), torch.arange(6)))
        last = buffer.stats(per_class=False)
        since = last.since(first)
        assert (since.num_rounds, since.num_held, since.held_per_class) == (4, 12, {})
        for name in ("seconds_waited", "seconds_joining", "seconds_offering", "seconds_exposed"):
            assert getattr(since, name) == getattr(last, name) - getattr(first, name) or name == (
                "seconds_exposed"
            )
        for stage, seconds in since.seconds_per_stage.items():
            assert seconds == last.seconds_per_stage[stage] - first.seconds_per_stage[stage] > 0.0
        assert "buffer/exposed_ms" not in last.since(last).figures()  # a mean of nothing
        with pytest.raises(ValueError, match=r"since: the earlier stats have 14 rounds, these 10"):
            first.since(last)


def test_bytes_between_ranks() -> None:
    def rank_of(transport: Transport) -> tuple[float, float, float]:
        with a_buffer(10, transport=transport) as buffer:
            first = buffer.stats()
            for _ in range(5):
                buffer.update((torch.rand(6, 3), torch.arange(6)))
            last = buffer.stats()
        figures = last.since(first).figures()
        expected = (last.bytes_received - first.bytes_received) / 5e6
        return figures["buffer/sent_mb"], figures["buffer/received_mb"], expected

    (sent, received, expected), others = run_ranks(LocalTransport.connect(2), rank_of)
    assert received == pytest.approx(expected)
    assert (received, sent) == pytest.approx(others[:2])
    assert sent + received > 0.0


# The trackers.


def test_tensorboard_goes_on_without_double_steps(tmp_path: Path) -> None:
    with trackers.TensorBoard(tmp_path) as tracker:
        for step in range(1, 9):
            tracker.log({"train/loss": step, "nan": float("nan")}, step)
    going_on = trackers.TensorBoard(str(tmp_path), first_step=6)
    for step in range(6, 11):
        going_on.log({"train/loss": -step}, step)
    going_on.close()
    going_on.close()
    points = in_tensorboard(tmp_path)["train/loss"]
    assert points == [(step, step if step < 6 else -step) for step in range(1, 11)]


def test_tensorboard_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with trackers.TensorBoard("here") as tracker:
        monkeypatch.chdir("elsewhere")
        tracker.log({"loss": 1.0}, 1)
    assert in_tensorboard(tmp_path / "here")["loss"] == [(1, 1.0)]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_nothing_is_written_on_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(trackers.dist, "get_rank", lambda: 1)
    for tracker in (trackers.TensorBoard(tmp_path / "a"), trackers.WandB(tmp_path / "b")):
        with tracker:
            tracker.log({"x": 1.0}, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "tracker", "name"),
    [
        ("torch.utils.tensorboard", "TensorBoard", "TensorBoard"),
        ("wandb", "WandB", "Weights & Biases"),
    ],
)
def test_a_package_that_is_missing(
    package: str, tracker: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"trackers needs {name}: pip install 'ritornello\["):
        getattr(trackers, tracker)(tmp_path)


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'ritornello\[trackers\]'"):
        trackers.check("wandb")
    with pytest.raises(ImportError, match=r"pip install 'ritornello\[trackers\]'"):
        trackers.WandB(tmp_path)
    sys.modules.pop("wandb")


# Runs.


def test_settings_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--track mlflow: there are tensorboard, wandb"):
        Tracking(("mlflow",)).check()
    with pytest.raises(ValueError, match=r"--track-every 0: it must be at least 1"):
        Tracking(("tensorboard",), track_every=0).check()
    with pytest.raises(ValueError, match=r"trackers need an output folder"):
        train.run(recipe_named("digits"), tracking=TRACKED)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--track wandb: .*pip install 'ritornello\[trackers\]'"):
        Tracking(("wandb",)).check()


def test_a_tracker_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ritornello.CheckpointError, match=r"--track: .*tensorboard"):
        train.run(recipe_named("digits", num_tasks=2, epochs=1), str(tmp_path), tracking=TRACKED)


def check_curves(points: Points, results: dict[str, Any]) -> None:
    """That all that is promised is there, once for each step, and agrees with the results."""
    ends = [sum(results["steps_per_task"][: i + 1]) for i in range(len(results["tasks"]))]
    steps = sorted({*range(10, ends[-1] + 1, 10), *ends})
    for name in ("train/loss", "train/step_ms", "train/load_ms", "train/task", "buffer/held"):
        assert [step for step, _ in points[name]] == steps, name
    for name in ("exposed_ms", "hidden_ms", "waiting_ms", "exchange_ms", "received_mb"):
        assert [step for step, _ in points[f"buffer/{name}"]] == steps, name
    top1 = results["top1"]
    for task, _ in enumerate(ends):
        expected = [(end, 100 * top1[i][task]) for i, end in enumerate(ends) if i >= task]
        told = points[f"top1_percent/task_{task + 1}"]
        np.testing.assert_allclose(told, expected, rtol=1e-5)
    for name, figure in (
        ("top1_percent/average", results["average_top1"]),
        ("top5_percent/average", results["average_top5"]),
        ("top1_percent/forgetting", results["forgetting"]),
    ):
        assert [step for step, _ in points[name]] == ends
        assert points[name][-1][1] == pytest.approx(100 * figure)
    held = {name: of_class[-1][1] for name, of_class in points.items() if "/held/" in name}
    assert len(held) == len(results["class_names"])
    assert sum(held.values()) == points["buffer/held"][-1][1] == 200  # of all ranks


def test_a_run_on_two_ranks(tmp_path: Path) -> None:
    recipe = recipe_named("digits", epochs=1)
    arguments = (recipe, str(tmp_path), None, "", train.OFF, TRACKED)
    results = launch(2, train.run, *arguments)
    check_curves(in_tensorboard(tmp_path / "tensorboard"), results)


@pytest.mark.parametrize(("save_at", "crash_at"), [(13, 22), (16, 16)])
def test_a_run_that_goes_on(
    save_at: int, crash_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the middle of a task, and from its last step, after which it is tested."""
    recipe = recipe_named("digits", epochs=1)
    between_steps, at_task_end = Saver.between_steps, Saver.at_task_end

    class CrashError(RuntimeError):
        """Stands for the end of a process."""

    def crashing(saver: Saver, count: int, snapshot: Callable[[], Any]) -> None:
        between_steps(saver, count, snapshot)
        if count == crash_at:
            raise CrashError

    monkeypatch.setattr(Saver, "between_steps", crashing)
    monkeypatch.setattr(Saver, "at_task_end", lambda *_: None)
    saving = CheckpointSettings(save_every=save_at, resume=True)
    with pytest.raises(CrashError):
        train.run(recipe, str(tmp_path), saving=saving, tracking=TRACKED)
    assert (
        in_tensorboard(tmp_path / "tensorboard")["train/loss"][-1][0]
        == min(crash_at, 20) // 10 * 10
    )
    monkeypatch.setattr(Saver, "between_steps", between_steps)
    monkeypatch.setattr(Saver, "at_task_end", at_task_end)
    results = train.run(recipe, str(tmp_path), saving=saving, tracking=TRACKED)
    assert results["resumed"] == 1
    assert results["steps_per_task"][0] == 16
    points = in_tensorboard(tmp_path / "tensorboard")
    if save_at == 16:  # nobody has told of the losses since step 10
        for name, of_name in points.items():
            if name.startswith(("train/", "buffer/")) and "/held/" not in name:
                of_name.insert(1, (16, 0.0))
    check_curves(points, results)


def test_the_curves_of_a_run_that_is_extended_go_on(tmp_path: Path) -> None:
    recipe = recipe_named("digits", num_tasks=5, epochs=1)
    living = tmp_path / "living"
    train.run(recipe, str(living), tracking=TRACKED)
    generator = np.random.default_rng(0)
    arrays = {
        "train_images": generator.integers(0, 256, (40, 8, 8), dtype=np.uint8),
        "train_labels": np.arange(40) % 2,
        "test_images": generator.integers(0, 256, (8, 8, 8), dtype=np.uint8),
        "test_labels": np.arange(8) % 2,
    }
    np.savez(tmp_path / "day.npz", **arrays, class_names=["0", "new"])
    results = extend(living, tmp_path / "day.npz", changes={"epochs": 5}, tracking=TRACKED)
    points = in_tensorboard(living / "tensorboard")
    steps = [step for step, _ in points["train/loss"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == sum(results["steps_per_task"]) > 80
    assert len(points["top1_percent/average"]) == 6
    assert points["top1_percent/task_6"][-1][1] == pytest.approx(100 * results["top1"][-1][-1])


def test_probes_and_averaged_weights_have_curves(tmp_path: Path) -> None:
    recipe = recipe_named("digits", num_tasks=2, epochs=1, averaged=0.9, probe_every=8)
    results = train.run(recipe, str(tmp_path), tracking=TRACKED)
    points = in_tensorboard(tmp_path / "tensorboard")
    probes = results["probes"]
    assert [step for step, _ in points["probe_percent/newest"]] == [each["step"] for each in probes]
    assert points["probe_percent/newest"][-1][1] == pytest.approx(100 * probes[-1]["top1"][-1])
    later = [each["step"] for each in probes if each["task"] == 1]
    assert [step for step, _ in points["probe_percent/lowest_old"]] == later
    assert points["averaged_top1_percent/average"][-1][1] == pytest.approx(
        100 * results["average_averaged_top1"]
    )


def test_joint_training_has_figures_once_it_has_trained(tmp_path: Path) -> None:
    recipe = recipe_named("digits", num_tasks=2, epochs=1, strategy="joint")
    results = train.run(recipe, str(tmp_path), tracking=TRACKED)
    points = in_tensorboard(tmp_path / "tensorboard")
    assert [step for step, _ in points["top1_percent/average"]] == [sum(results["steps_per_task"])]
    assert "top1_percent/forgetting" not in points
    assert not [name for name in points if name.startswith("buffer/")]


def test_the_command_without_trackers_and_with_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys; from ritornello.experiments.cli import main; "
        "run = ['run', 'digits', '--epochs', '1', '--tasks', '2', '--output']; "
        "main([*run, 'untracked']); "
        "loaded = {'tensorboard', 'wandb', 'ritornello.integrations.trackers'} & {*sys.modules}; "
        "assert not loaded, loaded; "
        "main([*run, 'out', '--track', 'wandb', '--track-every', '10'])"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "TMPDIR": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = in_wandb(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ends = [sum(results["steps_per_task"][: i + 1]) for i in range(2)]
    assert [row["_step"] for row in rows] == sorted({*range(10, ends[-1] + 1, 10), *ends})
    assert rows[-1]["top1_percent/average"] == pytest.approx(100 * results["average_top1"])
    assert rows[-1]["buffer/held/class_3"] == 20
    assert {"train/loss", "buffer/exposed_ms", "buffer/hidden_ms"} <= set(rows[0])
    [file] = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    run_id = (tmp_path / "out" / "wandb" / trackers.RUN_ID).read_text().strip()
    assert file.name == f"run-{run_id}.wandb"


def test_a_run_of_wandb_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    class Run:
        id = "abc"

        def finish(self, exit_code: int = 0) -> None:
            made.append({"exit_code": exit_code})

    made: list[dict[str, Any]] = []

    def init(**settings: Any) -> Run:
        made.append(settings)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    trackers.WandB(tmp_path, name="mine").close()
    with pytest.raises(KeyError), trackers.WandB(tmp_path, name="mine"):
        raise KeyError
    monkeypatch.chdir(tmp_path)
    trackers.WandB("here").close()
    assert made[-2:] == [{"dir": str(tmp_path / "here")}, {"exit_code": 0}]
    del made[-2:]
    first = {"dir": str(tmp_path), "name": "mine"}
    again = {**first, "id": "abc", "resume": "allow"}
    assert made == [first, {"exit_code": 0}, again, {"exit_code": 1}]
