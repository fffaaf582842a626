"""Generative replay: past samples are made anew by a generator, alone or beside stored ones.

Sources: Shin et al., "Continual Learning with Deep Generative Replay" (NeurIPS 2017), in the form
of van de Ven et al., "Three types of incremental learning" (2022); with a Dirichlet prior and the
Jensen-Shannon distance Zeng et al., "Dirichlet Continual Learning" (UAI 2024).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ritornello.buffer import RehearsalBuffer
from ritornello.experiments.models.generator import GeneratorSettings
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.strategies.base import GlobalSizes, Strategy
from ritornello.experiments.strategies.distances import distance_named
from ritornello.experiments.strategies.rehearsal import Rehearsal, checked_weights
from ritornello.experiments.strategies.without_samples.generated import GeneratedPast

NUM_EXAMPLES = 10
"""Of each class, that the results show."""

MOST_CLASSES = 20
"""Whose examples the results show."""


class Generative(Strategy):
    """Every mini-batch of new samples is joined with generated ones; nothing is stored.

    In a loop of one's own call ``begin_task(number, classes)`` and ``end_task(model)`` for each
    task, and give samples as one tensor, uint8 or floating-point.

    Args:
        past: what generates them.
        loss_weights: see ``Rehearsal``; the generator's own loss is weighed alike.
        distillation: weight of the distance of generated samples' logits to those of the model as
            it was when the last task had ended; 0: they count by their labels alone.
        distance: one of ``distances.DISTANCES``.
        others: see ``Strategy``.

    Raises:
        ValueError: there are no such ``loss_weights``, or no such distance.
    """

    num_draws: ClassVar[int] = 1

    def __init__(
        self,
        past: GeneratedPast,
        *,
        loss_weights: str = "by-sample",
        distillation: float = 0.0,
        distance: str = "mse",
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.loss_weights = checked_weights(loss_weights)
        self.past, self.distillation = past, distillation
        self.distance = distance_named(distance)
        past.wants_logits = distillation > 0

    @classmethod
    def of(
        cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer], **common: Any
    ) -> Strategy:
        """See ``Strategy.of``; ``num_classes`` and ``sizes`` are among the common arguments."""
        sizes: GlobalSizes = common["sizes"]
        num_generated = recipe.global_num_generated
        past = GeneratedPast(
            -(-num_generated // sizes.num_ranks),
            common.pop("num_classes"),
            settings_of(recipe),
            sizes=GlobalSizes(sizes.rank, sizes.num_ranks, sizes.num_new, num_generated),
            seed=recipe.seed,
            trusts_class=recipe.scenario == "task-incremental",
        )
        return cls(
            past,
            loss_weights=recipe.loss_weights,
            distillation=recipe.distillation,
            distance=recipe.distance,
            **cls.stored(recipe, new_buffer),
            **common,
        )

    @classmethod
    def stored(cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer]) -> dict[str, Any]:
        """The arguments of a strategy that stores samples, too."""
        return {}

    def begin_task(self, number: int, classes: Sequence[int] = ()) -> None:
        """See ``Strategy.begin_task``; here the classes must be given.

        Raises:
            ValueError, RuntimeError: see ``GeneratedPast.begin_task``.
        """
        self.past.begin_task(number, classes)
        super().begin_task(number, classes)

    def joined(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """New samples, and stored ones if there are any."""
        self._num_past = None if self.sizes is None else 0
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean over new and past samples. The generator makes its step, too.

        Raises:
            RuntimeError: no task has begun.
            TypeError, ValueError: the samples are none that can be generated.
        """
        self._check_begun()
        num_new = len(labels)
        images, labels = self.joined(images, labels)
        generated = self.past.draw(model, images)
        num_real = len(labels)
        if generated is not None:
            images = torch.cat((images, generated.images))
            labels = torch.cat((labels, generated.labels))
            if self._num_past is not None:
                self._num_past += self.past.num_global
        self.past.learn(images, labels, partial(self.weighed, num_new=num_new))
        logits = model(images)
        losses = self.criterion(logits, labels)
        if generated is not None and self.distillation:
            away = self.distance(logits[num_real:], generated.logits)
            real, made = losses.split([num_real, len(losses) - num_real])
            losses = torch.cat((real, made + self.distillation * away))
        return self.weighed(losses, num_new)

    def end_task(self, model: nn.Module) -> None:
        """Has the samples of this task be generated from now on, with those before.

        Raises:
            RuntimeError: no task has begun.
            FloatingPointError: the generator has diverged.
        """
        self._check_begun()
        self.past.end_task(model)

    def shared_state_dict(self) -> dict[str, Any]:
        """See ``Strategy.shared_state_dict``."""
        return self.past.state_dict()

    def load_shared_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Strategy.load_shared_state_dict``."""
        self.past.load_state_dict(state)

    @property
    def held_bytes(self) -> int:
        """See ``Strategy.held_bytes``: the generator, and what is frozen."""
        return super().held_bytes + self.past.held_bytes

    def sent_bytes_per_step(self, model: nn.Module) -> float:
        """See ``Strategy.sent_bytes_per_step``: the generator's gradients."""
        return super().sent_bytes_per_step(model) + self.past.sent_bytes

    def outcome(self) -> dict[str, Any]:
        """Some images of the generator."""
        examples = self.past.examples(NUM_EXAMPLES, MOST_CLASSES)
        if examples is None or examples.images.dtype != torch.uint8:
            return {}
        pixels = zlib.compress(examples.images.numpy().tobytes(), 9)
        drawn = {
            "shape": list(examples.images.shape),
            "labels": examples.labels.tolist() if self.past.settings.is_conditional else None,
            "pixels": base64.b64encode(pixels).decode(),
        }
        return {"generated": drawn}


class PartlyGenerated(Generative, Rehearsal):
    """As ``Rehearsal``, and further past samples are generated: each step has both.

    The generator also learns from the stored ones, so that it forgets less itself.

    Args:
        past: what generates.
        buffer: of (images, labels).
        others: see ``Generative`` and ``RehearsalStrategy``.
    """

    def __init__(self, past: GeneratedPast, buffer: RehearsalBuffer, **others: Any) -> None:
        super().__init__(past, buffer=buffer, **others)

    @classmethod
    def stored(cls, recipe: Recipe, new_buffer: Callable[..., RehearsalBuffer]) -> dict[str, Any]:
        """See ``Generative.stored``."""
        return {
            "buffer": new_buffer(num_draws=cls.num_draws),
            "offers_stream": recipe.offers_stream,
            "goes_by_distances": recipe.sampling == "grasp",
        }

    def joined(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """See ``Generative.joined``."""
        return self.augment(images, labels)


def check(recipe: Recipe) -> None:
    """Checks what a recipe that generates past samples cannot have; others may have all.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    generates = f"strategy={recipe.strategy!r}"
    if recipe.strategy == "rehearsal" and recipe.generated_share:
        generates = f"generated_share={recipe.generated_share}"
        for name, is_set, without in (
            ("composition", recipe.is_proportional, "append"),
            ("soft_targets", recipe.soft_targets > 0, 0),
        ):
            if is_set:
                raise ValueError(
                    f"{name}={getattr(recipe, name)!r} with {generates}: it is made for past "
                    f"samples that are stored, all of them; use {name}={without!r}, or "
                    "generated_share=0"
                )
    elif recipe.strategy != "generative":
        return
    elif recipe.sampling != "uniform":
        raise ValueError(
            f"sampling={recipe.sampling!r} with {generates}: nothing is stored that it could "
            "choose from; use sampling='uniform'"
        )
    if recipe.local_steps:
        raise ValueError(
            f"local_steps={recipe.local_steps} with {generates}: all ranks have one generator, and "
            "average its gradients in every step; use local_steps=0"
        )
    if recipe.scenario == "task-incremental" and not recipe.conditional:
        raise ValueError(
            f"conditional=False with {generates} and scenario='task-incremental': the model tells "
            "classes apart within a task alone, so that the label of what is generated must be the "
            "class that was asked for; use conditional=True"
        )


def settings_of(recipe: Recipe) -> GeneratorSettings:
    """The generator that a recipe asks for."""
    return GeneratorSettings(
        prior=recipe.prior,
        concentration=recipe.prior_concentration,
        num_latents=recipe.latents,
        num_units=recipe.generator_units,
        learning_rate=recipe.generator_learning_rate,
        is_conditional=recipe.conditional,
    )
