"""Whole runs on an accelerator."""

from __future__ import annotations

import pytest

import simulated
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train

ONE_SCHEDULE = pytest.mark.parametrize(
    "accelerator", ["random-1"] if simulated.REAL is None else ["real"], indirect=True
)

pytestmark = [pytest.mark.accelerator, pytest.mark.slow, ONE_SCHEDULE]

EPOCHS = 6 if simulated.REAL is not None else 1
"""The simulated device says whether a run works there, not how well the network learns."""


@pytest.mark.parametrize(
    "strategy", ["rehearsal", "er-ace", "der", "der++", "a-gem", "gdumb", "from-scratch"]
)
@pytest.mark.parametrize("amp", ["off", "float16"])
def test_strategies_learn(accelerator: str, strategy: str, amp: str) -> None:
    recipe = recipe_named("digits", strategy=strategy, amp=amp, epochs=EPOCHS, device=accelerator)
    results = train.run(recipe)
    assert results["machine"]["device"] != "CPU"
    if simulated.REAL is not None:
        assert results["average_top1"] > (0.15 if strategy == "a-gem" else 0.75)
    elif amp == "off":
        expected = train.run(recipe_named("digits", strategy=strategy, epochs=1, device="cpu"))
        assert results["top1"] == expected["top1"]


# PyTorch 2.6's compiler recommends TF32 with a warning.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "grasp", "selection": "grasp"},
        {"remembers": "herding", "selection": "first-offered"},
        {"model": "small-cnn", "channels_last": True},
        pytest.param(
            {"model": "small-cnn", "channels_last": True, "compile": True},
            marks=pytest.mark.skipif(
                simulated.REAL is None, reason="the simulated device has no compiled kernels"
            ),
        ),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings(accelerator: str, changes: dict[str, object]) -> None:
    results = train.run(recipe_named("digits", epochs=EPOCHS, device=accelerator, **changes))
    if simulated.REAL is not None:
        assert results["average_top1"] > 0.7
    elif "model" not in changes:
        expected = train.run(recipe_named("digits", epochs=1, device="cpu", **changes))
        assert results["top1"] == expected["top1"]
