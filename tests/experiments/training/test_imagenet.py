"""The whole path of the ImageNet recipe, on a tiny folder of generated pictures, with two ranks.

What is missing for the real run are the data and the machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train

NUM_CLASSES = 8


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of many sizes; a class is a colour, with noise."""
    folder = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    colours = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(NUM_CLASSES)]) * 160 + 40
    for part, count in (("train", 24), ("val", 6)):
        for label, colour in enumerate(colours):
            path = folder / part / f"n{label:08d}"
            path.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(40, 90, size=2)
                pixels = generator.normal(colour, 40, size=(height, width, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path / f"{number}.JPEG")
    return folder


def tiny(folder: Path, **changes: Any) -> Any:
    """The paper's recipe, smaller where size alone matters."""
    recipe = recipe_named("bouvier-imagenet-resnet50")
    return replace(
        recipe,
        data_path=str(folder),
        model="resnet10t",
        image_size=40,
        crop_size=32,
        global_batch_size=12,
        learning_rate=0.02,
        epochs=6,
        warmup_epochs=1,
        milestones=((4, 0.5), (5, 0.05)),
        global_num_representatives=6,
        global_num_candidates=6,
        num_workers=1,
        amp="bfloat16",  # a CPU has no fast float16
        **changes,
    )


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_recipe_runs_from_files_to_results_on_two_ranks(
    image_folder: Path, tmp_path: Path
) -> None:
    recipes = {each: tiny(image_folder, strategy=each) for each in ("incremental", "rehearsal")}
    comparison = launch(2, train.compare, recipes, str(tmp_path))
    rehearsal, incremental = comparison["rehearsal"], comparison["incremental"]
    assert json.loads((tmp_path / "rehearsal" / "results.json").read_text()) == rehearsal
    config = rehearsal["config"]
    assert (config["global_batch_size"], config["learning_rate"]) == (24, 0.04)
    assert [len(task["classes"]) for task in rehearsal["tasks"]] == [2, 2, 2, 2]
    buffer = rehearsal["buffer"]
    assert buffer["capacity"] == round(0.3 * 24 * NUM_CLASSES)
    assert buffer["record_bytes"] == 3 * 40 * 40 + 8 + 8  # uint8 at full size, label, alignment
    assert set(buffer["held_per_class"]) == set(map(str, range(NUM_CLASSES)))
    assert incremental["average_top1"] < 0.45
    assert rehearsal["average_top1"] > incremental["average_top1"] + 0.1
    assert rehearsal["average_top5"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["resnet18", "ghostnet_050"])
def test_the_other_models_and_strategies(image_folder: Path, model: str) -> None:
    dropout = 0.225 if model == "ghostnet_050" else 0.0
    strategy = "der++" if model == "ghostnet_050" else "from-scratch"
    recipe = replace(
        tiny(image_folder, strategy=strategy),
        model=model,
        dropout=dropout,
        epochs=1,
        warmup_epochs=0,
    )
    results = train.run(recipe)
    assert np.array(results["top5"]).shape == (4, 4)
    assert results["average_top5"] > 0.3
