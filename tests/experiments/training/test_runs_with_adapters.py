"""Whole runs with adapters: what a later task leaves as it was, however many ranks there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ritornello.experiments.data.load import load
from ritornello.experiments.models.build import build
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training import run as train
from ritornello.experiments.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("forked_ranks")


def quick(**changes: Any) -> Recipe:
    return recipe_named(
        "digits",
        **{
            "strategy": "adapter", "model": "test_efficientnet", "adapter_width": 4, "iterations": 3,
            "global_batch_size": 33, "global_num_candidates": None, "momentum": 0.9,
            "weight_decay": 0.1, **changes,
        },
    )  # fmt: skip


Weights = dict[str, Tensor]


def weights_after_tasks(recipe: Recipe) -> list[Weights]:
    """The model as it begins, and behind each task."""
    seen: list[Weights] = []
    evaluate = Trainer.evaluate

    def noting(trainer: Trainer) -> None:
        seen.append({name: v.clone() for name, v in trainer.network.model.state_dict().items()})
        evaluate(trainer)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "evaluate", noting)
        train.run(recipe)
    return seen


def of_recipes(recipes: list[Recipe]) -> list[list[Weights]]:
    return [weights_after_tasks(recipe) for recipe in recipes]


def check_kept(seen: list[Weights], outputs_stay: bool) -> None:
    """Each task changes its own adapters and outputs; all else is bit by bit as it was."""
    assert len(seen) == 5
    for number, (before, after) in enumerate(itertools.pairwise(seen), 1):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"classifier.weight", "classifier.bias"}
        for name in changed:
            same = (before[name] == after[name]).reshape(10, -1).all(dim=1).tolist()
            own = (2 * number, 2 * number + 1)
            assert same == [outputs_stay and row not in own for row in range(10)]
        new = {name.rpartition("adapter.")[2] for name in after.keys() - before.keys()}
        assert new == {f"down.{number}", f"up.{number}"}
        assert all(value.any() for name, value in after.items() if f"up.{number}" in name)


def test_a_later_task_changes_nothing_of_an_earlier_one() -> None:
    check_kept(weights_after_tasks(quick()), outputs_stay=True)
    check_kept(weights_after_tasks(quick(strategy="adapter-rehearsal")), outputs_stay=False)


def test_nor_does_it_on_several_ranks() -> None:
    """Neither by averaged gradients nor by averaged weights, of ranks with unlike many samples."""
    unlike: dict[str, Any] = {"local_steps": 2, "ranks_differ": 1.0, "averaged": 0.9}
    for seen in launch(2, of_recipes, [quick(optimiser="adam"), quick(**unlike)]):
        check_kept(seen, outputs_stay=True)


def test_on_features_it_learns_what_it_would_on_images() -> None:
    """What comes before the adapted stages is computed once."""
    images, features = (
        weights_after_tasks(quick(stores=stores, features_dtype="float32", num_tasks=2))
        for stores in ("pixels", "features")
    )
    for name, value in images[-1].items():
        torch.testing.assert_close(features[-1][name], value, atol=1e-4, rtol=1e-3)
    recipe = quick(strategy="adapter-rehearsal", stores="features", features_dtype="float16")
    with Trainer(recipe, load("digits"), Place(0, 1, torch.device("cpu"))) as trainer:
        trainer.train()
        assert trainer.strategy.buffer is not None
        drawn, _ = trainer.strategy.buffer.draw()
        assert (drawn.dtype, drawn.shape[1:]) == (torch.float16, (32, 1, 1))


def test_stages_that_are_tuned_and_adapters_share_what_comes_before_them() -> None:
    on_features = {"stores": "features", "num_tasks": 2}
    tuned = {"strategy": "incremental", "backbone_rate": 0.0}
    found = train.compare(
        {
            "adapters": quick(**on_features),
            "tuned": quick(**tuned, tuned_stages=2, **on_features),
            "one": quick(adapted_stages=1, **on_features),
        },
        None,
    )
    seconds = [each["seconds_embedding"] for each in found.values()]
    assert seconds[0] == seconds[1] != seconds[2]


def test_what_is_frozen_begins_with_weights_and_is_in_what_the_run_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    begun = build("test_efficientnet", 1000, (3, 8, 8)).state_dict()
    torch.save(begun, tmp_path / "weights.pth")
    recipe = quick(weights=str(tmp_path / "weights.pth"), num_tasks=2, data="digits")
    train.run(recipe, str(tmp_path / "run"))
    assert "untrained" not in capsys.readouterr().err
    left = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    names = {name.replace(".body.", ".") for name in left if ".adapter." not in name}
    assert names == begun.keys()
    for name, value in left.items():
        if ".adapter." not in name and "classifier" not in name:
            assert torch.equal(value, begun[name.replace(".body.", ".")]), name


def test_a_frozen_backbone_that_is_untrained_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    train.run(quick(num_tasks=2))
    said = capsys.readouterr().err
    assert (
        "the frozen layers of test_efficientnet are untrained, and stay so; --weights says" in said
    )


def test_the_last_stages_of_a_frozen_backbone_can_be_tuned() -> None:
    """What adapters are compared with: the same stages learn themselves."""
    recipe = quick(strategy="incremental", backbone_rate=0.0, tuned_stages=2, num_tasks=2)
    for stores in ("pixels", "features"):
        before, after = weights_after_tasks(replace(recipe, stores=stores))
        weights = {name for name in before if not name.endswith("num_batches_tracked")}
        assert {name for name in weights if not torch.equal(before[name], after[name])} == weights
        stages = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        assert stages == {"3", "4"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned_stages": -1}, r"tuned_stages=-1: it must be 0 \(none\) or more"),
        ({"tuned_stages": 2}, "tuned_stages=2 with backbone_rate=1.0: all stages learn; use"),
        (
            {"tuned_stages": 6, "backbone_rate": 0.0},
            "tuned_stages=6 with model='test_efficientnet': .* number of the model's stages",
        ),
    ],
)
def test_stages_that_cannot_be_tuned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(quick(strategy="incremental", **changes))


def test_compiled_models_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_module(model, backend="eager"))
    compiled, plain = (
        weights_after_tasks(quick(num_tasks=2, adapted_stages=1, iterations=1, compile=each))
        for each in (True, False)
    )
    for name, value in plain[-1].items():
        torch.testing.assert_close(compiled[-1][name], value, atol=1e-4, rtol=1e-3)


def test_what_does_not_fit_the_model_is_said_before_anything_is_trained() -> None:
    for changes, message in (
        (
            {"adapted_stages": 6},
            r"adapted_stages=6 with model=.*: 6 of its last stages: .* number of the model's stages \(5\)",
        ),
        ({"model": "levit_128s"}, "model='levit_128s': it cannot see images of 8 x 8"),
        (
            {"model": "levit_128s", "image_size": 224},
            "the model LevitDistilled has no linear layer as its last",
        ),
        ({"adapter_width": 40}, "adapter_width=40: the layer 'blocks.3.0' sees vectors of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            train.run(quick(**changes))
