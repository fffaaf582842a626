from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ritornello.experiments.models import build as models

SMALL = [
    ("mlp", (1, 28, 28), 100),
    ("mlp-400", (1, 28, 28), 400),
    ("small-cnn", (3, 32, 32), 512),
    ("small-cnn", (1, 8, 8), 512),
    ("halving-cnn", (3, 32, 32), 128 * 16),
    ("halving-cnn", (1, 28, 28), 128 * 16),
    ("halving-cnn", (3, 48, 48), 256 * 9),
    ("halving-cnn", (3, 64, 64), 256 * 16),
    ("halving-cnn", (1, 8, 8), 64 * 4),
    ("cifar-resnet18", (1, 16, 16), 512),
    ("resnet18", (1, 32, 32), 512),
    ("ghostnet_050", (3, 32, 32), 1280),
]


def num_parameters(name: str, num_classes: int, shape: tuple[int, int, int]) -> int:
    return sum(each.numel() for each in models.build(name, num_classes, shape).parameters())


@pytest.mark.parametrize(("name", "shape", "num_features"), SMALL)
def test_models_map_images_to_features_and_classes(
    name: str, shape: tuple[int, int, int], num_features: int
) -> None:
    model = models.build(name, 7, shape).eval()
    images = torch.rand(2, *shape)
    with torch.no_grad():
        logits, seen = model(images), models.features(model, images)
    assert logits.shape == (2, 7)
    assert seen.shape == (2, num_features)
    last = [each for each in model.modules() if isinstance(each, nn.Linear)][-1]
    assert torch.allclose(last(seen), logits, atol=1e-5)


def test_the_halving_cnn_is_the_strided_one_where_images_are_small() -> None:
    halving, strided = (
        [str(each) for each in models.build(name, 10, (3, 32, 32)).modules()][1:]
        for name in ("halving-cnn", "strided-cnn")
    )
    assert halving == strided


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["mlp", "resnet18"])
def test_features_of_a_wrapped_model(name: str, one_rank: None) -> None:
    model, images = models.build(name, 7, (1, 32, 32)).eval(), torch.rand(2, 1, 32, 32)
    expected = models.features(model, images)
    parallel = DistributedDataParallel(model)
    for wrapped in (
        parallel,
        torch.compile(model, backend="eager"),
        torch.compile(parallel, backend="eager"),
        DistributedDataParallel(torch.compile(model, backend="eager")),
    ):
        assert torch.equal(models.features(wrapped, images), expected)


def test_models_are_those_of_the_published_tables() -> None:
    def perceptron(hidden: int) -> int:
        return 784 * hidden + hidden + hidden * hidden + hidden + hidden * 10 + 10

    assert num_parameters("mlp", 10, (1, 28, 28)) == perceptron(100)
    assert num_parameters("mlp-400", 10, (1, 28, 28)) == perceptron(400)
    assert num_parameters("cifar-resnet18", 10, (3, 32, 32)) == 11_173_962
    assert num_parameters("cifar-resnet18", 100, (3, 32, 32)) == 11_220_132


def test_the_resnet_for_small_images_keeps_their_size() -> None:
    model = models.build("cifar-resnet18", 10, (3, 32, 32))
    assert model.forward_features(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    # As PyTorch initialises: no residual branch begins at zero, no weight is above its bound.
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all()
        if isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["cifar-resnet18", "ghostnet_050"])
def test_dropout_comes_before_the_last_layer_in_training(name: str) -> None:
    model, images = (
        models.build(name, 10, (3, 32, 32), dropout=0.225).eval(),
        torch.rand(8, 3, 32, 32),
    )
    with torch.no_grad():
        maps, kept = model.forward_features(images), models.features(model, images)
        seen = model.train().forward_head(maps, pre_logits=True)
    dropped = (seen == 0) & (kept != 0)
    # Of about 3000 features or more: beyond six standard deviations.
    assert abs(dropped.sum() / (kept != 0).sum() - 0.225) < 0.05
    assert torch.allclose(seen[~dropped], kept[~dropped] / 0.775, atol=1e-5)


@pytest.mark.parametrize("name", models.SEQUENTIAL)
def test_dropout_for_a_model_that_has_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"dropout=0.1: the model '{name}' has none; .* be 0"):
        models.build(name, 10, (1, 8, 8), dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_is_a_share(dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout={dropout}: it must be from 0 to below 1"):
        models.build("resnet18", 10, (1, 8, 8), dropout=dropout)


def test_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"model='ghostnet_05': .* did you mean ghostnet_050"):
        models.build("ghostnet_05", 10, (3, 32, 32))
    with pytest.raises(ValueError, match=r"'cifar-resnet18' and .* see timm.list_models\(\)"):
        models.build("no such thing", 10, (3, 32, 32))
