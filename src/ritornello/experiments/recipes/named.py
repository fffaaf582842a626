"""Recipes: complete, named experiments. A recipe is a function that returns a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ritornello.experiments.recipes.published import PUBLISHED
from ritornello.experiments.recipes.recipe import Recipe, with_changes

TEST_SAMPLES = "the test samples"
"""What settings were chosen by that are older than the holdout."""

HELD_OUT = "a tenth of CIFAR-10's training samples, held out"


def digits() -> Recipe:
    """The 8x8 digits that come with scikit-learn: no download, seconds to train."""
    return Recipe(
        name="digits",
        description="8x8 digits embedded in scikit-learn, 5 tasks of 2 classes (the demo)",
        data="digits",
        epochs=12,
        global_batch_size=16,
        learning_rate=0.05,
        momentum=0.9,
        capacity=200,
        global_num_representatives=16,
        global_num_candidates=8,
        tuned_on=TEST_SAMPLES,
    )


def mnist() -> Recipe:
    """Split MNIST, class-incremental, one pass; the perceptron of Buzzega et al. (2020)."""
    return Recipe(
        name="mnist",
        description="Split MNIST, 5 tasks of 2 classes, one pass, 500 representatives",
        data="mnist",
        global_batch_size=16,
        learning_rate=0.05,
        momentum=0.5,
        # Within the pass: a decaying rate forgets less of the tasks before.
        milestones=((0.5, 0.3), (0.8, 0.1)),
        capacity=500,
        global_num_representatives=64,
        tuned_on=TEST_SAMPLES,
    )


def permuted_mnist() -> Recipe:
    """Permuted MNIST, where importances of weights can help: all tasks have all ten digits.

    The stream of Zenke et al. (ICML 2017) and of van de Ven et al. (2022), reduced: there it has 10
    tasks, larger perceptrons, and many times as many steps.
    """
    return Recipe(
        name="permuted-mnist",
        description="permuted MNIST, domain-incremental; reduced: 5 tasks of 250 steps each",
        data="mnist",
        scenario="domain-incremental-permuted",
        optimiser="adam",
        iterations=250,
        global_batch_size=64,
        learning_rate=1e-3,
        momentum=0.5,  # of --optimiser sgd
        si_strength=10.0,
        capacity=500,
        global_num_representatives=64,
        tuned_on="a tenth of MNIST's training samples, held out",
    )


def cifar10() -> Recipe:
    """Split CIFAR-10 with a small convolutional network and a buffer of a fifth of the data."""
    return Recipe(
        name="cifar10",
        description="Split CIFAR-10, 5 tasks of 2 classes, small CNN, buffer of 20 % of the data",
        data="cifar10",
        model="small-cnn",
        epochs=3,
        global_batch_size=64,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=((1, 0.3), (2, 0.1)),
        capacity=0.2,
        global_num_representatives=64,
        global_num_candidates=32,
        tuned_on=TEST_SAMPLES,
    )


def cifar10_quick() -> Recipe:
    """Split CIFAR-10 with a network whose steps take 15 ms on one core, and few representatives.

    They count by task, as a quarter of the mini-batch would otherwise be a quarter of the loss,
    whatever it stands for.
    """
    return replace(
        cifar10(),
        name="cifar10-quick",
        description="Split CIFAR-10, 5 tasks of 2 classes, strided CNN, r/b = 1/4, buffer of 20 %",
        model="strided-cnn",
        loss_weights="by-task",
        epochs=6,
        learning_rate=0.02,
        milestones=((2, 0.3), (4, 0.1)),
        global_num_representatives=16,
    )


def cifar10_pretrained() -> Recipe:
    """Split CIFAR-10 on features of a frozen EfficientNet-Lite0, which has learnt ImageNet.

    All images pass the frozen layers once; what is stored, sent and trained on are 1,280 features.
    ``weights`` may be a file, where timm cannot download its own.
    """
    return Recipe(
        name="cifar10-pretrained",
        description="Split CIFAR-10, 5 tasks of 2, features of a frozen EfficientNet-Lite0",
        data="cifar10",
        image_size=96,
        model="tf_efficientnet_lite0",
        weights="timm",
        backbone_rate=0.0,
        stores="features",
        features_dtype="float16",
        alpha=0.05,
        beta=1.0,
        channels_last=True,
        global_batch_size=64,
        learning_rate=0.03,
        momentum=0.9,
        milestones=((0.5, 0.3), (0.8, 0.1)),
        capacity=1000,
        global_num_representatives=64,
        loss_weights="by-task",
        tuned_on=HELD_OUT,
    )


RATE_SCHEDULE: dict[str, Any] = {
    "warmup_epochs": 5,
    "milestones": ((21, 0.5), (26, 0.05), (28, 0.01)),
}
"""Of 30 epochs per task, as in Bouvier et al. (CCGrid 2024)."""


def cifar10_frontier() -> Recipe:
    """Split CIFAR-10, trained for long enough to come close to training from scratch.

    ``compare`` draws what accuracy costs, for both compositions of a step: see ``SWEEPS``.
    """
    recipe = replace(
        cifar10_quick(),
        name="cifar10-frontier",
        description="Split CIFAR-10, 5 tasks of 2, buffer of 20 %, steps composed in proportion",
        augmentation="crop-flip",
        composition="proportional",
        sampling="earlier-tasks",
        loss_weights="by-sample",
        first_share=0.5,
        epochs=30,
        stretches_schedule=True,
        global_num_representatives=8,
        global_num_candidates=None,
        remembers="last-epoch",
        tuned_on=HELD_OUT,
        **RATE_SCHEDULE,
    )
    return with_changes(recipe, epochs=20)


def frontier() -> Recipe:
    """Your own small images of many classes, close to training from scratch at 9/8 of the price."""
    return replace(
        cifar10_frontier(),
        name="frontier",
        description="your own small images of many classes, 4 tasks, buffer of 30 %, r/b = 1/8",
        data="folder",
        image_size=32,
        num_tasks=4,
        model="halving-cnn",
        first_share=0.6,
        epochs=30,
        capacity=0.3,
        **RATE_SCHEDULE,
    )


def folder() -> Recipe:
    """Your own images: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg."""
    return Recipe(
        name="folder",
        description="your own images (--data FOLDER with train/CLASS and val/CLASS)",
        data="folder",
        image_size=256,
        augmentation="resized-crop-flip",
        crop_size=224,
        num_tasks=4,
        model="resnet18",
        epochs=30,
        global_batch_size=56,
        learning_rate=0.0125,
        momentum=0.9,
        weight_decay=5e-5,
        warmup_epochs=5,
        milestones=((21, 0.5), (26, 0.05), (28, 0.01)),
        capacity=10_000,
        global_num_representatives=8,
        global_num_candidates=16,
        num_workers=4,
    )


def arrivals() -> Recipe:
    """Your own stream: a folder of folders, one for each day on which data arrived.

    The least share of the new day in a step was found with CIFAR-10's images in 20 days.
    """
    recipe = replace(
        folder(),
        name="arrivals",
        description="your own stream (--data FOLDER with DAY/CLASS/*.jpg)",
        data="arrivals",
        scenario="arrivals",
        first_share=0.6,
        share_floor=0.25,
        global_num_candidates=None,
        remembers="last-epoch",
    )
    return with_changes(recipe, composition="proportional")


def ptychography() -> Recipe:
    """Reconstruction from simulated diffraction patterns: targets are images, measured by errors.

    The single pass and the share of the buffer are those of the journal extension of Bouvier et
    al. (Future Generation Computer Systems, 2025). All else is smaller: there 156 measured scans,
    32 channels, and 16 new and 24 past samples in a step.
    """
    return Recipe(
        name="ptychography",
        description="reconstruction; reduced: 10 simulated scans of MNIST objects, 8 channels",
        data="mnist-diffraction",
        scenario="group-incremental",
        num_tasks=10,
        model="ptychonn",
        loss="mae",
        alpha=1.0,
        beta=1.0,
        optimiser="adam",
        keeps_optimiser=True,
        global_batch_size=8,
        learning_rate=1e-3,
        capacity=0.3,
        global_num_representatives=8,
        global_num_candidates=4,
        selection="reservoir",
        tuned_on="patterns of MNIST objects, held out",
    )


def ptycho_cifar10() -> Recipe:
    """As ``ptychography``, with objects of CIFAR-10: each scan has pictures of one class."""
    return replace(
        ptychography(),
        name="ptycho-cifar10",
        description="reconstruction; reduced: 10 simulated scans of CIFAR-10 objects",
        data="cifar10-diffraction",
    )


def regression() -> Recipe:
    """Your own regression: tensors to predict, in groups that come one after another."""
    return Recipe(
        name="regression",
        description="your own regression (--data FILE.npz with train_targets), groups in turn",
        data="npz",
        scenario="group-incremental",
        num_tasks=5,
        model="mlp",
        loss="mse",
        optimiser="adam",
        keeps_optimiser=True,
        epochs=3,
        global_batch_size=16,
        learning_rate=1e-3,
        capacity=500,
        global_num_representatives=16,
        selection="reservoir",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{
        recipe.__name__.replace("_", "-"): recipe
        for recipe in (
            *(digits, mnist, permuted_mnist),
            *(cifar10, cifar10_quick, cifar10_frontier, cifar10_pretrained),
            *(frontier, folder, arrivals),
            *(ptychography, ptycho_cifar10, regression),
        )
    },
    **PUBLISHED,
}


BOTH = ("append", "proportional")

SWEEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cifar10-frontier": {"compositions": BOTH, "representatives": (0, 8, 16, 32, 64)},
    "frontier": {"compositions": BOTH, "representatives": (0, 8)},
}
"""What ``compare`` varies in a recipe, beside the strategy, where no flag says what."""


def recipe_named(name: str, **changes: Any) -> Recipe:
    """A recipe by its name, with some settings changed.

    Raises:
        ValueError: no recipe has that name.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"there is no recipe {name!r}{hint}; 'ritornello recipes' lists all {len(RECIPES)}"
        )
    return with_changes(RECIPES[name](), **changes)
