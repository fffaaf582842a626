"""Where a network is split: a trunk that can be frozen, and the rest that learns on.

A model's body is a list of stages: the ``blocks`` of EfficientNets, MobileNets and transformers,
the ``layer1`` to ``layer4`` of ResNets, the ``stages`` of ConvNeXt and others. Both parts share the
model's layers, and have them under the same names.
"""

from __future__ import annotations

import re
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

LISTS = ("blocks", "stages", "layers")
"""What a module that holds all stages is called."""

NUMBERED = re.compile(r"(layer|s)[1-9]")
"""What stages are called that are attributes of the model one by one."""


class Trunk(nn.Module):
    """What comes before the rest: maps images to what the rest takes.

    Args:
        model: without what comes behind.
        pools: whether the trunk goes up to the last layer, so that features are pooled.
    """

    def __init__(self, model: nn.Module, pools: bool) -> None:
        super().__init__()
        self._model, self._pools = (model,), pools
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, images: Tensor) -> Tensor:
        """What the rest takes, ``[b, ...]``, of images ``[b, C, H, W]``."""
        return features(self._model[0], images) if self._pools else _body(self._model[0], images)

    def train(self, mode: bool = True) -> Trunk:
        """See ``nn.Module``; the model knows as well."""
        super().train(mode)
        self._model[0].train(mode)
        return self


class LastLayer(nn.Module):
    """A model's last layer, which has the model's name for it, with the dropout before it.

    Args:
        name: of the layer in the model, such as "head.fc".
        layer: maps features ``[b, d]`` to logits.
        dropout: the share of features that are dropped in training.
    """

    def __init__(self, name: str, layer: nn.Linear, dropout: float) -> None:
        super().__init__()
        *parents, own = name.split(".")
        holder: nn.Module = self
        for parent in parents:
            holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(own, layer)
        self.name, self._dropout = name, dropout

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features ``[b, d]``."""
        kept = nn.functional.dropout(features, self._dropout, self.training)
        logits: Tensor = self.get_submodule(self.name)(kept)
        return logits

    def forward_features(self, features: Tensor) -> Tensor:
        """As timm's models have it: nothing is left to be done."""
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's models have it."""
        return features if pre_logits else self(features)


def stage_names(model: nn.Module) -> list[str]:
    """The names of a model's stages, first to last, such as "blocks.0" or "layer4".

    Raises:
        ValueError: the model's body is no list of stages.
    """
    for name in LISTS:
        stages = getattr(model, name, None)
        if isinstance(stages, (nn.Sequential, nn.ModuleList)):
            return [f"{name}.{number}" for number, _ in stages.named_children()]
    names = [name for name, _ in model.named_children() if NUMBERED.fullmatch(name)]
    if not names:
        raise ValueError(
            f"the model {type(model).__name__} cannot be split: it has no list of stages "
            f"({', '.join(LISTS)}, or layer1, layer2 and so on)"
        )
    return names


def split(model: nn.Module, num_last: int, example: Tensor) -> tuple[Trunk, nn.Module]:
    """Splits a model in two: ``rest(trunk(images)) == model(images)``, bit for bit.

    Both parts share the model's layers: what is trained in the rest is trained in the model.

    Args:
        model: from ``build``.
        num_last: how many stages the rest has, with all that comes behind them; 0: the last layer
            alone, which takes pooled features.
        example: what the model sees, ``[b, C, H, W]``; both ways are tried with it.

    Returns:
        The trunk, and the rest.

    Raises:
        ValueError: the model cannot be split there.
    """
    if num_last == 0:
        name = last_layer_name(model)
        layer = cast(nn.Linear, model.get_submodule(name))
        before = _shallow(model)
        _leave_out(before, name)
        last = LastLayer(name, layer, getattr(model, "drop_rate", 0.0))
        parts: tuple[Trunk, nn.Module] = (Trunk(before, pools=True), last)
    else:
        names = stage_names(model)
        if not 1 <= num_last <= len(names):
            raise ValueError(
                f"{num_last} of its last stages: it must be from 0 to the number of the model's "
                f"stages ({len(names)})"
            )
        parts = _split_at(model, names, len(names) - num_last)
    _check_same(model, *parts, example)
    return parts


def last_layer_name(model: nn.Module) -> str:
    """The name of a model's last layer, which maps features to logits.

    Raises:
        ValueError: it has none, or it is no linear layer.
    """
    names = last_layer_names(model)
    if len(names) == 1 and isinstance(model.get_submodule(names[0]), nn.Linear):
        return names[0]
    raise ValueError(
        f"the model {type(model).__name__} has no linear layer as its last one, which takes its "
        "features"
    )


def last_layer_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that have a part for each class; of most models there is one."""
    if isinstance(model, nn.Sequential):
        return (str(len(model) - 1),)
    names: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the last layer of a model sees, ``[b, d]``, of images ``[b, C, H, W]``."""
    if isinstance(model, nn.Sequential):
        seen: Tensor = model[:-1](images)
        return seen
    whole: Any = model
    pooled: Tensor = whole.forward_head(whole.forward_features(images), pre_logits=True)
    return pooled


def _body(model: Any, images: Tensor) -> Tensor:
    made: Tensor = model.forward_features(images)
    return made


def _split_at(model: nn.Module, names: list[str], at: int) -> tuple[Trunk, nn.Module]:
    """The model without what comes behind the first ``at`` stages, and without what comes before.

    What a part is without is the identity there; children stand in the order of their use.
    """
    first_kept, last_kept = names[at].split(".")[0], names[max(0, at - 1)].split(".")[0]
    before, rest = _shallow(model), _shallow(model)
    children = [name for name, _ in model.named_children()]
    for name in children:
        if children.index(name) > children.index(last_kept):
            before._modules[name] = nn.Identity()
        if children.index(name) < children.index(first_kept):
            rest._modules[name] = nn.Identity()
    for number, name in enumerate(names):
        _leave_out(rest if number < at else before, name)
    # Such as a transformer's positions and class token, which are added before its blocks.
    rest._parameters = dict.fromkeys(model._parameters)
    return Trunk(before, pools=False), rest


def _leave_out(part: nn.Module, name: str) -> None:
    """Puts the identity in a layer's place, in this part alone."""
    *parents, own = name.split(".")
    for parent in parents:
        part._modules[parent] = _shallow(part.get_submodule(parent))
        part = part.get_submodule(parent)
    part._modules[own] = nn.Identity()


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with children that can be replaced."""
    other = copy(module)
    other._modules = dict(module._modules)
    return other


def _check_same(model: nn.Module, trunk: Trunk, rest: nn.Module, example: Tensor) -> None:
    """Tries the parts on an example.

    Raises:
        ValueError: they do not give what the model does.
    """
    was_training = model.training
    for part in (model, trunk, rest):
        part.eval()
    try:
        with torch.no_grad():
            same = torch.equal(rest(trunk(example)), model(example))
    except (RuntimeError, TypeError, AttributeError, AssertionError):
        same = False
    finally:
        for part in (model, trunk, rest):
            part.train(was_training)
    if not same:
        raise ValueError(
            f"the model {type(model).__name__} cannot be split there: its parts, one after the "
            "other, do not give what it gives"
        )
