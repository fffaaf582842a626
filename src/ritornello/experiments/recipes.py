"""Recipes: complete, named experiments. A recipe is a function that returns a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AMP_MODES = ("off", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the number of ranks.

    Sizes are those of all ranks together, so that 1, 2 or 128 ranks are comparable.
    """

    name: str
    description: str
    data: str
    """See ``data.load``."""
    data_path: str | None = None
    image_size: int | None = None
    """Of data="folder"."""
    num_tasks: int = 5
    class_order: tuple[int, ...] | None = None
    """The classes as they arrive; None: ascending."""
    model: str = "mlp"
    """See ``models.build``."""
    strategy: str = "rehearsal"
    """See ``strategies``."""
    epochs: int = 1
    """Per task."""
    global_batch_size: int = 64
    """``N * b``."""
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    """Over which the learning rate rises linearly, at the beginning of each task."""
    milestones: tuple[tuple[float, float], ...] = ()
    """(epoch, factor): from that epoch of a task on, the learning rate is multiplied by it."""
    capacity: int = 500
    """Representatives in the whole buffer."""
    global_num_representatives: int = 64
    """``N * r``."""
    global_num_candidates: int | None = None
    """``N * c``; None: every sample is a candidate."""
    selection: str = "class-balanced"
    amp: str = "off"
    """Mixed precision: "off", "bfloat16" or "float16"."""
    device: str = "auto"
    """"auto": one GPU per rank if there are any, else the CPU."""
    num_workers: int = 0
    """Loader processes per rank."""
    seed: int = 0

    def check(self, num_ranks: int) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            ValueError: names the setting, its value and the rule.
        """
        from ritornello.experiments.strategies import STRATEGIES

        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r}: there are {', '.join(STRATEGIES)}")
        if self.amp not in AMP_MODES:
            raise ValueError(f"amp={self.amp!r}: there are {', '.join(AMP_MODES)}")
        for name in ("epochs", "global_batch_size", "capacity", "global_num_representatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: it must be above 0")
        for name in ("global_batch_size", "global_num_representatives", "global_num_candidates"):
            value = getattr(self, name)
            if value is not None and value % num_ranks:
                below = value // num_ranks * num_ranks
                near = [each for each in (below, below + num_ranks) if each > 0]
                raise ValueError(
                    f"{name}={value} does not divide evenly over {num_ranks} ranks; "
                    f"take {' or '.join(map(str, near))}, or another number of ranks"
                )

    def learning_rate_factor(self, epoch: float) -> float:
        """What the learning rate is multiplied by at a time within a task."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        passed = [factor for start, factor in sorted(self.milestones) if epoch >= start]
        return passed[-1] if passed else 1.0


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
        capacity=10_000,
        global_num_representatives=64,
        global_num_candidates=32,
    )


def folder() -> Recipe:
    """Your own images: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg."""
    return Recipe(
        name="folder",
        description="your own images (--data FOLDER with train/CLASS and val/CLASS), ResNet-18",
        data="folder",
        image_size=224,
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


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (digits, mnist, cifar10, folder)
}


def recipe_named(name: str, **changes: Any) -> Recipe:
    """A recipe by its name, with some settings changed.

    Raises:
        ValueError: no recipe has that name.
    """
    from dataclasses import replace

    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"there is no recipe {name!r}{hint}; there are {', '.join(RECIPES)}")
    return replace(RECIPES[name](), **changes)
