"""The model as strategies see it: stored images in, logits (or tensors to predict) out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.models import adapters, stages
from ritornello.experiments.models import build as models
from ritornello.experiments.models.augmentation import Features, Pixels
from ritornello.experiments.models.local_steps import average_over_ranks
from ritornello.experiments.models.weights import begin_with, tensors_in
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.recipe import Recipe


class Network(nn.Module):
    """A model as it is before training, with all that surrounds it, the same on every rank.

    Images are augmented and normalised, the model runs in mixed precision if the recipe asks for
    it, and logits come out as float32. In training mode gradients are averaged over the ranks.

    If the recipe asks for it there is a running average of the model beside it: after each step
    ``average = decay * average + (1 - decay) * model``, of weights and of running statistics
    alike. So the average never sees data of its own: to measure its statistics anew there would
    have to be a pass over what was learnt long ago.

    With a frozen backbone the model is split (``stages``): ``whole`` is the trunk, which is frozen,
    and ``model``, the rest, where something is trained. Where features are stored, samples have
    passed the trunk before: ``embed``. Else ``model`` is the ``whole``.

    With ``local_steps`` gradients are not averaged: each rank goes its own way, for so many steps.
    Then model and running average become their mean over the ranks (``agree``).

    With adapters (``models.adapters``) all else but the last layer is frozen, running statistics
    too, and the model grows with each task (``grow``).

    Args:
        recipe: what to build.
        data: what to build it for.
        place: of this rank; with several, the model is made parallel.
        begins_with: a file of the whole model's weights; None: the recipe's, if it has any.
        only_frozen: whether only the frozen layers come from that file; the others begin as they
            would without it.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: there are no such weights (``weights``), or
            the model cannot be split, or cannot see images of that size.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: DataSet,
        place: Place,
        begins_with: Path | None = None,
        only_frozen: bool = False,
    ) -> None:
        super().__init__()
        device = place.device
        self._num_ranks, self._local_steps = place.num_ranks, recipe.local_steps
        self._num_alone = self._num_samples_alone = 0
        self._amp = recipe.amp
        self._memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        pixels = Pixels.of(recipe, data).to(device)
        self._output_shape, self._predicts_tensors = data.output_shape, data.targets is not None
        whole = models.build(
            recipe.model,
            math.prod(self._output_shape),
            pixels.image_shape,
            recipe.dropout,
        )
        shape = pixels.image_shape
        example = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
        if recipe.weights is not None or recipe.freezes_trunk:
            _try(whole, recipe, example)
        if recipe.weights is not None and (begins_with is None or only_frozen):
            _begin(whole, recipe, is_needed=begins_with is None or recipe.num_last_stages > 0)
        self._opens_outputs = recipe.strategy == "adapter"
        self.model, trunk = whole, None
        try:
            if recipe.has_adapters:
                adapters.adapt(
                    whole,
                    recipe.adapted_stages,
                    recipe.adapter_width,
                    recipe.adapter_scale,
                    example,
                )
            if self._opens_outputs:
                # Where borders are blurred, samples come before their classes' task.
                adapters.close_outputs(whole, *([0.0] if recipe.scenario == "blurry" else []))
            if begins_with is not None and not only_frozen:
                begin_with(whole, recipe.model, begins_with)
            if recipe.backbone_rate != 1:
                stages.last_layer_name(whole)
            if recipe.freezes_trunk:
                trunk, self.model = stages.split(whole, recipe.num_last_stages, example)
                trunk.requires_grad_(False).eval()
        except ValueError as error:
            setting = "tuned_stages" if recipe.tuned_stages else "backbone_rate"
            setting = "adapted_stages" if recipe.has_adapters else setting
            raise ValueError(
                f"{setting}={getattr(recipe, setting)} with model={recipe.model!r}: {error}"
            ) from None
        if trunk is not None and begins_with is not None and only_frozen:
            saved = tensors_in(begins_with)
            trunk.load_state_dict({name: saved[name] for name in trunk.state_dict()})
        whole.to(device).to(memory_format=self._memory_format)  # its parts as well
        self._whole, self._trunk, self._embedded_pixels = (whole,), (trunk,), (pixels,)
        self.sees_features = recipe.stores == "features"
        self.pixels: Pixels | Features = Features() if self.sees_features else pixels
        self._seed = recipe.seed
        # In tuples, so that its parameters are not counted a second time.
        self._averages = (_average_of(self.model, recipe.averaged),) if recipe.averaged else ()
        self._evaluated = (self.model,)
        self._device, self._compiles = device, recipe.compile
        self._parallel: tuple[nn.Module, ...] = (self._made_parallel(),)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 ``[b, num_classes]``, of uint8 images ``[b, C, H, W]``.

        Where targets are tensors, what the model says of them, ``[b, *shape]``.
        """
        # In evaluation ranks may have unequally many mini-batches: each runs the model alone.
        model = self._parallel[0] if self.training else self._evaluated[0]
        pixels = self.pixels.for_training if self.training else self.pixels.for_evaluation
        with self._autocast():
            logits: Tensor = model(self._up_to_model(pixels(images)))
        outputs = logits.float()
        if self._predicts_tensors:
            return outputs.reshape(len(images), *self._output_shape)
        return outputs

    def train(self, mode: bool = True) -> Network:
        """See ``nn.Module``; what is frozen stays as in evaluation, with its running statistics."""
        super().train(mode)
        for part in self.model.modules():
            weights = [*part.parameters()]
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        return self

    def grow(self, num_tasks: int, classes: Sequence[int] = ()) -> None:
        """Has adapters, if there are any, for so many tasks; old outputs stay as they are.

        Parameters come with it: make the optimiser behind it. Blocks until all ranks have called
        it.

        Args:
            num_tasks: so far, with the one that begins.
            classes: that the task brings, if it begins.
        """
        models = [self.model, *(average.module for average in self._averages)]
        for model in models * self._opens_outputs:
            adapters.open_outputs(model, classes)
        own = adapters.adapters_of(self.model)
        if min((each.num_tasks for each in own), default=num_tasks) >= num_tasks:
            return
        while own[0].num_tasks < num_tasks:
            adapters.grow(models, self._seed)
        for average in self._averages:
            average.requires_grad_(False)
        self._parallel = ()  # it knows the old parameters
        self._parallel = (self._made_parallel(),)

    @property
    def whole(self) -> nn.Module:
        """The whole model, with the trunk if there is one; what is trained of it is shared."""
        return self._whole[0]

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that makes logits of features."""
        layer = self.whole.get_submodule(stages.last_layer_name(self.whole))
        assert isinstance(layer, nn.Linear)
        return layer

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of the whole model, with another one's in the place of ``model``'s."""
        return self.whole.state_dict() | model.state_dict()

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """What the trunk makes of images as they are in evaluation, float32 ``[b, ...]``."""
        [trunk], [pixels] = self._trunk, self._embedded_pixels
        assert trunk is not None
        with self._autocast():
            embedded: Tensor = trunk(self._laid_out(pixels.for_evaluation(images)))
        return embedded.float()

    @property
    def is_local(self) -> bool:
        """Whether each rank makes steps by itself."""
        return self._local_steps > 0

    @property
    def alone(self) -> tuple[int, int]:
        """How many steps this rank has made by itself since all agreed, and on how many samples."""
        return self._num_alone, self._num_samples_alone

    @alone.setter
    def alone(self, counts: tuple[int, int]) -> None:
        self._num_alone, self._num_samples_alone = counts

    @property
    def average(self) -> AveragedModel | None:
        """The running average of the model; None if the recipe asks for none."""
        return self._averages[0] if self._averages else None

    def follow_step(self) -> None:
        """Has the average follow the model, after each step of the optimiser."""
        for average in self._averages:
            average.update_parameters(self.model)

    def end_local_step(self, step: int, num_samples: int) -> None:
        """Counts a step, if ranks make them by themselves; behind the last of some, all agree.

        Args:
            step: the task's steps so far.
            num_samples: that this rank has trained on in it.
        """
        if self.is_local:
            self._num_alone += 1
            self._num_samples_alone += num_samples
            if step % self._local_steps == 0:
                self.agree()

    def begin_average(self, weights: Mapping[str, Tensor]) -> None:
        """Has the average, if there is one, go on from given weights of the model."""
        for average in self._averages:
            own = average.module.state_dict()
            average.module.load_state_dict({name: weights[name] for name in own})
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
        """Gives all ranks the same weights and running statistics.

        After steps of their own the mean of all ranks' (``average_over_ranks``); else weights are
        the same, and statistics become the first rank's, as each has its own after a step.

        Blocks until all ranks have called it.
        """
        models = (self.model, *(average.module for average in self._averages))
        if self.is_local:
            if self._num_alone:
                own = dict(self.model.named_parameters())
                trained = {name for name, each in own.items() if each.requires_grad}
                only = trained if len(trained) < len(own) else None
                average_over_ranks(models, self._num_samples_alone, only)
            self.alone = 0, 0
        elif self._num_ranks > 1:
            for model in models:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A context with what ``agree`` gives; behind it local steps go on as if it had not been.

        Blocks until all ranks have called it.
        """
        models = (self.model, *(average.module for average in self._averages))
        alone, own = self.alone, [deepcopy(each.state_dict()) for each in models * self.is_local]
        self.agree()
        yield
        for model, state in zip(models, own, strict=False):
            model.load_state_dict(state)
        self.alone = alone

    def rehearse_step(self, images: Tensor) -> None:
        """Makes a step that changes nothing but running statistics and the random state.

        ``DistributedDataParallel`` adds up gradients in another order in its first step than
        later. A model that goes on in the middle of a run must have its first step behind it,
        or the last bits of its weights differ from those of a run that never stopped.
        """
        if self._num_ranks > 1 and not self.is_local:
            self.train()
            self(images).sum().backward()
            self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees of images as they are in evaluation, float32 ``[b, d]``."""
        was_training = self.training
        self.eval()
        with self._autocast():
            seen = self._up_to_model(self.pixels.for_evaluation(images))
            features = models.features(self.model, seen)
        self.train(was_training)
        return features.float()

    def _made_parallel(self) -> nn.Module:
        """The model as ranks train it together, compiled if it shall be."""
        parallel = self.model
        if self._num_ranks > 1 and not self.is_local:
            device_ids = None if self._device.type == "cpu" else [self._device]
            parallel = DistributedDataParallel(self.model, device_ids=device_ids)
        if self._compiles:
            parallel.compile()
        return parallel

    def _up_to_model(self, pixels: Tensor) -> Tensor:
        """What the model sees: of pixels what the trunk makes of them, if there is one."""
        laid_out, [trunk] = self._laid_out(pixels), self._trunk
        if trunk is None or self.sees_features:
            return laid_out
        with torch.no_grad():
            embedded: Tensor = trunk(laid_out)
        return embedded

    def _laid_out(self, pixels: Tensor) -> Tensor:
        if pixels.dim() != 4:  # features in a row
            return pixels
        return pixels.contiguous(memory_format=self._memory_format)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._amp == "off":
            return nullcontext()
        return torch.autocast(self._device.type, getattr(torch, self._amp))


def _try(model: nn.Module, recipe: Recipe, example: Tensor) -> None:
    """Lets a model see an example of what it will see.

    Raises:
        ValueError: it cannot.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    except Exception as error:  # what is raised depends on the model
        height, width = example.shape[2:]
        raise ValueError(
            f"image_size={recipe.image_size} with model={recipe.model!r}: it cannot see images of "
            f"{height} x {width}: {error}"
        ) from error
    finally:
        model.train(was_training)


def _begin(model: nn.Module, recipe: Recipe, is_needed: bool) -> None:
    """Gives a model the weights of its recipe; where they are not needed they may be gone."""
    assert recipe.weights is not None
    try:
        begin_with(model, recipe.model, recipe.weights)
    except (FileNotFoundError, ConnectionError):
        if is_needed:
            raise


def _average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A running average that begins with the model as it is after its first step."""
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(decay),
        use_buffers=True,
    )
    average.eval().requires_grad_(False)
    return average
