"""The model as strategies see it: stored images in, logits (or tensors to predict) out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.models import build as models
from ritornello.experiments.models.augmentation import Pixels
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe


class Network(nn.Module):
    """An untrained model with all that surrounds it, the same on every rank.

    Images are augmented and normalised, the model runs in mixed precision if the recipe asks for
    it, and logits come out as float32. In training mode gradients are averaged over the ranks.

    If the recipe asks for it there is a running average of the model beside it: after each step
    ``average = decay * average + (1 - decay) * model``, of weights and of running statistics
    alike. So the average never sees data of its own: to measure its statistics anew there would
    have to be a pass over what was learnt long ago.

    Args:
        recipe: what to build.
        data: what to build it for.
        place: of this rank; with several, the model is made parallel.
    """

    def __init__(self, recipe: Recipe, data: DataSet, place: Place) -> None:
        super().__init__()
        device = place.device
        self._num_ranks = place.num_ranks
        self._amp = recipe.amp
        self._device_type = device.type
        self._memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        self.pixels = Pixels.of(recipe, data).to(device)
        self._output_shape = data.output_shape
        self.model = models.build(
            recipe.model,
            math.prod(self._output_shape),
            self.pixels.image_shape,
            recipe.dropout,
        )
        self.model.to(device).to(memory_format=self._memory_format)
        # In tuples, so that its parameters are not counted a second time.
        self._averages = (_average_of(self.model, recipe.averaged),) if recipe.averaged else ()
        self._evaluated = (self.model,)
        parallel: nn.Module = self.model
        if place.num_ranks > 1:
            parallel = DistributedDataParallel(
                self.model, device_ids=None if device.type == "cpu" else [device]
            )
        if recipe.compile:
            parallel.compile()
        self._parallel = (parallel,)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 ``[b, num_classes]``, of uint8 images ``[b, C, H, W]``.

        Where targets are tensors, what the model says of them, ``[b, *shape]``.
        """
        # In evaluation ranks may have unequally many mini-batches: each runs the model alone.
        model = self._parallel[0] if self.training else self._evaluated[0]
        pixels = self.pixels.for_training if self.training else self.pixels.for_evaluation
        with self._autocast():
            logits: Tensor = model(pixels(images).contiguous(memory_format=self._memory_format))
        return logits.float().reshape(len(images), *self._output_shape)

    @property
    def average(self) -> AveragedModel | None:
        """The running average of the model; None if the recipe asks for none."""
        return self._averages[0] if self._averages else None

    def follow_step(self) -> None:
        """Has the average follow the model, after each step of the optimiser."""
        for average in self._averages:
            average.update_parameters(self.model)

    def begin_average(self, weights: Mapping[str, Tensor]) -> None:
        """Has the average, if there is one, go on from given weights of the model."""
        for average in self._averages:
            average.module.load_state_dict(weights)
            average.n_averaged.fill_(1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the average is evaluated in place of the model."""
        assert self.average is not None
        self._evaluated = (self.average.module,)
        try:
            yield
        finally:
            self._evaluated = (self.model,)

    def agree(self) -> None:
        """Gives all ranks the first one's running statistics, as each has its own after a step.

        Blocks until all ranks have called it.
        """
        if self._num_ranks > 1:
            for model in (self.model, *(average.module for average in self._averages)):
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def rehearse_step(self, images: Tensor) -> None:
        """Makes a step that changes nothing but running statistics and the random state.

        ``DistributedDataParallel`` adds up gradients in another order in its first step than
        later. A model that goes on in the middle of a run must have its first step behind it,
        or the last bits of its weights differ from those of a run that never stopped.
        """
        if self._num_ranks > 1:
            self.train()
            self(images).sum().backward()
            self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees of images as they are in evaluation, float32 ``[b, d]``."""
        was_training = self.training
        self.eval()
        with self._autocast():
            features = models.features(self.model, self.pixels.for_evaluation(images))
        self.train(was_training)
        return features.float()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._amp == "off":
            return nullcontext()
        return torch.autocast(self._device_type, getattr(torch, self._amp))


def _average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A running average that begins with the model as it is after its first step."""
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(decay),
        use_buffers=True,
    )
    average.eval().requires_grad_(False)
    return average
