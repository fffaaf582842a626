from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe, with_changes
from ritornello.experiments.recipes.split_sizes import check_split


def check(recipe: Recipe) -> None:
    """As a run on 4 ranks does."""
    recipe.check()
    check_split(recipe, 4)


def test_the_schedule_of_the_learning_rate() -> None:
    recipe = recipe_named("folder")
    factors = [recipe.learning_rate_factor(epoch) for epoch in (0.5, 5, 20, 21, 26.5, 29)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.05, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "int8"}, "amp='int8': there are off"),
        ({"epochs": 0}, "epochs=0: it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: it must be a finite number"),
        ({"capacity": float("inf")}, "capacity=inf: it must be a finite number"),
        ({"alpha": float("nan")}, "alpha=nan: it must be a finite number"),
        ({"momentum": 1.5}, r"momentum=1.5: it must be from 0 \(off\) to below 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: it must not be negative"),
        ({"seed": -1}, "seed=-1: it must not be negative"),
        ({"num_workers": -1}, "num_workers=-1: it must not be negative"),
        ({"optimiser": "lion"}, "optimiser='lion': there are sgd, adam"),
        ({"pixels": "raw"}, "pixels='raw': there are standardised, unit"),
        ({"loss_weights": "even"}, "loss_weights='even': there are by-sample, by-task"),
        ({"logits_dtype": "int8"}, "logits_dtype='int8': there are float32, float16"),
        ({"iterations": 0}, "iterations=0: it must be at least 1"),
        ({"capacity": 0.0}, "capacity=0.0: it must be at least 1, or a fraction"),
        ({"capacity": 1.5}, "capacity=1.5: it must be at least 1, or a fraction"),
        ({"alpha": -0.1}, "alpha=-0.1: it must not be negative"),
        ({"distillation": -0.1}, "distillation=-0.1: it must not be negative"),
        ({"distance": "kl"}, "distance='kl': there are mse, js"),
        ({"prior": "flat"}, "prior='flat': there are gaussian, dirichlet"),
        ({"prior_concentration": 0.0}, "prior_concentration=0.0: it must be above 0"),
        ({"generator_learning_rate": 0.0}, "generator_learning_rate=0.0: it must be above 0"),
        ({"latents": 0}, "latents=0: it must be at least 1"),
        ({"generator_units": 0}, "generator_units=0: it must be at least 1"),
        ({"generated_share": 1.0}, r"generated_share=1.0: it must be from 0 \(off\) to below 1"),
        (
            {"generated_share": 0.2},
            "generated_share=0.2 of global_num_representatives=16: 3 would be generated and 13",
        ),
        (
            {"generated_share": 0.8},
            r"13 would be generated and 3 drawn; .* of either as ranks \(4\)",
        ),
        ({"blur": 1.0}, "blur=1.0: it must be from 0 to below 1"),
        ({"averaged": 1.0}, r"averaged=1.0: it must be from 0 \(off\) to below 1"),
        ({"holdout": -0.1}, r"holdout=-0.1: it must be from 0 \(off\) to below 1"),
        ({"probe_every": -1}, r"probe_every=-1: it must be 0 \(off\) or more steps"),
        ({"global_num_representatives": 3}, "global_num_representatives=3: it must be at least"),
        ({"global_batch_size": 3}, "global_batch_size=3: it must be at least the number of ranks"),
        ({"global_num_candidates": 2}, "global_num_candidates=2 does not .*; take 4, or another"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(recipe_named("digits", **changes))


PROPORTIONAL = {"composition": "proportional", "global_num_candidates": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": "mixed"}, "composition='mixed': there are append, proportional"),
        (
            {"global_num_representatives": 2},
            "samples_per_step=18 does not divide .*; take 16 or 20",
        ),
        ({"global_num_representatives": -1}, "global_num_representatives=-1: it must not be neg"),
        ({"global_batch_size": 18}, "global_batch_size=18 does not divide evenly over 4 ranks"),
        ({"samples_per_step": 2}, "samples_per_step=2 does not divide evenly .*; take 4, or"),
        ({"samples_per_step": 4}, "samples_per_step=4: it must be at least two for each of 4"),
        ({"first_share": 0.0}, "first_share=0.0: it must be above 0 and at most 1"),
        ({"share_floor": 1.5}, "share_floor=1.5: it must be from 0 to 1"),
        ({"loss_weights": "by-task"}, "loss_weights='by-task' with composition='proportional'"),
        ({"soft_targets": -1.0}, "soft_targets=-1.0: it must not be negative"),
        ({"soft_temperature": 0.0}, "soft_temperature=0.0: it must be above 0"),
        (
            {"soft_targets": 1.0, "scenario": "task-incremental"},
            "soft_targets=1.0 with scenario='task-incremental'",
        ),
    ],
)
def test_compositions_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(recipe_named("digits", **PROPORTIONAL | changes))


def test_a_composition_brings_what_goes_with_it() -> None:
    proportional = recipe_named("digits", composition="proportional", first_share=0.5)
    assert (proportional.sampling, proportional.loss_weights) == ("earlier-tasks", "by-sample")
    assert with_changes(proportional, composition="proportional", seed=1).first_share == 0.5
    appended = with_changes(proportional, composition="append")
    assert (appended.sampling, appended.loss_weights) == ("uniform", "by-task")
    assert appended.first_share is None
    chosen = recipe_named("digits", composition="proportional", sampling="grasp")
    assert chosen.sampling == "grasp"
    assert recipe_named("digits", composition="append") == recipe_named("digits")


def test_incremental_trainings_price_is_no_representative_more() -> None:
    recipe = recipe_named("digits", global_num_representatives=0, **PROPORTIONAL)
    check(recipe)
    assert recipe.composed_samples == recipe.global_batch_size


def test_a_schedule_that_stretches() -> None:
    recipe = recipe_named("frontier")
    assert (recipe.epochs, recipe.warmup_epochs) == (30, 5)
    shorter = with_changes(recipe, epochs=15)
    assert shorter.warmup_epochs == 2.5
    assert shorter.milestones == ((10.5, 0.5), (13, 0.05), (14, 0.01))
    assert with_changes(recipe, epochs=15, warmup_epochs=1.0).warmup_epochs == 1.0
    assert recipe_named("cifar10-frontier").milestones[0] == (14, 0.5)
    assert recipe_named("folder", epochs=3).warmup_epochs == 5


def test_sizes_of_one_rank() -> None:
    recipe = recipe_named("digits", scales_with_ranks=True)
    scaled = recipe.on(4)
    assert scaled.global_batch_size == 64
    assert scaled.global_num_representatives == 64
    assert scaled.global_num_candidates == 32
    assert scaled.learning_rate == pytest.approx(0.2)
    assert scaled.capacity == recipe.capacity
    assert recipe_named("digits").on(4) == recipe_named("digits")
    assert replace(recipe, samples_per_step=18).on(4).samples_per_step == 72
    assert recipe_named("digits", scales_with_ranks=True, global_num_candidates=None).on(3)


def test_the_capacity_may_be_a_fraction() -> None:
    assert recipe_named("digits", capacity=0.25).num_stored(1000) == 250
    assert recipe_named("digits", capacity=0.25).num_stored(1) == 1
    assert recipe_named("digits", capacity=70).num_stored(1000) == 70
