from __future__ import annotations

import pytest
import torch

from ritornello.experiments import models


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (1, 28, 28)),
        ("small-cnn", (3, 32, 32)),
        ("small-cnn", (1, 8, 8)),
        ("resnet18", (1, 32, 32)),
    ],
)
def test_models_map_images_to_classes(name: str, shape: tuple[int, int, int]) -> None:
    model = models.build(name, 7, shape)
    assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_the_mlp_is_that_of_the_published_table() -> None:
    parameters = sum(each.numel() for each in models.build("mlp", 10, (1, 28, 28)).parameters())
    assert parameters == 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10


def test_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"model='ghostnet_05': .* did you mean ghostnet_050"):
        models.build("ghostnet_05", 10, (3, 32, 32))
    with pytest.raises(ValueError, match=r"see timm.list_models\(\)"):
        models.build("no such thing", 10, (3, 32, 32))
