"""Runs whose targets are tensors and not classes: regression, and reconstruction of images."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from PIL import Image
from synthetic_results import results_of

from ritornello.experiments.data.data_set import DataSet, Part
from ritornello.experiments.data.load import load
from ritornello.experiments.ranks.interruption import RunInterruptedError
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.reporting.report import table_of, write_report
from ritornello.experiments.reporting.results_page import page_of
from ritornello.experiments.reporting.summaries import summary_of
from ritornello.experiments.results import reading
from ritornello.experiments.results.groups import groups_of
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import STRATEGIES
from ritornello.experiments.training import run as train
from ritornello.experiments.training import tracking
from ritornello.experiments.training.saver import CheckpointSettings, Saver

FOR_TENSORS = ("incremental", "rehearsal", "der", "der++", "joint", "from-scratch")


def regression(**changes: Any) -> Recipe:
    usual = {"num_tasks": 3, "epochs": 2, "loss": "mae", "capacity": 60, "learning_rate": 3e-3}
    return recipe_named("regression", **usual | changes)


def write_regression(path: Path) -> None:
    """Two numbers, of three; each group has another slope and another range of inputs."""
    generator = np.random.default_rng(0)
    arrays = {"target_names": np.array(["first", "second"])}
    for part, num in (("train", 240), ("test", 60)):
        groups = np.arange(num) % 3
        features = generator.normal(size=(num, 3)) + 3 * groups[:, None]
        targets = np.stack((features[:, 0] * (groups - 1), features[:, 1] + groups), axis=1)
        arrays |= {
            f"{part}_images": features, f"{part}_targets": targets, f"{part}_groups": groups,
        }  # fmt: skip
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("regression") / "slopes.npz"
    write_regression(path)
    return path


@pytest.fixture(scope="module")
def regressions(npz: Path) -> dict[str, Results]:
    """One run of each strategy."""
    data = load("npz", str(npz))
    return {
        strategy: train.run(regression(strategy=strategy, probe_every=10, averaged=0.5), None, data)
        for strategy in FOR_TENSORS
    }


def test_errors_in_the_place_of_accuracies(regressions: dict[str, Results]) -> None:
    for strategy, results in regressions.items():
        assert "top1" not in results
        error = np.array(results["error"])
        assert error.shape == (3, 3)
        assert results["average_error"] == pytest.approx(error[-1].mean())
        parts = results["error_of_parts"]
        assert np.allclose(np.array(parts["first"]) + np.array(parts["second"]), error)
        average = results["average_error_of_parts"]["first"]
        assert average == pytest.approx(np.mean(parts["first"][-1]))
        assert np.array(results["averaged_error"]).shape == (3, 3)
        assert all("error" in probe for probe in results["probes"])
        if strategy == "joint":
            assert results["average_incremental_error"] is results["error_when_learnt"] is None
            continue
        lowest = [error[task:-1, task].min() for task in range(2)]
        assert results["forgetting"] == pytest.approx(np.mean(error[-1, :-1] - lowest))
        change = np.mean(np.diag(error)[:-1] - error[-1, :-1])
        assert results["backward_transfer"] == pytest.approx(change)
        at_start = np.array(results["error_at_start"])
        gain = np.mean(at_start[1:] - np.diag(error, k=1))
        assert results["forward_transfer"] == pytest.approx(gain)
        assert results["error_when_learnt"] == pytest.approx(np.diag(error).mean())
        newest = results["probes"][-1]["error"][-1]
        worst = (newest + 2 * results["max_error"]) / 3
        assert results["worst_case_error"] == pytest.approx(worst)


def test_what_is_forgotten_is_rehearsed(regressions: dict[str, Results]) -> None:
    incremental = regressions["incremental"]
    assert incremental["forgetting"] > 1
    for strategy in ("rehearsal", "der", "der++", "joint", "from-scratch"):
        assert regressions[strategy]["average_error"] < 0.8 * incremental["average_error"], strategy


def test_what_is_kept_is_a_sample_of_the_whole_stream(regressions: dict[str, Results]) -> None:
    assert regressions["rehearsal"]["buffer"]["num_held"] == 60
    assert regressions["rehearsal"]["config"]["selection"] == "reservoir"
    assert regressions["incremental"]["buffer"] is None


@pytest.mark.parametrize("strategy", ["der++", "from-scratch"])
def test_it_goes_on_bit_by_bit(
    strategy: str, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("npz", str(npz))
    recipe = regression(strategy=strategy, epochs=1, probe_every=4)
    expected = train.run(recipe, None, data)
    between_steps = Saver.between_steps
    saving = CheckpointSettings(save_every=3, resume=True)

    def stopping(saver: Saver, now: int, *rest: Any) -> None:
        if now == 9:
            raise RunInterruptedError(10, "here")
        between_steps(saver, now, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "between_steps", stopping)
        with pytest.raises(RunInterruptedError):
            train.run(recipe, str(tmp_path), data, saving=saving)
    results = train.run(recipe, str(tmp_path), data, saving=saving)
    assert results["resumed"] == 1
    for name in ("weights_sha256", "error", "error_of_parts", "error_at_start", "probes"):
        assert results[name] == expected[name], name


def _on_ranks(recipes: list[Recipe]) -> list[Results]:
    return [train.run(recipe) for recipe in recipes]


def test_two_ranks_learn_as_one(npz: Path) -> None:
    recipes = [
        regression(strategy=strategy, data_path=str(npz), epochs=1, optimiser="sgd")
        for strategy in ("incremental", "der++")
    ]
    alone, together = _on_ranks(recipes), launch(2, _on_ranks, recipes)
    # The same global mini-batches; without a buffer the same gradients, too.
    assert np.allclose(alone[0]["error"], together[0]["error"], rtol=1e-3)
    assert np.all(np.array(together[1]["error"]) > 0)
    assert together[1]["buffer"]["num_held"] == 60


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each not in FOR_TENSORS])
def test_strategies_that_need_classes_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy='{strategy}' with loss='mae': it is for clas"):
        train.check(regression(strategy=strategy, local_steps=2 * (strategy == "fedssi")), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "class-incremental"}, "take group-incremental or instance-incremental or"),
        ({"selection": "class-balanced"}, "selection='class-balanced' .* take reservoir or fifo"),
        ({"sampling": "grasp"}, "sampling='grasp' .* take uniform or earlier-tasks"),
        ({"remembers": "herding"}, "remembers='herding' .* take stream or last-epoch"),
        ({"augmentation": "crop"}, "augmentation='crop' .* take none"),
        ({"soft_targets": 1.0}, "soft_targets=1.0 with loss='mae': targets are tensors"),
        ({"generated_share": 0.5}, "generated_share=0.5 with loss='mae': targets are tensors"),
        ({"strategy": "der", "distance": "js"}, "distance='js' with loss='mae': .* take mse"),
        ({"strategy": "si-rehearsal"}, "strategy='si-rehearsal' with loss='mae': it is for cla"),
        ({"loss": "hinge"}, "loss='hinge': there are cross-entropy, mae, mse"),
    ],
)
def test_settings_that_need_classes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.check(regression(**changes), 1)


def test_settings_of_a_buffer_do_not_matter_without_one() -> None:
    train.check(regression(strategy="joint", selection="class-balanced"), 1)


def test_groups_are_not_for_classes() -> None:
    recipe = recipe_named("digits", scenario="group-incremental")
    with pytest.raises(ValueError, match="of classes take 'class-incremental'"):
        train.check(recipe, 1)


def test_the_loss_must_fit_the_data(npz: Path) -> None:
    with pytest.raises(ValueError, match=r"loss='mae' is for targets that are tensors, but those"):
        train.run(regression(), None, load("digits"))
    recipe = recipe_named("digits", data_path=str(npz))
    with pytest.raises(ValueError, match=r"targets of digits are tensors of \[2\]: take the rec"):
        train.run(recipe)
    with pytest.raises(ValueError, match="num_tasks=4: .* number of groups of slopes"):
        train.run(regression(num_tasks=4, data_path=str(npz)))


def test_a_model_that_diverges_is_named(npz: Path) -> None:
    recipe = regression(optimiser="sgd", loss="mse", learning_rate=1e6, strategy="incremental")
    with pytest.raises(FloatingPointError, match="the model's errors on the task '0' are not fin"):
        train.run(recipe, None, load("npz", str(npz)))


def test_the_groups_may_be_mixed_in_every_task(npz: Path) -> None:
    recipe = regression(scenario="instance-incremental", sampling="earlier-tasks", epochs=1)
    results = train.run(recipe, None, load("npz", str(npz)))
    assert [task["train_samples"] for task in results["tasks"]] == [80, 80, 80]


def test_composed_steps_need_no_classes(npz: Path) -> None:
    recipe = regression(composition="proportional", sampling="uniform", epochs=1)
    results = train.run(recipe, None, load("npz", str(npz)))
    assert results["samples_per_step"] == 32


def test_trackers_are_told_errors(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, float] = {}

    class Told:
        def log(self, figures: dict[str, float], step: int) -> None:
            told.update(figures)

    monkeypatch.setattr(tracking, "_made", lambda *_: [Told()])
    monkeypatch.setattr(tracking.Tracking, "check", lambda _: None)
    recipe = regression(epochs=1, probe_every=5, averaged=0.5)
    data = load("npz", str(npz))
    each = tracking.Tracking(("tensorboard",))
    results = train.run(recipe, str(tmp_path / "out"), data, tracking=each)
    assert told["error/average"] == pytest.approx(results["average_error"])
    assert told["error/forgetting"] == pytest.approx(results["forgetting"])
    assert told["error/task_2"] == pytest.approx(results["error"][-1][1])
    assert told["averaged_error/average"] == pytest.approx(results["average_averaged_error"])
    last = results["probes"][-1]["error"]
    assert told["probe_error/average"] == pytest.approx(np.mean(last))
    assert told["probe_error/highest_old"] == pytest.approx(max(last[:-1]))
    assert not [name for name in told if "percent" in name and "top" in name]


# What is said of it.


def test_the_table_and_the_summary_speak_of_errors(regressions: dict[str, Results]) -> None:
    groups = groups_of(regressions.values())
    headers = [str(column.header) for column in table_of(groups, 200).columns]
    assert headers[:4] == ["strategy", "avg error", "first error", "second error"]
    assert "top-5" not in headers
    narrow = [str(column.header) for column in table_of(groups, 60).columns]
    assert not {"first error", "second error"} & {*narrow}
    summary = summary_of(groups)
    incremental = groups[0].average.as_number()
    assert (
        f"ends at an error of {incremental} over all tasks: on the earlier ones it has" in summary
    )
    assert summary.endswith("Of errors lower is better.")
    assert "%" not in summary.replace("% of the data", "")


def test_the_best_has_the_lowest_error(regressions: dict[str, Results]) -> None:
    run = regressions["rehearsal"]
    config = run["config"] | {"capacity": 30}
    runs = [run, {**run, "config": config, "average_error": 0.5 * run["average_error"]}]
    assert "the best of 2 settings (rehearsal, capacity 30)" in summary_of(groups_of(runs))


def test_the_report_speaks_of_errors(regressions: dict[str, Results], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(groups_of(regressions.values()), path)
    page = path.read_text()
    for text in (
        "average error</th>",
        "first error</th>",
        "Error after each task",
        "Down is better, left is faster.",
        "Error matrix",
        "highest error</th>",
        "Mean absolute error of what the model says",
        "groups and samples",
    ):
        assert text in page, text
    visible = re.sub(r"<style>.*?</style>|<pre.*?</pre>", "", page, flags=re.S)
    assert not re.search("accurac|top-1|top-5", visible, re.I)
    assert "Truth and prediction" not in page  # two numbers are no picture


def test_pages_of_results_keep_errors(regressions: dict[str, Results], tmp_path: Path) -> None:
    path = tmp_path / "archive.json"
    reading.archive([*regressions.values(), results_of("rehearsal")], path)
    runs = reading.find_results([path])
    page = page_of(runs, "ritornello results archive.json")
    assert page == page_of(list(reversed(runs)), "ritornello results archive.json")
    header = (
        "| strategy | buffer | ranks | seeds | error | first error | second error | forgetting |"
    )
    assert header in page
    joint = next(line for line in page.splitlines() if line.startswith("| joint |"))
    expected = groups_of([regressions["joint"]])[0].average.as_number()
    assert f"| {expected} |" in joint
    assert joint.split(" | ")[-2] == "-"  # nothing can be forgotten
    assert "### regression: error against runtime" in page


def test_accuracies_and_errors_have_no_common_report(
    regressions: dict[str, Results], tmp_path: Path
) -> None:
    groups = groups_of([regressions["joint"], results_of("rehearsal")])
    for show in (lambda: table_of(groups), lambda: write_report(groups, tmp_path / "no.html")):
        with pytest.raises(ValueError, match="make a report of each kind"):
            show()
    assert not (tmp_path / "no.html").exists()


# Reconstruction, from digits alone.


def scans() -> DataSet:
    """The first three scans, with few patterns each."""
    data = load("digits-diffraction")
    assert data.targets is not None

    def few(labels: np.ndarray, number: int) -> np.ndarray:
        return np.concatenate([np.flatnonzero(labels == each)[:number] for each in range(3)])

    return replace(
        data,
        train=Part(data.train, few(data.train.labels, 48)),
        test=Part(data.test, few(data.test.labels, 12)),
        class_names=data.class_names[:3],
    )


@pytest.fixture(scope="module")
def reconstruction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("reconstruction") / "out"
    recipe = recipe_named(
        "ptychography", num_tasks=3, strategy="der", model="ptychonn-2", seed=1, holdout=0.0
    )
    train.run(recipe, str(folder), scans())
    return folder


def test_amplitude_and_phase_are_measured_apart(reconstruction: Path) -> None:
    results = json.loads((reconstruction / "results.json").read_text())
    assert list(results["average_error_of_parts"]) == ["amplitude", "phase"]
    assert results["average_error"] == pytest.approx(
        sum(results["average_error_of_parts"].values())
    )
    assert [task["name"] for task in results["tasks"]] == ["0", "1", "2"]
    assert "reduced" in results["config"]["description"]
    assert results["data"]["targets"] == {"shape": [2, 16, 16], "parts": ["amplitude", "phase"]}
    # Pattern, amplitude and phase, and what the model said of both: images, too.
    fields = 16 * 16 + 2 * (2 * 16 * 16 * 4)
    assert fields <= results["buffer"]["record_bytes"] < fields + 64


def test_pictures_of_truth_and_prediction(reconstruction: Path, tmp_path: Path) -> None:
    [results] = reading.find_results([reconstruction])
    pictures = results["pictures"]
    assert [each["task"] for each in pictures] == [0, 1, 2]
    data = scans()
    pattern, truth = data.test[5]
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[0]["input"])))
    assert np.array_equal(np.asarray(shown), pattern[0].numpy())
    assert [part["name"] for part in pictures[0]["parts"]] == ["amplitude", "phase"]
    middles = [data.test[number][1] for number in (5, 17, 29)]
    for place, part in enumerate(pictures[0]["parts"]):
        of_part = np.stack([each[place].numpy() for each in middles])
        low, high = of_part.min(), of_part.max()
        expected = 255 * (truth[place].numpy() - low) / (high - low)
        shown = Image.open(io.BytesIO(base64.b64decode(part["truth"])))
        assert np.abs(np.asarray(shown) - expected).max() < 0.51
        assert part["prediction"] != part["truth"]
    assert run("report", str(reconstruction), "--output", str(tmp_path / "report.html")) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Truth and prediction" in page
    assert page.count("<img ") == 3 * 5
    assert f'<img src="data:image/png;base64,{pictures[2]["parts"][1]["prediction"]}"' in page
    assert 'alt="2, phase: prediction"' in page


def test_the_buffer_can_be_looked_at_and_exported(
    reconstruction: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", str(reconstruction), "--export", str(tmp_path / "held.npz")) == 0
    with np.load(tmp_path / "held.npz") as held:
        assert held["train_images"].shape[1:] == (16, 16)
        assert held["field_1"].shape[1:] == (2, 16, 16)
    assert run("inspect", str(reconstruction), "--export", str(tmp_path / "folder")) != 0
    assert "knows no labels" in " ".join(capsys.readouterr().err.split())


def test_a_run_of_tensors_is_not_extended(
    reconstruction: Path, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("extend", str(reconstruction), "--data", str(npz)) != 0
    assert "only runs of classes can go on" in " ".join(capsys.readouterr().err.split())
