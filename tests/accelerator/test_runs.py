"""Whole runs on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest

from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    "strategy", ["rehearsal", "er-ace", "der", "der++", "a-gem", "gdumb", "from-scratch"]
)
@pytest.mark.parametrize("amp", ["off", "float16"])
def test_strategies_learn_on_a_gpu(strategy: str, amp: str) -> None:
    recipe = recipe_named("digits", strategy=strategy, amp=amp, epochs=6, device="cuda")
    results = train.run(recipe)
    assert results["machine"]["device"] != "CPU"
    assert results["average_top1"] > (0.15 if strategy == "a-gem" else 0.75)


# PyTorch 2.6's compiler recommends TF32 with a warning.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_grasp_exemplars_and_channels_last_on_a_gpu() -> None:
    for changes in (
        {"sampling": "grasp", "selection": "grasp"},
        {"remembers": "herding", "selection": "first-offered"},
        {"model": "small-cnn", "channels_last": True, "compile": True},
    ):
        recipe = recipe_named("digits", epochs=6, device="cuda", **changes)
        assert train.run(recipe)["average_top1"] > 0.7
