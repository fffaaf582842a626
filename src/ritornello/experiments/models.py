"""Models by name: a small perceptron, a small convolutional network, and all of timm."""

from __future__ import annotations

from torch import nn


def build(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Builds an untrained model that maps images ``[b, C, H, W]`` to ``[b, num_classes]``.

    Args:
        name: "mlp", "small-cnn", or a model of timm such as "resnet18".
        num_classes: outputs.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: no such model.
    """
    if name == "mlp":
        return mlp(num_classes, image_shape)
    if name == "small-cnn":
        return small_cnn(num_classes, image_shape)
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(f"model={name!r}: there are 'mlp', 'small-cnn' and timm's models; {hint}")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=image_shape[0])
    return model


def mlp(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Two hidden layers of 100 units, as in Buzzega et al. (NeurIPS 2020) for Split MNIST."""
    channels, height, width = image_shape
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def small_cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
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
