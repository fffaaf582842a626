"""Models by name: perceptrons, a small convolutional network, a ResNet for small images, timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritornello.experiments.models import stages
from ritornello.experiments.models.ptychonn import NAME, is_ptychonn, ptychonn


def build(
    name: str, num_classes: int, image_shape: tuple[int, int, int], dropout: float = 0.0
) -> nn.Module:
    """Builds an untrained model that maps images ``[b, C, H, W]`` to ``[b, num_classes]``.

    Args:
        name: one of ``OWN``, or a model of timm such as "resnet18".
        num_classes: outputs; also the numbers of a target that is a tensor.
        image_shape: ``(C, H, W)``.
        dropout: the share of features that are dropped before the last layer, in training.

    Raises:
        ValueError: no such model, or dropout for a model that has none.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it must be from 0 to below 1")
    if name == "cifar-resnet18":
        return cifar_resnet18(num_classes, image_shape, dropout)
    if dropout and (name in SEQUENTIAL or is_ptychonn(name)):
        raise ValueError(f"dropout={dropout}: the model {name!r} has none; it must be 0")
    if is_ptychonn(name):
        return ptychonn(name, num_classes, image_shape)
    if name in SEQUENTIAL:
        return SEQUENTIAL[name](num_classes, image_shape)
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(
            f"model={name!r}: there are {', '.join(map(repr, OWN))} and timm's models; {hint}"
        )
    model: nn.Module = timm.create_model(
        name, num_classes=num_classes, in_chans=image_shape[0], drop_rate=dropout
    )
    return model


def mlp(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Two hidden layers of 100 units, as in Buzzega et al. (NeurIPS 2020) for Split MNIST."""
    model = _perceptron(num_classes, image_shape, 100)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def mlp_400(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Two hidden layers of 400 units, as in van de Ven et al. (Nature Machine Intelligence 2022).

    The weights are as PyTorch initialises them.
    """
    return _perceptron(num_classes, image_shape, 400)


def _perceptron(
    num_classes: int, image_shape: tuple[int, int, int], num_units: int
) -> nn.Sequential:
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, num_units),
        nn.ReLU(),
        nn.Linear(num_units, num_units),
        nn.ReLU(),
        nn.Linear(num_units, num_classes),
    )


def small_cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Three convolutions that halve the image, made to be fast on a CPU.

    Group normalisation: running statistics of a batch normalisation would follow the newest
    task and forget the others.
    """

    def block(num_in: int, num_out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.GroupNorm(8, num_out),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(image_shape[0], 32),
        *block(32, 64),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


def strided_cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Three convolutions that halve the image as they go: a quarter of ``small_cnn``'s time.

    For images whose height and width are multiples of 8. Group normalisation as there.
    """

    def block(num_in: int, num_out: int, size: int) -> list[nn.Module]:
        return [
            nn.Conv2d(num_in, num_out, size, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, num_out),
            nn.ReLU(),
        ]

    channels, height, width = image_shape
    return nn.Sequential(
        *block(channels, 32, 4),
        *block(32, 64, 3),
        *block(64, 128, 3),
        nn.Flatten(),
        nn.Linear(128 * (height // 8) * (width // 8), num_classes),
    )


def halving_cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """As many convolutions that halve the image as leave at most 4 x 4 of it, and at least two.

    For images of 32 x 32 it is ``strided_cnn``; one of 64 x 64 passes one convolution more.
    """
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    num_in, num_out, size = channels, 32, 4
    while max(height, width) > 4 or len(layers) < 6:
        layers += [
            nn.Conv2d(num_in, num_out, size, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, num_out),
            nn.ReLU(),
        ]
        height, width = ((side + 2 - size) // 2 + 1 for side in (height, width))
        num_in, num_out, size = num_out, min(2 * num_out, 256), 3
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(num_in * height * width, num_classes))


def cifar_resnet18(
    num_classes: int, image_shape: tuple[int, int, int], dropout: float = 0.0
) -> nn.Module:
    """The ResNet-18 for small images of Buzzega et al. (NeurIPS 2020), and of most others.

    The first convolution is 3 x 3 with stride 1, and no pooling follows: images of 32 x 32 would
    otherwise be 8 x 8 before the first block. The weights are as PyTorch initialises them, as in
    their code; timm would make the residual branches zero.
    """
    import timm

    model: nn.Module = timm.create_model(
        "resnet18", num_classes=num_classes, drop_rate=dropout, zero_init_last=False
    )
    model.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return model


SEQUENTIAL: dict[str, Callable[[int, tuple[int, int, int]], nn.Sequential]] = {
    "mlp": mlp,
    "mlp-400": mlp_400,
    "small-cnn": small_cnn,
    "strided-cnn": strided_cnn,
    "halving-cnn": halving_cnn,
}

OWN = (*SEQUENTIAL, NAME, "cifar-resnet18")
"""Models that are not timm's."""


def widened(old: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a trained model, for the same one with further classes.

    What a layer has for each class is as it was, bit by bit, for the old ones; for the further
    ones it is that of the fresh model.

    Args:
        old: the trained model's ``state_dict``.
        fresh: that of the model with further classes, untrained.

    Raises:
        ValueError: they are not of the same model.
    """
    odd = set(old) ^ set(fresh)
    odd |= {
        name
        for name in set(old) & set(fresh)
        if old[name].shape[1:] != fresh[name].shape[1:]
        or old[name].shape[:1] > fresh[name].shape[:1]
    }
    if odd:
        raise ValueError(f"the weights are those of another model: see {min(odd)}")
    return {
        name: torch.cat([own.to(new.device), new[len(own) :]]) if own.shape != new.shape else own
        for (name, new), own in zip(fresh.items(), (old[each] for each in fresh), strict=True)
    }


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the last layer of a model sees.

    It is computed as the model stands: call ``model.eval()`` first, and use ``torch.no_grad()``.

    Args:
        model: from ``build``; also compiled, or made parallel.
        images: ``[b, C, H, W]``.

    Returns:
        ``[b, d]``.
    """
    plain: Any = model
    while isinstance(plain, DistributedDataParallel) or hasattr(plain, "_orig_mod"):
        is_parallel = isinstance(plain, DistributedDataParallel)
        plain = plain.module if is_parallel else plain._orig_mod  # else torch.compile's
    return stages.features(plain, images)
