"""Models of timm in two parts, which give together what the model gives."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from ritornello.experiments.models.build import build
from ritornello.experiments.models.stages import split, stage_names

SMALL = {
    "test_efficientnet": "blocks.4",
    "mobilenetv3_small_050": "blocks.5",
    "test_vit": "blocks.5",
    "test_resnet": "layer4",
    "regnetx_002": "s4",
    "test_convnext": "stages.3",
}

IMAGES, SQUARES = (torch.linspace(-1, 1, 6 * side**2).view(2, 3, side, side) for side in (96, 224))


@pytest.fixture(params=SMALL)
def model(request):
    return timm.create_model(request.param, num_classes=7).eval()


@pytest.fixture
def images(model):
    return torch.randn(3, *model.pretrained_cfg["input_size"], generator=torch.Generator())


def test_the_last_stage_is_named_as_in_the_model(model):
    names = stage_names(model)

    assert names[-1] in SMALL.values()
    assert all(model.get_submodule(name) is not None for name in names)


def test_the_parts_give_what_the_model_gives(model, images):
    num_stages = len(stage_names(model))
    with torch.no_grad():
        whole = model(images)
        for num_last in (0, 1, num_stages):
            trunk, rest = split(model, num_last, images)
            assert torch.equal(rest(trunk(images)), whole)


def test_each_tensor_is_in_one_part_under_its_own_name(model, images):
    for num_last in (0, 2):
        trunk, rest = split(model, num_last, images)
        assert sorted([*trunk.state_dict(), *rest.state_dict()]) == sorted(model.state_dict())
    last = split(model, 0, images)[1]
    assert [name.rpartition(".")[0] for name in last.state_dict()] == [
        model.pretrained_cfg["classifier"]
    ] * 2


def test_the_rest_takes_features_where_it_is_the_last_layer_alone(model, images):
    trunk, rest = split(model, 0, images)

    with torch.no_grad():
        seen = trunk(images)

    assert seen.shape == (3, model.head_hidden_size)
    assert rest(seen).shape == (3, 7)


def test_what_is_trained_in_the_rest_is_trained_in_the_model():
    model = timm.create_model("test_efficientnet", num_classes=7)
    _, rest = split(model, 1, IMAGES)

    with torch.no_grad():
        for parameter in rest.parameters():
            parameter.zero_()

    assert not model.conv_head.weight.any()
    assert model.conv_stem.weight.any()


def test_dropout_before_the_last_layer_stays_with_it():
    model = timm.create_model("test_efficientnet", num_classes=7, drop_rate=0.5)
    _, rest = split(model, 0, IMAGES)
    features = torch.ones(64, rest.state_dict()["classifier.weight"].shape[1])

    assert rest.train()(features).std(0).max() > 0
    assert rest.eval()(features).std(0).max() == 0


@pytest.mark.parametrize("name", ["small-cnn", "strided-cnn", "halving-cnn", "mlp"])
def test_the_library_s_own_models_are_split_before_their_last_layer(name):
    model = build(name, 7, (3, 32, 32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator())

    trunk, rest = split(model, 0, images)

    assert torch.equal(rest(trunk(images)), model(images))
    assert list(rest.state_dict()) == [f"{len(model) - 1}.weight", f"{len(model) - 1}.bias"]


@pytest.mark.parametrize(
    ("name", "num_last", "message"),
    [
        ("densenet121", 1, "DenseNet cannot be split: it has no list of stages"),
        ("resnet18", 5, r"5 of its last stages: it must be from 0 to the number of .* \(4\)"),
        ("levit_128s", 0, "LevitDistilled has no linear layer as its last one"),
        ("levit_128s", 1, "LevitDistilled cannot be split there: its parts"),
    ],
)
def test_refusals(name, num_last, message):
    model = timm.create_model(name, num_classes=7)

    with pytest.raises(ValueError, match=message):
        split(model, num_last, SQUARES)


def test_a_model_in_training_stays_so():
    model = timm.create_model("test_resnet", num_classes=7).train()

    split(model, 1, IMAGES)

    assert all(each.training for each in model.modules() if not isinstance(each, nn.Identity))
