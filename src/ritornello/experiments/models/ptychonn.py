"""PtychoNN: from a diffraction pattern to the amplitude and the phase of the object behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NAME = "ptychonn"
CHANNELS = 8
"""Of the first convolution, if the model's name does not end with another number, as -32."""

NUM_HALVINGS = 4


class PtychoNN(nn.Module):
    """One encoder that halves the pattern four times, and a decoder for each part of the object.

    The weights are initialised as in He et al. (ICCV 2015): PyTorch's own make the signal smaller
    in each of the 17 layers that a pattern passes, and hundreds of steps learn nothing.

    Source: the authors' code of Bouvier et al. (Future Generation Computer Systems, 2025), where
    the first convolution has 32 channels.

    Args:
        channels: of the first convolution; each halving of the image doubles them.
    """

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_in = 1
        for number in range(NUM_HALVINGS):
            num_out = channels * 2**number
            layers += [*_convolutions(num_in, num_out), nn.MaxPool2d(2)]
            num_in = num_out
        self.encoder = nn.Sequential(*layers)
        self.amplitude, self.phase = _decoder(channels), _decoder(channels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, patterns: Tensor) -> Tensor:
        """Amplitude and phase (from -pi to pi), ``[b, 2, H, W]``, of patterns ``[b, 1, H, W]``."""
        seen = self.encoder(patterns)
        return torch.cat((self.amplitude(seen), math.pi * torch.tanh(self.phase(seen))), dim=1)


def is_ptychonn(name: str) -> bool:
    """Whether a model's name begins as these do."""
    return name == NAME or name.startswith(f"{NAME}-")


def ptychonn(name: str, num_outputs: int, image_shape: tuple[int, int, int]) -> PtychoNN:
    """The model of a name, such as "ptychonn" or "ptychonn-32".

    Raises:
        ValueError: the name ends with no number, or the data are none that it is for.
    """
    channels = name.removeprefix(NAME).removeprefix("-") or str(CHANNELS)
    if not channels.isdecimal() or int(channels) < 1 or name.endswith("-"):
        raise ValueError(
            f"model={name!r}: behind {NAME!r} stands the number of channels, as in {NAME}-32"
        )
    num_in, height, width = image_shape
    multiple = 2**NUM_HALVINGS
    if num_in != 1 or height % multiple or width % multiple or num_outputs != 2 * height * width:
        raise ValueError(
            f"model={name!r}: it makes two images of one, with one channel and sides that are "
            f"multiples of {multiple}, but here it would make {num_outputs} numbers of an image of "
            f"{height} x {width} with {num_in} channel{'s' * (num_in > 1)}: take data with "
            "diffraction patterns, as the recipe 'ptychography' does"
        )
    return PtychoNN(int(channels))


def _decoder(channels: int) -> nn.Sequential:
    num_in = channels * 2 ** (NUM_HALVINGS - 1)
    layers: list[nn.Module] = []
    for number in reversed(range(NUM_HALVINGS)):
        num_out = channels * 2**number
        upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        layers += [*_convolutions(num_in, num_out), upsample]
        num_in = num_out
    return nn.Sequential(*layers, nn.Conv2d(num_in, 1, 3, padding=1))


def _convolutions(num_in: int, num_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(num_in, num_out, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(num_out, num_out, 3, padding=1),
        nn.ReLU(),
    ]
