"""Past samples that nobody has stored: a generator behind the draw, the same on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ritornello.experiments.models.build import widened
from ritornello.experiments.models.generator import Generator, GeneratorSettings, prior_of
from ritornello.experiments.strategies.base import GlobalSizes, Past, bytes_of
from ritornello.records import accelerators
from ritornello.rounds.random_streams import Purpose, stream


class GeneratedPast:
    """Draws past samples out of a generator that learns beside the model.

    At a task's end (``end_task``) a copy of the generator is frozen, and the model's weights as
    they are then. Until the next end each rank draws from the copy by random streams of its own,
    keyed by (seed, rank, step). So a draw needs no other rank. What is sent are the gradients of
    the generator, once per step, so that all ranks have the same one bit by bit.

    A conditional generator is asked for each class so far equally often; another makes what it
    makes. The label of a sample is what the model as it was takes it for, so that one between two
    classes does not count as the wrong one.

    Args:
        num_representatives: how many a rank draws; with ``sizes`` the most that one draws.
        num_classes: of the model.
        settings: of the generator.
        sizes: of the global mini-batch, with as many past samples as are generated; None: all
            ranks have equally many.
        seed: of everything random.
        trusts_class: whether a sample's label is the class that the generator was asked for
            instead, as where the model tells classes apart within a task alone.

    Raises:
        ValueError: a setting breaks its rule.
    """

    def __init__(
        self,
        num_representatives: int,
        num_classes: int,
        settings: GeneratorSettings,
        *,
        sizes: GlobalSizes | None = None,
        seed: int = 0,
        trusts_class: bool = False,
    ) -> None:
        if trusts_class and not settings.is_conditional:
            raise ValueError("trusts_class=True: an unconditional generator is asked for no class")
        if num_representatives < 1:
            raise ValueError(f"num_representatives={num_representatives}: it must be at least 1")
        prior_of(settings)
        self.num_own = self.num_global = num_representatives
        if sizes is not None:
            self.num_own = sizes.own_past(num_representatives)
            self.num_global = sizes.global_past(num_representatives)
        self.settings, self.num_classes = settings, num_classes
        self._rank = sizes.rank if sizes else None
        self._seed, self._trusts_class = seed, trusts_class
        self.wants_logits = False
        """Whether draws have the logits of the model as it was."""
        self._step = 0
        self._seen: set[int] = set()
        self._is_unended = False  # whether the running task has had steps, and no end
        self._task_number = 0
        self._generator: Generator | None = None
        self._optimiser: torch.optim.Optimizer | None = None
        self._frozen: Generator | None = None
        self._model_then: dict[str, Tensor] = {}
        self._classes: list[int] = []  # of the tasks that have ended
        self._latents_seed = 0

    def begin_task(self, number: int, classes: Sequence[int]) -> None:
        """Says that a task begins, and which classes it brings.

        Raises:
            ValueError: the classes are not given, or are more than the model knows.
            RuntimeError: another task was trained on, and ``end_task`` was not called.
        """
        if not classes:
            raise ValueError("generated samples: begin_task needs the classes that the task brings")
        if max(classes) >= self.num_classes:
            raise ValueError(
                f"generated samples: the task has the class {max(classes)}, but num_classes="
                f"{self.num_classes}"
            )
        if self._is_unended and number != self._task_number:
            raise RuntimeError(
                f"generated samples: task {self._task_number} has not ended, so that none of its "
                "samples would be drawn: call strategy.end_task(model) behind the last step of "
                "each task"
            )
        self._task_number = number
        self._seen |= set(classes)

    def draw(self, model: nn.Module, like: Tensor) -> Past | None:
        """The past samples of the next step; None before the first task's end.

        Args:
            model: the one that learns; with its weights as they were it is asked for logits.
            like: samples, on whose device the draw is made.
        """
        rank = self._rank
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        numbers = stream(self._seed, Purpose.GENERATION, self._step, rank)
        self._step += 1
        self._latents_seed = int(numbers.integers(2**63))
        if self._frozen is None:
            return None
        return self._drawn(model, self.num_own, numbers, like.device)

    def learn(self, samples: Tensor, labels: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        """Has the generator make a step of its own; all ranks call it, after ``draw``.

        Args:
            samples: new and past ones, ``[n, ...]``.
            labels: int64 ``[n]``.
            mean: of losses ``[n]``, such that its mean over the ranks is what is meant.

        Raises:
            TypeError, ValueError: the samples are none that it can generate.
        """
        generator, optimiser = self._made_for(samples)
        self._is_unended = True
        optimiser.zero_grad(set_to_none=True)
        mean(generator.losses(samples, labels, self._latents_seed)).backward()
        average_gradients(generator)
        optimiser.step()

    def end_task(self, model: nn.Module) -> None:
        """Freezes the generator, and the model's weights, for the draws to come.

        Raises:
            FloatingPointError: the generator has diverged.
        """
        self._is_unended = False
        if self._generator is None:  # not one step has been made
            return
        if not all(each.isfinite().all() for each in self._generator.parameters()):
            raise FloatingPointError(
                f"the generator has diverged in task {self._task_number + 1}: its weights are not "
                f"finite. Its learning rate is {self.settings.learning_rate:g}; take a lower one"
            )
        self._frozen = copy.deepcopy(self._generator).eval().requires_grad_(False)
        self._classes = sorted(self._seen)
        if self._asks_model:
            self._model_then = {
                name: value.detach().clone() for name, value in _tensors_of(plain(model)).items()
            }

    def state_dict(self) -> dict[str, Any]:
        """All of it, on any rank; numbers, strings, tensors and None in dicts and lists."""
        generator, optimiser = self._generator, self._optimiser
        return {
            "step": self._step,
            "classes": self._classes,
            "num_classes": self.num_classes,
            "sample_shape": None if generator is None else list(generator.sample_shape),
            "dtype": None if generator is None else str(generator.dtype).removeprefix("torch."),
            "generator": None if generator is None else generator.state_dict(),
            "optimiser": None if optimiser is None else optimiser.state_dict(),
            "frozen": None if self._frozen is None else self._frozen.state_dict(),
            "model_then": self._model_then,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave, on any number of ranks.

        Where the model knows further classes now, the generator does, too, and its optimiser
        begins anew.
        """
        self._step, self._classes = state["step"], list(state["classes"])
        self._model_then = dict(state["model_then"])
        self._generator = self._optimiser = self._frozen = None
        if state["generator"] is None:
            return
        shape, dtype = state["sample_shape"], getattr(torch, state["dtype"])
        device = next(iter(state["generator"].values())).device
        generator, optimiser = self._make(shape, dtype, device)
        fresh = copy.deepcopy(generator.state_dict())
        if state["frozen"] is not None:
            generator.load_state_dict(widened(state["frozen"], fresh))
            self._frozen = copy.deepcopy(generator).eval().requires_grad_(False)
        generator.load_state_dict(widened(state["generator"], fresh))
        if state["num_classes"] == self.num_classes:
            optimiser.load_state_dict(state["optimiser"])

    def examples(self, num_per_class: int, most_classes: int) -> Past | None:
        """Some samples as they would be drawn now, on the CPU; None before the first task's end.

        Of a conditional generator so many of each of the first classes; of another as many
        altogether, whose labels mean nothing.
        """
        if self._frozen is None:
            return None
        labels = torch.tensor(self._classes[:most_classes]).repeat_interleave(num_per_class)
        device = next(self._frozen.parameters()).device
        numbers = stream(self._seed, Purpose.GENERATION, self._step)
        samples = self._frozen.generate(labels.to(device), numbers)
        return Past(samples.cpu(), labels)

    @property
    def held_bytes(self) -> int:
        """What a rank holds for it: generator, its optimiser's state, and what is frozen."""
        generator = self._generator
        if generator is None:
            return 0
        own = bytes_of(generator.parameters())
        return 3 * own + own * (self._frozen is not None) + bytes_of(self._model_then.values())

    @property
    def sent_bytes(self) -> int:
        """What goes into the all-reduce of a step: the generator's gradients; 0 on one rank."""
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._generator is None or is_alone:
            return 0
        return bytes_of(self._generator.parameters())

    @property
    def _asks_model(self) -> bool:
        return self.wants_logits or not self._trusts_class

    def _drawn(
        self, model: nn.Module, count: int, numbers: np.random.Generator, device: torch.device
    ) -> Past:
        frozen = self._frozen
        assert frozen is not None
        frozen.to(device)
        classes = torch.from_numpy(numbers.choice(self._classes, count))
        labels = accelerators.copied_to(device, classes)
        samples = frozen.generate(labels, numbers)
        logits = None
        if self._asks_model:
            logits = self._logits_then(model, samples)
        if not self._trusts_class:
            assert logits is not None
            known = accelerators.copied_to(device, torch.tensor(self._classes))
            labels = known[logits[:, known].argmax(dim=1)]
        return Past(samples, labels, logits)

    @torch.no_grad()
    def _logits_then(self, model: nn.Module, samples: Tensor) -> Tensor:
        """What the model said when the last task had ended."""
        model = plain(model)
        then = self._model_then
        if then and next(iter(then.values())).device != samples.device:  # they were saved
            then = self._model_then = {name: each.to(samples.device) for name, each in then.items()}
        with in_evaluation(model):
            logits: Tensor = functional_call(model, then, (samples,))
        if (num_further := self.num_classes - logits.shape[1]) > 0:  # it did not know them
            lowest = logits.min(dim=1, keepdim=True).values
            logits = torch.cat((logits, lowest.expand(-1, num_further)), dim=1)
        return logits

    def _made_for(self, samples: Tensor) -> tuple[Generator, torch.optim.Optimizer]:
        dtype = getattr(samples, "dtype", None)
        if dtype is None or not (dtype == torch.uint8 or dtype.is_floating_point):
            kind = dtype or type(samples).__name__
            raise TypeError(
                "generated samples: images or features must be one tensor [b, ...] of uint8 or "
                f"floats, of samples of one size, not {kind}; samples of other kinds can be "
                "stored: take a strategy with a buffer"
            )
        generator, optimiser = self._generator, self._optimiser
        if generator is None or optimiser is None:
            generator, optimiser = self._make(samples.shape[1:], samples.dtype, samples.device)
        if samples.shape[1:] != generator.sample_shape or samples.dtype != generator.dtype:
            raise ValueError(
                f"generated samples: a sample is {samples.dtype} of shape "
                f"{tuple(samples.shape[1:])}, but the first ones were {generator.dtype} of shape "
                f"{generator.sample_shape}"
            )
        if next(generator.parameters()).device != samples.device:  # it was saved
            generator.to(samples.device)
            optimiser.load_state_dict(optimiser.state_dict())
        return generator, optimiser

    def _make(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> tuple[Generator, torch.optim.Optimizer]:
        with accelerators.seeded(torch.device("cpu"), self._seed):
            generator = Generator(shape, dtype, self.num_classes, self.settings)
        self._generator = generator.to(device)
        rate = self.settings.learning_rate
        self._optimiser = torch.optim.Adam(generator.parameters(), lr=rate)
        return generator, self._optimiser


def average_gradients(model: nn.Module) -> None:
    """Replaces gradients by their means over all ranks, which all call it; one all-reduce."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    together = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    parts = together.split([each.numel() for each in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def plain(model: nn.Module) -> nn.Module:
    """The model itself, where ``DistributedDataParallel`` is around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; then every part of it is as before."""
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
