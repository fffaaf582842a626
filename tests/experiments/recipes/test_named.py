from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from torch import nn

from ritornello.experiments.data.load import NAMES
from ritornello.experiments.data.scenarios import SCENARIOS
from ritornello.experiments.models import build as models
from ritornello.experiments.models.augmentation import AUGMENTATIONS
from ritornello.experiments.recipes.named import RECIPES, recipe_named
from ritornello.experiments.recipes.published import BUZZEGA_MNIST, VAN_DE_VEN_MNIST
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.run import check
from ritornello.policies.names import SAMPLING_POLICIES as SAMPLING
from ritornello.policies.names import SELECTION_POLICIES as SELECTION

MODELS_OF_CLASSES = sorted(
    {recipe.model for recipe in map(recipe_named, RECIPES) if not recipe.predicts_tensors}
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_1_2_and_4_ranks(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.name == name
    assert recipe.description
    for num_ranks in (1, 2, 4):
        check(recipe, num_ranks)
    assert recipe.data in NAMES
    assert recipe.scenario in SCENARIOS
    assert recipe.selection in SELECTION
    assert recipe.sampling in SAMPLING
    assert recipe.augmentation in AUGMENTATIONS


@pytest.mark.parametrize("model", MODELS_OF_CLASSES)
def test_every_model_can_be_built(model: str) -> None:
    dropout = max(r.dropout for r in map(recipe_named, RECIPES) if r.model == model)
    made = models.build(model, 10, (3, 64, 64), dropout)
    last = [layer for layer in made.modules() if isinstance(layer, nn.Linear)][-1]
    assert last.out_features == 10


def test_an_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'minst' \(did you mean 'mnist'\?\)"):
        recipe_named("minst")


def test_every_row_of_the_two_split_mnist_tables() -> None:
    assert len(BUZZEGA_MNIST) == 12
    assert len(VAN_DE_VEN_MNIST) == 5
    recipe = recipe_named("buzzega-mnist-der++-500")
    assert recipe.published is not None
    assert (recipe.published.top1, recipe.published.spread) == (91.00, 1.49)
    settings = (recipe.learning_rate, recipe.global_num_representatives, recipe.alpha, recipe.beta)
    assert settings == (0.03, 10, 1.0, 0.5)


def test_a_changed_recipe_no_longer_reproduces_the_published_figure() -> None:
    assert recipe_named("buzzega-mnist-er-500", seed=3).published is not None
    assert recipe_named("buzzega-mnist-er-500", learning_rate=0.2).published is None


def test_the_papers_imagenet_runs() -> None:
    recipe = recipe_named("bouvier-imagenet-resnet50")
    on_64 = recipe.on(64)
    assert (on_64.global_batch_size, on_64.global_num_representatives) == (56 * 64, 7 * 64)
    assert on_64.global_num_candidates == 14 * 64
    assert on_64.learning_rate == pytest.approx(0.0125 * 64)
    assert recipe.on(128).learning_rate == on_64.learning_rate
    assert recipe.on(128).on(128).global_batch_size == 56 * 128
    assert recipe.num_stored(1_281_167) == 384_350
    factors = [recipe.learning_rate_factor(epoch) for epoch in (2.5, 5, 20, 21, 26, 28)]
    assert factors == [0.5, 1.0, 1.0, 0.5, 0.05, 0.01]
    ghostnet = recipe_named("bouvier-imagenet-ghostnet")
    assert (ghostnet.dropout, ghostnet.weight_decay) == (0.225, 1.5e-5)
    assert ghostnet.model == "ghostnet_050"
    assert ghostnet.learning_rate_factor(16) == 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert Recipe.from_results(json.loads(json.dumps(asdict(recipe)))) == recipe
