from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Iterable

import pytest

from ritornello.experiments.cli import flags as changes
from ritornello.experiments.cli.flags import (
    BufferChanges,
    Changes,
    RehearsalChanges,
    Sweep,
    TaskChanges,
    check_kept,
)
from ritornello.experiments.data import scenarios
from ritornello.experiments.models import augmentation
from ritornello.experiments.recipes import recipe as config
from ritornello.experiments.recipes.named import RECIPES, recipe_named
from ritornello.experiments.recipes.several_ranks import DRAWS
from ritornello.experiments.training import exemplars
from ritornello.policies import names


def test_what_is_not_given_is_as_in_the_recipe() -> None:
    for name, make in RECIPES.items():
        assert Changes().applied_to(name, **BufferChanges().as_changes()) == make()


def test_every_setting_arrives_in_the_recipe() -> None:
    given = Changes(
        data="here.npz", image_size=64, scenario="blurry", tasks=2, class_order="by-seed",
        blur=0.2, augmentation="crop-flip", model="small-cnn", dropout=0.3, amp="bfloat16",
        compile="on", channels_last="on", iterations=7, batch_size=8, optimiser="adam",
        keeps_optimiser="on", learning_rate=0.1, momentum=0.2, weight_decay=0.3, alpha=0.4,
        beta=0.6, loss_weights="by-task", remembers="herding", device="cpu", workers=3,
        crop_size=32, logits_dtype="float16", fixed_shares="on", samples_per_step=12,
        first_share=0.7, share_floor=0.1, soft_targets=2.0, soft_temperature=3.0, holdout=0.1,
        averaged=0.9, probe_every=5, ranks_differ=0.1, local_steps=4, si_strength=0.3,
        si_damping=0.4, locality=0.6, surrogate_steps=9, distance="js", generated_share=0.5,
        prior="dirichlet", prior_concentration=2.0, latents=7, generator_units=9, generator_learning_rate=0.01,
        conditional="off", distillation=0.5, stores="files", capacity_bytes=10**6, loss="mae",
        adapted_stages=3, adapter_width=5, adapter_scale=0.2, orthogonality=0.3, tuned_stages=1,
        weights="timm", backbone_rate=0.5, features_dtype="float16", ridge_penalty=0.2,
    )  # fmt: skip
    assert {name for name, value in vars(given).items() if value is None} == {"epochs"}
    buffer = BufferChanges(
        composition="proportional",
        capacity=0.2,
        representatives=5,
        candidates=6,
        selection="fifo",
        sampling="grasp",
        draws="local",
    )
    changed = given.applied_to("mnist", **buffer.as_changes())
    recipe = recipe_named("mnist")
    differing = {name for name, value in vars(changed).items() if value != getattr(recipe, name)}
    assert len(differing) == len(vars(given)) - 1 + len(vars(buffer))
    assert (changed.num_tasks, changed.capacity, changed.compile) == (2, 0.2, True)


def test_epochs_take_the_place_of_iterations() -> None:
    name = next(name for name, make in RECIPES.items() if make().iterations is not None)
    changed = Changes(epochs=3).applied_to(name)
    assert (changed.epochs, changed.iterations) == (3, None)
    with pytest.raises(ValueError, match="--epochs and --iterations: a task has one of the two"):
        Changes(epochs=3, iterations=3).applied_to(name)


def test_switches_and_orders_can_be_taken_back() -> None:
    changed = Changes(compile="off", class_order="ascending").applied_to("mnist")
    assert (changed.compile, changed.class_order) == (False, None)
    assert Changes(class_order=3).applied_to("mnist").class_order == 3


def help_of(kind: type) -> dict[str, str]:
    """Field to the text below it."""
    bodies = [
        node.body
        for node in ast.parse(inspect.getsource(changes)).body
        if isinstance(node, ast.ClassDef) and node.name in [each.__name__ for each in kind.__mro__]
    ]
    texts = {}
    for field, text in itertools.chain.from_iterable(map(itertools.pairwise, bodies)):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            texts[field.target.id] = str(text.value.value)
    return texts


@pytest.mark.parametrize(
    ("kind", "field", "names"),
    [
        (Changes, "scenario", scenarios.SCENARIOS),
        (Changes, "augmentation", augmentation.AUGMENTATIONS),
        (Changes, "remembers", exemplars.CHOICES),
        (Changes, "amp", config.AMP_MODES),
        (Changes, "optimiser", config.OPTIMISERS),
        (Changes, "distance", config.DISTANCES),
        (Changes, "prior", config.PRIORS),
        (Changes, "loss", config.LOSSES[1:]),  # of classes there is one
        (BufferChanges, "composition", config.COMPOSITIONS),
        (Sweep, "compositions", config.COMPOSITIONS),
        (BufferChanges, "selection", names.SELECTION_POLICIES),
        (BufferChanges, "sampling", names.SAMPLING_POLICIES),
        (Sweep, "selections", names.SELECTION_POLICIES),
        (Sweep, "samplings", names.SAMPLING_POLICIES),
        (BufferChanges, "draws", DRAWS),
        (Sweep, "draws", DRAWS),
    ],
)
def test_the_help_names_all_that_there_is(kind: type, field: str, names: Iterable[str]) -> None:
    words = help_of(kind)[field].replace(",", " ").replace(".", " ").replace(";", " ").split()
    assert [name for name in names if name not in words] == []


def test_what_a_finished_run_keeps_is_refused_by_name() -> None:
    check_kept(["extend", "runs/one", "--data=more.npz", "--epochs", "1", "--capacity", "9"])
    for flag in ("--weights", "--strategy=der", "--seed", "--scenario", "--tuned_stages=1"):
        name = flag.partition("=")[0]
        with pytest.raises(ValueError, match=f"^extend {name}: a finished run goes on with its"):
            check_kept(["extend", "runs/one", "--data", "more.npz", flag, "3"])


@pytest.mark.parametrize("kind", [TaskChanges, RehearsalChanges])
def test_what_may_change_is_not(kind: type) -> None:
    for each in dataclasses.fields(kind):
        check_kept(["extend", "runs/one", f"--{each.name.replace('_', '-')}", "1"])
