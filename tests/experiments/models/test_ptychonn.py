from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ritornello.experiments.models import build as models


@pytest.mark.parametrize(("name", "channels"), [("ptychonn", 8), ("ptychonn-3", 3)])
def test_two_images_of_one(name: str, channels: int) -> None:
    model = models.build(name, 2 * 16 * 32, (1, 16, 32))
    convolutions = [each for each in model.encoder.modules() if isinstance(each, nn.Conv2d)]  # type: ignore[union-attr]
    assert [each.out_channels for each in convolutions] == [
        channels * 2**number for number in range(4) for _ in range(2)
    ]
    for decoder in (model.amplitude, model.phase):
        assert [each.in_channels for each in decoder.modules() if isinstance(each, nn.Conv2d)] == [  # type: ignore[union-attr]
            channels * each for each in (8, 8, 8, 4, 4, 2, 2, 1, 1)
        ]
    outputs = model(100 * torch.randn(3, 1, 16, 32))
    assert outputs.shape == (3, 2, 16, 32)
    assert outputs[:, 1].abs().max() <= math.pi + 1e-5


@pytest.mark.parametrize("name", ["ptychonn-", "ptychonn-0", "ptychonn-wide"])
def test_channels_that_are_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"model='{name}': behind 'ptychonn' stands the number"):
        models.build(name, 512, (1, 16, 16))


@pytest.mark.parametrize(
    ("num_outputs", "shape"), [(10, (1, 16, 16)), (512, (3, 16, 16)), (2 * 24 * 24, (1, 24, 24))]
)
def test_data_that_it_is_not_for(num_outputs: int, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="it makes two images of one, with one channel and sides"):
        models.build("ptychonn", num_outputs, shape)


def test_it_has_no_dropout() -> None:
    with pytest.raises(ValueError, match="the model 'ptychonn' has none"):
        models.build("ptychonn", 512, (1, 16, 16), dropout=0.1)
