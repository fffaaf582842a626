"""Adapters that grow with each task, beside a network that stays as it is.

Source: Gao, Dong, He, Wang, Gong, "Beyond Prompt Learning: Continual Adapter for Efficient
Rehearsal-Free Continual Learning" (C-ADA, ECCV 2024). Theirs are the adapters in parallel to
attention and perceptron of a vision transformer, a block of weights for each task, scaling and
shifting learnt in the first task, and the orthogonal loss. Ours are what the paper's text was not
at hand for, and what it has not: which tensor an adapter sees (that of the layer that it stands
beside), how new blocks and outputs begin, adapters of the last stages instead of the first ones (so
that nothing is trained before them), and those beside the blocks of convolutional networks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.hooks import RemovableHandle

from ritornello.experiments.models.stages import last_layer_name, stage_names

logger = logging.getLogger(__name__)

CLOSED = -1e4
"""The bias of a class that has not come: it is never predicted. In float16, too."""


class ContinualAdapter(nn.Module):
    """Low-rank layers next to each other, one block for each task so far.

    ::

        s = scale * h + shift                                  learnt with the first block alone
        adapter(h) = sum over tasks i of up_i ReLU(down_i s)   the newest block is learnt

    It is made without a block; ``grow`` adds them.

    Args:
        num_in: ``D``, of the vectors that it sees.
        num_out: ``D'``, of those that it gives.
        width: ``d``, the hidden units of each block.
        stride: None: it maps the last dimension, ``[..., D]`` to ``[..., D']``, such as tokens
            ``[b, n, D]``; else feature maps ``[b, D, H, W]``, of which it sees every so many
            rows and columns.
    """

    def __init__(self, num_in: int, num_out: int, width: int, stride: int | None = None) -> None:
        super().__init__()
        self.num_in, self.num_out, self.width, self.stride = num_in, num_out, width, stride
        self.scale, self.shift = (
            nn.Parameter(value(num_in)) for value in (torch.ones, torch.zeros)
        )
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        """Of each task, ``[d, D]`` and ``[D', d]``."""

    @property
    def num_tasks(self) -> int:
        """How many blocks there are."""
        return len(self.down)

    @property
    def room(self) -> int:
        """How many directions are left that are orthogonal to all that the blocks see."""
        return self.num_in - self.num_tasks * self.width

    def grow(self, down: Tensor) -> None:
        """Adds a block that changes no output yet, and freezes those before.

        Args:
            down: its down-projection, ``[d, D]``; see ``new_directions``. The up-projection is 0.
        """
        if self.num_tasks:
            self.requires_grad_(False)
        self.down.append(nn.Parameter(down.to(self.scale, copy=True)))
        self.up.append(nn.Parameter(self.scale.new_zeros(self.num_out, self.width)))

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added; there must be a block."""
        mapped: Callable[[Tensor, Tensor], Tensor] = linear
        scale: Tensor = self.scale
        shift: Tensor = self.shift
        if self.stride is not None:
            # A convolution: it keeps the layout in memory, and so the last bits of what follows.
            inputs = inputs[..., :: self.stride, :: self.stride]
            mapped = _at_each_position
            scale, shift = scale[:, None, None], shift[:, None, None]
        shifted = inputs * scale + shift
        # One block after another: with a further block of zeros the sum is the same bit by bit.
        total = torch.zeros((), device=shifted.device)
        for down, up in zip(self.down, self.up, strict=True):
            total = total + mapped(mapped(shifted, down).relu(), up)
        return total

    def orthogonal_loss(self) -> Tensor:
        """How far the newest block is from being orthogonal to those before it.

        The sum of squares of all products of a direction of the newest block with one of an older
        block, of what they see (``down``) and of what they give (``up``).
        """
        if self.num_tasks < 2:
            return self.scale.new_zeros(())
        old_down, old_up = torch.cat([*self.down[:-1]]), torch.cat([*self.up[:-1]], dim=1)
        seen, given = self.down[-1] @ old_down.T, self.up[-1].T @ old_up
        loss: Tensor = seen.square().sum() + given.square().sum()
        return loss


class Adapted(nn.Module):
    """A layer with an adapter beside it: ``body(x) + weight * adapter(x)``.

    Args:
        body: the layer.
        adapter: of what it sees and gives.
        weight: of the adapter.
    """

    def __init__(self, body: nn.Module, adapter: ContinualAdapter, weight: float) -> None:
        super().__init__()
        self.body, self.adapter, self.weight = body, adapter, weight

    def forward(self, inputs: Tensor, *others: object, **named: object) -> Tensor:
        """What the layer gives, and what the adapter adds."""
        outputs: Tensor = self.body(inputs, *others, **named)
        if self.adapter.num_tasks:
            outputs = outputs + self.weight * self.adapter(inputs)
        return outputs


def adapt(model: nn.Module, num_stages: int, width: int, weight: float, example: Tensor) -> None:
    """Puts adapters, without blocks yet, beside the layers of a model's last stages; freezes it.

    In transformers they stand beside attention and perceptron of each block, elsewhere beside each
    block of a stage. All that is learnt then are adapters and the last layer.

    Args:
        model: of timm, or what ``split`` has left of it.
        num_stages: how many; of transformers each block is one.
        width: hidden units that each adapter has for each task.
        weight: of the adapters.
        example: what the model sees, ``[b, ...]``.

    Raises:
        ValueError: it has no such stages, or a layer in them that no such adapter fits beside.
    """
    names = stage_names(model)
    if not 1 <= num_stages <= len(names):
        raise ValueError(
            f"{num_stages} of its last stages: it must be from 1 to the number of the model's "
            f"stages ({len(names)})"
        )
    layers = [
        layer
        for name in names[-num_stages:]
        for layer in _layers_in(name, model.get_submodule(name))
    ]
    model.requires_grad_(False)
    model.get_submodule(last_layer_name(model)).requires_grad_(True)
    for name, (seen, given) in _shapes(model, layers, example).items():
        *parents, own = name.split(".")
        body = model.get_submodule(name)
        adapter = _adapter_beside(name, body, seen, given, width).to(next(body.parameters()))
        model.get_submodule(".".join(parents)).add_module(own, Adapted(body, adapter, weight))


def adapters_of(model: nn.Module) -> list[ContinualAdapter]:
    """All adapters of a model, first to last."""
    return [each for each in model.modules() if isinstance(each, ContinualAdapter)]


def orthogonal_loss(model: nn.Module) -> Tensor:
    """The sum over a model's adapters; see ``ContinualAdapter``.

    Raises:
        ValueError: the model has none.
    """
    losses = [adapter.orthogonal_loss() for adapter in adapters_of(model)]
    if not losses:
        raise ValueError("the model has no adapters: let `adapt` put them in")
    return torch.stack(losses).sum()


def grow(models: Sequence[nn.Module], seed: int) -> None:
    """Adds a block to every adapter, with which the outputs are what they were, bit for bit.

    Blocks are the same on all ranks, which all call it.

    Args:
        models: a model, and others with the same adapters, such as its running average, which get
            the same blocks.
        seed: of the directions that new blocks begin with.
    """
    narrowest = min(adapters_of(models[0]), key=lambda each: each.room)
    if 0 <= narrowest.room < narrowest.width and not (dist.is_initialized() and dist.get_rank()):
        logger.warning(
            "adapter_width=%d: %d tasks have taken %d of the %d directions that the narrowest "
            "adapted layer sees. From now on adapters cannot be orthogonal to all before them, and "
            "what older ones do is disturbed more",
            narrowest.width,
            narrowest.num_tasks,
            narrowest.num_in - narrowest.room,
            narrowest.num_in,
        )
    for number, twins in enumerate(zip(*map(adapters_of, models), strict=True)):
        adapter = twins[0]
        generator = np.random.default_rng([seed, adapter.num_tasks, number])
        down = new_directions([*adapter.down], adapter.num_in, adapter.width, generator)
        down = down.to(adapter.scale.device)
        if dist.is_initialized():  # ranks on unlike processors do not find the same last bits
            dist.broadcast(down, 0)
        for twin in twins:
            twin.grow(down)


@torch.no_grad()
def close_outputs(model: nn.Module, bias: float = CLOSED) -> None:
    """Has the last layer begin without any class: with weights of 0, and a bias for all.

    Where only the classes of one task compete, their logits have no common level with those of
    other tasks but the one that they begin with.

    Raises:
        ValueError: the last layer has no bias.
    """
    layer = _last_layer(model)
    layer.weight.zero_()
    layer.bias.fill_(bias)


@torch.no_grad()
def open_outputs(model: nn.Module, classes: Sequence[int]) -> None:
    """Lets classes that have not come before be predicted, with a logit that begins at 0."""
    bias = _last_layer(model).bias
    for label in classes:
        if bias[label] == CLOSED:
            bias[label] = 0


def new_directions(
    old: Sequence[Tensor], size: int, width: int, generator: np.random.Generator
) -> Tensor:
    """Random directions of length 1, orthogonal to each other and to all old ones.

    Where old ones leave no room for as many, the last ones are orthogonal to each other alone.

    Args:
        old: each ``[d, D]``.
        size: ``D``.
        width: how many, at most ``D``.
        generator: of the random numbers.

    Returns:
        float32 ``[width, D]``.
    """
    noise = generator.standard_normal((size, width))
    before = np.concatenate(
        [noise[:, :0], *(each.detach().cpu().numpy().T for each in old)], axis=1
    )
    new = np.linalg.qr(np.concatenate([before, noise], axis=1))[0][:, before.shape[1] :]
    if new.shape[1] < width:
        new = np.linalg.qr(np.concatenate([new, noise], axis=1))[0][:, :width]
    return torch.from_numpy(new.T.astype(np.float32))


def _last_layer(model: nn.Module) -> nn.Linear:
    name = last_layer_name(model)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        raise ValueError(f"strategy='adapter': the model's last layer, {name!r}, has no bias")
    return layer


def _at_each_position(maps: Tensor, weights: Tensor) -> Tensor:
    return conv2d(maps, weights[..., None, None])


def _layers_in(name: str, module: nn.Module) -> Iterator[str]:
    """The names of the layers of a stage, or of a part of it, that adapters stand beside."""
    children = dict(module.named_children())
    if {"attn", "mlp"} <= children.keys():
        yield from (f"{name}.attn", f"{name}.mlp")
    elif isinstance(module, (nn.Sequential, nn.ModuleList)):
        for own, child in children.items():
            yield from _layers_in(f"{name}.{own}", child)
    elif "blocks" in children:
        yield from _layers_in(f"{name}.blocks", children["blocks"])
    elif any(True for _ in module.parameters()):
        yield name


def _shapes(
    model: nn.Module, names: Sequence[str], example: Tensor
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """What some layers see and give, when the model sees an example."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def noting(name: str) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            given = output.shape if isinstance(output, Tensor) else torch.Size()
            shapes[name] = inputs[0].shape, given

        return model.get_submodule(name).register_forward_hook(note)

    hooks = [noting(name) for name in names]
    was_training = model.training
    with torch.no_grad():
        model.eval()(example)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return shapes


def _adapter_beside(
    name: str, body: nn.Module, seen: torch.Size, given: torch.Size, width: int
) -> ContinualAdapter:
    """An adapter that maps what a layer sees to what it gives.

    Raises:
        ValueError: there is none.
    """
    of_maps = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)
    is_of_maps = len(seen) == len(given) == 4 and any(
        isinstance(each, of_maps) for each in body.modules()
    )
    at = 1 if is_of_maps else -1
    stride = -(-seen[-1] // given[-1]) if is_of_maps else None
    kept = [-(-side // stride) for side in seen[2:]] if stride else [*seen[1:-1]]
    if not given or kept != [*(given[2:] if is_of_maps else given[1:-1])]:
        raise ValueError(
            f"no adapter fits beside the layer {name!r}, which maps {[*seen]} to "
            f"{[*given] or 'no single tensor'}: take "
            "fewer adapted_stages, or another model"
        )
    if width > seen[at]:
        raise ValueError(
            f"adapter_width={width}: the layer {name!r} sees vectors of {seen[at]} numbers, so "
            "that at most as many directions are orthogonal to each other"
        )
    return ContinualAdapter(seen[at], given[at], width, stride)
