"""Recipes that reproduce published figures, row by row.

Named after the first author, the data and the strategy: ``buzzega-mnist-er-500``. The settings
are the authors', from their papers and code; what differs is said beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ritornello.experiments.recipes.recipe import Published, Recipe

BUZZEGA = "Buzzega et al., Dark Experience for General Continual Learning, NeurIPS 2020"
VAN_DE_VEN = "van de Ven et al., Three types of incremental learning, 2022 (deviation: SEM)"
BOSCHINI = "Boschini et al., Class-Incremental Continual Learning into the eXtended DER-verse, 2022"
BOUVIER = "Bouvier et al., CCGrid 2024"

SHORT_NAMES = {"incremental": "sgd", "rehearsal": "er", "generative": "dgr"}
"""How the authors call some strategies."""


def _figure(figure: tuple[float, float], num_runs: int, source: str) -> Published:
    top1, spread = figure
    return Published(top1, spread, num_runs, source)


def _named(recipe: Recipe, strategy: str, capacity: int | None, what: str) -> Recipe:
    name = SHORT_NAMES.get(strategy, strategy)
    size = "" if capacity is None else f"-{capacity}"
    with_buffer = "" if capacity is None else f", {capacity} representatives"
    return replace(
        recipe,
        name=f"{recipe.name}-{name}{size}",
        description=f"{what}: {strategy}{with_buffer}",
        strategy=strategy,
        capacity=capacity or recipe.capacity,
    )


# Split MNIST, class-incremental, one pass (Buzzega et al., table 2 of the supplement).

BUZZEGA_MNIST: dict[tuple[str, int | None], dict[str, Any]] = {
    ("incremental", None): {"lr": 0.03, "top1": (19.60, 0.04)},
    ("joint", None): {"lr": 0.1, "top1": (95.57, 0.24)},
    ("rehearsal", 200): {"lr": 0.01, "r": 10, "top1": (80.43, 1.89)},
    ("rehearsal", 500): {"lr": 0.1, "r": 10, "top1": (86.12, 1.89)},
    ("rehearsal", 5120): {"lr": 0.1, "r": 10, "top1": (93.40, 1.29)},
    ("a-gem", 200): {"lr": 0.1, "r": 128, "top1": (45.72, 4.26)},
    ("der", 200): {"lr": 0.03, "r": 10, "alpha": 0.2, "top1": (84.55, 1.64)},
    ("der", 500): {"lr": 0.03, "r": 128, "alpha": 1.0, "top1": (90.54, 1.18)},
    ("der", 5120): {"lr": 0.1, "r": 128, "alpha": 0.5, "top1": (94.90, 0.57)},
    ("der++", 200): {"lr": 0.03, "r": 128, "alpha": 0.2, "beta": 1.0, "top1": (85.61, 1.40)},
    ("der++", 500): {"lr": 0.03, "r": 10, "alpha": 1.0, "beta": 0.5, "top1": (91.00, 1.49)},
    ("der++", 5120): {"lr": 0.1, "r": 64, "alpha": 0.2, "beta": 0.5, "top1": (95.30, 1.20)},
}


def buzzega_mnist(strategy: str, capacity: int | None) -> Recipe:
    """A row of the table. The rate of joint training is not published: that of ER is taken."""
    row = BUZZEGA_MNIST[strategy, capacity]
    recipe = Recipe(
        name="buzzega-mnist",
        description="",
        data="mnist",
        pixels="unit",
        model="mlp",
        global_batch_size=10,
        learning_rate=row["lr"],
        alpha=row.get("alpha", 0.5),
        beta=row.get("beta", 0.5),
        global_num_representatives=row.get("r", 10),
        selection="reservoir",
        published=_figure(row["top1"], 10, BUZZEGA),
    )
    if strategy == "a-gem":
        # Its memory is filled at each task's end, with an equal part for each task.
        recipe = replace(recipe, remembers="random", selection="first-offered", fixed_shares=True)
    return _named(recipe, strategy, capacity, "Split MNIST, one pass")


# Permuted and rotated MNIST, domain-incremental, one pass (the same paper's settings, from its
# code; its figures could not be checked, and are left out).

BUZZEGA_DOMAINS: dict[tuple[str, str, int | None], dict[str, Any]] = {
    ("permuted", "incremental", None): {"lr": 0.2},
    ("permuted", "rehearsal", 200): {"lr": 0.2},
    ("permuted", "rehearsal", 500): {"lr": 0.2},
    ("permuted", "rehearsal", 5120): {"lr": 0.2},
    ("permuted", "der", 500): {"lr": 0.2, "alpha": 1.0},
    ("permuted", "der++", 500): {"lr": 0.2, "alpha": 1.0, "beta": 0.5},
    ("rotated", "incremental", None): {"lr": 0.2},
    ("rotated", "rehearsal", 500): {"lr": 0.2},
    ("rotated", "der", 500): {"lr": 0.2, "alpha": 0.5},
    ("rotated", "der++", 500): {"lr": 0.2, "alpha": 0.5, "beta": 1.0},
}


def buzzega_domains(domain: str, strategy: str, capacity: int | None) -> Recipe:
    """20 tasks of all ten digits. Rotations here are equally spaced, there random."""
    row = BUZZEGA_DOMAINS[domain, strategy, capacity]
    recipe = Recipe(
        name=f"buzzega-{domain}-mnist",
        description="",
        data="mnist",
        scenario=f"domain-incremental-{domain}",
        num_tasks=20,
        pixels="unit",
        model="mlp",
        global_batch_size=128,
        learning_rate=row["lr"],
        alpha=row.get("alpha", 0.5),
        beta=row.get("beta", 0.5),
        global_num_representatives=128,
        selection="reservoir",
    )
    return _named(recipe, strategy, capacity, f"{domain.capitalize()} MNIST, 20 tasks")


# Split CIFAR-10 and Tiny ImageNet, class-incremental (Buzzega et al., table 2).

BUZZEGA_IMAGES: dict[tuple[str, str, int | None], dict[str, Any]] = {
    ("cifar10", "incremental", None): {"lr": 0.1, "top1": (19.62, 0.05)},
    ("cifar10", "joint", None): {"lr": 0.1, "top1": (92.20, 0.15)},
    ("cifar10", "rehearsal", 200): {"lr": 0.1, "top1": (44.79, 1.86)},
    ("cifar10", "rehearsal", 500): {"lr": 0.1, "top1": (57.74, 0.27)},
    ("cifar10", "rehearsal", 5120): {"lr": 0.1, "top1": (82.47, 0.52)},
    ("cifar10", "der", 200): {"lr": 0.03, "alpha": 0.3, "top1": (61.93, 1.79)},
    ("cifar10", "der", 500): {"lr": 0.03, "alpha": 0.3, "top1": (70.51, 1.67)},
    ("cifar10", "der", 5120): {"lr": 0.03, "alpha": 0.3, "top1": (83.81, 0.33)},
    ("cifar10", "der++", 200): {"lr": 0.03, "alpha": 0.1, "beta": 0.5, "top1": (64.88, 1.17)},
    ("cifar10", "der++", 500): {"lr": 0.03, "alpha": 0.2, "beta": 0.5, "top1": (72.70, 1.36)},
    ("cifar10", "der++", 5120): {"lr": 0.03, "alpha": 0.1, "beta": 1.0, "top1": (85.24, 0.49)},
    ("tiny-imagenet", "incremental", None): {"lr": 0.03, "top1": (7.92, 0.26)},
    ("tiny-imagenet", "joint", None): {"lr": 0.03, "top1": (59.99, 0.19)},
    ("tiny-imagenet", "rehearsal", 200): {"lr": 0.1, "top1": (8.49, 0.16)},
    ("tiny-imagenet", "rehearsal", 500): {"lr": 0.03, "top1": (9.99, 0.29)},
    ("tiny-imagenet", "rehearsal", 5120): {"lr": 0.1},
    ("tiny-imagenet", "der", 200): {"lr": 0.03, "alpha": 0.1, "top1": (11.87, 0.78)},
    ("tiny-imagenet", "der", 500): {"lr": 0.03, "alpha": 0.1, "top1": (17.75, 1.14)},
    ("tiny-imagenet", "der", 5120): {"lr": 0.03, "alpha": 0.1},
    ("tiny-imagenet", "der++", 200): {"lr": 0.03, "alpha": 0.1, "beta": 1.0, "top1": (10.96, 1.17)},
    ("tiny-imagenet", "der++", 500): {"lr": 0.03, "alpha": 0.2, "beta": 0.5, "top1": (19.38, 1.41)},
    ("tiny-imagenet", "der++", 5120): {"lr": 0.03, "alpha": 0.1, "beta": 0.5},
}


def buzzega_images(data: str, strategy: str, capacity: int | None) -> Recipe:
    """A row of the table. DER and DER++ run one forward pass here, three there."""
    row = BUZZEGA_IMAGES[data, strategy, capacity]
    is_cifar = data == "cifar10"
    recipe = Recipe(
        name=f"buzzega-{data}",
        description="",
        data=data,
        num_tasks=5 if is_cifar else 10,
        augmentation="crop-flip",
        model="cifar-resnet18",
        epochs=50 if is_cifar else 100,
        global_batch_size=32,
        learning_rate=row["lr"],
        alpha=row.get("alpha", 0.5),
        beta=row.get("beta", 0.5),
        global_num_representatives=32,
        selection="reservoir",
        num_workers=0 if is_cifar else 4,
        published=_figure(row["top1"], 10, BUZZEGA) if "top1" in row else None,
    )
    title = "CIFAR-10, 5 tasks" if is_cifar else "Tiny ImageNet, 10 tasks"
    return _named(recipe, strategy, capacity, f"Split {title}, ResNet-18")


# Split CIFAR-100, class-incremental (Boschini et al., table 1).

BOSCHINI_CIFAR100: dict[tuple[str, int | None], dict[str, Any]] = {
    ("incremental", None): {"lr": 0.03, "top1": 9.43},
    ("joint", None): {"lr": 0.03, "top1": 70.44},
    ("rehearsal", 500): {"lr": 0.1, "top1": 22.10},
    ("rehearsal", 2000): {"lr": 0.1, "top1": 38.58},
    ("er-ace", 500): {"lr": 0.03, "top1": 38.75},
    ("er-ace", 2000): {"lr": 0.03, "top1": 49.72},
    ("der", 500): {"lr": 0.03, "alpha": 0.3, "top1": 36.60},
    ("der", 2000): {"lr": 0.03, "alpha": 0.3, "top1": 51.89},
    ("der++", 500): {"lr": 0.03, "alpha": 0.1, "beta": 0.5, "top1": 38.25},
    ("der++", 2000): {"lr": 0.03, "alpha": 0.1, "beta": 0.5, "top1": 53.63},
}


def boschini_cifar100(strategy: str, capacity: int | None) -> Recipe:
    """A row of the table. The rate falls to a tenth twice; the authors' code says 0.2 elsewhere."""
    row = BOSCHINI_CIFAR100[strategy, capacity]
    recipe = Recipe(
        name="boschini-cifar100",
        description="",
        data="cifar100",
        num_tasks=10,
        augmentation="crop-flip",
        model="cifar-resnet18",
        epochs=50,
        global_batch_size=32,
        learning_rate=row["lr"],
        milestones=((35, 0.1), (45, 0.01)),
        alpha=row.get("alpha", 0.5),
        beta=row.get("beta", 0.5),
        global_num_representatives=32,
        selection="reservoir",
        published=Published(row["top1"], None, None, BOSCHINI),
    )
    return _named(recipe, strategy, capacity, "Split CIFAR-100, 10 tasks, ResNet-18")


# Split MNIST, class-incremental, 2000 iterations per task (van de Ven et al.).

VAN_DE_VEN_MNIST = {
    "incremental": (19.89, 0.02),
    "rehearsal": (88.79, 0.20),
    "a-gem": (65.10, 3.64),
    "generative": (90.35, 0.24),
    "joint": (98.17, 0.04),
}


def van_de_ven_mnist(strategy: str) -> Recipe:
    """A row of the table: 100 random samples per class are stored when a task has ended.

    Generative replay ("DGR"): the generator is told no class, and what it makes gets hard labels
    of the model as it was.
    """
    recipe = Recipe(
        name="vandeven-mnist",
        description="",
        data="mnist",
        class_order="by-seed",
        pixels="unit",
        model="mlp-400",
        loss_weights="by-task",
        optimiser="adam",
        keeps_optimiser=True,
        iterations=2000,
        global_batch_size=128,
        learning_rate=0.001,
        capacity=1000,
        global_num_representatives=128,
        remembers="random",
        selection="first-offered",
        fixed_shares=True,
        conditional=strategy != "generative",
        published=_figure(VAN_DE_VEN_MNIST[strategy], 20, VAN_DE_VEN),
    )
    return _named(recipe, strategy, None, "Split MNIST, 2000 iterations per task")


# ImageNet-1K in four tasks (Bouvier et al.), on 16 to 128 GPUs.

BOUVIER_IMAGENET: dict[str, dict[str, Any]] = {
    "resnet50": {"lr": 0.0125, "weight_decay": 5e-5, "decay_at": (21, 26, 28)},
    "resnet18": {"lr": 0.0125, "weight_decay": 5e-5, "decay_at": (21, 26, 28)},
    "ghostnet": {"lr": 0.01, "weight_decay": 1.5e-5, "decay_at": (15, 21, 28), "dropout": 0.225},
}

TIMM_NAMES = {"ghostnet": "ghostnet_050"}


def bouvier_imagenet(model: str) -> Recipe:
    """The paper's runs: sizes and rate are those of one GPU; a buffer of 30 % of the data.

    ``--capacities 0.05 0.1 0.2 0.3``, ``--representatives`` and ``--candidates`` of ``compare``
    are the paper's other runs; "der" and "der++" take its alpha and beta. The authors store
    samples as they were augmented once, here they are augmented anew each time.
    """
    row = BOUVIER_IMAGENET[model]
    return Recipe(
        name=f"bouvier-imagenet-{model}",
        description=f"ImageNet-1K in 4 tasks, {model}, a buffer of 30 %; sizes are per GPU",
        data="imagenet",
        image_size=256,
        num_tasks=4,
        augmentation="resized-crop-flip",
        crop_size=224,
        model=TIMM_NAMES.get(model, model),
        dropout=row.get("dropout", 0.0),
        channels_last=True,
        amp="float16",
        alpha=0.8,
        beta=1.0,
        epochs=30,
        global_batch_size=56,
        learning_rate=row["lr"],
        momentum=0.9,
        weight_decay=row["weight_decay"],
        warmup_epochs=5,
        milestones=tuple(zip(row["decay_at"], (0.5, 0.05, 0.01), strict=True)),
        capacity=0.3,
        global_num_representatives=7,
        global_num_candidates=14,
        selection="per-class-random",
        fixed_shares=True,
        scales_with_ranks=True,
        num_workers=8,
        published=Published(None, None, None, BOUVIER, top5=80.55) if model == "resnet50" else None,
    )


def bouvier_imagenet_proportional(model: str) -> Recipe:
    """The paper's runs with as many samples per step, composed in proportion; not the paper's."""
    recipe = bouvier_imagenet(model)
    return replace(
        recipe,
        name=f"{recipe.name}-proportional",
        description=f"ImageNet-1K in 4 tasks, {model}, 30 %, steps composed in proportion",
        composition="proportional",
        sampling="earlier-tasks",
        first_share=0.6,
        published=None,
    )


def _all() -> dict[str, Callable[[], Recipe]]:
    makers: list[Callable[[], Recipe]] = [
        *(partial(buzzega_mnist, *row) for row in BUZZEGA_MNIST),
        *(partial(van_de_ven_mnist, row) for row in VAN_DE_VEN_MNIST),
        *(partial(buzzega_domains, *row) for row in BUZZEGA_DOMAINS),
        *(partial(buzzega_images, *row) for row in BUZZEGA_IMAGES),
        *(partial(boschini_cifar100, *row) for row in BOSCHINI_CIFAR100),
        *(partial(bouvier_imagenet, row) for row in BOUVIER_IMAGENET),
        partial(bouvier_imagenet_proportional, "resnet50"),
    ]
    return {make().name: make for make in makers}


PUBLISHED = _all()
"""Name to recipe."""


def family_of(recipe: str) -> str:
    """What the names of recipes have in common that reproduce the rows of one table.

    They are one experiment; only, each strategy and capacity has settings of its own.
    ``buzzega-mnist-er-500`` and ``buzzega-mnist-der++-200`` are of the family ``buzzega-mnist``.
    """
    return _own_part().sub("", recipe)


@cache
def _own_part() -> re.Pattern[str]:
    """What is a row's own in the name of its recipe: strategy and capacity."""
    names = {make().strategy for make in PUBLISHED.values()} | {*SHORT_NAMES.values()}
    return re.compile(rf"-({'|'.join(map(re.escape, sorted(names)))})(-\d+)?$")
