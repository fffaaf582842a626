"""A run that is stopped and goes on must end as the one that never stopped, bit by bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello import RehearsalBuffer
from ritornello.errors import CheckpointError
from ritornello.experiments.ranks.interruption import RunInterruptedError
from ritornello.experiments.ranks.launch import LaunchError, launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import STRATEGIES
from ritornello.experiments.training import checkpoints
from ritornello.experiments.training import run as train
from ritornello.experiments.training.checkpoints import Checkpoint
from ritornello.experiments.training.saver import CheckpointSettings, Saver

pytestmark = pytest.mark.usefixtures("forked_ranks")

EVERY_7 = CheckpointSettings(save_every=7, resume=True)

FEW_STEPS = {"num_tasks": 2, "epochs": 1, "global_batch_size": 128, "global_num_candidates": None}
"""Of models that are slow: 6 steps, one more for the end of the task, and 5."""

SMALL_ADAPTERS = {"model": "test_efficientnet", "adapter_width": 4, **FEW_STEPS}

ELSEWHERE = ("fedssi", "adapter", "adapter-rehearsal")
"""Strategies that want several ranks, or a model of timm."""

SLOW_MODELS = ("resnet10t", "test_efficientnet")

SMALL_GENERATOR = {"generator_units": 32, "latents": 8}

IF_MEASURED = ("averaged_sha256", "averaged_top1", "probes", "stability_gap")

AS_UNDISTURBED = ("weights_sha256", "top1", "top5", "loss", "steps_per_task", "top1_at_start")


class CrashError(RuntimeError):
    """Stands for the end of a process."""


def quick(**changes: Any) -> Recipe:
    return recipe_named("digits", **{"epochs": 2, "num_tasks": 3, **changes})


def preempt() -> None:
    signal.raise_signal(signal.SIGUSR1)


def crash() -> None:
    raise CrashError


StopAt = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> StopAt:
    """Has runs crash, or get a signal, when they come to a given moment."""
    between_steps = Saver.between_steps

    def patch(count: int, stop: Callable[[], None]) -> None:
        def stopping(saver: Saver, now: int, *rest: Any) -> None:
            if now == count:
                stop()
            between_steps(saver, now, *rest)

        monkeypatch.setattr(Saver, "between_steps", stopping)

    return patch


def check_goes_on(recipe: Recipe, folder: Path, stop_at: StopAt, *counts: int) -> Results:
    """Stops a run at some moments, one after another, and compares its end.

    First by a signal, so that it goes on from that very moment, then by a crash, and so on.
    """
    expected = train.run(recipe)
    for number, count in enumerate(counts):
        stop_at(count, crash if number % 2 else preempt)
        with pytest.raises(CrashError if number % 2 else RunInterruptedError):
            train.run(recipe, str(folder), saving=EVERY_7)
    stop_at(-1, crash)
    results = train.run(recipe, str(folder), saving=EVERY_7)
    assert results["resumed"] == len(counts)
    for name in (*AS_UNDISTURBED, *(name for name in IF_MEASURED if name in expected)):
        assert results[name] == expected[name], name
    if expected["buffer"] is not None:
        for name in ("held_per_class", "held_per_rank", "num_rounds"):
            assert results["buffer"][name] == expected["buffer"][name], name
    return results


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each not in ELSEWHERE])
def test_every_strategy_goes_on_bit_by_bit(strategy: str, tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(strategy=strategy)
    # Where tasks have 66, 50 and 48 steps: in an epoch, between two, at a task's end. Those that
    # make no steps see 3, 2 and 2 mini-batches.
    counts = (10, 20, 33, 60, 66, 81, 94, 150)
    if STRATEGIES[strategy].solves:
        counts = (1, 5, 8)
    check_goes_on(recipe, tmp_path, stop_at, *counts)
    assert (tmp_path / "buffer").exists() == STRATEGIES[strategy].rehearses
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "incremental", "optimiser": "adam", "keeps_optimiser": True},
        {"strategy": "incremental", "amp": "float16", "momentum": 0.9},
        {"strategy": "incremental", "num_workers": 1},
        {"strategy": "incremental", "augmentation": "crop-flip", "scenario": "blurry"},
        {"strategy": "incremental", "augmentation": "resized-crop-flip", "iterations": 40},
        {"strategy": "from-scratch", "model": "small-cnn", "epochs": 1},
        {"strategy": "incremental", "model": "resnet10t", "dropout": 0.5, **FEW_STEPS},
        {"sampling": "grasp", "selection": "grasp"},
        {"sampling": "class-balanced", "selection": "reservoir"},
        {"selection": "class-balanced-reservoir", "scenario": "task-incremental"},
        {"selection": "per-class-random", "fixed_shares": True, "loss_weights": "by-task"},
        {"selection": "greedy-balanced"},
        {"selection": "fifo"},
        {"remembers": "herding", "selection": "first-offered"},
        {"remembers": "random"},
        {"remembers": "last-epoch", "epochs": 2},
        {"averaged": 0.9, "probe_every": 4},
        {"strategy": "der", "logits_dtype": "float16", "augmentation": "crop-flip"},
        {"composition": "proportional", "first_share": 0.7, "soft_targets": 1.0},
        {"generated_share": 0.5, "prior": "dirichlet", "conditional": False, **SMALL_GENERATOR},
        {"strategy": "adapter", "averaged": 0.9, "dropout": 0.5, **SMALL_ADAPTERS},
        {"strategy": "adapter-rehearsal", "amp": "bfloat16", "probe_every": 4, **SMALL_ADAPTERS},
        {"strategy": "adapter-rehearsal", "stores": "features", **SMALL_ADAPTERS},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_settings_go_on_bit_by_bit(
    changes: dict[str, Any], tmp_path: Path, stop_at: StopAt
) -> None:
    counts = (3, 7, 10) if changes.get("model") in SLOW_MODELS else (10, 40, 70)
    check_goes_on(quick(**changes), tmp_path, stop_at, *counts)


def all_ends_of_runs(recipes: list[Recipe], folder: str) -> list[list[dict[str, Any]]]:
    """Of each recipe, on each rank: see ``ends_of_runs``."""
    return [
        ends_of_runs(
            recipe,
            str(Path(folder, str(number))),
            (3, 7, 10) if recipe.model in SLOW_MODELS else (10, 30, 50),
        )
        for number, recipe in enumerate(recipes)
    ]


def ends_of_runs(recipe: Recipe, folder: str, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """The end of an undisturbed run, and of one that crashed at some moments."""
    expected = train.run(recipe)
    between_steps = Saver.between_steps
    for count in counts:

        def crashing(saver: Saver, now: int, *rest: Any, count: int = count) -> None:
            between_steps(saver, now, *rest)
            if now == count:
                raise CrashError

        Saver.between_steps = crashing  # type: ignore[method-assign]
        with pytest.raises(CrashError):
            train.run(recipe, folder, saving=EVERY_7)
    Saver.between_steps = between_steps  # type: ignore[method-assign]
    return [expected, train.run(recipe, folder, saving=EVERY_7)]


ON_RANKS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"sampling": "grasp", "selection": "grasp"},
        {"strategy": "der++", "model": "resnet10t", **FEW_STEPS},
        {"strategy": "gdumb"},
        {"strategy": "generative", "distillation": 0.5, "num_tasks": 2, **SMALL_GENERATOR},
        {"composition": "proportional", "first_share": 0.6},
        {"strategy": "adapter-rehearsal", "optimiser": "adam", **SMALL_ADAPTERS},
    ],
    3: [
        {"strategy": "a-gem", "augmentation": "crop-flip", "global_num_candidates": None},
        {"ranks_differ": 0.05, "draws": "local", "global_num_candidates": None, "num_tasks": 2},
        {
            "local_steps": 4,
            "ranks_differ": 0.05,
            "optimiser": "adam",
            "averaged": 0.9,
            "probe_every": 5,
            "global_num_candidates": None,
            "num_tasks": 2,
        },
    ],
    4: [
        {"strategy": "fedssi", "local_steps": 5, "num_tasks": 2},
        {"strategy": "incremental", "num_tasks": 2},
        {"composition": "proportional", "soft_targets": 1.0},
    ],
}


@pytest.mark.parametrize("num_ranks", ON_RANKS)
def test_several_ranks_go_on_bit_by_bit(num_ranks: int, tmp_path: Path) -> None:
    recipes = [quick(**{"epochs": 1, **changes}) for changes in ON_RANKS[num_ranks]]
    ends = launch(num_ranks, all_ends_of_runs, recipes, str(tmp_path))
    for changes, (expected, results) in zip(ON_RANKS[num_ranks], ends, strict=True):
        for name in AS_UNDISTURBED:
            assert results[name] == expected[name], (changes, name)


def test_fewer_and_more_ranks_go_on(tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(epochs=4, num_tasks=5)
    alone = train.run(recipe)
    stop_at(60, preempt)
    with pytest.raises(RunInterruptedError):
        train.run(recipe, str(tmp_path), saving=EVERY_7)
    with pytest.raises(LaunchError, match="CrashError"):
        launch(2, crash_at, recipe, str(tmp_path), 200)
    stop_at(-1, crash)
    results = train.run(recipe, str(tmp_path), saving=EVERY_7)
    assert results["resumed"] == 2
    assert results["steps_per_task"] == alone["steps_per_task"]
    assert results["buffer"]["num_held"] == 200
    assert abs(results["average_top1"] - alone["average_top1"]) < 0.08


def test_other_ranks_go_on_from_the_mean_of_local_steps() -> None:
    def of_rank(weight: float, num_samples: int) -> dict[str, Any]:
        model = {"w": torch.full((2,), weight), "count": torch.tensor(7)}
        return {"trained": {"model": model, "average": None, "alone": [3, num_samples]}}

    of_ranks = [of_rank(1.0, 10), of_rank(4.0, 20)]
    tensors = {"model": {}, "average": None, "optimiser": {"of": "the first rank"}}
    checkpoint = checkpoints.Checkpoint(Path(), {}, tensors, of_ranks)
    place = Place(1, 2, torch.device("cpu"))
    assert checkpoint.trained(place) == of_ranks[1]["trained"]
    trained = checkpoint.trained(replace(place, num_ranks=3))
    assert trained["model"]["w"].tolist() == [3.0, 3.0]
    assert trained["model"]["count"] == 7
    assert trained["optimiser"] == {"of": "the first rank"}
    assert "alone" not in trained


def test_what_all_ranks_have_alike_goes_on_with_another_number_of_them(
    tmp_path: Path, stop_at: StopAt
) -> None:
    recipe = quick(strategy="generative", **SMALL_GENERATOR)
    stop_at(80, preempt)  # in the second task
    with pytest.raises(RunInterruptedError):
        train.run(recipe, str(tmp_path), saving=EVERY_7)
    stop_at(-1, crash)
    [path] = (tmp_path / "checkpoints").glob("step-00000080")
    state = torch.load(path / "trainer.pt", weights_only=True)
    saved = Checkpoint(
        path, json.loads((path / "run.json").read_text()), state["trainer"], 2 * state["ranks"]
    )
    place = Place(0, 1, torch.device("cpu"))
    with train.Trainer(recipe, train.load("digits"), place) as trainer:
        trainer.go_on(saved)
        found = trainer.strategy.shared_state_dict()
    expected = state["trainer"]["strategy"]
    assert found["step"] == expected["step"] == 79
    assert found["classes"] == list(range(4))
    for part in ("generator", "frozen"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value)


def crash_at(recipe: Recipe, folder: str, count: int) -> None:
    between_steps = Saver.between_steps

    def crashing(saver: Saver, now: int, *rest: Any) -> None:
        between_steps(saver, now, *rest)
        if now == count:
            raise CrashError("CrashError")

    Saver.between_steps = crashing  # type: ignore[method-assign]
    train.run(recipe, folder, saving=EVERY_7)


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "checkpoints").iterdir())


def crash_after(count: int, recipe: Recipe, folder: Path, stop_at: StopAt, **saving: Any) -> None:
    stop_at(count, crash)
    with pytest.raises(CrashError):
        train.run(recipe, str(folder), saving=CheckpointSettings(**{"save_every": 7, **saving}))
    stop_at(-1, crash)


def test_the_newest_ones_are_kept(tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(strategy="incremental")
    crash_after(30, recipe, tmp_path, stop_at, keep=3)
    assert names(tmp_path) == ["step-00000014", "step-00000021", "step-00000028"]
    (tmp_path / "checkpoints" / "step-00000099.partial").mkdir()
    crash_after(36, recipe, tmp_path, stop_at, keep=1, resume=True)
    assert names(tmp_path) == ["step-00000035"]
    # A task has 66 steps; at its end there is one more.
    crash_after(69, recipe, tmp_path, stop_at, keep=2, resume=True)
    assert names(tmp_path) == ["step-00000063", "step-00000067"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "trainer.pt"),
        lambda folder: cut(folder / "run.json"),
        lambda folder: (folder / "SHA256SUMS").unlink(),
        lambda folder: (folder / "SHA256SUMS").write_text(""),
        lambda folder: cut(
            max((folder / "buffer").iterdir(), key=lambda each: each.stat().st_size)
        ),
        lambda folder: shutil.rmtree(folder / "buffer"),
    ],
    ids=["trainer.pt", "run.json", "no sums", "empty sums", "buffer", "no buffer"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], object],
    tmp_path: Path,
    stop_at: StopAt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = quick()
    expected = train.run(recipe)
    crash_after(30, recipe, tmp_path, stop_at)
    damage(tmp_path / "checkpoints" / "step-00000028")
    crash_after(23, recipe, tmp_path, stop_at, resume=True)
    said = capsys.readouterr().err
    assert "step-00000028 is damaged and not used: " in said
    assert "resumed at task 1 of 3, step 21" in said
    results = train.run(recipe, str(tmp_path), saving=EVERY_7)
    assert results["weights_sha256"] == expected["weights_sha256"]


def test_no_whole_checkpoint(tmp_path: Path, stop_at: StopAt) -> None:
    crash_after(20, quick(), tmp_path, stop_at)
    for name in names(tmp_path):
        cut(tmp_path / "checkpoints" / name / "trainer.pt")
    with pytest.raises(CheckpointError, match="no checkpoint is whole; remove the folder"):
        train.run(quick(), str(tmp_path), saving=EVERY_7)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, stop_at: StopAt) -> None:
    crash_after(13, quick(), tmp_path, stop_at)
    [name] = names(tmp_path)
    folder = tmp_path / "checkpoints" / name
    text = (folder / "run.json").read_text()
    changed = text.replace('"format": 1', '"format": 2')
    assert changed != text
    sums = folder / "SHA256SUMS"
    digests = [hashlib.sha256(each.encode()).hexdigest() for each in (text, changed)]
    (folder / "run.json").write_text(changed)
    sums.write_text(sums.read_text().replace(*digests))
    with pytest.raises(CheckpointError, match="has the format 2, this release reads 1"):
        train.run(quick(), str(tmp_path), saving=EVERY_7)


def test_another_run_is_refused(tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(strategy="incremental")
    crash_after(20, recipe, tmp_path, stop_at)
    other = quick(strategy="incremental", learning_rate=0.1, momentum=0.5, num_workers=1)
    with pytest.raises(
        ValueError, match=r"1 rank\): learning_rate was .* and is 0.1, momentum was"
    ):
        train.run(other, str(tmp_path), saving=EVERY_7)
    # Where the data lie, and what reads them, is no other run.
    crash_after(30, quick(strategy="incremental", num_workers=1), tmp_path, stop_at, resume=True)
    train.run(recipe, str(tmp_path), saving=EVERY_7)
    with pytest.raises(ValueError, match="is of another run .*: seed was 0 and is 1; give"):
        train.run(quick(strategy="incremental", seed=1), str(tmp_path), saving=EVERY_7)


def test_other_data_are_refused(tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(strategy="incremental", data="digits")
    crash_after(20, recipe, tmp_path, stop_at)
    path = next(iter((tmp_path / "checkpoints").glob("*14")))
    description = json.loads((path / "run.json").read_text())
    assert description["where"] == "task 1 of 3, step 14"
    data = train.load("digits", None, None)
    data.train.labels[:20] = 9
    with pytest.raises(ValueError, match="is of a run on other data: its tasks had"):
        train.run(recipe, str(tmp_path), data, saving=EVERY_7)


def test_a_full_disk_leaves_the_last_one_as_it_was(
    tmp_path: Path, stop_at: StopAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick()
    crash_after(16, recipe, tmp_path, stop_at)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_write_files", full)
        with pytest.raises(
            CheckpointError, match="cannot write .*step-00000021.partial: .*No space"
        ):
            train.run(recipe, str(tmp_path), saving=EVERY_7)
    assert names(tmp_path) == ["step-00000007", "step-00000014"]
    assert train.run(recipe, str(tmp_path), saving=EVERY_7)["resumed"] == 1


def test_checkpoints_by_time(tmp_path: Path, stop_at: StopAt) -> None:
    recipe = quick(strategy="incremental")
    crash_after(5, recipe, tmp_path, stop_at, save_every=None, save_minutes=1e-9)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_compare_keeps_what_has_finished(tmp_path: Path, stop_at: StopAt) -> None:
    recipes = {each: quick(strategy=each) for each in ("incremental", "rehearsal")}
    expected = train.compare(recipes, None)
    run_with = train.Trainer.train

    def crash_in_the_second(trainer: Any, saver: Saver, figures: Any) -> Results:
        if trainer.recipe.strategy == "rehearsal":
            stop_at(40, crash)
        return run_with(trainer, saver, figures)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.Trainer, "train", crash_in_the_second)
        with pytest.raises(CrashError):
            train.compare(recipes, str(tmp_path), saving=EVERY_7)
    stop_at(-1, crash)
    before = (tmp_path / "incremental" / "results.json").read_text()
    comparison = train.compare(recipes, str(tmp_path), saving=EVERY_7)
    assert (tmp_path / "incremental" / "results.json").read_text() == before
    assert [each["resumed"] for each in comparison.values()] == [0, 1]
    for label, results in comparison.items():
        assert results["weights_sha256"] == expected[label]["weights_sha256"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison


def test_a_finished_run_leaves_its_buffer(tmp_path: Path) -> None:
    results = train.run(quick(), str(tmp_path / "with"))
    with RehearsalBuffer(200, num_representatives=16, seed=1) as buffer:
        buffer.load(tmp_path / "with" / "buffer")
        assert len(buffer) == results["buffer"]["num_held"] == 200
    train.run(quick(), str(tmp_path / "without"), saving=CheckpointSettings(keep_buffer="off"))
    assert not (tmp_path / "without" / "buffer").exists()


def test_checkpoints_need_a_folder() -> None:
    with pytest.raises(ValueError, match="checkpoints need an output folder"):
        train.run(quick(), saving=EVERY_7)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_real_kills(tmp_path: Path) -> None:
    """A short run of the benchmark, which takes minutes with its twenty kills."""
    program = Path(__file__).parents[3] / "benchmarks" / "kill_runs.py"
    if not program.exists():
        pytest.skip("needs the benchmarks beside the tests")
    settings = ("--kills", "2", "--epochs", "2", "--save-every", "10")
    with subprocess.Popen(
        [sys.executable, str(program), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=280)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    assert printed.rstrip().endswith("the same")


def test_a_signal_between_two_runs_is_heard_by_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = train.write_json

    def write_and_preempt(path: Path, content: Any) -> None:
        write(path, content)
        if path.name == "results.json":
            preempt()

    monkeypatch.setattr("ritornello.experiments.training.run.write_json", write_and_preempt)
    variants = {
        name: recipe_named("digits", strategy=name, epochs=1, num_tasks=2)
        for name in ("incremental", "rehearsal")
    }
    with pytest.raises(RunInterruptedError):
        train.compare(variants, str(tmp_path), saving=EVERY_7)
    assert [path.parent.name for path in tmp_path.rglob("results.json")] == ["incremental"]
