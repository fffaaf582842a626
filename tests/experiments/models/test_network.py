"""The model as strategies see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.load import load
from ritornello.experiments.models.network import Network
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def network(digits: DataSet, **changes: Any) -> Network:
    recipe: Recipe = recipe_named("digits", **changes)
    torch.manual_seed(0)
    return Network(recipe, digits, Place(0, 1, torch.device("cpu")))


def test_stored_images_in_logits_out(digits: DataSet) -> None:
    images = digits.train.__getitems__(range(7))[0]
    made = network(digits)
    logits = made(images)
    mean, std = (torch.tensor(values)[:, None, None] for values in (digits.mean, digits.std))
    torch.testing.assert_close(logits, made.model((images.float() / 255 - mean) / std))
    assert [name for name, _ in made.named_parameters()] == [
        f"model.{name}" for name, _ in made.model.named_parameters()
    ]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_gives_float32_logits(digits: DataSet, amp: str) -> None:
    images = digits.train.__getitems__(range(7))[0]
    exact, mixed = network(digits)(images), network(digits, amp=amp)(images)
    assert mixed.dtype == torch.float32
    assert not torch.equal(exact, mixed)
    torch.testing.assert_close(exact, mixed, rtol=0.1, atol=0.05)


def test_augmentation_in_training_only(digits: DataSet) -> None:
    images = digits.train.__getitems__(range(7))[0]
    made = network(digits, augmentation="crop-flip")
    assert not torch.equal(made(images), made(images))
    made.eval()
    assert torch.equal(made(images), made(images))
    torch.testing.assert_close(made(images), network(digits)(images))


def test_features_are_what_the_last_layer_sees(digits: DataSet) -> None:
    images = digits.train.__getitems__(range(7))[0]
    made = network(digits, augmentation="crop-flip")
    features = made.features(images)
    assert features.shape == (7, 100)
    assert not features.requires_grad
    assert made.training
    made.eval()
    torch.testing.assert_close(made.model[-1](features), made(images))  # type: ignore[index,operator]


def test_channels_last(digits: DataSet) -> None:
    made = network(digits, model="small-cnn", channels_last=True)
    first = next(made.model.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last)
    images = digits.train.__getitems__(range(7))[0]
    plain = network(digits, model="small-cnn")(images)
    torch.testing.assert_close(made(images), plain, rtol=1e-3, atol=1e-4)


def test_the_average_follows_the_model(digits: DataSet) -> None:
    images = digits.test.__getitems__(range(9))[0]
    made = network(digits, averaged=0.75)
    [weight, *_] = made.model.parameters()
    values = []
    for value in (1.0, 3.0, -5.0):
        torch.nn.init.constant_(weight, value)
        made.follow_step()
        assert made.average is not None
        values.append(next(made.average.module.parameters()).mean().item())
    assert values == pytest.approx([1.0, 1.5, 1.5 * 0.75 - 5 * 0.25])
    made.eval()
    raw = made(images)
    with made.averaged():
        assert not torch.equal(made(images), raw)
    assert torch.equal(made(images), raw)
    assert [name for name, _ in made.named_parameters()] == [
        f"model.{name}" for name, _ in made.model.named_parameters()
    ]
    assert network(digits).average is None


def test_running_statistics_are_averaged_too(digits: DataSet) -> None:
    made = network(digits, averaged=0.5, model="resnet10t")
    images = digits.train.__getitems__(range(8))[0]
    means = []
    for _ in range(2):
        made(images)
        made.follow_step()
        means.append(dict(made.model.named_buffers())["bn1.running_mean"].clone())
    assert made.average is not None
    averaged = dict(made.average.module.named_buffers())["bn1.running_mean"]
    torch.testing.assert_close(averaged, (means[0] + means[1]) / 2)


def test_with_adapters_the_average_grows_too_and_what_is_frozen_stays_in_evaluation(
    digits: DataSet,
) -> None:
    images = digits.train.__getitems__(range(8))[0]
    changes = {"strategy": "adapter", "model": "test_efficientnet", "averaged": 0.5}
    made = network(digits, **changes, adapter_width=4)
    with torch.no_grad():
        assert made.eval()(images).unique().tolist() == [-1e4]  # no class has come yet
    made.grow(1, (0, 1))
    assert set(made(images).argmax(dim=1).tolist()) <= {0, 1}
    made.train()
    for _ in range(2):
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.requires_grad and "adapter" in name:
                    weight.add_(0.1)
        made(images)
        made.follow_step()
    made.eval()
    assert made.average is not None
    before = made(images)
    with made.averaged():
        averaged = made(images)
    made.grow(2)
    made.grow(1)  # which it has
    assert torch.equal(made(images), before)
    with made.averaged():
        assert torch.equal(made(images), averaged)
    assert not any(each.requires_grad for each in made.average.parameters())
    made.grow(2, (2, 3))
    for model in (made.model, made.average.module):
        assert (model.get_submodule("classifier").bias[4:] == -1e4).all()
        assert (model.get_submodule("classifier").bias[:4] > -1).all()
    blurred = network(digits, **changes, adapter_width=4, scenario="blurry")
    assert not blurred.eval()(images).any()
    [own, copied] = (
        [value for name, value in model.state_dict().items() if "adapter.down.1" in name]
        for model in (made.model, made.average.module)
    )
    assert len(own) == 2
    assert all(map(torch.equal, own, copied))
    counts = [v for k, v in made.model.named_buffers() if k.endswith("num_batches_tracked")]
    assert len(counts) > 5
    assert not any(counts)  # batch normalisation went by what it had, in training too
