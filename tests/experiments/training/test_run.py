from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.load import load
from ritornello.experiments.models.build import build
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe, with_changes
from ritornello.experiments.training import run as train

pytestmark = pytest.mark.usefixtures("forked_ranks")


def quick(**changes: Any) -> Recipe:
    return recipe_named("digits", **{"epochs": 3, **changes})


def loss_with(weights: dict[str, torch.Tensor]) -> float:
    """The mean loss of a trained model on all test samples of the digits."""
    data = load("digits")
    images, labels = data.test.__getitems__(range(len(data.test)))
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (data.mean, data.std))
    model = build("mlp", 10, data.image_shape)
    model.load_state_dict(weights)
    logits = model((images / 255 - mean) / std)
    return nn.functional.cross_entropy(logits, labels).item()


def test_results_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def data() -> DataSet:
        monkeypatch.chdir("elsewhere")  # the output stays where it was
        return load("digits")

    state = torch.get_rng_state()
    results = train.run(quick(), "out", data)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert np.array(results["top1"]).shape == np.array(results["top5"]).shape == (5, 5)
    assert results["world_size"] == 1
    assert results["average_top1"] == pytest.approx(np.mean(results["top1"][-1]))
    loss = np.array(results["loss"])
    assert results["average_loss"] == pytest.approx(np.mean(loss[-1]))
    lowest = [loss[task:-1, task].min() for task in range(4)]
    assert results["forgetting_in_loss"] == pytest.approx(np.mean(loss[-1, :-1] - lowest))
    assert results["buffer"]["num_held"] == 200
    assert results["buffer"]["shard_bytes"] == 200 * results["buffer"]["record_bytes"]
    assert results["steps_per_task"] == [
        3 * (task["train_samples"] // 16) for task in results["tasks"]
    ]
    assert results["step_seconds"]["wait"] > 0.0
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    sizes = [task["test_samples"] for task in results["tasks"]]
    assert np.average(loss[-1], weights=sizes) == pytest.approx(loss_with(weights), rel=1e-4)
    assert set(weights) == {"1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"}


def test_rehearsal_undoes_forgetting(tmp_path: Path) -> None:
    strategies = ("incremental", "rehearsal", "from-scratch")
    recipes = {each: recipe_named("digits", epochs=8, strategy=each) for each in strategies}
    comparison = train.compare(recipes, str(tmp_path), command="ritornello compare digits")
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison
    assert (tmp_path / "rehearsal" / "results.json").exists()
    assert comparison["rehearsal"]["command"] == "ritornello compare digits"
    top1 = {strategy: results["average_top1"] for strategy, results in comparison.items()}
    assert top1["incremental"] < 0.3
    assert top1["rehearsal"] > 0.8
    assert top1["from-scratch"] > top1["rehearsal"]
    assert (
        comparison["from-scratch"]["steps_per_task"][4]
        > 4 * comparison["incremental"]["steps_per_task"][4]
    )


def runs_of(recipes: list[Recipe]) -> list[dict[str, Any]]:
    """The results of several runs, one after another."""
    return [train.run(recipe) for recipe in recipes]


def test_equal_seeds_give_bit_identical_weights_on_two_ranks() -> None:
    first, other = launch(2, runs_of, [quick(epochs=1, seed=seed) for seed in (0, 1)])
    second = launch(2, train.run, quick(epochs=1))
    assert first["world_size"] == 2
    assert first["weights_sha256"] == second["weights_sha256"] != other["weights_sha256"]
    assert first["top1"] == second["top1"]
    assert sum(first["buffer"]["held_per_rank"]) == 200


@pytest.mark.long
def test_uneven_ranks_learn_as_well_as_one() -> None:
    """10 samples and 10 representatives a step, on 4 ranks."""
    recipe = quick(
        global_batch_size=10,
        global_num_representatives=10,
        global_num_candidates=None,
        strategy="der++",
        epochs=4,
    )
    several = launch(4, train.run, recipe)
    alone = train.run(recipe)
    assert several["world_size"] == 4
    assert several["steps_per_task"] == alone["steps_per_task"]
    assert abs(several["average_top1"] - alone["average_top1"]) < 0.06
    assert alone["average_top1"] > 0.85


ABOVE = {
    "er-ace": 0.8,
    "der": 0.8,
    "der++": 0.8,
    "a-gem": 0.15,
    "gdumb": 0.75,
    "joint": 0.85,
}
"""What each strategy reaches in a few epochs, with room for other processors."""


@pytest.mark.parametrize("strategy", ABOVE)
def test_every_strategy_learns(strategy: str) -> None:
    results = train.run(quick(strategy=strategy, epochs=6))
    assert results["average_top1"] > ABOVE[strategy]
    if strategy == "joint":
        assert results["steps_per_task"][:4] == [0, 0, 0, 0]
        assert np.mean(results["top1"][3]) < 0.3
        assert results["forgetting"] == results["backward_transfer"] == 0.0


@pytest.mark.parametrize(
    ("changes", "above"),
    [
        ({"scenario": "task-incremental"}, 0.95),
        ({"scenario": "domain-incremental-permuted", "num_tasks": 3}, 0.75),
        ({"scenario": "domain-incremental-rotated", "num_tasks": 3}, 0.7),
        ({"scenario": "instance-incremental"}, 0.9),
        ({"scenario": "blurry"}, 0.8),
        ({"class_order": "by-seed"}, 0.8),
        ({"sampling": "class-balanced", "selection": "reservoir"}, 0.8),
        ({"sampling": "grasp", "selection": "grasp"}, 0.75),
        ({"selection": "class-balanced-reservoir"}, 0.8),
        ({"selection": "per-class-random", "fixed_shares": True}, 0.75),
        ({"remembers": "last-epoch"}, 0.8),
        ({"remembers": "last-epoch", "strategy": "er-ace"}, 0.8),
        ({"remembers": "random", "selection": "first-offered"}, 0.75),
        ({"remembers": "herding", "selection": "first-offered"}, 0.75),
        ({"remembers": "closest-to-mean", "selection": "first-offered"}, 0.6),
        ({"optimiser": "adam", "keeps_optimiser": True, "learning_rate": 0.005}, 0.8),
        ({"iterations": 60}, 0.75),
        ({"loss_weights": "by-task"}, 0.8),
        ({"strategy": "der", "logits_dtype": "float16"}, 0.8),
        ({"composition": "proportional"}, 0.85),
        ({"composition": "proportional", "global_num_representatives": 0}, 0.8),
        ({"composition": "proportional", "first_share": 0.6, "soft_targets": 1.0}, 0.8),
        ({"composition": "proportional", "sampling": "uniform", "share_floor": 0.3}, 0.75),
        ({"composition": "proportional", "scenario": "blurry"}, 0.8),
        ({"composition": "proportional", "iterations": 60}, 0.8),
        ({"composition": "proportional", "remembers": "random"}, 0.8),
        ({"composition": "proportional", "remembers": "last-epoch", "soft_targets": 1.0}, 0.8),
        ({"soft_targets": 1.0, "logits_dtype": "float16"}, 0.8),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings(changes: dict[str, Any], above: float) -> None:
    results = train.run(quick(**({"epochs": 6, "global_num_candidates": None} | changes)))
    assert results["average_top1"] > above
    if "remembers" in changes:
        # At a task's end its classes share with all that came before: 20 each at the end.
        assert results["buffer"]["held_per_class"] == {str(label): 20 for label in range(10)}
    if changes.get("strategy") == "der":
        assert (
            results["buffer"]["record_bytes"] == 96
        )  # 64 pixels, a label, 10 half-precision logits


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.long), 4])
def test_steps_composed_in_proportion_learn_as_well_on_several_ranks(num_ranks: int) -> None:
    recipe = quick(
        composition="proportional", first_share=0.5, soft_targets=0.5, epochs=3,
        global_num_candidates=None, global_num_representatives=8,
    )  # fmt: skip
    several, alone = launch(num_ranks, train.run, recipe), train.run(recipe)
    assert several["steps_per_task"] == alone["steps_per_task"]
    assert several["samples_per_step"] == alone["samples_per_step"] == 24
    assert abs(several["average_top1"] - alone["average_top1"]) < 0.06


def test_generated_samples_undo_forgetting_alone_and_beside_stored_ones() -> None:
    fast = {"epochs": 5, "generator_learning_rate": 0.003, "generator_units": 128, "latents": 16}
    top1, results = {}, {}
    for name, changes in {
        "nothing": {"strategy": "incremental"},
        "generated": {"strategy": "generative"},
        "both": {"capacity": 40, "generated_share": 0.5, "global_num_representatives": 32},
        "task": {"strategy": "generative", "scenario": "task-incremental"},
    }.items():
        made = quick(**(fast | {"num_tasks": 2} | changes))
        results[name] = train.run(made)
        top1[name] = results[name]["average_top1"]
    assert top1["nothing"] < 0.55
    assert top1["generated"] > 0.75
    assert top1["both"] > 0.8
    assert top1["task"] > 0.9
    assert results["both"]["samples_per_step"] == 48
    assert results["generated"]["samples_per_step"] == 32
    assert results["generated"]["buffer"] is None
    assert results["both"]["buffer"]["num_held"] == 40
    assert results["generated"]["costs"]["held_bytes"] > 0
    assert results["both"]["generated"]["shape"] == [100, 1, 8, 8]
    assert "generated" not in results["nothing"]


def test_strategies_without_a_buffer_know_no_composition() -> None:
    for strategy in ("incremental", "from-scratch"):
        plain = quick(strategy=strategy, epochs=1)
        composed = with_changes(plain, composition="proportional", first_share=0.5)
        results = [train.run(each) for each in (plain, composed)]
        assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
        assert results[1]["samples_per_step"] == 16


def test_compiled_models_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone; the other one takes a minute on a CPU."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_module(model, backend="eager"))
    compiled, plain = (train.run(quick(epochs=1, compile=each)) for each in (True, False))
    assert compiled["average_top1"] == pytest.approx(plain["average_top1"], abs=0.02)


def test_a_task_that_is_known_is_easier() -> None:
    unknown = train.run(quick(strategy="incremental"))
    known = train.run(quick(strategy="incremental", scenario="task-incremental"))
    assert unknown["average_top1"] < 0.3
    assert known["average_top1"] > 0.6


def test_grasp_on_two_ranks_is_reproducible() -> None:
    recipe = quick(sampling="grasp", selection="grasp", epochs=1, num_tasks=2)
    first, second = (launch(2, train.run, recipe) for _ in range(2))
    assert first["weights_sha256"] == second["weights_sha256"]


def test_exemplars_fill_the_buffer_evenly_on_two_ranks() -> None:
    recipe = quick(epochs=2, remembers="herding", selection="first-offered", num_tasks=2)
    held = launch(2, train.run, recipe)["buffer"]
    assert held["held_per_rank"] == [100, 100]
    assert set(held["held_per_class"].values()) == {10}


def digests_on_all_ranks(rank_recipe: Recipe) -> list[str]:
    """The digests of the models on all ranks."""
    digest = train.run(rank_recipe)["weights_sha256"]
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, digest)
    return everyone


def test_ranks_end_with_one_model_also_with_running_statistics() -> None:
    recipe = quick(model="resnet10t", epochs=1, num_tasks=1, strategy="incremental")
    first, second = launch(2, digests_on_all_ranks, recipe)
    assert first == second


def test_gdumb_with_more_to_remember_than_a_task_brings() -> None:
    results = train.run(quick(strategy="gdumb", capacity=1000, epochs=3))
    assert results["average_top1"] > 0.85
    assert min(results["step_seconds"].values()) >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remembers": "best"}, "remembers='best': there are stream, last-epoch, random"),
        ({"remembers": "random", "strategy": "der"}, "'der' fills its buffer from the stream"),
        ({"remembers": "last-epoch", "strategy": "gdumb"}, "it sees a task's samples once"),
        ({"scenario": "none"}, "scenario='none': there are class-incremental"),
        ({"sampling": "best"}, "sampling='best': there are uniform"),
        ({"selection": "best"}, "selection='best': there are class-balanced"),
        ({"remembers": "herding"}, "which only selection='first-offered' keeps"),
        (
            {
                "remembers": "herding",
                "selection": "first-offered",
                "scenario": "instance-incremental",
            },
            "classes come again in later tasks, and selection='first-offered' keeps",
        ),
        (
            {"remembers": "random", "capacity": 9, "global_num_representatives": 4},
            "capacity=9: with remembers='random' it must be at least the number of classes",
        ),
        (
            {
                "remembers": "random",
                "capacity": 9,
                "fixed_shares": True,
                "global_num_representatives": 4,
            },
            "capacity=9: with remembers='random' it must be at least the number of classes",
        ),
        ({"augmentation": "best"}, "augmentation='best': there are none"),
        ({"class_order": -1}, "class_order=-1: it must not be negative"),
        (
            {"class_order": 1, "scenario": "instance-incremental"},
            "class_order=1 with scenario='instance-incremental': classes come one after another in",
        ),
        ({"samples_per_step": 20}, "samples_per_step=20 with composition='append': only"),
        ({"first_share": 0.5}, "first_share=0.5 with composition='append': only"),
        (
            {"composition": "proportional", "strategy": "er-ace"},
            "composition='proportional' with strategy='er-ace': .* use 'rehearsal', or composition=",
        ),
        ({"soft_targets": 1.0, "strategy": "der"}, "'rehearsal', or soft_targets=0"),
        ({"soft_targets": 1.0, "strategy": "generative"}, "'rehearsal', or soft_targets=0"),
        ({"composition": "proportional", "strategy": "generative"}, "or composition='append'"),
        ({"generated_share": 0.5, "strategy": "der"}, "'rehearsal', or generated_share=0"),
        (
            {"generated_share": 0.5, "strategy": "generative"},
            "generated_share=0.5 with strategy='generative': it generates all .* use 'rehearsal'",
        ),
        (
            {"generated_share": 0.5, "soft_targets": 1.0},
            "soft_targets=1.0 with generated_share=0.5: .* use soft_targets=0, or generated_share",
        ),
        (
            {"generated_share": 0.5, "composition": "proportional"},
            "composition='proportional' with generated_share=0.5: .* use composition='append'",
        ),
        (
            {"strategy": "generative", "sampling": "grasp"},
            "sampling='grasp' with strategy='generative': nothing is stored that it could choose",
        ),
        (
            {"strategy": "generative", "scenario": "task-incremental", "conditional": False},
            "conditional=False with strategy='generative' and scenario='task-incremental': the mo",
        ),
        ({"soft_targets": 1.0, "remembers": "random"}, "exemplars are stored without logits"),
        ({"global_batch_size": 0}, "global_batch_size=0: it must be at least 1"),
    ],
)
def test_settings_that_break_a_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(quick(**changes))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(amp: str) -> None:
    results = train.run(quick(amp=amp, epochs=8))
    assert results["average_top1"] > 0.75


def test_loader_workers() -> None:
    with_workers = train.run(quick(epochs=1, num_tasks=2, num_workers=1))
    without = train.run(quick(epochs=1, num_tasks=2))
    assert with_workers["weights_sha256"] == without["weights_sha256"]


def test_a_task_smaller_than_a_mini_batch() -> None:
    with pytest.raises(ValueError, match="fewer than global_batch_size=1600: take a smaller one"):
        train.run(quick(global_batch_size=1600))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device='cuda': this machine has no CUDA device"):
        train.run(quick(device="cuda"))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_split_mnist_on_two_ranks(shared_data: Path) -> None:
    """The accuracy itself is under test: a refactoring that costs points must not go unnoticed."""
    path = str(shared_data / "mnist.npz")
    recipes = {
        each: recipe_named("mnist", data_path=path, strategy=each)
        for each in ("incremental", "rehearsal")
    }
    comparison = launch(2, train.compare, recipes, None)
    assert comparison["incremental"]["average_top1"] < 0.25
    # 0.853 where it was written; other processors round differently.
    assert comparison["rehearsal"]["average_top1"] > 0.82


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_published_row(shared_data: Path) -> None:
    """DER++ with 500 representatives on Split MNIST: 91.00 +- 1.49 over ten published runs."""
    path = str(shared_data / "mnist.npz")
    results = train.run(recipe_named("buzzega-mnist-der++-500", data_path=path))
    assert 0.87 < results["average_top1"] < 0.95
